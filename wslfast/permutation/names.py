"""Names of numbers, and which permutations keep a set of them.

A *group* is a set of channels with one permutation; a group that is *fixed* keeps its order. An *id* is one channel of one group. Every
number of a network, a weight or an activation, has a *name*, the tuple of the ids that it belongs to: number (i, j) of a linear layer's
weight is called (output channel i, input channel j). Permuting a group renames, and whatever is called a is then where what is called
its image was. A sum over an axis, or a function of several tensors number by number, is left unchanged if the set of names that it runs
over is *closed*: each permutation maps it onto itself. :meth:`Names.close` makes a set closed by giving up permutations: it replaces
groups by parts of them, by products of smaller ones (a head and a place in it), by others, or fixes them.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Names:
    """All groups of one network. Ids are whole numbers, -1 is none."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.fixed: list[bool] = []
        self._first: list[int] = []
        self._ids = 0
        self._group = torch.empty(0, dtype=torch.long)  # of each id
        self._now = torch.empty(0, 1, dtype=torch.long)  # what each id is by now, -1 where it is fewer than the longest
        self._places: dict[int, Tensor] = {}

    # -- groups --------------------------------------------------------------------------------------------------------

    def new(self, size: int, fixed: bool = False) -> Tensor:
        """Ids ``[size]`` of a new group."""
        first = self._ids
        if first + size > len(self._group):
            room = max(first + size, 2 * len(self._group), 1024) - len(self._group)
            self._group = torch.cat([self._group, torch.full((room,), -1)])
            self._now = torch.cat([self._now, torch.full((room, self._now.shape[1]), -1)])
        ids = torch.arange(first, first + size)
        self._group[first : first + size] = len(self.sizes)
        self._now[first : first + size, 0] = ids
        self.sizes.append(size)
        self.fixed.append(fixed or size < 2)
        self._first.append(first)
        self._ids += size
        return ids

    def places(self, size: int) -> Tensor:
        """Fixed ids ``[size]``: places along an axis whose order is kept."""
        if size not in self._places:
            self._places[size] = self.new(size, fixed=True)
        return self._places[size]

    def group(self, ids: Tensor) -> Tensor:
        """The group of each id, -1 where there is none."""
        return torch.where(ids < 0, -1, self._group[ids.clamp_min(0)])

    def index(self, ids: Tensor) -> Tensor:
        """The number of each id in its group."""
        group = self.group(ids)
        return torch.where(group < 0, -1, ids - torch.tensor(self._first)[group.clamp_min(0)])

    def free(self, ids: Tensor) -> Tensor:
        """Whether an id is one of a group that may be permuted."""
        group = self.group(ids)
        return (group >= 0) & ~torch.tensor(self.fixed)[group.clamp_min(0)]

    def move(self, ids: Tensor) -> Tensor:
        """Whether an id is called by anything that may be permuted."""
        return self.free(self._now[ids]).any(1)

    def fix(self, groups: list[int]) -> None:
        """Keep the order of groups."""
        for group in groups:
            self.fixed[group] = True

    def fix_all(self, columns: Tensor | list[Tensor]) -> None:
        """Keep the order of every group in these names."""
        for column in columns:
            groups = self.group(self.resolved(column.reshape(1, -1), constant=True)).unique()
            self.fix(groups[groups >= 0].tolist())

    def resolved(self, columns: Tensor | list[Tensor], constant: bool = False) -> Tensor:
        """Names ``[m, N]`` by what their ids are now, ``[m', N]``, columns that say nothing left out (``constant``: those kept that say
        the same everywhere). One id of a group that may be permuted does say something: that it is not another."""
        telling: list[Tensor] = []
        for column in columns:
            now = self._now[column.clamp_min(0)]
            for c in range(now.shape[1]):
                ids = torch.where(column < 0, -1, now[:, c])
                if not len(ids):
                    continue
                varies = bool((ids != ids[0]).any())
                if varies or (int(ids[0]) >= 0 and (constant or bool(self.free(ids[:1])))):
                    telling.append(ids)
        return torch.stack(telling) if telling else torch.empty(0, columns[0].shape[0] if len(columns) else 0, dtype=torch.long)

    def replace(self, ids: Tensor, names: Tensor) -> None:
        """From now on the ids ``[size]`` of one group are called ``names [size, q]``."""
        group = int(self._group[ids[0]])
        table = torch.full((self.sizes[group], names.shape[1]), -1)
        table[ids - self._first[group]] = names
        before = self._now[: self._ids]
        in_group = (before >= 0) & (self._group[before.clamp_min(0)] == group)
        rows = in_group.any(1).nonzero().flatten()
        parts: list[Tensor] = []
        for column, here in zip(before[rows].unbind(1), in_group[rows].unbind(1), strict=True):
            new = torch.full((len(rows), table.shape[1]), -1)
            new[here] = table[column[here] - self._first[group]]
            new[:, 0] = torch.where(here, new[:, 0], column)
            parts.append(new)
        after = once(torch.cat(parts, 1))
        after = after.gather(1, (after < 0).to(torch.int8).argsort(dim=1, stable=True))  # what is there first
        after = after[:, : max(int((after >= 0).sum(1).max()), 1)]
        wider = after.shape[1] - self._now.shape[1]
        if wider > 0:
            self._now = torch.nn.functional.pad(self._now, (0, wider), value=-1)
        self._now[rows] = torch.nn.functional.pad(after, (0, -min(wider, 0)), value=-1)

    def split(self, group: int, kind: Tensor) -> None:
        """Channels of a group are interchangeable only with those of the same kind ``[size]``."""
        ids = torch.arange(self._first[group], self._first[group] + self.sizes[group])
        apart = self.new(int(kind.max()) + 1, fixed=True)  # one kind may come to be called by another, and is still not it
        names = torch.stack([torch.full_like(ids, -1), apart[kind]], 1)
        for k in range(len(apart)):
            names[kind == k, 0] = self.new(int((kind == k).sum()))
        self.replace(ids, names)

    # -- closing -------------------------------------------------------------------------------------------------------

    def close(self, rows: Tensor) -> Tensor:
        """Names ``[S, m]`` (as they are now, ``[S, m']``) after their set, each as often as it is there, has been made closed."""
        while True:
            rows = once(self.resolved(rows.T).T) if rows.shape[1] else rows
            if not rows.shape[1] or self._plain(rows) or not self._restricted(rows):
                return rows

    def _plain(self, rows: Tensor) -> bool:
        """Whether names are at a glance a closed set: one whole group, or nothing that moves."""
        if rows.shape[1] > 1:
            return not bool(self.free(rows).any())
        groups = self.group(rows[:, 0])
        whole = int(groups[0]) >= 0 and len(rows) == self.sizes[int(groups[0])] and bool((groups == groups[0]).all())
        return (whole and len(rows[:, 0].unique()) == len(rows)) or not bool(self.free(rows).any())

    def _restricted(self, rows: Tensor) -> bool:
        """Give up what the next reason asks for; False if the set is closed."""
        rows, counts = torch.unique(rows, dim=0, return_counts=True)
        free = self.free(rows)
        kinds = torch.cat([torch.where(free, self.group(rows), -2 - rows), counts.unsqueeze(1)], 1)  # fixed ids are kinds of their own
        if self._called_by_others(rows, kinds, free):
            return True
        classes, which = torch.unique(kinds, dim=0, return_inverse=True)
        sizes = torch.tensor([*self.sizes, 1], dtype=torch.float64)
        whole = torch.where(classes[:, :-1] >= 0, sizes[classes[:, :-1].clamp_min(-1)], 1.0).prod(1)
        broken = (torch.bincount(which).double() != whole).nonzero().flatten().tolist()
        if not broken:
            return False
        groups = classes[broken, :-1].flatten().unique()
        if self._parted(rows, which, groups[groups >= 0].tolist()):
            return True
        columns = (classes[broken[0], :-1] >= 0).nonzero().flatten()
        block = rows[which == broken[0]][:, columns]
        if not self._called_by_what_they_tell(block):
            self._fix_what_is_not_independent(block)
        return True

    def _called_by_others(self, rows: Tensor, kinds: Tensor, free: Tensor) -> bool:
        """A group whose every id is in one row, and one column, is called by the rest of its rows: the columns of a weight by the
        features that they are multiplied with. Where that rest is there several times, by its number among them as well."""
        for c in reversed(range(rows.shape[1] if rows.shape[1] > 1 else 0)):
            changed = False
            for group in kinds[free[:, c], c].unique().tolist():
                in_group = (kinds[:, c] == group) & free[:, c]
                ids = rows[in_group, c]
                elsewhere = int(((kinds[:, :-1] == group) & free).sum()) > len(ids)
                if elsewhere or len(ids) != self.sizes[group] or len(ids.unique()) != len(ids):
                    continue
                others = torch.cat([rows[in_group, :c], rows[in_group, c + 1 :]], 1)
                kind = torch.cat([kinds[in_group, :c], kinds[in_group, c + 1 :]], 1)
                if len(torch.unique(others, dim=0)) == 1:
                    continue
                self.replace(ids, torch.cat([others, self._numbers(others, kind).unsqueeze(1)], 1))
                changed = True
            if changed:
                return True
        return False

    def _numbers(self, names: Tensor, kinds: Tensor) -> Tensor:
        """Ids ``[S]`` that tell equal ``names [S, m]`` apart: of one group for all of one kind that are as often there; -1 where once."""
        _, same, counts = torch.unique(names, dim=0, return_inverse=True, return_counts=True)
        often = counts[same]
        order = same.argsort(stable=True)
        first = torch.cat([counts.new_zeros(1), counts.cumsum(0)[:-1]])
        rank = torch.empty_like(same)
        rank[order] = torch.arange(len(same)) - first[same[order]]
        _, which = torch.unique(torch.cat([kinds, often.unsqueeze(1)], 1), dim=0, return_inverse=True)
        numbers = torch.full_like(same, -1)
        for w in which[often > 1].unique().tolist():
            members = which == w
            numbers[members] = self.new(int(often[members][0]))[rank[members]]
        return numbers

    def _parted(self, rows: Tensor, which: Tensor, groups: list[int]) -> bool:
        """Split groups whose ids are not all in the same classes of rows."""
        group = self.group(rows)
        code = torch.randint(1 << 62, (int(which.max()) + 1, rows.shape[1]), generator=torch.Generator().manual_seed(0))[which]
        changed = False
        for g in groups:
            at = group == g
            pairs = torch.unique(torch.stack([rows[at], code[at]], 1), dim=0)
            pattern = torch.zeros(self.sizes[g], dtype=torch.long).index_add(0, pairs[:, 0] - self._first[g], pairs[:, 1])
            kind = torch.unique(pattern, return_inverse=True)[1]
            if int(kind.max()):
                self.split(g, kind)
                changed = True
        return changed

    def _called_by_what_they_tell(self, block: Tensor) -> bool:
        """A group whose ids say which id of others a row has is called by those and a number."""
        group = self.group(block[0])
        for a in range(block.shape[1]):
            if int((group == group[a]).sum()) > 1:
                continue
            told = [
                b
                for b in range(block.shape[1])
                if group[b] != group[a] and len(torch.unique(block[:, [a, b]], dim=0)) == self.sizes[int(group[a])]
            ]
            if not told:
                continue
            pairs = torch.unique(block[:, [a, *told]], dim=0)
            counts = torch.unique(pairs[:, 1:], dim=0, return_inverse=True, return_counts=True)
            often = counts[2][counts[1]]
            if int(often.min()) != int(often.max()):
                self.split(int(group[a]), torch.unique(often, return_inverse=True)[1])
            else:
                number = self._numbers(pairs[:, 1:], torch.zeros(len(pairs), 1, dtype=torch.long))
                self.replace(pairs[:, 0], torch.cat([pairs[:, 1:], number.unsqueeze(1)], 1))
            return True
        return False

    def _fix_what_is_not_independent(self, block: Tensor) -> None:
        """Fix the groups of a class of rows but those that go with every combination of the others."""
        for c in reversed(range(block.shape[1])):
            if block.shape[1] > 1:
                rest = torch.unique(torch.cat([block[:, :c], block[:, c + 1 :]], 1), dim=0)
                group = self.group(block[0, c])
                if not bool((self.group(rest[0]) == group).any()) and len(block) == len(rest) * self.sizes[int(group)]:
                    block = rest
        self.fix(self.group(block[0]).tolist())


def once(rows: Tensor) -> Tensor:
    """Names ``[S, m]`` with an id that is twice in one of them kept once, and columns that are empty then left out."""
    rows = rows.clone()
    for c in range(1, rows.shape[1]):
        again = (rows[:, :c] == rows[:, c : c + 1]).any(1)
        rows[again, c] = -1
    return rows[:, (rows >= 0).any(0)]
