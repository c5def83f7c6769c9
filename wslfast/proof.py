"""Proving the kernels where they will run: :func:`doctor`, and what training, zoo building, evaluation and generation ask for themselves.

The kernels are compiled, compared with float64 and timed beside torch in a process of their own (``engine/trial.py``), so that no fault,
hang or crash of the compiler reaches the caller. The result is a verdict (``engine/verdicts.py``), which ``backend="auto"`` follows.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .architecture import Architecture
from .engine import device_errors, ranks, verdicts
from .engine.choice import why_not_triton
from .engine.precision import PRECISIONS, kernel_precision
from .engine.preference import preferred
from .engine.trial import MARK
from .engine.verdicts import FAILED, FORMS, RIGHT, UNKNOWN, WRONG, Decision, Verdict
from .errors import check_device, check_positive, require, say_once

LIMIT_S = 120.0
COMMAND = (sys.executable, "-m", "wslfast.engine.trial")
SIZES = ((128, 256), (1024, 256))  # what doctor times where nobody says: a published batch, and a large one
logger = logging.getLogger("wslfast")


class _Child:
    """A trial that runs: its findings, a line each."""

    def __init__(self, command: Sequence[str], job: dict[str, Any]) -> None:
        root = str(Path(__file__).resolve().parent.parent)
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed in stop)
        self.process = subprocess.Popen(
            list(command),
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            start_new_session=True,  # compilers that it starts end with it
        )
        self.lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(MARK):
                self.lines.put(line.removeprefix(MARK))
        self.lines.put(None)

    def findings(self, deadline: float) -> Iterator[dict[str, Any]]:
        """Until it ends or, with a TimeoutError, until the time is over."""
        while True:
            try:
                line = self.lines.get(timeout=max(deadline - time.monotonic(), 0.01))
            except queue.Empty:
                raise TimeoutError from None
            if line is None:
                return
            yield json.loads(line)

    def ended(self) -> str:
        """How it ended, in words; empty if well."""
        code = self.process.wait()
        if code == 0:
            return ""
        self.errors.seek(0)
        last = self.errors.read().decode(errors="replace").strip().splitlines()[-1:]
        how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        return f"its process died ({how}){': ' + last[0][:160] if last else ''}"

    def stop(self) -> None:
        """End it and what it started."""
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.errors.close()


def prove(
    architecture: Architecture,
    forms: Iterable[str],
    precision: str,
    sizes: Iterable[tuple[int, int]],
    device: torch.device,
    *,
    limit_s: float = LIMIT_S,
    command: Sequence[str] = COMMAND,
) -> dict[str, Verdict]:
    """Verdicts by form, made now and in processes of their own; nothing is stored.

    Args:
        forms: of ``verdicts.FORMS``.
        precision: of ``engine.precision.PRECISIONS``.
        sizes: (k, n) to time.
        limit_s: seconds for all forms together.
        command: what reads the job.
    """
    left, made, deadline = list(forms), {}, time.monotonic() + limit_s
    times = [list(size) for size in sizes]
    while left and time.monotonic() < deadline:
        job = {"architecture": architecture.to_dict(), "device": str(device), "precision": precision, "forms": left, "sizes": times}
        child, current, why = _Child(command, job), left[0], ""
        try:
            for finding in child.findings(deadline):
                current = finding["form"]
                if "verdict" in finding:
                    made[current] = verdicts.from_dict(finding["verdict"])
            why = child.ended()
        except TimeoutError:
            why = f"not finished after {limit_s:.0f} s"
        finally:
            child.stop()
        if not why:
            break
        earlier = made.get(current)
        if earlier is None or earlier.status == RIGHT:  # what broke off in the timing is no kernel to run, however right it was
            timed = earlier is not None and earlier.speeds
            made[current] = earlier if timed and "not finished" in why and earlier is not None else Verdict(FAILED, why)
        left = left[left.index(current) + 1 :]
    return {form: made.get(form, Verdict(UNKNOWN, f"no time was left in {limit_s:.0f} s")) for form in forms}


def doctor(
    architecture: Architecture | None = None,
    *,
    k: int | None = None,
    n: int | None = None,
    precision: str | None = None,
    device: torch.device | str = "cuda",
    limit_s: float = LIMIT_S,
) -> dict[str, str]:
    """One line for each form of call: whether the kernels compute it right, and faster than torch, on this machine.

    ``backend="auto"`` follows this at once, and an earlier verdict is replaced. It takes two minutes at most, in another process.

    Args:
        architecture: by default the published ``cnn3``.
        k, n: the size to time, models and queries (default: 128 and 1,024 models on 256 queries).
        precision: ``"tf32"``, ``"tf32x3"``, ``"fp16"`` or ``"bf16"`` (default: what torch's settings make of a call now).
        device: the GPU.
        limit_s: seconds for everything.

    Returns:
        What was found, by form: ``"forward"``, ``"loss"``, ``"indexed"``; one entry ``"kernels"`` where this machine cannot run them.

    Raises:
        WslfastError: arguments that do not fit.
    """
    architecture = Architecture.cnn3() if architecture is None else architecture
    require(isinstance(architecture, Architecture), f"architecture: expected an Architecture, got {type(architecture).__name__}")
    require(precision is None or precision in PRECISIONS, f"precision: expected one of {PRECISIONS}, got {precision!r}")
    for name, value in (("k", k), ("n", n)):
        if value is not None:
            check_positive(name, value)
    if not torch.cuda.is_available():
        return {"kernels": "there is no CUDA device here: networks run on the CPU engine or on torch"}
    where = _numbered(check_device(device))
    reason = f"{where} is no GPU" if where.type != "cuda" else why_not_triton(architecture, "cuda", torch.float32, where.index)
    if reason is not None:
        return {"kernels": f"not for {architecture.name!r} on this machine: {reason}; torch runs it"}
    precision = precision or kernel_precision()
    sizes = SIZES if k is None and n is None else (verdicts.slice_of(k or SIZES[0][0], n or SIZES[0][1]),)
    outcomes = _make(architecture, [(form, precision) for form in FORMS], sizes, where, limit_s)
    return {form: verdicts.describe(architecture, precision, form, v, *sizes[0]) for (form, _), v in outcomes.items()}


def _numbered(device: torch.device) -> torch.device:
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _make(
    architecture: Architecture,
    wanted: Iterable[tuple[str, str]],
    sizes: Sequence[tuple[int, int]],
    device: torch.device,
    limit_s: float = LIMIT_S,
) -> dict[tuple[str, str], Verdict]:
    """Prove and keep: verdicts by (form, precision)."""
    by_precision: dict[str, list[str]] = {}
    for form, precision in wanted:
        by_precision.setdefault(precision, []).append(form)
    made, deadline = {}, time.monotonic() + limit_s
    for precision, forms in by_precision.items():
        by_form = prove(architecture, forms, precision, sizes, device, limit_s=max(deadline - time.monotonic(), 1.0), command=COMMAND)
        for form, verdict in by_form.items():
            key = verdicts.key_of(architecture, precision, form, device.index)
            earlier = verdicts.read(key)
            whole = verdict.merged(earlier) if earlier is not None else verdict
            verdicts.keep(key, whole)
            made[form, precision] = whole
    return made


def ensure(
    architecture: Architecture, device: torch.device, wanted: Iterable[tuple[str, str | None]], k: int, n: int
) -> dict[tuple[str, str, str], Decision]:
    """Decisions for a piece of work that is about to begin, proved first where nobody has: what :func:`verdicts.holding` takes.

    Does nothing, and returns nothing, unless the work is ``backend="auto"`` on a GPU that the kernels are for. Under torchrun one process
    of each node looks and all take the same decision.

    Args:
        wanted: (form, precision) of the calls to come; None is the precision that torch's settings lead to now.
        k, n: models and queries of a call.
    """
    if device.type != "cuda" or preferred("auto") != "auto" or verdicts.setting() != "auto":
        return {}
    device, (k, n) = _numbered(device), verdicts.slice_of(k, n)
    asked = list(dict.fromkeys((form, precision or kernel_precision()) for form, precision in wanted))
    many = _many()
    if why_not_triton(architecture, "cuda", torch.float32, device.index) is not None:
        outcomes: list[Verdict | None] = [None] * len(asked)  # choose() says why
        if not many:
            return {}
    else:
        looks = not many or int(os.environ.get("LOCAL_RANK", "0")) == 0
        outcomes = _known_or_made(architecture, asked, k, n, device) if looks else [None] * len(asked)
    if many:
        outcomes = _agreed(outcomes)
    decisions = {}
    for (form, precision), verdict in zip(asked, outcomes, strict=True):
        decision = verdicts.judge(verdict, k, n)
        decisions[verdicts.graph_digest(architecture), precision, form] = decision
        say_once(f"wslfast: {verdicts.describe(architecture, precision, form, verdict, k, n)}", logging.INFO)
    return decisions


@contextlib.contextmanager
def proved(architecture: Architecture, device: torch.device, forms: Iterable[str], k: int, n: int) -> Iterator[None]:
    """A block whose calls of these forms take one path from beginning to end: the kernels where they are proved, see :func:`ensure`. A
    device error that comes up in it turns them off for the next time."""
    decisions = ensure(architecture, device, [(form, None) for form in forms], k, n)
    with verdicts.holding(decisions), device_errors.watched():
        yield


def standing(
    architecture: Architecture, device: torch.device, decisions: dict[tuple[str, str, str], Decision]
) -> dict[tuple[str, str, str], Decision]:
    """Decisions that a checkpoint holds, without kernels that this machine has found wrong or failed since: a run that died of them is not
    to go on with them. Under torchrun what one process has found counts for all."""
    device, refused = _numbered(device), {}
    for key, decision in decisions.items():
        graph, precision, form = key
        if not decision.on or device.type != "cuda" or graph != verdicts.graph_digest(architecture):
            continue
        verdict = verdicts.read(verdicts.key_of(architecture, precision, form, device.index))
        if verdict is not None and verdict.status in (WRONG, FAILED):
            refused[key] = verdicts.judge(verdict, None, None)
    if _many():
        everybody: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everybody, refused)
        refused = {key: theirs[key] for theirs in reversed(everybody) for key in theirs}
    for (_, precision, form), decision in refused.items():
        say_once(f"wslfast: this run leaves the kernels for {architecture.name!r}, {form} in {precision}: {decision.reason}")
    return {**decisions, **refused}


def _many() -> bool:
    """Whether this process shares its work with others."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 and not ranks.is_apart()


def _known_or_made(
    architecture: Architecture, asked: Sequence[tuple[str, str]], k: int, n: int, device: torch.device
) -> list[Verdict | None]:
    stored = {pair: verdicts.read(verdicts.key_of(architecture, pair[1], pair[0], device.index)) for pair in asked}
    size = verdicts.bucket(k, n)

    def settled(verdict: Verdict | None) -> bool:
        if verdict is None or verdict.status == UNKNOWN:
            return False
        return verdict.status != RIGHT or any(verdicts.bucket(s.k, s.n) == size for s in verdict.speeds)

    missing = [pair for pair in asked if not settled(stored[pair])]
    if missing:
        forms = ", ".join(f"{form} in {precision}" for form, precision in missing)
        logger.info("checking the kernels for %r on %s: %s (%.0f s at most, once)", architecture.name,
                    verdicts.machine(device.index).gpu, forms, LIMIT_S)  # fmt: skip
        stored |= _make(architecture, missing, ((k, n),), device)
    return [stored[pair] for pair in asked]


def _agreed(mine: list[Verdict | None]) -> list[Verdict | None]:
    """What all processes of the job make of their verdicts together; those that did not look do not count."""
    looks = int(os.environ.get("LOCAL_RANK", "0")) == 0
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, mine if looks else None)
    looked = [theirs for theirs in everybody if theirs is not None]
    return [verdicts.combined([theirs[i] for theirs in looked]) for i in range(len(mine))]
