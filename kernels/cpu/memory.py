"""Memory of results and slabs: glibc's and the system's habits cost a CPU path as much as some of its layers do."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["fresh_like", "keep_freed_memory"]

_TOP_PAD, _HEAP = -2, 64 << 20  # M_TOP_PAD of <malloc.h>; bytes of a thread's heap
_LARGE = 32 << 20  # bytes, from which on glibc hands freed memory back to the system whatever it is told


@lru_cache(maxsize=1)
def keep_freed_memory() -> None:
    """Let glibc keep what slabs free, once a process: without this, a third of the time goes into fresh pages.

    glibc hands freed memory back to the system above a threshold that follows the largest block it has seen released, up to
    32 MiB; one untouched block of nearly that size raises it. Elsewhere this is one allocation.

    Threads beside the first have their memory in heaps of 64 MiB, and glibc hands a heap back as soon as nothing is in it: a group that
    takes more than one of them makes and loses the last one at every call (a tenth of the time of residual networks). It keeps one that is
    no larger than what is to be left at the top of the memory, which costs nothing until it is written to.
    """
    torch.empty(_LARGE - (1 << 20), dtype=torch.uint8, device="cpu")
    if "MALLOC_TOP_PAD_" in os.environ or "glibc.malloc.top_pad" in os.environ.get("GLIBC_TUNABLES", ""):
        return  # somebody has decided that
    try:
        ctypes.CDLL(None).mallopt(_TOP_PAD, _HEAP)
    except (AttributeError, OSError, TypeError):  # no glibc
        return


def fresh_like(x: Tensor) -> Tensor:
    """Contiguous memory of the shape and type of ``x``, not initialised.

    A large block is new to the process every time, and the system clears it page by page when it is first written. Where Linux gives
    pages of 2 MiB to those who ask (``transparent_hugepage``: madvise), this asks: a quarter of the time for 85 MB.
    """
    made = torch.empty_like(x, memory_format=torch.contiguous_format)
    size = made.numel() * made.element_size()
    advise = _advise() if size >= _LARGE and made.device.type == "cpu" else None
    if advise is not None:
        first = -(-made.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        advise(ctypes.c_void_p(first), ctypes.c_size_t(made.data_ptr() + size - first), mmap.MADV_HUGEPAGE)  # a refusal costs nothing
    return made


@lru_cache(maxsize=1)
def _advise() -> Callable[..., int] | None:
    """``madvise`` of the C library, where there are huge pages to ask for."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    try:
        return ctypes.CDLL(None).madvise  # type: ignore[no-any-return]
    except (AttributeError, OSError, TypeError):
        return None
