"""A code whose metric is each model's own: the decoder runs what it has decoded, and so knows what the next layer will see.

The activation metric of :class:`LinearCodec` is an average over models. Here layers are decoded one after another. The queries, which
are part of the code as its matrices are, run through the layers decoded so far; the second moment C of what reaches the next layer
is then known on both sides, and that layer's rows are coded in the directions that matter for *this* model. No latent number is spent
on saying which those are. The encoder does the same, so it also knows the decoder's errors in earlier layers and asks each layer for
the rows that undo as much of them as they can (sequential compensation, as layer-wise quantisers do: Frantar et al. 2023).

Nothing is trained, and nothing but the latent tells the decoder about the model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Union

import torch
from torch import Tensor

from ..architecture import Architecture
from ..errors import describe, require
from ..kernels.layers import Conv2d, Layer
from ..population import Population
from ..queries import QueryPool
from ..tokens import layout
from .layer_inputs import good_models, hidden_inputs, output_sensitivity, root, spaced, symmetrise, weighted_layers, without_weights
from .linear import LinearCodec, budget_of, check_fitted, deviations, principal, row_moments, scales, water_filling
from .token_groups import TokenGroups

_QUERIES = 256
_CHUNK_BYTES = 1 << 26  # patches of all queries, of as many models at once


class AdaptiveCodec(LinearCodec):
    """Encoder and decoder of models, layer by layer in the metric of the model's own activations.

    Latents keep the coordinates of the average code: a model's own directions are turned among themselves towards the average
    ones (orthogonal Procrustes), so latents of different models compare, and a sign or a near-tie among eigenvalues changes nothing. (Of a
    model whose activations are next to nothing the turn itself is left to rounding: its outputs are kept, its weights less so.)
    It is not a linear map, and no gradient flows through it.

    Args:
        population: training models, finite, of a planned architecture without grouped convolutions.
        queries: images ``[n, *input_shape]`` or a QueryPool; at most 256, evenly spaced, become part of the code.
        latent: size of the code: a share of P if a float in (0, 1], numbers a model if an int.
        token_size: as in :class:`TokenLayout`; of a cut row each piece has a code of its own.
        views: fit the mean and the covariance of rows on every permuted view of every training model.
        models: training models, drawn from the better half, whose spectra set the latent widths.
        damping: added to C, as a share of its mean eigenvalue.
        compensate: ask each layer to undo the errors of those before it.
        seed: of the draw of models.

    Attributes:
        As of :class:`LinearCodec`; ``encoder`` and ``decoder`` are the average code's, a first-order picture of this one.

    Raises:
        WslfastError: naming the argument, what was expected and what came.
    """

    linear = False

    def __init__(
        self,
        population: Population,
        *,
        queries: Tensor | QueryPool,
        latent: Union[float, int] = 0.55,
        token_size: int = 0,
        views: bool = True,
        models: int = 24,
        damping: float = 1e-3,
        compensate: bool = True,
        seed: int = 0,
    ) -> None:
        check_fitted(population, damping)
        images = queries.images if isinstance(queries, QueryPool) else queries
        shape = population.architecture.input_shape
        require(
            isinstance(images, Tensor) and images.is_floating_point() and tuple(images.shape[1:]) == shape and len(images) > 0,
            f"queries: expected floating [n, {', '.join(map(str, shape))}], got {describe(images)}",
        )
        self._place(layout(population.architecture, token_size))
        self.metric, self.damping, self.compensate = "adaptive", float(damping), bool(compensate)
        budget = budget_of(latent, int(self.layout.mask.sum()))
        weights = population.weights
        self.queries = spaced(images, _QUERIES).to(weights.device, torch.float32)

        center, covariance = row_moments(weights, self.groups, views)
        self.scale = scales(covariance)
        chosen = weights[good_models(population, models, seed).to(weights.device)]
        own = self._own_moments(chosen)
        alive = torch.stack([m.isfinite().all((1, 2)).expand(len(chosen)) for m in own]).all(0)
        require(bool(alive.any()), "queries: none of the models drawn has finite activations on them")
        chosen, own = chosen[alive], [m[alive] if len(m) > 1 else m for m in own]
        average = [symmetrise(m.mean(0), *hidden) for m, hidden in zip(own, hidden_inputs(self.architecture), strict=True)]
        own_roots = [root(piece, damping) for layer, m in enumerate(own) for piece in _pieces(self.groups, layer, m)]
        importance = output_sensitivity(chosen, self.queries, self.groups, own_roots, seed)
        spectra = [v.mean(0) for v in principal(covariance, own_roots)[0]]
        self.widths = water_filling([s * i for s, i in zip(spectra, importance, strict=True)], self.groups.members, budget)
        roots = [root(m, damping) for m in self.groups.cut(average)]
        values, vectors = principal(covariance, roots)
        self._fill(center, roots, values, vectors, budget)
        g, d, w = self.encoder.shape
        self.prior, self.reference = (torch.zeros(g, d, n, dtype=torch.float64, device=weights.device) for n in (d, w))
        self.deviation = torch.ones(g, w, dtype=torch.float64, device=weights.device)
        for i, (n, width) in enumerate(zip(self.groups.sizes, self.widths, strict=True)):
            self.prior[i, :n, :n], self.reference[i, :n, :width] = covariance[i], vectors[i][:, :width]
            self.deviation[i, :width] = deviations(values[i])[:width]

    def _place(self, place: Any) -> None:
        super()._place(place)
        architecture = self.architecture
        require(architecture.planned, f"architecture {architecture.name!r}: not a plain chain of layers; use LinearCodec(metric='plain')")
        self.head, self.weighted = weighted_layers(architecture)
        grouped = [w.layer.name for w in self.weighted if w.groups > 1]
        require(not grouped, f"architecture {architecture.name!r}: expected no grouped convolutions, got {grouped}")

    @staticmethod
    def supports(architecture: Architecture) -> bool:
        """Whether models of this architecture can be coded: a plain chain of layers without grouped convolutions."""
        return architecture.planned and not any(_grouped(layer) for layer in architecture.layers)

    def _opening(self) -> Tensor:
        """Patches ``[1, R, width]`` that the rows of the first layer meet: the same in every model."""
        return self.weighted[0].patches(without_weights(self.queries, self.head))

    def __repr__(self) -> str:
        return super().__repr__().replace("LinearCodec", "AdaptiveCodec", 1)

    # -- the maps ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, weights: Tensor) -> Tensor:
        """``[k, P] -> [k, T, W]``, zero where ``mask`` is False; NaN for a model that is not finite. No gradient."""
        tokens = self.layout.tokenize(weights.detach().float()).tokens
        first = self._opening()
        return torch.cat([self._walk(first, None, part)[0] for part in tokens.split(self._chunk())])

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """``[k, T, W] -> [k, P]``. What lies outside ``mask`` is ignored. No gradient."""
        self._check_latents(latents)
        latents = torch.where(self.mask, latents.detach().float(), 0)
        first = self._opening()
        tokens = torch.cat([self._walk(first, part, None)[1] for part in latents.split(self._chunk())])
        return self.layout.detokenize(tokens)

    @torch.no_grad()
    def reconstruct(self, weights: Tensor) -> Tensor:
        """``decode(encode(weights))``, in one pass: the encoder decodes anyway."""
        tokens = self.layout.tokenize(weights.detach().float()).tokens
        first = self._opening()
        return self.layout.detokenize(torch.cat([self._walk(first, None, part)[1] for part in tokens.split(self._chunk())]))

    @torch.no_grad()
    def held(self, weights: Tensor, known: Tensor | None = None, layers: int = 0) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Latents ``[k, T, W]`` of models, and the decoder with its bases held where these models' own decoding puts them.

        At these latents it is :meth:`decode`; away from them it is affine in each model's latent, and differentiable, where
        :meth:`decode` would turn a layer's bases with what it has decoded of the layers below. With ``known`` latents, those of the first
        ``layers`` layers are taken from there and the rest of the models is encoded on top of them; the bases of
        layer ``layers`` are then the decoder's own whatever happens above.
        """
        tokens = self.layout.tokenize(weights.detach().float()).tokens
        chunk, first, latents, parts = self._chunk(), self._opening(), [], []
        given: Sequence[Tensor | None] = [None] * len(tokens) if known is None else known.split(chunk)
        for part, mine in zip(tokens.split(chunk), given):
            maps: list[_Map] = []
            latents.append(self._walk(first, mine, part, maps, layers)[0])
            parts.append([m._replace(matrix=m.matrix.expand(len(part), -1, -1)) for m in maps])
        joined = [same[0]._replace(matrix=torch.cat([m.matrix for m in same])) for same in zip(*parts, strict=True)]

        def decoder(z: Tensor) -> Tensor:
            out = z.new_zeros(len(z), *self.layout.mask.shape)
            for m in joined:
                width, n = m.matrix.shape[1:]
                out[:, m.tokens, :n] = z[:, m.tokens, :width] @ m.matrix + m.center
            return self.layout.detokenize(out)

        return torch.cat(latents), decoder

    @torch.no_grad()
    def left_open(self, latents: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Weights ``[k, P]`` that latents ``[k, T, W]`` decode to, and of every group ``L [k, n, n - width]`` (float64), so that ``L L^T``
        is the covariance of its rows that the latents leave open (of a code without compensation, which changes what they say)."""
        self._check_latents(latents)
        latents = torch.where(self.mask, latents.detach().float(), 0)
        first, tokens, left = self._opening(), [], []
        for part in latents.split(self._chunk()):
            maps: list[_Map] = []
            tokens.append(self._walk(first, part, None, maps)[1])
            left.append([m.left.expand(len(part), -1, -1) for m in maps])
        return self.layout.detokenize(torch.cat(tokens)), [torch.cat(same) for same in zip(*left, strict=True)]

    def _walk(
        self, first: Tensor, latents: Tensor | None, tokens: Tensor | None, maps: list[_Map] | None = None, known: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Latents and decoded tokens of k models, layer by layer: encoding ``tokens`` if they are given (from layer ``known`` on), else
        decoding ``latents``. ``first``: :meth:`_opening`. ``maps`` is told how each piece was decoded."""
        given = tokens if tokens is not None else latents
        assert given is not None
        k, device = len(given), given.device
        if k == 0:
            return given.new_zeros(0, *self.mask.shape), given.new_zeros(0, *self.layout.mask.shape)
        finite = given.isfinite().flatten(1).all(1)
        given = torch.where(finite[:, None, None], given, 0)
        z = given if tokens is None else given.new_zeros(k, *self.mask.shape) if latents is None else latents.clone()
        out = given.new_zeros(k, *self.layout.mask.shape)
        rows = None if tokens is None else self.groups.rows(given)
        inputs = true = first  # every model sees the same images, so one moment serves the first layer of all
        for index, (layer, span) in enumerate(zip(self.weighted, self.groups.spans, strict=True)):
            moment = layer.moment(inputs, inputs)
            sound = moment.isfinite().all(-1).all(-1)  # weights that overflow leave nothing to code the rest in
            finite = finite & sound
            moment = torch.where(sound[:, None, None], moment, torch.eye(moment.shape[1], dtype=moment.dtype, device=device)).double()
            roots = [root(m, self.damping) for m in _pieces(self.groups, index, moment)]
            encoding = rows if index >= known else None
            if encoding is not None:
                target = encoding[index].double()
                if self.compensate and index > 0:
                    cross = layer.moment(true, inputs)
                    inverse = roots[0][1] if len(roots) == 1 else root(moment, self.damping)[1]
                    target = self._compensated(target, cross.nan_to_num(0, 0, 0).double(), moment, inverse)
            start = 0
            for piece, (half, back) in enumerate(roots):
                group = span.first + piece
                n, width = self.groups.sizes[group], self.widths[group]
                channels = slice(span.start + piece, span.stop, span.chunks)
                center, deviation = self.center[group, :n].double(), self.deviation[group, :width]
                basis, rest = self._basis(group, half)
                if encoding is not None:
                    t = (target[..., start : start + n] - center) @ half
                    z[:, channels, :width] = (t @ basis / deviation).float()
                coded = z[:, channels, :width].double() * deviation
                out[:, channels, :n] = (coded @ basis.mT @ back + center).float()
                if maps is not None:
                    maps.append(_Map(channels, (deviation[:, None] * (basis.mT @ back)).float(), center.float(), back @ rest))
                start += n
            if index + 1 < len(self.weighted):
                above = self.weighted[index + 1]
                inputs = above.patches(layer(self.groups.rows(out)[index], inputs), k)
                if rows is not None and self.compensate:
                    true = above.patches(layer(rows[index], true), k)
        lost = ~finite[:, None, None]
        return z.masked_fill(lost, float("nan")) if tokens is not None else z, out.masked_fill(lost, float("nan"))

    def _compensated(self, rows: Tensor, cross: Tensor, moment: Tensor, inverse: Tensor) -> Tensor:
        """Rows w* for the decoded inputs x^ that come closest to rows w on the true inputs x: least squares of
        ``E |w x - w* x^|^2``, damped towards w. ``cross = E[x x^^T]``, ``moment = E[x^ x^^T]``, ``inverse`` its damped C^(-1/2).

        Not by ``torch.linalg.solve``: after ``torch.set_num_threads``, MKL's LU of a batch of wide matrices fails in some builds of torch.
        """
        scale = self.damping * moment.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(torch.finfo(torch.float32).tiny)
        ridge = scale[:, None, None] * torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
        return rows @ (cross + ridge) @ inverse @ inverse

    def _basis(self, group: int, half: Tensor) -> tuple[Tensor, Tensor]:
        """``[k, n, width]``: the leading directions in each model's own metric, turned towards the average code's; and the others
        ``[k, n, n - width]``, each as long as rows deviate along it."""
        n, width = self.groups.sizes[group], self.widths[group]
        values, vectors = torch.linalg.eigh(half @ self.prior[group, :n, :n] @ half)
        leading, others = vectors[..., n - width :], vectors[..., : n - width]
        left, _, right = torch.linalg.svd(leading.mT @ self.reference[group, :n, :width])
        return leading @ left @ right, others * values[..., None, : n - width].clamp_min(0).sqrt()

    def _own_moments(self, weights: Tensor) -> list[Tensor]:
        """``E[x x^T]`` of every layer's inputs in every model, ``[k, width, width]`` float64 (``[1, ...]`` for the first layer)."""
        parts: list[list[Tensor]] = []
        first = self._opening()
        for tokens in self.layout.tokenize(weights).tokens.split(self._chunk()):
            inputs, moments = first, []
            for index, layer in enumerate(self.weighted):
                if index > 0:
                    below = self.weighted[index - 1]
                    inputs = layer.patches(below(self.groups.rows(tokens)[index - 1], inputs), len(tokens))
                moments.append(layer.moment(inputs, inputs).double())
            parts.append(moments)
        return [layer[0] if index == 0 else torch.cat(layer) for index, layer in enumerate(zip(*parts, strict=True))]

    def _chunk(self) -> int:
        """Models whose patches are held at once."""
        sizes = [4 * len(self.queries) * layer.width * layer.positions for layer in self.weighted]
        return max(1, _CHUNK_BYTES // max(sizes))

    # -- persistence ---------------------------------------------------------------------------------------------------

    _TENSORS = ("center", "scale", "encoder", "decoder", "prior", "reference", "deviation", "queries")

    def to(self, device: torch.device | str) -> AdaptiveCodec:
        """The same codec with its tensors on ``device``."""
        other = copy.copy(self)
        for name in (*self._TENSORS, "mask"):
            setattr(other, name, getattr(self, name).to(device))
        return other

    def state(self) -> dict[str, Any]:
        """Tensors, numbers and strings alone, as of :class:`LinearCodec`."""
        own = {name: getattr(self, name) for name in self._TENSORS}
        return {**super().state(), **own, "damping": self.damping, "compensate": self.compensate}

    @classmethod
    def from_state(cls, architecture: Architecture | None, state: Mapping[str, Any]) -> AdaptiveCodec:
        """Rebuild a codec from :meth:`state`. Raises WslfastError for a state that does not fit its architecture."""
        extra = ("prior", "reference", "deviation", "queries", "damping", "compensate")
        require(isinstance(state, Mapping) and set(extra) <= set(state), f"state: expected one of an AdaptiveCodec, got {describe(state)}")
        codec = super().from_state(architecture, {name: value for name, value in state.items() if name not in extra})
        assert isinstance(codec, AdaptiveCodec)
        codec.damping, codec.compensate = float(state["damping"]), bool(state["compensate"])
        g, d, w = codec.encoder.shape
        shapes = {"prior": (g, d, d), "reference": (g, d, w), "deviation": (g, w)}
        shapes["queries"] = (len(state["queries"]), *codec.architecture.input_shape)
        for name, shape in shapes.items():
            value = state[name]
            fits = isinstance(value, Tensor) and tuple(value.shape) == shape and len(value) > 0
            require(fits, f"state[{name!r}]: expected {list(shape)}, got {describe(value)}")
            setattr(codec, name, value)
        return codec


def _grouped(layer: Layer) -> bool:
    return isinstance(layer, Conv2d) and layer.groups > 1


class _Map(NamedTuple):
    """How one piece of a layer's rows was decoded: ``z[:, tokens, :width] @ matrix + center``, and what that leaves open."""

    tokens: slice
    matrix: Tensor  # [k, width, n], or [1, width, n]
    center: Tensor  # [n]
    left: Tensor  # [k, n, n - width] float64, or [1, ...]; times its transpose: the covariance of a row given its latent


def _pieces(groups: TokenGroups, layer: int, moment: Tensor) -> Iterator[Tensor]:
    """The diagonal blocks ``[k, n, n]`` of a layer's moment, one a piece of its rows."""
    span, start = groups.spans[layer], 0
    for n in groups.sizes[span.first : span.first + span.chunks]:
        yield moment[:, start : start + n, start : start + n]
        start += n
