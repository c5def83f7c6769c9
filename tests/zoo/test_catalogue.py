"""Named data sets against small files of the real formats, written here byte by byte, and photographs that know where they are."""

from __future__ import annotations

import gzip
import hashlib
import pickle
import struct
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from tolerances import FP32

from wslfast import Architecture, WslfastError, build_zoo
from wslfast.zoo import catalogue, dataset_of, load_dataset, photos
from wslfast.zoo.datasets import image_shape

RNG = np.random.default_rng(0)
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def published(images: np.ndarray) -> np.ndarray:
    """uint8 ``[N, H, W, 3]`` as the published pipeline normalises them, ``[N, 3, H, W]``."""
    return ((images / 255 - MEAN) / STD).transpose(0, 3, 1, 2)


def order(n: int) -> list[int]:
    return torch.randperm(n, generator=torch.Generator().manual_seed(2020)).tolist()


def check_published(data: Any, train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray]) -> None:
    """Nine tenths of the official training images for training, one tenth for validation, by seed 2020; the official test images."""
    images, labels = train
    kept = int(0.9 * len(images))
    for split, rows in (("train", order(len(images))[:kept]), ("val", order(len(images))[kept:])):
        np.testing.assert_allclose(data.split(split)[0].numpy(), published(images[rows]), atol=FP32)
        assert data.split(split)[1].tolist() == labels[rows].tolist()
    np.testing.assert_allclose(data.test_images.numpy(), published(test[0]), atol=FP32)
    assert data.test_labels.tolist() == test[1].tolist()
    assert data.provenance["mean"] == pytest.approx(MEAN.tolist())
    assert data.provenance["std"] == pytest.approx(STD.tolist())


# -- fashion -----------------------------------------------------------------------------------------------------------


def write_fashion(folder: Path, train: int = 40, test: int = 20, packed: bool = True) -> dict[str, np.ndarray]:
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for prefix, n in (("train", train), ("t10k", test)):
        arrays[prefix] = RNG.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        arrays[f"{prefix}-labels"] = RNG.permutation(np.arange(n) % 10).astype(np.uint8)
        for kind, array in (("images-idx3", arrays[prefix]), ("labels-idx1", arrays[f"{prefix}-labels"])):
            content = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()
            name = f"{prefix}-{kind}-ubyte"
            (folder / (f"{name}.gz" if packed else name)).write_bytes(gzip.compress(content) if packed else content)
    return arrays


def without_torchvision(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(sys.modules, "torchvision", None)


@pytest.mark.parametrize("place", ["", "FashionMNIST/raw", "fashion-mnist"])
@pytest.mark.parametrize("reader", ["torchvision", "own"])
def test_fashion(tmp_path: Path, place: str, reader: str, torchvision: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = write_fashion(tmp_path / place, packed=place != "FashionMNIST/raw")
    if reader == "own":
        without_torchvision(monkeypatch)
    data = load_dataset("fashion-full", (1, 28, 28), root=tmp_path)
    rows = order(40)[:36]
    mean, std = arrays["train"][rows].mean() / 255, arrays["train"][rows].std() / 255
    np.testing.assert_allclose(data.train_images[:, 0].numpy(), (arrays["train"][rows] / 255 - mean) / std, atol=FP32)
    np.testing.assert_allclose(data.test_images[:, 0].numpy(), (arrays["t10k"] / 255 - mean) / std, atol=FP32)
    assert data.train_labels.tolist() == arrays["train-labels"][rows].tolist()
    assert data.val_labels.tolist() == arrays["train-labels"][order(40)[36:]].tolist()
    assert data.test_labels.tolist() == arrays["t10k-labels"].tolist()


def test_fashion_is_a_stated_sub_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert catalogue._SUBSAMPLE == (10_000, 2_000)
    monkeypatch.setattr(catalogue, "_SUBSAMPLE", (20, 7))
    without_torchvision(monkeypatch)
    arrays = write_fashion(tmp_path)
    data = load_dataset("fashion", (1, 28, 28), root=tmp_path)
    assert [len(data.split(s)[1]) for s in ("train", "val", "test")] == [18, 2, 7]
    pixels = torch.cat([data.train_images, data.val_images])[:, 0] * data.provenance["std"][0] + data.provenance["mean"][0]
    known = {image.tobytes() for image in arrays["train"]}
    drawn = {image.tobytes() for image in (pixels * 255).round().byte().numpy()}
    assert len(drawn) == 20
    assert drawn <= known
    assert data.provenance["subsample"] == [20, 7]


def test_fashion_errors_say_where_to_put_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_torchvision(monkeypatch)
    with pytest.raises(WslfastError, match=r"train-images-idx3-ubyte.*dataset-fashion-mnist.*--data"):
        load_dataset("fashion", (1, 28, 28), root=tmp_path)
    write_fashion(tmp_path)
    images = tmp_path / "train-images-idx3-ubyte.gz"
    for bad in (
        images.read_bytes()[:100],
        gzip.compress(b"\0\0\x09\x01aaaa"),
        gzip.compress(b"\0\0\x08\x03" + b"\0\0\1\0" * 3),
        b"nothing",
    ):
        images.write_bytes(bad)
        with pytest.raises(WslfastError, match="fashion"):
            load_dataset("fashion", (1, 28, 28), root=tmp_path)


def test_a_zoo_finds_its_named_data_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_torchvision(monkeypatch)
    write_fashion(tmp_path / "files")
    arch = Architecture.mlp(784, (4,), 10, dropout=0.0)
    build_zoo("fashion", tmp_path / "zoo", architecture=arch, models=4, epochs=1, split=(0.5, 0.25, 0.25), root=tmp_path / "files")
    data = dataset_of(tmp_path / "zoo", arch)
    assert torch.equal(data.train_images, load_dataset("fashion", (784,), root=tmp_path / "files").train_images)
    write_fashion(tmp_path / "files")  # other images in the same place
    with pytest.raises(WslfastError, match=r"data set 'fashion' is not what it was trained on"):
        dataset_of(tmp_path / "zoo", arch)


# -- through torchvision -----------------------------------------------------------------------------------------------


def test_svhn(tmp_path: Path, torchvision: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    matlab = pytest.importorskip("scipy.io")
    parts = {}
    for split, n in (("train", 31), ("test", 12)):
        images, labels = RNG.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8), RNG.permutation(np.arange(n) % 10)
        path = tmp_path / f"{split}_32x32.mat"
        matlab.savemat(path, {"X": images.transpose(1, 2, 3, 0), "y": np.where(labels == 0, 10, labels)[:, None].astype(np.uint8)})
        monkeypatch.setitem(torchvision.datasets.SVHN.split_list, split, ["", path.name, md5(path)])
        parts[split] = images, labels
    check_published(load_dataset("svhn", (3, 32, 32), root=tmp_path), parts["train"], parts["test"])


def test_cifar10(tmp_path: Path, torchvision: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    reader = torchvision.datasets.CIFAR10
    batches = {}
    for name, n in [(f"data_batch_{i}", 7) for i in range(1, 6)] + [("test_batch", 11)]:
        images, labels = RNG.integers(0, 256, (n, 3072), dtype=np.uint8), RNG.integers(0, 10, n).tolist()
        (folder / name).write_bytes(pickle.dumps({"data": images, "labels": labels}))
        batches[name] = images.reshape(n, 3, 32, 32).transpose(0, 2, 3, 1), np.array(labels)
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    with pytest.raises(WslfastError, match=r"cifar10.*not found or corrupted"):  # pickles of other checksums are not opened
        load_dataset("cifar10", (3, 32, 32), root=tmp_path)
    monkeypatch.setattr(reader, "train_list", [[f"data_batch_{i}", md5(folder / f"data_batch_{i}")] for i in range(1, 6)])
    monkeypatch.setattr(reader, "test_list", [["test_batch", md5(folder / "test_batch")]])
    monkeypatch.setattr(reader, "meta", {"filename": "batches.meta", "key": "label_names", "md5": md5(folder / "batches.meta")})
    train = [np.concatenate([batches[f"data_batch_{i}"][j] for i in range(1, 6)]) for j in range(2)]
    check_published(load_dataset("cifar10", (3, 32, 32), root=tmp_path), (train[0], train[1]), batches["test_batch"])


def resized(images: np.ndarray) -> np.ndarray:
    pillow = pytest.importorskip("PIL.Image")
    return np.stack([np.asarray(pillow.fromarray(i).resize((32, 32), pillow.Resampling.BILINEAR)) for i in images])


def test_stl10(tmp_path: Path, torchvision: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    parts = {}
    for split, n in (("train", 20), ("test", 12)):
        images, labels = RNG.integers(0, 256, (n, 96, 96, 3), dtype=np.uint8), np.arange(n) % 10
        (folder / f"{split}_X.bin").write_bytes(images.transpose(0, 3, 2, 1).tobytes())  # each channel column after column
        (folder / f"{split}_y.bin").write_bytes((labels + 1).astype(np.uint8).tobytes())
        sums = [[f"{split}_{a}.bin", md5(folder / f"{split}_{a}.bin")] for a in "Xy"]
        monkeypatch.setattr(torchvision.datasets.STL10, f"{split}_list", sums)
        parts[split] = resized(images), labels
    check_published(load_dataset("stl10", (3, 32, 32), root=tmp_path), parts["train"], parts["test"])


def test_eurosat(tmp_path: Path, torchvision: ModuleType) -> None:
    pillow = pytest.importorskip("PIL.Image")
    stored = []
    for label, name in enumerate(("AnnualCrop", "Forest")):
        folder = tmp_path / "eurosat" / "2750" / name
        folder.mkdir(parents=True)
        for i in range(20):
            pillow.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / f"{name}_{i:02}.jpg", quality=90)
            stored.append((np.asarray(pillow.open(folder / f"{name}_{i:02}.jpg")), label))
    images, labels = resized(np.stack([i for i, _ in stored])), np.array([label for _, label in stored])
    data = load_dataset("eurosat", (3, 32, 32), root=tmp_path)
    rows = order(40)
    for split, chosen in (("train", rows[:32]), ("val", rows[32:34]), ("test", rows[34:])):
        np.testing.assert_allclose(data.split(split)[0].numpy(), published(images[chosen]), atol=FP32)
        assert data.split(split)[1].tolist() == labels[chosen].tolist()


@pytest.mark.parametrize("name", ["svhn", "cifar10", "eurosat", "stl10"])
def test_missing_files_are_named(name: str, tmp_path: Path, torchvision: ModuleType) -> None:
    with pytest.raises(WslfastError, match=rf"dataset '{name}': expected .* in .*--data"):
        load_dataset(name, (3, 32, 32), root=tmp_path)
    assert image_shape(name) == (3, 32, 32)


def test_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refuses:
        def find_spec(self, name: str, *_: Any) -> None:
            if name == "torchvision":
                raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Refuses(), *sys.meta_path])
    with pytest.raises(WslfastError, match=r"torchvision::nms.*Install torch and torchvision as one pair"):
        load_dataset("cifar10", (3, 32, 32))
    without_torchvision(monkeypatch)
    with pytest.raises(WslfastError, match=r"pip install wslfast\[vision\]"):
        load_dataset("svhn", (3, 32, 32))
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(WslfastError, match=r"pip install wslfast\[photos\]"):
        load_dataset("photos", (3, 32, 32))


# -- photos ------------------------------------------------------------------------------------------------------------


def test_no_cell_is_in_two_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Photographs whose red and green are row and column: every patch says where it was cut."""
    y, x = np.mgrid[:250, :200].astype(np.uint8)
    noise = RNG.integers(0, 256, (250, 200), dtype=np.uint8)
    monkeypatch.setattr(photos, "_photograph", lambda name: np.stack([y, x, noise], 2))
    cells: dict[tuple[int, int, int], set[str]] = {}
    for split, (patches, labels) in photos.photo_patches().items():
        assert patches.shape[1:] == (32, 32, 3)
        for patch, label in zip(patches, labels, strict=True):
            corners = {(int(patch[i, j, 0]) // 64, int(patch[i, j, 1]) // 64) for i in (0, -1) for j in (0, -1)}
            assert len(corners) == 1, "a patch lies within one cell"
            cells.setdefault((int(label), *corners.pop()), set()).add(split)
    assert all(len(splits) == 1 for splits in cells.values())
    assert len(cells) == 10 * 9, "whole cells alone, and all of them"


def test_photos() -> None:
    pytest.importorskip("skimage")
    patches = photos.photo_patches()
    again, other = photos.photo_patches(), photos.photo_patches(1)
    for split, count in (("train", 300), ("val", 50), ("test", 100)):
        images, labels = patches[split]
        assert np.array_equal(images, again[split][0])
        assert not np.array_equal(images, other[split][0])
        assert np.bincount(labels).tolist() == [count] * 10
        assert images.mean(3).std((1, 2)).min() > 0.8, "every patch shows something"
        tints = images[labels >= 7].reshape(3 * count, -1, 3).mean(1)
        tints /= tints.sum(1, keepdims=True)
        assert tints.std(0).min() > 0.03, "the grey photographs' patches have colours of their own"
        assert np.abs(tints - 1 / 3).max(1).min() < 0.05 < np.median(np.abs(tints - 1 / 3).max(1))
    data = load_dataset("photos", (3, 32, 32))
    assert data.classes == 10
    assert data.train_images.double().mean((0, 2, 3)).abs().max() < 1e-5
    assert image_shape("photos") == (3, 32, 32)
