"""Latents refined at test time: better on images that taught nothing, one model at a time, and never worse on those kept back."""

from __future__ import annotations

import pytest
import torch
from tolerances import FP32, FP32_AMPLIFIED, FP32_DEEP

from wslfast import Architecture, Autoencoder, LinearCodec, Population, WslfastError, batched_behavioral_loss, batched_forward
from wslfast.codes.adaptive import AdaptiveCodec
from wslfast.kernels.layers import Activation, Conv2d, Flatten, Linear, Pool2d
from wslfast.measure.evaluation import decode, encode
from wslfast.measure.refinement import refine
from wslfast.tokens import layout

ARCH = Architecture.from_layers(
    (Conv2d("a", 1, 4, (3, 3)), Pool2d("p"), Activation("r", "tanh"), Flatten("f"), Linear("b", 36, 6), Activation("s", "tanh"),
     Linear("c", 6, 3)), (1, 8, 8), "small",
)  # fmt: skip
IMAGES = torch.randn(160, 1, 8, 8, generator=torch.Generator().manual_seed(1))
MANY = torch.randn(1200, 1, 8, 8, generator=torch.Generator().manual_seed(3))
FRESH = torch.randn(200, 1, 8, 8, generator=torch.Generator().manual_seed(2))


def models(k: int, first: int = 0) -> torch.Tensor:
    return 2 * ARCH.initial_weights(["kaiming_uniform"] * k, range(first, first + k))


CODEC = LinearCodec(Population(ARCH, models(60)), latent=0.4)


def distance(weights: torch.Tensor, latents: torch.Tensor, images: torch.Tensor, code: object = CODEC) -> torch.Tensor:
    return batched_behavioral_loss(
        decode(code, latents), None, images, ARCH, targets=batched_forward(weights, images, ARCH), criterion="mse", reduction="none"
    )  # type: ignore[arg-type]


def test_models_behave_better_on_images_that_taught_nothing() -> None:
    weights = models(12, 100)
    start, refined = encode(CODEC, weights), refine(CODEC, weights, MANY, steps=150, lr=0.05)
    assert refined.shape == start.shape
    before, after = distance(weights, start, FRESH), distance(weights, refined, FRESH)
    assert float(after.median()) < 0.6 * float(before.median())
    kept_back = MANY[::4]
    assert bool((distance(weights, refined, kept_back) <= distance(weights, start, kept_back)).all())


ADAPTIVE = AdaptiveCodec(Population(ARCH, models(60)), queries=IMAGES[:48], latent=0.4, models=8)


def test_an_adaptive_code_too() -> None:
    """Its bases turn while it is refined; what is returned is what its own decoder makes better models of."""
    weights = models(12, 100)
    start, refined = encode(ADAPTIVE, weights), refine(ADAPTIVE, weights, MANY, steps=120)
    before, after = distance(weights, start, FRESH, ADAPTIVE), distance(weights, refined, FRESH, ADAPTIVE)
    assert int((after < before).sum()) >= 9
    assert float(after.mean()) < 0.95 * float(before.mean())


def test_a_held_decoder_is_the_decoder_where_it_is_held() -> None:
    weights = models(5, 100)
    latents, decoder = ADAPTIVE.held(weights)
    torch.testing.assert_close(decoder(latents), ADAPTIVE.decode(latents), rtol=FP32_DEEP, atol=FP32)
    torch.testing.assert_close(latents, ADAPTIVE.encode(weights))
    moved = latents.clone().requires_grad_()
    assert torch.autograd.grad(decoder(moved).square().sum(), moved)[0].abs().sum() > 0


@pytest.mark.parametrize("code", [CODEC, ADAPTIVE], ids=["linear", "adaptive"])
def test_a_model_is_refined_alone(code: LinearCodec) -> None:
    weights = models(7, 100)
    together = refine(code, weights, IMAGES, steps=20)
    blocks = refine(code, weights, IMAGES, steps=20, block=3)
    alone = refine(code, weights[4:5], IMAGES, steps=20)
    torch.testing.assert_close(blocks, together, rtol=FP32_AMPLIFIED, atol=FP32_AMPLIFIED)
    torch.testing.assert_close(alone[0], together[4], rtol=FP32_AMPLIFIED, atol=FP32_AMPLIFIED)


def test_a_broken_model_stays_where_it_is() -> None:
    weights = models(5, 100)
    sound = refine(CODEC, weights, IMAGES, steps=20)
    weights[2] *= 1e30
    found = refine(CODEC, weights, IMAGES, steps=20)
    torch.testing.assert_close(found[[0, 1, 3, 4]], sound[[0, 1, 3, 4]])
    assert torch.equal(found[2].nan_to_num(0), encode(CODEC, weights)[2].nan_to_num(0))


def test_a_worse_latent_is_not_kept() -> None:
    weights = models(6, 100)
    assert torch.equal(refine(CODEC, weights, IMAGES, steps=0), encode(CODEC, weights))
    wild = refine(CODEC, weights, IMAGES, steps=3, lr=1e3)
    assert torch.equal(wild, encode(CODEC, weights))


def test_an_autoencoder_is_refined_and_left_alone() -> None:
    torch.manual_seed(0)
    code = Autoencoder(layout(ARCH), d_model=16, layers=1, heads=2, latent=4).eval()
    weights = models(4, 100)
    refined = refine(code, weights, IMAGES, steps=60, lr=0.1)
    assert float(distance(weights, refined, FRESH, code).mean()) < float(distance(weights, encode(code, weights), FRESH, code).mean())
    assert all(p.grad is None for p in code.parameters())


def test_errors_say_what_is_wrong() -> None:
    with pytest.raises(WslfastError, match="images"):
        refine(CODEC, models(2), IMAGES[:5])
    with pytest.raises(WslfastError, match="steps"):
        refine(CODEC, models(2), IMAGES, steps=-1)
    for wrong, message in (({"lr": float("nan")}, "lr"), ({"lr": -1}, "lr"), ({"block": 0}, "block"), ({"steps": 2.5}, "steps")):
        with pytest.raises(WslfastError, match=f"{message}.*: expected"):
            refine(CODEC, models(2), IMAGES, **wrong)
