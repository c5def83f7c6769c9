"""The GPU gate, ``make gpu``: the GPU tests, then the core of the suite, then one profiled training step, in one go of under ten minutes.

Plain ``python3`` with ``PYTHONPATH=.``; needs torch, numpy, einops and safetensors (tests are skipped where pytest is missing, kernels
where triton is). Every part runs in processes of its own, has its own time, and writes its rows to ``${OUT:-benchmarks/data}/gpu.csv``
as soon as it has them; what fails, runs out of memory or of time is a row that says so. ``--only PART...`` runs some parts, replacing
their rows. Without a GPU: one line, no rows, exit status 0.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

try:
    import torch
except ModuleNotFoundError:
    sys.exit(f"gpu gate: {sys.executable} has no torch; run it with one that has: make gpu PYTHON=...")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import derived, suites, tables, workers
from benchmarks.recording import DATA, ROOT, Row, merge, read_rows

# the share of the time that each part may take, in seconds of a whole run; what a part leaves goes to those after it
PARTS = {"tests": 150.0, "ceilings": 30.0, "core": 205.0, "nets": 40.0, "growth": 50.0, "step": 45.0, "zoo": 25.0}
TOTAL_S = sum(PARTS.values())
CELL_S = 60.0  # one provider on one shape, compilation included


def allowance(provider: str) -> float:
    """Seconds that one provider's cells of a part may take."""
    if provider in suites.KERNELS:
        return 60.0
    return 70.0 if provider == "vmap-compiled" else 20.0


def _run(command: list[str], log: Path, seconds: float) -> int:
    """Run a command of ours into a log; its exit status, or 124 where it had to be stopped."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with log.open("w") as file:
        try:
            done = subprocess.run(
                [sys.executable, *command],
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=max(seconds, 5.0),
                check=False,
            )
        except subprocess.TimeoutExpired:
            return 124
    return done.returncode


def run_tests(log: Path, seconds: float) -> int:
    """``pytest -m gpu`` in its own process; 0 if there is no pytest."""
    if importlib.util.find_spec("pytest") is None:
        print("gpu tests: skipped, pytest is not installed")
        return 0
    status = _run(["-m", "pytest", "-m", "gpu", "-q", "--tb=short", "-p", "no:cacheprovider", "tests/gpu"], log, seconds)
    print("\n".join(log.read_text().splitlines()[-12:]))
    return 0 if status == 5 else status  # 5: no test carries the mark


def run_section(name: str, out: Path, seconds: float) -> None:
    """A section of ``--suite gpu`` in its own process, its rows into ``gpu.csv``."""
    log = out / "gpu_sections.log"
    status = _run(["-m", "benchmarks", "--suite", "gpu", "--only", name, "--out", str(out), "--no-page"], log, seconds)
    if status:
        tail = log.read_text().splitlines()[-6:]
        print("\n".join([f"{name}: {'out of time' if status == 124 else f'failed ({status})'}", *tail]), flush=True)


def run_cells(name: str, out: Path, deadline: float) -> None:
    """The gate and the clocks for the cells of a part."""
    path = out / "gpu.csv"
    best = [row for row in (read_rows(path) if path.exists() else []) if row.provider == "ceiling"]

    def emit(rows: list[Row]) -> None:
        merge(path, rows)
        clock = next((r for r in rows if r.metric == "gpu_ms"), rows[0])
        said = f"{clock.median} ms, error {clock.relative_error}" if clock.value is not None else clock.details
        print(f"{clock.provider} {clock.architecture} k={clock.k} n={clock.n} {clock.precision} {clock.variant}: {said}", flush=True)

    workers.run(
        suites.GPU_CELLS[name](), emit, device="cuda", deadline=deadline, cell_s=CELL_S, provider_s=allowance, figure_s=0.4, best=best
    )


def pack_trace(out: Path) -> None:
    """Make the profile of the step two small files: ``trace.json.gz`` and ``phases.json``."""
    folder = out / "step"
    if (folder / "trace.json").exists():
        with gzip.open(out / "trace.json.gz", "wb") as file:
            file.write((folder / "trace.json").read_bytes())
        (folder / "trace.json").unlink()
    if (folder / "phases.json").exists():
        (folder / "phases.json").replace(out / "phases.json")
        folder.rmdir()


def summary(rows: list[Row]) -> str:
    """The short table: bars, phases of the step, providers on the job at k=1024."""
    gpu = derived.Rows(rows)
    net, n = suites.JOB
    job = derived.Rows(r for r in rows if (r.architecture, r.n, r.k) == (net, n, 1024) and r.precision in ("tf32", "fp16"))
    step = [table for table in tables.others(gpu) if table.title == tables.STEP]
    return "\n\n".join(map(tables.plain, [tables.bars(gpu), *step, *tables.losses(job, "loss+gradient")]))


def main() -> int:
    """All parts or some; the exit status is that of the tests."""
    parser = argparse.ArgumentParser(description="GPU tests, then the core of the benchmark suite, in under ten minutes")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="some parts")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu gate: no CUDA device here, nothing was run")
        return 0
    began, status = time.monotonic(), 0
    out = Path(os.environ.get("OUT") or DATA)
    out.mkdir(parents=True, exist_ok=True)
    parts = [part for part in PARTS if part in options.only]
    for i, part in enumerate(parts):
        started = time.monotonic()
        end = started + (began + TOTAL_S - started) * PARTS[part] / sum(PARTS[p] for p in parts[i:])
        try:
            if part == "tests":
                status = run_tests(out / "gpu_tests.log", end - started)
            elif part in suites.GPU_CELLS:
                run_cells(part, out, end)
            else:
                run_section(part, out, end - started)
                pack_trace(out)
        except Exception as error:  # the parts to come are worth more than a gate that stops
            print(f"{part}: failed: {type(error).__name__}: {error}", flush=True)
        print(f"-- {part}: {time.monotonic() - started:.0f} s", flush=True)
    rows = read_rows(out / "gpu.csv") if (out / "gpu.csv").exists() else []
    if rows:
        print(summary(rows))
    print(f"gpu gate: tests {'passed' if status == 0 else f'failed ({status})'}, {len(rows)} rows, {time.monotonic() - began:.0f} s")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
