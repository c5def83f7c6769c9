"""Segments: what is taken into a run of layers, what ends it, and that it computes what the modules compute."""

from __future__ import annotations

import pytest
import torch
from graph_oracle import close, criterion_value, loop, looped, queries_like, rows_near
from segment_cases import CASES, Case, found, traced
from torch import nn

from wslfast.architecture import Architecture
from wslfast.kernels import stacked
from wslfast.kernels.reference import value_shapes
from wslfast.kernels.stacked.rows import rows_of
from wslfast.kernels.stacked.segments import segments
from wslfast.kernels.stacked.through import Through

TOLERANCE = 1e-5
QUICK = (
    "norm behind",
    "norm ahead of a padded one",
    "norm ahead of groups",
    "one dimension",
    "first in groups",
    "residual",
    "padded pools",
    "mean over pixels",
)


@pytest.mark.parametrize("name", CASES)
def test_what_is_taken_in(name: str) -> None:
    case = CASES[name]
    _, _, graph = traced(case)
    runs = found(graph)
    assert tuple(len(run.nodes) for run in runs) == case.runs, graph.nodes
    assert tuple(type(layer).__name__ for run in runs for layer in run.layers) == case.kinds


def compared(case: Case, n: int, own: bool, tolerance: float = TOLERANCE, k: int = 3) -> None:
    """Outputs, losses and gradients of the stacked engine in float32 against the float64 loop."""
    module, arch, graph = traced(case)
    weights = rows_near(module, arch, k)
    queries = queries_like(module, arch, *((k,) if own else ()), n)
    outputs, targets, values, slope = looped(module, arch, weights, queries)
    rows, x, wanted = weights.float(), queries.float(), targets.float()
    close(stacked.forward(rows, x, graph), outputs, tolerance, "outputs")
    losses, gradient = stacked.loss_and_gradient(rows, x, wanted, graph, "mse")
    close(losses, values, tolerance, "losses")
    for slot in graph.slots:
        close(gradient[:, slot.offset : slot.stop], slope[:, slot.offset : slot.stop], 5 * tolerance, f"gradient of {slot.name}")
    again = stacked.loss_and_gradient(rows, x, wanted, graph, "mse")
    assert torch.equal(again[0], losses)
    assert torch.equal(again[1], gradient)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in CASES])
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
def test_values_and_gradients(name: str, own: bool) -> None:
    compared(CASES[name], 5, own)


@pytest.mark.parametrize("own", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["shared", "own"])
@pytest.mark.parametrize(
    "name", ["norm ahead of a padded one", "residual", pytest.param("one dimension to the end", marks=pytest.mark.slow)]
)
def test_several_slabs(name: str, own: bool) -> None:
    n = 150
    _, _, graph = traced(CASES[name])
    assert stacked.group_shape(graph, n)[1] < n
    compared(CASES[name], n, own, 2e-5)


@pytest.mark.parametrize(
    "name",
    [
        "norm behind",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("conv to the end", "residual", "one dimension", "norm ahead of a padded one")
        ),
    ],
)
def test_under_autocast(name: str) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        module, arch, graph = traced(CASES[name])
        rows = rows_near(module, arch, 3).float()
        made = stacked.forward(rows, queries_like(module, arch, 5).float(), graph)
        assert made.dtype == torch.bfloat16
    weights, queries = rows.double().requires_grad_(), queries_like(module, arch, 5)
    outputs = loop(module, arch, weights, queries)
    close(made.double(), outputs.detach(), 3e-2, "outputs")
    targets = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    values = criterion_value(outputs, targets, "mse")
    (slope,) = torch.autograd.grad(values.sum(), weights)
    with torch.autocast("cpu", torch.bfloat16):
        losses, gradient = stacked.loss_and_gradient(rows, queries.float(), targets.float(), graph, "mse")
    assert losses.dtype == gradient.dtype == torch.float32
    close(losses, values.detach(), 3e-2, "losses")
    close(gradient, slope, 1e-1, "gradient")


def test_segments_meet_what_comes_without_them() -> None:
    """A gradient to queries is asked for: then nothing is a segment, and outputs are the same to rounding."""
    module, arch, graph = traced(CASES["residual"])
    rows, x = rows_near(module, arch, 3).float(), queries_like(module, arch, 5).float()
    close(
        stacked.differentiable(rows.requires_grad_(), x, graph).detach(),
        stacked.forward(rows.detach(), x, graph).double(),
        TOLERANCE,
        "outputs",
    )
    assert found(graph)


@pytest.mark.parametrize(("models", "queries"), [(1, 16), (3, 1), (1, 1), (3, 16)])
@pytest.mark.parametrize("flat", [True, False], ids=["flattened", "images"])
def test_the_outputs_gradient_stays_as_it_is(models: int, queries: int, flat: bool) -> None:
    """It may be somebody else's as well: both operands of a sum get the same one. An activation writes over what reaches it."""
    parts = (nn.Conv2d(2, 5, 4), nn.ReLU(), *((nn.Flatten(),) if flat else ()))
    graph = Architecture.from_module(nn.Sequential(*parts), (2, 4, 4)).graph
    assert graph is not None
    (segment,) = segments(graph, value_shapes(graph), graph.readers())
    rows = torch.randn(models, graph.parameters)
    leaves = {f"@w:{slot.name}": rows[:, slot.offset : slot.stop].view(models, *slot.shape) for slot in graph.slots}
    rule = Through(segment, True, frozenset({"rows"}))
    y, saved = rule.forward({"x": torch.randn(queries, 2, 4, 4), "rows": rows_of(segment, leaves)}, models)
    slope = torch.randn(y.shape)
    before = slope.clone()
    rule.backward(slope, saved, models)
    assert torch.equal(slope, before)
