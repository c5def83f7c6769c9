"""Zoo building against torch's own Adam and modules, and against itself: no model may feel its neighbours."""

from __future__ import annotations

import logging
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import FP32, FP64

from wslfast import profiling
from wslfast.architecture import Architecture
from wslfast.errors import WslfastError
from wslfast.kernels.layers import Activation, Conv2d, Flatten, Linear, Pool2d
from wslfast.population import Population
from wslfast.testing import as_module
from wslfast.zoo import Dataset, Grid, build, build_zoo, dataset_of, load_dataset, load_zoo, read_manifest
from wslfast.zoo.build import StackedAdam, batch_generator, default_keep, fine_tune
from wslfast.zoo.grid import Cell
from wslfast.zoo.unfinished import Unfinished

ARCH = Architecture.from_layers(
    [Conv2d("0", 1, 3, (3, 3)), Pool2d("1"), Activation("2", "tanh"), Flatten("3"), Linear("4", 27, 5)], (1, 9, 9), "tiny"
)
GRID = Grid(("kaiming_uniform", "xavier_normal"), (1e-3, 1e-2), (0.0, 1e-2), (3, 11, 40))


@pytest.fixture(scope="module")
def data() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.randn(5, 1, 9, 9, generator=generator)
    parts: dict[str, torch.Tensor] = {}
    for split, n in (("train", 53), ("val", 11), ("test", 30)):
        labels = torch.randint(5, (n,), generator=generator)
        parts[f"{split}_labels"] = labels
        parts[f"{split}_images"] = prototypes[labels] + 0.7 * torch.randn(n, 1, 9, 9, generator=generator)
    return Dataset("made up", **parts, classes=5)  # type: ignore[arg-type]


def small(data: Dataset, **options: Any) -> Population:
    return build_zoo(data, **{"architecture": ARCH, "models": 5, "epochs": 3, "grid": GRID, "batch_size": 16, **options})


def cell(population: Population, row: int) -> Cell:
    return Cell(*(population.properties[name][row] for name in ("init_type", "lr", "wd", "seed")))


def alone(data: Dataset, c: Cell, **options: Any) -> Population:
    """The one model of a grid of one cell."""
    return small(data, grid=Grid((c.init_type,), (c.lr,), (c.weight_decay,), (c.seed,)), models=1, **options)


def test_one_model_is_what_torch_trains(data: Dataset) -> None:
    population = small(data, keep=[0, 1, 3])
    for row in range(0, 15, 3):
        c = cell(population, row)
        module = as_module(ARCH)
        initial = ARCH.initial_weights([c.init_type], [c.seed])
        assert torch.equal(population.weights[row], initial[0])
        module.load_state_dict(Population(ARCH, initial).state_dict(0))
        optimizer = torch.optim.Adam(module.parameters(), lr=c.lr, weight_decay=c.weight_decay)
        generator = batch_generator(c.seed)
        for epoch in (1, 2, 3):
            batches = torch.randperm(53, generator=generator).split(16)  # 16, 16, 16 and 5, as a DataLoader would
            for batch in batches:
                optimizer.zero_grad()
                F.cross_entropy(module(data.train_images[batch]), data.train_labels[batch]).backward()
                optimizer.step()
            if epoch != 2:
                expected = Population.from_state_dicts(ARCH, [module.state_dict()]).weights[0]
                torch.testing.assert_close(population.weights[row + (1 if epoch == 1 else 2)], expected, atol=2 * FP32, rtol=2 * FP32)


def test_fine_tuning_is_what_torch_does_from_given_weights(data: Dataset) -> None:
    population = small(data)[[0, 3, 6]]
    given = population.weights.clone()
    tuned = fine_tune(population, data, epochs=2, lr=1e-3, weight_decay=1e-2, batch_size=16, seed=5)
    assert torch.equal(population.weights, given)
    assert (tuned.properties["model"], tuned.properties["epoch"]) == ((0, 0, 0, 1, 1, 1, 2, 2, 2), (0, 1, 2) * 3)
    assert torch.equal(tuned.weights[0::3], given)
    for j in range(3):
        module = as_module(ARCH)
        module.load_state_dict(population.state_dict(j))
        optimizer = torch.optim.Adam(module.parameters(), lr=1e-3, weight_decay=1e-2)
        generator = batch_generator(5 + j)
        for epoch in (1, 2):
            for batch in torch.randperm(53, generator=generator).split(16):
                optimizer.zero_grad()
                F.cross_entropy(module(data.train_images[batch]), data.train_labels[batch]).backward()
                optimizer.step()
            row = 3 * j + epoch
            expected = Population.from_state_dicts(ARCH, [module.state_dict()]).weights[0]
            torch.testing.assert_close(tuned.weights[row], expected, atol=2 * FP32, rtol=2 * FP32)
            right = (module(data.test_images).argmax(-1) == data.test_labels).double().mean()
            assert tuned.column("test_acc")[row] == pytest.approx(float(right), abs=FP64)


def test_fine_tuning_refuses_what_does_not_fit(data: Dataset) -> None:
    population = small(data)
    with pytest.raises(WslfastError, match="epochs"):
        fine_tune(population, data, epochs=0)
    with pytest.raises(WslfastError, match="expected images"):
        fine_tune(Population(Architecture.cnn(), torch.zeros(2, Architecture.cnn().num_weights)), data)


def _noisy(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Five classes whose prototypes drown in noise, so that accuracies have room on both sides."""
    prototypes = torch.randn(5, 1, 9, 9, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(5, (n,), generator=generator)
    return prototypes[labels] + 2.5 * torch.randn(n, 1, 9, 9, generator=generator), labels


def _one_after_another(data: Dataset, seeds: range, lr: float, weight_decay: float, epochs: int) -> list[float]:
    """Test accuracies of models trained in plain torch: nn.Module, NCHW, batch 32, torch.optim.Adam."""
    accuracies = []
    for seed in seeds:
        torch.manual_seed(seed)
        module = as_module(ARCH)
        for layer in module.modules():
            if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
                torch.nn.init.kaiming_uniform_(layer.weight)
                torch.nn.init.zeros_(layer.bias)
        optimizer = torch.optim.Adam(module.parameters(), lr=lr, weight_decay=weight_decay)
        for _ in range(epochs):
            for batch in torch.randperm(len(data.train_labels)).split(32):
                optimizer.zero_grad()
                F.cross_entropy(module(data.train_images[batch]), data.train_labels[batch]).backward()
                optimizer.step()
        with torch.no_grad():
            accuracies.append(float((module(data.test_images).argmax(-1) == data.test_labels).double().mean()))
    return accuracies


@pytest.mark.slow
def test_final_accuracies_are_distributed_as_torchs() -> None:
    """48 seeds of a zoo and 48 other seeds one after another: Kolmogorov-Smirnov sees no difference. It does see a wrong weight decay."""
    from scipy.stats import ks_2samp

    parts = {"train": _noisy(320, 1), "val": _noisy(64, 2), "test": _noisy(1000, 3)}
    fields = {f"{split}_{what}": x for split, pair in parts.items() for what, x in zip(("images", "labels"), pair, strict=True)}
    data = Dataset("noisy", **fields, classes=5)  # type: ignore[arg-type]
    grid = Grid(("kaiming_uniform",), (1e-2,), (1e-3,), tuple(range(48)))
    zoo = build_zoo(data, architecture=ARCH, models=48, epochs=6, keep=[6], grid=grid, batch_size=32)
    ours = zoo.column("test_acc").tolist()
    torchs = _one_after_another(data, range(1000, 1048), 1e-2, 1e-3, 6)
    assert 0.3 < sum(torchs) / 48 < 0.9  # they learn, and not everything
    assert ks_2samp(ours, torchs).pvalue > 0.01
    wrong = _one_after_another(data, range(2000, 2048), 1e-2, 1e-1, 6)
    assert ks_2samp(ours, wrong).pvalue < 1e-4


def test_stacked_adam_is_torchs(poisoned_empty: None) -> None:
    weights = torch.randn(3, 67)
    lrs, decays = [1e-3, 2e-2, 0.5], [0.0, 1e-1, 1e-3]
    rows = [torch.nn.Parameter(w.clone()) for w in weights]
    theirs = [torch.optim.Adam([row], lr=lr, weight_decay=wd) for row, lr, wd in zip(rows, lrs, decays, strict=True)]
    ours = StackedAdam(weights, lrs, decays)
    for step in range(60):
        gradient = torch.randn(3, 67) * 10.0 ** (step % 5 - 3)
        for row, g, optimizer in zip(rows, gradient, theirs, strict=True):
            row.grad = g.clone()
            optimizer.step()
        ours.step(gradient)
    torch.testing.assert_close(weights, torch.stack([r.detach() for r in rows]), atol=FP32, rtol=FP32)


@pytest.mark.parametrize("width", [1, 7, 63, 2464, 20_011])  # the last is left to torch's fused Adam
def test_rows_of_adam_are_bitwise_their_own(width: int) -> None:
    weights, gradients = torch.randn(13, width), [torch.randn(13, width) for _ in range(5)]
    lrs, decays = torch.rand(13).tolist(), torch.rand(13).tolist()
    together = weights.clone()
    adam = StackedAdam(together, lrs, decays)
    for g in gradients:
        adam.step(g.clone())
    for j in (0, 5, 12):
        row = weights[j : j + 1].clone()
        single = StackedAdam(row, lrs[j : j + 1], decays[j : j + 1])
        for g in gradients:
            single.step(g[j : j + 1].clone())
        assert torch.equal(row[0], together[j])


def test_a_trajectory_depends_on_its_own_cell_alone(data: Dataset) -> None:
    population = small(data)
    rows = {cell(population, r): population.weights[r : r + 3] for r in range(0, 15, 3)}
    for c, weights in list(rows.items())[:3]:
        assert torch.equal(alone(data, c).weights, weights)
    larger = small(data, models=9, seed=1)
    for r in range(0, 27, 3):
        if cell(larger, r) in rows:
            assert torch.equal(larger.weights[r : r + 3], rows[cell(larger, r)])


def test_same_seed_same_zoo_to_the_bit(data: Dataset, poisoned_empty: None) -> None:
    first, second = small(data), small(data)
    assert torch.equal(first.weights, second.weights)
    assert dict(first.properties) == dict(second.properties)
    assert not torch.equal(first.weights, small(data, seed=1).weights)


@pytest.mark.parametrize(("lr", "reason"), [(1e38, "not finite"), (1e5, "above 10000")])
def test_a_diverging_model_is_dropped_and_disturbs_nobody(
    data: Dataset, caplog: pytest.LogCaptureFixture, tmp_path: Path, lr: float, reason: str
) -> None:
    grid = Grid(("kaiming_uniform",), (1e-3, lr), (0.0, 0.5), (7,))
    with caplog.at_level(logging.WARNING, "wslfast"):
        population = small(data, grid=grid, models=4, out=tmp_path / "zoo")
    assert set(population.properties["lr"]) == {1e-3}
    assert len(population) == 6
    assert "dropped 6 of 12 checkpoints, of 2 models" in caplog.text
    assert f"6 with weights {'that are ' if lr > 1e6 else ''}{reason}" in caplog.text
    for row in (0, 3):
        assert torch.equal(population.weights[row : row + 3], alone(data, cell(population, row)).weights)
    assert sum(read_manifest(tmp_path / "zoo").provenance["dropped_rows"].values()) == 6
    with pytest.raises(WslfastError, match="all 3 checkpoints diverged"):
        alone(data, Cell("kaiming_uniform", lr, 0.0, 7))


def test_properties_are_what_the_models_do(data: Dataset) -> None:
    population = small(data, keep=[0, 3])
    assert population.properties["model"] == tuple(j for j in range(5) for _ in range(2))
    assert population.properties["epoch"] == (0, 3) * 5
    module = as_module(ARCH)
    for row in range(10):
        module.load_state_dict(population.state_dict(row))
        with torch.no_grad():
            for split in ("train", "val", "test"):
                images, labels = data.split(split)
                accuracy = (module(images).argmax(1) == labels).double().mean().item()
                assert population.properties[f"{split}_acc"][row] == accuracy
            loss = F.cross_entropy(module(data.train_images), data.train_labels).item()
        assert population.properties["train_loss"][row] == pytest.approx(loss, rel=FP32)
        gap = population.properties["train_acc"][row] - population.properties["test_acc"][row]
        assert population.properties["ggap"][row] == gap
    assert population.column("test_acc")[1::2].mean() > population.column("test_acc")[::2].mean() + 0.2, "training helps"
    assert {cell(population, r) for r in range(0, 10, 2)} == set(GRID.cells(5, 0))


def test_a_stored_zoo_is_the_returned_one(data: Dataset, tmp_path: Path) -> None:
    population = small(data, out=tmp_path / "zoo", split=(0.4, 0.2, 0.4))
    loaded = load_zoo(tmp_path / "zoo")
    assert torch.equal(loaded.weights, population.weights)
    assert dict(loaded.properties) == dict(population.properties)
    assert loaded.architecture == ARCH
    assert sorted(len(load_zoo(tmp_path / "zoo", s)) for s in ("train", "val", "test")) == [3, 6, 6]
    manifest = read_manifest(tmp_path / "zoo")
    assert manifest.provenance["grid"]["seeds"] == [3, 11, 40]
    assert manifest.provenance["dataset"]["name"] == "made up"
    assert manifest.split == {"by": "model", "seed": 0, "fractions": [0.4, 0.2, 0.4]}


def test_a_zoo_that_is_there_is_noticed_before_training(data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(data, out=tmp_path, models=2, epochs=1)
    new = small(data, out=tmp_path, models=3, epochs=1, overwrite=True)
    assert torch.equal(load_zoo(tmp_path).weights, new.weights)
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(build, "_train", lambda *a: pytest.fail("trained first"))
    with pytest.raises(WslfastError, match="overwrite=True"):
        small(data, out=tmp_path)
    with pytest.raises(WslfastError, match=r"out: .*file"):
        small(data, out=tmp_path / "file")


def test_resuming_what_is_finished_returns_it(data: Dataset, tmp_path: Path) -> None:
    """A job that is begun again until it succeeds, and was killed just after it had."""
    out = tmp_path / "zoo"
    made = small(data, out=out, epochs=1)
    (out / "unfinished.safetensors").write_bytes(b"left behind")
    again = small(data, out=out, epochs=1, resume=True)
    assert torch.equal(again.weights, made.weights)
    assert dict(again.properties) == dict(made.properties)
    assert not (out / "unfinished.safetensors").exists()
    for other in ({"batch_size": 8}, {"models": 6}, {"split": (0.5, 0.25, 0.25)}):
        with pytest.raises(WslfastError, match=rf"there is a zoo already, built with other settings \({next(iter(other))}\)"):
            small(data, out=out, **{"epochs": 1, "resume": True, **other})


def test_a_build_does_not_go_on_with_other_data(data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same name and shapes, given as tensors: nothing but their numbers tells them apart."""
    other = replace(data, train_images=data.train_images.flip(0))
    small(data, out=tmp_path / "zoo")
    with pytest.raises(WslfastError, match=r"built with other settings \(data\)"):
        small(other, out=tmp_path / "zoo", resume=True)

    def interrupted(self: Unfinished, state: dict[str, Any]) -> None:
        save(self, state)
        raise KeyboardInterrupt

    save = Unfinished.save
    monkeypatch.setattr(Unfinished, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        small(data, out=tmp_path / "half")
    monkeypatch.undo()
    with pytest.raises(WslfastError, match=r"begun with other settings \(data\)"):
        small(other, out=tmp_path / "half", resume=True)
    assert torch.equal(small(data, out=tmp_path / "half", resume=True).weights, load_zoo(tmp_path / "zoo").weights)


def test_a_build_that_fails_leaves_no_folder(data: Dataset, tmp_path: Path) -> None:
    for options in ({"dataset": tmp_path / "gone.npz"}, {"dataset": data, "models": 10**9}, {"dataset": data, "architecture": 3}):
        with pytest.raises(WslfastError):
            build_zoo(**{"models": 2, **options}, out=tmp_path / "runs" / "zoo")  # type: ignore[arg-type]
        assert list(tmp_path.iterdir()) == []


def test_an_npz_file_is_enough(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "mine.npz", images=rng.integers(0, 256, (40, 28, 28, 3), dtype=np.uint8), labels=rng.integers(0, 10, 40))
    population = build_zoo(tmp_path / "mine.npz", tmp_path / "zoo", models=2, epochs=1)
    assert population.architecture == Architecture.cnn(3)
    assert len(read_manifest(tmp_path / "zoo").provenance["dataset"]["sha256"]) == 64
    images = dataset_of(tmp_path / "zoo", population.architecture).train_images
    assert torch.equal(images, load_dataset(tmp_path / "mine.npz", (3, 28, 28)).train_images), "a zoo leads back to its images"
    np.savez(tmp_path / "odd.npz", images=rng.random((40, 20, 20)), labels=rng.integers(0, 12, 40))
    with pytest.raises(WslfastError, match="pass architecture="):
        build_zoo(tmp_path / "odd.npz")
    with pytest.raises(WslfastError, match="12 classes, and architecture 'cnn' has 10 outputs"):
        build_zoo(tmp_path / "odd.npz", architecture=Architecture.cnn())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs"),
        ({"epochs": 2.0}, "epochs"),
        ({"keep": []}, "keep"),
        ({"keep": [1, 1]}, "keep"),
        ({"keep": [4]}, "keep: expected different epochs from 0 to 3"),
        ({"keep": [-1]}, "keep"),
        ({"batch_size": 0}, "batch_size"),
        ({"models": 0}, "models: expected 1 to 24"),
        ({"models": 25}, "models: expected 1 to 24"),
        ({"grid": "large"}, "grid: expected 'small', 'published', 'signals' or a Grid"),
        ({"seed": -1}, "seed"),
        ({"split": (1, 1, 1)}, "split"),
        ({"device": "gpu"}, "device"),
        ({"device": "meta"}, "device"),
        ({"architecture": "cnn"}, "architecture: expected an Architecture"),
        ({"architecture": Architecture.resnet18(width=1)}, r"expected images \[3, 32, 32\]"),
        ({"architecture": Architecture.cnn()}, r"expected images \[1, 28, 28\]"),
    ],
)
def test_wrong_arguments(data: Dataset, options: dict[str, Any], message: str) -> None:
    with pytest.raises(WslfastError, match=message):
        small(data, **options)


@pytest.mark.parametrize(
    ("epochs", "kept"), [(1, (1,)), (2, (1, 2)), (3, (1, 2, 3)), (4, (2, 3, 4)), (5, (2, 3, 5)), (8, (3, 5, 8)), (50, (19, 31, 50))]
)
def test_epochs_kept_by_default(epochs: int, kept: tuple[int, ...]) -> None:
    assert default_keep(epochs) == kept


def test_the_published_grid() -> None:
    grid = Grid.published()
    assert len(grid) == 1200
    cells = grid.cells(1200)
    assert len(set(cells)) == 1200
    assert {c.init_type for c in cells} == {"uniform", "normal", "kaiming_uniform", "kaiming_normal"}
    assert {c.lr for c in cells} == {1e-4, 2.5e-4, 5e-4, 7.5e-4, 1e-3}


def test_a_small_zoo_has_balanced_settings_and_a_seed_for_each_model() -> None:
    cells = Grid.small().cells(120, seed=5)
    assert len({c.seed for c in cells}) == 120
    counts = {s: sum(c[:3] == s for c in cells) for s in {c[:3] for c in cells}}
    assert len(counts) == 27
    assert set(counts.values()) == {4, 5}
    assert cells != Grid.small().cells(120, seed=6)


@settings(max_examples=100)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 12), st.integers(0, 99), st.data())
def test_cells_never_repeat(lrs: int, decays: int, seeds: int, seed: int, drawn: st.DataObject) -> None:
    grid = Grid(("normal", "uniform"), tuple(range(1, lrs + 1)), tuple(range(decays)), tuple(range(seeds)))
    models = drawn.draw(st.integers(1, len(grid)))
    cells = grid.cells(models, seed)
    assert len(set(cells)) == models
    assert cells == grid.cells(models, seed)
    assert len({c.seed for c in cells}) == min(models, seeds)


@pytest.mark.parametrize(
    "values",
    [
        {"init_types": ("kaiming",)}, {"init_types": "normal"}, {"lrs": ()}, {"lrs": (-1.0,)}, {"lrs": (math.nan,)}, {"lrs": ("1e-3",)},
        {"weight_decays": (0.0, 0.0)}, {"seeds": (1.5,)}, {"seeds": (-1,)}, {"seeds": 3},
    ],
)  # fmt: skip
def test_grids_that_are_none(values: dict[str, Any]) -> None:
    with pytest.raises(WslfastError, match=f"grid.{next(iter(values))}"):
        Grid(**{"init_types": ("normal",), "lrs": (1e-3,), "weight_decays": (0.0,), "seeds": (0,), **values})


def test_progress_and_profile(data: Dataset, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with profiling.profile() as profile:
        small(data, models=2, epochs=2, progress=True)
    assert {"initialise", "loss", "optimise", "evaluate"} <= set(profile.calls)
    assert profile.calls["optimise"] == 8
    if "rich" in sys.modules:
        assert "epoch 2/2" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    assert len(small(data, models=1, epochs=1, progress=True)) == 1


@pytest.mark.slow
def test_a_digits_zoo_has_accuracies_spread_over_a_mean_of_four_fifths() -> None:
    pytest.importorskip("sklearn")
    population = build_zoo(models=27, epochs=8)
    accuracy = population.column("test_acc")
    assert len(population) == 81
    assert 0.7 < accuracy.mean() < 0.9
    assert accuracy.std() > 0.05
    by_epoch = [accuracy[population.column("epoch") == e].mean() for e in (3, 5, 8)]
    assert by_epoch == sorted(by_epoch)
