"""Generation: the density, what is measured of a sample, and that nothing is selected."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tolerances import FP32, FP32_ROUNDING

from wslfast import Architecture, Population, TrainConfig, WslfastError, build_zoo, evaluate, generate, load_zoo, save_zoo, train
from wslfast.measure import reconstruct
from wslfast.measure.diversity import nearest
from wslfast.measure.generation import best_rows, val_accuracy
from wslfast.measure.sampling import draw
from wslfast.testing import oracle_outputs
from wslfast.training import load_run
from wslfast.zoo import dataset_of
from wslfast.zoo.build import fine_tune


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small zoo on random images, and an autoencoder that took two steps."""
    root = tmp_path_factory.mktemp("generation")
    rng = np.random.default_rng(0)
    np.savez(root / "noise.npz", images=rng.random((90, 28, 28), dtype=np.float32), labels=rng.integers(0, 4, 90))
    build_zoo(root / "noise.npz", root / "zoo", models=10, epochs=2)
    sizes = {"queries": 8, "batch_size": 4, "d_model": 16, "heads": 2, "layers": 1}
    train(TrainConfig(zoo=str(root / "zoo"), out=str(root / "run"), steps=2, **sizes))
    return root


def test_the_density_is_an_anchor_plus_scaled_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    anchors = torch.randn(5, 3, 2, generator=generator) * torch.tensor([1.0, 10.0])
    latents, of = draw(anchors, 20_000, generator, bandwidth=0.1)
    assert of is not None
    assert set(of.tolist()) == set(range(5))
    noise = (latents - anchors[of]) / (0.1 * anchors.std(0, unbiased=False))
    assert noise.mean().abs() < 0.02
    assert torch.allclose(noise.std(0), torch.ones(3, 2), atol=0.03)
    assert torch.corrcoef(noise.flatten(1).T).sub(torch.eye(6)).abs().max() < 0.03  # one stream, not one seed a dimension


def test_without_noise_the_anchors_reconstructions_come_out(run: Path) -> None:
    made = generate(run / "run", samples=12, bandwidth=0.0, anchors=0.5, seed=3)
    zoo = load_zoo(run / "zoo", "train")
    rebuilt = reconstruct(load_run(run / "run").autoencoder, zoo.weights)
    for row, anchor, epoch in zip(made.weights, made.properties["anchor"], made.properties["anchor_epoch"], strict=True):
        (j,) = [i for i in range(len(zoo)) if (zoo.properties["model"][i], zoo.properties["epoch"][i]) == (anchor, epoch)]
        assert torch.allclose(row, rebuilt[j], atol=FP32)


def test_what_is_said_of_a_sample_is_true(run: Path) -> None:
    made = generate(run / "run", samples=6, bandwidth=0.2, out=run / "made")
    zoo = load_zoo(run / "zoo", "train")
    images, labels = dataset_of(run / "zoo", made.architecture).split("test")
    expected = (oracle_outputs(made.weights, images, made.architecture).argmax(-1) == labels).double().mean(1)
    assert torch.allclose(made.column("test_acc"), expected, atol=1.5 / len(labels))
    distances = [min(float((w - v).double().norm()) for v in zoo.weights) for w in made.weights]
    assert torch.allclose(made.column("novelty"), torch.tensor(distances, dtype=torch.float64), rtol=FP32)
    again = load_zoo(run / "made")
    assert torch.equal(again.weights, made.weights)
    assert torch.equal(generate(run / "run", samples=6, bandwidth=0.2).weights, made.weights)
    assert not torch.equal(generate(run / "run", samples=6, bandwidth=0.2, seed=1).weights, made.weights)


def test_new_models_are_a_zoo_that_can_be_evaluated_and_trained_on(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its images are the zoo's; codes are fitted to the zoo's training models; another file of the images' name beside it misleads nobody."""
    (run / "elsewhere").mkdir()
    np.savez(run / "elsewhere" / "noise.npz", images=np.zeros((9, 28, 28)), labels=np.zeros(9, dtype=int))
    made = generate(run / "run", samples=6, out=run / "elsewhere" / "made")
    figures = evaluate(run / "run", run / "elsewhere" / "made")
    assert figures["run"]["accuracy_original"] == pytest.approx(float(made.column("test_acc").mean()))
    assert figures["linear"]["n_models"] == 6
    monkeypatch.chdir(run)
    again = generate("run", samples=10, out="dealt", split="drawn")
    assert {*load_zoo("dealt").properties["split"]} == {"train", "val", "test"}
    sizes = {"queries": 8, "batch_size": 4, "d_model": 16, "heads": 2, "layers": 1}
    train(TrainConfig(zoo="dealt", out="second", steps=1, **sizes))
    assert len(evaluate("second")["run"]["spread"]) > 0
    monkeypatch.chdir("/")  # its zoo was named from another folder
    assert Path(load_run(run / "second").zoo) == (run / "dealt").resolve()
    assert torch.equal(generate(run / "second", samples=2).weights, generate(run / "second", run / "dealt", samples=2).weights)
    assert len(again) == 10
    with pytest.raises(WslfastError, match=r"no row is in split 'train'.*--split drawn"):
        train(TrainConfig(zoo=str(run / "elsewhere" / "made"), out=str(run / "third"), steps=1, **sizes))


def test_a_zoo_of_other_networks_and_one_without_classes_say_so(run: Path, tmp_path: Path) -> None:
    arch = Architecture.mlp(2, (4,), 1, "tanh", 0.0, True)
    rows = arch.initial_weights(["kaiming_uniform"] * 8, range(8))
    save_zoo(Population(arch, rows), tmp_path / "zoo", dataset="grid:6x6")
    for call in (evaluate, generate):
        with pytest.raises(WslfastError, match="trained on models of architecture 'cnn', and these are of 'mlp', another network"):
            call(run / "run", tmp_path / "zoo")
    train(TrainConfig(zoo=str(tmp_path / "zoo"), out=str(tmp_path / "run"), steps=1, layers=1, d_model=16, heads=2))
    with pytest.raises(WslfastError, match=r"finetune: expected 0, as the zoo's data set \(grid:6x6\) has no classes"):
        generate(tmp_path / "run", samples=2, finetune=1)
    with pytest.raises(WslfastError, match="expected labelled images to train for"):
        fine_tune(load_zoo(tmp_path / "zoo"), dataset_of(tmp_path / "zoo", arch))


@pytest.mark.parametrize("sampler", ["token", "individual", "uniform", "neighbours"])
def test_other_samplers_measure_their_models_too(run: Path, sampler: str) -> None:
    made = generate(run / "run", samples=4, sampler=sampler, bandwidth=0.1, anchors=0.5)
    assert len(made) == 4
    assert (None in made.properties["anchor"]) == (sampler != "neighbours")
    assert torch.equal(made.weights, generate(run / "run", samples=4, sampler=sampler, bandwidth=0.1, anchors=0.5).weights)
    assert bool((made.column("novelty") > 0).all())


def test_selection_is_on_validation_images_best_first(run: Path) -> None:
    every = generate(run / "run", samples=20, bandwidth=0.3, anchors=0.5, seed=2)
    best = generate(run / "run", samples=5, candidates=20, select="subsampled", bandwidth=0.3, anchors=0.5, seed=2)
    value = every.column("val_acc")
    assert torch.equal(best.column("val_acc"), value.sort(descending=True).values[:5])
    rows = value.argsort(descending=True, stable=True)[:5].tolist()
    assert torch.allclose(best.weights, every.weights[rows], atol=FP32_ROUNDING)
    assert best.properties["anchor"] == tuple(every.properties["anchor"][i] for i in rows)
    again = generate(run / "run", samples=5, candidates=20, select="bootstrapped", rounds=2, bandwidth=0.3, anchors=0.5, seed=2)
    assert bool((again.column("val_acc") >= best.column("val_acc")).all())
    assert set(again.properties["anchor"]) == {None}


def test_fine_tuned_samples_stand_behind_what_they_were(run: Path) -> None:
    plain = generate(run / "run", samples=3, bandwidth=0.2)
    tuned = generate(run / "run", samples=3, bandwidth=0.2, finetune=2)
    assert tuned.properties["epoch"] == (0, 1, 2) * 3
    assert tuned.properties["model"] == (0, 0, 0, 1, 1, 1, 2, 2, 2)
    assert torch.equal(tuned.weights[0::3], plain.weights)
    assert tuned.properties["test_acc"][0::3] == plain.properties["test_acc"]
    assert tuned.properties["anchor"][1::3] == plain.properties["anchor"]
    assert not torch.equal(tuned.weights[2::3], plain.weights)
    images, labels = dataset_of(run / "zoo", tuned.architecture).split("test")
    expected = (oracle_outputs(tuned.weights, images, tuned.architecture).argmax(-1) == labels).double().mean(1)
    assert torch.allclose(tuned.column("test_acc"), expected, atol=1.5 / len(labels))


def test_anchors_are_the_best_by_validation_accuracy(run: Path) -> None:
    zoo = load_zoo(run / "zoo", "train")
    data = dataset_of(run / "zoo", zoo.architecture)
    column = [0.1, None, 0.9, 0.5, *[0.0] * (len(zoo) - 4)]
    value = val_accuracy(Population(zoo.architecture, zoo.weights, {"val_acc": column}), data)
    assert best_rows(value, 3 / len(zoo)).tolist() == [2, 3, 0]
    assert len(best_rows(value, 1e-6)) == 1
    assert nearest(zoo.weights[:3], zoo.weights).abs().max() < 1e-3
    # a zoo that does not say is measured; a tie may fall either way
    measured = val_accuracy(Population(zoo.architecture, zoo.weights), data)
    assert torch.allclose(measured, zoo.column("val_acc"), atol=1.5 / len(data.val_labels))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"samples": 0}, "samples"),
        ({"anchors": 0.0}, "anchors"),
        ({"anchors": 1.5}, "anchors"),
        ({"bandwidth": -1.0}, "bandwidth"),
        ({"sampler": "kde"}, "sampler"),
        ({"select": "best"}, "select"),
        ({"finetune": -1}, "finetune"),
        ({"select": "subsampled", "candidates": 3}, "candidates"),
    ],
    ids=["samples", "no-anchors", "anchors", "bandwidth", "sampler", "select", "finetune", "candidates"],
)
def test_a_wrong_argument_is_named(run: Path, arguments: dict, words: str) -> None:
    with pytest.raises(WslfastError, match=words):
        generate(run / "run", **arguments)
