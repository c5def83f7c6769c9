"""Published zoos: what is read, what is left out and why, that nothing of a file is run, and the way back."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import struct
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pickled import Calls, as_archive, honest_file, hostile_programs
from tolerances import FP32, FP32_ROUNDING
from torch import Tensor, nn

from wslfast import Architecture, Population, TokenLayout, WslfastError, load_zoo
from wslfast.cli import main
from wslfast.safe.inert import InertFile, StoredTensor, Stub
from wslfast.zoo import export_zoo, import_zoo, load_parts, read_manifest, save_zoo
from wslfast.zoo.importers.recognise import recognise
from wslfast.zoo.splits import Split

ARCH = Architecture.cnn()


def population(k: int = 6, epochs: tuple[int, ...] = (0, 2, 5), arch: Architecture = ARCH) -> Population:
    rows = [(m, e) for m in range(k) for e in epochs]
    weights = arch.initial_weights(["kaiming_uniform"] * len(rows), range(len(rows)))
    accuracy = tuple(0.1 + 0.01 * i for i in range(len(rows)))
    table: dict[str, tuple[Any, ...]] = {
        "model": tuple(m for m, _ in rows),
        "epoch": tuple(e for _, e in rows),
        "train_acc": accuracy,
        "test_acc": tuple(a / 2 for a in accuracy),
        "ggap": tuple(a - a / 2 for a in accuracy),
        "init_type": ("uniform",) * len(rows),
        "lr": (1e-3,) * len(rows),
        "wd": (0.0,) * len(rows),
        "seed": tuple(m for m, _ in rows),
    }
    return Population(arch, weights, table)


def _restate(trial: Path, **settings: Any) -> None:
    """Change a trial's settings; None takes one away."""
    config = json.loads((trial / "params.json").read_text()) | settings
    (trial / "params.json").write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    save_zoo(population(), tmp_path / "zoo", splits=Split((0.5, 0.25, 0.25), 7), provenance={})
    export_zoo(tmp_path / "zoo", tmp_path / "ray")
    return tmp_path / "ray"


# -- ray trees ---------------------------------------------------------------------------------------------------------


def test_there_and_back_is_bit_equal(tmp_path: Path, tree: Path) -> None:
    done = import_zoo(tree, tmp_path / "back", split=(0.5, 0.25, 0.25), seed=7)
    a, b = load_zoo(tmp_path / "zoo"), load_zoo(tmp_path / "back")
    assert (done.rows, done.models, dict(done.skipped)) == (18, 6, {})
    assert torch.equal(a.weights, b.weights)
    assert a.architecture.to_dict() == b.architecture.to_dict()
    for name, column in a.properties.items():
        assert column == b.properties[name], name
    assert json.loads((tmp_path / "back" / "skipped.json").read_text()) == []


def test_what_the_published_layout_says_is_what_is_read(tmp_path: Path) -> None:
    """A tree written by hand: both spellings of checkpoint folders, a prefix of older zoos, a folder in between, a nested config."""
    weights = population(2, (0, 20)).state_dicts()
    for number, (name, spelling) in enumerate([("NN_tune_trainable_ab_00001_1", "checkpoint_{:06d}"), ("tune_zoo_x", "checkpoint_{}")]):
        trial = tmp_path / "src" / "experiment" / name
        for i, epoch in enumerate((0, 20)):
            (trial / spelling.format(epoch)).mkdir(parents=True)
            torch.save(weights[2 * number + i], trial / spelling.format(epoch) / "checkpoints")
            torch.save({"state": {}}, trial / spelling.format(epoch) / "optimizer")
        (trial / "params.json").write_text(json.dumps({"model::type": "CNN", "model::nlin": "tanh", "optim::lr": 1e-4, "seed": number}))
        lines = [{"training_iteration": e, "train_acc": e / 100, "test_acc": e / 200, "config": {"optim::lr": 1e-4}} for e in range(21)]
        (trial / "result.json").write_text("\n".join(map(json.dumps, lines)) + "\n")
    done = import_zoo(tmp_path / "src", tmp_path / "out", split=(1.0, 0.0, 0.0))
    zoo = load_zoo(tmp_path / "out")
    assert done.architecture.to_dict() == Architecture.cnn(activation="tanh").to_dict()
    assert zoo.properties["epoch"] == (0, 20, 0, 20)
    assert zoo.properties["test_acc"] == (0.0, 0.1, 0.0, 0.1)
    assert zoo.properties["ggap"] == (0.0, 0.1, 0.0, 0.1)
    assert zoo.properties["name"][::2] == ("NN_tune_trainable_ab_00001_1", "tune_zoo_x")
    assert torch.equal(zoo.weights, population(2, (0, 20)).weights)
    only = import_zoo(tmp_path / "src", tmp_path / "only", epochs=[20, 30])
    assert (only.rows, dict(only.skipped)) == (2, {"epoch missing": 2})


def _spoil(tree: Path, how: str) -> None:
    trial = tree / "NN_tune_trainable_00001"
    file = trial / "checkpoint_000002" / "checkpoints"
    state = population().state_dict(4)
    match how:
        case "not finite":
            state["module_list.0.weight"][0, 0, 0, 0] = float("nan")
            torch.save(state, file)
        case "weight above threshold":
            state["module_list.0.bias"][0] = -2e4
            torch.save(state, file)
        case "another architecture":
            torch.save(Population(Architecture.cnn2(), torch.zeros(1, 3047)).state_dict(0), file)
        case "unreadable checkpoint":
            file.write_bytes(file.read_bytes()[:-300])
        case "no weights":
            file.unlink()
        case "no checkpoints":
            for epoch in (0, 2, 5):
                (trial / f"checkpoint_{epoch:06d}" / "checkpoints").unlink()
                (trial / f"checkpoint_{epoch:06d}").rmdir()
        case "no params.json" | "no result.json":
            (trial / how.removeprefix("no ")).unlink()
        case "unreadable params.json":
            (trial / "params.json").write_text("[1, 2")
        case "unreadable line of result.json":
            (trial / "result.json").write_text((trial / "result.json").read_text() + '{"training_iteration": 6, "trai')


@pytest.mark.parametrize(
    ("how", "rows"),
    [
        ("not finite", 17), ("weight above threshold", 17), ("another architecture", 17), ("unreadable checkpoint", 17), ("no weights", 17),
        ("no checkpoints", 15), ("no params.json", 18), ("no result.json", 18), ("unreadable params.json", 18),
        ("unreadable line of result.json", 18),
    ],
)  # fmt: skip
def test_holes_are_left_out_and_counted(tmp_path: Path, tree: Path, how: str, rows: int) -> None:
    _spoil(tree, how)
    done = import_zoo(tree, tmp_path / "out")
    assert (done.rows, dict(done.skipped)) == (rows, {how: 1})
    entries = json.loads((tmp_path / "out" / "skipped.json").read_text())
    assert [e["reason"] for e in entries] == [how]
    assert entries[0]["where"].startswith("NN_tune_trainable_00001")
    whole, zoo = population(), load_zoo(tmp_path / "out")
    kept = {(m, e): i for i, (m, e) in enumerate(zip(whole.properties["model"], whole.properties["epoch"], strict=True))}
    index = [kept[pair] for pair in zip(zoo.properties["model"], zoo.properties["epoch"], strict=True)]
    assert torch.equal(zoo.weights, whole.weights[index])


def test_another_activation_is_another_architecture_of_the_same_zoo(tmp_path: Path, tree: Path) -> None:
    for trial in ("NN_tune_trainable_00001", "NN_tune_trainable_00004"):
        _restate(tree / trial, **{"model::nlin": "tanh"})
    done = import_zoo(tree, tmp_path / "both")
    assert (done.models, list(done.architectures), dict(done.skipped)) == (6, ["cnn relu", "cnn tanh"], {})
    parts, whole = load_parts(tmp_path / "both"), population().weights.view(6, 3, -1)
    assert torch.equal(parts["cnn tanh"].weights, whole[[1, 4]].flatten(0, 1))
    assert torch.equal(parts["cnn relu"].weights, whole[[0, 2, 3, 5]].flatten(0, 1))
    assert parts["cnn tanh"].architecture == Architecture.cnn(1, "tanh")
    done = import_zoo(tree, tmp_path / "tanh", architecture=Architecture.cnn(1, "tanh"))
    assert (done.models, dict(done.skipped)) == (2, {"another architecture": 12})
    assert "expected activation tanh, got 'relu'" in (tmp_path / "tanh" / "skipped.json").read_text()


def test_an_activation_that_is_not_stated_is_that_of_the_others(tmp_path: Path, tree: Path) -> None:
    trials = sorted(tree.iterdir())
    for trial in trials:
        _restate(trial, **{"model::nlin": "tanh"})
    (trials[0] / "params.json").unlink()
    file = trials[0] / "result.json"
    results = [{name: v for name, v in json.loads(line).items() if name != "config"} for line in file.read_text().splitlines()]
    file.write_text("\n".join(map(json.dumps, results)))
    done = import_zoo(tree, tmp_path / "a")
    assert done.architecture == Architecture.cnn(1, "tanh")
    assert dict(done.skipped) == {"no params.json": 1}
    for trial in trials[1:]:
        _restate(trial, **{"model::nlin": None})
    done = import_zoo(tree, tmp_path / "b")
    assert (done.rows, done.architecture) == (18, ARCH)
    assert dict(done.skipped) == {"no params.json": 1, "activation not stated": 1}
    config = {"model::type": "CNN", "model::nlin": "gelu", "model::channels_in": 1}  # ray repeats the settings in every line
    file.write_text("\n".join(json.dumps(r | {"config": config}) for r in results))
    assert import_zoo(tree, tmp_path / "c").architecture == Architecture.cnn(1, "gelu")


def test_the_threshold_is_the_callers(tmp_path: Path, tree: Path) -> None:
    largest = float(population().weights.abs().max())
    assert import_zoo(tree, tmp_path / "a", threshold=largest).rows == 18
    assert import_zoo(tree, tmp_path / "b", threshold=0.99 * largest).rows < 18


def test_an_explicit_split_does_not_depend_on_the_listing(tmp_path: Path, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import_zoo(tree, tmp_path / "a", seed=3)
    real = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: sorted(real(path), reverse=True))
    import_zoo(tree, tmp_path / "b", seed=3)
    a, b = load_zoo(tmp_path / "a"), load_zoo(tmp_path / "b")
    assert dict(a.properties) == dict(b.properties)
    assert torch.equal(a.weights, b.weights)


def test_a_models_split_depends_on_nothing_that_was_left_out(tmp_path: Path, tree: Path) -> None:
    shares = {"split": (0.5, 0.25, 0.25), "seed": 3}
    for file in tree.rglob("result.json"):  # as of other people: an export of ours says which split each model is in
        file.write_text(file.read_text().replace('"split"', '"other"'))
    import_zoo(tree, tmp_path / "all", **shares)  # type: ignore[arg-type]
    whole = dict(zip(load_zoo(tmp_path / "all").properties["name"], load_zoo(tmp_path / "all").properties["split"]))
    gone = next(name for name, split in whole.items() if split == "train")  # train has two more
    (tree / gone / "checkpoint_000005" / "checkpoints").unlink()
    import_zoo(tree, tmp_path / "last", epochs=[5], **shares)  # type: ignore[arg-type]
    last = dict(zip(load_zoo(tmp_path / "last").properties["name"], load_zoo(tmp_path / "last").properties["split"]))
    assert last == {name: split for name, split in whole.items() if name != gone}


def test_no_split_is_emptied_by_what_was_left_out(tmp_path: Path, tree: Path) -> None:
    shares = {"split": (0.5, 0.25, 0.25), "seed": 3}
    for file in tree.rglob("result.json"):  # as of other people: an export of ours says which split each model is in
        file.write_text(file.read_text().replace('"split"', '"other"'))
    import_zoo(tree, tmp_path / "all", **shares)  # type: ignore[arg-type]
    zoo = load_zoo(tmp_path / "all")
    for name in {n for n, split in zip(zoo.properties["name"], zoo.properties["split"]) if split == "val"}:
        for epoch in (0, 2, 5):
            (tree / name / f"checkpoint_{epoch:06d}" / "checkpoints").unlink()
    import_zoo(tree, tmp_path / "rest", **shares)  # type: ignore[arg-type]
    assert set(load_zoo(tmp_path / "rest").properties["split"]) == {"train", "val", "test"}


def test_two_folders_of_one_epoch_and_names_that_are_none(tmp_path: Path, tree: Path) -> None:
    trial = tree / "NN_tune_trainable_00001"
    other = population(7).state_dict(18)
    (trial / "checkpoint_2").mkdir()
    torch.save(other, trial / "checkpoint_2" / "checkpoints")  # the published loaders look for this one first
    (trial / "checkpoint_-00001").mkdir()
    done = import_zoo(tree, tmp_path / "out", split=(1.0, 0.0, 0.0))
    assert (done.rows, dict(done.skipped)) == (18, {"epoch twice": 1, "not an epoch": 1})
    assert torch.equal(load_zoo(tmp_path / "out").weights[4], population(7).weights[18])


def test_no_threshold_is_the_published_default(tmp_path: Path, tree: Path) -> None:
    _spoil(tree, "weight above threshold")
    assert import_zoo(tree, tmp_path / "out", threshold=float("inf")).rows == 18
    assert read_manifest(tmp_path / "out").provenance["threshold"] is None


def test_links_are_not_followed(tmp_path: Path, tree: Path) -> None:
    (tree / "loop").symlink_to(tree)
    (tree / "NN_tune_trainable_00009").symlink_to(tree / "NN_tune_trainable_00000")
    done = import_zoo(tree, tmp_path / "out")
    assert (done.models, dict(done.skipped)) == (6, {"a link to a folder": 2})


def test_trials_that_never_began_are_counted(tmp_path: Path, tree: Path) -> None:
    (tree / "NN_tune_trainable_00007").mkdir()
    (tree / "NN_tune_trainable_00008").mkdir()
    (tree / "NN_tune_trainable_00008" / "error.txt").write_text("CUDA out of memory")
    (tree / "notes").mkdir()
    deep = tree.joinpath(*"abcdefghij")
    deep.mkdir(parents=True)
    done = import_zoo(tree, tmp_path / "out")
    assert (done.models, dict(done.skipped)) == (6, {"no checkpoints": 2, "too deep": 1})


def test_trials_come_before_the_data_sets_made_of_them(tmp_path: Path, tree: Path) -> None:
    for split in ("train", "test"):
        (tree / f"dataset_{split}.pt").write_bytes(b"never opened")
    done = import_zoo(tree, tmp_path / "out")
    assert (done.rows, dict(done.skipped)) == (18, {"a data set beside trials": 2})
    with pytest.raises(WslfastError, match=r"dataset_test\.pt"):
        import_zoo(tree / "dataset_test.pt", tmp_path / "other")


def test_shards_are_written_as_they_fill(tmp_path: Path, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wslfast.zoo.importers.rows.SHARD_BYTES", 5 * 4 * 2464)
    import_zoo(tree, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("shard-*.safetensors"))) == 4
    assert torch.equal(load_zoo(tmp_path / "out").weights, population().weights)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "nowhere"}, "no such file or folder"),
        ({"source": "empty"}, r"no usable checkpoint \(no trials"),
        ({"epochs": [1.5]}, "epochs: expected integers"),
        ({"epochs": [77]}, r"no usable checkpoint \(epoch missing: 6\)"),
        ({"threshold": 0.0}, "threshold: expected a positive"),
        ({"split": (1.0, 1.0, 1.0)}, "split: expected three shares"),
        ({"architecture": Architecture.cnn3()}, r"no usable checkpoint \(another architecture: 18\)"),
        ({"dataset": "no-such.npz"}, "no-such.npz"),
    ],
    ids=["nowhere", "empty", "epochs", "no-such-epoch", "threshold", "split", "architecture", "dataset"],
)  # fmt: skip
def test_what_cannot_be_imported_is_one_clear_error(tmp_path: Path, tree: Path, arguments: dict[str, Any], message: str) -> None:
    (tmp_path / "empty").mkdir()
    source = tmp_path / arguments.pop("source", "ray")
    with pytest.raises(WslfastError, match=message):
        import_zoo(source, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_a_zoo_that_is_there_is_kept_unless_asked(tmp_path: Path, tree: Path) -> None:
    import_zoo(tree, tmp_path / "out", epochs=[0])
    with pytest.raises(WslfastError, match="there is a zoo already"):
        import_zoo(tree, tmp_path / "out")
    assert import_zoo(tree, tmp_path / "out", overwrite=True).rows == len(load_zoo(tmp_path / "out")) == 18


# -- recognising ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arch",
    [
        Architecture.cnn(), Architecture.cnn(3, "gelu", 0.2), Architecture.cnn2(), Architecture.cnn3(1, "tanh"), Architecture.lenet5(3, "silu", 0.1),
        Architecture.mlp(), Architecture.resnet18(width=8),
    ],
    ids=lambda a: a.name,
)  # fmt: skip
def test_architectures_are_recognised_from_their_config_and_shapes(tmp_path: Path, arch: Architecture) -> None:
    weights = 0.1 * torch.rand(2, arch.num_weights)
    save_zoo(Population(arch, weights, {"model": (0, 1), "epoch": (3, 3)}), tmp_path / "zoo", splits=("train", "test"), provenance={})
    export_zoo(tmp_path / "zoo", tmp_path / "ray")
    done = import_zoo(tmp_path / "ray", tmp_path / "back")
    assert done.architecture.to_dict() == arch.to_dict()
    assert torch.equal(load_zoo(tmp_path / "back").weights, weights)


def test_without_a_config_the_shapes_decide() -> None:
    for arch in (Architecture.cnn2(), Architecture.cnn3(), Architecture.lenet5(), Architecture.cnn(3)):
        shapes = {slot.name: slot.shape for slot in arch.parameters}
        assert recognise({}, shapes).to_dict() == arch.to_dict()
    with pytest.raises(WslfastError, match="no known network has these weights"):
        recognise({"model::type": "CNN"}, {"a.weight": (3, 4)})


# -- pickled data sets -----------------------------------------------------------------------------------------------------


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> type:
    """A class in a module that will not exist when the file is read."""
    module = types.ModuleType("shrp_gone.datasets")
    monkeypatch.setitem(sys.modules, "shrp_gone", types.ModuleType("shrp_gone"))
    monkeypatch.setitem(sys.modules, "shrp_gone.datasets", module)
    module.DatasetTokens = type("DatasetTokens", (), {"__module__": "shrp_gone.datasets"})  # type: ignore[attr-defined]
    return module.DatasetTokens


def _dataset(kind: type, rows: Population, mode: str, standardize: Any) -> Any:
    """What the published class holds: ``data`` model by epoch, properties, epochs, the reference, and the standardisation."""
    weights, layers = rows.weights.clone(), {}
    if standardize:
        for slot in ARCH.parameters:
            if slot.name.endswith("weight"):
                bias = ARCH.slots[slot.name.replace("weight", "bias")]
                part = torch.cat([weights[:, slot.offset : slot.stop], weights[:, bias.offset : bias.stop]], 1)
                if standardize == "minmax":
                    low, high = float(part.min()), float(part.max())
                    layers[slot.name] = {"min": low, "max": high}
                    scale, shift = (high - low) / 2, (high + low) / 2
                else:
                    scale, shift = float(part.std()), float(part.mean())
                    layers[slot.name] = {"mean": shift, "std": scale}
                for s in (slot, bias):
                    weights[:, s.offset : s.stop] = (weights[:, s.offset : s.stop] - shift) / scale
    stored = Population(ARCH, weights)
    tokens = TokenLayout(ARCH).tokenize(weights).tokens
    flat: list[Any] = [t.clone() for t in tokens] if mode == "vector" else [OrderedDict(s) for s in stored.state_dicts()]
    dataset = kind()
    dataset.data = [flat[i : i + 3] for i in range(0, len(flat), 3)]
    dataset.epochs = [[0, 2, 5]] * len(dataset.data)
    dataset.paths = [[Path("/somewhere/else")] * 3] * len(dataset.data)
    dataset.properties = {"test_acc": [[0.1, 0.2, 0.3]] * len(dataset.data), "optim::lr": [[1e-3] * 3] * len(dataset.data)}
    dataset.reference_checkpoint, dataset.reference_config = OrderedDict(rows.state_dict(0)), {"model::type": "CNN", "model::nlin": "relu"}
    dataset.standardize, dataset.layers, dataset.ignore_bn, dataset.transforms = standardize, layers, False, nn.Sequential(nn.ReLU())
    return dataset


@pytest.mark.parametrize("standardize", [False, True, "minmax"], ids=str)
@pytest.mark.parametrize("mode", ["vector", "checkpoint"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "stream"])
def test_pickled_data_sets_are_read_without_their_class(
    tmp_path: Path, published: type, mode: str, standardize: Any, zipped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = population()
    for number, split in enumerate(("train", "val", "test")):
        part = rows[list(range(6 * number, 6 * number + 6))]
        torch.save(_dataset(published, part, mode, standardize), tmp_path / f"dataset_{split}.pt", _use_new_zipfile_serialization=zipped)
    monkeypatch.delitem(sys.modules, "shrp_gone.datasets")
    done = import_zoo(tmp_path, tmp_path / "out")
    zoo = load_zoo(tmp_path / "out")
    assert (done.rows, done.models, dict(done.skipped)) == (18, 6, {})
    torch.testing.assert_close(zoo.weights, rows.weights, rtol=FP32, atol=FP32_ROUNDING if standardize else 0.0)
    assert zoo.properties["split"] == ("train",) * 6 + ("val",) * 6 + ("test",) * 6
    assert zoo.properties["epoch"] == (0, 2, 5) * 6
    assert zoo.properties["test_acc"] == (0.1, 0.2, 0.3) * 6
    assert zoo.properties["lr"] == (1e-3,) * 18
    one = import_zoo(tmp_path / "dataset_val.pt", tmp_path / "one", epochs=[5])
    assert (one.rows, one.models) == (2, 2)


def test_running_statistics_were_standardised_twice(tmp_path: Path, published: type) -> None:
    """The published class goes over a key and then over its bias; a running statistic's bias is itself."""
    arch = Architecture.resnet18(num_classes=2, width=4)
    true = torch.rand(2, arch.num_weights, generator=torch.Generator().manual_seed(0)) + 0.25
    stored, layers = true.clone(), {}
    for name in arch.slots:
        if any(part in name for part in ("weight", "running_mean", "running_var")):
            scale, shift = 2.0, 0.5
            layers[name] = {"mean": shift, "std": scale}
            for key in (name, name.replace("weight", "bias")):  # the same key twice where there is no "weight" in it
                if key in arch.slots:
                    s = arch.slots[key]
                    stored[:, s.offset : s.stop] = (stored[:, s.offset : s.stop] - shift) / scale
    dataset = published()
    dataset.data = [[OrderedDict(state)] for state in Population(arch, stored).state_dicts()]
    dataset.epochs, dataset.properties = [[1]] * 2, {}
    dataset.reference_checkpoint, dataset.reference_config = OrderedDict(Population(arch, true).state_dict(0)), {}
    dataset.standardize, dataset.layers, dataset.ignore_bn = True, layers, False
    torch.save(dataset, tmp_path / "zoo.pt")
    import_zoo(tmp_path / "zoo.pt", tmp_path / "out", architecture=arch, split=(1.0, 0.0, 0.0))
    torch.testing.assert_close(load_zoo(tmp_path / "out").weights, true, rtol=FP32, atol=FP32)


def test_epoch_0_is_dropped_from_the_published_list_of_epochs(tmp_path: Path, published: type) -> None:
    rows = population(2)
    dataset = _dataset(published, rows, "checkpoint", False)
    dataset.epochs, dataset.properties = [[2, 5]] * 2, {"test_acc": [[0.2, 0.3]] * 2}
    dataset.labels = [[f"/zoo/{m}#_#epoch_{e}" for e in (0, 2, 5)] for m in range(2)]
    torch.save(dataset, tmp_path / "zoo.pt")
    import_zoo(tmp_path / "zoo.pt", tmp_path / "out", split=(1.0, 0.0, 0.0))
    zoo = load_zoo(tmp_path / "out")
    assert zoo.properties["epoch"] == (0, 2, 5) * 2
    assert zoo.properties["test_acc"] == (None, 0.2, 0.3) * 2
    assert torch.equal(zoo.weights, rows.weights)
    del dataset.labels  # then nobody knows which the third is
    torch.save(dataset, tmp_path / "zoo.pt")
    with pytest.raises(WslfastError, match="epoch unknown: 6"):
        import_zoo(tmp_path / "zoo.pt", tmp_path / "unknown")


def test_a_flat_list_of_checkpoints_keeps_a_model_together(tmp_path: Path, published: type) -> None:
    rows = population(4)
    dataset = _dataset(published, rows, "checkpoint", False)
    dataset.data = [row for model in dataset.data for row in model]
    dataset.epochs, dataset.properties = [0, 2, 5] * 4, {}
    dataset.paths = [f"/zoo/{m}" for m in range(4) for _ in range(3)]
    torch.save(dataset, tmp_path / "zoo.pt")
    done = import_zoo(tmp_path / "zoo.pt", tmp_path / "out", split=(0.5, 0.25, 0.25))
    zoo = load_zoo(tmp_path / "out")
    assert (done.rows, done.models) == (12, 4)
    assert zoo.properties["model"] == (0,) * 3 + (1,) * 3 + (2,) * 3 + (3,) * 3
    assert zoo.properties["epoch"] == (0, 2, 5) * 4
    assert all(len({zoo.properties["split"][3 * m + e] for e in range(3)}) == 1 for m in range(4))


def test_a_broken_file_among_several_is_left_out(tmp_path: Path, published: type) -> None:
    for number, split in enumerate(("train", "test")):
        part = population(4)[list(range(6 * number, 6 * number + 6))]
        torch.save(_dataset(published, part, "checkpoint", False), tmp_path / f"dataset_{split}.pt")
    (tmp_path / "dataset_val.pt").write_bytes(b"nothing of torch's")
    done = import_zoo(tmp_path, tmp_path / "out")
    assert (done.rows, dict(done.skipped)) == (12, {"unreadable data set": 1})
    assert set(load_zoo(tmp_path / "out").properties["split"]) == {"train", "test"}


def test_a_dict_of_data_sets_is_read(tmp_path: Path, published: type) -> None:
    rows = population()
    torch.save(
        {"trainset": _dataset(published, rows[:12], "vector", False), "testset": _dataset(published, rows[12:], "vector", False)},
        tmp_path / "dataset.pt",
    )
    import_zoo(tmp_path / "dataset.pt", tmp_path / "out")
    assert load_zoo(tmp_path / "out").properties["split"] == ("train",) * 12 + ("test",) * 6


def test_a_normalisation_that_forgets_is_refused(tmp_path: Path, published: type) -> None:
    dataset = _dataset(published, population(), "vector", False)
    dataset.standardize = "l2_ind"
    torch.save(dataset, tmp_path / "dataset_train.pt")
    with pytest.raises(WslfastError, match="forgets the weights' size"):
        import_zoo(tmp_path, tmp_path / "out")


# -- nothing runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("container", ["archive", "bare", "traversal"])
def test_no_code_of_a_file_runs(tmp_path: Path, tree: Path, container: str) -> None:
    canary = tmp_path / "canary"
    before = sorted(p.name for p in tmp_path.iterdir())
    for name, program in hostile_programs(canary).items():
        data = program if container == "bare" else as_archive(program, prefix="archive" if container == "archive" else "../../escaped")
        file = tree / "NN_tune_trainable_00000" / "checkpoint_000000" / "checkpoints"
        file.write_bytes(data)
        with contextlib.suppress(WslfastError), InertFile(file) as opened:
            assert not callable(opened.root)
        done = import_zoo(tree, tmp_path / "out", overwrite=True)
        assert (done.rows, dict(done.skipped)) == (17, {"unreadable checkpoint": 1}), name
        assert not canary.exists(), name
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*before, "out"])
    assert not (tmp_path.parent / "escaped").exists()


def test_torch_would_have_run_it(tmp_path: Path) -> None:
    """The canary works: the same bytes, read as pickles usually are, do touch it."""
    canary = tmp_path / "canary"
    pickle.loads(hostile_programs(canary)["system-2"])
    assert canary.exists()


# -- damaged and lying files -------------------------------------------------------------------------------------------------


def _tensor_program(size: tuple[int, ...], stride: tuple[int, ...], numel: int, offset: int = 0, kind: str = "FloatStorage") -> bytes:
    """The pickle of one tensor with whatever numbers."""

    class Machine(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return ("storage", getattr(torch, kind, kind), "0", "cpu", numel) if value is storage else None

    storage = object.__new__(_Token)
    out = io.BytesIO()
    Machine(out, protocol=2).dump({"w": Calls(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, OrderedDict())})
    return out.getvalue()


class _Token:
    pass


@pytest.mark.parametrize(
    ("size", "stride", "numel", "offset", "held"),
    [
        ((4,), (1,), 3, 0, 12), ((2,), (5,), 4, 0, 16), ((1 << 40,), (0,), 4, 0, 16), ((2, 2), (2,), 4, 0, 16), ((-1,), (1,), 4, 0, 16),
        ((4,), (1,), 4, 1, 16), ((4,), (-1,), 4, 3, 16), ((4,), (1,), 4, 0, 12), ((4,), (1,), 1 << 50, 0, 16), ((1 << 62, 4), (0, 1), 4, 0, 16),
    ],
)  # fmt: skip
def test_views_that_lie_are_refused(tmp_path: Path, size: Any, stride: Any, numel: int, offset: int, held: int) -> None:
    (tmp_path / "x.pt").write_bytes(as_archive(_tensor_program(size, stride, numel, offset), {"0": bytes(held)}))
    with InertFile(tmp_path / "x.pt") as opened, pytest.raises(WslfastError):
        opened.root["w"].tensor()


def test_an_honest_view_is_read(tmp_path: Path) -> None:
    numbers = torch.arange(12.0)
    (tmp_path / "x.pt").write_bytes(as_archive(_tensor_program((2, 3), (1, 4), 12, 1), {"0": numbers.numpy().tobytes()}))
    with InertFile(tmp_path / "x.pt") as opened:
        assert torch.equal(opened.root["w"].tensor(), numbers.as_strided((2, 3), (1, 4), 1))


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool], ids=str
)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "stream"])
def test_every_dtype_and_any_stride(tmp_path: Path, dtype: torch.dtype, zipped: bool) -> None:
    x = torch.randint(0, 2, (3, 4)).to(dtype)
    content = {
        "plain": x,
        "turned": x.t(),
        "part": x[1:, ::2],
        "scalar": x[0, 0],
        "none": x[:0],
        "parameter": nn.Parameter(x) if dtype.is_floating_point else x,
    }
    torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    with InertFile(tmp_path / "x.pt") as opened:
        for name, value in content.items():
            assert isinstance(opened.root[name], StoredTensor)
            assert torch.equal(opened.root[name].tensor(), value.detach()), name


def test_a_memo_index_costs_no_memory(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(as_archive(b"\x80\x02]r\xff\xff\xff\xff."))  # LONG_BINPUT at 2^32 - 1
    with InertFile(tmp_path / "x.pt") as opened:
        assert opened.root == []


def test_a_compressed_bomb_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + b"]" * 10_000_000 + b".")
    with pytest.raises(WslfastError, match="larger than the file"):
        InertFile(tmp_path / "x.pt")


def _read_all(value: Any) -> Any:
    if isinstance(value, StoredTensor):
        return value.tensor()
    if isinstance(value, dict):
        return {str(k)[:50]: _read_all(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_read_all(v) for v in value]
    return repr(value)[:50] if isinstance(value, Stub) else value


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "stream"])
@settings(max_examples=300)
@given(st.data())
def test_damaged_files_raise_nothing_else(tmp_path: Path, zipped: bool, data: st.DataObject) -> None:
    content = bytearray(honest_file(zipped))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "x.pt").write_bytes(content[: data.draw(st.integers(1, len(content)))] if data.draw(st.booleans()) else content)
    with contextlib.suppress(WslfastError), InertFile(tmp_path / "x.pt") as opened:
        _read_all(opened.root)


@settings(max_examples=300)
@given(st.binary(max_size=200), st.sampled_from([b"", b"\x80\x02", b"\x80\x04\x95"]))
def test_any_program_raises_nothing_else(tmp_path: Path, program: bytes, start: bytes) -> None:
    (tmp_path / "x.pt").write_bytes(as_archive(start + program))
    with contextlib.suppress(WslfastError), InertFile(tmp_path / "x.pt") as opened:
        _read_all(opened.root)


@settings(max_examples=60)
@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8),
        lambda x: (
            st.lists(x, max_size=3)
            | st.dictionaries(
                st.text(max_size=12) | st.sampled_from(["model::type", "model::nlin", "model::dropout", "training_iteration", "train_acc"]),
                x,
                max_size=4,
            )
        ),
        max_leaves=12,
    ),
    st.binary(max_size=40),
)
def test_any_json_beside_a_checkpoint(tmp_path: Path, value: Any, noise: bytes) -> None:
    trial = tmp_path / "t" / "trial"
    (trial / "checkpoint_1").mkdir(parents=True, exist_ok=True)
    torch.save(population(1, (1,)).state_dict(0), trial / "checkpoint_1" / "checkpoints")
    (trial / "params.json").write_text(json.dumps(value))
    (trial / "result.json").write_bytes(json.dumps(value).encode() + b"\n" + noise)
    try:
        assert import_zoo(tmp_path / "t", tmp_path / "out", overwrite=True, architecture=ARCH).rows == 1
    except WslfastError as error:
        raise AssertionError(str(error)) from error  # a checkpoint that is sound is read, whatever lies beside it
    with contextlib.suppress(WslfastError):
        import_zoo(tmp_path / "t", tmp_path / "out", overwrite=True)


# -- export and the shell --------------------------------------------------------------------------------------------------


def test_state_dicts_load_into_the_module(tmp_path: Path) -> None:
    rows = population(2, (4,), Architecture.cnn3())
    save_zoo(rows, tmp_path / "zoo", splits=("train", "test"), provenance={})
    assert export_zoo(tmp_path / "zoo", tmp_path / "sd", format="state-dicts") == 2
    index = json.loads((tmp_path / "sd" / "index.json").read_text())
    assert [c["file"] for c in index["checkpoints"]] == ["00000.pt", "00001.pt"]
    assert [c["epoch"] for c in index["checkpoints"]] == [4, 4]
    state: dict[str, Tensor] = torch.load(tmp_path / "sd" / "00001.pt", weights_only=True)
    assert torch.equal(Population.from_state_dicts(rows.architecture, [state]).weights[0], rows.weights[1])


def test_the_ray_form_is_what_published_loaders_expect(tmp_path: Path, tree: Path) -> None:
    """``results[epoch]`` is the line of that epoch, ``checkpoint_{epoch:06d}/checkpoints`` a state dict, ``params.json`` has the keys."""
    trial = tree / "NN_tune_trainable_00003"
    results = [json.loads(line) for line in (trial / "result.json").open()]
    assert [r["training_iteration"] for r in results] == list(range(6))
    assert results[5]["train_acc"] - results[5]["test_acc"] == pytest.approx(population().properties["ggap"][11])
    assert results[5]["config"]["optim::lr"] == 1e-3
    assert json.loads((trial / "params.json").read_text())["model::type"] == "CNN"
    assert set(torch.load(trial / "checkpoint_000005" / "checkpoints", weights_only=True)) == {s.name for s in ARCH.parameters}


def test_dropout_goes_with_each_model(tmp_path: Path, tree: Path) -> None:
    for number in range(6):
        _restate(tree / f"NN_tune_trainable_{number:05d}", **{"model::dropout": 0.1 * number})
    import_zoo(tree, tmp_path / "in")
    export_zoo(tmp_path / "in", tmp_path / "out")
    for number in range(6):
        trial = tmp_path / "out" / f"NN_tune_trainable_{number:05d}"
        assert json.loads((trial / "params.json").read_text())["model::dropout"] == 0.1 * number
        assert "dropout" not in json.loads((trial / "result.json").read_text().splitlines()[0])


def test_export_refuses_what_would_be_lost(tmp_path: Path, tree: Path) -> None:
    with pytest.raises(WslfastError, match="expected a new or an empty folder"):
        export_zoo(tmp_path / "zoo", tree)
    with pytest.raises(WslfastError, match="format: expected one of"):
        export_zoo(tmp_path / "zoo", tmp_path / "x", format="onnx")
    twice = Population(ARCH, population(1).weights[:2], {"model": (0, 0), "epoch": (1, 1)})
    save_zoo(twice, tmp_path / "twice", splits=("train", "train"), provenance={})
    with pytest.raises(WslfastError, match="one checkpoint per epoch"):
        export_zoo(tmp_path / "twice", tmp_path / "x")


def test_the_shell(tmp_path: Path, tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _spoil(tree, "unreadable checkpoint")
    main(["zoo", "import", str(tree), str(tmp_path / "out"), "--epochs", "2", "5"])
    said = capsys.readouterr().out
    assert "11 rows of 6 models, architecture cnn" in said
    assert "skipped: 1 x unreadable checkpoint" in said
    main(["zoo", "export", str(tmp_path / "out"), str(tmp_path / "sd"), "--format", "state-dicts", "--split", "test"])
    assert "checkpoints" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["zoo", "import", str(tmp_path / "gone"), str(tmp_path / "x")])
    assert "no such file or folder" in capsys.readouterr().err


def test_a_stream_storage_larger_than_the_file(tmp_path: Path) -> None:
    data = honest_file(False)
    count = struct.pack("<q", 6)
    at = data.rindex(count)
    (tmp_path / "x.pt").write_bytes(data[:at] + struct.pack("<q", 1 << 40) + data[at + 8 :])
    with pytest.raises(WslfastError):
        InertFile(tmp_path / "x.pt")


@pytest.mark.parametrize("use", [b"}" + b"%bNs", b"(%bNd", b"\x8f(%b\x90", b"(%b\x91"], ids=["setitem", "dict", "additems", "frozenset"])
def test_a_key_of_nested_tuples_is_refused_at_once(tmp_path: Path, use: bytes) -> None:
    deep = b")" + b"2\x86" * 100  # t = (t, t), a hundred times: hashing it would outlive the machine
    (tmp_path / "x.pt").write_bytes(as_archive(b"\x80\x04" + use % deep + b"."))
    with pytest.raises(WslfastError, match="key of nested tuples"):
        InertFile(tmp_path / "x.pt")
