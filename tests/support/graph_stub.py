"""A stand-in for torch's CUDA graphs on a CPU: what runs while a graph is recorded is written down, operator by operator, and run again on
the same tensors at a replay. As on a GPU, recording computes nothing: what it made holds NaN until the first replay."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

REFUSED = "CUDA error: operation not permitted when stream is capturing"
BROKEN = "CUDA error: operation failed due to a previous error during capture"


class _Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self.broken = False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:  # the host asks the device
            self.broken = True
            raise RuntimeError(REFUSED)
        made = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, made))
        return made


def _fresh(made: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[int | None, Tensor]]:
    """Results in memory of their own, with their places."""
    given = {a.untyped_storage().data_ptr() for a in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(a, Tensor)}
    several = list(enumerate(made)) if isinstance(made, (tuple, list)) else [(None, made)]
    return [(i, t) for i, t in several if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in given]


class CUDAGraph:
    """Of torch's, what is used."""

    made: int = 0
    replays: int = 0
    forgets: int = 0  # operators at the end of a tape that replays leave out

    def __init__(self) -> None:
        type(self).made += 1
        self.tape = _Tape()

    def replay(self) -> None:
        type(self).replays += 1
        calls = self.tape.calls[: len(self.tape.calls) - self.forgets]
        with torch.no_grad():
            for func, args, kwargs, made in calls:
                again = func(*args, **kwargs)
                for i, before in _fresh(made, args, kwargs):
                    before.copy_(again if i is None else again[i])
                    if "empty" in str(func) and before.is_floating_point():
                        before.fill_(float("nan"))  # whatever lies there could be what a call has left


class _Stream:
    def __init__(self, device: Any = None) -> None:
        self.waited: list[Any] = []

    def wait_stream(self, other: Any) -> None:
        self.waited.append(other)


def install(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Put the stand-in in torch's place; returns the streams that were made current for good."""
    current, chosen = _Stream(), []

    @contextlib.contextmanager
    def graph(made: CUDAGraph, stream: Any, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        try:
            with made.tape:
                yield
        finally:
            if made.tape.broken:
                raise RuntimeError(BROKEN)
        with torch.no_grad():
            for _, args, kwargs, results in made.tape.calls:
                for _, result in _fresh(results, args, kwargs):
                    if result.is_floating_point():
                        result.fill_(float("nan"))

    CUDAGraph.made = CUDAGraph.replays = CUDAGraph.forgets = 0
    for name, value in (
        ("CUDAGraph", CUDAGraph), ("graph", graph), ("Stream", _Stream), ("stream", lambda _: contextlib.nullcontext()),
        ("device", lambda _: contextlib.nullcontext()), ("current_stream", lambda _=None: current), ("set_stream", chosen.append),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    return chosen
