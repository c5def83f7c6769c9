"""The images that a zoo's models were trained on, from the ``dataset.pt`` beside them; nothing of the file is run.

Such a file pickles ``{"trainset", "valset", "testset"}`` whole: objects of a training script's own class with ``data`` and ``targets``,
``TensorDataset``, lists of pairs, and ``Subset`` or ``ConcatDataset`` of these. Their classes are not needed.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import WslfastError, describe, require
from ...files import write_bytes, write_tensors
from ...safe.inert import InertFile, StoredTensor, Stub

FILE = "dataset.pt"
SPLITS = {"train": "trainset", "val": "valset", "test": "testset"}
_MOST_IMAGES = 1 << 26
Pair = tuple[Tensor, Tensor | None]


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
        found = {split: root[key] for split, key in SPLITS.items() if root.get(key) is not None}
        require(bool(found), f"{path}: expected one of {list(SPLITS.values())}, got {sorted(map(str, root))[:5]}")
        try:
            return {split: _pair(value, 0) for split, value in found.items()}
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
    content = io.BytesIO()
    np.savez(content, **arrays)  # type: ignore[arg-type]  # its stub takes every keyword for allow_pickle
    write_bytes(Path(out), content.getvalue())
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


def _pair(value: Any, depth: int) -> Pair:
    require(depth < 8, "data sets nested too deeply")
    if isinstance(value, Stub):
        tensors, data = value.attribute("tensors"), value.attribute("data", value.attribute("images"))
        if isinstance(tensors, (tuple, list)) and tensors:
            return _images(tensors[0]), _labels(tensors[1]) if len(tensors) > 1 else None
        if data is not None:
            labels = value.attribute("targets", value.attribute("labels"))
            return _images(data), None if labels is None else _labels(labels)
        inner, indices = value.attribute("dataset"), value.attribute("indices")
        if inner is not None and indices is not None:
            images, labels = _pair(inner, depth + 1)
            rows = torch.as_tensor(_numbers(indices))
            require(bool(((rows >= 0) & (rows < len(images))).all()), "a subset's indices leave its data set")
            return images[rows], None if labels is None else labels[rows]
        several = value.attribute("datasets")
        if isinstance(several, (list, tuple)) and several:
            return _joined([_pair(part, depth + 1) for part in several])
        raise WslfastError(f"a data set of an unknown kind, {value!r}: expected one with data and targets, or with tensors")
    if isinstance(value, (list, tuple)) and value:
        if all(isinstance(v, (tuple, list)) and len(v) == 2 and isinstance(v[0], StoredTensor) for v in value):
            return torch.stack([v[0].tensor() for v in value]).float(), _labels([v[1] for v in value])
        if len(value) == 2 and isinstance(value[0], StoredTensor):
            return _images(value[0]), _labels(value[1])
    if isinstance(value, StoredTensor):
        return _images(value), None
    if isinstance(value, dict) and "data" in value:
        return _images(value["data"]), _labels(value["targets"]) if "targets" in value else None
    raise WslfastError(f"a data set of an unknown kind, {describe(value)}")


def _joined(parts: list[Pair]) -> Pair:
    shapes = {tuple(images.shape[1:]) for images, _ in parts}
    require(len(shapes) == 1, f"data sets of one shape are expected in a row, got {sorted(shapes)}")
    labels = [labels for _, labels in parts if labels is not None]
    return torch.cat([images for images, _ in parts]), torch.cat(labels) if len(labels) == len(parts) else None


def _images(value: Any) -> Tensor:
    if isinstance(value, (list, tuple)) and value and all(isinstance(v, StoredTensor) for v in value):
        images = torch.stack([v.tensor() for v in value])
    else:
        require(isinstance(value, StoredTensor), f"images: expected a tensor, got {describe(value)}")
        images = value.tensor()
    bytes_ = images.dtype == torch.uint8
    images = images.float() / 255 if bytes_ else images.float()
    images = images.unsqueeze(1) if images.ndim == 3 else images
    require(images.ndim == 4 and len(images) > 0, f"images: expected [N, C, H, W], got {describe(images)}")
    if images.shape[1] not in (1, 3, 4) and images.shape[3] in (1, 3, 4):
        images = images.permute(0, 3, 1, 2)
    return images.contiguous()


def _labels(value: Any) -> Tensor:
    if isinstance(value, StoredTensor):
        return value.tensor().long().flatten()
    return torch.tensor(_numbers(value), dtype=torch.long)


def _numbers(value: Any) -> list[int]:
    if isinstance(value, StoredTensor):
        return value.tensor().long().flatten().tolist()
    if isinstance(value, Stub) and value.kind in ("builtins.range", "__builtin__.xrange", "__builtin__.range"):
        require(all(type(v) is int and abs(v) < 1 << 31 for v in value.arguments), "a range of no whole numbers")
        span = range(*value.arguments)
        require(len(span) <= _MOST_IMAGES, f"a range of {len(span):,} images")  # a file is not to fill the memory
        return list(span)
    require(isinstance(value, (list, tuple)), f"expected numbers, got {describe(value)}")
    out = [v.tensor() if isinstance(v, StoredTensor) else v for v in value]
    require(all(isinstance(v, (int, Tensor)) for v in out), "expected whole numbers")
    return [int(v) for v in out]
