"""The code of the network as a whole against the same algebra in float64 with a Jacobian by torch.func, and against what it promises."""

from __future__ import annotations

import pytest
import torch
from small_joint import ARCH, LAYERS, distance, fitted, images, models
from tolerances import FP32, FP32_AMPLIFIED, FP32_DEEP

from wslfast import WslfastError, batched_forward
from wslfast.codes import joint
from wslfast.codes.adaptive import AdaptiveCodec
from wslfast.kernels.reference import forward_one


@pytest.mark.parametrize("token_size", [0, 16], ids=["rows", "cut-rows"])
def test_the_latent_alone_tells_the_decoder(token_size: int) -> None:
    codec = fitted(token_size=token_size)
    weights = models(5, 7).weights
    latents, rebuilt = codec.encode(weights), codec.reconstruct(weights)
    assert latents.shape == (5, codec.latent_size)
    assert codec.latent_size == round(0.4 * ARCH.num_weights)
    assert codec.joint_size == codec.latent_size - codec.base.latent_size
    torch.testing.assert_close(codec.decode(latents), rebuilt, rtol=FP32_DEEP, atol=FP32_DEEP)
    torch.testing.assert_close(codec.decode(latents[3:4])[0], rebuilt[3], rtol=FP32_DEEP, atol=FP32_DEEP)
    torch.testing.assert_close(codec.encode(weights[3:4])[0], latents[3], rtol=FP32_AMPLIFIED, atol=FP32_AMPLIFIED)


def test_of_no_models_there_are_no_latents() -> None:
    codec, none = fitted(), models(2, 7).weights[:0]
    assert codec.encode(none).shape == (0, codec.latent_size)
    assert codec.decode(codec.encode(none)).shape == codec.reconstruct(none).shape == (0, ARCH.num_weights)


@pytest.mark.parametrize("token_size", [0, 16], ids=["rows", "cut-rows"])
def test_all_of_the_latent_is_all_of_the_model(token_size: int) -> None:
    codec = fitted(latent=1.0, token_size=token_size)
    weights = models(3, 7).weights
    torch.testing.assert_close(codec.reconstruct(weights), weights, rtol=FP32_AMPLIFIED, atol=2e-2 * float(weights.std()))


def test_a_sketch_is_the_squared_jacobian_in_expectation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 4,096 combinations of outputs an image, against torch.func; rows are weights, then the bias."""
    codec = fitted()
    monkeypatch.setattr(joint, "_DRAWN", 4096)
    codec.queries = codec.queries[:6]
    row = models(1, 7).weights[0]
    flat = torch.cat([part.flatten(1) for part in codec._jacobian(row)], 1).double()
    found = flat.T @ flat
    slopes = torch.func.jacrev(lambda w: forward_one(w, codec.queries.double(), LAYERS))(row.double()).flatten(0, 1)
    in_rows = torch.stack([codec._rows(one.float()) for one in slopes]).double()
    expected = in_rows.T @ in_rows / 6
    assert float((found - expected).norm() / expected.norm()) < 0.1
    assert float((torch.stack([codec._weights(one) for one in in_rows.float()]) - slopes).abs().max()) < FP32 * float(slopes.abs().max())


def test_directions_are_the_leading_ones_of_what_is_left_open() -> None:
    """Against a float64 eigendecomposition: the same subspace, orthonormal in units of the covariance that the base code leaves open."""
    codec = fitted()
    weights, left = codec.base.left_open(codec.base.encode(models(1, 7).weights))
    directions, white = codec._directions(weights[0], [part[0].float() for part in left])
    flat = torch.cat([part.flatten(1) for part in codec._jacobian(weights[0])], 1).double()
    groups = codec.base.groups
    blocks = [part[0] for part, members in zip(left, groups.members, strict=True) for _ in range(members)]
    root = torch.block_diag(*blocks)
    values, vectors = torch.linalg.eigh(root.T @ flat.T @ flat @ root)
    leading = vectors[:, -codec.joint_size :]
    torch.testing.assert_close(white.T @ white, torch.eye(codec.joint_size), rtol=0, atol=FP32_DEEP)
    kept = float((flat @ root @ white.double()).square().sum() / values[-codec.joint_size :].sum())
    assert 0.99 < kept < 1 + FP32_DEEP
    assert float((leading.T @ white.double()).norm() ** 2) > 0.9 * codec.joint_size
    torch.testing.assert_close(directions.double(), root @ white.double(), rtol=FP32_DEEP, atol=FP32_DEEP)


def test_what_is_left_open_is_the_conditional_covariance() -> None:
    """Schur's complement in float64: given the numbers of the base code, which are linear in a row."""
    codec = fitted()
    weights = models(3, 7).weights
    latents, decoder = codec.base.held(weights)
    _, left = codec.base.left_open(latents)
    rows = codec.base.groups.split(codec.layout.tokenize(decoder(latents) - decoder(torch.zeros_like(latents))).tokens)
    for group, part in enumerate(left):
        n, width = codec.base.groups.sizes[group], codec.base.widths[group]
        prior = codec.base.prior[group, :n, :n]
        for model in range(3):
            spanned = rows[group][model].double()
            if len(spanned) < width:
                continue  # too few channels to read the span off
            basis = torch.linalg.svd(spanned)[2][:width].T
            inverse = torch.linalg.inv(prior)
            expected = prior - basis @ torch.linalg.solve(basis.T @ inverse @ basis, basis.T)
            torch.testing.assert_close(part[model] @ part[model].T, expected, rtol=1e-3, atol=1e-4 * float(prior.diagonal().max()))


def test_it_behaves_better_than_as_many_numbers_layer_by_layer() -> None:
    weights, fresh = models(12, 7).weights, images(200, 5)
    codec = fitted(queries=images(200))
    layers = AdaptiveCodec(models(40), queries=images(200), latent=0.4, models=8)
    ours, theirs = distance(weights, codec.reconstruct(weights), fresh), distance(weights, layers.reconstruct(weights), fresh)
    assert float((ours / theirs).log().mean()) < -0.2


def test_steps_lower_the_loss_on_the_codes_images() -> None:
    weights = models(6, 7).weights
    codec = fitted()
    moved = distance(weights, codec.reconstruct(weights), codec.queries)
    codec.steps = 0
    read = distance(weights, codec.reconstruct(weights), codec.queries)
    assert bool((moved < read).all())


def test_a_broken_model_is_nan_and_alone() -> None:
    weights = models(4, 7).weights
    codec = fitted()
    sound = codec.reconstruct(weights)
    weights[1, 0] = float("nan")
    latents, rebuilt = codec.encode(weights), codec.reconstruct(weights)
    assert bool(rebuilt[1].isnan().all())
    assert bool(codec.decode(latents)[1].isnan().all())
    torch.testing.assert_close(rebuilt[[0, 2, 3]], sound[[0, 2, 3]], rtol=FP32_AMPLIFIED, atol=FP32_AMPLIFIED)
    assert bool(batched_forward(rebuilt[[0, 2, 3]], images(4), ARCH).isfinite().all())


def test_errors_say_what_is_wrong() -> None:
    with pytest.raises(WslfastError, match="joint: expected a share"):
        fitted(joint=1.0)
    with pytest.raises(WslfastError, match="steps: expected"):
        fitted(steps=-1)
    with pytest.raises(WslfastError, match="leave none"):
        fitted(latent=1)
    with pytest.raises(WslfastError, match="latents: expected"):
        fitted().decode(torch.zeros(2, 3))
