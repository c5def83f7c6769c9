"""The activation metric as a loss, and as the coordinates that a weight autoencoder works in.

A row e of weights (one output channel and its bias) changes its layer's responses to inputs x by ``e x``. With C the second moment of
the layer's inputs, ``E |e x|^2 = e C e^T``: the layer-wise Gauss-Newton approximation of behavior, quadratic in the weights, so that a
decoder that descends it has one best answer a model and no way to answer all models alike. C is an average over training models and
query images, made once.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import require
from ..population import Population
from ..tokens import TokenLayout
from .graph_inputs import graph_second_moments
from .layer_inputs import good_models, input_second_moments, output_sensitivity, root, spaced
from .linear import check_fitted, deviations, principal, row_moments
from .token_groups import TokenGroups

UNITS = ("zoo", "layer", "outputs")
_QUERIES, _CHUNK = 512, 256


class Coordinates(nn.Module):
    """A fixed affine change of coordinates of the rows of every token group, and back: buffers, zero beyond a group's columns.

    Args:
        groups: tokens that share one.
        token_size: D.
    """

    shift: Tensor
    forward_map: Tensor
    inverse_map: Tensor
    of_token: Tensor

    def __init__(self, groups: TokenGroups, token_size: int) -> None:
        super().__init__()
        self.groups = groups
        self.register_buffer("shift", torch.zeros(len(groups), token_size))
        self.register_buffer("forward_map", torch.zeros(len(groups), token_size, token_size))
        self.register_buffer("inverse_map", torch.zeros(len(groups), token_size, token_size))
        self.register_buffer("of_token", groups.of_token, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Weights ``[k, T, D]`` in these coordinates, float32."""
        with torch.autocast(tokens.device.type, enabled=False):  # 1 % of error in the weights already costs agreement
            return self.groups.linear(tokens.float() - self.shift[self.of_token], self.forward_map)

    def inverse(self, coordinates: Tensor) -> Tensor:
        """The weights ``[k, T, D]`` that have these coordinates."""
        with torch.autocast(coordinates.device.type, enabled=False):
            return self.groups.linear(coordinates.float(), self.inverse_map) + self.shift[self.of_token]


class ActivationMetric:
    """The second moments of a zoo's layer inputs, as a structural loss and as coordinates.

    Args:
        population: training models, finite. Of networks that are no plain chain, layers that are neither linear nor ungrouped
            convolutions (norms, their statistics) count as they are.
        images: ``[n, *input_shape]``, of which at most 512, evenly spaced, are used.
        layout: how models become tokens.
        unit: what a layer's error counts. ``"zoo"``: its change of responses as it is. ``"layer"``: in units of the responses'
            variance over the zoo, layers by their numbers of weights. ``"outputs"``: what it does to the networks' outputs, measured
            (a unit of random error in that layer alone).
        views: whether coordinates are centred on the mean row over all permuted views.
        models: training models whose activations make C, drawn from the better half.
        damping: added to C, as a share of its mean eigenvalue.
        seed: of that draw.

    Attributes:
        maps: of each layer ``[width, width]``, so that its part of the loss is ``|row difference @ map|^2`` summed over its rows.
        spread: the loss of answering every training model with their mean (one model alone: with zero).

    Raises:
        WslfastError: a network that cannot be traced, or an unknown unit.
    """

    def __init__(
        self,
        population: Population,
        images: Tensor,
        layout: TokenLayout,
        *,
        unit: str = "zoo",
        views: bool = True,
        models: int = 24,
        damping: float = 1e-3,
        seed: int = 0,
    ) -> None:
        architecture, weights = population.architecture, population.weights
        require(
            architecture.graph is not None,
            f"the activation metric (structure_metric, coordinates): architecture {architecture.name!r} cannot be traced, so its layers' "
            "inputs cannot be followed; use plain",
        )
        check_fitted(population, damping)
        require(unit in UNITS, f"unit: expected one of {UNITS}, got {unit!r}")
        self.layout, self.groups, self.views, self.damping = layout, TokenGroups(layout), views, damping
        chosen, images = weights[good_models(population, models, seed).to(weights.device)], spaced(images, _QUERIES)
        moments = input_second_moments if architecture.planned else graph_second_moments
        self._moments = moments(chosen, images, architecture)
        halves = [root(c, damping)[0] for c in self._moments]
        spreads = self._spreads(weights, halves)
        worth = [1.0] * len(halves)
        if unit == "layer":
            rows = [span.channels * len(half) for span, half in zip(self.groups.spans, halves, strict=True)]
            worth = [n / sum(rows) / s if s > 0 else 1.0 for n, s in zip(rows, spreads, strict=True)]
        elif unit == "outputs":
            roots = [root(c, damping) for c in self.groups.cut(self._moments)]
            of_groups = output_sensitivity(chosen, images, self.groups, roots, seed)
            worth = [of_groups[span.first] for span in self.groups.spans]
        self.maps = [(half * w**0.5).float() for half, w in zip(halves, worth, strict=True)]
        self.spread = sum(w * s for w, s in zip(worth, spreads, strict=True))

    def _spreads(self, weights: Tensor, halves: list[Tensor]) -> list[float]:
        """Of each layer, ``|(row - mean row) C^(1/2)|^2`` summed over rows, a model."""
        mean = weights.double().mean(0) if len(weights) > 1 else torch.zeros_like(weights[0], dtype=torch.float64)
        totals = [0.0] * len(halves)
        for chunk in weights.split(_CHUNK):
            rows = self.groups.rows(self.layout.tokenize(chunk.double() - mean).tokens)
            for i, (own, half) in enumerate(zip(rows, halves, strict=True)):
                totals[i] += float((own.double() @ half).square().sum())
        return [total / len(weights) for total in totals]

    def loss(self, reconstructed: Tensor, target: Tensor) -> Tensor:
        """``sum over layers and rows of e C e^T``, e the difference of two ``[k, T, D]``, times the layer's worth; the mean over
        models. Padding takes no part. A scalar."""
        difference = self.groups.rows(torch.where(self.layout.mask.to(target.device), reconstructed.float() - target.float(), 0))
        parts = [(rows @ m).square().sum() for rows, m in zip(difference, self.maps, strict=True)]
        return torch.stack(parts).sum() / len(target)

    def coordinates(self, population: Population) -> Coordinates:
        """``t = (w - mean row) C^(1/2) V / s``: the principal coordinates of a group's rows in the metric, each of unit variance (those
        that hardly vary, less). So a random map sees all of them, and an optimiser's step is one size for all, where their variances differ
        by a factor of thousands. What couples two pieces of a cut row is left out."""
        center, covariance = row_moments(population.weights, self.groups, self.views)
        roots = [root(moment, self.damping) for moment in self.groups.cut(self._moments)]
        made = Coordinates(self.groups, self.layout.token_size).to(population.weights.device)
        for g, (values, vectors) in enumerate(zip(*principal(covariance, roots), strict=True)):
            (half, inverse), n, deviation = roots[g], self.groups.sizes[g], deviations(values)
            made.shift[g, :n] = center[g].float()
            made.forward_map[g, :n, :n] = (half @ vectors / deviation).float()
            made.inverse_map[g, :n, :n] = (deviation[:, None] * vectors.mT @ inverse).float()
        return made
