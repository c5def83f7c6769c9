"""Published zoos: what is read, what is left out and why, that nothing of a file is run, and the way back."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pickled import as_archive, hostile_programs
from torch import Tensor
from zoo_trees import ARCH, population, restate

from wslfast import Architecture, Population, WslfastError, load_zoo
from wslfast.cli import main
from wslfast.safe.inert import InertFile
from wslfast.zoo import export_zoo, import_zoo, load_parts, read_manifest, save_zoo

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
        restate(tree / trial, **{"model::nlin": "tanh"})
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
        restate(trial, **{"model::nlin": "tanh"})
    (trials[0] / "params.json").unlink()
    file = trials[0] / "result.json"
    results = [{name: v for name, v in json.loads(line).items() if name != "config"} for line in file.read_text().splitlines()]
    file.write_text("\n".join(map(json.dumps, results)))
    done = import_zoo(tree, tmp_path / "a")
    assert done.architecture == Architecture.cnn(1, "tanh")
    assert dict(done.skipped) == {"no params.json": 1}
    for trial in trials[1:]:
        restate(trial, **{"model::nlin": None})
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
        ({"input_shape": (1, 28, 28)}, "input_shape: expected None without network="),
        ({"output": 0}, "output: expected None without network="),
        ({"standardise": True}, "standardise: expected none without dataset="),
        ({"mean": [0.5]}, "mean: expected none without dataset="),
        ({"padding": "full"}, "padding: expected one of"),
        ({"omega": 0.0}, "omega: expected a positive number"),
    ],
    ids=["nowhere", "empty", "epochs", "no-such-epoch", "threshold", "split", "architecture", "dataset", "shape", "output", "standardise",
         "mean", "padding", "omega"],
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


# -- whatever lies beside a checkpoint ---------------------------------------------------------------------------------


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
        restate(tree / f"NN_tune_trainable_{number:05d}", **{"model::dropout": 0.1 * number})
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
