"""Closed-form codes as systems of an ablation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ablation_cases import read_rows, write

from wslfast import LinearCodec, load_zoo
from wslfast.codes.joint import JointCodec
from wslfast.measure.evaluation import compare_models, evaluate_code
from wslfast.study import closed_form
from wslfast.study.ablation_file import Ablation
from wslfast.study.ablations import run_ablation
from wslfast.study.loaded_zoo import evenly
from wslfast.zoo import dataset_of


def test_closed_form_codes_are_systems(tmp_path: Path, zoo: Path) -> None:
    """A cell is the code itself, fitted on the query set's images: only codes that look at queries depend on them."""
    axis = '[axis]\nsemantics = ["linear", "metric", "adaptive"]\nquery_set = ["data", "noise"]'
    file = write(tmp_path / "codes.toml", zoo, axis, seeds="[0]", base="share = 0.3")
    rows = run_ablation(Ablation.from_toml(file), tmp_path, systems=closed_form.systems())
    found = {r["variant"]: r["mean"] for r in rows if r["metric"] == "agreement"}
    assert found["semantics=linear query_set=data"] == found["semantics=linear query_set=noise"]
    for name in ("metric", "adaptive"):
        assert found[f"semantics={name} query_set=data"] != found[f"semantics={name} query_set=noise"]
    train, test = load_zoo(zoo, "train"), load_zoo(zoo, "test")
    images, labels = dataset_of(zoo, train.architecture).split("test")
    expected = evaluate_code(LinearCodec(train, latent=0.3), test, images, labels).summary()["agreement"]
    assert found["semantics=linear query_set=data"] == pytest.approx(expected)


@pytest.mark.slow
def test_codes_that_encode_by_descent_are_systems_of_a_few_models(tmp_path: Path, zoo: Path) -> None:
    """The cell of ``joint`` is that code itself; models are those that the file asks for, evenly spaced, and no probes are made."""
    axis = '[axis]\nsemantics = ["adaptive", "joint", "refined"]'
    file = write(tmp_path / "codes.toml", zoo, axis, seeds="[0]", base="share = 0.3\nsteps = 60", top="models = 1")
    rows = run_ablation(Ablation.from_toml(file), tmp_path, systems=closed_form.systems())
    found = {(r["variant"].partition("=")[2], r["metric"]): r["mean"] for r in rows}
    train, test = load_zoo(zoo, "train"), load_zoo(zoo, "test")
    data = dataset_of(zoo, train.architecture)
    order = torch.randperm(len(data.train_images), generator=torch.Generator().manual_seed(0))
    code = JointCodec(train, queries=data.train_images[order[:1024]], latent=0.3)
    few = evenly(test, 1)
    expected = compare_models(few, code.reconstruct(few.weights), *data.split("test")).summary()
    assert found["joint", "agreement"] == pytest.approx(expected["agreement"])
    assert found["joint", "latent_numbers"] == code.latent_size
    assert found["adaptive", "agreement"] != found["refined", "agreement"]
    assert all(found[name, "coding_seconds"] > 0 for name in ("adaptive", "joint", "refined"))
    assert not any(metric.startswith("probe") for _, metric in found)
    whole = write(tmp_path / "codes.toml", zoo, axis, seeds="[0]", base="share = 0.3\nsteps = 60")
    again = run_ablation(Ablation.from_toml(whole), tmp_path, systems=closed_form.systems())
    assert len(test) > 1
    assert {(r["variant"], r["mean"]) for r in again if r["metric"] == "agreement"} != {
        (r["variant"], r["mean"]) for r in rows if r["metric"] == "agreement"
    }


@pytest.mark.slow
def test_joint_codes_with_an_importance_are_systems(tmp_path: Path, zoo: Path) -> None:
    axis = '[axis]\nsemantics = ["joint-trained", "joint-untrained", "joint-fisher"]'
    file = write(tmp_path / "codes.toml", zoo, axis, seeds="[0]", base="share = 0.3\nsteps = 2\nlr = 0.03", top="models = 1")
    rows = run_ablation(Ablation.from_toml(file), tmp_path, systems=closed_form.systems())
    found = {(r["variant"].partition("=")[2], r["metric"]): r["mean"] for r in rows}
    train, few = load_zoo(zoo, "train"), evenly(load_zoo(zoo, "test"), 1)
    data = dataset_of(zoo, train.architecture)
    order = torch.randperm(len(data.train_images), generator=torch.Generator().manual_seed(0))
    code = JointCodec(train, queries=data.train_images[order[:1024]], latent=0.3, steps=0, importance=lambda outputs: outputs.softmax(1))
    expected = compare_models(few, code.reconstruct(few.weights), *data.split("test")).summary()
    assert found["joint-fisher", "agreement"] == pytest.approx(expected["agreement"])
    assert found["joint-fisher", "l2_masked"] == pytest.approx(expected["l2_masked"])
    assert len({found[name, "l2_masked"] for name in ("joint-trained", "joint-untrained", "joint-fisher")}) == 3
    assert [found[name, "steps"] for name in ("joint-trained", "joint-untrained", "joint-fisher")] == [2, 0, 0]


def test_rows_of_other_zoos_stay(tmp_path: Path, zoo: Path) -> None:
    file = write(tmp_path / "codes.toml", zoo, '[axis]\nsemantics = ["linear"]', seeds="[0]", base="share = 0.3")
    rows = run_ablation(Ablation.from_toml(file), tmp_path, systems=closed_form.systems())
    path = tmp_path / "ablations.csv"
    path.write_text(path.read_text().replace("\ndigits,", "\nelsewhere,"))
    run_ablation(Ablation.from_toml(file), tmp_path, systems=closed_form.systems())
    assert {r["zoo"] for r in read_rows(path)} == {"digits", "elsewhere"}
    assert len(read_rows(path)) == 2 * len(rows)
