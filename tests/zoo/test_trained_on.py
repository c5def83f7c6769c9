"""The data a zoo was trained on: as the models saw it, with the labels they know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from own_networks import SHAPE, images
from torch import nn

from wslfast import Population, WslfastError, load_zoo, save_zoo
from wslfast.measure.recorded import check_recorded
from wslfast.zoo import dataset_of, import_zoo, load_dataset


def test_images_as_the_models_saw_them(tmp_path: Path) -> None:
    file = images(tmp_path)
    raw = torch.from_numpy(np.load(file)["test_images"]).float().div(255).unsqueeze(1)
    plain = load_dataset(file, SHAPE, standardise=False)
    given = load_dataset(file, SHAPE, mean=[0.5], std=[0.25])
    torch.testing.assert_close(plain.test_images, raw, rtol=0, atol=0)
    torch.testing.assert_close(given.test_images, (raw - 0.5) / 0.25)
    assert given.provenance["standardise"] is True
    for mean, std in (([0.5, 0.5], [1.0, 1.0]), ([0.5], [0.0]), ([0.5], None), (["a"], [1.0])):
        with pytest.raises(WslfastError, match="mean, std"):
            load_dataset(file, SHAPE, mean=mean, std=std)  # type: ignore[arg-type]


def test_labels_that_go_from_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of a network with as many outputs as there are labels, the first class is 0; of one with one more, labels are what they say."""
    code = "from torch import nn\n\n\ndef three():\n    return nn.Sequential(nn.Flatten(), nn.Linear(16, 3))\n\n\n"
    (tmp_path / "net.py").write_text(code + "def four():\n    return nn.Sequential(nn.Flatten(), nn.Linear(16, 4))\n")
    pixels, labels = np.random.default_rng(0).random((40, 4, 4), dtype=np.float32), np.arange(40) % 3 + 1
    np.savez(tmp_path / "images.npz", train_images=pixels[:20], train_labels=labels[:20], test_images=pixels[20:], test_labels=labels[20:])
    for name, outputs, first in (("three", 3, 1), ("four", 4, 0)):
        (tmp_path / name).mkdir()
        torch.save({"1.weight": torch.randn(outputs, 16), "1.bias": torch.randn(outputs)}, tmp_path / name / "a.pt")
        with caplog.at_level("INFO", logger="wslfast"):
            import_zoo(tmp_path / name, tmp_path / f"zoo-{name}", network=f"{tmp_path}/net.py:{name}", dataset=tmp_path / "images.npz")
        data = dataset_of(tmp_path / f"zoo-{name}", load_zoo(tmp_path / f"zoo-{name}").architecture)
        assert torch.equal(data.test_labels, torch.from_numpy(labels[20:] - first))
        assert ("labels go from 1 to 3" in caplog.text) == (first == 1)
        caplog.clear()
    np.savez(tmp_path / "images.npz", images=pixels, labels=labels + 3)
    with pytest.raises(WslfastError, match=r"7 classes, and architecture 'three' has 3 outputs .*leave them out of the file"):
        import_zoo(tmp_path / "three", tmp_path / "zoo", network=f"{tmp_path}/net.py:three", dataset=tmp_path / "images.npz")


def test_a_data_set_that_was_moved_may_lie_beside_the_zoo(tmp_path: Path, nets: list[nn.Module]) -> None:
    file = images(tmp_path)
    (tmp_path / "models").mkdir()
    torch.save(nets[0].state_dict(), tmp_path / "models" / "n.pt")
    import_zoo(tmp_path / "models", tmp_path / "zoos" / "zoo", network=f"{tmp_path}/net.py:Net", dataset=file)
    arch = load_zoo(tmp_path / "zoos" / "zoo").architecture
    before = dataset_of(tmp_path / "zoos" / "zoo", arch)
    moved = file.rename(tmp_path / "elsewhere.npz")
    with pytest.raises(
        WslfastError, match=r"data set 'images\.npz' was .*which is not there; put the file into the zoo's folder, or beside it"
    ):
        dataset_of(tmp_path / "zoos" / "zoo", arch)
    moved.rename(tmp_path / "zoos" / file.name)
    assert torch.equal(dataset_of(tmp_path / "zoos" / "zoo", arch).test_images, before.test_images)


def test_a_zoo_remembers_mean_and_deviation(tmp_path: Path, nets: list[nn.Module]) -> None:
    file = images(tmp_path)
    (tmp_path / "models").mkdir()
    torch.save(nets[0].state_dict(), tmp_path / "models" / "n.pt")
    settings: dict[str, Any] = {"network": f"{tmp_path}/net.py:Net", "dataset": file}
    import_zoo(tmp_path / "models", tmp_path / "zoo", mean=[0.4], std=[0.2], **settings)
    import_zoo(tmp_path / "models", tmp_path / "own", standardise=True, **settings)
    raw = torch.from_numpy(np.load(file)["train_images"]).float().div(255).unsqueeze(1)
    arch = load_zoo(tmp_path / "zoo").architecture
    torch.testing.assert_close(dataset_of(tmp_path / "zoo", arch).train_images, (raw - 0.4) / 0.2)
    torch.testing.assert_close(dataset_of(tmp_path / "own", arch).train_images, (raw - raw.mean()) / raw.std(correction=0))


def test_accuracies_on_another_split_name_the_remedy(tmp_path: Path, nets: list[nn.Module], caplog: pytest.LogCaptureFixture) -> None:
    """One pair of images and labels: their owner's test images are not known, and that is said beside accuracies that differ."""
    with np.load(images(tmp_path)) as file:
        np.savez(tmp_path / "pair.npz", images=file["train_images"], labels=file["train_labels"])
    population = Population.from_modules(nets, SHAPE, {"test_acc": [0.9] * 6})
    save_zoo(population, tmp_path / "zoo", dataset=tmp_path / "pair.npz")
    data = dataset_of(tmp_path / "zoo", population.architecture)
    assert check_recorded(population, torch.full((6,), 0.3), data, "zoo") == pytest.approx(0.6)
    assert "one pair images, labels, so that they were drawn here: name train_images, ... test_labels" in caplog.text


def test_without_labels_there_are_no_classes(tmp_path: Path) -> None:
    file = images(tmp_path, labels=False)
    data = load_dataset(file, SHAPE, standardise=False, unlabelled=True)
    assert (data.classes, len(data.test_images)) == (0, 16)
    np.savez(tmp_path / "regression.npz", images=np.zeros((20, 3)), labels=np.random.default_rng(0).normal(size=(20, 2)))
    assert load_dataset(tmp_path / "regression.npz", (3,), standardise=False, unlabelled=True).classes == 0
    with pytest.raises(WslfastError, match="expected keys"):
        load_dataset(file, SHAPE)
    with pytest.raises(WslfastError, match="labels: expected integers"):
        load_dataset(tmp_path / "regression.npz", (3,))
