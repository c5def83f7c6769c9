"""Whether the kernels are right and faster on this machine: what was found, kept in files, and what a call makes of it.

No kernel is trusted because it passed elsewhere. ``proof.py`` makes verdicts, at safe points; here they are stored, read and combined.
A verdict holds for one GPU, driver, torch, Triton, state of the kernels' sources, network, precision and form of call: anything else has
another key, so that a stale one is never found. What a process has read stays as it read it until a new proof replaces it, and a
training run holds what it began with.

Environment: ``WSLFAST_KERNELS=auto`` follows verdicts, ``on`` takes the kernels without one, ``off`` leaves them. ``WSLFAST_CACHE`` names
the folder (default: ``$XDG_CACHE_HOME/wslfast`` or ``~/.cache/wslfast``).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ..architecture import Architecture
from ..errors import WslfastError, require, say_once
from ..files import write_json
from ..kernels.triton import sources
from ..kernels.triton.budget import FULL_PAIRS
from ..kernels.triton.configurations import CHOICES

FORMS = ("forward", "loss", "indexed")  # outputs and their graph; loss and gradient; the same with rows of a pool
RIGHT, WRONG, FAILED, UNKNOWN = "right", "wrong", "failed", "unknown"
FASTER = 0.9  # of torch's time
NEAR = 8  # times as many models or queries, or as few, that a time still says something of
SETTINGS = ("auto", "on", "off")
SCHEMA = 1
FORMER = {"long": "default"}  # choices of earlier versions, in checkpoints, and what gives the same bits


@dataclass(frozen=True)
class Machine:
    """What a verdict holds for besides the network: another value of any field is another machine."""

    gpu: str
    capability: str
    driver: str
    torch: str
    triton: str
    sources: str


@dataclass(frozen=True)
class Key:
    """What one verdict is about."""

    machine: Machine
    graph: str
    precision: str
    form: str

    @property
    def file(self) -> str:
        """Name of the verdict's file."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:32] + ".json"


@dataclass(frozen=True)
class Speed:
    """Median milliseconds of one call with k models and n queries: torch's, and the best configuration's of those that ran."""

    k: int
    n: int
    torch_ms: float
    kernels_ms: float
    choice: str

    @property
    def faster(self) -> bool:
        """Whether the kernels are worth taking."""
        return self.kernels_ms < FASTER * self.torch_ms

    def near(self, models: int, queries: int) -> bool:
        """Whether it says something of a call of that size."""
        alike = 1 / NEAR <= self.k / models <= NEAR or (models > self.k and self.k * self.n >= FULL_PAIRS)
        return alike and 1 / NEAR <= self.n / queries <= NEAR

    def __str__(self) -> str:
        return f"{self.kernels_ms:.3g} ms against torch's {self.torch_ms:.3g} (k={self.k}, n={self.n})"


@dataclass(frozen=True)
class Verdict:
    """right | wrong | failed | unknown, why in one line, relative errors by name, and how fast at which sizes."""

    status: str
    reason: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    speeds: tuple[Speed, ...] = ()

    def at(self, k: int | None, n: int | None) -> Speed | None:
        """The speed at the size that is nearest in proportion (any, where none is given: the largest); None where none is near, as kernels
        that are faster for a thousand models may be slower for one. Of a large call the part counts that is timed for it."""
        if not self.speeds:
            return None
        if k is None or n is None:
            return max(self.speeds, key=lambda s: s.k * s.n)
        models, queries = slice_of(k, n)
        near = [s for s in self.speeds if s.near(models, queries)]
        return min(near, key=lambda s: abs(math.log(s.k / models)) + abs(math.log(s.n / queries)), default=None)

    def merged(self, other: Verdict) -> Verdict:
        """This one with the speeds of an earlier one at other sizes."""
        sizes = {bucket(s.k, s.n) for s in self.speeds}
        older = tuple(s for s in other.speeds if bucket(s.k, s.n) not in sizes) if other.status == self.status == RIGHT else ()
        return Verdict(self.status, self.reason, self.errors, self.speeds + older)


@dataclass(frozen=True)
class Decision:
    """What a call does: the kernels or not, why, and with which configuration."""

    on: bool
    reason: str
    choice: str = "default"
    proved: bool = True  # False: nobody has looked yet


def bucket(k: int, n: int) -> tuple[int, int]:
    """Sizes that share a measurement: within a factor of two of a power of four."""
    return round(math.log(max(k, 1), 4)), round(math.log(max(n, 1), 4))


def slice_of(k: int, n: int) -> tuple[int, int]:
    """The part of a call that is timed for it: enough for a GPU to be full, and a second of torch's time at most."""
    n = max(1, min(n, 1024))
    return max(1, min(k, 2**19 // n)), n


def setting() -> str:
    """WSLFAST_KERNELS. Raises WslfastError for another word."""
    value = os.environ.get("WSLFAST_KERNELS", "auto")
    require(value in SETTINGS, f"WSLFAST_KERNELS: expected one of {SETTINGS}, got {value!r}")
    return value


def _driver() -> str:
    """The driver's version, as its own file or, where there is none, the CUDA version that it serves."""
    with suppress(OSError):
        match = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", Path("/proc/driver/nvidia/version").read_text())
        if match is not None:
            return match[0]
    ask = getattr(torch._C, "_cuda_getDriverVersion", None)
    return f"CUDA {ask()}" if ask is not None else "unknown"


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, as for tests: what they take then says nothing of the GPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def machine(index: int | None = None) -> Machine:
    """This machine with one of its GPUs (default: the current one)."""
    if index is None and torch.cuda.is_available():
        index = torch.cuda.current_device()
    return _machine(index)


@lru_cache(maxsize=64)
def _machine(index: int | None) -> Machine:
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "unknown"
    has_gpu = torch.cuda.is_available()
    name, capability = (torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)) if has_gpu else ("no GPU", (0, 0))
    return Machine(name, f"{capability[0]}.{capability[1]}", _driver(), str(torch.__version__), triton, sources.digest())


def graph_digest(architecture: Architecture) -> str:
    """A digest of a network's operations, without its name. Training mode is no part of it: verdicts are of evaluation mode."""
    assert architecture.graph is not None
    return architecture.graph.digest[:16]


def key_of(architecture: Architecture, precision: str, form: str, index: int | None = None) -> Key:
    """The key of a call's verdict."""
    return Key(machine(index), graph_digest(architecture), precision, form)


# -- the files ---------------------------------------------------------------------------------------------------------

_known: dict[Key, Verdict | None] = {}  # what this process has read or made


def folder() -> Path:
    """Where verdicts are kept. Raises RuntimeError for a user without a home folder."""
    chosen = os.environ.get("WSLFAST_CACHE")
    if chosen:
        return Path(chosen).expanduser() / "kernels"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "wslfast" / "kernels"


def read(key: Key, again: bool = False) -> Verdict | None:
    """The verdict of a key: the process's own, else the file's, which then counts for the process. None: there is none. ``again``: the
    file's where there is one, as another process may have written it since."""
    if again or key not in _known:
        _known[key] = _stored(key) or _known.get(key)
    return _known[key]


def _stored(key: Key) -> Verdict | None:
    """What the file says; None for one that is missing, damaged, of another form or about something else."""
    try:
        record = json.loads((folder() / key.file).read_text())
        if record["schema"] != SCHEMA or record["key"] != asdict(key):
            return None
        return from_dict(record["verdict"])
    except (OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, OverflowError):
        return None


def from_dict(record: Mapping[str, Any]) -> Verdict:
    """A verdict from its JSON form. Raises ValueError, LookupError, TypeError, AttributeError or OverflowError for anything
    else."""
    if record["status"] not in (RIGHT, WRONG, FAILED, UNKNOWN):
        raise ValueError(record["status"])
    speeds = tuple(
        Speed(int(s["k"]), int(s["n"]), float(s["torch_ms"]), float(s["kernels_ms"]), str(s["choice"])) for s in record["speeds"]
    )
    if any(s.choice not in CHOICES or not min(s.k, s.n, s.torch_ms, s.kernels_ms) > 0 for s in speeds):
        raise ValueError("speeds")
    return Verdict(record["status"], str(record["reason"]), {str(n): float(e) for n, e in record["errors"].items()}, speeds)


def keep(key: Key, verdict: Verdict) -> None:
    """Make a verdict that of this process, at once, and of those to come: its file is replaced as a whole. Where it cannot be written,
    memory has to do, which is said once. What is unknown is not written: the next process may find out."""
    _known[key] = verdict
    if verdict.status == UNKNOWN:
        return
    try:
        write_json(folder() / key.file, {"schema": SCHEMA, "key": asdict(key), "verdict": asdict(verdict)})
    except (WslfastError, OSError, RuntimeError) as error:  # no home folder is a RuntimeError
        say_once(f"wslfast: what was found about the kernels holds for this process alone: {error}")


@contextmanager
def one_at_a_time(machine: Machine, seconds: float) -> Iterator[bool]:
    """A block that one process at a time is in, of those that share the folder and have the same kind of GPU: two that time kernels would
    disturb each other, and the second finds what the first has found. Nobody waits for longer than ``seconds``, nor where no file can be
    locked; the value is whether this process is alone in it."""
    alone = False
    with ExitStack() as held:
        with suppress(OSError, RuntimeError, ImportError):
            import fcntl

            folder().mkdir(parents=True, exist_ok=True)
            name = hashlib.sha256(json.dumps(asdict(machine), sort_keys=True).encode()).hexdigest()[:16]
            file, until = held.enter_context(open(folder() / f"{name}.lock", "a")), time.monotonic() + seconds
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    alone = True
                    break
                except BlockingIOError:
                    if time.monotonic() > until:
                        break
                    time.sleep(0.1)
        yield alone


def forget() -> None:
    """Forget what this process has read and made; the files stay."""
    _known.clear()
    _machine.cache_clear()


# -- what a call makes of them -----------------------------------------------------------------------------------------

_held: ContextVar[Mapping[tuple[str, str, str], Decision] | None] = ContextVar("wslfast_kernels", default=None)


def decide(
    architecture: Architecture, precision: str, form: str, k: int | None = None, n: int | None = None, index: int | None = None
) -> Decision:
    """Whether a call of ``backend="auto"`` on a GPU takes the kernels."""
    asked = setting()
    if asked != "auto":
        return Decision(asked == "on", f"WSLFAST_KERNELS={asked}")
    if interpreted():
        return Decision(False, "TRITON_INTERPRET is set, and Triton's interpreter is no GPU")
    held = _held.get()
    if held is not None and (kept := held.get((graph_digest(architecture), precision, form))) is not None:
        return kept
    return judge(read(key_of(architecture, precision, form, index)), k, n)


def judge(verdict: Verdict | None, k: int | None, n: int | None) -> Decision:
    """What a verdict means for a size."""
    if verdict is None:
        how = "wslfast.doctor(architecture), or `wslfast doctor` in a shell, looks and takes two minutes at most"
        return Decision(False, f"nobody has checked yet whether they are right and faster on this GPU; {how}", proved=False)
    if verdict.status != RIGHT:
        again = "" if verdict.status == UNKNOWN else "; `wslfast doctor` looks again"
        return Decision(False, f"found {verdict.status} on this GPU: {verdict.reason}{again}", proved=verdict.status != UNKNOWN)
    speed = verdict.at(k, n)
    if speed is None and verdict.speeds:
        sizes = ", ".join(f"k={s.k}, n={s.n}" for s in verdict.speeds)
        how = f"wslfast.doctor(architecture, k={k}, n={n}), or `wslfast doctor`, times them"
        return Decision(False, f"found right on this GPU, but timed at other sizes alone ({sizes}); {how}", proved=False)
    if speed is None:
        return Decision(False, f"found right on this GPU, but not timed: {verdict.reason}", proved=False)
    if not speed.faster:
        return Decision(False, f"right but not faster on this GPU: {speed}")
    return Decision(True, f"kernels, proved on this GPU: {speed}", speed.choice)


@contextmanager
def holding(decisions: Mapping[tuple[str, str, str], Decision]) -> Iterator[None]:
    """In this block these decisions count, whatever verdicts are made meanwhile: a training run takes one path from start to end.
    Keys are (graph's digest, precision, form)."""
    token = _held.set({**(_held.get() or {}), **decisions})
    try:
        yield
    finally:
        _held.reset(token)


def device_failed(architecture: Architecture, precision: str, form: str, why: str, index: int | None = None) -> None:
    """A device error came out of a call on the kernels: from now on they count as failed here."""
    with suppress(Exception):  # the device may not even tell its name any more; the error that led here matters more
        keep(key_of(architecture, precision, form, index), Verdict(FAILED, f"a call ended in a device error: {why}"))


def combined(verdicts: Sequence[Verdict | None]) -> Verdict:
    """One verdict for all processes of a job: right only if all are right, as fast as the slowest, unknown if one is unknown.
    The same on every process, whatever its own GPU is."""
    order = (WRONG, FAILED, UNKNOWN)
    outcomes = [v if v is not None else Verdict(UNKNOWN, "a process of this job has no verdict") for v in verdicts]
    for status in order:
        for verdict in outcomes:
            if verdict.status == status:
                return Verdict(status, verdict.reason)
    sizes = [(s.k, s.n) for s in outcomes[0].speeds]
    speeds = []
    for k, n in sizes:
        of_all = [v.at(k, n) for v in outcomes]
        if all(s is not None for s in of_all):
            worst = max((s for s in of_all if s is not None), key=lambda s: s.kernels_ms / s.torch_ms)
            speeds.append(Speed(k, n, worst.torch_ms, worst.kernels_ms, worst.choice))
    return Verdict(RIGHT, outcomes[0].reason, outcomes[0].errors, tuple(speeds))


def describe(architecture: Architecture, precision: str, form: str, verdict: Verdict | None, k: int | None, n: int | None) -> str:
    """One line for a log."""
    decision = judge(verdict, k, n)
    return f"kernels {'on' if decision.on else 'off'} for {architecture.name!r}, {form} in {precision}: {decision.reason}"


def to_dict(decision: Decision) -> dict[str, Any]:
    """A decision as a checkpoint keeps it."""
    return asdict(decision)


def decision_from(record: Mapping[str, Any]) -> Decision:
    """The inverse of :func:`to_dict`. Raises WslfastError for anything else."""
    names = {f.name for f in fields(Decision)}
    good = isinstance(record, Mapping) and set(record) == names and type(record["on"]) is bool and record["choice"] in (*CHOICES, *FORMER)
    require(good, "kernels: expected a decision with on, reason, choice and proved")
    choice = FORMER.get(record["choice"], record["choice"])
    return Decision(record["on"], str(record["reason"]), str(choice), bool(record["proved"]))
