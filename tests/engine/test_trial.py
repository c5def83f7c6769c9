"""Kernels are tried in a process of their own, by stand-ins that are right, wrong, slow, crash, hang, print or cannot be reached, and in
Triton's interpreter: what becomes of it is a verdict, and only what says something of the kernels is one against them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import proof_machine
import pytest
import stub_trial
import torch
from proof_machine import ARCH, COMMAND, FLAT, GPU, command

from wslfast import Architecture, proof
from wslfast.engine import trial, triton_path, verdicts
from wslfast.engine.trial_process import TrialProcess
from wslfast.engine.verdicts import FAILED, RIGHT, UNKNOWN, WRONG, Speed, Verdict
from wslfast.kernels.layers import Activation, Conv2d, Flatten, Linear, Pool2d


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As on a machine with a GPU that the kernels are for; the verdicts' folder."""
    return proof_machine.install(tmp_path, monkeypatch)


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Verdict]]:
    """Verdicts of a trial in this process, for what does not end one."""

    def run(mode: str, forms: tuple[str, ...] = verdicts.FORMS) -> dict[str, Verdict]:
        stub_trial.install(mode, monkeypatch.setattr)
        monkeypatch.setattr(triton_path, "unbuildable", {})
        device = "cuda:99" if mode == "busy" else "cpu"
        job = {"architecture": ARCH.to_dict(), "device": device, "precision": "tf32", "forms": list(forms), "sizes": [[4, 6]]}
        found: dict[str, Verdict] = {}
        said = json.loads(json.dumps(proof_machine.run(job)))
        for finding in said:
            if "verdict" in finding:
                found[finding["form"]] = verdicts.from_dict(finding["verdict"])
        return found

    return run


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
    found = proof_machine.prove(mode)
    assert [found[form].status for form in verdicts.FORMS] == [RIGHT, FAILED, RIGHT]
    assert found["loss"].reason == words


def test_a_configuration_that_is_wrong_is_left_out(tried: Callable[..., dict[str, Verdict]]) -> None:
    (verdict,) = tried("wrong@pipelined", ("loss",)).values()
    assert verdict.status == RIGHT
    assert verdict.speeds[0].choice == "default"
    assert "pipelined: not right" in verdict.reason


@pytest.mark.slow
def test_a_hang_is_ended(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "HANG_S", 0.0)
    found = proof_machine.prove("hang@loss", ("loss", "forward"), limit_s=30.0)
    assert (found["loss"].status, found["loss"].reason) == (FAILED, "not finished after 30 s")
    assert found["forward"].status == UNKNOWN  # its time was used up
    still = subprocess.run(["pgrep", "-f", "stub_trial.py hang@loss"], capture_output=True, text=True, check=False)
    assert still.stdout == ""


@pytest.mark.slow
def test_a_form_that_loses_the_device_costs_itself_alone(gpu: Path) -> None:
    """A process whose device is lost fails in every call that follows, whatever is called."""
    found = proof_machine.prove("raises@loss")
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
    assert {form: v.status for form, v in proof_machine.prove("chatty", ("loss", "forward")).items()} == {"loss": RIGHT, "forward": RIGHT}


def test_what_it_started_does_not_keep_its_end_from_being_seen(gpu: Path) -> None:
    """A compiler that outlives the trial holds its output open."""
    child = TrialProcess(_script(f"subprocess.Popen(['sleep', '20']); {WHOLE}"), {})
    try:
        assert len(list(child.findings(time.monotonic() + 15))) == 3  # and no TimeoutError
    finally:
        child.stop()


def test_a_job_that_nobody_reads_holds_nobody_up() -> None:
    """More than a pipe takes, for a process that hangs before it asks for it."""
    child = TrialProcess([sys.executable, "-c", "import time; time.sleep(600)"], {"architecture": "x" * (1 << 20)})
    try:
        with pytest.raises(TimeoutError):
            list(child.findings(time.monotonic() + 0.1))
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
    assert found.reason == "not finished after 2 s, nor silent for long"
    (found,) = _by(f"{_says('loss')}; {_says('loss', right)}; time.sleep(60)", 2.0).values()
    assert (found.status, found.speeds) == (RIGHT, ())  # not timed, so that the next process looks again
    assert not verdicts.judge(found, 4, 6).on
    monkeypatch.setattr(proof, "HANG_S", 0.2)
    (found,) = _by(f"{_says('loss')}; time.sleep(60)", 2.0).values()
    assert (found.status, found.reason) == (FAILED, "not finished after 2 s")
    made = proof._make(ARCH, [("loss", "tf32"), ("loss", "fp16")], [(4, 6)], GPU, 0.0)
    assert {verdict.status for verdict in made.values()} == {UNKNOWN}


def test_modules_of_the_folder_one_is_in_are_not_the_librarys(gpu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("json", "statistics", "signal", "torch", "wslfast", "kernels"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('taken for another')")
    monkeypatch.chdir(tmp_path)
    found = proof.prove(ARCH, ("loss",), "tf32", [], GPU, command=COMMAND)["loss"]
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


ASKS = """
import json, sys, time
from wslfast.engine.trial_process import TrialProcess
child = TrialProcess(json.loads(sys.argv[1]), json.loads(sys.argv[2]))
print(child.process.pid, child.lines.get(), flush=True)  # the form has begun
time.sleep(600)
"""


@pytest.mark.slow
def test_a_trial_ends_with_the_process_that_asked(gpu: Path) -> None:
    """Killed, as by the end of its share of the time, it can end nobody; what comes next on that GPU would be timed beside the trial."""
    job = {"architecture": ARCH.to_dict(), "device": "cpu", "precision": "tf32", "forms": ["loss"], "sizes": [], "limit_s": 600.0}
    asks = [sys.executable, "-c", ASKS, json.dumps(command("hang")), json.dumps(job)]
    with subprocess.Popen(asks, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        trial_pid = process.stdout.readline().split()[0]
        process.kill()

    def runs() -> bool:
        stat = Path(f"/proc/{trial_pid}/stat")
        return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"

    for _ in range(1200):
        if not runs():
            break
        time.sleep(0.1)
    assert not runs()


@pytest.mark.slow
def test_the_kernels_themselves_in_the_interpreter(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    found = proof.prove(FLAT, ("loss", "forward"), "tf32", [], GPU, limit_s=300.0, command=command("interpreter"))
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
