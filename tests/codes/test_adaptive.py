"""The adaptive code against a float64 loop that knows nothing of batches, groups or roots, and against its own algebra."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from tolerances import FP32, FP32_AMPLIFIED, FP32_DEEP
from torch.nn import functional as F

from wslfast import Architecture, Autoencoder, LinearCodec, Population, TokenLayout, WslfastError, batched_forward
from wslfast.codes.adaptive import AdaptiveCodec
from wslfast.codes.linear import row_moments
from wslfast.kernels.layers import Activation, Conv2d, Flatten, Linear, Pool2d
from wslfast.permutation import permute, random_permutations

# leaky by a third: two dead units would tie, and which of them is kept, to no effect, would be left to rounding
LAYERS = (
    Conv2d("a", 1, 3, (3, 3)), Pool2d("p"), Activation("r", "leakyrelu", 0.3), Conv2d("b", 3, 4, (2, 2)),
    Activation("s", "leakyrelu", 0.3), Flatten("f"), Linear("c", 36, 5), Activation("t", "leakyrelu", 0.3), Linear("d", 5, 3),
)  # fmt: skip
ARCH = Architecture.from_layers(LAYERS, (1, 10, 10), "small")
DAMPING = 1e-3


def models(k: int, seed: int = 0) -> Population:
    return Population(ARCH, ARCH.initial_weights(["kaiming_uniform"] * k, [seed * 100 + j for j in range(k)]))


def images(n: int, seed: int = 1) -> torch.Tensor:
    coarse = torch.randn(n, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, (10, 10), mode="bilinear")  # smooth, so that some directions matter more than others


def fitted(**changes: object) -> AdaptiveCodec:
    return AdaptiveCodec(models(40), **{"queries": images(48), "latent": 0.4, "models": 8, **changes})  # type: ignore[arg-type]


def _by_hand(codec: AdaptiveCodec, row: torch.Tensor, queries: torch.Tensor, compensate: bool) -> np.ndarray:
    """One model, one layer after another, in float64: weighted least squares onto the leading directions."""
    groups = codec.groups
    means, covariances = row_moments(models(40).weights, groups, True)
    true = seen = queries.double()
    rebuilt: list[torch.Tensor] = []
    offset, index = 0, 0
    for layer in LAYERS:
        if isinstance(layer, (Conv2d, Linear)):
            out = layer.weight_shape[0]
            size = int(np.prod(layer.weight_shape))
            weight, bias = row[offset : offset + size].double().view(out, -1), row[offset + size : offset + size + out].double()
            offset += size + out
            rows = torch.cat([weight, bias[:, None]], 1).numpy()

            def columns(x: torch.Tensor, layer: Conv2d | Linear = layer) -> np.ndarray:
                flat = x if isinstance(layer, Linear) else F.unfold(x, layer.kernel_size).transpose(1, 2).flatten(0, 1)
                return np.concatenate([flat.numpy(), np.ones((len(flat), 1))], 1)

            x, y = columns(seen), columns(true)
            moment, cross = x.T @ x / len(x), y.T @ x / len(x)
            damped = moment + DAMPING * np.trace(moment) / len(moment) * np.eye(len(moment))
            wanted = rows
            if compensate and index:
                wanted = rows @ (cross + damped - moment) @ np.linalg.inv(damped)
            factor = np.linalg.cholesky(damped)  # not the symmetric root: the best subspace does not depend on which root is taken
            values, vectors = np.linalg.eigh(factor.T @ covariances[index].numpy() @ factor)
            basis = vectors[:, np.argsort(values)[::-1][: codec.widths[index]]]
            mean = means[index].numpy()
            coded = (wanted - mean) @ factor @ basis @ basis.T @ np.linalg.inv(factor) + mean
            rebuilt += [torch.from_numpy(coded[:, :-1].reshape(-1)), torch.from_numpy(coded[:, -1])]
            w, b = torch.from_numpy(coded[:, :-1].copy()).view(layer.weight_shape), torch.from_numpy(coded[:, -1].copy())
            run = F.conv2d if isinstance(layer, Conv2d) else F.linear
            seen, true, index = run(seen, w, b), run(true, weight.view(layer.weight_shape), bias), index + 1
        else:
            both = []
            for x in (seen, true):
                both.append(
                    F.max_pool2d(x, 2)
                    if isinstance(layer, Pool2d)
                    else x.flatten(1)
                    if isinstance(layer, Flatten)
                    else F.leaky_relu(x, 0.3)
                )
            seen, true = both
    return torch.cat(rebuilt).numpy()


@pytest.mark.parametrize("compensate", [True, False])
def test_it_is_the_closed_form_written_out(compensate: bool) -> None:
    codec = fitted(compensate=compensate)
    held_out = models(3, seed=7).weights
    rebuilt = codec.reconstruct(held_out).numpy()
    for row, ours in zip(held_out, rebuilt, strict=True):
        np.testing.assert_allclose(ours, _by_hand(codec, row, images(48), compensate), rtol=2 * FP32_AMPLIFIED, atol=2 * FP32_DEEP)


def test_all_of_the_latent_is_all_of_the_model() -> None:
    codec = fitted(latent=1.0)
    weights = models(3, seed=7).weights
    assert codec.latent_size == ARCH.num_weights
    torch.testing.assert_close(codec.reconstruct(weights), weights, rtol=FP32_AMPLIFIED, atol=FP32_DEEP)


def test_the_latent_alone_tells_the_decoder() -> None:
    codec = fitted()
    weights = models(5, seed=7).weights
    latents = codec.encode(weights)
    assert latents.shape == (5, *codec.mask.shape)
    assert not latents[:, ~codec.mask].any()
    assert codec.latent_size == codec.mask.sum() <= 0.4 * ARCH.num_weights
    torch.testing.assert_close(codec.decode(latents), codec.reconstruct(weights), rtol=FP32_DEEP, atol=FP32)
    torch.testing.assert_close(codec.decode(latents[3:4]), codec.reconstruct(weights)[3:4], rtol=FP32_DEEP, atol=FP32)
    junk = torch.where(codec.mask, latents, 1e3)
    torch.testing.assert_close(codec.decode(junk), codec.decode(latents), rtol=FP32_DEEP, atol=FP32)


def test_a_view_is_rebuilt_as_the_view_of_the_rebuilt() -> None:
    codec = fitted()
    weights = models(4, seed=7).weights
    permutations = random_permutations(ARCH, 4, torch.Generator().manual_seed(3))
    got, expected = codec.reconstruct(permute(weights, ARCH, permutations)), permute(codec.reconstruct(weights), ARCH, permutations)
    torch.testing.assert_close(got, expected, rtol=2 * FP32_AMPLIFIED, atol=2 * FP32_DEEP)


def test_after_the_number_of_threads_was_set() -> None:
    """MKL's LU of a batch of wide matrices fails then, in a process of its own choosing: the code does without."""
    torch.set_num_threads(max(2, torch.get_num_threads()))
    arch = Architecture.cnn()
    population = Population(arch, arch.initial_weights(["kaiming_uniform"] * 24, range(24)))
    codec = AdaptiveCodec(population, queries=torch.randn(32, 1, 28, 28), latent=0.5, models=4)
    assert codec.reconstruct(population.weights).isfinite().all()


def test_latents_are_steady() -> None:
    """Signs and near-ties of eigenvectors do not show: a model that hardly differs has hardly another latent."""
    codec = fitted()
    weights = models(6, seed=7).weights
    noise = 1e-5 * torch.randn(weights.shape, generator=torch.Generator().manual_seed(5))
    change = (codec.encode(weights + noise) - codec.encode(weights)).norm(dim=(1, 2)) / codec.encode(weights).norm(dim=(1, 2))
    assert change.median() < 1e-3


def test_it_behaves_better_than_the_average_metric_at_the_same_size() -> None:
    train, held_out, unseen = models(40), models(12, seed=7).weights, images(64, seed=9)
    outputs = batched_forward(held_out, unseen, ARCH)
    errors = {}
    for share in (0.3, 0.5):
        average = LinearCodec(train, latent=share, metric="activation", queries=images(48), models=8)
        ours, bare = fitted(latent=share), fitted(latent=share, compensate=False)
        for name, code in (("average", average), ("adaptive", ours), ("bare", bare)):
            assert code.latent_size <= share * ARCH.num_weights + 1
            errors[name] = (batched_forward(code.reconstruct(held_out), unseen, ARCH) - outputs).square().sum((1, 2)).median()
        assert max(errors["adaptive"], errors["bare"]) < 0.7 * errors["average"], (share, errors)


def test_cut_rows_and_missing_biases() -> None:
    weights = models(4, seed=7).weights
    cut = fitted(token_size=9, latent=1.0)
    assert cut.layout.token_size == 9
    torch.testing.assert_close(cut.reconstruct(weights), weights, rtol=FP32_AMPLIFIED, atol=FP32_DEEP)
    assert torch.equal(fitted(token_size=9).layout.mask, TokenLayout(ARCH, 9).mask)
    bare = Architecture.mlp(6, (5,), 3, activation="tanh", dropout=0.0, use_bias=False)
    some = Population(bare, torch.randn(20, bare.num_weights, generator=torch.Generator().manual_seed(0)))
    codec = AdaptiveCodec(some, queries=torch.randn(30, 6), latent=1.0, models=4)
    torch.testing.assert_close(codec.reconstruct(some.weights[:3]), some.weights[:3], rtol=FP32_AMPLIFIED, atol=FP32_DEEP)


def test_layers_before_the_first_weights_run_on_the_queries() -> None:
    arch = Architecture.from_layers(
        (Pool2d("p"), Flatten("f"), Linear("a", 25, 4), Activation("r", "tanh"), Linear("b", 4, 3)), (1, 10, 10)
    )
    same = Architecture.from_layers((Linear("a", 25, 4), Activation("r", "tanh"), Linear("b", 4, 3)), (25,))
    weights = torch.randn(20, arch.num_weights, generator=torch.Generator().manual_seed(0))
    ahead, after = images(30), F.max_pool2d(images(30), 2).flatten(1)
    codes = [AdaptiveCodec(Population(a, weights), queries=q, latent=0.5, models=4) for a, q in ((arch, ahead), (same, after))]
    torch.testing.assert_close(codes[0].reconstruct(weights[:3]), codes[1].reconstruct(weights[:3]), rtol=FP32_DEEP, atol=FP32)


def test_broken_models_touch_nobody_else() -> None:
    codec = fitted()
    weights = models(5, seed=7).weights.clone()
    expected = codec.reconstruct(weights)
    weights[1, 17], weights[3] = float("nan"), 1e30  # not a number; and finite, but its activations overflow
    rebuilt = codec.reconstruct(weights)
    for row in (0, 2, 4):
        torch.testing.assert_close(rebuilt[row], expected[row], rtol=FP32_DEEP, atol=FP32)
    assert rebuilt[1].isnan().all()
    assert rebuilt[3].isnan().all()
    assert codec.encode(weights)[1].isnan().all()


def test_a_state_is_plain_and_rebuilds_the_code() -> None:
    codec = fitted()
    file = io.BytesIO()
    torch.save(codec.state(), file)
    file.seek(0)
    again = AdaptiveCodec.from_state(None, torch.load(file, weights_only=True))
    weights = models(2, seed=7).weights
    assert torch.equal(again.reconstruct(weights), codec.reconstruct(weights))
    assert again.widths == codec.widths
    assert "AdaptiveCodec" in repr(again)
    moved = codec.to("cpu")
    assert torch.equal(moved.encode(weights), codec.encode(weights))
    with pytest.raises(WslfastError, match="state"):
        AdaptiveCodec.from_state(None, {**codec.state(), "prior": torch.zeros(2)})
    with pytest.raises(WslfastError, match="AdaptiveCodec"):
        AdaptiveCodec.from_state(None, LinearCodec(models(8)).state())


def test_errors_say_what_is_wrong() -> None:
    with pytest.raises(WslfastError, match="queries: expected floating"):
        fitted(queries=images(4)[:, :, 1:])
    with pytest.raises(WslfastError, match="latent"):
        fitted(latent=1.5)
    with pytest.raises(WslfastError, match="damping"):
        fitted(damping=0.0)
    opaque = Architecture.resnet18(1, 3, width=4)
    with pytest.raises(WslfastError, match="not a plain chain"):
        AdaptiveCodec(Population(opaque, torch.randn(2, opaque.num_weights)), queries=torch.zeros(2, 1, 32, 32))
    grouped = Architecture.from_layers(
        (Conv2d("a", 2, 4, (3, 3)), Conv2d("b", 4, 4, (3, 3), groups=2), Flatten("f"), Linear("c", 4, 3)), (2, 5, 5)
    )
    assert [AdaptiveCodec.supports(a) for a in (opaque, grouped, ARCH)] == [False, False, True]
    with pytest.raises(WslfastError, match=r"grouped convolutions, got \['b'\]"):
        AdaptiveCodec(Population(grouped, torch.randn(2, grouped.num_weights)), queries=torch.zeros(2, 2, 5, 5))
    with pytest.raises(WslfastError, match="codec: expected a linear one"):
        Autoencoder.small(TokenLayout(ARCH), fitted())
    with pytest.raises(WslfastError, match="latents: expected"):
        fitted().decode(torch.zeros(2, 3, 4))
