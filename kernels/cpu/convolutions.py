"""Convolutions whose groups are models, of which none may see another.

In bfloat16, oneDNN multiplies the channels that a group reads two at a time. Where their number is odd it takes the first one of the next
group as well, times a weight of zero: a NaN or an infinity of one model becomes a NaN of the model before it, and layer by layer of
others. (Seen in torch 2.13: forward with an odd number of input channels, the input's gradient with an odd number of output channels.)
Those are computed in float32 here; in float16 as well, where a processor has the same products.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..picking import picked, picks
from .half_pooling import HALVES

# Overloads resolved once: looking one up costs as much as a small operator.
_convolution = torch.ops.aten.convolution.default
_backward = torch.ops.aten.convolution_backward.default


def crosses(dtype: torch.dtype, channels: int, groups: int) -> bool:
    """Whether a convolution that reads this many channels a group would read one of the next group's."""
    return dtype in HALVES and groups > 1 and channels % 2 == 1


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, *where: Any) -> Tensor:
    """``aten.convolution``; ``where``: stride, padding, dilation, whether it is transposed, output padding, groups."""
    transposed, groups = where[3], where[5]
    read = weight.shape[0] // groups if transposed else weight.shape[1]
    if not crosses(x.dtype, read, groups):
        return _convolution(x, weight, bias, *where)  # type: ignore[no-any-return]
    return _convolution(x.float(), weight.float(), None if bias is None else bias.float(), *where).to(x.dtype)  # type: ignore[no-any-return]


def convolution_backward(g: Tensor, x: Tensor, weight: Tensor, sizes: Any, *rest: Any) -> tuple[Any, Any, Any]:
    """``aten.convolution_backward``: gradients of input, weight and bias; ``rest``: as in :func:`convolution`, then which of them are
    wanted."""
    *where, wanted = rest
    transposed, groups = where[3], where[5]
    strides = picks(weight.shape[2:], where[0], where[1]) if groups == 1 and not transposed and wanted[1] else ()
    if strides:
        gx = convolution_backward(g, x, weight, sizes, *where, (True, False, False))[0] if wanted[0] else None
        where[0] = [1] * len(strides)
        return (gx, *_backward(g, picked(x, strides), weight, sizes, *where, (False, *wanted[1:]))[1:])
    read = weight.shape[1] if transposed else weight.shape[0] // groups
    if not (wanted[0] and crosses(g.dtype, read, groups)):
        return _backward(g, x, weight, sizes, *where, wanted)  # type: ignore[no-any-return]
    gx = _backward(g.float(), x.float(), weight.float(), sizes, *where, (True, False, False))[0].to(x.dtype)
    others = (False, *wanted[1:])
    return (gx, *(_backward(g, x, weight, sizes, *where, others)[1:] if any(others) else (None, None)))


__all__ = ["convolution", "convolution_backward", "crosses"]
