"""Files made to run something, or to write somewhere else: nothing runs, nothing is written outside."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matrix import reached, snapshot
from pickled import Calls, as_archive, hostile_programs
from training_runs import ARCH

from wslfast import Population, WslfastError, load_zoo
from wslfast.sane.queries import _images
from wslfast.sane.state import load_state
from wslfast.training import load_run
from wslfast.training.checkpoint import _seal, checkpoint_path
from wslfast.zoo import export_zoo, import_zoo, load_dataset, save_zoo


def _stream(program: bytes) -> bytes:
    """The form before archives: a magic number, a version, the machine, the object, the storages."""
    head = (
        0x1950A86A20F9469CFC6C,
        1001,
        {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}},
    )
    return b"".join(pickle.dumps(part, protocol=2) for part in head) + program + pickle.dumps([], protocol=2)


def _tar(program: bytes) -> bytes:
    """The form before that, with members that climb out and a link."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors", "../../escaped"):
            member = tarfile.TarInfo(name)
            member.size = len(program)
            archive.addfile(member, io.BytesIO(program))
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    return out.getvalue()


FORMS: dict[str, Callable[[bytes], bytes]] = {
    "bare": lambda p: p, "archive": as_archive, "climbing archive": lambda p: as_archive(p, prefix="../../escaped"), "stream": _stream, "tar": _tar,
    "archive in an archive": lambda p: as_archive(pickle.dumps({"inner": as_archive(p)}, protocol=2)),
}  # fmt: skip


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


@pytest.mark.parametrize("form", FORMS)
def test_no_payload_runs_at_any_door(tmp_path: Path, canary: Path, form: str) -> None:
    """Each payload in each form at each door: a run, a published state, a zoo to import (both kinds), query images, a data set."""
    payloads = hostile_programs(canary)
    payloads |= {
        f"state-{p}": pickle.dumps({"model": Calls(exec, f"open({str(canary)!r}, 'w')"), "schema": 1}, protocol=p) for p in range(6)
    }
    home = tmp_path / "home"
    trial = home / "tree" / "trial" / "checkpoint_000001"
    trial.mkdir(parents=True)
    (home / "data").mkdir()
    checkpoint_path(home / "run").parent.mkdir(parents=True)
    outside = sorted(p.name for p in tmp_path.iterdir())
    tried = 0
    for program in payloads.values():
        data = FORMS[form](program)
        for file in (
            trial / "checkpoints",
            home / "data" / "dataset_train.pt",
            home / "images.pt",
            home / "d.npz",
            checkpoint_path(home / "run"),
        ):
            file.write_bytes(data)
        with contextlib.suppress(OSError):
            _seal(checkpoint_path(home / "run"))  # a digest is nothing that a stranger could not make
        doors: list[Callable[[], Any]] = [
            lambda: load_run(home / "run"),
            lambda: load_state(home / "images.pt"),
            lambda: import_zoo(home / "tree", home / "out", overwrite=True),
            lambda: import_zoo(home / "data", home / "out", overwrite=True),
            lambda: _images(home / "images.pt", (1, 8, 8)),
            lambda: load_dataset(home / "d.npz", (1, 8, 8)),
        ]
        for door in doors:
            with pytest.raises(WslfastError):
                door()
            tried += 1
            assert not canary.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == outside
    assert not (tmp_path.parent / "escaped").exists()
    reached("hostile", f"payloads ({form}) that did not run", len(payloads), "50+ in all")
    reached("hostile", f"doors they were put to ({form}), payload by payload", tried, "-")


def test_arrays_of_objects_do_not_run(tmp_path: Path, canary: Path) -> None:
    for name, payload in hostile_programs(canary).items():
        if not name.startswith(("system", "eval")):
            continue
        array = np.empty(1, dtype=object)
        array[0] = Calls(os.system, f"touch {canary}")
        np.savez(tmp_path / "d.npz", images=array, labels=np.zeros(1, dtype=np.int64), more=np.frombuffer(payload, dtype=np.uint8))
        with pytest.raises(WslfastError, match=r"d\.npz"):
            load_dataset(tmp_path / "d.npz", (1, 8, 8))
    assert not canary.exists()


def test_a_configuration_runs_nothing(tmp_path: Path) -> None:
    from wslfast import TrainConfig

    (tmp_path / "c.toml").write_text("zoo = '$(touch canary)'\nout = '`touch canary`'\n")
    assert TrainConfig.from_toml(tmp_path / "c.toml").zoo == "$(touch canary)"
    assert not (tmp_path / "canary").exists()


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    save_zoo(Population(ARCH, torch.zeros(4, ARCH.num_weights)), tmp_path / "zoo", splits=["train"] * 4, provenance={}, shard_rows=2)
    return tmp_path / "zoo"


LINKS = [
    "manifest.json",
    "shard-00000.safetensors",
    "shard-00001.safetensors",
    "skipped.json",
    ".manifest.json.{pid}.tmp",
    ".shard-00000.safetensors.{pid}.tmp",
]


@pytest.mark.parametrize("name", LINKS)
def test_links_in_a_folder_are_not_written_through(tmp_path: Path, zoo: Path, name: str) -> None:
    """A zoo from a stranger, overwritten: what its links point to stays as it was."""
    (tmp_path / "victim").write_text("mine")
    place = zoo / name.format(pid=os.getpid())
    place.unlink(missing_ok=True)
    place.symlink_to(tmp_path / "victim")
    with contextlib.suppress(WslfastError):
        save_zoo(Population(ARCH, torch.ones(3, ARCH.num_weights)), zoo, splits=["train"] * 3, provenance={}, shard_rows=2, overwrite=True)
    assert (tmp_path / "victim").read_text() == "mine"
    assert len(load_zoo(zoo)) == 3


def test_links_out_of_a_zoo_or_a_tree_are_not_read(tmp_path: Path, zoo: Path) -> None:
    secret = tmp_path / "elsewhere"
    zoo.rename(secret)
    zoo.mkdir()
    for name in os.listdir(secret):
        (zoo / name).symlink_to(secret / name)
    with pytest.raises(WslfastError, match=r"manifest\.json.*link"):
        load_zoo(zoo)
    export_zoo(secret, tmp_path / "tree")
    (tmp_path / "linked").mkdir()
    for trial in (tmp_path / "tree").iterdir():
        (tmp_path / "linked" / trial.name).symlink_to(trial)
    with pytest.raises(WslfastError, match="no usable checkpoint"):
        import_zoo(tmp_path / "linked", tmp_path / "out")
    assert not (tmp_path / "out").exists() or snapshot(tmp_path / "out") == {}


@pytest.mark.parametrize("name", ["../victim.safetensors", "/etc/passwd", "a/../../x.safetensors", "..\\x.safetensors"])
def test_names_that_climb_are_refused(zoo: Path, name: str) -> None:
    record = json.loads((zoo / "manifest.json").read_text())
    record["shards"][0]["file"] = name
    (zoo / "manifest.json").write_text(json.dumps(record))
    with pytest.raises(WslfastError, match=r"shards\[0\]: file"):
        load_zoo(zoo)
    with pytest.raises(WslfastError, match=r"shards\[0\]: file"):
        load_zoo(zoo, skip_bad=True)
