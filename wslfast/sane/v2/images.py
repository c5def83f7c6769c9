"""The images that a zoo's models were trained on, from the ``dataset.pt`` beside them; nothing of the file is run.

Such a file pickles ``{"trainset", "valset", "testset"}`` whole, data sets of many kinds (:mod:`wslfast.safe.data_sets`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...errors import WslfastError, describe, require
from ...files import write_arrays, write_tensors
from ...safe.data_sets import Pair, pair_of
from ...safe.inert import InertFile

FILE = "dataset.pt"
SPLITS = {"train": "trainset", "val": "valset", "test": "testset"}


def images_of(source: str | Path) -> dict[str, Pair]:
    """Images ``[N, C, H, W]`` float32 and labels ``[N]`` int64 (or None) by split, of a ``dataset.pt`` or of the folder that holds it.

    Args:
        source: the file, or a zoo's folder.

    Returns:
        ``{"train": (images, labels), ...}``, the splits that are there, images as they were stored (published zoos: -1 to 1).

    Raises:
        WslfastError: no such file, or images that are stored another way.
    """
    path = Path(source)
    path = path / FILE if path.is_dir() else path
    require(path.is_file(), f"{path}: no such file of images")
    with InertFile(path) as file:
        root = file.root
        require(isinstance(root, dict), f"{path}: expected a dict of data sets, got {describe(root)}")
        sets = {split: root[key] for split, key in SPLITS.items() if root.get(key) is not None}
        require(bool(sets), f"{path}: expected one of {list(SPLITS.values())}, got {sorted(map(str, root))[:5]}")
        try:
            return {split: _images_and_labels(value, SPLITS[split]) for split, value in sets.items()}
        except WslfastError as error:
            raise WslfastError(f"{path}: {error}") from None


def to_npz(source: str | Path, out: str | Path) -> Path:
    """Writes a ``dataset.pt`` as the ``.npz`` that wslfast reads (``train_images``, ``train_labels``, ...); returns its path."""
    parts = images_of(source)
    unlabelled = [split for split, (_, labels) in parts.items() if labels is None]
    require(not unlabelled, f"{source}: {unlabelled} hold no labels, which a zoo's data set needs")
    arrays: dict[str, np.ndarray] = {}
    for split, (images, labels) in parts.items():
        assert labels is not None
        arrays |= {f"{split}_images": images.numpy(), f"{split}_labels": labels.numpy()}
    write_arrays(Path(out), arrays, compressed=False)
    return Path(out)


def write(parts: Mapping[str, Pair], out: str | Path) -> Path:
    """Writes images as a ``dataset.pt`` of ``TensorDataset`` objects, which published scripts read; returns its path."""
    sets = {}
    for split, (images, labels) in parts.items():
        require(split in SPLITS, f"split: expected one of {list(SPLITS)}, got {split!r}")
        fits = images.ndim == 4 and images.is_floating_point() and labels is not None and labels.shape == (len(images),)
        require(fits, f"{split}: expected images [N, C, H, W] and labels [N], got {describe(images)} and {describe(labels)}")
        assert labels is not None
        sets[SPLITS[split]] = torch.utils.data.TensorDataset(images.float().cpu().contiguous(), labels.long().cpu().contiguous())
    path = Path(out)
    path = path / FILE if path.is_dir() else path
    write_tensors(path, sets)
    return path


def _images_and_labels(value: Any, name: str) -> Pair:
    """Images ``[N, C, H, W]`` float32 in any order of axes, bytes in [0, 1], and labels ``[N]`` int64."""
    images, labels = pair_of(value, name)
    images = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    images = images.unsqueeze(1) if images.ndim == 3 else images
    require(images.ndim == 4 and len(images) > 0, f"{name}: expected images [N, C, H, W], got {describe(images)}")
    if images.shape[1] not in (1, 3, 4) and images.shape[3] in (1, 3, 4):
        images = images.permute(0, 3, 1, 2)
    return images.contiguous(), None if labels is None else labels.long().flatten()
