"""A gradient that was computed together with its value, or by kernels: differentiating it again is an error, never zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def once(gradient: Tensor, *of: Tensor) -> Tensor:
    """The same numbers; where graphs are recorded (``create_graph=True``), differentiating them raises RuntimeError.

    torch's own once_differentiable keeps silent where the incoming gradient is a constant, as it is behind a mean.

    Args:
        gradient: the numbers.
        of: what they depend on, or a :func:`link` to it. Without, only ``backward()`` raises: ``torch.autograd.grad`` passes by what does
            not lead to the tensors it was asked for, and torch.autograd.functional takes that for zeros.
    """
    if not torch.is_grad_enabled():
        return gradient
    markers = of if any(tensor.requires_grad for tensor in of) else (gradient.new_zeros(()).requires_grad_(),)
    return _Once.apply(gradient, *markers)


def link(tensor: Tensor) -> Tensor:
    """A number whose graph leads to ``tensor``, and that keeps neither its memory nor what it held."""
    return tensor[:0].sum()


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *of: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        remedy = "for second derivatives take wslfast.batched_forward's outputs and a loss of torch's"
        raise RuntimeError(f"this is once_differentiable: its gradient comes without a gradient of its own; {remedy}")
