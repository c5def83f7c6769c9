"""The process in which kernels are tried: right or wrong against float64, then how fast beside torch. Started by ``wslfast/proof.py``.

``python -m wslfast.engine.trial`` reads one job, a JSON object, from its input and prints one line for each finding. Whatever the kernels
do to this process or to its hold on the GPU, the process that asked goes on.
"""

from __future__ import annotations

import json
import math
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..architecture import Architecture
from ..errors import first_line
from ..kernels.criteria import CRITERIA
from ..kernels.layers import Conv2d, Linear
from ..kernels.triton.configurations import CHOICES, joins
from ..kernels.triton.devices import matrix_unit
from ..kernels.triton.folding import chain
from ..kernels.triton.launcher import capability_of
from ..kernels.triton.schedule import schedule
from . import Call, choose, device_errors
from .paths import Path
from .precision import at_precision
from .triton_path import Triton, Unbuildable, reaches_queries, unbuildable
from .verdicts import FAILED, RIGHT, UNKNOWN, WRONG, Speed, Verdict

MARK = "wslfast-trial:"  # of the lines that are ours
K, N = 3, 37  # odd, and no multiple of a tile
BROKEN = 1  # of the K models: its weights are NaN, and nobody else's numbers may show it
SEEDS = 3  # a maximum that is nearly tied may go another way and take a gradient with it: what is wrong is wrong for most seeds
REPEATS = 5
LOST = 75  # exit status of a process that lost its device
# relative L2 error of: forward, linear layers' gradients, convolutions', the first convolution's (near-ties of a pooling window)
BARS = {
    "tf32x3": (1e-5, 1e-5, 1e-5, 1e-5),
    "tf32": (2e-3, 2e-3, 2e-2, 8e-2),
    "fp16": (2e-3, 2e-3, 2e-2, 8e-2),
    "bf16": (3e-2, 6e-2, 1e-1, 2e-1),
}
clock: Callable[[], float] = time.perf_counter


def kernels(architecture: Architecture, choice: str) -> Path:
    """The kernels' path, which is on trial."""
    return Triton(architecture, "on trial", choice)


def torch_path(architecture: Architecture, device: torch.device, form: str) -> Path:
    """Torch's path, which the kernels have to beat."""
    return choose(architecture, device.type, torch.float32, "torch", torch.is_autocast_enabled(device.type), Call(form))


def models(architecture: Architecture, k: int, seed: int) -> Tensor:
    """``[k, P]`` weights whose activations are of order one."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.zeros(k, architecture.num_weights)
    for p in architecture.parameters:
        spread = 1.3 * math.sqrt(p.shape[0] / p.size) if len(p.shape) > 1 else 0.2
        drawn = torch.randn(k, p.size, generator=generator) * spread
        weights[:, p.offset : p.stop] = drawn.abs() + 0.5 if p.name.endswith("running_var") else drawn
    return weights


@contextmanager
def poisoned() -> Iterator[None]:
    """In this block ``torch.empty`` and its kin return NaN, so that a number that no kernel writes shows up in the result."""
    names = ("empty", "empty_like", "empty_strided")
    real = {name: getattr(torch, name) for name in names}

    def fill(made: Tensor) -> Tensor:
        if made.is_floating_point():
            made.fill_(float("nan"))
        elif made.dtype in (torch.int8, torch.int32, torch.int64):
            made.fill_(torch.iinfo(made.dtype).min // 2)
        return made

    try:
        for name in names:
            setattr(torch, name, lambda *a, _make=real[name], **kw: fill(_make(*a, **kw)))
        yield
    finally:
        for name in names:
            setattr(torch, name, real[name])


class Wrong(Exception):
    """A result that no precision excuses."""


def bar(architecture: Architecture, parameter: str, bars: tuple[float, ...]) -> float:
    """The bound of one parameter's gradient. A norm's parameters are those of the convolution that it is folded into."""
    weighted = [layer for layer in architecture.layers if isinstance(layer, (Conv2d, Linear))]
    layer = next((layer for layer in weighted if layer.name == parameter.rpartition(".")[0]), None)
    if layer is None:
        return bars[3]
    return bars[1] if isinstance(layer, Linear) else bars[3] if layer is weighted[0] else bars[2]


def truth_of(architecture: Architecture) -> Path:
    """The path in float64 that the kernels are compared with: torch, on the CPU."""
    return choose(architecture, "cpu", torch.float64, "torch")


class Trial:
    """One network in one form and precision on one device."""

    def __init__(self, architecture: Architecture, form: str, precision: str, device: torch.device) -> None:
        self.architecture, self.form, self.precision, self.device = architecture, form, precision, device
        self.bars = BARS[precision]

    # -- right? ----------------------------------------------------------------------------------------------------

    def errors(self, choice: str) -> dict[str, float]:
        """Relative errors as shares of their bounds, by name: above one is wrong. Raises Wrong for what is no matter of precision."""
        first = self._errors(choice, 0)
        if max(first.values()) < 1:
            return first
        others = [self._errors(choice, seed) for seed in range(1, SEEDS)]
        return {name: statistics.median([value, *(o[name] for o in others)]) for name, value in first.items()}

    def _errors(self, choice: str, seed: int) -> dict[str, float]:
        architecture, path = self.architecture, kernels(self.architecture, choice)
        generator = torch.Generator().manual_seed(1000 + seed)
        weights = models(architecture, K, seed)
        weights[BROKEN] = float("nan")
        queries = torch.randn(N, *architecture.input_shape, generator=generator)
        targets = torch.randn(K, N, architecture.num_classes, generator=generator)
        labels = torch.randint(architecture.num_classes, (K, N), generator=generator)
        index = torch.randint(N, (K, N), generator=generator)
        if self.form == "forward":
            return self._forward(path, weights, queries)
        errors: dict[str, float] = {}
        jobs: list[tuple[str, Tensor]] = [(name, targets) for name in CRITERIA] + [("cross_entropy", labels)]
        for name, y in jobs if self.form == "loss" else [jobs[0], jobs[-1]]:
            own = index if self.form == "indexed" else None
            errors |= self._loss(path, weights, queries, y, name, own)
        return errors

    def _forward(self, path: Path, weights: Tensor, queries: Tensor) -> dict[str, float]:
        truth = truth_of(self.architecture).forward(weights.double(), queries.double(), False)
        here, asked = self._here(weights, queries)
        outputs = self._twice("outputs", lambda: (path.forward(here, asked, False),))[0]
        errors = {"outputs": self._error("outputs", outputs, truth) / self.bars[0]}
        slope = torch.ones(1, 1, 1, dtype=truth.dtype).expand(truth.shape)  # stride 0, as out of a sum
        gradient, expected = self._slopes("gradient", path, (weights, queries), 0, slope)
        errors |= self._gradient("sum", gradient, expected)
        if reaches_queries(self.architecture):
            # each model's own, so that the broken one is seen and touches nobody else's
            gradient, expected = self._slopes("queries", path, (weights, queries.expand(K, *queries.shape)), 1, slope)
            errors["queries"] = self._error("queries", gradient, expected) / self.bars[3]
        return errors

    def _slopes(self, what: str, path: Path, inputs: tuple[Tensor, Tensor], to: int, slope: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of the outputs, summed with ``slope``, to the weights (``to`` is 0) or to the queries (1): the path's, and the
        same in float64. Raises Wrong if two runs of the path differ."""

        def gradient(path: Path, rows: Tensor, x: Tensor) -> tuple[Tensor, ...]:
            leaf = (rows, x)[to].requires_grad_()
            outputs = path.forward(rows, x, True)
            return torch.autograd.grad(outputs, leaf, slope.to(outputs))

        (kernels,) = self._twice(what, lambda: gradient(path, *self._here(*inputs)))
        (expected,) = gradient(truth_of(self.architecture), *(t.double() for t in inputs))
        return kernels, expected

    def _loss(
        self, path: Path, weights: Tensor, queries: Tensor, targets: Tensor, criterion: str, index: Tensor | None
    ) -> dict[str, float]:
        exact = targets.double() if targets.is_floating_point() else targets
        own = queries.double() if index is None else queries.double()[index]
        truth, slopes = truth_of(self.architecture).loss_and_gradient(weights.double(), own, exact, criterion, 2.0, None)
        rows, x, y = self._here(weights, queries, targets)
        chosen = None if index is None else index.to(self.device)
        name = criterion if targets.is_floating_point() else "labels"
        losses, gradient = self._twice(name, lambda: path.loss_and_gradient(rows, x, y, criterion, 2.0, chosen))
        errors = {f"{name} loss": self._error(name, losses, truth) / (2 * self.bars[0])}
        return errors | self._gradient(name, gradient, slopes)

    def _here(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.to(self.device, copy=True) for t in tensors)

    def _twice(self, what: str, run: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """What ``run`` returns. Raises Wrong unless a second run returns the same bits."""
        with at_precision(self.precision), poisoned():
            first = [t.detach().float().cpu() for t in run()]
            second = [t.detach().float().cpu() for t in run()]
        if not all(torch.equal(a.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0)) for a, b in zip(first, second, strict=True)):
            raise Wrong(f"{what}: two runs differ")
        return tuple(first)

    def _error(self, what: str, actual: Tensor, truth: Tensor) -> float:
        """Relative error of the models whose weights are finite. Raises Wrong if the model with NaN weights has no NaN in its result."""
        if actual.shape != truth.shape:
            raise Wrong(f"{what}: expected {list(truth.shape)}, got {list(actual.shape)}")
        if not bool(actual[BROKEN].isnan().any()):
            raise Wrong(f"{what}: a model whose weights are NaN got numbers")
        well = [j for j in range(K) if j != BROKEN]
        if not bool(actual[well].isfinite().all()):
            raise Wrong(f"{what}: not finite for models whose weights are")
        return float((actual[well].double() - truth[well]).norm() / truth[well].norm().clamp(min=1e-30))

    def _gradient(self, what: str, actual: Tensor, truth: Tensor) -> dict[str, float]:
        self._error(f"{what} gradient", actual, truth)
        well = [j for j in range(K) if j != BROKEN]
        errors = {}
        for p in self.architecture.parameters:
            a, b = actual[well, p.offset : p.stop].double(), truth[well, p.offset : p.stop]
            errors[f"{what} {p.name}"] = float((a - b).norm() / b.norm().clamp(min=1e-30)) / bar(self.architecture, p.name, self.bars)
        return errors

    # -- faster? ---------------------------------------------------------------------------------------------------

    def timer(self, k: int, n: int) -> Callable[[Path], float]:
        """A function that runs a path once, with k models and n queries, and returns the milliseconds."""
        rows = models(self.architecture, min(k, 64), 0).to(self.device)
        rows = rows.repeat(-(-k // len(rows)), 1)[:k]
        x = torch.randn(n, *self.architecture.input_shape, device=self.device)
        y = torch.randn(k, n, self.architecture.num_classes, device=self.device)
        labels = torch.zeros(k, n, dtype=torch.int64, device=self.device)
        index = torch.randint(n, (k, n), device=self.device)
        calls: dict[str, Callable[[Path], Any]] = {
            "forward": lambda path: path.forward(rows, x, False),
            "loss": lambda path: path.loss_and_gradient(rows, x, y, "mse", 2.0, None),
            "indexed": lambda path: path.loss_and_gradient(rows, x, labels, "cross_entropy", 2.0, index),
        }
        call = calls[self.form]

        def milliseconds(path: Path) -> float:
            with at_precision(self.precision), torch.no_grad():
                self._wait()
                began = clock()
                call(path)
                self._wait()
                return 1e3 * (clock() - began)

        return milliseconds

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @property
    def choices(self) -> list[str]:
        """The configurations that differ for this network and form."""
        graph = self.architecture.graph
        joint = self.form != "forward" and graph is not None
        if joint:
            unit = matrix_unit(capability_of(self.device))
            joint = joins(schedule(chain(graph).layers, self.architecture.input_shape), self.precision, unit)
        return [name for name, tuning in CHOICES.items() if joint or not tuning.joint]

    def speed(self, k: int, n: int) -> tuple[Speed, list[str]]:
        """The best configuration's time beside torch's, and what configurations could not run. A configuration other than the default
        has to be right, too, before its time counts."""
        with at_precision(self.precision):
            peer = torch_path(self.architecture, self.device, self.form)
        milliseconds, left_out = self.timer(k, n), []
        milliseconds(peer)
        paths = {"": peer}
        for choice in self.choices:
            path = kernels(self.architecture, choice)
            try:
                if choice != "default" and not max(self._errors(choice, 0).values()) < 1:
                    raise Wrong("not right")
                milliseconds(path)
            except (Unbuildable, Wrong) as error:
                if choice == "default":
                    raise
                left_out.append(f"{choice}: {error or 'cannot be built'}")
                unbuildable.pop(self.architecture, None)
                continue
            paths[choice] = path
        times: dict[str, list[float]] = {name: [] for name in paths}
        for _ in range(REPEATS):  # in turns: a GPU's clocks rise as it works, and others may be at work on it
            for name, path in paths.items():
                times[name].append(milliseconds(path))
        median = {name: statistics.median(taken) for name, taken in times.items()}
        reference_ms = median.pop("")
        best = min(median, key=lambda name: median[name])
        return Speed(k, n, reference_ms, median[best], best), left_out


def run(job: dict[str, Any], say: Callable[[dict[str, Any]], None]) -> bool:
    """Verdicts of a job's forms, in order, each said as soon as it is known: right first, then how fast. False where this process lost the
    device, with which every other form would fail."""
    device = torch.device(job["device"])
    architecture = Architecture.from_dict(job["architecture"])
    try:
        torch.zeros(1, device=device) + 1
        here = torch.cuda.get_device_name(device) if device.type == "cuda" else None
        if here is not None and here != job["gpu"]:
            raise RuntimeError(f"it sees {here!r} under the number of {job['gpu']!r}")  # as CUDA_VISIBLE_DEVICES has changed since, say
    except (RuntimeError, AssertionError) as error:  # a GPU that takes one process alone, or has no memory left
        for form in job["forms"]:
            say(_said(form, Verdict(UNKNOWN, f"no second process gets onto the GPU: {first_line(error):.160}")))
        return True
    for form in job["forms"]:
        say({"form": form, "begins": True})
        trial = Trial(architecture, form, job["precision"], device)
        verdict, lost = _verdict(trial, job, partial(_say_verdict, say, form))
        _say_verdict(say, form, verdict)
        say({"form": form, "ends": True})
        if lost:
            return False
    return True


def _say_verdict(say: Callable[[dict[str, Any]], None], form: str, verdict: Verdict) -> None:
    say(_said(form, verdict))


def _verdict(trial: Trial, job: dict[str, Any], interim: Callable[[Verdict], None]) -> tuple[Verdict, bool]:
    """The verdict, and whether the device was lost on the way."""
    try:
        errors = trial.errors("default")
    except Wrong as error:
        return Verdict(WRONG, str(error)), False
    except Unbuildable:
        return Verdict(FAILED, unbuildable[trial.architecture]), False
    except Exception as error:
        if device_errors.out_of_memory(error):
            return Verdict(UNKNOWN, f"out of memory: {first_line(error):.160}"), False
        return Verdict(FAILED, f"{type(error).__name__}: {first_line(error):.200}"), device_errors.kind_of(error) is not None
    wrong = {name: value for name, value in errors.items() if not value < 1}
    worst = max(errors, key=lambda name: errors[name])
    if wrong:
        return Verdict(WRONG, f"{worst}: {errors[worst]:.3g} times the error that {trial.precision} excuses", errors), False
    right = Verdict(RIGHT, f"worst error {errors[worst]:.2g} of its bound ({worst})", errors)
    interim(right)
    speeds = []
    for k, n in job["sizes"]:
        try:
            speed, left_out = trial.speed(k, n)
        except Exception as error:  # right at a small size, and broken at a real one
            if device_errors.out_of_memory(error):
                continue
            why = f"at k={k}, n={n}: {type(error).__name__}: {first_line(error):.200}"
            return Verdict(FAILED, why), device_errors.kind_of(error) is not None
        speeds.append(speed)
        right = Verdict(RIGHT, "; ".join([right.reason, *left_out]), errors, tuple(speeds))
        interim(right)
    return right, False


def _said(form: str, verdict: Verdict) -> dict[str, Any]:
    return {"form": form, "verdict": asdict(verdict)}


def _end_with(parent: int) -> None:
    """End this process soon after the one that started it: nobody wants its findings, and its GPU may be wanted."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(LOST)


def serve(job: dict[str, Any]) -> None:
    """Do a job and print findings."""
    device_errors.on_trial()
    # nobody may be left to end it: the process that asked can die, too, and with a hang in a compiler no thread runs
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    if hasattr(signal, "alarm"):
        signal.alarm(math.ceil(job["limit_s"]) + 30)
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as findings:  # a line of somebody else's in the middle of ours would cost it
        os.dup2(2, 1)
        if not run(job, lambda finding: print(MARK + json.dumps(finding), file=findings, flush=True)):
            sys.exit(LOST)


def main() -> None:
    """Read a job, print findings."""
    serve(json.loads(sys.stdin.readline()))


if __name__ == "__main__":
    main()
