"""Samplers of latents: kernel densities around anchors, a box, and points between neighbours.

Anchors are latents ``[m, T, W]`` of good models. Every sampler draws from one generator, passed in: a seed that is set anew for each
dimension, as published code does, gives all dimensions the same noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import check_positive, describe, require

MODES = ("joint", "token", "individual")
SAMPLERS = (*MODES, "uniform", "neighbours")


@dataclass(frozen=True, eq=False)
class LatentDensity:
    """A Gaussian kernel density around anchors.

    Attributes:
        anchors: ``[m, T, W]`` (any ``[m, ...]`` whose second axis is the token).
        bandwidth: standard deviation of the kernel, in units of ``scale``; 0 puts all mass on the anchors.
        mode: what one kernel covers. ``"joint"``: a whole latent, so a sample is one anchor with noise. ``"token"``: a token, each
            drawn around an anchor of its own. ``"individual"``: a number, likewise.
        scale: ``[T, W]``, the unit of the bandwidth; default: each number's standard deviation over the anchors, so that numbers that do
            not vary get no noise. Ones give bandwidths in the latents' own unit (published code: 0.2 and 0.002).
    """

    anchors: Tensor
    bandwidth: float
    mode: str = "joint"
    scale: Tensor | None = None

    def __post_init__(self) -> None:
        require(
            isinstance(self.anchors, Tensor) and self.anchors.ndim >= 2 and len(self.anchors) > 0,
            f"anchors: expected [m, T, ...] latents of at least one model, got {describe(self.anchors)}",
        )
        require(0 <= self.bandwidth < float("inf"), f"bandwidth: expected a non-negative number, got {self.bandwidth!r}")
        require(self.mode in MODES, f"mode: expected one of {MODES}, got {self.mode!r}")
        if self.scale is None:
            object.__setattr__(self, "scale", self.anchors.std(0, unbiased=False))

    def sample(self, samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Latents ``[samples, T, W]``, and the anchor ``[samples]`` of each, or None where a sample has many (mode not joint)."""
        m, shape = len(self.anchors), tuple(self.anchors.shape[1:])
        where = {"joint": (), "token": shape[:1], "individual": shape}[self.mode]
        chosen = torch.randint(m, (samples, *where), generator=generator)
        noise = torch.randn(samples, *shape, generator=generator, dtype=torch.float32).to(self.anchors)
        index = chosen.reshape(samples, *where, *(1,) * (len(shape) - len(where))).expand(samples, *shape).to(self.anchors.device)
        assert self.scale is not None
        latents = self.anchors.gather(0, index) + self.bandwidth * self.scale * noise
        return latents, chosen.to(self.anchors.device) if self.mode == "joint" else None


def uniform_box(anchors: Tensor, samples: int, generator: torch.Generator) -> Tensor:
    """Latents uniform in the box that the anchors span, ``[samples, ...]``."""
    low, high = anchors.amin(0), anchors.amax(0)
    return low + (high - low) * torch.rand(samples, *anchors.shape[1:], generator=generator, dtype=torch.float32).to(anchors)


def between_neighbours(anchors: Tensor, samples: int, generator: torch.Generator, *, neighbours: int = 5) -> tuple[Tensor, Tensor]:
    """Points on the segments between an anchor, drawn uniformly, and one of its nearest other anchors; and the anchor drawn."""
    m = len(anchors)
    require(m >= 2, f"anchors: sampler 'neighbours' needs at least two, got {m}")
    flat = anchors.flatten(1).double()
    distance = torch.cdist(flat, flat).fill_diagonal_(math.inf)
    near = distance.topk(min(neighbours, m - 1), largest=False).indices.cpu()  # [m, neighbours]
    chosen = torch.randint(m, (samples,), generator=generator)
    which = torch.randint(near.shape[1], (samples,), generator=generator)
    share = torch.rand(samples, *(1,) * (anchors.ndim - 1), generator=generator, dtype=torch.float32).to(anchors)
    other = near[chosen, which].to(anchors.device)
    chosen = chosen.to(anchors.device)
    return anchors[chosen] + share * (anchors[other] - anchors[chosen]), chosen


def draw(
    anchors: Tensor,
    samples: int,
    generator: torch.Generator,
    *,
    sampler: str = "joint",
    bandwidth: float = 0.05,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Latents ``[samples, ...]`` from one of ``SAMPLERS``, and the anchor of each where there is one."""
    require(sampler in SAMPLERS, f"sampler: expected one of {SAMPLERS}, got {sampler!r}")
    if sampler == "uniform":
        return uniform_box(anchors, samples, generator), None
    if sampler == "neighbours":
        return between_neighbours(anchors, samples, generator)
    return LatentDensity(anchors, bandwidth, sampler, scale).sample(samples, generator)


@dataclass(frozen=True, eq=False)
class Selected:
    """Samples that a score chose, best first.

    Attributes:
        latents: ``[kept, T, W]``. scores: ``[kept]``, falling.
        anchors: ``[kept]`` row of the anchor each was drawn around; None where the sampler has none, and after the first round of
            :func:`bootstrapped`, whose anchors are samples themselves.
        drawn: how many latents were scored in all.
    """

    latents: Tensor
    scores: Tensor
    anchors: Tensor | None
    drawn: int


def subsampled(
    anchors: Tensor,
    samples: int,
    generator: torch.Generator,
    score: Callable[[Tensor], Tensor],
    *,
    candidates: int,
    sampler: str = "joint",
    bandwidth: float = 0.05,
    scale: Tensor | None = None,
) -> Selected:
    """Draw ``candidates`` latents and keep the ``samples`` that score best.

    Args:
        score: latents ``[c, T, W]`` -> ``[c]``, higher is better; NaN is worst. It should see validation data only.
    """
    require(candidates >= samples, f"candidates: expected at least samples = {samples}, got {candidates}")
    latents, of = draw(anchors, candidates, generator, sampler=sampler, bandwidth=bandwidth, scale=scale)
    scores, order = _ranked(score(latents))
    best = order[:samples]
    return Selected(latents[best], scores[:samples], None if of is None else of[best], candidates)


def bootstrapped(
    anchors: Tensor,
    samples: int,
    generator: torch.Generator,
    score: Callable[[Tensor], Tensor],
    *,
    candidates: int,
    rounds: int = 3,
    sampler: str = "joint",
    bandwidth: float = 0.05,
) -> Selected:
    """:func:`subsampled` over and over: the survivors of a round, best first, are the anchors of the next, and stand beside its samples.

    (The published loop returns its first survivors unsorted, so not the best; here the last round's are sorted like any.)
    """
    check_positive("rounds", rounds)
    # survivors grow alike; the kernel keeps the first anchors' unit, so that it does not shrink with them
    scale = anchors.std(0, unbiased=False)
    settings: dict[str, Any] = {"sampler": sampler, "bandwidth": bandwidth, "scale": scale, "candidates": candidates}
    best = subsampled(anchors, samples, generator, score, **settings)
    for _ in range(rounds - 1):
        new = subsampled(best.latents, samples, generator, score, **settings)
        scores, order = _ranked(torch.cat([best.scores, new.scores]))
        kept = order[:samples]
        best = Selected(torch.cat([best.latents, new.latents])[kept], scores[:samples], None, best.drawn + candidates)
    return best


def _ranked(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Scores falling, NaN as the lowest, and the order that sorts them; the first of equals stays first."""
    return torch.nan_to_num(scores, nan=-math.inf).sort(descending=True, stable=True)
