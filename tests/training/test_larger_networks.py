"""Networks of many tokens: windows, and one real training step on a narrow ResNet-18 with its behavior compared."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tolerances import FP32_AMPLIFIED, FP32_DEEP, FP32_SMALL
from training_runs import config

from wslfast import Architecture, Autoencoder, Population, TokenLayout, batched_behavioral_loss, train
from wslfast.codes import transformer as parts
from wslfast.permutation import random_views
from wslfast.training import load_run
from wslfast.training.trainer import Trainer

SIZES = {"d_model": 16, "heads": 2, "layers": 1, "latent": 8, "projection": 6}


def _sequence(window: int) -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder(TokenLayout(Architecture.cnn()), window=window, **SIZES)  # 48 tokens


def test_a_window_attends_to_itself_alone() -> None:
    """Against the same transformer on each window by itself: 48 tokens in windows of 20 are three of 16."""
    model = _sequence(20)
    tokens = torch.randn(3, 48, model.layout.token_size)
    with torch.no_grad():
        z = model.encode(tokens)
        h = model.tokenizer(torch.where(model.mask, tokens, 0)) + model.pe(model.positions)
        for start in (0, 16, 32):
            alone = model.encoder_comp(model.transformer_encoder(h[:, start : start + 16]))
            torch.testing.assert_close(z[:, start : start + 16], alone)
        changed = tokens.clone()
        changed[:, 20] += 1
        assert torch.equal(model.encode(changed)[:, :16], z[:, :16])
        assert not torch.equal(model.encode(changed)[:, 16:32], z[:, 16:32])
        assert model.project(z).shape == (3, 6)
        assert model.decode(z).shape == tokens.shape


def test_one_window_is_the_whole_sequence() -> None:
    whole, one = _sequence(0), _sequence(48)
    tokens = torch.randn(2, 48, whole.layout.token_size)
    one.load_state_dict(whole.state_dict())
    assert all(map(torch.equal, whole(tokens), one(tokens)))


@pytest.mark.parametrize("window", [7, 13, 20])
def test_recomputed_blocks_have_the_same_gradient(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _sequence(window)
    tokens = torch.randn(3, 48, model.layout.token_size)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        _, y, p = model(tokens)
        (y.square().mean() + p.square().mean()).backward()
        return [q.grad.clone() for q in model.parameters() if q.grad is not None]

    expected = gradients()
    monkeypatch.setattr(parts, "_BLOCK_TOKENS", 2 * window)
    for a, b in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=FP32_DEEP, atol=FP32_SMALL)


def test_padding_of_the_last_window_is_not_seen_outside() -> None:
    windows = parts.Windows(10, 4)
    assert (windows.count, windows.size) == (3, 4)
    x = torch.arange(20.0).view(1, 10, 2)
    assert torch.equal(windows.through(torch.nn.Identity(), x), x)
    assert windows.cut(x).shape == (3, 4, 2)
    assert not windows.cut(x)[2, 2:].any()


def _drawn(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Numbers as a ResNet begins with, a little apart."""
    if len(shape) > 1:
        return torch.randn(shape) * (2 / math.prod(shape[1:])) ** 0.5
    centre = 1.0 if name.endswith(("running_var", "weight")) else 0.0
    return centre + 0.02 * torch.randn(shape)


def test_a_training_step_on_a_narrow_resnet(tmp_path: Path) -> None:
    """Tokens of 288 numbers in windows of 32, the behavioral loss on the whole decoded network: it is what the loss says on
    the reconstruction, its gradient reaches every parameter, and a run stores and loads."""
    arch = Architecture.resnet18(width=4)
    states = []
    for seed in range(4):
        torch.manual_seed(seed)
        assert arch.graph is not None
        states.append({slot.name: _drawn(slot.name, slot.shape) for slot in arch.graph.slots})
    population = Population.from_state_dicts(arch, states)
    images = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    settings = replace(
        config(tmp_path / "run"),
        steps=2,
        batch_size=2,
        queries=4,
        token_size=288,
        window=32,
        start="linear",
        clip=None,
        memory_gb=0.0,
        lr=1e-3,
        checkpoint_every=2,
    )
    trainer = Trainer(settings, population, images)
    assert trainer.layout.num_tokens > 64
    assert trainer.model._windows.count > 2
    rows, queries = torch.tensor([1, 3]), torch.arange(4)
    before = trainer.views.get_state()
    total, found = trainer.losses(rows, queries)
    total.backward()
    assert int(found["skipped_models"]) == 0  # a variance that decodes negative would make one
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in trainer.model.parameters())
    with torch.no_grad():
        trainer.views.set_state(before)
        originals = population.weights[rows].repeat(2, 1)
        views = torch.cat([random_views(population.weights[rows], arch, trainer.views) for _ in range(2)])  # the two that it saw
        rebuilt = trainer.layout.detokenize(trainer.model.decode(trainer.model.encode(trainer.layout.tokenize(views).tokens)))
        assert not torch.equal(views, originals)
        expected = batched_behavioral_loss(rebuilt, originals, trainer.pool.images[:4], arch)
    assert float(found["behavioral"]) * trainer.normalizers.behavioral == pytest.approx(float(expected), rel=FP32_AMPLIFIED)
    train(settings, population=population, images=images)
    run = load_run(tmp_path / "run", architecture=arch)
    assert run.autoencoder.config()["window"] == 32


def test_many_tokens_attend_in_windows_unless_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """48 tokens where 40 are many: a run says so, keeps its windows when it goes on elsewhere, and takes all at once when told."""
    arch = Architecture.cnn()
    population = Population(arch, arch.initial_weights(["kaiming_uniform"] * 4, range(4)))
    images = torch.randn(24, 1, 28, 28)
    settings = replace(config(tmp_path / "run"), steps=2, batch_size=2, queries=4, window=0)
    monkeypatch.setattr("wslfast.training.trainer._ALL", 40)
    monkeypatch.setattr("wslfast.training.trainer._WINDOW", 20)
    with caplog.at_level("INFO", logger="wslfast"):
        train(settings, population=population, images=images, stop=lambda step: step == 1)
    assert "48 tokens attend in windows of 20" in caplog.text
    monkeypatch.setattr("wslfast.training.trainer._ALL", 2048)
    resumed = train(settings, population=population, images=images, resume=True)
    assert resumed.autoencoder.config()["window"] == 20
    for window, expected in ((0, 0), (48, 48)):
        assert Trainer(replace(settings, window=window), population, images).model.config()["window"] == expected
        assert Trainer(replace(settings, window=window), population, images).model._windows.count == 1
