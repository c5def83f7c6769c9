"""Disks that are full, files that may not grow, folders that may not be written: the old content stays, the error says what and how much."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from matrix import reached, snapshot
from training_runs import ARCH, config

from wslfast import Population, WslfastError, train
from wslfast.measure.evaluation import write_json
from wslfast.sane.state import save_model
from wslfast.training.checkpoint import load_checkpoint, save_checkpoint
from wslfast.training.records import RunLog
from wslfast.zoo import export_zoo, import_zoo, save_zoo

NOBODY = 65_534
_done: list[str] = []


@pytest.fixture(scope="module")
def population() -> Population:
    return Population(ARCH, ARCH.initial_weights(["kaiming_normal"] * 20, range(20)))


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory, population: Population) -> dict[str, object]:
    out = tmp_path_factory.mktemp("run")
    train(config(out, steps=1), population=population, images=torch.randn(48, 1, 8, 8))
    return {key: value for key, value in load_checkpoint(out).items() if key != "schema"}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory, population: Population) -> Path:
    save_zoo(population, tmp_path_factory.mktemp("zoos") / "zoo", splits=["train"] * 20, provenance={})
    return tmp_path_factory.getbasetemp() / "zoos0" / "zoo"


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory, zoo: Path) -> Path:
    export_zoo(zoo, tmp_path_factory.mktemp("ray") / "tree")
    return tmp_path_factory.getbasetemp() / "ray0" / "tree"


# -- what refuses --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _full(folder: Path) -> Iterator[None]:
    """A file system of its own with nothing left on it."""
    filler = folder.parent / "filler"
    with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 12))
            file.flush()
    try:
        yield
    finally:
        filler.unlink()


@contextlib.contextmanager
def _short_files(folder: Path) -> Iterator[None]:
    """RLIMIT_FSIZE: no file may grow beyond 64 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def _read_only(folder: Path) -> Iterator[None]:
    """Permission bits, as somebody whom they bind: root gives its rights away for a while."""
    folders = [folder, *(p for p in folder.rglob("*") if p.is_dir())]
    for path in folders:
        path.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        for path in folders:
            path.chmod(0o755)


def _refusing(call: str, code: int) -> Callable[[Path], contextlib.AbstractContextManager[None]]:
    """The operating system's answer, injected."""

    @contextlib.contextmanager
    def refuse(folder: Path) -> Iterator[None]:
        def no(*_: object, **__: object) -> None:
            raise OSError(code, os.strerror(code))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, call, no)
            yield

    return refuse


REFUSALS = {
    "disk full": (_full, errno.ENOSPC), "file size limit": (_short_files, errno.EFBIG), "read-only folder": (_read_only, errno.EACCES),
    "full when flushed": (_refusing("fsync", errno.ENOSPC), errno.ENOSPC), "read-only file system": (_refusing("replace", errno.EROFS), errno.EROFS),
}  # fmt: skip


# -- what is written -----------------------------------------------------------------------------------------------------


def _module() -> SimpleNamespace:
    model = torch.nn.Linear(40, 40)
    return SimpleNamespace(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), criterion=torch.nn.MSELoss(), scheduler=None)


def _writers(population: Population, state: dict[str, object], tree: Path, zoo: Path) -> dict[str, tuple[str, Callable[[Path], object]]]:
    """What writes below a folder, and the name that its error has to give. Each is run once before, so that there is old content."""
    half = population[:10]
    return {
        "checkpoint": ("state.pt", lambda at: save_checkpoint(at / "run", state)),
        "zoo": ("zoo", lambda at: save_zoo(half, at / "zoo", splits=["train"] * 10, provenance={}, overwrite=True)),
        "zoo in many shards": (
            "zoo",
            lambda at: save_zoo(population, at / "zoo", splits=["train"] * 20, provenance={}, overwrite=True, shard_rows=2),
        ),
        "imported zoo": ("zoo", lambda at: import_zoo(tree, at / "zoo", overwrite=True, architecture=ARCH)),
        "figures": ("figures.json", lambda at: write_json(at / "figures.json", {"values": [0.5] * 100})),
        "published state": ("state.pt", lambda at: save_model(_module(), at / "sane")),
    }


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path | None]:
    """A tmpfs of 2 MB, where we may mount one."""
    place = tmp_path_factory.mktemp("disk")
    mounted = (
        os.geteuid() == 0
        and subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], capture_output=True, check=False).returncode == 0
    )
    yield place if mounted else None
    if mounted:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("refusal", REFUSALS)
@pytest.mark.parametrize("what", ["checkpoint", "zoo", "zoo in many shards", "imported zoo", "figures", "published state"])
def test_a_refused_write_leaves_the_old_and_says_what_it_needs(
    tmp_path: Path,
    small_disk: Path | None,
    population: Population,
    state: dict[str, object],
    tree: Path,
    zoo: Path,
    what: str,
    refusal: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if refusal == "disk full" and small_disk is None:
        pytest.skip("no file system can be mounted here; a full disk is injected at fsync")
    place = (small_disk if refusal == "disk full" else tmp_path) / "place"  # type: ignore[operator]
    place.mkdir()
    monkeypatch.chdir(place)  # relative paths: whoever has lost root's rights cannot walk down from /
    name, write = _writers(population, state, tree, zoo)[what]
    context, code = REFUSALS[refusal]
    at = Path()
    write(at)
    torch.manual_seed(1)  # another published state
    before = snapshot(at)
    if refusal == "read-only folder" and what == "imported zoo":
        read_only_tree = place / "tree"
        shutil.copytree(tree, read_only_tree)
        write = lambda at: import_zoo(Path("tree"), at / "zoo", overwrite=True, architecture=ARCH)  # noqa: E731
        before = snapshot(at)
    with context(place), pytest.raises(WslfastError) as caught:
        write(at)
    said = str(caught.value)
    assert name in said
    assert os.strerror(code) in said
    assert "bytes" in said or "cannot be written into" in said  # seen before there is anything to write
    assert snapshot(at) == before
    write(at)  # and when there is room again
    monkeypatch.chdir("/")
    shutil.rmtree(place)
    _done.append(f"{what}, {refusal}")
    if len(_done) == 30:
        reached("writes", "refused writes that left the old content and no stray", len(_done), 30)


@pytest.mark.parametrize("refusal", ["file size limit", "read-only folder"])
def test_a_run_that_may_not_write_says_so(tmp_path: Path, population: Population, refusal: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    images = torch.randn(48, 1, 8, 8)
    (tmp_path / "runs").mkdir()
    with (
        REFUSALS[refusal][0](tmp_path),
        pytest.raises(WslfastError, match=r"(cannot write runs.*bytes)|(out: runs.*cannot be written into)"),
    ):
        train(config(Path("runs/a"), steps=1), population=population, images=images)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_a_log_that_cannot_grow_is_one_clear_error(tmp_path: Path) -> None:
    with (
        RunLog(tmp_path / "log.jsonl", 0, None) as log,
        _short_files(tmp_path),
        pytest.raises(WslfastError, match=r"cannot write .*log\.jsonl"),
    ):
        log.write({"step": 1, "note": "x" * 200})


def test_a_link_in_the_temporary_files_place_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("mine")
    (tmp_path / f".figures.json.{os.getpid()}.tmp").symlink_to(tmp_path / "victim")
    write_json(tmp_path / "figures.json", {"a": 1})
    assert (tmp_path / "victim").read_text() == "mine"
    assert not (tmp_path / "figures.json").is_symlink()
