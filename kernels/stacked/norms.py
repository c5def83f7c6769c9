"""Batch norms in evaluation mode: as a factor and a shift per channel, or folded into the weights of the layer before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

PARAMETERS = ("running_mean", "running_var", "weight", "bias")  # of a batch norm, by argument


class Norm(NamedTuple):
    """A batch norm: scale (x - mean) / sqrt(variance + eps) + shift, ``[M, C]`` each."""

    mean: Tensor
    variance: Tensor
    scale: Tensor | None
    shift: Tensor | None
    eps: float

    @classmethod
    def of(cls, read: Callable[[str], Any], eps: float) -> Norm:
        """The norm whose tensors ``read`` returns, one for each of ``PARAMETERS``."""
        mean, variance, scale, shift = (read(name) for name in PARAMETERS)
        return cls(mean, variance, scale, shift, eps)

    @property
    def factor(self) -> Tensor:
        """scale / sqrt(variance + eps)."""
        factor = torch.rsqrt(self.variance + self.eps)
        return factor if self.scale is None else factor * self.scale

    def factor_and_shift(self) -> tuple[Tensor, Tensor]:
        """The norm is factor * x + shift."""
        factor = self.factor
        return factor, -self.mean * factor if self.shift is None else torch.addcmul(self.shift, self.mean, factor, value=-1)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weights ``[M, out, ...]`` and biases ``[M, out]`` of a layer with the norm behind it: scale (w x + b - mean) + shift.

        b - mean comes first: the two are alike after training, and their products with the factor would cancel.
        """
        factor = self.factor
        moved = -self.mean if bias is None else bias - self.mean
        moved = moved * factor if self.shift is None else torch.addcmul(self.shift, moved, factor)
        return weight * factor.reshape(*factor.shape, *(1,) * (weight.ndim - 2)), moved


__all__ = ["PARAMETERS", "Norm"]
