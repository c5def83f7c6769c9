"""How each operation runs for M models at once, in plain torch.

A value of one model is a tensor ``[...]``. Stacked it is, as its ``Layout`` says,

    SHARED     ``[...]``           the same for all models, computed once
    MODELS     ``[M, ...]``        the axis of models in front
    CHANNELS   ``[n, M * C, ...]`` the models side by side among the channels: what grouped convolutions, pools and norms take

A form gets the arguments by name, tensors in the layouts that its ``Call`` tells, and gives the output in the layout that was settled
when the program was made (``program.py``). Every form is a plain function of tensors: autograd, transforms and autocast see through.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cpu.activations import BY_TWO_FORMULAS, dense
from ..cpu.convolutions import crosses
from ..cpu.products import LANES, vector
from ..cpu.steps import as_channels_last
from ..picking import unstrided
from .calls import Call, Layout, Values
from .layouts import added_as_they_lie, aligned, behind, everyone, mapped, over_pixels, repeated
from .product_forms import addmm, attention, cdist, einsum, embedding, linear, matmul, tensordot
from .recurrent import cell, recurrent

_ADDED = frozenset({"mean.dim", "sum.dim_IntList", "adaptive_avg_pool2d"})
_BY_CHANNEL = frozenset({"mean.dim", "sum.dim_IntList", "logsumexp", "var.correction", "std.correction"})

# -- elementwise, axes, shapes -----------------------------------------------------------------------------------------


def elementwise(call: Call, a: Values, models: int) -> Any:
    """The same call on operands that are aligned behind the axis of models."""
    a.update((name, aligned(call, a, name, models)) for name in call.layouts)
    if call.aligned and call.operation.name in BY_TWO_FORMULAS:
        a.update((name, _side_by_side(a[name], len(call.layouts) > 1)) for name in call.layouts)
    return call.operation.invoke(a)


def _side_by_side(x: Tensor, several: bool) -> Tensor:
    """A number's neighbors in memory, whatever lies between models: of several tensors, which may be broadcast, those of its model."""
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        return x
    return x.contiguous() if several else dense(x)


def axes(call: Call, a: Values, models: int) -> Any:
    """The same call as for one model, as its axes are counted from the end."""
    if call.layout is Layout.CHANNELS and call.aligned and call.operation.name in _BY_CHANNEL:
        return _reduced(call, a, a.get("dim"), bool(a.get("keepdim")))
    if call.operation.name == "glu" and call.aligned:
        a["self"] = a["self"].contiguous()  # its halves would lie in runs (``dense``)
    if (
        call.operation.name == "linalg_vector_norm"
        and call.aligned
        and not a["self"].is_complex()
        and a["ord"] == 2
        and a["dim"]
        and a["dtype"] is None
    ):
        return length(a["self"], a["dim"], a["keepdim"])
    return call.operation.invoke(a)


def length(x: Tensor, axes: Any, keep: bool) -> Tensor:
    """The root of a sum of squares, with torch's gradient of zero where it is zero. torch's own takes seven times as long where the axes
    are not the last in memory."""
    squares = (x * x).sum(axes, keep)
    if not squares.requires_grad and not torch._C._functorch.is_functorch_wrapped_tensor(squares):
        return squares.sqrt_()
    nothing = squares == 0
    return squares.masked_fill(nothing, 1).sqrt().masked_fill(nothing, 0)


def _reduced(call: Call, a: Values, dim: Any, keep: bool) -> Any:
    """A reduction of images whose channels are added in the same order each. Of channels-last images torch adds up the last channels in
    another order than the others, and a model's bits would depend on its place."""
    x: Tensor = a["self"]
    every = x.ndim == 4 and isinstance(dim, (tuple, list)) and sorted(dim) == [-2, -1] and a.get("dtype") is None
    if not (every and call.operation.name in _ADDED and added_as_they_lie(x)):
        return call.operation.invoke({**a, "self": x.contiguous()})
    made = over_pixels(x, mean=call.operation.name != "sum.dim_IntList")
    return made if keep else made[..., 0, 0]


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
    a["tensors"] = [everyone(t, models, layout is Layout.MODELS) for t, layout in zip(a["tensors"], layouts, strict=True)]
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
        a[name] = everyone(a[name], models, call.stacked(name))
    if call.operation.name == "slice_scatter":  # torch.vmap counts from the end in its own way
        a["start"], a["end"], _ = slice(a["start"], a["end"]).indices(a["self"].shape[a["dim"]])
    return call.operation.invoke(a)  # type: ignore[no-any-return]


def image(call: Call, a: Values, models: int) -> Any:
    """Models folded into the axis of queries, where there is one; in the layout of channels, nothing to do."""
    if call.operation.name == "avg_pool3d" and call.aligned and (size := neighbors(a)):
        return over_neighbors(a["self"], size)
    if call.layout is Layout.CHANNELS:
        if call.operation.name == "adaptive_avg_pool2d" and call.aligned and one_pixel(a["output_size"]):
            return _reduced(call, a, (-2, -1), True)
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


def neighbors(a: Values) -> int:
    """How many values along the first of three axes an average pooling takes the mean of, at every place; 0 if it is another. So a local
    response norm adds up neighboring channels."""
    (size, *others), stride, padding = a["kernel_size"], a["stride"], a["padding"]
    plain = others == [1, 1] and set(stride or [0]) == {1} and not any(padding) and a["divisor_override"] is None
    return size if plain else 0


def over_neighbors(x: Tensor, size: int) -> Tensor:
    """Means of ``size`` values along the third axis from the end: torch's pooling of three axes takes each number by itself."""
    count = x.shape[-3] - size + 1
    made = x.narrow(-3, 0, count)
    for i in range(1, size):
        made = made + x.narrow(-3, i, count)
    return made / size


def one_pixel(size: Any) -> bool:
    """Whether an output size, a number or one for each axis, is that of an average over all pixels."""
    return all(each == 1 for each in (size if isinstance(size, (tuple, list)) else (size,)))


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


# -- convolutions ------------------------------------------------------------------------------------------------------


def _own_kernels(call: Call, a: Values, models: int) -> tuple[Tensor, Tensor | None]:
    """Kernels ``[M * out, in, ...]`` and biases ``[M * out]``."""
    weight = everyone(a["weight"], models, call.stacked("weight")).flatten(0, 1)
    if weight.ndim == 4 and call.aligned:
        weight = weight.contiguous(memory_format=torch.channels_last)
    bias = a.get("bias")
    return weight, None if bias is None else everyone(bias, models, call.stacked("bias")).flatten()


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
    # groups of shared channels and groups of models do not fit into one convolution; and without AVX-512 oneDNN adds up a volume's gradient
    # with respect to some of many kernels in another order
    if shared and (groups > 1 or (call.spatial == 3 and call.aligned and vector() < LANES)):
        x, shared = repeated(x, models), False
    x, stride = unstrided(x, a["weight"].shape[-call.spatial :], a.get("stride", 1), a.get("padding", 0))
    weight, bias = _own_kernels(call, a, models)
    if x.ndim == 4 and call.aligned:
        x = _channels_last(x)
    return _apart(
        call, {**a, "input": x, "stride": stride, "weight": weight, "bias": bias, "groups": groups if shared else groups * models}
    )


def transposed(call: Call, a: Values, models: int) -> Tensor:
    """Transposed convolutions; kernels are ``[in, out / groups, ...]``, so shared images are repeated for every model."""
    if call.layout is not Layout.CHANNELS:
        return _with_shared_kernels(call, a, models)
    x, groups = a["input"], a.get("groups", 1)
    if call.layouts["input"] is Layout.SHARED:
        x = repeated(x, models)
    weight, bias = _own_kernels(call, a, models)
    return _apart(call, {**a, "input": x, "weight": weight, "bias": bias, "groups": groups * models})


def _apart(call: Call, a: Values) -> Tensor:
    """A convolution with models among its groups: in float32 where autocast would have it, or its gradient, read a neighbor's channel."""
    x, weight, groups = a["input"], a["weight"], a["groups"]
    if x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        if any(crosses(dtype, channels, groups) for channels in (weight.shape[0] // groups, weight.shape[1])):
            with torch.autocast("cpu", enabled=False):
                operands = {name: None if a[name] is None else a[name].float() for name in ("input", "weight", "bias")}
                made: Tensor = call.operation.invoke({**a, **operands})
            return made.to(dtype)
    return call.operation.invoke(a)  # type: ignore[no-any-return]


# -- norms -------------------------------------------------------------------------------------------------------------


def _channelwise(call: Call, a: Values, name: str, models: int, rank: int) -> Tensor | None:
    """A parameter of one number a channel, laid out to broadcast over the output."""
    value = a.get(name)
    if value is None:
        return None
    if call.layout is Layout.CHANNELS:
        return everyone(value, models, call.stacked(name)).reshape(1, -1, *(1,) * (rank - 2))
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
        return _group_normed(x, groups * models, flat[0], flat[1], eps)
    if not call.stacked("input"):
        return _affine(call, a, _group_normed(x, groups, None, None, eps), models)
    n = x.shape[1]
    return _affine(call, a, _group_normed(x.flatten(0, 1), groups, None, None, eps).unflatten(0, (models, n)), models)


def _group_normed(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """torch's, which of channels-last images takes the mean of squares less the square of the mean, and loses digits. Images of one pixel
    are both contiguous and channels-last, and torch takes them for the latter: so it is given rows of pixels."""
    rows = x.contiguous().flatten(2) if x.ndim > 3 else x.contiguous()
    return F.group_norm(rows, groups, weight, bias, eps).reshape(x.shape)


def layer_norm(call: Call, a: Values, models: int) -> Tensor:
    """Layer norm over the last axes."""
    x, shape, eps = a["input"], a["normalized_shape"], a.get("eps", 1e-5)
    if _forward_twice():
        variance, mean = torch.var_mean(x, tuple(range(-len(shape), 0)), correction=0, keepdim=True)
        return _scaled(call, a, (x - mean) * torch.rsqrt(variance + eps), models)
    return _scaled(call, a, F.layer_norm(x, shape, eps=eps), models)


def _forward_twice() -> bool:
    """Whether a forward-mode derivative of another is taken (``jacfwd`` of ``jacfwd``).

    The tangent of torch's layer norm takes its mean and deviation for constants, so the outer one is wrong without a word.
    """
    levels = torch._C._functorch.get_interpreter_stack() or ()
    return sum(level.key() == torch._C._functorch.TransformType.Jvp for level in levels) > 1


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
        weight = everyone(weight, models, call.stacked("weight")).expand(models, x.shape[1] // models).reshape(-1, *(1,) * (call.rank - 2))
    elif call.rank > 1:
        weight = _channelwise(call, a, "weight", models, call.rank)
    return torch.where(x > 0, x, weight * x)


Form = Callable[[Call, Values, int], Any]
FORMS: dict[str, Form] = {
    "elementwise": elementwise, "axes": axes, "shape": shape, "join": join, "scatter": scatter, "image": image, "create": axes,
    "identity": identity, "getitem": getitem, "vmap": mapped, "linear": linear, "matmul": matmul, "addmm": addmm,
    "attention": attention, "embedding": embedding, "convolution": convolution, "transposed": transposed, "batch_norm": batch_norm,
    "instance_norm": instance_norm, "group_norm": group_norm, "layer_norm": layer_norm, "rms_norm": rms_norm, "prelu": prelu,
    "recurrent": recurrent, "cell": cell, "grid": grid, "einsum": einsum,
    "tensordot": tensordot, "cdist": cdist,
}  # fmt: skip


def by_form(call: Call) -> Callable[[Values, int], Any]:
    """The call by its form: ``(arguments, models) -> value``."""
    return partial(FORMS[call.operation.form], call)
