"""Maxima of 2 x 2 windows in 16-bit floats, and the way back: torch's own operators, which count in float32 and keep 64-bit positions,
take as long as in float32.

Where the maximum came from is kept as a 16-bit 0 or 1: whether the left one of two neighbors won, then whether the upper one of two
winners did. A gradient's bits go there by integer products, and the rest of them to the other side by a difference. Ties go to the first
pixel in reading order, as torch's do, but that zeros of different signs are different numbers. Twins: ``max_pool2d_with_indices`` and its
backward, to the bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..layers import Pool2d

HALVES = (torch.bfloat16, torch.float16)
Winners = tuple[Tensor, Tensor]
_BITS = torch.int16


def applies(x: Tensor, pool: Pool2d) -> bool:
    """Whether the functions below do this pooling of a channels-last ``[q, C, H, W]``."""
    return x.dtype in HALVES and pool.mode == "max" and pool.kernel_size == pool.stride == (2, 2) and pool.padding == (0, 0)


def maxima(x: Tensor) -> tuple[Tensor, Winners]:
    """Maxima ``[q, C, H // 2, W // 2]`` of ``x [q, C, H, W]``, both channels-last, and which won."""
    rows, columns = (size // 2 * 2 for size in x.shape[2:])
    x = x.permute(0, 2, 3, 1)
    left, right = x[:, :rows, 0:columns:2], x[:, :rows, 1:columns:2]
    across, left_won = _larger(left, right)
    y, upper_won = _larger(across[:, ::2], across[:, 1::2])
    return y.permute(0, 3, 1, 2), (left_won, upper_won)


def to_maxima(g: Tensor, winners: Winners, gx: Tensor) -> Tensor:
    """``gx [q, C, H, W]``, written: the gradient ``g [q, C, H // 2, W // 2]`` at each window's maximum, zero elsewhere; channels-last."""
    left_won, upper_won = winners
    rows, columns = left_won.shape[1], left_won.shape[2] * 2
    if (rows, columns) != gx.shape[2:]:
        gx[:, :, rows:].zero_()
        gx[:, :, :, columns:].zero_()
    across = torch.empty_like(left_won)
    _apart(g.permute(0, 2, 3, 1).view(_BITS), upper_won, across[:, ::2], across[:, 1::2])
    made = gx.permute(0, 2, 3, 1).view(_BITS)
    _apart(across, left_won, made[:, :rows, 0:columns:2], made[:, :rows, 1:columns:2])
    return gx


def _larger(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The larger of two, and 1 where that is the first or both are the same number."""
    larger = torch.maximum(a, b)
    return larger, torch.eq(larger.view(_BITS), a.view(_BITS), out=torch.empty_like(larger, dtype=_BITS))


def _apart(bits: Tensor, first: Tensor, into_first: Tensor, into_second: Tensor) -> None:
    """Each number to one of two places, and zero to the other."""
    torch.mul(bits, first, out=into_first)
    torch.sub(bits, into_first, out=into_second)


__all__ = ["applies", "maxima", "to_maxima"]
