"""The published structural loss on tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import describe, require
from .loss_scale import ScaledLoss
from .semantics import Choice, resolve

REDUCTIONS = ("mean", "sum")


class MaskedReconLoss(ScaledLoss):
    """Squared difference of tokens, divided by its first value.

    Published: the output is masked and the target is not, and the mean counts padding. Corrected (``unmasked_target=False``):
    both are masked, and the mean is over real weights.

    Args:
        reduction: ``"mean"`` or ``"sum"``.
        semantics, flags: see :class:`~wslfast.sane.semantics.Semantics`.

    Attributes:
        scale: the divisor, None before the first call.
        loss_mean: loss of the mean model, from :meth:`set_mean_loss`; once set, ``rsq`` is relative to it.
    """

    _paper = True  # with the paper's keys; SANE's own version has loss_recon and rsq alone

    def __init__(self, reduction: str, *, semantics: Choice = "published", **flags: bool) -> None:
        require(reduction in REDUCTIONS, f"reduction: expected one of {list(REDUCTIONS)}, got {reduction!r}")
        chosen = resolve(semantics, flags)
        super().__init__(chosen.first_value_scale)
        self.semantics = chosen
        self.reduction = reduction
        self.criterion = nn.MSELoss(reduction=reduction)
        self.loss_mean: Tensor | None = None

    def forward(self, output: Tensor, target: Tensor, mask: Tensor, _: Any = None) -> dict[str, Tensor]:
        """Tokens ``[k, T, D]`` of reconstructions and originals, and the mask of that shape."""
        same = isinstance(mask, Tensor) and output.shape == target.shape == mask.shape
        require(same, f"mask: expected the shape of output and target, got {describe(output)}, {describe(target)}, {describe(mask)}")
        if self.semantics.unmasked_target:
            output = mask * output
            loss = self.criterion(output, target)
        else:
            keep = mask.bool()
            output, target = torch.where(keep, output, 0), torch.where(keep, target, 0)
            whole = output.dtype == torch.float16 and self.reduction == "mean"  # a sum that float16 does not hold, of a mean that it does
            loss = F.mse_loss(*((output.float(), target.float()) if whole else (output, target)), reduction="sum")
            loss = loss / keep.sum() if self.reduction == "mean" else loss
        loss = self.scaled(loss)
        rsq = explained_variance(output, target) if self.loss_mean is None else 1 - loss.detach() / self.loss_mean
        out = {"loss_recon": loss, "rsq": rsq}
        if self._paper:
            out |= {"loss_structure": loss, "loss_behaviour": torch.tensor(0.0)}
        return out

    @torch.no_grad()
    def set_mean_loss(self, data: Tensor, mask: Tensor) -> None:
        """Measure ``rsq`` against the mean of ``data [M, T, D]`` from now on."""
        require(isinstance(data, Tensor) and data.ndim == 3, f"data: expected tokens [M, T, D], got {describe(data)}")
        self.loss_mean = self.forward(data.mean(0).expand_as(data), data, mask)["loss_recon"]


@torch.no_grad()
def explained_variance(output: Tensor, target: Tensor) -> Tensor:
    """1 - Var(target - output) / Var(target) of each entry over models, averaged over entries.

    An entry that never varies counts 1 if its error does not either, and 0 if it does.
    """
    n = len(target)
    error = target - output
    left = error.square().sum(0) / n - (error.sum(0) / n).square()
    variance = target.square().sum(0) / n - (target.sum(0) / n).square()
    score = torch.where(left == 0, 1.0, 0.0)
    return torch.where(variance != 0, 1 - left / variance, score).mean()
