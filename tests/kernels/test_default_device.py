"""The whole way from a module to a trained autoencoder, while torch's default device is another than the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import wslfast
from wslfast import Architecture, Population, TokenLayout, TrainConfig, batched_behavioral_loss, batched_forward
from wslfast.kernels.default_device import on_the_cpu


@pytest.fixture
def elsewhere() -> Iterator[None]:
    """A default device whose tensors hold no numbers: whatever is made there by mistake shows."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


class Looks(nn.Module):
    """Cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) if x.isfinite().all() else x[:, :4]


MODULES = {
    "a chain": lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)),
    "a graph": lambda: nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 4)),
    "batch norm": lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)),
    "untraced": Looks,
}


@pytest.mark.parametrize("name", MODULES)
def test_networks(name: str, elsewhere: None) -> None:
    with torch.device("cpu"):
        torch.manual_seed(0)
        modules = [MODULES[name]().eval() for _ in range(3)]
        x = torch.randn(5, 6)
    population = Population.from_modules(modules, (6,))
    again = Population.from_state_dicts(population.architecture, [m.state_dict() for m in modules])
    arch = population.architecture
    assert (arch.graph is None) == (name == "untraced")
    assert torch.equal(population.weights, again.weights)
    assert population.weights.device.type == "cpu"
    outputs = batched_forward(population, x, arch)
    with torch.no_grad():
        assert torch.allclose(outputs, torch.stack([m(x) for m in modules]), atol=1e-6)
        assert torch.allclose(population[1:].module(0)(x), modules[1](x), atol=1e-6)
    for _ in range(4):
        weights = population.weights.clone().requires_grad_()
        batched_behavioral_loss(weights, None, x, arch, targets=outputs + 1).backward()
        assert weights.grad is not None
        assert weights.grad.isfinite().all()
    layout = TokenLayout(arch)
    assert torch.equal(layout.detokenize(layout.tokenize(population.weights).tokens), population.weights)
    assert {value.device.type for value in population.state_dict(0).values()} == {"cpu"}


def test_from_a_zoo_to_an_autoencoder(tmp_path: Path, elsewhere: None) -> None:
    zoo = wslfast.build_zoo("digits", tmp_path / "zoo", models=6, epochs=1)
    assert zoo.weights.device.type == "cpu"
    assert torch.equal(wslfast.load_zoo(tmp_path / "zoo").weights, zoo.weights)
    config = TrainConfig(zoo=str(tmp_path / "zoo"), out=str(tmp_path / "run"), steps=3, batch_size=4, queries=8)
    run = wslfast.train(config)
    assert all(parameter.isfinite().all() for parameter in run.autoencoder.parameters())
    assert wslfast.evaluate(tmp_path / "run")


def test_what_is_set_stays_set(elsewhere: None) -> None:
    made = on_the_cpu(lambda: (torch.zeros(1), torch.get_default_device()))()
    assert {made[0].device.type, made[1].type} == {"cpu"}
    assert torch.zeros(1).device.type == "meta"
    with pytest.raises(ValueError, match="x"):
        on_the_cpu(int)("x")
    assert torch.zeros(1).device.type == "meta"


def test_weights_of_an_architecture(elsewhere: None) -> None:
    rows = Architecture.cnn().initial_weights(["kaiming_uniform"], [3])
    torch.set_default_device(None)
    assert torch.equal(rows, Architecture.cnn().initial_weights(["kaiming_uniform"], [3]))
