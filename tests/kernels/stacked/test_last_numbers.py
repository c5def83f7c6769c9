"""A tensor's last numbers, which torch computes by another formula than those that fill its vectors: no model may lie there."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
    assert set(TABLE) >= costs.BY_TWO_FORMULAS


class Of(nn.Module):
    """A function as a module, with a layer of its own where it needs one."""

    def __init__(self, run: Callable[..., Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.run, self.layers = run, nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, *self.layers)


class Pairs(nn.Module):
    """Complex kernels of one pixel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width, 1, 1, 2))


def _second_half(function: Callable[[Tensor], Tensor]) -> nn.Module:
    return Of(lambda x: function(x.transpose(1, 2).chunk(2, 1)[1]))


def _gated(run: Callable[[Tensor, Tensor], Tensor], make: Callable[[Tensor], Tensor], layer: nn.Module) -> nn.Module:
    return Of(lambda x, own: run(x, own(make(x)).reshape(*x.shape[:2], *(1,) * (x.ndim - 2))), layer)


def _length(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)


# networks whose numbers lie in runs that models share: a function of a run has another formula for what is left over of vectors
BETWEEN_MODELS: dict[str, tuple[Callable[[], nn.Sequential], tuple[int, ...], int]] = {
    "a cut signal": (lambda: nn.Sequential(nn.Conv1d(8, 2, 1), Of(lambda x: F.softplus(x[..., 1:])), nn.Flatten(), nn.Linear(2, 3)), (8, 2), 100),
    "a cut image": (lambda: nn.Sequential(nn.Conv2d(8, 2, 1), Of(lambda x: F.mish(x[..., 1:])), nn.Flatten(), nn.Linear(2, 3)), (8, 1, 2), 33),
    "half of a norm": (
        lambda: nn.Sequential(nn.Linear(20, 16, bias=False), nn.BatchNorm1d(1), _second_half(torch.sigmoid), nn.Flatten(), nn.Linear(8, 3)),
        (1, 20),
        100,
    ),
    "half of three": (
        lambda: nn.Sequential(nn.Linear(20, 16, bias=False), nn.BatchNorm1d(3), _second_half(F.gelu), nn.Flatten(), nn.Linear(24, 3)),
        (3, 20),
        33,
    ),
    "a gate of volumes": (
        lambda: nn.Sequential(
            nn.Conv3d(2, 4, 1), _gated(torch.maximum, lambda x: x.mean((2, 3, 4)), nn.Linear(4, 4)), nn.Flatten(), nn.Linear(96, 3)
        ),
        (2, 3, 4, 2),
        33,
    ),
    "a bound": (
        lambda: nn.Sequential(
            nn.Conv2d(24, 2, 1), _gated(lambda x, g: torch.minimum(x, g.sigmoid()), _length, nn.Conv2d(2, 2, 1)), nn.Flatten()
        ),
        (24, 2, 2),
        33,
    ),
    "powers": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 2, 1),
            _gated(lambda x, g: (x.abs() + 0.1) ** (g.sigmoid() + 1), lambda x: x.mean((2, 3), keepdim=True), nn.Conv2d(2, 2, 1)),
            nn.Conv2d(2, 3, 1),
            nn.Flatten(),
            nn.Linear(216, 3),
        ),
        (3, 9, 8),
        2,
    ),
    "an island that a convolution reads": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1),
            Of(lambda x, own: F.conv2d(torch.complex(x, x.flip(-1).sin()), torch.view_as_complex(own.weight)).abs(), Pairs(3)),
            nn.GroupNorm(1, 3),
            Of(lambda x, own: torch.maximum(own(x), _length(x)), nn.Conv2d(3, 3, 1)),
            nn.GroupNorm(1, 3),
            nn.Flatten(),
            nn.Linear(72, 3),
        ),
        (2, 8, 3),
        7,
    ),
    "a GLU along a line": (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.GLU(-1), nn.Flatten(), nn.Linear(40, 3)), (3, 5, 4), 7),
}  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("name", BETWEEN_MODELS)
def test_of_numbers_that_lie_between_those_of_other_models(name: str, own: bool, seed: int) -> None:
    make, shape, n = BETWEEN_MODELS[name]
    torch.manual_seed(seed)
    architecture, many = Architecture.from_module(make().eval(), shape), 17
    graph = architecture.graph
    assert graph is not None
    weights = torch.randn(many, architecture.num_weights) * 0.6
    for slot in architecture.parameters:
        if "running_var" in slot.name:
            weights[:, slot.offset : slot.stop].abs_()
    queries = torch.randn(*((many,) if own else ()), n, *shape)
    targets = torch.randn(many, n, *architecture.output_shape)

    def step(order: Sequence[int]) -> tuple[Tensor, ...]:
        rows, x = list(order), queries[list(order)] if own else queries
        losses, gradient = engine.loss_and_gradient(weights[rows], x, targets[rows], graph, "mse")
        return losses, gradient, engine.forward(weights[rows], x, graph)

    whole = step(range(many))
    for order in (*map(range, (1, 2, 3, 4, 5, 9, 16)), range(many - 1, -1, -1), (1, 0, 2), (5, 0), (5, 6, 7, 0)):
        assert all(torch.equal(a, b[list(order)]) for a, b in zip(step(order), whole, strict=True)), order


def test_a_model_is_where_it_is() -> None:
    """Behind a gate, or a length: the loss of a model against its own outputs is zero, and so is its gradient."""
    pixels = nn.Sequential(nn.Conv2d(6, 8, 1), Of(lambda x: F.normalize(x, dim=1)), nn.Flatten())
    gates = nn.Sequential(nn.Linear(6, 64), Of(lambda x: torch.cat([part.sigmoid() for part in x.chunk(4, -1)], -1)), nn.Linear(64, 2))
    for net, shape in ((pixels, (6, 4, 4)), (gates, (6,))):
        graph = Architecture.from_module(net, shape).graph
        assert graph is not None
        weights, queries = torch.randn(5, graph.parameters), torch.randn(33, *shape)
        losses, gradient = engine.loss_and_gradient(weights, queries, engine.forward(weights, queries, graph), graph, "mse")
        assert losses.abs().max() == 0
        assert gradient.abs().max() == 0
