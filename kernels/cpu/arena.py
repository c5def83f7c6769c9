"""One block of memory for all that a recorded call writes: what is never needed at the same time lies in the same place.

While a call runs, what it has read for the last time is freed, and its memory, still in the cache, goes to the next result. A recording
holds every tensor; each in memory of its own, they would be several times as much as the call ever had at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["Arena", "offsets"]

_ALIGNED = 64  # bytes, as torch's allocator has it: a BLAS may look at it
Life = tuple[int, int]  # the first and the last step in which memory is written or read


def offsets(sizes: Sequence[int], lives: Sequence[Life]) -> tuple[list[int], int]:
    """Where blocks of ``sizes`` bytes lie, and how many bytes they take together: those whose lives overlap lie apart.

    The largest first, each in the first gap that holds it.
    """
    places = [0] * len(sizes)
    placed: list[tuple[int, int, Life]] = []  # start, stop, life; by their starts
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], lives[i])):
        (first, last), size, at = lives[i], -(-sizes[i] // _ALIGNED) * _ALIGNED, 0
        for start, stop, (born, gone) in placed:
            if born <= last and first <= gone:
                if start >= at + size:
                    break
                at = max(at, stop)
        places[i] = at
        placed.append((at, at + size, lives[i]))
        placed.sort(key=lambda block: block[0])
    return places, max((stop for _, stop, _ in placed), default=0)


class Arena:
    """Memory for storages that a call made.

    Args:
        sizes: bytes of each storage, by its ``_cdata``.
        lives: of those that are to lie here.

    Attributes:
        memory: the block ``[bytes]``, uint8.
    """

    def __init__(self, sizes: Mapping[int, int], lives: Mapping[int, Life]) -> None:
        names = list(lives)
        places, size = offsets([sizes[name] for name in names], [lives[name] for name in names])
        self.memory = torch.empty(size, dtype=torch.uint8, device="cpu")
        self._places = dict(zip(names, places, strict=True))

    def moved(self, tensor: Tensor) -> Tensor:
        """The tensor at its place here, its numbers not copied; itself where its storage has none."""
        place = self._places.get(tensor.untyped_storage()._cdata)
        if place is None:
            return tensor
        here = torch.empty(0, dtype=tensor.dtype, device="cpu")
        start = place // tensor.element_size() + tensor.storage_offset()
        here = here.set_(self.memory.untyped_storage(), start, tensor.shape, tensor.stride())
        here = here.conj() if tensor.is_conj() else here  # torch notes that a tensor is a conjugate, and has the numbers as they were
        return torch._neg_view(here) if tensor.is_neg() else here
