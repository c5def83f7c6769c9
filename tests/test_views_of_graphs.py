"""Views of any network: the same outputs in float64 from permuted weights, of some forty networks, group by group."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from torch import Tensor
from view_networks import CASES, queries

from wslfast.architecture import Architecture
from wslfast.permutation import hidden_channels, inverse, permute, random_permutations
from wslfast.testing import oracle_outputs, relative_error


@lru_cache(maxsize=None)
def _architecture(name: str) -> Architecture:
    torch.manual_seed(0)
    arch = Architecture.from_module(CASES[name].make(), CASES[name].input_shape, name)
    assert arch.graph is not None, arch.reason
    return arch


def _weights(arch: Architecture, k: int) -> Tensor:
    rows = torch.randn(k, arch.num_weights, dtype=torch.float64) / 2
    for slot in arch.parameters:
        if slot.name.endswith("running_var"):
            rows[:, slot.offset : slot.stop] = rows[:, slot.offset : slot.stop].abs() + 0.1
    return rows


@pytest.mark.parametrize("name", CASES)
def test_views_are_the_same_function(name: str) -> None:
    arch = _architecture(name)
    assert hidden_channels(arch) == CASES[name].groups
    weights, x = _weights(arch, 3), queries(CASES[name], 3)
    expected = oracle_outputs(weights, x, arch)
    drawn = random_permutations(arch, 3, torch.Generator().manual_seed(1))
    views = permute(weights, arch, drawn)
    assert relative_error(oracle_outputs(views, x, arch), expected) < 1e-9
    assert torch.equal(permute(views, arch, inverse(drawn)), weights)
    assert torch.equal(views.sort(1).values, weights.sort(1).values)  # nothing is lost or doubled
    if drawn:
        assert all(not torch.equal(v, w) for v, w in zip(views, weights, strict=True))
        assert float(expected.std(0).norm()) > 0.1  # other weights are another function: the comparison can fail
