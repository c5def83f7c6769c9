"""The same providers under pytest-benchmark: ``pytest benchmarks/ --benchmark-only``. What was timed is checked afterwards."""

from __future__ import annotations

from typing import Any

import pytest

from . import gate
from .cases import ARCHITECTURES, Case, architecture_of
from .providers import PROVIDERS, Unavailable

SHAPES = {"small": (8, 16), "medium": (16, 64)}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("net", ARCHITECTURES)
@pytest.mark.parametrize("name", [name for name in PROVIDERS if name != "vmap-compiled"])  # compiling takes longer than all others together
def test_loss_and_gradient(name: str, net: str, shape: str, benchmark: Any) -> None:
    k, n = SHAPES[shape]
    case = Case(architecture_of(net), k, n)
    given = name != "published"
    try:
        gate.run(name, case, "loss+gradient", given)
    except Unavailable as why:
        pytest.skip(str(why))
    benchmark.group = f"{net} k={k} n={n}, targets {'given' if given else 'recomputed'}"
    found = benchmark(gate.run, name, case, "loss+gradient", given)
    error = gate.judge(found, case, "loss+gradient", "highest")
    benchmark.extra_info["relative_error"] = error


@pytest.mark.parametrize("net", ARCHITECTURES)
@pytest.mark.parametrize("name", ["vmap", "grouped", "loop-channels-last", "wslfast-torch"])
def test_forward(name: str, net: str, benchmark: Any) -> None:
    case = Case(architecture_of(net), 8, 16)
    benchmark.group = f"{net} k=8 n=16, forward"
    found = benchmark(gate.run, name, case, "forward", False)
    benchmark.extra_info["relative_error"] = gate.judge(found, case, "forward", "highest")
