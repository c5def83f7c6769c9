"""Shards that are damaged, or hold something else than the manifest says."""

from __future__ import annotations

import hashlib
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from zoo_cases import ARCH, flip, names

from wslfast.errors import WslfastError
from wslfast.zoo import load_zoo, read_manifest
from wslfast.zoo.manifest import Manifest, Shard


def test_flipped_bits_of_shards_are_found_and_named(zoo: Path) -> None:
    rng = random.Random(1)
    for name in names(zoo)[1:]:
        bits = 8 * (zoo / name).stat().st_size
        for bit in [*range(0, 8 * 80, 37), *(rng.randrange(bits) for _ in range(20)), bits - 1]:
            flip(zoo / name, bit)
            with pytest.raises(WslfastError, match=name):
                load_zoo(zoo)
            with pytest.raises(WslfastError, match=name):
                load_zoo(zoo, "val")
            flip(zoo / name, bit)
    assert len(load_zoo(zoo)) == 21


def test_without_verification_the_rest_is_still_checked(zoo: Path) -> None:
    shard = zoo / "shard-00001.safetensors"
    flip(shard, 8 * shard.stat().st_size - 8)
    assert len(load_zoo(zoo, verify=False)) == 21
    flip(shard, 8 * 20)
    with pytest.raises(WslfastError, match="shard-00001"):
        load_zoo(zoo, verify=False)


def swap(zoo: Path) -> None:
    a, b, c = (zoo / f"{n}.safetensors" for n in ("shard-00000", "shard-00001", "spare"))
    a.rename(c), b.rename(a), c.rename(b)


def replace(zoo: Path, make_it: Callable[[Path], object]) -> None:
    (zoo / "shard-00001.safetensors").unlink()
    make_it(zoo / "shard-00001.safetensors")


@pytest.mark.parametrize(
    ("harm", "named"),
    [
        pytest.param(lambda z: (z / "shard-00001.safetensors").unlink(), "shard-00001.*no such file", id="missing"),
        pytest.param(lambda z: os.truncate(z / "shard-00001.safetensors", 300), "shard-00001.*expected .* bytes, got 300", id="truncated"),
        pytest.param(lambda z: os.truncate(z / "shard-00001.safetensors", 0), "shard-00001.*bytes, got 0", id="empty"),
        pytest.param(lambda z: os.truncate(z / "shard-00001.safetensors", 1 << 40), "shard-00001.*expected", id="a terabyte"),
        pytest.param(swap, "shard-00000.*damaged or not the manifest's", id="swapped"),
        pytest.param(lambda z: (z / "shard-00007.safetensors").write_bytes(b"x"), "shard-00007.*extra shard", id="extra"),
        pytest.param(lambda z: replace(z, lambda p: p.symlink_to("/etc/hostname")), "shard-00001.*link", id="link out"),
        pytest.param(lambda z: replace(z, lambda p: p.symlink_to("absent")), "shard-00001.*no such file", id="dangling link"),
        pytest.param(lambda z: replace(z, lambda p: p.symlink_to(p.name)), "shard-00001", id="circular link"),
        pytest.param(lambda z: replace(z, Path.mkdir), "shard-00001.*regular file", id="a folder"),
        pytest.param(lambda z: replace(z, os.mkfifo), "shard-00001.*regular file", id="a pipe"),
        pytest.param(lambda z: (z / "manifest.json").unlink(), r"manifest\.json.*no such file", id="no manifest"),
        pytest.param(lambda z: os.truncate(z / "manifest.json", 0), r"manifest\.json.*JSON", id="empty manifest"),
        pytest.param(lambda z: os.truncate(z / "manifest.json", 500), r"manifest\.json.*JSON", id="truncated manifest"),
        pytest.param(lambda z: (z / "manifest.json").write_text("[" * 10**5), r"manifest\.json", id="deep manifest"),
        pytest.param(lambda z: (z / "manifest.json").write_text('{"schema": ' + "9" * 5000 + "}"), r"manifest\.json", id="long number"),
        pytest.param(lambda z: (z / "manifest.json").write_bytes(b"\xff\xfe{}"), r"manifest\.json", id="not UTF-8"),
        pytest.param(
            lambda z: (z / "manifest.json").write_text((z / "manifest.json").read_text().replace('"rows": 21', '"rows": 21, "rows": 21')),
            "appears twice",
            id="a key twice",
        ),
        pytest.param(lambda z: (z / "manifest.json").write_text("[]"), r"manifest\.json.*object", id="a list"),
    ],
)
def test_damage_is_a_typed_error_that_names_the_file(zoo: Path, harm: Callable[[Path], object], named: str) -> None:
    harm(zoo)
    with pytest.raises(WslfastError, match=named):
        load_zoo(zoo)


def test_no_zoo_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "absent", tmp_path, tmp_path / "file", "a\0b"):
        with pytest.raises(WslfastError, match="manifest"):
            load_zoo(path)


class _Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_a_shard_with_the_right_digest_and_the_wrong_content(zoo: Path, tmp_path: Path) -> None:
    canary, width = tmp_path / "canary", ARCH.num_weights
    good = torch.zeros(8, width)
    contents = {
        "a pickle": pickle.dumps([_Canary(canary)] * 300) + bytes(9000),
        "another name": safetensors.torch.save({"weight": good}),
        "two tensors": safetensors.torch.save({"weights": good, "more": good + 1}),
        "float16": safetensors.torch.save({"weights": torch.zeros(16, width).half()}),
        "transposed": safetensors.torch.save({"weights": good.t().contiguous()}),
        "a row too many": safetensors.torch.save({"weights": torch.zeros(9, width)}),
        "a row too few": safetensors.torch.save({"weights": torch.zeros(7, width), "pad": torch.zeros(100)}),
        "a huge header": (2**62).to_bytes(8, "little") + bytes(9000),
    }
    manifest = read_manifest(zoo)
    for blob in contents.values():
        (zoo / "shard-00000.safetensors").write_bytes(blob)
        shard = Shard("shard-00000.safetensors", 8, len(blob), hashlib.sha256(blob).hexdigest())
        changed = Manifest(**{**vars(manifest), "shards": (shard, *manifest.shards[1:])})
        (zoo / "manifest.json").write_bytes(changed.to_json())
        with pytest.raises(WslfastError, match="shard-00000"):
            load_zoo(zoo)
    assert not canary.exists()
