"""Whatever the bytes: a value or a WslfastError, and no memory beyond the input's.

A seeded mutator per reader (the same inputs at every run; ``WSLFAST_FUZZ=n`` draws others): bytes changed, inserted, removed, moved,
numbers blown up, files cut short; for formats with a checksum half of the inputs are sealed again, so that what lies behind it
is met too.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import random
import resource
import shutil
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from matrix import many, reached
from pickled import honest_file
from training_runs import ARCH, config

from wslfast import Population, TrainConfig, WslfastError, train
from wslfast.safe.state import load_plain
from wslfast.training import load_run
from wslfast.training.checkpoint import _seal, checkpoint_path
from wslfast.zoo import export_zoo, import_zoo, save_zoo
from wslfast.zoo.manifest import MANIFEST, Manifest

SEED = int(os.environ.get("WSLFAST_FUZZ", "0"))
CONSTANT = 48 << 20  # bytes that a million readings may add to the process, beside twice the input
_TOKENS = [
    b"0",
    b"-1",
    b"1e999",
    b"9" * 25,
    b"null",
    b"true",
    b"[",
    b"{",
    b"}",
    b"]",
    b'"',
    b"\\ud800",
    b"\x00",
    b"\xff\xff\xff\xff",
    b"nan",
    b"= ",
    b"\n",
]
_OPCODES = b"(.012lLdtRbcqhjrJKMTUX]}aesu\x80\x81\x82\x85\x86\x87\x88\x89\x8a\x8b\x8c\x8f\x90\x91\x92\x93\x94\x95\x96"


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory, where there is one."""
    shm = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(dir=shm if os.access(shm, os.W_OK) else None))
    yield folder
    shutil.rmtree(folder)


def mutated(data: bytes, rng: random.Random, words: list[bytes]) -> bytes:
    """One to six changes."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        at, kind = rng.randrange(len(changed) + 1), rng.random()
        if kind < 0.35 and at < len(changed):
            changed[at] = rng.choice((rng.randrange(256), 0, 255, changed[at] ^ 1 << rng.randrange(8)))
        elif kind < 0.5:
            changed[at:at] = rng.choice(words)
        elif kind < 0.65:
            changed[at : at + rng.randint(1, 12)] = rng.choice(words)
        elif kind < 0.8:
            del changed[at : at + rng.randint(1, 12)]
        elif kind < 0.95:
            source = rng.randrange(len(changed) + 1)
            changed[at : at + rng.randrange(16)] = changed[source : source + rng.randrange(16)]
        else:
            del changed[at:]
    return bytes(changed)


def fuzz(name: str, count: int, make: Callable[[random.Random], bytes], read: Callable[[bytes], object]) -> Counter[str]:
    """Read so many inputs; anything but a value or a WslfastError fails, with the seed that made it."""
    outcomes: Counter[str] = Counter()
    largest = 0
    for i in range(count):
        if i == min(2000, count // 10):  # imports and caches are there
            before = _peak(anew=True)
        seed = f"{name} {SEED} {i}"
        data = make(random.Random(seed))
        largest = max(largest, len(data))
        try:
            read(data)
            outcomes["values"] += 1
        except WslfastError:
            outcomes["errors"] += 1
        except BaseException as error:
            raise AssertionError(f"input {seed!r} ({data[:200]!r}...): {type(error).__name__}: {error}") from error
    grown = _peak() - before
    assert grown <= 2 * largest + CONSTANT, f"{grown:,} bytes more for inputs of {largest:,}"
    reached("fuzz", f"inputs of {name}: values or WslfastError alone", count, "1,000,000 in all")
    reached("fuzz", f"growth of the process over {name}, MB", f"{grown / 1e6:.0f}", "2 x input + 50")
    return outcomes


def _peak(anew: bool = False) -> int:
    """The most memory that the process has held; since now, if ``anew`` (where the system lets the mark be reset)."""
    if anew:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def _manifest() -> Manifest:
    weights = torch.zeros(6, ARCH.num_weights)
    folder = Path(tempfile.mkdtemp())
    made = save_zoo(
        Population(ARCH, weights, {"lr": [1e-05, None, 0.5] * 2, "note": ["é"] * 6}),
        folder,
        splits=["train"] * 6,
        provenance={"a": [1]},
        shard_rows=4,
    )
    shutil.rmtree(folder)
    return made


def test_any_manifest() -> None:
    made = _manifest()
    data = made.to_json()
    record = json.loads(data)

    def make(rng: random.Random) -> bytes:
        if rng.random() < 0.7:
            return mutated(data, rng, _TOKENS)
        changed = json.loads(data)
        node: Any = changed
        while True:  # somewhere inside, another value
            key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
            if not isinstance(node[key], (dict, list)) or not node[key] or rng.random() < 0.3:
                break
            node = node[key]
        node[key] = rng.choice([None, True, -1, 0, 1 << 70, 1e308, "", "../x", [], {}, [[]], record["shards"], node[key], [node[key]] * 3])
        return json.dumps(changed).encode()

    def read(data: bytes) -> None:
        Manifest.parse(data, MANIFEST).rebuild(MANIFEST)

    outcomes = fuzz("manifests", many(4000, 400_000), make, read)
    assert outcomes["errors"] > 0


def test_any_architecture_behind_a_right_checksum() -> None:
    made = _manifest()
    text = json.dumps(dict(made.architecture)).encode()

    def read(data: bytes) -> None:
        try:
            record = json.loads(data)
        except (ValueError, RecursionError):
            return
        if isinstance(record, dict):
            Manifest(**{**vars(made), "architecture": record}).rebuild(MANIFEST)

    fuzz("architecture records", many(3000, 250_000), lambda rng: mutated(text, rng, _TOKENS), read)


@pytest.mark.parametrize("form", ["archive", "stream", "program"])
def test_any_file_of_torch_save(memory: Path, form: str) -> None:
    file = memory / "x.pt"
    words = [bytes([code]) for code in _OPCODES] + [
        b"h\x00",
        b"j\xff\xff\xff\x7f",
        b"\x8a\x08" + b"\xff" * 7 + b"\x7f",
        b"ctorch._utils\n_rebuild_tensor_v2\n",
    ]
    sample = honest_file(form == "archive")
    if form == "program":
        with zipfile.ZipFile(io.BytesIO(honest_file(True))) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        pickled = next(name for name in members if name.endswith("data.pkl"))

    def make(rng: random.Random) -> bytes:
        return mutated(members[pickled] if form == "program" else sample, rng, words)

    def read(data: bytes) -> None:
        if form == "program":  # behind the archive's checksums
            with zipfile.ZipFile(file, "w") as archive:
                for name, content in members.items():
                    archive.writestr(name, data if name == pickled else content)
        else:
            file.write_bytes(data)
        load_plain(file)

    outcomes = fuzz(f"torch.save's {form}s", many(1500, {"archive": 60_000, "stream": 130_000, "program": 55_000}[form]), make, read)
    assert outcomes["errors"] > 0


def test_any_tree_of_checkpoints(memory: Path) -> None:
    """The importer from end to end: params.json, result.json and a checkpoint, each damaged now and then."""
    save_zoo(Population(ARCH, ARCH.initial_weights(["kaiming_normal"], [0])), memory / "zoo", splits=["train"], provenance={})
    export_zoo(memory / "zoo", memory / "tree")
    files = {file: file.read_bytes() for file in sorted((memory / "tree").rglob("*")) if file.is_file()}

    def make(rng: random.Random) -> bytes:
        return pickle.dumps({str(f): mutated(d, rng, _TOKENS) if rng.random() < 0.5 else d for f, d in files.items()})

    def read(data: bytes) -> None:
        for file, content in pickle.loads(data).items():
            Path(file).write_bytes(content)
        import_zoo(memory / "tree", memory / "out", overwrite=True, architecture=ARCH)

    fuzz("checkpoint trees", many(30, 1500), make, read)


def test_any_configuration(memory: Path) -> None:
    file = memory / "c.toml"
    text = TrainConfig(zoo="z", out="o").to_toml().encode()
    lines = text.splitlines(keepends=True)

    def make(rng: random.Random) -> bytes:
        some = b"".join(rng.sample(lines, rng.randint(1, 6)))
        return mutated(
            b'zoo = "z"\nout = "o"\n' * (rng.random() < 0.8) + some, rng, [*_TOKENS, b"[a]", b"1979-05-27", b"0x_1", b"'''", b"inf"]
        )

    def read(data: bytes) -> None:
        file.write_bytes(data)
        TrainConfig.from_toml(file)

    outcomes = fuzz("configurations", many(2000, 100_000), make, read)
    assert min(outcomes["errors"], outcomes["values"]) > 0


def test_any_checkpoint(memory: Path) -> None:
    """``state.pt`` as it is, and sealed again: a stranger can make a digest, too."""
    population = Population(ARCH, ARCH.initial_weights(["kaiming_normal"] * 20, range(20)))
    train(config(memory / "run", steps=1, d_model=4, heads=1), population=population, images=torch.randn(48, 1, 8, 8))
    file = checkpoint_path(memory / "run")
    whole = file.read_bytes()
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    program = next(name for name in members if name.endswith("data.pkl"))
    words = [bytes([code]) for code in _OPCODES] + [
        b"K\x00",
        b"K\xff",
        b"J\xff\xff\xff\x7f",
        b"J\xff\xff\xff\xff",
        b"G\x7f\xf0" + bytes(6),
        b"N",
        b"]",
        b"}",
        b")",
    ]

    def make(rng: random.Random) -> bytes:
        return b"program" + mutated(members[program], rng, words) if rng.random() < 0.7 else b"archive" + mutated(whole, rng, words)

    def read(data: bytes) -> None:
        kind, data = data[:7], data[7:]
        if kind == b"program":
            with zipfile.ZipFile(file, "w") as archive:
                for name, content in members.items():
                    archive.writestr(name, data if name == program else content)
        else:
            file.write_bytes(data)
        if file.stat().st_size > 2:
            _seal(file)
        load_run(memory / "run")

    outcomes = fuzz("checkpoints", many(80, 4000), make, read)
    assert outcomes["errors"] > 0


DEEP = 50_000


@pytest.mark.parametrize(
    "program",
    [b"\x80\x02" + b"]" * DEEP + b"a" * (DEEP - 1) + b".", b"\x80\x02N" + b"\x85" * DEEP + b".", b"\x80\x02" + b"(" * DEEP + b"t" * DEEP + b".",
     b"\x80\x02]q\x00h\x00a.", b"\x80\x02}q\x00K\x01h\x00s.", b"\x80\x02]q\x00(" + b"h\x00" * 5 + b"e."],
    ids=["lists", "tuples", "marks", "a list in itself", "a dict in itself", "a list in itself, five times"],
)  # fmt: skip
def test_depth_and_cycles_are_errors(tmp_path: Path, program: bytes) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("archive/data.pkl", program)
    with pytest.raises(WslfastError, match=r"x\.pt"):
        load_plain(tmp_path / "x.pt")


def test_what_would_not_end_when_written_out_is_refused(tmp_path: Path) -> None:
    """Sixty lists, each twice in the next, are 2**60 for whoever walks or prints them."""
    program = b"\x80\x02]q\x00" + b"".join(b"]q%c(h%ch%ce" % (i, i - 1, i - 1) for i in range(1, 60)) + b"."
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("archive/data.pkl", program)
    with pytest.raises(WslfastError, match="more values than the file"):
        load_plain(tmp_path / "x.pt")
