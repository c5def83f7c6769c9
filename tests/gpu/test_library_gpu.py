"""The library on a CUDA device, through its public calls. Skipped where there is none; ``make gpu`` runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import FP32, FP32_DEEP
from torch import nn

from wslfast import (
    Architecture,
    Population,
    QueryPool,
    TargetCache,
    TokenLayout,
    TrainConfig,
    WslfastError,
    batched_behavioral_loss,
    batched_forward,
    engine,
    train,
)
from wslfast.engine.cuda_graph import Recorder, recording
from wslfast.engine.triton_path import Triton
from wslfast.permutation import random_views
from wslfast.testing import oracle_loss, oracle_outputs, relative_error
from wslfast.training import load_run

pytestmark = pytest.mark.gpu
NETS = {"cnn": Architecture.cnn, "cnn3": Architecture.cnn3, "lenet5": Architecture.lenet5, "mlp": Architecture.mlp}


def case(name: str, k: int = 5, n: int = 7) -> tuple[Architecture, torch.Tensor, torch.Tensor, torch.Tensor]:
    arch = NETS[name]()
    generator = torch.Generator().manual_seed(0)
    rows = [arch.initial_weights(["kaiming_normal"] * k, range(s, s + k)) for s in (0, 100)]
    return arch, rows[0], rows[1], torch.randn(n, *arch.input_shape, generator=generator)


@pytest.fixture(autouse=True)
def _highest() -> object:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("criterion", ["mse", "softmax_mse", "cross_entropy", "distillation"])
def test_the_torch_engine_against_float64(name: str, criterion: str) -> None:
    arch, rebuilt, original, queries = case(name)
    targets = oracle_outputs(original, queries, arch)
    values, gradients = oracle_loss(rebuilt, queries, targets, arch, criterion)
    leaf = rebuilt.cuda().requires_grad_()
    got = batched_behavioral_loss(leaf, original.cuda(), queries.cuda(), arch, criterion=criterion, reduction="none", backend="torch")
    got.sum().backward()
    assert relative_error(got, values) < FP32_DEEP
    assert leaf.grad is not None
    assert relative_error(leaf.grad, gradients) < FP32_DEEP
    assert relative_error(batched_forward(leaf, queries.cuda(), arch, backend="torch"), oracle_outputs(rebuilt, queries, arch)) < FP32


def test_a_bad_model_stays_alone() -> None:
    arch, rebuilt, original, queries = case("cnn3")
    rebuilt[2] = float("nan")
    leaf = rebuilt.cuda().requires_grad_()
    batched_behavioral_loss(leaf, original.cuda(), queries.cuda(), arch, nan_policy="omit").backward()
    assert leaf.grad is not None
    assert bool(leaf.grad.isfinite().all())
    assert bool((leaf.grad[2] == 0).all())
    assert bool((leaf.grad.abs().sum(1) > 0)[[0, 1, 3, 4]].all())


def test_views_tokens_and_targets_on_the_device() -> None:
    arch, rows, _, queries = case("cnn3")
    rows, queries = rows.cuda(), queries.cuda()
    layout = TokenLayout(arch)
    generator = torch.Generator("cuda").manual_seed(1)
    views = random_views(rows, arch, generator)
    tokens, mask, positions = layout.tokenize(views)
    assert tokens.is_cuda
    assert mask.is_cuda
    assert positions.is_cuda
    assert torch.equal(layout.detokenize(tokens), views)
    assert bool((tokens[:, ~mask] == 0).all())
    cache = TargetCache(Population(arch, rows), QueryPool(queries))
    served = cache.targets(torch.tensor([3, 1], device="cuda"), torch.tensor([0, 6], device="cuda"))
    assert relative_error(served, oracle_outputs(views[[3, 1]], queries[[0, 6]], arch)) < FP32_DEEP


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_and_resuming(tmp_path: Path, precision: str) -> None:
    arch = Architecture.cnn()
    population = Population(arch, arch.initial_weights(["kaiming_normal"] * 12, range(12)))
    images = torch.randn(64, 1, 28, 28)
    values = {"steps": 6, "queries": 16, "batch_size": 4, "d_model": 32, "heads": 2, "layers": 1, "checkpoint_every": 3}
    config = TrainConfig(zoo="-", out=str(tmp_path), device="cuda", precision=precision, **values)
    train(config, population=population, images=images)
    run = load_run(tmp_path, device="cuda")
    assert run.step == 6
    assert all(bool(p.isfinite().all()) for p in run.autoencoder.parameters())


@pytest.mark.parametrize("name", ["cnn3", "lenet5", "folded"])
def test_recorded_calls_are_the_calls_to_the_bit(name: str) -> None:
    """The behavioral loss as a run with cuda_graph has it. Folded: a norm and an average, whose gradient goes through autograd."""
    if name == "folded":
        module = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
            nn.Flatten(), nn.Linear(8, 5),
        )  # fmt: skip
        arch = Architecture.from_module(module, (3, 16, 16), name)
    else:
        arch = NETS[name]()
    k, n = 6, 20
    recorder, calls = Recorder(), []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        rows = arch.initial_weights(["kaiming_normal"] * k, range(seed, seed + k)).cuda()
        images = torch.randn(n, *arch.input_shape, generator=generator).cuda()
        calls.append((rows, images, torch.randn(k, n, arch.num_classes, generator=generator).cuda()))
    expected = [engine.loss_and_gradient(*call, arch, "mse", backend="triton") for call in calls]
    with recording(recorder):
        found = [engine.loss_and_gradient(*call, arch, "mse", backend="triton") for call in calls]
    assert recorder.recorded == 1
    for got, want in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert torch.cuda.current_stream() == torch.cuda.default_stream()


def test_a_call_that_asks_the_device_is_refused_a_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA breaks the recording off: an error in words, and the process's calls still give the numbers that they gave."""
    arch, rows, _, images = case("cnn3")
    call = (rows.cuda(), images.cuda(), torch.randn(5, 7, 10).cuda())
    expected = engine.loss_and_gradient(*call, arch, "mse", backend="triton")
    plain = Triton.loss_and_gradient

    def asks(self: Triton, *given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        losses, gradient = plain(self, *given)
        losses.sum().item()
        return losses, gradient

    monkeypatch.setattr(Triton, "loss_and_gradient", asks)
    with recording(Recorder()), pytest.raises(WslfastError, match="broke the recording"):
        engine.loss_and_gradient(*call, arch, "mse", backend="triton")
    monkeypatch.undo()
    again = engine.loss_and_gradient(*call, arch, "mse", backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))
    assert torch.cuda.current_stream() == torch.cuda.default_stream()


def test_a_run_with_cuda_graph_is_the_run_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WSLFAST_KERNELS", "on")
    arch = Architecture.cnn()
    population = Population(arch, arch.initial_weights(["kaiming_normal"] * 12, range(12)))
    images = torch.randn(64, 1, 28, 28)
    values = {"steps": 4, "queries": 16, "batch_size": 4, "d_model": 32, "heads": 2, "layers": 1, "log_every": 1}
    losses = []
    for graph in (False, True):
        config = TrainConfig(zoo="-", out=str(tmp_path / str(graph)), device="cuda", cuda_graph=graph, **values)
        seen: list[float] = []
        train(config, population=population, images=images, on_record=lambda record, seen=seen: seen.append(record["loss"]))
        losses.append(seen)
    # the autoencoder's own gradients may sum in another order from run to run; the first step's loss is before any
    assert losses[0][0] == losses[1][0]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
