"""The kernels' loss recorded once and replayed, on a stand-in for CUDA graphs (support/graph_stub.py) and with torch for kernels: whose
memory is whose, which calls are replayed, what happens where recording fails. Whether a GPU records the kernels is for tests/gpu."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import graph_stub
import pytest
import torch
from graph_stub import CUDAGraph
from torch import Tensor
from training_runs import ARCH, config, same

from benchmarks import training_step
from benchmarks.recording import Row
from wslfast import Population, TrainConfig, WslfastError, batched_behavioral_loss, engine, errors
from wslfast.engine import cuda_graph, triton_path
from wslfast.engine.cuda_graph import Recorder, recording
from wslfast.engine.paths import Loop
from wslfast.engine.triton_path import Triton, Unbuildable
from wslfast.training.mixed import MixedTrainer
from wslfast.training.trainer import Trainer, check_resumed


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """As on a GPU whose kernels are proved; torch computes what they would."""
    monkeypatch.setattr(Triton, "loss_and_gradient", lambda self, *call: Loop(self.architecture, "").loss_and_gradient(*call))
    monkeypatch.setattr(Triton, "forward", lambda self, *call: Loop(self.architecture, "").forward(*call))
    monkeypatch.setattr(Triton, "constants", lambda self, n, device: ("held",))
    monkeypatch.setattr(engine, "choose", lambda architecture, *more: Triton(architecture, "a test"))
    monkeypatch.setattr(errors, "_said", set())
    monkeypatch.setattr(triton_path, "unbuildable", {})
    return graph_stub.install(monkeypatch)


def _arguments(seed: int, k: int = 3, n: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(k, ARCH.num_weights, generator=generator)
    return weights, torch.randn(n, 1, 8, 8, generator=generator), torch.randn(k, n, 3, generator=generator)


def _call(arguments: tuple[Tensor, Tensor, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    return engine.loss_and_gradient(*arguments, ARCH, options.pop("criterion", "mse"), **options)


def test_replays_are_the_calls_to_the_bit(gpu: list[Any]) -> None:
    calls = [_arguments(seed) for seed in range(4)]
    calls[2][0][1] = float("nan")
    expected = [_call(arguments) for arguments in calls]
    recorder = Recorder()
    with recording(recorder):
        found = [_call(arguments) for arguments in calls]
    for (losses, gradient), (loss, slope) in zip(found, expected, strict=True):  # all of them, after the last replay
        assert torch.equal(losses.nan_to_num(7.0), loss.nan_to_num(7.0))
        assert torch.equal(gradient.nan_to_num(7.0), slope.nan_to_num(7.0))
    assert not found[2][0].isfinite()[1]
    assert (CUDAGraph.made, CUDAGraph.replays, recorder.recorded) == (1, 4, 1)  # one to check, three calls


def test_results_are_the_callers_own(gpu: list[Any]) -> None:
    with recording(Recorder()):
        _call(_arguments(0))
        losses, gradient = _call(_arguments(1))
        losses.zero_()
        gradient.mul_(0)
        again = _call(_arguments(1))
    expected = _call(_arguments(1))
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


def test_arguments_are_copied(gpu: list[Any]) -> None:
    """The first call's tensors may change or go afterwards."""
    first = _arguments(0)
    with recording(Recorder()):
        _call(first)
        for tensor in first:
            tensor.fill_(float("nan"))
        found = _call(_arguments(1))
    assert all(torch.equal(a, b) for a, b in zip(found, _call(_arguments(1)), strict=True))


def test_another_size_or_setting_is_another_recording(gpu: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder()
    sizes: list[dict[str, Any]] = [{}, {"criterion": "huber"}, {"criterion": "distillation", "temperature": 3.0}]
    with recording(recorder):
        for options in sizes * 2:
            _call(_arguments(0), **options)
        _call(_arguments(0, k=2))
        assert recorder.recorded == cuda_graph.MOST == CUDAGraph.made
        found = _call(_arguments(0, n=4))
    assert all(torch.equal(a, b) for a, b in zip(found, _call(_arguments(0, n=4)), strict=True))
    assert CUDAGraph.made == 4
    assert "more than 4 sizes" in caplog.text


def test_what_is_not_recorded_is_run(gpu: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "wslfast")
    recorder, (weights, pool, targets) = Recorder(), _arguments(0)
    with recording(recorder):
        engine.loss_and_gradient(weights, pool, targets, ARCH, "mse", index=torch.randint(5, (3, 5)))
        engine.loss_and_gradient(weights, pool, targets, ARCH, lambda a, b: (a - b).square().sum((1, 2)))
        monkeypatch.setattr(engine, "choose", lambda architecture, *more: Loop(architecture, ""))
        _call(_arguments(0))
    assert CUDAGraph.made == 0
    assert "nothing is recorded where torch runs the networks" in caplog.text
    assert cuda_graph.recorder() is None


def _fails_when_recorded(monkeypatch: pytest.MonkeyPatch, how: Any) -> None:
    """The call of the kernels ends in ``how`` while it is recorded, the second time that it is made."""
    calls: list[None] = []

    def run(self: Triton, *call: Any) -> tuple[Tensor, Tensor]:
        calls.append(None)
        results = Loop(self.architecture, "").loss_and_gradient(*call)
        if len(calls) == 2:
            how(results)
        return results

    monkeypatch.setattr(Triton, "loss_and_gradient", run)


def test_a_call_that_cannot_be_recorded_is_run(gpu: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fail(_: Any) -> None:
        triton_path.unbuildable[ARCH] = "as there was a recording"
        raise Unbuildable

    expected = [_call(_arguments(seed)) for seed in range(3)]
    _fails_when_recorded(monkeypatch, fail)
    recorder = Recorder()
    with recording(recorder):
        found = [_call(_arguments(seed)) for seed in range(3)]
    assert all(torch.equal(a, b) for got, want in zip(found, expected, strict=True) for a, b in zip(got, want, strict=True))
    assert (CUDAGraph.made, CUDAGraph.replays, recorder.recorded) == (1, 0, 0)
    assert caplog.text.count("cannot be recorded") == 1
    assert ARCH not in triton_path.unbuildable


def test_a_recording_that_cuda_breaks_off_is_an_error(gpu: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """torch does not tell its allocator of that: a run had better start again."""
    _fails_when_recorded(monkeypatch, lambda results: results[0].sum().item())
    with recording(Recorder()), pytest.raises(WslfastError, match=r"cuda_graph: CUDA broke the recording.*not permitted.*--resume"):
        _call(_arguments(0))
    assert len(gpu) == 1  # the stream that was current is so again


def test_a_replay_with_other_numbers_is_not_used(gpu: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    CUDAGraph.forgets = 1
    recorder = Recorder()
    with recording(recorder):
        found = [_call(_arguments(seed)) for seed in range(3)]
    for seed, results in enumerate(found):
        assert all(torch.equal(a, b) for a, b in zip(results, _call(_arguments(seed)), strict=True))
    assert recorder.recorded == 0
    assert "a replay gave other numbers" in caplog.text


def test_kernels_that_cannot_be_built_are_left_to_the_engine(gpu: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def unbuildable(self: Triton, *call: Any) -> tuple[Tensor, Tensor]:
        monkeypatch.setattr(engine, "choose", lambda architecture, *more: Loop(architecture, ""))
        raise Unbuildable

    monkeypatch.setattr(Triton, "loss_and_gradient", unbuildable)
    with recording(Recorder()):
        found = _call(_arguments(0))
    assert torch.equal(found[0], _call(_arguments(0))[0])
    assert CUDAGraph.made == 0


def test_the_loss_has_its_gradient_from_a_replay(gpu: list[Any]) -> None:
    def gradient(seed: int) -> Tensor:
        weights, queries, targets = _arguments(seed)
        weights.requires_grad_()
        batched_behavioral_loss(weights, None, queries, ARCH, targets=targets).backward()
        assert weights.grad is not None
        return weights.grad

    expected = [gradient(seed) for seed in range(3)]
    with recording(Recorder()):
        assert all(torch.equal(gradient(seed), expected[seed]) for seed in range(3))
    assert CUDAGraph.replays == 3


def test_caches_may_forget_what_a_recording_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    from wslfast.kernels.triton import tables
    from wslfast.kernels.triton.schedule import schedule

    cpu = torch.device("cpu")
    held = Triton(ARCH, "").constants(5, cpu)
    planned = schedule(ARCH.layers, ARCH.input_shape)
    read = (tables.pack_table(planned, cpu), tables.fold_tables(planned, 5, cpu), tables.whole_tables(planned, cpu))
    assert all(any(one is other for other in held) for one in read)


# -- the trainer -------------------------------------------------------------------------------------------------------


def _trained(tmp_path: Path, steps: int = 5, **changes: Any) -> tuple[Trainer, dict[str, Any]]:
    """A trainer's state after some steps, on the CPU and as if that were a GPU."""
    population = Population(ARCH, ARCH.initial_weights(["kaiming_normal"] * 20, range(20)))
    images = torch.randn(48, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    torch.manual_seed(0)
    trainer = Trainer(config(tmp_path, device="cuda", **changes), population, images, device=torch.device("cpu"))
    parts = [trainer.step() for _ in range(steps)]
    state = trainer.state()
    state["config"].pop("cuda_graph")
    return trainer, {"parts": [{n: v.detach() for n, v in part.items()} for part in parts], **state}


@pytest.mark.parametrize(
    "changes", [{}, {"behavior_from": 0.25, "gamma": 0.0}, {"criterion": "distillation"}], ids=["", "later", "criterion"]
)
def test_a_run_is_the_same_with_replayed_calls(gpu: list[Any], tmp_path: Path, changes: dict[str, Any]) -> None:
    _, plain = _trained(tmp_path, **changes)
    assert CUDAGraph.made == 0
    trainer, replayed = _trained(tmp_path, cuda_graph=True, **changes)
    steps = 5 - trainer.config.behavior_start
    assert (CUDAGraph.made, CUDAGraph.replays) == (1, steps)
    assert same(plain, replayed)
    trainer.release()
    assert trainer.recorder is None


def test_the_benchmark_times_both_in_turns(gpu: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step after the other, each with its own time; where nothing was recorded, a row says so."""
    order: list[bool] = []

    def timed(step: Any, repeats: int) -> list[float]:
        order.append(step.__self__.recorder is not None)
        step()
        return [5.0 - 2 * order[-1]] * repeats

    monkeypatch.setattr(training_step, "synchronised_ms", timed)
    plain, graphed = (_trained(tmp_path, 0, cuda_graph=graph)[0] for graph in (False, True))
    row = Row("wslfast", "tiny", 12, 8, "step", "tf32", "wall_ms")
    rows = training_step.beside_a_graph(plain, graphed, row, "small", 2)
    assert [(r.variant, r.value) for r in rows] == [(training_step.WHOLE, 5.0), (training_step.GRAPHED, 3.0)]
    assert order == [False, True] * 2
    monkeypatch.setattr(engine, "choose", lambda architecture, *more: Loop(architecture, ""))
    rows = training_step.beside_a_graph(plain, _trained(tmp_path, 0, cuda_graph=True)[0], row, "small", 2)
    assert [(r.variant, r.value) for r in rows] == [(training_step.WHOLE, 5.0), (training_step.GRAPHED, None)]
    assert "not run: nothing was recorded" in rows[1].details


def test_what_has_no_gpu_has_no_graphs(tmp_path: Path) -> None:
    with pytest.raises(WslfastError, match=r"^cuda_graph: expected device cuda, got 'cpu', which has no CUDA graphs$"):
        config(tmp_path, cuda_graph=True)
    assert config(tmp_path, cuda_graph=True, device="cuda:1").cuda_graph
    assert not TrainConfig.paper(zoo="z", out="o").cuda_graph


def test_a_run_goes_on_with_or_without(tmp_path: Path) -> None:
    before, after = config(tmp_path, device="cuda"), config(tmp_path, device="cuda", cuda_graph=True)
    check_resumed(after, {"config": before.to_dict()})
    check_resumed(before, {"config": after.to_dict()})


def test_a_trainer_of_several_architectures_lets_go_of_all(tmp_path: Path) -> None:
    trainer, _ = _trained(tmp_path, steps=0, cuda_graph=True)
    made = MixedTrainer.__new__(MixedTrainer)
    made.parts = {"a": trainer}
    made.release()
    assert trainer.recorder is None
