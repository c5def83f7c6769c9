"""Query sets: what is drawn, what is optimised and distilled, files, and how a run chooses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tolerances import FP32
from torch import Tensor

from wslfast import Architecture, Population, TrainConfig, WslfastError, build_zoo, train
from wslfast.behavior import batched_forward
from wslfast.queries import SYNTHETIC, distil, load_queries, save_queries, synthetic_queries
from wslfast.training import loop, query_sets
from wslfast.training.query_sets import query_images, set_names
from wslfast.zoo import MappedZoo, dataset_of

CNN, CNN3, MLP = Architecture.cnn(1), Architecture.cnn3(), Architecture.mlp(16, (8,), 3)
DRAWN = tuple(kind for kind in SYNTHETIC if kind != "optimised")


def population(arch: Architecture, k: int = 6) -> Population:
    return Population(arch, arch.initial_weights(["kaiming_normal"] * k, range(k)))


@pytest.mark.parametrize("arch", [CNN, CNN3, MLP, Architecture.mlp(7, (3,), 2)], ids=["1 channel", "3 channels", "flat square", "flat"])
@pytest.mark.parametrize("kind", DRAWN)
def test_drawn_sets(kind: str, arch: Architecture) -> None:
    state = torch.get_rng_state()
    images = synthetic_queries(kind, 70, arch, seed=3)
    assert torch.equal(state, torch.get_rng_state())
    assert images.shape == (70, *arch.input_shape)
    assert images.dtype == torch.float32
    assert torch.equal(images, synthetic_queries(kind, 70, arch, seed=3))
    assert not torch.equal(images, synthetic_queries(kind, 70, arch, seed=4))
    assert len(torch.unique(images.flatten(1), dim=0)) == 70
    if kind == "uniform":
        assert 0 <= float(images.min()) <= float(images.max()) < 1
    elif images.ndim == 4:
        std, mean = torch.std_mean(images.double(), (0, 2, 3), correction=0)
        torch.testing.assert_close(mean, torch.zeros_like(mean), atol=FP32, rtol=0)
        torch.testing.assert_close(std, torch.ones_like(std), atol=FP32, rtol=0)


def neighbours(images: Tensor) -> float:
    """Correlation of a pixel with the next one in its row."""
    a, b = images[..., :-1].flatten(), images[..., 1:].flatten()
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


def test_what_the_kinds_look_like() -> None:
    sets = {kind: synthetic_queries(kind, 200, CNN) for kind in DRAWN}
    assert abs(neighbours(sets["noise"])) < 0.02
    assert abs(neighbours(sets["uniform"])) < 0.02
    assert all(neighbours(sets[kind]) > 0.7 for kind in ("smooth", "strokes", "blend"))
    # power of photograph-like noise falls with frequency; that of white noise does not
    power = {k: torch.fft.rfft2(sets[k][:, 0]).abs().square().mean(0) for k in ("noise", "smooth")}
    assert power["smooth"][0, 2] > 10 * power["smooth"][0, 12]
    assert power["noise"][0, 2] < 2 * power["noise"][0, 12]
    # strokes are thin: most of an image is ground
    strokes = sets["strokes"].flatten(1)
    ground = strokes.median(1, keepdim=True).values
    assert float(((strokes - ground).abs() < 0.3).float().mean()) > 0.5


def test_optimised_images_raise_disagreement_and_touch_no_data() -> None:
    zoo = population(CNN, 8)
    state = torch.get_rng_state()
    images = synthetic_queries("optimised", 12, CNN, population=zoo, steps=8, seed=1)
    assert torch.equal(state, torch.get_rng_state())
    assert images.shape == (12, 1, 28, 28)
    assert not images.requires_grad
    assert torch.equal(images, synthetic_queries("optimised", 12, CNN, population=zoo, steps=8, seed=1))

    def disagreement(x: Tensor) -> float:
        return float(batched_forward(zoo.weights, x, CNN).softmax(2).var(0).sum(1).mean())

    start = synthetic_queries("optimised", 12, CNN, population=zoo, steps=0, seed=1)
    drawn = max(disagreement(synthetic_queries(kind, 100, CNN)) for kind in ("smooth", "strokes", "blend"))
    assert disagreement(images) > 1.5 * max(drawn, disagreement(start))
    assert float(images.std()) < 3  # not by larger pixels
    broken = Population(CNN, torch.cat([zoo.weights, torch.full((1, CNN.num_weights), float("inf"))]))
    assert bool(synthetic_queries("optimised", 3, CNN, population=broken, steps=2).isfinite().all())


def test_optimised_flat_images() -> None:
    images = synthetic_queries("optimised", 5, MLP, population=population(MLP), steps=3)
    assert images.shape == (5, 16)


def test_distilling_takes_what_is_new() -> None:
    zoo = population(MLP, 5)
    distinct = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    images = torch.cat([distinct[:3], distinct[:3], distinct])  # rows 0..2 three times, 3..5 once
    chosen = distil(images, zoo.weights, MLP, 6).tolist()
    assert len(set(chosen)) == 6
    assert {c % 3 if c < 6 else c - 6 for c in chosen} == set(range(6))  # no image twice while others are new
    outputs = batched_forward(zoo.weights, images, MLP).softmax(2).double()
    vectors = (outputs - outputs.mean(0)).permute(1, 0, 2).flatten(1)
    assert chosen[0] in vectors.square().sum(1).topk(3).indices.tolist()
    second = max(
        range(12),
        key=lambda i: float((vectors[i] - vectors[i] @ vectors[chosen[0]] / vectors[chosen[0]].square().sum() * vectors[chosen[0]]).norm()),
    )
    torch.testing.assert_close(vectors[chosen[1]], vectors[second])
    assert sorted(distil(images, zoo.weights, MLP, 12).tolist()) == list(range(12))  # duplicates come last, none is lost


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: synthetic_queries("fractal", 3, CNN), "kind: expected"),
        (lambda: synthetic_queries("noise", 0, CNN), "n: expected"),
        (lambda: synthetic_queries("optimised", 3, CNN), "population: expected"),
        (lambda: synthetic_queries("optimised", 3, CNN, population=population(CNN, 1)), "at least 2 models"),
        (lambda: distil(torch.zeros(3, 16), population(MLP).weights, MLP, 4), "n: expected 1 to 3"),
        (lambda: set_names("data+nosie"), "query_set: expected data"),
        (lambda: TrainConfig("z", "o", query_set="stl10"), "stl10"),
    ],
)
def test_wrong_arguments(call: object, words: str) -> None:
    with pytest.raises(WslfastError, match=words):
        call()  # type: ignore[operator]


def test_files_go_round_and_bad_ones_are_named(tmp_path: Path) -> None:
    images = torch.randn(4, 16)
    save_queries(tmp_path / "a.npz", images)
    assert torch.equal(load_queries(tmp_path / "a.npz", MLP), images)
    with pytest.raises(WslfastError, match=r"a\.npz"):
        load_queries(tmp_path / "a.npz", CNN)
    with pytest.raises(WslfastError, match="ending in"):
        save_queries(tmp_path / "a.npy", images)
    (tmp_path / "b.npz").write_bytes(b"not a zip")
    np.savez(tmp_path / "c.npz", images=images.numpy())
    np.savez(tmp_path / "d.npz", queries=np.array([{"a": 1}], dtype=object))
    np.savez(tmp_path / "e.npz", queries=np.full((2, 16), np.nan))
    np.savez(tmp_path / "f.npz", queries=np.zeros((2, 16), dtype=np.int64))
    np.save(tmp_path / "g.npz.npy", images.numpy())
    (tmp_path / "g.npz.npy").rename(tmp_path / "g.npz")
    for name in "bcdefgh":
        with pytest.raises(WslfastError, match=f"{name}.npz"):
            load_queries(tmp_path / f"{name}.npz", MLP)


# -- in a run ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zoo") / "zoo"
    build_zoo("digits", folder, models=10, epochs=1, seed=0)
    return folder


def test_sets_by_name(zoo: Path, tmp_path: Path) -> None:
    source = MappedZoo(zoo, "train")
    data = dataset_of(zoo, CNN)
    for name, images in (("data", data.train_images), ("val", data.val_images), ("test", data.test_images)):
        assert torch.equal(query_images(name, zoo, source), images)
    assert torch.equal(query_images("strokes", zoo, source, n=9, seed=2), synthetic_queries("strokes", 9, CNN, seed=2))
    save_queries(tmp_path / "mine.npz", data.test_images[:5])
    assert torch.equal(query_images(str(tmp_path / "mine.npz"), zoo, source), data.test_images[:5])
    mixed = query_images(f"uniform+{tmp_path / 'mine.npz'}", zoo, source, n=8)
    assert len(mixed) == 10  # as many of each
    assert sorted(mixed[5:].sum((1, 2, 3)).tolist()) == sorted(data.test_images[:5].sum((1, 2, 3)).tolist())


def test_synthetic_sets_never_read_the_zoo_s_images(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> None:
        raise AssertionError("images were read")

    monkeypatch.setattr(query_sets, "dataset_of", forbidden)
    monkeypatch.setattr(query_sets, "OPTIMISED", 4)
    for kind in SYNTHETIC:
        assert len(query_images(kind, zoo, MappedZoo(zoo, "train"), n=6)) == (4 if kind == "optimised" else 6)


def settings(zoo: Path, out: Path, **changes: object) -> TrainConfig:
    values = {
        "zoo": str(zoo),
        "out": str(out),
        "steps": 2,
        "batch_size": 4,
        "queries": 4,
        "query_pool": 6,
        "d_model": 16,
        "heads": 2,
        "layers": 1,
    }
    return TrainConfig(**(values | changes))  # type: ignore[arg-type]


def test_runs_differ_by_their_set_and_optimised_images_are_made_once(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(query_sets, "OPTIMISED", 6)
    losses = {}
    for kind in ("data", "noise", "optimised"):
        train(settings(zoo, tmp_path / kind, query_set=kind))
        losses[kind] = json.loads((tmp_path / kind / "log.jsonl").read_text().splitlines()[-1])["loss"]
    assert len(set(losses.values())) == 3
    assert len(load_queries(tmp_path / "optimised" / "queries.npz", CNN)) == 6
    assert not (tmp_path / "noise" / "queries.npz").exists()
    monkeypatch.setattr(loop, "query_images", lambda *a, **k: pytest.fail("made again"))
    run = train(settings(zoo, tmp_path / "optimised", query_set="optimised", steps=3), resume=True)
    assert run.step == 3
    monkeypatch.undo()
    with pytest.raises(WslfastError, match="query_set = 'noise'"):
        train(settings(zoo, tmp_path / "data", query_set="noise", steps=3), resume=True)


def test_stop_ends_a_run_that_can_go_on(zoo: Path, tmp_path: Path) -> None:
    asked: list[int] = []
    run = train(settings(zoo, tmp_path / "a", steps=9), stop=lambda step: asked.append(step) or step == 2)  # type: ignore[func-returns-value]
    assert (run.step, asked) == (2, [1, 2])
    assert not run.finished
    assert train(settings(zoo, tmp_path / "a", steps=9), resume=True).finished
    whole = train(settings(zoo, tmp_path / "b", steps=9))
    assert torch.equal(
        whole.autoencoder.linear.encoder, train(settings(zoo, tmp_path / "a", steps=9), resume=True).autoencoder.linear.encoder
    )  # type: ignore[union-attr]
