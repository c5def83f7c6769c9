"""The groups of hidden channels of an architecture, and which numbers of a row of weights move with them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from ..architecture import Architecture
from ..kernels.graph import Slot
from ..kernels.layers import Conv2d, Linear
from ..tokens import layers_of
from .following import followed
from .names import Names, once


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
        moved = (t.to(device) for t in (self.places, self.channels, self.base, self.at))
        places, channels, base, at = moved
        return Part(places, self.groups, channels, self.strides, base, at)

    def source(self, permutations: tuple[Tensor, ...]) -> Tensor:
        """``[k, R]``: where along the axis what comes to each place is read from."""
        found = self.base
        for i, (group, stride) in enumerate(zip(self.groups, self.strides, strict=True)):
            found = found + permutations[group].index_select(1, self.channels[:, i]) * stride
        return self.at[found]


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

    def source(self, permutations: tuple[Tensor, ...]) -> Tensor:
        """``[k, size]``: where along the axis what comes to each place is read from."""
        if len(self.parts) == 1 and len(self.parts[0].places) == self.size:
            return self.parts[0].source(permutations)
        k, device = len(permutations[0]), permutations[0].device
        found = torch.arange(self.size, device=device).repeat(k, 1)
        for part in self.parts:
            found[:, part.places] = part.source(permutations)
        return found


@dataclass(frozen=True, eq=False)
class ChannelGroups:
    """Which permutations of channels leave the functions of an architecture unchanged.

    Attributes:
        sizes: channels of each group, each of which may be put in any order by itself.
        axes: of each parameter that moves, by name, its axes; None for one along which nothing moves.
    """

    sizes: tuple[int, ...]
    axes: dict[str, tuple[Axis | None, ...]]

    def to(self, device: torch.device) -> ChannelGroups:
        """The same with its indices on a device."""
        moved = {
            name: tuple(None if a is None else Axis(a.size, a.rows, tuple(part.to(device) for part in a.parts)) for a in axes)
            for name, axes in self.axes.items()
        }
        return ChannelGroups(self.sizes, moved)


@lru_cache(maxsize=64)
def channel_groups(architecture: Architecture, device: torch.device | None = None) -> ChannelGroups:
    """The groups of an architecture, in the order in which the axes of its parameters are called after them; none for a module that cannot
    be traced.

    A plain chain of layers has one for each hidden layer, which is empty where a grouped convolution reads or makes its channels.
    """
    if device is not None and device.type != "cpu":
        return channel_groups(architecture).to(device)
    graph = architecture.graph
    if graph is None:
        return ChannelGroups((), {})
    names, own = followed(graph)
    called = {slot.name: [once(names.resolved(ids.unsqueeze(0)).T) for ids in own[slot.name]] for slot in graph.slots}
    chosen, sizes = _of_chain(architecture, names, called) if architecture.planned else _of_graph(architecture, names, called)
    rows = {layer.slot.name: layer.axes for layer in layers_of(architecture)}
    axes = {}
    for slot in graph.slots:
        found = tuple(_axis(names, c, a in rows.get(slot.name, (0,)), chosen) for a, c in enumerate(called[slot.name]))
        if any(axis is not None for axis in found):
            axes[slot.name] = found
    return ChannelGroups(sizes, axes)


def _of_graph(architecture: Architecture, names: Names, called: dict[str, list[Tensor]]) -> tuple[dict[int, int], tuple[int, ...]]:
    """The number of every free group, in the order of the parameters, and their sizes."""
    chosen: dict[int, int] = {}
    for slot in architecture.parameters:
        for columns in called[slot.name]:
            free = names.free(columns)
            for group in names.group(columns)[free].tolist():
                chosen.setdefault(group, len(chosen))
    return chosen, tuple(names.sizes[group] for group in chosen)


def _of_chain(architecture: Architecture, names: Names, called: dict[str, list[Tensor]]) -> tuple[dict[int, int], tuple[int, ...]]:
    """The same of a chain: one group a hidden layer, of which nothing is permuted beside grouped convolutions."""
    layers = [layer for layer in architecture.layers if isinstance(layer, (Conv2d, Linear))]
    chosen, sizes = {}, []
    for i, (layer, following) in enumerate(pairwise(layers)):
        free = all(isinstance(a, Linear) or a.groups == 1 for a in (layer, following))
        columns = called[f"{layer.name}.weight"][0]
        if free and columns.shape[1] == 1 and bool(names.free(columns).all()):
            chosen[int(names.group(columns)[0])] = i
            sizes.append(layer.weight_shape[0])
        else:
            sizes.append(layer.weight_shape[0] if free and layer.weight_shape[0] == 1 else 0)
    return chosen, tuple(sizes)


def _axis(names: Names, columns: Tensor, rows: bool, chosen: dict[int, int]) -> Axis | None:
    """How the places of an axis, called ``columns [S, m]``, move."""
    group = names.group(columns)
    moving = torch.isin(group, torch.tensor(list(chosen), dtype=torch.long)) & (columns >= 0)
    if not bool(moving.any()):
        return None
    kinds, which = torch.unique(torch.where(moving, group, -1), dim=0, return_inverse=True)
    rest = torch.unique(torch.cat([torch.where(moving, -1, columns), which.unsqueeze(1)], 1), dim=0, return_inverse=True)[1]
    parts = []
    for w, kind in enumerate(kinds):
        at = (kind >= 0).nonzero().flatten().tolist()
        places = (which == w).nonzero().flatten()
        if not at:
            continue
        groups = tuple(int(kind[c]) for c in at)
        channels = names.index(columns[places][:, at])
        strides, total = [], 1
        for g in reversed(groups):
            strides.insert(0, total)
            total *= names.sizes[g]
        base = torch.unique(rest[places], return_inverse=True)[1] * total
        flat = base + (channels * torch.tensor(strides)).sum(1)
        table = torch.full(((int(base.max()) + total),), -1)
        table[flat] = places
        if bool((table < 0).any()):
            raise AssertionError("names that are not closed")
        parts.append(Part(places, tuple(chosen[g] for g in groups), channels, tuple(strides), base, table))
    return Axis(len(columns), rows, tuple(parts))


def read_from(slot: Slot, axes: tuple[Axis | None, ...], outputs: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> Tensor:
    """``[k, *shape]``: where in a row of weights each number of a permuted parameter is read from."""
    index, stride = torch.full((1,), slot.offset, device=outputs[0].device), slot.size
    for size, axis in zip(slot.shape, axes, strict=True):
        stride //= size
        place = torch.arange(size, device=index.device).unsqueeze(0) if axis is None else axis.source(outputs if axis.rows else inputs)
        index = index.unsqueeze(-1) + (place * stride).view(len(place), *(1,) * (index.ndim - 1), size)
    return index
