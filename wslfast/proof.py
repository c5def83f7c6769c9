"""Proving the kernels where they will run: :func:`doctor`, and what training, zoo building, evaluation and generation ask for themselves.

The kernels are compiled, compared with float64 and timed beside torch in a process of their own (``engine/trial.py``), so that no fault,
hang or crash of the compiler reaches the caller. The result is a verdict (``engine/verdicts.py``), which ``backend="auto"`` follows.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from .architecture import Architecture
from .engine import device_errors, ranks, verdicts
from .engine.choice import why_not_triton
from .engine.precision import PRECISIONS, kernel_precision
from .engine.preference import preferred
from .engine.trial_process import COMMAND, TrialProcess
from .engine.verdicts import FAILED, FORMS, RIGHT, UNKNOWN, WRONG, Decision, Verdict
from .errors import check_device, check_positive, require, say_once

LIMIT_S = 120.0
HANG_S = 45.0  # silence that is a hang, which is kept; a busy machine compiles slowly
SIZES = ((128, 256), (1024, 256), (16, 16))  # what doctor times where nobody says: a published batch, a large one, and a few small ones
logger = logging.getLogger("wslfast")
_looked_at: set[tuple[verdicts.Key, tuple[int, ...]]] = set()  # by this process, with no verdict for the size


def prove(
    architecture: Architecture,
    forms: Iterable[str],
    precision: str,
    sizes: Iterable[tuple[int, int]],
    device: torch.device,
    *,
    limit_s: float = LIMIT_S,
    command: Sequence[str] = COMMAND,
    found: Callable[[str, Verdict], object] | None = None,
) -> dict[str, Verdict]:
    """Verdicts by form, made now and in processes of their own; nothing is stored.

    Args:
        forms: of ``verdicts.FORMS``.
        precision: of ``engine.precision.PRECISIONS``.
        sizes: (k, n) to time.
        limit_s: seconds for all forms together.
        command: what reads the job.
        found: called with a form that is done and its verdict, while others are tried.
    """
    left, made, deadline = list(forms), dict[str, Verdict](), time.monotonic() + limit_s
    times = [list(size) for size in sizes]
    gpu = verdicts.machine(device.index).gpu if device.type == "cuda" else None
    while left and time.monotonic() < deadline:
        job = {
            "architecture": architecture.to_dict(), "device": str(device), "gpu": gpu, "precision": precision, "forms": left,
            "sizes": times, "limit_s": deadline - time.monotonic(),
        }  # fmt: skip
        try:
            child = TrialProcess(command, job)
        except (OSError, RuntimeError) as error:  # no memory, no threads, no such program: a machine on which it cannot be told
            return made | dict.fromkeys(left, Verdict(UNKNOWN, f"no process can be started: {error}"))
        within: str | None = None  # the form that is being tried
        why, late, since, before = "", False, time.monotonic(), list(left)
        try:
            for finding in child.findings(deadline):
                form = finding["form"]
                if form not in left:
                    continue
                since = time.monotonic()
                if "verdict" in finding:
                    made[form] = finding["verdict"]
                elif "begins" in finding:
                    within = form
                else:
                    within = None
                    left.remove(form)
                    if found is not None and form in made:
                        found(form, made[form])
            why = child.ended(deadline)
        except TimeoutError:
            late, why = True, f"not finished after {limit_s:.0f} s"
        finally:
            child.stop()
        if not why:
            break
        if within is not None:
            made[within] = _broken_off(made.get(within), why, late, time.monotonic() - since)
            left.remove(within)
        elif left == before and not late:  # nothing is known of the kernels
            return made | dict.fromkeys(left, Verdict(UNKNOWN, f"{why}, before it began"))
    return {form: made.get(form, Verdict(UNKNOWN, "no time was left for it")) for form in forms}


def _broken_off(earlier: Verdict | None, why: str, late: bool, seconds: float) -> Verdict:
    """What to make of a form whose trial did not come to its end, ``seconds`` after it last said something: what broke off in the timing is
    no kernel to run, however right it was. A form whose time ran out before it had much of it may be as good as any."""
    if earlier is not None and earlier.status != RIGHT:
        return earlier
    if not late:
        return Verdict(FAILED, why)
    if earlier is not None and (earlier.speeds or seconds < HANG_S):
        return earlier
    return Verdict(FAILED, why) if seconds >= HANG_S else Verdict(UNKNOWN, f"{why}, nor silent for long")


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

    ``backend="auto"`` follows this at once, and an earlier verdict is replaced. It takes two minutes at most, in another process, once no
    other program does the same.

    Args:
        architecture: by default the published ``cnn3``.
        k, n: the size to time, models and queries (default: 128 and 1,024 models on 256 queries, 16 on 16).
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
    require(0 < limit_s < 86400, f"limit_s: expected seconds, above 0 and less than a day, got {limit_s!r}")
    if not torch.cuda.is_available():
        check_device("cpu" if str(device).startswith("cuda") else device)
        return {"kernels": "there is no CUDA device here: networks run on the CPU engine or on torch"}
    where = _numbered(check_device(device))
    reason = f"{where} is no GPU" if where.type != "cuda" else why_not_triton(architecture, "cuda", torch.float32, where.index)
    if reason is None and verdicts.interpreted():
        reason = "TRITON_INTERPRET is set, and Triton's interpreter is no GPU"
    if reason is not None:
        return {"kernels": f"not for {architecture.name!r} on this machine: {reason}; torch runs it"}
    precision = precision or kernel_precision()
    sizes = SIZES if k is None and n is None else (verdicts.slice_of(k or SIZES[0][0], n or SIZES[0][1]),)
    with verdicts.one_at_a_time(verdicts.machine(where.index), limit_s):
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
    made, deadline = dict[tuple[str, str], Verdict](), time.monotonic() + limit_s

    def keep(precision: str, form: str, verdict: Verdict) -> None:
        if (form, precision) not in made:  # at once: who waits for this may be stopped before all forms are done
            key = verdicts.key_of(architecture, precision, form, device.index)
            earlier = verdicts.read(key, again=True)
            made[form, precision] = verdict.merged(earlier) if earlier is not None else verdict
            verdicts.keep(key, made[form, precision])

    for precision, forms in by_precision.items():
        left_s = max(deadline - time.monotonic(), 0.0)
        by_form = prove(architecture, forms, precision, sizes, device, limit_s=left_s, command=COMMAND, found=partial(keep, precision))
        for form, verdict in by_form.items():
            keep(precision, form, verdict)
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
    if device.type != "cuda" or preferred("auto") != "auto":
        return {}
    device, (k, n) = _numbered(device), verdicts.slice_of(k, n)
    looks = _looks(device)  # before anything that one process may do and another not
    if verdicts.setting() != "auto" or verdicts.interpreted():
        return {}
    asked = list(dict.fromkeys((form, precision or kernel_precision()) for form, precision in wanted))
    many = _many()
    if why_not_triton(architecture, "cuda", torch.float32, device.index) is not None:
        outcomes: list[Verdict | None] = [None] * len(asked)  # choose() says why
        if not many:
            return {}
    else:
        outcomes = _known_or_made(architecture, asked, k, n, device) if looks else [None] * len(asked)
    if many:
        outcomes = _agreed(outcomes, looks)
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
    keys = {pair: verdicts.key_of(architecture, pair[1], pair[0], device.index) for pair in asked}
    stored = {pair: verdicts.read(key) for pair, key in keys.items()}
    size = verdicts.bucket(k, n)

    def settled(pair: tuple[str, str]) -> bool:
        verdict = stored[pair]
        if (keys[pair], size) in _looked_at:  # in vain: a GPU that is too full stays so for a while, and every piece of work would wait
            return True
        if verdict is None or verdict.status == UNKNOWN:
            return False
        return verdict.status != RIGHT or any(verdicts.bucket(s.k, s.n) == size for s in verdict.speeds)

    def missing() -> list[tuple[str, str]]:
        return [pair for pair in asked if not settled(pair)]

    if missing():
        with verdicts.one_at_a_time(verdicts.machine(device.index), LIMIT_S):
            # what another process has found while this one waited
            stored = {pair: verdicts.read(key, again=True) for pair, key in keys.items()}
            if missing():
                forms = ", ".join(f"{form} in {precision}" for form, precision in missing())
                logger.info("checking the kernels for %r on %s: %s (%.0f s at most, once)", architecture.name,
                            verdicts.machine(device.index).gpu, forms, LIMIT_S)  # fmt: skip
                stored |= _make(architecture, missing(), ((k, n),), device)
                _looked_at.update((keys[pair], size) for pair in missing())
    return [stored[pair] for pair in asked]


def _looks(device: torch.device) -> bool:
    """Whether this process looks: of those that share a machine, the first with its kind of GPU. Raises WslfastError in all of them if they
    do not have the same settings, with which some would look and others not."""
    if not _many():
        return True
    setting = os.environ.get("WSLFAST_KERNELS", "auto"), verdicts.interpreted()
    mine = os.environ.get("GROUP_RANK", "0"), asdict(verdicts.machine(device.index))
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, (setting, mine))
    settings = sorted({asked for (asked, _), _ in everybody})
    require(len(settings) == 1, f"WSLFAST_KERNELS: expected the same in all processes of a job, got {', '.join(settings)}")
    require(len({seen for seen, _ in everybody}) == 1, "TRITON_INTERPRET: expected the same in all processes of a job")
    return [theirs for _, theirs in everybody].index(mine) == dist.get_rank()


def _agreed(mine: list[Verdict | None], looked: bool) -> list[Verdict | None]:
    """What all processes of the job make of their verdicts together; those that did not look do not count."""
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, mine if looked else None)
    found = [theirs for theirs in everybody if theirs is not None]
    return [verdicts.combined([theirs[i] for theirs in found]) for i in range(len(mine))]
