"""The names of a tensor's numbers, axis by axis or number by number.

What a network multiplies and adds has its names axis by axis: number (i, j) is called what its row i and its column j are called. What is
only moved about (reshaped, cut, joined) has them number by number, and is brought into the first form when something computes with it: the
rows of one matrix that is cut into queries, keys and values are thus called apart, and a feature that becomes a head and a place in it by
a reshape is both once somebody treats the two differently.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .names import Names

_MOST_COLUMNS = 64  # ways in which an axis may be called along the other axes, before its groups are fixed


def _nothing(size: int) -> Tensor:
    return torch.empty(size, 0, dtype=torch.long)


class Value:
    """A tensor of one query: its shape, and its names in one of the two forms.

    Attributes:
        shape: its sizes, one query.
    """

    def __init__(self, names: Names, shape: Sequence[int], axes: Sequence[Tensor] | None = None, ids: Sequence[Tensor] = ()) -> None:
        self.names, self.shape = names, tuple(shape)
        self._axes = None if axes is None else list(axes)
        self._ids = list(ids)

    @classmethod
    def unnamed(cls, names: Names, shape: Sequence[int]) -> Value:
        """One whose numbers are all the same."""
        return cls(names, shape, [_nothing(size) for size in shape])

    @classmethod
    def placed(cls, names: Names, shape: Sequence[int], axes: Sequence[int] | None = None) -> Value:
        """One whose numbers keep their places along these axes (all), and are the same along the others."""
        called = range(len(shape)) if axes is None else axes
        columns = [
            names.places(size).unsqueeze(1) if a in called and size > 1 else torch.empty(size, 0).long() for a, size in enumerate(shape)
        ]
        return cls(names, shape, columns)

    @property
    def axes(self) -> list[Tensor]:
        """Names ``[size, m]`` of every axis, each set of them closed."""
        if self._axes is None:
            self._axes = [self.names.close(columns) for columns in _by_axis(self.names, self._ids, self.shape)]
            self._ids = []
        return self._axes

    def ids(self) -> list[Tensor]:
        """Names number by number: ids of the value's shape, a tensor for each id of a name, -1 for none."""
        if self._axes is None:
            return self._ids
        layers = []
        for axis, columns in enumerate(self._axes):
            for column in self.names.resolved(columns.T) if columns.shape[1] else ():
                layers.append(column.view([-1 if a == axis else 1 for a in range(len(self.shape))]).expand(self.shape))
        return layers

    def fix(self) -> None:
        """Keep the order of every group that it is called by."""
        self.names.fix_all([column.reshape(-1) for column in (self.ids() if self._axes is None else [c for x in self._axes for c in x.T])])


def moved(names: Names, move: Callable[[list[Tensor]], Any], values: Sequence[Value], told_apart: bool) -> Any:
    """What comes out of an operation that only moves numbers about: a value, or a tuple of them.

    Args:
        move: the operation, on tensors in the place of the values.
        values: what it reads.
        told_apart: whether numbers of different operands meet in one result, and are called after their operand as well.
    """
    slots = [value.ids() for value in values]
    layers = max((len(s) for s in slots), default=0)
    rows = [[_at(s, i, value.shape) for s, value in zip(slots, values, strict=True)] for i in range(layers)]
    if told_apart:
        places = names.places(len(values))
        rows.append([torch.full(value.shape, int(place)) for value, place in zip(values, places, strict=True)])
    # as floating numbers, as every operation takes them; zero is none, as padding is
    results = [move([(ids + 1).double() for ids in row]) for row in rows]
    if not results:
        results, rows = [move([torch.zeros(value.shape, dtype=torch.float64) for value in values])], []
    several = isinstance(results[0], (tuple, list))
    parts = [list(r) if several else [r] for r in results]
    made = [Value(names, parts[0][j].shape, None, [parts[i][j].round().long() - 1 for i in range(len(rows))]) for j in range(len(parts[0]))]
    return tuple(made) if several else made[0]


def _at(slots: list[Tensor], i: int, shape: tuple[int, ...]) -> Tensor:
    return slots[i] if i < len(slots) else torch.full(shape, -1)


def _by_axis(names: Names, ids: list[Tensor], shape: tuple[int, ...]) -> list[Tensor]:
    """Names of every axis ``[size, m]`` from names number by number, after groups that run along several axes at once have become
    products of one along each, and an id that is alone a group of its own."""
    long = [axis for axis, size in enumerate(shape) if size > 1]
    while True:
        slots = [s.view(shape) for s in names.resolved([s.reshape(-1) for s in ids])]
        along: list[dict[int, int]] = []  # of each layer of ids: the one axis of each group
        several = False
        for slot in slots:
            along.append({})
            for group, axes in _axes_of(names, slot, long).items():
                if len(axes) > 1:
                    _separate(names, slot, group, axes)
                    several = True
                elif axes:
                    along[-1][group] = axes[0]
                else:
                    _single(names, slot, group)
                    several = True
        if not several:
            break
    return [
        _columns(names, slots, along, axis, shape) if axis in long else torch.empty(shape[axis], 0).long() for axis in range(len(shape))
    ]


def _single(names: Names, slot: Tensor, group: int) -> None:
    """Tell the one id of a group that is there apart from the others; fix a group of which several are, along no axis."""
    ids = slot[names.group(slot) == group].unique()
    if len(ids) == 1:
        names.split(group, (torch.arange(names.sizes[group]) == names.index(ids)).long())
    else:
        names.fix([group])


def _axes_of(names: Names, slot: Tensor, long: list[int]) -> dict[int, list[int]]:
    """Of every free group in one layer of ids: the axes along which its id changes."""
    groups, free = names.group(slot), names.free(slot)
    changing: dict[int, list[int]] = {}
    for group in groups[free].unique().tolist():
        in_group = groups == group
        high, low = torch.where(in_group, slot, -1), torch.where(in_group, slot, torch.iinfo(torch.long).max)
        changing[group] = [axis for axis in long if bool(((high.amax(axis) > low.amin(axis)) & in_group.any(axis)).any())]
    return changing


def _separate(names: Names, slot: Tensor, group: int, axes: list[int]) -> None:
    """Make a group that runs along several axes a product of one along each; fix what is none."""
    in_group = names.group(slot) == group
    at = in_group.nonzero()
    rows = torch.cat([slot[in_group].unsqueeze(1), *(names.new(slot.shape[axis])[at[:, axis]].unsqueeze(1) for axis in axes)], 1)
    names.close(torch.unique(rows, dim=0))
    now = names.group(names.resolved(rows[:, :1].T, constant=True))
    if bool((now == group).any()):  # it is closed as it is, and yet no product: it cannot be told by axis
        names.fix([group])


def _columns(names: Names, slots: list[Tensor], along: list[dict[int, int]], axis: int, shape: tuple[int, ...]) -> Tensor:
    """What the places of one axis are called: the ids of the groups along it, and the place wherever anything else changes along it."""
    size = shape[axis]
    generator = torch.Generator().manual_seed(0)
    columns: list[Tensor] = []
    pattern = torch.zeros(size, dtype=torch.long)
    for slot, of in zip(slots, along, strict=True):
        here = torch.tensor([group for group, at in of.items() if at == axis], dtype=torch.long)
        lines = slot.movedim(axis, 0).reshape(size, -1)
        groups, free = names.group(lines), names.free(lines)
        in_groups = torch.isin(groups, here) & free
        if bool(in_groups.any()):
            called = torch.where(in_groups, lines, -1)
            code = (called * torch.randint(1 << 40, (size, 1), generator=generator)).sum(0)
            first = torch.unique(code, return_inverse=True)[1]
            which = torch.full((int(first.max()) + 1,), 0).scatter(0, first, torch.arange(len(first)))
            if len(which) > _MOST_COLUMNS:
                names.fix(here.tolist())
                return _columns(names, slots, along, axis, shape)
            columns += list(called[:, which].unbind(1))
        rest = torch.where(free, -2 - groups, lines)
        pattern += (rest * torch.randint(1 << 40, (1, rest.shape[1]), generator=generator)).sum(1)
    kinds, which = torch.unique(pattern, return_inverse=True)
    if len(kinds) > 1:
        columns.append(names.places(size)[which])
    return torch.stack(columns, 1) if columns else _nothing(size)
