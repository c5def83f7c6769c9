"""The trainer: objective, resumption to the bit, checkpoints that survive, configuration."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import FP32_DEEP
from torch import Tensor
from training_runs import ARCH, config, records, same

from wslfast import Population, TrainConfig, WslfastError, engine, train
from wslfast.kernels.criteria import CRITERIA
from wslfast.kernels.reference import forward
from wslfast.losses import layer_units, structural_loss
from wslfast.testing import oracle_loss, oracle_outputs
from wslfast.training import load_run
from wslfast.training.checkpoint import checkpoint_path, load_checkpoint, save_checkpoint
from wslfast.training.trainer import Trainer

SCHEDULED = {"start": "random", "behavior_from": 1 / 3, "behavior_ramp": 1 / 3, "schedule": "onecycle"}


class Killed(Exception):
    pass


# -- resumption ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dropout": 0.2, "schedule": "onecycle"},
        {"start": "random", "gamma": 0.0},
        {"beta": 1.0},
        {"precision": "bf16", "views": False},
        SCHEDULED,
        {**SCHEDULED, "start": "paths"},
        {"behavior_of": "deviations", "structure_unit": "layer"},
        {
            "structure_metric": "activation",
            "structure_unit": "outputs",
            "coordinates": "activation",
            "maps_lr": 10.0,
            "schedule": "onecycle",
            "start": "paths",
            "metric": "activation",
        },
    ],
    ids=[
        "default",
        "dropout-onecycle",
        "random-one-view",
        "structure",
        "bf16-no-views",
        "scheduled",
        "paths",
        "deviations-layer",
        "activation",
    ],
)
@pytest.mark.parametrize("killed_at", [3, 6, 9])
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(
    tmp_path: Path, population: Population, images: Tensor, changes: dict[str, Any], killed_at: int
) -> None:
    whole, broken = config(tmp_path / "whole", **changes), config(tmp_path / "broken", **changes)

    def kill(record: dict[str, Any]) -> None:
        if record["step"] == killed_at:
            raise Killed

    train(whole, population=population, images=images)
    with pytest.raises(Killed):
        train(broken, population=population, images=images, on_record=kill)
    torch.rand(7)  # the world goes on between the two
    train(broken, population=population, images=images, resume=True)
    a, b = load_checkpoint(tmp_path / "whole"), load_checkpoint(tmp_path / "broken")
    a["config"].pop("out"), b["config"].pop("out")
    assert same(a, b)
    assert records(tmp_path / "whole") == records(tmp_path / "broken")
    assert sorted(os.listdir(tmp_path / "whole" / "checkpoint")) == sorted(os.listdir(tmp_path / "broken" / "checkpoint")) == ["state.pt"]


def test_resume_says_where_from_and_leaves_a_finished_run_alone(
    tmp_path: Path, population: Population, images: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "wslfast")
    first = config(tmp_path / "run", steps=4)
    train(first, population=population, images=images, resume=True)  # nothing to resume: afresh
    assert "resumed" not in caplog.text
    train(replace(first, steps=8), population=population, images=images, resume=True)
    assert "resumed at step 4" in caplog.text
    before = checkpoint_path(tmp_path / "run").stat().st_mtime_ns, (tmp_path / "run" / "log.jsonl").read_bytes()
    run = train(replace(first, steps=8), population=population, images=images, resume=True)
    assert run.step == 8
    assert run.finished
    assert before == (checkpoint_path(tmp_path / "run").stat().st_mtime_ns, (tmp_path / "run" / "log.jsonl").read_bytes())


@pytest.mark.parametrize(
    ("has", "precision", "layers", "told"), [(1, "fp32", 1, 1), (1, "bf16", 1, 0), (1, "fp32", 0, 0), (0, "fp32", 1, 0), (0, "bf16", 1, 0)]
)
def test_a_cpu_that_has_bf16_is_told_of(
    tmp_path: Path, population: Population, images: Tensor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    has: int, precision: str, layers: int, told: int,
) -> None:  # fmt: skip
    caplog.set_level(logging.INFO, "wslfast")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bool(has), raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    train(config(tmp_path, steps=1, precision=precision, layers=layers), population=population, images=images)
    assert ("this CPU computes in bf16" in caplog.text) == bool(told)
    assert ("imitates them: precision = bf16 makes" in caplog.text) == (precision == "bf16" and not has)


def test_behavior_in_bf16_on_a_cpu_that_imitates_it_is_warned_of(
    tmp_path: Path, population: Population, images: Tensor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False, raising=False)
    train(config(tmp_path, steps=1, behavior_precision="bf16"), population=population, images=images)
    (warning,) = (r for r in caplog.records if "imitates" in r.message)
    assert (warning.levelname, "behavior_precision = bf16" in warning.message) == ("WARNING", True)


@pytest.mark.parametrize(("has", "becomes"), [(True, "bf16"), (False, "fp32")])
def test_precision_auto_is_the_devices_and_stays_when_a_run_goes_on_elsewhere(
    tmp_path: Path, population: Population, images: Tensor, monkeypatch: pytest.MonkeyPatch, has: bool, becomes: str
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    first = config(tmp_path / "run", steps=2, precision="auto")
    run = train(first, population=population, images=images)
    assert run.config.precision == becomes
    assert f'precision = "{becomes}"' in (tmp_path / "run" / "config.toml").read_text()
    named = train(replace(first, out=str(tmp_path / "named"), precision=becomes), population=population, images=images)
    for one, other in zip(run.autoencoder.parameters(), named.autoencoder.parameters(), strict=True):
        assert torch.equal(one, other)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: not has, raising=False)
    longer = train(replace(first, steps=4), population=population, images=images, resume=True)
    assert (longer.step, longer.config.precision) == (4, becomes)


def test_a_folder_that_holds_a_run_is_not_overwritten(tmp_path: Path, population: Population, images: Tensor) -> None:
    train(config(tmp_path, steps=2), population=population, images=images)
    with pytest.raises(WslfastError, match="already holds a run"):
        train(config(tmp_path, steps=2), population=population, images=images)


@pytest.mark.parametrize("changes", [{"lr": 1e-2}, {"seed": 4}, {"beta": 0.5}, {"queries": 4}], ids=lambda c: next(iter(c)))
def test_resuming_with_another_config_is_refused(tmp_path: Path, population: Population, images: Tensor, changes: dict[str, Any]) -> None:
    train(config(tmp_path, steps=4), population=population, images=images)
    for steps in (config(tmp_path).steps, 4, 2):  # also of a run that is finished: what comes back is of the other config
        with pytest.raises(WslfastError, match=f"cannot resume with another config: {next(iter(changes))} = "):
            train(replace(config(tmp_path, steps=steps), **changes), population=population, images=images, resume=True)
    assert train(config(tmp_path, steps=2), population=population, images=images, resume=True).step == 4


def test_resuming_on_another_zoo_is_refused(tmp_path: Path, population: Population, images: Tensor) -> None:
    train(config(tmp_path, steps=4), population=population, images=images)
    with pytest.raises(WslfastError, match=r"18 training rows, the checkpoint saw 20"):
        train(config(tmp_path), population=population[:18], images=images, resume=True)
    others = population[torch.arange(len(population)).flip(0)]  # as many of the same architecture
    with pytest.raises(WslfastError, match="other training models than the checkpoint saw"):
        train(config(tmp_path), population=others, images=images, resume=True)
    assert train(config(tmp_path), population=population, images=images, resume=True).finished


def test_a_checkpoint_that_does_not_say_which_models_it_saw_goes_on(tmp_path: Path, population: Population, images: Tensor) -> None:
    train(config(tmp_path, steps=4), population=population, images=images)
    state = {name: value for name, value in load_checkpoint(tmp_path).items() if name != "schema"}
    del state["sampler"]["models"]
    save_checkpoint(tmp_path, state)
    assert train(config(tmp_path), population=population, images=images, resume=True).finished


@pytest.mark.slow
def test_sigkill_then_resume_equals_an_uninterrupted_run(tmp_path: Path) -> None:
    """A real process, killed at whatever it happens to be doing, then resumed by another."""
    code = f"""
import sys, torch
sys.path[:0] = {sys.path!r}
from training_runs import ARCH, config
from pathlib import Path
from wslfast import Population, train
torch.set_num_threads(1)
population = Population(ARCH, ARCH.initial_weights(["kaiming_normal"] * 20, range(20)))
images = torch.randn(48, 1, 8, 8, generator=torch.Generator().manual_seed(5))
train(config(Path(sys.argv[1]), steps=150, checkpoint_every=5), population=population, images=images, resume=True)
"""

    def start(out: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", code, str(out)], cwd=Path(__file__).parent)

    assert start(tmp_path / "whole").wait(120) == 0
    killed = 0
    for delay in (0.02, 0.05, 0.1, 0.2):
        process = start(tmp_path / "broken")
        while process.poll() is None and not checkpoint_path(tmp_path / "broken").exists():
            time.sleep(0.01)
        time.sleep(delay)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            killed += 1
        process.wait()
    assert start(tmp_path / "broken").wait(120) == 0
    assert killed > 0
    a, b = load_checkpoint(tmp_path / "whole"), load_checkpoint(tmp_path / "broken")
    a["config"].pop("out"), b["config"].pop("out")
    assert same(a, b)
    assert records(tmp_path / "whole") == records(tmp_path / "broken")


# -- the schedule of behavior --------------------------------------------------------------------------------------------


def test_before_behavior_a_scheduled_run_is_one_of_structure_alone(tmp_path: Path, population: Population, images: Tensor) -> None:
    """Steps 1 to 4 of 12 to the bit; then behavior's weight rises over four steps to 1 - beta."""
    train(config(tmp_path / "scheduled", log_every=1, gamma=0.0, **SCHEDULED), population=population, images=images)
    alone = config(tmp_path / "alone", log_every=1, gamma=0.0, beta=1.0, start="random", schedule="onecycle")
    train(alone, population=population, images=images)
    found, structure = records(tmp_path / "scheduled"), records(tmp_path / "alone")
    assert found[:4] == structure[:4]
    assert all("behavioral" not in r for r in found[:4])
    share = [(r["loss"] - r["structural"]) / (r["behavioral"] - r["structural"]) for r in found[4:]]
    assert share == pytest.approx([0.9 * w for w in (0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1)], rel=1e-3)


def test_a_scheduled_run_may_end_without_structure(tmp_path: Path, population: Population, images: Tensor) -> None:
    run = config(tmp_path, beta=0.0, gamma=0.0, log_every=1, behavior_from=0.5, start="random")
    assert run.uses_structure
    assert [run.beta_at(s) for s in (0, 5, 6, 11)] == [1, 1, 0, 0]
    train(run, population=population, images=images)
    assert [("structural" in r, "behavioral" in r) for r in records(tmp_path)] == [(True, False)] * 6 + [(False, True)] * 6


@pytest.mark.parametrize("changes", [{"steps": 24}, {"behavior_from": 0.25}])
def test_a_scheduled_run_does_not_go_on_with_another_schedule(
    tmp_path: Path, population: Population, images: Tensor, changes: dict[str, Any]
) -> None:
    run = config(tmp_path, behavior_from=0.5)
    train(run, population=population, images=images, stop=lambda step: step == 4)
    with pytest.raises(WslfastError, match=f"cannot resume with another config: {next(iter(changes))} = "):
        train(replace(run, **changes), population=population, images=images, resume=True)


def test_a_resumed_run_keeps_the_units_it_was_begun_with(tmp_path: Path, population: Population, images: Tensor) -> None:
    """Of a checkpoint from before behavior's unit was the models' mean behavior, and before there was a schedule."""
    train(config(tmp_path, steps=4), population=population, images=images)
    state = load_checkpoint(tmp_path)
    state.pop("schema")
    state["normalizers"]["behavioral"] *= 3.0
    for name in ("behavior_from", "behavior_ramp"):
        del state["config"][name]
    save_checkpoint(tmp_path, state)
    train(config(tmp_path, steps=8), population=population, images=images, resume=True)
    assert load_checkpoint(tmp_path)["normalizers"] == state["normalizers"]


# -- checkpoints -----------------------------------------------------------------------------------------------------------


def test_the_checkpoint_is_plain_data_and_rebuilds_the_autoencoder(tmp_path: Path, population: Population, images: Tensor) -> None:
    run = train(config(tmp_path, steps=4), population=population, images=images)
    state = torch.load(checkpoint_path(tmp_path), weights_only=True)  # refuses anything but tensors and plain values
    assert {"model", "optimizer", "schedule", "normalizers", "rng", "sampler", "config", "step"} <= set(state)
    again = load_run(tmp_path)
    assert again.config == run.config
    assert all(
        torch.equal(a, b) for a, b in zip(run.autoencoder.state_dict().values(), again.autoencoder.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("damage", ["empty", "truncated", "flipped", "other"])
def test_a_damaged_checkpoint_is_one_clear_error(tmp_path: Path, population: Population, images: Tensor, damage: str) -> None:
    train(config(tmp_path, steps=2), population=population, images=images)
    path = checkpoint_path(tmp_path)
    data = bytearray(path.read_bytes())
    if damage == "empty":
        data = bytearray()
    elif damage == "truncated":
        data = data[: len(data) // 2]
    elif damage == "flipped":
        data[:4] = b"\x00\x01\x02\x03"
    if damage == "other":
        torch.save({"hello": torch.zeros(3)}, path)
    else:
        path.write_bytes(bytes(data))
    with pytest.raises(WslfastError, match=r"state\.pt"):
        load_run(tmp_path)


def test_a_hostile_checkpoint_runs_nothing(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "canary"),))

    checkpoint_path(tmp_path).parent.mkdir(parents=True)
    torch.save({"schema": 1, "model": Hostile()}, checkpoint_path(tmp_path))
    with pytest.raises(WslfastError, match="damaged"):
        load_run(tmp_path)
    assert not (tmp_path / "canary").exists()


def test_a_failed_save_keeps_the_old_checkpoint_and_leaves_no_stray_file(
    tmp_path: Path, population: Population, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(config(tmp_path, steps=2), population=population, images=images)
    state = load_checkpoint(tmp_path)
    before = checkpoint_path(tmp_path).read_bytes()
    state.pop("schema")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(WslfastError, match=r"cannot write .*state\.pt: .*No space left"):
        save_checkpoint(tmp_path, state)
    assert checkpoint_path(tmp_path).read_bytes() == before
    assert os.listdir(checkpoint_path(tmp_path).parent) == ["state.pt"]


# -- the objective -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", CRITERIA)
def test_the_objective_is_the_papers_composition(tmp_path: Path, population: Population, images: Tensor, criterion: str) -> None:
    """Against float64: masked MSE over real weights, the oracle's behavioral loss, NT-Xent by a loop; each over its normaliser."""
    trainer = Trainer(config(tmp_path, criterion=criterion, views=False), population, images)
    trainer.model.eval()
    rows, queries = torch.arange(6), torch.arange(8)
    with torch.no_grad():
        for p in trainer.model.parameters():
            p.add_(0.02 * torch.randn_like(p))
        total, _ = trainer.losses(rows, queries)
        tokens = trainer.layout.tokenize(population.weights[:6]).tokens
        _, rebuilt, projection = trainer.model(tokens)
    weights = trainer.layout.detokenize(rebuilt)
    structural = (weights.double() - population.weights[:6].double()).square().mean()
    targets = oracle_outputs(population.weights[:6], images_of(trainer)[:8], ARCH)
    behavioral = oracle_loss(weights, images_of(trainer)[:8], targets, ARCH, criterion)[0].mean()
    unit = torch.nn.functional.normalize(torch.cat([projection, projection]).double(), dim=1)
    similarity = unit @ unit.T / 0.1
    terms = []
    for i in range(12):
        others = [similarity[i, j] for j in range(12) if j != i]
        terms.append(-similarity[i, (i + 6) % 12] + torch.logsumexp(torch.stack(others), 0))
    contrastive = torch.stack(terms).mean()
    n = trainer.normalizers
    expected = 0.05 * contrastive / n.contrastive + 0.95 * (0.1 * structural / n.structural + 0.9 * behavioral / n.behavioral)
    assert math.isclose(float(total), float(expected), rel_tol=1e-4)
    assert n.contrastive == pytest.approx(math.log(11))
    assert n.structural == pytest.approx(float(population.weights.double().var(0, unbiased=False).mean()))


def test_behavior_of_deviations_is_that_objective_with_its_whole_gradient(tmp_path: Path, population: Population, images: Tensor) -> None:
    """Against float64 autograd through the mean error, which the trainer holds; a diverged model takes no part in the mean."""
    trainer = Trainer(config(tmp_path, behavior_of="deviations", gamma=0.0, beta=0.0, views=False), population, images)
    rows, queries = torch.arange(6), torch.arange(8)
    parameters = [p for name, p in trainer.model.named_parameters() if "projection" not in name]
    with torch.no_grad():
        for p in parameters:
            p.add_(0.02 * torch.randn_like(p))
    total, _ = trainer.losses(rows, queries)
    found = torch.autograd.grad(total, parameters, allow_unused=True)
    weights = trainer.layout.detokenize(trainer.model.decode(trainer.model.encode(trainer.layout.tokenize(population.weights[:6]).tokens)))
    seen = images_of(trainer)[:8].double()
    error = forward(weights.double(), seen, ARCH.layers) - forward(population.weights[:6].double(), seen, ARCH.layers)
    value = (error - error.mean(0)).square().sum(2).mean() / 2 / trainer.normalizers.behavioral
    assert float(total.detach()) == pytest.approx(float(value.detach()), rel=1e-5)
    for ours, expected in zip(found, torch.autograd.grad(value, parameters, allow_unused=True), strict=True):
        assert (ours is None) == (expected is None)
        if ours is not None:
            torch.testing.assert_close(ours, expected, rtol=FP32_DEEP, atol=FP32_DEEP * float(expected.abs().max()))

    targets = trainer._targets(rows, population.weights[:6], queries)
    broken = weights.detach().clone()
    broken[2] *= 1e30
    moved = trainer._moved(broken, targets, queries) - targets
    sound = error.detach()[[0, 1, 3, 4, 5]].mean(0).expand_as(moved)
    torch.testing.assert_close(moved.double(), sound, rtol=FP32_DEEP, atol=FP32_DEEP * float(sound.abs().max()))


def test_structure_in_units_of_each_layer(tmp_path: Path, population: Population, images: Tensor) -> None:
    """Against a loop over parameters; answering with the mean model still costs 1."""
    trainer = Trainer(config(tmp_path, structure_unit="layer", beta=1.0, gamma=0.0, views=False), population, images)
    with torch.no_grad():
        value, _ = trainer.losses(torch.arange(6), torch.arange(8))
        tokens = trainer.layout.tokenize(population.weights[:6]).tokens
        rebuilt = trainer.layout.detokenize(trainer.model.decode(trainer.model.encode(tokens))).double()
    wide, spans = population.weights.double(), {"0": (0, 40), "4": (40, 262), "6": (262, 283)}
    assert ARCH.num_weights == 283
    total = 0.0
    for start, stop in spans.values():
        variance = wide[:, start:stop].var(0, unbiased=False).mean()
        total += float((rebuilt - wide[:6])[:, start:stop].square().sum() / variance)
    assert float(value) == pytest.approx(total / 6 / 283, rel=1e-5)
    units, tokens = layer_units(population, trainer.layout), trainer.layout.tokenize(population.weights).tokens
    mean = structural_loss(tokens.mean(0).expand_as(tokens), tokens, trainer.layout.mask, units)
    assert float(mean) / trainer.normalizers.structural == pytest.approx(1.0, rel=1e-5)


def images_of(trainer: Trainer) -> Tensor:
    return trainer.pool.images


def test_a_behavioral_loss_in_bf16_is_that_of_fp32_to_its_rounding(tmp_path: Path, population: Population, images: Tensor) -> None:
    """Same start, same draws: the loss's value within bf16's rounding, its gradient in float32 and in the same direction."""
    steps = {}
    for precision in ("high", "bf16"):
        trainer = Trainer(replace(config(tmp_path / precision), behavior_precision=precision, beta=0.0, gamma=0.0), population, images)
        parts = trainer.step()
        slopes = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
        assert slopes.dtype == torch.float32
        steps[precision] = float(parts["behavioral"]), slopes
    (exact, gradient), (rounded, other) = steps["high"], steps["bf16"]
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.02)
    assert float(torch.nn.functional.cosine_similarity(gradient, other, 0)) > 0.98  # 20 % apart, the bound of bf16 (engine/trial.py)


def test_no_step_runs_an_original(tmp_path: Path, population: Population, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(config(tmp_path), population, images)

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("an original was run")

    monkeypatch.setattr(engine, "forward", forbidden)
    trainer.step()
    assert trainer.cache is not None
    assert trainer.cache.served == 6 * 8


def test_structure_alone_needs_no_queries(tmp_path: Path, population: Population, images: Tensor) -> None:
    trainer = Trainer(config(tmp_path, beta=1.0), population, images)
    assert trainer.cache is None
    assert "behavioral" not in trainer.step()


def test_training_lowers_the_loss_and_every_model_is_seen(tmp_path: Path, population: Population, images: Tensor) -> None:
    seen = []
    run = train(config(tmp_path, steps=60, lr=5e-3, log_every=1), population=population, images=images, on_record=seen.append)
    assert run.finished
    assert sum(r["behavioral"] for r in seen[-10:]) < 0.8 * sum(r["behavioral"] for r in seen[:10])
    trainer = Trainer(config(tmp_path), population, images)
    rows = torch.cat([trainer.next_rows() for _ in range(3)])
    assert len(rows.unique()) == 18  # batches of one epoch share no model


def test_a_diverged_reconstruction_is_left_out_and_counted(tmp_path: Path, population: Population, images: Tensor) -> None:
    trainer = Trainer(config(tmp_path, gamma=0.0, beta=0.0, views=False), population, images)
    assert trainer.cache is not None
    trainer.cache.outputs[2] = float("nan")
    total, parts = trainer.losses(torch.tensor([1, 2, 3]), torch.arange(8))
    assert int(parts["skipped_models"]) == 1
    total.backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in trainer.model.parameters())


def test_the_callers_random_state_is_untouched(tmp_path: Path, population: Population, images: Tensor) -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()
    train(config(tmp_path, steps=2, dropout=0.1), population=population, images=images)
    assert torch.equal(before, torch.get_rng_state())


def test_a_profile_has_a_trace_and_a_table(tmp_path: Path, population: Population, images: Tensor) -> None:
    train(config(tmp_path), population=population, images=images, profiled=True)
    phases = {row["phase"]: row for row in json.loads((tmp_path / "profile" / "phases.json").read_text())}
    assert {"views", "tokenise", "encode", "decode", "detokenise", "loss", "backward", "optimise"} <= set(phases)
    assert sum(row["share"] for row in phases.values()) == pytest.approx(1.0)
    assert "traceEvents" in json.loads((tmp_path / "profile" / "trace.json").read_text())


# -- configuration -----------------------------------------------------------------------------------------------------------


def test_a_config_survives_toml(tmp_path: Path) -> None:
    wild = config(tmp_path / 'a "quoted"\\path\n', clip=None, lr=1e-5, weight_decay=3e-9, views=False)
    (tmp_path / "c.toml").write_text(wild.to_toml())
    assert TrainConfig.from_toml(tmp_path / "c.toml") == wild
    assert TrainConfig.from_toml(tmp_path / "c.toml", steps=7) == replace(wild, steps=7)
    assert TrainConfig.from_dict({**wild.to_dict(), "restart": False}) == wild  # an option of older runs, which this one did not use


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz = 3", "unknown keys ['stepz']"),
        ("steps = 'three'", "steps: expected int, got 'three'"),
        ("steps = true", "steps: expected int, got True"),
        ("lr = -1.0", "lr: expected a positive number"),
        ("lr = nan", "lr: expected float, got nan"),
        ("criterion = 'l1'", "criterion: expected one of"),
        ("beta = 1.5", "beta: expected a number in [0, 1]"),
        ("behavior_from = 1.0", "behavior_from, behavior_ramp: expected shares of less than 1 in all, got 1"),
        ("behavior_from = 0.6\nbehavior_ramp = 0.5", "behavior_from, behavior_ramp: expected shares of less than 1 in all, got 1.1"),
        (
            "behavior_of = 'deviations'\ncriterion = 'distillation'",
            "behavior_of: deviations are those of criterion mse, got 'distillation'",
        ),
        ("restart = true", "unknown keys ['restart']"),
        ("d_model = 30\nheads = 4", "d_model: expected a multiple of"),
        ("steps = ", "Invalid value"),
        ("steps = 0", "steps: expected at least 1"),
    ],
    ids=lambda v: v[:12],
)
def test_a_wrong_config_is_one_clear_error(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.toml").write_text(f"zoo = 'z'\nout = 'o'\n{text}")
    with pytest.raises(WslfastError) as caught:
        TrainConfig.from_toml(tmp_path / "c.toml")
    assert message in str(caught.value)
    assert "c.toml" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "tpu"}, "device"),
        ({"out": ""}, "out: expected a folder"),
    ],
    ids=["device", "out"],
)
def test_a_run_that_cannot_start_says_why(tmp_path: Path, population: Population, images: Tensor, changes: Any, message: str) -> None:
    with pytest.raises(WslfastError, match=message):
        train(replace(config(tmp_path), **changes), population=population, images=images)


def test_the_default_queries_are_at_most_all_that_there_are(
    tmp_path: Path, population: Population, images: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "wslfast"):
        runs = [
            train(replace(config(tmp_path / str(n)), queries=n, steps=2), population=population, images=images)
            for n in (TrainConfig.queries, 48)
        ]
    assert "queries: all 48 that there are at every step" in caplog.text
    states = [run.autoencoder.state_dict() for run in runs]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_the_papers_preset_is_the_papers(tmp_path: Path) -> None:
    paper = TrainConfig.paper("zoo", "out")
    names = ("gamma", "beta", "queries", "batch_size", "d_model", "heads", "layers", "latent", "lr", "steps", "clip", "start")
    assert [getattr(paper, name) for name in names] == [0.05, 0.1, 256, 64, 256, 8, 8, 64, 1e-5, 30_000, None, "random"]
    assert TrainConfig.from_dict({"preset": "paper", "zoo": "zoo", "out": "out"}) == paper
    (tmp_path / "c.toml").write_text('preset = "paper"\nzoo = "zoo"\nout = "out"\nlr = 1e-4\n')
    assert TrainConfig.from_toml(tmp_path / "c.toml") == replace(paper, lr=1e-4)
    assert TrainConfig.from_toml(tmp_path / "c.toml", preset="small", steps=5) == TrainConfig("zoo", "out", lr=1e-4, steps=5)
    with pytest.raises(WslfastError, match=r"preset: expected one of \('small', 'paper'\), got 'large'"):
        TrainConfig.from_dict({"preset": "large", "zoo": "zoo", "out": "out"})


# -- scrambled views -------------------------------------------------------------------------------------------------------


def test_random_permutations_make_each_view_its_own_original(tmp_path: Path, population: Population, images: Tensor) -> None:
    trainer = Trainer(config(tmp_path, permutations="random", beta=0.0, gamma=0.0, batch_size=3), population, images)
    assert trainer.config.views
    rows, queries = trainer.next_rows(), trainer.pool.draw(8, trainer.draws)
    state = trainer.views.get_state()
    _, parts = trainer.losses(rows, queries)
    trainer.views.set_state(state)
    seen = trainer._view(population.weights[rows], 3, slice(0, 3))
    assert not torch.equal(seen, population.weights[rows])
    outputs = oracle_outputs(seen, trainer.pool[queries], ARCH)
    known = oracle_outputs(population.weights[rows], trainer.pool[queries], ARCH)
    assert float((outputs - known).norm() / known.norm()) > 0.1  # not the same functions
    tokens, _, _ = trainer.layout.tokenize(seen)
    rebuilt = trainer.layout.detokenize(trainer.model.decode(trainer.model.encode(tokens)))
    expected = oracle_loss(rebuilt, trainer.pool[queries], outputs, ARCH, "mse")[0].mean() / trainer.normalizers.behavioral
    assert float(parts["behavioral"]) == pytest.approx(float(expected), rel=FP32_DEEP)


def test_each_layer_s_own_maps_have_a_rate_of_their_own(tmp_path: Path, population: Population, images: Tensor) -> None:
    """Groups as before where the rate is the same, or there are no such maps; else ten times as far in the first step of Adam."""
    for changes in ({"start": "paths"}, {"start": "random", "maps_lr": 10.0}):
        groups = Trainer(config(tmp_path, **changes), population, images).optimizer.param_groups
        assert [group["lr"] for group in groups] == [5e-4, 5e-4]
    moved = {}
    for rate in (1.0, 10.0):
        trainer = Trainer(config(tmp_path, start="paths", maps_lr=rate, weight_decay=0.0), population, images)
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        trainer.step()
        moved[rate] = {name: (p.detach() - before[name]).abs().max() for name, p in trainer.model.named_parameters()}
    for name, far in moved[10.0].items():
        assert float(far) == pytest.approx(float(moved[1.0][name]) * (10 if name.startswith("linear.") else 1), rel=1e-3), name
