"""Rules (``rules.py``) of calls on images ``[n, M * C, ...]``, whose models lie among the channels; channels-last where there are two axes.

What is here stands between the segments of a network (``segments.py``): norms by group, joined, padded, cut and averaged images. The
twins are the forms (``forms.py``).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .calls import Call, Layout, Values
from .forms import by_form, joined_channels, neighbors, one_pixel, spread
from .layouts import in_rows, over_pixels
from .rules import Gradients, Maker, Rule, Shaped, Within

_aten = torch.ops.aten
_ARGUMENTS = ("input", "weight", "bias")  # of a norm
_SIDE_BY_SIDE = 32  # pixels of a channel
_LANES, _VECTOR = 16, 8  # numbers: of a vector with AVX-512, and of half of one
_LARGE = 1024  # pixels: from there on torch takes all channels of a pixel together


class GroupNorm:
    """Groups of channels, or every channel, less their mean and over their deviation, and a backward of few passes.

    torch's own functions run where they are faster, on numbers from which a mean was taken before: of channels-last images they take the
    mean of squares less the square of the mean, and where a group's mean is thirty times its spread three digits would be gone. Elsewhere
    moments are taken by passes over pixels. Which of the two is a matter of a model's shapes alone.
    """

    def __init__(self, known: Values, wanted: frozenset[str], groups: int | None) -> None:
        self.wanted = wanted
        self.groups, self.eps = groups, known.get("eps", 1e-5)  # None: every channel is a group

    def forward(self, a: Values, models: int) -> tuple[Tensor, Any]:
        x, weight, bias = a["input"], a.get("weight"), a.get("bias")
        x = x if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous() else in_rows(x)
        n, channels, *pixels = x.shape
        each = 1 if self.groups is None else channels // (self.groups * models)
        count = each * math.prod(pixels)
        beside = (-1, channels, *(1,) * len(pixels))

        def mean_of(value: Tensor) -> Tensor:
            """Means of each group, ``[n, groups]``."""
            return _over_pixels(value).view(n, -1, each).sum(2) / count

        there, back = _torchs_own(x, channels // models, each)
        centered = x if there and x.is_contiguous() else x - mean_of(x).repeat_interleave(each, 1).view(beside)
        if there:
            flat = (None if weight is None else weight.reshape(-1), None if bias is None else bias.reshape(-1))
            made, left, root = torch.native_group_norm(centered, *flat, n, channels, math.prod(pixels), channels // each, self.eps)
            return made, (centered, left, root, weight, back)
        left = mean_of(centered)  # what rounding has left of the mean
        root = torch.rsqrt((mean_of(centered * centered) - left.square()).clamp_min_(0) + self.eps)
        factor, shift = root.repeat_interleave(each, 1), (-left * root).repeat_interleave(each, 1)
        if weight is not None:
            factor, shift = factor * weight.view(1, -1), shift * weight.view(1, -1)
        shift = shift if bias is None else shift + bias.view(1, -1)
        return torch.addcmul(shift.view(beside), centered, factor.view(beside)), (centered, left, root, weight, False)

    def backward(self, g: Tensor, saved: Any, models: int) -> Gradients:
        x, mean, root, weight, by_torch = saved
        n, channels, *pixels = x.shape
        each = channels // mean.view(n, -1).shape[1]  # channels of a group
        made: Gradients = {}
        if by_torch:
            flat = None if weight is None else weight.reshape(-1)
            layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
            slopes = _aten.native_group_norm_backward(
                g.contiguous(memory_format=layout), x, mean, root, flat, n, channels, math.prod(pixels), channels // each,
                [name in self.wanted for name in _ARGUMENTS],
            )  # fmt: skip
            for name, slope in zip(_ARGUMENTS, slopes, strict=True):
                if name in self.wanted:
                    made[name] = slope if name == "input" else slope.view(models, -1)
            return made

        def by_group(value: Tensor) -> Tensor:
            """Sums over a group's channels of what belongs to its normalised numbers, ``[n, groups]``."""
            return (value if weight is None else value * weight.view(-1)).view(n, -1, each).sum(2)

        def beside(value: Tensor) -> Tensor:
            """A number a query and group, or a query and channel, laid out for the images."""
            wide = value if value.shape[1] == channels else value.repeat_interleave(each, 1)
            return wide.view(n, channels, *(1,) * len(pixels))

        mean, root = mean.view(n, -1), root.view(n, -1)
        product = g * x
        of_shift, along = _over_pixels(g), _over_pixels(product)  # [n, channels]
        if "weight" in self.wanted:
            of_scale = torch.addcmul(along, of_shift, mean.repeat_interleave(each, 1), value=-1) * root.repeat_interleave(each, 1)
            made["weight"] = _over_queries(of_scale, models)
        if "bias" in self.wanted:
            made["bias"] = _over_queries(of_shift, models)
        if "input" in self.wanted:  # root (w g - mean of w g - normal * mean of w g normal), as a factor of g, one of x and a shift
            count = each * math.prod(pixels)
            even = by_group(of_shift) / count
            slanted = (by_group(along) / count - mean * even) * root.square()
            of_g = beside(root) if weight is None else beside(root) * weight.view(1, channels, *(1,) * len(pixels))
            shift = beside(root * (mean * slanted - even))
            made["input"] = torch.addcmul(shift, x, beside(-root * slanted), out=product).addcmul_(g, of_g)
        return made


def _torchs_own(x: Tensor, channels: int, each: int) -> tuple[bool, bool]:
    """Whether torch's group norm is faster than passes over the pixels of ``x``, forward and back.

    It takes channels-last images group by group, in vectors of a group's channels where there are enough of them, and forward all channels
    at once where images are large. Sums of many pixels side by side are faster by far.

    Args:
        channels: of a model.
        each: channels of a group.
    """
    pixels = x[0, 0].numel()
    if x.dtype != torch.float32 or x.device.type != "cpu":
        return False, False
    if x.is_contiguous():
        return pixels >= _SIDE_BY_SIDE, pixels >= _SIDE_BY_SIDE
    whole = channels % _LANES == 0  # no model lies among what is left over of vectors
    return whole and (each >= _VECTOR or pixels >= _LARGE), whole and each >= _VECTOR


def _over_pixels(x: Tensor) -> Tensor:
    """Sums ``[n, channels]``; of channels-last images by an average pooling, which adds whole vectors of channels."""
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and x.dtype == torch.float32:
        return over_pixels(x).flatten(1)
    return x.flatten(2).sum(2) if x.ndim > 2 else x


def _over_queries(x: Tensor, models: int) -> Tensor:
    """Sums ``[M, C]`` of ``[n, M * C]``: model by model, as in which order torch adds depends on how many numbers lie side by side."""
    return x.view(len(x), models, -1).transpose(0, 1).contiguous().sum(1)


class Prelu:
    """x, or a slope of the channel's own times x where x is negative."""

    def __init__(self, call: Call, wanted: frozenset[str]) -> None:
        self.call, self.wanted = call, wanted

    def forward(self, a: Values, models: int) -> tuple[Tensor, Any]:
        x, weight = a["self"], a["weight"]
        if self.call.layout is Layout.CHANNELS:
            slopes = weight.expand(models, x.shape[1] // models).reshape(1, -1, *(1,) * (x.ndim - 2))
        else:
            slopes = weight.reshape(models, 1, -1, *(1,) * (x.ndim - 3))
        return _aten._prelu_kernel(x, slopes), (x, slopes, weight.shape)

    def backward(self, g: Tensor, saved: Any, models: int) -> Gradients:
        x, slopes, shape = saved
        above = _aten.threshold_backward(g, x, 0)  # and what is below, in few passes: torch's own takes twice as long
        below = g - above
        made: Gradients = {}
        if "self" in self.wanted:
            made["self"] = above.addcmul_(below, slopes)
        if "weight" in self.wanted:
            of_slopes = below.mul_(x)
            if self.call.layout is Layout.CHANNELS:
                summed = _over_queries(_over_pixels(of_slopes), models)
            else:
                summed = of_slopes.flatten(3).sum((1, 3)) if of_slopes.ndim > 3 else of_slopes.sum(1)
            made["weight"] = summed if summed.shape == shape else summed.sum(1, keepdim=True)
        return made


def _prelu(call: Call, known: Values, wanted: frozenset[str], owned: bool) -> Rule | None:
    both = call.rank > 1 and call.layouts["self"] is call.layout and call.stacked("weight")
    return Prelu(call, wanted) if both else None


def _instance_norm(call: Call, known: Values, wanted: frozenset[str], owned: bool) -> Rule | None:
    own = all(call.stacked(name) for name in ("weight", "bias") if name in call.layouts)
    return GroupNorm(known, wanted, None) if own and known["use_input_stats"] and call.layout is Layout.CHANNELS else None


def _group_norm(call: Call, known: Values, wanted: frozenset[str], owned: bool) -> Rule | None:
    own = all(call.stacked(name) for name in ("weight", "bias") if name in call.layouts)
    return GroupNorm(known, wanted, known["num_groups"]) if own and call.layout is Layout.CHANNELS else None


class Joined:
    """Images side by side among each model's own channels, or along an axis of pixels."""

    def __init__(self, call: Call, known: Values, wanted: frozenset[str]) -> None:
        self.call, self.wanted, self.axis = call, wanted, known["dim"]
        self.of_channels = -self.axis == call.rank - 1

    def forward(self, a: Values, models: int) -> tuple[Tensor, Any]:
        parts = spread(a["tensors"], self.call.layouts["tensors"], models)
        made = joined_channels(parts, models) if self.of_channels else torch.cat(parts, self.axis)
        return made, [part.shape[self.axis] for part in parts]

    def backward(self, g: Tensor, saved: list[int], models: int) -> Gradients:
        if not self.of_channels:
            parts = list(g.split(saved, self.axis))
        else:
            behind = g.movedim(1, -1).unflatten(-1, (models, -1))
            parts = [part.flatten(-2).movedim(-1, 1) for part in behind.split([size // models for size in saved], -1)]
        return {name: parts[int(name.rpartition(".")[2])] for name in self.wanted}


def _joined(call: Call, known: Values, wanted: frozenset[str], owned: bool) -> Rule | None:
    return Joined(call, known, wanted) if call.layout is Layout.CHANNELS and call.operation.name == "cat" else None


def _select(call: Call, known: Values, wanted: frozenset[str], owned: bool) -> Rule | None:
    axis, index = known.get("dim"), known.get("index")
    if type(axis) is not int or axis >= 0 or type(index) is not int or list(call.layouts) != ["self"]:
        return None
    return Shaped("self", by_form(call), lambda g, shape: Within(shape, (lambda whole: whole.select(axis, index), g)))


def _slice(call: Call, known: Values, wanted: frozenset[str], owned: bool) -> Rule | None:
    axis, start, end, step = (known.get(name, default) for name, default in (("dim", 0), ("start", None), ("end", None), ("step", 1)))
    if type(axis) is not int or axis >= 0 or type(step) is not int or list(call.layouts) != ["self"]:
        return None

    def backward(g: Tensor, shape: torch.Size) -> Within:
        return Within(shape, (lambda whole: _aten.slice(whole, axis, start, end, step), g))

    return Shaped("self", by_form(call), backward)


def _pad(call: Call, known: Values, wanted: frozenset[str], owned: bool) -> Rule | None:
    around, run = known["pad"], by_form(call)
    if any(type(width) is not int or width < 0 for width in around):
        return None

    def forward(a: Values, models: int) -> Tensor:
        x = a["self"]
        if x.ndim == 3 and x.stride(1) == 1:  # torch keeps the order in memory of images alone
            return run({**a, "self": x.unsqueeze(2)}, models).squeeze(2)  # type: ignore[no-any-return]
        return run(a, models)  # type: ignore[no-any-return]

    def backward(g: Tensor, shape: torch.Size) -> Tensor:
        for i in range(len(around) // 2):
            g = g.narrow(-1 - i, around[2 * i], shape[-1 - i])
        return g

    return Shaped("self", forward, backward)


def _average(call: Call, known: Values, wanted: frozenset[str], owned: bool) -> Rule | None:
    """Over all pixels, which are one afterwards."""
    if not one_pixel(known["output_size"]) or call.layout is not Layout.CHANNELS:
        return None
    return Shaped("self", by_form(call), lambda g, shape: (g / math.prod(shape[2:])).expand(shape))


def _neighbors(call: Call, known: Values, wanted: frozenset[str], owned: bool) -> Rule | None:
    """Means over neighbors along one axis."""
    size = neighbors(known)

    def backward(g: Tensor, shape: torch.Size) -> Tensor:
        share, made = g / size, g.new_zeros(shape)
        for i in range(size):
            made.narrow(-3, i, g.shape[-3]).add_(share)
        return made

    return Shaped("self", by_form(call), backward) if size and call.aligned else None


def _nearest(call: Call, known: Values, wanted: frozenset[str], owned: bool) -> Rule | None:
    """Images enlarged by their nearest pixels; whole times, the gradient is a sum over tiles, which an average pooling adds up."""
    whole = known.get("output_size") is not None or all(float(f).is_integer() for f in known["scale_factors"])

    def backward(g: Tensor, shape: torch.Size) -> Tensor:
        (height, width), (tall, wide) = shape[2:], g.shape[2:]
        if tall % height == 0 and wide % width == 0:
            tile = [tall // height, wide // width]
            return _aten.avg_pool2d(g, tile, tile, [0, 0], False, False, 1)  # type: ignore[no-any-return]
        return _aten.upsample_nearest2d_backward(g, [tall, wide], shape)  # type: ignore[no-any-return]

    return Shaped("input", by_form(call), backward) if whole and call.layout is Layout.CHANNELS else None


MAKERS: dict[str, Maker] = {
    "group_norm": _group_norm,
    "instance_norm": _instance_norm,
    "prelu": _prelu,
    "upsample_nearest2d.vec": _nearest,
    "cat": _joined,
    "select.int": _select,
    "slice.Tensor": _slice,
    "constant_pad_nd": _pad,
    "avg_pool3d": _neighbors,
    "adaptive_avg_pool1d": _average,
    "adaptive_avg_pool2d": _average,
}
