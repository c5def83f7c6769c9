"""Labelled arrays in files, as their owner wrote them: ``.npz``, and the ``dataset.pt`` that model-zoo code leaves beside its models.

Nothing is unpickled: ``.npz`` is read without pickle, a ``.pt`` file by the reader that runs nothing (``safe/inert.py``).
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Union

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import WslfastError, present, require, say_once
from ..files import npz_archive, sha256_of
from ..safe.data_sets import pair_of
from ..safe.inert import InertFile, StoredTensor, Stub
from .manifest import SPLITS

Raw = dict[str, tuple[Tensor, Tensor]]  # numbers [N, ...] float32 and labels [N] int64, by split, or "" where the file has one part
Read = dict[str, tuple[Tensor, Union[Tensor, None]]]  # the same; None where labels are no classes
ENDINGS = (".npz", ".pt", ".pth")
_CALLED = {
    **dict.fromkeys(("images", "image", "x", "data", "inputs"), "images"),
    **dict.fromkeys(("labels", "label", "y", "targets", "target"), "labels"),
}
SETS = {"trainset": "train", "valset": "val", "testset": "test"}


def read_arrays(path: Path, unlabelled: bool = False) -> tuple[Raw, dict[str, Any]]:
    """What a file holds, and where it came from (``source``, ``path``, ``sha256``). Bytes become numbers in [0, 1]; all other numbers are
    as they are. ``unlabelled`` ones without labels, or with ones that are no classes, have zeros, and ``labels: none`` says so. Raises
    WslfastError naming file and key."""
    require(path.is_file(), f"dataset: {path}: no such file")
    raw = _npz(path, unlabelled) if path.suffix == ".npz" else _pt(path, unlabelled)
    shapes = {tuple(images.shape[1:]) for images, _ in raw.values()}
    require(len(shapes) == 1, f"{path}: expected images of one shape in every split, got {sorted(shapes)}")
    facts = {"source": path.name, "path": str(path.resolve()), "sha256": sha256_of(path)}
    if any(labels is None for _, labels in raw.values()):
        require(unlabelled, f"{path}: labels: expected integers")
        return {p: (x, torch.zeros(len(x), dtype=torch.int64)) for p, (x, _) in raw.items()}, {**facts, "labels": "none"}
    return {p: (x, y) for p, (x, y) in raw.items() if y is not None}, facts


# -- .npz --------------------------------------------------------------------------------------------------------------


def _npz(path: Path, unlabelled: bool) -> Read:
    with npz_archive(path) as file:
        names = _names(file.files)
        parts = _layout(list(names), path, unlabelled)  # no other array is read
        arrays = {own: file[theirs] for own, theirs in names.items() if own.rpartition("_")[0] in parts}
        return {p: _pair(arrays, f"{p}_" if p else "", path) for p in parts}


def _names(keys: Iterable[str]) -> dict[str, str]:
    """What the arrays are called here, and in the file: ``x_train``, ``trainX``, ``X``, ``test_y``, ``val_targets`` and the like are the
    images and labels of a split, unless there is an array of our own name."""
    given = list(keys)
    ours = {f"{p}{what}" for p in ("", *(f"{split}_" for split in SPLITS)) for what in ("images", "labels")}
    names = {key: key for key in given if key in ours}
    for key in given:
        words = [w for w in re.split(r"[_\W]+|(?<=[a-z])(?=[A-Z])", key.replace("validation", "val").replace("valid", "val")) if w]
        what = [_CALLED[w.lower()] for w in words if w.lower() in _CALLED]
        split = [w.lower() for w in words if w.lower() in SPLITS]
        if len(what) == 1 and len(what) + len(split) == len(words) <= 2:
            names.setdefault("_".join((*split, what[0])), key)
    return {**names, **{key: key for key in given if key not in names.values()}}


def _layout(keys: Sequence[str], path: Path, unlabelled: bool) -> tuple[str, ...]:
    """Prefixes of the arrays to read: an owner's split goes before one pair. Raises WslfastError if neither layout is complete."""
    for wanted in (("images", "labels"), ("images",)) if unlabelled else (("images", "labels"),):
        have = tuple(p for p in SPLITS if {f"{p}_{what}" for what in wanted} <= set(keys))
        if "train" in have and "test" in have:
            return have
        if set(wanted) <= set(keys):
            return ("",)
    raise WslfastError(
        f"{path}: expected keys 'images' and 'labels', or 'train_images', 'train_labels', 'test_images' and 'test_labels'; "
        f"got {sorted(keys)[:8]}"
    )


def _pair(file: Mapping[str, np.ndarray], prefix: str, path: Path) -> tuple[Tensor, Tensor | None]:
    images, labels = file[f"{prefix}images"], file.get(f"{prefix}labels", None)
    where = f"{path}: {prefix}images"
    require(images.dtype == np.uint8 or images.dtype.kind == "f", f"{where}: expected uint8 or floating, got {images.dtype}")
    require(
        images.ndim >= 2 and 0 not in images.shape,
        f"{where}: expected [N, H, W], [N, C, H, W], [N, H, W, C] or [N, ...], got {list(images.shape)}",
    )
    pixels = torch.from_numpy(np.ascontiguousarray(images, dtype=np.float32))
    numbers = _checked(pixels / 255 if images.dtype == np.uint8 else pixels, where)
    return numbers, None if labels is None else _labels(labels, len(images), f"{path}: {prefix}labels")


def _checked(pixels: Tensor, where: str) -> Tensor:
    require(bool(pixels.isfinite().all()), f"{where}: expected finite numbers")
    return pixels


def _labels(labels: np.ndarray, count: int, where: str) -> Tensor | None:
    """Labels ``[N]``, whole numbers in any dtype, a column, or one-hot rows; None where they are no classes but what a regression is to
    give."""
    if labels.dtype.kind in "fiub" and labels.ndim == 2 and len(labels) == count and labels.shape[1] > 1 and _one_hot(labels):
        labels = labels.argmax(1)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]  # a column, as some archives have it
    if (
        labels.dtype.kind == "f"
        and labels.shape == (count,)
        and bool(((labels == labels.round()) & (labels >= 0) & (labels < 1 << 20)).all())
    ):
        labels = labels.astype(np.int64)
    if labels.dtype.kind == "f" and len(labels) == count:
        text = "labels are no whole numbers: there are no classes, and models are compared by their outputs"
        say_once(f"wslfast: {where.rpartition(': ')[0]}: {text}", logging.INFO)  # once for all splits
        return None
    hint = " (numpy.unique(labels, return_inverse=True)[1] makes them of names)" if labels.dtype.kind in "US" else ""
    require(labels.dtype.kind in "iu", f"{where}: expected integers, got {labels.dtype}{hint}")
    require(labels.shape == (count,), f"{where}: expected [{count}] like the images, got {list(labels.shape)}")
    low, high = int(labels.min()), int(labels.max())
    require(low >= 0 and high < 1 << 20, f"{where}: expected labels from 0 upwards, got {low} to {high}")
    return torch.from_numpy(labels.astype(np.int64))


def _one_hot(rows: np.ndarray) -> bool:
    return bool(((rows == 0) | (rows == 1)).all()) and bool((rows.sum(1) == 1).all())


# -- dataset.pt --------------------------------------------------------------------------------------------------------


def _pt(path: Path, unlabelled: bool) -> Read:
    """A dict of ``trainset``, ``valset``, ``testset``, data sets as :func:`~wslfast.safe.data_sets.pair_of` reads them; or of tensors under
    the keys of an .npz file."""
    with InertFile(path) as file:
        root = file.root
        require(isinstance(root, dict), f"{path}: expected a dict of data sets or tensors")
        try:
            sets = {split: root[key] for key, split in SETS.items() if isinstance(root.get(key), Stub)}
            if sets:
                require("train" in sets and "test" in sets, f"expected trainset and testset, got {sorted(map(str, root))[:8]}")
                pairs = {split: _labelled(stub, f"{split}set") for split, stub in sets.items()}
                return {split: pair for split, pair in pairs.items() if pair is not None}
            stored = {str(k): v for k, v in root.items() if isinstance(v, StoredTensor)}
            arrays = {own: stored[theirs].tensor().numpy() for own, theirs in _names(stored).items()}
            return {p: _pair(arrays, f"{p}_" if p else "", path) for p in _layout(list(arrays), path, unlabelled)}
        except WslfastError as error:
            raise WslfastError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None


def _labelled(value: Any, name: str) -> tuple[Tensor, Tensor | None] | None:
    """Images and labels of a data set object; None of an empty one."""
    images, labels = pair_of(value, name, refuse_transforms=True)
    labels = present(labels, f"{name}: expected labels")
    if len(labels) == 0:
        return None
    where = f"{name}: images"
    require(images.ndim >= 2 and (images.is_floating_point() or images.dtype == torch.uint8), f"{where}: expected numbers [N, ...]")
    pixels = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    return _checked(pixels, where), _labels(labels.numpy(), len(images), f"{name}: labels")


# -- shapes ------------------------------------------------------------------------------------------------------------


def shapes_of(numbers: Tensor) -> list[tuple[int, ...]]:
    """Input shapes that a network of its owner's may have for numbers ``[N, ...]``, the likeliest first."""
    sizes = tuple(numbers.shape[1:])
    if len(sizes) == 2:
        likely: list[tuple[int, ...]] = [(1, *sizes), sizes]
    elif len(sizes) == 3:
        first, last = sizes[0], sizes[2]
        moved = (sizes[2], *sizes[:2])
        likely = [moved, sizes] if first > 4 and last <= 4 else [sizes, moved] if last <= 4 else [sizes]
    else:
        likely = [sizes]
    return list(dict.fromkeys([*likely, (math.prod(sizes),)]))


def as_images(numbers: Tensor, channels: int | None, where: str) -> Tensor:
    """``[N, C, H, W]`` of ``[N, H, W]`` or either order of channels: the axis that fits the architecture, else the one that is short
    enough for channels. Raises WslfastError for anything else."""
    if numbers.ndim == 3:
        return numbers.unsqueeze(1)
    require(numbers.ndim == 4, f"{where}: expected [N, H, W], [N, C, H, W] or [N, H, W, C], got {list(numbers.shape)}")
    first, last = numbers.shape[1], numbers.shape[3]
    for fits in (lambda size: size == channels, lambda size: size <= 4):
        if fits(first):
            return numbers
        if fits(last):
            return numbers.permute(0, 3, 1, 2).contiguous()
    raise WslfastError(f"{where}: expected [N, C, H, W] or [N, H, W, C] with at most 4 channels, or {channels}, got {list(numbers.shape)}")


def fitted(numbers: Tensor, shape: tuple[int, ...], where: str, grey: bool = False) -> Tensor:
    """Numbers ``[N, ...]`` as an architecture wants them: as they are where they fit; images resized bilinearly, one channel repeated
    where more are wanted (``grey``: three averaged where one is), flattened for a flat architecture (after resizing to a square where
    sizes differ)."""
    came = tuple(numbers.shape[1:])
    if came == shape:
        return numbers
    if len(came) < 2 or len(shape) not in (1, 3):
        require(math.prod(came) == math.prod(shape), f"{where}: expected {list(shape)} numbers each, got {list(came)}")
        return numbers.reshape(len(numbers), *shape)
    pixels = as_images(numbers, shape[0] if len(shape) == 3 else None, where)
    n, channels, height, width = pixels.shape
    if len(shape) == 1:
        if shape[0] != channels * height * width:
            side = math.isqrt(shape[0] // channels)
            require(
                side * side * channels == shape[0],
                f"{where}: cannot make {shape[0]} features of images {[channels, height, width]}: neither their size nor a square",
            )
            pixels = _bilinear(pixels, side, side)
        return pixels.reshape(n, -1)
    if grey and shape[0] == 1 and channels == 3:
        pixels, channels = pixels.mean(1, keepdim=True), 1
    require(
        channels in (1, shape[0]),
        f"{where}: expected {shape[0]} channels (or 1, which is repeated), got {channels}; an architecture made with "
        f"channels_in={channels} takes them",
    )
    return _bilinear(pixels, shape[1], shape[2]).expand(-1, shape[0], -1, -1)


def _bilinear(pixels: Tensor, height: int, width: int) -> Tensor:
    if tuple(pixels.shape[2:]) == (height, width):
        return pixels
    shrinks = height < pixels.shape[2] or width < pixels.shape[3]
    return F.interpolate(pixels, (height, width), mode="bilinear", antialias=shrinks)
