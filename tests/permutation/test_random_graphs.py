"""Views of random networks: no derived group fails its trial, and outputs are the same from permuted weights."""

from __future__ import annotations

import pytest
import torch
from random_networks import RandomNetwork
from tolerances import FP64_GRADIENT

from wslfast import Architecture
from wslfast.permutation import kept_channels, random_views
from wslfast.population import unstack
from wslfast.testing import relative_error

FEW, MANY = range(6), range(1000, 1060)  # six hundred were tried once
SEEDS = [*FEW, *(pytest.param(seed, marks=pytest.mark.slow) for seed in MANY)]


@pytest.mark.parametrize("seed", SEEDS)
def test_views_of_a_random_network(seed: int) -> None:
    torch.manual_seed(seed)
    module = RandomNetwork(seed, 3 + seed % 9).eval()
    arch = Architecture.from_module(module, (5,))
    assert arch.graph is not None, arch.reason
    assert not any("changes the outputs" in why for why in kept_channels(arch).values())  # the rules are right without the trial
    weights, x = torch.randn(2, arch.num_weights, dtype=torch.float64) / 2, torch.randn(3, 5, dtype=torch.float64)
    for slot in arch.parameters:
        if slot.name.endswith("running_var"):
            weights[:, slot.offset : slot.stop] = weights[:, slot.offset : slot.stop].abs() + 0.1
    exact, views = module.double(), random_views(weights, arch, torch.Generator().manual_seed(1))
    for one, other in zip(weights, views, strict=True):
        answers = [torch.func.functional_call(exact, {n: v[0] for n, v in unstack(row[None], arch).items()}, (x,)) for row in (one, other)]
        assert relative_error(answers[1], answers[0]) < FP64_GRADIENT
