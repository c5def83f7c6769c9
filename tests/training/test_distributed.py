"""Data-parallel training with real processes (Gloo, CPU): the same run as one process with the whole batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import FP32_DEEP, FP32_ROUNDING
from training_runs import ARCH, config, records, same

from wslfast import Population, WslfastError, losses, train
from wslfast.engine.ranks import World
from wslfast.training.checkpoint import load_checkpoint

WORKER = """
    import json, os, signal, sys
    sys.path[:0] = json.loads(sys.argv[1])
    import torch
    from pathlib import Path
    from training_runs import ARCH, config
    from wslfast import Population, WslfastError, train
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    out, changes, resume, kill_at = json.loads(sys.argv[2])
    population = Population(ARCH, ARCH.initial_weights(["kaiming_normal"] * 20, range(20)))
    images = torch.randn(48, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    if kill_at and os.environ.get("RANK") == "1":
        from wslfast.training.trainer import Trainer
        step = Trainer.step
        def dying(self):
            if self.step_index == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(self)
        Trainer.step = dying
    try:
        train(config(Path(out), **changes), population=population, images=images, resume=resume)
    except WslfastError as error:
        print(f"wslfast: {error}", file=sys.stderr)
        raise SystemExit(2)
"""


def launch(tmp_path: Path, out: Path, *, processes: int, resume: bool = False, kill_at: int = 0, **changes: Any) -> Any:
    script = tmp_path / "worker.py"
    script.write_text(textwrap.dedent(WORKER))
    arguments = [str(script), json.dumps([*sys.path]), json.dumps([str(out), changes, resume, kill_at])]
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(run, capture_output=True, text=True, timeout=240, env=environment, check=False)


def alone(out: Path, **changes: Any) -> None:
    population = Population(ARCH, ARCH.initial_weights(["kaiming_normal"] * 20, range(20)))
    train(config(out, **changes), population=population, images=torch.randn(48, 1, 8, 8, generator=torch.Generator().manual_seed(5)))


def assert_close_runs(a: Path, b: Path, tolerance: float = 2e-4) -> None:
    """Same steps, same losses and same weights, up to the order of summation grown through twelve optimiser steps."""
    left, right = records(a), records(b)
    assert [r["step"] for r in left] == [r["step"] for r in right]
    for x, y in zip(left, right, strict=True):
        assert x.keys() == y.keys()
        assert x == pytest.approx(y, rel=tolerance, abs=FP32_ROUNDING)
    x, y = load_checkpoint(a), load_checkpoint(b)
    for name, value in x["model"].items():
        torch.testing.assert_close(value, y["model"][name], rtol=tolerance, atol=tolerance)
    assert same(x["sampler"], y["sampler"])
    assert same({k: v for k, v in x["rng"].items() if k != "torch"}, {k: v for k, v in y["rng"].items() if k != "torch"})


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{}, {"gamma": 0.0}, {"beta": 1.0, "start": "random"}, {"criterion": "cross_entropy", "memory_gb": 0.0}],
    ids=["default", "one-view", "structure-random", "targets-recomputed"],
)
def test_two_processes_are_one_with_the_whole_batch(tmp_path: Path, changes: dict[str, Any]) -> None:
    done = launch(tmp_path, tmp_path / "two", processes=2, **changes)
    assert done.returncode == 0, done.stderr
    alone(tmp_path / "one", **changes)
    assert_close_runs(tmp_path / "two", tmp_path / "one")
    assert sorted(os.listdir(tmp_path / "two")) == ["checkpoint", "config.toml", "log.jsonl"]


@pytest.mark.slow
def test_without_gathered_negatives_the_contrast_is_each_processes_own(tmp_path: Path) -> None:
    done = launch(tmp_path, tmp_path / "two", processes=2, gather_negatives=False)
    assert done.returncode == 0, done.stderr
    alone(tmp_path / "one")
    ours, whole = records(tmp_path / "two")[0], records(tmp_path / "one")[0]
    assert ours["structural"] == pytest.approx(whole["structural"], rel=FP32_DEEP)
    assert ours["contrastive"] < 0.95 * whole["contrastive"]  # fewer negatives, an easier task


@pytest.mark.slow
def test_a_killed_process_ends_the_run_and_any_number_goes_on(tmp_path: Path) -> None:
    """Rank 1 dies by SIGKILL after the checkpoint of step 8: the rest stops, and one process alone finishes the run."""
    died = launch(tmp_path, tmp_path / "broken", processes=2, kill_at=10)
    assert died.returncode != 0
    assert load_checkpoint(tmp_path / "broken")["step"] == 8
    alone(tmp_path / "whole")
    two = tmp_path / "broken-two"
    subprocess.run(["cp", "-r", str(tmp_path / "broken"), str(two)], check=True)
    population = Population(ARCH, ARCH.initial_weights(["kaiming_normal"] * 20, range(20)))
    images = torch.randn(48, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    train(config(tmp_path / "broken"), population=population, images=images, resume=True)
    assert_close_runs(tmp_path / "broken", tmp_path / "whole")
    again = launch(tmp_path, two, processes=2, resume=True)
    assert again.returncode == 0, again.stderr
    assert_close_runs(two, tmp_path / "whole")


@pytest.mark.slow
def test_dropout_resumes_exactly_on_the_same_number_of_processes(tmp_path: Path) -> None:
    assert launch(tmp_path, tmp_path / "whole", processes=2, dropout=0.2).returncode == 0
    assert launch(tmp_path, tmp_path / "broken", processes=2, dropout=0.2, kill_at=6).returncode != 0
    assert launch(tmp_path, tmp_path / "broken", processes=2, dropout=0.2, resume=True).returncode == 0
    assert_close_runs(tmp_path / "whole", tmp_path / "broken", 1e-6)


@pytest.mark.slow
def test_a_batch_that_cannot_be_shared_is_refused(tmp_path: Path) -> None:
    done = launch(tmp_path, tmp_path / "run", processes=2, batch_size=5)
    assert done.returncode != 0
    assert "batch_size: expected a multiple of the 2 processes, got 5" in done.stderr


def test_shares_are_equal_and_cover_the_batch() -> None:
    rows = torch.arange(12)
    assert torch.equal(torch.cat([rows[World(r, 4).share(12)] for r in range(4)]), rows)
    with pytest.raises(WslfastError, match="multiple of the 4 processes"):
        World(0, 4).share(10)


def test_a_gathered_contrast_has_the_whole_batchs_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two simulated ranks: their scaled gradients average to that of one process, without a process group."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(6, 5, dtype=torch.float64, generator=generator) for _ in range(2))
    mixing = torch.randn(5, 5, dtype=torch.float64, generator=generator, requires_grad=True)  # the shared parameter
    whole = losses.nt_xent(a @ mixing, b @ mixing)
    (expected,) = torch.autograd.grad(whole, mixing)
    gradients = []
    for rank in range(2):
        world = World(rank, 2)

        def fake(parts: list[torch.Tensor], part: torch.Tensor) -> None:
            everyone = a if torch.equal(part, (a @ mixing).detach()[world.share(6)]) else b  # noqa: B023
            for r, target in enumerate(parts):
                target.copy_((everyone @ mixing).detach()[World(r, 2).share(6)])

        monkeypatch.setattr(torch.distributed, "all_gather", fake)
        mine = world.share(6)
        value = world.summed(losses.nt_xent(world.gather(a[mine] @ mixing), world.gather(b[mine] @ mixing)))
        assert float(value) == pytest.approx(float(whole))
        gradients.append(torch.autograd.grad(value, mixing)[0])
    torch.testing.assert_close(torch.stack(gradients).mean(0), expected)
