"""The same for images, layers with weights, recurrences and products."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from operation_cases import IMAGE, SIGNAL, add, constant
from torch import Tensor

# -- images ------------------------------------------------------------------------------------------------------------

VOLUME = (2, 4, 5, 4)
for _name, _run, _shape in [
    ("max_pool1d", lambda x: F.max_pool1d(x, 3, 2, 1), SIGNAL), ("max_pool2d", lambda x: F.max_pool2d(x, 2, padding=1, ceil_mode=True), IMAGE), ("max_pool2d", lambda x: F.max_pool2d(x, 2, 1, dilation=2), IMAGE), ("max_pool3d", lambda x: F.max_pool3d(x, 2), VOLUME),
    ("avg_pool1d", lambda x: F.avg_pool1d(x, 3, 2, 1, count_include_pad=False), SIGNAL), ("avg_pool2d", lambda x: F.avg_pool2d(x, (2, 3), 2, 1, ceil_mode=True, count_include_pad=False), IMAGE), ("avg_pool2d", lambda x: F.avg_pool2d(x, 2, divisor_override=3), IMAGE),
    ("avg_pool3d", lambda x: F.avg_pool3d(x, 2), VOLUME), ("adaptive_avg_pool1d", lambda x: F.adaptive_avg_pool1d(x, 3), SIGNAL), ("adaptive_avg_pool2d", lambda x: F.adaptive_avg_pool2d(x, (2, 3)), IMAGE), ("adaptive_avg_pool2d", lambda x: F.adaptive_avg_pool2d(x, (1, None)), IMAGE),
    ("adaptive_avg_pool3d", lambda x: F.adaptive_avg_pool3d(x, 2), VOLUME), ("adaptive_max_pool1d", lambda x: F.adaptive_max_pool1d(x, 3), SIGNAL), ("adaptive_max_pool2d", lambda x: F.adaptive_max_pool2d(x, (2, 3)), IMAGE), ("adaptive_max_pool3d", lambda x: F.adaptive_max_pool3d(x, 2), VOLUME),
    ("pixel_shuffle", lambda x: F.pixel_shuffle(x, 2), IMAGE), ("pixel_unshuffle", lambda x: F.pixel_unshuffle(x, 2), (4, 4, 6)), ("channel_shuffle", lambda x: F.channel_shuffle(x, 2), IMAGE), ("im2col", lambda x: F.unfold(x, (2, 3), padding=1), IMAGE),
    ("col2im", lambda x: F.fold(x.flatten(2), (3, 4), 2, stride=1), (4, 2, 3)), ("pad", lambda x: F.pad(x, (1, 2), mode="reflect"), SIGNAL), ("pad", lambda x: F.pad(x, (1, 2, 0, 1), mode="reflect"), IMAGE),
    ("pad", lambda x: F.pad(x, (1, 2), mode="replicate"), SIGNAL), ("pad", lambda x: F.pad(x, (1, 2, 0, 1), mode="replicate"), IMAGE), ("pad", lambda x: F.pad(x, (1, 1, 1, 1, 0, 1), mode="reflect"), VOLUME),
    ("pad", lambda x: F.pad(x, (1, 1, 1, 1, 0, 1), mode="replicate"), VOLUME), ("pad", lambda x: F.pad(x, (1, 0, 2, 1), mode="circular"), IMAGE), ("constant_pad_nd", lambda x: F.pad(x, (1, 0), value=0.5), IMAGE), ("constant_pad_nd", lambda x: F.pad(x, (0, 0, 0, 0, 1, 2)), IMAGE),
    ("upsample_nearest1d.vec", lambda x: F.interpolate(x, scale_factor=2), SIGNAL), ("upsample_nearest2d.vec", lambda x: F.interpolate(x, size=(7, 9)), IMAGE), ("upsample_nearest2d.vec", lambda x: F.interpolate(x, scale_factor=2), IMAGE),
    ("upsample_bilinear2d.vec", lambda x: F.interpolate(x, scale_factor=(2, 1.5), mode="bilinear", align_corners=True), IMAGE), ("upsample_bilinear2d.vec", lambda x: F.interpolate(x, size=(3, 3), mode="bilinear"), IMAGE),
    ("upsample_bicubic2d.vec", lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"), IMAGE), ("upsample_linear1d.vec", lambda x: F.interpolate(x, scale_factor=2, mode="linear"), SIGNAL), ("upsample_nearest3d.vec", lambda x: F.interpolate(x, scale_factor=2), VOLUME),
    ("upsample_trilinear3d.vec", lambda x: F.interpolate(x, scale_factor=2, mode="trilinear"), VOLUME),
    ("max_pool2d_with_indices", lambda x: F.max_pool2d(x, 2, return_indices=True)[0], IMAGE), ("max_unpool2d", lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2), (4, 6, 6)), ("lp_pool2d", lambda x: F.lp_pool2d(x.abs(), 2, 2), IMAGE),
    ("local_response_norm", lambda x: F.local_response_norm(x, 3), IMAGE), ("_upsample_bilinear2d_aa.vec", lambda x: F.interpolate(x, size=(3, 3), mode="bilinear", antialias=True), IMAGE),
    ("_upsample_nearest_exact1d.vec", lambda x: F.interpolate(x, size=9, mode="nearest-exact"), SIGNAL), ("_upsample_nearest_exact2d.vec", lambda x: F.interpolate(x, size=(7, 9), mode="nearest-exact"), IMAGE),
    ("_upsample_nearest_exact3d.vec", lambda x: F.interpolate(x, scale_factor=2, mode="nearest-exact"), VOLUME), ("_upsample_bicubic2d_aa.vec", lambda x: F.interpolate(x, size=(3, 3), mode="bicubic", antialias=True), IMAGE),
]:  # fmt: skip
    add(_name, _run, _shape, fronts="mcs")
# images without an axis of queries: torch takes the queries for channels
add("max_pool1d", lambda x: F.max_pool1d(x, 2), (6,), fronts="ms")
add("avg_pool1d", lambda x: F.avg_pool1d(x.mean(-1), 2), (5, 6), fronts="c")
add("max_pool2d", lambda x: F.max_pool2d(x, 2), (5, 6), fronts="mcs")
add("adaptive_avg_pool1d", lambda x: F.adaptive_avg_pool1d(x.mean((-1, -2)), 3), (5, 3, 2), fronts="mc")
add("upsample_bilinear2d.vec", lambda x, w: F.interpolate(w, size=(5, 6), mode="bilinear") * x, IMAGE, (1, 4, 2, 3), fronts="mcs")
add("upsample_bicubic2d.vec", lambda x, w: F.interpolate(w, size=(5, 6), mode="bicubic") + x, IMAGE, (1, 4, 3, 3), fronts="mcs")
add("pixel_shuffle", lambda x, w: F.pixel_shuffle(w, 2) + x, (1, 4, 6), (4, 2, 3), fronts="mcs")
add("avg_pool2d", lambda x, w: F.avg_pool2d(w, 2) + x, (2, 2, 3), (2, 4, 6), fronts="mcs")

# -- layers with weights -----------------------------------------------------------------------------------------------

add("linear", lambda x, w, b: F.linear(x, w, b), (6,), (4, 6), (4,), fronts="ms")
add("linear", lambda x, w: F.linear(x, w), (3, 2, 6), (5, 6), fronts="mcs")
add("linear", lambda x, w: F.linear(x, w), (6,), (6,), fronts="ms")  # a single row
add("linear", lambda x, b: F.linear(x, constant(x, 4, 6), b), (6,), (4,), fronts="ms")
add("linear", lambda x: F.linear(x, constant(x, 4, 6), constant(x, 4)), (6,), fronts="ms")
add("linear", lambda x, w: F.linear(x, w, constant(x, 4)), (6,), (4, 6), fronts="ms")
add("linear", lambda x, w, v: F.linear(x, F.linear(w, v.t())), (6,), (4, 2), (2, 6), fronts="ms")  # low-rank factors
for _d, _shape in ((1, SIGNAL), (2, IMAGE), (3, VOLUME)):
    conv, transposed = getattr(F, f"conv{_d}d"), getattr(F, f"conv_transpose{_d}d")
    c, one = _shape[0], (2,) * _d
    three = (3,) * _d
    add(f"conv{_d}d", lambda x, w, b, f=conv: f(x, w, b, 2, 1), _shape, (3, c, *three), (3,), fronts="mcs")
    add(f"conv{_d}d", lambda x, w, b, f=conv: f(x, w, b, groups=2), _shape, (6, c // 2, *one), (6,), fronts="mcs")
    add(f"conv{_d}d", lambda x, w, f=conv, g=c: f(x, w, padding=1, groups=g), _shape, (c, 1, *three), fronts="mcs")
    add(f"conv{_d}d", lambda x, w, f=conv: f(x, w, dilation=2, padding=2), _shape, (1, c, *three), fronts="mcs")
    add(
        f"conv{_d}d", lambda x, w, f=conv, s=(2, c, *one): f(x, constant(x, *s), w), _shape, (2,), fronts="mcs"
    )  # a fixed filter, an offset a model
    add(f"conv{_d}d", lambda x, f=conv, s=(2, c, *one): f(x, constant(x, *s)), _shape, fronts="mcs")
    add(f"conv{_d}d", lambda x, f=conv, s=(c, 1, *one), g=c: f(x, constant(x, *s), constant(x, g), groups=g), _shape, fronts="mcs")
    add(f"conv{_d}d.padding", lambda x, w, f=conv: f(x, w, padding="same"), _shape, (3, c, *one), fronts="mcs")
    add(f"conv{_d}d", lambda x, w, f=conv: f(x, w, padding="same"), _shape, (3, c, *three), fronts="mcs")
    name = f"conv_transpose{_d}d" + ("" if _d == 1 else ".input")
    add(name, lambda x, w, b, f=transposed: f(x, w, b, 2, 1, 1), _shape, (c, 3, *three), (3,), fronts="mcs")
    add(name, lambda x, w, f=transposed: f(x, w, groups=2, dilation=2), _shape, (c, 2, *one), fronts="mcs")
    add(name, lambda x, f=transposed, s=(c, 2, *one): f(x, constant(x, *s)), _shape, fronts="mcs")
add("conv2d", lambda x, w, v: F.conv2d(v, w).expand(len(x), -1, -1, -1), (2,), (2, 3, 2, 2), (1, 3, 4, 5), fronts="m")  # of a learned image
add("conv2d", lambda x, w, v: F.conv2d(v, w).expand(len(x), -1, -1, -1), (2,), (2, 3, 2, 2), (3, 4, 5), fronts="m")
add("conv1d", lambda x, w: F.conv1d(x[:, 0].t(), w).t(), (1, 4), (2, 4, 1), fronts="ms")  # without an axis of queries
add("conv2d", lambda x, w: F.conv2d(x, w.view(3, 4, 1, 1) / w.norm(dim=1)[:, None, None, None]), IMAGE, (3, 4), fronts="mcs")

for _shape in ((6,), SIGNAL, IMAGE, VOLUME):
    c = _shape[0]
    _fronts = "ms" if len(_shape) == 1 else "mcs"
    add("prelu", F.prelu, _shape, (c,), fronts=_fronts)
    add("prelu", F.prelu, _shape, (1,), fronts=_fronts)
    add("group_norm", lambda x, w, b: F.group_norm(x, 2, w, b), _shape, (c,), (c,), fronts=_fronts)
    add("group_norm", lambda x: F.group_norm(x, 1), _shape, fronts=_fronts)
    add(
        "batch_norm",
        lambda x, w, b: F.batch_norm(x, constant(x, x.shape[1]), constant(x, x.shape[1]).abs() + 0.5, w, b),
        _shape,
        (c,),
        (c,),
        fronts=_fronts,
    )
    add("batch_norm", lambda x, w: F.batch_norm(x, w, w.exp()), _shape, (c,), fronts=_fronts)
    if len(_shape) > 1:
        add("instance_norm", lambda x, w, b: F.instance_norm(x, None, None, w, b, eps=1e-2), _shape, (c,), (c,), fronts="mcs")
        add("instance_norm", lambda x: F.instance_norm(x, None, None, eps=1e-2), _shape, fronts="mcs")
        add("instance_norm", lambda x, w, b: F.instance_norm(x, b, b.exp(), w, b, use_input_stats=False), _shape, (c,), (c,), fronts="mcs")
add("prelu", lambda x: F.prelu(x, constant(x, 4)), IMAGE, fronts="mcs")
for _name, _f in {"layer_norm": F.layer_norm, "rms_norm": F.rms_norm}.items():
    add(_name, lambda x, w, f=_f: f(x, (6,), w, eps=1e-2), (6,), (6,), fronts="ms")
    add(_name, lambda x, w, f=_f: f(x, (5, 6), w, eps=1e-2), IMAGE, (5, 6), fronts="mcs")
    add(_name, lambda x, f=_f: f(x, IMAGE, eps=1e-2), IMAGE, fronts="mcs")
    add(_name, lambda x, f=_f: f(x, (6,), constant(x, 6), eps=1e-2), IMAGE, fronts="mcs")
add("layer_norm", lambda x, w, b: F.layer_norm(x, (6,), w, b), (3, 6), (6,), (6,), fronts="ms")
add("rms_norm", lambda x, w: F.rms_norm(x, (6,), w), (3, 6), (6,), fronts="ms")


def indices(x: Tensor, most: int) -> Tensor:
    return (10 * x).long() % most


add("embedding", lambda x, w: F.embedding(indices(x, 5), w), (4,), (5, 3), fronts="ms")
add("embedding", lambda x, w: F.embedding(indices(x, 5), w, padding_idx=2), (2, 3), (5, 3), fronts="ms")
add("embedding", lambda x: F.embedding(indices(x, 5), constant(x, 5, 3)), (4,), fronts="ms")
add("embedding", lambda x, w: F.embedding(torch.arange(4), w) + x.unsqueeze(-1), (4,), (5, 3), fronts="ms")

# -- recurrent ---------------------------------------------------------------------------------------------------------


def _recurrent(
    kind: str, gates: int, layers: int, both: bool, biases: bool, first: bool, learned: bool, width: int = 3, project: int = 0
) -> None:
    out = project or width
    shapes: list[tuple[int, ...]] = []
    for layer in range(layers):
        for _ in range(1 + both):
            shapes += [(gates * width, 2 if layer == 0 else out * (1 + both)), (gates * width, out)]
            shapes += [(gates * width,)] * 2 if biases else []
            shapes += [(project, width)] if project else []
    states = [(layers * (1 + both), 1, size) for size in ((out, width) if kind == "lstm" else (out,))]

    def run(x: Tensor, *w: Tensor) -> Any:
        n = len(x)
        held = [s.expand(-1, n, -1) for s in w[len(shapes) :]] if learned else [torch.zeros(s[0], n, s[2]).to(x) for s in states]
        x = x if first else x.transpose(0, 1)
        made = getattr(torch, kind)(x, held if kind == "lstm" else held[0], list(w[: len(shapes)]), biases, layers, 0.0, False, both, first)
        return (made[0] if first else made[0].transpose(0, 1), *(m.transpose(0, 1) for m in made[1:]))

    add(f"{kind}.input", run, (4, 2), *shapes, *(states if learned else []), fronts="ms")


for _kind, _gates in {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}.items():
    _recurrent(_kind, _gates, 1, False, True, True, False)
    _recurrent(_kind, _gates, 2, True, False, False, True)
_recurrent("lstm", 4, 2, True, True, True, True, width=4, project=3)
_recurrent("lstm", 4, 1, False, False, True, False, width=4, project=3)

# -- products ----------------------------------------------------------------------------------------------------------

add("matmul", lambda x, w: x @ w, (6,), (6, 4), fronts="ms")
add("matmul", lambda x, w: (w @ x.t()).t(), (6,), (4, 6), fronts="ms")  # queries last
add("matmul", lambda x, w: x @ w, (6,), (6,), fronts="ms")
add("matmul", lambda x, w: (x @ w).flatten(1), (2, 3, 6), (6, 4), fronts="mcs")
add("matmul", lambda x, w: w @ x, (2, 3, 6), (2, 4, 3), fronts="mcs")
add("matmul", lambda x: x @ x.transpose(-1, -2), (3, 6), fronts="mcs")
add("matmul", lambda x: x @ constant(x, 6, 3), (3, 6), fronts="mcs")
add("matmul", lambda x, w: x @ (w @ w.t()), (3,), (3, 4), fronts="ms")
add("matmul", lambda x, w: constant(x, 3, 4) @ w @ x.unsqueeze(-1), (2,), (4, 2), fronts="ms")
add("mm", lambda x, w: torch.mm(x, w), (6,), (6, 4), fronts="ms")
add("bmm", lambda x, w: torch.bmm(x, w.expand(len(x), -1, -1)), (3, 6), (6, 4), fronts="ms")
add("mv", lambda x, w: torch.mv(x, w), (6,), (6,), fronts="ms")
add("dot", lambda x, w: torch.dot(w, w) * x, (6,), (6,), fronts="ms")
add("addmm", lambda x, w, b: torch.addmm(b, x, w, beta=0.5, alpha=2), (6,), (6, 4), (4,), fronts="ms")
add("addmm", lambda x, b: torch.addmm(b, x, constant(x, 6, 4)), (6,), (4,), fronts="ms")
add("addmm", lambda x, w: torch.addmm(constant(x, 4), x, w), (6,), (6, 4), fronts="ms")
add("baddbmm", lambda x, w, b: torch.baddbmm(b, x, w.expand(len(x), -1, -1)), (3, 6), (6, 4), (1, 3, 4), fronts="ms")
add("baddbmm", lambda x, b: torch.baddbmm(b, x, constant(x, 6, 4).expand(len(x), 6, 4)), (3, 6), (4,), fronts="ms")


def _heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (2, 3)).transpose(1, 2)


attend = F.scaled_dot_product_attention
add("scaled_dot_product_attention", lambda x, w: attend(_heads(x), _heads(x * w), _heads(x)), (4, 6), (6,), fronts="ms")
add(
    "scaled_dot_product_attention",
    lambda x, w: attend(_heads(x), _heads(x * w), _heads(x), is_causal=True, scale=0.7),
    (4, 6),
    (6,),
    fronts="ms",
)
add(
    "scaled_dot_product_attention",
    lambda x, w: attend(_heads(x), _heads(x), _heads(x * w), attn_mask=w.expand(4, 4)),
    (4, 6),
    (4, 1),
    fronts="ms",
)
add(
    "scaled_dot_product_attention",
    lambda x: attend(_heads(x), _heads(x), _heads(x), attn_mask=torch.ones(4, 4, dtype=torch.bool).tril()),
    (4, 6),
    fronts="ms",
)
add(
    "scaled_dot_product_attention", lambda x: attend(x, x, x, attn_mask=(x[:, None, :, 0] > -0.3)), (4, 6), fronts="ms"
)  # some rows see nothing
add("scaled_dot_product_attention", lambda x, w: attend(w.expand(len(x), -1, -1), x, x), (4, 6), (1, 2, 6), fronts="ms")
add("scaled_dot_product_attention", lambda x, w: attend(x, w, w), (4, 6), (5, 6), fronts="ms")  # a learned memory
add(
    "scaled_dot_product_attention",
    lambda x: attend(x.view(-1, 4, 2, 3), x.view(-1, 4, 2, 3)[:, :2], x.view(-1, 4, 2, 3)[:, :2], enable_gqa=True),
    (4, 6),
    fronts="ms",
)
add("einsum", lambda x, w: torch.einsum("nij,jk->nik", x, w), (3, 6), (6, 4), fronts="ms")
add("einsum", lambda x, w: torch.einsum("nij,nkj,k->nik", x, x, w), (3, 6), (3,), fronts="ms")
add("bilinear", lambda x, w, b: F.bilinear(x, x.sin(), w, b), (6,), (4, 6, 6), (4,), fronts="ms")
add("index.Tensor", lambda x, w: w[indices(x, 5)], (4,), (5, 3), fronts="ms")
add("index.Tensor", lambda x: x[:, torch.tensor([3, 0, 1])], (4,), fronts="ms")
add("index.Tensor", lambda x: x[:, :, torch.tensor([[1], [0]]), torch.tensor([2, 0])], IMAGE, fronts="mcs")
add("index.Tensor", lambda x, w: w[:, torch.arange(4), torch.tensor([0, 2, 1, 2])] + x, (4,), (1, 4, 3), fronts="ms")
add("index_select", lambda x: x.index_select(1, torch.tensor([3, 0, 1])), (4,), fronts="ms")
add("index_select", lambda x, w: w.index_select(0, torch.tensor([3, 0])) + x[:, :1], (4,), (5,), fronts="ms")
add("gather", lambda x: x.gather(1, indices(x, 4)), (4,), fronts="ms")
add("gather", lambda x, w: w.expand(len(x), -1).gather(1, indices(x, 4)), (4,), (4,), fronts="ms")
add("cosine_similarity", lambda x, w: F.cosine_similarity(x, w, -1), (3, 6), (3, 6), fronts="ms")
add("pairwise_distance", lambda x, w: F.pairwise_distance(x, w), (3, 6), (3, 6), fronts="ms")
add("cdist", lambda x, w: torch.cdist(x, w), (3, 6), (4, 6), fronts="ms")
add("cdist", lambda x, w: torch.cdist(x, w), (6,), (4, 6), fronts="ms")  # a radial basis
add("outer", lambda x, w: torch.outer(w, w[:2]).flatten() * x, (6,), (3,), fronts="ms")
add("kron", lambda x, w: torch.kron(w, w).reshape(-1) * x, (6 * 6,), (2, 3), fronts="ms")
add(
    "grid_sampler",
    lambda x, w: F.grid_sample(x, F.affine_grid(w.expand(len(x), 2, 3), [len(x), 2, 4, 4], align_corners=False), align_corners=False),
    (2, 4, 4),
    (1, 2, 3),
    fronts="mcs",
)
add("linalg_matrix_norm.str_ord", lambda x, w: x / torch.linalg.matrix_norm(w), (6,), (4, 6), fronts="ms")
add("linalg_matrix_norm", lambda x, w: x / torch.linalg.matrix_norm(w, 1), (6,), (4, 6), fronts="ms")
add("mT", lambda x, w: x.mT @ w, (3, 6), (3, 2), fronts="ms")
add("numpy_T", lambda x, w: x @ w.T, (6,), (4, 6), fronts="ms")
add("t", lambda x, w: x @ w.t(), (6,), (4, 6), fronts="ms")
add("searchsorted.Tensor", lambda x: torch.searchsorted(torch.arange(5).to(x.dtype) / 4 - 0.5, x), (6,), fronts="ms")
add("one_hot", lambda x: F.one_hot(indices(x, 5), 5), (4,), fronts="ms")
add("scatter.src", lambda x: torch.zeros_like(x).scatter(1, indices(x, 4).argsort(1), x), (4,), fronts="ms")
add("index_add", lambda x: torch.zeros_like(x).index_add(1, torch.tensor([0, 2, 2, 1]), x), (4,), fronts="ms")
add("scatter.value", lambda x: x.scatter(1, indices(x, 4), 0.5), (4,), fronts="ms")
add("scatter_add", lambda x: torch.zeros_like(x).scatter_add(1, indices(x, 4), x), (4,), fronts="ms")
add("index_copy", lambda x: x.index_copy(1, torch.tensor([3, 0]), x[:, 1:3]), (4,), fronts="ms")
add("index_fill.int_Scalar", lambda x: x.index_fill(1, torch.tensor([3, 0]), 0.7), (4,), fronts="ms")
add("index_put", lambda x: torch.index_put(x.t(), (torch.tensor([3, 0]),), x.t()[1:3]).t(), (4,), fronts="ms")
add("slice_scatter", lambda x: x.slice_scatter(x[..., :2].sin(), -1, 2, 4), IMAGE, fronts="mcs")
add("slice_scatter", lambda x, w: x.slice_scatter(w.expand(len(x), -1), 1, 1, 3), (4,), (1, 2), fronts="ms")
add("select_scatter", lambda x, w: w.expand(len(x), 4, 5, 6).select_scatter(x[:, 0], 1, 2), IMAGE, (1, 4, 1, 1), fronts="mcs")
add("take_along_dim", lambda x: x.take_along_dim(indices(x, 4), 1), (4,), fronts="ms")
add("tensordot", lambda x, w: torch.tensordot(x, w, ([2], [0])), (3, 4), (4, 2), fronts="ms")
add("inner", lambda x, w: torch.inner(x, w), (4,), (3, 4), fronts="ms")
add("diagonal", lambda x: x.diagonal(0, 2, 3), IMAGE, fronts="mcs")
add("detach", lambda x: x + (x.round() - x).detach(), fronts="ms")  # straight through
add("detach", lambda x, w: x * w.detach(), (6,), (6,), fronts="ms")


def _cell(kind: str, gates: int, biases: bool) -> None:
    def run(x: Tensor, w: Tensor, v: Tensor, *b: Tensor) -> Any:
        state: Any = x.new_zeros(len(x), 3)
        state = (state, state) if kind == "lstm_cell" else state
        for step in x.unbind(1):
            state = getattr(torch, kind)(step, state, w, v, *b)
        return state

    add(kind, run, (4, 2), (gates * 3, 2), (gates * 3, 3), *([(gates * 3,)] * 2 if biases else []), fronts="ms")


for _kind, _gates in {"lstm_cell": 4, "gru_cell": 3, "rnn_tanh_cell": 1, "rnn_relu_cell": 1}.items():
    _cell(_kind, _gates, True)
    _cell(_kind, _gates, False)
for _name, _f in {name: getattr(torch, name) for name in ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")}.items():
    add(_name, lambda x, f=_f: f(x, 0.5, False), IMAGE, fronts="mcs")
add("prod", lambda x, w: x * w.prod(), (6,), (3,), fronts="ms")
add("median", lambda x, w: x * w.median(), (6,), (5,), fronts="ms")
add("trace", lambda x, w: x * w.trace(), (6,), (3, 3), fronts="ms")
add("diag", lambda x, w: x @ torch.diag(w), (6,), (6,), fronts="ms")
add(
    "affine_grid_generator",
    lambda x, w: F.affine_grid(w.expand(len(x), 2, 3), [len(x), 1, 2, 3], align_corners=True).flatten(1) * x,
    (12,),
    (1, 2, 3),
    fronts="ms",
)
