"""Views of one model, which share its targets."""

from __future__ import annotations

import pytest
import torch
from loss_cases import case
from tolerances import FP32_DEEP

from wslfast.architecture import Architecture
from wslfast.permutation import random_views
from wslfast.sane import (
    DistillationLoss,
)
from wslfast.sane.views import same_functions, shared_functions
from wslfast.tokens import TokenLayout


@pytest.mark.parametrize(
    "arch", [Architecture.cnn(3), Architecture.cnn3(), Architecture.lenet5(), Architecture.mlp()], ids=lambda a: a.name
)
def test_views_of_one_model_are_found_and_no_others(arch: Architecture) -> None:
    weights = arch.initial_weights(["kaiming_uniform"] * 4, [0, 1, 2, 3])
    views = random_views(weights, arch)
    assert same_functions(torch.cat([weights, views]), arch).all()
    views[2] = random_views(weights[3:], arch)[0]  # another model's
    views[3, 7] += 1e-6  # and nearly the same
    first, of = shared_functions(torch.cat([weights, views]), arch)
    assert first is not None
    assert of is not None
    assert first.tolist() == [0, 1, 2, 3, 6, 7]
    assert of.tolist() == [0, 1, 2, 3, 0, 1, 4, 5]
    assert shared_functions(weights[:3], arch) == (None, None)
    assert shared_functions(torch.full((2, arch.num_weights), float("nan")), arch) == (None, None)


def test_sharing_targets_changes_no_value() -> None:
    checkpoint, params, *_ = case("CNN3")
    arch = Architecture.cnn3(3, "tanh")
    weights = arch.initial_weights(["kaiming_uniform"] * 3, [5, 6, 7])
    x, *_ = TokenLayout(arch).tokenize(torch.cat([weights, random_views(weights, arch)]))
    queries = torch.randn(4, 3, 32, 32)
    together = DistillationLoss(checkpoint, params).values(x * 1.2, x, queries)
    alone = [DistillationLoss(checkpoint, params).values(row[None] * 1.2, row[None], queries) for row in x]
    torch.testing.assert_close(together, torch.cat(alone), rtol=FP32_DEEP, atol=1e-8)
