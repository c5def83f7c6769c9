"""Work that takes less at a time when memory runs out: fewer models, or smaller buffers of a call that cuts models into chunks itself."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from ..errors import WslfastError, first_line, say_once

_T = TypeVar("_T")
_LEAST = 64 << 20  # bytes: with less, what a call of the kernels holds is its arguments and results


def in_chunks(models: int, size: int, run: Callable[[slice], None]) -> None:
    """Call ``run`` with slices of ``range(models)``, ``size`` long, in order.

    Where memory runs out the slice is tried again at half its length, and the rest stay so: one warning. Raises WslfastError if one
    model alone does not fit.
    """
    start, size = 0, max(1, size)
    failed = 0  # models in the first attempt for which there was no memory
    while start < models:
        part = slice(start, min(start + size, models))
        shortage: str | None = None
        try:
            run(part)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_shortage(error):
                raise
            shortage = first_line(error)
        # outside the except block, whose traceback would keep the failed attempt's tensors alive
        if shortage is None:
            if failed:
                hint = "WSLFAST_MEMORY_MB bounds it ahead"
                say_once(f"wslfast: out of memory on {failed} models at once; going on with {size} ({hint})", logging.WARNING)
                failed = 0
            start = part.stop
            continue
        tried = part.stop - part.start
        if tried == 1:
            raise WslfastError(f"out of memory on one model alone; pass fewer queries at a time ({shortage})")
        failed, size = failed or tried, tried // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def fitting(memory: int, run: Callable[[int], _T]) -> _T:
    """What ``run`` gives with so many bytes of a GPU for its buffers, or half as many each time that the GPU has none left: one warning.
    For calls whose bits do not depend on it. Raises torch's error where the least is too much."""
    while True:
        try:
            return run(memory)
        except torch.OutOfMemoryError as error:
            if memory <= _LEAST or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
                raise
            shortage = first_line(error)
        # outside the except block, as above
        memory //= 2
        torch.cuda.empty_cache()
        hint = "WSLFAST_MEMORY_MB bounds it ahead"
        say_once(f"wslfast: out of memory in the kernels; going on with {memory >> 20} MiB ({hint}): {shortage:.160}", logging.WARNING)


def is_shortage(error: BaseException) -> bool:
    """Torch's CPU allocator raises a plain RuntimeError."""
    typed = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return typed or any(mark in str(error) for mark in ("not enough memory", "can't allocate memory"))
