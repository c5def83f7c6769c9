"""The training objective: contrastive, structural and behavioral terms, their units, and how they are added up.

The behavioral term itself is :func:`wslfast.batched_behavioral_loss`; what it is divided by is here. The composition is that
of arXiv 2503.17138, ``gamma L_C + (1 - gamma) (beta L_S + (1 - beta) L_B)``, whose weights only mean something once the terms
share a unit. The published code divides each term by its own first value on an untrained network; here every divisor is
computed from data, finite and positive, and can be logged, saved and set.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import check_positive, describe, present, require
from .population import Population
from .queries import TargetCache
from .queries.pool import uninformed_behavior
from .tokens import TokenLayout

Parts = dict[str, Tensor]


def structural_loss(reconstructed: Tensor, target: Tensor, mask: Tensor, layer_scale: Tensor | None = None) -> Tensor:
    """Mean squared difference over real weights: padding of either side takes no part, in value or gradient, even if it is NaN.

    Args:
        reconstructed, target: tokens ``[k, T, D]``.
        mask: ``[T, D]`` bool, True on real weights.
        layer_scale: factor of every squared difference, one per token ``[T]`` or an entry ``[T, D]``; for instance the inverse
            variance of the token's layer. None is 1. The divisor stays the number of real weights.

    Returns:
        A scalar, float32 or wider.

    Raises:
        WslfastError: where shapes do not fit.
    """
    require(
        reconstructed.ndim == 3 and reconstructed.shape == target.shape,
        f"reconstructed, target: expected two [k, T, D], got {describe(reconstructed)} and {describe(target)}",
    )
    require(
        mask.shape == target.shape[1:] and mask.dtype == torch.bool,
        f"mask: expected bool {list(target.shape[1:])}, got {describe(mask)}",
    )
    difference = torch.where(mask, _wide(reconstructed) - _wide(target), 0)  # before the square, or NaN * 0 reaches the gradient
    squares = difference.square()
    if layer_scale is not None:
        require(
            layer_scale.shape in (mask.shape, mask.shape[:1]),
            f"layer_scale: expected [{mask.shape[0]}] or {list(mask.shape)}, got {describe(layer_scale)}",
        )
        squares = squares * (layer_scale.unsqueeze(1) if layer_scale.ndim == 1 else layer_scale)
    return squares.sum() / (len(target) * mask.sum())


def nt_xent(a: Tensor, b: Tensor, temperature: float = 0.1) -> Tensor:
    """NT-Xent (Chen et al. 2020, SimCLR): each embedding has to find its partner among the other 2k - 1.

    Args:
        a, b: ``[k, d]`` embeddings of two views; row j of ``a`` and row j of ``b`` are partners. Any k >= 1; for k = 1 there is
            nothing to tell apart and the value is 0.
        temperature: divides the cosine similarities.

    Returns:
        Scalar: -log softmax probability of the partner, self excluded, averaged over the 2k anchors.
    """
    fits = a.ndim == 2 and a.shape == b.shape and len(a) > 0
    require(fits, f"a, b: expected two [k, d] with k >= 1, got {describe(a)} and {describe(b)}")
    require(0 < temperature < math.inf, f"temperature: expected a positive number, got {temperature!r}")
    k = len(a)
    with torch.autocast(a.device.type, enabled=False):  # similarities over 0.1 do not fit 8 bits of mantissa
        unit = F.normalize(torch.cat([_wide(a), _wide(b)]), dim=1, eps=1e-8)
        similarity = (unit @ unit.T / temperature).fill_diagonal_(-math.inf)
        partner = torch.arange(2 * k, device=a.device).roll(k)
        return F.cross_entropy(similarity, partner)


def term_weights(gamma: float = 0.05, beta: float = 0.1) -> tuple[float, float, float]:
    """Weights of the contrastive, structural and behavioral term: ``gamma, (1 - gamma) beta, (1 - gamma) (1 - beta)``."""
    for name, value in (("gamma", gamma), ("beta", beta)):
        require(isinstance(value, (int, float)) and 0 <= value <= 1, f"{name}: expected a number from 0 to 1, got {value!r}")
    return gamma, (1 - gamma) * beta, (1 - gamma) * (1 - beta)


@dataclass(frozen=True)
class Normalizers:
    """What each term is divided by: its value for a reconstruction (or embedding) that knows nothing of the model.

    Attributes:
        structural: variance of the target weights (in another metric, its own value for the zoo's mean).
        behavioral: the criterion's value for the models' mean output at each query, given for every model.
        contrastive: log(2k - 1), the value of embeddings that are all alike.
    """

    structural: float = 1.0
    behavioral: float = 1.0
    contrastive: float = 1.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            require(number and math.isfinite(value) and value > 0, f"normalizers: {name}: expected a finite positive number, got {value!r}")
            object.__setattr__(self, name, float(value))

    @classmethod
    def from_data(
        cls,
        population: Population,
        cache: TargetCache | None = None,
        *,
        batch_size: int,
        criterion: str = "mse",
        temperature: float = 2.0,
    ) -> Normalizers:
        """The normalisers of a training population.

        Args:
            population: the training models. ``structural`` is the variance of each weight over models, averaged over weights:
                the structural loss of answering every model with the population's mean. Of one model alone, the loss of answering zero.
            cache: the training models' outputs; None (no behavioral term) leaves ``behavioral`` at 1.
            batch_size: k, models in a batch (pairs of views), for ``contrastive``; 1 gives 1.
            criterion, temperature: of the behavioral loss.

        Raises:
            WslfastError: where a unit would be zero or not finite, as for models that are all alike.
        """
        check_positive("batch_size", batch_size)
        weights = population.weights
        structural = float((weights.var(0, unbiased=False).double() if len(weights) > 1 else weights.double().square()).mean())
        behavioral = 1.0 if cache is None else uninformed_behavior(cache.outputs, criterion, temperature)
        return cls(structural, behavioral, math.log(2 * batch_size - 1) if batch_size > 1 else 1.0)

    def to_dict(self) -> dict[str, float]:
        """JSON-able form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Normalizers:
        """The inverse of :meth:`to_dict`. Raises WslfastError for unknown or missing names."""
        names = {"structural", "behavioral", "contrastive"}
        require(isinstance(record, Mapping) and set(record) == names, f"normalizers: expected {sorted(names)}, got {record!r}")
        return cls(**record)


def layer_units(population: Population, layout: TokenLayout) -> Tensor:
    """Factor ``[T]`` of each token's squared differences that gives every layer one unit: the variance of each weight over models,
    averaged over all weights, over its average within the token's layer. So :attr:`Normalizers.structural` stays the value of answering
    every model with the population's mean. 1 for a layer that never varies."""
    variance = population.weights.double().var(0, unbiased=False)
    tokens, mask, _ = layout.tokenize(variance[None])
    layer = layout.token_layer.to(variance.device)
    total, count = (torch.zeros(len(layout.layers), dtype=torch.float64, device=variance.device) for _ in range(2))
    total.index_add_(0, layer, torch.where(mask, tokens[0], 0).sum(1))
    count.index_add_(0, layer, mask.sum(1).double())
    own = total / count
    return torch.where(own > 0, variance.mean() / own, 1.0)[layer].float()


def compose(
    contrastive: Tensor | None,
    structural: Tensor | None,
    behavioral: Tensor | None,
    normalizers: Normalizers,
    gamma: float = 0.05,
    beta: float = 0.1,
) -> tuple[Tensor, Parts]:
    """``gamma L_C/N_C + (1 - gamma) (beta L_S/N_S + (1 - beta) L_B/N_B)`` (arXiv 2503.17138).

    A term of weight zero may be None and never enters the graph, so that a non-finite one cannot reach the total.

    Returns:
        The total, and the parts, detached: ``"loss"`` and, for each term given, its value divided by its normaliser.

    Raises:
        WslfastError: if a term with a weight is None, or if no term has one.
    """
    terms = {"contrastive": contrastive, "structural": structural, "behavioral": behavioral}
    total: Tensor | None = None
    parts: Parts = {}
    for weight, (name, term) in zip(term_weights(gamma, beta), terms.items(), strict=True):
        if term is not None:
            term = term / getattr(normalizers, name)
            parts[name] = term.detach()
        if weight == 0:
            continue
        term = present(term, f"{name}: has weight {weight:g} (gamma={gamma:g}, beta={beta:g}) but is None")
        total = weight * term if total is None else total + weight * term
    assert total is not None  # the weights add up to one
    return total, {"loss": total.detach(), **parts}


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
