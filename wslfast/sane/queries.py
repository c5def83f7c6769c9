"""Query images of a behavior loss: uniform noise, images of a data set, or half of each.

The published code makes a shuffled DataLoader and takes its first batch, at every step. Here the images lie in one tensor and
the same ones are gathered: the same draws from torch's generator lead to the same indices.
"""

from __future__ import annotations

import logging
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import WslfastError, describe, require, say_once

KINDS = ("random", "data", "union")


class Queries:
    """Draws ``[n, *shape]`` query images.

    Args:
        kind: ``"random"``, ``"data"`` or ``"union"``.
        n: images per draw; of a union each half has ``(n + 1) // 2``.
        shape: of one image.
        dump: for data and unions: images ``[Q, C, H, W]``, a data set of (image, label), or a file of either or of
            ``{"trainset": data set}``. Files are read with ``weights_only=True``; a ``TensorDataset`` in one, or ``Subset`` and
            ``ConcatDataset`` of such, are let through.
    """

    def __init__(self, kind: str, n: int, shape: tuple[int, ...], dump: Any) -> None:
        require(kind in KINDS, f"queryset: expected one of {list(KINDS)}, got {kind!r}")
        require(isinstance(n, Integral) and not isinstance(n, bool) and n >= 1, f"n_queries: expected a positive integer, got {n!r}")
        n = int(n)
        self.kind, self.shape = kind, shape
        if kind == "union" and n % 2:
            say_once(f"wslfast.sane: a union of queries needs an even number; {n} becomes {n + 1}", logging.WARNING)
        self.n = (n + 1) // 2 if kind == "union" else n
        self.images: Tensor | None = None
        if kind != "random":
            require(dump is not None, f"dump: expected images, a data set or a file for queryset {kind!r}, got None")
            self.images = _images(dump, shape)

    def draw(self) -> Tensor:
        """The next images, on the CPU in float32 (in a data set's dtype)."""
        if self.kind == "random":
            return self._noise()
        if self.kind == "data":
            return self._data()
        return torch.cat([self._noise(), self._data()])

    def _noise(self) -> Tensor:
        return torch.rand(self.n, *self.shape)

    def _data(self) -> Tensor:
        assert self.images is not None
        # what a fresh DataLoader iterator takes from the generator: its workers' seed, then its sampler's
        torch.empty((), dtype=torch.int64).random_()
        seed = int(torch.empty((), dtype=torch.int64).random_())
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(seed))
        return self.images[order[: self.n]]


def _read(file: Path) -> Any:
    # what published scripts store: tensors and a list of them, random splits of that, or several zoos' in a row; indices may be numpy's
    sets = torch.utils.data
    classes: list[Any] = [sets.TensorDataset, sets.Subset, sets.ConcatDataset, range, np.ndarray, np.dtype, type(np.dtype(np.int64))]
    classes += [type(np.dtype(np.int32)), np.empty(0).__reduce__()[0]]
    try:
        with torch.serialization.safe_globals(classes):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        expected = "expected tensors, a TensorDataset, or Subsets and ConcatDatasets of such (another data set can be passed as an object)"
        raise WslfastError(f"dump: cannot be read from {str(file)!r}: {expected}: {error}") from None


def unreadable(dump: Any) -> str | None:
    """Why a dump cannot be read without running code of the file, or None (nothing is said of what is in it)."""
    if isinstance(dump, (str, Path)) and Path(dump).is_file():
        try:
            _read(Path(dump))
        except WslfastError as error:
            return str(error)
    return None


def _images(dump: Any, shape: tuple[int, ...]) -> Tensor:
    if isinstance(dump, (str, Path)):
        require(Path(dump).is_file(), f"dump: expected a file of images, got {str(dump)!r}")
        dump = _read(Path(dump))
    if isinstance(dump, dict):
        require("trainset" in dump, f"dump: expected a key 'trainset', got {sorted(map(str, dump))[:5]}")
        dump = dump["trainset"]
    if isinstance(dump, torch.utils.data.TensorDataset):
        dump = dump.tensors[0]
    if not isinstance(dump, Tensor):
        indexed = hasattr(dump, "__len__") and hasattr(dump, "__getitem__")
        require(indexed, f"dump: expected images or a data set that can be indexed, got {describe(dump)}")
        dump = torch.stack([torch.as_tensor(dump[j][0]) for j in range(len(dump))])
    require(
        dump.ndim == len(shape) + 1 and tuple(dump.shape[1:]) == shape and len(dump) > 0 and dump.is_floating_point(),
        f"dump: expected floating images [Q, {', '.join(map(str, shape))}], got {describe(dump)}",
    )
    return dump.detach().cpu()
