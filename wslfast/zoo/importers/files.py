"""Files of one network each, as training scripts leave them: ``torch.save``'s, safetensors and ``.npz``. Nothing of them is run."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from ...errors import WslfastError, require
from ...files import npz_archive
from ...safe.inert import InertFile
from .checkpoint import Skips, State, folders, state_of, unwrapped

TORCH = (".pt", ".pth", ".bin", ".ckpt", ".tar", ".th", ".model", ".pkl")  # model_best.pth.tar, as torch's own examples call it
ENDINGS = (*TORCH, ".safetensors", ".npz")


@dataclass(frozen=True)
class Loaded:
    """A network's weights by name, and plain values that were saved beside them."""

    state: State
    beside: dict[str, Any] = field(default_factory=dict)


def state_files(source: Path, skips: Skips) -> list[Path]:
    """Every file at or below ``source`` that may hold a network, in sorted order, numbers in names by size. Links to folders are not
    followed."""
    if source.is_file():
        return [source]
    files = [
        path
        for folder, names, below in folders(source, skips)
        for path in (folder / name for name in names if not name.startswith("."))
        if path.suffix.lower() in ENDINGS and path not in below and (path.is_file() or not path.exists())  # a pipe would wait for ever
    ]
    return sorted(files, key=lambda path: _natural(str(path.relative_to(source))))


def _natural(text: str) -> list[tuple[int, int, str]]:
    """``model_2`` before ``model_10``."""
    parts = (part for part in re.split(r"(\d+)", text) if part)
    return [(0, int(part), part) if part.isdigit() and part.isascii() else (1, 0, part) for part in parts]


def name_of(path: Path) -> str:
    """A file's name without its ending (``net.pth.tar``: net)."""
    first = Path(path.stem)
    return first.stem if path.suffix.lower() == ".tar" and first.suffix.lower() in TORCH else path.stem


def load(path: Path) -> Loaded:
    """A network's file. Raises WslfastError naming it for anything else."""
    if path.suffix.lower() == ".safetensors":
        return Loaded(_safetensors(path))
    if path.suffix.lower() == ".npz":
        return _arrays(path)
    with InertFile(path) as file:
        try:
            state = dict(state_of(file.root))
            _, beside = unwrapped(file.root)
        except WslfastError as error:
            raise WslfastError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None
    return _apart(state, beside)


def _apart(state: dict[str, Tensor], beside: dict[str, Any]) -> Loaded:
    """The weights, without single integers such as a label that lie among them; these count as saved beside the weights."""
    for name in [n for n, t in state.items() if t.ndim == 0 and not t.is_floating_point() and "." not in n and n != "num_batches_tracked"]:
        beside = {name: state.pop(name).item(), **beside}
    require(len(state) > 0, "expected a state dict (names to tensors)")
    return Loaded(state, beside)


def _safetensors(path: Path) -> State:
    try:
        with open(path, "rb") as file:
            data = file.read()
        state = safetensors.torch.load(data)
    except OSError as error:
        raise WslfastError(f"{path}: cannot be read: {error.strerror or error}") from None
    except Exception as error:  # whatever the parser makes of bytes that nobody wrote
        raise WslfastError(f"{path}: not a safetensors file: {error}") from None
    require(len(state) > 0, f"{path}: expected a state dict, got an empty file")
    return state


def _arrays(path: Path) -> Loaded:
    with npz_archive(path) as file:
        arrays = {name: np.asarray(file[name], order="C") for name in file.files}  # ascontiguousarray makes a vector of a single number
    wrong = [name for name, value in arrays.items() if value.dtype.kind not in "fiub"]
    require(not wrong, f"{path}: expected arrays of numbers; {wrong[:1]} is something else")
    try:
        tensors = {name: torch.from_numpy(value.astype(value.dtype.newbyteorder("="), copy=False)) for name, value in arrays.items()}
    except TypeError as error:  # numbers of 80 bits, say
        raise WslfastError(f"{path}: {error}") from None
    return _apart(tensors, {})
