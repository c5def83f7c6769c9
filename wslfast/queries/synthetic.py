"""Query images made without any data: noise, strokes, and images optimised until models disagree on them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..architecture import Architecture
from ..behavior import batched_forward
from ..errors import check_positive, check_seed, describe, require
from ..population import Population
from . import images as drawn

SYNTHETIC = ("uniform", "noise", "smooth", "strokes", "blend", "optimised")
_JUDGES = 24  # models that have to disagree
_ASCENT = 64  # images optimised at a time


def synthetic_queries(
    kind: str, n: int, architecture: Architecture, *, population: Population | None = None, steps: int = 12, seed: int = 0
) -> Tensor:
    """Query images made without any data set: ``[n, *architecture.input_shape]`` float32 on the CPU.

    Args:
        kind: ``"uniform"`` U[0, 1), the published code's ``random``; the others have mean 0 and standard deviation 1 in each channel:
            ``"noise"`` white; ``"smooth"`` noise with a spectrum like that of photographs; ``"strokes"`` curves of a soft pen;
            ``"blend"`` strokes over smooth noise; ``"optimised"`` smooth noise, strokes and blends, altered until the models of
            ``population`` disagree most, and distilled to the n that leave the least of the disagreement unsaid (their mean and
            deviation are near those of what they were chosen from).
        population: models to disagree, for ``"optimised"`` alone: weights, never images.
        steps: of the ascent, for ``"optimised"``.
        seed: of everything drawn, 0 to 2^63 - 1.

    Raises:
        WslfastError: naming the argument, what was expected and what came.
    """
    require(kind in SYNTHETIC, f"kind: expected one of {SYNTHETIC}, got {kind!r}")
    check_positive("n", n)
    generator = torch.Generator().manual_seed(check_seed(seed))
    if kind != "optimised":
        return drawn.draw(kind, n, architecture.input_shape, generator)
    require(isinstance(population, Population), f"population: expected the models that have to disagree, got {describe(population)}")
    assert population is not None
    require(len(population) >= 2, f"population: expected at least 2 models, got {len(population)}")
    rows = torch.randperm(len(population), generator=generator)[:_JUDGES].sort().values
    weights = population.weights[rows.to(population.weights.device)]
    parts = [drawn.draw(k, n, architecture.input_shape, generator) for k in ("smooth", "strokes", "blend")]
    candidates = torch.cat(parts).to(weights.device)
    raised = torch.cat([_ascend(block, weights, architecture, steps) for block in candidates.split(_ASCENT)])
    return raised[distil(raised, weights, architecture, n)].cpu()


def _ascend(images: Tensor, weights: Tensor, architecture: Architecture, steps: int) -> Tensor:
    """Images moved towards disagreement: the variance over models of class probabilities.

    Each step is the gradient divided by its own largest entry in frequency space, where low frequencies move most (1 / f), so that
    images stay images; an image keeps its mean and its contrast, or larger pixels alone would win.
    """
    x = images.clone()
    std, mean = torch.std_mean(x.flatten(1), 1, correction=0, keepdim=True)
    size = std.clamp_min(1e-3)
    for step in range(steps):
        x.requires_grad_()
        with torch.enable_grad():
            spread = batched_forward(weights, x, architecture).softmax(2).var(0).sum()
            (gradient,) = torch.autograd.grad(spread, x)
        with torch.no_grad():
            g = torch.where(gradient.isfinite(), gradient, 0.0)
            if g.ndim == 4:
                h, w = g.shape[2:]
                g = torch.fft.irfft2(torch.fft.rfft2(g) / drawn.frequencies(h, w).to(g), s=(h, w))
            g = g.flatten(1)
            rate = 0.3 * (1 - step / steps) * size  # per step, in units of the image's contrast
            moved = x.flatten(1) + rate * g / g.std(1, correction=0, keepdim=True).clamp_min(1e-12)
            s, m = torch.std_mean(moved, 1, correction=0, keepdim=True)
            x = ((moved - m) / s.clamp_min(1e-12) * size + mean).view_as(images)
    return x.detach()


@torch.no_grad()
def distil(images: Tensor, weights: Tensor, architecture: Architecture, n: int) -> Tensor:
    """Indices ``[n]`` of the images that say most about how models ``weights [k, P]`` differ.

    An image is the vector of what each model answers beyond the models' mean; pivoted Cholesky takes, one after another, the image
    whose vector is furthest from the span of those taken before (greedy D-optimal design). ``n`` is at most the number of images;
    once everything is said, the rest follow in order of how much they say alone.
    """
    require(0 < n <= len(images), f"n: expected 1 to {len(images)} images, got {n!r}")
    outputs = torch.cat([batched_forward(weights, block, architecture) for block in images.split(1024)], 1).softmax(2).double()
    outputs = outputs[outputs.isfinite().flatten(1).all(1)]
    vectors = (outputs - outputs.mean(0)).permute(1, 0, 2).flatten(1)  # [N, k K]
    alone = vectors.square().sum(1)
    left, factor = alone.clone(), vectors.new_zeros(len(images), n)
    chosen: list[int] = []
    for column in range(n):
        best = int(left.argmax())
        if not float(left[best]) > 1e-12 * float(alone.max()):
            break
        chosen.append(best)
        row = vectors @ vectors[best] - factor[:, :column] @ factor[best, :column]
        factor[:, column] = row / left[best].sqrt()
        left = (left - factor[:, column].square()).clamp_min(0)
        left[chosen] = 0
    taken = set(chosen)
    rest = [i for i in alone.argsort(descending=True).tolist() if i not in taken]
    return torch.tensor((chosen + rest)[:n], device=images.device)
