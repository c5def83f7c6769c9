"""Errors of the device that the kernels may have caused.

A GPU runs behind the program, so that a kernel's fault shows later: at the next wait, whoever waits, or not before the process ends.
So what kernels have run in this process is remembered, and all of it counts as failed on this machine as soon as such an error is seen:
in a call of theirs, in a piece of work that holds their decisions (:func:`watched`), or when the process ends. Who caused it cannot be
told; an innocent network gets its kernels back from ``wslfast.doctor``.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
from collections.abc import Iterator

import torch

from ..architecture import Architecture
from ..errors import WslfastError, first_line
from . import verdicts

logger = logging.getLogger("wslfast")
_FAULTS = (  # what CUDA says of a kernel that ran and went wrong, after which a process's context is lost
    "illegal memory access", "illegal instruction", "illegal address", "misaligned address", "unspecified launch failure",
    "launch timed out", "hardware stack error", "uncorrectable", "invalid program counter", "launch failed",
)  # fmt: skip
_ASSERTION = "device-side assert"  # of torch's own operators, an index out of range say: our kernels have none
_ran: dict[tuple[str, str, str, int | None], Architecture] = {}
_kept = True


def kind_of(error: BaseException) -> str | None:
    """``fault`` of a kernel, ``assertion`` of an operator of torch's, None for another error."""
    text = str(error)
    if not ("Triton Error [CUDA]" in text or "CUDA error" in text or type(error).__name__ == "AcceleratorError"):
        return None
    if _ASSERTION in text:
        return "assertion"
    return "fault" if any(mark in text.lower() for mark in _FAULTS) else None


def ran(architecture: Architecture, precision: str, form: str, index: int | None) -> None:
    """Remember that kernels run, on a GPU's number."""
    if _kept:
        _ran.setdefault((verdicts.graph_digest(architecture), precision, form, index), architecture)


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, the host's or the device's, in the words of torch, of Triton, of the driver or of a library of theirs."""
    text = str(error).lower()
    marks = ("out of memory", "_alloc_failed", "memoryallocation", "not enough memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(mark in text for mark in marks)


def on_trial() -> None:
    """This process tries kernels for another one, which judges: nothing is remembered."""
    global _kept
    _kept = False


def explained(error: BaseException) -> WslfastError | None:
    """The error to raise instead of one that the device ended in, with which the kernels that ran here count as failed; None where no
    kernels ran or the error is another."""
    kind = kind_of(error) if _ran else None
    if kind is None:
        return None
    lost = "This process can no longer use its GPU: start it again"
    if kind == "assertion":
        return WslfastError(f"an operator of torch's found a wrong value on the GPU, such as an index: {first_line(error)}. {lost}")
    return WslfastError(f"{_blame(first_line(error))}. {lost}")


def _blame(why: str) -> str:
    """Write the verdicts, say what happened."""
    names = dict.fromkeys(f"{a.name!r} ({form}, {precision})" for (_, precision, form, _), a in _ran.items())
    for (_, precision, form, index), architecture in _ran.items():
        verdicts.device_failed(architecture, precision, form, why, index)
    _ran.clear()
    return (
        f"a device error came up in a process that ran kernels: {why}. They are off on this GPU for {', '.join(names)} until "
        "wslfast.doctor(architecture) finds them right again; WSLFAST_KERNELS=auto|on|off decides for all networks"
    )


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """A block in which a device error, wherever it shows, is the kernels' that ran."""
    try:
        yield
    except RuntimeError as error:
        better = explained(error)
        if better is None:
            raise
        raise better from error


@atexit.register
def _at_exit() -> None:
    """A device error that no call has met, or that the program did not hand to us."""
    if not _ran or not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        if kind_of(error) == "fault":
            logger.error("wslfast: %s", _blame(first_line(error)))
