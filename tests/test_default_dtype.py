"""Whatever torch's default type is, everything of ours is float32, and the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch_settings import default_dtype

import wslfast
from wslfast import Architecture, Population, engine
from wslfast.kernels.stacked import folded_chain
from wslfast.queries import synthetic_queries
from wslfast.zoo import Dataset, MappedZoo

DTYPES = [torch.float64, torch.bfloat16]


class Looking(nn.Module):
    """No graph follows what looks at numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.only = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.only(x) if float(x.sum()) != 7 else self.only(x) * 2


def _chain() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def _normed() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))


def _population(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> Population:
    generator = torch.Generator().manual_seed(0)
    modules = [make().float() for _ in range(3)]
    for parameter in (p for module in modules for p in module.parameters()):  # a module of torch's draws other numbers in another type
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
    return Population.from_modules(modules, shape)


def _module() -> list[Tensor]:
    population = _population(_chain, (4,))
    return [population.weights, population.module(1)(_queries(4))]


def _queries(*shape: int) -> Tensor:
    return torch.randn(5, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float32)


def _loss(make: Callable[[], nn.Module], *shape: int) -> list[Tensor]:
    weights = torch.randn(
        3, Architecture.from_module(make(), shape).num_weights, generator=torch.Generator().manual_seed(2), dtype=torch.float32
    )
    architecture, rows = Architecture.from_module(make(), shape), weights.abs().requires_grad_()
    value = wslfast.batched_behavioral_loss(rows, weights.abs() + 0.1, _queries(*shape), architecture)
    return [value.detach(), *torch.autograd.grad(value, rows), wslfast.batched_forward(weights.abs(), _queries(*shape), architecture)]


def _targets() -> list[Tensor]:
    return [wslfast.TargetCache(_population(_chain, (4,)), wslfast.QueryPool(_queries(4))).outputs]


def _codes() -> list[Tensor]:
    architecture = Architecture.cnn()
    population = Population(architecture, architecture.initial_weights(["kaiming_normal"] * 6, range(6)))
    images = synthetic_queries("smooth", 24, architecture)
    made = [wslfast.LinearCodec(population), wslfast.AdaptiveCodec(population, queries=images, models=3)]
    return [codec.reconstruct(population.weights) for codec in made]


CASES: dict[str, Callable[[], list[Tensor]]] = {
    "fresh weights": lambda: [Architecture.cnn().initial_weights(["default", "normal"], [1, 2])],
    "modules there and back": _module,
    "a chain's loss": lambda: _loss(_chain, 4),
    "a loss through folded norms": lambda: _loss(_normed, 1, 4, 4),
    "a loss of what has no graph": lambda: _loss(Looking, 4),
    "targets": _targets,
    "codes": _codes,
    **{f"queries: {kind}": lambda kind=kind: [synthetic_queries(kind, 4, Architecture.cnn3())] for kind in ("uniform", "noise", "smooth", "strokes", "blend")},
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", list(CASES))
def test_numbers_are_float32_and_the_same(name: str, dtype: torch.dtype) -> None:
    folded_chain.supports.cache_clear()
    with default_dtype(dtype):
        found = CASES[name]()
    folded_chain.supports.cache_clear()
    for a, b in zip(found, CASES[name](), strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_path_is_the_same(dtype: torch.dtype) -> None:
    """Whether the engine folds norms is asked once a process, and must not depend on what torch's default is then."""
    architecture = Architecture.from_module(_normed(), (1, 4, 4))
    folded_chain.supports.cache_clear()
    with default_dtype(dtype):
        assert engine.choose(architecture, "cpu", torch.float32).name == "cpu"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_zoo_is_built_and_trained_on(dtype: torch.dtype, tmp_path: Path) -> None:
    inputs, labels = _queries(4).repeat(4, 1), torch.arange(20) % 3
    data = Dataset("points", *(inputs, labels) * 3, 3)
    settings = {"models": 6, "epochs": 1, "batch_size": 8, "split": (0.7, 0.0, 0.3)}
    architecture = Architecture.from_module(_chain().float(), (4,), "chain")
    with default_dtype(dtype):
        built = wslfast.build_zoo(data, tmp_path / "zoo", architecture=architecture, **settings)
        stored, mapped = wslfast.load_zoo(tmp_path / "zoo").weights, MappedZoo(tmp_path / "zoo").rows(torch.arange(len(built)))
        sizes = {"steps": 2, "batch_size": 4, "queries": 5, "d_model": 8, "heads": 2, "layers": 1}
        wslfast.train(wslfast.TrainConfig(zoo=str(tmp_path / "zoo"), out=str(tmp_path / "run"), **sizes), images=inputs)
        run = wslfast.training.load_run(tmp_path / "run")
    assert stored.dtype == mapped.dtype == torch.float32
    assert torch.equal(stored, mapped)
    assert torch.equal(built.weights, wslfast.build_zoo(data, architecture=architecture, **settings).weights)
    assert {p.dtype for p in run.autoencoder.parameters()} == {torch.float32}
