"""The same seed twice, models in another order, other chunks: every model's loss and gradient to the bit."""

from __future__ import annotations

import random

import pytest
import torch
from matrix import FULL, digest, many, reached
from torch import Tensor
from training_runs import ARCH, config

from wslfast import Architecture, Population, batched_behavioral_loss, engine, train
from wslfast.kernels.criteria import CRITERIA
from wslfast.training.checkpoint import load_checkpoint

CNN = Architecture.cnn()


def _call(weights: Tensor, queries: Tensor, targets: Tensor, arch: Architecture, criterion: str, backend: str) -> tuple[Tensor, Tensor]:
    rows = weights.clone().requires_grad_()
    values = batched_behavioral_loss(rows, None, queries, arch, targets=targets, criterion=criterion, reduction="none", backend=backend)
    return values.detach(), torch.autograd.grad(values.sum(), rows)[0]


def _equal(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


class _Looking(torch.nn.Module):
    """Control flow on numbers, which nobody can trace."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) if bool(x.isfinite().any()) else -self.inner(x)


@pytest.mark.parametrize("path", ["cpu", "loop", "stacked", "module"])
def test_twice_permuted_and_chunked_are_the_same_bits(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On every path that runs on a CPU. (On a GPU grouped convolutions of other group counts are cuDNN's to choose.)"""
    rounds = many(4, 50)
    arch = CNN if path == "cpu" else ARCH
    if path in ("stacked", "module"):
        layers = [torch.nn.Flatten(), torch.nn.Linear(64, 6), torch.nn.LayerNorm(6), torch.nn.SiLU(), torch.nn.Linear(6, 3)]
        net = torch.nn.Sequential(*layers)
        arch = Architecture.from_module(net if path == "stacked" else _Looking(net), (1, 8, 8))
    backend = "torch" if path == "loop" else "auto"
    assert engine.choose(arch, "cpu", torch.float32, backend).name == path
    for seed in range(rounds):
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        k, n = rng.randint(2, 17), rng.randint(1, 9)
        weights = 0.3 * torch.randn(k, arch.num_weights, generator=generator)
        queries = torch.randn(n, *arch.input_shape, generator=generator)
        targets = torch.randn(k, n, arch.num_classes, generator=generator)

        def call(
            order: Tensor, criterion: str = rng.choice(CRITERIA), data: tuple[Tensor, ...] = (weights, queries, targets)
        ) -> tuple[Tensor, Tensor]:
            return _call(data[0][order], data[1], data[2][order], arch, criterion, backend)

        whole = torch.arange(k)
        first = call(whole)
        assert _equal(first, call(whole))
        order = torch.randperm(k, generator=generator)
        assert _equal((first[0][order], first[1][order]), call(order))
        cuts = [rng.randint(1, k) for _ in range(2)]
        for size in (1, *cuts):
            parts = [call(part) for part in whole.split(size)]
            assert _equal(first, (torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])))
        with monkeypatch.context() as patch:
            patch.setattr(engine, "models_per_chunk", lambda *_, size=cuts[0]: size)
            assert _equal(first, call(whole))
    reached("determinism", f"seeds, orders and chunks on path {path!r}, losses and gradients bit-equal", rounds, 50)


def test_two_runs_of_one_seed_are_one_run(tmp_path_factory: pytest.TempPathFactory) -> None:
    rounds = many(2, 10)
    images = torch.randn(48, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    population = Population(ARCH, ARCH.initial_weights(["kaiming_normal"] * 20, range(20)))
    for seed in range(rounds):
        states = []
        for _ in range(2):
            out = tmp_path_factory.mktemp("run")
            train(config(out, seed=seed, steps=4, dropout=0.1), population=population, images=images)
            states.append(digest({key: value for key, value in load_checkpoint(out).items() if key != "config"}))
            torch.rand(seed + 3)
        assert states[0] == states[1]
    reached("determinism", "training runs of one seed whose checkpoints are bit-equal", rounds, 10)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_broken_models_among_64_touch_nobody_else(value: float) -> None:
    """Whatever their number: the others' losses and gradients to the bit, and each policy as documented."""
    numbers = list(range(1, 64)) if FULL else [1, 7, 32, 63]
    generator = torch.Generator().manual_seed(0)
    weights = 0.1 * torch.randn(64, ARCH.num_weights, generator=generator)
    queries, targets = torch.randn(5, 1, 8, 8, generator=generator), torch.randn(64, 5, 3, generator=generator)

    def run(rows: Tensor, good: Tensor, policy: str, reduction: str = "none") -> tuple[Tensor, Tensor]:
        rows = rows.clone().requires_grad_()
        losses = batched_behavioral_loss(rows, None, queries, ARCH, targets=targets, reduction=reduction, nan_policy=policy)
        return losses.detach(), torch.autograd.grad(losses[good].sum() if reduction == "none" else losses, rows)[0]

    expected, gradient = run(weights, torch.ones(64, dtype=torch.bool), "propagate")
    for bad in numbers:
        chosen = torch.randperm(64, generator=generator)[:bad]
        good = torch.ones(64, dtype=torch.bool)
        good[chosen] = False
        spoilt = weights.clone()
        spoilt[chosen, torch.randint(ARCH.num_weights, (bad,), generator=generator)] = value
        for policy in ("propagate", "omit"):
            losses, rows = run(spoilt, good, policy)
            assert torch.equal(losses[good], expected[good])
            assert torch.equal(rows[good], gradient[good])
        judged, _ = run(spoilt, good, "omit")  # -inf before a ReLU may do no harm: such a model is kept
        mean, rows = run(spoilt, good, "omit", "mean")
        torch.testing.assert_close(mean, judged[~judged.isnan()].mean())
        assert bool(rows.isfinite().all())
        found = False
        try:
            run(spoilt, good, "raise")
        except ValueError as error:
            found = "non-finite" in str(error)
        assert found == bool(judged.isnan().any())
    reached("numbers", f"counts of {value} models among 64, the others bit-equal", len(numbers), 63)
