"""Try the kernels' levers on this GPU: kernel by kernel, then whole steps, one table of rows and what to keep.

    PYTHONPATH=. python3 benchmarks/tune.py [--architecture cnn3 cnn lenet5] [--precision fp16 tf32] [--seconds 420]

Every attempt goes through one hook, ``configurations.tuned``; docs/notes/tuning.md lists the levers in order, with what each is expected to
give.
A lever's result has to agree with the default's before its time counts. Rows go to ``${OUT:-benchmarks/data}/tune.csv`` as they are
measured: what fails to compile or to launch is a row that says so. Needs torch and triton alone.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import timing
from benchmarks.kernels.inspect import ARCHITECTURES
from wslfast.kernels import criteria, reference
from wslfast.kernels.layers import Layers
from wslfast.kernels.triton import launch
from wslfast.kernels.triton.configurations import Configuration, Tuning, tuned
from wslfast.kernels.triton.schedule import schedule
from wslfast.kernels.triton.stages import Stage

DATA = Path(__file__).resolve().parent / "data"
KEEP = 0.98  # of the default's time: what is closer is noise
AGREES = 2e-3  # relative difference from the default's gradient
QUERIES = 256
CRITERION = "mse"


@dataclass(frozen=True)
class Lever:
    """One attempt: another configuration for some roles, another number of rows a split, or two gradients in one launch."""

    name: str
    roles: tuple[str, ...]
    change: Callable[[Configuration], Configuration]
    split_rows: int = 0
    joint: bool = False

    def tuning(self) -> Tuning:
        """The hook's argument: the change for this lever's roles on every stage."""
        base = Tuning(lambda role, stage, precision, c: self.change(c) if role in self.roles else c)
        return replace(base, split_rows=self.split_rows or base.split_rows, joint=self.joint)


def _set(**values: Any) -> Callable[[Configuration], Configuration]:
    return lambda c: replace(c, **values)


# In the order of docs/notes/tuning.md.
LEVERS = (
    Lever("stages 2", ("forward", "dx"), _set(STAGES=2)),
    Lever("registers 128", ("forward", "dw", "dx"), _set(REGISTERS=128)),
    Lever("registers 168", ("dx", "dw"), _set(REGISTERS=168)),
    Lever("other hoist", ("forward", "dx"), lambda c: replace(c, HOIST=not c.HOIST)),
    Lever("rows 128, warps 8", ("forward", "dx"), _set(BM=128, WARPS=8)),
    Lever("rows 64 in dw", ("dw",), _set(BM=64)),
    Lever("tiles 4", ("forward", "dx"), _set(TILES=4)),
    Lever("tiles 16", ("forward", "dx"), _set(TILES=16)),
    Lever("tiles 32", ("forward", "dx"), _set(TILES=32)),
    Lever("split rows 2048", ("dw",), _set(), 2048),
    Lever("split rows 16384", ("dw",), _set(), 16384),
    Lever("joint", (), _set(), joint=True),  # of whole steps alone
)


@dataclass(frozen=True)
class Row:
    """One attempt; ``ratio`` is its time over the default's, ``error`` the relative difference of the results."""

    part: str
    architecture: str
    precision: str
    k: int
    n: int
    kernel: str
    lever: str
    ms: float | None = None
    default_ms: float | None = None
    ratio: float | None = None
    error: float | None = None
    keep: str = ""
    device: str = ""
    note: str = ""


class Job:
    """One network, precision and size: its inputs, a whole step, and every launch of it for itself."""

    def __init__(self, name: str, layers: Layers, shape: tuple[int, ...], precision: str, k: int, n: int, device: str) -> None:
        self.name, self.layers, self.precision, self.k, self.n = name, layers, precision, k, n
        self.schedule = schedule(layers, shape)
        torch.manual_seed(0)
        self.weights = torch.randn(k, self.schedule.parameters, device=device) * 0.1
        self.queries = torch.randn(n, *shape, device=device)
        self.targets = torch.randn(k, n, self.schedule.classes, device=device)

    def step(self) -> tuple[Tensor, Tensor]:
        """Losses and gradient of all models."""
        return launch.loss_and_gradient(self.weights, self.queries, self.targets, self.layers, CRITERION, 2.0, self.precision, memory=2**36)

    def launches(self) -> list[tuple[str, Stage, Configuration, Callable[[Configuration], None]]]:
        """(kernel's name, stage, configuration, launch with a configuration) of every stage kernel of a step, its buffers kept."""
        launches: list[tuple[str, Stage, Configuration, Callable[[Configuration], None]]] = []
        real = {role: getattr(launch, f"stage_{role}") for role in ("forward", "dw", "dx")}

        def record(role: str) -> Callable[..., None]:
            def call(*arguments: Any, **options: Any) -> None:
                at = next(i for i, a in enumerate(arguments) if isinstance(a, Configuration))
                stage = next(a for a in arguments if isinstance(a, Stage))

                def again(c: Configuration) -> None:
                    real[role](*arguments[:at], c, *arguments[at + 1 :], **options)

                launches.append((f"{role} {self.schedule.stages.index(stage)}", stage, arguments[at], again))
                again(arguments[at])

            return call

        try:
            for role in real:
                setattr(launch, f"stage_{role}", record(role))
            self.step()
        finally:
            for role, function in real.items():
                setattr(launch, f"stage_{role}", function)
        return launches


def milliseconds(call: Callable[[], object], device: str, repeats: int) -> float:
    """Median time of a call that is warm: CUDA events with a cold L2, or a host clock in the interpreter."""
    if device == "cuda":
        return statistics.median(timing.event_ms(call, repeats))
    began = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - began)


def _difference(given: Tensor, expected: Tensor) -> float:
    return float((given - expected).norm() / expected.norm().clamp(min=1e-30))


def _why(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:120]}"


def _judged(row: Row, ms: float, default: float, error: float) -> Row:
    keep = "yes" if ms < KEEP * default and error < AGREES else "no"
    note = "" if error < AGREES else "its result differs"
    return replace(row, ms=ms, default_ms=default, ratio=ms / default, error=error, keep=keep, note=note)


def _by_kernel(job: Job, chosen: dict[str, Lever]) -> Tuning:
    """The hook's argument: for each of these kernels its own lever."""

    def choose(role: str, stage: Stage, precision: str, c: Configuration) -> Configuration:
        lever = chosen.get(f"{role} {job.schedule.stages.index(stage)}") if stage in job.schedule.stages else None
        return c if lever is None else lever.change(c)

    return Tuning(choose)


def kernel_rows(job: Job, levers: tuple[Lever, ...], device: str, base: Row, repeats: int, end: float) -> Iterator[Row]:
    """Each stage kernel alone under each lever of its role (split counts change buffers: they are for whole steps). Its result is judged by
    the gradient of a step in which that kernel alone has the lever: launched by itself, it works on what it has overwritten."""
    _, expected = job.step()
    for name, _, config, again in job.launches():
        role, default = name.split()[0], milliseconds(lambda again=again, config=config: again(config), device, repeats)
        yield replace(base, part="kernel", kernel=name, lever="default", ms=default, default_ms=default, ratio=1.0)
        for lever in levers:
            other = lever.change(config)
            if role not in lever.roles or other == config or time.monotonic() > end:
                continue
            row = replace(base, part="kernel", kernel=name, lever=lever.name)
            try:
                with tuned(_by_kernel(job, {name: lever})):
                    _, gradient = job.step()
                again(other)
                ms = milliseconds(lambda again=again, other=other: again(other), device, repeats)
                yield _judged(row, ms, default, _difference(gradient, expected))
            except Exception as error:  # does not compile, or asks for more than the device has
                yield replace(row, keep="no", note=_why(error))


def step_rows(
    job: Job, levers: tuple[Lever, ...], chosen: dict[str, Lever], device: str, base: Row, repeats: int, end: float
) -> Iterator[Row]:
    """Whole steps: the default, each lever everywhere in its roles, and what was best for each kernel together."""
    _, expected = job.step()
    default = milliseconds(job.step, device, repeats)
    yield replace(base, part="step", kernel="step", lever="default", ms=default, default_ms=default, ratio=1.0)
    attempts = [(lever.name, lever.tuning()) for lever in levers]
    if chosen:
        attempts.insert(0, ("best of each kernel", _by_kernel(job, chosen)))
    for name, tuning in attempts:
        if time.monotonic() > end:
            return
        row = replace(base, part="step", kernel="step", lever=name)
        try:
            with tuned(tuning):
                _, gradient = job.step()
                ms = milliseconds(job.step, device, repeats)
            yield _judged(row, ms, default, _difference(gradient, expected))
        except Exception as error:
            yield replace(row, keep="no", note=_why(error))


def check(job: Job) -> float:
    """Relative error of the default's losses of two models against float64: nothing is tuned that is wrong."""
    losses, _ = job.step()
    some = [0, job.k - 1]
    targets = job.targets[some].double()
    outputs = reference.forward(job.weights[some].double(), job.queries.double(), job.layers)
    return _difference(losses[some].double(), criteria.criterion_values(outputs, targets, CRITERION))


def sweep(job: Job, levers: tuple[Lever, ...], device: str, emit: Callable[[Row], None], repeats: int, end: float) -> list[Row]:
    """All rows of one job, handed to ``emit`` one by one."""
    where = torch.cuda.get_device_name() if device == "cuda" else "interpreter"
    base = Row("", job.name, job.precision, job.k, job.n, "", "", device=where)
    error = check(job)
    if not error < 0.05:
        note = "the default differs from float64: nothing was tuned"
        row = replace(base, part="step", kernel="step", lever="default", error=error, note=note)
        emit(row)
        return [row]
    rows: list[Row] = []

    def keep(row: Row) -> None:
        rows.append(row)
        emit(row)

    for row in kernel_rows(job, levers, device, base, repeats, end):
        keep(row)
    names = {lever.name: lever for lever in levers}
    best: dict[str, Row] = {}
    for row in rows:
        if row.keep == "yes" and (row.kernel not in best or row.ms < best[row.kernel].ms):  # type: ignore[operator]
            best[row.kernel] = row
    chosen = {kernel: names[row.lever] for kernel, row in best.items()}
    for row in step_rows(job, levers, chosen, device, base, repeats, end):
        keep(row)
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--architecture", nargs="+", choices=sorted(ARCHITECTURES), default=["cnn3"])
    parser.add_argument("--precision", nargs="+", choices=["fp16", "tf32", "bf16"], default=["fp16", "tf32"])
    parser.add_argument("--models", type=int, default=1024)
    parser.add_argument("--queries", type=int, default=QUERIES)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=420.0, help="for everything; what does not fit is left out")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("tune: no CUDA device here, nothing was run")
        return 0
    out = Path(os.environ.get("OUT") or DATA)
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    jobs = [(a, p) for a in options.architecture for p in options.precision]
    better: list[Row] = []
    with (out / "tune.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)])
        writer.writeheader()

        def emit(row: Row) -> None:
            writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else "" if v is None else v for k, v in asdict(row).items()})
            file.flush()

        for i, (architecture, precision) in enumerate(jobs):
            end = began + options.seconds * (i + 1) / len(jobs)
            job = Job(architecture, *ARCHITECTURES[architecture], precision, options.models, options.queries, "cuda")
            rows = sweep(job, LEVERS, "cuda", emit, options.repeats, end)
            better += [row for row in rows if row.keep == "yes"]
            for row in rows:
                if row.lever == "default" and row.ms is not None:
                    print(f"{architecture} {precision} {row.kernel}: {row.ms:.3f} ms", flush=True)
    print("keep:" if better else "keep: nothing beats the defaults")
    for row in sorted(better, key=lambda row: row.ratio or 1.0):
        print(f"  {row.architecture} {row.precision} {row.kernel}: {row.lever}: {row.ms:.3f} ms, {row.ratio:.2f} of the default")
    print(f"tune: {time.monotonic() - began:.0f} s, rows in {out / 'tune.csv'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
