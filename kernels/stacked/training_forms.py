"""Operations that compute something else in training mode: batch norm by the batch's statistics, and dropout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..graph import Node
from .calls import Call, Layout, Values

_ALPHA = 1.7580993408473766  # of the scaled exponential unit, whose mean and variance alpha dropout keeps (Klambauer et al. 2017)


class Statistics(NamedTuple):
    """Of one batch norm on one batch: ``[M, C]`` each, the variance with n - 1; references of the running ones, and their momentum."""

    mean: Tensor
    variance: Tensor
    running_mean: str
    running_var: str
    momentum: float


def normalised(node: Node, call: Call, a: Values, models: int) -> Tensor:
    """Batch norm by the statistics of each model's own batch, which are appended to ``a["statistics"]``."""
    x: Tensor = a["input"]
    channels = call.layout is Layout.CHANNELS
    if not channels:  # [M, n, C, ...]
        x = x if call.stacked("input") else x.expand(models, *x.shape)
        x = x.transpose(0, 1).flatten(1, 2)
    scale, shift = (_everyones(a.get(name), models, call.stacked(name)) for name in ("weight", "bias"))
    if x.numel() == x.shape[1]:
        raise ValueError("one number a channel has no variance, which a batch norm in training mode divides by; take other batches")
    mean, variance = x.new_zeros(2, x.shape[1]).unbind()
    y = torch.native_batch_norm(x, scale, shift, mean, variance, True, 1.0, a["eps"])[0]  # momentum 1: nothing of the zeros stays
    if a.get("running_mean") is not None:
        references = [str(node.argument(name)) for name in ("running_mean", "running_var")]
        found = (mean.view(models, -1), variance.view(models, -1))
        a["statistics"].append(Statistics(*found, references[0], references[1], float(node.argument("momentum", 0.1))))
    return y if channels else y.unflatten(1, (models, -1)).transpose(0, 1)


def _everyones(value: Tensor | None, models: int, stacked: bool) -> Tensor | None:
    """``[M * C]``."""
    if value is None:
        return None
    return (value if stacked else value.expand(models, *value.shape)).reshape(-1)


def noise_shape(node: Node, shape: Sequence[int]) -> tuple[int, ...]:
    """Shape of the random numbers of one model, for a dropout with a result of this shape: one per channel where channels are dropped."""
    whole = node.operation.startswith("feature")
    return (*shape[:2], *(1,) * (len(shape) - 2)) if whole else tuple(shape)


def probability(node: Node) -> float:
    """The probability with which a dropout drops a number; 0 for a dropout that drops nothing."""
    return float((node.argument("p") if node.argument("train") else node.argument("dropout_p")) or 0.0)


def factors(node: Node, drawn: Tensor) -> tuple[Tensor, Tensor | None]:
    """What dropout multiplies by and, where it keeps mean and variance, adds, for numbers drawn from [0, 1): kept where they reach p."""
    p = probability(node)
    kept = (drawn >= p).to(drawn.dtype)
    if "alpha" not in node.operation:
        return (kept / (1 - p) if p < 1 else kept), None
    a = 0.0 if p == 1 else 1 / math.sqrt((_ALPHA**2 * p + 1) * (1 - p))
    return kept * a, (kept - 1) * (_ALPHA * a) + _ALPHA * a * p
