"""The library on a CUDA device, through its public calls. Skipped where there is none; ``make gpu`` runs it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tolerances import FP32, FP32_DEEP

from wslfast import (
    Architecture,
    Population,
    QueryPool,
    TargetCache,
    TokenLayout,
    TrainConfig,
    batched_behavioral_loss,
    batched_forward,
    train,
)
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
