"""Two gradients in one launch (``configurations.CHOICES["joint"]``), in Triton's interpreter: against float64 and against the launches that
it stands for, every other number of which it leaves to the bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from kernel_cases import CASES, Block, Net, cnn3, cnn28, error, gradient_errors, lenet5, make, net, oracle
from tolerances import FP32
from torch import Tensor

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("needs TRITON_INTERPRET=1 when triton is first imported", allow_module_level=True)

from wslfast.kernels.triton import launch as kernels
from wslfast.kernels.triton import launcher
from wslfast.kernels.triton.configurations import CHOICES, Tuning, joins, splits, tuned
from wslfast.kernels.triton.query_gradient import gradients
from wslfast.kernels.triton.schedule import schedule

JOINT = CHOICES["joint"]
# first stages with maxima; second stages of one and two pixels a step, padded, cropped, with slopes that are stored and that are not
NETWORKS = {
    "cropped": CASES["cropped"],
    "slopes stored, one pixel a step": CASES["silu_after_max"],
    "elu": CASES["elu_celu"],
    "padded": net((3, 11, 12), Block(5, 3, padding=1, pool="max", act="tanh"), Block(6, 3, padding=1, pool="max")),
    "stride 2": net((2, 17, 13), Block(4, 3, pool="max"), Block(6, 3, stride=2, padding=1, act="tanh"), hidden=((5, "relu"),)),
    "averaged above": net((1, 12, 14), Block(16, 3, pool="max", act="sigmoid"), Block(33, 2, pool="avg", act="silu")),
    "no bias": net((3, 10, 10), Block(7, 3, pool="max", act="", bias=False), Block(3, 2, pool="max")),
}
SMALL = NETWORKS["padded"]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Launches by name as they are made."""
    made: list[str] = []

    def seen(name: str, real: Callable[..., None]) -> Callable[..., None]:
        return lambda *a, **kw: (made.append(name), real(*a, **kw))[1]

    for name in ("stage_dw", "stage_dx", "stage_joint"):
        monkeypatch.setattr(kernels, name, seen(name, getattr(kernels, name)))
    return made


def _both(
    case: Net, k: int, n: int, precision: str = "ieee", tuning: Tuning = JOINT, **more: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(losses, gradient) of the joint launch, then of the default's."""
    weights, queries, targets = make(case, k, n)
    arguments = (weights, queries, targets, case.layers, "mse", 2.0, precision)
    with tuned(tuning):
        joint = kernels.loss_and_gradient(*arguments, **more)  # type: ignore[arg-type]
    with tuned(replace(tuning, joint=False)):
        apart = kernels.loss_and_gradient(*arguments, **more)  # type: ignore[arg-type]
    return *joint, *apart


@pytest.mark.parametrize("name", [*NETWORKS, pytest.param("cnn3", marks=pytest.mark.slow), pytest.param("cnn28", marks=pytest.mark.slow)])
def test_against_float64(name: str, launched: list[str], poisoned_empty: None) -> None:
    case = {**NETWORKS, "cnn3": cnn3("tanh"), "cnn28": cnn28()}[name]
    weights, queries, targets = make(case, 2, 3)
    with tuned(JOINT):
        losses, gradient = kernels.loss_and_gradient(weights, queries, targets, case.layers, "mse", 2.0, "ieee")
    expected, slopes = oracle(weights, queries, targets, case.layers, "mse")
    assert launched.count("stage_joint") == 1
    assert error(losses, expected) < 5e-6
    assert max(gradient_errors(gradient, slopes, case.layers).values()) < 5e-6


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("name", ["padded", "slopes stored, one pixel a step"])
def test_against_the_launches_it_stands_for(name: str, precision: str, poisoned_empty: None) -> None:
    """It rounds what lies between as they do: the first layer's gradient differs by the order of fp32 sums, nothing else by a bit."""
    case = NETWORKS[name]
    losses, gradient, apart, expected = _both(case, 2, 5, precision)
    first = schedule(case.layers, case.shape).placements[0]
    end = first.weight.stop if first.bias is None else first.bias.stop
    assert torch.equal(losses, apart)
    assert torch.equal(gradient[:, end:], expected[:, end:])
    assert error(gradient[:, :end], expected[:, :end]) < FP32


def test_many_rows_are_split(poisoned_empty: None) -> None:
    """More splits than the blocks fill, and a tail in the last tile: every partial is written, empty ones as zeros."""
    tuning = replace(JOINT, split_rows=16)
    with tuned(tuning):
        assert splits(schedule(SMALL.layers, SMALL.shape).stages[0], 7) > 8
    losses, gradient, apart, expected = _both(SMALL, 2, 7, "ieee", tuning)
    assert torch.equal(losses, apart)
    assert error(gradient, expected) < FP32


def test_queries_of_every_model_and_from_a_pool(poisoned_empty: None) -> None:
    weights, pool, _ = make(SMALL, 3, 7)
    targets = torch.randn(3, 4, 3)
    index = torch.randint(0, 7, (3, 4))
    own = pool[index]
    _, slopes = oracle(weights, own, targets, SMALL.layers, "mse")
    with tuned(JOINT):
        _, by_pool = kernels.loss_and_gradient(weights, pool, targets, SMALL.layers, "mse", 2.0, "ieee", index=index)
        _, by_model = kernels.loss_and_gradient(weights, own, targets, SMALL.layers, "mse", 2.0, "ieee")
    assert error(by_pool, slopes) < FP32 / 2
    assert torch.equal(by_pool, by_model)


def test_chunks_and_neighbours_do_not_change_a_bit() -> None:
    weights, queries, targets = make(SMALL, 5, 3)
    with tuned(JOINT):
        whole = kernels.loss_and_gradient(weights, queries, targets, SMALL.layers, "mse", 2.0, "fp16", mode="layers")
        chunked = kernels.loss_and_gradient(weights, queries, targets, SMALL.layers, "mse", 2.0, "fp16", memory=1, mode="layers")
        alone = kernels.loss_and_gradient(weights[3:4], queries, targets[3:4], SMALL.layers, "mse", 2.0, "fp16", mode="layers")
        again = kernels.loss_and_gradient(weights, queries, targets, SMALL.layers, "mse", 2.0, "fp16", mode="layers")
    assert torch.equal(chunked[1], whole[1])
    assert torch.equal(alone[1][0], whole[1][3])
    assert torch.equal(again[1], whole[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_model_touches_nobody_else(value: float) -> None:
    weights, queries, targets = make(SMALL, 3, 3)
    spoiled = weights.clone()
    spoiled[1, 0] = value
    with tuned(JOINT):
        good = kernels.loss_and_gradient(weights, queries, targets, SMALL.layers, "mse", 2.0, "fp16")
        losses, gradient = kernels.loss_and_gradient(spoiled, queries, targets, SMALL.layers, "mse", 2.0, "fp16")
    for j in (0, 2):
        assert torch.equal(losses[j], good[0][j])
        assert torch.equal(gradient[j], good[1][j])
    if value != value:
        assert gradient[1].isnan().any()
    assert good[1].isfinite().all()


def test_what_it_does_not_serve_goes_the_usual_way(launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks of another form, operands of four bytes, other matrix units, and the gradient to the queries, whose first stage has no weights of its own."""
    case = lenet5()
    assert not joins(schedule(case.layers, case.shape), "fp16")
    _both(SMALL, 1, 1, "tf32")
    _both(SMALL, 1, 1, "tf32x3")
    with monkeypatch.context() as patch:
        patch.setattr(launcher, "capability_of", lambda device: (8, 0))
        _both(SMALL, 1, 1, "fp16")
    weights, queries, targets = make(CASES["same_padding"], 1, 2)
    with tuned(JOINT):
        kernels.loss_and_gradient(weights, queries, targets, CASES["same_padding"].layers, "mse", 2.0, "ieee")
        weights, queries, targets = make(SMALL, 2, 3)
        mine = gradients(weights, queries, targets, SMALL.layers, "ieee")
    assert "stage_joint" not in launched
    expected = gradients(weights, queries, targets, SMALL.layers, "ieee")
    assert all(torch.equal(a, b) for a, b in zip(mine, expected, strict=True))
