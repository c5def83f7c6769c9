"""The autoencoder: goldens of the published gpt2 variant, an oracle in einsum, the linear start, and batch independence."""

from __future__ import annotations

import io
import json
import math
from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from tolerances import FP32, FP32_DEEP, FP32_ROUNDING
from torch import Tensor

from wslfast.architecture import Architecture
from wslfast.codes import transformer as module
from wslfast.codes.autoencoder import Autoencoder
from wslfast.codes.linear import LinearCodec
from wslfast.errors import WslfastError
from wslfast.losses import structural_loss
from wslfast.population import Population
from wslfast.tokens import TokenLayout

SIZES = {"d_model": 16, "heads": 4, "layers": 2}


def population(architecture: Architecture, k: int = 20, seed: int = 0) -> Population:
    return Population(architecture, architecture.initial_weights(["kaiming_normal", "xavier_uniform"] * (k // 2), range(seed, seed + k)))


@lru_cache(maxsize=8)
def linear_start(metric: str = "plain", token_size: int = 0) -> tuple[Autoencoder, LinearCodec, Population]:
    arch = Architecture.cnn()
    zoo = population(arch)
    codec = LinearCodec(zoo, metric=metric, queries=torch.rand(8, 1, 28, 28), token_size=token_size)
    return Autoencoder.small(codec.layout, codec, **SIZES), codec, zoo


def test_golden_of_the_published_network() -> None:
    arch = Architecture.cnn3()
    layout = TokenLayout(arch)
    model = Autoencoder(layout, d_model=32, heads=4, layers=2, latent=8, max_positions=(100, 10, 40)).eval()
    start = 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # the published state dict's order
            ramp = 0.2 * torch.arange(start, start + parameter.numel(), dtype=torch.float64).sin()
            start += parameter.numel()
            norm = ".ln_" in name or ".head.1" in name or ".head.4" in name
            fill = torch.full_like(parameter, float(name.endswith("weight"))) if norm else ramp.float().view_as(parameter)
            parameter.copy_(fill)
        weights = (0.3 * torch.arange(arch.num_weights, dtype=torch.float64).sin()).float()[None]
        t = layout.tokenize(weights).tokens[0]
        x = torch.stack([t, 0.5 * t, -t])
        z = model.encode(x)
        y = model.decode(z, keep_padding=True)
        close = {"rtol": 1e-4, "atol": 2e-5}
        torch.testing.assert_close(z[0, 0, :3], torch.tensor([0.636005, 0.854944, 0.873246]), **close)
        torch.testing.assert_close(y[2, 92, :3], torch.tensor([-0.400035, -0.243291, 0.111319]), **close)
        torch.testing.assert_close(model.project(z)[0, :4], torch.tensor([0.5942, 1.316425, 0, 0]), **close)
        torch.testing.assert_close(model.embed(x)[1, :3], torch.tensor([0.558632, 0.557238, 0.453913]), **close)
        assert z.sum().item() == pytest.approx(130.79525, rel=FP32_DEEP)
        assert y.sum().item() == pytest.approx(252.6344, rel=FP32_DEEP)
        torch.testing.assert_close(model.encode(x[:1]), z[:1], rtol=FP32, atol=FP32_ROUNDING)


def test_paper_preset() -> None:
    layout = TokenLayout(Architecture.cnn3())
    model = Autoencoder.paper(layout)
    assert sum(p.numel() for p in model.parameters()) == 13_035_485
    assert model.latent_numbers == 93 * 64
    names = [name for name, _ in model.named_parameters()]
    block = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    assert names == [
        "tokenizer.weight",
        "tokenizer.bias",
        *(f"transformer_encoder.transformer.{i}.{part}.weight" for i in range(8) for part in block),
        "encoder_comp.weight",
        "encoder_comp.bias",
        "detokenizer.weight",
        "detokenizer.bias",
        *(f"transformer_decoder.transformer.{i}.{part}.weight" for i in range(8) for part in block),
        "decoder_comp.weight",
        "decoder_comp.bias",
        "pe.pe1.weight",
        "pe.pe2.weight",
        "pe.pe3.weight",
        "projection_head.head.0.weight",
        "projection_head.head.1.weight",
        "projection_head.head.1.bias",
        "projection_head.head.3.weight",
        "projection_head.head.4.weight",
        "projection_head.head.4.bias",
    ]
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        elif parameter.ndim == 1:
            assert (parameter == 1).all()
        else:
            std = 0.02 / math.sqrt(16) if name.endswith("c_proj.weight") else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.1), name
    weights = population(Architecture.cnn3(), 2).weights
    with torch.autocast("cpu", torch.bfloat16):
        z, y, p = model(layout.tokenize(weights).tokens)
    assert (z.shape, y.shape, p.shape) == ((2, 93, 64), (2, 93, 289), (2, 30))
    assert all(t.isfinite().all() for t in (z, y, p))
    assert not y[:, ~layout.mask].any()
    (y.float().square().mean() + p.float().mean()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def _oracle(model: Autoencoder, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Encoder and decoder of a random start from the published description, one head at a time."""
    state = {name: value.double() if value.is_floating_point() else value for name, value in model.state_dict().items()}
    p = state["positions"]
    place = torch.cat([state["pe.pe1.weight"][p[:, 0]] + state["pe.pe2.weight"][p[:, 1]], state["pe.pe3.weight"][p[:, 2]]], 1)

    def stack(x: Tensor, name: str) -> Tensor:
        heads, d = model.config()["heads"], x.shape[-1]
        for i in range(model.config()["layers"]):
            w = {k.removeprefix(f"{name}.transformer.{i}."): v for k, v in state.items() if k.startswith(f"{name}.transformer.{i}.")}
            q, k, v = (F.layer_norm(x, (d,), w["ln_1.weight"]) @ w["attn.c_attn.weight"].T).split(d, -1)
            out = []
            for h in range(heads):
                part = slice(h * d // heads, (h + 1) * d // heads)
                attention = (torch.einsum("bsd,btd->bst", q[..., part], k[..., part]) / math.sqrt(d // heads)).softmax(-1)
                out.append(torch.einsum("bst,btd->bsd", attention, v[..., part]))
            x = x + torch.cat(out, -1) @ w["attn.c_proj.weight"].T
            hidden = F.layer_norm(x, (d,), w["ln_2.weight"]) @ w["mlp.c_fc.weight"].T
            x = x + (hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2) @ w["mlp.c_proj.weight"].T
        return x

    x = tokens.double() @ state["tokenizer.weight"].T + state["tokenizer.bias"]
    z = stack(x + place, "transformer_encoder") @ state["encoder_comp.weight"].T + state["encoder_comp.bias"]
    x = z @ state["decoder_comp.weight"].T + state["decoder_comp.bias"]
    y = stack(x + place, "transformer_decoder") @ state["detokenizer.weight"].T + state["detokenizer.bias"]
    return z, y


def test_against_an_oracle() -> None:
    layout = TokenLayout(Architecture.cnn())
    model = Autoencoder(layout, **SIZES, latent=7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    tokens = torch.randn(3, 48, 201) * layout.mask
    z, y, _ = model(tokens)
    expected_z, expected_y = _oracle(model, tokens)
    torch.testing.assert_close(z, expected_z.float(), rtol=FP32_DEEP, atol=FP32_DEEP)
    torch.testing.assert_close(y, expected_y.float() * layout.mask, rtol=FP32_DEEP, atol=FP32_DEEP)


def _models() -> list[Autoencoder]:
    torch.manual_seed(3)
    started = Autoencoder.small(linear_start()[1].layout, linear_start()[1], **SIZES)
    random = Autoencoder.small(TokenLayout(Architecture.cnn()), **SIZES)
    with torch.no_grad():
        for model in (started, random):
            for name, parameter in model.named_parameters():
                if not name.startswith("linear."):
                    parameter.normal_(std=0.3)
    return [random, started]


@pytest.mark.parametrize("model", _models(), ids=["random", "linear"])
def test_a_model_encoded_alone_equals_itself_in_a_batch(model: Autoencoder) -> None:
    tokens = model.layout.tokenize(population(model.layout.architecture, 6, seed=50).weights).tokens
    with torch.no_grad():
        together = model(tokens)
        for j in range(len(tokens)):
            for alone, whole in zip(model(tokens[j : j + 1]), together, strict=True):
                torch.testing.assert_close(alone[0], whole[j], rtol=FP32, atol=FP32)
        other = tokens.clone()
        other[1:] = other[1:].flip(0) * 3
        torch.testing.assert_close(model(other)[1][0], together[1][0], rtol=FP32, atol=FP32)
        moved = tokens.clone()
        moved[0, 40] += model.mask[40] * 0.5  # attention is over tokens: one token reaches all latents of its model
        changed = (model.encode(moved)[0] - together[0][0]).abs().amax(1)
        assert (changed > 0).all()


@pytest.mark.parametrize("model", _models(), ids=["random", "linear"])
def test_padding_does_not_matter(model: Autoencoder) -> None:
    tokens = model.layout.tokenize(population(model.layout.architecture, 2).weights).tokens
    junk = torch.where(model.mask, tokens, float("nan"))
    with torch.no_grad():
        z, y, _ = model(tokens)
        assert torch.equal(model.encode(junk), z)
        assert not y[:, ~model.mask].any()
        assert model.decode(z, keep_padding=True)[:, ~model.mask].any()
        assert not z[:, ~model.latent_mask].any()
        noise = torch.where(model.latent_mask, z, float("nan"))
        assert torch.equal(model.decode(noise), y)
    assert model.latent_numbers == int(model.latent_mask.sum())


@pytest.mark.parametrize("start", ["random", "linear"])
def test_rebuilt_from_config_and_state(start: str) -> None:
    model = _models()[start == "linear"]
    tokens = model.layout.tokenize(population(model.layout.architecture, 2).weights).tokens
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    again = Autoencoder.from_config(TokenLayout(model.layout.architecture), json.loads(json.dumps(model.config())))
    again.load_state_dict(torch.load(file, weights_only=True))
    assert again.latent_numbers == model.latent_numbers
    assert all(torch.equal(a, b) for a, b in zip(model(tokens), again(tokens), strict=True))


def test_dropout_is_off_in_evaluation() -> None:
    layout = TokenLayout(Architecture.cnn())
    model = Autoencoder(layout, **SIZES, dropout=0.5)
    tokens = torch.randn(2, 48, 201)
    assert not torch.equal(model.encode(tokens), model.encode(tokens))
    model.eval()
    assert torch.equal(model.encode(tokens), model.encode(tokens))


@pytest.mark.parametrize("token_size", [0, 64], ids=["whole rows", "cut rows"])
@pytest.mark.parametrize("metric", ["plain", "activation"])
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_a_linear_start_is_the_code(metric: str, token_size: int, autocast: bool) -> None:
    model, codec, _ = linear_start(metric, token_size)
    held_out = population(codec.architecture, 6, seed=100).weights
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        z, y, _ = model(codec.layout.tokenize(held_out).tokens)
    torch.testing.assert_close(z, codec.encode(held_out), rtol=FP32, atol=FP32)
    torch.testing.assert_close(codec.layout.detokenize(y), codec.reconstruct(held_out), rtol=FP32, atol=FP32)
    assert model.latent_numbers == codec.latent_size
    assert torch.equal(model.latent_mask, codec.mask)


@pytest.mark.parametrize("start", ["random", "linear"])
def test_gradient_reaches_every_parameter(start: str) -> None:
    if start == "linear":
        codec = linear_start("activation")[1]
        model = Autoencoder.small(codec.layout, codec, **SIZES)
    else:
        model = Autoencoder.small(TokenLayout(Architecture.cnn()), **SIZES)
    tokens = model.layout.tokenize(population(model.layout.architecture, 4).weights).tokens
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for _ in range(2):  # behind zero-started maps, the gradient arrives once those have moved
        optimizer.zero_grad()
        _, y, p = model(tokens)
        (structural_loss(y, tokens, model.mask) + p.square().mean()).backward()
        optimizer.step()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent
    # what is padding of a map stays zero, so the latent size is what it says
    if start == "linear":
        assert model.linear is not None
        width = model.linear.encoder.shape[2]
        for g, (size, w) in enumerate(zip(codec.groups.sizes, codec.widths, strict=True)):
            assert not model.linear.encoder[g, size:].any()
            assert not model.linear.encoder[g, :, w:width].any()
            assert not model.linear.decoder[g, w:].any()
            assert not model.linear.decoder[g, :, size:].any()


@pytest.mark.parametrize("token_size", [0, 64], ids=["whole rows", "cut rows"])
def test_paths_are_random_maps_of_a_codes_widths(token_size: int) -> None:
    _, codec, zoo = linear_start("plain", token_size)

    def begun(seed: int) -> Autoencoder:
        torch.manual_seed(seed)
        return Autoencoder(codec.layout, start="paths", codec=codec, **SIZES)

    model, other = begun(0), begun(1)
    assert model.linear is not None
    assert other.linear is not None
    assert model.latent_numbers == codec.latent_size
    assert torch.equal(model.linear.shift, codec.center)
    assert not torch.equal(model.linear.encoder, other.linear.encoder)
    for g, (size, w) in enumerate(zip(codec.groups.sizes, codec.widths, strict=True)):
        for maps, rows, columns in ((model.linear.encoder, size, w), (model.linear.decoder, w, size)):
            assert maps[g].count_nonzero() == rows * columns  # and those are its first ones
            if rows * columns > 200:
                assert float(maps[g, :rows, :columns].detach().std()) == pytest.approx(rows**-0.5, rel=0.2)
    assert all(bool(p.any()) for p in (model.encoder_comp.weight, model.detokenizer.weight))  # nothing waits at zero
    tokens = codec.layout.tokenize(zoo.weights[:2]).tokens
    again = Autoencoder.from_config(codec.layout, model.config())
    again.load_state_dict(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model(tokens), again(tokens), strict=True))


def test_no_transformer_is_a_linear_model() -> None:
    _, codec, zoo = linear_start()
    model = Autoencoder.small(codec.layout, codec, layers=0)
    assert not any("attn" in name for name in model.state_dict())
    a, b = codec.layout.tokenize(zoo.weights[:2]).tokens
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
        ends = model.decode(model.encode(torch.stack([a, b, (a + b) / 2])))
    torch.testing.assert_close(ends[2], (ends[0] + ends[1]) / 2, rtol=FP32_DEEP, atol=FP32_DEEP)


def test_what_is_refused() -> None:
    layout = TokenLayout(Architecture.cnn())
    _, codec, _ = linear_start()
    for arguments, message in [
        ({"start": "pca"}, "start"),
        ({"start": "linear"}, "codec"),
        ({"start": "paths"}, "codec"),
        ({"codec": codec}, "codec"),
        ({"d_model": 30, "heads": 4}, "d_model"),
        ({"heads": 0}, "heads"),
        ({"layers": -1}, "layers"),
        ({"dropout": 1.0}, "dropout"),
        ({"max_positions": (9, 9, 9)}, "max_positions"),
        ({"start": "linear", "codec": codec, "latent": 2}, "latent"),
        ({"latent": 0}, "latent"),
    ]:
        with pytest.raises(WslfastError, match=message):
            Autoencoder(layout, **{**SIZES, **arguments})
    with pytest.raises(WslfastError, match="codec: fitted on"):
        Autoencoder.small(TokenLayout(Architecture.cnn(), 64), codec)
    with pytest.raises(WslfastError, match="codec: fitted on"):
        Autoencoder.small(TokenLayout(Architecture.cnn2()), codec)
    model = Autoencoder(layout, **SIZES)
    with pytest.raises(WslfastError, match=r"tokens: expected floating \[k, 48, 201\]"):
        model.encode(torch.zeros(2, 48, 200))
    with pytest.raises(WslfastError, match="z: expected"):
        model.decode(torch.zeros(2, 48, 3))
    with pytest.raises(WslfastError, match="config"):
        Autoencoder.from_config(layout, {"depth": 3})


@pytest.mark.parametrize("length", [1, 7, 48, module._SHORT + 1], ids=str)
def test_attention_in_half_precision_on_a_cpu(length: int) -> None:
    """Forward and gradients against float64, under autocast as the trainer runs it and with half-precision inputs."""
    generator = torch.Generator().manual_seed(length)
    exact = [torch.randn(2, 3, length, 8, generator=generator).bfloat16().double().requires_grad_() for _ in range(3)]
    q, k, v = exact
    expected = ((q @ k.mT) / math.sqrt(8)).softmax(-1) @ v
    grad = torch.randn(expected.shape, generator=generator).bfloat16()
    expected.backward(grad.double())
    half = [x.detach().bfloat16().requires_grad_() for x in exact]
    with torch.autocast("cpu", torch.bfloat16):
        found = module.attention(*half)
    assert found.dtype == torch.bfloat16
    found.backward(grad)
    for a, b in [(found, expected.detach()), *((h.grad, x.grad) for h, x in zip(half, exact, strict=True))]:
        assert a is not None
        assert b is not None
        assert (a.detach().double() - b).norm() <= 2e-2 * b.norm() + 1e-3


def test_attention_drops_scores_in_training_alone() -> None:
    v = torch.eye(6).expand(500, 1, 6, 6).bfloat16()
    q = torch.zeros(500, 1, 6, 4, dtype=torch.bfloat16)
    torch.manual_seed(0)
    scores = module.attention(q, q, v, 0.25).float() * 6
    assert float((scores == 0).float().mean()) == pytest.approx(0.25, abs=0.02)
    assert float(scores.mean()) == pytest.approx(1, abs=0.03)
    assert torch.equal(module.attention(q, q, v), module.attention(q, q, v))
