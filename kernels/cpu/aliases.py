"""Tensors of a recording that stand for memory of somebody else's: what torch makes anew in every replay, and what the caller hands in or
wants to have.

A recorded operator is bound to tensors. Where their memory is another in each replay, the tensors are moved there, which takes about a
microsecond each; to copy the numbers takes as long from some tens of thousands of bytes on.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Borrowed", "Loose", "place_of", "rebound", "released", "storage_of", "tensors_in"]


def storage_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def place_of(tensor: Tensor) -> Hashable:
    """Where a tensor lies in its storage."""
    return tensor.shape, tensor.stride(), tensor.storage_offset()


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors of arguments or results, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = tuple(value.values())
    return [t for item in value for t in tensors_in(item)] if isinstance(value, (tuple, list)) else []


def _standing_for(tensor: Tensor, known: list[Tensor]) -> Tensor:
    """One of ``known`` that lies where ``tensor`` does; if there is none, a new one."""
    for other in known:
        if other.dtype == tensor.dtype and place_of(other) == place_of(tensor):
            return other
    made = torch.empty(0, dtype=tensor.dtype, device="cpu")
    known.append(made.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride()))
    return made


class Loose:
    """Tensors on memory that torch makes anew in every replay, by the storage that was recorded."""

    def __init__(self, storages: set[int]) -> None:
        self.known: dict[int, list[Tensor]] = {name: [] for name in storages}

    def of(self, tensor: Tensor) -> Tensor:
        """One that stands for ``tensor``."""
        return _standing_for(tensor, self.known[storage_of(tensor)])


def rebound(places: Sequence[Tensor | list[Tensor]], func: Any, args: Any, kwargs: Any) -> None:
    """Call an operator, and let what stands for its results, or for views of them, be in their memory; copy those that have a place."""
    for place, made in zip(places, tensors_in(func(*args, **kwargs)), strict=True):
        if isinstance(place, Tensor):
            place.copy_(made)
            continue
        storage = made.untyped_storage()
        for alias in place:
            alias.set_(storage, alias.storage_offset(), alias.shape, alias.stride())


def released(aliases: Sequence[Tensor]) -> None:
    """Give memory back that was read for the last time."""
    aliases[0].untyped_storage().resize_(0)


class Borrowed:
    """Tensors on memory of the caller's: a dense input that is read where it lies, or a dense result that is written where it goes.

    Args:
        recorded: the whole tensor, in the memory that was recorded.
    """

    def __init__(self, recorded: Tensor) -> None:
        self.shape, self.dtype = recorded.shape, recorded.dtype
        self._aliases: list[Tensor] = []
        self._places: list[tuple[Tensor, Any, Any, Any]] = []
        self._nowhere = torch.empty(0, dtype=recorded.dtype, device="cpu")

    def of(self, tensor: Tensor) -> Tensor:
        """One that stands for ``tensor``, the whole or a view of it."""
        return _standing_for(tensor, self._aliases)

    def settle(self) -> None:
        """What there is so far is all; it lies nowhere from now on."""
        self._places = [(alias, alias.storage_offset(), alias.shape, alias.stride()) for alias in self._aliases]
        self.give_back()

    def lend(self, given: Tensor) -> None:
        """Let all of them lie in ``given``, until :meth:`give_back`."""
        storage, start = given.untyped_storage(), given.storage_offset()
        for alias, offset, shape, stride in self._places:
            alias.set_(storage, start + offset, shape, stride)

    def give_back(self) -> None:
        """Keep nothing of the caller's."""
        for alias in self._aliases:
            alias.set_(self._nowhere)  # type: ignore[call-overload]
