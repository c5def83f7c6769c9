"""Jobs of the CPU path side by side: one thread a job, and one torch thread inside each.

torch shares every operator out among its threads, which then wait for each other after every call; a slab of a few networks is too
little for that. Groups of models have nothing to tell each other, so each is a job of its own, computed by one thread from first layer to
last. What a job computes then depends on nothing but the job: the bits are the same at any number of threads.

The threads are those that torch has already: one parallel region of the OpenMP that torch was linked with, whose threads wait for work
(58 us a call here, where a pool of our own took 206, and its threads had to wait for cores that OpenMP's were spinning on). How many
threads torch uses inside one of them is told to OpenMP and MKL, for that thread alone (``torch.set_num_threads`` would speak for the
whole process). Where these functions are not to be found (another threading library, a static build), jobs run one after another
on all of torch's threads.
"""

from __future__ import annotations

import ctypes
import os
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import lru_cache, partial
from threading import get_ident
from typing import Any, NamedTuple

import torch

from .denormals import with_zeros, zeros_asked, zeros_here

__all__ = ["controls", "forked", "run", "run_here", "threads_inside"]

Setter = Callable[[int], "int | None"]
_Body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_forked = False  # OpenMP's threads do not survive a fork, and it waits for them: a forked process works alone, in torch's operators as well
_had_threads = False  # the process that was forked


class Controls(NamedTuple):
    """What OpenMP and MKL are told; the first two about the calling thread alone."""

    openmp: Setter  # threads of its parallel regions
    mkl: Setter  # threads of MKL's routines; returns what was set, 0 for "as everybody"
    region: Callable[[Any, None, int, int], None]  # calls a body once on each of so many threads, of which this is one, and waits for them
    survives: bool  # a fork: LLVM's and Intel's begin anew there, GCC's waits for ever for threads that the parent had


@lru_cache(maxsize=1)
def controls() -> Controls | None:
    """The functions of this build of torch, or None where it does not thread that way."""
    if "ATen parallel backend: OpenMP" not in torch.__config__.parallel_info():
        return None
    nothing: Setter = lambda number: 0  # noqa: E731
    try:
        linked = ctypes.CDLL(torch._C.__file__)  # a search through what torch is linked with
        openmp, mkl = linked.omp_set_num_threads, linked.MKL_Set_Num_Threads_Local if torch.backends.mkl.is_available() else nothing
        region = linked.GOMP_parallel  # what a compiler makes of "omp parallel"; GCC's, LLVM's and Intel's libraries all have it
    except (AttributeError, OSError):
        return None
    openmp.restype = region.restype = None
    region.argtypes = (_Body, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    return Controls(openmp, mkl, region, hasattr(linked, "__kmpc_fork_call"))


def threads_inside() -> int:
    """Threads that torch uses inside a job, on which its bits may depend."""
    return 1 if controls() is not None else torch.get_num_threads()


def _alone(act: Callable[[], None], library: Controls, threads: int, products: int = 1) -> None:
    """Calls ``act`` with one torch thread in this thread, ``products`` in MKL; there are ``threads`` again afterwards.

    No context manager: an interrupt is raised behind any call, and so at the beginning of its ``__exit__``.
    """
    before = None
    try:
        library.openmp(1)
        before = library.mkl(products)
        act()
    finally:
        try:
            library.openmp(threads)
        finally:
            library.mkl(before or 0)


def _note_threads() -> None:
    global _had_threads
    try:
        _had_threads = len(os.listdir("/proc/self/task")) > 1
    except OSError:  # no Linux
        _had_threads = True


def _note_fork() -> None:
    global _forked
    _forked = True
    library = controls()
    if _had_threads and library is not None and not library.survives and torch.get_num_threads() > 1:
        torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_note_threads, after_in_child=_note_fork)


def forked() -> bool:
    """Whether this process was forked: it has one thread."""
    return _forked


def _next(waiting: deque[Callable[[], None]]) -> Callable[[], None] | None:
    try:
        return waiting.popleft()
    except IndexError:  # another thread was faster
        return None


def run(jobs: Sequence[Callable[[], None]]) -> None:
    """Call every job once, in this thread and up to ``torch.get_num_threads() - 1`` others; returns when all are done.

    The first exception keeps the jobs that wait from beginning, and is raised here. Gradient mode and autocast belong to a thread:
    jobs set their own.
    """
    library, threads = controls(), torch.get_num_threads()
    if library is None or threads == 1 or len(jobs) == 1 or _forked:
        run_here(jobs)
        return
    waiting = deque(jobs)
    errors: list[BaseException] = []
    caller, inference, zeros = get_ident(), torch.is_inference_mode_enabled(), zeros_here() or zeros_asked()

    def rest() -> None:
        while (job := _next(waiting)) is not None:
            job()

    def work() -> None:
        with_zeros(partial(_alone, rest, library, threads), zeros)

    def work_elsewhere() -> None:
        """The same with the caller's modes, which belong to a thread, and which torch's thread gets back."""
        torch.get_num_threads()  # torch sets a thread's number when it is first asked for: ask, then overrule it
        with torch.inference_mode() if inference else nullcontext():
            work()

    def body(_: object) -> None:  # nothing can be raised through a library that is not Python
        try:
            work() if get_ident() == caller else work_elsewhere()
        except BaseException as error:
            waiting.clear()
            errors.append(error)

    library.region(_Body(body), None, min(threads, len(jobs)), 0)
    if errors:
        raise errors[0]
    if waiting:  # an interrupt came before a thread's first act
        work()


def run_here(jobs: Sequence[Callable[[], None]], share_products: bool = False) -> None:
    """Call every job once, one after another, in this thread, by one torch thread.

    ``share_products``: MKL's matrix products alone may use all threads, where the caller has seen that they then give the same bits.
    """
    library, threads = controls(), torch.get_num_threads()
    asked = zeros_asked() and (library is not None or threads == 1)  # other threads would not know of it
    inside = threads if share_products and not _forked and not asked else 1

    def work() -> None:
        for job in jobs:
            job()

    # where torch has one thread, MKL has one, too: torch takes the number from there
    act = work if library is None or threads == 1 else partial(_alone, work, library, threads, inside)
    with_zeros(act, asked or zeros_here())
