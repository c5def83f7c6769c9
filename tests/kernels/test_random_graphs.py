"""Random graphs stacked, in every way that they run, against the plain reference: one model after another in float64, torch's autograd."""

from __future__ import annotations

import json

import pytest
import torch
from graph_oracle import close, criterion_value
from hypothesis import given, settings
from hypothesis import strategies as st
from random_graphs import graphs
from torch import Tensor

from wslfast.architecture import Architecture
from wslfast.kernels import stacked
from wslfast.kernels.graph import Constant, Graph, Node, slots_of
from wslfast.kernels.reference import run_graph

K = 3


def drawn(graph: Graph, n: int, own: bool, seed: int) -> tuple[Tensor, Tensor]:
    """Weights ``[k, P]`` and queries that float32 holds exactly; variances positive, everything small."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(K, graph.parameters, generator=generator) * 0.5
    for slot in graph.slots:
        if slot.name.startswith("v"):
            rows[:, slot.offset : slot.stop] = rows[:, slot.offset : slot.stop].abs() + 0.5
    return rows, torch.randn(*((K,) if own else ()), n, *graph.input_shape, generator=generator)


def agrees(graph: Graph, n: int, own: bool, seed: int) -> None:
    rows, queries = drawn(graph, n, own, seed)
    w, x = rows.double().requires_grad_(), queries.double().requires_grad_()
    outputs = torch.stack([run_graph(row, x[j] if own else x, graph) for j, row in enumerate(w)])
    targets = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    values = criterion_value(outputs, targets, "mse")
    slopes = torch.autograd.grad(values.sum(), (w, x), allow_unused=True, materialize_grads=True)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 2e-4)):
        weights, images, wanted = rows.to(dtype), queries.to(dtype), targets.to(dtype)
        close(stacked.forward(weights, images, graph), outputs.detach(), tolerance, f"{dtype} outputs")
        losses, gradient = stacked.loss_and_gradient(weights, images, wanted, graph, "mse")
        close(losses, values.detach(), tolerance, f"{dtype} losses")
        close(gradient, slopes[0], 3 * tolerance, f"{dtype} gradient to weights")
        if dtype == torch.float64:
            leaves = weights.requires_grad_(), images.requires_grad_()
            made = criterion_value(stacked.differentiable(*leaves, graph), wanted, "mse")
            found = torch.autograd.grad(made.sum(), leaves, allow_unused=True, materialize_grads=True)
            for a, b, what in zip(found, slopes, ("weights", "queries"), strict=True):
                close(a, b, 3 * tolerance, f"differentiable: gradient to {what}")


def held(graph: Graph) -> Architecture:
    """The graph as it comes back from a file."""
    arch = Architecture("random", graph.input_shape, graph)
    again = Architecture.from_dict(json.loads(json.dumps(arch.to_dict())))
    assert again == arch
    return again


@settings(max_examples=40)
@given(graphs(), st.integers(1, 5), st.booleans(), st.integers(0, 99))
def test_random_graph(graph: Graph, n: int, own: bool, seed: int) -> None:
    held(graph)
    agrees(graph, n, own, seed)


FOUND = {  # by the slow tests below
    "a norm of a constant behind a layer": [
        ("linear", {"input": "@x", "weight": "@w:w", "bias": "@c:b"}),
        ("batch_norm", {"input": "@0", "weight": None, "bias": "@w:b", "running_mean": "@c:b", "running_var": "@w:v", "training": False, "momentum": 0.1, "eps": 0.1}),
    ],
    "a bias that is computed, and a norm": [
        ("mul.Tensor", {"self": "@c:b", "other": 2}),
        ("linear", {"input": "@x", "weight": "@w:w", "bias": "@0"}),
        ("batch_norm", {"input": "@1", "weight": None, "bias": None, "running_mean": "@w:b", "running_var": "@w:v", "training": False, "momentum": 0.1, "eps": 0.1}),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
def test_graph_that_was_found(name: str, own: bool) -> None:
    nodes = tuple(Node(operation, tuple(given.items())) for operation, given in FOUND[name])
    slots = slots_of({"w": (4, 3), "b": (4,), "v": (4,)})
    constant = Constant.of("b", torch.tensor([1.0, -0.5, 0.25, 2.0]))
    agrees(Graph((3,), nodes, f"@{len(nodes) - 1}", slots, (constant,)), 5, own, 0)


@pytest.mark.slow
@settings(max_examples=1500)
@given(graphs(16), st.sampled_from((1, 2, 5, 17)), st.booleans(), st.integers(0, 99))
def test_random_graph_at_length(graph: Graph, n: int, own: bool, seed: int) -> None:
    held(graph)
    agrees(graph, n, own, seed)


@pytest.mark.slow
@settings(max_examples=60)
@given(graphs(10), st.booleans(), st.integers(0, 99))
def test_random_graph_in_slabs(graph: Graph, own: bool, seed: int) -> None:
    agrees(graph, 131, own, seed)
