"""Query images in ``.npz`` files."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..architecture import Architecture
from ..errors import WslfastError, require
from ..files import write_atomically


def save_queries(path: str | Path, images: Tensor) -> None:
    """Write query images ``[n, ...]`` to an ``.npz`` file, under the key ``queries``."""
    path = Path(path)
    require(path.suffix == ".npz", f"queries: expected a path ending in .npz, got {str(path)!r}")
    require(_is_ours(path), f"queries: {path} is something else already; choose another name")

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez_compressed(file, queries=images.detach().float().cpu().numpy())

    write_atomically(path, write)


def _is_ours(path: Path) -> bool:
    """Whether a file may be replaced: there is none, or one of query images alone."""
    if not path.exists():
        return True
    try:
        with zipfile.ZipFile(path) as file:
            return file.namelist() == ["queries.npy"]
    except (OSError, zipfile.BadZipFile):
        return False


def load_queries(path: str | Path, architecture: Architecture) -> Tensor:
    """Query images ``[n, *architecture.input_shape]`` float32 of :func:`save_queries`, or of any ``.npz`` file with a floating array
    ``queries`` of that shape, used as they are. Raises WslfastError naming the file; nothing is unpickled."""
    shape = architecture.input_shape
    expected = f"queries {path}: expected an .npz file with floating 'queries' [n, {', '.join(map(str, shape))}]"
    try:
        with np.load(path, allow_pickle=False) as file:
            found = file["queries"] if isinstance(file, np.lib.npyio.NpzFile) and "queries" in file.files else None
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, KeyError) as error:
        raise WslfastError(f"{expected}, got {type(error).__name__}: {error}") from None
    require(found is not None, f"{expected}, got a file without it")
    assert found is not None
    fits = found.dtype.kind == "f" and tuple(found.shape[1:]) == shape and found.ndim > 1 and len(found) > 0
    require(fits, f"{expected}, got {found.dtype} {list(found.shape)}")
    images = torch.from_numpy(np.ascontiguousarray(found, dtype=np.float32))
    require(bool(images.isfinite().all()), f"{expected}, got values that are not finite")
    return images
