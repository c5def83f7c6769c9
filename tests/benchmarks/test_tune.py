"""The sweep of ``benchmarks/tune.py`` on one tiny network in Triton's interpreter: the hook, the rows, and what is refused."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from kernel_cases import MLP, SMALL

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("needs TRITON_INTERPRET=1 when triton is first imported", allow_module_level=True)

from benchmarks import tune
from wslfast.kernels.triton import configurations as module
from wslfast.kernels.triton import launch
from wslfast.kernels.triton.schedule import schedule


def _job() -> tune.Job:
    return tune.Job("mlp", MLP.layers, MLP.shape, "fp16", 2, 2, "cpu")


def test_a_sweep_of_one_case() -> None:
    def broken(c: module.Configuration) -> module.Configuration:
        return replace(c, BM=3)  # no power of two: does not compile

    levers = (
        tune.Lever("rows 32", ("forward",), lambda c: replace(c, BM=32)),
        tune.Lever("split rows 1", ("dw",), lambda c: c, 1),
        tune.Lever("broken", ("dx",), broken),
    )
    emitted: list[tune.Row] = []
    rows = tune.sweep(_job(), levers, "cpu", emitted.append, 1, time.monotonic() + 600)
    assert rows == emitted
    kernels = {row.kernel for row in rows if row.part == "kernel" and row.lever == "default"}
    assert kernels == {"forward 0", "forward 1", "dw 0", "dw 1", "dx 1"}
    assert {row.kernel for row in rows if row.lever == "rows 32" and row.part == "kernel"} == {"forward 0", "forward 1"}
    assert all(row.keep == "no" and row.note for row in rows if row.lever == "broken")
    steps = {row.lever: row for row in rows if row.part == "step"}
    assert {"default", "rows 32", "split rows 1", "broken"} <= set(steps)
    assert steps["rows 32"].error is not None
    assert steps["rows 32"].error < tune.AGREES
    assert steps["split rows 1"].error is not None
    assert steps["split rows 1"].error < tune.AGREES


def test_a_kernel_that_is_fast_and_wrong_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    right, output = launch.stage_forward, 4  # its argument

    def wrong(*arguments: Any, **options: Any) -> None:
        right(*arguments, **options)
        if next(a for a in arguments if isinstance(a, module.Configuration)).BM == 32:
            arguments[output].zero_()

    times = iter([1.0, 0.5, 1.0, 0.5])  # two kernels, the default and the lever of each
    monkeypatch.setattr(launch, "stage_forward", wrong)
    monkeypatch.setattr(tune, "milliseconds", lambda *_: next(times, 1.0))
    levers = (tune.Lever("rows 32", ("forward",), lambda c: replace(c, BM=32)),)
    rows = list(tune.kernel_rows(_job(), levers, "cpu", tune.Row("", "mlp", "fp16", 2, 2, "", ""), 1, time.monotonic() + 600))
    tried = [row for row in rows if row.lever == "rows 32"]
    assert [(row.kernel, row.ms, row.keep, row.note) for row in tried] == [
        (f"forward {i}", 0.5, "no", "its result differs") for i in range(2)
    ]


def test_the_hook_changes_launches_inside_it_alone() -> None:
    stage = schedule(SMALL.layers, SMALL.shape).stages[1]
    before = module.configuration("dw", stage, "fp16"), module.splits(stage, 64)
    lever = tune.Lever("both", ("dw",), lambda c: replace(c, BM=16, REGISTERS=128), 64)
    with module.tuned(lever.tuning()):
        assert module.configuration("dw", stage, "fp16").BM == 16
        assert module.configuration("dx", stage, "fp16").BM == 64
        assert module.splits(stage, 128) == 2
    assert (module.configuration("dw", stage, "fp16"), module.splits(stage, 64)) == before
    assert module.launch_options(4, 128)["maxnreg"] == 128
    assert "maxnreg" not in module.launch_options()


def test_a_wrong_default_is_not_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    job = _job()
    monkeypatch.setattr(tune, "check", lambda job: float("nan"))
    (row,) = tune.sweep(job, tune.LEVERS, "cpu", lambda row: None, 1, time.monotonic() + 600)
    assert "nothing was tuned" in row.note


def test_every_lever_changes_a_default() -> None:
    stage = schedule(SMALL.layers, SMALL.shape).stages[1]
    for lever in tune.LEVERS:
        changed = any(lever.change(c) != c for role in lever.roles for c in [module.configuration(role, stage, "tf32")])
        assert changed or lever.joint or lever.split_rows not in (0, module.SPLIT_ROWS), lever.name


def test_without_a_gpu_nothing_is_run(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert tune.main([]) == 0
    assert "no CUDA device" in capsys.readouterr().out
