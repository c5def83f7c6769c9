"""One bit of a file turned over: an error that names the file, whichever bit it is."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from matrix import many, reached
from training_runs import ARCH, config

from wslfast import Architecture, Population, WslfastError, load_zoo, train
from wslfast.training import load_run
from wslfast.training.checkpoint import checkpoint_path, load_checkpoint
from wslfast.zoo import MappedZoo, save_zoo
from wslfast.zoo.manifest import MANIFEST

SMALL = Architecture.mlp(3, (2,), 2)


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    weights = torch.randn(12, SMALL.num_weights, generator=torch.Generator().manual_seed(0))
    table = {"model": range(12), "val_acc": [i / 12 for i in range(12)], "lr": [1e-05] * 12}
    save_zoo(Population(SMALL, weights, table), tmp_path / "zoo", splits=["train"] * 12, provenance={"by": "a test"}, shard_rows=4)
    return tmp_path / "zoo"


def _flip(file: Path, data: bytes, bit: int) -> None:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    file.write_bytes(changed)


@pytest.mark.parametrize("part", ["header", "data", "manifest"])
def test_no_flipped_bit_of_a_zoo_is_silent(zoo: Path, part: str) -> None:
    rng, flips = random.Random(part), many(150, 2500)
    file = zoo / (MANIFEST if part == "manifest" else "shard-00001.safetensors")
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")  # of the numbers, in a shard
    low, high = {"header": (0, start), "data": (start, len(data)), "manifest": (0, len(data))}[part]
    for i in range(flips):
        _flip(file, data, rng.randrange(8 * low, 8 * high))
        with pytest.raises(WslfastError, match=file.name):
            load_zoo(zoo) if i % 2 else MappedZoo(zoo).load()
    file.write_bytes(data)
    assert len(load_zoo(zoo)) == 12
    reached(
        "flips", f"flipped bits of a {'manifest' if part == 'manifest' else f'shard, its {part}'} that were refused by name", flips, 2500
    )


def test_no_flipped_bit_of_a_checkpoint_is_silent(tmp_path: Path) -> None:
    """torch.load alone reads four of five of these files, most of them with other weights."""
    rng, flips = random.Random(0), many(150, 2500)
    population = Population(ARCH, ARCH.initial_weights(["kaiming_normal"] * 20, range(20)))
    train(config(tmp_path, steps=1, d_model=4, heads=1), population=population, images=torch.randn(48, 1, 8, 8))
    file = checkpoint_path(tmp_path)
    data = file.read_bytes()
    for i in range(flips):
        _flip(file, data, rng.randrange(8 * len(data)))
        with pytest.raises(WslfastError, match=r"state\.pt"):
            load_checkpoint(tmp_path) if i % 10 else load_run(tmp_path)
    file.write_bytes(data)
    assert load_run(tmp_path).step == 1
    reached("flips", "flipped bits of a checkpoint that were refused by name", flips, 2500)
    reached("flips", "silent loads", 0, 0)
