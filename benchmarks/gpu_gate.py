"""The GPU gate, ``make gpu``: everything that only a GPU can tell, in one go of under ten minutes.

In this order, so that what is lost is the least telling: *compile* every kernel in many processes; *diagnose* every kernel alone against
its twin; the GPU *tests* in several processes; the *timing* cells (ceilings, core, nets, growth), each worker started anew after a device
error; the *proof* that ``backend="auto"`` asks of every machine; one profiled training *step*; a *zoo*.

Plain ``python3`` with ``PYTHONPATH=.``; needs torch, numpy, einops and safetensors (tests are skipped where pytest is missing, kernels
where triton is). Every line is written as soon as it is known: rows to ``${OUT:-benchmarks/data}/gpu.csv``, everything else to
``gpu_gate.jsonl`` beside it; what fails, runs out of memory or of time is a line that says so, and what was not begun is listed at the
end. ``--only PART...`` runs some parts, replacing their rows. Without a GPU: one line, no rows, exit status 0. ``--rehearse`` goes the
whole way without one: small pieces in Triton's interpreter and on the CPU, and no figure that means anything.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

try:
    import torch
except ModuleNotFoundError:
    sys.exit(f"gpu gate: {sys.executable} has no torch; run it with one that has: make gpu PYTHON=...")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import derived, suites, tables, workers
from benchmarks.jobs import Done, Job, run_all
from benchmarks.losses import Cell
from benchmarks.recording import DATA, Row, merge, read_rows

# the share of the time that each part may take, in seconds of a whole run; what a part leaves goes to those after it
PARTS = {
    "compile": 110.0, "diagnose": 60.0, "tests": 120.0, "ceilings": 20.0, "core": 120.0, "nets": 30.0, "growth": 30.0, "proof": 40.0,
    "step": 25.0, "zoo": 15.0,
}  # fmt: skip
TOTAL_S = sum(PARTS.values())  # 9:30
CELL_S = 60.0  # one provider on one shape
CORE = ("cnn3", "lenet5", "cnn")
PRECISIONS = ("tf32", "fp16", "tf32x3", "bf16")
PROOFS = (("cnn3", "tf32"), ("lenet5", "tf32"), ("cnn3", "tf32x3"), ("cnn", "tf32"), ("cnn3", "fp16"))  # in the order of their worth
NO_TESTS = 5  # pytest's status
LOST = 75  # of a test process whose device was lost, see tests/gpu/conftest.py
LOG = "gpu_gate.jsonl"


def allowance(provider: str) -> float:
    """Seconds that one provider's cells of a part may take."""
    if provider in suites.KERNELS:
        return 60.0
    return 70.0 if provider == "vmap-compiled" else 20.0


@dataclass
class Gate:
    """One run: where it writes, what it found, and what it did not come to."""

    out: Path
    rehearse: bool = False
    processes: int = field(default_factory=lambda: min(16, os.cpu_count() or 1))
    undone: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def note(self, part: str, what: str, **more: Any) -> None:
        """A line for the log and for whoever watches, at once."""
        with (self.out / LOG).open("a") as file:
            file.write(json.dumps({"part": part, "what": what, **more}) + "\n")
        print(f"{part}: {what}", flush=True)

    def heard(self, part: str) -> Callable[[Done], None]:
        """What :func:`run_all` tells of every job of a part."""

        def said(done: Done) -> None:
            if done.cut:  # by the end of the part's time, which says nothing of the job
                self.undone.append(f"{part}: {done.job.name} ({done.words})")
            elif done.status:
                self.wrong.append(f"{part}: {done.job.name}: {done.words}")
            lines = [line for line in done.output.splitlines() if line.strip()]
            tail = lines[-1:] if done.status == 0 else lines[-12:]
            self.note(part, f"{done.job.name}: {done.words}", seconds=round(done.seconds, 1), status=done.status, output=tail)

        return said

    def jobs(self, part: str, jobs: list[Job], processes: int, deadline: float) -> None:
        """Run jobs; what was not begun is remembered."""
        left = run_all(jobs, processes, deadline, self.heard(part))
        self.undone += [f"{part}: {name}" for name in left]


def target() -> str:
    """The GPU as compilers name it."""
    return "sm_{}{}".format(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else "sm_90"


def compile_jobs(rehearse: bool) -> list[Job]:
    """Every network and precision that the parts to come run: the published ones first, then the tests', then what proofs call besides."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))
    import kernel_cases

    nets = [(net, precision) for precision in PRECISIONS for net in CORE]
    nets += [(f"test:{n}", p) for p in PRECISIONS for n in ("small", *kernel_cases.HEADS, *kernel_cases.CASES)]
    nets = [("test:mlp", "fp16")] if rehearse else nets
    proofs = () if rehearse else PROOFS
    wanted = [(n, p, target()) for n, p in nets] + [(n, p, target(), "proof") for n, p in proofs]
    no_interpreter = {"TRITON_INTERPRET": "0"}
    command = ("-m", "benchmarks.kernels.compile")
    return [Job(" ".join((n, p, *more)), (*command, n, p, where, *more), 100.0, no_interpreter) for n, p, where, *more in wanted]


def diagnose_jobs(rehearse: bool) -> list[Job]:
    """Every kernel of the published networks alone, in the order in which a wrong one explains those after it."""
    from benchmarks.kernels.diagnose import steps

    nets = [("cnn3", "tf32"), ("cnn3", "fp16"), ("lenet5", "tf32"), ("cnn", "tf32"), ("cnn3", "tf32x3"), ("cnn3", "bf16")]
    jobs = [(n, p, step) for n, p in nets for step in steps(n, p)]
    jobs = [("cnn", "tf32", "pack"), ("cnn", "tf32", "forward 2"), ("cnn", "tf32", "dw 4")] if rehearse else jobs
    environment = {"TRITON_INTERPRET": "1"} if rehearse else {}
    return [Job(f"{n} {p} {s}", ("-m", "benchmarks.kernels.diagnose", n, p, *s.split()), 40.0, environment) for n, p, s in jobs]


def proof_jobs(rehearse: bool) -> list[Job]:
    """``wslfast.doctor`` for the published networks, in the precision of the trainer and in torch's default."""
    code = (
        "import sys, wslfast; found = wslfast.doctor(getattr(wslfast.Architecture, sys.argv[1])(), precision=sys.argv[2]); "
        "print(*(f'{form}: {line}' for form, line in found.items()), sep=' | ')"
    )
    return [Job(f"{n} {p}", ("-c", code, n, p), 125.0) for n, p in (PROOFS[:1] if rehearse else PROOFS)]


def run_tests(gate: Gate, deadline: float, command: tuple[str, ...] = (), processes: int | None = None) -> None:
    """``pytest -m gpu`` in several processes. One whose device is lost, or that dies, is started again for what it had not begun."""
    if not command and importlib.util.find_spec("pytest") is None:
        gate.note("tests", "skipped, pytest is not installed")
        return
    given = ("-m", "pytest", "-m", "gpu", "-q", "--tb=short", "-p", "no:cacheprovider", "tests/gpu")
    small = ("tests/gpu/test_kernels_gpu.py", "-k", "test_labels or test_bf16") if gate.rehearse else ()
    command = command or (given[:-1] + small if small else given)
    processes = processes or (1 if gate.rehearse else min(6, gate.processes))
    with tempfile.TemporaryDirectory() as folder:
        journals = [Path(folder) / f"{i}.jsonl" for i in range(processes)]
        pending, cut = list(range(processes)), set[Path]()
        for _ in range(20):  # a device that is lost twenty times is told of often enough
            jobs = [
                Job(f"share {i + 1} of {processes}", command, 600.0,
                    {"WSLFAST_SHARD": f"{i}/{processes}", "WSLFAST_JOURNAL": str(journals[i]),
                     **({"WSLFAST_GPU_TESTS": "interpret", "TRITON_INTERPRET": "1"} if gate.rehearse else {})})
                for i in pending
            ]  # fmt: skip
            ended: list[Done] = []
            run_all(jobs, processes, deadline, ended.append)
            again = [d for d in ended if d.status == LOST or d.status < 0]
            cut |= {journals[int(d.job.name.split()[1]) - 1] for d in ended if d.cut}
            for done in ended:
                if done.status not in (0, 1, NO_TESTS):
                    if done.status > 0 and done.status != LOST and not done.cut:  # it did not begin: a missing package, a broken import
                        gate.wrong.append(f"tests: {done.job.name}: {done.words}")
                    gate.note("tests", f"{done.job.name}: {done.words}", status=done.status, output=done.output.splitlines()[-12:])
            pending = [int(d.job.name.split()[1]) - 1 for d in again]
            if not pending or time.monotonic() >= deadline:
                break
        if not _results(gate, journals, cut) and ended and not cut and not gate.wrong:
            gate.wrong.append("tests: none was run")


def _results(gate: Gate, journals: list[Path], cut: set[Path]) -> int:
    """How many tests the journals know. Failures are notes; so is what has no result, in journals that were cut off for want of time."""
    results: dict[str, str] = {}
    last: dict[Path, str] = {}  # test to begin in a journal
    waiting: dict[str, None] = {}
    for journal in journals:
        for line in journal.read_text().splitlines() if journal.exists() else []:
            entry = json.loads(line)
            if "waiting" in entry:
                waiting[entry["waiting"]] = None
                continue
            results[entry["test"]] = entry["outcome"] if entry["outcome"] != "begun" else results.get(entry["test"], "begun")
            if entry["outcome"] == "begun":
                last[journal] = entry["test"]
            if entry["outcome"] == "failed":
                gate.note("tests", f"FAILED {entry['test']}", why=entry["why"])
    counts = {outcome: sum(o == outcome for o in results.values()) for outcome in ("passed", "failed", "skipped", "begun")}
    late = {test for journal, test in last.items() if journal in cut and results[test] == "begun"}
    ill = {test: o for test, o in results.items() if o in ("failed", "begun") and test not in late}
    gate.wrong += [f"tests: {test}: {'died in it' if o == 'begun' else o}" for test, o in ill.items()]
    gate.undone += [f"tests: {test}" for test in (*late, *(w for w in waiting if w not in results))]
    gate.note("tests", ", ".join(f"{count} {'without an end' if o == 'begun' else o}" for o, count in counts.items()), **counts)
    return len(results)


def run_section(gate: Gate, name: str, deadline: float) -> None:
    """A section of ``--suite gpu`` in its own process, its rows into ``gpu.csv``."""
    job = Job(name, ("-m", "benchmarks", "--suite", "gpu", "--only", name, "--out", str(gate.out), "--no-page"), 600.0)
    if gate.rehearse:
        job = Job(name, ("-c", f"print('rehearsed: the section {name} needs a GPU')"), 60.0)
    gate.jobs(name, [job], 1, deadline)


def rehearsed_cells(part: str) -> list[Cell]:
    """Small cells that run on a CPU: a peer, and the kernels in both modes in Triton's interpreter."""
    kernels = {"core": ["wslfast-triton-layerwise"], "nets": ["wslfast-triton-network"]}.get(part, [])
    return [Cell(name, "cnn", 1, 2) for name in ("loop", *kernels)]


def run_cells(gate: Gate, name: str, deadline: float) -> None:
    """The gate and the clocks for the cells of a part."""
    path = gate.out / "gpu.csv"
    cells = rehearsed_cells(name) if gate.rehearse else suites.GPU_CELLS[name]()
    best = [row for row in (read_rows(path) if path.exists() else []) if row.provider == "ceiling"]

    def emit(rows: list[Row]) -> None:
        merge(path, rows)
        clock = next((r for r in rows if r.metric == "gpu_ms"), rows[0])
        said = f"{clock.median} ms, error {clock.relative_error}" if clock.value is not None else clock.details
        what = f"{clock.provider} {clock.architecture} k={clock.k} n={clock.n} {clock.precision} {clock.variant}"
        gate.note(name, f"{what}: {said}")
        if "not run: out of time" in clock.details:
            gate.undone.append(f"{name}: {what}")
        elif clock.value is None and clock.provider in suites.KERNELS and not any(w in clock.details for w in ("not run", "out of memory")):
            gate.wrong.append(f"{name}: {what}: {clock.details}")

    device = "cpu" if gate.rehearse else "cuda"
    with environment(TRITON_INTERPRET="1", WSLFAST_REHEARSE="1") if gate.rehearse else contextlib.nullcontext():
        workers.run(cells, emit, device=device, deadline=deadline, cell_s=CELL_S, provider_s=allowance, figure_s=0.4, best=best)


@contextlib.contextmanager
def environment(**values: str) -> Iterator[None]:
    """Processes that are started inside have these variables."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


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


def run_part(gate: Gate, part: str, deadline: float) -> None:
    """One part, until its deadline."""
    if part == "compile":
        gate.jobs(part, compile_jobs(gate.rehearse), gate.processes, deadline)
    elif part == "diagnose":
        gate.jobs(part, diagnose_jobs(gate.rehearse), min(8, gate.processes), deadline)
    elif part == "tests":
        run_tests(gate, deadline)
    elif part in suites.GPU_CELLS:
        run_cells(gate, part, deadline)
    elif part == "proof":
        gate.jobs(part, proof_jobs(gate.rehearse), 1, deadline)  # one at a time: it times
    else:
        run_section(gate, part, deadline)
        pack_trace(gate.out)


def main(arguments: list[str] | None = None) -> int:
    """All parts or some; the exit status is 1 if anything was found wrong."""
    parser = argparse.ArgumentParser(description="everything that only a GPU can tell, in under ten minutes")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="some parts")
    parser.add_argument("--rehearse", action="store_true", help="the whole way without a GPU, on small pieces")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available() and not options.rehearse:
        print("gpu gate: no CUDA device here, nothing was run")
        return 0
    began = time.monotonic()
    out = Path(os.environ.get("OUT") or DATA)
    out.mkdir(parents=True, exist_ok=True)
    gate = Gate(out, options.rehearse)
    (out / LOG).unlink(missing_ok=True)
    parts = [part for part in PARTS if part in options.only]
    for i, part in enumerate(parts):
        started = time.monotonic()
        end = started + (began + TOTAL_S - started) * PARTS[part] / sum(PARTS[p] for p in parts[i:])
        try:
            run_part(gate, part, end)
        except Exception as error:  # the parts to come are worth more than a gate that stops
            gate.wrong.append(f"{part}: {type(error).__name__}: {error}")
            gate.note(part, f"failed: {type(error).__name__}: {error}")
        gate.note(part, f"{time.monotonic() - started:.0f} s")
    rows = read_rows(out / "gpu.csv") if (out / "gpu.csv").exists() else []
    if rows and not gate.rehearse:
        print(summary(rows))
    return report(gate, len(rows), time.monotonic() - began)


def report(gate: Gate, rows: int, seconds: float) -> int:
    """What was wrong and what was left undone, in the log and at the end of the output; 1 if anything was wrong."""
    for title, found in (("wrong", gate.wrong), ("not done", gate.undone)):
        with (gate.out / LOG).open("a") as file:
            file.write(json.dumps({"part": title, "what": found}) + "\n")
        print("\n".join([f"{title}: {len(found)}", *(f"  {line[:200]}" for line in found[:40]), *(["  ..."] if len(found) > 40 else [])]))
    print(f"gpu gate: {rows} rows, {len(gate.wrong)} wrong, {len(gate.undone)} not done, {seconds:.0f} s", flush=True)
    return 1 if gate.wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
