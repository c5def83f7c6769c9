"""The backend of a whole piece of work: what ``backend="auto"`` means inside it.

A training run, an evaluation or the building of a zoo reaches the engine in dozens of places. Each of them opens one block with the
backend that its caller asked for, instead of handing the word through every function.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from ..errors import require
from .choice import BACKENDS

_preferred: ContextVar[str] = ContextVar("wslfast_backend", default="auto")


def check_backend(backend: str) -> None:
    """Raise WslfastError for a backend that does not exist."""
    require(backend in BACKENDS, lambda: f"backend: expected one of {BACKENDS}, got {backend!r}")


@contextmanager
def using(backend: str) -> Iterator[None]:
    """Every call of the engine inside that names no backend of its own takes this one; ``"auto"`` leaves what is set outside."""
    check_backend(backend)
    token = _preferred.set(backend if backend != "auto" else _preferred.get())
    try:
        yield
    finally:
        _preferred.reset(token)


def preferred(backend: str) -> str:
    """``backend``, or what the block around the call asks for where it is ``"auto"``."""
    return _preferred.get() if backend == "auto" else backend
