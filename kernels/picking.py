"""Convolutions that only pick positions: kernels one wide, with a stride and without padding.

In float32, channels-last and with few input channels, oneDNN's gradient of such a kernel writes behind its own memory on processors without
AVX-512: the process dies of it, or something else is wrong later. (Seen in torch 2.13, with 2 to 7 channels; kernels that are wider in one
direction, padded ones and convolutions in groups were sound.) So they are given the positions that they read, and no stride.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def picks(kernel: Sequence[int], stride: Any, padding: Any) -> tuple[int, ...]:
    """The strides of a convolution that reads every so many-th position and none beside it; nothing for any other."""
    strides = tuple(stride) if isinstance(stride, (tuple, list)) else (stride,)
    strides = strides * len(kernel) if len(strides) == 1 else strides
    paddings = padding if isinstance(padding, (tuple, list)) else (padding,)
    alone = all(size == 1 for size in kernel) and all(p in (0, "valid") for p in paddings)
    return strides if alone and max(strides, default=1) > 1 else ()


def unstrided(x: Tensor, kernel: Sequence[int], stride: Any, padding: Any) -> tuple[Tensor, Any]:
    """Images and stride of the same convolution, which no longer picks."""
    strides = picks(kernel, stride, padding)
    return (picked(x, strides), [1] * len(strides)) if strides else (x, stride)


def picked(x: Tensor, strides: Sequence[int]) -> Tensor:
    """The positions of images ``[..., *axes]`` that such a convolution reads."""
    where: Any = (..., *(slice(None, None, step) for step in strides))
    return x[where]
