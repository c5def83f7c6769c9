"""Chains of layer records as graphs and back: what a record means is what torch's own module computes, in float64."""

from __future__ import annotations

import pytest
import torch
from tolerances import FP64_ROUNDING
from torch import Tensor, nn

from wslfast import Architecture
from wslfast.kernels import reference
from wslfast.kernels.chains import chain_of, graph_of
from wslfast.kernels.layers import ACTIVATIONS, Activation, Linear, Pool2d

MODULES = {
    "relu": nn.ReLU(), "leakyrelu": nn.LeakyReLU(0.3), "tanh": nn.Tanh(), "sigmoid": nn.Sigmoid(), "silu": nn.SiLU(), "gelu": nn.GELU("tanh"),
    "elu": nn.ELU(0.7), "celu": nn.CELU(1.3), "softplus": nn.Softplus(2.5), "identity": nn.Identity(),
}  # fmt: skip


def _outputs(module: nn.Module, arch: Architecture, queries: Tensor) -> tuple[Tensor, Tensor]:
    """What the module gives, and what the records do with its weights."""
    row = torch.cat([p.detach().flatten() for p in module.parameters()])
    return module(queries).detach(), reference.forward(row[None], queries, arch.layers)[0]


@pytest.mark.parametrize("function", ACTIVATIONS)
def test_every_activation_is_its_module(function: str) -> None:
    assert set(MODULES) == set(ACTIVATIONS)
    module = nn.Sequential(nn.Linear(5, 4), MODULES[function], nn.Linear(4, 3)).double()
    arch = Architecture.from_module(module, (5,))
    assert [a.function for a in arch.layers if isinstance(a, Activation)] == [function] * (function != "identity")
    assert chain_of(graph_of(arch.layers, (5,))) == arch.layers
    expected, actual = _outputs(module, arch, 30 * torch.randn(7, 5, dtype=torch.float64))
    torch.testing.assert_close(actual, expected, rtol=FP64_ROUNDING, atol=FP64_ROUNDING)


def test_a_softplus_with_another_threshold_is_no_record() -> None:
    module = nn.Sequential(nn.Linear(5, 4), nn.Softplus(1.0, threshold=3), nn.Linear(4, 3)).double()
    arch = Architecture.from_module(module, (5,))
    assert arch.layers == ()
    queries = torch.randn(7, 5, dtype=torch.float64)
    row = torch.cat([p.detach().flatten() for p in module.parameters()])
    torch.testing.assert_close(reference.run_graph(row, queries, arch.graph), module(queries).detach())


def test_the_average_of_a_whole_map_is_one_window() -> None:
    module = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).double()
    arch = Architecture.from_module(module, (2, 7, 9))
    assert arch.layers[2] == Pool2d(arch.layers[2].name, "avg", (5, 7), (5, 7))
    expected, actual = _outputs(module, arch, torch.randn(6, 2, 7, 9, dtype=torch.float64))
    torch.testing.assert_close(actual, expected, rtol=FP64_ROUNDING, atol=FP64_ROUNDING)


def test_the_average_to_more_than_one_pixel_is_no_record() -> None:
    module = nn.Sequential(nn.Conv2d(2, 4, 3), nn.AdaptiveAvgPool2d((2, 1)), nn.Flatten(), nn.Linear(8, 3))
    assert Architecture.from_module(module, (2, 7, 9)).layers == ()


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown activation 'softsign'"):
        reference.activation(torch.zeros(2), Activation("a", "softsign"))
    with pytest.raises(KeyError, match="softsign"):
        graph_of((Linear("l", 3, 2), Activation("a", "softsign")), (3,))
