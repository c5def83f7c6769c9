"""Named regions that cost nothing while profiling is off.

``with region("encode"): ...`` marks a phase. Inside ``with profile(folder):`` each region becomes an NVTX range (where
the nvtx package or a CUDA build of torch offers one) and a ``torch.profiler`` record, and its wall time is added to a
per-phase table of calls, milliseconds and share. On a GPU, wall time is taken after a synchronisation, so a profiled run is
slower than a plain one and its shares are what to read.
"""

from __future__ import annotations

import contextlib
import functools
import json
import platform
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .errors import require
from .files import make_folder, write_text

_OFF = contextlib.nullcontext()
_active: Profile | None = None
_stack = threading.local()


class Profile:
    """Times of the regions seen while it was active. ``rows()`` is the table, most expensive first."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.seconds: dict[str, float] = {}
        self.calls: dict[str, int] = {}
        self.total = 0.0

    def add(self, name: str, seconds: float) -> None:
        """Account ``seconds`` of the region's own time (that of regions inside it excluded) to ``name``."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        self.calls[name] = self.calls.get(name, 0) + 1

    def rows(self) -> list[dict[str, Any]]:
        """``{"phase", "share", "calls", "ms"}``: share of the profiled wall time, own milliseconds per call."""
        rest = max(self.total - sum(self.seconds.values()), 0.0)
        times = dict(sorted(self.seconds.items(), key=lambda item: -item[1]))
        rows = [
            {"phase": name, "share": s / max(self.total, 1e-12), "calls": self.calls[name], "ms": 1e3 * s / self.calls[name]}
            for name, s in times.items()
        ]
        return [*rows, {"phase": "(outside any region)", "share": rest / max(self.total, 1e-12), "calls": 1, "ms": 1e3 * rest}]

    def table(self) -> str:
        """The rows as fixed-width text."""
        lines = [f"{'phase':<24}{'share':>8}{'calls':>8}{'ms per call':>12}"]
        lines += [f"{r['phase']:<24}{r['share']:>8.1%}{r['calls']:>8}{r['ms']:>12.3f}" for r in self.rows()]
        return "\n".join(lines)


def enabled() -> bool:
    """Whether regions are being recorded."""
    return _active is not None


def region(name: str) -> contextlib.AbstractContextManager[None]:
    """Mark a phase; a shared do-nothing context while profiling is off."""
    return _OFF if _active is None else _region(name, _active)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@functools.cache  # a package that is missing is looked for in every folder, again and again
def _nvtx_ranges() -> tuple[Any, Any]:
    try:
        import nvtx

        return nvtx.push_range, nvtx.pop_range
    except ImportError:
        if torch.cuda.is_available():
            return torch.cuda.nvtx.range_push, torch.cuda.nvtx.range_pop
    return (lambda name: None), (lambda: None)


@contextlib.contextmanager
def _region(name: str, profile: Profile) -> Iterator[None]:
    push, pop = _nvtx_ranges()
    inner = getattr(_stack, "inner", 0.0)
    _stack.inner = 0.0  # time spent in regions nested inside this one
    push(name)
    start = _now(profile.device)
    try:
        with torch.profiler.record_function(name):
            yield
            _now(profile.device)
    finally:
        end = time.perf_counter()
        pop()
        profile.add(name, end - start - _stack.inner)
        _stack.inner = inner + end - start


@contextlib.contextmanager
def profile(folder: str | Path | None = None, device: torch.device | str = "cpu", trace: bool = True) -> Iterator[Profile]:
    """Record regions until the block ends; with ``folder``, write ``trace.json`` (Chrome format) and ``phases.json`` there.

    Raises WslfastError where profiling is on already in this process, and for a folder that cannot be made.
    """
    global _active
    require(_active is None, "profile: expected one at a time, and profiling is on already in this process")
    if folder is not None:
        make_folder(folder)
    current = Profile(device)
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if current.device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    tracer = torch.profiler.profile(activities=kinds) if folder is not None and trace else None
    with tracer or contextlib.nullcontext():
        _active, start = current, _now(current.device)
        try:
            yield current
        finally:
            current.total = _now(current.device) - start
            _active = None
    if folder is not None:
        out = Path(folder)
        write_text(out / "phases.json", json.dumps(current.rows(), indent=1))
        if tracer is not None:
            tracer.export_chrome_trace(str(out / "trace.json"))


def processor() -> str:
    """The processor's name as the system gives it, for the record of a measurement."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
