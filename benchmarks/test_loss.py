"""The same providers under pytest-benchmark: ``pytest benchmarks/ --benchmark-only``. The gate runs before the clock."""

from __future__ import annotations

from typing import Any

import pytest

from wslfast import engine

from .bench_loss import BOUND
from .providers import ARCHITECTURES, PROVIDERS, cases, relative_error

SHAPES = {"small": (8, 16), "medium": (16, 64)}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("net", ARCHITECTURES)
@pytest.mark.parametrize("name", PROVIDERS)
def test_loss_and_gradient(name: str, net: str, shape: str, benchmark: Any) -> None:
    architecture = ARCHITECTURES[net]()
    assert relative_error(name, (*next(cases(architecture, 2, 8)), architecture)) <= BOUND
    weights, original, queries = next(cases(architecture, *SHAPES[shape]))
    targets = engine.forward(original, queries, architecture)
    benchmark.group = f"{net} k={SHAPES[shape][0]} n={SHAPES[shape][1]}, targets cached"
    benchmark(PROVIDERS[name], weights, original, queries, targets, architecture)
