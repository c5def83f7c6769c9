"""Zoos that stay on disk: the same rows, a shuffle that visits shards in windows, the same training run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tolerances import FP32_DEEP
from training_runs import ARCH, config, records, same

from wslfast import Population, WslfastError, load_zoo, train
from wslfast.training import models
from wslfast.training.checkpoint import load_checkpoint
from wslfast.zoo import MappedZoo, mapped, save_zoo
from wslfast.zoo.splits import Split


@pytest.fixture(scope="module")
def population() -> Population:
    weights = ARCH.initial_weights(["kaiming_normal"] * 60, range(60))
    return Population(ARCH, weights, {"model": tuple(range(60)), "val_acc": tuple(i / 60 for i in range(60))})


@pytest.fixture
def folder(tmp_path: Path, population: Population) -> Path:
    save_zoo(population, tmp_path / "zoo", splits=Split((0.8, 0.1, 0.1), 3), provenance={}, shard_rows=3)  # 20 shards
    return tmp_path / "zoo"


@pytest.mark.parametrize("split", [None, "train", "test"])
def test_rows_are_those_of_load_zoo(folder: Path, split: str | None) -> None:
    zoo, loaded = MappedZoo(folder, split), load_zoo(folder, split)
    assert len(zoo) == len(loaded)
    assert dict(zoo.properties) == dict(loaded.properties)
    index = torch.randperm(len(zoo), generator=torch.Generator().manual_seed(0))
    index = torch.cat([index, index[:3]])  # twice the same row is no trouble
    assert torch.equal(zoo.rows(index), loaded.weights[index])
    assert torch.equal(zoo.load().weights, loaded.weights)
    some = zoo.load(index[:4])
    assert some.properties["model"] == tuple(loaded.properties["model"][i] for i in index[:4].tolist())
    assert len(zoo._open) <= mapped.WINDOW


def test_a_shuffle_visits_every_row_once_a_window_of_shards_at_a_time(folder: Path) -> None:
    zoo = MappedZoo(folder)
    order = zoo.shuffle(torch.Generator().manual_seed(1))
    assert sorted(order.tolist()) == list(range(60))
    shards = (order // 3).tolist()
    window = 3 * mapped.WINDOW
    groups = [set(shards[at : at + window]) for at in range(0, 60, window)]
    assert [len(g) for g in groups] == [8, 8, 4]
    assert set.union(*groups) == set(range(20))  # disjoint: 8 + 8 + 4
    assert shards[:window] != sorted(shards[:window])  # mixed inside a window
    assert not torch.equal(order, zoo.shuffle(torch.Generator().manual_seed(2)))
    assert torch.equal(order, zoo.shuffle(torch.Generator().manual_seed(1)))


def test_no_epoch_opens_a_shard_twice(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zoo = MappedZoo(folder)
    opened: list[int] = []
    original = MappedZoo._map

    def counting(self: MappedZoo, number: int) -> torch.Tensor:
        opened.append(number)
        return original(self, number)

    monkeypatch.setattr(MappedZoo, "_map", counting)
    for batch in zoo.shuffle(torch.Generator().manual_seed(1)).split(4):
        zoo.rows(batch)
    assert len(opened) <= 20 + mapped.WINDOW  # a batch may straddle two windows


def test_training_from_disk_is_training_from_memory(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit where targets are cached, to rounding where they are computed at every step (from fewer queries at a time).

    The sample is smaller than the zoo, as for large ones.
    """
    monkeypatch.setattr(models, "SAMPLE", 16)
    images = torch.randn(48, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    whole = replace(config(tmp_path / "whole"), zoo=str(folder))
    train(whole, images=images)
    weights, targets = 4 * 48 * ARCH.num_weights, 4 * 48 * 48 * 3
    assert targets < weights
    for name, limit in (("neither", 0), ("targets", targets), ("both", weights)):
        other = replace(whole, out=str(tmp_path / name), memory_gb=2e-9 * limit)
        train(other, images=images)
        if name == "neither":
            for a, b in zip(records(tmp_path / "whole"), records(tmp_path / name), strict=True):
                assert a == pytest.approx(b, rel=FP32_DEEP)
            continue
        a, b = load_checkpoint(whole.out), load_checkpoint(other.out)
        a.pop("config"), b.pop("config")
        assert same(a, b), name
        assert records(tmp_path / "whole") == records(tmp_path / name)


def test_a_run_resumes_whatever_stays_in_memory(tmp_path: Path, folder: Path) -> None:
    images = torch.randn(48, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    whole = replace(config(tmp_path / "whole"), zoo=str(folder))
    train(whole, images=images)
    train(replace(whole, out=str(tmp_path / "parts"), steps=5), images=images)
    train(replace(whole, out=str(tmp_path / "parts"), memory_gb=0.0), images=images, resume=True)
    assert records(tmp_path / "parts")[-1] == pytest.approx(records(tmp_path / "whole")[-1], rel=FP32_DEEP)


def test_damage_is_found_when_a_shard_is_opened(folder: Path) -> None:
    zoo = MappedZoo(folder)
    file = folder / "shard-00002.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert zoo.rows(torch.tensor([0])).shape == (1, ARCH.num_weights)
    with pytest.raises(WslfastError, match=r"shard-00002\.safetensors: the shard is damaged"):
        zoo.rows(torch.tensor([7]))


def test_a_missing_shard_is_found_at_once(folder: Path) -> None:
    (folder / "shard-00004.safetensors").unlink()
    with pytest.raises(WslfastError, match=r"shard-00004\.safetensors: no such file"):
        MappedZoo(folder)


@pytest.mark.parametrize("index", [torch.tensor([60]), torch.tensor([-1]), torch.tensor([0.0]), torch.tensor([[0]])], ids=str)
def test_a_wrong_index_is_one_clear_error(folder: Path, index: torch.Tensor) -> None:
    with pytest.raises(WslfastError, match="index: expected int64"):
        MappedZoo(folder).rows(index)


def test_a_wrong_split_or_architecture_is_one_clear_error(folder: Path) -> None:
    with pytest.raises(WslfastError, match="split: expected None or one of"):
        MappedZoo(folder, "dev")
    from wslfast import Architecture

    with pytest.raises(WslfastError, match="architecture: the zoo has"):
        MappedZoo(folder, architecture=Architecture.cnn())
