"""Weights and biases of a layer with the batch norm behind it, each a call of its own, and their gradients written out.

Arguments are named as the operators name them: ``weight`` and ``bias`` of the layer, ``norm_running_mean`` and so on of the norm. The
twins are the forward functions under autograd.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .calls import Values
from .norms import PARAMETERS, Norm
from .rules import Gradients


@dataclass(frozen=True)
class FoldedWeight:
    """The rule (``rules.py``) of :meth:`Norm.folded_weight`."""

    eps: float

    def forward(self, a: Values, models: int) -> tuple[Tensor, Any]:
        norm = _norm_of(a, self.eps)
        return norm.folded_weight(a["weight"]), (norm, a["weight"])

    def backward(self, g: Tensor, saved: tuple[Norm, Tensor], models: int) -> Gradients:
        norm, weight = saved
        return _named(norm, (g * weight).flatten(2).sum(2), weight=norm.folded_weight(g))


@dataclass(frozen=True)
class Factor:
    """The rule of :attr:`Norm.factor`, for a layer whose outputs are fewer than its weights: they take the factor instead."""

    eps: float

    def forward(self, a: Values, models: int) -> tuple[Tensor, Any]:
        norm = _norm_of(a, self.eps)
        return norm.factor, norm

    def backward(self, g: Tensor, saved: Norm, models: int) -> Gradients:
        return _named(saved, g)


@dataclass(frozen=True)
class FoldedBias:
    """The rule of :meth:`Norm.folded_bias`."""

    eps: float

    def forward(self, a: Values, models: int) -> tuple[Tensor, Any]:
        norm, bias = _norm_of(a, self.eps), a.get("bias")
        return norm.folded_bias(bias), (norm, bias)

    def backward(self, g: Tensor, saved: tuple[Norm, Tensor | None], models: int) -> Gradients:
        norm, bias = saved
        moved = g * norm.factor
        return _named(norm, g * norm.centered(bias), bias=None if bias is None else moved, norm_running_mean=-moved, norm_bias=g)


def _norm_of(a: Values, eps: float) -> Norm:
    return Norm.of(lambda name: a.get(f"norm_{name}"), eps)


def _named(norm: Norm, of_factor: Tensor, **others: Tensor | None) -> Gradients:
    """Gradients by argument, those of what the factor is made of included."""
    _, variance, scale, _ = (f"norm_{name}" for name in PARAMETERS)
    of_variance, of_scale = norm.slopes_of_factor(of_factor)
    if norm.shift is None:
        others.pop("norm_bias", None)
    return {name: slope for name, slope in {variance: of_variance, scale: of_scale, **others}.items() if slope is not None}


__all__ = ["Factor", "FoldedBias", "FoldedWeight"]
