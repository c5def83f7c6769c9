"""Files that an older version wrote still load, with the values that it read from them (tests/data/before_the_move/make.py made them)."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import FP32, FP32_AMPLIFIED

import wslfast
from wslfast.measure.results import read_results, read_units
from wslfast.training import load_run

FOLDER = Path(__file__).parent / "data" / "before_the_move"
EXPECTED: dict[str, Any] = json.loads((FOLDER / "expected.json").read_text())


def close(values: Any, expected: Any) -> bool:
    """Equal up to the rounding of another processor or BLAS."""
    values, expected = torch.as_tensor(values, dtype=torch.float64), torch.as_tensor(expected, dtype=torch.float64)
    return values.shape == expected.shape and bool((values - expected).norm() <= 1e-4 * expected.norm())


def test_an_older_zoo_loads_with_its_values() -> None:
    zoo = wslfast.load_zoo(FOLDER / "zoo")
    written = json.loads((FOLDER / "zoo" / "manifest.json").read_text())["properties"]
    assert {name: list(column) for name, column in zoo.properties.items()} == written
    assert len(wslfast.load_zoo(FOLDER / "zoo", "test")) == written["split"].count("test")
    assert zoo.weights.sum(1).tolist() == pytest.approx(EXPECTED["zoo"]["weights"], rel=FP32)
    queries = torch.linspace(-1, 1, 32).view(2, 1, 4, 4)
    assert close(wslfast.batched_forward(zoo, queries, zoo.architecture)[:, 0], EXPECTED["zoo"]["outputs"])


def test_an_older_run_loads_and_encodes_as_it_did() -> None:
    run, zoo = load_run(FOLDER / "run"), wslfast.load_zoo(FOLDER / "zoo")
    assert (run.config.steps, run.config.d_model, run.config.start) == (2, 4, "random")
    with torch.no_grad():
        latents = run.autoencoder.encode(run.autoencoder.layout.tokenize(zoo.weights).tokens)
    assert close(latents.sum((1, 2)), EXPECTED["run"]["latents"])


def test_an_older_run_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The third step is the one that the older version took."""
    for name in ("zoo", "run"):
        shutil.copytree(FOLDER / name, tmp_path / name)
    shutil.copy(FOLDER / "images.npz", tmp_path)
    monkeypatch.chdir(tmp_path)
    config = wslfast.TrainConfig.from_toml("run/config.toml")
    wslfast.train(replace(config, steps=3), resume=True)
    first, second, third = (json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines())
    assert [first["loss"], second["loss"]] == [step["loss"] for step in EXPECTED["run"]["losses"]]
    for name, value in EXPECTED["run"]["a third step"].items():
        assert third[name] == pytest.approx(value, rel=FP32_AMPLIFIED), name


def test_older_results_load_and_are_drawn(tmp_path: Path) -> None:
    results = read_results(FOLDER / "results")
    assert {v: results.value("tiny", v, "agreement") for v in results.variants("tiny")} == EXPECTED["results"]
    assert results.value("tiny", "run", "latent_numbers") == [10]
    units = {unit.variant: unit for unit in read_units(FOLDER / "results")}
    assert set(units) == {"zoo", "run", "linear-77"}
    assert units["run"].metrics["l2_masked"][1] == pytest.approx(1.90444, rel=FP32)
    assert len(units["run"].tables["models"]) == 4
    pytest.importorskip("matplotlib")
    from wslfast.study.study import report

    shutil.copytree(FOLDER / "results", tmp_path / "results")
    assert "linear-77" in report(tmp_path / "results").read_text()
