"""Along which axes of the parameters of an architecture channels lie, and where a permuted row of weights is read from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.graph import Slot

Permutations = tuple[Tensor, ...]  # one [k, channels] a group


@dataclass(frozen=True)
class Part:
    """Places of one axis of a parameter that move with the same groups.

    Attributes:
        places: ``[R]``, where they are along the axis.
        groups: which move them, one of which every place has a channel each.
        channels: ``[R, q]``, those channels.
        strides: ``[q]``: of ``at``, by channel.
        base: ``[R]``: in ``at``, of what else tells places apart.
        at: the place of every such combination.
    """

    places: Tensor
    groups: tuple[int, ...]
    channels: Tensor
    strides: tuple[int, ...]
    base: Tensor
    at: Tensor

    def to(self, device: torch.device) -> Part:
        """The same on a device."""
        places, channels, base, at = (t.to(device) for t in (self.places, self.channels, self.base, self.at))
        return Part(places, self.groups, channels, self.strides, base, at)

    def source(self, permutations: Permutations) -> Tensor:
        """``[k, R]``: where along the axis what comes to each place is read from."""
        index = self.base
        for i, (group, stride) in enumerate(zip(self.groups, self.strides, strict=True)):
            index = index + permutations[group].index_select(1, self.channels[:, i]) * stride
        return self.at[index]


@dataclass(frozen=True)
class Axis:
    """One axis of a parameter along which something moves.

    Attributes:
        size: of the axis.
        rows: whether it is one of those that count rows of tokens, the outputs of a layer.
        parts: places that move; the others stay.
    """

    size: int
    rows: bool
    parts: tuple[Part, ...]

    def source(self, permutations: Permutations) -> Tensor:
        """``[k, size]``: where along the axis what comes to each place is read from."""
        if len(self.parts) == 1 and len(self.parts[0].places) == self.size:
            return self.parts[0].source(permutations)
        k, device = len(permutations[0]), permutations[0].device
        index = torch.arange(self.size, device=device).repeat(k, 1)
        for part in self.parts:
            index[:, part.places] = part.source(permutations)
        return index


@dataclass(frozen=True, eq=False)
class ChannelGroups:
    """Which permutations of channels leave the functions of an architecture unchanged.

    Attributes:
        sizes: channels of each group, each of which may be put in any order by itself.
        axes: of each parameter that moves, by name, its axes; None for one along which nothing moves.
        kept: hidden channels that keep their order: the parameter that makes them, and why.
    """

    sizes: tuple[int, ...]
    axes: dict[str, tuple[Axis | None, ...]]
    kept: dict[str, str]

    def to(self, device: torch.device) -> ChannelGroups:
        """The same with its indices on a device."""
        moved = {
            name: tuple(None if a is None else Axis(a.size, a.rows, tuple(part.to(device) for part in a.parts)) for a in axes)
            for name, axes in self.axes.items()
        }
        return ChannelGroups(self.sizes, moved, self.kept)

    def source(self, slots: Iterable[Slot], num_weights: int, outputs: Permutations, inputs: Permutations) -> Tensor:
        """``[k, P]``: where each weight of permuted models is read from. ``inputs`` are of the axes that count no rows."""
        k, device = len(outputs[0]), outputs[0].device
        index = torch.arange(num_weights, device=device).repeat(k, 1)
        for slot in slots:
            if slot.name in self.axes:
                index[:, slot.offset : slot.stop] = _read_from(slot, self.axes[slot.name], outputs, inputs).flatten(1)
        return index


def _read_from(slot: Slot, axes: tuple[Axis | None, ...], outputs: Permutations, inputs: Permutations) -> Tensor:
    """``[k, *shape]``: where in a row of weights each number of a permuted parameter is read from."""
    index, stride = torch.full((1,), slot.offset, device=outputs[0].device), slot.size
    for size, axis in zip(slot.shape, axes, strict=True):
        stride //= size
        place = torch.arange(size, device=index.device).unsqueeze(0) if axis is None else axis.source(outputs if axis.rows else inputs)
        index = index.unsqueeze(-1) + (place * stride).view(len(place), *(1,) * (index.ndim - 1), size)
    return index
