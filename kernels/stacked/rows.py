"""Weights of a segment's layers, ``[M, P]``, from the graph's parameters: norms are folded in here. Forward and gradient.

The gradient is written out, as the tape runs it. Its twin is :func:`rows_of` under autograd.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..layers import Affine, Conv2d, Linear
from .norms import PARAMETERS, Norm
from .rules import Gradients
from .segments import NormPart, Part, Segment

Weighted = Conv2d | Linear | Affine


def rows_of(segment: Segment, values: Mapping[str, Tensor]) -> Tensor:
    """Weights ``[M, P]`` of the segment's layers, in their order, from the graph's parameters ``[M, *shape]``."""
    return _in_rows(_filled(segment, values))


@dataclass
class _Filled:
    """A layer with its numbers: of its own and of the norms that are folded into it."""

    layer: Weighted
    weight: Tensor | None  # None of an affine step
    bias: Tensor | None
    after: Norm | None
    before: Norm | None

    @property
    def groups(self) -> int:
        """Of its channels."""
        return self.layer.groups if isinstance(self.layer, Conv2d) else 1

    def behind(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias with the norm behind the layer folded in."""
        if self.weight is None:
            assert self.after is not None
            return self.after.factor_and_shift()
        return (self.weight, self.bias) if self.after is None else self.after.fold(self.weight, self.bias)

    def pieces(self) -> tuple[Tensor, ...]:
        """Weight and, where there is one, bias with both norms folded in."""
        weight, bias = self.behind()
        if self.before is not None:
            weight, bias = _ahead(weight, bias, *self.before.factor_and_shift(), self.groups)
        return (weight,) if bias is None else (weight, bias)


def _filled(segment: Segment, values: Mapping[str, Tensor]) -> list[_Filled]:
    """Layers that have numbers, in order."""
    return [
        _Filled(
            layer,
            None if part.weight is None else values[part.weight],
            None if part.bias is None else values[part.bias],
            None if part.after is None else _norm_of(part.after, values),
            None if part.before is None else _norm_of(part.before, values),
        )
        for part, layer in weighted(segment)
    ]


def _in_rows(filled: list[_Filled]) -> Tensor:
    return torch.cat([piece.flatten(1) for layer in filled for piece in layer.pieces()], 1)


def weighted(segment: Segment) -> list[tuple[Part, Weighted]]:
    return [(part, part.layer) for part in segment.parts if isinstance(part.layer, Weighted)]


class Rows:
    """The rule of :func:`rows_of` (``rules.py``), whose arguments are named as the parameters are."""

    def __init__(self, segment: Segment, wanted: frozenset[str]) -> None:
        self.segment = segment

    def forward(self, a: dict[str, Any], models: int) -> tuple[Tensor, Any]:
        """``[M, P]``, and the layers with their numbers."""
        filled = _filled(self.segment, a)
        return _in_rows(filled), filled

    def backward(self, g: Tensor, saved: list[_Filled], models: int) -> Gradients:
        """Gradients of all parameters from that of the rows."""
        made, at = _Sums(), 0
        for (part, _), own in zip(weighted(self.segment), saved, strict=True):
            shape = own.layer.weight_shape if own.weight is None else own.weight.shape[1:]  # in one dimension they differ
            end = at + math.prod(shape)
            slope, slope_of_bias = g[:, at:end].view(models, *shape), g[:, end : end + shape[0]]
            at = end + own.layer.bias * shape[0]
            if own.before is not None and part.before is not None:
                weight, _ = own.behind()
                slope, *both = _ahead_slopes(slope, slope_of_bias, weight, *own.before.factor_and_shift(), own.groups)
                made.add(part.before.parameters, own.before.slopes_of_both(*both))
            if own.after is not None and part.after is not None:
                if own.weight is None:
                    made.add(part.after.parameters, own.after.slopes_of_both(slope, slope_of_bias))
                    continue
                slope, slope_of_bias, numbers = own.after.fold_slopes(slope, slope_of_bias, own.weight, own.bias)
                made.add(part.after.parameters, numbers)
            made.add((part.weight, part.bias), (slope, slope_of_bias))
        return made


class _Sums(Gradients):
    """Gradients by reference; one that is read twice gets the sum."""

    def add(self, references: Iterable[str | None], slopes: Iterable[Tensor | None]) -> None:
        for reference, slope in zip(references, slopes, strict=True):
            if reference is not None and slope is not None:
                self[reference] = self[reference] + slope if reference in self else slope


def _norm_of(norm: NormPart, values: Mapping[str, Tensor]) -> Norm:
    references = dict(zip(PARAMETERS, norm.parameters, strict=True))
    return Norm.of(lambda name: None if references[name] is None else values[str(references[name])], norm.eps)


def _by_channel(weight: Tensor, factor: Tensor, groups: int) -> Tensor:
    """A layer's weight as ``[M * groups, outputs, channels, pixels]`` for norms of ``[M, all channels]``."""
    return weight.reshape(len(weight) * groups, weight.shape[1] // groups, factor.shape[1] // groups, -1)


def _ahead(weight: Tensor, bias: Tensor | None, factor: Tensor, shift: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Weights and bias of a layer that reads factor * x + shift: w (f x + s) = (w f) x + w s."""
    apart = _by_channel(weight, factor, groups)
    batch, _, channels, _ = apart.shape
    moved = (apart.sum(3) * shift.reshape(batch, 1, channels)).sum(2).view(weight.shape[:2])  # a product's bits could depend on how many
    return (apart * factor.reshape(batch, 1, channels, 1)).view_as(weight), moved if bias is None else bias + moved


def _ahead_slopes(g: Tensor, of_bias: Tensor, weight: Tensor, factor: Tensor, shift: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of weight, factor and shift of :func:`_ahead` from those of what it makes."""
    apart, slope = (_by_channel(x, factor, groups) for x in (weight, g))
    batch, _, channels, _ = apart.shape
    of_bias = of_bias.reshape(batch, -1)
    made = torch.addcmul(of_bias[:, :, None, None] * shift.view(batch, 1, channels, 1), slope, factor.view(batch, 1, channels, 1))
    of_shift = (of_bias.unsqueeze(2) * apart.sum(3)).sum(1)
    return made.view_as(weight), (slope * apart).sum(3).sum(1).view_as(factor), of_shift.view_as(shift)
