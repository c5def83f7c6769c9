"""The published networks: layers, sizes, initialisation, and the way to JSON and back."""

from __future__ import annotations

import json
import math
from types import ModuleType
from typing import Any

import pytest
import torch
from tolerances import FP32
from torch import nn

from wslfast import batched_forward
from wslfast.architecture import INITIALISATIONS, Architecture
from wslfast.kernels.layers import Activation, Conv2d, Flatten, Linear, Pool2d
from wslfast.population import Population
from wslfast.testing import as_module, relative_error

C, P, A, D, FL, L = "conv2d", "pool2d", "activation", "dropout", "flatten", "linear"
CNN_ORDER = [C, P, A, C, P, A, C, A, FL, L, A, L]
CNN_DROP = [C, P, A, D, C, P, A, D, C, A, FL, L, A, D, L]
CNN3_ORDER = [C, P, A, D] * 3 + [FL, L, A, D, L]
LENET_ORDER = [C, A, P, D] * 2 + [FL, L, A, D, L, A, D, L]
# reference.md section 1.1: order of modules, indices with parameters, weight shapes, parameter count
PUBLISHED: dict[str, tuple[Architecture, list[str], tuple[int, ...], list[tuple[int, ...]], int]] = {
    "cnn-1": (Architecture.cnn(), CNN_ORDER, (0, 3, 6, 9, 11), [(8, 1, 5, 5), (6, 8, 5, 5), (4, 6, 2, 2), (20, 36), (10, 20)], 2464),
    "cnn-3": (Architecture.cnn(3), CNN_ORDER, (0, 3, 6, 9, 11), [(8, 3, 5, 5), (6, 8, 5, 5), (4, 6, 2, 2), (20, 36), (10, 20)], 2864),
    "cnn-dropout": (
        Architecture.cnn(1, dropout=0.1), CNN_DROP, (0, 4, 8, 11, 14), [(8, 1, 5, 5), (6, 8, 5, 5), (4, 6, 2, 2), (20, 36), (10, 20)], 2464,
    ),
    "cnn2-1": (Architecture.cnn2(), CNN_ORDER, (0, 3, 6, 9, 11), [(6, 1, 5, 5), (9, 6, 5, 5), (6, 9, 2, 2), (20, 54), (10, 20)], 3047),
    "cnn2-3": (Architecture.cnn2(3), CNN_ORDER, (0, 3, 6, 9, 11), [(6, 3, 5, 5), (9, 6, 5, 5), (6, 9, 2, 2), (20, 54), (10, 20)], 3347),
    "cnn2-dropout": (
        Architecture.cnn2(1, dropout=0.1), CNN_DROP, (0, 4, 8, 11, 14), [(6, 1, 5, 5), (9, 6, 5, 5), (6, 9, 2, 2), (20, 54), (10, 20)], 3047,
    ),
    "cnn3-1": (Architecture.cnn3(1), CNN3_ORDER, (0, 4, 8, 13, 16), [(16, 1, 3, 3), (32, 16, 3, 3), (15, 32, 3, 3), (20, 60), (10, 20)], 10565),
    "cnn3-3": (Architecture.cnn3(), CNN3_ORDER, (0, 4, 8, 13, 16), [(16, 3, 3, 3), (32, 16, 3, 3), (15, 32, 3, 3), (20, 60), (10, 20)], 10853),
    "cnn3-dropout": (
        Architecture.cnn3(dropout=0.5), CNN3_ORDER, (0, 4, 8, 13, 16), [(16, 3, 3, 3), (32, 16, 3, 3), (15, 32, 3, 3), (20, 60), (10, 20)], 10853,
    ),
    "lenet5-1": (Architecture.lenet5(1), LENET_ORDER, (0, 4, 9, 12, 15), [(6, 1, 5, 5), (16, 6, 5, 5), (120, 400), (84, 120), (10, 84)], 61706),
    "lenet5-3": (Architecture.lenet5(), LENET_ORDER, (0, 4, 9, 12, 15), [(6, 3, 5, 5), (16, 6, 5, 5), (120, 400), (84, 120), (10, 84)], 62006),
    "mlp": (Architecture.mlp(), [L, A, D, L, A, D, L], (0, 3, 6), [(30, 14), (15, 30), (10, 15)], 1075),
    "mlp-plain": (Architecture.mlp(7, (5,), 3, dropout=0.0, use_bias=False), [L, A, L], (0, 2), [(5, 7), (3, 5)], 50),
}  # fmt: skip


@pytest.mark.parametrize(("arch", "kinds", "indices", "shapes", "count"), PUBLISHED.values(), ids=PUBLISHED)
def test_published_networks(arch: Architecture, kinds: list[str], indices: tuple[int, ...], shapes: list[Any], count: int) -> None:
    assert [layer.kind for layer in arch.layers] == kinds
    weights = [s for s in arch.parameters if s.name.endswith("weight")]
    assert [s.name for s in weights] == [f"module_list.{i}.weight" for i in indices]
    assert [s.shape for s in weights] == shapes
    assert arch.num_weights == arch.num_parameters == count
    assert arch.planned
    assert list(arch.slots) == list(as_module(arch).state_dict())
    assert as_module(arch)(torch.zeros(2, *arch.input_shape)).shape == (2, arch.num_classes)


def test_published_pools_and_convolutions_are_plain() -> None:
    for name in ("cnn-1", "cnn2-1", "cnn3-3", "lenet5-3"):
        for layer in PUBLISHED[name][0].layers:
            if isinstance(layer, Conv2d):
                assert (layer.stride, layer.padding, layer.dilation, layer.groups, layer.bias) == ((1, 1), (0, 0), (1, 1), 1, True)
            if isinstance(layer, Pool2d):
                assert (layer.mode, layer.kernel_size, layer.stride) == ("max", (2, 2), (2, 2))


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("relu", Activation("relu2", "relu")),
        ("leakyrelu", Activation("leaky_relu2", "leakyrelu", 0.01)),
        ("leaky_relu", Activation("leaky_relu2", "leakyrelu", 0.01)),
        ("elu", Activation("elu2", "elu", 1.0)),
        ("gelu", Activation("gelu2", "gelu")),
        ("silu", Activation("silu2", "silu")),
    ],
)
def test_activation_names(name: str, record: Activation) -> None:
    assert Architecture.cnn3(activation=name).layers[2] == record


def test_mlp_does_not_touch_its_list() -> None:
    hidden = [30, 15]
    assert Architecture.mlp(h_dim=hidden) == Architecture.mlp(h_dim=hidden)
    assert hidden == [30, 15]


BIG = Architecture.from_layers([Conv2d("c", 40, 50, (5, 4)), Flatten("f"), Linear("l", 50, 400)], (40, 5, 4))
FANS = {"c": (40 * 20, 50 * 20), "l": (50, 400)}


def _expected(initialisation: str, fan_in: int, fan_out: int) -> tuple[float, float, float]:
    """Mean, standard deviation and largest magnitude (infinite for a normal) of an initialisation."""
    if initialisation == "uniform":
        return 0.5, math.sqrt(1 / 12), 1.0
    if initialisation == "normal":
        return 0.0, 1.0, math.inf
    if initialisation.startswith("kaiming"):
        std = math.sqrt(2 / fan_in)
    elif initialisation.startswith("xavier"):
        std = math.sqrt(2 / (fan_in + fan_out))
    else:
        std = math.sqrt(1 / (3 * fan_in))
    return 0.0, std, math.inf if initialisation.endswith("_normal") else std * math.sqrt(3)


@pytest.mark.parametrize("initialisation", INITIALISATIONS)
def test_initialisation_distributions(initialisation: str, poisoned_empty: None) -> None:
    row = BIG.initial_weights([initialisation], [11])[0]
    assert row.isfinite().all()
    for name, (fan_in, fan_out) in FANS.items():
        slot = BIG.slots[f"{name}.weight"]
        w = row[slot.offset : slot.stop].double()
        mean, std, largest = _expected(initialisation, fan_in, fan_out)
        error = 5 * std / math.sqrt(len(w))  # five standard errors
        assert abs(float(w.mean()) - mean) < error
        assert float(w.std()) == pytest.approx(std, rel=0.03)
        if largest < math.inf:
            assert float(w.abs().max()) <= largest * (1 + 1e-6)
            assert float(w.abs().max()) > 0.99 * largest
            if initialisation == "uniform":
                assert float(w.min()) >= 0
        else:
            assert 3.5 * std < float(w.abs().max()) < 6.5 * std
            assert float((w.abs() < std).double().mean()) == pytest.approx(0.6827, abs=0.02)  # a normal, not just its moments
        bias = row[BIG.slots[f"{name}.bias"].offset : BIG.slots[f"{name}.bias"].stop]
        if initialisation in ("default", "siren"):  # without a sine, both are torch's
            assert 0.8 / math.sqrt(fan_in) < float(bias.abs().max()) <= 1 / math.sqrt(fan_in)
        else:
            assert torch.equal(bias, torch.full_like(bias, 0.01))


def test_initialisation_is_torchs_to_the_bit() -> None:
    arch = Architecture.cnn3()
    row = arch.initial_weights(["kaiming_normal"], [5])[0]
    generator, state = torch.Generator().manual_seed(5), as_module(arch).state_dict()
    for key, value in state.items():
        if key.endswith("bias"):
            value.fill_(0.01)
        else:
            nn.init.kaiming_normal_(value, generator=generator)
    assert torch.equal(row, torch.cat([v.flatten() for v in state.values()]))


def test_default_initialisation_is_the_layers_own() -> None:
    arch = Architecture.lenet5()
    row = arch.initial_weights(["default"], [5])[0]
    with torch.random.fork_rng():
        torch.manual_seed(5)
        modules = [m for m in as_module(arch).modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        torch.manual_seed(5)
        for m in modules:
            m.reset_parameters()
    state = torch.cat([t.detach().flatten() for m in modules for t in (m.weight, m.bias)])
    assert torch.equal(row, state)


def test_a_row_depends_on_its_own_initialisation_and_seed() -> None:
    arch = Architecture.cnn()
    rng = torch.get_rng_state()
    many = arch.initial_weights(["uniform", "normal", "default", "uniform"], [3, 1, 2, 4])
    assert torch.equal(many[1:2], arch.initial_weights(["normal"], [1]))
    assert not torch.equal(many[0], many[3])
    assert torch.equal(rng, torch.get_rng_state())


def _torchvision_resnet18_keys() -> list[str]:
    def norm(name: str) -> list[str]:
        return [f"{name}.{key}" for key in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]

    keys = ["conv1.weight", *norm("bn1")]
    for stage in range(1, 5):
        for block in range(2):
            at = f"layer{stage}.{block}"
            keys += [f"{at}.conv1.weight", *norm(f"{at}.bn1"), f"{at}.conv2.weight", *norm(f"{at}.bn2")]
            if stage > 1 and block == 0:
                keys += [f"{at}.downsample.0.weight", *norm(f"{at}.downsample.1")]
    return [*keys, "fc.weight", "fc.bias"]


def test_resnet18_keys_and_counts() -> None:
    rng = torch.get_rng_state()
    arch = Architecture.resnet18()
    assert torch.equal(rng, torch.get_rng_state())
    keys = [key for key in _torchvision_resnet18_keys() if not key.endswith("num_batches_tracked")]
    assert [s.name for s in arch.parameters] == keys
    assert arch.num_parameters == 11_173_962
    assert arch.num_weights == 11_183_582 - 20  # state-dict elements less one step counter for each of the 20 batch norms
    assert arch.slots["conv1.weight"].shape == (64, 3, 3, 3)
    assert arch.slots["layer4.0.downsample.0.weight"].shape == (512, 256, 1, 1)
    assert arch.num_classes == 10


@pytest.mark.slow
def test_resnet18_of_100_classes() -> None:
    assert Architecture.resnet18(num_classes=100).num_parameters == 11_220_132


def test_resnet18_against_torchvision(torchvision: ModuleType) -> None:
    module = torchvision.models.resnet18(num_classes=10)
    module.conv1, module.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    arch = Architecture.resnet18()
    population = Population.from_state_dicts(arch, [module.state_dict()])
    queries = torch.randn(2, 3, 32, 32)
    assert relative_error(batched_forward(population, queries, arch)[0], module.eval()(queries)) < FP32
    module.load_state_dict(population.state_dict(0))


def test_small_resnet18_runs_and_its_record_returns() -> None:
    arch = Architecture.resnet18(channels_in=1, num_classes=3, width=4)
    again = Architecture.from_dict(json.loads(json.dumps(arch.to_dict())))
    weights, queries = torch.rand(2, arch.num_weights), torch.randn(3, 1, 32, 32)
    outputs = batched_forward(weights, queries, arch)
    assert outputs.shape == (2, 3, 3)
    assert torch.equal(outputs, batched_forward(weights, queries, again))


@pytest.mark.parametrize("name", PUBLISHED)
def test_json_there_and_back(name: str) -> None:
    arch = PUBLISHED[name][0]
    assert Architecture.from_dict(json.loads(json.dumps(arch.to_dict(), allow_nan=False))) == arch
