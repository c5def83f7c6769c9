"""Outputs with a graph to the weights and to the queries. The backward pass runs the forward pass again rather than keeping activations,
and raises when it is differentiated again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..layers import Layers
from ..once import once
from .configurations import tuned, tuning
from .launch import forward, loss_and_gradient
from .query_gradient import gradients


def differentiable_forward(
    weights: Tensor, queries: Tensor, layers: Layers, precision: str = "tf32", *, memory: int | None = None
) -> Tensor:
    """:func:`forward` with a graph to the weights and, where they require a gradient, to the queries (query_gradient.py, which says
    where it cannot)."""
    return _Forward.apply(weights, queries, layers, precision, memory)


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, queries: Tensor, layers: Layers, precision: str, memory: int | None) -> Tensor:
        ctx.save_for_backward(weights, queries)
        ctx.options = layers, precision, memory, tuning()
        return forward(weights, queries, layers, precision, memory=memory)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weights, queries = ctx.saved_tensors
        layers, precision, memory, choice = ctx.options
        slope = grad.detach().float()
        with tuned(choice):  # this is autograd's thread
            if ctx.needs_input_grad[1]:
                gradient, to_queries = gradients(weights.detach(), queries.detach(), slope, layers, precision, memory=memory)
                of = weights, queries, grad
                return once(gradient.to(weights.dtype), *of), once(to_queries.to(queries.dtype), *of), None, None, None
            _, gradient = loss_and_gradient(weights.detach(), queries, slope, layers, "gradient", 1.0, precision, memory=memory)
        return once(gradient.to(weights.dtype), weights, queries, grad), None, None, None, None
