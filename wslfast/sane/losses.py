"""The published training objective: contrast between two views, and the composition of all terms."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..architecture import Architecture
from ..errors import describe, require
from ..losses import nt_xent
from .behavior import DistillationLoss, ReconDistillationLoss
from .loss_scale import ScaledLoss
from .semantics import Choice, Semantics, resolve
from .structure import MaskedReconLoss

_NONE = 1e-10  # weights this close to 0 or 1 leave the other term out


class _Contrast(ScaledLoss):
    """What both contrastive losses share. Any number of models may come; ``batch_size`` is kept for scripts that read it."""

    def __init__(self, batch_size: int, temperature: float, *, semantics: Choice = "published", **flags: bool) -> None:
        chosen = resolve(semantics, flags)
        super().__init__(chosen.first_value_scale)
        self.semantics = chosen
        self.batch_size, self.temperature = batch_size, temperature

    def forward(self, z_i: Tensor, z_j: Tensor) -> Tensor:
        """Embeddings ``[k, d]`` of two views; row j of one and row j of the other are partners."""
        return self.scaled(self._value(z_i, z_j))

    def _value(self, z_i: Tensor, z_j: Tensor) -> Tensor:
        raise NotImplementedError


class NT_Xent(_Contrast):
    """NT-Xent (Chen et al. 2020) over the ``2 k`` embeddings of a batch, divided by its first value.

    Args:
        batch_size: k.
        temperature: divides cosine similarities.

    Attributes:
        scale: the divisor, None before the first call.
    """

    def _value(self, z_i: Tensor, z_j: Tensor) -> Tensor:
        return nt_xent(z_i, z_j, self.temperature)


class NT_Xent_pos(_Contrast):
    """The ``"positive"`` contrast as published: mean squared similarity of partners over ``2 k``. It drives partners apart."""

    def _value(self, z_i: Tensor, z_j: Tensor) -> Tensor:
        fits = z_i.ndim == 2 and z_i.shape == z_j.shape and len(z_i) > 0
        require(fits, f"z_i, z_j: expected two [k, d] with k >= 1, got {describe(z_i)} and {describe(z_j)}")
        return (F.cosine_similarity(z_i, z_j, dim=1) / self.temperature).square().mean() / (2 * len(z_i))


class GammaContrastReconLoss(nn.Module):
    """``gamma`` times the contrast plus ``1 - gamma`` times the reconstruction loss, a cycle term and penalties.

    Args:
        gamma: weight of the contrast, 0 to 1; at either end the other term is not computed.
        reduction: ``"mean"`` or ``"sum"``.
        batch_size, temperature: of the contrast.
        contrast: ``"simclr"`` or ``"positive"``.
        z_var_penalty, z_norm_penalty: weights of the variance over models and of the norm of ``z_i``.
        beta: weight of structure within reconstruction; 1 leaves behavior out, 0 structure.
        loss_distillation ... reference_params: see :class:`~wslfast.sane.behavior.DistillationLoss`; needed for ``beta < 1``.
        lambda_: weight of the cycle term, the mean distance of ``z`` and ``z_hat`` over tokens.
        architecture, semantics, flags: see :class:`~wslfast.sane.behavior.DistillationLoss`.

    Attributes:
        loss_contrast, loss_recon: the terms, each with its ``scale``.
    """

    _paper = True

    def __init__(
        self,
        gamma: float,
        reduction: str,
        batch_size: int,
        temperature: float,
        contrast: str = "simclr",
        z_var_penalty: float = 0.0,
        z_norm_penalty: float = 0.0,
        beta: float = 0.1,
        loss_distillation: str = "l2",
        temperature_distillation: float = 2.0,
        queryset_distillation: str = "random",
        queryset_dump: Any = None,
        n_queries_distillation: int = 64,
        reference_checkpoint: Mapping[str, Tensor] | None = None,
        reference_params: Mapping[str, Any] | None = None,
        lambda_: float = 0.0,
        *,
        architecture: Architecture | None = None,
        semantics: Choice = "published",
        **flags: bool,
    ) -> None:
        super().__init__()
        for name, value in (("gamma", gamma), ("beta", beta)):
            require(isinstance(value, Real) and 0 <= value <= 1, f"{name}: expected a number from 0 to 1, got {value!r}")
        self.semantics = resolve(semantics, flags)
        gamma, beta = float(gamma), float(beta)  # of a grid of numpy's, perhaps
        self.gamma, self.lambda_ = gamma, lambda_
        self.z_var_penalty, self.z_norm_penalty = z_var_penalty, z_norm_penalty
        kinds = {"simclr": NT_Xent, "positive": NT_Xent_pos}
        known = contrast in kinds
        require(known or gamma < _NONE, f"contrast: expected one of {list(kinds)} for gamma={gamma:g}, got {contrast!r}")
        if known:
            self.loss_contrast = kinds[contrast](batch_size, temperature, semantics=self.semantics)
        self.loss_recon = self._reconstruction(
            beta,
            reduction,
            self.semantics,
            queryset=queryset_distillation,
            dump=queryset_dump,
            n_queries=n_queries_distillation,
            temperature=temperature_distillation,
            loss=loss_distillation,
            reference_checkpoint=reference_checkpoint,
            reference_params=reference_params,
            architecture=architecture,
        )
        self.loss_mean = None

    def _reconstruction(self, beta: float, reduction: str, semantics: Semantics, **behavior: Any) -> nn.Module:
        if beta >= 1 - _NONE:
            return MaskedReconLoss(reduction, semantics=semantics)
        if beta <= _NONE:
            return DistillationLoss(reduction=reduction, semantics=semantics, **behavior)
        return ReconDistillationLoss(beta=beta, reduction=reduction, semantics=semantics, **behavior)

    def set_mean_loss(self, weights: Tensor, mask: Tensor | None = None) -> None:
        """Measure ``rsq`` against the mean of ``weights [M, T, D]`` from now on (where there is a structural term)."""
        structure: Any = getattr(self.loss_recon, "recon_loss", self.loss_recon)
        require(isinstance(structure, MaskedReconLoss), "set_mean_loss: expected a structural term, got beta=0")
        structure.set_mean_loss(weights, torch.ones_like(weights, dtype=torch.bool) if mask is None else mask)

    def forward(
        self,
        z_i: Tensor,
        z_j: Tensor,
        y: Tensor,
        t: Tensor,
        m: Tensor,
        p: Tensor | None = None,
        z: Tensor | None = None,
        z_hat: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Projections ``z_i, z_j [k, d]`` of two views, reconstructions, targets and mask ``[2k, T, D]``, positions
        ``[2k, T, 3]``, latents and latents of the reconstruction ``[2k, T, latent]`` (needed for ``lambda_ > 0`` alone)."""
        out = self._terms(z_i, z_j, y, t, m, p)
        loss = out["loss/loss"]
        if self.lambda_ > 0:
            require(z is not None and z_hat is not None, f"z, z_hat: expected latents for lambda_={self.lambda_:g}, got None")
            loss = loss + self.lambda_ * torch.linalg.vector_norm(z - z_hat, dim=1).mean()  # type: ignore[operator]
        flat = z_i.flatten(1)
        z_norm, z_var = torch.linalg.vector_norm(flat, dim=1).mean(), flat.var(0).mean()
        # the published code adds them at weight zero, too: there, an infinite norm makes the loss NaN
        if self.semantics.nan_gradients or self.z_var_penalty:
            loss = loss + self.z_var_penalty * z_var
        if self.semantics.nan_gradients or self.z_norm_penalty:
            loss = loss + self.z_norm_penalty * z_norm
        return out | {"loss/loss": loss, "debug/z_norm": z_norm, "debug/z_var": z_var}

    def _terms(self, z_i: Tensor, z_j: Tensor, y: Tensor, t: Tensor, m: Tensor, p: Tensor | None) -> dict[str, Tensor]:
        contrast, recon = torch.tensor(0.0), {"loss_recon": torch.tensor(0.0)}
        if self._paper:
            recon |= {"loss_structure": torch.tensor(0.0), "loss_behaviour": torch.tensor(0.0)}
        if self.gamma >= _NONE:
            measure: Any = self.loss_contrast
            contrast = loss = measure(z_i, z_j)
        if abs(1 - self.gamma) >= _NONE:
            recon = self.loss_recon(y, t, m, p) if self._paper else self.loss_recon(y, t, m)
            loss = recon["loss_recon"] if self.gamma < _NONE else self.gamma * contrast + (1 - self.gamma) * recon["loss_recon"]
        return {"loss/loss": loss, "loss/loss_contrast": contrast} | {f"loss/{name}": value for name, value in recon.items()}
