"""Models and query images of small runs, for all tests of training."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from training_runs import ARCH

from wslfast import Population


@pytest.fixture(scope="module")
def population() -> Population:
    return Population(ARCH, ARCH.initial_weights(["kaiming_normal"] * 20, range(20)))


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(48, 1, 8, 8, generator=torch.Generator().manual_seed(5))
