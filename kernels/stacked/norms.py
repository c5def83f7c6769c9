"""Batch norms in evaluation mode: as a factor and a shift per channel, or folded into the weights of the layer before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

PARAMETERS = ("running_mean", "running_var", "weight", "bias")  # of a batch norm, by argument


@dataclass
class Norm:
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

    @cached_property
    def root(self) -> Tensor:
        """1 / sqrt(variance + eps)."""
        return torch.rsqrt(self.variance + self.eps)

    @cached_property
    def factor(self) -> Tensor:
        """scale / sqrt(variance + eps)."""
        return self.root if self.scale is None else self.root * self.scale

    def centered(self, bias: Tensor | None) -> Tensor:
        """Bias less mean."""
        return -self.mean if bias is None else bias - self.mean

    def factor_and_shift(self) -> tuple[Tensor, Tensor]:
        """The norm is factor * x + shift."""
        factor = self.factor
        return factor, -self.mean * factor if self.shift is None else torch.addcmul(self.shift, self.mean, factor, value=-1)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weights ``[M, out, ...]`` and biases ``[M, out]`` of a layer with the norm behind it: scale (w x + b - mean) + shift.

        b - mean comes first: the two are alike after training, and their products with the factor would cancel.
        """
        return self.folded_weight(weight), self.folded_bias(bias)

    def folded_weight(self, weight: Tensor) -> Tensor:
        """The first of :meth:`fold`; its own gradient is made of the output's in the same way."""
        return weight * self.factor.reshape(*self.factor.shape, *(1,) * (weight.ndim - 2))

    def folded_bias(self, bias: Tensor | None) -> Tensor:
        """The second of :meth:`fold`."""
        moved = self.centered(bias)
        return moved * self.factor if self.shift is None else torch.addcmul(self.shift, moved, self.factor)

    def fold_slopes(
        self, g: Tensor, of_bias: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor | None, Tensor]]:
        """Gradients of weight, bias and ``PARAMETERS`` from those of what :meth:`fold` makes."""
        of_moved = of_bias * self.factor
        of_factor = torch.addcmul((g * weight).flatten(2).sum(2), of_bias, self.centered(bias))
        return self.folded_weight(g), of_moved, (-of_moved, *self.slopes_of_factor(of_factor), of_bias)

    def slopes_of_both(self, of_factor: Tensor, of_shift: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Gradients of ``PARAMETERS`` from those of :meth:`factor_and_shift`."""
        of_factor = torch.addcmul(of_factor, of_shift, self.mean, value=-1)
        return -of_shift * self.factor, *self.slopes_of_factor(of_factor), of_shift

    def slopes_of_factor(self, g: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gradients of variance and scale from that of the factor."""
        of_root = g * self.root
        of_variance = of_root * self.factor
        return of_variance.mul_(self.root).mul_(-0.5), None if self.scale is None else of_root


__all__ = ["PARAMETERS", "Norm"]
