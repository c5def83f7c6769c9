"""Kernels prove themselves where they run: with stand-ins that are right, wrong, slow, crash, hang or cannot be reached, and with Triton's
interpreter. No GPU is needed; what a GPU says is not claimed."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import stub_trial
import torch

import wslfast
from wslfast import Architecture, WslfastError, engine, errors, proof
from wslfast.engine import trial, triton_path, verdicts
from wslfast.engine.verdicts import FAILED, RIGHT, UNKNOWN, WRONG, Decision, Machine, Speed, Verdict
from wslfast.kernels.layers import Activation, Conv2d, Flatten, Linear, Pool2d

ARCH = Architecture.from_layers(
    [Conv2d("a", 1, 3, (3, 3)), Pool2d("b"), Activation("c", "tanh"), Flatten("d"), Linear("e", 12, 3)], (1, 6, 6), "tiny"
)
FLAT = Architecture.from_layers([Linear("a", 5, 3), Activation("b"), Linear("c", 3, 3)], (5,), "flat")
MACHINE = Machine("Test GPU", "9.0", "1", "2", "3", "sources")
HERE = Path(__file__).parent
COMMAND, INTERPRETED = proof.COMMAND, verdicts.interpreted
GPU = torch.device("cuda", 0)


def _command(mode: str) -> list[str]:
    return [sys.executable, str(HERE / "support" / "stub_trial.py"), mode]


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As on a machine with a GPU that the kernels are for; the verdicts' folder."""
    monkeypatch.setenv("WSLFAST_CACHE", str(tmp_path))
    monkeypatch.delenv("WSLFAST_KERNELS", raising=False)
    monkeypatch.setattr(verdicts, "interpreted", lambda: False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(HERE.parent))
    monkeypatch.setattr(verdicts, "machine", lru_cache(lambda index=None: MACHINE))
    monkeypatch.setattr(verdicts, "_known", {})
    monkeypatch.setattr(triton_path, "unbuildable", {})
    monkeypatch.setattr(errors, "_said", set())
    monkeypatch.setattr(proof, "COMMAND", _command("right"))
    return tmp_path / "kernels"


@pytest.fixture
def own_command(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial's own command in place of the stand-in's."""
    monkeypatch.setattr(proof, "COMMAND", COMMAND)


def _new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdicts, "_known", {})


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Verdict]]:
    """Verdicts of a trial in this process, for what does not end one."""

    def run(mode: str, forms: tuple[str, ...] = verdicts.FORMS) -> dict[str, Verdict]:
        stub_trial.install(mode, monkeypatch.setattr)
        monkeypatch.setattr(triton_path, "unbuildable", {})
        device = "cuda:99" if mode == "busy" else "cpu"
        job = {"architecture": ARCH.to_dict(), "device": device, "precision": "tf32", "forms": list(forms), "sizes": [[4, 6]]}
        found: dict[str, Verdict] = {}
        said = json.loads(json.dumps(_run(job)))
        for finding in said:
            if "verdict" in finding:
                found[finding["form"]] = verdicts.from_dict(finding["verdict"])
        return found

    return run


def _run(job: dict[str, Any]) -> list[dict[str, Any]]:
    said: list[dict[str, Any]] = []
    trial.run(job, said.append)
    return said


def _prove(mode: str, forms: tuple[str, ...] = verdicts.FORMS, limit_s: float = 60.0, **more: Any) -> dict[str, Verdict]:
    return proof.prove(ARCH, forms, "tf32", [(4, 6)], GPU, limit_s=limit_s, command=_command(mode), **more)


# -- the trial ---------------------------------------------------------------------------------------------------------


def test_right_and_faster(tried: Callable[..., dict[str, Verdict]]) -> None:
    found = tried("right")
    assert list(found) == list(verdicts.FORMS)
    for form, verdict in found.items():
        assert verdict.status == RIGHT, (form, verdict)
        assert verdict.speeds == (Speed(4, 6, 10_000.0, 2_000.0, "pipelined"),)  # the best of three configurations
        assert all(0 <= e < 1 for e in verdict.errors.values())
    assert {"outputs", "sum a.weight", "sum e.bias"} <= set(found["forward"].errors)
    criteria = {"mse", "softmax_mse", "cross_entropy", "distillation", "labels"}
    assert {f"{name} loss" for name in criteria} <= set(found["loss"].errors)
    assert {"mse loss", "labels loss", "labels a.weight"} <= set(found["indexed"].errors)


@pytest.mark.parametrize(
    ("mode", "status", "words"),
    [
        ("wrong", WRONG, "times the error that tf32 excuses"),
        ("noisy", WRONG, "two runs differ"),
        ("bad neighbour", WRONG, "not finite for models whose weights are"),
        ("hides NaN", WRONG, "a model whose weights are NaN got numbers"),
        ("unwritten", WRONG, "not finite"),
        ("unbuildable", FAILED, "they cannot be built here: no such luck"),
        ("raises", FAILED, "illegal memory access"),
        ("memory", UNKNOWN, "out of memory"),
        ("busy", UNKNOWN, "no second process gets onto the GPU: CUDA error: CUDA-capable device(s) is/are busy"),
    ],
)
def test_what_is_wrong_is_found(tried: Callable[..., dict[str, Verdict]], mode: str, status: str, words: str) -> None:
    (verdict,) = tried(mode, ("loss",)).values()
    assert verdict.status == status, verdict
    assert words in verdict.reason
    assert "\n" not in verdict.reason
    assert not verdicts.judge(verdict, 4, 6).on


def test_slow_is_right_and_off(tried: Callable[..., dict[str, Verdict]]) -> None:
    (verdict,) = tried("slow", ("loss",)).values()
    assert verdict.status == RIGHT
    decision = verdicts.judge(verdict, 4, 6)
    assert (decision.on, decision.proved) == (False, True)
    assert "right but not faster" in decision.reason


@pytest.mark.parametrize(("error", "status"), [(MemoryError(), UNKNOWN), (ValueError(), FAILED)], ids=["memory", "other"])
def test_an_error_without_a_message_is_a_verdict(monkeypatch: pytest.MonkeyPatch, error: Exception, status: str) -> None:
    def fail(self: trial.Trial, choice: str) -> dict[str, float]:
        raise error

    said: list[dict[str, Any]] = []
    monkeypatch.setattr(trial.Trial, "errors", fail)
    trial.run({"device": "cpu", "architecture": ARCH.to_dict(), "forms": ["loss"], "precision": "tf32", "sizes": []}, said.append)
    (verdict,) = [finding["verdict"] for finding in said if "verdict" in finding]
    assert verdict["status"] == status
    assert type(error).__name__ in verdict["reason"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "words"),
    [("crash@loss", "its process died (SIGSEGV)"), ("exit@loss", "its process died (exit status 70): LLVM ERROR: out of registers")],
)
def test_one_form_that_crashes_costs_itself_alone(gpu: Path, mode: str, words: str) -> None:
    found = _prove(mode)
    assert [found[form].status for form in verdicts.FORMS] == [RIGHT, FAILED, RIGHT]
    assert found["loss"].reason == words


def test_a_configuration_that_is_wrong_is_left_out(tried: Callable[..., dict[str, Verdict]]) -> None:
    (verdict,) = tried("wrong@pipelined", ("loss",)).values()
    assert verdict.status == RIGHT
    assert verdict.speeds[0].choice == "default"
    assert "pipelined: not right" in verdict.reason


@pytest.mark.slow
def test_a_hang_is_ended(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "HANG_S", 5.0)
    found = _prove("hang@loss", ("loss", "forward"), limit_s=20.0)
    assert (found["loss"].status, found["loss"].reason) == (FAILED, "not finished after 20 s")
    assert found["forward"].status == UNKNOWN  # its time was used up
    still = subprocess.run(["pgrep", "-f", "stub_trial.py hang@loss"], capture_output=True, text=True, check=False)
    assert still.stdout == ""


@pytest.mark.slow
def test_a_form_that_loses_the_device_costs_itself_alone(gpu: Path) -> None:
    """A process whose device is lost fails in every call that follows, whatever is called."""
    found = _prove("raises@loss")
    assert [found[form].status for form in verdicts.FORMS] == [RIGHT, FAILED, RIGHT]
    assert "illegal memory access" in found["loss"].reason


def _script(code: str) -> list[str]:
    return [sys.executable, "-c", f"import json, os, subprocess, sys, time; job = json.loads(sys.stdin.readline()); {code}"]


def _says(form: str, verdict: Verdict | None = None, ends: bool = False) -> str:
    """A statement that prints a finding."""
    finding: dict[str, Any] = {"form": form, "begins": True} if verdict is None else {"form": form, "verdict": asdict(verdict)}
    finding = {"form": form, "ends": True} if ends else finding
    return f"print({trial.MARK + json.dumps(finding)!r}, flush=True)"


WHOLE = "; ".join([_says("loss"), _says("loss", Verdict(RIGHT, "well", {}, (Speed(4, 6, 2.0, 1.0, "default"),))), _says("loss", ends=True)])


def _by(code: str, limit_s: float = 60.0, forms: tuple[str, ...] = ("loss",)) -> dict[str, Verdict]:
    return proof.prove(ARCH, forms, "tf32", [(4, 6)], GPU, limit_s=limit_s, command=_script(code))


def test_what_others_print_costs_no_finding(gpu: Path) -> None:
    noise = [
        "os.write(1, b'\\xff\\xfe warning without an end: ')", "print('wslfast-trial:{')", "print('wslfast-trial:[]')",
        _says("loss", Verdict("fine")), "print('wslfast-trial:' + json.dumps({'form': 'other', 'begins': True}))",
    ]  # fmt: skip
    found = _by("; ".join(["os.write(1, b'\\xff at the head of a line of ours ')", WHOLE, *noise]))["loss"]
    assert (found.status, found.speeds[0].kernels_ms) == (RIGHT, 1.0), found


@pytest.mark.slow
def test_what_a_trial_prints_is_no_finding(gpu: Path) -> None:
    assert {form: v.status for form, v in _prove("chatty", ("loss", "forward")).items()} == {"loss": RIGHT, "forward": RIGHT}


def test_what_it_started_does_not_keep_its_end_from_being_seen(gpu: Path) -> None:
    """A compiler that outlives the trial holds its output open."""
    child = proof._Child(_script(f"subprocess.Popen(['sleep', '20']); {WHOLE}"), {})
    try:
        assert len(list(child.findings(time.monotonic() + 15))) == 3  # and no TimeoutError
    finally:
        child.stop()


def test_what_it_dies_of_after_its_work_is_nobodys(gpu: Path) -> None:
    """Libraries crash when a process ends."""
    found = _by(f"{WHOLE}; os.kill(os.getpid(), 11)")["loss"]
    assert (found.status, found.reason) == (RIGHT, "well")


def test_a_trial_that_cannot_begin_says_nothing_of_the_kernels(gpu: Path) -> None:
    found = _by("sys.exit('ModuleNotFoundError: no torch here')", forms=("loss", "forward"))
    for verdict in found.values():
        assert (verdict.status, verdict.reason) == (
            UNKNOWN, "its process died (exit status 1): ModuleNotFoundError: no torch here, before it began"
        )  # fmt: skip
    found = proof.prove(ARCH, ("loss",), "tf32", [], GPU, command=("/no/such/python",))
    assert found["loss"].status == UNKNOWN
    assert "no process can be started" in found["loss"].reason


def test_a_form_without_time_is_no_hang(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Verdict(RIGHT, "well")
    (found,) = _by(f"{_says('loss')}; time.sleep(60)", 2.0).values()
    assert found.status == UNKNOWN
    assert found.reason.startswith("not finished after 2 s, of which it had")
    (found,) = _by(f"{_says('loss')}; {_says('loss', right)}; time.sleep(60)", 2.0).values()
    assert (found.status, found.speeds) == (RIGHT, ())  # not timed, so that the next process looks again
    assert not verdicts.judge(found, 4, 6).on
    monkeypatch.setattr(proof, "HANG_S", 0.2)
    (found,) = _by(f"{_says('loss')}; time.sleep(60)", 2.0).values()
    assert (found.status, found.reason) == (FAILED, "not finished after 2 s")
    made = proof._make(ARCH, [("loss", "tf32"), ("loss", "fp16")], [(4, 6)], GPU, 0.0)
    assert {verdict.status for verdict in made.values()} == {UNKNOWN}


def test_modules_of_the_folder_one_is_in_are_not_the_librarys(own_command: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("json", "statistics", "signal", "torch", "wslfast", "kernels"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('taken for another')")
    monkeypatch.chdir(tmp_path)
    found = proof.prove(ARCH, ("loss",), "tf32", [], GPU, command=proof.COMMAND)["loss"]
    assert found.status == UNKNOWN
    assert found.reason.startswith("no second process gets onto the GPU"), found.reason  # which the trial itself has said


def test_another_gpu_under_the_same_number_is_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[dict[str, Any]] = []
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *a, device=None, **kw: zeros(*a, **kw))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Another GPU")
    job = {"device": "cuda:1", "gpu": "Test GPU", "architecture": ARCH.to_dict(), "forms": ["loss"], "precision": "tf32", "sizes": []}
    assert trial.run(job, said.append)
    (finding,) = said
    assert finding["verdict"]["status"] == UNKNOWN
    assert "it sees 'Another GPU' under the number of 'Test GPU'" in finding["verdict"]["reason"]


@pytest.mark.parametrize(
    "words",
    ["CUDA error: out of memory", "Triton Error [CUDA]: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`",
     "cuDNN error: CUDNN_STATUS_ALLOC_FAILED", "DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes."],
)  # fmt: skip
def test_memory_that_ran_out_says_nothing_of_the_kernels(monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    monkeypatch.setattr(trial.Trial, "errors", lambda self, choice: (_ for _ in ()).throw(RuntimeError(words)))
    said: list[dict[str, Any]] = []
    trial.run({"device": "cpu", "architecture": ARCH.to_dict(), "forms": ["loss"], "precision": "tf32", "sizes": []}, said.append)
    assert [s["verdict"]["status"] for s in said if "verdict" in s] == [UNKNOWN]
    assert triton_path.build_failure(RuntimeError(words)) is None


def test_kernels_and_torch_are_timed_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's clocks rise in its first second of work: whoever came last would win."""
    order: list[str] = []
    stub_trial.install("right", monkeypatch.setattr)
    run = stub_trial.Stub._run
    monkeypatch.setattr(stub_trial.Stub, "_run", lambda self, results, form: order.append(self.choice) or run(self, results, form))
    trial.Trial(ARCH, "loss", "tf32", torch.device("cpu")).speed(4, 6)
    assert order[-trial.REPEATS * 3 :] == ["torch", "default", "pipelined"] * trial.REPEATS


@pytest.mark.slow
def test_the_kernels_themselves_in_the_interpreter(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    found = proof.prove(FLAT, ("loss", "forward"), "tf32", [], GPU, limit_s=300.0, command=_command("interpreter"))
    assert {form: v.status for form, v in found.items()} == {"loss": RIGHT, "forward": RIGHT}, found
    assert max(found["loss"].errors.values()) < 1


def test_configurations_that_are_the_default_for_a_network_are_not_tried() -> None:
    """Two gradients in one launch: no matter of outputs, not written for LeNet-5, and too many registers for operands of four bytes."""
    counts = {"loss": 3, "indexed": 3, "forward": 2}
    for form, count in counts.items():
        choices = trial.Trial(Architecture.cnn3(), form, "fp16", torch.device("cpu")).choices
        assert choices == ["default", "pipelined", "joint"][:count]
    for arch, precision in ((Architecture.cnn3(), "tf32"), (Architecture.cnn3(), "tf32x3"), (Architecture.lenet5(), "fp16")):
        assert trial.Trial(arch, "loss", precision, torch.device("cpu")).choices == ["default", "pipelined"]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["loss", "indexed"])
def test_the_joint_launch_is_put_to_the_proof(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    if not triton.knobs.runtime.interpret:
        pytest.skip("needs TRITON_INTERPRET=1 when triton is first imported")
    first = [Conv2d("a", 1, 3, (3, 3)), Pool2d("b"), Activation("c", "tanh")]
    arch = Architecture.from_layers([*first, Conv2d("d", 3, 2, (2, 2)), Flatten("e"), Linear("f", 8, 3)], (1, 8, 8), "joined")
    stub_trial.install("interpreter", monkeypatch.setattr)
    tried = trial.Trial(arch, form, "fp16", torch.device("cpu"))
    assert "joint" in tried.choices
    errors = tried.errors("joint")
    assert max(errors.values()) < 1
    assert any(name.endswith("a.weight") for name in errors)


def test_a_choice_of_an_earlier_version_goes_on_with_the_same_bits() -> None:
    record = verdicts.to_dict(Decision(True, "of the run", "default", True))
    assert verdicts.decision_from({**record, "choice": "long"}) == verdicts.decision_from(record)
    for choice in ("fastest", None, ["long"]):
        with pytest.raises(WslfastError, match="kernels: expected a decision"):
            verdicts.decision_from({**record, "choice": choice})


# -- what is kept ------------------------------------------------------------------------------------------------------

GOOD = Verdict(RIGHT, "well", {"mse loss": 0.1}, (Speed(128, 256, 10.0, 2.0, "joint"),))


def test_files(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = verdicts.key_of(ARCH, "tf32", "loss")
    assert verdicts.read(key) is None
    verdicts.keep(key, GOOD)
    assert verdicts.read(key) == GOOD
    _new_process(monkeypatch)
    assert verdicts.read(key) == GOOD
    (file,) = gpu.iterdir()
    record = json.loads(file.read_text())
    assert record["key"]["machine"]["gpu"] == "Test GPU"

    for damage in ("", "{", "[]", json.dumps({**record, "schema": 99}), json.dumps({**record, "verdict": {"status": "fine"}}),
                   json.dumps({**record, "key": {**record["key"], "form": "forward"}}),
                   json.dumps({**record, "verdict": {**record["verdict"], "errors": []}}),
                   json.dumps({**record, "verdict": {**record["verdict"], "speeds": [{**record["verdict"]["speeds"][0], "k": float("inf")}]}}),
                   json.dumps({**record, "verdict": {**record["verdict"], "speeds": [{**record["verdict"]["speeds"][0], "choice": "mad"}]}})):  # fmt: skip
        file.write_text(damage)
        _new_process(monkeypatch)
        assert verdicts.read(key) is None, damage


@pytest.mark.parametrize("field", ["gpu", "capability", "driver", "torch", "triton", "sources"])
def test_another_machine_or_other_sources_have_no_verdict(gpu: Path, monkeypatch: pytest.MonkeyPatch, field: str) -> None:
    verdicts.keep(verdicts.key_of(ARCH, "tf32", "loss"), GOOD)
    other = Machine(**{**vars(MACHINE), field: "another"})
    monkeypatch.setattr(verdicts, "machine", lambda index=None: other)
    _new_process(monkeypatch)
    decision = verdicts.decide(ARCH, "tf32", "loss", 128, 256)
    assert not decision.on
    assert not decision.proved
    assert "wslfast.doctor" in decision.reason


def test_another_network_precision_or_form_has_none(gpu: Path) -> None:
    verdicts.keep(verdicts.key_of(ARCH, "tf32", "loss"), GOOD)
    assert verdicts.decide(ARCH, "tf32", "loss").on
    assert verdicts.decide(Architecture.from_layers(ARCH.layers, ARCH.input_shape, "renamed"), "tf32", "loss").on
    assert not verdicts.decide(FLAT, "tf32", "loss").on
    assert not verdicts.decide(ARCH, "fp16", "loss").on
    assert not verdicts.decide(ARCH, "tf32", "indexed").on


def test_the_nearest_size_counts() -> None:
    verdict = Verdict(RIGHT, "", {}, (Speed(4, 64, 1.0, 2.0, "default"), Speed(1024, 256, 10.0, 2.0, "joint")))
    assert not verdicts.judge(verdict, 8, 64).on
    assert verdicts.judge(verdict, 500, 256) == Decision(True, verdicts.judge(verdict, 1024, 256).reason, "joint")
    fresh = Verdict(RIGHT, "", {}, (Speed(5, 60, 5.0, 1.0, "default"),))
    assert {(s.k, s.n) for s in fresh.merged(verdict).speeds} == {(5, 60), (1024, 256)}
    assert fresh.merged(Verdict(WRONG)).speeds == fresh.speeds


def test_a_folder_that_cannot_be_written(gpu: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("WSLFAST_CACHE", "/proc/nowhere")
    key = verdicts.key_of(ARCH, "tf32", "loss")
    with caplog.at_level(logging.WARNING, "wslfast"):
        verdicts.keep(key, GOOD)
        verdicts.keep(key, GOOD)
    assert len(caplog.messages) == 1
    assert "holds for this process alone" in caplog.messages[0]
    assert verdicts.decide(ARCH, "tf32", "loss").on
    _new_process(monkeypatch)
    assert verdicts.read(key) is None


def test_what_is_unknown_is_not_written(gpu: Path) -> None:
    verdicts.keep(verdicts.key_of(ARCH, "tf32", "loss"), Verdict(UNKNOWN, "busy"))
    assert not gpu.exists()
    assert not verdicts.decide(ARCH, "tf32", "loss").on


def test_a_home_that_is_none(gpu: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In a container a user may have no home; a folder may begin with a tilde."""
    from wslfast.cli.doctor import Doctor

    monkeypatch.setenv("HOME", str(gpu.parent))
    monkeypatch.setenv("WSLFAST_CACHE", "~/here")
    assert verdicts.folder() == gpu.parent / "here" / "kernels"

    def homeless(*_: Any) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("WSLFAST_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    key = verdicts.key_of(ARCH, "tf32", "loss")
    assert verdicts.read(key) is None
    verdicts.keep(key, GOOD)
    with verdicts.one_at_a_time(MACHINE, 1.0):
        assert verdicts.read(key) == GOOD
    Doctor(json=True).run()
    assert json.loads(capsys.readouterr().out)["kept in"].startswith("memory alone (Could not determine home directory.)")


WAITS = """
import sys, time
from wslfast.engine import verdicts
machine = verdicts.Machine("Test GPU", "9.0", "1", "2", "3", "sources")
with verdicts.one_at_a_time(machine, float(sys.argv[1])):
    print("in", flush=True)
    time.sleep(float(sys.argv[2]))
print("out", flush=True)
"""


def test_one_process_at_a_time(gpu: Path) -> None:
    """The second waits for the first, but not for ever; another kind of GPU is another matter; one that dies inside holds nobody up."""
    first = subprocess.Popen([sys.executable, "-c", WAITS, "1", "600"], stdout=subprocess.PIPE, text=True, cwd=HERE.parent)
    assert first.stdout is not None
    try:
        assert first.stdout.readline() == "in\n"
        with verdicts.one_at_a_time(Machine(**{**vars(MACHINE), "gpu": "Another"}), 0.0) as alone:
            assert alone
        with verdicts.one_at_a_time(MACHINE, 0.5) as alone:
            assert not alone
    finally:
        first.kill()
        first.wait()
    with verdicts.one_at_a_time(MACHINE, 0.0) as alone:
        assert alone


def test_what_another_process_found_meanwhile_is_taken(fitting: list[list[str]], gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = verdicts.one_at_a_time

    @contextlib.contextmanager
    def waited(machine: Machine, seconds: float) -> Any:
        key = verdicts.key_of(ARCH, "tf32", "loss")
        known = dict(verdicts._known)
        verdicts.keep(key, Verdict(RIGHT, "of another", {}, (Speed(4, 6, 10.0, 2.0, "joint"),)))
        verdicts._known.clear()
        verdicts._known.update(known)  # this process has read that there is none
        with real(machine, seconds):
            yield

    monkeypatch.setattr(verdicts, "one_at_a_time", waited)
    (decision,) = proof.ensure(ARCH, GPU, [("loss", "tf32")], 4, 6).values()
    assert (decision.on, decision.choice) == (True, "joint")
    assert fitting == []


def test_each_gpu_is_a_machine_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names with odd characters, MIG's among them; the current GPU may change."""
    names, current = ["Tësla \u2603 \udcff/..%", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"], [0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: names[index])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    verdicts._machine.cache_clear()
    try:
        assert verdicts.machine().gpu == names[0]
        current[0] = 1
        assert verdicts.machine().gpu == names[1] == verdicts.machine(1).gpu
        for index in range(2):
            key = verdicts.key_of(ARCH, "tf32", "loss", index)
            verdicts.keep(key, GOOD)
            _new_process(monkeypatch)
            assert verdicts.read(key) == GOOD
    finally:
        verdicts._machine.cache_clear()


def test_the_interpreter_is_no_gpu(fitting: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts.keep(verdicts.key_of(ARCH, "tf32", "loss"), GOOD)
    monkeypatch.setattr(verdicts, "interpreted", INTERPRETED)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert not verdicts.decide(ARCH, "tf32", "loss").on
    assert proof.ensure(ARCH, GPU, [("forward", "tf32")], 4, 6) == {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(proof, "check_device", lambda device: GPU)
    assert "TRITON_INTERPRET is set" in wslfast.doctor(ARCH)["kernels"]
    assert fitting == []
    monkeypatch.setenv("WSLFAST_KERNELS", "on")
    assert verdicts.decide(ARCH, "tf32", "loss").on


# -- what calls make of it ---------------------------------------------------------------------------------------------


def _path(**more: Any) -> Any:
    return engine.choose(ARCH, "cuda", torch.float32, call=engine.Call("loss", 128, 256), **more)


def test_auto_follows_the_verdict(gpu: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    with caplog.at_level(logging.WARNING, "wslfast"):
        assert _path().name == "stacked"
        assert _path().name == "stacked"
    assert len(caplog.messages) == 1, "a call without a verdict says once how to get one"
    assert "`wslfast doctor`" in caplog.messages[0]
    verdicts.keep(verdicts.key_of(ARCH, "tf32x3", "loss"), GOOD)
    path = _path()
    assert (path.name, path.choice) == ("triton", "joint")
    assert "2 ms against torch's 10" in path.reason
    assert engine.choose(ARCH, "cuda", torch.float32, call=engine.Call("forward", 128, 256)).name == "stacked"
    assert engine.choose(ARCH, "cuda", torch.float32, "torch").name == "stacked"
    monkeypatch.setenv("WSLFAST_KERNELS", "off")
    assert _path().name == "stacked"
    monkeypatch.setenv("WSLFAST_KERNELS", "on")
    assert engine.choose(FLAT, "cuda", torch.float32).name == "triton"
    monkeypatch.setenv("WSLFAST_KERNELS", "yes")
    with pytest.raises(WslfastError, match="WSLFAST_KERNELS: expected one of"):
        _path()


def test_a_verdict_is_frozen_for_the_process(gpu: Path) -> None:
    key = verdicts.key_of(ARCH, "tf32x3", "loss")
    assert not verdicts.decide(ARCH, "tf32x3", "loss").on
    verdicts.keep(verdicts.key_of(ARCH, "tf32", "loss"), GOOD)
    (made,) = gpu.iterdir()
    record = json.loads(made.read_text())
    record["key"]["precision"] = "tf32x3"
    (gpu / key.file).write_text(json.dumps(record))  # another process has proved it
    assert not verdicts.decide(ARCH, "tf32x3", "loss").on
    verdicts.forget()
    assert verdicts.decide(ARCH, "tf32x3", "loss").on


def test_held_decisions_win(gpu: Path) -> None:
    graph = verdicts.graph_digest(ARCH)
    with verdicts.holding({(graph, "tf32", "loss"): Decision(True, "of the run", "joint")}):
        assert verdicts.decide(ARCH, "tf32", "loss", 3, 3) == Decision(True, "of the run", "joint")
        assert not verdicts.decide(ARCH, "fp16", "loss", 3, 3).on
    assert not verdicts.decide(ARCH, "tf32", "loss", 3, 3).on


# -- safe points -------------------------------------------------------------------------------------------------------


@pytest.fixture
def fitting(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Every (form, precision) of every proof that is begun."""
    began: list[list[str]] = []

    def watched(architecture: Any, forms: Any, precision: str, sizes: Any, *_: Any, command: list[str], **__: Any) -> Any:
        began.append(list(forms))
        return in_this_process(command[-1], list(forms), precision, sizes)

    def in_this_process(mode: str, forms: list[str], precision: str, sizes: Any) -> dict[str, Verdict]:
        if mode == "crash":
            return dict.fromkeys(forms, Verdict(FAILED, "its process died (SIGSEGV)"))
        stub_trial.install(mode, monkeypatch.setattr)
        job = {"architecture": ARCH.to_dict(), "device": "cuda:99" if mode == "busy" else "cpu", "precision": precision, "forms": forms}
        said = _run({**job, "sizes": [list(size) for size in sizes]})
        return {s["form"]: verdicts.from_dict(json.loads(json.dumps(s["verdict"]))) for s in said if "verdict" in s}

    monkeypatch.setattr(proof, "prove", watched)
    monkeypatch.setattr(proof, "why_not_triton", lambda *_: None)
    return began


def test_ensure_looks_once(fitting: list[list[str]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    wanted = [("loss", "tf32"), ("forward", "tf32")]
    caplog.set_level(logging.INFO, "wslfast")
    decisions = proof.ensure(ARCH, GPU, wanted, 4, 6)
    assert {(p, f): d.on for (_, p, f), d in decisions.items()} == {("tf32", "loss"): True, ("tf32", "forward"): True}
    assert {d.choice for d in decisions.values()} == {"pipelined"}
    assert any(m.startswith("checking the kernels for 'tiny' on Test GPU") for m in caplog.messages)
    assert any("kernels on for 'tiny', loss in tf32" in m for m in caplog.messages)
    _new_process(monkeypatch)
    assert proof.ensure(ARCH, GPU, wanted, 5, 7) == proof.ensure(ARCH, GPU, wanted, 4, 6)  # the same bucket
    assert fitting == [["loss", "forward"]]
    proof.ensure(ARCH, GPU, wanted[:1], 64, 6)
    assert fitting[1:] == [["loss"]]
    both = verdicts.read(verdicts.key_of(ARCH, "tf32", "loss"))
    assert both is not None
    assert sorted((s.k, s.n) for s in both.speeds) == [(4, 6), (64, 6)]


def test_ensure_leaves_alone(fitting: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [("loss", "tf32")]
    assert proof.ensure(ARCH, torch.device("cpu"), wanted, 4, 6) == {}
    with engine.using("torch"):
        assert proof.ensure(ARCH, GPU, wanted, 4, 6) == {}
    for setting in ("on", "off"):
        monkeypatch.setenv("WSLFAST_KERNELS", setting)
        assert proof.ensure(ARCH, GPU, wanted, 4, 6) == {}
    monkeypatch.setenv("WSLFAST_KERNELS", "auto")
    monkeypatch.setattr(proof, "why_not_triton", lambda *_: "it has compute capability 7.5")
    assert proof.ensure(ARCH, GPU, wanted, 4, 6) == {}
    assert fitting == []


def test_a_failure_is_kept_and_what_is_unknown_is_asked_again(fitting: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    for mode, times in (("crash", 1), ("busy", 2)):
        monkeypatch.setattr(proof, "COMMAND", _command(mode))
        precision = "tf32" if mode == "crash" else "tf32x3"
        fitting.clear()
        for _ in range(2):
            _new_process(monkeypatch)
            (decision,) = proof.ensure(ARCH, GPU, [("loss", precision)], 4, 6).values()
            assert not decision.on
        assert len(fitting) == times, mode


def test_doctor(fitting: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(proof, "check_device", lambda device: GPU)
    monkeypatch.setattr(proof, "COMMAND", _command("crash"))
    found = wslfast.doctor(ARCH, k=4, n=6, precision="tf32")
    assert list(found) == list(verdicts.FORMS)
    assert all("kernels off for 'tiny'" in line and "SIGSEGV" in line for line in found.values())
    monkeypatch.setattr(proof, "COMMAND", _command("right"))
    assert not verdicts.decide(ARCH, "tf32", "loss").on
    found = wslfast.doctor(ARCH, k=4, n=6, precision="tf32")
    assert "kernels on for 'tiny', loss in tf32: kernels, proved on this GPU: 2e+03 ms against torch's 1e+04 (k=4, n=6)" in found["loss"]
    assert verdicts.decide(ARCH, "tf32", "loss").on, "the process's verdict is replaced at once"
    for wrong in ({"precision": "fp8"}, {"k": 0}, {"n": "x"}):
        with pytest.raises(WslfastError, match=next(iter(wrong))):
            wslfast.doctor(ARCH, **wrong)


def test_doctor_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    from wslfast.cli.doctor import Doctor

    Doctor().run()
    said = capsys.readouterr().out
    assert "WSLFAST_KERNELS" in said
    assert "there is no CUDA device here" in said
    with pytest.raises(WslfastError, match="device: expected cpu, cuda or cuda:N, got 'banana'"):
        wslfast.doctor(device="banana")
    assert wslfast.doctor() == {"kernels": "there is no CUDA device here: networks run on the CPU engine or on torch"}


# -- many processes, and runs that go on -------------------------------------------------------------------------------


def test_ranks_take_the_worst() -> None:
    slow = Verdict(RIGHT, "", {}, (Speed(128, 256, 10.0, 9.5, "default"),))
    assert verdicts.combined([GOOD, GOOD]) == GOOD
    assert not verdicts.judge(verdicts.combined([GOOD, slow]), 128, 256).on
    assert verdicts.combined([GOOD, slow]) == verdicts.combined([slow, GOOD]).__class__(RIGHT, "well", {"mse loss": 0.1}, slow.speeds)
    assert verdicts.combined([GOOD, Verdict(WRONG, "bad"), None]).status == WRONG
    assert verdicts.combined([GOOD, Verdict(UNKNOWN, "busy")]).reason == "busy"
    assert verdicts.combined([GOOD, None]).status == UNKNOWN


RANKS = """
import os
import torch
import torch.distributed as dist
from wslfast import WslfastError, proof
from wslfast.engine import verdicts
from wslfast.engine.verdicts import RIGHT, Speed, Verdict, judge
dist.init_process_group("gloo")
rank, kind = dist.get_rank(), 0
# two nodes, the second with two processes; in one case these have GPUs of two kinds
os.environ["GROUP_RANK"] = "0" if rank < 1 else "1"
verdicts.machine = lambda index=None: verdicts.Machine(f"GPU {kind}", "9.0", "1", "2", "3", "4")
for case in ("nodes", "kinds", "settings"):
    kind = rank if case == "kinds" else 0
    os.environ["WSLFAST_KERNELS"] = "off" if case == "settings" and rank == 1 else "auto"
    try:
        looks = proof._looks(torch.device("cuda", 0))
    except WslfastError as error:
        print(case, "said", error, flush=True)
        continue
    mine = [Verdict(RIGHT, "", {}, (Speed(4, 4, 2.0, 1.0 + rank * 0.95, "default"),)), Verdict(RIGHT, "", {}, (Speed(4, 4, 2.0, 1.0, "joint"),))]
    agreed = proof._agreed(mine if looks else [None, None], looks)
    print(case, "looks" if looks else "waits", [(v.status, judge(v, 4, 4).on) for v in agreed], flush=True)
dist.destroy_process_group()
"""


def test_ranks_agree(tmp_path: Path) -> None:
    """One process a node looks, and one for every further kind of GPU there; the second node's finds the first form too slow: nobody takes
    it, everybody takes the other. Where settings differ, all end with the same words, and nobody waits for the others."""
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    agreed = "[('right', False), ('right', True)]"
    differ = "WSLFAST_KERNELS: expected the same in all processes of a job, got auto, off"
    # counted in the text: lines of three processes may run into one another
    for line, times in (
        (f"nodes looks {agreed}", 2),
        (f"nodes waits {agreed}", 1),
        (f"kinds looks {agreed}", 3),
        (f"settings said {differ}", 3),
    ):
        assert done.stdout.count(line) == times, done.stdout


def test_a_run_keeps_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from training_runs import ARCH as arch
    from training_runs import config

    from wslfast import Population
    from wslfast.training import loop
    from wslfast.training.checkpoint import load_checkpoint

    population = Population(arch, arch.initial_weights(["kaiming_normal"] * 20, range(20)))
    images = torch.randn(48, *population.architecture.input_shape)
    graph = verdicts.graph_digest(population.architecture)
    held: list[Any] = []
    began = {(graph, "tf32", "loss"): Decision(True, "proved", "joint")}
    monkeypatch.setattr(loop, "ensure", lambda *_: held.append("asked") or began)
    wslfast.train(config(tmp_path, steps=1), population=population, images=images)
    assert held == ["asked"]
    assert load_checkpoint(tmp_path)["kernels"] == [[graph, "tf32", "loss", verdicts.to_dict(began[graph, "tf32", "loss"])]]

    seen = []
    real = verdicts.holding
    monkeypatch.setattr(loop.verdicts, "holding", lambda decisions: seen.append(decisions) or real(decisions))
    wslfast.train(config(tmp_path, steps=2), population=population, images=images, resume=True)
    assert held == ["asked"], "a resumed run does not ask again"
    assert seen == [began]
