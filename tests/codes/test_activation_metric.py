"""The activation metric as a loss against loops over rows, models, images, positions and permutations; its coordinates; training with it."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tolerances import FP32, FP32_DEEP
from torch import Tensor, nn
from training_runs import ARCH, config

from wslfast import Architecture, Population, TrainConfig, WslfastError
from wslfast.codes.activation_metric import UNITS, ActivationMetric
from wslfast.codes.autoencoder import STARTS, Autoencoder
from wslfast.codes.layer_inputs import input_second_moments, output_sensitivity, root
from wslfast.codes.linear import LinearCodec
from wslfast.tokens import TokenLayout
from wslfast.training.trainer import Trainer

DAMPING = 1e-3


@pytest.fixture(scope="module")
def zoo() -> Population:
    weights = ARCH.initial_weights(["kaiming_normal"] * 5, range(5))  # without biases, which are to vary as well
    return Population(ARCH, weights + 0.1 * torch.randn(weights.shape, generator=torch.Generator().manual_seed(2)))


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(5))


def rows_of(weights: Tensor) -> list[Tensor]:
    """Rows of the network's three layers, weights then bias: ``[4, 10], [6, 37], [3, 7]``, by hand from its parameters' places."""
    sizes = [(4, 9), (6, 36), (3, 6)]
    out, start = [], 0
    for channels, width in sizes:
        matrix = weights[start : start + channels * width].view(channels, width)
        bias = weights[start + channels * width : start + channels * (width + 1)]
        out.append(torch.cat([matrix, bias[:, None]], 1))
        start += channels * (width + 1)
    assert start == len(weights)
    return out


def inputs_of(weights: Tensor, images: Tensor) -> list[list[Tensor]]:
    """Every input that each layer meets, with its 1, in every order of its hidden channels (float64)."""
    first, second, _ = rows_of(weights.double())
    x = images.double()
    patches = [p for image in F.unfold(x, 3) for p in image.T]
    made = F.conv2d(x, first[:, :9].reshape(4, 1, 3, 3), first[:, 9])
    hidden = F.max_pool2d(made, 2).relu()  # [n, 4, 3, 3]
    last = (hidden.flatten(1) @ second[:, :36].T + second[:, 36]).relu()  # [n, 6]
    one = torch.ones(1, dtype=torch.float64)
    return [
        [torch.cat([p, one]) for p in patches],
        [torch.cat([h[list(order)].flatten(), one]) for h in hidden for order in itertools.permutations(range(4))],
        [torch.cat([v[list(order)], one]) for v in last for order in itertools.permutations(range(6))],
    ]


def layer_values(zoo: Population, images: Tensor, difference: Tensor) -> list[float]:
    """Of each layer: the sum over rows e of the mean of ``(e x)^2`` over inputs, and damping times their mean square times ``|e|^2``."""
    met = [inputs_of(w, images) for w in zoo.weights]
    values = []
    for layer, rows in enumerate(rows_of(difference.double())):
        x = torch.stack([v for model in met for v in model[layer]])
        power = float(x.square().sum(1).mean()) / x.shape[1]
        values.append(sum(float((x @ e).square().mean() + DAMPING * power * e.square().sum()) for e in rows))
    return values


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("token_size", [0, 7], ids=["whole rows", "cut rows"])
def test_the_loss_is_the_mean_squared_change_of_responses(zoo: Population, images: Tensor, unit: str, token_size: int) -> None:
    place = TokenLayout(ARCH, token_size)
    metric = ActivationMetric(zoo, images, place, unit=unit)
    generator = torch.Generator().manual_seed(1)
    errors = 0.1 * torch.randn(2, ARCH.num_weights, generator=generator)
    target = place.tokenize(zoo.weights[:2]).tokens
    rebuilt = place.tokenize(zoo.weights[:2] + errors).tokens
    padded = torch.where(place.mask, rebuilt, math.nan).requires_grad_()
    got = metric.loss(padded, target)
    each = [layer_values(zoo, images, e) for e in errors]
    about = [layer_values(zoo, images, w - zoo.weights.mean(0)) for w in zoo.weights]
    spreads = [sum(column) / len(about) for column in zip(*about, strict=True)]
    worth = [1.0] * 3
    if unit == "layer":
        worth = [n / ARCH.num_weights / s for n, s in zip((40, 222, 21), spreads, strict=True)]
    elif unit == "outputs":
        roots = [root(c, DAMPING) for c in metric.groups.cut(input_second_moments(zoo.weights, images, ARCH))]
        factors = output_sensitivity(zoo.weights, images, metric.groups, roots, 0)
        worth = [factors[span.first] for span in metric.groups.spans]
    expected = sum(sum(w * v for w, v in zip(worth, values, strict=True)) for values in each) / 2
    assert float(got.detach()) == pytest.approx(expected, rel=FP32_DEEP)
    assert metric.spread == pytest.approx(sum(w * s for w, s in zip(worth, spreads, strict=True)), rel=FP32_DEEP)
    got.backward()
    assert padded.grad is not None
    assert bool(padded.grad.isfinite().all())
    assert bool((padded.grad[:, ~place.mask] == 0).all())
    mean = place.tokenize(zoo.weights).tokens.mean(0).expand(5, -1, -1)
    assert float(metric.loss(mean, place.tokenize(zoo.weights).tokens)) == pytest.approx(metric.spread, rel=FP32_DEEP)


def test_coordinates_are_principal_and_of_unit_variance(zoo: Population, images: Tensor) -> None:
    place = TokenLayout(ARCH)
    metric = ActivationMetric(zoo, images, place)
    coordinates = metric.coordinates(zoo)
    tokens = place.tokenize(zoo.weights).tokens
    seen = coordinates(tokens)
    torch.testing.assert_close(torch.where(place.mask, coordinates.inverse(seen), 0), tokens, rtol=FP32_DEEP, atol=FP32)
    assert bool((seen[:, ~place.mask] == 0).all())
    stored = ActivationMetric(zoo, images, place, views=False).coordinates(zoo)
    for rows, n in zip(metric.groups.split(stored(tokens)), metric.groups.sizes, strict=True):
        flat = rows.flatten(0, 1).double()
        if len(flat) > n:  # else the zoo does not fill the space
            torch.testing.assert_close(flat.mT @ flat / len(flat), torch.eye(n, dtype=torch.float64), rtol=0, atol=FP32_DEEP)
    # the metric is diagonal in them: each coordinate's part of the loss is its square times a variance
    difference = metric.groups.split(seen[:1] - seen[1:2])
    alone = layer_values(zoo, images, zoo.weights[0] - zoo.weights[1])
    for layer, (rows, back) in enumerate(zip(difference, coordinates.inverse_map.double(), strict=True)):
        n = rows.shape[-1]
        moment = input_second_moments(zoo.weights, images, ARCH)[layer]
        damped = moment + DAMPING * moment.diagonal().mean() * torch.eye(n, dtype=torch.float64)
        variances = back[:n, :n] @ damped @ back[:n, :n].mT
        torch.testing.assert_close(variances, variances.diagonal().diag(), rtol=0, atol=FP32_DEEP * float(variances.max()))
        assert float((rows.double().square() @ variances.diagonal()).sum()) == pytest.approx(alone[layer], rel=FP32_DEEP)


@pytest.mark.parametrize("token_size", [0, 7], ids=["whole rows", "cut rows"])
def test_a_linear_start_in_coordinates_is_the_code(zoo: Population, images: Tensor, token_size: int) -> None:
    codec = LinearCodec(zoo, latent=0.5, metric="activation", queries=images, views=False, token_size=token_size)
    coordinates = ActivationMetric(zoo, images, codec.layout).coordinates(zoo)  # centred elsewhere than the code
    model = Autoencoder(codec.layout, d_model=16, heads=2, layers=1, start="linear", codec=codec, coordinates=coordinates).eval()
    tokens = codec.layout.tokenize(zoo.weights).tokens
    with torch.no_grad():
        z = model.encode(tokens)
        torch.testing.assert_close(z, codec.encode(zoo.weights), rtol=FP32_DEEP, atol=10 * FP32)
        torch.testing.assert_close(codec.layout.detokenize(model.decode(z)), codec.reconstruct(zoo.weights), rtol=FP32_DEEP, atol=10 * FP32)


@pytest.mark.parametrize("start", STARTS)
def test_a_model_in_coordinates_is_rebuilt_from_its_state(zoo: Population, images: Tensor, start: str) -> None:
    codec = None if start == "random" else LinearCodec(zoo, latent=0.5)
    coordinates = ActivationMetric(zoo, images, TokenLayout(ARCH)).coordinates(zoo)
    model = Autoencoder(TokenLayout(ARCH), d_model=16, heads=2, layers=1, start=start, codec=codec, coordinates=coordinates).eval()
    again = Autoencoder.from_config(TokenLayout(ARCH), model.config())
    again.load_state_dict(model.state_dict())
    tokens = model.layout.tokenize(zoo.weights).tokens
    with torch.no_grad():
        for a, b in zip(model(tokens), again.eval()(tokens), strict=True):
            assert torch.equal(a, b)
        by_hand = Autoencoder.from_config(TokenLayout(ARCH), {k: v for k, v in model.config().items() if k != "coordinates"})
        plain = {name: value for name, value in model.state_dict().items() if not name.startswith("coordinates.")}
        by_hand.load_state_dict(plain)
        if start != "linear":  # the same maps between the coordinates
            seen = torch.where(model.mask, coordinates(tokens), 0)
            inner = by_hand.eval().decode(by_hand.encode(seen), keep_padding=True)
            expected = torch.where(model.mask, coordinates.inverse(inner), 0)
            torch.testing.assert_close(model(tokens)[1], expected, rtol=FP32_DEEP, atol=FP32)


def test_the_zoo_s_mean_costs_one_in_training(zoo: Population, images: Tensor, tmp_path: Path) -> None:
    changes = {"structure_metric": "activation", "structure_unit": "layer", "beta": 1.0, "gamma": 0.0, "views": False, "batch_size": 5}
    trainer = Trainer(config(tmp_path, **changes), zoo, torch.cat([images, images]))
    tokens = trainer.layout.tokenize(zoo.weights).tokens
    _, parts = trainer.losses(torch.arange(5), torch.arange(8))
    with torch.no_grad():
        rebuilt = trainer.model.decode(trainer.model.encode(tokens))
    assert trainer.responses is not None
    expected = float(trainer.responses.loss(rebuilt, tokens)) / trainer.responses.spread
    assert float(parts["structural"]) == pytest.approx(expected, rel=FP32_DEEP)
    mean = trainer.responses.loss(tokens.mean(0).expand_as(tokens), tokens)
    assert float(mean) / trainer.normalizers.structural == pytest.approx(1.0, rel=FP32_DEEP)


def test_what_does_not_fit_is_one_line(zoo: Population, images: Tensor, tmp_path: Path) -> None:
    with pytest.raises(WslfastError, match="unit: expected one of"):
        ActivationMetric(zoo, images, TokenLayout(ARCH), unit="model")

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (2 if float(x.sum()) > 0 else 1)  # looks at numbers

    opaque = Architecture.from_module(Doubled(4, 2), (4,))
    few = Population(opaque, torch.zeros(2, opaque.num_weights))
    with pytest.raises(WslfastError, match=r"structure_metric, coordinates.*cannot be traced"):
        ActivationMetric(few, torch.zeros(2, 4), TokenLayout(opaque))
    with pytest.raises(WslfastError, match="structure_unit: outputs"):
        TrainConfig(zoo="z", out="o", structure_unit="outputs")
    with pytest.raises(WslfastError, match="coordinates: expected one of"):
        TrainConfig(zoo="z", out="o", coordinates="whitened")
