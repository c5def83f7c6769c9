"""The groups of hidden channels of an architecture, and which numbers of a row of weights move with them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from ..architecture import Architecture
from ..kernels.graph import Graph
from ..kernels.layers import Conv2d, Linear
from ..tokens import layers_of
from .axes import Axis, ChannelGroups, Part
from .following import followed
from .names import Names, once
from .trial import failing

_GROUPED = "a grouped convolution in a chain of layers"
_TRIED = "a permutation of them changes the outputs"


def channel_groups(architecture: Architecture, device: torch.device | None = None) -> ChannelGroups:
    """The groups of an architecture, in the order in which the axes of its parameters are called after them; none for a module that cannot
    be traced.

    A plain chain of layers has one for each hidden layer, which is empty where a grouped convolution reads or makes its channels.
    """
    return _derived(architecture) if device is None or device.type == "cpu" else _elsewhere(architecture, device)


@lru_cache(maxsize=64)
def _elsewhere(architecture: Architecture, device: torch.device) -> ChannelGroups:
    return _derived(architecture).to(device)


@lru_cache(maxsize=64)
def _derived(architecture: Architecture) -> ChannelGroups:
    graph = architecture.graph
    if graph is None:
        return ChannelGroups((), {}, {slot.name: "the module cannot be traced" for slot in architecture.parameters})
    names, own, kept_by = followed(graph)
    called = {slot.name: [once(names.resolved(ids.unsqueeze(0)).T) for ids in own[slot.name]] for slot in graph.slots}
    if architecture.planned:
        chosen, sizes = _of_chain(architecture, names, called)
        axes = _axes(architecture, names, called, chosen)
        return ChannelGroups(sizes, axes, _kept(architecture, graph, axes, kept_by, _GROUPED))
    free = _free(architecture, names, called)
    while True:
        try:
            axes = _axes(architecture, names, called, {group: i for i, group in enumerate(free)})
            kept = _kept(architecture, graph, axes, kept_by, _TRIED)
            groups = ChannelGroups(tuple(names.sizes[group] for group in free), axes, kept)
            wrong = failing(graph, groups)
        except _Open as unclear:
            wrong = unclear.groups
        if not wrong:
            return groups
        free = [group for i, group in enumerate(free) if i not in wrong]


def _free(architecture: Architecture, names: Names, called: Mapping[str, list[Tensor]]) -> list[int]:
    """Every group that may be permuted, in the order of the parameters."""
    groups: dict[int, None] = {}
    for slot in architecture.parameters:
        for columns in called[slot.name]:
            groups.update(dict.fromkeys(names.group(columns)[names.free(columns)].tolist()))
    return list(groups)


def _of_chain(architecture: Architecture, names: Names, called: Mapping[str, list[Tensor]]) -> tuple[dict[int, int], tuple[int, ...]]:
    """The number of each group of a chain, one a hidden layer, and their sizes: nothing is permuted beside grouped convolutions."""
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


# -- axes ----------------------------------------------------------------------------------------------------------------


def _axes(
    architecture: Architecture, names: Names, called: Mapping[str, list[Tensor]], chosen: Mapping[int, int]
) -> dict[str, tuple[Axis | None, ...]]:
    """Of each parameter that moves, its axes."""
    rows = {layer.slot.name: layer.axes for layer in layers_of(architecture)}
    axes = {}
    for slot in architecture.parameters:
        moving = tuple(_axis(names, c, a in rows.get(slot.name, (0,)), chosen) for a, c in enumerate(called[slot.name]))
        if any(axis is not None for axis in moving):
            axes[slot.name] = moving
    return axes


class _Open(Exception):
    """Groups by which places of an axis cannot be told apart, or that would move one to where there is none."""

    def __init__(self, groups: tuple[int, ...]) -> None:
        super().__init__(groups)
        self.groups = groups


def _axis(names: Names, columns: Tensor, rows: bool, chosen: Mapping[int, int]) -> Axis | None:
    """How the places of an axis, called ``columns [S, m]``, move."""
    group = names.group(columns)
    moving = torch.isin(group, torch.tensor(list(chosen), dtype=torch.long)) & (columns >= 0)
    if not bool(moving.any()):
        return None
    if columns.shape[1] == 1 and bool((moving & (group == group[0])).all()):  # as almost all are: one whole group
        channels = names.index(columns)
        if len(channels) != names.sizes[int(group[0])] or len(channels.unique()) != len(channels):
            raise _Open((chosen[int(group[0])],))
        places, at = torch.arange(len(columns)), channels.flatten().argsort()
        return Axis(len(columns), rows, (Part(places, (chosen[int(group[0])],), channels, (1,), torch.zeros_like(places), at),))
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
        strides: list[int] = []
        total = 1
        for g in reversed(groups):
            strides.insert(0, total)
            total *= names.sizes[g]
        base = torch.unique(rest[places], return_inverse=True)[1] * total
        flat = base + (channels * torch.tensor(strides)).sum(1)
        table = torch.full(((int(base.max()) + total),), -1)
        table[flat] = places
        if bool((table < 0).any()) or len(table) != len(places):
            raise _Open(tuple(chosen[g] for g in groups))
        parts.append(Part(places, tuple(chosen[g] for g in groups), channels, tuple(strides), base, table))
    return Axis(len(columns), rows, tuple(parts))


# -- what stays ------------------------------------------------------------------------------------------------------------


def _kept(
    architecture: Architecture,
    graph: Graph,
    axes: Mapping[str, tuple[Axis | None, ...]],
    kept_by: Mapping[str, list[Tensor]],
    otherwise: str,
) -> dict[str, str]:
    """Layers whose outputs, or some of them, keep their order though nobody outside asks for one, and what asks for it."""
    kept: dict[str, str] = {}
    for layer in layers_of(architecture):
        if not layer.multiplies:
            continue
        name, reasons = layer.slot.name, []
        for axis in layer.axes:
            size, by = layer.slot.shape[axis], kept_by[name][axis]
            stays = torch.ones(size, dtype=torch.bool)
            along = axes[name][axis] if name in axes else None
            for part in () if along is None else along.parts:
                stays[part.places] = False
            stays &= by < len(graph.nodes)
            if size > 1 and bool(stays.any()):
                at = sorted({int(i) for i in by[stays]})
                why = " and ".join(dict.fromkeys(otherwise if i < 0 else f"operation {i} ({graph.nodes[i].operation})" for i in at))
                reasons.append(f"{int(stays.sum())} of {size}: {why}")
        if reasons:
            kept[name] = "; ".join(reasons)
    return kept
