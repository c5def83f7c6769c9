"""Measured accuracy beside the zoo's own: what is warned of, once, and what is not; images standardised or as they are."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tolerances import FP32, FP64

from wslfast import Architecture, Population, TrainConfig, WslfastError, build_zoo, errors, evaluate, generate, load_zoo, train
from wslfast.measure.evaluation import compare_models
from wslfast.measure.recorded import check_recorded
from wslfast.study.ablation_file import Ablation
from wslfast.study.ablations import run_ablation
from wslfast.study.loaded_zoo import LoadedZoo, Protocol
from wslfast.testing import oracle_outputs
from wslfast.zoo import Dataset, dataset_of, export_zoo, import_zoo, load_dataset, read_manifest, save_zoo
from wslfast.zoo.manifest import MANIFEST, Manifest

ARCH = Architecture.cnn()


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "_said", set())


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images in [0, 1], a zoo whose models were trained and measured on them as they are, and the same as a ray tree without a word."""
    root = tmp_path_factory.mktemp("recorded")
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 160)
    images = np.clip(rng.random((3, 28, 28))[labels] * 0.3 + 0.1 + 0.1 * rng.standard_normal((160, 28, 28)), 0, 1).astype(np.float32)
    np.savez(root / "images.npz", images=images, labels=labels)
    raw = load_dataset(root / "images.npz", (1, 28, 28), standardise=False)
    build_zoo(raw, root / "raw", models=8, epochs=3, split=(0.5, 0.25, 0.25))
    export_zoo(root / "raw", root / "ray")
    import_zoo(root / "ray", root / "zoo", dataset=root / "images.npz", standardise=True, split=(0.5, 0.25, 0.25))
    sizes = {"queries": 8, "batch_size": 4, "d_model": 16, "heads": 2, "layers": 1}
    for name in ("raw", "zoo"):
        train(TrainConfig(zoo=str(root / name), out=str(root / f"run-{name}"), steps=1, **sizes))
    return root


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if "their test_acc says" in r.getMessage()]


def test_what_is_done_to_images_is_in_the_manifest(root: Path) -> None:
    raw, zoo = (read_manifest(root / name).provenance["dataset"] for name in ("raw", "zoo"))
    assert (raw["standardise"], zoo["standardise"]) == (False, True)
    assert raw["mean"] == zoo["mean"]
    pixels = dataset_of(root / "raw", ARCH).test_images
    assert float(pixels.min()) >= 0
    assert float(pixels.max()) <= 1
    expected = (pixels.double() - zoo["mean"][0]) / zoo["std"][0]
    torch.testing.assert_close(dataset_of(root / "zoo", ARCH).test_images.double(), expected, atol=FP32, rtol=FP32)


def test_a_manifest_of_before_means_standardised(root: Path, tmp_path: Path) -> None:
    manifest = read_manifest(root / "zoo")
    record = {name: value for name, value in manifest.provenance["dataset"].items() if name != "standardise"}
    old = replace(manifest, provenance={**manifest.provenance, "dataset": record})
    (tmp_path / MANIFEST).write_bytes(old.to_json())
    assert torch.equal(dataset_of(tmp_path, ARCH).train_images, dataset_of(root / "zoo", ARCH).train_images)
    assert "standardise" not in json.loads((tmp_path / MANIFEST).read_text())["provenance"]["dataset"]
    assert Manifest.parse((tmp_path / MANIFEST).read_bytes(), "old").provenance["dataset"] == record
    wrong = replace(manifest, provenance={**manifest.provenance, "dataset": {**record, "standardise": "no"}})
    (tmp_path / MANIFEST).write_bytes(wrong.to_json())
    with pytest.raises(WslfastError, match="its manifest says standardise 'no'; expected true or false"):
        dataset_of(tmp_path, ARCH)


def test_standardising_a_file_is_said_once(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "wslfast")
    for _ in range(2):
        load_dataset(root / "images.npz", (1, 28, 28))
        load_dataset(root / "images.npz", (1, 28, 28), standardise=False)
    standardised, raw = [r.getMessage() for r in caplog.records]
    figures = read_manifest(root / "zoo").provenance["dataset"]
    assert (
        standardised
        == f"wslfast: images.npz: images are standardised by those of the training split (mean {figures['mean'][0]:.4g}; deviation {figures['std'][0]:.4g})"
    )
    assert raw == "wslfast: images.npz: images are taken as they are, not standardised"


def _evaluate(root: Path, zoo: str) -> Any:
    return evaluate(root / f"run-{zoo}", baselines=False)["run"]["accuracy_original"]


def _generate(root: Path, zoo: str) -> Any:
    return generate(root / f"run-{zoo}", samples=2)


def _bench(root: Path, zoo: str) -> Any:
    bench = LoadedZoo(root / zoo, Protocol.quick())
    images, labels = bench.data.split("test")
    return [compare_models(bench.test, bench.test.weights, images, labels, bench.targets) for _ in range(2)]


@pytest.mark.parametrize("measure", [_evaluate, _generate, _bench], ids=["evaluate", "generate", "bench"])
def test_models_on_other_images_than_theirs_are_one_warning(
    root: Path, measure: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "wslfast")
    measure(root, "raw")
    assert warnings_of(caplog) == []
    measure(root, "zoo")
    measure(root, "zoo")
    (said,) = warnings_of(caplog)
    assert "data set 'images.npz' is taken standardised here" in said
    assert str(root / "zoo") in said
    assert [r.levelno for r in caplog.records if r.getMessage() == said] == [logging.WARNING]


def test_an_ablation_warns_once_for_all_its_cells(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "a.toml"
    base = "queries = 8\nbatch_size = 4\nd_model = 16\nheads = 2\nlayers = 1\nsteps = 1\n"
    for split in ("val", "test"):  # the zoo's test_acc says nothing of validation images
        file.write_text(f'zoo = "{root / "zoo"}"\nseeds = [0, 1]\nsplit = "{split}"\n[base]\n{base}[axis]\nbeta = [0.1, 0.5]\n')
        run_ablation(Ablation.from_toml(file), tmp_path / "out")
        assert len(warnings_of(caplog)) == (split == "test")


def test_the_figures_said_are_the_oracles(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    _evaluate(root, "zoo")
    population = load_zoo(root / "zoo", "test")
    images, labels = dataset_of(root / "zoo", ARCH).split("test")
    measured = (oracle_outputs(population.weights, images, ARCH).argmax(-1) == labels).double().mean(1)
    recorded = population.column("test_acc")
    (said,) = warnings_of(caplog)
    assert (
        f"{len(population)} models are right on {float(measured.mean()):.3f} of the test images, their test_acc says {float(recorded.mean()):.3f}"
        in said
    )
    assert f"(mean difference {float((measured - recorded).abs().mean()):.3f})" in said


def population(test_acc: list[Any]) -> Population:
    arch = Architecture.mlp(3, (2,), 2)
    return Population(arch, torch.zeros(len(test_acc), arch.num_weights), {"test_acc": test_acc})


def data(images: int = 10_000) -> Dataset:
    x, y = torch.zeros(images, 3), torch.zeros(images, dtype=torch.int64)
    return Dataset("made up", x, y, x, y, x, y, 2)


@pytest.mark.parametrize(
    ("recorded", "measured", "apart", "warned"),
    [
        ([0.6, 0.7], [0.6, 0.7], 0.0, False),
        ([0.6, 0.7], [0.604, 0.696], 0.004, False),
        ([0.6, 0.7], [0.606, 0.706], 0.006, True),
        ([0.6, 0.7], [0.7, 0.6], 0.1, True),  # the mean is the same, and every model's is another one's
        ([0.6, None, "?"], [0.6, 0.1, 0.2], 0.0, False),
        ([0.6, 0.7], [float("nan"), 0.7], 0.0, False),
        ([None, None], [0.1, 0.2], None, False),
    ],
)
def test_half_a_point(
    recorded: list[Any], measured: list[float], apart: float | None, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    found = check_recorded(population(recorded), torch.tensor(measured, dtype=torch.float64), data(), "z")
    assert found == (None if apart is None else pytest.approx(apart, abs=FP64))
    assert len(warnings_of(caplog)) == warned


def test_percent_is_named(caplog: pytest.LogCaptureFixture) -> None:
    check_recorded(population([60.0, 70.0]), torch.tensor([0.6, 0.7]), data(), "z")
    assert "percent where shares are expected" in warnings_of(caplog)[0]


def test_fewer_images_than_there_are_may_differ_by_chance(caplog: pytest.LogCaptureFixture) -> None:
    few, measured = data(400), torch.tensor([0.63, 0.67])
    check_recorded(population([0.6, 0.7]), measured, few, "z", of=10_000)
    assert warnings_of(caplog) == []
    check_recorded(population([0.6, 0.7]), measured, few, "z", of=400)
    assert len(warnings_of(caplog)) == 1


def test_without_the_property_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    arch = Architecture.mlp(3, (2,), 2)
    assert check_recorded(Population(arch, torch.zeros(2, arch.num_weights)), torch.zeros(2), data(), "z") is None
    with pytest.raises(WslfastError, match="expected 2 accuracies, got 3"):
        check_recorded(population([0.1, 0.2]), torch.zeros(3), data(), "z")


def test_a_zoo_without_results_is_measured_in_silence(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    zoo = load_zoo(root / "zoo")
    table = {name: column for name, column in zoo.properties.items() if not name.endswith("_acc")}
    provenance = dict(read_manifest(root / "zoo").provenance)
    save_zoo(Population(ARCH, zoo.weights, table), tmp_path / "zoo", splits=table["split"], provenance=provenance)
    evaluate(root / "run-zoo", tmp_path / "zoo", baselines=False)
    assert warnings_of(caplog) == []
