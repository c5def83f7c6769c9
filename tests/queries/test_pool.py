"""Query pools and the originals' outputs on them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from tolerances import FP32

from wslfast.architecture import Architecture
from wslfast.behavior import batched_behavioral_loss, batched_forward
from wslfast.errors import WslfastError
from wslfast.permutation import random_views
from wslfast.population import Population
from wslfast.queries import QueryPool, TargetCache
from wslfast.testing import oracle_outputs, relative_error

ARCH = Architecture.mlp(6, (5, 4), 3)


def _population(k: int = 4) -> Population:
    return Population(ARCH, ARCH.initial_weights(["default"] * k, range(k)))


def test_a_pool_keeps_images_as_float32() -> None:
    images = torch.rand(7, 1, 4, 5, dtype=torch.float64).transpose(2, 3).requires_grad_()
    pool = QueryPool(images)
    assert len(pool) == 7
    assert pool.images.dtype == torch.float32
    assert pool.images.is_contiguous()
    assert not pool.images.requires_grad
    index = torch.tensor([3, 3, 0])
    assert torch.equal(pool[index], images.detach().float()[index])
    assert QueryPool(images, "meta").images.device.type == "meta"


@pytest.mark.parametrize("n", [1, 5, 11])
def test_draws_are_distinct_and_explicit(n: int) -> None:
    pool = QueryPool(torch.rand(11, 6))
    state = torch.get_rng_state()
    drawn = pool.draw(n, torch.Generator().manual_seed(3))
    assert torch.equal(state, torch.get_rng_state())
    assert drawn.shape == (n,)
    assert len(set(drawn.tolist())) == n
    assert set(drawn.tolist()) <= set(range(11))
    assert torch.equal(drawn, pool.draw(n, torch.Generator().manual_seed(3)))
    generator = torch.Generator().manual_seed(3)
    draws = [tuple(pool.draw(5, generator).tolist()) for _ in range(4)]
    assert len(set(draws)) == 4  # the generator moves on


def test_draws_are_uniform() -> None:
    pool, generator = QueryPool(torch.rand(6, 6)), torch.Generator().manual_seed(0)
    counts = Counter(i for _ in range(3000) for i in pool.draw(2, generator).tolist())
    chi2 = sum((counts[i] - 1000) ** 2 / 1000 for i in range(6))
    assert chi2 < 30  # 5 degrees of freedom, p about 1e-5


def test_cache_is_what_recomputing_gives(poisoned_empty: None) -> None:
    population, pool = _population(), QueryPool(torch.randn(9, 6))
    cache = TargetCache(population, pool)
    assert cache.outputs.shape == (4, 9, 3)
    assert relative_error(cache.outputs, oracle_outputs(population.weights, pool.images, ARCH)) < FP32 / 10
    models, queries = torch.tensor([2, 0, 2]), torch.tensor([8, 1])
    expected = batched_forward(population.weights[models], pool[queries], ARCH)
    assert relative_error(cache.targets(models, queries), expected) < FP32 / 10
    assert not cache.outputs.requires_grad


def test_cache_in_blocks_of_queries() -> None:
    population, pool = _population(2), QueryPool(torch.randn(2050, 6))
    assert relative_error(TargetCache(population, pool).outputs, oracle_outputs(population.weights, pool.images, ARCH)) < FP32 / 10


def test_views_share_their_models_row() -> None:
    arch = Architecture.cnn()
    population = Population(arch, arch.initial_weights(["kaiming_uniform"] * 3, range(3)))
    pool = QueryPool(torch.randn(6, 1, 28, 28))
    cache = TargetCache(population, pool)
    models, queries = torch.tensor([0, 2, 2, 1]), torch.tensor([5, 0, 3])
    views = random_views(population.weights[models], arch, torch.Generator().manual_seed(1))
    targets = cache.targets(models, queries)
    assert relative_error(targets, oracle_outputs(views, pool[queries], arch)) < FP32
    value = batched_behavioral_loss(views, None, pool[queries], arch, targets=targets)
    assert float(value) < 1e-9 * cache.variance()


def test_counters() -> None:
    population, pool = _population(), QueryPool(torch.randn(9, 6))
    cache = TargetCache(population, pool)
    assert (cache.computed, cache.served) == (36, 0)
    cache.targets(torch.tensor([0, 1, 1]), torch.tensor([2, 3]))
    cache.targets(torch.tensor([3]), torch.arange(9))
    assert (cache.computed, cache.served) == (36, 15)


def test_variance_is_the_loss_of_the_models_mean_output_at_each_query() -> None:
    population, pool = _population(), QueryPool(torch.randn(50, 6))
    cache = TargetCache(population, pool)
    outputs = oracle_outputs(population.weights, pool.images, ARCH)
    expected = float((outputs - outputs.mean(0)).square().sum((1, 2)).mean() / (2 * 50))
    assert cache.variance() == pytest.approx(expected, rel=FP32)


WRONG: dict[str, tuple[Any, str]] = {
    "images-list": (lambda: QueryPool([1.0]), r"images: expected floating.*got list"),  # type: ignore[arg-type]
    "images-uint8": (lambda: QueryPool(torch.zeros(3, 1, 2, 2, dtype=torch.uint8)), r"images: expected floating.*uint8"),
    "images-none": (
        lambda: QueryPool(torch.zeros(0, 1, 2, 2)),
        r"images: expected floating \[Q, C, H, W\] with Q >= 1, got \[0, 1, 2, 2\]",
    ),
    "images-flat": (lambda: QueryPool(torch.zeros(3)), r"images: expected floating.*got \[3\]"),
    "n-zero": (lambda: QueryPool(torch.zeros(3, 2)).draw(0), r"n: expected 1 to 3 queries.*got 0"),
    "n-many": (lambda: QueryPool(torch.zeros(3, 2)).draw(4), r"n: expected 1 to 3 queries.*got 4"),
    "n-float": (lambda: QueryPool(torch.zeros(3, 2)).draw(2.0), r"n: expected 1 to 3 queries.*got 2.0"),  # type: ignore[arg-type]
    "cache-shape": (lambda: TargetCache(_population(), QueryPool(torch.zeros(3, 5))), r"queries: expected floating \[n, 6\].*got \[3, 5\]"),
    "cache-population": (lambda: TargetCache(torch.zeros(3, 2), QueryPool(torch.zeros(3, 6))), r"population: expected a Population"),  # type: ignore[arg-type]
    "cache-pool": (lambda: TargetCache(_population(), torch.zeros(3, 6)), r"pool: expected a QueryPool"),  # type: ignore[arg-type]
    "cache-empty": (lambda: TargetCache(_population()[:0], QueryPool(torch.zeros(3, 6))), r"expected at least one model"),
}


@pytest.mark.parametrize(("call", "words"), WRONG.values(), ids=WRONG)
def test_bad_arguments(call: Any, words: str) -> None:
    with pytest.raises(WslfastError, match=words):
        call()
