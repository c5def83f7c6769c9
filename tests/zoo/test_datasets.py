"""Data sets against hand-written oracles: what the source holds, a bilinear formula, numpy's own moments."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tolerances import FP32, FP32_ROUNDING

from wslfast.errors import WslfastError
from wslfast.zoo.datasets import Dataset, image_shape, load_dataset

RNG = np.random.default_rng(0)
BYTES = RNG.integers(0, 256, (41, 7, 6), dtype=np.uint8)
LABELS = RNG.integers(0, 5, 41)


def npz(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)
    return path


def test_digits_are_scikit_learns_all_of_them_once() -> None:
    sk = pytest.importorskip("sklearn.datasets").load_digits()
    data = load_dataset("digits", (1, 8, 8))
    assert [len(data.split(s)[0]) for s in ("train", "val", "test")] == [1200, 200, 397]
    mean, std = data.provenance["mean"][0], data.provenance["std"][0]
    pixels = torch.cat([data.split(s)[0] for s in ("train", "val", "test")])
    labels = torch.cat([data.split(s)[1] for s in ("train", "val", "test")])
    grey = ((pixels.double() * std + mean) * 16).round().int().flatten(1)
    ours = sorted(map(tuple, torch.cat([grey, labels[:, None].int()], 1).tolist()))
    theirs = sorted(map(tuple, np.concatenate([sk.data, sk.target[:, None]], 1).astype(int).tolist()))
    assert ours == theirs
    assert data.classes == 10


def test_digits_split_is_fixed_and_normalised_by_train() -> None:
    pytest.importorskip("sklearn")
    data, again, other = (load_dataset("digits", (1, 28, 28), seed=s) for s in (0, 0, 1))
    assert torch.equal(data.test_images, again.test_images)
    assert not torch.equal(data.test_labels, other.test_labels)
    assert data.train_images.shape == (1200, 1, 28, 28)
    assert data.train_images.is_contiguous()
    train = data.train_images.double()
    assert abs(train.mean().item()) < 1e-5
    assert abs(train.std(correction=0).item() - 1) < 1e-5


def test_three_channels_are_one_repeated() -> None:
    pytest.importorskip("sklearn")
    one, three = load_dataset("digits", (1, 32, 32)), load_dataset("digits", (3, 32, 32))
    assert three.val_images.shape == (200, 3, 32, 32)
    for channel in range(3):
        torch.testing.assert_close(three.val_images[:, channel], one.val_images[:, 0])


def test_digits_without_scikit_learn_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(WslfastError, match=r"pip install wslfast\[eval\]"):
        load_dataset("digits", (1, 28, 28))


def test_bilinear_by_hand(tmp_path: Path) -> None:
    path = npz(tmp_path / "a.npz", images=BYTES, labels=LABELS)
    native, large = load_dataset(path, (1, 7, 6)), load_dataset(path, (1, 15, 13))
    source = native.test_images[3, 0].double().numpy() * native.provenance["std"][0] + native.provenance["mean"][0]
    expected = np.empty((15, 13))
    for i in range(15):
        for j in range(13):
            y, x = (min(max((c + 0.5) * s / t - 0.5, 0), s - 1) for c, s, t in ((i, 7, 15), (j, 6, 13)))
            a, b = int(y), int(x)
            c, d = min(a + 1, 6), min(b + 1, 5)
            rows = [source[r, b] * (1 - (x - b)) + source[r, d] * (x - b) for r in (a, c)]
            expected[i, j] = rows[0] * (1 - (y - a)) + rows[1] * (y - a)
    got = large.test_images[3, 0].double().numpy() * large.provenance["std"][0] + large.provenance["mean"][0]
    np.testing.assert_allclose(got, expected, atol=FP32_ROUNDING)


@pytest.mark.parametrize(
    "images",
    [
        pytest.param(BYTES, id="NHW uint8"),
        pytest.param(BYTES[:, None], id="NCHW uint8"),
        pytest.param(BYTES[..., None], id="NHWC uint8"),
        pytest.param(BYTES / 255.0, id="NHW float64"),
        pytest.param(np.asfortranarray(BYTES).astype(np.float32) / np.float32(255), id="fortran float32"),
        pytest.param((BYTES / 255.0).astype(">f8"), id="big endian"),
    ],
)
def test_layouts_are_one_dataset(tmp_path: Path, images: np.ndarray) -> None:
    expected = load_dataset(npz(tmp_path / "a.npz", images=BYTES, labels=LABELS), (1, 7, 6))
    data = load_dataset(npz(tmp_path / "b.npz", images=images, labels=LABELS.astype(np.uint8)), (1, 7, 6))
    assert [len(data.split(s)[1]) for s in ("train", "val", "test")] == [29, 4, 8]
    for split in ("train", "val", "test"):
        torch.testing.assert_close(data.split(split)[0], expected.split(split)[0], atol=FP32, rtol=FP32)
        assert torch.equal(data.split(split)[1], expected.split(split)[1])
    assert image_shape(tmp_path / "b.npz") == (1, 7, 6)


def test_channels_go_where_the_architecture_has_them(tmp_path: Path) -> None:
    images = RNG.random((20, 6, 6, 13))
    data = load_dataset(npz(tmp_path / "a.npz", images=images, labels=LABELS[:20]), (13, 6, 6))
    other = load_dataset(npz(tmp_path / "b.npz", images=images.transpose(0, 3, 1, 2), labels=LABELS[:20]), (13, 6, 6))
    assert torch.equal(data.train_images, other.train_images)
    moments = data.train_images.double()
    assert moments.mean((0, 2, 3)).abs().max() < 1e-5, "each channel is normalised by itself"
    with pytest.raises(WslfastError, match=r"a\.npz: images: expected \[N, C, H, W\]"):
        load_dataset(tmp_path / "a.npz", (1, 6, 6))


def test_given_splits_are_kept(tmp_path: Path) -> None:
    parts = {f"{p}_images": BYTES[i * 10 : i * 10 + 10] for i, p in enumerate(("train", "val", "test"))}
    parts |= {f"{p}_labels": LABELS[i * 10 : i * 10 + 10, None] for i, p in enumerate(("train", "val", "test"))}
    data = load_dataset(npz(tmp_path / "a.npz", **parts), (1, 7, 6))
    for i, split in enumerate(("train", "val", "test")):
        assert data.split(split)[1].tolist() == LABELS[i * 10 : i * 10 + 10].tolist()
    del parts["val_images"]
    data = load_dataset(npz(tmp_path / "b.npz", **parts), (1, 7, 6), seed=4)
    assert len(data.val_labels) == 1
    assert sorted([*data.val_labels.tolist(), *data.train_labels.tolist()]) == sorted(LABELS[:10].tolist())
    assert data.test_labels.tolist() == LABELS[20:30].tolist()


def test_flat_architectures_get_rows(tmp_path: Path) -> None:
    path = npz(tmp_path / "a.npz", images=BYTES, labels=LABELS)
    image, row = load_dataset(path, (1, 7, 6)), load_dataset(path, (42,))
    assert row.train_images.shape == (29, 42)
    torch.testing.assert_close(row.train_images, image.train_images.flatten(1), atol=FP32, rtol=FP32)
    assert load_dataset(path, (16,)).test_images.shape == (8, 16)
    with pytest.raises(WslfastError, match="cannot make 17 features"):
        load_dataset(path, (17,))


@pytest.mark.parametrize("shape", [(1, 7, 6), (42,), (3, 7, 6)], ids=["image", "flat", "repeated"])
def test_images_as_they_are(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = npz(tmp_path / "a.npz", images=BYTES, labels=LABELS)
    raw, usual = load_dataset(path, shape, standardise=False), load_dataset(path, shape)
    assert (raw.provenance["standardise"], usual.provenance["standardise"]) == (False, True)
    assert {k: v for k, v in raw.provenance.items() if k != "standardise"} == {
        k: v for k, v in usual.provenance.items() if k != "standardise"
    }
    rows = [tuple(row) for row in BYTES.reshape(41, -1).tolist()]
    for split in ("train", "val", "test"):
        pixels, labels = raw.split(split)
        assert torch.equal(labels, usual.split(split)[1])
        for image, label in zip(pixels.reshape(len(pixels), -1, 42), labels.tolist(), strict=True):
            for channel in image:
                assert LABELS[rows.index(tuple((channel * 255).round().int().tolist()))] == label
        mean, std = (torch.tensor(raw.provenance[k]).reshape([1, -1] + [1] * (len(shape) - 1)) for k in ("mean", "std"))
        torch.testing.assert_close((pixels - mean) / std, usual.split(split)[0], atol=FP32, rtol=FP32)
    with pytest.raises(WslfastError, match="standardise: expected True or False, got 1"):
        load_dataset(path, shape, standardise=1)  # type: ignore[arg-type]


def test_a_constant_channel_does_not_divide_by_zero(tmp_path: Path) -> None:
    data = load_dataset(npz(tmp_path / "a.npz", images=np.full((20, 4, 4), 7, np.uint8), labels=LABELS[:20]), (1, 4, 4))
    assert torch.equal(data.train_images, torch.zeros(14, 1, 4, 4))


KEYS = {"keras": "{0}_{1}", "camel": "{1}{2}", "long": "{1}_{3}", "dots": "{1}.{0}"}


@pytest.mark.parametrize("form", KEYS)
def test_arrays_by_other_names(tmp_path: Path, form: str) -> None:
    """x_train, trainX, train_inputs, val.x; what is called by our names is taken first."""
    ours, theirs = {}, {}
    for split, part in (("train", slice(20)), ("val", slice(20, 30)), ("test", slice(30, 41))):
        for own, short, long, array in (("images", "x", "inputs", BYTES), ("labels", "y", "targets", LABELS)):
            ours[f"{split}_{own}"] = array[part]
            name = "validation" if split == "val" and form == "long" else split
            theirs[KEYS[form].format(short, name, short.upper(), long)] = array[part]
    one, other = load_dataset(npz(tmp_path / "a.npz", **ours), (1, 7, 6)), load_dataset(npz(tmp_path / "b.npz", **theirs), (1, 7, 6))
    for split in ("train", "val", "test"):
        assert all(torch.equal(a, b) for a, b in zip(one.split(split), other.split(split), strict=True))
    both = load_dataset(npz(tmp_path / "c.npz", **ours, **{k: v[::-1] for k, v in theirs.items()}, extra=np.array(["not read"])), (1, 7, 6))
    assert torch.equal(both.test_images, one.test_images)


@pytest.mark.parametrize(
    "form",
    [lambda y: y.astype(np.float64), lambda y: np.eye(5)[y], lambda y: np.eye(5, dtype=bool)[y], lambda y: y[:, None].astype(np.uint8)],
    ids=["floats", "one-hot", "one-hot booleans", "a column"],
)
def test_labels_in_other_forms(tmp_path: Path, form: Callable[[np.ndarray], np.ndarray]) -> None:
    one = load_dataset(npz(tmp_path / "a.npz", images=BYTES, labels=LABELS), (1, 7, 6))
    other = load_dataset(npz(tmp_path / "b.npz", images=BYTES, labels=form(LABELS)), (1, 7, 6))
    assert other.classes == 5
    assert torch.equal(one.test_labels, other.test_labels)


@pytest.mark.parametrize("targets", [LABELS - 2.0, LABELS / 2, np.stack([LABELS, LABELS], 1) * 1.0, LABELS * 1e7])
def test_numbers_that_are_no_classes(tmp_path: Path, targets: np.ndarray) -> None:
    file = npz(tmp_path / "a.npz", images=BYTES, labels=targets)
    assert load_dataset(file, (1, 7, 6), unlabelled=True).classes == 0
    with pytest.raises(WslfastError, match="expected integers"):
        load_dataset(file, (1, 7, 6))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        pytest.param({"images": BYTES}, "expected keys 'images' and 'labels'", id="no labels"),
        pytest.param({"train_images": BYTES, "train_labels": LABELS}, "test_images", id="no test"),
        pytest.param({"images": BYTES, "labels": LABELS[:-1]}, r"labels: expected \[41\]", id="too few labels"),
        pytest.param({"images": BYTES, "labels": LABELS + 0.5}, "labels: expected integers", id="float labels"),
        pytest.param({"images": BYTES, "labels": LABELS - 1}, "labels from 0 upwards, got -1", id="negative label"),
        pytest.param({"images": BYTES, "labels": LABELS + 2**40}, "labels from 0 upwards", id="huge label"),
        pytest.param({"images": BYTES.astype(np.int32), "labels": LABELS}, "expected uint8 or floating, got int32", id="int images"),
        pytest.param({"images": BYTES.astype(complex), "labels": LABELS}, "expected uint8 or floating", id="complex images"),
        pytest.param({"images": BYTES[0], "labels": LABELS}, r"labels: expected \[7\]", id="one image"),
        pytest.param({"images": BYTES[0, 0], "labels": LABELS}, r"expected \[N, H, W\]", id="a row of pixels"),
        pytest.param({"images": BYTES[:0], "labels": LABELS[:0]}, r"expected \[N, H, W\]", id="no images"),
        pytest.param({"images": np.where(BYTES == 0, np.nan, BYTES), "labels": LABELS}, "finite", id="NaN"),
        pytest.param({"images": BYTES[:2], "labels": LABELS[:2]}, "got none for", id="two images"),
        pytest.param({"images": BYTES[:, :, :, None].repeat(3, 3), "labels": LABELS}, "expected 1 channels", id="colour"),
        pytest.param(
            {"train_images": BYTES, "train_labels": LABELS, "test_images": BYTES[:, :6], "test_labels": LABELS}, "one shape", id="two sizes"
        ),
    ],
)
def test_errors_name_the_file_and_the_key(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(WslfastError, match=message) as error:
        load_dataset(npz(tmp_path / "bad.npz", **arrays), (1, 7, 6))
    assert "bad.npz" in str(error.value)


class _Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_nothing_pickled_is_opened(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    objects = np.array([_Canary(canary)] * 41, dtype=object)
    npz(tmp_path / "a.npz", images=BYTES, labels=objects)
    (tmp_path / "b.npz").write_bytes(pickle.dumps(_Canary(canary)))
    for name in ("a.npz", "b.npz"):
        with pytest.raises(WslfastError, match=name):
            load_dataset(tmp_path / name, (1, 7, 6))
    assert not canary.exists()


def test_damaged_files_are_one_kind_of_error(tmp_path: Path) -> None:
    data = npz(tmp_path / "a.npz", images=BYTES, labels=LABELS).read_bytes()
    bad = tmp_path / "bad.npz"
    for cut in (0, 1, 30, 300, len(data) // 2, len(data) - 1):
        bad.write_bytes(data[:cut])
        with pytest.raises(WslfastError, match=r"bad\.npz"):
            load_dataset(bad, (1, 7, 6))
    np.save(tmp_path / "array.npy", BYTES)
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    for wrong in (tmp_path / "array.npz", tmp_path / "absent.npz", tmp_path, "mnist", tmp_path / "images.npy"):
        with pytest.raises(WslfastError):
            load_dataset(wrong, (1, 7, 6))


@pytest.mark.parametrize("shape", [(), (0, 28, 28), (1.0, 28, 28), (1,) * 9])
def test_wrong_input_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(WslfastError, match="input_shape"):
        load_dataset("digits", shape)


def test_a_dataset_checks_itself() -> None:
    images, labels = torch.zeros(4, 1, 5, 5), torch.arange(4)
    Dataset("mine", images, labels, images, labels, images, labels, classes=4)
    with pytest.raises(WslfastError, match="val_labels: expected 0 to 2, got 0 to 3"):
        Dataset("mine", images, labels.clamp_max(2), images, labels, images, labels, classes=3)
    with pytest.raises(WslfastError, match="test_images"):
        Dataset("mine", images, labels, images, labels, images.double(), labels, classes=4)
    with pytest.raises(WslfastError, match="train_labels"):
        Dataset("mine", images, labels[:3], images, labels, images, labels, classes=4)
