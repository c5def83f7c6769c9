"""The kernels on a real GPU: every path and precision against float64, and what no interpreter can show.

Runs from the source tree with plain torch and triton: ``PYTHONPATH=. python3 -m pytest -m gpu tests/gpu``. Without a GPU the same
bodies run small in Triton's interpreter (gpu_device.py).
"""

from __future__ import annotations

import pytest
import torch
from gpu_device import DEVICE, INTERPRET, needs_cuda, size
from kernel_cases import CASES, HEADS, SMALL, Net, cnn3, cnn28, error, gradient_errors, lenet5, make, oracle, random_net
from tolerances import BARS, FP32, allowed
from torch import Tensor

from wslfast import Architecture, batched_behavioral_loss, batched_forward, build_zoo, engine
from wslfast.engine.paths import Stacked
from wslfast.engine.triton_path import Triton
from wslfast.kernels import criteria, reference
from wslfast.zoo import Dataset

pytestmark = pytest.mark.gpu
pytest.importorskip("triton")
if not torch.cuda.is_available() and not INTERPRET:
    pytest.skip("no CUDA device", allow_module_level=True)

from wslfast.kernels.triton import budget
from wslfast.kernels.triton import launch as kernels
from wslfast.kernels.triton.configurations import CHOICES, tuned
from wslfast.kernels.triton.criterion import CRITERIA
from wslfast.kernels.triton.differentiable import differentiable_forward
from wslfast.kernels.triton.schedule import schedule

NETWORKS = {"cnn3": cnn3(), "cnn3_tanh": cnn3("tanh"), "cnn28": cnn28(), "lenet5": lenet5(), "small": SMALL, **CASES, **HEADS}
NETWORKS = size(NETWORKS, {"small": SMALL, "head_relu": HEADS["head_relu"]})
CNN3, CNN3_TANH = size((cnn3(), cnn3("tanh")), (SMALL, HEADS["head_relu"]))
K, N = size((16, 64), (2, 3))


@pytest.fixture
def on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine takes the kernels: on a GPU as if they were the default, in the interpreter as if there were a GPU."""
    monkeypatch.setattr(engine, "choose", lambda architecture, *_, **__: Triton(architecture, "test"))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def _on_gpu(case: Net, k: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    weights, queries, targets = (t.to(DEVICE) for t in make(case, k, n))
    return weights, queries, targets


def _check(case: Net, k: int, n: int, precision: str, criterion: str = "mse") -> None:
    weights, queries, targets = _on_gpu(case, k, n)
    bars = BARS[precision]
    outputs = kernels.forward(weights, queries, case.layers, precision, mode="layers")
    assert error(outputs, reference.forward(weights.double(), queries.double(), case.layers)) < bars[0]
    losses, gradient = kernels.loss_and_gradient(weights, queries, targets, case.layers, criterion, 2.0, precision)
    expected, slopes = oracle(weights, queries, targets, case.layers, criterion)
    assert error(losses, expected) < 2 * bars[0]
    of, found = allowed(case.layers, precision), gradient_errors(gradient, slopes, case.layers)
    wrong = {name: value for name, value in found.items() if not value < of[name.rpartition(".")[0]]}
    assert not wrong, wrong


@pytest.mark.parametrize("precision", ["tf32x3", "tf32", "fp16", "bf16"])
@pytest.mark.parametrize("name", NETWORKS)
def test_against_float64(name: str, precision: str) -> None:
    _check(NETWORKS[name], *size((3, 37), (2, 3)), precision)


@pytest.mark.parametrize("precision", ["tf32x3", "tf32", "fp16", "bf16"])
@pytest.mark.parametrize("choice", [name for name in CHOICES if name != "default"])
def test_what_a_machine_may_choose_against_float64(choice: str, precision: str) -> None:
    with tuned(CHOICES[choice]):
        _check(CNN3_TANH, *size((3, 37), (2, 3)), precision)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("fused", [True, False])
def test_criteria(criterion: str, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not fused:
        monkeypatch.setattr(kernels, "fits", lambda scheduled, n: False)
    _check(CNN3_TANH, *size((3, 140), (2, 3)), "tf32x3", criterion)


def test_labels() -> None:
    weights, queries, _ = _on_gpu(SMALL, 5, 33)
    labels = torch.randint(0, 3, (5, 33), device=DEVICE)
    losses, gradient = kernels.loss_and_gradient(weights, queries, labels, SMALL.layers, "cross_entropy", 2.0, "tf32x3")
    expected, slopes = oracle(weights, queries, labels, SMALL.layers, "cross_entropy")
    assert error(losses, expected) < FP32
    assert error(gradient, slopes) < FP32


@pytest.mark.parametrize("seed", range(size(24, 1)))
def test_random_networks(seed: int) -> None:
    case = random_net(seed, *size((14, 64), (6, 5)))
    # several queries: with one, f - y may cancel, and fp32 itself is past the bar
    _check(case, 1 + seed % 4, 8 + 7 * seed % 50, "tf32x3")


@pytest.mark.parametrize("precision", ["tf32x3", "tf32", "fp16", "bf16"])
def test_two_runs_and_any_chunks_are_equal_to_the_bit(precision: str) -> None:
    case = CNN3
    weights, queries, targets = _on_gpu(case, *size((33, 64), (3, 2)))
    first = kernels.loss_and_gradient(weights, queries, targets, case.layers, "mse", 2.0, precision)
    for memory in (None, size(2**25, 2**10)):
        again = kernels.loss_and_gradient(weights, queries, targets, case.layers, "mse", 2.0, precision, memory=memory, mode="layers")
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    at = size(7, 1)
    alone = kernels.loss_and_gradient(weights[at : at + 1], queries, targets[at : at + 1], case.layers, "mse", 2.0, precision)
    assert torch.equal(alone[1][0], first[1][at])


@needs_cuda
def test_activations_past_two_to_the_31_numbers() -> None:
    case, n = cnn3(), 256
    scheduled = schedule(case.layers, case.shape)
    k = 2**31 // (n * scheduled.stages[0].OUTPUTS) + 2
    need = k * n * budget.query_bytes(scheduled, "fp16", True) * 5 // 4
    if torch.cuda.mem_get_info()[0] < need:
        pytest.skip(f"needs {need >> 30} GiB")
    weights, queries, targets = _on_gpu(case, 4, n)
    many = weights.repeat(k // 4 + 1, 1)[:k]
    many_targets = targets.repeat(k // 4 + 1, 1, 1)[:k]
    memory = 2**40
    losses, gradient = kernels.loss_and_gradient(many, queries, many_targets, case.layers, "mse", 2.0, "fp16", memory=memory)
    few = kernels.loss_and_gradient(weights, queries, targets, case.layers, "mse", 2.0, "fp16")
    pick = torch.arange(k, device=DEVICE) % 4
    assert torch.equal(losses, few[0][pick])
    assert torch.equal(gradient, few[1][pick])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("precision", ["tf32x3", "tf32", "fp16", "bf16"])
def test_a_bad_model_touches_nobody_else(precision: str, value: float) -> None:
    case = CNN3
    weights, queries, targets = _on_gpu(case, 5, size(40, 2))
    good = kernels.loss_and_gradient(weights, queries, targets, case.layers, "mse", 2.0, precision)
    weights[2, 5] = value
    losses, gradient = kernels.loss_and_gradient(weights, queries, targets, case.layers, "mse", 2.0, precision)
    keep = [0, 1, 3, 4]
    assert torch.equal(losses[keep], good[0][keep])
    assert torch.equal(gradient[keep], good[1][keep])
    if value != value:
        assert losses[2].isnan()


def test_nan_in_one_window_position_survives_pooling() -> None:
    case = CNN3
    weights, queries, _ = _on_gpu(case, 2, 3)
    queries[(1, 0, *size((7, 9), (2, 3)))] = float("nan")
    for precision in ("tf32x3", "tf32", "fp16", "bf16"):
        found = kernels.forward(weights, queries, case.layers, precision, mode="layers")
        assert found.isnan().any(-1).tolist() == [[False, True, False]] * 2


def test_queries_from_a_pool() -> None:
    case, (k, rows, n) = CNN3, size((5, 50, 20), (2, 5, 3))
    weights, pool, targets = _on_gpu(case, k, rows)
    index, targets = torch.randint(0, rows, (k, n), device=DEVICE), targets[:, :n]
    by_pool = kernels.loss_and_gradient(weights, pool, targets, case.layers, "mse", index=index)
    by_model = kernels.loss_and_gradient(weights, pool[index], targets, case.layers, "mse")
    assert all(torch.equal(a, b) for a, b in zip(by_pool, by_model, strict=True))


@needs_cuda
def test_cuda_graph() -> None:
    case = cnn3()
    weights, queries, targets = _on_gpu(case, 16, 64)

    def step() -> tuple[Tensor, Tensor]:
        return kernels.loss_and_gradient(weights, queries, targets, case.layers, "mse")

    kernels.warmup(case.layers, case.shape, 64)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    graph.replay()
    torch.cuda.synchronize()
    expected = step()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    weights.copy_(weights.flip(0))
    graph.replay()
    torch.cuda.synchronize()
    again = step()
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_autograd() -> None:
    """The gradient of the forward pass, that of a plain sum (stride 0) included; a second derivative is an error."""
    case = CNN3_TANH
    weights, queries, targets = _on_gpu(case, *size((4, 32), (2, 3)))
    weights.requires_grad_()

    def outputs() -> Tensor:
        return differentiable_forward(weights, queries, case.layers, "tf32x3")

    (found,) = torch.autograd.grad((outputs() - targets).square().sum() * 0.5, weights)
    wide = weights.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad((reference.forward(wide, queries.double(), case.layers) - targets).square().sum() * 0.5, wide)
    assert error(found, expected) < 1e-4
    (slope,) = torch.autograd.grad(outputs().sum(), weights, create_graph=True)
    assert slope.isfinite().all()
    with pytest.raises(RuntimeError, match="once"):
        slope.sum().backward()


@needs_cuda
def test_streams() -> None:
    case = cnn3()
    weights, queries, targets = _on_gpu(case, 16, 64)
    expected = kernels.loss_and_gradient(weights, queries, targets, case.layers, "mse")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        found = kernels.loss_and_gradient(weights, queries, targets, case.layers, "mse")
    torch.cuda.current_stream().wait_stream(side)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@needs_cuda
def test_a_second_gpu() -> None:
    case = cnn3()
    weights, queries, targets = _on_gpu(case, 4, 32)
    expected = kernels.loss_and_gradient(weights, queries, targets, case.layers, "mse")
    found = kernels.loss_and_gradient(weights.to("cuda:1"), queries.to("cuda:1"), targets.to("cuda:1"), case.layers, "mse")
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(found, expected, strict=True))


def test_public_calls_compiled(on_triton: None) -> None:
    """fullgraph, forward and loss: the same bits as eager code on the kernels, and close to float64."""
    case = CNN3_TANH
    arch = Architecture.from_layers(case.layers, case.shape)
    weights, queries, targets = _on_gpu(case, *size((4, 32), (2, 3)))
    weights.requires_grad_()

    def step(w: Tensor) -> Tensor:
        outputs = batched_forward(w, queries, arch)
        return (outputs - targets).square().mean() + batched_behavioral_loss(w, None, queries, arch, targets=targets)

    compiled = torch.compile(step, fullgraph=True, backend=size("inductor", "aot_eager"))
    (found,) = torch.autograd.grad(compiled(weights), weights)
    wide = weights.detach().double().requires_grad_()
    outputs = reference.forward(wide, queries.double(), case.layers)
    losses = criteria.criterion_values(outputs, targets.double(), "mse")
    (expected,) = torch.autograd.grad((outputs - targets.double()).square().mean() + losses.mean(), wide)
    assert error(found, expected) < 1e-4


def test_any_strides() -> None:
    case = CNN3
    weights, queries, targets = _on_gpu(case, *size((3, 20), (2, 3)))
    expected = kernels.loss_and_gradient(weights, queries, targets, case.layers, "mse", 2.0, "fp16")
    wide = torch.full((len(weights), 2 * weights.shape[1]), float("nan"), device=DEVICE)
    wide[:, ::2] = weights
    turned = targets.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    laid = queries.contiguous(memory_format=torch.channels_last)
    found = kernels.loss_and_gradient(wide[:, ::2], laid, turned, case.layers, "mse", 2.0, "fp16")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@needs_cuda
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_autocast(on_triton: None, kind: torch.dtype) -> None:
    case = CNN3
    arch = Architecture.from_layers(case.layers, case.shape)
    weights, queries, targets = _on_gpu(case, 4, 32)
    bars = BARS["fp16" if kind == torch.float16 else "bf16"]
    with torch.autocast("cuda", kind):
        outputs = batched_forward(weights, queries, arch)
        loss = batched_behavioral_loss(weights, None, queries, arch, targets=targets)
    assert outputs.dtype == kind
    assert loss.dtype == torch.float32
    assert error(outputs, reference.forward(weights.double(), queries.double(), case.layers)) < 2 * bars[0]


def test_a_zoo_trained_on_the_kernels(on_triton: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pool and index all the way: the checkpoints of the torch engine up to rounding."""
    arch = Architecture.mlp(6, (5,), 3, "tanh", 0.0)
    images = torch.randn(10, 6)
    splits = {f"{part}_images": images for part in ("train", "val", "test")}
    data = Dataset(name="made", classes=3, **splits, **{f"{part}_labels": torch.arange(10) % 3 for part in ("train", "val", "test")})
    options = {"architecture": arch, "models": 2, "epochs": 1, "batch_size": 4, "split": (1.0, 0.0, 0.0)}
    found = build_zoo(data, device=DEVICE, **options)
    monkeypatch.undo()
    assert error(found.weights, build_zoo(data, **options).weights) < 1e-3


@pytest.mark.parametrize("precision", BARS)
def test_the_gradient_to_the_queries(precision: str) -> None:
    from wslfast.kernels.triton.query_gradient import gradients

    case = CNN3
    weights, queries, slope = _on_gpu(case, *size((3, 37), (2, 3)))
    for x in (queries, queries.expand(len(weights), *queries.shape).contiguous()):
        _, found = gradients(weights, x, slope, case.layers, precision)
        wide = x.double().requires_grad_()
        (expected,) = torch.autograd.grad(reference.forward(weights.double(), wide, case.layers), wide, slope.double())
        assert error(found, expected) < BARS[precision][3]


def test_a_network_with_norms_and_a_global_average(on_triton: None) -> None:
    from torch import nn

    module = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.SiLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip
    arch = Architecture.from_module(module, size((3, 20, 20), (3, 9, 9)))
    k, n = size((5, 33), (2, 3))
    weights = torch.randn(k, arch.num_weights, device=DEVICE) * 0.4
    for p in arch.parameters:
        if p.name.endswith("running_var"):
            weights[:, p.offset : p.stop] = weights[:, p.offset : p.stop].abs() + 0.5
    queries, targets = torch.randn(n, *arch.input_shape, device=DEVICE), torch.randn(k, n, 10, device=DEVICE)
    losses, gradient = engine.loss_and_gradient(weights, queries, targets, arch, "mse")
    exact = Stacked(arch, "the oracle")
    arguments = weights.cpu().double(), queries.cpu().double(), targets.cpu().double()
    expected, slopes = exact.loss_and_gradient(*arguments, "mse", 2.0, None)
    assert error(losses, expected) < 1e-4
    assert error(gradient, slopes) < 1e-3
