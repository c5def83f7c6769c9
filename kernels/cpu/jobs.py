"""Jobs of the CPU path side by side: one thread a job, and one torch thread inside each.

torch shares every operator out among its threads, which then wait for each other after every call; a slab of a few networks is too
little for that. Groups of models have nothing to tell each other, so each is a job of its own, computed by one thread from first layer to
last. What a job computes then depends on nothing but the job: the bits are the same at any number of threads.

How many threads torch uses inside a thread is told to OpenMP and MKL, for that thread alone, by the functions of theirs that torch
itself was linked with (``torch.set_num_threads`` would speak for the whole process). Where they are not to be found (another
threading library, a static build), jobs run one after another on all of torch's threads.
"""

from __future__ import annotations

import ctypes
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

import torch

__all__ = ["controls", "keep_freed_memory", "run", "threads_inside"]

_MOST = 256  # threads that may ever be started; they are, as jobs ask for them

Setter = Callable[[int], "int | None"]


class Controls(NamedTuple):
    """What OpenMP and MKL are told, all of it about the calling thread alone."""

    openmp: Setter  # threads of its parallel regions
    mkl: Setter  # threads of MKL's routines; returns what was set, 0 for "as everybody"
    rest: Setter  # 1: its pool of threads may go (they are made again when needed)


@lru_cache(maxsize=1)
def controls() -> Controls | None:
    """The functions of this build of torch, or None where it does not thread that way."""
    if "ATen parallel backend: OpenMP" not in torch.__config__.parallel_info():
        return None
    nothing: Setter = lambda number: 0  # noqa: E731
    try:
        linked = ctypes.CDLL(torch._C.__file__)  # a search through what torch is linked with
        openmp, mkl = linked.omp_set_num_threads, linked.MKL_Set_Num_Threads_Local if torch.backends.mkl.is_available() else nothing
    except (AttributeError, OSError):
        return None
    openmp.restype = None
    return Controls(openmp, mkl, getattr(linked, "omp_pause_resource_all", nothing))


def threads_inside() -> int:
    """Threads that torch uses inside a job, on which its bits may depend."""
    return 1 if controls() is not None else torch.get_num_threads()


@contextmanager
def _alone(library: Controls, threads: int) -> Iterator[None]:
    """One torch thread in this thread; ``threads`` again afterwards."""
    library.openmp(1)
    before = library.mkl(1)
    try:
        yield
    finally:
        library.mkl(before or 0)
        library.openmp(threads)


def _begin(library: Controls) -> None:
    """A worker's first act. torch sets a thread's number when it is first asked for: ask, then overrule it."""
    torch.get_num_threads()
    library.openmp(1)
    library.mkl(1)


@lru_cache(maxsize=1)
def _pool() -> ThreadPoolExecutor:
    library = controls()
    assert library is not None
    return ThreadPoolExecutor(_MOST, thread_name_prefix="wslfast", initializer=_begin, initargs=(library,))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked process has none of its parent's threads


def _next(waiting: deque[Callable[[], None]]) -> Callable[[], None] | None:
    try:
        return waiting.popleft()
    except IndexError:  # another thread was faster
        return None


def _flushes_denormals() -> bool:
    """Whether numbers below 1e-38 are zero in this thread (``torch.set_flush_denormal``)."""
    return float(torch.full((1,), 1e-30, dtype=torch.float32, device="cpu").mul_(1e-10)) == 0


def run(jobs: Sequence[Callable[[], None]]) -> None:
    """Call every job once, in this thread and up to ``torch.get_num_threads() - 1`` others; returns when all are done.

    The first exception keeps the jobs that wait from beginning, and is raised here. Gradient mode and autocast belong to a thread:
    jobs set their own.
    """
    library, threads = controls(), torch.get_num_threads()
    if library is None or threads == 1:
        for job in jobs:
            job()
        return
    if len(jobs) == 1:  # this thread has its own modes already
        with _alone(library, threads):
            jobs[0]()
        return
    waiting = deque(jobs)
    inference, flushed = torch.is_inference_mode_enabled(), _flushes_denormals()

    def work() -> None:
        try:
            if _flushes_denormals() != flushed:  # which belongs to a thread, as the modes do
                torch.set_flush_denormal(flushed)
            with torch.inference_mode(inference):
                while (job := _next(waiting)) is not None:
                    job()
        except BaseException:
            waiting.clear()
            raise

    with _alone(library, threads):
        # OpenMP's threads spin for milliseconds after torch's last call, on the cores that the others are to run on
        library.rest(1)
        others = []
        try:
            for _ in range(min(threads, len(jobs)) - 1):
                others.append(_pool().submit(work))
        except RuntimeError:
            pass  # no thread can be started any more: the interpreter is on its way out, or the system refuses. This one does it all
        try:
            work()
        finally:
            wait(others)
    for other in others:
        other.result()


@lru_cache(maxsize=1)
def keep_freed_memory() -> None:
    """Let glibc keep what slabs free, once a process: without this, a third of the time goes into fresh pages.

    glibc hands freed memory back to the system above a threshold that follows the largest block it has seen released, up to
    32 MiB; one untouched block of nearly that size raises it. Elsewhere this is one allocation.
    """
    torch.empty(31 << 20, dtype=torch.uint8, device="cpu")
