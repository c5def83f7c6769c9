"""The masked reconstruction loss and the contrastive loss of ``sane`` 2.x, in fewer passes over the tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ...losses import nt_xent

Tensors = Mapping[str, Tensor]
_CLOSE = 1e-4  # torchmetrics takes sums of squares this near to zero for zero


def reconstruct(self: Any, tensors: Tensors, *, original: Callable[..., Any]) -> dict[str, Any]:
    """``MSEReconstructionLoss.forward``: loss, R squared (without a gradient), share of real numbers, compression.

    One difference of the tokens serves the loss, whatever its normalisation, and R squared.
    """
    if "x_i" in tensors and "x" not in tensors:
        keys = ("x", "x_hat", "mask", "z")
        one, two = (reconstruct(self, {k: tensors[f"{k}_{view}"] for k in keys}, original=original) for view in "ij")
        return {k: (one[k] + two[k]) / 2 for k in one}
    target, output, mask = tensors["x"], tensors["x_hat"], tensors.get("mask")
    keep = torch.ones_like(target, dtype=torch.bool) if mask is None else mask.bool()
    if not _usual(self, target, output, keep):
        return original(self, tensors)  # type: ignore[no-any-return]
    with torch.no_grad():
        chosen = torch.masked_select(target, keep)
        n = chosen.numel()
        # NaN anywhere, padding included, is an error with a message of its own; so is a single number
        if n < 2 or bool((target.sum() + output.sum()).isnan()):
            return original(self, tensors)  # type: ignore[no-any-return]
        scale = _scale(self.normalize, target, keep, chosen, self.std_eps)
    loss, squares = _MaskedSquares.apply(output, target, keep, scale)
    if self.reduction == "mean":
        loss = loss / n
    with torch.no_grad():
        total = chosen.square().sum() - chosen.sum().square() / n
        rsq = torch.where(squares <= _CLOSE, 1.0, torch.where(total.abs() <= _CLOSE, 0.0, 1 - squares / total))
    count = keep.sum()
    return {
        "loss": loss,
        self.name: loss,
        self.name + "_rsq": rsq,
        "mask_ratio": count / keep.numel(),
        "compression_ratio": count / tensors["z"].numel() if "z" in tensors else None,
    }


def _usual(loss: Any, target: Tensor, output: Tensor, keep: Tensor) -> bool:
    if loss.reduction not in ("mean", "sum") or loss.normalize not in (None, False, "", "batch", "window", "token"):
        return False
    if target.requires_grad or not (output.shape == target.shape == keep.shape) or target.dtype != torch.float32:
        return False
    enough = {"window": 3, "token": 2}.get(loss.normalize or "", 1)
    return output.dtype in (torch.float32, torch.float16, torch.bfloat16) and target.ndim >= enough


def _scale(normalize: Any, target: Tensor, keep: Tensor, chosen: Tensor, eps: float) -> Tensor:
    """What differences are divided by: a number, or one per window or an entry of the token."""
    if not normalize:
        return target.new_ones(())
    if normalize == "batch":
        return chosen.std() + eps
    over = (1, 2) if normalize == "window" else (0, 1)
    weights = keep.float()
    counts = weights.sum(dim=over, keepdim=True).clamp(min=1)
    mean = target.sum(dim=over, keepdim=True) / counts
    return (((target - mean).square() * weights).sum(dim=over, keepdim=True) / counts).sqrt() + eps


def _difference(output: Tensor, target: Tensor, keep: Tensor) -> Tensor:
    return torch.where(keep, output.float() - target, 0.0)


class _MaskedSquares(torch.autograd.Function):
    """Sums of squared differences where ``keep``: over ``scale``, and as they are. Differentiable in the output."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, target: Tensor, keep: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        difference = _difference(output, target, keep)
        squares = difference.square().sum()
        whole = scale.ndim == 0
        loss = squares / scale.square() if whole else (difference / scale).square().sum()
        ctx.save_for_backward(output, target, keep, difference, scale)
        ctx.dtype = output.dtype
        ctx.mark_non_differentiable(squares)
        return loss, squares

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor, None, None, None]:
        output, target, keep, difference, scale = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: this gradient depends on the output, too
            difference = _difference(output, target, keep)
        return (difference * (2 * gradient / scale.square())).to(ctx.dtype), None, None, None


def contrast(self: Any, tensors: Tensors, *, original: Callable[..., Any]) -> dict[str, Tensor]:
    """``NTXentLoss.forward``: one matrix of similarities, no mask and no copy of the batch for every partner."""
    a, b = tensors["z_p_i"], tensors["z_p_j"]
    if a.ndim != 2 or a.shape != b.shape or len(a) < 2 or not (isinstance(self.temperature, (int, float)) and self.temperature > 0):
        return original(self, tensors)  # type: ignore[no-any-return]
    loss = nt_xent(a, b, self.temperature)
    return {"loss": loss, self.name: loss}
