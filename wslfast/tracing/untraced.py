"""Modules that no file can hold, by what a file can say of them: whoever reads such a record finds the architecture here that its user has
named, or holds in this process."""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Union

from ..errors import require
from .module import innermost

if TYPE_CHECKING:
    from ..architecture import Architecture

Maker = Callable[[Mapping[str, Any]], Union["Architecture", None]]
_SAME = ("name", "input_shape", "parameters", "output")  # of a record; why it cannot be traced is said in a version's own words

_numbers = itertools.count()
_held: weakref.WeakValueDictionary[str, Architecture] = weakref.WeakValueDictionary()
_makers: list[Maker] = []


def enter(architecture: Architecture) -> str:
    """A handle by which the architecture is found for as long as somebody holds it."""
    handle = f"{architecture.name} ({next(_numbers)})"
    _held[handle] = architecture
    return handle


def held(handle: str) -> Architecture | None:
    """The architecture behind a handle, while somebody holds it."""
    return _held.get(handle)


def of_record(record: Mapping[str, Any]) -> Architecture | None:
    """The architecture that a record (:meth:`Architecture.to_dict`) is of: one that a maker gives, else the youngest that is held in this
    process. None where there is none. Raises WslfastError where those held are of different code: they may differ in what they compute."""
    if not isinstance(record.get("parameters"), list):
        return None
    named = next((own for own in (maker(record) for maker in _makers) if own is not None), None)
    if named is not None:
        return named
    numbered = sorted((int(handle.rpartition("(")[2][:-1]), own) for handle, own in list(_held.items()) if _same(own.to_dict(), record))
    several = f"architecture {record.get('name')!r}: modules of different code fit its names and shapes in this process; keep one of them"
    require(len({_code(own) for _, own in numbered}) < 2, several)
    return numbered[-1][1] if numbered else None


def _code(architecture: Architecture) -> tuple[Any, ...]:
    """What tells modules apart that have the same names and shapes: the code of each part's forward."""
    assert architecture.module is not None
    parts = innermost(architecture.module).modules()
    return tuple(getattr(type(part).forward, "__code__", type(part)) for part in parts)


def _same(own: Mapping[str, Any], record: Mapping[str, Any]) -> bool:
    return all(own.get(key) == record.get(key) for key in _SAME)


@contextlib.contextmanager
def naming(maker: Maker) -> Iterator[None]:
    """Inside the block ``maker`` is asked for architectures that no file holds: it gets a record and gives the architecture, or None."""
    _makers.append(maker)
    try:
        yield
    finally:
        _makers.remove(maker)
