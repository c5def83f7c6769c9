"""The library call inside ``torch.compile(fullgraph=True)``: no graph break, the same bits as eager code, errors that arrive."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from small_networks import OPAQUE, SMALL
from tolerances import FP32, FP32_DEEP, FP32_ROUNDING
from torch import Tensor

from wslfast import Architecture, Population, TokenLayout, WslfastError, batched_behavioral_loss, batched_forward, operators
from wslfast.architecture import _of_json, from_handle
from wslfast.testing import as_module

MLP = Architecture.mlp(6, (5, 4), 3)
NETS = {"mlp": MLP, "small": SMALL, "opaque": OPAQUE}


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def _data(architecture: Architecture, k: int = 3, n: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """(weights that require a gradient, queries, targets)."""
    weights = (
        torch.rand(k, architecture.num_weights) if not architecture.planned else architecture.initial_weights(["default"] * k, range(k))
    )
    return weights.requires_grad_(), torch.randn(n, *architecture.input_shape), torch.randn(k, n, architecture.num_classes)


def _same(function: Any, inputs: tuple[Tensor, ...], backend: str = "aot_eager") -> None:
    """Compiled without a graph break: value and gradients equal to the bit, twice over the same graph."""
    wanted = [t for t in inputs if t.requires_grad]
    expected = function(*inputs)
    found = torch.compile(function, fullgraph=True, backend=backend)(*inputs)
    assert torch.equal(found, expected)
    assert found.dtype == expected.dtype
    if wanted:
        assert found.requires_grad
        for _ in range(2):
            pairs = zip(*(torch.autograd.grad(y.sum(), wanted, retain_graph=True) for y in (found, expected)), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("net", NETS)
def test_forward(net: str, backend: str) -> None:
    architecture = NETS[net]
    weights, queries, _ = _data(architecture)
    _same(lambda w, q: batched_forward(w, q, architecture).square(), (weights, queries), backend)


@pytest.mark.parametrize("leaves", ["queries", "both", "neither"])
def test_forward_with_other_leaves(leaves: str) -> None:
    weights, queries, _ = _data(SMALL)
    inputs = weights.detach().requires_grad_(leaves == "both"), queries.requires_grad_(leaves != "neither")
    _same(lambda w, q: batched_forward(w, q, SMALL).tanh(), inputs)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("net", NETS)
def test_loss(net: str, backend: str) -> None:
    architecture = NETS[net]
    weights, queries, targets = _data(architecture)
    _same(lambda w, q, t: batched_behavioral_loss(w, None, q, architecture, targets=t), (weights, queries, targets), backend)


@pytest.mark.parametrize("policy", ["propagate", "omit", "raise"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("gradient", [True, False])
def test_policies_and_reductions(policy: str, reduction: str, gradient: bool) -> None:
    weights, queries, _ = _data(MLP)
    original = weights.detach().roll(1, 0)
    weights = weights.detach().requires_grad_(gradient)
    options: dict[str, Any] = {"nan_policy": policy, "reduction": reduction, "criterion": "distillation", "temperature": 3.0}
    _same(lambda w, q: batched_behavioral_loss(w, original, q, MLP, **options), (weights, queries))


def test_tokens_and_mappings() -> None:
    weights, queries, targets = _data(MLP)
    layout = TokenLayout(MLP, 8)
    tokens = layout.tokenize(weights.detach())[0].requires_grad_()
    _same(lambda t, q: batched_behavioral_loss(t, None, q, MLP, targets=targets), (tokens, queries))
    named = {p.name: weights.detach()[:, p.offset : p.stop].unflatten(1, p.shape).clone().requires_grad_() for p in MLP.parameters}
    leaves = tuple(named.values())
    _same(lambda *parts: batched_forward(dict(zip(named, parts, strict=True)), queries, MLP), leaves)
    population = Population(MLP, weights.detach())
    _same(lambda q: batched_forward(population, q, MLP), (queries,))


def test_autocast_inside_and_around() -> None:
    weights, queries, targets = _data(SMALL)

    def inside(w: Tensor, q: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return batched_forward(w, q, SMALL).float() + batched_behavioral_loss(w, None, q, SMALL, targets=targets)

    def plain(w: Tensor, q: Tensor) -> Tensor:
        return batched_forward(w, q, SMALL)

    _same(inside, (weights, queries))
    compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        assert compiled(weights, queries).dtype == torch.bfloat16
        _same(plain, (weights, queries))
    assert compiled(weights, queries).dtype == torch.float32


def test_float64() -> None:
    weights, queries, targets = _data(SMALL)
    wide = weights.detach().double().requires_grad_()
    _same(lambda w, q: batched_behavioral_loss(w, None, q, SMALL, targets=targets, criterion="softmax_mse"), (wide, queries))


def test_a_training_step_with_changing_sizes() -> None:
    """A decoder before the loss, its gradient, and other k and n without another graph break."""
    decoder = torch.nn.Linear(4, MLP.num_weights)

    def step(codes: Tensor, queries: Tensor, targets: Tensor) -> Tensor:
        return batched_behavioral_loss(decoder(codes), None, queries, MLP, targets=targets) + codes.square().mean()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for k, n in ((3, 4), (5, 4), (6, 7)):
        codes, queries, targets = torch.randn(k, 4), torch.randn(n, 6), torch.randn(k, n, 3)
        slopes = []
        for run in (step, compiled):
            decoder.zero_grad()
            run(codes, queries, targets).backward()
            slopes.append([p.grad.clone() for p in decoder.parameters()])
        assert all(torch.allclose(a, b, rtol=FP32, atol=1e-8) for a, b in zip(*slopes, strict=True))


def test_a_network_that_compiled_code_sees_first() -> None:
    """Its constants have their numbers there, and in eager code afterwards."""

    class Turned(torch.nn.Module):
        order: Tensor
        factors: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.last = torch.nn.Linear(6, 3)
            self.register_buffer("order", torch.arange(6).flip(0))
            self.register_buffer("factors", torch.linspace(0.5, 1, 6), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(x[:, self.order] * self.factors)

    first, second = (Architecture.from_module(Turned(), (6,), name) for name in ("first", "second"))
    weights, queries, _ = _data(first)
    _of_json.cache_clear()
    outputs = torch.compile(lambda w, q: batched_forward(w, q, second), fullgraph=True, backend="aot_eager")(weights, queries)
    assert torch.equal(outputs, batched_forward(weights, queries, first))
    assert torch.equal(outputs, batched_forward(weights, queries, second))


def test_bad_models_and_wrong_arguments_raise_from_compiled_code() -> None:
    weights, queries, targets = _data(MLP)
    weights = weights.detach()
    weights[1, 0] = float("nan")
    weights.requires_grad_()

    def loss(policy: str, **options: Any) -> Any:
        return torch.compile(
            lambda w: batched_behavioral_loss(w, None, queries, MLP, targets=targets, nan_policy=policy, **options),
            fullgraph=True,
            backend="aot_eager",
        )

    with pytest.raises(WslfastError, match=r"models \[1\] of 3"):
        loss("raise")(weights)
    kept = loss("omit")(weights)
    kept.backward()
    assert weights.grad is not None
    assert bool((weights.grad[1] == 0).all())
    assert bool(weights.grad[0].any())
    with pytest.raises(WslfastError, match="nothing to average"):
        loss("omit")((weights.detach() * float("nan")).requires_grad_())
    with pytest.raises(Exception, match=r"criterion: expected one of"):
        loss("propagate", criterion="l3")(weights)


@pytest.mark.parametrize("call", ["forward", "loss"])
def test_differentiated_twice_is_an_error(call: str) -> None:
    weights, queries, targets = _data(MLP)

    def value(w: Tensor) -> Tensor:
        if call == "forward":
            return batched_forward(w, queries, MLP).square().sum()
        return batched_behavioral_loss(w, None, queries, MLP, targets=targets)

    runs = [torch.compile(value, fullgraph=True, backend="eager"), *([value] if call == "loss" else [])]
    for run in runs:
        (slope,) = torch.autograd.grad(run(weights), weights, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable" if call == "loss" else "no autograd formula"):
            (weights.sum() + slope.square().sum()).backward()  # without the error: half a gradient


@pytest.mark.parametrize("net", NETS)
def test_opcheck(net: str) -> None:
    architecture = NETS[net]
    weights, queries, targets = _data(architecture)
    queries.requires_grad_()
    key = architecture.handle
    for autocast in ("", "bfloat16"):
        torch.library.opcheck(operators._forward, (weights, queries, key, "auto", autocast, True))
    torch.library.opcheck(operators._forward, (weights.detach(), queries.detach(), key, "torch", "", False))
    grad = torch.randn_like(targets)
    for asked in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(operators._forward_backward, (grad, weights.detach(), queries.detach(), key, "auto", "", *asked))
    size = max(p.size for p in architecture.parameters)
    tokens = TokenLayout(architecture, size).tokenize(weights).tokens.detach().requires_grad_()
    torch.library.opcheck(operators._detokenize, (tokens, key))
    torch.library.opcheck(operators._tokenize, (weights, key, size))
    options = (key, "softmax_mse", 2.0, "mean", "omit", "auto", "")
    torch.library.opcheck(operators._behavioral_loss, (weights, queries.detach(), targets, *options, True))
    torch.library.opcheck(operators._behavioral_loss, (weights.detach(), queries.detach(), targets, *options, False))


@pytest.mark.parametrize("own", [False, True])
def test_chunks_of_the_backward_pass(own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The queries' gradient adds up over chunks, or has a block for each model."""
    weights, queries, grad = _data(MLP, 5)
    images = torch.randn(5, 4, 6) if own else queries
    arguments = (grad, weights.detach(), images, MLP.handle, "auto", "", True, True)
    whole = operators._forward_backward(*arguments)
    monkeypatch.setattr(operators.engine, "models_per_chunk", lambda *_: 2)
    cut = operators._forward_backward(*arguments)
    assert torch.equal(whole[0], cut[0])
    assert torch.allclose(whole[1], cut[1], rtol=FP32, atol=FP32_ROUNDING)
    wide = [t.detach().double().requires_grad_() for t in (weights, images)]
    expected = torch.autograd.grad(batched_like(wide[0], wide[1]), wide, grad.double())
    assert all(torch.allclose(a.double(), b, rtol=FP32_DEEP, atol=FP32) for a, b in zip(cut, expected, strict=True))


def batched_like(weights: Tensor, images: Tensor) -> Tensor:
    from wslfast.kernels import reference

    return reference.forward(weights, images, MLP.layers)


def test_handles() -> None:
    assert from_handle(MLP.handle) == MLP
    assert copy.deepcopy(MLP).handle == MLP.handle
    assert from_handle(OPAQUE.handle) == OPAQUE
    module = Architecture("hidden", OPAQUE.input_shape, None, as_module(OPAQUE), "hidden by a test")
    handle = module.handle
    assert from_handle(handle) is module
    del module
    gc.collect()
    with pytest.raises(WslfastError, match="kept as long as"):
        from_handle(handle)


def test_weights_by_name_need_no_call_before() -> None:
    architecture = Architecture.mlp(5, (3,), 2, activation="tanh")
    weights, queries, targets = _data(architecture)

    def named(w: Tensor, q: Tensor) -> Tensor:
        parts = {s.name: w[:, s.offset : s.stop].reshape(-1, *s.shape) for s in architecture.parameters}
        return batched_behavioral_loss(parts, None, q, architecture, targets=targets)

    found = torch.compile(named, fullgraph=True, backend="aot_eager")(weights, queries)
    assert torch.equal(found, named(weights, queries))


def test_another_axis_of_classes_needs_one_call_before() -> None:
    architecture = Architecture.from_module(torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.Unflatten(1, (3, 4))), (6,))
    weights, queries, _ = _data(architecture)
    targets = torch.randn(3, 4, 3, 4)

    def loss(w: Tensor, q: Tensor) -> Tensor:
        return batched_behavioral_loss(w, None, q, architecture, targets=targets, criterion="softmax_mse", class_axis=0)

    with pytest.raises(Exception, match=r"call with_classes_last\(0\) of the architecture once"):
        torch.compile(loss, fullgraph=True, backend="aot_eager")(weights, queries)
    torch._dynamo.reset()
    assert architecture.with_classes_last(0) is architecture.with_classes_last(-2)
    _same(loss, (weights, queries))


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.grad_and_value, torch.vmap], ids=["grad", "grad and value", "vmap"])
@pytest.mark.parametrize("call", ["loss", "forward"])
def test_transforms_inside_what_is_compiled(call: str, transform: Any) -> None:
    _, queries, targets = _data(MLP)
    weights = torch.randn(*((5,) if transform is torch.vmap else ()), 3, MLP.num_weights)

    def value(w: Tensor) -> Tensor:
        if call == "forward":
            return batched_forward(w, queries, MLP).square().sum()
        return batched_behavioral_loss(w, None, queries, MLP, targets=targets, nan_policy="propagate")

    found, expected = torch.compile(transform(value), backend="aot_eager")(weights), transform(value)(weights)
    pairs = zip(*(made if isinstance(made, tuple) else (made,) for made in (found, expected)), strict=True)
    assert all(torch.allclose(a, b, rtol=FP32_DEEP, atol=1e-6) for a, b in pairs)


def test_what_a_hook_was_given_is_not_written_over() -> None:
    weights, queries, targets = _data(MLP)
    kept: list[tuple[Tensor, Tensor]] = []

    def pack(saved: Tensor) -> Tensor:
        kept.append((saved, saved.clone()))
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        loss = batched_behavioral_loss(weights, None, queries, MLP, targets=targets)
    (3 * loss).backward()
    assert kept
    assert all(torch.equal(now, then) for now, then in kept)
