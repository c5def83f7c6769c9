"""Transposed convolutions, forward and gradient, for all models at once (rules as in ``rules.py``, images as in ``image_rules.py``).

Run as what it is, a transposed convolution with a group a model is slow on a CPU. It is the gradient of a convolution's input, for which
libraries are fast. With a stride its forward is a convolution without one, whose channels are then laid out as pixels
(``sub_pixels.py``). And where windows do not overlap, it is a batched product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..cpu.convolutions import convolution, convolution_backward
from ..cpu.products import LANES
from ..cpu.steps import bias_gradient
from .calls import Call, Layout, Values
from .layouts import repeated
from .rules import Gradients, Maker, Rule
from .sub_pixels import sub_pixels


class Transposed:
    """As the gradient of a convolution's input."""

    def __init__(self, call: Call, known: Values, wanted: frozenset[str]) -> None:
        self.call, self.wanted, self.groups = call, wanted, known.get("groups", 1)
        self.stride, self.padding, self.more, self.dilation = _geometry(call, known)
        plain = call.spatial == 2 and self.groups == 1 and set(self.dilation) == {1} and max(self.stride) > 1
        self.phases = tuple(zip(self.stride, self.padding, strict=True)) if plain else None

    def forward(self, a: Values, models: int) -> tuple[Tensor, Any]:
        x, weight = _stacked_input(self.call, a, models), a["weight"]
        kernels = _last(weight.flatten(0, 1))
        places = zip(x.shape[2:], weight.shape[3:], self.stride, self.padding, self.more, self.dilation, strict=True)
        sizes = [(i - 1) * s - 2 * p + d * (k - 1) + o + 1 for i, k, s, p, o, d in places]
        if self.phases is not None:
            return _with_bias(sub_pixels(x, weight, self.phases, sizes), a.get("bias")), (x, kernels, weight.shape)
        like = _last(x.new_empty(x.shape[0], models * self.groups * weight.shape[2], *sizes))
        y = convolution_backward(x, like, kernels, None, *self._as_convolution(models), [True, False, False])[0]
        return _with_bias(y, a.get("bias")), (x, kernels, weight.shape)

    def backward(self, g: Tensor, saved: Any, models: int) -> Gradients:
        x, kernels, shape = saved
        g = _last(g)
        made = _bias(g, self.wanted, models)
        if "input" in self.wanted:
            made["input"] = convolution(g, kernels, None, *self._as_convolution(models))
        if "weight" in self.wanted:
            slope = convolution_backward(x, g, kernels, None, *self._as_convolution(models), [False, True, False])[1]
            made["weight"] = slope.reshape(shape)
        return made

    def _as_convolution(self, models: int) -> tuple[Any, ...]:
        return self.stride, self.padding, self.dilation, False, [0] * len(self.stride), self.groups * models


class Tiles:
    """Without overlap, over images: every pixel becomes a tile, ``[M, n * H * W, in] x [M, in, tile * out]``.

    Where a tile has few numbers the product is computed the other way round (``cpu/products.py`` has the reason), tiles first.
    """

    def __init__(self, call: Call, wanted: frozenset[str]) -> None:
        self.call, self.wanted = call, wanted

    def forward(self, a: Values, models: int) -> tuple[Tensor, Any]:
        x, weight = _stacked_input(self.call, a, models), a["weight"]
        n, _, height, width = x.shape
        _, features, out, tall, wide = weight.shape
        rows = x.permute(0, 2, 3, 1).reshape(-1, models, features).transpose(0, 1)
        kernels = weight.permute(0, 1, 3, 4, 2).reshape(models, features, -1)
        if _few(kernels):
            tiles = torch.bmm(kernels.transpose(1, 2), rows.transpose(1, 2)).view(models, tall, wide, out, n, height, width)
            tiles = tiles.permute(4, 5, 1, 6, 2, 0, 3)
        else:
            tiles = torch.bmm(rows, kernels).view(models, n, height, width, tall, wide, out).permute(1, 2, 4, 3, 5, 0, 6)
        y = tiles.reshape(n, height * tall, width * wide, -1).permute(0, 3, 1, 2)
        return _with_bias(y, a.get("bias")), (rows, kernels, x.shape, weight.shape)

    def backward(self, g: Tensor, saved: Any, models: int) -> Gradients:
        rows, kernels, (n, _, height, width), shape = saved
        _, features, out, tall, wide = shape
        g = _last(g)
        made = _bias(g, self.wanted, models)
        tiles = g.permute(0, 2, 3, 1).reshape(n, height, tall, width, wide, models, out)
        few, positions = _few(kernels), rows.shape[1]
        if few:
            tiles = tiles.permute(5, 2, 4, 6, 0, 1, 3).reshape(models, -1, positions)
        else:
            tiles = tiles.permute(5, 0, 1, 3, 2, 4, 6).reshape(models, positions, -1)
        if "weight" in self.wanted:
            slope = torch.bmm(tiles, rows).transpose(1, 2) if few else torch.bmm(rows.transpose(1, 2), tiles)
            made["weight"] = slope.reshape(models, features, tall, wide, out).permute(0, 1, 4, 2, 3).reshape(shape)
        if "input" in self.wanted:
            slope = torch.bmm(kernels, tiles).permute(2, 0, 1) if few else torch.bmm(tiles, kernels.transpose(1, 2)).transpose(0, 1)
            made["input"] = slope.reshape(n, height, width, -1).permute(0, 3, 1, 2)
        return made


def _few(kernels: Tensor) -> bool:
    """Whether a tile is shorter than a vector."""
    return kernels.shape[2] < LANES


class Either:
    """Tiles where windows of the weight's size do not overlap and leave nothing out, else a convolution's gradient."""

    def __init__(self, call: Call, known: Values, wanted: frozenset[str]) -> None:
        self.general, self.tiles = Transposed(call, known, wanted), Tiles(call, wanted)
        own = self.general
        self.plain = call.spatial == 2 and own.groups == 1 and not any((*own.padding, *own.more)) and all(d == 1 for d in own.dilation)

    def forward(self, a: Values, models: int) -> tuple[Tensor, Any]:
        rule: Rule = self.tiles if self.plain and list(a["weight"].shape[3:]) == self.general.stride else self.general
        y, saved = rule.forward(a, models)
        return y, (rule, saved)

    def backward(self, g: Tensor, saved: tuple[Rule, Any], models: int) -> Gradients:
        rule, kept = saved
        return rule.backward(g, kept, models)


def _geometry(call: Call, known: Values) -> tuple[list[int], ...]:
    """Stride, padding, output padding and dilation, a number an axis."""
    made = []
    for name, default in (("stride", 1), ("padding", 0), ("output_padding", 0), ("dilation", 1)):
        value = known.get(name, default)
        numbers = list(value) if isinstance(value, (tuple, list)) else [value]
        made.append(numbers * call.spatial if len(numbers) == 1 else numbers)
    return tuple(made)


def _stacked_input(call: Call, a: Values, models: int) -> Tensor:
    x: Tensor = a["input"]
    return _last(repeated(x, models) if call.layouts["input"] is Layout.SHARED else x)


def _last(x: Tensor) -> Tensor:
    """Images channels-last."""
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x.contiguous()


def _with_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y.add_(bias.reshape(1, -1, *(1,) * (y.ndim - 2)))


def _bias(g: Tensor, wanted: frozenset[str], models: int) -> Gradients:
    if "bias" not in wanted:
        return {}
    if g.ndim == 4 and g.dtype == torch.float32:
        return {"bias": bias_gradient(g, models)}
    return {"bias": g.transpose(0, 1).flatten(1).sum(1).view(models, -1)}


def _transposed(call: Call, known: Values, wanted: frozenset[str], owned: bool) -> Rule | None:
    own = all(call.stacked(name) for name in ("weight", "bias") if name in call.layouts)
    return Either(call, known, wanted) if own and call.layout is Layout.CHANNELS else None


MAKERS: dict[str, Maker] = dict.fromkeys(("conv_transpose1d", "conv_transpose2d.input", "conv_transpose3d.input"), _transposed)
