"""The zoo on disk: round trips, splits, what cannot be stored, interrupted and concurrent writing."""

from __future__ import annotations

import errno
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from zoo_cases import ARCH, make, names, same, save

from wslfast.architecture import Architecture
from wslfast.errors import WslfastError
from wslfast.population import Population
from wslfast.tracing import untraced
from wslfast.zoo import Split, load_zoo, read_manifest, summarize


@pytest.mark.parametrize(("models", "epochs", "shard_rows"), [(1, 1, None), (3, 1, 1), (7, 3, 5), (5, 3, 15), (21, 3, 63), (7, 3, 64)])
def test_round_trip(tmp_path: Path, models: int, epochs: int, shard_rows: int | None) -> None:
    population = make(models, epochs)
    manifest = save(population, tmp_path / "a" / "zoo", shard_rows=shard_rows)
    loaded = load_zoo(tmp_path / "a" / "zoo")
    assert torch.equal(loaded.weights, population.weights)
    assert {name: loaded.properties[name] for name in population.properties} == dict(population.properties)
    assert loaded.architecture == population.architecture
    assert manifest == read_manifest(tmp_path / "a" / "zoo")
    k = models * epochs
    assert [s.rows for s in manifest.shards] == [min(k, shard_rows or k)] * (k // (shard_rows or k)) + (
        [k % shard_rows] if shard_rows and k % shard_rows else []
    )
    assert names(tmp_path / "a" / "zoo") == ["manifest.json", *(f"shard-{i:05d}.safetensors" for i in range(len(manifest.shards)))]
    first = safetensors.torch.load_file(tmp_path / "a" / "zoo" / manifest.shards[0].file)
    assert list(first) == ["weights"]
    assert first["weights"].dtype == torch.float32


def test_strided_weights_and_poisoned_memory(tmp_path: Path, poisoned_empty: None) -> None:
    weights = torch.randn(ARCH.num_weights, 12).t()[::2]
    save(Population(ARCH, weights, {"epoch": range(6)}), tmp_path, shard_rows=4)
    assert torch.equal(load_zoo(tmp_path).weights, weights)
    assert torch.equal(
        load_zoo(tmp_path, "train").weights.sort(0)[0], weights[[s == "train" for s in load_zoo(tmp_path).properties["split"]]].sort(0)[0]
    )
    assert load_zoo(tmp_path).properties["model"] == tuple(range(6)), "rows without a model are one each"


def test_splits_are_by_model_and_loading_filters_in_manifest_order(tmp_path: Path) -> None:
    population = make(20, 3)
    save(population, tmp_path, shard_rows=7)
    whole = load_zoo(tmp_path)
    of = dict(zip(whole.properties["model"], whole.properties["split"]))
    for split, models in (("train", 14), ("val", 3), ("test", 3)):
        part = load_zoo(tmp_path, split)
        expected = whole[[s == split for s in whole.properties["split"]]]
        assert same(part, expected)
        assert {of[m] for m in part.properties["model"]} == {split}
        assert len(set(part.properties["model"])) == models
    assert read_manifest(tmp_path).split == {"by": "model", "seed": 3, "fractions": [0.7, 0.15, 0.15]}


@settings(max_examples=100)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=60),
    st.integers(0, 2**40),
    st.sampled_from([(0.7, 0.15, 0.15), (0.8, 0.05, 0.15), (1, 0, 0), (0.5, 0, 0.5)]),
)
def test_a_split_cuts_models_and_nothing_else(models: list[int], seed: int, fractions: tuple[float, float, float]) -> None:
    splits = Split(fractions, seed).assign(models)
    of: dict[int, set[str]] = {}
    for model, split in zip(models, splits, strict=True):
        of.setdefault(model, set()).add(split)
    assert all(len(s) == 1 for s in of.values())
    assert splits == Split(fractions, seed).assign(models)
    assert dict(zip(models, splits)) == dict(zip(reversed(models), reversed(Split(fractions, seed).assign(models))))
    assert "train" in splits
    present = {"train", *(name for name, share in zip(("val", "test"), fractions[1:], strict=True) if share > 0)}
    assert set(splits) == present if len(of) >= 3 else set(splits) <= present


@pytest.mark.parametrize("fractions", [(0.5, 0.5), (0.7, 0.2, 0.2), (-0.5, 0.75, 0.75), (0, 0.5, 0.5), "abc", (float("nan"), 0.5, 0.5)])
def test_shares_that_make_no_split(fractions: Any) -> None:
    with pytest.raises(WslfastError, match="split"):
        Split(fractions)


def test_two_savings_are_the_same_bytes(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        save(make(), tmp_path / folder, shard_rows=5)
    assert names(tmp_path / "a") == names(tmp_path / "b")
    for name in names(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_overwriting_asks_first_and_leaves_nothing_behind(tmp_path: Path) -> None:
    old, new = make(seed=0), make(5, seed=1)
    save(old, tmp_path, shard_rows=3)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(WslfastError, match="overwrite=True"):
        save(new, tmp_path)
    for population in (new, new, old):
        manifest = save(population, tmp_path, shard_rows=4, overwrite=True)
        assert torch.equal(load_zoo(tmp_path).weights, population.weights)
        assert names(tmp_path) == sorted(["manifest.json", "notes.txt", *(s.file for s in manifest.shards)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"splits": ["train"] * 20}, "expected a Split or 21", id="too few splits"),
        pytest.param({"splits": ["train", "test"] * 10 + ["train"]}, "model 0 is in both", id="model in two splits"),
        pytest.param({"splits": ["train"] * 20 + ["all"]}, "split", id="unknown split"),
        pytest.param({"splits": "train"}, "expected a Split", id="a string"),
        pytest.param({"provenance": {"x": float("nan")}}, "provenance", id="NaN provenance"),
        pytest.param({"provenance": {"x": torch.zeros(2)}}, "provenance", id="tensor provenance"),
        pytest.param({"provenance": {"x": "\ud800"}}, "provenance", id="surrogate"),
        pytest.param({"shard_rows": -1}, "shard_rows", id="negative shard_rows"),
        pytest.param({"shard_rows": 2.5}, "shard_rows", id="fractional shard_rows"),
    ],
)
def test_what_cannot_be_stored_is_refused_before_anything_is_written(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(WslfastError, match=message):
        save(make(), tmp_path / "zoo", **change)
    assert not (tmp_path / "zoo").exists()


def test_property_values(tmp_path: Path) -> None:
    weights = torch.zeros(3, ARCH.num_weights)
    save(
        Population(ARCH, weights, {"x": torch.tensor([1.5, float("nan"), float("inf")]), "n": list(torch.arange(3).numpy())}),
        tmp_path / "a",
    )
    loaded = load_zoo(tmp_path / "a").properties
    assert loaded["x"] == (1.5, None, None)
    assert loaded["n"] == (0, 1, 2)
    for bad in ([[1], 2, 3], [object(), 2, 3], [torch.zeros(2)] * 3):
        with pytest.raises(WslfastError, match=r"properties\['x'\]"):
            save(Population(ARCH, weights, {"x": bad}), tmp_path / "b")
    with pytest.raises(WslfastError, match=r"properties\['model'\]"):
        save(Population(ARCH, weights, {"model": ["a", "b", "c"]}), tmp_path / "b")
    with pytest.raises(WslfastError, match="finite weights"):
        save(Population(ARCH, weights + float("nan")), tmp_path / "b")
    with pytest.raises(WslfastError, match="at least one model"):
        save(Population(ARCH, weights[:0]), tmp_path / "b")
    assert not (tmp_path / "b").exists()


# -- architectures that the manifest cannot rebuild ----------------------------------------------------------------------


def test_an_opaque_architecture_is_passed_by_its_user(tmp_path: Path) -> None:
    def hidden(*layers: nn.Module) -> Architecture:
        return Architecture("hidden", (1, 5, 5), None, nn.Sequential(*layers).eval(), "hidden by a test")

    opaque = hidden(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(18, 3))
    other = hidden(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Sequential(nn.Flatten(), nn.Linear(18, 3)))
    assert not opaque.planned
    population = make(2, 1, architecture=opaque)
    save(population, tmp_path)
    assert load_zoo(tmp_path).architecture is opaque  # as long as somebody holds it in this process
    untraced._held.clear()
    with pytest.raises(WslfastError, match="pass architecture="):
        load_zoo(tmp_path)
    assert torch.equal(load_zoo(tmp_path, architecture=opaque).weights, population.weights)
    with pytest.raises(WslfastError, match="parameters differ"):
        load_zoo(tmp_path, architecture=other)
    with pytest.raises(WslfastError, match=f"the zoo has {opaque.num_weights} weights"):
        load_zoo(tmp_path, architecture=ARCH)


def test_a_published_network_with_batch_norm_rebuilds_itself(tmp_path: Path) -> None:
    population = make(2, 1, architecture=Architecture.resnet18(width=2))
    save(population, tmp_path)
    loaded = load_zoo(tmp_path)
    assert torch.equal(loaded.weights, population.weights)
    assert [s.name for s in loaded.architecture.parameters] == [s.name for s in population.architecture.parameters]


# -- interrupted and concurrent writing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_disk_that_refuses_leaves_the_old_zoo_and_no_stray_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: bool, call: str
) -> None:
    zoo, old, new = tmp_path / "zoo", make(seed=0), make(5, seed=1)
    if not fresh:
        save(old, zoo, shard_rows=8)
    before = {name: (zoo / name).read_bytes() for name in (names(zoo) if zoo.exists() else [])}
    real, left = getattr(os, call), 0

    def refuse(*arguments: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    for at in range(3):
        left = at
        monkeypatch.setattr(os, call, refuse)
        with pytest.raises(WslfastError, match=r"zoo: cannot write .* bytes.*No space left"):
            save(new, zoo, shard_rows=8, overwrite=True)
        monkeypatch.setattr(os, call, real)
        assert {name: (zoo / name).read_bytes() for name in names(zoo)} == before
    save(new, zoo, shard_rows=8, overwrite=True)
    assert torch.equal(load_zoo(zoo).weights, new.weights)


def test_a_writer_that_died_is_no_obstacle(zoo: Path) -> None:
    before = load_zoo(zoo)
    (zoo / "shard-00000.0123456789ab.safetensors").write_bytes(b"half")
    (zoo / ".manifest.json.77.tmp").write_bytes(b"half")
    assert same(load_zoo(zoo), before)
    manifest = save(make(3, seed=5), zoo, overwrite=True)
    assert names(zoo) == ["manifest.json", manifest.shards[0].file]


def test_a_reader_sees_the_old_zoo_or_the_new_one(tmp_path: Path) -> None:
    zoos = [make(6, seed=0), make(9, seed=1)]
    save(zoos[0], tmp_path, shard_rows=5)
    stop, errors = threading.Event(), []

    def write() -> None:
        try:
            for i in range(30):
                save(zoos[(i + 1) % 2], tmp_path, shard_rows=5, overwrite=True)
        except BaseException as error:
            errors.append(error)
        stop.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = set()
    while not stop.is_set():
        try:
            loaded = load_zoo(tmp_path)
        except WslfastError as error:  # as readers are told where a writer does not stop
            if "was replaced 5 times while it was read" not in str(error):
                raise
            continue
        which = len(loaded) == 27
        assert torch.equal(loaded.weights, zoos[which].weights)
        seen.add(which)
    writer.join()
    assert not errors
    assert seen == {False, True}


def test_summary(zoo: Path) -> None:
    summary = summarize(zoo)
    population = load_zoo(zoo)
    assert (summary["rows"], summary["models"], summary["epochs"], summary["shards"]) == (21, 7, [1, 2, 3], 3)
    assert summary["splits"]["train"] == {"rows": 15, "models": 5}
    accuracy = sorted(population.properties["test_acc"])
    assert summary["quantiles"]["test_acc"] == [accuracy[i] for i in (0, 5, 10, 15, 20)]
    assert summary["bytes"] == sum((zoo / n).stat().st_size for n in names(zoo) if n.startswith("shard"))
    assert summary["architecture"] == "mlp"
    assert summary["provenance"] == {"dataset": "made up"}
    json.dumps(summary)
