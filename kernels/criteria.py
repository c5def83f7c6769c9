"""The behavioral criteria: one table of values and gradients. A new criterion is one entry here, and every path has it.

Outputs ``f`` and targets ``y`` are ``[k, n, *out]``; the classes of a criterion over classes are the last axis. With p = softmax, T
the temperature, n queries and K classes, a model's value is (over no queries NaN, as of any mean)

    mse             1/(2n) sum (f - y)^2               (arXiv 2503.17138, behavioral loss; its mean over models is the paper's formula)
    huber           1/n sum h(f - y),  h(d) = d^2/2 for |d| <= 1, |d| - 1/2 beyond          (Huber 1964, with threshold 1)
    softmax_mse     1/(nK) sum (p(f) - p(y))^2         (the published code's l2)
    cross_entropy   -1/n sum p(y) log p(f)             (soft labels; integer targets [k, n] are labels: the loss that trains a zoo)
    distillation    T^2/n sum p(y/T) (log p(y/T) - log p(f/T))                                      (Hinton et al. 2015)

Each entry gives a slab's terms: values that add up over queries, and their gradient with respect to f, written out by hand, so that no
graph is needed between outputs and loss. ``terms`` alone is differentiable any number of times.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Union

import torch
from torch import Tensor

# Values of a slab, and the gradient with respect to its outputs (None where nobody wants it).
Terms = Callable[[Tensor, Tensor, int, float], Tensor]
Gradient = Callable[[Tensor, Tensor, int, float], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Criterion:
    """One criterion.

    Attributes:
        terms: ``(outputs [M, q, *out], targets, n, temperature) -> [M]``: the share that these q queries have in the value over n.
        gradient: the same share, and its gradient with respect to the outputs.
        labels: whether integer targets ``[M, q]`` are taken too.
        over_classes: whether it needs a class axis (the last one).
    """

    terms: Terms
    gradient: Gradient
    labels: bool = False
    over_classes: bool = True


def _per_model(values: Tensor) -> Tensor:
    """``[M, q, *out] -> [M]``: every model's row of numbers is summed on its own."""
    return values.flatten(1).sum(1)


def _mse(f: Tensor, y: Tensor, n: int, _: float) -> Tensor:
    return _per_model((f - y).square()) / (2 * n)


def _mse_gradient(f: Tensor, y: Tensor, n: int, _: float) -> tuple[Tensor, Tensor]:
    g = f - y
    return _per_model(g.square()) / (2 * n), g / n


def _huber(f: Tensor, y: Tensor, n: int, _: float) -> Tensor:
    distance = (f - y).abs()
    inside = distance.clamp_max(1)
    return _per_model(inside * (distance - inside / 2)) / n


def _huber_gradient(f: Tensor, y: Tensor, n: int, temperature: float) -> tuple[Tensor, Tensor]:
    return _huber(f, y, n, temperature), (f - y).clamp_(-1, 1) / n


def _softmax_mse(f: Tensor, y: Tensor, n: int, _: float) -> Tensor:
    return _per_model((f.softmax(-1) - y.softmax(-1)).square()) / (n * _numbers(f))


def _softmax_mse_gradient(f: Tensor, y: Tensor, n: int, _: float) -> tuple[Tensor, Tensor]:
    p = f.softmax(-1)
    difference = p - y.softmax(-1)
    scale = n * _numbers(f)
    along = (p * difference).sum(-1, keepdim=True)
    return _per_model(difference.square()) / scale, p * (difference - along) * _over(2, scale)


def _cross_entropy(f: Tensor, y: Tensor, n: int, _: float) -> Tensor:
    log_p = f.log_softmax(-1)
    if y.is_floating_point():
        return -_per_model(y.softmax(-1) * log_p) / n
    return -_per_model(log_p.gather(-1, y.unsqueeze(-1))) / n


def _cross_entropy_gradient(f: Tensor, y: Tensor, n: int, _: float) -> tuple[Tensor, Tensor]:
    log_p = f.log_softmax(-1)
    if y.is_floating_point():
        soft = y.softmax(-1)
        return -_per_model(soft * log_p) / n, (log_p.exp() - soft) / n
    labels = y.unsqueeze(-1)
    one_hot = log_p.new_full(labels.shape, -1.0)
    return -_per_model(log_p.gather(-1, labels)) / n, log_p.exp().scatter_add(-1, labels, one_hot) / n


def _softened(f: Tensor, y: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    # near convergence the two logs agree to the last float32 digits: their difference needs more
    return (f.double() / temperature).log_softmax(-1), (y.double() / temperature).log_softmax(-1)


def _distillation(f: Tensor, y: Tensor, n: int, temperature: float) -> Tensor:
    log_p, log_q = _softened(f, y, temperature)
    return (_per_model(log_q.exp() * (log_q - log_p)) * _over(temperature**2, n)).to(f.dtype)


def _distillation_gradient(f: Tensor, y: Tensor, n: int, temperature: float) -> tuple[Tensor, Tensor]:
    log_p, log_q = _softened(f, y, temperature)
    q = log_q.exp()
    value = _per_model(q * (log_q - log_p)) * _over(temperature**2, n)
    return value.to(f.dtype), ((log_p.exp() - q) * _over(temperature, n)).to(f.dtype)


def _over(number: float, n: int) -> float:
    """``number / n``, and NaN over no queries: what tensors give, where Python raises."""
    return number / n if n else math.nan


def _numbers(f: Tensor) -> int:
    """Numbers of one output."""
    return f[0, 0].numel() if f.shape[0] and f.shape[1] else 1


TABLE: dict[str, Criterion] = {
    "mse": Criterion(_mse, _mse_gradient, over_classes=False),
    "huber": Criterion(_huber, _huber_gradient, over_classes=False),
    "softmax_mse": Criterion(_softmax_mse, _softmax_mse_gradient),
    "cross_entropy": Criterion(_cross_entropy, _cross_entropy_gradient, labels=True),
    "distillation": Criterion(_distillation, _distillation_gradient),
}
CRITERIA = tuple(TABLE)


class Averaged(NamedTuple):
    """A criterion by name, whose gradient is that of a mean over so many models: divided where it is smallest, at the outputs."""

    name: str
    models: int


# A criterion by name, or a function of outputs and targets to values ``[M]`` that add up over queries.
Named = Union[str, Averaged, Callable[[Tensor, Tensor], Tensor]]


def criterion(name: str) -> Criterion:
    """The criterion of that name. Raises ValueError for a name that is not in the table."""
    try:
        return TABLE[name]
    except KeyError:
        raise ValueError(f"unknown criterion {name!r}; known: {list(CRITERIA)}") from None


def criterion_values(outputs: Tensor, targets: Tensor, name: str, temperature: float = 2.0) -> Tensor:
    """Per-model values ``[k]`` of a criterion, differentiable; outputs ``[k, n, *out]``, targets alike or labels ``[k, n]``."""
    return criterion(name).terms(outputs, targets, outputs.shape[1], temperature)


def share_of_loss(outputs: Tensor, targets: Tensor, n: int, name: Named, temperature: float) -> tuple[Tensor, Tensor]:
    """A slab's share ``[M]`` of the values over n queries, and its gradient with respect to ``outputs [M, q, *out]``."""
    if isinstance(name, str):
        return criterion(name).gradient(outputs, targets, n, temperature)
    if isinstance(name, Averaged):
        values, slope = criterion(name.name).gradient(outputs, targets, n, temperature)
        return values, slope / name.models
    with torch.enable_grad():
        leaf = outputs.detach().requires_grad_()
        values = name(leaf, targets)
    return values.detach(), torch.autograd.grad(values, leaf, torch.ones_like(values))[0]
