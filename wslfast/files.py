"""Writing files so that a reader, or a crash, sees the old content or the new, never a mix; a file's SHA-256; ``.npz`` archives."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .errors import WslfastError, require


def sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` durable (a no-op where folders cannot be opened, as on Windows)."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits. Raises WslfastError if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise WslfastError(f"{path}: cannot be read: {error.strerror or error}") from None
    return digest.hexdigest()


def write_atomically(path: Path, write: Callable[[Path], object], need: int = 0) -> None:
    """Call ``write(temporary)`` beside ``path``, flush it to disk, then rename it into place.

    Args:
        path: the file; its folder is made if absent.
        write: makes the whole file under the name it is given, which is nobody's yet.
        need: bytes that it will take, for the error.

    Raises:
        WslfastError: the file could not be written (disk full, read-only folder, ...): names it and what it needs, the old content
            is intact and nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{threading.get_native_id()}.tmp")  # which no other writer has
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)  # whatever has this name, a link to elsewhere say, is not written through
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        room = _room(path.parent, need)
        raise WslfastError(f"cannot write {path}: {_reason(error)} ({room}anything that was there before is intact)") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


_MARKS = {  # files that say what a folder is
    "zoo": ("manifest.json",), "run": ("checkpoint/state.pt", "log.jsonl"), "results": ("units", "rows.csv"),
    "project": (".git", "pyproject.toml"),
}  # fmt: skip


def check_folder(folder: Path, kind: str) -> None:
    """Raise WslfastError for a folder that is something else than the ``zoo``, ``run`` or ``results`` that is to be written into it, or
    that nothing can be written into."""
    if folder.is_file():
        raise WslfastError(f"out: expected a folder, got the file {folder}")
    others = [other for other, marks in _MARKS.items() if other != kind and any((folder / mark).exists() for mark in marks)]
    if others and not any((folder / mark).exists() for mark in _MARKS[kind]):
        article = {"zoo": "a zoo", "run": "a training run", "results": "results of an evaluation", "project": "somebody's project"}
        raise WslfastError(f"out: {folder} holds {article[others[0]]} already; choose another folder")
    check_writable(folder)


def check_writable(out: str | Path) -> None:
    """Raise WslfastError for a folder that nothing can be written into, or that cannot be made, as far as that shows before it is made:
    work of hours would be lost for it."""
    folder = Path(out).absolute()
    try:
        there = next(place for place in (folder, *folder.parents) if place.exists())
        require(there.is_dir(), f"out: {out}: {there} is a file")
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise WslfastError(f"out: {out}: cannot be written into: {error.strerror or error}") from None


def make_folder(out: str | Path) -> None:
    """Make a folder, and those that it is in. Raises WslfastError where it cannot be made."""
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WslfastError(f"out: {out}: cannot be made: {error.strerror or error}") from None


@contextlib.contextmanager
def folder_made(out: str | Path) -> Iterator[None]:
    """A folder to write into: what the block leaves empty when it fails is removed, as far as it was made for it."""
    folder = Path(out)
    new = [place for place in (folder, *folder.parents) if not place.exists()]
    make_folder(folder)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # it has something in it
            for place in new:
                place.rmdir()
        raise


def check_empty(out: str | Path) -> None:
    """Raise WslfastError for a folder that has something in it, and for what is no folder."""
    folder = Path(out)
    require(not folder.exists() or (folder.is_dir() and not any(folder.iterdir())), f"out: {out}: expected a new or an empty folder")


@contextlib.contextmanager
def npz_archive(path: Path) -> Iterator[Any]:
    """An open ``.npz`` archive, read without pickle. Raises WslfastError naming the file if it is none, or if what is read of it is
    damaged."""
    try:
        archive = np.load(path, allow_pickle=False)
        require(isinstance(archive, np.lib.npyio.NpzFile), f"{path}: expected an .npz archive")
        with archive:
            yield archive
    except WslfastError:
        raise
    except Exception as error:  # zipfile, zlib and numpy each have their own for a damaged or pickled file
        raise WslfastError(f"{path}: cannot be read as .npz without pickle: {type(error).__name__}: {error}") from None


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], *, compressed: bool = True) -> None:
    """:func:`write_atomically` for numpy arrays by name, as an ``.npz`` archive."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            (np.savez_compressed if compressed else np.savez)(file, **arrays)  # type: ignore[arg-type]  # their stubs take no mapping

    write_atomically(path, write)


def write_bytes(path: Path, content: bytes) -> None:
    """:func:`write_atomically` for bytes."""
    write_atomically(path, lambda temporary: temporary.write_bytes(content), len(content))


def write_text(path: Path, text: str) -> None:
    """:func:`write_atomically` for a text in UTF-8."""
    try:
        content = text.encode()
    except UnicodeEncodeError as error:  # a path in bytes that are no UTF-8, say
        raise WslfastError(f"cannot write {path}: {error}") from None
    write_bytes(path, content)


def write_json(path: str | Path, value: Mapping[str, Any]) -> None:
    """:func:`write_atomically` for JSON; what is not finite becomes null."""
    write_text(Path(path), json.dumps(json_ready(value), indent=1, allow_nan=False) + "\n")


def json_ready(value: Any) -> Any:
    """Mappings, sequences and numbers as JSON has them; what is not finite becomes None."""
    if isinstance(value, Mapping):
        return {str(k): json_ready(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_ready(v) for v in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return value


def write_tensors(path: Path, value: Any, finish: Callable[[Path], None] | None = None) -> None:
    """:func:`write_atomically` for what ``torch.save`` writes; ``finish(temporary)`` may add to the file."""

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:  # a file of Python's: torch's own forgets why it could not be written
            torch.save(value, file)
        if finish is not None:
            finish(temporary)

    write_atomically(path, write, _tensor_bytes(value))


def remove_leftovers(*paths: Path) -> None:
    """Remove what a writer of these files that was killed left half-written beside them. One writer a file at a time."""
    for path in paths:
        name = re.compile(rf"\.{re.escape(path.name)}\.\d+\.tmp")
        with contextlib.suppress(OSError):
            for stray in filter(name.fullmatch, os.listdir(path.parent)):
                (path.parent / stray).unlink()


def _tensor_bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return sum(map(_tensor_bytes, inner))


def _reason(error: BaseException) -> BaseException:
    """What the system said, if it did: torch.save's own error hides it."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    return cause or error


def _room(folder: Path, need: int) -> str:
    """What a writer needs, and what there is."""
    if need == 0:
        return ""
    try:
        free = f", {shutil.disk_usage(folder).free:,} are free"
    except OSError:
        free = ""
    return f"it needs about {need:,} bytes{free}; "
