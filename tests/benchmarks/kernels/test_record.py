"""The recorded resources and races: they hold for the sources that are here, and some of them are made again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.kernels import record
from wslfast.kernels.triton import sources

HEADER, ROWS = record.read()
RESOURCES = [row for row in ROWS if row["kind"] == "resources"]
# bytes of stack a thread may hold: none in the products of a layer, some where a whole network is unrolled
SPILLS = {"forward": 0, "dx": 0, "dw": 0, "joint": 0, "layout": 0, "tail": 512, "network_forward": 512, "network_loss": 2048}
BLACKWELL = {
    "network_forward": 576,
    "network_loss": 2304,
}  # it takes Hopper's tiles: CNN3 in tf32 spills 544 and 2,176, Hopper 496 and 1,672
# elsewhere than on Hopper the assembler spills some to fit one more program on a multiprocessor; none in tf32x3
FRAME, JOINT_FRAME = 16, 24
SHARED = 99 * 1024  # what a block gets on the smaller GPUs


def test_the_record_is_of_these_sources() -> None:
    assert record.stale() is None


def _allowed(row: dict[str, Any]) -> int:
    """Bytes of stack: none on Hopper, and none in tf32x3 anywhere."""
    if row["target"] == "sm_100" and row["role"] in BLACKWELL:
        return BLACKWELL[row["role"]]
    if row["target"] == "sm_90" or SPILLS[row["role"]]:
        return SPILLS[row["role"]]
    frame = JOINT_FRAME if row["role"] == "joint" else FRAME
    return frame if row["registers"] <= 168 and row["precision"] != "tf32x3" else 0


def test_no_recorded_kernel_is_over_its_bounds() -> None:
    """tf32x3 and bf16 as well as tf32 and fp16."""
    wrong = [
        (row["architecture"], row["precision"], row["target"], row["kernel"], row["spill_bytes"], row["shared_bytes"])
        for row in RESOURCES
        if row["spill_bytes"] > _allowed(row) or row["shared_bytes"] > SHARED or (row["dots"] and not row["mma"])
    ]
    assert not wrong
    assert not [row for row in ROWS if row["kind"] == "races" and row["races"]]


def test_a_change_of_the_sources_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "kernels.jsonl"
    path.write_text(json.dumps({"sources": sources.digest(compiled=True), "triton": "3.9.0"}) + "\n")
    assert record.stale(path) is None
    monkeypatch.setattr(sources, "digest", lambda compiled: "other")
    assert "run `make kernels`" in str(record.stale(path))
    assert record.stale(tmp_path / "none.jsonl") is not None


# two kernels a role, and what they are compiled for
AGAIN = {
    "cnn3": ("forward 0", "forward 1", "dx 1", "dx 2", "dw 0", "dw 1", "joint 1", "joint 1 indexed", "head mse", "criterion mse", "pack", "fold"),
    "cnn": ("network_forward", "network_loss mse"),
    "lenet5": ("network_forward", "network_loss mse"),
}  # fmt: skip
MEASURED = ("registers", "spill_bytes", "shared_bytes", "dots", "mma")


def test_what_is_made_again_are_two_of_every_role() -> None:
    roles = [
        row["role"]
        for row in RESOURCES
        if (row["precision"], row["target"]) == ("fp16", "sm_90") and row["kernel"] in AGAIN.get(row["architecture"], ())
    ]
    assert {role: roles.count(role) for role in SPILLS} == dict.fromkeys(SPILLS, 2)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("architecture", [name if name == "cnn" else pytest.param(name, marks=pytest.mark.thorough) for name in AGAIN])
def test_two_rows_a_role_are_made_again(architecture: str) -> None:
    """Compiled again with the Triton that made them, they are equal."""
    triton = pytest.importorskip("triton")
    if HEADER.get("triton") != triton.__version__:
        pytest.skip("recorded with another Triton")
    kept = {
        row["kernel"]: row
        for row in RESOURCES
        if (row["architecture"], row["precision"], row["target"]) == (architecture, "fp16", "sm_90")
        and row["kernel"] in AGAIN[architecture]
    }
    assert set(kept) == set(AGAIN[architecture])
    asked = ("--target", "sm_90", "--precision", "fp16", "--architecture", architecture, "--json", "--kernel", *AGAIN[architecture])
    again = {row["kernel"]: row for row in record._lines("benchmarks.kernels.inspect", *asked)}
    for name, row in kept.items():
        assert {n: again[name][n] for n in MEASURED} == {n: row[n] for n in MEASURED}, name
