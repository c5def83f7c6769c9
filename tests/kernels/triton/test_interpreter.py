"""The kernels in Triton's interpreter, against float64 autograd. Quick ones cover every path once; the rest are slow.

The interpreter runs fp32 and fp16 as a GPU would up to the order of sums, and rounds to TF32 where the kernels do; its bf16
product is wrong, so bf16 operands are widened. Integer overflow wraps as on a GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_cases import CASES, HEADS, MLP, SMALL, Net, cnn3, cnn28, error, gradient_errors, lenet5, make, oracle, random_net
from tolerances import FP32

from wslfast.kernels import reference

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("needs TRITON_INTERPRET=1 when triton is first imported", allow_module_level=True)

from wslfast.kernels.triton import launch as kernels
from wslfast.kernels.triton.configurations import splits
from wslfast.kernels.triton.schedule import schedule

QUICK = (
    "same_padding", "stride_2", "rectangular", "average_then_act", "act_then_average", "silu_after_max", "gelu_before_max",
    "negative_leak_before_max", "no_bias_no_act", "activation_last", "silu_last", "flat_gradient", "dx_by_columns",
)  # fmt: skip
NETWORKS = {"mlp": MLP, "small": SMALL, "cnn3": cnn3(), "cnn28": cnn28(), "lenet5": lenet5(), **CASES}
QUICK_NETWORKS = ("mlp", "small", *QUICK)


def _marked(names: Any, quick: tuple[str, ...]) -> list[Any]:
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


def _compare(case: Net, k: int, n: int, criterion: str = "mse", tolerance: float = 5e-6) -> None:
    weights, queries, targets = make(case, k, n)
    losses, gradient = kernels.loss_and_gradient(weights, queries, targets, case.layers, criterion, 2.0, "ieee")
    expected, slopes = oracle(weights, queries, targets, case.layers, criterion)
    assert error(losses, expected) < tolerance
    assert max(gradient_errors(gradient, slopes, case.layers).values()) < tolerance


@pytest.mark.parametrize("name", _marked(NETWORKS, QUICK_NETWORKS))
def test_loss_and_gradient(name: str, poisoned_empty: None) -> None:
    _compare(NETWORKS[name], 2, 2 if name in ("cnn3", "cnn28", "lenet5") else 3)


@pytest.mark.parametrize("name", _marked(NETWORKS, ("mlp", "small", "stride_2")))
def test_forward(name: str, poisoned_empty: None) -> None:
    case = NETWORKS[name]
    weights, queries, _ = make(case, 2, 3)
    found = kernels.forward(weights, queries, case.layers, "ieee", mode="layers")
    assert error(found, reference.forward(weights.double(), queries.double(), case.layers)) < FP32 / 2


@pytest.mark.slow
@pytest.mark.parametrize("act", ["relu", "leakyrelu", "tanh", "sigmoid", "silu", "gelu", "elu", "celu", "softplus"])
@pytest.mark.parametrize("order", ["pa", "ap"])
def test_every_activation_in_both_orders(act: str, order: str, poisoned_empty: None) -> None:
    from kernel_cases import Block, net

    parameter = 0.1 if act == "leakyrelu" else 0.9
    blocks = [Block(5, pool=pool, order=order, act=act, parameter=parameter) for pool in ("max", "avg")]
    _compare(net((1, 14, 13), *blocks, hidden=((9, act),) if act not in ("elu", "celu", "leakyrelu") else ()), 1, 3)


@pytest.mark.slow
@pytest.mark.parametrize("act", ["leakyrelu", "tanh", "sigmoid", "silu", "gelu"])
@pytest.mark.parametrize("name", ["cnn3", "cnn28", "lenet5"])
def test_published_networks_with_every_activation(name: str, act: str, poisoned_empty: None) -> None:
    """relu is among test_loss_and_gradient; one model and one query."""
    make_net = {"cnn3": cnn3, "cnn28": cnn28, "lenet5": lenet5}[name]
    _compare(make_net(act), 1, 1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_random_networks(seed: int, poisoned_empty: None) -> None:
    case = random_net(seed)
    _compare(case, 1 + seed % 2, 1 + seed % 4)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("n", [1, 5])
def test_one_model_and_one_query(k: int, n: int, poisoned_empty: None) -> None:
    _compare(MLP, k, n)


@pytest.mark.slow
def test_many_rows_are_split(poisoned_empty: None) -> None:
    """More rows than one split and than one program's tiles: partial sums and the tail of the last tile."""
    case = NETWORKS["kernel_1"]
    n = 130
    assert max(splits(s, n) for s in schedule(case.layers, case.shape).stages) > 1
    _compare(case, 2, n)


# -- the fused head ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", _marked(HEADS, ("head_relu", "head_silu_on_average", "head_silu_last")))
def test_fused_head(name: str, poisoned_empty: None) -> None:
    case = HEADS[name]
    assert kernels.fits(schedule(case.layers, case.shape), 3)
    _compare(case, 2, 3)


@pytest.mark.parametrize("criterion", ["softmax_mse", "cross_entropy", "distillation", "labels", "gradient"])
def test_fused_head_is_the_layer_by_layer_path(criterion: str, monkeypatch: pytest.MonkeyPatch, poisoned_empty: None) -> None:
    case = HEADS["head_relu"]
    weights, queries, targets = make(case, 2, 67)  # more than one tile of queries
    if criterion == "labels":
        criterion, targets = "cross_entropy", torch.randint(0, 3, (2, 67))
    for precision, tolerance in (("ieee", 2e-6), ("fp16", 1e-3)):
        arguments = (weights, queries, targets, case.layers, criterion, 3.0, precision)
        fused = kernels.loss_and_gradient(*arguments)
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "fits", lambda scheduled, n: False)
            plain = kernels.loss_and_gradient(*arguments)
        if criterion != "gradient":
            assert error(fused[0], plain[0]) < tolerance
        assert error(fused[1], plain[1]) < tolerance


def test_heads_that_do_not_fit() -> None:
    scheduled = schedule(HEADS["head_relu"].layers, HEADS["head_relu"].shape)
    assert not kernels.fits(scheduled, 1025)
    for case in (MLP, lenet5(), cnn28()):  # too few stages, or too wide
        assert not kernels.fits(schedule(case.layers, case.shape), 3)


@pytest.mark.slow
def test_cnn3_layer_by_layer(monkeypatch: pytest.MonkeyPatch, poisoned_empty: None) -> None:
    monkeypatch.setattr(kernels, "fits", lambda scheduled, n: False)
    _compare(cnn3("tanh"), 2, 2)


# -- criteria ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", ["mse", "softmax_mse", "cross_entropy", "distillation"])
def test_criteria(criterion: str, poisoned_empty: None) -> None:
    weights, queries, targets = make(MLP, 3, 5)
    for temperature in (1.0, 4.0) if criterion == "distillation" else (2.0,):
        found = kernels.loss_and_gradient(weights, queries, 3 * targets, MLP.layers, criterion, temperature, "ieee")
        expected = oracle(weights, queries, 3 * targets, MLP.layers, criterion, temperature=temperature)
        assert error(found[0], expected[0]) < FP32 / 2
        assert error(found[1], expected[1]) < FP32 / 2


def test_labels(poisoned_empty: None) -> None:
    weights, queries, _ = make(MLP, 3, 5)
    labels = torch.randint(0, 3, (3, 5))
    for form in (labels, labels.to(torch.int32), labels[0].expand(3, 5), labels.T.contiguous().T):
        found = kernels.loss_and_gradient(weights, queries, form, MLP.layers, "cross_entropy", 2.0, "ieee")
        expected = oracle(weights, queries, form.long(), MLP.layers, "cross_entropy")
        assert error(found[0], expected[0]) < FP32 / 2
        assert error(found[1], expected[1]) < FP32 / 2
    labels[1, 2] = 3  # names no class
    losses, _ = kernels.loss_and_gradient(weights, queries, labels, MLP.layers, "cross_entropy", 2.0, "ieee")
    assert losses.isnan().tolist() == [False, True, False]


def test_losses_far_off_and_tiny_keep_their_gradient_in_fp16() -> None:
    """The gain: gradients of 1e5 and of 1e-7 both survive fp16 storage."""
    weights, queries, targets = make(MLP, 2, 4)
    outputs = kernels.forward(weights, queries, MLP.layers, "fp16")
    for scale in (1e5, 1e-7):
        far = (outputs + scale * targets).contiguous()
        _, gradient = kernels.loss_and_gradient(weights, queries, scale * targets, MLP.layers, "gradient", 2.0, "fp16")
        weights64 = weights.double().requires_grad_()
        reference.forward(weights64, queries.double(), MLP.layers).backward(scale * targets.double())
        assert weights64.grad is not None
        assert error(gradient, weights64.grad) < 3e-3
        assert far.isfinite().all()


# -- forms of the arguments --------------------------------------------------------------------------------------------


def test_queries_of_every_model_and_from_a_pool(poisoned_empty: None) -> None:
    weights, pool, _ = make(SMALL, 3, 7)
    targets = torch.randn(3, 4, 3)
    index = torch.randint(0, 7, (3, 4))
    own = pool[index]
    expected = oracle(weights, own, targets, SMALL.layers, "mse")
    by_pool = kernels.loss_and_gradient(weights, pool, targets, SMALL.layers, "mse", 2.0, "ieee", index=index)
    by_model = kernels.loss_and_gradient(weights, own, targets, SMALL.layers, "mse", 2.0, "ieee")
    for found in (by_pool, by_model):
        assert error(found[0], expected[0]) < FP32 / 2
        assert error(found[1], expected[1]) < FP32 / 2
    assert torch.equal(by_pool[1], by_model[1])
    outputs = kernels.forward(weights, pool, SMALL.layers, "ieee", index=index.to(torch.int32), mode="layers")
    assert error(outputs, reference.forward(weights.double(), own.double(), SMALL.layers)) < FP32 / 2


def test_strided_expanded_and_sliced_arguments(poisoned_empty: None) -> None:
    weights, queries, targets = make(SMALL, 3, 4)
    expected = kernels.loss_and_gradient(weights, queries, targets, SMALL.layers, "mse", 2.0, "ieee")
    wide = torch.full((3, 2 * weights.shape[1]), float("nan"))
    wide[:, ::2] = weights
    channels_last = queries.contiguous(memory_format=torch.channels_last)
    turned = targets.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    found = kernels.loss_and_gradient(wide[:, ::2], channels_last, turned, SMALL.layers, "mse", 2.0, "ieee")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    shared = targets[:1].expand(3, -1, -1)
    found = kernels.loss_and_gradient(weights[:1].expand(3, -1), queries, shared, SMALL.layers, "mse", 2.0, "ieee")
    assert torch.equal(found[1][0], found[1][2])
    assert torch.equal(found[1][0], expected[1][0])


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_of_the_arguments(kind: torch.dtype) -> None:
    weights, queries, targets = (t.to(kind) for t in make(MLP, 2, 3))
    losses, gradient = kernels.loss_and_gradient(weights, queries, targets, MLP.layers, "mse", 2.0, "ieee")
    assert losses.dtype == gradient.dtype == torch.float32
    expected = oracle(weights, queries, targets, MLP.layers, "mse")
    assert error(gradient, expected[1]) < FP32 / 2


def test_wrong_arguments_are_named() -> None:
    weights, queries, targets = make(MLP, 2, 3)
    call = kernels.loss_and_gradient
    with pytest.raises(ValueError, match=r"weights \[k, 66\]"):
        call(weights[:, :-1], queries, targets, MLP.layers, "mse")
    with pytest.raises(ValueError, match="targets"):
        call(weights, queries, targets[:, :2], MLP.layers, "mse")
    with pytest.raises(ValueError, match="criterion"):
        call(weights, queries, targets, MLP.layers, "mae")
    with pytest.raises(ValueError, match="labels"):
        call(weights, queries, torch.zeros(2, 3, dtype=torch.long), MLP.layers, "mse")
    with pytest.raises(ValueError, match="precision"):
        call(weights, queries, targets, MLP.layers, "mse", 2.0, "fp8")
    with pytest.raises(ValueError, match="3 models"):
        kernels.forward(weights[:1].expand(3, -1), queries[None].expand(2, -1, -1), MLP.layers)
    with pytest.raises(ValueError, match="index"):
        kernels.forward(weights, queries, MLP.layers, index=torch.zeros(3, 2, dtype=torch.long))
    assert call(weights[:0], queries, targets[:0], MLP.layers, "mse")[1].shape == (0, 66)


# -- independence, determinism, non-finite models ----------------------------------------------------------------------


def test_chunks_and_neighbours_do_not_change_a_bit() -> None:
    weights, queries, targets = make(SMALL, 5, 3)
    losses, gradient = kernels.loss_and_gradient(weights, queries, targets, SMALL.layers, "mse")
    for memory in (1, 60_000):
        chunked = kernels.loss_and_gradient(weights, queries, targets, SMALL.layers, "mse", memory=memory, mode="layers")
        assert torch.equal(chunked[0], losses)
        assert torch.equal(chunked[1], gradient)
    alone = kernels.loss_and_gradient(weights[3:4], queries, targets[3:4], SMALL.layers, "mse")
    assert torch.equal(alone[1][0], gradient[3])
    outputs = kernels.forward(weights, queries, SMALL.layers, mode="layers")
    assert torch.equal(kernels.forward(weights, queries, SMALL.layers, memory=1, mode="layers"), outputs)


@pytest.mark.parametrize("precision", ["ieee", "tf32", "fp16", "bf16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_model_touches_nobody_else(precision: str, value: float) -> None:
    weights, queries, targets = make(SMALL, 3, 3)
    good = kernels.loss_and_gradient(weights, queries, targets, SMALL.layers, "mse", 2.0, precision)
    spoiled = weights.clone()
    spoiled[1, 0] = value
    losses, gradient = kernels.loss_and_gradient(spoiled, queries, targets, SMALL.layers, "mse", 2.0, precision)
    for j in (0, 2):
        assert torch.equal(losses[j], good[0][j])
        assert torch.equal(gradient[j], good[1][j])
    if value != value:
        assert losses[1].isnan()
        assert gradient[1].isnan().any()
    assert all(t.isfinite().all() for t in good)


@pytest.mark.parametrize("name", ["small", "gelu_before_max", "average_then_act"])
def test_nan_in_one_window_position_survives_pooling(name: str) -> None:
    """One NaN pixel is one position of its windows: a maximum that drops NaN would hide it."""
    case = NETWORKS[name]
    weights, queries, _ = make(case, 1, 2)
    queries[1, 0, 2, 3] = float("nan")
    found = kernels.forward(weights, queries, case.layers, "ieee", mode="layers")
    assert found[0].isnan().any(1).tolist() == [False, True]
    assert error(found[:, :1], reference.forward(weights.double(), queries[:1].double(), case.layers)) < FP32 / 2


def test_queries_that_pass_32_bit_offsets_are_refused() -> None:
    weights = make(SMALL, 1, 1)[0]
    many = torch.zeros(1).expand(20_000_000, 2, 9, 8)
    with pytest.raises(ValueError, match="address"):
        kernels._check(weights, schedule(SMALL.layers, SMALL.shape), many.shape[0], "ieee")
