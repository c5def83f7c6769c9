"""How each operation runs for M models at once, in plain torch.

A value of one model is a tensor ``[...]``. Stacked it is, as its ``Layout`` says,

    SHARED     ``[...]``           the same for all models, computed once
    MODELS     ``[M, ...]``        the axis of models in front
    CHANNELS   ``[n, M * C, ...]`` the models side by side among the channels: what grouped convolutions, pools and norms take

A form gets the arguments by name, tensors in the layouts that its ``Call`` tells, and gives the output in the layout that was settled
when the program was made (``program.py``). Every form is a plain function of tensors: autograd, transforms and autocast see through.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cpu.products import product
from ..cpu.steps import as_channels_last
from .calls import Call, Layout, Values
from .recurrent import cell, recurrent


def models_first(x: Tensor, models: int) -> Tensor:
    """``[n, M * C, ...] -> [M, n, C, ...]``."""
    return x.unflatten(1, (models, -1)).transpose(0, 1)


def channels_first(x: Tensor, last: bool) -> Tensor:
    """``[M, n, C, ...] -> [n, M * C, ...]``; ``last``: images are made channels-last."""
    if x.ndim == 5 and last:  # [n, H, W, M, C] in memory
        n, h, w = x.shape[1], x.shape[3], x.shape[4]
        return x.permute(1, 3, 4, 0, 2).reshape(n, h, w, -1).permute(0, 3, 1, 2)
    return x.transpose(0, 1).flatten(1, 2)


def repeated(x: Tensor, models: int) -> Tensor:
    """``[n, C, ...] -> [n, M * C, ...]``: what all models share, once for each."""
    return x.repeat(1, models, *(1,) * (x.ndim - 2))


def behind(x: Tensor, rank: int, of: int, models: int) -> Tensor:
    """A stacked tensor of ``of`` axes a model with ``rank`` axes a model, so that it broadcasts as a single model's tensor does."""
    return x if of == rank else x.reshape(models, *(1,) * (rank - of), *x.shape[1:])


def _everyone(x: Tensor, models: int, stacked: bool) -> Tensor:
    return x if stacked else x.expand(models, *x.shape)


# -- elementwise, axes, shapes -----------------------------------------------------------------------------------------


def elementwise(call: Call, a: Values, models: int) -> Any:
    """The same call on operands that are aligned behind the axis of models."""
    if call.layout is Layout.MODELS:
        for name, layout in call.layouts.items():
            if layout is Layout.MODELS:
                a[name] = behind(a[name], call.rank, call.ranks[name], models)
    return call.operation.invoke(a)


def axes(call: Call, a: Values, models: int) -> Any:
    """The same call as for one model, as its axes are counted from the end."""
    return call.operation.invoke(a)


def shape(call: Call, a: Values, models: int) -> Tensor:
    """Views, with the models in front."""
    x = a["input" if "input" in a else "self"]
    name = call.operation.name
    if name == "flatten.using_ints":
        return call.operation.invoke(a)
    rank = call.ranks["self"]
    if name == "permute":
        return x.permute(0, *(d + rank + 1 for d in a["dims"]))
    sizes: list[int] = next(a[key] for key in ("size", "shape", "repeats", "dims") if key in a)
    if name in ("view", "reshape"):
        return x.reshape(models, *sizes)
    if name == "expand":
        return behind(x, len(sizes), rank, models).expand(models, *sizes)
    times = [1] * (rank - len(sizes)) + list(sizes)
    return behind(x, len(times), rank, models).repeat(1, *times)


def join(call: Call, a: Values, models: int) -> Tensor:
    """Several tensors along one axis; what is shared is repeated."""
    layouts = call.layouts["tensors"]
    if call.layout is Layout.CHANNELS:
        parts = spread(a["tensors"], layouts, models)
        return joined_channels(parts, models) if -a["dim"] == call.rank - 1 else torch.cat(parts, a["dim"])
    a["tensors"] = [_everyone(t, models, layout is Layout.MODELS) for t, layout in zip(a["tensors"], layouts, strict=True)]
    return call.operation.invoke(a)


def spread(parts: Sequence[Tensor], layouts: Sequence[Layout], models: int) -> list[Tensor]:
    """``[n, M * C, ...]`` each; what is shared is repeated."""
    return [part if layout is Layout.CHANNELS else repeated(part, models) for part, layout in zip(parts, layouts, strict=True)]


def joined_channels(parts: Sequence[Tensor], models: int) -> Tensor:
    """Each model's channels ``[n, M * C, ...]`` of all parts side by side; images channels-last, as the parts are."""
    behind = [part.movedim(1, -1).unflatten(-1, (models, -1)) for part in parts]
    return torch.cat(behind, -1).flatten(-2).movedim(-1, 1)


def scatter(call: Call, a: Values, models: int) -> Tensor:
    """A tensor with a part of it replaced; what is shared is repeated."""
    for name in ("self", "src"):
        a[name] = _everyone(a[name], models, call.stacked(name))
    return call.operation.invoke(a)  # type: ignore[no-any-return]


def image(call: Call, a: Values, models: int) -> Any:
    """Models folded into the axis of queries, where there is one; in the layout of channels, nothing to do."""
    if call.layout is Layout.CHANNELS:
        return call.operation.invoke(a)
    spatial = len(a["pad"]) // 2 if call.operation.name == "pad" else call.spatial or 1  # col2im reads [n, values, places]
    if not all(call.stacked(name) and rank == spatial + 2 for name, rank in call.ranks.items()):
        return mapped(call, a, models)
    n = 0
    for name in call.layouts:
        n = a[name].shape[1]
        a[name] = a[name].flatten(0, 1)
    made = call.operation.invoke(a)
    unfolded = [t.unflatten(0, (models, n)) for t in (made if isinstance(made, (tuple, list)) else (made,))]
    return unfolded if isinstance(made, (tuple, list)) else unfolded[0]


def grid(call: Call, a: Values, models: int) -> Tensor:
    """Sampling grids of affine maps, models folded into the axis of queries: vmap would go one after another."""
    n = a["size"][0]
    made: Tensor = call.operation.invoke({**a, "theta": a["theta"].flatten(0, 1), "size": [models * n, *a["size"][1:]]})
    return made.unflatten(0, (models, n))


def identity(call: Call, a: Values, models: int) -> Tensor:
    """Dropout in evaluation mode."""
    return a["input"]


def getitem(call: Call, a: Values, models: int) -> Any:
    return a["self"][a["index"]]


def mapped(call: Call, a: Values, models: int) -> Any:
    """The operator under vmap, for operations that have no form of their own."""
    names = [name for name in call.layouts if name in a]

    def run(*tensors: Any) -> Any:
        return call.operation.invoke({**a, **dict(zip(names, tensors, strict=True))})

    def dims(name: str) -> Any:
        layout = call.layouts[name]
        return (
            [0 if part is Layout.MODELS else None for part in layout]
            if isinstance(layout, tuple)
            else 0
            if layout is Layout.MODELS
            else None
        )

    return torch.vmap(run, in_dims=tuple(dims(name) for name in names))(*(a[name] for name in names))


# -- products ----------------------------------------------------------------------------------------------------------


def linear(call: Call, a: Values, models: int) -> Tensor:
    """Batched products; inputs that all models share are read once for each."""
    x, weight, bias = a["input"], a["weight"], a.get("bias")
    if not call.stacked("weight") and not call.stacked("bias"):
        return F.linear(x, weight, bias)
    if call.ranks["weight"] != 2:
        return mapped(call, a, models)  # type: ignore[no-any-return]
    return products(call, x, weight, bias, models)[0]


def products(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None, models: int) -> tuple[Tensor, Tensor, Tensor]:
    """The output of a linear layer, and the operands ``[M, rows, in']`` and ``[M, out, in']`` of its product, filled up where they are
    to lie aligned."""
    out, features = weight.shape[-2:]
    lead = x.shape[1:-1] if call.stacked("input") else x.shape[:-1]
    rows = x.reshape(models, -1, features) if call.stacked("input") else x.reshape(-1, features)
    if call.aligned and out * features % 4:
        missing = -features % 4
        weight, rows = F.pad(weight, (0, missing)), F.pad(rows, (0, missing))
    if rows.ndim == 2:
        rows = rows.expand(models, *rows.shape)
    weight = _everyone(weight, models, call.stacked("weight"))
    made = product(rows, weight, bias)
    return made if len(lead) == 1 else made.reshape(models, *lead, out), rows, weight


def matmul(call: Call, a: Values, models: int) -> Tensor:
    """Products of matrices, batched in any way."""
    names = list(call.layouts)
    ranks = [call.ranks[name] for name in names]
    if min(ranks) < 2:
        return mapped(call, a, models)
    return torch.matmul(*(ranked(call, a, name, max(ranks), models) for name in names))


def ranked(call: Call, a: Values, name: str, rank: int, models: int) -> Tensor:
    """A tensor that broadcasts as a single model's of ``rank`` axes does."""
    return behind(a[name], rank, call.ranks[name], models) if call.stacked(name) else a[name]  # type: ignore[no-any-return]


def addmm(call: Call, a: Values, models: int) -> Tensor:
    """beta * self + alpha * a @ b."""
    first, second = (a[name] for name in call.layouts if name != "self")
    return a.get("beta", 1) * ranked(call, a, "self", call.rank, models) + a.get("alpha", 1) * torch.matmul(first, second)


def attention(call: Call, a: Values, models: int) -> Tensor:
    """softmax(q k^T * scale + mask) v, written out: for short sequences faster than torch's fused forms, and so is its backward."""
    query, key, value = (ranked(call, a, name, call.rank, models) for name in ("query", "key", "value"))
    mask, scale = a.get("attn_mask"), a.get("scale")
    if a.get("enable_gqa"):  # a key for several queries
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    scores = torch.matmul(query, key.transpose(-1, -2)) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if a.get("is_causal"):
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is None:
        shares = scores.softmax(-1)
    else:
        if call.stacked("attn_mask"):
            mask = behind(mask, call.rank, call.ranks["attn_mask"], models)
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
        shares = torch.ops.aten._safe_softmax(scores, -1)  # of what sees nothing, zeros
    if "dropped" in a:  # in training mode, as dropout's factors
        shares = shares * a["dropped"]
    return torch.matmul(shares, value)


def embedding(call: Call, a: Values, models: int) -> Tensor:
    """Rows of each model's own table."""
    weight, indices, padding = a["weight"], a["indices"], a.get("padding_idx", -1)
    if not call.stacked("weight"):
        return F.embedding(indices, weight)
    if padding >= 0:  # torch gives that row no gradient
        row = torch.arange(weight.shape[1], device=weight.device) == padding
        weight = torch.where(row[:, None], weight.detach(), weight)
    if call.stacked("indices"):
        first = torch.arange(models, device=indices.device) * weight.shape[1]
        return weight.flatten(0, 1)[indices + first.view(models, *(1,) * (indices.ndim - 1))]
    return weight.index_select(1, indices.flatten()).unflatten(1, tuple(indices.shape))


# -- convolutions ------------------------------------------------------------------------------------------------------


def _own_kernels(call: Call, a: Values, models: int) -> tuple[Tensor, Tensor | None]:
    """Kernels ``[M * out, in, ...]`` and biases ``[M * out]``."""
    weight = _everyone(a["weight"], models, call.stacked("weight")).flatten(0, 1)
    if weight.ndim == 4 and call.aligned:
        weight = weight.contiguous(memory_format=torch.channels_last)
    bias = a.get("bias")
    return weight, None if bias is None else _everyone(bias, models, call.stacked("bias")).flatten()


def _channels_last(x: Tensor) -> Tensor:
    """Images channels-last; where no gradient flows to them, with strides that say so whatever their size."""
    x = x.contiguous(memory_format=torch.channels_last)
    return x if x.requires_grad else as_channels_last(x)


def _with_shared_kernels(call: Call, a: Values, models: int) -> Tensor:
    """A convolution whose kernels all models share, as one over all their images; and that of a single image, without queries."""
    fixed = not call.stacked("weight") and not call.stacked("bias") and call.ranks["input"] == call.spatial + 2
    if not fixed:
        return mapped(call, a, models)  # type: ignore[no-any-return]
    made: Tensor = call.operation.invoke({**a, "input": a["input"].flatten(0, 1)})
    return made.unflatten(0, (models, -1))


def convolution(call: Call, a: Values, models: int) -> Tensor:
    """One convolution of shared images with M * out outputs, or one with the models as its groups."""
    if call.layout is not Layout.CHANNELS:
        return _with_shared_kernels(call, a, models)
    x, groups = a["input"], a.get("groups", 1)
    shared = call.layouts["input"] is Layout.SHARED
    if shared and groups > 1:  # groups of shared channels and groups of models do not fit into one convolution
        x, shared = repeated(x, models), False
    weight, bias = _own_kernels(call, a, models)
    if x.ndim == 4 and call.aligned:
        x = _channels_last(x)
    return call.operation.invoke({**a, "input": x, "weight": weight, "bias": bias, "groups": groups if shared else groups * models})


def transposed(call: Call, a: Values, models: int) -> Tensor:
    """Transposed convolutions; kernels are ``[in, out / groups, ...]``, so shared images are repeated for every model."""
    if call.layout is not Layout.CHANNELS:
        return _with_shared_kernels(call, a, models)
    x, groups = a["input"], a.get("groups", 1)
    if call.layouts["input"] is Layout.SHARED:
        x = repeated(x, models)
    weight, bias = _own_kernels(call, a, models)
    return call.operation.invoke({**a, "input": x, "weight": weight, "bias": bias, "groups": groups * models})


# -- norms -------------------------------------------------------------------------------------------------------------


def _channelwise(call: Call, a: Values, name: str, models: int, rank: int) -> Tensor | None:
    """A parameter of one number a channel, laid out to broadcast over the output."""
    value = a.get(name)
    if value is None:
        return None
    if call.layout is Layout.CHANNELS:
        return _everyone(value, models, call.stacked(name)).reshape(1, -1, *(1,) * (rank - 2))
    lead = (models,) if call.stacked(name) else ()
    return value.reshape(*lead, 1, -1, *(1,) * (rank - 2))


def _affine(call: Call, a: Values, x: Tensor, models: int) -> Tensor:
    weight, bias = (_channelwise(call, a, name, models, call.rank) for name in ("weight", "bias"))
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def batch_norm(call: Call, a: Values, models: int) -> Tensor:
    """Batch norm by the running statistics, which are parameters like any other."""
    mean, variance = (_channelwise(call, a, name, models, call.rank) for name in ("running_mean", "running_var"))
    assert mean is not None
    assert variance is not None
    scale = torch.rsqrt(variance + a.get("eps", 1e-5))
    weight, bias = (_channelwise(call, a, name, models, call.rank) for name in ("weight", "bias"))
    scale = scale if weight is None else scale * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    return a["input"] * scale + shift


def instance_norm(call: Call, a: Values, models: int) -> Tensor:
    """Instance norm: by each image's own statistics, or by running statistics where the layer keeps some."""
    if not a["use_input_stats"]:
        return batch_norm(call, a, models)
    x = a["input"]
    variance, mean = torch.var_mean(x, tuple(range(2 - call.rank, 0)), correction=0, keepdim=True)
    return _affine(call, a, (x - mean) * torch.rsqrt(variance + a.get("eps", 1e-5)), models)


def group_norm(call: Call, a: Values, models: int) -> Tensor:
    """Group norm over groups of each model's own channels."""
    x, groups, eps = a["input"], a["num_groups"], a.get("eps", 1e-5)
    if call.layout is Layout.CHANNELS:
        weight, bias = (_channelwise(call, a, name, models, call.rank) for name in ("weight", "bias"))
        flat = [None if p is None else p.flatten() for p in (weight, bias)]
        return F.group_norm(x, groups * models, flat[0], flat[1], eps)
    if not call.stacked("input"):
        return _affine(call, a, F.group_norm(x, groups, eps=eps), models)
    n = x.shape[1]
    return _affine(call, a, F.group_norm(x.flatten(0, 1), groups, eps=eps).unflatten(0, (models, n)), models)


def layer_norm(call: Call, a: Values, models: int) -> Tensor:
    """Layer norm over the last axes."""
    made = F.layer_norm(a["input"], a["normalized_shape"], eps=a.get("eps", 1e-5))
    return _scaled(call, a, made, models)


def rms_norm(call: Call, a: Values, models: int) -> Tensor:
    """RMS norm over the last axes: no mean is subtracted."""
    made = F.rms_norm(a["input"], a["normalized_shape"], eps=a.get("eps"))
    return _scaled(call, a, made, models)


def _scaled(call: Call, a: Values, x: Tensor, models: int) -> Tensor:
    for name, apply in (("weight", torch.mul), ("bias", torch.add)):
        value = a.get(name)
        if value is not None:
            x = apply(x, behind(value, call.rank, call.ranks[name], models) if call.stacked(name) else value)
    return x


def prelu(call: Call, a: Values, models: int) -> Tensor:
    """PReLU with one slope per model, or one per channel."""
    x, weight = a["self"], a["weight"]
    if call.layout is Layout.CHANNELS:
        weight = _everyone(weight, models, call.stacked("weight")).expand(models, x.shape[1] // models).reshape(-1, *(1,) * (call.rank - 2))
    elif call.rank > 1:
        weight = _channelwise(call, a, "weight", models, call.rank)
    return torch.where(x > 0, x, weight * x)


Form = Callable[[Call, Values, int], Any]
FORMS: dict[str, Form] = {
    "elementwise": elementwise, "axes": axes, "shape": shape, "join": join, "scatter": scatter, "image": image, "create": axes,
    "identity": identity, "getitem": getitem, "vmap": mapped, "linear": linear, "matmul": matmul, "addmm": addmm,
    "attention": attention, "embedding": embedding, "convolution": convolution, "transposed": transposed, "batch_norm": batch_norm,
    "instance_norm": instance_norm, "group_norm": group_norm, "layer_norm": layer_norm, "rms_norm": rms_norm, "prelu": prelu,
    "recurrent": recurrent, "cell": cell, "grid": grid,
}  # fmt: skip
