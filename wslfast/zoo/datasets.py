"""Labelled images to train a zoo on: data sets known by name, or any ``.npz`` file. Nothing is downloaded.

Images come standardised (train mean and standard deviation of each channel, or the published ones) unless asked otherwise, in the
shape that an architecture wants, split once by a seed. A file is read without pickle.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import WslfastError, check_seed, describe, require, say_once
from .catalogue import NAMES, Parts, Source, named_shape, read_named

_PREFIXES = ("train", "val", "test")
_FRACTIONS = (0.7, 0.1, 0.2)
_DIGITS = (1200, 200, 397)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images and labels in three splits, standardised unless ``provenance["standardise"]`` is False.

    Attributes:
        name: what to call it: one of ``NAMES`` (digits, fashion, photos, ...), or a file's name.
        train_images, val_images, test_images: float32 ``[N, C, H, W]`` (``[N, features]`` for a flat architecture).
        train_labels, val_labels, test_labels: int64 ``[N]``, in ``range(classes)``.
        classes: how many labels there are.
        provenance: where it came from: file digest, split sizes and seed, mean and standard deviation of each channel of the training
            images (or the published ones), and ``standardise``: whether they were subtracted and divided by.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    val_images: Tensor
    val_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: int
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(type(self.classes) is int and self.classes > 0, f"classes: expected a positive integer, got {self.classes!r}")
        shape = tuple(self.train_images.shape[1:])
        for prefix in _PREFIXES:
            images, labels = self.split(prefix)
            require(
                images.dtype == torch.float32 and images.ndim in (2, 4) and len(images) > 0 and tuple(images.shape[1:]) == shape,
                f"{prefix}_images: expected float32 [N, {', '.join(map(str, shape))}], got {describe(images)}",
            )
            require(
                labels.dtype == torch.int64 and labels.shape == (len(images),),
                f"{prefix}_labels: expected int64 [{len(images)}], got {describe(labels)}",
            )
            low, high = int(labels.min()), int(labels.max())
            require(low >= 0 and high < self.classes, f"{prefix}_labels: expected 0 to {self.classes - 1}, got {low} to {high}")
        object.__setattr__(self, "provenance", MappingProxyType(dict(self.provenance)))

    def split(self, name: str) -> tuple[Tensor, Tensor]:
        """Images and labels of "train", "val" or "test"."""
        require(name in _PREFIXES, f"split: expected one of {_PREFIXES}, got {name!r}")
        return getattr(self, f"{name}_images"), getattr(self, f"{name}_labels")


def load_dataset(
    name_or_path: str | Path, input_shape: Sequence[int], *, seed: int = 0, root: str | Path | None = None, standardise: bool = True
) -> Dataset:
    """Images and labels in an architecture's shape.

    Args:
        name_or_path: a name, or an ``.npz`` file. Names: "digits" (scikit-learn's 1,797 8x8 images, split 1,200 / 200 / 397); "fashion"
            (Fashion-MNIST, a sub-sample of 12,000: 9,000 / 1,000 / 2,000) and "fashion-full" (54,000 / 6,000 / 10,000); "photos"
            (32x32 patches of ten scikit-image photographs, 3,000 / 500 / 1,000: texture identification); "svhn", "cifar10", "eurosat"
            and "stl10" with the splits and the normalisation of the published zoos. A file has ``images`` and ``labels`` (split
            0.7 / 0.1 / 0.2), or ``train_images``, ``train_labels``, ``test_images``, ``test_labels`` and maybe ``val_images``,
            ``val_labels`` (without them one eighth of train is held out). Images are uint8 or floats ``[N, H, W]``, ``[N, C, H, W]``
            or ``[N, H, W, C]``; labels integers ``[N]`` from 0.
        input_shape: ``(C, H, W)``, or ``(features,)``: images are resized bilinearly, one channel is repeated where C are
            wanted; for a flat architecture they are flattened, after resizing to a square where sizes differ.
        seed: of the split; 0 is the published one where there is one.
        root: folder with a named data set's files, as torchvision lays them out; default ``data``, and for fashion also where Debian's
            dataset-fashion-mnist puts them.
        standardise: subtract the training images' mean of each channel and divide by their standard deviation (or the published ones).
            False: pixels as they are, bytes in [0, 1]. Models answer as they did for their owner only on what they were trained on.

    Raises:
        WslfastError: naming file and key, what was expected and what came; for a package that is missing, how to install it.
    """
    shape = tuple(input_shape)
    require(
        len(shape) in (1, 3) and all(type(s) is int and s > 0 for s in shape),
        f"input_shape: expected (C, H, W) or (features,), got {input_shape!r}",
    )
    check_seed(seed)
    require(type(standardise) is bool, f"standardise: expected True or False, got {describe(standardise)}")
    if str(name_or_path) in NAMES and str(name_or_path) != "digits":
        name, source = str(name_or_path), read_named(str(name_or_path), root, seed)
    else:
        name, raw, facts = _raw(name_or_path, shape[0] if len(shape) == 3 else None)
        source = Source(_split(raw, name, seed), facts)
    parts, provenance = source.parts, source.provenance
    images = {key: _resized(pixels, shape, f"{name}: {key}") for key, (pixels, _) in parts.items()}
    train = images["train"].double()
    axes = (0,) if train.ndim == 2 else (0, 2, 3)
    if source.normalisation is not None and train.ndim == 4:
        mean, std = (torch.tensor(values, dtype=torch.float64) for values in source.normalisation)
    else:
        mean, std = (train.mean(), train.std(correction=0)) if train.ndim == 2 else (train.mean(axes), train.std(axes, correction=0))
    std = torch.where(std > 0, std, 1.0)
    view = (1, -1) if train.ndim == 2 else (1, -1, 1, 1)
    arrays: dict[str, Tensor] = {}
    for key, (_, labels) in parts.items():
        pixels = (images[key] - mean.float().view(view)) / std.float().view(view) if standardise else images[key]
        arrays[f"{key}_images"] = pixels.contiguous()
        arrays[f"{key}_labels"] = labels
    classes = 1 + max(int(labels.max()) for _, labels in parts.values())
    sizes = [len(labels) for _, labels in parts.values()]
    made: dict[str, Any] = {"seed": seed, "sizes": sizes, "mean": mean.reshape(-1).tolist(), "std": std.reshape(-1).tolist()}
    if str(name_or_path) not in NAMES:
        _say(name, standardise, made["mean"], made["std"])
    return Dataset(name, **arrays, classes=classes, provenance={**provenance, **made, "standardise": standardise})  # type: ignore[arg-type]


def _say(name: str, standardise: bool, mean: Sequence[float], std: Sequence[float]) -> None:
    """Say once what was done to a file's pixels: whoever trained on others gets other answers."""
    if not standardise:
        say_once(f"wslfast: {name}: images are taken as they are, not standardised", logging.INFO)
        return
    figures = "; ".join(f"{what} {', '.join(f'{v:.4g}' for v in values[:4])}" for what, values in (("mean", mean), ("deviation", std)))
    say_once(f"wslfast: {name}: images are standardised by those of the training split ({figures})", logging.INFO)


def image_shape(name_or_path: str | Path) -> tuple[int, int, int]:
    """``(C, H, W)`` of a dataset's images before any resizing; of a named one, what it is meant for (digits: 28x28)."""
    if str(name_or_path) in NAMES:
        return named_shape(str(name_or_path))
    _, raw, _ = _raw(name_or_path, None)
    return tuple(next(iter(raw.values()))[0].shape[1:])  # type: ignore[return-value]


def _raw(source: str | Path, channels: int | None) -> tuple[str, Parts, dict[str, Any]]:
    """Name, images ``[N, C, H, W]`` float32 with labels by prefix ("" where there is no split), and provenance."""
    if str(source) == "digits":
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise WslfastError("dataset 'digits' is scikit-learn's: pip install wslfast[eval]") from None
        digits = load_digits()
        pixels = torch.from_numpy(np.ascontiguousarray(digits.images)).float().div_(16).unsqueeze(1)
        return "digits", {"": (pixels, torch.from_numpy(digits.target).long())}, {"source": "scikit-learn load_digits"}
    path = Path(source)
    require(path.suffix == ".npz", f"dataset: expected one of {', '.join(NAMES)} or a path ending in .npz, got {str(source)!r}")
    require(path.is_file(), f"dataset: {path}: no such file")
    try:
        with np.load(path, allow_pickle=False) as file:
            require(isinstance(file, np.lib.npyio.NpzFile), f"{path}: expected an .npz archive")
            prefixes = _layout(list(file.files), path)
            raw = {p: _pair(file, f"{p}_" if p else "", path, channels) for p in prefixes}
    except WslfastError:
        raise
    except Exception as error:  # zipfile, zlib and numpy each have their own for a damaged or pickled file
        raise WslfastError(f"{path}: cannot be read as .npz without pickle: {type(error).__name__}: {error}") from None
    shapes = {tuple(images.shape[1:]) for images, _ in raw.values()}
    require(len(shapes) == 1, f"{path}: expected images of one shape in every split, got {sorted(shapes)}")
    return path.name, raw, {"source": path.name, "path": str(path.resolve()), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def _layout(keys: Sequence[str], path: Path) -> tuple[str, ...]:
    """Prefixes of the arrays to read. Raises WslfastError if neither layout is complete."""
    if {"images", "labels"} <= set(keys):
        return ("",)
    have = tuple(p for p in _PREFIXES if {f"{p}_images", f"{p}_labels"} <= set(keys))
    require(
        "train" in have and "test" in have,
        f"{path}: expected keys 'images' and 'labels', or 'train_images', 'train_labels', 'test_images' and 'test_labels'; "
        f"got {sorted(keys)[:8]}",
    )
    return have


def _pair(file: Mapping[str, np.ndarray], prefix: str, path: Path, channels: int | None) -> tuple[Tensor, Tensor]:
    images, labels = file[f"{prefix}images"], file[f"{prefix}labels"]
    where = f"{path}: {prefix}images"
    require(
        images.dtype == np.uint8 or images.dtype.kind == "f",
        f"{where}: expected uint8 or floating, got {images.dtype}",
    )
    require(
        images.ndim in (3, 4) and 0 not in images.shape,
        f"{where}: expected [N, H, W], [N, C, H, W] or [N, H, W, C], got {list(images.shape)}",
    )
    pixels = torch.from_numpy(np.ascontiguousarray(images, dtype=np.float32))
    require(bool(pixels.isfinite().all()), f"{where}: expected finite numbers")
    if images.dtype == np.uint8:
        pixels = pixels / 255
    pixels = pixels.unsqueeze(1) if pixels.ndim == 3 else _channels_first(pixels, channels, where)
    where = f"{path}: {prefix}labels"
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]  # a column, as some archives have it
    require(labels.dtype.kind in "iu", f"{where}: expected integers, got {labels.dtype}")
    require(labels.shape == (len(pixels),), f"{where}: expected [{len(pixels)}] like the images, got {list(labels.shape)}")
    low, high = int(labels.min()), int(labels.max())
    require(low >= 0 and high < 1 << 20, f"{where}: expected labels from 0 upwards, got {low} to {high}")
    return pixels, torch.from_numpy(labels.astype(np.int64))


def _channels_first(pixels: Tensor, channels: int | None, where: str) -> Tensor:
    """``[N, C, H, W]`` from either order: the axis that fits the architecture, else the one that is short enough for channels."""
    first, last = pixels.shape[1], pixels.shape[3]
    for fits in (lambda size: size == channels, lambda size: size <= 4):
        if fits(first):
            return pixels
        if fits(last):
            return pixels.permute(0, 3, 1, 2).contiguous()
    raise WslfastError(f"{where}: expected [N, C, H, W] or [N, H, W, C] with at most 4 channels, or {channels}, got {list(pixels.shape)}")


def _split(raw: Parts, name: str, seed: int) -> Parts:
    """Train, val and test, cut by a permutation of their own generator where the source does not say."""
    generator = torch.Generator().manual_seed(seed)
    if "" in raw:
        images, labels = raw[""]
        n = len(images)
        sizes = _DIGITS if name == "digits" else tuple(max(1, round(share * n)) for share in _FRACTIONS[:2])
        order = torch.randperm(n, generator=generator)
        cuts = order.tensor_split((sizes[0], sizes[0] + sizes[1]))
        parts = {prefix: (images[rows], labels[rows]) for prefix, rows in zip(_PREFIXES, cuts, strict=True)}
    else:
        parts = dict(raw)
        if "val" not in raw:
            images, labels = raw["train"]
            held, kept = torch.randperm(len(images), generator=generator).tensor_split((max(1, len(images) // 8),))
            parts["val"], parts["train"] = (images[held], labels[held]), (images[kept], labels[kept])
    short = [prefix for prefix, (images, _) in parts.items() if len(images) == 0]
    require(not short, f"{name}: expected images in every split, got none for {short}")
    return {prefix: parts[prefix] for prefix in _PREFIXES}


def _resized(pixels: Tensor, shape: tuple[int, ...], where: str) -> Tensor:
    """``[N, C, H, W]`` as the architecture wants it."""
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
    return F.interpolate(pixels, (height, width), mode="bilinear", align_corners=False, antialias=shrinks)
