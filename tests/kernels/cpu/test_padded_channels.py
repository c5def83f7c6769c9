"""Networks with channels added: the same function and the same gradient, in float32 where both can be compared."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from wslfast import Architecture
from wslfast.kernels import cpu
from wslfast.kernels.cpu.padded_channels import Wide, widened
from wslfast.kernels.layers import Activation, Affine, Conv2d, Dropout, Flatten, Layers, Linear, Pool2d, layer_slots, numbers_of

SIGMOID = (
    Conv2d("a", 2, 5, (3, 3)), Activation("s", "sigmoid"), Conv2d("b", 5, 3, (3, 3), (1, 1), (1, 1)), Activation("t", "sigmoid"),
    Pool2d("p"), Dropout("d"), Conv2d("c", 3, 9, (2, 2), bias=False), Activation("u", "softplus"), Pool2d("q", "avg", (2, 2), (1, 1)),
    Flatten("f"), Linear("g", 9 * 4, 7), Activation("v", "tanh"), Linear("h", 7, 3),
)  # fmt: skip
NETWORKS: dict[str, tuple[Layers, tuple[int, ...]]] = {
    "cnn3": (Architecture.cnn3().layers, (3, 32, 32)),
    "cnn": (Architecture.cnn().layers, (1, 28, 28)),
    "activations of zero": (SIGMOID, (2, 10, 10)),
}


def wide_of(name: str) -> tuple[Layers, tuple[int, ...], Wide]:
    layers, shape = NETWORKS[name]
    wide = widened(layers, shape)
    assert wide is not None
    return layers, shape, wide


def weights_of(layers: Layers, k: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(k, numbers_of(layers), generator=generator)
    for pair in layer_slots(layers):
        for slot in (pair.weight, pair.bias):
            if slot is not None:
                weights[:, slot.offset : slot.stop] /= math.sqrt(max(1, math.prod(slot.shape[1:])))
    return weights


@pytest.mark.parametrize("name", NETWORKS)
def test_function_and_gradient_are_the_narrow_networks(name: str) -> None:
    layers, shape, wide = wide_of(name)
    k, n = 3, 6
    generator = torch.Generator().manual_seed(1)
    weights, queries = weights_of(layers, k), torch.randn(n, *shape, generator=generator)
    rows = wide.rows(weights, k + 2)
    assert rows.shape == (k + 2, numbers_of(wide.layers))
    assert rows[k:].count_nonzero() == 0
    outputs = cpu.forward(weights, queries, layers)
    targets = torch.randn(outputs.shape, generator=generator)
    assert torch.allclose(cpu.forward(rows[:k], queries, wide.layers), outputs, rtol=1e-5, atol=1e-6)
    losses, gradient = cpu.loss_and_gradient(weights, queries, targets, layers, "mse")
    found, slopes = cpu.loss_and_gradient(rows[:k], queries, targets, wide.layers, "mse")
    narrow = torch.full_like(gradient, float("nan"))
    wide.narrowed(slopes, narrow)
    assert torch.allclose(found, losses, rtol=1e-5)
    assert (narrow - gradient).norm() <= 1e-5 * gradient.norm()


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_added_lies_between_two_layers_with_weights(name: str) -> None:
    layers, _, wide = wide_of(name)
    narrow, made = ([layer for layer in of if isinstance(layer, (Conv2d, Linear))] for of in (layers, wide.layers))
    assert all(layer.out_channels % 8 == 0 for layer in made[1:] if isinstance(layer, Conv2d))
    assert all(layer.out_channels % 2 == 0 for layer in made[:1] if isinstance(layer, Conv2d))
    assert made[0].weight_shape[0] - narrow[0].weight_shape[0] in (0, 1)
    assert [layer.weight_shape[0] for layer in made[-1:]] == [layer.weight_shape[0] for layer in narrow[-1:]]
    back = wide.rows(weights_of(layers, 2), 2)
    assert back.count_nonzero() == weights_of(layers, 2).count_nonzero()


@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        ((Conv2d("a", 1, 8, (3, 3)), Conv2d("b", 8, 16, (3, 3)), Flatten("f"), Linear("g", 16 * 4, 3)), (1, 6, 6)),  # nothing to add
        ((Conv2d("a", 1, 6, (3, 3)), Flatten("f"), Linear("g", 6 * 16, 3)), (1, 6, 6)),  # the first layer only gets even
        ((Conv2d("a", 1, 6, (3, 3)), Conv2d("b", 6, 3, (4, 4)), Flatten("f")), (1, 6, 6)),  # outputs stay
        ((Conv2d("a", 2, 6, (3, 3)), Conv2d("b", 6, 6, (3, 3), groups=2), Flatten("f"), Linear("g", 6 * 4, 3)), (2, 6, 6)),
        ((Conv2d("a", 2, 6, (3, 3)), Conv2d("b", 6, 6, (3, 3)), Affine("n", 6), Flatten("f"), Linear("g", 6 * 4, 3)), (2, 6, 6)),
        ((Linear("g", 5, 3), Linear("h", 3, 3)), (5,)),
    ],
)
def test_networks_that_stay_as_they_are(layers: Layers, shape: tuple[int, ...]) -> None:
    assert widened(layers, shape) is None


@pytest.mark.parametrize("name", NETWORKS)
def test_in_bfloat16_no_model_sees_the_others(name: str) -> None:
    layers, shape = NETWORKS[name]
    k, n = 11, 9
    generator = torch.Generator().manual_seed(1)
    weights, queries = weights_of(layers, k), torch.randn(n, *shape, generator=generator)
    weights[4] = float("nan")
    with torch.autocast("cpu", torch.bfloat16):
        outputs = cpu.forward(weights, queries, layers)
        targets = torch.randn(outputs.shape, generator=generator)
        losses, gradient = cpu.loss_and_gradient(weights, queries, targets, layers, "mse")
        for part in (slice(0, 1), slice(2, 4), slice(5, 11)):
            again = cpu.loss_and_gradient(weights[part], queries, targets[part], layers, "mse")
            assert torch.equal(again[0], losses[part])
            assert torch.equal(again[1], gradient[part])
            assert torch.equal(cpu.forward(weights[part], queries, layers), outputs[part])
    assert losses[4].isnan()
    assert torch.isfinite(torch.cat((gradient[:4], gradient[5:]))).all()
