"""A zoo of several architectures: one autoencoder over all, batches of one, losses and figures of each."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tolerances import FP32, FP32_DEEP

from wslfast import Architecture, Population, TrainConfig, WslfastError, batched_forward, evaluate, generate, save_zoo, train
from wslfast.cli import main
from wslfast.measure import generate_each
from wslfast.measure.evaluation import reconstruct
from wslfast.training import load_run
from wslfast.zoo import dataset_of, load_parts

ARCHES = {
    "relu": Architecture.mlp(16, (6,), 3, "relu"),
    "tanh": Architecture.mlp(16, (6,), 3, "tanh"),
    "wide": Architecture.mlp(16, (9, 5), 3),
}
SMALL: dict[str, Any] = {"queries": 8, "batch_size": 4, "d_model": 16, "heads": 2, "layers": 1, "log_every": 1}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mixed")
    rng = np.random.default_rng(0)
    np.savez(root / "images.npz", images=rng.random((60, 4, 4), dtype=np.float32), labels=np.arange(60) % 3)
    splits = ["train"] * 6 + ["val"] * 2 + ["test"] * 4
    parts = {n: Population(a, a.initial_weights(["default"] * 12, range(12)), {"split": splits}) for n, a in ARCHES.items()}
    save_zoo(parts, root / "zoo", dataset=root / "images.npz")
    return root / "zoo"


@pytest.mark.parametrize("metric", ["plain", "activation"])
@pytest.mark.parametrize("start", ["linear", "random"])
def test_one_autoencoder_over_all(zoo: Path, tmp_path: Path, start: str, metric: str) -> None:
    settings: Any = {"start": start, "coordinates": metric, "structure_metric": metric, **SMALL}
    run = train(TrainConfig(zoo=str(zoo), out=str(tmp_path / "run"), steps=6, **settings))
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6]
    loaded = load_run(tmp_path / "run")
    assert list(loaded.parts) == list(ARCHES)
    for one, other in itertools.combinations(loaded.parts.values(), 2):  # the transformers are one; of one token size and latent width
        for name, value in one.transformer_encoder.state_dict().items():
            assert torch.equal(other.transformer_encoder.state_dict()[name], value)
        assert one.layout.token_size == other.layout.token_size
        assert one.latent_mask.shape[1] == other.latent_mask.shape[1]
    for name, part in load_parts(zoo, "test").items():
        tokens = run.parts[name].layout.tokenize(part.weights).tokens
        with torch.no_grad():
            assert torch.equal(loaded.of(part.architecture)(tokens)[1], run.parts[name](tokens)[1])


def test_steps_go_by_the_numbers_of_models(zoo: Path, tmp_path: Path) -> None:
    """Three architectures of six training models each: every one has its turn in every three steps, from the first."""
    train(TrainConfig(zoo=str(zoo), out=str(tmp_path / "run"), steps=6, **SMALL))
    from wslfast.training.checkpoint import load_checkpoint

    assert load_checkpoint(tmp_path / "run")["sampler"]["taken"] == {"relu": 2, "tanh": 2, "wide": 2}
    normalizers = load_checkpoint(tmp_path / "run")["normalizers"]
    for name, part in load_parts(zoo, "train").items():
        assert normalizers[name]["structural"] == pytest.approx(float(part.weights.double().var(0, correction=0).mean()), rel=FP32)


def test_a_linear_start_reconstructs_as_the_code_of_each_architecture(zoo: Path, tmp_path: Path) -> None:
    """At step 0 every part is the closed-form code of its own architecture, whatever the others' widths are."""
    from wslfast import LinearCodec
    from wslfast.training.mixed import MixedTrainer
    from wslfast.zoo.mapped import mapped_parts

    models = mapped_parts(zoo, "train")
    config = TrainConfig(zoo=str(zoo), out=str(tmp_path / "run"), steps=1, **SMALL)
    images = {n: dataset_of(zoo, p.architecture).train_images for n, p in models.items()}
    trainer = MixedTrainer(config, models, images, None, torch.device("cpu"))
    size = max(part.layout.token_size for part in trainer.parts.values())
    for name, part in trainer.parts.items():
        population = models[name].load()
        code = LinearCodec(population, latent=config.share, token_size=size, seed=config.seed)
        torch.testing.assert_close(
            reconstruct(part.model.eval(), population.weights), reconstruct(code, population.weights), atol=FP32, rtol=FP32_DEEP
        )


def test_a_resumed_run_is_the_same_to_the_bit(zoo: Path, tmp_path: Path) -> None:
    whole = train(TrainConfig(zoo=str(zoo), out=str(tmp_path / "whole"), steps=7, **SMALL))
    config = TrainConfig(zoo=str(zoo), out=str(tmp_path / "cut"), steps=7, **SMALL)
    train(config, stop=lambda step: step == 4)
    resumed = train(config, resume=True)
    for name, part in whole.parts.items():
        other = resumed.parts[name].state_dict()
        assert all(torch.equal(other[key], value) for key, value in part.state_dict().items())


def test_figures_of_each_architecture_and_of_all(zoo: Path, tmp_path: Path) -> None:
    train(TrainConfig(zoo=str(zoo), out=str(tmp_path / "run"), steps=2, **SMALL))
    figures = evaluate(tmp_path / "run", baselines=False)["run"]
    loaded, agreed = load_run(tmp_path / "run"), []
    for name, part in load_parts(zoo, "test").items():
        images, labels = dataset_of(zoo, part.architecture).split("test")
        with torch.no_grad():
            rebuilt = reconstruct(loaded.of(part.architecture), part.weights)
            mine, theirs = (batched_forward(w, images, part.architecture).argmax(-1) for w in (part.weights, rebuilt))
        own = figures["architectures"][name]
        assert own["agreement"] == pytest.approx(float((mine == theirs).double().mean()))
        assert own["accuracy_original"] == pytest.approx(float((mine == labels).double().mean()))
        agreed.append(own["agreement"])
    assert figures["agreement"] == pytest.approx(sum(agreed) / 3)  # four test models of each
    assert figures["n_models"] == 12


def test_new_models_of_one_architecture_and_of_each(zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(TrainConfig(zoo=str(zoo), out=str(tmp_path / "run"), steps=1, **SMALL))
    made = generate(tmp_path / "run", samples=3, architecture="wide", finetune=1)
    assert made.architecture.same_network(ARCHES["wide"])
    each = generate_each(tmp_path / "run", samples=3, finetune=1, out=tmp_path / "new", split="drawn")
    assert list(each) == list(ARCHES)
    assert torch.equal(each["wide"].weights, made.weights)  # as alone, to the bit
    stored = load_parts(tmp_path / "new")
    for name, part in each.items():
        assert torch.equal(stored[name].weights, part.weights)
        assert stored[name].properties["test_acc"] == part.properties["test_acc"]
        assert sorted(stored[name].properties["split"][::2]) == ["test", "train", "val"]  # dealt out by architecture, epochs together
    assert evaluate(tmp_path / "run", tmp_path / "new", baselines=False)["run"]["n_models"] == 6  # 3 of a model's 2 epochs
    main(["generate", "--run", str(tmp_path / "run"), "--samples", "3", "--finetune", "1", "--out", str(tmp_path / "shell")])
    said = capsys.readouterr().out
    assert [line for line in said.splitlines() if line.endswith(": 3 models")] == [f"{name}: 3 models" for name in ARCHES]
    assert all(torch.equal(part.weights, each[name].weights) for name, part in load_parts(tmp_path / "shell").items())


def test_one_architecture_is_chosen_where_none_is_named(zoo: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(TrainConfig(zoo=str(zoo), out=str(tmp_path / "run"), steps=1, **SMALL))
    with caplog.at_level("INFO", logger="wslfast"):
        assert generate(tmp_path / "run", samples=3).architecture.same_network(ARCHES["relu"])
    assert "of 3 architectures, models of 'relu'" in caplog.text
    with pytest.raises(WslfastError, match="got 'thin'"):
        generate(tmp_path / "run", samples=3, architecture="thin")
    with pytest.raises(WslfastError, match="not trained on models of architecture"):
        load_run(tmp_path / "run").of(Architecture.mlp(16, (7,), 3))


def test_architectures_of_one_model_each(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As in a zoo in which every model is another network: all train, and none can be held back for a test."""
    import csv

    from wslfast.zoo import import_zoo

    code = "from torch import nn\n"
    (tmp_path / "models").mkdir()
    with open(tmp_path / "table.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file", "network"])
        for width in (3, 4, 5):
            code += (
                f"\n\ndef net{width}():\n    return nn.Sequential(nn.Flatten(), nn.Linear(16, {width}), nn.ReLU(), nn.Linear({width}, 3))\n"
            )
            net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, width), torch.nn.ReLU(), torch.nn.Linear(width, 3))
            torch.save(net.state_dict(), tmp_path / "models" / f"{width}.pt")
            rows.writerow([f"{width}.pt", f"net{width}"])
    (tmp_path / "nets.py").write_text(code)
    np.savez(tmp_path / "images.npz", images=np.random.default_rng(0).random((60, 4, 4), dtype=np.float32), labels=np.arange(60) % 3)
    networks = [f"{tmp_path}/nets.py:net{width}" for width in (3, 4, 5)]
    import_zoo(tmp_path / "models", tmp_path / "zoo", network=networks, table=tmp_path / "table.csv", dataset=tmp_path / "images.npz")
    assert "3 of 3 architectures have too few models" in caplog.text
    run = train(TrainConfig(zoo=str(tmp_path / "zoo"), out=str(tmp_path / "run"), steps=3, **SMALL))
    assert list(run.parts) == ["net3", "net4", "net5"]
    with pytest.raises(WslfastError, match="--split train"):
        evaluate(tmp_path / "run")
    assert evaluate(tmp_path / "run", split="train", baselines=False)["run"]["n_models"] == 3
    assert list(generate_each(run, samples=2)) == ["net3", "net4", "net5"]


def test_bf16_on_a_cpu_that_imitates_it_is_warned_of(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    train(TrainConfig(zoo=str(zoo), out=str(tmp_path / "run"), steps=1, precision="bf16", **SMALL))
    assert "imitates them: precision = bf16 makes" in caplog.text
