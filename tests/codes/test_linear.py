"""The linear code: scikit-learn's PCA, brute-force permutation averages, and algebra."""

from __future__ import annotations

import io
import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import FP32, FP32_AMPLIFIED, FP32_DEEP, FP32_ROUNDING
from torch import nn

from wslfast.architecture import Architecture
from wslfast.codes.layer_inputs import good_models, input_second_moments, output_sensitivity, root, symmetrise
from wslfast.codes.linear import LinearCodec, equal_widths, water_filling
from wslfast.codes.token_groups import TokenGroups
from wslfast.errors import WslfastError
from wslfast.kernels.layers import Activation, Conv2d, Flatten, Linear, Pool2d
from wslfast.permutation import permute, random_views
from wslfast.population import Population
from wslfast.queries import QueryPool
from wslfast.tokens import TokenLayout, layout


def tiny(bias: bool = True, groups: int = 1) -> Architecture:
    """Two convolutions, a pool, a flatten and two linear layers, with 3, 4 and 5 hidden channels."""
    return Architecture.from_layers(
        [
            Conv2d("a", 2, 4, (3, 2), padding=(1, 0), bias=bias),
            Activation("r", "relu"),
            Pool2d("p"),
            Conv2d("b", 4, 4 if groups > 1 else 3, (2, 2), groups=groups),
            Activation("s", "tanh"),
            Flatten("f"),
            Linear("c", 6 * (4 if groups > 1 else 3), 5),
            Activation("t", "relu"),
            Linear("d", 5, 3, bias=bias),
        ],
        (2, 8, 7),
        "tiny",
    )


def zoo(architecture: Architecture, k: int = 12, seed: int = 0, **properties: Any) -> Population:
    generator = torch.Generator().manual_seed(seed)
    scale = 0.2 + torch.rand(architecture.num_weights, generator=generator)
    return Population(architecture, torch.randn(k, architecture.num_weights, generator=generator) * scale + 0.1, properties)


def images(architecture: Architecture, n: int = 9) -> torch.Tensor:
    return torch.randn(n, *architecture.input_shape, generator=torch.Generator().manual_seed(5)) + 0.3


@pytest.mark.parametrize("token_size", [0, 5, 16])
def test_groups_hold_every_token_once_with_its_real_columns(token_size: int) -> None:
    place = TokenLayout(tiny(), token_size)
    groups = TokenGroups(place)
    for g in range(len(groups)):
        members = (groups.of_token == g).nonzero().flatten()
        assert len(members) == groups.members[g]
        assert (place.positions[members, 1] == groups.layer[g]).all()
        assert all(torch.equal(place.mask[i].nonzero().flatten(), torch.arange(groups.sizes[g])) for i in members)
    assert sum(n * m for n, m in zip(groups.sizes, groups.members, strict=True)) == place.architecture.num_weights
    tokens, matrices = torch.randn(3, place.num_tokens, place.token_size), torch.randn(len(groups), place.token_size, 4)
    loop = torch.stack([tokens[:, i] @ matrices[g] for i, g in enumerate(groups.of_token)], 1)
    torch.testing.assert_close(groups.linear(tokens, matrices), loop)
    for g, part in enumerate(groups.split(tokens)):
        assert torch.equal(part, tokens[:, groups.of_token == g, : groups.sizes[g]])
    weights = torch.randn(2, place.architecture.num_weights)
    uncut = TokenLayout(tiny())
    whole = TokenGroups(uncut).split(uncut.tokenize(weights).tokens)
    for a, b in zip(groups.rows(place.tokenize(weights).tokens), whole, strict=True):
        assert torch.equal(a, b)


def test_plain_code_is_pca() -> None:
    decomposition = pytest.importorskip("sklearn.decomposition")
    population = zoo(tiny())
    codec = LinearCodec(population, latent=0.5, views=False)
    place, weights = codec.layout, population.weights
    tokens, rebuilt = place.tokenize(weights).tokens, place.tokenize(codec.reconstruct(weights)).tokens
    for g, (size, width) in enumerate(zip(codec.groups.sizes, codec.widths, strict=True)):
        rows = codec.groups.split(tokens)[g][..., :size].flatten(0, 1).double().numpy()
        pca = decomposition.PCA(svd_solver="full").fit(rows)
        kept = pca.components_[:width]
        expected = (rows - pca.mean_) @ kept.T @ kept + pca.mean_
        np.testing.assert_allclose(codec.groups.split(rebuilt)[g][..., :size].flatten(0, 1), expected, atol=2 * FP32)
        latents = codec.groups.split(codec.encode(weights))[g][..., :width].flatten(0, 1)
        np.testing.assert_allclose(latents.mean(0), 0, atol=FP32)
        np.testing.assert_allclose(latents.var(0, unbiased=False), 1, rtol=FP32_DEEP)


@pytest.mark.parametrize("metric", ["plain", "activation"])
@pytest.mark.parametrize("token_size", [0, 7], ids=["whole rows", "cut rows"])
@pytest.mark.parametrize("bias", [True, False])
def test_full_width_is_the_identity(metric: str, token_size: int, bias: bool) -> None:
    arch = tiny(bias)
    codec = LinearCodec(zoo(arch), latent=1.0, metric=metric, queries=images(arch), token_size=token_size)
    assert codec.latent_size == arch.num_weights
    assert codec.widths == codec.groups.sizes
    unseen = zoo(arch, 5, seed=1).weights
    torch.testing.assert_close(codec.reconstruct(unseen), unseen, rtol=FP32_DEEP, atol=FP32_DEEP)


@pytest.mark.parametrize("token_size", [0, 7], ids=["whole rows", "cut rows"])
def test_views_are_every_permutation_of_the_training_models(token_size: int) -> None:
    arch = tiny()
    weights = zoo(arch, 2).weights
    closed = LinearCodec(Population(arch, weights), latent=1.0, token_size=token_size)
    for layer, channels in enumerate((4, 3, 5)):  # layer by layer: permuting a layer's outputs only reorders its rows
        views = []
        for order in itertools.permutations(range(channels)):
            permutations = [torch.arange(c).expand(2, c) for c in (4, 3, 5)]
            permutations[layer] = torch.tensor(order).expand(2, channels)
            views.append(permute(weights, arch, tuple(permutations)))
        stored = LinearCodec(Population(arch, torch.cat(views)), latent=1.0, views=False, token_size=token_size)
        for g in (g for g, at in enumerate(closed.groups.layer) if at == layer + 1):
            torch.testing.assert_close(closed.center[g], stored.center[g], rtol=FP32_DEEP, atol=FP32)
            torch.testing.assert_close(closed.scale[g], stored.scale[g], rtol=FP32_DEEP, atol=FP32)
            covariance = [c.decoder[g].T @ c.decoder[g] for c in (closed, stored)]  # at full width and unit variance
            torch.testing.assert_close(covariance[0], covariance[1], rtol=FP32_AMPLIFIED, atol=FP32_DEEP)


def test_full_width_is_the_identity_with_fewer_models_than_directions() -> None:
    arch = tiny()
    codec = LinearCodec(zoo(arch, 1), latent=1.0)
    unseen = zoo(arch, 3, seed=1).weights
    torch.testing.assert_close(codec.reconstruct(unseen), unseen, rtol=FP32_AMPLIFIED, atol=FP32_AMPLIFIED)


def test_batch_norm_networks() -> None:
    arch = Architecture.from_module(
        nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)), (1, 6, 6)
    )
    assert not arch.planned
    population = zoo(arch)
    codec = LinearCodec(population, latent=0.6)
    assert codec.latent_size <= 0.6 * arch.num_weights + 1
    assert codec.reconstruct(population.weights).shape == population.weights.shape
    with pytest.raises(WslfastError, match="use metric='plain'"):
        LinearCodec(population, metric="activation", queries=images(arch))
    for known in (None, arch):  # the file says which network it is for
        again = LinearCodec.from_state(known, codec.state())
        assert torch.equal(again.encode(population.weights), codec.encode(population.weights))


def _loop_moments(architecture: Architecture, weights: torch.Tensor, queries: torch.Tensor) -> list[np.ndarray]:
    """Second moments of layer inputs, model by model and position by position, in float64."""
    sums: list[np.ndarray] = []
    for row in weights.double():
        x, at, index = queries.double(), 0, 0
        for layer in architecture.layers:
            if isinstance(layer, (Conv2d, Linear)):
                size = int(np.prod(layer.weight_shape))
                weight, at = row[at : at + size].view(layer.weight_shape), at + size
                bias = None
                if layer.bias:
                    bias, at = row[at : at + layer.weight_shape[0]], at + layer.weight_shape[0]
            if isinstance(layer, Conv2d):
                padded = F.pad(x, (layer.padding[1],) * 2 + (layer.padding[0],) * 2)
                kh, kw = layer.kernel_size
                seen = [
                    image[:, i : i + kh, j : j + kw].reshape(-1)
                    for image in padded
                    for i in range(padded.shape[2] - kh + 1)
                    for j in range(padded.shape[3] - kw + 1)
                ]
                x = F.conv2d(x, weight, bias, padding=layer.padding)
            elif isinstance(layer, Linear):
                seen = list(x)
                x = F.linear(x, weight, bias)
            elif isinstance(layer, Pool2d):
                x = F.max_pool2d(x, 2)
            elif isinstance(layer, Flatten):
                x = x.flatten(1)
            else:
                x = getattr(torch, layer.function)(x)  # type: ignore[union-attr]
            if isinstance(layer, (Conv2d, Linear)):
                rows = np.stack([np.append(s.numpy(), 1.0) if layer.bias else s.numpy() for s in seen])
                moment = rows.T @ rows / len(rows) / len(weights)
                if len(sums) == index:
                    sums.append(np.zeros_like(moment))
                sums[index] += moment
                index += 1
    return sums


@pytest.mark.parametrize("bias", [True, False])
def test_second_moments_are_averages_over_all_permutations(bias: bool) -> None:
    arch = tiny(bias)
    weights, queries = zoo(arch, 2).weights, images(arch, 5)
    # every permutation of every hidden layer, its function unchanged: 4! * 3! * 5! views, layer by layer as they are independent
    for layer, channels in enumerate((4, 3, 5)):
        views = []
        for order in itertools.permutations(range(channels)):
            permutations = [torch.arange(c).expand(2, c) for c in (4, 3, 5)]
            permutations[layer] = torch.tensor(order).expand(2, channels)
            views.append(permute(weights, arch, tuple(permutations)))
        expected = _loop_moments(arch, torch.cat(views), queries)[layer + 1]
        got = input_second_moments(weights, queries, arch, chunk=2)[layer + 1]
        np.testing.assert_allclose(got, expected, rtol=FP32_DEEP, atol=FP32_ROUNDING)
    first = input_second_moments(weights, queries, arch)[0]  # image channels stay as they are
    np.testing.assert_allclose(first, _loop_moments(arch, weights[:1], queries)[0], rtol=FP32_DEEP, atol=FP32_ROUNDING)


def test_moments_are_the_same_for_every_view_and_leave_bad_models_out() -> None:
    arch = tiny()
    weights, queries = zoo(arch, 4).weights, images(arch)
    plain = input_second_moments(weights, queries, arch)
    views = input_second_moments(random_views(weights, arch, torch.Generator().manual_seed(0)), queries, arch)
    bad = input_second_moments(torch.cat([weights, torch.full_like(weights[:1], 1e30)]), queries, arch)
    for a, b, c in zip(plain, views, bad, strict=True):
        torch.testing.assert_close(a, b, rtol=FP32_DEEP, atol=FP32)
        assert torch.equal(a, c)
    with pytest.raises(WslfastError, match="finite activations"):
        input_second_moments(torch.full_like(weights, 1e30), queries, arch)


def test_symmetrise_one_channel_and_grouped_convolutions() -> None:
    x = torch.randn(9, 4, dtype=torch.float64)
    moment = x.T @ x
    torch.testing.assert_close(symmetrise(moment, 1, 1), moment)
    arch = tiny(groups=2)
    moments = input_second_moments(zoo(arch, 2).weights, images(arch), arch)
    assert [len(m) for m in moments] == [13, 9, 25, 6]
    LinearCodec(zoo(arch), metric="activation", queries=images(arch))


def test_metric_measures_layer_outputs() -> None:
    """||e C^(1/2)||^2 is the mean squared output of a layer with weights e; the root and its inverse undo each other."""
    arch = Architecture.mlp(i_dim=6, h_dim=[4], o_dim=3, dropout=0)
    weights, queries = zoo(arch, 1).weights, torch.randn(50, 6)
    moment = input_second_moments(weights, queries, arch)[0]
    half, inverse = root(moment, 1e-9)
    error = torch.randn(3, 7, dtype=torch.float64)
    outputs = queries.double() @ error[:, :6].T + error[:, 6]
    torch.testing.assert_close((error @ half).square().sum(1), outputs.square().mean(0), rtol=FP32, atol=FP32_ROUNDING)
    torch.testing.assert_close(half @ inverse, torch.eye(7, dtype=torch.float64))


def test_metric_code_keeps_layer_outputs_better_than_the_plain_one() -> None:
    arch = Architecture.mlp(i_dim=12, h_dim=[6], o_dim=4, dropout=0)
    queries = torch.randn(200, 12) * torch.linspace(0.02, 3, 12)  # some inputs hardly ever move
    population = zoo(arch, 60)
    codecs = [LinearCodec(population, latent=0.5, metric=m, queries=queries) for m in ("plain", "activation")]
    held_out = zoo(arch, 20, seed=0).weights
    first = arch.parameters[0]

    def error(codec: LinearCodec) -> float:
        difference = (codec.reconstruct(held_out) - held_out)[:, first.offset : first.stop].unflatten(1, first.shape)
        return float((queries @ difference.transpose(1, 2)).square().mean())

    assert error(codecs[1]) < 0.6 * error(codecs[0])
    assert codecs[0].latent_size == pytest.approx(codecs[1].latent_size, abs=6)


def test_sensitivity_of_a_network_that_is_linear() -> None:
    """Two linear maps without activation: what an error of the first does to the outputs is known in closed form."""
    arch = Architecture.from_layers([Linear("a", 5, 8), Linear("b", 8, 4)], (5,), "linear")
    weights, queries = zoo(arch, 40, seed=3).weights * 0.4, torch.randn(128, 5)
    groups = TokenGroups(layout(arch))
    roots = [root(c, 1e-6) for c in input_second_moments(weights, queries, arch)]
    got = output_sensitivity(weights, queries, groups, roots, seed=0, noise=0.01)
    ratios = []
    for row in weights.double():
        second = row[48:80].view(4, 8)
        outputs = F.linear(F.linear(queries.double(), row[:40].view(8, 5), row[40:48]), second, row[80:])
        # an error of the first layer's outputs, alike in all 8 channels, passes through the second's weights
        ratios.append(second.square().sum() / 8 / outputs.var(0, unbiased=False).sum())
    assert got[0] == pytest.approx(float(torch.stack(ratios).median()), rel=0.4)
    dead = torch.cat([torch.zeros(3, 48), weights[:3, 48:]], 1)  # constant outputs: nothing to measure, nothing infinite
    assert output_sensitivity(dead, queries, groups, roots, seed=0)[0] > 0


def test_models_of_the_metric() -> None:
    arch = tiny()
    accuracy = [0.1 * j if j != 7 else None for j in range(10)]
    picked = good_models(zoo(arch, 10, test_acc=accuracy), 3, seed=0)
    assert len(picked) == 3
    assert set(picked.tolist()) <= {4, 5, 6, 8, 9}
    assert good_models(zoo(arch, 10, epoch=list(range(10))), 4, seed=0).tolist() == [0, 3, 6, 9]
    assert good_models(zoo(arch, 3), 24, seed=0).tolist() == [0, 1, 2]


def test_rounding_chooses_no_component() -> None:
    """Two groups with a direction in which nothing varies, whose variance is whatever rounding leaves: every machine chooses alike."""
    for noise in ((0.0, 0.0), (1e-18, 3e-18), (3e-18, 1e-18)):
        variances = [torch.tensor([0.5, noise[0]], dtype=torch.float64), torch.tensor([0.7, noise[1]], dtype=torch.float64)]
        assert water_filling(variances, (4, 3), 11) == (2, 1)


@settings(max_examples=60)
@given(data=st.data())
def test_water_filling(data: st.DataObject) -> None:
    groups = data.draw(st.integers(1, 5))
    variances = [
        torch.tensor(data.draw(st.lists(st.floats(0, 10, width=32), min_size=1, max_size=6))).sort(descending=True).values
        for _ in range(groups)
    ]
    costs = tuple(data.draw(st.lists(st.integers(1, 20), min_size=groups, max_size=groups)))
    most = sum(c * len(v) for c, v in zip(costs, variances, strict=True))
    before = 0
    for budget in range(most + 2):
        widths = water_filling(variances, costs, budget)
        used = sum(c * w for c, w in zip(costs, widths, strict=True))
        assert before <= used <= budget  # never over, and a larger budget never buys less
        assert all(c > budget - used for c, w, v in zip(costs, widths, variances, strict=True) if w < len(v))  # nothing more fits
        before = used
    assert before == most
    if len(set(costs)) == 1:  # equal costs: exactly the components of most variance
        budget = costs[0] * data.draw(st.integers(0, most // costs[0]))
        widths = water_filling(variances, costs, budget)
        kept = sum(float(v[:w].sum()) for v, w in zip(variances, widths, strict=True))
        best = torch.cat(variances).sort(descending=True).values[: budget // costs[0]]
        assert kept == pytest.approx(float(best.sum()), rel=FP32)


def test_equal_widths_and_budgets() -> None:
    flat = [torch.ones(3), torch.ones(10)]
    assert equal_widths(flat, (2, 5), 6 + 25) == (3, 5)
    assert equal_widths(flat, (2, 5), 6 + 24) == (3, 4)
    assert equal_widths(flat, (2, 5), 6) == (0, 0)
    arch = Architecture.cnn()
    population = zoo(arch, 3)
    assert LinearCodec(population, latent=1350, widths="equal").widths == (26, 32, 25, 32, 21)
    for share in (0.3, 0.55):
        size = LinearCodec(population, latent=share).latent_size
        assert share * arch.num_weights - max(8, 20) < size <= share * arch.num_weights + 0.5
    capped = LinearCodec(population, latent=0.9, max_width=12)
    assert max(capped.widths) == 12
    assert capped.mask.shape == (48, 12)


@pytest.mark.parametrize("token_size", [0, 9])
def test_state_round_trip(token_size: int) -> None:
    arch = tiny()
    population = zoo(arch)
    pool = QueryPool(images(arch))
    codec = LinearCodec(population, metric="activation", queries=pool, token_size=token_size)
    file = io.BytesIO()
    torch.save(codec.state(), file)
    file.seek(0)
    again = LinearCodec.from_state(None, torch.load(file, weights_only=True))
    assert again.widths == codec.widths
    assert repr(again) == repr(codec)
    latents = codec.encode(population.weights)
    assert torch.equal(again.encode(population.weights), latents)
    assert torch.equal(again.to("cpu").decode(latents), codec.decode(latents))
    assert not latents[:, ~codec.mask].any()
    assert torch.equal(codec.decode(torch.where(codec.mask, latents, float("nan"))), codec.decode(latents))
    broken = codec.state()
    broken["encoder"] = broken["encoder"][:, :-1]
    for state in (broken, {}, {**codec.state(), "widths": [1]}):
        with pytest.raises(WslfastError, match="state"):
            LinearCodec.from_state(arch, state)


def test_differentiable_and_deterministic() -> None:
    arch = tiny()
    population = zoo(arch)
    codec = LinearCodec(population, metric="activation", queries=images(arch))
    assert all(
        torch.equal(a, b)
        for a, b in zip(_tensors(codec), _tensors(LinearCodec(population, metric="activation", queries=images(arch))), strict=True)
    )
    weights = zoo(arch, 2, seed=2).weights.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda w: codec.reconstruct(w)[:, ::17], (weights,))
    alone = codec.reconstruct(population.weights[:1])
    torch.testing.assert_close(alone, codec.reconstruct(population.weights)[:1], rtol=FP32_ROUNDING, atol=FP32_ROUNDING)


def _tensors(codec: LinearCodec) -> list[torch.Tensor]:
    return [value for value in codec.state().values() if isinstance(value, torch.Tensor)]


def test_what_is_refused() -> None:
    arch = tiny()
    population = zoo(arch)
    for arguments, message in [
        ({"latent": 0.0}, "latent"),
        ({"latent": 1.5}, "latent"),
        ({"latent": 10**6}, "latent"),
        ({"latent": True}, "latent"),
        ({"latent": 1}, "buy no component"),
        ({"metric": "fisher"}, "metric"),
        ({"widths": "wide"}, "widths"),
        ({"max_width": 0}, "max_width"),
        ({"damping": 0.0}, "damping"),
        ({"metric": "activation"}, "queries"),
        ({"metric": "activation", "queries": [1]}, "queries"),
        ({"metric": "activation", "queries": torch.zeros(3, 1, 8, 8)}, "queries"),
        ({"token_size": -1}, "token_size"),
    ]:
        with pytest.raises(WslfastError, match=message):
            LinearCodec(population, **arguments)
    weights = population.weights.clone()
    weights[3, 4] = float("nan")
    with pytest.raises(WslfastError, match=r"models \[3\]"):
        LinearCodec(Population(arch, weights))
    codec = LinearCodec(population)
    with pytest.raises(WslfastError, match="latents"):
        codec.decode(torch.zeros(2, 3, 4))
    with pytest.raises(WslfastError, match="weights"):
        codec.encode(torch.zeros(2, 3))
    assert codec.layout is layout(arch, 0)
