"""Views of any network: the same outputs in float64 from permuted weights, of some forty networks, group by group."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from torch import Tensor, nn
from view_networks import CASES, queries

from wslfast.architecture import Architecture
from wslfast.permutation import hidden_channels, inverse, permute, random_permutations
from wslfast.population import unstack
from wslfast.testing import relative_error


@lru_cache(maxsize=None)
def _network(name: str) -> tuple[nn.Module, Architecture]:
    torch.manual_seed(0)
    module = CASES[name].make().eval()
    arch = Architecture.from_module(module, CASES[name].input_shape, name)
    assert arch.graph is not None, arch.reason
    return module.double(), arch


def _weights(arch: Architecture, k: int) -> Tensor:
    rows = torch.randn(k, arch.num_weights, dtype=torch.float64) / 2
    for slot in arch.parameters:
        if slot.name.endswith("running_var"):
            rows[:, slot.offset : slot.stop] = rows[:, slot.offset : slot.stop].abs() + 0.1
    return rows


def _outputs(name: str, weights: Tensor, x: Tensor) -> Tensor:
    """The module itself, one model after another."""
    module, arch = _network(name)
    named = unstack(weights, arch)
    with torch.no_grad():
        return torch.stack([torch.func.functional_call(module, {n: v[j] for n, v in named.items()}, (x,)) for j in range(len(weights))])


@pytest.mark.parametrize("name", CASES)
def test_views_are_the_same_function(name: str) -> None:
    arch = _network(name)[1]
    weights, x = _weights(arch, 3), queries(CASES[name], 3)
    expected = _outputs(name, weights, x)
    drawn = random_permutations(arch, 3, torch.Generator().manual_seed(1))
    views = permute(weights, arch, drawn)
    assert relative_error(_outputs(name, views, x), expected) < 1e-9
    assert hidden_channels(arch) == CASES[name].groups
    assert torch.equal(permute(views, arch, inverse(drawn)), weights)
    assert torch.equal(views.sort(1).values, weights.sort(1).values)  # nothing is lost or doubled
    if drawn:
        assert not torch.equal(views, weights)
        assert float(expected.std(0).norm()) > 0.1  # other weights are another function: the comparison can fail
