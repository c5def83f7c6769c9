"""Images and labels of a data set that a training script pickled whole: its class is not needed, and nothing of it is run.

What is read: objects of any class with ``data`` (or ``images``) and ``targets`` (or ``labels``), ``TensorDataset``, lists of
(image, label) pairs, and ``Subset`` or ``ConcatDataset`` of these.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Union

import torch
from torch import Tensor

from ..errors import WslfastError, describe, require
from .inert import StoredTensor, Stub

Pair = tuple[Tensor, Union[Tensor, None]]
_DEEPEST = 8  # data sets in data sets
_MOST_IMAGES = 1 << 26
_RANGES = ("builtins.range", "__builtin__.xrange", "__builtin__.range")


def pair_of(value: Any, name: str, *, refuse_transforms: bool = False, depth: int = 0) -> Pair:
    """Images ``[N, ...]`` and labels ``[N, ...]`` of a data set, in the dtypes in which they were stored; None where it has no labels.

    Args:
        value: the data set, as :class:`~wslfast.safe.inert.InertFile` gives it.
        name: what errors call it.
        refuse_transforms: raise for one that changes its images when they are read, as that code cannot be run here.
        depth: of this data set inside others.

    Raises:
        WslfastError: for anything else.
    """
    require(depth < _DEEPEST, f"{name}: data sets nested too deeply")
    inner = partial(pair_of, name=name, refuse_transforms=refuse_transforms, depth=depth + 1)
    if isinstance(value, Stub):
        changed = [key for key in ("transform", "target_transform", "transforms") if value.attribute(key) is not None]
        words = f"{name}: it changes its images when they are read ({', '.join(changed)}), which nothing here can run"
        require(not (changed and refuse_transforms), words)
        tensors, data = value.attribute("tensors"), value.attribute("data", value.attribute("images"))
        if isinstance(tensors, (tuple, list)) and tensors:
            return _numbers(tensors[0], name), _numbers(tensors[1], name) if len(tensors) > 1 else None
        if data is not None:
            labels = value.attribute("targets", value.attribute("labels"))
            return _numbers(data, name), None if labels is None else _numbers(labels, name)
        whole, rows = value.attribute("dataset"), value.attribute("indices")
        if whole is not None and rows is not None:
            return _chosen(inner(whole), _numbers(rows, name).long().flatten(), name)
        parts = value.attribute("datasets")
        if isinstance(parts, (list, tuple)) and parts:
            return _joined([inner(part) for part in parts], name)
    if isinstance(value, (list, tuple)) and value:
        if all(isinstance(v, (tuple, list)) and len(v) == 2 and isinstance(v[0], StoredTensor) for v in value):
            return _numbers([image for image, _ in value], name), _numbers([label for _, label in value], name)
        if len(value) == 2 and isinstance(value[0], StoredTensor):
            return _numbers(value[0], name), _numbers(value[1], name)
    if isinstance(value, StoredTensor):
        return value.tensor(), None
    if isinstance(value, dict) and "data" in value:
        return _numbers(value["data"], name), _numbers(value["targets"], name) if "targets" in value else None
    came = repr(value) if isinstance(value, Stub) else describe(value)
    raise WslfastError(f"{name}: a data set of an unknown kind, {came}: expected one with data and targets, or with tensors")


def _chosen(pair: Pair, rows: Tensor, name: str) -> Pair:
    """The rows of a data set that a ``Subset`` of it has."""
    images, labels = pair
    require(bool(((rows >= 0) & (rows < len(images))).all()), f"{name}: a subset's indices leave its data set")
    return images[rows], None if labels is None else labels[rows]


def _joined(parts: list[Pair], name: str) -> Pair:
    shapes = {tuple(images.shape[1:]) for images, _ in parts}
    require(len(shapes) == 1, f"{name}: expected data sets of one shape in a row, got {sorted(shapes)}")
    labels = [labels for _, labels in parts if labels is not None]
    return torch.cat([images for images, _ in parts]), torch.cat(labels) if len(labels) == len(parts) else None


def _numbers(value: Any, name: str) -> Tensor:
    """A stored tensor, or several of one shape stacked; whole numbers, or a range of them, as int64 ``[N]``."""
    if isinstance(value, StoredTensor):
        return value.tensor()
    if isinstance(value, Stub) and value.kind in _RANGES:
        require(all(type(v) is int and abs(v) < 1 << 31 for v in value.arguments), f"{name}: a range of no whole numbers")
        span = range(*value.arguments)
        require(len(span) <= _MOST_IMAGES, f"{name}: a range of {len(span):,} images")  # a file is not to fill the memory
        return torch.tensor(span, dtype=torch.int64)
    if isinstance(value, (list, tuple)) and value and all(isinstance(v, StoredTensor) for v in value):
        shapes = {tuple(v.shape) for v in value}
        require(len(shapes) == 1, f"{name}: expected tensors of one shape, got {sorted(shapes)[:4]}")
        return torch.stack([v.tensor() for v in value])
    whole = isinstance(value, (list, tuple)) and all(isinstance(v, int) or (isinstance(v, StoredTensor) and v.shape == ()) for v in value)
    require(whole, f"{name}: expected tensors or whole numbers, got {value!r:.60}")
    return torch.tensor([v.tensor().item() if isinstance(v, StoredTensor) else v for v in value], dtype=torch.int64)
