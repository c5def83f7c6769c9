"""A closed-form linear code of a zoo: per-layer PCA with water-filled widths, no training.

The *plain* code keeps the directions in which weights vary most. The *activation* metric measures a weight error by what it
does to its layer's output: with C the second moment of the layer's inputs, ``E ||e x||^2 = e C e^T``, so PCA is done on
``t = w C^(1/2)`` and decoded by ``C^(-1/2)``. That is the layer-wise idea of GPTQ-like quantisers (Frantar et al. 2023), and
behavioral information without a gradient step. Either code is a baseline for, and a start of, a trained autoencoder.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, Union

import torch
import torch.nn.functional as F
from torch import Tensor

from ..architecture import Architecture
from ..errors import describe, require
from ..permutation import hidden_channels, random_views
from ..population import Population
from ..queries import QueryPool
from ..tokens import TokenLayout, layout
from .layer_inputs import good_models, hidden_inputs, input_second_moments, output_sensitivity, root, spaced, symmetrise
from .token_groups import TokenGroups

METRICS = ("plain", "activation")
WIDTHS = ("water-filling", "equal")
_QUERIES = 512  # images that make the metric, of however many are given
_VIEWS = 8  # of each model, where permutations are drawn
_ROUNDING = 1e-12  # of the largest variance: below, a variance is what rounding has left of none
_FLOOR = 1e-3  # a latent is never scaled up by more than this much against its group's strongest one


class LinearCodec:
    """Encoder and decoder of models, fitted to a training population.

    Args:
        population: training models, finite.
        latent: size of the code: a share of P if a float in (0, 1], numbers a model if an int.
        metric: ``"plain"`` or ``"activation"`` (a planned architecture only).
        queries: images ``[n, *input_shape]`` or a QueryPool, for the activation metric; a few hundred do, and at most 512, evenly
            spaced, are used.
        token_size: as in :class:`TokenLayout`; rows longer than it are cut, and each piece has a code of its own.
        widths: ``"water-filling"`` keeps, over all layers, the components with the most variance a number (in the activation
            metric: the most effect on the networks' outputs); ``"equal"`` gives every token the same width (a shorter row at
            most its own).
        max_width: upper bound of any token's width.
        views: fit on every permuted view of every training model, in closed form (of a network that is no plain chain of layers, on a
            few views of each, drawn at random); False fits on the models as stored. No effect on modules that cannot be traced.
        models: training models whose activations make the metric, drawn from the better half.
        damping: added to C, as a share of its mean eigenvalue: directions that no query excites still count a little.
        seed: of that draw.

    Attributes:
        layout, architecture: what is encoded.
        groups: tokens that share a map: one group a layer, or one a piece where rows are cut.
        widths: latent width of each group (so, without cut rows, of each layer).
        latent_size: latent numbers a model: the sum over tokens of their group's width; at most the budget.
        mask: ``[T, W]`` bool, True where a latent number is one.
        center: ``[G, D]``, each group's mean row. scale: ``[G]``, the standard deviation about it.
        encoder, decoder: ``[G, D, W]``, ``[G, W, D]``; latents have about unit variance over the training population.

    Raises:
        WslfastError: naming the argument, what was expected and what came.
    """

    linear = True  # the same maps for every model

    def __init__(
        self,
        population: Population,
        *,
        latent: Union[float, int] = 0.55,
        metric: str = "plain",
        queries: Tensor | QueryPool | None = None,
        token_size: int = 0,
        widths: str = "water-filling",
        max_width: int | None = None,
        views: bool = True,
        models: int = 24,
        damping: float = 1e-3,
        seed: int = 0,
    ) -> None:
        check_fitted(population, damping)
        require(metric in METRICS, f"metric: expected one of {METRICS}, got {metric!r}")
        require(widths in WIDTHS, f"widths: expected one of {WIDTHS}, got {widths!r}")
        require(max_width is None or max_width >= 1, f"max_width: expected a positive integer or None, got {max_width!r}")
        self._place(layout(population.architecture, token_size))
        self.metric = metric
        budget = budget_of(latent, int(self.layout.mask.sum()))
        device = population.weights.device

        center, covariance = row_moments(population.weights, self.groups, views)
        sizes = self.groups.sizes
        self.scale = scales(covariance)
        roots = [(torch.eye(n, dtype=torch.float64, device=device),) * 2 for n in sizes]
        importance = [1.0] * len(sizes)
        if metric == "activation":
            roots, importance = self._activation_metric(population, queries, models, damping, seed)
        values, vectors = principal(covariance, roots)
        most = [n if max_width is None else min(n, max_width) for n in sizes]
        choose = water_filling if widths == "water-filling" else equal_widths
        worth = [v[:m] * i for v, m, i in zip(values, most, importance, strict=True)]
        self.widths = choose(worth, self.groups.members, budget)
        self._fill(center, roots, values, vectors, budget)

    def _fill(
        self, center: list[Tensor], roots: list[tuple[Tensor, Tensor]], values: list[Tensor], vectors: list[Tensor], budget: int
    ) -> None:
        """The maps, from every group's mean row, root of its metric, and components."""
        sizes, wide, device = self.groups.sizes, self.layout.token_size, center[0].device
        width = max(self.widths)
        require(width > 0, f"latent: {budget} numbers a model buy no component; the cheapest costs {min(self.groups.members)}")
        self.center = torch.zeros(len(sizes), wide, dtype=torch.float32, device=device)
        self.encoder = torch.zeros(len(sizes), wide, width, dtype=torch.float32, device=device)
        self.decoder = torch.zeros(len(sizes), width, wide, dtype=torch.float32, device=device)
        for g, (n, w) in enumerate(zip(sizes, self.widths, strict=True)):
            half, inverse = roots[g]
            deviation = deviations(values[g])[:w]
            self.center[g, :n] = center[g].float()
            self.encoder[g, :n, :w] = (half @ vectors[g][:, :w] / deviation).float()
            self.decoder[g, :w, :n] = (deviation.unsqueeze(1) * vectors[g][:, :w].T @ inverse).float()
        self._finish()

    def _place(self, place: TokenLayout) -> None:
        require(place.complete, f"architecture {place.architecture.name!r}: some of its weights have no token; it cannot be encoded")
        self.layout, self.architecture, self.groups = place, place.architecture, TokenGroups(place)

    def _finish(self) -> None:
        width = self.encoder.shape[2]
        rows = torch.arange(width) < torch.tensor(self.widths).unsqueeze(1)  # [G, W]
        self.mask = rows[self.groups.of_token].to(self.encoder.device)
        self.latent_size = int(self.mask.sum())

    def _activation_metric(
        self, population: Population, queries: Tensor | QueryPool | None, models: int, damping: float, seed: int
    ) -> tuple[list[tuple[Tensor, Tensor]], list[float]]:
        """``C^(1/2), C^(-1/2)`` of every group (its layer's C, cut to the columns of its piece: what couples two pieces of a row is
        left out), and what a unit of error in it does to the networks' outputs."""
        images = queries.images if isinstance(queries, QueryPool) else queries
        require(isinstance(images, Tensor), f"queries: expected images for metric='activation', got {describe(images)}")
        assert images is not None
        images = spaced(images, _QUERIES)
        weights = population.weights[good_models(population, models, seed).to(population.weights.device)]
        roots = [root(c, damping) for c in self.groups.cut(input_second_moments(weights, images, self.architecture))]
        return roots, output_sensitivity(weights, images, self.groups, roots, seed)

    def __repr__(self) -> str:
        return (
            f"LinearCodec({self.architecture.name!r}, metric={self.metric!r}, latent_size={self.latent_size} "
            f"of {int(self.layout.mask.sum())}, widths={list(self.widths)})"
        )

    def encode(self, weights: Tensor) -> Tensor:
        """``[k, P] -> [k, T, W]``, zero where ``mask`` is False; differentiable."""
        tokens = self.layout.tokenize(weights).tokens
        center, encoder = (t.to(tokens.dtype) for t in (self.center, self.encoder))
        return self.groups.linear(tokens - center[self.groups.of_token.to(center.device)], encoder)

    def decode(self, latents: Tensor) -> Tensor:
        """``[k, T, W] -> [k, P]``; differentiable. What lies outside ``mask`` is ignored."""
        self._check_latents(latents)
        center, decoder = (t.to(latents.dtype) for t in (self.center, self.decoder))
        tokens = self.groups.linear(torch.where(self.mask, latents, 0), decoder)
        return self.layout.detokenize(tokens + center[self.groups.of_token.to(center.device)])

    def _check_latents(self, latents: Tensor) -> None:
        shape = tuple(self.mask.shape)
        require(
            isinstance(latents, Tensor) and latents.ndim == 3 and tuple(latents.shape[1:]) == shape and latents.is_floating_point(),
            f"latents: expected floating [k, {shape[0]}, {shape[1]}], got {describe(latents)}",
        )

    def reconstruct(self, weights: Tensor) -> Tensor:
        """``decode(encode(weights))``."""
        return self.decode(self.encode(weights))

    def to(self, device: torch.device | str) -> LinearCodec:
        """The same codec with its tensors on ``device``."""
        other = copy.copy(self)
        for name in ("center", "scale", "encoder", "decoder", "mask"):
            setattr(other, name, getattr(self, name).to(device))
        return other

    def state(self) -> dict[str, Any]:
        """Tensors, numbers and strings alone: ``torch.save`` it, load it with ``weights_only=True``, rebuild with :meth:`from_state`."""
        tensors = {name: getattr(self, name) for name in ("center", "scale", "encoder", "decoder")}
        return {
            "architecture": self.architecture.to_dict(),
            "token_size": self.layout.token_size,
            "metric": self.metric,
            "widths": list(self.widths),
            **tensors,
        }

    @classmethod
    def from_state(cls, architecture: Architecture | None, state: Mapping[str, Any]) -> LinearCodec:
        """Rebuild a codec from :meth:`state`; ``architecture`` may be None unless it is an opaque one that a state cannot
        describe. Raises WslfastError for a state that does not fit its architecture."""
        expected = {"architecture", "token_size", "metric", "widths", "center", "scale", "encoder", "decoder"}
        require(isinstance(state, Mapping) and set(state) == expected, f"state: expected keys {sorted(expected)}, got {describe(state)}")
        codec = cls.__new__(cls)
        codec._place(layout(architecture or Architecture.from_dict(state["architecture"]), int(state["token_size"])))
        codec.metric, codec.widths = str(state["metric"]), tuple(int(w) for w in state["widths"])
        g, d, w = len(codec.groups), codec.layout.token_size, max(codec.widths, default=0)
        shapes = {"center": (g, d), "scale": (g,), "encoder": (g, d, w), "decoder": (g, w, d)}
        for name, shape in shapes.items():
            value = state[name]
            require(
                isinstance(value, Tensor) and tuple(value.shape) == shape and len(codec.widths) == g,
                f"state[{name!r}]: expected {list(shape)}, got {describe(value)}",
            )
            setattr(codec, name, value)
        codec._finish()
        return codec


def scales(covariance: list[Tensor]) -> Tensor:
    """``[G]``: the standard deviation of every group's numbers; 1 for one that never varies."""
    scale = torch.stack([c.diagonal().mean().sqrt() for c in covariance])
    return torch.where(scale > 0, scale, 1.0).float()


def principal(covariance: list[Tensor], roots: list[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    """Variances ``[..., n]``, falling, and directions ``[..., n, n]`` (columns) of ``t = w C^(1/2)``, of every group."""
    pairs = [torch.linalg.eigh(half @ sigma @ half) for sigma, (half, _) in zip(covariance, roots, strict=True)]
    return [v.flip(-1).clamp_min(0) for v, _ in pairs], [basis.flip(-1) for _, basis in pairs]


def deviations(variances: Tensor) -> Tensor:
    """Square roots of falling variances, none smaller than a small share of the first; ones where nothing varies."""
    deviation = variances.sqrt()
    return deviation.clamp_min(float(deviation[0]) * _FLOOR if deviation[0] > 0 else 1.0)


def check_fitted(population: Population, damping: float) -> None:
    """Raise WslfastError unless a code can be fitted to the population with that damping."""
    require(isinstance(population, Population), f"population: expected a Population, got {describe(population)}")
    require(len(population) > 0, "population: expected at least one model, got none")
    require(damping > 0, f"damping: expected a positive number, got {damping!r}")
    bad = (~population.weights.isfinite().all(1)).nonzero().flatten().tolist()
    require(not bad, f"population: models {bad[:10]} have non-finite weights; leave them out")


def budget_of(latent: Union[float, int], total: int) -> int:
    """Numbers a model that ``latent`` stands for, of ``total``."""
    number = isinstance(latent, (int, float)) and not isinstance(latent, bool)
    ok = number and (0 < latent <= 1 if isinstance(latent, float) else 0 < latent <= total)
    require(ok, f"latent: expected a share in (0, 1] (float) or 1 to {total} numbers a model (int), got {latent!r}")
    return round(latent * total) if isinstance(latent, float) else latent


def row_moments(weights: Tensor, groups: TokenGroups, views: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Mean row ``[n]`` and covariance ``[n, n]`` (float64) of every group, over channels, models and, with ``views``, over every
    permutation of a layer's input channels; of a network that is no plain chain of layers, over views drawn at random."""
    architecture = groups.layout.architecture
    inputs = hidden_inputs(architecture) if views and architecture.planned else None
    # permutations mix the pieces of a cut row, so they need the moments of whole rows; else the pieces' own are enough
    rows_of = groups.rows if inputs else groups.split
    total: list[Tensor] = []
    square: list[Tensor] = []
    for chunk in _drawn_views(weights, architecture) if views and not architecture.planned else weights.split(256):
        for g, rows in enumerate(rows_of(groups.layout.tokenize(chunk).tokens)):
            rows = rows.flatten(0, 1).double()
            if g == len(total):
                total.append(rows.new_zeros(rows.shape[1]))
                square.append(rows.new_zeros(rows.shape[1], rows.shape[1]))
            total[g] += rows.sum(0)
            square[g] += rows.T @ rows
    k = len(weights) * (_VIEWS if views and not architecture.planned and hidden_channels(architecture) else 1)
    counts = [k * s.channels for s in groups.spans] if inputs else [k * m for m in groups.members]
    means = [t / c for t, c in zip(total, counts, strict=True)]
    moments = [s / c for s, c in zip(square, counts, strict=True)]
    if inputs:
        # the moment of [row, 1] holds the mean as its last column, so one function averages both over permutations
        full = [torch.cat([torch.cat([s, m[:, None]], 1), F.pad(m, (0, 1), value=1.0)[None]]) for s, m in zip(moments, means, strict=True)]
        full = [symmetrise(f, *hidden, extra=1) for f, hidden in zip(full, inputs, strict=True)]
        means = groups.cut([f[:-1, -1] for f in full])
        moments = groups.cut([f[:-1, :-1] for f in full])
    return means, [s - torch.outer(m, m) for s, m in zip(moments, means, strict=True)]


def _drawn_views(weights: Tensor, architecture: Architecture) -> Iterator[Tensor]:
    """Views of every model, some at a time; the models themselves where nothing may be permuted."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(_VIEWS if hidden_channels(architecture) else 1):
        for chunk in weights.split(256):
            yield random_views(chunk, architecture, generator)


def water_filling(variances: list[Tensor], costs: tuple[int, ...], budget: int) -> tuple[int, ...]:
    """Components of each group to keep, so that what is kept has the most variance a latent number.

    A component of a group costs one number for each of the group's tokens and holds that many times its variance, so
    components are taken by falling variance; one that no longer fits is passed over for cheaper ones. What rounding has left of no
    variance at all is none, and of those the first group's come first: else each machine would choose others.

    Args:
        variances: of each group's components, falling.
        costs: tokens of each group.
        budget: numbers a model; never exceeded, and no component that would still fit is left out.
    """
    least = _ROUNDING * max((float(values.max()) for values in variances if len(values)), default=0.0)
    found = ((float(v), g) for g, values in enumerate(variances) for v in values)
    order = sorted(((-v if v > least else 0.0, g) for v, g in found), key=lambda item: item[0])
    widths, left = [0] * len(costs), budget
    for _, g in order:
        if costs[g] <= left:
            widths[g] += 1
            left -= costs[g]
    return tuple(widths)


def equal_widths(variances: list[Tensor], costs: tuple[int, ...], budget: int) -> tuple[int, ...]:
    """The widest equal width within the budget; a group with fewer components keeps those it has."""
    most = [len(v) for v in variances]
    best = 0
    for width in range(1, max(most) + 1):
        if sum(c * min(width, m) for c, m in zip(costs, most, strict=True)) > budget:
            break
        best = width
    return tuple(min(best, m) for m in most)
