"""Shards that are short, empty, swapped, gone or too many: an error that names one, or --skip-bad with an exact count."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from matrix import many, reached
from training_runs import ARCH, config

from wslfast import Population, WslfastError, errors, load_zoo, train
from wslfast.cli import main
from wslfast.measure import evaluation, generation
from wslfast.training import load_run, query_sets
from wslfast.zoo import Dataset, MappedZoo, export_zoo, import_zoo, save_zoo

ROWS, SHARDS = 30, 10
SPLITS = ["train", "train", "val"] * 10


@pytest.fixture(scope="module")
def population() -> Population:
    return Population(
        ARCH,
        ARCH.initial_weights(["kaiming_normal"] * ROWS, range(ROWS)),
        {"model": range(ROWS), "val_acc": [i / ROWS for i in range(ROWS)], "epoch": [1] * ROWS},
    )


@pytest.fixture
def zoo(tmp_path: Path, population: Population) -> Path:
    save_zoo(population, tmp_path / "zoo", splits=SPLITS, provenance={}, shard_rows=ROWS // SHARDS)
    return tmp_path / "zoo"


def _shard(zoo: Path, i: int) -> Path:
    return zoo / f"shard-{i:05d}.safetensors"


def _harm(zoo: Path, kind: str, rng: random.Random) -> set[int]:
    """Do something to a zoo; returns the shards that cannot be read any more."""
    chosen = set(rng.sample(range(SHARDS), rng.randint(1, 4)))
    if kind == "truncated":
        for i in chosen:
            os.truncate(_shard(zoo, i), rng.randrange(1, _shard(zoo, i).stat().st_size))
    elif kind == "empty":
        for i in chosen:
            os.truncate(_shard(zoo, i), 0)
    elif kind == "missing":
        for i in chosen:
            _shard(zoo, i).unlink()
    elif kind == "swapped":
        a, b = rng.sample(range(SHARDS), 2)
        _shard(zoo, a).rename(zoo / "spare"), _shard(zoo, b).rename(_shard(zoo, a)), (zoo / "spare").rename(_shard(zoo, b))
        chosen = {a, b}
    else:
        shutil.copy(_shard(zoo, 0), _shard(zoo, rng.randint(SHARDS, 10**5)))
        chosen = set()
    return chosen


def _whole(zoo: Population | MappedZoo) -> Population:
    return zoo.load() if isinstance(zoo, MappedZoo) else zoo


@pytest.mark.parametrize("kind", ["truncated", "empty", "missing", "swapped", "extra"])
def test_bad_shards_are_named_or_counted(
    tmp_path: Path, zoo: Path, population: Population, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    rng, cases = random.Random(kind), many(6, 100)
    for case in range(cases):
        broken = tmp_path / f"case{case}"
        shutil.copytree(zoo, broken)
        bad = _harm(broken, kind, rng)
        split = rng.choice([None, "train", "val"])
        for read in (load_zoo, MappedZoo):
            with pytest.raises(WslfastError, match=r"shard-\d{5}\.safetensors") as caught:
                _whole(read(broken, split))
            if bad and split is None:
                assert any(f"shard-{i:05d}" in str(caught.value) for i in bad)
        good = [j for j in range(ROWS) if j // (ROWS // SHARDS) not in bad and split in (None, SPLITS[j])]
        for read in (load_zoo, MappedZoo):
            errors._said.clear()
            caplog.clear()
            loaded = _whole(read(broken, split, skip_bad=True))
            assert torch.equal(loaded.weights, population.weights[good])
            assert loaded.properties["model"] == tuple(good)
            (said,) = (r.getMessage() for r in caplog.records)
            extra = int(kind == "extra")
            assert f"{len(bad)} of {SHARDS} shards with {3 * len(bad)} of {ROWS} rows left out, {extra} extra shards ignored" in said
        shutil.rmtree(broken)
    reached("shards", f"zoos with {kind} shards: an error that names one, and skip_bad with the exact count", cases, 100)


def test_a_sound_zoo_is_read_whole_and_a_ruined_one_is_an_error(
    zoo: Path, population: Population, caplog: pytest.LogCaptureFixture
) -> None:
    assert torch.equal(load_zoo(zoo, skip_bad=True).weights, population.weights)
    assert caplog.records == []
    for i in range(SHARDS):
        os.truncate(_shard(zoo, i), 5)
    for read in (load_zoo, MappedZoo):
        with pytest.raises(WslfastError, match=r"none of the zoo's 10 shards can be read: .*shard-00000"):
            read(zoo, skip_bad=True)


def test_a_damaged_manifest_is_not_skipped(zoo: Path) -> None:
    os.truncate(zoo / "manifest.json", 100)
    with pytest.raises(WslfastError, match=r"manifest\.json"):
        load_zoo(zoo, skip_bad=True)


def test_every_command_that_loads_a_zoo_skips_on_demand(
    tmp_path: Path, zoo: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shell by shell: two of ten shards gone. ``train`` needs images, which its zoo's manifest does not name here."""
    images = torch.randn(24, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(24) % 3
    data = Dataset("noise", images, labels, images, labels, images, labels, 3)
    for module in (query_sets, evaluation, generation):
        monkeypatch.setattr(module, "dataset_of", lambda *_: data)
    train(config(tmp_path / "run", steps=1, checkpoint_every=1), population=load_zoo(zoo, "train"), images=images)
    _shard(zoo, 2).unlink()
    os.truncate(_shard(zoo, 7), 9)
    flags = ["--queries", "8", "--batch-size", "4", "--d-model", "16", "--heads", "2", "--layers", "1", "--steps", "1"]
    commands: dict[str, list[str]] = {
        "export": ["zoo", "export", str(zoo), "OUT", "--format", "state-dicts"],
        "train": ["train", "--zoo", str(zoo), "--out", "OUT", *flags],
        "evaluate": ["evaluate", "--run", str(tmp_path / "run"), "--zoo", str(zoo), "--split", "val", "--out", "OUT"],
        "generate": ["generate", "--run", str(tmp_path / "run"), "--zoo", str(zoo), "--samples", "2", "--out", "OUT"],
    }
    for name, arguments in commands.items():
        arguments = [str(tmp_path / (f"{name}.json" if name == "evaluate" else f"{name}.out")) if a == "OUT" else a for a in arguments]
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
        said = capsys.readouterr()
        assert "shard-00002.safetensors" in said.err
        assert "Traceback" not in said.err
        errors._said.clear()
        main([*arguments, "--skip-bad"])
        assert "2 of 10 shards with 6 of 30 rows left out" in capsys.readouterr().out
    assert len(list((tmp_path / "export.out").glob("*.pt"))) == 24
    assert load_run(tmp_path / "train.out").finished
    assert json.loads((tmp_path / "evaluate.json").read_text())["split"] == "val"
    reached("shards", "commands with --skip-bad", len(commands), 4)


def test_an_import_counts_what_it_leaves_out(tmp_path: Path, zoo: Path) -> None:
    export_zoo(zoo, tmp_path / "tree")
    files = sorted((tmp_path / "tree").rglob("checkpoints"))
    for file in files[:3]:
        os.truncate(file, 50)
    files[5].unlink()
    done = import_zoo(tmp_path / "tree", tmp_path / "again", architecture=ARCH)
    assert done.rows == ROWS - 4
    assert done.skipped["unreadable checkpoint"] == 3
