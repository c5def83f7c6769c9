"""Weights of a chain with its norms folded in, ``[k, P']``, and their gradient's way back, by a plan that is made once a graph.

``rows.py`` computes the same from single parameters, a norm at a time: a hundred small calls, which at a few small networks are a tenth of
a step. Here one call makes a number of all norms. The twin is :func:`.rows.rows_of` under autograd.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..graph import Graph
from ..layers import Conv2d
from .norms import PARAMETERS
from .rows import Weighted, weighted
from .segments import NormPart, Segment

_STATISTICS = PARAMETERS[:2]  # that every norm has
_NUMBERS = ("bias ahead", *PARAMETERS)  # of a norm's channel; the first is the bias of the layer that the norm is behind


class _Step(NamedTuple):
    """A layer that has numbers.

    Attributes:
        shape: of its weight, ``[groups, outputs, channels * pixels]``; None of an affine step, which is nothing but the norm behind it.
        weight, bias: its slots in the graph's weights; None without.
        after, before: the norm behind it and the one ahead of it, by their places among all.
    """

    shape: tuple[int, int, int] | None
    weight: int | None
    bias: int | None
    after: int | None
    before: int | None


@dataclass
class Saved:
    """What the way back reads.

    Attributes:
        weights: of the graph, ``[k, P]``.
        centered, root, factor, shift: of all channels of norms, ``[k, C]``: bias - mean, 1 / sqrt(variance + eps), root * scale, and
            centered * factor + the norm's own shift.
        spread: factor and shift of each norm that is ahead of a layer, at all pixels of that layer's weights, ``[k, C * pixels]``.
        ahead: weights that such a layer has without that norm.
    """

    weights: Tensor
    centered: Tensor
    root: Tensor
    factor: Tensor
    shift: Tensor
    spread: tuple[Tensor, ...]
    ahead: list[Tensor] = field(default_factory=list)


class FoldPlan:
    """How a graph's weights become those of the segment that the graph is.

    Args:
        graph: a chain once its norms are folded in. No layer shares a parameter with another (:func:`can_be_planned`).
        segment: that chain.
    """

    def __init__(self, graph: Graph, segment: Segment) -> None:
        slots = {f"@w:{slot.name}": i for i, slot in enumerate(graph.slots)}
        self._slot_sizes = graph.sizes
        self._steps: list[_Step] = []
        self._row_sizes: list[int] = []
        self._channels: list[int] = []  # of each norm
        columns: list[list[int]] = [[] for _ in _NUMBERS]  # of the weights, one for each channel of all norms; -1 where a norm has none
        eps: list[float] = []

        def place_of(norm: NormPart | None, bias: str | None) -> int | None:
            if norm is None:
                return None
            count = graph.slots[slots[str(norm.parameters[0])]].size
            for known, name in zip(columns, (bias, *norm.parameters), strict=True):
                start = None if name is None else graph.slots[slots[name]].offset
                known.extend([-1] * count if start is None else range(start, start + count))
            eps.extend([norm.eps] * count)
            self._channels.append(count)
            return len(self._channels) - 1

        for part, layer in weighted(segment):
            after, before = place_of(part.after, part.bias), place_of(part.before, None)
            weight, bias = (None if name is None else slots[name] for name in (part.weight, part.bias))
            shape = None if weight is None else _grouped(layer)
            self._steps.append(_Step(shape, weight, bias, after, before))
            self._row_sizes += [math.prod(layer.weight_shape), layer.weight_shape[0] if layer.bias else 0]
        read = {reference for part in segment.parts for reference in part.references()}
        self._unread = [i for name, i in slots.items() if name not in read]
        self._spread, self._spread_sizes = self._places_of_spread()
        self._eps = torch.tensor(eps, dtype=torch.float32, device="cpu")
        had = {name: known for name, known in zip(_NUMBERS, columns, strict=True) if name in _STATISTICS or max(known, default=-1) >= 0}
        self._had = tuple(had)  # by some norm
        columns_of_all = torch.tensor([*had.values()], dtype=torch.long, device="cpu").flatten()
        self._given = columns_of_all >= 0
        self._columns, self._own_columns = columns_of_all.clamp(min=0), columns_of_all[self._given]
        self._places = self._given.nonzero().flatten()
        neutral = [float(name == "weight") for name in had for _ in eps]  # what a norm without a number has: a scale of 1, others of 0
        self._neutral = None if self._given.all() else torch.tensor(neutral, dtype=torch.float32, device="cpu")

    def fold(self, weights: Tensor) -> tuple[Tensor, Saved]:
        """Folded weights ``[k, P']`` of the graph's ``[k, P]``, and what :meth:`unfold` reads. Not differentiable."""
        with torch.no_grad():
            saved, k = self._numbers(weights), len(weights)
            rows = weights.new_empty(k, sum(self._row_sizes))
            own, pieces = weights.split_with_sizes(self._slot_sizes, 1), iter(rows.split_with_sizes(self._row_sizes, 1))
            factors, shifts = (x.split_with_sizes(self._channels, 1) for x in (saved.factor, saved.shift))
            spread = iter(saved.spread)
            for step in self._steps:
                weight, bias = next(pieces), next(pieces)
                after, before = step.after, step.before
                shift = shifts[after] if after is not None else None if step.bias is None else own[step.bias]
                if step.shape is None or step.weight is None:
                    assert after is not None  # an affine step is that norm
                    weight.copy_(factors[after])
                elif after is None and before is None:
                    weight.copy_(own[step.weight])
                else:
                    g, o, _ = step.shape
                    source, target = own[step.weight].view(k, *step.shape), weight.view(k, *step.shape)
                    if after is not None:
                        source = torch.mul(source, factors[after].view(k, g, o, 1), out=target if before is None else None)
                    if before is not None:
                        torch.mul(source, next(spread).view(k, g, 1, -1), out=target)
                        moved = source * next(spread).view(k, g, 1, -1)
                        if shift is None:
                            torch.sum(moved, 3, out=bias.view(k, g, o))
                        else:
                            torch.add(shift, moved.sum(3).view(k, g * o), out=bias)
                        shift = None  # it is there
                        saved.ahead.append(source)
                if shift is not None:
                    bias.copy_(shift)
        return rows, saved

    def unfold(self, slopes: Tensor, saved: Saved, out: Tensor) -> None:
        """Write gradients ``[k, P]`` of the graph's own weights, from those of the folded ones, ``[k, P']``."""
        with torch.no_grad():
            k, channels, had = len(slopes), len(self._eps), self._had
            names = [*(name for name in had if name != "bias"), "bias", "factor"]  # all that norms have, and behind it what none has
            found = slopes.new_empty(k, len(names) * channels)
            of = dict(zip(names, found.split_with_sizes([channels] * len(names), 1), strict=True))
            self._unfold_layers(slopes, saved, found[:, -2 * channels :].unflatten(1, (2, channels)), out)
            of_bias = torch.mul(of["bias"], saved.factor, out=of.get("bias ahead", of["running_mean"]))
            torch.neg(of_bias, out=of["running_mean"])
            of["factor"].addcmul_(of["bias"], saved.centered)
            of_scale = torch.mul(of["factor"], saved.root, out=of.get("weight", of["factor"]))
            torch.mul(of_scale, saved.factor, out=of["running_var"]).mul_(saved.root).mul_(-0.5)
            found = found[:, : len(had) * channels] if self._neutral is None else found.index_select(1, self._places)
            out.index_copy_(1, self._own_columns, found)

    def _unfold_layers(self, slopes: Tensor, saved: Saved, of_norms: Tensor, out: Tensor) -> None:
        """Write the gradients of layers' own numbers, and those of all norms' shifts and factors, ``[k, 2, C]``."""
        k, pieces, spread, ahead = len(slopes), iter(slopes.split_with_sizes(self._row_sizes, 1)), iter(saved.spread), iter(saved.ahead)
        own, made = (x.split_with_sizes(self._slot_sizes, 1) for x in (saved.weights, out))
        factors, pairs = saved.factor.split_with_sizes(self._channels, 1), of_norms.split_with_sizes(self._channels, 2)
        for i in self._unread:
            made[i].zero_()
        for step in self._steps:
            slope, of_bias = next(pieces), next(pieces)
            after, before = step.after, step.before
            if after is not None:
                pairs[after][:, 0].copy_(of_bias)
            elif step.bias is not None:
                made[step.bias].copy_(of_bias)
            if step.shape is None or step.weight is None:
                assert after is not None
                pairs[after][:, 1].copy_(slope)
                continue
            if after is None and before is None:
                made[step.weight].copy_(slope)
                continue
            g, o, wide = step.shape
            slope, target = slope.view(k, *step.shape), made[step.weight].view(k, *step.shape)
            if before is not None:
                source, of_bias, pair = next(ahead), of_bias.view(k, g, o, 1), pairs[before]
                products = slopes.new_empty(k, 2, *step.shape)
                torch.mul(source, of_bias, out=products[:, 0])
                torch.mul(source, slope, out=products[:, 1])
                if self._channels[before] == g * wide:  # a channel has one pixel
                    torch.sum(products, 3, out=pair.unflatten(2, (g, -1)))
                else:
                    torch.sum(products.sum(3).view(*pair.shape, -1), 3, out=pair)
                slope = torch.mul(slope, next(spread).view(k, g, 1, -1), out=target if after is None else None)
                slope.addcmul_(of_bias, next(spread).view(k, g, 1, -1))
            if after is not None:
                torch.sum(slope * own[step.weight].view(k, *step.shape), 3, out=pairs[after][:, 1].view(k, g, o))
                torch.mul(slope, factors[after].view(k, g, o, 1), out=target)

    def _numbers(self, weights: Tensor) -> Saved:
        """Factors and shifts of all norms' channels."""
        numbers, channels = weights.index_select(1, self._columns), len(self._eps)
        if self._neutral is not None:
            numbers = torch.where(self._given, numbers, self._neutral)
        of = dict(zip(self._had, numbers.split_with_sizes([channels] * len(self._had), 1), strict=True))
        bias, scale, shift, mean = of.get("bias ahead"), of.get("weight"), of.get("bias"), of["running_mean"]
        centered, root = -mean if bias is None else bias - mean, (of["running_var"] + self._eps).rsqrt_()
        both = weights.new_empty(len(weights), 2 * channels)
        factor, moved = both.split_with_sizes([channels] * 2, 1)
        if scale is None:
            factor.copy_(root)
        else:
            torch.mul(root, scale, out=factor)
        if shift is None:
            torch.mul(centered, factor, out=moved)
        else:
            torch.addcmul(shift, centered, factor, out=moved)
        spread = both.index_select(1, self._spread).split_with_sizes(self._spread_sizes, 1)
        return Saved(weights, centered, root, factor, moved, spread)

    def _places_of_spread(self) -> tuple[Tensor, list[int]]:
        """Columns of all factors and shifts that :class:`Saved` spreads, and how many there are of each."""
        places: list[int] = []
        sizes: list[int] = []
        for step in self._steps:
            if step.before is not None and step.shape is not None:
                count, start = self._channels[step.before], sum(self._channels[: step.before])
                groups, _, wide = step.shape
                for first in (start, start + sum(self._channels)):
                    places += [channel for channel in range(first, first + count) for _ in range(groups * wide // count)]
                sizes += [groups * wide] * 2
        return torch.tensor(places, dtype=torch.long, device="cpu"), sizes


def can_be_planned(segment: Segment) -> bool:
    """Whether every parameter is read once."""
    reads = [reference for part in segment.parts for reference in part.references()]
    return len(reads) == len(set(reads))


def _grouped(layer: Weighted) -> tuple[int, int, int]:
    """``[groups, outputs, channels * pixels]`` of a layer's weight."""
    groups = layer.groups if isinstance(layer, Conv2d) else 1
    return groups, layer.weight_shape[0] // groups, math.prod(layer.weight_shape[1:])
