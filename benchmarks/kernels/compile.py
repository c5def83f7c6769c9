"""Compile a network's kernels into Triton's cache, for the GPU that is here or for one that is named, and launch nothing.

    PYTHONPATH=. python3 -m benchmarks.kernels.compile NETWORK PRECISION TARGET

So that what runs afterwards, tests and timings, finds its kernels made: sixteen of these run at once. What is compiled is what calls
compile (``inspect.make_calls`` through ``standin.py``). NETWORK is one of inspect.py's, or one of the tests' as ``test:NAME``.
"""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path

from benchmarks.kernels.inspect import ARCHITECTURES, make_calls
from benchmarks.kernels.standin import Launch, standing_in
from wslfast.kernels.layers import Layers, Unplannable
from wslfast.kernels.triton.schedule import schedule


def network_of(name: str) -> tuple[Layers, tuple[int, ...]]:
    """Layers and input shape of a network by name."""
    if not name.startswith("test:"):
        return ARCHITECTURES[name]
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "support"))
    import kernel_cases

    known = {"small": kernel_cases.SMALL, "mlp": kernel_cases.MLP, **kernel_cases.CASES, **kernel_cases.HEADS}
    case = known[name.removeprefix("test:")]
    return case.layers, case.shape


def main() -> int:
    """Command line."""
    name, precision, target = sys.argv[1:4]
    layers, shape = network_of(name)
    planned, began, made = schedule(layers, shape), time.perf_counter(), 0

    def count(launched: Launch) -> None:
        nonlocal made
        made += launched.new

    for call in make_calls(layers, shape, planned, precision):
        with contextlib.suppress(Unplannable), standing_in(target, planned, count):
            call()
    print(f"{name} {precision} {target}: {made} kernels in {time.perf_counter() - began:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
