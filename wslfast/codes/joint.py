"""A code that looks twice: at the layers one after another, then at the network as a whole.

Layer by layer, as :class:`AdaptiveCodec` codes, numbers go to what moves a layer's own output, whether or not the layers above listen. So a
part of the latent is kept back. What the other part decodes to is a network, and the decoder can differentiate it. With J the Jacobian of
its outputs on the code's images, and ``L L^T`` the covariance of the weights that the first part leaves open, the leading directions of
``L^T J^T J L`` are those, across all layers at once, along which the original probably differs *and* answers differently. The
numbers kept back are the original's coordinates along them. No number is spent on saying which directions those are.

Encoding reads the coordinates off, then moves them down the behavioral loss (arXiv 2503.17138, eq. 2) on the code's images by a few damped
Gauss-Newton steps. It sees no other image, and the latent keeps its size. Nothing is trained over models.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor

from ..behavior import batched_behavioral_loss, batched_forward
from ..errors import describe, require
from ..kernels.layers import Conv2d
from ..population import Population
from ..queries import QueryPool
from .adaptive import AdaptiveCodec
from .layer_inputs import good_models, spaced, without_weights
from .linear import budget_of, check_fitted

Importance = Callable[[Tensor], Tensor]

_IMAGES = 1024
_DRAWN = 4  # random combinations of an image's outputs whose gradients stand for all of its Jacobian
_EXTRA = 48  # columns of the random start of subspace iteration beyond those that are wanted
_ITERATIONS = 2
_TRIALS = 5  # of a Gauss-Newton step, each with eight times the damping of the one before
_LEAST = 1e-3  # singular values below this share of the first are not divided by


class JointCodec:
    """Encoder and decoder of models whose last numbers say how the network as a whole differs from what the others decode to.

    Latents of different models compare: the directions of each are turned among themselves towards those of one training model, so
    rounding changes nothing either.

    Args:
        population: training models, finite, of an architecture that :class:`AdaptiveCodec` supports.
        queries: images ``[n, *input_shape]`` or a QueryPool; at most 1,024, evenly spaced, become part of the code.
        latent: size of the code: a share of P if a float in (0, 1], numbers a model if an int.
        joint: share of the latent that is kept back for the network as a whole.
        steps: Gauss-Newton steps of an encoding; 0: coordinates are read off alone.
        token_size, models, damping, seed: as of :class:`AdaptiveCodec`.
        importance: how much each output counts at each image, ``[n, K] -> [n, K]``, positive, from the outputs of what the first part
            decodes to (the decoder has them). It chooses the directions, and is part of the code. What all outputs of an image have
            in common then counts nothing, as softmax and argmax do not see it: ``importance = softmax`` gives the Fisher metric of the
            answers. None: all outputs count alike. The loss that encoding descends is the same.

    Attributes:
        base: the adaptive code of the first part, without compensation, which would change what its latents say.
        joint_size, latent_size: numbers of the second part, and of both.
        layout, architecture, queries: as of :class:`AdaptiveCodec`.

    Raises:
        WslfastError: naming the argument, what was expected and what came.
    """

    def __init__(
        self,
        population: Population,
        *,
        queries: Tensor | QueryPool,
        latent: Union[float, int] = 0.55,
        joint: float = 0.125,
        steps: int = 2,
        token_size: int = 0,
        models: int = 24,
        damping: float = 1e-3,
        seed: int = 0,
        importance: Importance | None = None,
    ) -> None:
        check_fitted(population, damping)
        require(isinstance(joint, float) and 0 < joint < 1, f"joint: expected a share between 0 and 1, got {joint!r}")
        require(isinstance(steps, int) and steps >= 0, f"steps: expected a non-negative integer, got {steps!r}")
        require(importance is None or callable(importance), f"importance: expected a callable or None, got {describe(importance)}")
        budget = budget_of(latent, population.architecture.num_weights)
        first = budget - max(1, round(joint * budget))
        require(first > 0, f"latent: {budget} numbers a model leave none for the layers")
        self.base = AdaptiveCodec(
            population, queries=queries, latent=first, token_size=token_size, models=models, damping=damping, compensate=False, seed=seed
        )
        self.layout, self.architecture, self.steps = self.base.layout, self.base.architecture, steps
        self.importance = importance
        self.latent_size, self.joint_size = budget, budget - self.base.latent_size
        images = queries.images if isinstance(queries, QueryPool) else queries
        self.queries = spaced(images, _IMAGES).to(population.weights.device, torch.float32)
        best = population.weights[good_models(population, 1, seed).to(population.weights.device)]
        self.reference: Tensor | None = None
        weights, left = self.base.left_open(self.base.encode(best))
        self.reference = self._directions(weights[0], [part[0].float() for part in left])[0]

    def __repr__(self) -> str:
        return f"JointCodec({self.architecture.name!r}, latent_size={self.latent_size}, joint_size={self.joint_size}, base={self.base!r})"

    @torch.no_grad()
    def encode(self, weights: Tensor) -> Tensor:
        """``[k, P] -> [k, latent_size]``: the base code's numbers, then those of the whole network. NaN for a model that is not finite."""
        return self._encoded(weights)[0]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """``[k, latent_size] -> [k, P]``. Raises WslfastError for latents of another shape or without a fraction."""
        fits = isinstance(latents, Tensor) and latents.ndim == 2 and latents.shape[1] == self.latent_size and latents.is_floating_point()
        require(fits, f"latents: expected floating [k, {self.latent_size}], got {describe(latents)}")
        latents = latents.float()
        own = latents.new_zeros(len(latents), *self.base.mask.shape)
        own[:, self.base.mask] = latents[:, : self.base.latent_size]
        weights, left = self.base.left_open(own)
        decoded = []
        for j, row in enumerate(weights):
            broken = not bool(row.isfinite().all() and latents[j].isfinite().all())
            if broken:
                decoded.append(torch.full_like(row, float("nan")))
                continue
            directions, _ = self._directions(row, [part[j].float() for part in left])
            decoded.append(row + self._weights(directions @ latents[j, -self.joint_size :]))
        return torch.stack(decoded) if decoded else weights

    @torch.no_grad()
    def reconstruct(self, weights: Tensor) -> Tensor:
        """``decode(encode(weights))``, in one pass: the encoder decodes anyway."""
        return self._encoded(weights)[1]

    # -- one model -----------------------------------------------------------------------------------------------------------

    def _encoded(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Latents and decoded weights."""
        weights = weights.detach().float()
        latents = self.base.encode(weights)
        first, left = self.base.left_open(latents)
        if len(weights) == 0:
            return weights.new_empty(0, self.latent_size), first
        targets = batched_forward(weights, self.queries, self.architecture)
        numbers, decoded = [], []
        for j, (row, start) in enumerate(zip(weights, first, strict=True)):
            if not bool(start.isfinite().all() and targets[j].isfinite().all()):
                numbers.append(start.new_full((self.joint_size,), float("nan")))
                decoded.append(torch.full_like(start, float("nan")))
                continue
            directions, white = self._directions(start, [part[j].float() for part in left])
            read = white.mT @ self.missing(row - start, [part[j] for part in left])
            found = self._moved(_State(start, directions, targets[j]), read)
            numbers.append(found)
            decoded.append(start + self._weights(directions @ found))
        return torch.cat([latents[:, self.base.mask], torch.stack(numbers)], 1), torch.stack(decoded)

    def _directions(self, weights: Tensor, left: list[Tensor]) -> tuple[Tensor, Tensor]:
        """``[numbers of all rows, joint_size]``: how rows move with each of the second part's numbers, which have about unit variance; and
        the same in units of what was left open, where they are orthonormal."""
        white = self.whitened(torch.cat([part.flatten(1) for part in self._jacobian(weights, self.importance)], 1), left)
        leading = _leading(white, self.joint_size)
        directions = self._unwhitened(leading, left)
        if self.reference is not None:
            u, _, v = torch.linalg.svd(directions.mT @ self.reference, full_matrices=False)
            directions, leading = directions @ (u @ v), leading @ (u @ v)
        return directions, leading

    def missing(self, difference: Tensor, left: list[Tensor]) -> Tensor:
        """``[numbers left open]``: a difference of weights ``[P]`` in units of what was left open."""
        inverse = [torch.linalg.pinv(part, rtol=_LEAST).float().mT for part in left]
        return self.whitened(self._rows(difference)[None], inverse)[0]

    def unwhitened(self, numbers: Tensor, left: list[Tensor]) -> Tensor:
        """``[P]``: the difference of weights that numbers in units of what was left open stand for; differentiable."""
        return self._weights(self._unwhitened(numbers[:, None], left)[:, 0])

    def _unwhitened(self, columns: Tensor, left: list[Tensor]) -> Tensor:
        """``[numbers left open, m] -> [numbers of all rows, m]``."""
        groups, moved, at = self.base.groups, [], 0
        for members, half in zip(groups.members, left, strict=True):
            wide = half.shape[1]
            moved.append(half @ columns[at : at + members * wide].view(members, wide, columns.shape[1]))
            at += members * wide
        return torch.cat([torch.cat(moved[s.first : s.first + s.chunks], 1).flatten(0, 1) for s in groups.spans])

    def whitened(self, flat: Tensor, maps: list[Tensor]) -> Tensor:
        """Vectors over all rows ``[m, ...]``, every piece of a row times its group's matrix."""
        groups, out = self.base.groups, []
        for span, rows in zip(groups.spans, self._split(flat), strict=True):
            sizes = groups.sizes[span.first : span.first + span.chunks]
            for piece, matrix in zip(rows.split(sizes, 2), maps[span.first : span.first + span.chunks], strict=True):
                out.append((piece @ matrix).flatten(1))
        return torch.cat(out, 1)

    def _moved(self, state: _State, start: Tensor) -> Tensor:
        """Coordinates moved down the behavioral loss, from ``start`` and damped towards it."""
        found, damping = start, 0.0
        value, slope = self._loss(state, found)
        for _ in range(self.steps):
            current = state.weights + self._weights(state.directions @ found)
            columns = torch.cat([part.flatten(1) for part in self._jacobian(current)], 1) @ state.directions
            curvature = (columns.mT @ columns).double()
            least = self.base.damping * float(curvature.diagonal().mean())
            damping = max(damping, least)
            for _ in range(_TRIALS):
                system = curvature + damping * torch.eye(len(found), dtype=torch.float64, device=found.device)
                step = torch.cholesky_solve((-slope - damping * (found - start)).double()[:, None], torch.linalg.cholesky(system))
                moved = found + step[:, 0].float()
                after, its_slope = self._loss(state, moved)
                if after < value:
                    found, value, slope, damping = moved, after, its_slope, damping / 4
                    break
                damping *= 8
            else:
                break
        return found

    def _loss(self, state: _State, numbers: Tensor) -> tuple[float, Tensor]:
        """The behavioral loss of what the numbers decode to, and its gradient."""
        weights = (state.weights + self._weights(state.directions @ numbers))[None].requires_grad_()
        with torch.enable_grad():
            value = batched_behavioral_loss(weights, None, self.queries, self.architecture, targets=state.targets[None])
            (slope,) = torch.autograd.grad(value, weights)
        reached = float(value.detach())
        return reached if math.isfinite(reached) else math.inf, state.directions.mT @ self._rows(slope[0])

    def jacobian(self, weights: Tensor, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Outputs ``[n, K]`` of one model ``[P]``; of every layer ``[n * K, channels, width]``: their derivatives to the layer's rows."""
        return self._slopes(
            weights, images, lambda x: torch.eye(x.shape[1], dtype=x.dtype, device=x.device)[:, None].expand(-1, len(x), -1)
        )

    def _jacobian(self, weights: Tensor, importance: Importance | None = None) -> list[Tensor]:
        """Of every layer ``[rows of a sketch, channels, width]``: its squares add up to the mean over images of the squared Jacobian of the
        outputs to the layer's rows, in expectation over random combinations of outputs (the same for every model)."""

        def combinations(x: Tensor) -> Tensor:
            generator = torch.Generator().manual_seed(0)
            drawn = torch.randn(_DRAWN, *x.shape, generator=generator, dtype=torch.float32).to(x.device) / math.sqrt(_DRAWN * len(x))
            return drawn if importance is None else centered(drawn, _counted(importance, x))

        return self._slopes(weights, self.queries, combinations)[1]

    def _slopes(self, weights: Tensor, images: Tensor, combinations: Callable[[Tensor], Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Outputs of one model, and of every layer ``[n * m, channels, width]``: how m combinations of each image's outputs move with the
        layer's rows. The combinations ``[m, n, K]`` may depend on the outputs."""
        layers = self.base.weighted
        rows = self.base.groups.rows(self.layout.tokenize(weights[None]).tokens)
        x, made, met = without_weights(images, self.base.head), [], []
        with torch.enable_grad():
            for layer, (own,) in zip(layers, rows, strict=True):
                met.append(layer.patches(x.detach())[0].unflatten(0, (len(images), -1)))
                record = layer.layer
                weight = own[:, : layer.width - record.bias].reshape(record.weight_shape).requires_grad_()
                bias = own[:, -1] if record.bias else None
                if isinstance(record, Conv2d):
                    x = F.conv2d(x, weight, bias, record.stride, record.padding, record.spacing)
                else:
                    x = F.linear(x, weight, bias)
                made.append(x)
                x = without_weights(x, layer.rest)
            drawn = combinations(x.detach())
            slopes = [torch.autograd.grad(x, made, one, retain_graph=i + 1 < len(drawn)) for i, one in enumerate(drawn)]
        out = []
        for index, (layer, patches) in enumerate(zip(layers, met, strict=True)):
            slope = torch.stack([of[index] for of in slopes], 1).unflatten(2, (-1, 1)).flatten(3)  # [n, drawn, channels, positions]
            each = slope.flatten(1, 2) @ patches  # [n, drawn * channels, width]
            out.append(layer.ordered(each).unflatten(1, (len(drawn), -1)).flatten(0, 1))
        return x.detach(), out

    # -- rows, layer after layer, as one vector --------------------------------------------------------------------------------

    def _rows(self, weights: Tensor) -> Tensor:
        return torch.cat([part.flatten() for part in self.base.groups.rows(self.layout.tokenize(weights[None]).tokens)])

    def _split(self, flat: Tensor) -> list[Tensor]:
        """``[m, numbers of all rows] -> [m, channels, width]`` of every layer."""
        sizes = [(span.channels, layer.width) for span, layer in zip(self.base.groups.spans, self.base.weighted, strict=True)]
        return [part.unflatten(1, size) for part, size in zip(flat.split([c * w for c, w in sizes], 1), sizes, strict=True)]

    def _weights(self, flat: Tensor) -> Tensor:
        return self.layout.detokenize(self.base.groups.join(self._split(flat[None])))[0]


def centered(vectors: Tensor, importance: Tensor) -> Tensor:
    """Vectors ``[..., n, K]`` times a root of ``diag(a) - a a^T / sum(a)``, a the importance ``[n, K]`` of outputs: with vectors of unit
    variance, combinations of outputs whose second moment is that matrix."""
    share = importance / importance.sum(-1, keepdim=True)
    scaled = vectors * importance.sqrt()
    return scaled - share * scaled.sum(-1, keepdim=True)


def _counted(importance: Importance, outputs: Tensor) -> Tensor:
    counts = importance(outputs)
    fits = isinstance(counts, Tensor) and counts.shape == outputs.shape and outputs.ndim == 2 and bool((counts >= 0).all())
    expected = f"importance: expected finite [n, K] like the outputs {list(outputs.shape)}, none negative, none without any in a row"
    require(fits and bool((counts.sum(1) > 0).all() & counts.isfinite().all()), lambda: f"{expected}, got {describe(counts)}")
    return counts


class _State(NamedTuple):
    """What the second part of an encoding starts from: decoded weights, directions, outputs of the original."""

    weights: Tensor
    directions: Tensor
    targets: Tensor


def _leading(rows: Tensor, count: int) -> Tensor:
    """``[width, count]``: an orthonormal basis of the leading right singular directions of ``rows [m, width]``, by subspace iteration."""
    width = rows.shape[1]
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(width, min(width, count + _EXTRA), generator=generator, dtype=torch.float32).to(rows.device)
    small = width <= len(rows)
    square = rows.mT @ rows if small else None

    def applied(x: Tensor) -> Tensor:
        return square @ x if square is not None else rows.mT @ (rows @ x)

    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(applied(basis)).Q
    _, vectors = torch.linalg.eigh(basis.mT @ applied(basis))
    return basis @ vectors.flip(1)[:, :count]
