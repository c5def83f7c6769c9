"""Data sets that were pickled whole: images and labels are those that the data set itself gives, and nothing of it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from wslfast.errors import WslfastError
from wslfast.safe.data_sets import pair_of
from wslfast.safe.inert import InertFile
from wslfast.zoo import load_dataset


class OwnClass:
    """As scripts write them: a class that no reader has."""

    def __init__(self, data: Any, targets: Any, transform: Any = None) -> None:
        self.data, self.targets, self.transform = data, targets, transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> tuple[Any, Any]:
        return self.data[i], self.targets[i]


X, Y = torch.arange(96.0).reshape(6, 1, 4, 4), torch.arange(6) % 3
TENSORS = TensorDataset(X, Y)
FORMS: dict[str, Any] = {
    "own class": OwnClass(X, Y),
    "bytes and a list": OwnClass(X.byte(), Y.tolist()),
    "tensors": TENSORS,
    "subset": Subset(TENSORS, [4, 1, 1]),
    "subset of a subset": Subset(Subset(TENSORS, [4, 1, 3]), torch.tensor([2, 0])),  # type: ignore[arg-type]
    "range": Subset(TENSORS, range(1, 6, 2)),
    "in a row": ConcatDataset([TENSORS, Subset(TENSORS, [0])]),
    "pairs": [(X[j], int(Y[j])) for j in range(6)],
}


def _pair(tmp_path: Path, value: Any, **options: Any) -> Any:
    torch.save({"trainset": value}, tmp_path / "d.pt")
    with InertFile(tmp_path / "d.pt") as file:
        return pair_of(file.root["trainset"], "trainset", **options)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_what_the_data_set_gives(tmp_path: Path, form: str) -> None:
    value = FORMS[form]
    images, labels = _pair(tmp_path, value)
    expected = [value[j] for j in range(len(value))]
    assert torch.equal(images, torch.stack([image for image, _ in expected]))
    assert labels.tolist() == [int(label) for _, label in expected]


@pytest.mark.parametrize("form", [form for form in FORMS if form != "pairs"])
def test_a_zoos_own_data_set_is_of_any_of_these(tmp_path: Path, form: str) -> None:
    value = FORMS[form]
    torch.save({"trainset": value, "testset": FORMS["tensors"]}, tmp_path / "d.pt")
    data = load_dataset(tmp_path / "d.pt", (1, 4, 4), standardise=False)
    assert len(data.train_images) + len(data.val_images) == len(value)
    assert torch.equal(data.test_labels, Y)


def test_without_labels_there_are_none(tmp_path: Path) -> None:
    for value in (X, TensorDataset(X), ConcatDataset([TensorDataset(X), TENSORS])):
        assert _pair(tmp_path, value)[1] is None


@pytest.mark.parametrize(
    ("value", "options", "words"),
    [
        (OwnClass(X, Y, OwnClass), {"refuse_transforms": True}, r"trainset: it changes its images when they are read \(transform\)"),
        (Subset(TENSORS, [6]), {}, "leave its data set"),
        (Subset(TENSORS, [-1]), {}, "leave its data set"),
        (ConcatDataset([TENSORS, TensorDataset(X[:, :, 1:], Y)]), {}, "expected data sets of one shape"),
        (OwnClass([X[0], X[1, :, 1:]], Y), {}, "expected tensors of one shape"),
        (OwnClass("somewhere", Y), {}, "expected tensors or whole numbers"),
        (Subset(TENSORS, range(1 << 30)), {}, "a range of 1,073,741,824 images"),
        (3, {}, "a data set of an unknown kind"),
    ],
)
def test_what_is_no_data_set_is_named(tmp_path: Path, value: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(WslfastError, match=words):
        _pair(tmp_path, value, **options)


def test_data_sets_in_data_sets_have_an_end(tmp_path: Path) -> None:
    inside: Any = Subset(TENSORS, [0])
    for _ in range(9):
        inside = Subset(inside, [0])
    with pytest.raises(WslfastError, match="nested too deeply"):
        _pair(tmp_path, inside)
