"""Query images in ``.npz`` files."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..architecture import Architecture
from ..errors import WslfastError, present, require
from ..files import write_arrays


def save_queries(path: str | Path, images: Tensor) -> None:
    """Write query images ``[n, ...]`` to an ``.npz`` file, under the key ``queries``."""
    path = Path(path)
    require(path.suffix == ".npz", f"queries: expected a path ending in .npz, got {str(path)!r}")
    require(_is_ours(path), f"queries: {path} is something else already; choose another name")
    write_arrays(path, {"queries": images.detach().float().cpu().numpy()})


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
            stored = file["queries"] if isinstance(file, np.lib.npyio.NpzFile) and "queries" in file.files else None
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, KeyError) as error:
        raise WslfastError(f"{expected}, got {type(error).__name__}: {error}") from None
    array = present(stored, f"{expected}, got a file without it")
    fits = array.dtype.kind == "f" and tuple(array.shape[1:]) == shape and array.ndim > 1 and len(array) > 0
    require(fits, f"{expected}, got {array.dtype} {list(array.shape)}")
    images = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    require(bool(images.isfinite().all()), f"{expected}, got values that are not finite")
    return images
