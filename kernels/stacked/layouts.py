"""Values of all models at once, moved from one layout to another and set beside each other."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .calls import Call, Layout, Values

_FEW_PIXELS = 256  # whose sum, one after another, is as good as one of parts


def in_rows(x: Tensor) -> Tensor:
    """x, contiguous, with strides that say so also where one pixel or one channel leaves them open: torch's operators would read them as
    channels-last."""
    strides = [1] * x.ndim
    for axis in range(x.ndim - 1, 0, -1):
        strides[axis - 1] = strides[axis] * max(1, x.shape[axis])
    return x.contiguous().as_strided(x.shape, strides)


def added_as_they_lie(images: Tensor) -> bool:
    """Whether :func:`over_pixels` adds up these images ``[n, C, H, W]`` without a copy: few pixels, channels-last."""
    plain = images.ndim == 4 and images.dtype in (torch.float32, torch.float64)
    return plain and images.is_contiguous(memory_format=torch.channels_last) and images.shape[2:].numel() <= _FEW_PIXELS


def over_pixels(images: Tensor, mean: bool = False) -> Tensor:
    """Sums ``[n, C, 1, 1]`` over pixels, or means: each channel's numbers one after another, whatever vector the channel is in. Plain
    reductions add up the last channels of channels-last images in another order than the others."""
    return F.avg_pool2d(images, images.shape[2:], divisor_override=None if mean else 1)  # type: ignore[arg-type]


def models_first(x: Tensor, models: int) -> Tensor:
    """``[n, M * C, ...] -> [M, n, C, ...]``."""
    return x.unflatten(1, (models, -1)).transpose(0, 1)


def channels_first(x: Tensor, last: bool) -> Tensor:
    """``[M, n, C, ...] -> [n, M * C, ...]``; ``last``: images are made channels-last."""
    if x.ndim == 5 and last:  # [n, H, W, M, C] in memory
        n, h, w = x.shape[1], x.shape[3], x.shape[4]
        return x.permute(1, 3, 4, 0, 2).reshape(n, h, w, -1).permute(0, 3, 1, 2)
    return x.transpose(0, 1).flatten(1, 2)


def repeated(x: Tensor, models: int) -> Tensor:
    """``[n, C, ...] -> [n, M * C, ...]``: what all models share, once for each."""
    return x.repeat(1, models, *(1,) * (x.ndim - 2))


def behind(x: Tensor, rank: int, of: int, models: int) -> Tensor:
    """A stacked tensor of ``of`` axes a model with ``rank`` axes a model, so that it broadcasts as a single model's tensor does."""
    return x if of == rank else x.reshape(models, *(1,) * (rank - of), *x.shape[1:])


def everyone(x: Tensor, models: int, stacked: bool) -> Tensor:
    """The value ``[M, ...]``: what all models share, seen once for each."""
    return x if stacked else x.expand(models, *x.shape)


def ranked(call: Call, a: Values, name: str, rank: int, models: int) -> Tensor:
    """A tensor that broadcasts as a single model's of ``rank`` axes does."""
    return behind(a[name], rank, call.ranks[name], models) if call.stacked(name) else a[name]  # type: ignore[no-any-return]


def aligned(call: Call, a: Values, name: str, models: int) -> Tensor:
    """An operand of an elementwise call, behind the axis of models where the call has one in front."""
    return ranked(call, a, name, call.rank, models) if call.layout is Layout.MODELS else a[name]


def mapped(call: Call, a: Values, models: int) -> Any:
    """The operator under vmap, for operations that have no form of their own."""
    names = [name for name in call.layouts if name in a]

    def run(*tensors: Any) -> Any:
        return call.operation.invoke({**a, **dict(zip(names, tensors, strict=True))})

    def dims(name: str) -> Any:
        layout = call.layouts[name]
        return (
            [0 if part is Layout.MODELS else None for part in layout]
            if isinstance(layout, tuple)
            else 0
            if layout is Layout.MODELS
            else None
        )

    return torch.vmap(run, in_dims=tuple(dims(name) for name in names))(*(a[name] for name in names))
