"""The clocks. Which one a row shows is its metric.

``wall_ms``: host clock around a call and, on a GPU, a synchronisation. ``gpu_ms``: CUDA events around a call, the L2 cache
overwritten before each. ``graph_ms``: the same for the replay of the call captured as a CUDA graph: no launch gaps. On a GPU the cache is
cold for all three. (``triton.testing.do_bench`` reads low for calls of a few microseconds, and its CUDA-graph form
leaves the cache warm.)
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

Call = Callable[[], object]
Name = TypeVar("Name")
Result = TypeVar("Result")
_FLUSH_BYTES = 1 << 28  # past any GPU's L2
_NOT_KERNELS = ("memcpy", "memset", "activity buffer", "context sync", "stream wait", "stream sync", "event sync")
_SLOW_MS = 250.0  # a call above it is repeated three times, and not captured


# -- CPU -------------------------------------------------------------------------------------------------------------------


def take_turns(
    calls: Mapping[Name, Callable[..., Any]],
    arguments: Callable[[], tuple[Any, ...]],
    rounds: int,
    budget_s: float = 60.0,
    warm: bool = True,
) -> dict[Name, list[float]]:
    """Milliseconds of each call in ``rounds`` rounds, all calls once a round on that round's fresh arguments.

    With ``warm``, one untimed round goes first. A call that has used ``budget_s`` sits out the remaining rounds (three at least): the
    published algorithm takes seconds where others take milliseconds.
    """
    times: dict[Name, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + warm):
        given = arguments()
        for name, call in calls.items():
            if len(times[name]) >= 3 and sum(times[name]) > 1e3 * budget_s:
                continue
            began = time.perf_counter()
            call(*given)
            if turn >= warm:
                times[name].append(1e3 * (time.perf_counter() - began))
    return times


def host_peak_mb(call: Callable[[], Result]) -> tuple[Result, float | None]:
    """What ``call`` returns, and by how much the process's memory peaked above where it stood; None where Linux's /proc is not there."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
        before = _status("VmRSS")
    except OSError:
        before = None
    result = call()
    return result, None if before is None else max(0.0, (_status("VmHWM") or before) - before)


def _status(name: str) -> float | None:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(name)), None)


# -- GPU -------------------------------------------------------------------------------------------------------------------


@dataclass
class Figures:
    """What was measured of one call; ``missing`` says why a metric is not among them."""

    times: dict[str, list[float]] = field(default_factory=dict)
    peak_mb: float = 0.0
    launches: int = 0
    missing: dict[str, str] = field(default_factory=dict)


@lru_cache(maxsize=1)
def _scratch() -> Tensor:
    return torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")


def _cold() -> None:
    _scratch().zero_()


def event_ms(call: Call, repeats: int) -> list[float]:
    """CUDA-event times, the L2 cache overwritten before each."""
    pairs = []
    for _ in range(repeats):
        _cold()
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        stop.record()
        pairs.append((start, stop))
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) for start, stop in pairs]


def synchronised_ms(call: Call, repeats: int) -> list[float]:
    """Host times of a call and a synchronisation, the L2 cache overwritten before each."""
    times = []
    for _ in range(repeats):
        _cold()
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - began))
    return times


def launches_of(call: Call) -> int:
    """Kernels that the device ran for one call, as torch's profiler saw them: no copies, no fills, no bookkeeping."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        call()
        torch.cuda.synchronize()
    events = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not e.name.lower().startswith(_NOT_KERNELS) for e in events)


def measure_on_gpu(call: Call, budget_s: float) -> Figures:
    """All figures of one call that has been warmed up, within about ``budget_s`` seconds (three repeats at least)."""
    _scratch()  # before memory is counted
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    first = synchronised_ms(call, 1)[0]
    found = Figures(peak_mb=(torch.cuda.max_memory_allocated() - held) / 1e6)
    repeats = int(min(50, max(3, 1e3 * budget_s / 4 / max(first, 0.05))))
    found.times["wall_ms"] = synchronised_ms(call, repeats)
    found.times["gpu_ms"] = event_ms(call, repeats)
    with contextlib.suppress(RuntimeError):
        found.launches = launches_of(call)
    if first > _SLOW_MS:
        found.missing["graph_ms"] = f"not captured: a call takes more than {_SLOW_MS:g} ms"
        return found
    before = torch.cuda.current_stream()
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
    except Exception as error:
        torch.cuda.set_stream(before)  # torch leaves its own current where CUDA broke the capture off
        torch.cuda.synchronize()
        found.missing["graph_ms"] = f"cannot be captured as a CUDA graph: {str(error).strip().splitlines()[0][:100]}".replace(";", ",")
        return found
    graph.replay()
    found.times["graph_ms"] = event_ms(graph.replay, repeats)
    return found
