"""Criteria of the CPU path: values and their derivatives with respect to the outputs, written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Union

import torch
from torch import Tensor

# A criterion by name, or a function of outputs and targets ``[M, q, K]`` to values ``[M]`` that add up over queries.
Criterion = Union[str, Callable[[Tensor, Tensor], Tensor]]


def share_of_loss(outputs: Tensor, targets: Tensor, n: int, criterion: Criterion, temperature: float) -> tuple[Tensor, Tensor]:
    """A slab's share ``[M]`` of the losses over n queries, and its gradient with respect to ``outputs [M, q, K]``.

    The formulas of :func:`reference.criterion_values` and their derivatives; targets are ``[M, q, K]``, or labels ``[M, q]``.
    """
    if not isinstance(criterion, str):
        with torch.enable_grad():
            leaf = outputs.detach().requires_grad_()
            values = criterion(leaf, targets)
        return values.detach(), torch.autograd.grad(values, leaf, torch.ones_like(values))[0]
    if criterion == "mse":
        g = outputs - targets
        return _per_model(g.square()) / (2 * n), g / n
    if criterion == "softmax_mse":
        p = outputs.softmax(-1)
        difference = p - targets.softmax(-1)
        scale = n * outputs.shape[-1]
        along = (p * difference).sum(-1, keepdim=True)
        return _per_model(difference.square()) / scale, p * (difference - along) * (2 / scale)
    if criterion == "cross_entropy":
        log_p = outputs.log_softmax(-1)
        if targets.is_floating_point():
            soft = targets.softmax(-1)
            return -_per_model(soft * log_p) / n, (log_p.exp() - soft) / n
        labels = targets.unsqueeze(-1)
        return -_per_model(log_p.gather(-1, labels)) / n, log_p.exp().scatter_add(-1, labels, log_p.new_full(labels.shape, -1.0)) / n
    # near convergence the two logs agree to the last float32 digits: their difference needs more
    log_q = (targets.double() / temperature).log_softmax(-1)
    log_p = (outputs.double() / temperature).log_softmax(-1)
    q = log_q.exp()
    value, g = _per_model(q * (log_q - log_p)) * (temperature**2 / n), (log_p.exp() - q) * (temperature / n)
    return value.to(outputs.dtype), g.to(outputs.dtype)


def _per_model(values: Tensor) -> Tensor:
    """``[M, q, K] -> [M]``: every model's row of ``q * K`` numbers is summed on its own."""
    return values.flatten(1).sum(1)
