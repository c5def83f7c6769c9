"""Models that are not finite: which they are, when that is an error, and how values are reduced over the others.

``"propagate"`` lets NaN and infinity show in the model's own value and gradient. ``"omit"`` leaves the model out: zero gradient, NaN
under reduction ``"none"``. ``"raise"`` raises and names the model. A model is bad if its value or its gradient is not finite.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import WslfastError, require

NAN_POLICIES = ("propagate", "omit", "raise")
REDUCTIONS = ("mean", "sum", "none")


def bad_models(values: Tensor, gradient: Tensor | None) -> Tensor:
    """``[k]`` bool: models whose value, or row of the gradient ``[k, P]``, is not finite."""
    bad = ~values.isfinite()
    # a sum is not finite if any term is not; overflow of finite terms would need gradients near 1e38
    return bad if gradient is None else bad | ~gradient.isfinite().all(1)


def check_models(bad: Tensor, nan_policy: str, mean: bool) -> None:
    """Raise WslfastError for bad models under ``"raise"``, and for a mean over no model under ``"omit"``."""
    if nan_policy == "raise" and bool(bad.any()):
        where = bad.nonzero().flatten().tolist()
        raise WslfastError(f"reconstructed: models {where[:10]} of {len(bad)} have a non-finite value or gradient (nan_policy='raise')")
    if nan_policy == "omit" and mean:
        nothing = f"nan_policy='omit': all {len(bad)} models have a non-finite value or gradient; nothing to average"
        require(not bool(bad.all()), nothing)


def reduce(values: Tensor, bad: Tensor | None, reduction: str, nan_policy: str) -> Tensor:
    """Values ``[k]`` as the caller wants them: a scalar, or ``[k]`` for ``"none"``. ``"mean"`` divides by the models that are kept.
    ``bad`` is read under ``"omit"`` alone."""
    if nan_policy != "omit":
        return values if reduction == "none" else values.mean() if reduction == "mean" else values.sum()
    assert bad is not None
    if reduction == "none":
        return torch.where(bad, torch.full_like(values, float("nan")), values)
    total = torch.where(bad, torch.zeros_like(values), values).sum()
    return total / (~bad).sum() if reduction == "mean" else total
