"""A transposed convolution with a stride as a convolution without one: each of its channels makes the pixels of one phase of the stride.

Pixel s b + r of the output, r < s its phase, is a sum over pixels a of the input,

    y[s b + r] = sum_a x[a] w[s (b - a) + r + p],        p the padding, where the index is one of the kernel's,

so with d = b - a it is a convolution whose kernel of phase r has w[s d + r + p] at d, and zeros where that is outside. All phases have
the same range of d, from -floor((s - 1 + p) / s) to floor((k - 1 - p) / s). Their channels are then laid out as pixels. (Shi et al. 2016,
arXiv 1609.05158, in the other direction.)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..cpu.convolutions import convolution

Phases = Sequence[tuple[int, int]]  # stride and padding of each axis


def _reach(size: int, stride: int, padding: int) -> tuple[int, int]:
    """The least and the largest d."""
    return -((stride - 1 + padding) // stride), (size - 1 - padding) // stride


@lru_cache(maxsize=64)
def _taps(kernel: tuple[int, int], phases: tuple[tuple[int, int], ...]) -> tuple[Tensor, tuple[int, int]]:
    """Which number of a kernel ``[kh * kw]`` each phase has at each tap ``[sh * sw * taps]``, one past the last where it has none; and the
    taps of each axis."""
    each = []
    for size, (stride, padding) in zip(kernel, phases, strict=True):
        least, most = _reach(size, stride, padding)
        taps = stride * (most - torch.arange(most - least + 1)) + torch.arange(stride).unsqueeze(1) + padding  # [stride, taps]
        each.append(torch.where((taps >= 0) & (taps < size), taps, -1))
    rows, columns = each[0][:, None, :, None], each[1][None, :, None, :]
    both = torch.where((rows >= 0) & (columns >= 0), rows * kernel[1] + columns, kernel[0] * kernel[1])
    return both.flatten(), (each[0].shape[1], each[1].shape[1])


def sub_pixels(x: Tensor, weight: Tensor, phases: Phases, sizes: Sequence[int]) -> Tensor:
    """Images ``[n, M * out, *sizes]``, channels-last, of ``x [n, M * in, H, W]`` and ``weight [M, in, out, kh, kw]``."""
    models, features, out, *kernel = weight.shape
    (sh, _), (sw, _) = phases
    taps, (tall, wide) = _taps((kernel[0], kernel[1]), tuple(phases))
    picked = torch.nn.functional.pad(weight.flatten(3), (0, 1)).index_select(3, taps.to(x.device))
    picked = picked.view(models, features, out, sh * sw, tall, wide).permute(0, 3, 2, 4, 5, 1)  # channels-last
    kernels = picked.reshape(-1, tall, wide, features).permute(0, 3, 1, 2)
    around, cut = [], []
    for size, have, k, (s, p) in zip(sizes, x.shape[2:], kernel, phases, strict=True):
        least, most = _reach(k, s, p)
        windows = -(-size // s)
        after = windows - 1 - least - (have - 1)
        around.append(max(most, after, 0))
        cut.append((around[-1] - most, windows))
    y = convolution(x, kernels, None, [1, 1], around, [1, 1], False, [0, 0], models)
    (top, rows), (left, columns) = cut
    y = y[:, :, top : top + rows, left : left + columns].permute(0, 2, 3, 1).reshape(-1, rows, columns, models, sh, sw, out)
    y = y.permute(0, 1, 4, 2, 5, 3, 6).reshape(-1, rows * sh, columns * sw, models * out)
    return y[:, : sizes[0], : sizes[1]].permute(0, 3, 1, 2)


__all__ = ["sub_pixels"]
