"""Files and folders: what is written comes back, and what cannot be read or made is one error that names it."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from wslfast.errors import WslfastError
from wslfast.files import check_empty, check_folder, folder_made, make_folder, npz_archive, write_arrays, write_atomically


@pytest.mark.parametrize("compressed", [True, False])
def test_arrays_come_back(tmp_path: Path, compressed: bool) -> None:
    arrays = {"a": np.arange(6, dtype=np.uint8).reshape(2, 3), "none": np.zeros(0, np.float32)}
    write_arrays(tmp_path / "x.npz", arrays, compressed=compressed)
    with npz_archive(tmp_path / "x.npz") as file:
        assert sorted(file.files) == ["a", "none"]
        for name, array in arrays.items():
            assert file[name].dtype == array.dtype
            assert np.array_equal(file[name], array)
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]


def test_what_is_no_archive_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, a=np.arange(1000))
    whole = path.read_bytes()
    for content in (b"", b"text", whole[:-30]):
        path.write_bytes(content)
        with pytest.raises(WslfastError, match=r"x\.npz: cannot be read as \.npz without pickle"), npz_archive(path) as file:
            file["a"]
    np.savez(path, a=np.array([{}], dtype=object))
    with pytest.raises(WslfastError, match="without pickle"), npz_archive(path) as file:
        file["a"]
    np.save(tmp_path / "one.npy", np.arange(3))
    with pytest.raises(WslfastError, match=r"one\.npy: expected an \.npz archive"), npz_archive(tmp_path / "one.npy"):
        pass


def test_folders(tmp_path: Path) -> None:
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    check_empty(tmp_path / "a" / "b")
    check_empty(tmp_path / "new")
    (tmp_path / "file").write_text("x")
    with pytest.raises(WslfastError, match="cannot be made"):
        make_folder(tmp_path / "file" / "below")
    for path in (tmp_path / "a", tmp_path / "file"):
        with pytest.raises(WslfastError, match="expected a new or an empty folder"):
            check_empty(path)


def test_two_threads_write_one_file_each_whole(tmp_path: Path) -> None:
    path, half, first_done = tmp_path / "x", threading.Event(), threading.Event()
    errors: list[BaseException] = []

    def second(temporary: Path) -> None:
        temporary.write_bytes(b"half")
        half.set()
        first_done.wait(10)
        temporary.write_bytes(b"second")

    def run() -> None:
        try:
            write_atomically(path, second)
        except BaseException as error:
            errors.append(error)

    def first(temporary: Path) -> None:
        temporary.write_bytes(b"first")
        thread.start()
        half.wait(10)

    thread = threading.Thread(target=run)
    write_atomically(path, first)
    assert path.read_bytes() == b"first"
    first_done.set()
    thread.join()
    assert not errors
    assert path.read_bytes() == b"second"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_folder_that_stays_empty_goes_again(tmp_path: Path) -> None:
    with pytest.raises(WslfastError), folder_made(tmp_path / "a" / "b"):
        raise WslfastError("no data")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    with pytest.raises(KeyboardInterrupt), folder_made(tmp_path / "mine"):
        raise KeyboardInterrupt
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "kept").write_text("")
    with pytest.raises(KeyboardInterrupt), folder_made(tmp_path / "c"):
        raise KeyboardInterrupt
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["c", "kept", "mine"]
    with folder_made(tmp_path / "e"):
        pass
    assert (tmp_path / "e").is_dir()


def test_a_folder_that_cannot_be_made_is_seen_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "zoo", tmp_path / "file" / "a" / "b"):
        with pytest.raises(WslfastError, match=r"out: .*file is a file"):
            check_folder(out, "zoo")
    if Path("/proc/self").exists():
        with pytest.raises(WslfastError, match="cannot be written into"):
            check_folder(Path("/proc/zoo/a"), "zoo")
    check_folder(tmp_path / "new" / "zoo", "zoo")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
