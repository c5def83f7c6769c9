"""Models, units and cells dealt out to the processes that torchrun started: what two of them make is what one makes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tolerances import FP32, FP32_DEEP, FP32_ROUNDING

from wslfast import TrainConfig, WslfastError, build_zoo, evaluate, load_zoo, train
from wslfast.engine.ranks import ALONE, World, apart, joined
from wslfast.measure.results import read_results
from wslfast.queries import QueryPool, TargetCache
from wslfast.study.ablation_file import Ablation
from wslfast.study.ablations import run_ablation
from wslfast.study.loaded_zoo import Protocol
from wslfast.study.study import study
from wslfast.training.trainer import Trainer
from wslfast.zoo import read_manifest

SIZES: dict[str, Any] = {"queries": 8, "batch_size": 4, "d_model": 16, "heads": 2, "layers": 1, "steps": 4, "log_every": 2, "gamma": 0.0}
FEW = {
    "shares": (),
    "models": 6,
    "train_models": 20,
    "images": 20,
    "samples": 4,
    "bandwidths": (0.1,),
    "finetune_epochs": 0,
    "map_models": 12,
}
ABLATION = Ablation(
    "beta", "unused", {f"beta-{b}": {"beta": b, **SIZES} for b in (0.1, 0.5, 1.0)} | {"again": {"beta": 0.1, **SIZES}}, "beta", (0,)
)
ZOO: dict[str, Any] = {"models": 7, "epochs": 2, "split": (0.5, 0.2, 0.3)}


def images(root: Path) -> Path:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 90)
    stripes = np.stack([np.sin(np.outer(np.ones(28), np.arange(28)) * (c + 1) / 2) for c in range(3)])
    np.savez(root / "stripes.npz", images=(stripes[labels] + 0.5 * rng.normal(size=(90, 28, 28))).astype(np.float32), labels=labels)
    return root / "stripes.npz"


def every_job(root: Path, out: Path) -> None:
    """All that is dealt out, one after another, as a script of one's own would; what is returned goes to a file a process."""
    population = build_zoo(root / "stripes.npz", out / "zoo", **ZOO)
    config = TrainConfig(zoo=str(root / "zoo"), out=str(root / "run"), **SIZES)
    with joined("cpu") as (world, _):
        trainer = Trainer(
            config, load_zoo(root / "zoo", "train"), torch.randn(30, 1, 28, 28, generator=torch.Generator().manual_seed(1)), world=world
        )
        cache = trainer.cache.outputs
    figures = evaluate(root / "run", out=out / "figures.json")
    rows = run_ablation(ABLATION, out / "ablation", zoo=root / "zoo")
    study(root / "zoo", [root / "run"], out / "page", protocol=Protocol(**FEW))
    kept = {
        "weights": population.weights,
        "split": list(population.properties["split"]),
        "cache": cache,
        "figures": json.dumps(figures),
        "rows": json.dumps(rows),
    }
    torch.save(kept, out / f"returned-{world.rank}.pt")


# Every process has one thread, also the one that is alone: which work is put together, and so the last bits, follow the threads.
WORKER = """
    import json, os, signal, sys, time
    sys.path[:0] = json.loads(sys.argv[1])
    import torch
    from pathlib import Path
    torch.set_num_threads(1)
    job, dies = sys.argv[2], int(sys.argv[3])
    root, out = Path(sys.argv[4]), Path(sys.argv[5])
    if dies and os.environ["RANK"] == "1":
        from wslfast import engine
        from wslfast.training.trainer import Trainer
        def dying(function):
            def counted(*arguments, **settings):
                global dies
                dies -= 1
                if dies == 0:
                    while job == "build" and not list((out / "zoo" / ".parts").glob("*.pt")):
                        time.sleep(0.05)  # torchrun ends the other process too, which keeps its part first
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **settings)
            return counted
        if job == "build":
            engine.loss_and_gradient = dying(engine.loss_and_gradient)
        Trainer.step = dying(Trainer.step)
    import test_ranks
    from wslfast import WslfastError
    try:
        if job == "every":
            test_ranks.every_job(root, out)
        elif job == "build":
            test_ranks.build_zoo(root / "stripes.npz", out / "zoo", **test_ranks.ZOO)
        else:
            test_ranks.run_ablation(test_ranks.ABLATION, out / "ablation", zoo=root / "zoo")
    except WslfastError as error:
        print(f"wslfast: {error}", file=sys.stderr)
        raise SystemExit(2)
"""


def launch(job: str, root: Path, out: Path, dies: int = 0, processes: int = 2) -> Any:
    """A job by so many processes of one thread each; one alone is started without torchrun."""
    out.mkdir(exist_ok=True)
    script = out / "worker.py"
    script.write_text(textwrap.dedent(WORKER))
    paths = json.dumps([str(Path(__file__).parent), *sys.path])
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    run = [sys.executable, *torchrun, str(script), paths, job, str(dies), str(root), str(out)]
    return subprocess.run(run, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A zoo, a run on it, and in ``alone`` what one process makes of every job."""
    root = tmp_path_factory.mktemp("ranks")
    images(root)
    build_zoo(root / "stripes.npz", root / "zoo", models=10, epochs=2, split=(0.6, 0.2, 0.2))
    train(TrainConfig(zoo=str(root / "zoo"), out=str(root / "run"), **SIZES))
    return root


@pytest.fixture(scope="module")
def alone(root: Path) -> Path:
    done = launch("every", root, root / "alone", processes=1)
    assert done.returncode == 0, done.stderr[-3000:]
    return root / "alone"


def without_clocks(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["metric"] not in ("seconds", "coding_seconds")]


def assert_one_zoo(ours: Path, theirs: Path) -> None:
    """The same files, in which no part is left, with the same networks up to the last digits."""
    assert sorted(path.name for path in ours.iterdir()) == sorted(path.name for path in theirs.iterdir())
    one, other = (load_zoo(folder) for folder in (ours, theirs))
    torch.testing.assert_close(one.weights, other.weights, rtol=FP32_DEEP, atol=FP32)
    assert one.properties.keys() == other.properties.keys()
    for name, values in one.properties.items():
        assert close(list(map(as_number, values)), list(map(as_number, other.properties[name]))), name


def as_number(value: Any) -> Any:
    return value.item() if isinstance(value, (torch.Tensor, np.generic)) else value


@pytest.mark.slow
def test_two_processes_make_what_one_makes(root: Path, alone: Path, tmp_path: Path) -> None:
    done = launch("every", root, tmp_path / "two")
    assert done.returncode == 0, done.stderr[-3000:]
    two = tmp_path / "two"
    assert_one_zoo(two / "zoo", alone / "zoo")
    one = torch.load(alone / "returned-0.pt")
    for rank in (0, 1):
        found = torch.load(two / f"returned-{rank}.pt")
        torch.testing.assert_close(found["weights"], one["weights"], rtol=FP32_DEEP, atol=FP32)
        assert found["split"] == one["split"]
        torch.testing.assert_close(found["cache"], one["cache"], rtol=FP32_ROUNDING, atol=FP32_ROUNDING)
        assert close(json.loads(found["figures"]), json.loads(one["figures"]))
        assert close(without_clocks(json.loads(found["rows"])), without_clocks(json.loads(one["rows"])))
    assert close(json.loads((two / "figures.json").read_text())["variants"], json.loads(one["figures"]))
    ours, theirs = read_results(two / "page"), read_results(alone / "page")
    assert close(ours.rows, theirs.rows)
    assert (two / "page" / "report.html").is_file()
    assert (two / "ablation" / "ablations.csv").is_file()
    assert len(list((two / "ablation" / "cells").iterdir())) == 3  # two variants of one setting are one cell


def close(a: Any, b: Any) -> bool:
    """Equal up to the last digits of floats."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(close, a, b))
    if isinstance(a, float) and isinstance(b, (int, float)):
        return a == pytest.approx(b, rel=2 * FP32_DEEP, abs=2 * FP32)
    return a == b


@pytest.mark.slow
def test_a_build_whose_process_was_killed_goes_on_with_what_is_done(root: Path, alone: Path, tmp_path: Path) -> None:
    died = launch("build", root, tmp_path, dies=3)
    assert died.returncode != 0
    assert not (tmp_path / "zoo" / "manifest.json").exists()
    (part,) = (tmp_path / "zoo" / ".parts").glob("*.pt")  # of the process that lived
    written = part.stat().st_mtime_ns
    again = launch("build", root, tmp_path, dies=3)  # dies at the same place: what was kept is kept
    assert again.returncode != 0
    assert part.stat().st_mtime_ns == written
    done = launch("build", root, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_one_zoo(tmp_path / "zoo", alone / "zoo")


@pytest.mark.slow
def test_an_ablation_whose_process_was_killed_goes_on(root: Path, alone: Path, tmp_path: Path) -> None:
    died = launch("ablate", root, tmp_path, dies=2)
    assert died.returncode != 0
    done = launch("ablate", root, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    ours, theirs = (read_results(folder / "ablation").tables["ablations"] for folder in (tmp_path, alone))
    assert close(without_clocks(ours), without_clocks(theirs))


@pytest.mark.parametrize(("count", "size"), [(7, 2), (7, 3), (3, 3), (12, 4), (2, 4)])
def test_spans_cover_all_in_order_and_differ_by_one_at_most(count: int, size: int) -> None:
    spans = [World(rank, size).span(count) for rank in range(size)]
    assert [i for span in spans for i in span] == list(range(count))
    assert max(map(len, spans)) - min(map(len, spans)) <= 1
    dealt = [World(rank, size).dealt(list(range(count))) for rank in range(size)]
    assert sorted(i for own in dealt for i in own) == list(range(count))
    assert all(World(rank, size).mine(i) for rank in range(size) for i in dealt[rank])


@pytest.mark.parametrize(("count", "size"), [(7, 2), (7, 3), (8, 4)])
def test_rows_of_unequal_parts_come_together(count: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(count, 3, 2)

    def fake(parts: list[torch.Tensor], part: torch.Tensor) -> None:
        for rank, target in enumerate(parts):
            own = rows[World(rank, size).span(count).start : World(rank, size).span(count).stop]
            target.zero_()[: len(own)] = own

    monkeypatch.setattr(torch.distributed, "all_gather", fake)
    for rank in range(size):
        span = World(rank, size).span(count)
        assert torch.equal(World(rank, size).rows(rows[span.start : span.stop], count), rows)


def test_a_share_of_a_cache_is_that_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from wslfast import Architecture, Population

    arch = Architecture.mlp(6, (5,), 3)
    population, pool = Population(arch, arch.initial_weights(["normal"] * 5, range(5))), QueryPool(torch.randn(4, 6))
    whole = TargetCache(population, pool).outputs
    monkeypatch.setattr(World, "rows", lambda self, part, count: part)
    for rank in range(2):
        world = World(rank, 2)
        span = world.span(5)
        cache = TargetCache.of_blocks(arch, lambda rows: [population.weights[rows.start : rows.stop]], 5, pool, world=world)
        torch.testing.assert_close(cache.outputs, whole[span.start : span.stop])
        assert cache.computed == 20


def test_a_job_that_was_dealt_out_is_done_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    with apart(), joined("cpu") as (world, device):
        assert world == ALONE
        assert device.type == "cpu"
    with pytest.raises(WslfastError, match=r"expected cuda .one GPU a process. or cpu under torchrun|does not have it"), joined("cuda:1"):
        pass


def test_a_zoo_of_one_process_keeps_no_parts(root: Path) -> None:
    assert not (root / "zoo" / ".parts").exists()
    assert read_manifest(root / "zoo").rows > 0


def test_a_process_that_does_not_see_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a batch system leaves it that gives every process a GPU of its own."""
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(WslfastError, match=r"process 1 of this node takes GPU 1, and sees 1; .*CUDA_VISIBLE_DEVICES"), joined("cuda"):
        pass
