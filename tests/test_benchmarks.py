"""The benchmark suite's own promises: providers agree before they are timed, rows have the header everyone reads."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import bench_loss, providers, recording, zoo_building  # noqa: E402 (a checkout's folder, not an installed package)


@pytest.mark.parametrize("cached", [False, True], ids=["recomputed", "cached"])
@pytest.mark.parametrize("net", providers.ARCHITECTURES)
@pytest.mark.parametrize("name", providers.PROVIDERS)
def test_providers_compute_the_same(name: str, net: str, cached: bool) -> None:
    architecture = providers.ARCHITECTURES[net]()
    case = next(providers.cases(architecture, 2, 5))
    assert providers.relative_error(name, (*case, architecture), cached) <= bench_loss.BOUND


def test_the_published_layout_is_one_token_a_channel() -> None:
    architecture = providers.ARCHITECTURES["cnn3"]()
    weights = providers.models(architecture, 2, 0)
    tokens = providers.to_tokens(weights, architecture)
    assert tokens.shape == (2, 93, 289)
    assert torch.equal(torch.stack([providers._from_tokens(t, architecture) for t in tokens]), weights)


def test_both_ways_of_building_a_zoo_train_the_same_models() -> None:
    architecture = providers.ARCHITECTURES["cnn"]()
    weights = providers.models(architecture, 3, 0)
    images, labels = torch.randn(40, 1, 28, 28), torch.randint(10, (40,))
    order = torch.randint(40, (3, 2, 8))
    one = zoo_building.one_after_another(architecture, weights, images, labels, order)
    torch.testing.assert_close(zoo_building.together(architecture, weights, images, labels, order), one, rtol=1e-3, atol=1e-4)


def test_rows(tmp_path: Path) -> None:
    errors = bench_loss.gate("cnn", ["loop", "wslfast"])
    rows = bench_loss.measure("cnn", 2, 4, ["loop", "wslfast"], {**errors, "loop": 1.0}, rounds=2, budget_s=1.0)
    assert [r.note for r in rows if r.provider == "loop"] == ["gate: not timed"]
    assert {r.direction for r in rows if r.provider == "wslfast"} == {bench_loss.CACHED, bench_loss.RECOMPUTED}
    recording.write_rows(rows, tmp_path / "rows.csv")
    assert (tmp_path / "rows.csv").read_text().count("\n") == len(rows) + 1
    assert len(recording.table(rows).splitlines()) == len(rows) + 1


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "data").glob("*.csv")), ids=lambda p: p.name)
def test_tracked_rows_have_the_header(path: Path) -> None:
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == recording.HEADER
    assert all(len(row) == len(recording.HEADER) for row in rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="would run the GPU gate")
def test_the_gpu_gate_without_a_gpu_says_so(tmp_path: Path) -> None:
    environment = {"PYTHONPATH": str(ROOT), "OUT": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "benchmarks/gpu_gate.py"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert done.stdout.count("\n") == 1
    assert not list(tmp_path.iterdir())
