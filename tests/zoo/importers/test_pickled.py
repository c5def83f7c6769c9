"""Zoos that were pickled whole, read without their class."""

from __future__ import annotations

import sys
import types
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import FP32, FP32_ROUNDING
from torch import nn
from zoo_trees import ARCH, population

from wslfast import Architecture, Population, TokenLayout, WslfastError, load_zoo
from wslfast.zoo import import_zoo


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> type:
    """A class in a module that will not exist when the file is read."""
    module = types.ModuleType("shrp_gone.datasets")
    monkeypatch.setitem(sys.modules, "shrp_gone", types.ModuleType("shrp_gone"))
    monkeypatch.setitem(sys.modules, "shrp_gone.datasets", module)
    module.DatasetTokens = type("DatasetTokens", (), {"__module__": "shrp_gone.datasets"})  # type: ignore[attr-defined]
    return module.DatasetTokens


def _dataset(kind: type, rows: Population, mode: str, standardize: Any) -> Any:
    """What the published class holds: ``data`` model by epoch, properties, epochs, the reference, and the standardisation."""
    weights, layers = rows.weights.clone(), {}
    if standardize:
        for slot in ARCH.parameters:
            if slot.name.endswith("weight"):
                bias = ARCH.slots[slot.name.replace("weight", "bias")]
                part = torch.cat([weights[:, slot.offset : slot.stop], weights[:, bias.offset : bias.stop]], 1)
                if standardize == "minmax":
                    low, high = float(part.min()), float(part.max())
                    layers[slot.name] = {"min": low, "max": high}
                    scale, shift = (high - low) / 2, (high + low) / 2
                else:
                    scale, shift = float(part.std()), float(part.mean())
                    layers[slot.name] = {"mean": shift, "std": scale}
                for s in (slot, bias):
                    weights[:, s.offset : s.stop] = (weights[:, s.offset : s.stop] - shift) / scale
    stored = Population(ARCH, weights)
    tokens = TokenLayout(ARCH).tokenize(weights).tokens
    flat: list[Any] = [t.clone() for t in tokens] if mode == "vector" else [OrderedDict(s) for s in stored.state_dicts()]
    dataset = kind()
    dataset.data = [flat[i : i + 3] for i in range(0, len(flat), 3)]
    dataset.epochs = [[0, 2, 5]] * len(dataset.data)
    dataset.paths = [[Path("/somewhere/else")] * 3] * len(dataset.data)
    dataset.properties = {"test_acc": [[0.1, 0.2, 0.3]] * len(dataset.data), "optim::lr": [[1e-3] * 3] * len(dataset.data)}
    dataset.reference_checkpoint, dataset.reference_config = OrderedDict(rows.state_dict(0)), {"model::type": "CNN", "model::nlin": "relu"}
    dataset.standardize, dataset.layers, dataset.ignore_bn, dataset.transforms = standardize, layers, False, nn.Sequential(nn.ReLU())
    return dataset


@pytest.mark.parametrize("standardize", [False, True, "minmax"], ids=str)
@pytest.mark.parametrize("mode", ["vector", "checkpoint"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "stream"])
def test_pickled_data_sets_are_read_without_their_class(
    tmp_path: Path, published: type, mode: str, standardize: Any, zipped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = population()
    for number, split in enumerate(("train", "val", "test")):
        part = rows[list(range(6 * number, 6 * number + 6))]
        torch.save(_dataset(published, part, mode, standardize), tmp_path / f"dataset_{split}.pt", _use_new_zipfile_serialization=zipped)
    monkeypatch.delitem(sys.modules, "shrp_gone.datasets")
    done = import_zoo(tmp_path, tmp_path / "out")
    zoo = load_zoo(tmp_path / "out")
    assert (done.rows, done.models, dict(done.skipped)) == (18, 6, {})
    torch.testing.assert_close(zoo.weights, rows.weights, rtol=FP32, atol=FP32_ROUNDING if standardize else 0.0)
    assert zoo.properties["split"] == ("train",) * 6 + ("val",) * 6 + ("test",) * 6
    assert zoo.properties["epoch"] == (0, 2, 5) * 6
    assert zoo.properties["test_acc"] == (0.1, 0.2, 0.3) * 6
    assert zoo.properties["lr"] == (1e-3,) * 18
    one = import_zoo(tmp_path / "dataset_val.pt", tmp_path / "one", epochs=[5])
    assert (one.rows, one.models) == (2, 2)


def test_running_statistics_were_standardised_twice(tmp_path: Path, published: type) -> None:
    """The published class goes over a key and then over its bias; a running statistic's bias is itself."""
    arch = Architecture.resnet18(num_classes=2, width=4)
    true = torch.rand(2, arch.num_weights, generator=torch.Generator().manual_seed(0)) + 0.25
    stored, layers = true.clone(), {}
    for name in arch.slots:
        if any(part in name for part in ("weight", "running_mean", "running_var")):
            scale, shift = 2.0, 0.5
            layers[name] = {"mean": shift, "std": scale}
            for key in (name, name.replace("weight", "bias")):  # the same key twice where there is no "weight" in it
                if key in arch.slots:
                    s = arch.slots[key]
                    stored[:, s.offset : s.stop] = (stored[:, s.offset : s.stop] - shift) / scale
    dataset = published()
    dataset.data = [[OrderedDict(state)] for state in Population(arch, stored).state_dicts()]
    dataset.epochs, dataset.properties = [[1]] * 2, {}
    dataset.reference_checkpoint, dataset.reference_config = OrderedDict(Population(arch, true).state_dict(0)), {}
    dataset.standardize, dataset.layers, dataset.ignore_bn = True, layers, False
    torch.save(dataset, tmp_path / "zoo.pt")
    import_zoo(tmp_path / "zoo.pt", tmp_path / "out", architecture=arch, split=(1.0, 0.0, 0.0))
    torch.testing.assert_close(load_zoo(tmp_path / "out").weights, true, rtol=FP32, atol=FP32)


def test_epoch_0_is_dropped_from_the_published_list_of_epochs(tmp_path: Path, published: type) -> None:
    rows = population(2)
    dataset = _dataset(published, rows, "checkpoint", False)
    dataset.epochs, dataset.properties = [[2, 5]] * 2, {"test_acc": [[0.2, 0.3]] * 2}
    dataset.labels = [[f"/zoo/{m}#_#epoch_{e}" for e in (0, 2, 5)] for m in range(2)]
    torch.save(dataset, tmp_path / "zoo.pt")
    import_zoo(tmp_path / "zoo.pt", tmp_path / "out", split=(1.0, 0.0, 0.0))
    zoo = load_zoo(tmp_path / "out")
    assert zoo.properties["epoch"] == (0, 2, 5) * 2
    assert zoo.properties["test_acc"] == (None, 0.2, 0.3) * 2
    assert torch.equal(zoo.weights, rows.weights)
    del dataset.labels  # then nobody knows which the third is
    torch.save(dataset, tmp_path / "zoo.pt")
    with pytest.raises(WslfastError, match="epoch unknown: 6"):
        import_zoo(tmp_path / "zoo.pt", tmp_path / "unknown")


def test_a_flat_list_of_checkpoints_keeps_a_model_together(tmp_path: Path, published: type) -> None:
    rows = population(4)
    dataset = _dataset(published, rows, "checkpoint", False)
    dataset.data = [row for model in dataset.data for row in model]
    dataset.epochs, dataset.properties = [0, 2, 5] * 4, {}
    dataset.paths = [f"/zoo/{m}" for m in range(4) for _ in range(3)]
    torch.save(dataset, tmp_path / "zoo.pt")
    done = import_zoo(tmp_path / "zoo.pt", tmp_path / "out", split=(0.5, 0.25, 0.25))
    zoo = load_zoo(tmp_path / "out")
    assert (done.rows, done.models) == (12, 4)
    assert zoo.properties["model"] == (0,) * 3 + (1,) * 3 + (2,) * 3 + (3,) * 3
    assert zoo.properties["epoch"] == (0, 2, 5) * 4
    assert all(len({zoo.properties["split"][3 * m + e] for e in range(3)}) == 1 for m in range(4))


def test_a_broken_file_among_several_is_left_out(tmp_path: Path, published: type) -> None:
    for number, split in enumerate(("train", "test")):
        part = population(4)[list(range(6 * number, 6 * number + 6))]
        torch.save(_dataset(published, part, "checkpoint", False), tmp_path / f"dataset_{split}.pt")
    (tmp_path / "dataset_val.pt").write_bytes(b"nothing of torch's")
    done = import_zoo(tmp_path, tmp_path / "out")
    assert (done.rows, dict(done.skipped)) == (12, {"unreadable data set": 1})
    assert set(load_zoo(tmp_path / "out").properties["split"]) == {"train", "test"}


def test_a_dict_of_data_sets_is_read(tmp_path: Path, published: type) -> None:
    rows = population()
    torch.save(
        {"trainset": _dataset(published, rows[:12], "vector", False), "testset": _dataset(published, rows[12:], "vector", False)},
        tmp_path / "dataset.pt",
    )
    import_zoo(tmp_path / "dataset.pt", tmp_path / "out")
    assert load_zoo(tmp_path / "out").properties["split"] == ("train",) * 12 + ("test",) * 6


def test_a_normalisation_that_forgets_is_refused(tmp_path: Path, published: type) -> None:
    dataset = _dataset(published, population(), "vector", False)
    dataset.standardize = "l2_ind"
    torch.save(dataset, tmp_path / "dataset_train.pt")
    with pytest.raises(WslfastError, match="forgets the weights' size"):
        import_zoo(tmp_path, tmp_path / "out")
