"""Data sets known by name, read from local files; nothing is downloaded.

``fashion``, ``svhn``, ``cifar10``, ``eurosat`` and ``stl10`` come through torchvision's readers, split and normalised as the published
zoos are (arXiv 2503.17138); ``photos`` is made of scikit-image's photographs (``photos.py``).
"""

from __future__ import annotations

import gzip
import hashlib
import logging
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import random_split

from ..errors import WslfastError, require, say_once
from .manifest import SPLITS
from .photos import photo_patches

Parts = dict[str, tuple[Tensor, Tensor]]  # images [N, C, H, W] float32 in [0, 1] and labels [N] int64, by split

_SHAPES = {
    "digits": (1, 28, 28), "fashion": (1, 28, 28), "fashion-full": (1, 28, 28), "photos": (3, 32, 32),
    "svhn": (3, 32, 32), "cifar10": (3, 32, 32), "eurosat": (3, 32, 32), "stl10": (3, 32, 32),
}  # fmt: skip
NAMES = tuple(_SHAPES)
PUBLISHED_MEAN, PUBLISHED_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_PUBLISHED_SEED = 2020  # of the image splits of the published zoos
_SUBSAMPLE = (10_000, 2_000)  # of fashion's 60,000 and 10,000 images
_IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
_DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # where the package dataset-fashion-mnist puts them
_WHERE = {
    "svhn": "train_32x32.mat and test_32x32.mat", "cifar10": "cifar-10-batches-py/", "eurosat": "eurosat/2750/", "stl10": "stl10_binary/",
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """Images of a named data set in their splits, before they are normalised.

    Attributes:
        parts: images and labels of "train", "val" and "test".
        provenance: where they came from, with the SHA-256 of all pixels and labels.
        normalisation: mean and standard deviation of each channel, where they are given rather than measured.
    """

    parts: Parts
    provenance: dict[str, Any]
    normalisation: tuple[Sequence[float], Sequence[float]] | None = None


def named_shape(name: str) -> tuple[int, int, int]:
    """``(C, H, W)`` that a named data set is meant for."""
    return _SHAPES[name]


def read_named(name: str, root: str | Path | None, seed: int) -> Source:
    """A data set of :data:`NAMES` other than digits.

    Args:
        name: which.
        root: folder with the files as torchvision lays them out; default ``data`` in the current folder. For fashion also a folder
            of the four idx files, packed or not; by default that of Debian's dataset-fashion-mnist is looked for as well.
        seed: of the split; 0 is the published split.

    Raises:
        WslfastError: files or packages are missing, and what to install or where to put them.
    """
    published = (PUBLISHED_MEAN, PUBLISHED_STD) if _SHAPES[name][0] == 3 else None  # of gray images they are measured
    provenance: dict[str, Any] = {"source": f"torchvision {name}"}
    if name == "photos":
        arrays = photo_patches(seed)
        return _source({key: (_pixels(x), torch.from_numpy(y)) for key, (x, y) in arrays.items()}, {"source": "scikit-image photographs"})
    generator = torch.Generator().manual_seed(_PUBLISHED_SEED + seed)
    if name == "eurosat":
        folder = Path(root or "data")
        images, labels = _read(name, folder, "all")
        return _source(_cut(images, labels, (0.8, 0.05, 0.15), generator), {**provenance, "root": str(folder.resolve())}, published)
    if name.startswith("fashion"):
        folder = _fashion_folder(root)
        (images, labels), (test_images, test_labels) = _fashion(folder)
        if name == "fashion":
            (images, labels), (test_images, test_labels) = (
                (x[rows], y[rows])
                for x, y, rows in (
                    (images, labels, torch.randperm(len(images), generator=generator)[: _SUBSAMPLE[0]]),
                    (test_images, test_labels, torch.randperm(len(test_images), generator=generator)[: _SUBSAMPLE[1]]),
                )
            )
            provenance["subsample"] = list(_SUBSAMPLE)
    else:
        folder = Path(root or "data")
        (images, labels), (test_images, test_labels) = _read(name, folder, "train"), _read(name, folder, "test")
    cut = int(0.9 * len(images))
    train, val = _cut(images, labels, (cut, len(images) - cut), generator).values()
    parts = {"train": train, "val": val, "test": (test_images, test_labels)}
    return _source(parts, {**provenance, "root": str(folder.resolve())}, published)


def _source(parts: Parts, provenance: dict[str, Any], normalisation: tuple[Sequence[float], Sequence[float]] | None = None) -> Source:
    digest = hashlib.sha256()
    for images, labels in parts.values():
        for array in (images, labels):
            digest.update(array.contiguous().numpy().data)
    return Source(parts, {**provenance, "sha256": digest.hexdigest()}, normalisation)


def _cut(images: Tensor, labels: Tensor, sizes: Sequence[float], generator: torch.Generator) -> Parts:
    """Train, val (and test) as ``random_split`` of torch draws them."""
    parts: list[Any] = random_split(range(len(images)), sizes, generator)  # type: ignore[arg-type]
    return {key: (images[part.indices], labels[part.indices]) for key, part in zip(SPLITS, parts, strict=False)}


def _pixels(images: np.ndarray) -> Tensor:
    """uint8 ``[N, H, W]``, ``[N, H, W, 3]`` or ``[N, 3, H, W]`` -> float32 ``[N, C, H, W]`` in [0, 1]."""
    pixels = torch.from_numpy(np.ascontiguousarray(images))
    pixels = pixels.unsqueeze(1) if pixels.ndim == 3 else pixels if pixels.shape[1] == 3 else pixels.permute(0, 3, 1, 2)
    return pixels.contiguous().float().div_(255)


# -- through torchvision -------------------------------------------------------------------------------------------------


def _torchvision() -> Any:
    """``torchvision``, or a WslfastError that says what to install."""
    try:
        import torchvision

        return torchvision
    except ImportError:
        raise WslfastError("torchvision is missing: pip install wslfast[vision]") from None
    except RuntimeError as error:
        # its operators come compiled against one build of torch; beside another the import fails with "torchvision::nms does not exist"
        raise WslfastError(
            f"torchvision does not load beside torch {torch.__version__} ({error}): its operators belong to another build of torch. "
            "Install torch and torchvision as one pair, both from the same index and both for the CPU or both for CUDA "
            "(pip install --force-reinstall torch torchvision), or keep the images in an .npz file"
        ) from None


def _read(name: str, root: Path, split: str) -> tuple[Tensor, Tensor]:
    """Images and labels of one official split, resized to 32x32 by torchvision where they are larger."""
    vision = _torchvision()
    try:
        if name == "svhn":
            data = vision.datasets.SVHN(root, split=split)
        elif name == "cifar10":  # pickled batches: torchvision opens them only if their checksums are the published ones
            data = vision.datasets.CIFAR10(root, train=split == "train")
        elif name == "stl10":
            data = vision.datasets.STL10(root, split=split, transform=vision.transforms.Resize((32, 32)))
        else:
            data = vision.datasets.EuroSAT(root, transform=vision.transforms.Resize((32, 32)))
        if name in ("svhn", "cifar10"):
            labels = data.labels if name == "svhn" else data.targets
            return _pixels(data.data), torch.as_tensor(np.asarray(labels, dtype=np.int64))
        pairs = [data[i] for i in range(len(data))]
    except Exception as error:  # each reader has its own for files that are missing, damaged or of another kind
        raise WslfastError(f"dataset {name!r}: expected {_WHERE[name]} in {root} (--data says where): {error}") from None
    return _pixels(np.stack([np.asarray(image) for image, _ in pairs])), torch.tensor([label for _, label in pairs])


def _fashion_folder(root: str | Path | None) -> Path:
    """Folder of the four idx files."""
    places = [Path("data"), _DEBIAN] if root is None else [Path(root)]
    folders = [f for place in places for f in (place / "FashionMNIST" / "raw", place, place / "fashion-mnist")]
    for folder in folders:
        if all((folder / name).is_file() or (folder / f"{name}.gz").is_file() for name in _IDX):
            return folder
    raise WslfastError(
        f"dataset 'fashion': expected {_IDX[0]} and three more (or .gz) in one of {', '.join(map(str, places))}; install Debian's "
        "dataset-fashion-mnist, or say where they are with --data"
    )


def _fashion(folder: Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Official train and test images: by torchvision's reader, or, where torchvision does not load, by our own."""
    with tempfile.TemporaryDirectory() as temporary:
        raw = Path(temporary) / "FashionMNIST" / "raw"
        raw.mkdir(parents=True)
        try:
            for name in _IDX:
                packed = folder / f"{name}.gz"
                opener: Any = open if (folder / name).is_file() else gzip.open
                with opener(folder / name if opener is open else packed, "rb") as source, open(raw / name, "wb") as target:
                    shutil.copyfileobj(source, target)
            try:
                reader = _torchvision().datasets.FashionMNIST
            except WslfastError:
                say_once("fashion: torchvision does not load here; its files are read without it", logging.INFO)
                arrays = [_idx(raw / name) for name in _IDX]
            else:
                both = [reader(temporary, train=train) for train in (True, False)]
                arrays = [array.numpy() for data in both for array in (data.data, data.targets)]
        except (OSError, EOFError, ValueError, RuntimeError, AssertionError) as error:
            raise WslfastError(f"dataset 'fashion': the files in {folder} cannot be read: {error}") from None
    x, y, test_x, test_y = arrays
    return (_pixels(x), torch.from_numpy(y.astype(np.int64))), (_pixels(test_x), torch.from_numpy(test_y.astype(np.int64)))


def _idx(path: Path) -> np.ndarray:
    """An idx file of unsigned bytes: two zeros, a type, the number of axes, their sizes as big-endian int32, the data."""
    content = path.read_bytes()
    require(len(content) > 4 and content[:3] == b"\0\0\x08", f"{path.name}: not an idx file of unsigned bytes")
    start = 4 + 4 * content[3]
    shape = tuple(np.frombuffer(content[4:start], ">i4").tolist())
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy()
