"""What the package ``mzsane`` (MultiZoo-SANE) has another way: tokens without running statistics, and a standardised structural loss.

A script of that package changes its import to this module; where it is patched, these take the place of its own.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from . import package_sane
from .checkpoints import MULTIZOO, Checkpoint, fill, tokenize
from .semantics import Choice
from .structure import explained_variance

__all__ = ["GammaContrastReconLoss", "MaskedReconLoss", "tokenize_checkpoint", "tokens_to_checkpoint"]


def tokenize_checkpoint(
    checkpoint: Checkpoint, tokensize: int, return_mask: bool = True, ignore_bn: bool = False, device: str | torch.device = "cpu"
) -> tuple[Tensor, ...]:
    """:func:`wslfast.sane.tokenize_checkpoint` without running statistics, on ``device``."""
    return tuple(part.to(device) for part in tokenize(checkpoint, tokensize, return_mask, ignore_bn, MULTIZOO))


def tokens_to_checkpoint(
    tokens: Tensor, pos: Tensor, reference_checkpoint: Checkpoint, ignore_bn: bool = False
) -> OrderedDict[str, Tensor]:
    """:func:`wslfast.sane.tokens_to_checkpoint` of such tokens; running statistics are the reference's."""
    return fill(tokens, pos, reference_checkpoint, ignore_bn, None, MULTIZOO)


class MaskedReconLoss(package_sane.MaskedReconLoss):
    """Squared difference of tokens; standardised, of real weights alone, in units of the originals' deviation in the batch.

    Args:
        reduction: ``"mean"`` or ``"sum"``.
        standardize: subtract the mean of the originals' real weights and divide by their deviation.
        std_eps: added to that deviation.

    Without ``standardize`` the published code raises a NameError; here it is SANE's own loss.
    """

    def __init__(
        self, reduction: str, standardize: bool = False, std_eps: float = 1e-4, *, semantics: Choice = "published", **flags: bool
    ) -> None:
        super().__init__(reduction, semantics=semantics, **flags)
        self.standardize, self.std_eps = bool(standardize), std_eps

    def forward(self, output: Tensor, target: Tensor, mask: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """Tokens ``[k, T, D]`` of reconstructions and originals, and the mask of that shape."""
        if not self.standardize:
            return super().forward(output, target, mask)
        keep = mask.bool()
        with torch.no_grad():
            real = torch.masked_select(target, keep)
            mean = real.mean()
            deviation = (real - mean).square().mean().sqrt() + self.std_eps
            shown = (torch.where(keep, output, 0.0) - mean) / deviation, (target - mean) / deviation
            rsq = explained_variance(*shown) if not self.loss_mean else None
        loss = F.mse_loss(torch.where(keep, output / deviation, 0.0), torch.where(keep, target / deviation, 0.0), reduction="sum")
        loss = loss / real.numel() if self.reduction == "mean" else loss
        return {"loss_recon": loss, "rsq": 1 - loss.detach() / self.loss_mean if rsq is None else rsq}  # type: ignore[operator]


class GammaContrastReconLoss(package_sane.GammaContrastReconLoss):
    """``gamma`` times the contrast plus ``1 - gamma`` times the structural loss, which may be standardised."""

    def __init__(
        self,
        gamma: float,
        reduction: str,
        batch_size: int,
        temperature: float,
        contrast: str = "simclr",
        z_var_penalty: float = 0.0,
        z_norm_penalty: float = 0.0,
        standardize_token: bool = False,
        standardize_std_eps: float = 1e-4,
        *,
        semantics: Choice = "published",
        **flags: bool,
    ) -> None:
        super().__init__(gamma, reduction, batch_size, temperature, contrast, z_var_penalty, z_norm_penalty, semantics=semantics, **flags)
        self.loss_recon = MaskedReconLoss(
            reduction,
            standardize_token,
            standardize_std_eps,
            semantics=self.semantics,
            first_value_scale=self.semantics.first_value_scale,
        )

    def forward(self, z_i: Tensor, z_j: Tensor, y: Tensor, t: Tensor, m: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """Projections ``[k, d]`` of two views; reconstructions, targets and mask ``[2k, T, D]``."""
        out = super().forward(z_i, z_j, y, t, m)
        if m is not None:
            real = m.sum()
            out |= {"debug/mask_to_signal_ratio": real / m.numel(), "debug/signal_compression_ratio": real / z_i.numel()}
        return out
