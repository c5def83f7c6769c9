"""A gradient that was computed together with its value, or by kernels: differentiating it again is an error, never zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def once(gradient: Tensor) -> Tensor:
    """The same numbers; where graphs are recorded (``create_graph=True``), differentiating them raises RuntimeError.

    torch's own once_differentiable keeps silent where the incoming gradient is a constant, as it is behind a mean.
    """
    if not torch.is_grad_enabled():
        return gradient
    return _Once.apply(gradient, gradient.new_zeros(()).requires_grad_())


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, marker: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        remedy = "for second derivatives take wslfast.batched_forward's outputs and a loss of torch's"
        raise RuntimeError(f"this is once_differentiable: its gradient comes without a gradient of its own; {remedy}")
