"""The whole network in one launch on a real GPU: against float64, against the layer-by-layer path, and its memory.

Compiling a large network's loss takes ten seconds and more, so each appears once; the small networks go through every precision.
"""

from __future__ import annotations

import pytest
import torch
from kernel_cases import CASES, HEADS, MLP, SMALL, Net, cnn3, cnn28, error, gradient_errors, lenet5, make, oracle, random_net
from tolerances import BARS, FP32, allowed
from torch import Tensor

from wslfast.kernels import reference

pytestmark = pytest.mark.gpu
pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from wslfast.kernels.triton import launch as kernels
from wslfast.kernels.triton import network_launch as whole
from wslfast.kernels.triton import network_layout
from wslfast.kernels.triton.criterion import CRITERIA
from wslfast.kernels.triton.schedule import schedule

SMALL_NETS = {
    "mlp": MLP, "small": SMALL,
    **{name: CASES[name] for name in ("same_padding", "dx_through_stride_2_and_pool", "act_then_average", "gelu_before_max", "silu_last")},
    "head_on_window_average": HEADS["head_on_window_average"],
}  # fmt: skip


def _on_gpu(case: Net, k: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    weights, queries, targets = (t.cuda() for t in make(case, k, n))
    return weights, queries, targets


def _check(case: Net, k: int, n: int, precision: str, criterion: str = "mse") -> None:
    weights, queries, targets = _on_gpu(case, k, n)
    bars = BARS[precision]
    outputs = kernels.forward(weights, queries, case.layers, precision, mode="network")
    assert error(outputs, reference.forward(weights.double(), queries.double(), case.layers)) < bars[0]
    losses, gradient = kernels.loss_and_gradient(weights, queries, targets, case.layers, criterion, 2.0, precision, mode="network")
    expected, slopes = oracle(weights, queries, targets, case.layers, criterion)
    assert error(losses, expected) < 2 * bars[0]
    of, found = allowed(case.layers, precision), gradient_errors(gradient, slopes, case.layers)
    wrong = {name: value for name, value in found.items() if not value < of[name.rpartition(".")[0]]}
    assert not wrong, wrong


@pytest.mark.parametrize("precision", ["tf32x3", "tf32", "fp16", "bf16"])
@pytest.mark.parametrize("name", SMALL_NETS)
def test_small_networks_against_float64(name: str, precision: str) -> None:
    _check(SMALL_NETS[name], 3, 150, precision)


@pytest.mark.parametrize(("name", "precision"), [("cnn3", "fp16"), ("cnn3", "tf32"), ("cnn28", "fp16"), ("lenet5", "fp16")])
def test_large_networks_against_float64(name: str, precision: str) -> None:
    _check({"cnn3": cnn3(), "cnn28": cnn28(), "lenet5": lenet5()}[name], 3, 150, precision)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_criteria(criterion: str) -> None:
    _check(MLP, 5, 300, "tf32x3", criterion)


@pytest.mark.parametrize("seed", range(6))
def test_random_networks(seed: int) -> None:
    _check(random_net(200 + seed, 14, 32), 1 + seed % 4, 1 + 17 * seed % 140, "tf32x3")


def test_bits_depend_on_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Races would show here: a thousand programs of CNN3, again, in chunks, on few programs, and one model alone."""
    case = cnn3()
    weights, queries, targets = _on_gpu(case, 600, 256)
    arguments = (case.layers, "mse", 2.0, "fp16")
    first = kernels.loss_and_gradient(weights, queries, targets, *arguments, mode="network")
    outputs = kernels.forward(weights, queries, case.layers, "fp16", mode="network")
    for memory, programs in ((None, None), (2**28, None), (None, 37)):
        if programs is not None:
            monkeypatch.setattr(whole, "resident", lambda device: 37)
        again = kernels.loss_and_gradient(weights, queries, targets, *arguments, memory=memory, mode="network")
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert torch.equal(kernels.forward(weights, queries, case.layers, "fp16", memory=memory, mode="network"), outputs)
    alone = kernels.loss_and_gradient(weights[7:8], queries, targets[7:8], *arguments, mode="network")
    assert torch.equal(alone[1][0], first[1][7])
    layers = kernels.loss_and_gradient(weights, queries, targets, *arguments, mode="layers")
    assert error(first[0], layers[0]) < 1e-4
    assert error(first[1], layers[1]) < 1e-2  # both round their operands to 10 bits; sums differ in order, near-ties may flip


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_model_touches_nobody_else(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole, "resident", lambda device: 2)
    weights, queries, targets = _on_gpu(SMALL, 9, 40)
    good = kernels.loss_and_gradient(weights, queries, targets, SMALL.layers, "mse", 2.0, "fp16", mode="network")
    weights[4, 5] = value
    losses, gradient = kernels.loss_and_gradient(weights, queries, targets, SMALL.layers, "mse", 2.0, "fp16", mode="network")
    keep = [0, 1, 2, 3, 5, 6, 7, 8]
    assert torch.equal(losses[keep], good[0][keep])
    assert torch.equal(gradient[keep], good[1][keep])
    if value != value:
        assert losses[4].isnan()


def test_pool_and_labels() -> None:
    weights, pool, _ = _on_gpu(SMALL, 5, 50)
    index = torch.randint(0, 50, (5, 140), device="cuda")
    labels = torch.randint(0, 3, (5, 140), device="cuda")
    more = {"precision": "tf32x3", "mode": "network"}
    found = kernels.loss_and_gradient(weights, pool, labels, SMALL.layers, "cross_entropy", index=index, **more)
    own = kernels.loss_and_gradient(weights, pool[index], labels, SMALL.layers, "cross_entropy", **more)
    assert all(torch.equal(a, b) for a, b in zip(found, own, strict=True))
    assert error(found[1], oracle(weights, pool[index], labels, SMALL.layers, "cross_entropy")[1]) < FP32


def test_cuda_graph() -> None:
    weights, queries, targets = _on_gpu(SMALL, 16, 64)
    kernels.warmup(SMALL.layers, SMALL.shape, 64, mode="network")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = kernels.loss_and_gradient(weights, queries, targets, SMALL.layers, "mse", mode="network")
    weights.copy_(weights.flip(0))
    graph.replay()
    torch.cuda.synchronize()
    expected = kernels.loss_and_gradient(weights, queries, targets, SMALL.layers, "mse", mode="network")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_extra_memory_of_4096_models() -> None:
    case, k, n = cnn3(), 4096, 256
    weights, queries, targets = _on_gpu(case, 4, n)
    weights, targets = weights.repeat(k // 4, 1), targets.repeat(k // 4, 1, 1)
    scheduled = schedule(case.layers, case.shape)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    losses, gradient = kernels.loss_and_gradient(weights, queries, targets, case.layers, "mse", 2.0, "fp16", mode="network")
    extra = torch.cuda.max_memory_allocated() - before - 4 * (losses.numel() + gradient.numel())
    programs = whole.resident(weights.device)
    said = network_layout.network_bytes(scheduled, k, n, "fp16", True, programs)
    images = n * scheduled.stages[0].INPUTS * 2
    assert said <= extra <= said + images + 2**24  # the allocator rounds up
    assert extra <= 2e9
    assert all(torch.equal(gradient[:4], gradient[at : at + 4]) for at in (4, 2048, k - 4))
