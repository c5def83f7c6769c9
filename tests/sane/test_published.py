"""The published code itself beside ours, where ``WSLFAST_SANE_SRC`` points to a clone of it; skipped elsewhere."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import FP32_DEEP, FP32_ROUNDING

from benchmarks import drop_in, published_code
from wslfast import Architecture, Population, load_zoo, sane
from wslfast.zoo import export_zoo, import_zoo, save_zoo
from wslfast.zoo.splits import Split

FOUND = [package for package in published_code.available() if package in published_code.PACKAGES]
pytestmark = pytest.mark.skipif(not FOUND, reason=f"{published_code.VARIABLE} names no clone of the published code")
paper = pytest.mark.skipif("shrp" not in FOUND, reason="needs a clone of ICLR_WSL_2025-Structure_is_not_enough")
original = pytest.mark.skipif("SANE" not in FOUND, reason="needs a clone of SANE")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
    torch.set_num_threads(threads)


@paper
def test_every_item_has_the_published_value() -> None:
    for item, theirs, ours in [*drop_in.part_rows("shrp"), *drop_in.behavior_rows("shrp", 4, 5)]:
        row = drop_in.compare(item, theirs, ours, 1, lambda: 0.0)
        # rsq averages ratios of nearly equal numbers, and the probe's best penalty decides a rounding
        tolerance = 1e-3 if "rsq" in item or "probe" in item else 1e-4
        assert row.difference <= tolerance, row


@pytest.mark.parametrize("package", [package for package in FOUND if package != "shrp"])
def test_every_item_of_its_relatives_has_the_published_value(package: str) -> None:
    for item, theirs, ours in drop_in.part_rows(package):
        row = drop_in.compare(item, theirs, ours, 1, lambda: 0.0)
        assert row.difference <= (1e-3 if "rsq" in item else 1e-4), row


@paper
def test_training_steps_under_the_patch_have_the_published_losses() -> None:
    row, shares = drop_in.step("shrp", 3, 5, 3, iter(range(10_000)).__next__)
    assert row.difference <= 1e-4
    assert len(shares) == 2
    assert sane.replaced() == []


@paper
def test_initial_values_of_a_seed_are_the_published_ones() -> None:
    for kind in ("pytorch", "gpt2"):
        made = []
        for make in (published_code.module("shrp", "models.def_AE").AE, sane.AE):
            torch.manual_seed(3)
            made.append(make(drop_in.PAPER | {"ae:transformer_type": kind, "ae:num_layers": 2}).state_dict())
        assert list(made[0]) == list(made[1])
        assert all(torch.equal(a, b) for a, b in zip(made[0].values(), made[1].values()))


@paper
def test_states_are_read_both_ways() -> None:
    assert "equal" in drop_in.state_row("shrp")


@paper
@pytest.mark.parametrize("mode", ["individual", "token", "joint"])
def test_models_are_sampled_alike(mode: str) -> None:
    pytest.importorskip("sklearn")
    theirs = published_code.module("shrp", "sampling.sample_models")
    checkpoint, params, x, _, p = drop_in.case("CNN3", 4)
    config = drop_in.PAPER | {"ae:d_model": 32, "ae:num_layers": 1, "training::beta": 1.0}
    module = published_code.module("shrp", "models.def_AE_module").AEModule(config, checkpoint, params)
    z = module.forward_encoder(x, p).detach()
    for options in ({}, {"batch_size": 3}, {"halo": True, "halo_wse": 31, "halo_hs": 8}):
        found = [s.sample_models(module, checkpoint, 5, z, p[0], x.shape, mode, **options) for s in (theirs, sane)]
        (a, z_a, p_a, shape_a), (b, z_b, p_b, shape_b) = found
        assert torch.equal(z_a, z_b)
        assert torch.equal(p_a, p_b)
        assert tuple(shape_a) == tuple(shape_b)
        assert all(torch.equal(u[name], v[name]) for u, v in zip(a, b, strict=True) for name in u)


@paper
def test_epochs_have_the_published_means() -> None:
    checkpoint, params, x, mask, p = drop_in.case("CNN3", 8)
    loader = [(x[s], mask[s], p[s], x[s], mask[s], p[s]) for s in (slice(0, 2), slice(2, 4))]
    config = drop_in.PAPER | {"ae:d_model": 32, "ae:num_layers": 1, "trainset::batchsize": 2, "training::n_queries_distillation": 4}
    for change in ({}, {"training::lambda": 0.05}, {"training::gradient_clipping": "value", "optim::optimizer": "sgd"}):
        results = []
        for kind in (published_code.module("shrp", "models.def_AE_module").AEModule, sane.AEModule):
            made = kind(config | change, checkpoint, params)
            made.set_transforms(*[lambda *parts: parts] * 3)
            torch.manual_seed(1)
            results.append((made.train_epoch(loader), made.test_epoch(loader)))
        for theirs, ours in zip(*results):
            assert set(theirs) == set(ours)
            assert ours["loss/loss"] == pytest.approx(theirs["loss/loss"], rel=FP32_DEEP)


@paper
def test_views_are_drawn_and_corrupted_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, basin = (published_code.module("shrp", name) for name in ("datasets.augmentations", "git_re_basin.git_re_basin"))
    monkeypatch.setattr(theirs, "ProgressBar", published_code.Bar)
    checkpoint, _, x, _, _ = drop_in.case("CNN3", 2)
    torch.manual_seed(1)
    expected, _ = theirs.precompute_permutations(checkpoint, 2, basin.zoo_cnn_large_permutation_spec(), 0, False)
    torch.manual_seed(1)
    maps, _ = sane.precompute_permutations(checkpoint, 2, sane.zoo_cnn_large_permutation_spec(), 0, False)
    assert all(torch.equal(a, b) for a, b in zip(maps, expected))
    assert torch.equal(sane.permute_model_vector(x[0], 3, 50, maps[0]), theirs.permute_model_vector(x[0], 3, 50, expected[0]))


@paper
@pytest.mark.parametrize(
    "name",
    ["zoo_cnn", "zoo_cnn_large", "zoo_lenet", "resnet18", "resnet34", "MiniAlexNet"],
)
def test_specs_are_the_published_ones(name: str) -> None:
    basin = published_code.module("shrp", "git_re_basin.git_re_basin")
    theirs, ours = (getattr(m, f"{name}_permutation_spec")() for m in (basin, sane))
    assert ours.axes_to_perm == theirs.axes_to_perm
    assert ours.perm_to_axes == theirs.perm_to_axes


@pytest.mark.parametrize("package", [package for package in FOUND if package != "mzsane"])
@pytest.mark.parametrize("standardize", [False, True])
def test_their_data_sets_read_our_trees_and_are_read_back(
    package: str, standardize: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arch = Architecture.cnn()
    table = {"model": (0, 0, 1, 1), "epoch": (1, 2, 1, 2), "test_acc": (0.5, 0.75, 0.25, 0.5), "train_acc": (1.0,) * 4}
    weights = arch.initial_weights(["kaiming_uniform"] * 4, range(4))
    save_zoo(Population(arch, weights, table), tmp_path / "zoo", splits=Split((1.0, 0.0, 0.0), 0), provenance={})
    export_zoo(tmp_path / "zoo", tmp_path / "ray")
    for name in ("dataset_epochs", "dataset_properties", "dataset_tokens"):
        module = published_code.module(package, f"datasets.{name}")
        monkeypatch.setattr(module, "ProgressBar", published_code.Bar, raising=False)  # an actor of ray's
    made = published_code.module(package, "datasets.dataset_tokens").DatasetTokens(
        root=[tmp_path / "ray"],
        epoch_lst=[1, 2],
        permutation_spec=None,
        standardize=standardize,
        train_val_test="train",
        ds_split=[1.0, 0.0, 0.0],
        max_samples=None,
        shuffle_path=False,
        property_keys={"result_keys": ["test_acc", "training_iteration", "ggap"], "config_keys": []},
    )
    torch.save(made, tmp_path / "dataset_train.pt")
    done = import_zoo(tmp_path / "dataset_train.pt", tmp_path / "back")
    assert (done.rows, done.models, dict(done.skipped)) == (4, 2, {})
    back = load_zoo(tmp_path / "back")
    order = [back.properties["test_acc"].index(v) for v in (0.75, 0.25)]  # folders in the listing's order
    torch.testing.assert_close(back.weights[order], weights[[1, 2]], rtol=FP32_DEEP, atol=FP32_ROUNDING)
    assert set(back.properties["split"]) == {"train"}


@original
def test_sane_itself_trains_alike_under_the_patch() -> None:
    module = published_code.module("SANE", "models.def_AE_module")
    _, _, x, mask, p = drop_in.case("CNN3", 6)
    batch = (x[:3], mask[:3], p[:3], x[3:], mask[3:], p[3:])
    config = drop_in.PAPER | {"ae:num_layers": 2, "ae:d_model": 32, "trainset::batchsize": 3}

    def run() -> list[dict[str, Any]]:
        made = module.AEModule(config)
        made.model.train()
        torch.manual_seed(2)
        return [{k: float(v) for k, v in made.train_step(*batch).items()} for _ in range(2)]

    expected = run()
    with sane.patched():
        assert {row["package"] for row in sane.replaced()} >= {"SANE"}
        found = run()
    for a, b in zip(expected, found):
        assert set(a) == set(b)
        assert a["loss/loss"] == pytest.approx(b["loss/loss"], rel=FP32_DEEP)
