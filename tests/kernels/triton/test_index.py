"""Zoo building on the kernels, in Triton's interpreter: the engine hands them the pool and the index, and gathers nothing itself."""

from __future__ import annotations

import gc

import pytest
import torch
from kernel_cases import MLP, SMALL, error, make, oracle
from tolerances import FP32
from torch import Tensor

from wslfast import Architecture, engine
from wslfast.engine import paths
from wslfast.engine.triton_path import Triton
from wslfast.kernels import reference
from wslfast.zoo import Dataset, build_zoo

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("needs TRITON_INTERPRET=1 when triton is first imported", allow_module_level=True)

from wslfast.kernels.triton import launch as kernels
from wslfast.kernels.triton import packing
from wslfast.kernels.triton.schedule import schedule


@pytest.fixture
def on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine believes that the kernels run here, which in the interpreter they do."""
    monkeypatch.setattr(engine, "choose", lambda architecture, *_, **__: Triton(architecture, "test"))

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("queries were gathered before the kernels")

    monkeypatch.setattr(paths, "gathered", refuse)


def test_the_engine_hands_over_pool_and_index(on_triton: None, monkeypatch: pytest.MonkeyPatch, poisoned_empty: None) -> None:
    arch = Architecture.from_layers(SMALL.layers, SMALL.shape)
    weights, pool, _ = make(SMALL, 3, 9)
    pool = pool.contiguous(memory_format=torch.channels_last)
    index = torch.randint(0, 9, (3, 40), dtype=torch.int32)[:, ::10]  # a slice of an epoch's order, as zoo building passes it
    labels = torch.randint(0, 3, (3, 4))
    largest = 0
    empty = torch.empty

    def watched(*size: object, **options: object) -> Tensor:
        nonlocal largest
        made = empty(*size, **options)  # type: ignore[call-overload]
        largest = max(largest, made.numel() * made.element_size())
        return made

    monkeypatch.setattr(torch, "empty", watched)
    for megabytes in ("64", "1"):
        monkeypatch.setenv("WSLFAST_MEMORY_MB", megabytes)
        found = engine.loss_and_gradient(weights, pool, labels, arch, "cross_entropy", index=index)
        expected = oracle(weights, pool[index], labels, SMALL.layers, "cross_entropy")
        assert error(found[0], expected[0]) < FP32 / 2
        assert error(found[1], expected[1]) < FP32 / 2
    assert largest < 1 << 20


def test_a_criterion_that_the_kernels_do_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function of the outputs: they run forward and backward, and torch does what is between."""
    monkeypatch.setattr(engine, "choose", lambda architecture, *_, **__: Triton(architecture, "test"))
    arch = Architecture.from_layers(MLP.layers, MLP.shape)
    weights, pool, targets = make(MLP, 2, 3)
    index = torch.tensor([[0, 2, 1], [1, 1, 0]])

    def smooth(outputs: Tensor, wanted: Tensor) -> Tensor:
        return torch.nn.functional.huber_loss(outputs, wanted, reduction="none").sum((1, 2)) / 3

    for chosen, queries in ((None, pool), (index, pool[index])):
        values, gradient = engine.loss_and_gradient(weights, pool, targets, arch, smooth, index=chosen)
        wide = weights.double().requires_grad_()
        expected = smooth(reference.forward(wide, queries.double(), MLP.layers), targets.double())
        (slope,) = torch.autograd.grad(expected.sum(), wide)
        assert error(values, expected.detach()) < FP32 / 2
        assert error(gradient, slope) < FP32 / 2


def test_a_pool_is_stacked_once_until_it_changes_or_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, pool, targets = make(MLP, 2, 3)
    index = torch.tensor([[0, 2, 1], [1, 1, 0]])
    stacked: list[int] = []
    stack = packing.stack
    monkeypatch.setattr(packing, "stack", lambda *a: stacked.append(1) or stack(*a))

    def check(pool: Tensor, expect: int) -> None:
        losses, _ = kernels.loss_and_gradient(weights, pool, targets, MLP.layers, "mse", 2.0, "ieee", index=index)
        assert error(losses, oracle(weights, pool[index], targets, MLP.layers, "mse")[0]) < FP32 / 2
        assert len(stacked) == expect

    check(pool, 1)
    check(pool, 1)
    pool[0] += 1  # written to: stacked again
    check(pool, 2)
    kernels.forward(weights, pool, MLP.layers, "fp16", index=index)  # another precision
    assert len(stacked) == 3
    before = len(packing._pools)
    del pool
    gc.collect()
    assert len(packing._pools) == before - 1


def test_a_pool_made_in_inference_mode_is_not_kept() -> None:
    with torch.inference_mode():
        weights, pool, _ = make(MLP, 2, 3)
        index = torch.tensor([[0, 2], [1, 1]])
        before = len(packing._pools)
        scheduled = schedule(MLP.layers, MLP.shape)
        assert torch.equal(packing.stack_pool(pool, scheduled, 1, "ieee"), packing.stack(pool, scheduled, 1, "ieee"))
        kernels.forward(weights, pool, MLP.layers, "ieee", index=index)
        assert len(packing._pools) == before


def test_a_zoo_trained_on_the_kernels(on_triton: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two epochs of two models: the checkpoints of the CPU engine up to rounding."""
    arch = Architecture.mlp(6, (5,), 3, "tanh", 0.0)
    images = torch.randn(10, 6)
    parts = {
        f"{name}_{kind}": value
        for name in ("train", "val", "test")
        for kind, value in (("images", images), ("labels", torch.arange(10) % 3))
    }
    data = Dataset(name="made", classes=3, provenance={}, **parts)
    options = {"architecture": arch, "models": 2, "epochs": 2, "keep": (1, 2), "batch_size": 4, "split": (1.0, 0.0, 0.0)}
    found = build_zoo(data, **options)
    monkeypatch.undo()
    expected = build_zoo(data, **options)
    assert found.properties["model"] == expected.properties["model"]
    moved = expected.weights - expected.weights.roll(1, 0)
    assert error(found.weights, expected.weights) < 1e-4 * float(moved.norm() / expected.weights.norm())


@pytest.mark.parametrize("mode", ["layers", "network"])
@pytest.mark.parametrize("row", [9, -1, 2**40], ids=["one past the end", "before the beginning", "far away"])
def test_a_row_that_is_not_in_the_pool_is_nan_and_reads_nothing(row: int, mode: str) -> None:
    """Without waiting for the device: the query is NaN, its model shows it, nobody else's numbers change, and no address is outside."""
    from benchmarks.kernels.races import watching

    weights, pool, _ = make(SMALL, 3, 9)
    index = torch.randint(0, 9, (3, 4))
    targets = torch.randn(3, 4, 3)
    good = kernels.loss_and_gradient(weights, pool, targets, SMALL.layers, "mse", 2.0, "ieee", index=index, mode=mode)
    index[1, 2] = row
    with watching() as found:
        losses, gradient = kernels.loss_and_gradient(weights, pool, targets, SMALL.layers, "mse", 2.0, "ieee", index=index, mode=mode)
        outputs = kernels.forward(weights, pool, SMALL.layers, "ieee", index=index, mode=mode)
    assert not [race for race in found.races if "outside" in race]
    assert losses.isnan().tolist() == [False, True, False]
    assert outputs.isnan().any(-1).nonzero().tolist() == [[1, 2]]
    assert torch.equal(losses[[0, 2]], good[0][[0, 2]])
    assert torch.equal(gradient[[0, 2]], good[1][[0, 2]])
