"""The gradient to the queries, in the interpreter, against float64 and torch's own graph."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import CASES, HEADS, MLP, SMALL, Net, error, gradient_errors, make
from torch import Tensor

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("needs TRITON_INTERPRET=1 when triton is first imported", allow_module_level=True)

from wslfast import Architecture, engine
from wslfast.engine.triton_path import Triton, reaches_queries
from wslfast.kernels import reference
from wslfast.kernels.layers import Linear, Unplannable
from wslfast.kernels.triton.budget import model_bytes
from wslfast.kernels.triton.differentiable import differentiable_forward
from wslfast.kernels.triton.query_gradient import gradients, layers_on_queries
from wslfast.kernels.triton.schedule import schedule

ONE_LAYER = Net((Linear("only", 5, 3),), (5,))
QUICK = {"mlp": MLP, "one layer": ONE_LAYER, "small": SMALL}
SLOW = {
    name: {**CASES, **HEADS}[name]
    for name in ("stride_2_and_pool", "cropped", "same_padding", "act_then_average", "gelu_before_max", "linear_wide", "head_relu",
                 "head_sigmoid_last", "kernel_7_same")
}  # fmt: skip


def _truth(weights: Tensor, queries: Tensor, slope: Tensor, case: Net) -> tuple[Tensor, Tensor]:
    w, x = weights.double().requires_grad_(), queries.double().requires_grad_()
    return torch.autograd.grad(reference.forward(w, x, case.layers), (w, x), slope.double())


def _check(case: Net, precision: str, bar: float, memory: int | None = None) -> None:
    weights, queries, slope = make(case, 3, 4)
    for x in (queries, torch.randn(3, *queries.shape)):
        found, to_queries = gradients(weights, x, slope, case.layers, precision, memory=memory)
        expected, to_expected = _truth(weights, x, slope, case)
        assert to_queries.shape == x.shape
        assert error(to_queries, to_expected) < bar
        assert max(gradient_errors(found, expected, case.layers).values()) < bar


@pytest.mark.parametrize("name", QUICK)
def test_against_float64(name: str, poisoned_empty: None) -> None:
    _check(QUICK[name], "ieee", 5e-6)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("precision", ["ieee", "fp16", "tf32"])
@pytest.mark.parametrize("name", SLOW)
def test_every_kind_of_network(name: str, precision: str, poisoned_empty: None) -> None:
    _check(SLOW[name], precision, {"ieee": 1e-5, "tf32": 8e-2, "fp16": 8e-2}[precision])


def test_chunks_of_models_add_up(poisoned_empty: None) -> None:
    planned = schedule(layers_on_queries(SMALL.layers, SMALL.shape), SMALL.shape)
    _check(SMALL, "ieee", 5e-6, memory=model_bytes(planned, 4, "ieee", True))


def test_through_the_graph_of_the_outputs() -> None:
    weights, queries, slope = make(SMALL, 3, 4)
    w, x = weights.clone().requires_grad_(), queries.clone().requires_grad_()
    outputs = differentiable_forward(w, x, SMALL.layers, "ieee")
    found = torch.autograd.grad((outputs * slope).sum(), (w, x))
    for a, b in zip(found, _truth(weights, queries, slope, SMALL), strict=True):
        assert error(a, b) < 5e-6
    x = queries.clone().requires_grad_()
    (alone,) = torch.autograd.grad((differentiable_forward(weights, x, SMALL.layers, "ieee") * slope).sum(), x)
    assert torch.equal(alone, found[1])


def test_where_it_is_not_given() -> None:
    with pytest.raises(Unplannable, match="vectors of 300 numbers"):
        layers_on_queries((Linear("a", 300, 3),), (300,))
    arch = Architecture.from_layers(SMALL.layers, SMALL.shape)
    assert reaches_queries(arch)
    assert not reaches_queries(Architecture.from_layers([Linear("a", 300, 3)], (300,)))


def test_the_engine_takes_the_kernels_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU; on a CPU whatever serves there, through torch's graph."""
    arch = Architecture.from_layers(SMALL.layers, SMALL.shape)
    weights, queries, _ = make(SMALL, 2, 3)
    asked: list[str] = []
    real = engine.choose

    def choose(architecture: Architecture, device: str, dtype: torch.dtype, backend: str = "auto", *rest: object) -> object:
        asked.append(backend)
        return real(architecture, device, dtype, backend, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(engine, "choose", choose)
    engine.forward(weights, queries.clone().requires_grad_(), arch)
    assert asked == ["auto"]
    path = Triton(arch, "a test")
    x = queries.clone().requires_grad_()
    path.forward(weights, x, True).sum().backward()
    _, expected = _truth(weights, queries, torch.ones(2, 3, 3), SMALL)
    assert error(x.grad, expected) < 1e-3
