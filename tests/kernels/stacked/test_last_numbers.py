"""A tensor's last numbers, which torch computes by another formula than those that fill its vectors: no model may lie there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wslfast import Architecture
from wslfast.kernels.graph import Graph
from wslfast.kernels.operations import TABLE, training_graph
from wslfast.kernels.stacked import costs, engine
from wslfast.kernels.stacked.training import training_step

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "mish": F.mish,
    "softplus": F.softplus,
    "elu": F.elu,
    "selu": F.selu,
    "celu": lambda x: F.celu(x, 0.7),
    "exp2": torch.exp2,
    "sinh": torch.sinh,
    "cosh": torch.cosh,
    "atanh": lambda x: torch.atanh(x.tanh() * 0.9),
    "power": lambda x: (x.abs() + 0.1) ** 1.7,
}


class Through(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor], width: int, gate: bool = False) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(40, width), nn.Linear(width, 30)
        self.function, self.gate = function, nn.Parameter(torch.randn(width)) if gate else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(self.function(x) if self.gate is None else x.relu() * self.function(self.gate))


def _steps_alike(
    architecture: Architecture, counts: tuple[int, ...], n: int, step: Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, ...]]
) -> None:
    torch.manual_seed(0)
    many = 70
    weights, queries = torch.randn(many, architecture.num_weights) * 0.4, torch.randn(n, *architecture.input_shape)
    targets = torch.randn(many, n, *architecture.output_shape)
    whole = step(weights, queries, targets, many)
    for count in counts:
        few = step(weights[:count], queries, targets[:count], count)
        assert all(torch.equal(a, b[:count]) for a, b in zip(few, whole, strict=True)), count


def _evaluated(architecture: Architecture) -> Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, ...]]:
    graph = architecture.graph
    assert graph is not None

    def step(weights: Tensor, queries: Tensor, targets: Tensor, count: int) -> tuple[Tensor, ...]:
        return (*engine.loss_and_gradient(weights, queries, targets, graph, "mse"), engine.forward(weights, queries, graph))

    return step


@pytest.mark.parametrize("n", [16, 48])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_of_activations(name: str, n: int) -> None:
    """Three models of seven numbers for sixteen queries leave sixteen behind AVX-512's last vectors."""
    architecture = Architecture.from_module(Through(FUNCTIONS[name], 7), (40,))
    _steps_alike(architecture, (1, 3, 19, 27, 35, 51, 67), n, _evaluated(architecture))


@pytest.mark.parametrize("width", [1, 3, 16, 24])
def test_of_what_weights_alone_make(width: int) -> None:
    architecture = Architecture.from_module(Through(torch.sigmoid, width, gate=True), (40,))
    _steps_alike(architecture, (1, 2, 9, 14, 17, 20, 27, 34, 50), 16, _evaluated(architecture))


@pytest.mark.parametrize("name", ["alpha dropout", "recurrent", "odd"])
def test_of_training_steps(name: str) -> None:
    """Whose queries are as many as there are: none can be filled up, as it would be in the statistics of norms."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru, self.head = nn.GRU(6, 10, batch_first=True), nn.Linear(10, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.dropout(self.gru(x)[0][:, -1], 0.2, self.training))

    net, shape = {
        "alpha dropout": (nn.Sequential(nn.Linear(8, 40), nn.SELU(), nn.AlphaDropout(0.2), nn.Linear(40, 3)), (8,)),
        "recurrent": (Recurrent(), (5, 6)),
        "odd": (nn.Sequential(nn.Linear(8, 33), nn.BatchNorm1d(33), nn.SiLU(), nn.Linear(33, 3)), (8,)),
    }[name]
    architecture = Architecture.from_module(net, shape)
    assert architecture.graph is not None
    graph = training_graph(architecture.graph)

    def step(weights: Tensor, queries: Tensor, targets: Tensor, count: int) -> tuple[Tensor, ...]:
        own = [torch.Generator().manual_seed(i) for i in range(count)]
        losses, gradient, statistics = training_step(weights, queries, targets, graph, "mse", generators=own)
        return losses, gradient, *statistics.values()

    _steps_alike(architecture, (1, 2, 3, 9, 33), 7, step)


def test_groups_of_whole_vectors() -> None:
    def graph_of(net: nn.Module) -> Graph:
        graph = Architecture.from_module(net, (40,)).graph
        assert graph is not None
        return graph

    relu = graph_of(nn.Sequential(nn.Linear(40, 7), nn.ReLU(), nn.Linear(7, 3)))
    narrow, wide = (graph_of(nn.Sequential(nn.Linear(40, c), nn.SiLU(), nn.Linear(c, 3))) for c in (7, 64))
    gate = graph_of(Through(torch.sigmoid, 1, gate=True))
    found = {g: [costs.whole_models(g, (n,), 4) for n in (7, 16, 64)] for g in (relu, narrow, wide, gate)}
    assert found[relu] == found[wide] == [1, 1, 1]
    assert found[narrow] == [32, 2, 1]
    assert found[gate] == [32, 32, 32]
    assert costs.whole_models(narrow, (16,), 2) == 4
    assert set(TABLE) >= costs._BY_TWO_FORMULAS
