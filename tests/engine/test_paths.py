"""The seam: every path computes what the float64 oracle computes, in any chunking."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tolerances import BARS, FP32, FP64, FP64_ROUNDING
from torch import Tensor

from wslfast import engine, errors
from wslfast.architecture import Architecture
from wslfast.engine import paths, verdicts
from wslfast.errors import WslfastError
from wslfast.kernels import reference, stacked
from wslfast.kernels.criteria import CRITERIA
from wslfast.kernels.layers import Activation, Conv2d, Flatten, Linear, Pool2d
from wslfast.testing import as_module, oracle_loss, oracle_outputs, relative_error

ODD = Architecture.from_layers(
    [
        Conv2d("a", 3, 5, (3, 2), (2, 1), (1, 0)), Activation("b", "leakyrelu", 0.3), Pool2d("c", "avg", (2, 3), (1, 2)),
        Conv2d("d", 5, 10, (2, 2), groups=5, bias=False), Activation("e", "gelu", approximate="tanh"),
        Conv2d("f", 10, 3, (2, 1), dilation=(2, 1)), Pool2d("g", "max", (1, 2), (1, 1)), Flatten("h"),
        Linear("i", 6, 7, bias=False), Activation("j", "elu", 0.7), Linear("k", 7, 3),
    ],
    (3, 11, 9), "odd",
)  # fmt: skip
FLAT = Architecture.from_layers([Flatten("a"), Linear("b", 6, 5), Activation("c"), Linear("d", 5, 3)], (6,), "flat")
NETS = {
    "cnn": Architecture.cnn(),
    "cnn3": Architecture.cnn3(),
    "cnn2-silu": Architecture.cnn2(3, "silu", 0.2),
    "lenet5-gelu": Architecture.lenet5(1, "gelu"),
    "mlp": Architecture.mlp(),
    "odd": ODD,
    "flat": FLAT,
}


def _opaque(arch: Architecture) -> Architecture:
    """The same network, hidden from the planner."""
    return Architecture(f"opaque {arch.name}", arch.input_shape, None, as_module(arch), "hidden by a test")


def _models(arch: Architecture, k: int, seed: int = 0) -> Tensor:
    names = ["kaiming_uniform", "default", "xavier_normal"]
    return arch.initial_weights([names[j % 3] for j in range(k)], range(seed, seed + k))


def _case(arch: Architecture, k: int = 3, n: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    queries = torch.randn(n, *arch.input_shape, generator=generator)
    return _models(arch, k), queries, oracle_outputs(_models(arch, k, 100), queries, arch).float()


def _by_name(actual: Tensor, expected: Tensor, arch: Architecture) -> float:
    """The worst relative error of any parameter of any model."""
    return max(
        relative_error(a[s.offset : s.stop], e[s.offset : s.stop]) for a, e in zip(actual, expected, strict=True) for s in arch.parameters
    )


# -- choose ------------------------------------------------------------------------------------------------------------

CHOICES = {
    "cpu": (NETS["cnn3"], "cpu", torch.float32, "auto", {"cpu", "loop"}),
    "cpu-double": (NETS["cnn3"], "cpu", torch.float64, "auto", {"loop"}),
    "cpu-torch": (NETS["cnn3"], "cpu", torch.float32, "torch", {"loop"}),
    "cuda-torch": (NETS["cnn3"], "cuda", torch.float32, "torch", {"stacked"}),
    "cuda-double": (NETS["cnn3"], "cuda", torch.float64, "auto", {"stacked"}),
    "cuda": (NETS["cnn3"], "cuda", torch.float32, "auto", {"triton", "stacked"}),
    "opaque": (_opaque(NETS["mlp"]), "cpu", torch.float32, "auto", {"module"}),
    "opaque-cuda": (_opaque(NETS["mlp"]), "cuda", torch.float32, "auto", {"module"}),
    "opaque-torch": (_opaque(NETS["mlp"]), "cuda", torch.float32, "torch", {"module"}),
}


@pytest.mark.parametrize(("arch", "device", "dtype", "backend", "paths"), CHOICES.values(), ids=CHOICES)
def test_choose(
    arch: Architecture, device: str, dtype: torch.dtype, backend: str, paths: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = engine.choose(arch, device, dtype, backend)
    assert choice.name in paths
    assert choice.reason
    monkeypatch.setenv("WSLFAST_MEMORY_MB", "1")
    rng = torch.get_rng_state()
    assert engine.choose(arch, device, dtype, backend) == choice
    assert torch.equal(rng, torch.get_rng_state())


@pytest.mark.parametrize(
    ("arch", "device", "dtype", "words"),
    [
        (NETS["cnn3"], "cpu", torch.float32, "tensors are on cpu, kernels need cuda"),
        (NETS["cnn3"], "cuda", torch.float64, "no float64"),
        (_opaque(NETS["mlp"]), "cuda", torch.float32, "not a plain chain"),
    ],
    ids=["cpu", "double", "opaque"],
)
def test_triton_that_cannot_be_had_is_an_error(arch: Architecture, device: str, dtype: torch.dtype, words: str) -> None:
    with pytest.raises(WslfastError, match=f"backend='triton' cannot run this: .*{words}"):
        engine.choose(arch, device, dtype, "triton")


# -- paths -------------------------------------------------------------------------------------------------------------

PATHS: dict[str, Callable[[Tensor, Tensor, Architecture], Tensor]] = {
    "served": lambda w, x, a: engine.forward(w, x, a),
    "served-with-graph": lambda w, x, a: engine.forward(w.requires_grad_(), x, a),
    "loop": lambda w, x, a: engine.forward(w, x, a, backend="torch"),
    "stacked": lambda w, x, a: stacked.forward(w, x, a.graph),
    "stacked-with-graph": lambda w, x, a: stacked.differentiable(w.requires_grad_(), x, a.graph),
    "stacked-plain": lambda w, x, a: stacked.plain(w, x, a.graph),
    "module": lambda w, x, a: engine.forward(w, x, _opaque(a)),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("net", NETS)
def test_outputs(net: str, path: str) -> None:
    arch = NETS[net]
    weights, queries, _ = _case(arch)
    expected = oracle_outputs(weights, queries, arch)
    assert relative_error(PATHS[path](weights.clone(), queries, arch), expected) < FP32
    assert relative_error(PATHS[path](weights.double(), queries.double(), arch), expected) < FP64_ROUNDING


@pytest.mark.parametrize("how", ["served", "torch", "opaque"])
@pytest.mark.parametrize("net", NETS)
def test_loss_and_gradient(net: str, how: str) -> None:
    """fp32 gradients by name to 1e-5; max-pool and relu near-ties, where float32 and float64 may pick another branch, do not occur in
    these cases, so there is no further margin."""
    arch = NETS[net]
    weights, queries, targets = _case(arch, 2, 3) if net.startswith("lenet5") else _case(arch)
    ran, backend = (_opaque(arch), "auto") if how == "opaque" else (arch, "auto" if how == "served" else "torch")
    criterion = CRITERIA[list(NETS).index(net) % len(CRITERIA)]
    losses, gradient = engine.loss_and_gradient(weights, queries, targets, ran, criterion, backend=backend)
    expected = oracle_loss(weights, queries, targets, arch, criterion)
    assert relative_error(losses, expected[0]) < FP32
    assert _by_name(gradient, expected[1], arch) < FP32
    exact = engine.loss_and_gradient(weights.double(), queries.double(), targets.double(), ran, criterion, backend=backend)
    assert relative_error(exact[0], expected[0]) < FP64
    assert _by_name(exact[1], expected[1], arch) < FP64


@pytest.mark.parametrize("criterion", CRITERIA)
def test_criteria_and_temperature(criterion: str, poisoned_empty: None) -> None:
    arch = NETS["cnn"]
    weights, queries, targets = _case(arch, 5, 7)
    losses, gradient = engine.loss_and_gradient(weights, queries, targets, arch, criterion, temperature=3.5)
    expected = oracle_loss(weights, queries, targets, arch, criterion, 3.5)
    assert relative_error(losses, expected[0]) < FP32
    assert _by_name(gradient, expected[1], arch) < FP32


@pytest.mark.parametrize("how", ["served", "torch", "opaque"])
def test_labels(how: str) -> None:
    arch = NETS["cnn"]
    weights, queries, _ = _case(arch, 3, 9)
    labels = torch.randint(10, (3, 9))
    ran, backend = (_opaque(arch), "auto") if how == "opaque" else (arch, "auto" if how == "served" else "torch")
    losses, gradient = engine.loss_and_gradient(weights, queries, labels, ran, "cross_entropy", backend=backend)
    module = as_module(arch).double()
    for j in range(3):
        module.load_state_dict({s.name: weights[j, s.offset : s.stop].view(s.shape) for s in arch.parameters})
        module.zero_grad()
        value = F.cross_entropy(module(queries.double()), labels[j])
        value.backward()
        assert float(losses[j]) == pytest.approx(float(value), rel=FP32)
        expected = torch.cat([p.grad.flatten() for p in module.parameters()])  # type: ignore[union-attr]
        assert relative_error(gradient[j], expected) < FP32


@pytest.mark.parametrize("form", ["shared", "own", "pool"])
@pytest.mark.parametrize("how", ["served", "torch", "stacked", "opaque", "opaque-looped"])
def test_a_function_of_the_outputs_is_a_criterion(how: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Huber loss, which no table has, on every path, against torch's own in float64; and that of the table, written as a function."""
    arch, n = NETS["cnn" if how == "opaque-looped" else "mlp"], 7
    weights, pool, _ = _case(arch, 4, n)
    index = torch.randint(n, (4, n), generator=torch.Generator().manual_seed(2))
    queries, chosen = (pool, None) if form == "shared" else (pool[index], None) if form == "own" else (pool, index)
    targets = torch.randn(4, n, 10, generator=torch.Generator().manual_seed(1)) * 3
    ran, backend = (_opaque(arch), "auto") if how.startswith("opaque") else (arch, "auto" if how == "served" else "torch")
    if how == "stacked":
        monkeypatch.setattr(engine, "choose", lambda architecture, *_, **__: paths.Stacked(architecture, "test"))

    def huber(outputs: Tensor, wanted: Tensor) -> Tensor:
        return F.huber_loss(outputs, wanted, reduction="none", delta=0.5).sum((1, 2)) / n

    def mse(outputs: Tensor, wanted: Tensor) -> Tensor:
        return (outputs - wanted).square().sum((1, 2)) / (2 * n)

    values, gradient = engine.loss_and_gradient(weights, queries, targets, ran, huber, backend=backend, index=chosen)
    wide = weights.double().requires_grad_()
    asked = pool.double() if form == "shared" else pool[index].double()
    expected = huber(reference.forward(wide, asked, arch.layers), targets.double())
    (slope,) = torch.autograd.grad(expected.sum(), wide)
    assert relative_error(values, expected.detach()) < FP32
    assert _by_name(gradient, slope, arch) < FP32
    named = engine.loss_and_gradient(weights, queries, targets, ran, "mse", backend=backend, index=chosen)
    written = engine.loss_and_gradient(weights, queries, targets, ran, mse, backend=backend, index=chosen)
    assert all(relative_error(a, b) < FP32 / 10 for a, b in zip(written, named, strict=True))


@pytest.mark.parametrize("how", ["served", "torch", "opaque", "stacked"])
@pytest.mark.parametrize("net", ["cnn", "mlp", "odd", "flat"])
def test_each_model_its_own_queries(net: str, how: str) -> None:
    arch = NETS[net]
    weights, _, targets = _case(arch, 3, 4)
    queries = torch.randn(3, 4, *arch.input_shape)
    expected = torch.cat([oracle_outputs(weights[j : j + 1], queries[j], arch) for j in range(3)])
    if how == "stacked":
        assert arch.graph is not None
        assert relative_error(stacked.forward(weights, queries, arch.graph), expected) < FP32
        losses, gradient = stacked.loss_and_gradient(weights, queries, targets, arch.graph, "mse")
        for j in range(3):
            one = oracle_loss(weights[j : j + 1], queries[j], targets[j : j + 1], arch, "mse")
            assert relative_error(losses[j : j + 1], one[0]) < FP32
            assert _by_name(gradient[j : j + 1], one[1], arch) < FP32
        return
    ran, backend = (_opaque(arch), "auto") if how == "opaque" else (arch, "auto" if how == "served" else "torch")
    assert relative_error(engine.forward(weights, queries, ran, backend=backend), expected) < FP32
    losses, gradient = engine.loss_and_gradient(weights, queries, targets, ran, "mse", backend=backend)
    for j in range(3):
        one = oracle_loss(weights[j : j + 1], queries[j], targets[j : j + 1], arch, "mse")
        assert relative_error(losses[j : j + 1], one[0]) < FP32
        assert _by_name(gradient[j : j + 1], one[1], arch) < FP32


# -- chunks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["served", "torch", "opaque"])
def test_chunks_do_not_change_a_bit(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arch = NETS["cnn3"]
    weights, queries, targets = _case(arch, 5, 8)
    ran, backend = (_opaque(arch), "auto") if how == "opaque" else (arch, "auto" if how == "served" else "torch")

    def everything() -> list[Tensor]:
        w, x = weights.clone().requires_grad_(), queries.clone().requires_grad_()
        outputs = engine.forward(w, x, ran, backend=backend)
        gradients = torch.autograd.grad(outputs.square().sum(), (w, x))
        with torch.no_grad():
            plain = engine.forward(weights, queries, ran, backend=backend)
        return [
            outputs.detach(),
            gradients[0],
            plain,
            *engine.loss_and_gradient(weights, queries, targets, ran, "mse", backend=backend),
            gradients[1],
        ]

    assert engine.models_per_chunk(ran, 8, "cpu") >= 5
    whole = everything()
    monkeypatch.setenv("WSLFAST_MEMORY_MB", "3")
    assert engine.models_per_chunk(ran, 8, "cpu") < 5
    cut = everything()
    for a, b in zip(whole[:-1], cut[:-1], strict=True):
        assert torch.equal(a, b)
    assert relative_error(cut[-1], whole[-1]) < FP32 / 10  # the queries' gradient is a sum over models


@pytest.mark.parametrize("how", ["served", "torch", "opaque"])
def test_a_model_does_not_depend_on_its_neighbours(how: str) -> None:
    arch = NETS["cnn"]
    weights, queries, targets = _case(arch, 7, 5)
    ran, backend = (_opaque(arch), "auto") if how == "opaque" else (arch, "auto" if how == "served" else "torch")
    losses, gradient = engine.loss_and_gradient(weights, queries, targets, ran, "mse", backend=backend)
    for some in ([3], [6, 0], [1, 2, 3, 4, 5]):
        alone = engine.loss_and_gradient(weights[some], queries, targets[some], ran, "mse", backend=backend)
        assert torch.equal(alone[0], losses[some])
        assert torch.equal(alone[1], gradient[some])


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
def test_checkpointed_gradients(own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    arch = NETS["odd"]
    weights, queries, _ = _case(arch, 5, 64)
    queries = torch.randn(5, 64, *arch.input_shape) if own else queries
    monkeypatch.setenv("WSLFAST_MEMORY_MB", "1")
    assert engine.models_per_chunk(arch, 64, "cpu") < 5
    w, x = weights.double().requires_grad_(), queries.double().requires_grad_()
    got = torch.autograd.grad(engine.forward(w, x, arch).square().sum(), (w, x))
    module = as_module(arch).double()

    def one(row: Tensor, images: Tensor) -> Tensor:
        return torch.func.functional_call(module, {s.name: row[s.offset : s.stop].view(s.shape) for s in arch.parameters}, (images,))

    total = sum(one(row, x[j] if own else x).square().sum() for j, row in enumerate(w))
    expected = torch.autograd.grad(total, (w, x))  # type: ignore[arg-type]
    assert relative_error(got[0], expected[0]) < FP64_ROUNDING
    assert relative_error(got[1], expected[1]) < FP64_ROUNDING


def test_more_queries_than_the_kernels_address_run_on_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as make 2^31 numbers of a model, which a GPU's memory holds: refused where kernels are asked for, and not where they are not."""
    pytest.importorskip("triton")
    monkeypatch.setenv("WSLFAST_KERNELS", "on")
    monkeypatch.setattr(verdicts, "interpreted", lambda: False)
    arch = Architecture.cnn3()
    few, many = (engine.Call("loss", 4, n) for n in (1000, 10_000_000))
    assert engine.choose(arch, "cuda", torch.float32, "triton", call=few).name == "triton"
    assert engine.choose(arch, "cuda", torch.float32, "auto", call=few).name == "triton"
    assert engine.choose(arch, "cuda", torch.float32, "auto", call=many).name != "triton"
    with pytest.raises(WslfastError, match=r"10000000 queries are .* address fewer than 2147483648: ask fewer at a time"):
        engine.choose(arch, "cuda", torch.float32, "triton", call=many)


def test_memory_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WSLFAST_MEMORY_MB", raising=False)
    assert engine.memory_budget("cpu") > 1 << 28
    monkeypatch.setenv("WSLFAST_MEMORY_MB", "3")
    assert engine.memory_budget("cpu") == engine.memory_budget("cuda") == 3 << 20
    for wrong in ("0", "-1", "many", "", "1.5", "²"):
        monkeypatch.setenv("WSLFAST_MEMORY_MB", wrong)
        with pytest.raises(WslfastError, match="WSLFAST_MEMORY_MB: expected a positive integer, got"):
            engine.memory_budget("cpu")


def test_a_model_too_large_for_the_budget_still_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WSLFAST_MEMORY_MB", "1")
    assert engine.models_per_chunk(NETS["lenet5-gelu"], 10_000, "cpu") == 1


# -- precision ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["served", "torch", "opaque"])
def test_bf16_autocast(how: str) -> None:
    """design.md section 5: forward 3e-2, linear 6e-2, conv 1e-1, first conv 2e-1."""
    arch = NETS["cnn3"]
    weights, queries, targets = _case(arch, 3, 16)
    ran, backend = (_opaque(arch), "auto") if how == "opaque" else (arch, "auto" if how == "served" else "torch")
    with torch.autocast("cpu", torch.bfloat16):
        outputs = engine.forward(weights, queries, ran, backend=backend)
        losses, gradient = engine.loss_and_gradient(weights, queries, targets, ran, "mse", backend=backend)
    assert outputs.dtype == torch.bfloat16
    assert losses.dtype == gradient.dtype == torch.float32
    assert relative_error(outputs, oracle_outputs(weights, queries, arch)) < BARS["bf16"].outputs
    expected = oracle_loss(weights, queries, targets, arch, "mse")
    assert relative_error(losses, expected[0]) < BARS["bf16"].outputs
    bars = BARS["bf16"]
    for slot in arch.parameters:
        bound = (
            bars.first
            if ".0." in slot.name
            else bars.convolution
            if len(arch.slots[slot.name.replace("bias", "weight")].shape) == 4
            else bars.linear
        )
        part = slice(slot.offset, slot.stop)
        assert relative_error(gradient[:, part], expected[1][:, part]) < bound, slot.name


def test_nothing_is_written_into_the_arguments() -> None:
    arch = NETS["cnn"]
    weights, queries, targets = _case(arch)
    before = [weights.clone(), queries.clone(), targets.clone()]
    engine.forward(weights, queries, arch)
    losses, gradient = engine.loss_and_gradient(weights, queries, targets, arch, "mse")
    assert all(torch.equal(a, b) for a, b in zip(before, (weights, queries, targets), strict=True))
    assert not losses.requires_grad
    assert not gradient.requires_grad


def test_repeatable_to_the_bit() -> None:
    arch = NETS["cnn3"]
    weights, queries, targets = _case(arch, 9, 33)
    a = engine.loss_and_gradient(weights, queries, targets, arch, "distillation")
    b = engine.loss_and_gradient(weights, queries, targets, arch, "distillation")
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1], b[1])


def test_module_is_said_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "_said", set())
    arch = _opaque(NETS["mlp"])
    weights, queries, targets = _case(NETS["mlp"])
    with caplog.at_level(logging.INFO, logger="wslfast"):
        engine.forward(weights, queries, arch)
        engine.loss_and_gradient(weights, queries, targets, arch, "mse")
    assert len([r for r in caplog.records if "run as a module" in r.message]) == 1
