"""The loop around the steps: what is kept of a run that diverges, what the log says, and what a run goes on with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_runs import config

from wslfast import Population, WslfastError, train
from wslfast.training import trainer
from wslfast.training.checkpoint import checkpoint_path, load_checkpoint


def _broken_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient that is not finite in one step, whose loss is."""
    real, seen = trainer.descend, [0]

    def descend(total: Tensor, parts: dict[str, Tensor], model: nn.Module, *rest: Any) -> None:
        seen[0] += 1
        if seen[0] == step:
            real(total * float("nan"), parts, model, *rest)
        else:
            real(total, parts, model, *rest)

    monkeypatch.setattr(trainer, "descend", descend)


@pytest.mark.parametrize(("step", "every", "kept"), [(4, 3, 3), (6, 3, 3), (8, 4, 4)], ids=["between", "as it is saved", "the last step"])
def test_a_run_that_breaks_keeps_its_last_good_checkpoint(
    step: int, every: int, kept: int, tmp_path: Path, population: Population, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(tmp_path / "run", steps=8, log_every=100, checkpoint_every=every)
    _broken_at(step, monkeypatch)
    with pytest.raises(WslfastError, match=r"not finite after step \d.*; the last checkpoint in .* is from before"):
        train(settings, population=population, images=images)
    state = load_checkpoint(settings.out)
    assert state["step"] == kept
    assert all(value.isfinite().all() for value in state["model"].values() if value.is_floating_point())
    monkeypatch.undo()
    assert train(settings, population=population, images=images, resume=True).step == 8


def test_a_run_that_breaks_at_once_says_that_nothing_is_kept(
    tmp_path: Path, population: Population, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(tmp_path / "run", steps=4, log_every=2)
    _broken_at(1, monkeypatch)
    with pytest.raises(WslfastError, match=r"at step 2; there is no checkpoint in .* yet"):
        train(settings, population=population, images=images)
    assert not checkpoint_path(settings.out).exists()


def test_the_log_says_at_which_rate_a_step_was_taken(
    tmp_path: Path, population: Population, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[float] = []
    real = trainer.descend

    def descend(total: Tensor, parts: dict[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer, *rest: Any) -> None:
        used.append(optimizer.param_groups[0]["lr"])
        real(total, parts, model, optimizer, *rest)

    monkeypatch.setattr(trainer, "descend", descend)
    settings = config(tmp_path / "run", steps=6, log_every=1, schedule="onecycle")
    train(settings, population=population, images=images)
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["lr"] for line in lines] == used
    assert used[-1] < used[0] < max(used)


def test_a_run_goes_on_with_its_own_images_alone(tmp_path: Path, population: Population, images: Tensor) -> None:
    settings = config(tmp_path / "run", steps=4, checkpoint_every=2)
    train(settings, population=population, images=images, stop=lambda step: step == 2)
    for others in (images.flip(0), images + 0.5, torch.zeros_like(images), images[:40]):
        with pytest.raises(WslfastError, match="the query images are others than the checkpoint saw"):
            train(settings, population=population, images=others, resume=True)
    nearly = images * (1 + 1e-7)  # made by another machine
    assert train(settings, population=population, images=nearly, resume=True).step == 4


def test_what_is_no_config_and_no_population_is_said(tmp_path: Path, population: Population) -> None:
    with pytest.raises(WslfastError, match="config: expected a TrainConfig, got dict"):
        train({"zoo": "zoo"})  # type: ignore[arg-type]
    with pytest.raises(WslfastError, match="population: expected a Population or a MappedZoo, got list"):
        train(config(tmp_path / "run"), population=[population])  # type: ignore[arg-type]
