"""The whole network in one launch, in Triton's interpreter: against float64 autograd and against the layer-by-layer path.

Blocks of two queries and parts of four, so that five queries are several of both.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from kernel_cases import CASES, HEADS, MLP, SMALL, Block, Net, cnn3, cnn28, error, gradient_errors, lenet5, make, net, oracle, random_net
from tolerances import FP32
from torch import Tensor

from wslfast.kernels import reference
from wslfast.kernels.layers import Unplannable
from wslfast.kernels.triton.schedule import schedule

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("needs TRITON_INTERPRET=1 when triton is first imported", allow_module_level=True)

from wslfast.kernels.triton import budget, network_layout
from wslfast.kernels.triton import launch as kernels
from wslfast.kernels.triton import network_launch as whole
from wslfast.kernels.triton.configurations import CHOICES, tuned
from wslfast.kernels.triton.differentiable import differentiable_forward

SCALES = {"mlp": MLP, "small": SMALL, "cnn3": cnn3(), "cnn28": cnn28(), "lenet5": lenet5()}
# What a scratch holds and who reads it differs: maxima, slopes a pooled position, slopes a window position, several output and
# channel blocks, weights that are not held.
NETWORKS = {
    "one_stage", "mlp", "small", "same_padding", "stride_2_and_pool", "dx_through_stride_2_and_pool", "average_then_act",
    "act_then_average", "act_then_average_wide", "gelu_before_max", "silu_after_max", "negative_leak_before_max", "no_bias_no_act",
    "channels_33_64_63", "linear_wide", "silu_last", "activation_last", "head_on_window_average", "cnn3", "cnn28", "lenet5",
}  # fmt: skip
QUICK = ("one_stage", "mlp", "small", "average_then_act", "gelu_before_max", "silu_last")
TINY = net((2, 4, 4), Block(3, pool="max", act="tanh"))
SLOPED = net((2, 6, 6), Block(3, pool="max", act="silu"), hidden=((5, "relu"),))
ALL = {"one_stage": net((5,)), **SCALES, **CASES, **HEADS}


def _marked(names: Any) -> list[Any]:
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in sorted(names)]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(network_layout, "query_block", lambda *_: 2)
    monkeypatch.setattr(network_layout, "PART", 4)
    for kept in (network_layout.network, whole._specialised):
        kept.cache_clear()
    yield
    for kept in (network_layout.network, whole._specialised):
        kept.cache_clear()


@pytest.mark.parametrize("first", ["default", "pipelined"])
def test_every_choice_has_launch_parameters_of_its_own(first: str) -> None:
    """Whichever is asked for first in a process: one that is proved and timed is the one that runs."""
    whole._specialised.cache_clear()
    planned, cpu = schedule(SMALL.layers, SMALL.shape), torch.device("cpu")
    turns = {"default": {1}, "pipelined": {2}}
    for name in (first, "default", "pipelined", "default"):
        with tuned(CHOICES[name]):
            layout = whole.specialised(planned, "tf32", True, cpu)
        assert {c.STAGES for c in (*layout.forward, *layout.dx)} == turns[name]


def _loss(
    case: Net, *arguments: Any, precision: str = "ieee", criterion: str = "mse", mode: str = "network", **more: Any
) -> tuple[Tensor, Tensor]:
    weights, queries, targets = arguments
    return kernels.loss_and_gradient(weights, queries, targets, case.layers, criterion, 2.0, precision, mode=mode, **more)


def _compare(case: Net, k: int, n: int, tolerance: float = 5e-6) -> None:
    weights, queries, targets = make(case, k, n)
    outputs = kernels.forward(weights, queries, case.layers, "ieee", mode="network")
    assert error(outputs, reference.forward(weights.double(), queries.double(), case.layers)) < tolerance
    losses, gradient = _loss(case, weights, queries, targets)
    expected, slopes = oracle(weights, queries, targets, case.layers, "mse")
    assert error(losses, expected) < tolerance
    assert max(gradient_errors(gradient, slopes, case.layers).values()) < tolerance


@pytest.mark.parametrize("name", _marked(NETWORKS))
def test_against_float64(name: str, poisoned_empty: None) -> None:
    _compare(ALL[name], 1 if name in ("cnn3", "cnn28", "lenet5") else 2, 2 if name == "lenet5" else 3)


@pytest.mark.parametrize(("k", "n"), [(1, 1), (3, 1), (1, 5), (3, 5), (3, 8)])
def test_odd_sizes(k: int, n: int, poisoned_empty: None) -> None:
    _compare(MLP, k, n)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_random_networks(seed: int, poisoned_empty: None) -> None:
    _compare(random_net(100 + seed), 1 + seed % 2, 1 + seed % 4)


@pytest.mark.parametrize("criterion", ["softmax_mse", "cross_entropy", "distillation", "labels", "gradient"])
def test_criteria(criterion: str, poisoned_empty: None) -> None:
    weights, queries, targets = make(MLP, 2, 7)
    if criterion == "labels":
        criterion, targets = "cross_entropy", torch.randint(0, 3, (2, 7))
    found = _loss(MLP, weights, queries, targets, criterion=criterion)
    layers = _loss(MLP, weights, queries, targets, criterion=criterion, mode="layers")
    if criterion == "gradient":
        assert torch.equal(found[0], torch.zeros(2))
    else:
        expected = oracle(weights, queries, targets, MLP.layers, criterion)
        assert error(found[0], expected[0]) < FP32 / 2
        assert error(found[1], expected[1]) < FP32 / 2
    assert error(found[1], layers[1]) < FP32 / 10


@pytest.mark.parametrize("precision", ["ieee", "tf32", "fp16", pytest.param("bf16", marks=pytest.mark.slow)])
def test_both_paths_compute_the_same_numbers(precision: str, poisoned_empty: None) -> None:
    """The same operands, rounded the same way: equal up to the order of fp32 sums, in which two matrix products may differ."""
    weights, queries, targets = make(SLOPED, 2, 3)
    arguments = (weights, queries, SLOPED.layers, precision)
    assert error(kernels.forward(*arguments, mode="network"), kernels.forward(*arguments, mode="layers")) < FP32 / 10
    found = _loss(SLOPED, weights, queries, targets, precision=precision)
    layers = _loss(SLOPED, weights, queries, targets, precision=precision, mode="layers")
    assert error(found[0], layers[0]) < FP32 / 10
    assert error(found[1], layers[1]) < FP32 / 10


def test_losses_far_off_and_tiny_keep_their_gradient_in_fp16() -> None:
    """Every block has its own gain: a block of tiny gradients keeps its digits, whatever the block before it held."""
    weights, queries, targets = make(MLP, 2, 4)
    scales = torch.tensor([1e5, 1e5, 1e-7, 1e-7])[None, :, None]
    wide = weights.double().requires_grad_()
    for picked in (scales, scales.flip(1), scales * (scales < 1)):
        grad = picked * targets
        _, gradient = _loss(MLP, weights, queries, grad, precision="fp16", criterion="gradient")
        (expected,) = torch.autograd.grad(reference.forward(wide, queries.double(), MLP.layers), wide, grad.double())
        assert error(gradient, expected) < 3e-3


# -- forms of the arguments --------------------------------------------------------------------------------------------


def test_queries_of_every_model_and_from_a_pool(poisoned_empty: None) -> None:
    weights, pool, _ = make(TINY, 2, 4)
    targets = torch.randn(2, 3, 3)
    index = torch.tensor([[3, 0, 3], [1, 2, 0]])
    own = pool[index]
    by_pool = _loss(TINY, weights, pool, targets, index=index)
    for other in (_loss(TINY, weights, own, targets), _loss(TINY, weights, pool, targets, index=index.to(torch.int32), memory=1)):
        assert all(torch.equal(a, b) for a, b in zip(by_pool, other, strict=True))
    assert error(by_pool[1], oracle(weights, own, targets, TINY.layers, "mse")[1]) < FP32 / 2
    expected = reference.forward(weights.double(), own.double(), TINY.layers)
    for queries, rows in ((pool, index), (own.transpose(0, 1).contiguous().transpose(0, 1), None)):
        assert error(kernels.forward(weights, queries, TINY.layers, "ieee", index=rows, mode="network", memory=1), expected) < FP32 / 2


def test_strided_expanded_and_sliced_arguments(poisoned_empty: None) -> None:
    weights, queries, targets = make(TINY, 3, 3)
    expected = _loss(TINY, weights, queries, targets)
    wide = torch.full((3, 2 * weights.shape[1]), float("nan"))
    wide[:, ::2] = weights
    turned = targets.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    found = _loss(TINY, wide[:, ::2], queries.contiguous(memory_format=torch.channels_last), turned)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    found = _loss(TINY, weights[:1].expand(3, -1), queries, targets[:1].expand(3, -1, -1))
    assert torch.equal(found[1][2], expected[1][0])


# -- independence, determinism, non-finite models ----------------------------------------------------------------------


def test_neighbours_chunks_and_programs_do_not_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, queries, targets = make(MLP, 4, 5)
    losses, gradient = _loss(MLP, weights, queries, targets, precision="tf32")
    outputs = kernels.forward(weights, queries, MLP.layers, mode="network")
    alone = _loss(MLP, weights[3:4], queries, targets[3:4], precision="tf32")
    assert torch.equal(alone[1][0], gradient[3])
    assert torch.equal(alone[0][0], losses[3])
    for memory, programs in ((1, 4), (20_000, 3), (None, 100)):
        monkeypatch.setattr(whole, "resident", lambda device, programs=programs: programs)
        found = _loss(MLP, weights, queries, targets, precision="tf32", memory=memory)
        assert torch.equal(found[0], losses)
        assert torch.equal(found[1], gradient)
        assert torch.equal(kernels.forward(weights, queries, MLP.layers, mode="network", memory=memory), outputs)


@pytest.mark.parametrize("precision", ["tf32", "fp16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_model_touches_nobody_else(precision: str, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """One program runs all models in turn: what a bad one leaves in the scratch must not reach the next."""
    monkeypatch.setattr(whole, "resident", lambda device: 1)
    weights, queries, targets = make(TINY, 3, 3)
    good = _loss(TINY, weights, queries, targets, precision=precision)
    clean = kernels.forward(weights, queries, TINY.layers, precision, mode="network")
    weights[1, 0] = value
    losses, gradient = _loss(TINY, weights, queries, targets, precision=precision)
    outputs = kernels.forward(weights, queries, TINY.layers, precision, mode="network")
    for j in (0, 2):
        assert torch.equal(losses[j], good[0][j])
        assert torch.equal(gradient[j], good[1][j])
        assert torch.equal(outputs[j], clean[j])
    if value != value:
        assert losses[1].isnan()
        assert gradient[1].isnan().any()


@pytest.mark.slow
def test_offsets_of_programs_pass_two_to_the_31(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the last two programs of 17 million are run; their scratch lies past 2^31 numbers."""
    from triton.runtime import interpreter

    weights, queries, _ = make(MLP, 1, 2)
    scheduled = schedule(MLP.layers, MLP.shape)
    expected = kernels.forward(weights, queries, MLP.layers, "fp16", mode="network")
    net = whole.specialised(scheduled, "fp16", False, weights.device)
    first = 2**31 // net.SCRATCH + 3
    packed, images = whole.prepare(weights, queries, scheduled, 1, "fp16")
    try:
        scratch, outputs = torch.empty((first + 2) * net.SCRATCH, dtype=torch.float16), torch.empty(first + 2, 2, scheduled.classes)
    except RuntimeError:
        pytest.skip("no address space for 2^31 numbers")
    builder = interpreter.interpreter_builder
    set_grid_idx = builder.set_grid_idx
    monkeypatch.setattr(builder, "set_grid_idx", lambda x, y, z: set_grid_idx(x + first, y, z))
    monkeypatch.setattr(builder, "set_grid_dim", lambda x, y, z: None)
    builder.grid_dim = (first + 2, 1, 1)
    whole.network_forward_kernel[(2,)](
        images, images, packed, weights, outputs, scratch, 2, 2, first + 2, 1, 0, 0, 1, net=net, SHARED=True, INDEXED=False
    )
    assert torch.equal(outputs[first:], expected.expand(2, -1, -1))


def test_autograd_and_warmup_in_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a budget of a few models both take the whole-network path by themselves, with autograd's gradient."""
    ran: list[str] = []
    for name in ("network_loss", "network_forward"):
        launcher = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, launcher=launcher, name=name, **kw: (ran.append(name), launcher(*a, **kw))[1])
    weights, queries, targets = make(MLP, 2, 3)
    weights.requires_grad_()
    differentiable_forward(weights, queries, MLP.layers, "ieee", memory=1000).backward(targets)
    wide = weights.detach().double().requires_grad_()
    reference.forward(wide, queries.double(), MLP.layers).backward(targets.double())
    assert weights.grad is not None
    assert wide.grad is not None
    assert error(weights.grad, wide.grad) < FP32 / 2
    kernels.warmup(MLP.layers, MLP.shape, 3, "labels", "ieee", "cpu", memory=1000)
    assert ran[:2] == ["network_forward", "network_loss"]
    assert set(ran[2:]) == {"network_forward", "network_loss"}


# -- what fits, and what it takes --------------------------------------------------------------------------------------


DEEP = net((3,), hidden=tuple((4, "relu") for _ in range(8)))
MANY_CLASSES = net((3,), out=5000)
LARGE = net((1, 240, 240), Block(64, padding=1), Block(1, stride=2))
PRODUCTS = net((8, 40, 40), *(Block(8, 7, padding=3, pool="max") for _ in range(4)))


@pytest.mark.parametrize(
    ("case", "why"), [(DEEP, "9 stages"), (MANY_CLASSES, "5000 outputs"), (LARGE, "bytes a program"), (PRODUCTS, "matrix products")]
)
def test_what_does_not_fit_is_refused_with_the_reason_and_runs_layer_by_layer(case: Net, why: str) -> None:
    scheduled = schedule(case.layers, case.shape)
    with pytest.raises(Unplannable, match=why):
        network_layout.network(scheduled, "tf32", True)
    for gradient in (False, True):
        mode, reason = budget.choose_mode(scheduled, 4, "tf32", gradient, 1)
        assert mode == "layers"
        assert why in reason
    if case is DEEP:
        weights, queries, targets = make(case, 1, 2)
        with pytest.raises(Unplannable, match=why):
            _loss(case, weights, queries, targets)
        assert error(kernels.forward(weights, queries, case.layers, "ieee"), reference.forward(weights, queries, case.layers)) < FP32 / 2
    with pytest.raises(ValueError, match="mode"):
        kernels.forward(*make(MLP, 1, 1)[:2], MLP.layers, mode="fused")


def test_the_mode_is_a_function_of_shape_and_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduled = schedule(cnn3().layers, (3, 32, 32))
    for n, memory, expected in (
        (256, 2**32, "layers"),
        (256, 2**27, "network"),
        (1, 2**32, "layers"),
        (20_000, 2**32, "layers"),
        (20_000, 2**27, "network"),
        (512, 2**29, "network"),  # 44 models, 22,528 pairs: a GPU is not full yet
        (1024, 2**29 + 2**28, "layers"),  # 34 models, 34,816 pairs
    ):
        assert budget.choose_mode(scheduled, n, "tf32", True, memory)[0] == expected, (n, memory)
        assert budget.choose_mode(scheduled, n, "tf32", False, memory)[0] == "network"


def test_memory_is_what_the_function_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every buffer of a call, counted as it is allocated, against ``network_bytes``: the scratch does not grow with k."""
    weights, queries, targets = make(TINY, 9, 5)
    scheduled = schedule(TINY.layers, TINY.shape)
    allocated: list[Tensor] = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **kw: allocated.append(empty(*a, **kw)) or allocated[-1])
    losses, gradient = _loss(TINY, weights, queries, targets, precision="fp16")
    images = queries.shape[0] * scheduled.stages[0].INPUTS * 2
    results = 4 * (losses.numel() + gradient.numel())
    total = sum(t.numel() * t.element_size() for t in allocated)
    assert total == network_layout.network_bytes(scheduled, 9, 5, "fp16", True, 4) + images + results


def test_the_bar_of_extra_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """design bar: at most 2 GB for k = 4,096 models of CNN3 and n = 256 on an H100's 264 programs."""
    monkeypatch.undo()
    network_layout.network.cache_clear()
    scheduled = schedule(cnn3().layers, (3, 32, 32))
    assert network_layout.network_bytes(scheduled, 4096, 256, "tf32", True, 264) <= 2e9
    assert network_layout.network_bytes(scheduled, 4096, 256, "fp16", True, 264) <= 1.1e9


@pytest.mark.parametrize("n", [1, 5, 127, 128, 129, 256, 257, 1025, 2049, 10_000])
@pytest.mark.parametrize("block", [1, 8, 32, 64])
def test_parts_cover_the_queries(n: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    parts, each = network_layout.split(n, block)
    assert each % block == 0
    assert (parts - 1) * each < n <= parts * each
    assert parts <= 16
