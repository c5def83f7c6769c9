"""The GPU gate, ``make gpu``: tests that need a GPU, then the torch providers side by side, in one go of under ten minutes.

Plain ``python3`` with ``PYTHONPATH=.``; needs torch and nothing else (tests are skipped where pytest is missing). Rows go to
``${OUT:-benchmarks/data}/gpu.csv``, a short table to the screen last. A provider that fails the gate, fails, or runs out of memory
is a row that says so. Without a GPU: one line, no rows, exit status 0.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

try:
    import torch
except ModuleNotFoundError:
    sys.exit(f"gpu gate: {sys.executable} has no torch; run it with one that has: make gpu PYTHON=...")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import providers
from benchmarks.bench_loss import CACHED, RECOMPUTED
from benchmarks.recording import ROOT, Row, environment, quantiles, table, write_rows

NET, N, KS, PRECISIONS = "cnn3", 256, (128, 1024), ("fp32", "tf32")
NAMES = ("published", "vmap", "compiled vmap", "grouped", "wslfast", "wslfast-triton")
BOUNDS = {"fp32": 1e-4, "tf32": 8e-2}  # whole gradient; TF32 flips argmax near-ties of the first convolution
TEST_SECONDS, TIMING_SECONDS, REPEATS = 200, 300, 7


def run_tests() -> int:
    """``pytest -m gpu`` in its own process; 0 if there is no pytest."""
    if importlib.util.find_spec("pytest") is None:
        print("gpu tests: skipped, pytest is not installed")
        return 0
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "tests/gpu"]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    try:
        status = subprocess.run(command, cwd=ROOT, timeout=TEST_SECONDS, check=False, env=environ).returncode
    except subprocess.TimeoutExpired:
        print(f"gpu tests: stopped after {TEST_SECONDS} s")
        return 1
    return 0 if status == 5 else status  # 5: no test carries the mark


def timed(call: Callable[[], object]) -> tuple[list[float], float]:
    """Milliseconds of ``REPEATS`` calls after two untimed ones (CUDA events), and the peak of their memory in GB."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    times = []
    for _ in range(REPEATS):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
        if sum(times) > 20_000 and len(times) >= 3:
            break
    return times, (torch.cuda.max_memory_allocated() - held) / 1e9


def measure(name: str, k: int, precision: str, deadline: float) -> list[Row]:
    """Time and memory of one provider, targets recomputed and cached."""
    architecture = providers.ARCHITECTURES[NET]()
    row = Row(name, NET, k, N, "", precision, "ms", **environment(cuda=True))
    if time.monotonic() > deadline:
        return [replace(row, note="not run: out of time")]
    try:
        with providers.matmul_precision(precision):
            case = next(providers.cases(architecture, 4, 16, "cuda"))
            error = providers.relative_error(name, (*case, architecture))
            if error > BOUNDS[precision]:
                return [replace(row, relative_error=error, note=f"gate: error above {BOUNDS[precision]:g}, not timed")]
            weights, original, queries = next(providers.cases(architecture, k, N, "cuda"))
            targets = torch.randn(k, N, architecture.num_classes, device="cuda")
            rows = []
            for direction, given in ((RECOMPUTED, None), (CACHED, targets)):
                if name == "published" and given is not None:
                    continue  # the published algorithm always recomputes
                times, peak = timed(partial(providers.PROVIDERS[name], weights, original, queries, given, architecture))
                median, low, high = quantiles(times)
                done = replace(row, direction=direction, relative_error=error)
                rows.append(replace(done, median=median, p20=low, p80=high, note=f"{len(times)} repeats"))
                rows.append(replace(done, metric="peak GB", median=float(f"{peak:.3g}")))
            return rows
    except torch.cuda.OutOfMemoryError:
        return [replace(row, note="out of memory")]
    except Exception as error:  # a row that says why is worth more than a gate that stops
        return [replace(row, note=f"failed: {type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}")]
    finally:
        torch.cuda.empty_cache()


def main() -> int:
    """Tests, timings, rows; the exit status is that of the tests."""
    if not torch.cuda.is_available():
        print("gpu gate: no CUDA device here, nothing was run")
        return 0
    status = run_tests()
    providers.PROVIDERS |= {"compiled vmap": providers.compiled_vmap, "wslfast-triton": providers.wslfast_triton}
    deadline = time.monotonic() + TIMING_SECONDS
    rows: list[Row] = []
    for precision in PRECISIONS:
        for k in KS:
            for name in NAMES:
                rows += measure(name, k, precision, deadline)
                print(f"{name} k={k} {precision}: {rows[-1].note or 'done'}", flush=True)
                write_rows(rows, Path(os.environ.get("OUT", ROOT / "benchmarks" / "data")) / "gpu.csv")  # kept if we are stopped
    print(table(rows))
    print(f"gpu gate: tests {'passed' if status == 0 else f'failed ({status})'}, {len(rows)} rows")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
