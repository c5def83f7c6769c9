"""Identical weights are in one split and counted: copies of trials, data sets that overlap, models that begin alike."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wslfast import Architecture, Population, load_zoo
from wslfast.cli import main
from wslfast.zoo import Dataset, Grid, Split, build_zoo, export_zoo, import_zoo, read_manifest, save_zoo
from wslfast.zoo.identical import digests, draw

ARCH = Architecture.mlp(5, (4,), 3)
EVEN = (0.6, 0.2, 0.2)


def write_trial(folder: Path, checkpoints: dict[int, Tensor], **params: Any) -> None:
    for epoch, row in checkpoints.items():
        (folder / f"checkpoint_{epoch:06d}").mkdir(parents=True)
        state = {s.name: row[s.offset : s.stop].reshape(s.shape).clone() for s in ARCH.parameters}
        torch.save(state, folder / f"checkpoint_{epoch:06d}" / "checkpoints")
    (folder / "params.json").write_text(json.dumps(params))
    (folder / "result.json").write_text("".join(json.dumps({"epoch": e, "test_acc": e / 100}) + "\n" for e in range(60)))


def rows(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, ARCH.num_weights, generator=torch.Generator().manual_seed(seed))


def experiment(folder: Path, models: int = 20, epochs: Sequence[int] = (10, 20, 30), seed: int = 0) -> Path:
    weights = rows(models * len(epochs), seed).view(models, len(epochs), -1)
    for m in range(models):
        write_trial(folder / f"NN_tune_trainable_{m:05d}", dict(zip(epochs, weights[m])), seed=m)
    return folder


def imported(source: Path, out: Path, **options: Any) -> tuple[Any, Population]:
    done = import_zoo(source, out, architecture=ARCH, split=EVEN, **options)
    return done, load_zoo(out)


def splits_of_weights(zoo: Population) -> dict[bytes, set[str]]:
    """The splits that hold each row of weights: one each, where all is well."""
    found: dict[bytes, set[str]] = {}
    for row, split in zip(zoo.weights, zoo.properties["split"], strict=True):
        found.setdefault(row.numpy().tobytes(), set()).add(split)
    return found


def assert_one_split(zoo: Population) -> None:
    assert all(len(splits) == 1 for splits in splits_of_weights(zoo).values())


@pytest.mark.parametrize("how", ["another folder", "other names", "in another", "without results"])
def test_the_same_trials_twice_are_one_zoo(tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture) -> None:
    first = experiment(tmp_path / "src" / "a_experiment")
    _, once = imported(tmp_path / "src", tmp_path / "once")
    for i, trial in enumerate(sorted(first.iterdir())):
        place = {
            "another folder": tmp_path / "src" / "b_resumed" / trial.name,
            "other names": first / f"zz_{19 - i}",
            "in another": tmp_path / "src" / "z" / "deep" / trial.name,
        }
        copy = place.get(how, tmp_path / "src" / "b" / trial.name)
        shutil.copytree(trial, copy)
        if how == "without results":
            (copy / "result.json").unlink()
    caplog.clear()
    with caplog.at_level(logging.WARNING, "wslfast"):
        done, twice = imported(tmp_path / "src", tmp_path / "twice")
    assert (done.rows, done.models, done.skipped["identical weights"]) == (60, 20, 60)
    assert torch.equal(twice.weights, once.weights)
    assert dict(twice.properties) == dict(once.properties)  # a model's split, too, is what it was
    assert [r.getMessage() for r in caplog.records] == [
        f"zoo import: 60 checkpoints have the weights of another one, to the bit, and are left out ({tmp_path / 'twice' / 'skipped.json'})"
    ]
    provenance = read_manifest(tmp_path / "twice").provenance
    assert provenance["identical"] == {"left_out": 60, "kept": 0, "together": 0, "moved": 0}
    assert provenance["skipped"]["identical weights"] == 60
    entry = next(e for e in json.loads((tmp_path / "twice" / "skipped.json").read_text()) if e["reason"] == "identical weights")
    assert entry["detail"].startswith("the same as a_experiment")


def test_the_shell_counts_copies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_zoo(
        Population(Architecture.cnn(), Architecture.cnn().initial_weights(["kaiming_uniform"] * 6, range(6)), {"epoch": (3,) * 6}),
        tmp_path / "zoo",
        splits=Split(),
        provenance={},
    )
    export_zoo(tmp_path / "zoo", tmp_path / "src" / "a")
    shutil.copytree(tmp_path / "src" / "a", tmp_path / "src" / "b")
    main(["zoo", "import", str(tmp_path / "src"), str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "6 rows of 6 models" in said
    assert "skipped: 6 x identical weights" in said


def test_a_resumed_trial_is_one_model_with_all_its_epochs(tmp_path: Path) -> None:
    first = experiment(tmp_path / "src" / "a")
    later = rows(20, seed=1)
    for m, trial in enumerate(sorted(first.iterdir())):
        shutil.copytree(trial, tmp_path / "src" / "b" / trial.name)
        shutil.rmtree(tmp_path / "src" / "b" / trial.name / "checkpoint_000010")
        write_trial(tmp_path / "src" / "c" / trial.name, {40: later[m]}, seed=m)
        shutil.copytree(
            tmp_path / "src" / "c" / trial.name / "checkpoint_000040", tmp_path / "src" / "b" / trial.name / "checkpoint_000040"
        )
    shutil.rmtree(tmp_path / "src" / "c")
    done, zoo = imported(tmp_path / "src", tmp_path / "out")
    assert (done.rows, done.models, done.skipped["identical weights"]) == (80, 20, 40)
    epochs: dict[int, list[int]] = {}
    for model, epoch in zip(zoo.properties["model"], zoo.properties["epoch"], strict=True):
        epochs.setdefault(model, []).append(epoch)
    assert epochs == {m: [10, 20, 30, 40] for m in range(20)}
    export_zoo(tmp_path / "out", tmp_path / "ray")  # a model, an epoch, a checkpoint: it can go back


def test_a_trial_that_went_another_way_stays_in_its_copys_split(tmp_path: Path) -> None:
    """Resumed from 10, and 20 and 30 came out differently: two models, one split."""
    experiment(tmp_path / "src" / "a")
    experiment(tmp_path / "src" / "b", seed=1)
    for trial in (tmp_path / "src" / "a").iterdir():
        shutil.rmtree(tmp_path / "src" / "b" / trial.name / "checkpoint_000010")
        shutil.copytree(trial / "checkpoint_000010", tmp_path / "src" / "b" / trial.name / "checkpoint_000010")
    done, zoo = imported(tmp_path / "src", tmp_path / "out")
    assert (done.rows, done.models, done.skipped["identical weights"]) == (100, 40, 20)
    assert read_manifest(tmp_path / "out").provenance["identical"] == {"left_out": 20, "kept": 0, "together": 20, "moved": 0}
    of = dict(zip(zoo.properties["model"], zoo.properties["split"], strict=True))
    assert all(of[m] == of[m + 20] for m in range(20))
    assert set(of.values()) == {"train", "val", "test"}


def test_models_that_begin_alike_are_models_of_their_own(tmp_path: Path) -> None:
    weights, begin = rows(40).view(20, 2, -1), rows(1, seed=2)[0]
    for m in range(20):
        write_trial(tmp_path / "src" / f"t{m:02d}", {0: begin, 5: weights[m, 0], 9: weights[m, 1]}, seed=0)
    done, zoo = imported(tmp_path / "src", tmp_path / "out")
    assert (done.rows, done.models, dict(done.skipped)) == (41, 20, {"identical weights": 19})
    assert_one_split(zoo)
    of = dict(zip(zoo.properties["model"], zoo.properties["split"], strict=True))
    assert [list(of.values()).count(s) for s in ("train", "val", "test")] == [12, 4, 4]
    _, later = imported(tmp_path / "src", tmp_path / "later", epochs=[9])  # and that depends on no choice of epochs
    assert dict(zip(later.properties["model"], later.properties["split"], strict=True)) == of


def test_a_model_that_no_longer_moves_keeps_its_epochs(tmp_path: Path) -> None:
    weights = rows(6)
    for m in range(6):
        write_trial(tmp_path / "src" / f"t{m}", {1: weights[m], 2: weights[m], 3: weights[m]}, seed=m)
    shutil.copytree(tmp_path / "src" / "t5", tmp_path / "src" / "t6")
    done, zoo = imported(tmp_path / "src", tmp_path / "out")
    assert (done.rows, done.models, dict(done.skipped)) == (18, 6, {"identical weights": 3})
    assert read_manifest(tmp_path / "out").provenance["identical"] == {"left_out": 3, "kept": 12, "together": 0, "moved": 0}
    assert_one_split(zoo)


@settings(max_examples=40)
@given(st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=3), min_size=1, max_size=9), st.integers(0, 3))
def test_no_weights_are_in_two_splits(tmp_path: Path, models: list[list[int]], seed: int) -> None:
    """Trials of any checkpoints of a few: whatever they share, each row of weights is in one split, and everything is there or counted."""
    weights = rows(13)
    shutil.rmtree(tmp_path / "src", ignore_errors=True)
    for m, chosen in enumerate(models):
        write_trial(tmp_path / "src" / f"t{m}", {e: weights[i] for e, i in enumerate(chosen)}, seed=m)
    done, zoo = imported(tmp_path / "src", tmp_path / "out", seed=seed, overwrite=True)
    assert_one_split(zoo)
    assert {row.numpy().tobytes() for row in zoo.weights} == {weights[i].numpy().tobytes() for chosen in models for i in chosen}
    assert done.rows + done.skipped.get("identical weights", 0) == sum(map(len, models))


# -- pickled data sets -----------------------------------------------------------------------------------------------------


class Published:
    """Attributes of a data set object; what is read of it does not depend on its class."""

    def __init__(self, weights: Tensor, epochs: Sequence[int]) -> None:
        states = [{s.name: row[s.offset : s.stop].reshape(s.shape).clone() for s in ARCH.parameters} for row in weights]
        each = len(epochs)
        self.data = [states[i : i + each] for i in range(0, len(states), each)]
        self.epochs = [list(epochs)] * len(self.data)
        self.standardize, self.reference_config, self.properties = False, {}, {}


def test_data_sets_that_overlap(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = rows(20).view(10, 2, -1)
    half = torch.stack([weights[1, 0], rows(1, seed=3)[0]])  # model 1 again, and it went on otherwise
    torch.save(Published(weights[:6].flatten(0, 1), (10, 20)), tmp_path / "dataset_train.pt")
    torch.save(Published(torch.cat([weights[5], half]), (10, 20)), tmp_path / "dataset_val.pt")
    torch.save(Published(torch.cat([weights[0], weights[6:].flatten(0, 1)]), (10, 20)), tmp_path / "dataset_test.pt")
    with caplog.at_level(logging.WARNING, "wslfast"):
        done, zoo = imported(tmp_path, tmp_path / "out")
    assert_one_split(zoo)
    assert zoo.properties["split"] == ("train",) * 13 + ("test",) * 8  # what train has is not tested on, and val has nothing of its own
    assert dict(done.skipped) == {"identical weights": 5}
    assert read_manifest(tmp_path / "out").provenance["identical"] == {"left_out": 5, "kept": 0, "together": 1, "moved": 1}
    assert "1 checkpoints of models that are in two splits went to the first one" in caplog.text


def test_one_checkpoint_listed_twice_in_a_data_set(tmp_path: Path) -> None:
    weights = rows(4).view(2, 2, -1)
    torch.save(Published(torch.cat([weights[:, :1], weights], 1).flatten(0, 1), (10, 10, 20)), tmp_path / "zoo.pt")
    done, zoo = imported(tmp_path / "zoo.pt", tmp_path / "out")
    assert (done.rows, dict(done.skipped)) == (4, {"identical weights": 2})
    assert zoo.properties["epoch"] == (10, 20) * 2


# -- zoos that are saved and built -----------------------------------------------------------------------------------------


def test_what_is_saved_is_split_by_what_is_equal(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = torch.cat([rows(12), rows(12)])
    with caplog.at_level(logging.WARNING, "wslfast"):
        save_zoo(Population(ARCH, weights), tmp_path / "a", splits=Split(EVEN), provenance={})
    zoo = load_zoo(tmp_path / "a")
    assert torch.equal(zoo.weights, weights)  # nothing is left out of what is given
    assert_one_split(zoo)
    assert zoo.properties["split"][:12] == Split(EVEN).assign(range(12))
    assert [r.getMessage() for r in caplog.records] == [
        "zoo: 12 models share a checkpoint with another one, to the bit, and are in its split"
    ]


def test_what_is_saved_in_two_splits_by_name_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = torch.cat([rows(3), rows(3)])
    with caplog.at_level(logging.WARNING, "wslfast"):
        save_zoo(Population(ARCH, weights), tmp_path / "a", splits=["train"] * 4 + ["test"] * 2, provenance={})
        save_zoo(Population(ARCH, weights), tmp_path / "b", splits=["train"] * 6, provenance={})
    assert load_zoo(tmp_path / "a").properties["split"] == ("train",) * 4 + ("test",) * 2
    assert [r.getMessage() for r in caplog.records] == ["zoo: 2 checkpoints have weights that another split has, to the bit"]


def test_initial_weights_that_are_saved_make_no_family(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = torch.stack([rows(1)[0].expand(20, -1), rows(20, seed=1)], 1).flatten(0, 1)
    table = {"model": [m for m in range(20) for _ in range(2)], "epoch": [0, 5] * 20}
    with caplog.at_level(logging.WARNING, "wslfast"):
        save_zoo(Population(ARCH, weights, table), tmp_path / "a", splits=Split(EVEN), provenance={})
    assert load_zoo(tmp_path / "a").properties["split"] == Split(EVEN).assign(table["model"])
    (said,) = [r.getMessage() for r in caplog.records]
    assert said.endswith("checkpoints have weights that another split has, to the bit")


@pytest.mark.parametrize(
    ("keep", "grid", "models"),
    [
        ([0, 2], Grid(("kaiming_uniform",), (1e-3, 2e-3, 3e-3, 4e-3, 5e-3), (0.0, 1e-3), (7,)), 10),
        ([0], Grid(("kaiming_uniform", "xavier_normal"), (1e-3, 2e-3, 3e-3), (0.0,), (7, 8)), 12),
        ([1, 2], Grid(("kaiming_uniform",), (0.0, 1e-3), (0.0, 1e-3, 1e-2), (7, 8)), 12),  # without learning nobody moves
    ],
    ids=["initial weights beside others", "initial weights alone", "no learning"],
)  # fmt: skip
def test_a_built_zoo_has_no_weights_in_two_splits(
    tmp_path: Path, keep: list[int], grid: Grid, models: int, caplog: pytest.LogCaptureFixture
) -> None:
    images = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(30) % 3
    data = Dataset("noise", images, labels, images, labels, images, labels, 3)
    with caplog.at_level(logging.WARNING, "wslfast"):
        made = build_zoo(data, tmp_path / "zoo", architecture=ARCH, models=models, epochs=2, keep=keep, grid=grid, split=EVEN)
    zoo = load_zoo(tmp_path / "zoo")
    assert dict(zoo.properties) == dict(made.properties)
    assert torch.equal(zoo.weights, made.weights)
    assert_one_split(zoo)
    dropped = read_manifest(tmp_path / "zoo").provenance["dropped_rows"]
    assert dropped["identical"] == models * len(keep) - len(zoo)
    assert (f"dropped {dropped['identical']} of {models * len(keep)} checkpoints with weights that another split has" in caplog.text) == (
        dropped["identical"] > 0
    )
    if keep == [0, 2]:
        assert zoo.properties["epoch"].count(2) == models  # trained checkpoints all stay, in all splits
        assert dropped["identical"] > 0
        assert set(zoo.properties["split"]) == {"train", "val", "test"}


def test_bits_count_and_not_values() -> None:
    zero = torch.zeros(1, 4)
    assert digests(zero) != digests(-zero)
    assert digests(torch.ones(2, 8)[:, ::2]) == digests(torch.ones(2, 4))


def test_families_are_transitive_and_independent_of_order() -> None:
    a, b, c, d = rows(4)
    weights, models = torch.stack([a, b, b, c, c, d, d]), [3, 3, 1, 1, 0, 0, 2]
    for order in ([0, 1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1, 0], [4, 1, 6, 3, 0, 5, 2]):
        drawn = draw(Split((0.5, 0.0, 0.5), 1), weights[order], [models[i] for i in order], None)
        assert len(set(drawn.names)) == 1
        assert drawn.copies == 3
        assert not any(drawn.elsewhere)
