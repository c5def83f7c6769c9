"""The variants of package ``SANE``, where it differs from ``shrp``: losses without behavior, positions and first-value scale, and the rest.

A script of that package changes its import to this module; ``wslfast.sane`` has the versions of the paper's package ``shrp``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from . import losses, module, structure
from .checkpoints import tokens_to_checkpoint_without_batchnorm as tokens_to_checkpoint
from .semantics import Choice, Semantics

__all__ = ["AEModule", "GammaContrastReconLoss", "MaskedReconLoss", "NT_Xent", "NT_Xent_pos", "tokens_to_checkpoint"]


class MaskedReconLoss(structure.MaskedReconLoss):
    """Squared difference of tokens as SANE has it: ``{"loss_recon", "rsq"}``."""

    _paper = False

    def __init__(self, reduction: str, *, semantics: Choice = "published", **flags: bool) -> None:
        super().__init__(reduction, semantics=semantics, **{"first_value_scale": False} | flags)

    def forward(self, output: Tensor, target: Tensor, mask: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """Tokens ``[k, T, D]`` of reconstructions and originals, and the mask of that shape."""
        return super().forward(output, target, mask)


class _InOwnUnit:
    """A contrastive loss that is not divided by its first value unless it is asked to."""

    def __init__(self, batch_size: int, temperature: float, *, semantics: Choice = "published", **flags: bool) -> None:
        super().__init__(batch_size, temperature, semantics=semantics, **{"first_value_scale": False} | flags)  # type: ignore[call-arg]


class NT_Xent(_InOwnUnit, losses.NT_Xent):
    """NT-Xent, in its own unit."""


class NT_Xent_pos(_InOwnUnit, losses.NT_Xent_pos):
    """The ``"positive"`` contrast, in its own unit."""


class GammaContrastReconLoss(losses.GammaContrastReconLoss):
    """``gamma`` times the contrast plus ``1 - gamma`` times the structural loss."""

    _paper = False

    def __init__(
        self,
        gamma: float,
        reduction: str,
        batch_size: int,
        temperature: float,
        contrast: str = "simclr",
        z_var_penalty: float = 0.0,
        z_norm_penalty: float = 0.0,
        *,
        semantics: Choice = "published",
        **flags: bool,
    ) -> None:
        super().__init__(
            gamma,
            reduction,
            batch_size,
            temperature,
            contrast,
            z_var_penalty,
            z_norm_penalty,
            beta=1.0,
            semantics=semantics,
            **{"first_value_scale": False} | flags,  # type: ignore[arg-type]
        )

    def _reconstruction(self, beta: float, reduction: str, semantics: Semantics, **behavior: Any) -> nn.Module:
        return MaskedReconLoss(reduction, semantics=semantics, first_value_scale=semantics.first_value_scale)

    def forward(self, z_i: Tensor, z_j: Tensor, y: Tensor, t: Tensor, m: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """Projections ``[k, d]`` of two views; reconstructions, targets and mask ``[2k, T, D]``."""
        return super().forward(z_i, z_j, y, t, m)


class AEModule(module.AEModule):
    """:class:`wslfast.sane.AEModule` with SANE's objective: ``AEModule(config)``, no behavior, no reference network."""

    def __init__(self, config: Mapping[str, Any], *, semantics: Choice = "published", **flags: bool) -> None:
        super().__init__(config, semantics=semantics, **{"first_value_scale": False} | flags)  # type: ignore[arg-type]

    def _criterion(
        self, config: Mapping[str, Any], reference_checkpoint: Any, reference_params: Any, architecture: Any, chosen: Semantics
    ) -> nn.Module:
        return GammaContrastReconLoss(**module.contrast_settings(config), semantics=chosen, first_value_scale=chosen.first_value_scale)
