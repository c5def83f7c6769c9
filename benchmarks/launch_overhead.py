"""What an empty launch costs: the floor under anything made of many small calls. ``python benchmarks/launch_overhead.py``."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.recording import environment, quantiles


def microseconds(call: Callable[[], object], device: str, calls: int = 1000, repeats: int = 20) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile of a call's share of ``calls`` calls in a row, waited for at the end."""
    times = []
    for turn in range(repeats + 1):
        began = time.perf_counter()
        for _ in range(calls):
            call()
        if device == "cuda":
            torch.cuda.synchronize()
        if turn:
            times.append(1e6 * (time.perf_counter() - began) / calls)
    return quantiles(times)


def _replayed(call: Callable[[], object], launches: int = 100) -> Callable[[], object]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(launches):
            call()
    return graph.replay


def main() -> None:
    """Print what a call of one element costs, here: torch on the CPU, and on a GPU torch, Triton and a CUDA graph."""
    print("; ".join(filter(None, environment(torch.cuda.is_available()).values())))
    one = torch.zeros(1)
    calls: dict[str, tuple[Callable[[], object], str, int]] = {"torch, CPU: add_ on one element": (lambda: one.add_(1), "cpu", 1)}
    if torch.cuda.is_available():
        there = torch.zeros(1, device="cuda")
        calls["torch, GPU: add_ on one element"] = (lambda: there.add_(1), "cuda", 1)
        there.add_(1)
        calls["torch, GPU: the same, one of 100 in a CUDA graph"] = (_replayed(lambda: there.add_(1)), "cuda", 100)
        if importlib.util.find_spec("triton") is not None:
            from benchmarks.empty_kernel import launch

            launch(there)
            calls["Triton: an empty kernel"] = (lambda: launch(there), "cuda", 1)
    for name, (call, device, launches) in calls.items():
        median, low, high = (v / launches for v in microseconds(call, device, calls=1000 // launches))
        print(f"{name}: {median:.3g} microseconds ({low:.3g} to {high:.3g})")


if __name__ == "__main__":
    main()
