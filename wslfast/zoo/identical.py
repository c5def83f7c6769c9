"""Identical weights: rows that repeat another row to the bit, and models that are one because they share a trained checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .splits import Split


class First(NamedTuple):
    """The first row with certain weights: its model, its epoch (None if not known), and a name for messages."""

    model: int
    epoch: int | None
    where: str


class Identical:
    """The rows so far, by a digest of their bits.

    Models that share a trained checkpoint are of one family: a trial copied, renamed or resumed in another folder. The initial weights
    (epoch 0) make no family: models of one seed begin alike and go different ways.
    """

    def __init__(self) -> None:
        self._first: dict[bytes, First] = {}
        self._trained: dict[bytes, int] = {}
        self._parent: dict[int, int] = {}

    def add(self, key: bytes, model: int, epoch: int | None, where: str = "") -> First | None:
        """The first row with the same :func:`digest`, or None if this is it."""
        if epoch != 0:
            one, other = self.family(self._trained.setdefault(key, model)), self.family(model)
            self._parent[max(one, other)] = min(one, other)
        mine = First(model, epoch, where)
        first = self._first.setdefault(key, mine)
        return None if first is mine else first

    def family(self, model: int) -> int:
        """The least number of a model's family; its own where it shares nothing."""
        while (parent := self._parent.get(model, model)) != model:
            model = parent
        return model


class Drawn(NamedTuple):
    """A split drawn by model, a family's models together.

    Attributes:
        names: the split of each row.
        elsewhere: which rows have the bits of an earlier row of another split (initial weights at most, which make no family).
        copies: models that are in a split because another one of their family is.
    """

    names: tuple[str, ...]
    elsewhere: list[bool]
    copies: int


def digest(row: Tensor) -> bytes:
    """A digest of a row of weights ``[P]``. Two rows have the same only if they are equal to the bit."""
    return hashlib.sha256(row.contiguous().numpy().data).digest()


def digests(weights: Tensor | Sequence[Tensor]) -> list[bytes]:
    """The :func:`digest` of each row of ``weights [k, P]``."""
    return [digest(row.detach().cpu()) for row in weights]


def draw(plan: Split, weights: Tensor | Sequence[Tensor], models: Sequence[int], epochs: Sequence[Any] | None) -> Drawn:
    """The split of each row of ``weights [k, P]``; without ``epochs``, equal rows always make their models a family."""
    known, keys = Identical(), digests(weights)
    for key, model, epoch in zip(keys, models, epochs or [None] * len(keys), strict=True):
        known.add(key, model, epoch)
    families = [known.family(model) for model in models]
    names = plan.assign(families)
    return Drawn(names, elsewhere(keys, names), len(set(models)) - len(set(families)))


def elsewhere(keys: Sequence[bytes], names: Sequence[str]) -> list[bool]:
    """Which rows, by their digests, are in another split than the first row with their bits."""
    first: dict[bytes, str] = {}
    return [first.setdefault(key, name) != name for key, name in zip(keys, names, strict=True)]
