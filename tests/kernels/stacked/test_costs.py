"""What a graph costs: sizes of groups and slabs, and how many models are worth a thread."""

from __future__ import annotations

from itertools import product

import pytest
from torch import nn

from wslfast import Architecture
from wslfast.kernels.graph import Graph
from wslfast.kernels.stacked import costs


def _graph(*layers: nn.Module, shape: tuple[int, ...] = (64,)) -> Graph:
    graph = Architecture.from_module(nn.Sequential(*layers).eval(), shape).graph
    assert graph is not None
    return graph


def test_sizes_count_numbers_and_products() -> None:
    assert costs.sizes(_graph(nn.Linear(64, 10), nn.ReLU(), nn.Linear(10, 3))) == (10 + 10 + 3, 0, 64 * 10 + 10 * 3)
    made, convolved, products = costs.sizes(_graph(nn.Conv2d(2, 5, 3), nn.Flatten(), nn.Linear(5 * 16, 3), shape=(2, 6, 6)))
    assert (convolved, products) == (5 * 16 * 2 * 9, 80 * 3)
    assert made >= 5 * 16 + 3


def test_a_group_fits_memory_and_a_slab_its_filling() -> None:
    graphs = _graph(nn.Linear(64, 4000), nn.Tanh(), nn.Linear(4000, 4000)), _graph(nn.Linear(64, 3))
    for graph, n in product(graphs, (1, 16, 100, 5000)):
        models, queries = costs.group_shape(graph, n)
        assert models >= 1
        assert queries % costs.FILL == 0
        assert models == 1 or models * graph.parameters * 4 <= 64 << 20


def test_groups_of_convolutions_are_small_where_vectors_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    large, small = (_graph(nn.Conv2d(1, 8, 3, 1, 1), nn.Tanh(), nn.Conv2d(8, 8, 3, 1, 1), shape=(1, side, side)) for side in (32, 4))
    models = {}
    for numbers in (8, 16):
        monkeypatch.setattr(costs, "vector", lambda numbers=numbers: numbers)  # whatever this machine has
        models[numbers] = costs.group_shape(large, 64)[0], costs.group_shape(small, 16)[0]
    assert models == {8: (2, 64), 16: (8, 64)}


def test_more_work_makes_smaller_groups_worth_a_thread() -> None:
    narrow, wide = (
        _graph(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 3)),
        _graph(nn.Linear(64, 800), nn.Tanh(), nn.Linear(800, 800), nn.Tanh()),
    )
    assert costs.least_worth(wide, 512) < costs.least_worth(wide, 1) < costs.least_worth(narrow, 64)
    two, twenty = (
        _graph(*(layer for _ in range(layers) for layer in (nn.Linear(64, 64), *(nn.Tanh() for _ in range(9))))) for layers in (2, 20)
    )
    assert costs.least_worth(twenty, 64) >= costs.least_worth(two, 64)


def test_a_small_call_of_products_is_worth_no_thread() -> None:
    """MKL shares it out sooner than groups begin; not one with as much elsewhere, nor one whose groups take long."""
    products = _graph(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256))
    few = costs.least_worth(products, 8)
    assert 2 * few * costs.operations(products, 1, 8) >= costs._SHARED
    assert costs.least_worth(products, 1024) < few
    elsewhere = _graph(nn.Linear(64, 256), nn.GELU(), nn.Tanh(), nn.Tanh(), nn.Linear(256, 8))
    assert 2 * costs.least_worth(elsewhere, 128) * costs.operations(elsewhere, 1, 128) < costs._SHARED
