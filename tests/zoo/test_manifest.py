"""The manifest of a zoo: every bit is guarded, and what strangers write is an error that says so."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from zoo_cases import ARCH, same

from wslfast.errors import WslfastError
from wslfast.zoo import load_zoo, read_manifest
from wslfast.zoo.manifest import Manifest, Shard


def test_every_bit_of_a_manifest_is_guarded(zoo: Path) -> None:
    data = (zoo / "manifest.json").read_bytes()
    rng = random.Random(0)
    for byte in range(len(data)):
        for bit in rng.sample(range(8), 2):
            damaged = bytearray(data)
            damaged[byte] ^= 1 << bit
            with pytest.raises(WslfastError, match=r"manifest\.json"):
                Manifest.parse(bytes(damaged), "manifest.json")


def rewrite(zoo: Path, change: Callable[[dict[str, Any]], object]) -> None:
    record = json.loads((zoo / "manifest.json").read_text())
    change(record)
    (zoo / "manifest.json").write_text(json.dumps(record))


def test_unknown_fields_are_ignored_and_newer_schemas_refused(zoo: Path) -> None:
    before = load_zoo(zoo)
    rewrite(zoo, lambda r: r.update(future={"x": [1]}))
    rewrite(zoo, lambda r: r["shards"][0].update(future=1))
    assert same(load_zoo(zoo), before)
    rewrite(zoo, lambda r: r.update(schema=3))
    with pytest.raises(WslfastError, match="schema 3 is newer"):
        load_zoo(zoo)


@pytest.mark.parametrize(
    "name",
    ["../zoo/shard-00000.safetensors", "/etc/passwd", "..", ".", "", "a/b.safetensors", "a\\b.safetensors", "a\0.safetensors",
     "shard-00000.pt",
     "shard-00001.safetensors", "SHARD-00001.safetensors", ".safetensors", "~.safetensors", "a..safetensors", "C:.safetensors",
     "x" * 300 + ".safetensors",
     "shard.safetensors\n", None, 3, ["shard-00000.safetensors"]],
)  # fmt: skip
def test_hostile_file_names(zoo: Path, name: Any) -> None:
    rewrite(zoo, lambda r: r["shards"][0].update(file=name))
    with pytest.raises(WslfastError, match=r"shards\[[01]\]"):
        load_zoo(zoo)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(10**30, 10**40) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300)
@given(st.randoms(use_true_random=False), JUNK, st.integers(1, 6))
def test_any_other_manifest_is_a_typed_error(rng: random.Random, junk: Any, depth: int) -> None:
    record = json.loads(_example().to_json())
    node, key = record, rng.choice(list(record))
    for _ in range(depth):
        below = node[key]
        if not isinstance(below, (dict, list)) or not below:
            break
        node, key = below, rng.choice(list(below) if isinstance(below, dict) else range(len(below)))
    if rng.random() < 0.2:
        del node[key]
    else:
        node[key] = junk
    try:
        parsed = Manifest.parse(json.dumps(record).encode(), "manifest.json")
    except WslfastError:
        return
    assert parsed == _example()


@settings(max_examples=300)
@given(st.randoms(use_true_random=False), JUNK)
def test_any_other_architecture_is_a_typed_error(rng: random.Random, junk: Any) -> None:
    """Past the checksum, as a stranger who writes one would be."""
    record = json.loads(json.dumps(ARCH.to_dict()))
    node = rng.choice([record, record["graph"], rng.choice(record["graph"]["nodes"])])
    node[rng.choice(list(node))] = junk
    if rng.random() < 0.2:
        record = junk if isinstance(junk, dict) else {"layers": junk, "input_shape": [5]}
    example = _example()
    try:
        Manifest(record, example.num_weights, example.rows, example.properties, example.split, {}, example.shards).rebuild("manifest.json")
    except WslfastError:
        return


@settings(max_examples=200)
@given(st.binary(max_size=200) | JUNK.map(lambda v: json.dumps(v).encode()))
def test_any_bytes_are_a_typed_error(data: bytes) -> None:
    with pytest.raises(WslfastError):
        Manifest.parse(data, "manifest.json")


def _example() -> Manifest:
    properties = {"model": (0, 0, 1), "epoch": (1, 2, 1), "lr": (1e-05, 0.5, None), "split": ("train", "train", "test")}
    split = {"by": "model", "seed": 0, "fractions": None}
    return Manifest(ARCH.to_dict(), ARCH.num_weights, 3, properties, split, {}, (Shard("shard-00000.safetensors", 3, 9000, "0" * 64),))


def test_a_manifest_that_promises_more_than_its_shards_hold_allocates_nothing(zoo: Path) -> None:
    manifest = read_manifest(zoo)
    huge = Manifest(**{**vars(manifest), "num_weights": 1 << 50})
    (zoo / "manifest.json").write_bytes(huge.to_json())
    with pytest.raises(WslfastError, match=r"shard-00000.*cannot hold"):
        load_zoo(zoo)
