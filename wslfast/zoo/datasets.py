"""Labelled images to train a zoo on: data sets known by name, or files of arrays. Nothing is downloaded.

Images come standardised (train mean and standard deviation of each channel, or the published ones) unless asked otherwise, in the
shape that an architecture wants, split once by a seed where their owner did not. What implicit representations are asked, a grid of
coordinates, is a data set without labels.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import WslfastError, check_seed, describe, present, require, say_once
from ..kernels.default_device import on_the_cpu
from .arrays import ENDINGS, as_images, fitted, read_arrays, shapes_of
from .catalogue import NAMES, Parts, Source, named_shape, read_named
from .coordinates import PREFIX, grid_points, is_grid
from .manifest import SPLITS

_FRACTIONS = (0.7, 0.1, 0.2)
_DIGITS = (1200, 200, 397)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images and labels in three splits, standardised unless ``provenance["standardise"]`` is False.

    Attributes:
        name: what to call it: one of ``NAMES`` (digits, fashion, photos, ...), a grid's, or a file's name.
        train_images, val_images, test_images: float32 ``[N, *input_shape]``: ``[N, C, H, W]``, ``[N, features]``, ...
        train_labels, val_labels, test_labels: int64 ``[N]``, in ``range(classes)``.
        classes: how many labels there are; 0 where answers are no classes (coordinates of implicit representations): labels are zeros then.
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
        require(type(self.classes) is int and self.classes >= 0, f"classes: expected an integer >= 0, got {self.classes!r}")
        shape = tuple(self.train_images.shape[1:])
        for prefix in SPLITS:
            images, labels = self.split(prefix)
            require(
                images.dtype == torch.float32 and images.ndim >= 2 and len(images) > 0 and tuple(images.shape[1:]) == shape,
                f"{prefix}_images: expected float32 [N, {', '.join(map(str, shape))}], got {describe(images)}",
            )
            require(
                labels.dtype == torch.int64 and labels.shape == (len(images),),
                f"{prefix}_labels: expected int64 [{len(images)}], got {describe(labels)}",
            )
            low, high = int(labels.min()), int(labels.max())
            most = max(self.classes, 1) - 1
            require(low >= 0 and high <= most, f"{prefix}_labels: expected 0 to {most}, got {low} to {high}")
        object.__setattr__(self, "provenance", MappingProxyType(dict(self.provenance)))

    def __reduce__(self) -> tuple[Any, ...]:  # pickled, copied and saved as what it is made of
        tensors = (tensor for prefix in SPLITS for tensor in self.split(prefix))
        return Dataset, (self.name, *tensors, self.classes, dict(self.provenance))

    def __repr__(self) -> str:
        sizes = " / ".join(str(len(self.split(prefix)[1])) for prefix in SPLITS)
        what = f"{self.classes} classes" if self.classes else "no labels"
        return f"Dataset({self.name!r}, {list(self.train_images.shape[1:])}, train / val / test {sizes}, {what})"

    def split(self, name: str) -> tuple[Tensor, Tensor]:
        """Images and labels of "train", "val" or "test"."""
        require(name in SPLITS, f"split: expected one of {SPLITS}, got {name!r}")
        return getattr(self, f"{name}_images"), getattr(self, f"{name}_labels")


@on_the_cpu
def load_dataset(
    name_or_path: str | Path,
    input_shape: Sequence[int],
    *,
    seed: int = 0,
    root: str | Path | None = None,
    standardise: bool = True,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    unlabelled: bool = False,
    grey: bool = False,
    first_label: int = 0,
) -> Dataset:
    """Images and labels in an architecture's shape.

    Args:
        name_or_path: a name, or a file. Names: "digits" (scikit-learn's 1,797 8x8 images, split 1,200 / 200 / 397); "fashion"
            (Fashion-MNIST, a sub-sample of 12,000: 9,000 / 1,000 / 2,000) and "fashion-full" (54,000 / 6,000 / 10,000); "photos"
            (32x32 patches of ten scikit-image photographs, 3,000 / 500 / 1,000: texture identification); "svhn", "cifar10", "eurosat"
            and "stl10" with the splits and the normalisation of the published zoos; "grid:28x28" and the like, the coordinates of
            pixels (:mod:`wslfast.zoo.coordinates`), the same points in every split, never standardised. An ``.npz`` file has
            ``train_images``, ``train_labels``, ``test_images``, ``test_labels`` and maybe ``val_images``, ``val_labels`` (without them one
            eighth of train is held out), or one pair ``images`` and ``labels`` (split 0.7 / 0.1 / 0.2); ``x_train`` and ``y_train``,
            ``X`` and ``y``, ``data`` and ``targets`` are read as these. Images are uint8 or floats ``[N, H, W]``, ``[N, C, H, W]``,
            ``[N, H, W, C]`` or any ``[N, *input_shape]``; labels whole numbers ``[N]`` from 0, or one-hot rows. A ``.pt`` file is the
            ``dataset.pt`` that model-zoo code writes (a dict of ``trainset``, ``valset``, ``testset``), read without running any of it.
        input_shape: of one query: ``(C, H, W)``, ``(features,)`` or any other. Images are resized bilinearly, one channel is repeated
            where C are wanted; for a flat architecture they are flattened, after resizing to a square where sizes differ.
        seed: of the split, where the owner did not split; 0 is the published one where there is one.
        root: folder with a named data set's files, as torchvision lays them out; default ``data``, and for fashion also where Debian's
            dataset-fashion-mnist puts them.
        standardise: subtract the training images' mean of each channel and divide by their standard deviation (or the published ones).
            False: pixels as they are, bytes in [0, 1]. Models answer as they did for their owner only on what they were trained on.
        mean, std: what is subtracted and divided by instead, a number for each channel or one for all; both or neither.
        unlabelled: a file without labels, or with ones that are no whole numbers, has no classes: models are compared by their outputs.
            Otherwise it is an error.
        grey: three channels are averaged where one is wanted.
        first_label: what the owner calls the first class, 0 or 1.

    Raises:
        WslfastError: naming file and key, what was expected and what came; for a package that is missing, how to install it.
    """
    shape = tuple(input_shape)
    require(
        1 <= len(shape) <= 8 and all(type(s) is int and s > 0 for s in shape),
        f"input_shape: expected (C, H, W), (features,) or other positive integers, got {input_shape!r}",
    )
    check_seed(seed)
    require(type(standardise) is bool, f"standardise: expected True or False, got {describe(standardise)}")
    given = _given(mean, std)
    drawn: dict[str, Any] = {}
    if is_grid(str(name_or_path)):
        return _grid(str(name_or_path), shape)
    if str(name_or_path) in NAMES and str(name_or_path) != "digits":
        name, source = str(name_or_path), read_named(str(name_or_path), root, seed)
    else:
        name, raw, facts = _raw(name_or_path, unlabelled)
        drawn = {"split": "drawn"} if set(raw) == {""} and name not in NAMES else {}
        source = Source(_split(raw, name, seed), facts)
    parts, provenance = source.parts, source.provenance
    require(first_label in (0, 1), f"first_label: expected 0 or 1, got {first_label!r}")
    if first_label:
        lowest = min(int(labels.min()) for _, labels in parts.values())
        require(lowest >= first_label, f"{name}: labels: expected {first_label} upwards, got {lowest}")
        parts = {key: (pixels, labels - first_label) for key, (pixels, labels) in parts.items()}
    images = {key: fitted(pixels, shape, f"{name}: images", grey) for key, (pixels, _) in parts.items()}
    center, scale = _normalisation(images["train"], source.normalisation if given is None else given, name)
    standardise = standardise or given is not None
    view = (1, -1, 1, 1) if images["train"].ndim == 4 else (1,) * images["train"].ndim
    arrays: dict[str, Tensor] = {}
    for key, (_, labels) in parts.items():
        pixels = (images[key] - center.float().view(view)) / scale.float().view(view) if standardise else images[key]
        arrays[f"{key}_images"] = pixels.contiguous()
        arrays[f"{key}_labels"] = labels
    classes = 0 if source.provenance.get("labels") == "none" else 1 + max(int(labels.max()) for _, labels in parts.values())
    sizes = [len(labels) for _, labels in parts.values()]
    record: dict[str, Any] = {"seed": seed, "sizes": sizes, **drawn, "mean": center.reshape(-1).tolist(), "std": scale.reshape(-1).tolist()}
    record |= {**({} if given is None else {"given": True}), **({"grey": True} if grey else {})}
    record |= {"first_label": first_label} if first_label else {}
    if str(name_or_path) not in NAMES or given is not None:
        _say(name, standardise, record["mean"], record["std"], given is not None)
    return Dataset(name, **arrays, classes=classes, provenance={**provenance, **record, "standardise": standardise})  # type: ignore[arg-type]


def _given(mean: Sequence[float] | None, std: Sequence[float] | None) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and deviation that a caller states, checked."""
    if mean is None and std is None:
        return None
    mean, std = (present(values, "mean, std: expected both or neither") for values in (mean, std))
    numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) and abs(v) < 1e30 for v in (*mean, *std))
    fits = numbers and len(mean) == len(std) > 0 and all(v > 0 for v in std)
    require(
        fits,
        f"mean, std: expected as many numbers each, a channel's or one for all, std above 0, got {tuple(mean)!r:.60} {tuple(std)!r:.60}",
    )
    return tuple(map(float, mean)), tuple(map(float, std))


def _normalisation(train: Tensor, stated: tuple[Sequence[float], Sequence[float]] | None, name: str) -> tuple[Tensor, Tensor]:
    """Mean and deviation ``[C]`` of images ``[N, C, H, W]``, of all numbers of others ``[1]``: those stated, else their own; float64."""
    channels = train.shape[1] if train.ndim == 4 else 1
    if stated is not None and (train.ndim == 4 or len(stated[0]) == 1):  # published figures of channels say nothing of flat rows
        counts = len(stated[0]) in (1, channels)
        require(counts, f"mean, std: expected 1 or {channels} numbers for the images of {name}, got {len(stated[0])}")
        mean, std = (torch.tensor(values, dtype=torch.float64).expand(channels) for values in stated)
        return mean, std
    axes = (0, 2, 3) if train.ndim == 4 else tuple(range(train.ndim))
    mean, std = train.double().mean(axes), train.double().std(axes, correction=0)
    return mean, torch.where(std > 0, std, 1.0)


def _say(name: str, standardise: bool, mean: Sequence[float], std: Sequence[float], given: bool) -> None:
    """Say once what was done to a file's pixels: whoever trained on others gets other answers."""
    if not standardise:
        say_once(f"wslfast: {name}: images are taken as they are, not standardised", logging.INFO)
        return
    figures = "; ".join(f"{what} {', '.join(f'{v:.4g}' for v in values[:4])}" for what, values in (("mean", mean), ("deviation", std)))
    whose = "the figures given" if given else "those of the training split"
    say_once(f"wslfast: {name}: images are standardised by {whose} ({figures})", logging.INFO)


def image_shape(name_or_path: str | Path) -> tuple[int, int, int]:
    """``(C, H, W)`` of a dataset's images before any resizing; of a named one, what it is meant for (digits: 28x28)."""
    if str(name_or_path) in NAMES:
        return named_shape(str(name_or_path))
    name, raw, _ = _raw(name_or_path, True)
    return tuple(as_images(next(iter(raw.values()))[0][:1], None, f"{name}: images").shape[1:])  # type: ignore[return-value]


def input_shapes(name_or_path: str | Path) -> tuple[list[tuple[int, ...]], int]:
    """Input shapes that a network for these images may have, the likeliest first, and the number of their classes (0: none)."""
    name = str(name_or_path)
    if is_grid(name):
        return [tuple(grid_points(name)[0].shape[1:])], 0
    if name in NAMES and name != "digits":
        channels, height, width = named_shape(name)
        return [(channels, height, width), (channels * height * width,)], 10
    _, raw, facts = _raw(name_or_path, True)
    classes = 0 if facts.get("labels") == "none" else 1 + max(int(labels.max()) for _, labels in raw.values())
    if name == "digits":
        return [(1, 28, 28), (1, 8, 8), (784,), (64,)], classes
    return shapes_of(next(iter(raw.values()))[0]), classes


def _grid(name: str, shape: tuple[int, ...]) -> Dataset:
    points, facts = grid_points(name)
    require(
        tuple(points.shape[1:]) == shape, f"data set {name!r}: expected points of {list(shape)} coordinates, got {list(points.shape[1:])}"
    )
    none = torch.zeros(len(points), dtype=torch.int64)
    record = {"seed": 0, "sizes": [len(points)] * 3, "mean": [float(points.double().mean())], "std": [float(points.double().std())]}
    provenance = {**facts, **record, "standardise": False}
    return Dataset(name, points, none, points, none, points, none, classes=0, provenance=provenance)


def _raw(source: str | Path, unlabelled: bool = False) -> tuple[str, Parts, dict[str, Any]]:
    """Name, numbers ``[N, ...]`` float32 with labels by prefix ("" where there is no split), and provenance."""
    if str(source) == "digits":
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise WslfastError("dataset 'digits' is scikit-learn's: pip install wslfast[eval]") from None
        digits = load_digits()
        pixels = torch.from_numpy(np.ascontiguousarray(digits.images)).float().div_(16).unsqueeze(1)
        return "digits", {"": (pixels, torch.from_numpy(digits.target).long())}, {"source": "scikit-learn load_digits"}
    path = Path(source)
    names = f"{', '.join(NAMES)}, {PREFIX}28x28"
    require(path.suffix in ENDINGS, f"dataset: expected one of {names} or a path ending in {' or '.join(ENDINGS)}, got {str(source)!r}")
    raw, facts = read_arrays(path, unlabelled)
    return path.name, raw, facts


def _split(raw: Parts, name: str, seed: int) -> Parts:
    """Train, val and test, cut by a permutation of their own generator where the source does not say."""
    generator = torch.Generator().manual_seed(seed)
    if "" in raw:
        images, labels = raw[""]
        n = len(images)
        sizes = _DIGITS if name == "digits" else tuple(max(1, round(share * n)) for share in _FRACTIONS[:2])
        order = torch.randperm(n, generator=generator)
        cuts = order.tensor_split((sizes[0], sizes[0] + sizes[1]))
        parts = {prefix: (images[rows], labels[rows]) for prefix, rows in zip(SPLITS, cuts, strict=True)}
    else:
        parts = dict(raw)
        if "val" not in raw:
            images, labels = raw["train"]
            held, kept = torch.randperm(len(images), generator=generator).tensor_split((max(1, len(images) // 8),))
            parts["val"], parts["train"] = (images[held], labels[held]), (images[kept], labels[kept])
    short = [prefix for prefix, (images, _) in parts.items() if len(images) == 0]
    require(not short, f"{name}: expected images in every split, got none for {short}")
    return {prefix: parts[prefix] for prefix in SPLITS}
