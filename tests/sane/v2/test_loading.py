"""Zoos of ``sane`` 2.x from disk and back: files read without unpickling, images of any class, and nothing of a file run."""

from __future__ import annotations

import json
import pickle
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sane2_package import CNN3, sane2, trial  # noqa: F401 - a fixture

import wslfast
from wslfast.errors import WslfastError
from wslfast.sane import v2
from wslfast.sane.v2 import images, loading
from wslfast.zoo import import_zoo, save_zoo
from wslfast.zoo.splits import Split

SMALL = {"model::type": "Small", "model::o_dim": 3}


@pytest.fixture(autouse=True)
def _fresh() -> None:
    loading._programs.clear()
    loading._templates.clear()


def _same(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert (a.dtype, a.shape, a.stride(), a.requires_grad) == (b.dtype, b.shape, b.stride(), b.requires_grad)
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        assert getattr(a, "_metadata", None) == getattr(b, "_metadata", None)
        for key in a:
            _same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for one, two in zip(a, b):
            _same(one, two)
    else:
        assert a == b


def _forms(seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 3, 2), torch.nn.BatchNorm2d(3), torch.nn.Flatten(), torch.nn.Linear(12, 2))
    base = torch.randn(6, 5)
    return {
        "state": net.state_dict(),
        "wrapped": {"model": OrderedDict(net.state_dict()), "optimizer": {"lr": torch.randn(2)}},
        "window": (torch.randn(2, 5, 4), torch.rand(2, 5, 4) < 0.5, torch.arange(30, dtype=torch.int32).view(2, 5, 3)),
        "views": [base[1:4, ::2], base.t(), base[2], base],  # one storage under several names
        "halves": {"a": torch.randn(3).half(), "b": torch.randn(3).bfloat16(), "c": torch.randn(3).double(), "d": torch.empty(0)},
    }


@pytest.mark.parametrize("form", ["state", "wrapped", "window", "views", "halves"])
def test_files_of_one_program_are_read_as_torch_reads_them(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(3):
        torch.save(_forms(seed)[form], tmp_path / "file.pt")
        _same(loading.load(tmp_path / "file.pt"), torch.load(tmp_path / "file.pt", map_location="cpu"))
    assert list(loading._programs.values()) != [None]
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpickled"))
    read = loading.load(tmp_path / "file.pt")
    _same(read, _forms(2)[form])
    again = loading.load(tmp_path / "file.pt")
    _leaves(read)[0].fill_(7)
    _same(again, _forms(2)[form])  # memory of its own


def _leaves(value: Any) -> list[torch.Tensor]:
    found: list[Any] = []
    loading._leaves(value, found)
    return found


def test_other_programs_and_broken_files_are_torchs_business(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    torch.save({"step": 3, "w": torch.ones(2)}, path)
    _same(loading.load(path), {"step": 3, "w": torch.ones(2)})
    torch.save({"w": torch.nn.Parameter(torch.ones(2))}, path)
    assert loading.load(path)["w"].requires_grad
    assert loading.load(path)["w"].requires_grad
    torch.save(torch.ones(3), path)
    for _ in range(2):
        _same(loading.load(path), torch.ones(3))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RuntimeError):
        loading.load(path)
    place = whole.index(torch.ones(3).numpy().tobytes())
    path.write_bytes(whole[:place] + b"\x01" + whole[place + 1 :])  # its checksum is wrong now
    torch_says = None
    try:
        torch.load(path)
    except RuntimeError as error:
        torch_says = type(error)
    if torch_says is not None:
        with pytest.raises(torch_says):
            loading.load(path)
    with pytest.raises(FileNotFoundError):
        loading.load(tmp_path / "missing.pt")


class _Evil:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("ran"),)


def test_a_file_that_names_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"w": torch.ones(2), "evil": _Evil()}, tmp_path / "file.pt")
    with pytest.raises(pickle.UnpicklingError):
        loading.load(tmp_path / "file.pt")
    torch.save({"trainset": _Evil()}, tmp_path / "dataset.pt")
    with pytest.raises(WslfastError):
        v2.images_of(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("config", [CNN3, SMALL], ids=["CNN3", "batch norm"])
def test_an_item_of_a_zoo_is_the_published_one_and_draws_as_much(sane2: SimpleNamespace, tmp_path: Path, config: dict[str, Any]) -> None:  # noqa: F811
    models = []
    for seed in range(3):
        torch.manual_seed(seed)
        models.append(sane2.zoo_dataset_models.get_model(config))
    infos = [trial(tmp_path, {**config, "lr": 0.1 * seed}, model, epoch=seed, name=f"NN_{seed}") for seed, model in enumerate(models)]
    theirs = sane2.zoo_dataset.ZooDataset
    data, original = theirs(infos), theirs.__getitem__
    for index in (0, 1, 2, 1):
        torch.manual_seed(index)
        expected, drawn = original(data, index), torch.get_rng_state()
        torch.manual_seed(index)
        found = loading.item(data, index, original=original)
        assert torch.equal(drawn, torch.get_rng_state())
        _same(found.model.state_dict(), expected.model.state_dict())
        assert found.metadata == expected.metadata
        assert found.model.training
        assert all(p.requires_grad for p in found.model.parameters())
    assert len(loading._templates) == 1
    assert all(template is not None for template in loading._templates.values())
    data.augmentations = augmented = _Twice(theirs(infos, None))
    assert loading.item(data, 0, original=original) == "augmented"
    assert augmented.seen is not None


class _Twice:
    def __init__(self, data: Any) -> None:
        self.seen: Any = None

    def __call__(self, checkpoint: Any) -> str:
        self.seen = checkpoint
        return "augmented"


def test_what_goes_wrong_in_an_item_is_said_by_the_original(sane2: SimpleNamespace, tmp_path: Path) -> None:  # noqa: F811
    info = trial(tmp_path, CNN3, sane2.zoo_dataset_models.get_model(CNN3))
    theirs = sane2.zoo_dataset.ZooDataset
    data, original = theirs([info]), theirs.__getitem__
    Path(info.eval_results_path).write_text("{}\n")
    with pytest.raises(IndexError):
        loading.item(data, 0, original=original)
    with pytest.raises(IndexError):
        loading.item(data, 5, original=original)
    info.state_dict_path = str(tmp_path / "none")
    with pytest.raises((FileNotFoundError, IndexError)):
        loading.item(data, 0, original=original)


def test_the_filter_judges_as_published(sane2: SimpleNamespace, tmp_path: Path) -> None:  # noqa: F811
    kind = sane2.checkpoint_filters.WeightMagnitudeCheckpointFilter
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    cases = []
    for value, steps in ((0.5, 3), (200.0, 3), (float("nan"), 3), (float("inf"), 3), (0.5, 500)):
        state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        state["0.weight"][0, 0] = value
        state["1.num_batches_tracked"] = torch.tensor(steps)
        cases.append(SimpleNamespace(state_dict_path=str(tmp_path / f"{len(cases)}.pt")))
        torch.save(state, cases[-1].state_dict_path)
    clipped = {name: tensor.clamp(-0.1, 0.1) for name, tensor in net.state_dict().items() if tensor.is_floating_point()}
    cases.append(SimpleNamespace(state_dict_path=str(tmp_path / "clipped.pt")))
    torch.save(clipped, cases[-1].state_dict_path)
    assert loading.within_magnitude(kind(0.1, True), cases[-1], original=lambda *_: pytest.fail("the original was asked"))
    for limit in (None, 100.0, 0.1):
        for drop in (True, False):
            made = kind(limit, drop)
            for info in cases:
                assert loading.within_magnitude(made, info, original=kind.__call__) == made(info)


def test_cache_lists_are_written_now_and_then(sane2: SimpleNamespace) -> None:  # noqa: F811
    kind = sane2.cached_windowed_dataset.CachedWindowedDataset
    made = kind(50)
    loading.preload(made, original=kind.preload_cache)
    assert made.saved[-1] == 50
    assert len(made.saved) < 50
    assert "_save_cache_metadata" not in vars(made)
    loading.preload(made, [3], original=kind.preload_cache)
    assert made.saved[-1] == 50

    class Broken(kind):  # type: ignore[misc, valid-type]
        def _ensure_checkpoint_cached(self, index: int) -> None:
            if index == 7:
                raise OSError("disk full")
            super()._ensure_checkpoint_cached(index)

    broken = Broken(50)
    with pytest.raises(OSError, match="disk full"):
        loading.preload(broken, original=kind.preload_cache)
    assert broken.saved[-1] == 7  # what is on disk is on the list


# -- images ------------------------------------------------------------------------------------------------------------


class CachedDataset:  # as scripts pickle them: a class of their own, under a name that no reader has
    def __init__(self, data: Any, targets: Any) -> None:
        self.data, self.targets, self.transform = data, targets, None


def _sets() -> dict[str, Any]:
    x, y = torch.randn(6, 3, 4, 4), torch.arange(6)
    sets = torch.utils.data
    tensors = sets.TensorDataset(x, y)
    return {
        "own class": CachedDataset(x, y),
        "tensors": tensors,
        "subset": sets.Subset(tensors, [4, 1]),
        "range": sets.Subset(tensors, range(1, 5, 2)),
        "in a row": sets.ConcatDataset([tensors, sets.Subset(tensors, [0])]),
        "pairs": [(x[j], int(y[j])) for j in range(6)],
        "bytes": CachedDataset((x[:, 0].clamp(0, 1) * 255).byte(), y.tolist()),
    }


@pytest.mark.parametrize("form", list(_sets()))
def test_images_of_any_class(tmp_path: Path, form: str) -> None:
    torch.manual_seed(0)
    made = _sets()[form]
    torch.save({"trainset": made, "testset": None, "other": 3}, tmp_path / "dataset.pt")
    found = v2.images_of(tmp_path)
    assert list(found) == ["train"]
    x, labels = found["train"]
    if form in ("own class", "bytes"):
        expected = [(made.data[j], int(made.targets[j])) for j in range(6)]
    else:
        expected = [(image, int(label)) for image, label in (made[j] for j in range(len(made)))]
    assert labels is not None
    assert labels.tolist() == [label for _, label in expected]
    whole = torch.stack([image for image, _ in expected]).float()
    torch.testing.assert_close(x, whole.unsqueeze(1) / 255 if form == "bytes" else whole)


def test_wrong_images_are_named(tmp_path: Path) -> None:
    for content, words in (
        ([1], "dict of data sets"), ({"a": 1}, "trainset"), ({"trainset": 3}, "unknown kind"), ({"trainset": torch.ones(2, 2)}, r"\[N, C, H, W\]"),
        ({"trainset": torch.utils.data.Subset(torch.utils.data.TensorDataset(torch.ones(2, 1, 2, 2)), [5])}, "leave its data set"),
    ):  # fmt: skip
        torch.save(content, tmp_path / "dataset.pt")
        with pytest.raises(WslfastError, match=words):
            v2.images_of(tmp_path / "dataset.pt")
    with pytest.raises(WslfastError, match="no such file"):
        v2.images_of(tmp_path / "nothing.pt")


def test_images_go_to_npz_and_come_back_as_a_data_set(tmp_path: Path) -> None:
    x, y = torch.rand(6, 1, 4, 4), torch.arange(6) % 2
    images.write({"train": (x, y), "test": (x[:2], y[:2])}, tmp_path)
    read = torch.load(tmp_path / "dataset.pt", weights_only=False)
    assert torch.equal(read["trainset"].tensors[0], x)
    assert torch.equal(v2.images_of(tmp_path)["test"][1], y[:2])
    with np.load(v2.to_npz(tmp_path, tmp_path / "images.npz")) as file:
        assert sorted(file.files) == ["test_images", "test_labels", "train_images", "train_labels"]
        assert np.array_equal(file["train_images"], x.numpy())
    torch.save({"trainset": x}, tmp_path / "dataset.pt")
    with pytest.raises(WslfastError, match="no labels"):
        v2.to_npz(tmp_path, tmp_path / "images.npz")


# -- zoos both ways ----------------------------------------------------------------------------------------------------


def _zoo(folder: Path, provenance: dict[str, Any]) -> wslfast.Population:
    arch = wslfast.Architecture.cnn3()
    table = {"model": (0, 0, 1), "epoch": (1, 2, 2), "test_acc": (0.1, 0.2, 0.3), "init_type": ("uniform",) * 3}
    population = wslfast.Population(arch, arch.initial_weights(["kaiming_uniform"] * 3, [0, 1, 2]), table)
    save_zoo(population, folder, splits=Split((1.0, 0.0, 0.0), 0), provenance=provenance)
    return population


def test_our_zoos_are_read_by_their_data_set_and_theirs_are_a_population(sane2: SimpleNamespace, tmp_path: Path) -> None:  # noqa: F811
    x = np.random.default_rng(0).random((40, 32, 32, 3), dtype=np.float32)
    np.savez(tmp_path / "images.npz", images=x, labels=np.arange(40) % 10)
    population = _zoo(tmp_path / "zoo", {})
    assert v2.export_zoo(tmp_path / "zoo", tmp_path / "tree") == 3
    assert not (tmp_path / "tree" / "dataset.pt").exists()
    with pytest.raises(WslfastError, match="does not say which data set"):
        v2.export_zoo(tmp_path / "zoo", tmp_path / "tree2", with_images=True)
    assert not (tmp_path / "tree2").exists()  # so that the same folder can be asked for without images
    infos = []
    for model, epoch in ((0, 1), (0, 2), (1, 2)):
        home = tmp_path / "tree" / f"NN_tune_trainable_{model:05d}"
        infos.append(
            SimpleNamespace(
                epoch_idx=epoch,
                state_dict_path=str(home / f"checkpoint_{epoch:06d}" / "checkpoints"),
                model_config_path=str(home / "params.json"),
                eval_results_path=str(home / "result.json"),
            )
        )
    settings = json.loads(Path(infos[0].model_config_path).read_text())
    assert settings["model::type"] == "CNN3"
    assert {"model::channels_in", "model::nlin", "model::dropout", "model::init_type", "model::o_dim"} <= set(settings)
    data = sane2.zoo_dataset.ZooDataset(infos)
    assert [data[j].metadata["eval_results"]["test_acc"] for j in range(3)] == [0.1, 0.2, 0.3]
    back = v2.population(data)
    assert torch.equal(back.weights, population.weights)
    assert back.properties["test_acc"] == (0.1, 0.2, 0.3)
    assert back.architecture.layers == population.architecture.layers
    with pytest.raises(WslfastError, match="at least one checkpoint"):
        v2.population([])
    several = [SimpleNamespace(model=sane2.zoo_dataset_models.get_model(CNN3), metadata={}) for _ in range(3)]
    several[1].model.module_list[3].p = 0.3
    assert len(v2.population(several, (3, 32, 32))) == 3  # dropout has no part in what a network answers
    several[2].model.module_list[2] = torch.nn.Tanh()
    with pytest.raises(WslfastError, match=r"source\[2\]: expected the layers of the first, got Tanh\(\), not ReLU\(\)"):
        v2.population(several, (3, 32, 32))
    # and the tree comes in as any ray tree does, with the images of its dataset.pt
    pixels, labels = torch.rand(40, 3, 32, 32) * 2 - 1, torch.arange(40) % 10
    images.write({"train": (pixels, labels), "test": (pixels, labels)}, tmp_path / "tree")
    archive = v2.to_npz(tmp_path / "tree", tmp_path / "images.npz")
    done = import_zoo(tmp_path / "tree", tmp_path / "again", dataset=archive)
    assert (done.rows, done.models, dict(done.skipped)) == (3, 2, {})
    assert torch.equal(wslfast.load_zoo(tmp_path / "again").weights, population.weights)


@pytest.mark.slow
def test_images_go_out_with_a_zoo_that_knows_them(tmp_path: Path) -> None:
    wslfast.build_zoo(
        out=tmp_path / "zoo", dataset="digits", architecture=wslfast.Architecture.cnn3(1), models=2, epochs=1, keep=(1,), batch_size=400
    )
    v2.export_zoo(tmp_path / "zoo", tmp_path / "tree")
    found = v2.images_of(tmp_path / "tree")
    assert {split: len(images) for split, (images, _) in found.items()} == {"train": 1200, "val": 200, "test": 397}
    assert abs(float(found["train"][0].mean())) < 0.01  # normalised, as the models saw them
