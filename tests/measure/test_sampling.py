"""Samplers of latents against scikit-learn, closed forms and properties; selection against sorting by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from wslfast.errors import WslfastError
from wslfast.measure.sampling import SAMPLERS, LatentDensity, between_neighbours, bootstrapped, draw, subsampled, uniform_box


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _anchors(m: int = 7, seed: int = 1) -> Tensor:
    return torch.randn(m, 3, 2, generator=_generator(seed), dtype=torch.float64) * torch.tensor([1.0, 5.0], dtype=torch.float64)


def _pieces(latents: Tensor, mode: str) -> list[Tensor]:
    """What one kernel covers: ``[n, d]`` each."""
    if mode == "joint":
        return [latents.flatten(1)]
    if mode == "token":
        return list(latents.unbind(1))
    return [column.unsqueeze(1) for column in latents.flatten(1).unbind(1)]


@pytest.mark.parametrize("mode", ["joint", "token", "individual"])
def test_samples_are_as_likely_as_sklearns(mode: str) -> None:
    """Under scikit-learn's density of standardised anchors, our samples have the log densities that its own have."""
    neighbors = pytest.importorskip("sklearn.neighbors")
    anchors, n = _anchors(), 4000
    scale = anchors.std(0, unbiased=False)
    samples, _ = LatentDensity(anchors, 0.3, mode).sample(n, _generator())
    wider, _ = LatentDensity(anchors, 0.4, mode).sample(n, _generator())
    for a, ours, others in zip(*(_pieces(z / scale, mode) for z in (anchors, samples, wider)), strict=True):
        density = neighbors.KernelDensity(bandwidth=0.3).fit(a.numpy())
        theirs = density.score_samples(density.sample(n, random_state=0))
        bound = 4 * (2 / n) ** 0.5 * theirs.std()
        assert abs(density.score_samples(ours.numpy()).mean() - theirs.mean()) < bound
        if mode == "joint":  # the check tells a wrong bandwidth
            assert abs(density.score_samples(others.numpy()).mean() - theirs.mean()) > bound


@pytest.mark.parametrize("mode", ["joint", "token", "individual"])
def test_samples_come_from_the_density(mode: str) -> None:
    """Mean and covariance of the mixture, in closed form; numbers that share a kernel keep the anchors' covariance, others lose it."""
    anchors, n = _anchors(), 40_000
    latents, of = LatentDensity(anchors, 0.5, mode).sample(n, _generator())
    assert (of is not None) == (mode == "joint")
    flat = anchors.flatten(1)
    covariance = torch.cov(flat.T, correction=0)
    token = torch.arange(6) // 2
    together = {"joint": torch.ones(6, 6), "token": (token[:, None] == token).double(), "individual": torch.eye(6)}[mode]
    expected = covariance * together + torch.diag(0.25 * covariance.diagonal())
    found = latents.flatten(1)
    unit = covariance.diagonal().sqrt()
    assert ((found.mean(0) - flat.mean(0)) / unit).abs().max() < 0.03
    assert ((torch.cov(found.T) - expected) / torch.outer(unit, unit)).abs().max() < 0.04


def test_without_bandwidth_samples_are_anchors_piece_by_piece() -> None:
    anchors = _anchors()
    latents, of = LatentDensity(anchors, 0.0).sample(50, _generator())
    assert torch.equal(latents, anchors[of])
    by_token, _ = LatentDensity(anchors, 0.0, "token").sample(50, _generator())
    assert all(any(torch.equal(row[t], a[t]) for a in anchors) for row in by_token for t in range(3))
    assert not all(any(torch.equal(row, a) for a in anchors) for row in by_token)
    by_number, _ = LatentDensity(anchors, 0.0, "individual").sample(50, _generator())
    assert bool((by_number.unsqueeze(1) == anchors).any(1).all())


def test_numbers_that_do_not_vary_get_no_noise() -> None:
    anchors = _anchors()
    anchors[:, 1, 0] = 2.5
    latents, _ = LatentDensity(anchors, 0.5).sample(20, _generator())
    assert bool((latents[:, 1, 0] == 2.5).all())
    assert not bool((latents[:, 1, 1] == latents[0, 1, 1]).all())


def test_uniform_fills_the_box_and_no_more() -> None:
    anchors = _anchors()
    latents = uniform_box(anchors, 20_000, _generator())
    low, high = anchors.amin(0), anchors.amax(0)
    share = (latents - low) / (high - low)
    assert float(share.min()) >= 0
    assert float(share.max()) <= 1
    assert (share.mean(0) - 0.5).abs().max() < 0.02
    assert (share.var(0) - 1 / 12).abs().max() < 0.01


def test_neighbours_are_joined_to_the_nearest() -> None:
    anchors = torch.tensor([0.0, 1.0, 10.0, 12.0], dtype=torch.float64).view(4, 1, 1)
    latents, of = between_neighbours(anchors, 400, _generator(), neighbours=1)
    nearest = {0: 1, 1: 0, 2: 3, 3: 2}
    for z, a in zip(latents.flatten().tolist(), of.tolist(), strict=True):
        low, high = sorted((float(anchors[a]), float(anchors[nearest[a]])))
        assert low <= z <= high
    assert set(of.tolist()) == {0, 1, 2, 3}
    with pytest.raises(WslfastError, match="at least two"):
        between_neighbours(anchors[:1], 1, _generator())


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_generator_for_everything(sampler: str) -> None:
    anchors = _anchors().float()
    a, _ = draw(anchors, 5, _generator(3), sampler=sampler)
    b, _ = draw(anchors, 5, _generator(3), sampler=sampler)
    c, _ = draw(anchors, 5, _generator(4), sampler=sampler)
    assert a.dtype == torch.float32
    assert a.shape == (5, 3, 2)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def _score(latents: Tensor) -> Tensor:
    return -latents.flatten(1).norm(dim=1)


def test_subsampling_keeps_the_best_sorted() -> None:
    anchors = _anchors()
    kept = subsampled(anchors, 4, _generator(), _score, candidates=30, bandwidth=0.3)
    every, of = draw(anchors, 30, _generator(), bandwidth=0.3)
    order = sorted(range(30), key=lambda i: -float(_score(every)[i]))[:4]
    assert torch.equal(kept.latents, every[order])
    assert kept.anchors is not None
    assert torch.equal(kept.anchors, of[order])
    assert torch.equal(kept.scores, _score(kept.latents))
    assert kept.drawn == 30


def test_scores_that_are_not_numbers_are_last() -> None:
    kept = subsampled(_anchors(), 3, _generator(), lambda z: torch.where(torch.arange(len(z)) < 5, math.nan, 1.0), candidates=8)
    assert kept.scores.tolist() == [1.0, 1.0, 1.0]


def test_bootstrapping_improves_and_returns_its_best_sorted() -> None:
    anchors = _anchors(20)
    seen: list[Tensor] = []

    def score(latents: Tensor) -> Tensor:
        seen.append(latents)
        return _score(latents)

    one = subsampled(anchors, 5, _generator(), _score, candidates=20, bandwidth=0.3)
    many = bootstrapped(anchors, 5, _generator(), score, candidates=20, rounds=4, bandwidth=0.3)
    assert len(seen) == 4
    assert many.drawn == 80
    everything = torch.cat([_score(z) for z in seen])
    assert torch.equal(many.scores, everything.sort(descending=True).values[:5])  # survivors compete on: nothing good is lost
    assert float(many.scores[0]) > float(one.scores[0])
    # the kernel of later rounds keeps the unit of the first anchors
    spread = (seen[-1] - seen[-1].mean(0)).flatten(1).std(0)
    assert bool((spread > 0.25 * anchors.flatten(1).std(0, unbiased=False)).all())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda a: LatentDensity(a, -1.0), "bandwidth"),
        (lambda a: LatentDensity(a, float("nan")), "bandwidth"),
        (lambda a: LatentDensity(a, 0.1, "row"), "mode"),
        (lambda a: LatentDensity(a[:0], 0.1), "anchors"),
        (lambda a: draw(a, 1, _generator(), sampler="kde"), "sampler"),
        (lambda a: subsampled(a, 5, _generator(), _score, candidates=4), "candidates"),
        (lambda a: bootstrapped(a, 5, _generator(), _score, candidates=5, rounds=0), "rounds"),
    ],
    ids=["negative", "nan", "mode", "none", "sampler", "candidates", "rounds"],
)
def test_wrong_arguments_are_named(call: Any, words: str) -> None:
    with pytest.raises(WslfastError, match=words):
        call(_anchors())
