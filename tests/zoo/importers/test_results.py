"""Which result belongs to which checkpoint: runs that began again, numbers of several kinds, lines and lists that say nothing."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wslfast import Architecture, WslfastError, load_zoo
from wslfast.zoo import import_zoo, read_manifest

ARCH = Architecture.mlp(5, (4,), 3)
WEIGHTS = torch.randn(60, ARCH.num_weights, generator=torch.Generator().manual_seed(0))
Line = Mapping[str, Any]


def state(row: int) -> dict[str, torch.Tensor]:
    return {s.name: WEIGHTS[row % 60, s.offset : s.stop].reshape(s.shape).clone() for s in ARCH.parameters}


def trial(folder: Path, lines: Sequence[Line | str], checkpoints: Sequence[int]) -> Path:
    """A trial's folder; the weights of ``checkpoint_i`` are row i."""
    for number in checkpoints:
        (folder / f"checkpoint_{number:06d}").mkdir(parents=True)
        torch.save(state(number), folder / f"checkpoint_{number:06d}" / "checkpoints")
    (folder / "params.json").write_text("{}")
    (folder / "result.json").write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return folder


def imported(source: Path, out: Path, **options: Any) -> tuple[dict[int, Any], dict[str, int]]:
    """``test_acc`` by epoch, and the counts of what was left out or is not known."""
    done = import_zoo(source, out, architecture=ARCH, split=(1.0, 0.0, 0.0), **options)
    table = load_zoo(out).properties
    return dict(zip(table["epoch"], table.get("test_acc", [None] * done.rows), strict=True)), dict(done.skipped)


def test_a_run_that_was_killed_and_began_again(tmp_path: Path) -> None:
    """Killed at 12, began again at 0 and appended; checkpoints from epoch 30 on."""
    killed = [{"epoch": e, "test_acc": 0.5 + e / 1000, "train_acc": 0.9} for e in range(13)]
    whole = [{"epoch": e, "test_acc": e / 100, "train_acc": e / 50} for e in range(51)]
    trial(tmp_path / "src" / "NN_tune_trainable_seed=1", [*killed, *whole], [30, 40, 50])
    accuracy, skipped = imported(tmp_path / "src", tmp_path / "out")
    assert accuracy == {30: 0.3, 40: 0.4, 50: 0.5}
    assert skipped == {}
    assert load_zoo(tmp_path / "out").properties["ggap"] == tuple(e / 50 - e / 100 for e in (30, 40, 50))


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.booleans(), st.integers(1, 9)), min_size=1, max_size=5),
    st.integers(0, 6),
    st.integers(1, 3),
    st.sampled_from(["epoch", "training_iteration"]),
)
def test_runs_that_append(tmp_path: Path, runs: list[tuple[bool, int]], start: int, every: int, key: str) -> None:
    """Runs that begin at 0, or go on after the last checkpoint, write lines and, from ``start`` on, checkpoints over one another."""
    lines: list[Line] = []
    disk: dict[int, float] = {}
    for number, (again, length) in enumerate(runs):
        first = 0 if again or not disk else max(disk) + 1
        for epoch in range(first, first + length):
            accuracy = (100 * number + epoch) / 1000
            if epoch >= start and (epoch - start) % every == 0:
                disk[epoch] = accuracy
            lines.append({key: epoch, "test_acc": accuracy})
    folder = tmp_path / "src"
    if folder.exists():
        for file in sorted(folder.rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
    trial(folder, lines, sorted(disk))
    if not disk:
        with pytest.raises(WslfastError, match="no checkpoints"):
            imported(folder, tmp_path / "out", overwrite=True)
        return
    assert imported(folder, tmp_path / "out", overwrite=True) == (disk, {})


def test_numbers_may_be_written_as_floats(tmp_path: Path) -> None:
    trial(tmp_path / "src", [{"epoch": float(e), "test_acc": e / 10} for e in range(1, 4)], [2, 3])
    assert imported(tmp_path / "src", tmp_path / "out") == ({2: 0.2, 3: 0.3}, {})


UNDECIDED: dict[str, tuple[list[Line], list[int], str]] = {
    "no numbers": ([{"test_acc": e / 10} for e in range(6)], [2, 5], "no line records training_iteration, epoch"),
    "numbers of no kind": ([{"epoch": v, "test_acc": 0.1} for v in ("2", True, None, 2.5, [2], -2, 2e300)], [2], "no line records training_iteration"),
    "two numbers": ([{"training_iteration": e + 1, "epoch": e, "test_acc": e / 10} for e in range(6)], [2, 5], "training_iteration and epoch differ"),
    "two numbers, began again": (
        [{"training_iteration": i, "epoch": i % 4, "test_acc": i / 10} for i in range(8)], [1, 3], "training_iteration and epoch differ",
    ),
    "ray's functions count folders from 0": ([{"training_iteration": i, "test_acc": i / 10} for i in range(1, 7)], [0, 1, 2, 3, 4, 5], "folders count from 0"),
    "no lines": ([], [2, 5], "no line records training_iteration"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNDECIDED)
def test_nothing_is_guessed(tmp_path: Path, case: str, caplog: pytest.LogCaptureFixture) -> None:
    lines, checkpoints, why = UNDECIDED[case]
    trial(tmp_path / "src" / "a", lines, checkpoints)
    trial(tmp_path / "src" / "b", [{"epoch": e, "test_acc": e / 10} for e in range(51)], [50])
    with caplog.at_level(logging.WARNING, "wslfast"):
        accuracy, skipped = imported(tmp_path / "src", tmp_path / "out")
    assert accuracy == dict.fromkeys(checkpoints) | {50: 5.0}
    assert skipped == {"no matching results": len(checkpoints)}
    (said,) = [r.getMessage() for r in caplog.records]
    assert f"nothing says which results are those of {len(checkpoints)} checkpoints" in said
    entries = json.loads((tmp_path / "out" / "skipped.json").read_text())
    assert all(why in e["detail"] for e in entries)
    assert read_manifest(tmp_path / "out").provenance["skipped"] == skipped


def test_a_line_that_is_missing_or_broken_is_nobody_elses(tmp_path: Path) -> None:
    lines: list[Line | str] = [{"epoch": e, "test_acc": e / 10} for e in range(6)]
    lines[3] = '{"epoch": 3, "test_'
    del lines[1]
    trial(tmp_path / "src", lines, [1, 2, 3, 5])
    accuracy, skipped = imported(tmp_path / "src", tmp_path / "out")
    assert accuracy == {1: None, 2: 0.2, 3: None, 5: 0.5}
    assert skipped == {"unreadable line of result.json": 1, "no matching results": 2}


def test_initial_weights_beside_lines_from_1(tmp_path: Path) -> None:
    """Folder 0 has no line; the last folder is the last line's, so the numbers are of one kind."""
    trial(tmp_path / "src", [{"training_iteration": i, "test_acc": i / 10} for i in range(1, 6)], [0, 3, 5])
    assert imported(tmp_path / "src", tmp_path / "out") == ({0: None, 3: 0.3, 5: 0.5}, {"no matching results": 1})


def test_lines_that_name_the_folder(tmp_path: Path) -> None:
    """ray 2.7 and later: folders count checkpoints, lines name them; the second run went on from iteration 20 and wrote 30 and 40."""
    saved = {10: 0, 20: 1, 30: 2}, {30: 3, 40: 4}
    lines = [
        {
            "training_iteration": i,
            "epoch": i - 1,
            "test_acc": i / scale,
            "checkpoint_dir_name": f"checkpoint_{run[i]:06d}" if i in run else None,
        }
        for run, iterations, scale in zip(saved, (range(1, 36), range(21, 46)), (100, 200))
        for i in iterations
    ]
    trial(tmp_path / "src", lines, [0, 1, 2, 3, 4, 7])  # 10, 20, 30 of the first run, 30 and 40 of the second, and one of nobody's
    accuracy, skipped = imported(tmp_path / "src", tmp_path / "out")
    assert accuracy == {10: 0.1, 20: 0.2, 30: 0.15, 40: 0.2}
    assert skipped == {"epoch twice": 1, "epoch unknown": 1}
    zoo = load_zoo(tmp_path / "out")
    assert torch.equal(zoo.weights, WEIGHTS[[0, 1, 3, 4]])
    assert imported(tmp_path / "src", tmp_path / "one", epochs=[30])[0] == {30: 0.15}


def test_lines_that_name_the_folder_and_no_number(tmp_path: Path) -> None:
    trial(tmp_path / "src", [{"test_acc": e / 10, "checkpoint_dir_name": f"checkpoint_{e:06d}"} for e in (4, 2)], [2, 3, 4])
    assert imported(tmp_path / "src", tmp_path / "out") == ({2: 0.2, 3: None, 4: 0.4}, {"no matching results": 1})


def test_the_last_runs_settings_count_where_only_lines_repeat_them(tmp_path: Path) -> None:
    lines = [{"epoch": e, "config": {"optim::lr": lr, "seed": seed}} for lr, seed in ((0.1, 1), (0.01, 2)) for e in range(3)]
    (trial(tmp_path / "src", lines, [1]) / "params.json").unlink()
    imported(tmp_path / "src", tmp_path / "out")
    assert load_zoo(tmp_path / "out").properties["lr"] == (0.01,)
    assert load_zoo(tmp_path / "out").properties["seed"] == (2,)


# -- pickled data sets -----------------------------------------------------------------------------------------------------


class Published:
    """Attributes of a data set object; what is read of it does not depend on its class."""

    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)


def dump(file: Path, models: int = 2, each: int = 3, **attributes: Any) -> Path:
    data = [[state(each * m + e) for e in range(each)] for m in range(models)]
    torch.save(Published(data=data, reference_config={}, standardize=False, **attributes), file)
    return file


@pytest.mark.parametrize(
    ("attributes", "accuracy", "skipped"),
    [
        # the published class took lines by their place: of a run that began again they are another epoch's, and say so
        ({"epochs": [[10, 20, 30]] * 2, "properties": {"training_iteration": [[10, 20, 30], [7, 17, 27]], "test_acc": [[0.1, 0.2, 0.3]] * 2}}, [0.1, 0.2, 0.3, None, None, None], {"no matching results": 3}),
        ({"epochs": [[10, 20, 30]] * 2, "properties": {"training_iteration": [[30, 10, 20]] * 2, "test_acc": [[0.3, 0.1, 0.2]] * 2}}, [0.1, 0.2, 0.3] * 2, {}),
        ({"epochs": [[10, 20, 30]] * 2, "properties": {"test_acc": [[0.1, 0.2, 0.3], [0.2, 0.3]]}}, [0.1, 0.2, 0.3, None, None, None], {"no matching results": 3}),
        ({"epochs": [[10, 20, 30]] * 2, "properties": {"test_acc": [[0.1, 0.2, 0.3]]}}, [None] * 6, {"no matching results": 6}),
        ({"properties": {"training_iteration": [[10, 20, 30]] * 2, "test_acc": [[0.1, 0.2, 0.3]] * 2}}, [0.1, 0.2, 0.3] * 2, {}),
    ],
    ids=["another epoch's", "in another order", "a list that is shorter", "a model less", "only the properties say"],
)  # fmt: skip
def test_properties_are_those_of_the_epoch(
    tmp_path: Path, attributes: dict[str, Any], accuracy: list[Any], skipped: dict[str, int]
) -> None:
    done = import_zoo(dump(tmp_path / "zoo.pt", **attributes), tmp_path / "out", architecture=ARCH)
    table = load_zoo(tmp_path / "out").properties
    assert table["epoch"] == (10, 20, 30) * 2
    assert list(table.get("test_acc", [None] * 6)) == accuracy
    assert dict(done.skipped) == skipped


def test_more_epochs_than_checkpoints_are_not_counted_off(tmp_path: Path) -> None:
    file = dump(tmp_path / "zoo.pt", epochs=[[10, 20, 30, 40], [10, 20, 30]], properties={})
    done = import_zoo(file, tmp_path / "out", architecture=ARCH)
    assert (done.rows, dict(done.skipped)) == (3, {"epoch unknown": 3})


def test_epochs_that_nothing_states_are_said(tmp_path: Path) -> None:
    done = import_zoo(dump(tmp_path / "zoo.pt", properties={}), tmp_path / "out", architecture=ARCH)
    assert (done.rows, dict(done.skipped)) == (6, {"epochs not stated": 1})
    assert load_zoo(tmp_path / "out").properties["epoch"] == (0, 1, 2) * 2


def test_settings_are_the_whole_models(tmp_path: Path) -> None:
    """Also those of epoch 0, of which the published class keeps no properties."""
    table = {"optim::lr": [[0.1, 0.1], [0.2, 0.2]], "test_acc": [[0.1, 0.2]] * 2}
    labels = [[f"/zoo/{m}#_#epoch_{e}" for e in (0, 10, 20)] for m in range(2)]
    done = import_zoo(
        dump(tmp_path / "zoo.pt", epochs=[[10, 20]] * 2, labels=labels, properties=table), tmp_path / "out", architecture=ARCH
    )
    zoo = load_zoo(tmp_path / "out").properties
    assert zoo["lr"] == (0.1,) * 3 + (0.2,) * 3
    assert zoo["test_acc"] == (None, 0.1, 0.2) * 2
    assert dict(done.skipped) == {"no matching results": 2}
