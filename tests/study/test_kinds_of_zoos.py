"""The page of zoos of several architectures, and of networks whose answers are no classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ablation_cases import read_rows, write
from torch import nn

from wslfast import Population, TrainConfig, WslfastError, load_zoo, save_zoo, train
from wslfast.cli import main
from wslfast.measure.results import read_results
from wslfast.study.ablation_file import Ablation
from wslfast.study.ablations import run_ablation
from wslfast.study.loaded_zoo import LoadedZoo, Protocol
from wslfast.study.study import study
from wslfast.testing import oracle_outputs
from wslfast.training import load_run
from wslfast.zoo import load_parts

pytest.importorskip("matplotlib")
FEW = Protocol(shares=(), models=8, train_models=40, images=20, samples=4, bandwidths=(0.1,), finetune_epochs=1, finetune_images=40)
SIZES: dict[str, Any] = {"steps": 2, "queries": 8, "batch_size": 4, "d_model": 16, "heads": 2, "layers": 1, "log_every": 1}


def _modules(k: int, *layers: Any) -> list[nn.Module]:
    modules = []
    for seed in range(k):
        torch.manual_seed(seed)
        modules.append(nn.Sequential(*(make() for make in layers)))
    return modules


def _data(folder: Path, classes: bool) -> Path:
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for split, n in (("train", 60), ("val", 20), ("test", 20)):
        x = rng.normal(size=(n, 5)).astype(np.float32)
        arrays[f"{split}_images"] = x
        arrays[f"{split}_labels"] = (x[:, 0] > 0).astype(int) + (x[:, 1] > 0) if classes else x[:, :3] ** 2
    np.savez(folder / "table.npz", **arrays)
    return folder / "table.npz"


def _split(k: int) -> list[str]:
    return ["train"] * (k - 4) + ["val"] * 2 + ["test"] * 2


def test_each_architecture_has_a_block(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three architectures, one of them without test models: two blocks and a row each, its figures those of its own models."""
    parts = {}
    for i, act in enumerate((nn.ReLU, nn.Tanh, nn.ELU)):
        modules = _modules(8, lambda i=i: nn.Linear(5, 6 + i), act, lambda i=i: nn.Linear(6 + i, 3))
        splits = _split(8) if i < 2 else ["train"] * 8
        parts[act.__name__] = Population.from_modules(modules, (5,), {"split": splits})
    save_zoo(parts, tmp_path / "zoo", dataset=_data(tmp_path, True))
    train(TrainConfig(zoo=str(tmp_path / "zoo"), out=str(tmp_path / "run"), **SIZES))
    main(["evaluate", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "cli"), "--quick", "--no-zero-layer"])
    assert "left out, as they have no train or no test models: ELU" in capsys.readouterr().out
    study(tmp_path / "zoo", [tmp_path / "run"], tmp_path / "out", protocol=FEW)
    found = read_results(tmp_path / "out")
    assert found.zoos == [f"table.npz, {name}" for name in ("ReLU", "Tanh")]
    run, test = load_run(tmp_path / "run"), load_parts(tmp_path / "zoo", "test")
    x = torch.from_numpy(np.load(tmp_path / "table.npz")["test_images"])
    for zoo in found.zoos:
        assert {"run", "run-zero-layer"} <= set(found.variants(zoo, "run"))
        part = test[zoo.rpartition(" ")[2]]
        own = run.only(part.architecture).autoencoder
        tokens = own.layout.tokenize(part.weights).tokens
        rebuilt = own.layout.detokenize(own.decode(own.encode(tokens)))
        o, r = (oracle_outputs(w.detach(), x, part.architecture).argmax(-1) for w in (part.weights, rebuilt))
        assert found.mean(zoo, "run", "agreement") == pytest.approx(float((o == r).double().mean()), abs=1e-5)
        assert found.about(zoo, "zoo")["checkpoints"] == {"train": 4, "val": 2, "test": 2}
    html = (tmp_path / "out" / "report.html").read_text()
    assert all(f"<h3>{zoo}</h3>" in html for zoo in found.zoos)
    with pytest.raises(WslfastError, match="it is a zoo of several architectures"):
        LoadedZoo(tmp_path / "zoo", FEW)


def test_more_than_a_sentence_can_list_are_summed_up(tmp_path: Path) -> None:
    from wslfast.measure.results import Unit, write_tables
    from wslfast.page import headline, render
    from wslfast.page.finding import title

    values = {"a": 0.5, "b": 0.6, "c": 0.7, "d": 0.8, "e": 0.9}
    units = []
    for zoo, value in values.items():
        units.append(Unit(zoo, "zoo", 0, "zoo", "", {"classes": 3}, {}, {}))
        metrics = {"agreement": (value, value, None), "agreement_margin": (0.3, 0.3, None), "l2_masked": (1.0, 1.0, None)}
        units.append(Unit(zoo, "mine", 0, "run", "", {"losses": "S+B"}, metrics, {}))
    write_tables(tmp_path, units, {})
    results = read_results(tmp_path)
    words = "Over 5 zoos, reconstructions by “mine” agree with their originals on 70.0 % of images in the mean: from 50.0 % on a to 90.0 % on e."
    assert headline(results) == words
    assert title(results) == "“mine” on 5 zoos"
    assert words in render(results)
    units.append(Unit("waves", "zoo", 0, "zoo", "", {"classes": 0}, {}, {}))  # decibels are not added to shares
    units.append(Unit("waves", "mine", 0, "run", "", {"losses": "S+B"}, {"psnr": (31.0, 31.0, None), "l2_masked": (1.0, 1.0, None)}, {}))
    write_tables(tmp_path, units, {})
    assert headline(read_results(tmp_path)) == words.replace("Over 5", "Over 5 of 6")
    for zoo in values:  # a run that is worse on these, and better by decibels, is not the best
        metrics = {"agreement": (0.4, 0.4, None), "agreement_margin": (0.3, 0.3, None), "l2_masked": (1.0, 1.0, None)}
        units.append(Unit(zoo, "other", 0, "run", "", {"losses": "S+B"}, metrics, {}))
    units.append(Unit("waves", "other", 0, "run", "", {"losses": "S+B"}, {"psnr": (90.0, 90.0, None), "l2_masked": (1.0, 1.0, None)}, {}))
    write_tables(tmp_path, units, {})
    assert headline(read_results(tmp_path)) == words.replace("Over 5", "Over 5 of 6")


@pytest.mark.parametrize("outputs", [1, 3])
def test_answers_that_are_no_classes(tmp_path: Path, outputs: int, capsys: pytest.CaptureFixture[str]) -> None:
    """The page compares outputs: PSNR, variance kept, identified; nothing of accuracy, and no probe or new model judged by it."""
    modules = _modules(12, lambda: nn.Linear(5, 6), nn.Tanh, lambda: nn.Linear(6, outputs))
    save_zoo(Population.from_modules(modules, (5,), {"split": _split(12)}), tmp_path / "zoo", dataset=_data(tmp_path, False))
    train(TrainConfig(zoo=str(tmp_path / "zoo"), out=str(tmp_path / "run"), **SIZES))
    main(["evaluate", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--quick"])
    assert "PSNR" in capsys.readouterr().out
    found = read_results(tmp_path / "out")
    assert found.measure("table.npz") == "psnr"
    metrics = {row["metric"] for row in found.rows}
    assert {"psnr", "explained_variance", "identified", "l2_masked", "output_l2"} <= metrics
    assert not any(name.startswith(("accuracy", "probe", "generated", "best")) for name in metrics)
    assert ("agreement" in metrics) is (outputs > 1)
    zoo, run = load_zoo(tmp_path / "zoo", "test"), load_run(tmp_path / "run").autoencoder
    rebuilt = run.layout.detokenize(run.decode(run.encode(run.layout.tokenize(zoo.weights).tokens))).detach()
    x = torch.from_numpy(np.load(tmp_path / "table.npz")["test_images"])
    o, r = (oracle_outputs(w, x, zoo.architecture).double() for w in (zoo.weights, rebuilt))
    psnr = 10 * torch.log10((o.max() - o.min()) ** 2 / (o - r).square().flatten(1).mean(1))
    assert found.mean("table.npz", "run", "psnr") == pytest.approx(float(psnr.mean()), rel=1e-4)
    html = (tmp_path / "out" / "report.html").read_text()
    assert "Outputs against the originals" in html
    assert f"{float(psnr.mean()):.1f} dB" in html
    assert "New models</h2>" not in html
    assert "accuracy" not in html.lower()


def test_an_ablation_of_answers_that_are_no_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One number a query is no class that is always right: an ablation, too, holds outputs against outputs."""
    modules = _modules(12, lambda: nn.Linear(5, 6), nn.Tanh, lambda: nn.Linear(6, 1))
    save_zoo(Population.from_modules(modules, (5,), {"split": _split(12)}), tmp_path / "zoo", dataset=_data(tmp_path, False))
    file = write(tmp_path / "a.toml", tmp_path / "zoo", "[axis]\nbeta = [0.5]", seeds="[0]")
    main(["ablate", str(file), "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "psnr" in said
    assert "accuracy" not in said
    rows = {row["metric"]: row for row in read_rows(tmp_path / "out" / "ablations.csv")}
    assert not any(name.startswith(("accuracy", "agreement", "probe")) for name in rows)
    (cell,) = (tmp_path / "out" / "cells").iterdir()
    zoo, run = load_zoo(tmp_path / "zoo", "test"), load_run(cell).autoencoder
    rebuilt = run.layout.detokenize(run.decode(run.encode(run.layout.tokenize(zoo.weights).tokens))).detach()
    x = torch.from_numpy(np.load(tmp_path / "table.npz")["test_images"])
    o, r = (oracle_outputs(w, x, zoo.architecture).double() for w in (zoo.weights, rebuilt))
    psnr = 10 * torch.log10((o.max() - o.min()) ** 2 / (o - r).square().flatten(1).mean(1))
    assert rows["psnr"]["mean"] == pytest.approx(float(psnr.mean()), rel=1e-4)
    sampled = write(tmp_path / "b.toml", tmp_path / "zoo", "[axis]\nbeta = [0.5]", top="generate = true")
    with pytest.raises(WslfastError, match="generate: new models are judged by accuracy"):
        run_ablation(Ablation.from_toml(sampled), tmp_path / "out")
