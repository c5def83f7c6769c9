"""``make gpu`` without a GPU: jobs that crash, hang and are late, tests whose device is lost, workers that outlive theirs, and a rehearsal."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_gate, workers
from benchmarks.gpu_gate import Gate
from benchmarks.jobs import LATE, Done, Job, run_all
from benchmarks.losses import Cell

ROOT = Path(__file__).resolve().parents[2]


def _job(name: str, code: str, seconds: float = 60.0) -> Job:
    return Job(name, ("-S", "-c", code), seconds)


def test_jobs_that_end_in_every_way() -> None:
    found: dict[str, Done] = {}
    jobs = [
        _job("well", "print('a'); print('b')"),
        _job("fails", "import sys; print('why it failed'); sys.exit(3)"),
        _job("dies", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"),
        _job("hangs", "import time; print('begun', flush=True); time.sleep(600)", seconds=3.0),
        _job("reads its environment", "import os; print(os.environ['SHARE'])"),
    ]
    jobs[-1] = Job(jobs[-1].name, jobs[-1].command, 60.0, {"SHARE": "2/4"})
    left = run_all(jobs, 2, time.monotonic() + 120, lambda done: found.setdefault(done.job.name, done))
    assert left == []
    assert {name: done.status for name, done in found.items()} == {
        "well": 0, "fails": 3, "dies": -11, "hangs": LATE, "reads its environment": 0,
    }  # fmt: skip
    assert found["well"].output.split() == ["a", "b"]
    assert found["fails"].words == "failed (3): why it failed"
    assert found["dies"].words == "died (SIGSEGV)"
    assert found["hangs"].words.startswith("stopped after")
    assert "begun" in found["hangs"].output
    assert found["reads its environment"].output.strip() == "2/4"


def test_what_is_not_begun_by_the_deadline_is_named() -> None:
    found: list[Done] = []
    sleepers = [_job(str(i), "import time; time.sleep(600)") for i in range(4)]
    left = run_all(sleepers, 2, time.monotonic() + 1.0, found.append)
    assert left == ["2", "3"]
    assert [done.status for done in found] == [LATE, LATE]
    assert run_all(sleepers, 2, time.monotonic() - 1.0, found.append) == ["0", "1", "2", "3"]


TESTS = """
import os, signal
import pytest
pytestmark = pytest.mark.gpu
def test_a(): pass
def test_wrong(): assert 1 == 2, "a wrong value"
def test_lost(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
def test_after(): pass
def test_dies(): os.kill(os.getpid(), signal.SIGSEGV)
def test_after_that(): pass
def test_cnn3_comes_first(): pass
@pytest.mark.skip
def test_skipped(): pass
"""


def test_tests_go_on_after_a_device_that_is_lost(tmp_path: Path) -> None:
    """Every failure is written at once; what came after an illegal access, or after a crash, is run in another process."""
    (tmp_path / "out").mkdir()
    folder = tmp_path / "gpu"
    folder.mkdir()
    shutil.copy(ROOT / "tests" / "gpu" / "conftest.py", folder)
    (folder / "test_some.py").write_text(TESTS)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs a GPU\n")
    gate = Gate(tmp_path / "out")
    command = ("-m", "pytest", "-m", "gpu", "-q", "--tb=short", "-p", "no:cacheprovider", "-c", str(folder / "pytest.ini"), str(folder))
    gpu_gate.run_tests(gate, time.monotonic() + 300, command, processes=1)
    lines = [json.loads(line) for line in (gate.out / gpu_gate.LOG).read_text().splitlines()]
    failed = [line for line in lines if line["what"].startswith("FAILED")]
    assert [line["what"].rpartition("::")[2] for line in failed] == ["test_wrong", "test_lost"]
    assert "a wrong value" in failed[0]["why"]
    assert "illegal memory access" in failed[1]["why"]
    counts = lines[-1]
    assert {name: counts[name] for name in ("passed", "failed", "skipped", "begun")} == {"passed": 4, "failed": 2, "skipped": 1, "begun": 1}
    assert sorted(line.rpartition("::")[2] for line in gate.wrong) == ["test_dies: died in it", "test_lost: failed", "test_wrong: failed"]
    assert gate.undone == []


@pytest.mark.parametrize(
    ("code", "words"), [("import nowhere", "none was run"), ("raise SystemExit(4)", "failed (4)"), ("raise SystemExit(5)", "none was run")]
)
def test_tests_that_do_not_begin_are_wrong(tmp_path: Path, code: str, words: str) -> None:
    gate = Gate(tmp_path)
    gpu_gate.run_tests(gate, time.monotonic() + 60, ("-S", "-c", code), processes=1)
    assert len(gate.wrong) == 1
    assert words in gate.wrong[0]


def test_tests_without_time_are_named(tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    gpu_gate.run_tests(gate, time.monotonic() - 1, ("-S", "-c", "1"), processes=2)
    assert gpu_gate.report(gate, 0, 1.0) == 0


class _Fake:
    """A worker that replies as told, then is lost."""

    started = 0

    def __init__(self, device: str) -> None:
        _Fake.started += 1
        self.lost, self.asked = False, 0

    def ask(self, message: Any, seconds: float) -> Any:
        if "figure_s" in message:
            return []
        cell = Cell(**message)
        self.lost = cell.k == 3
        return [cell.failed("the device was lost: CUDA error" if self.lost else "fine", False)]

    def stop(self) -> None:
        assert self.lost or self.asked == 0


def test_a_worker_whose_device_is_lost_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_Worker", _Fake)
    monkeypatch.setattr(_Fake, "started", 0)
    rows: list[Any] = []
    cells = [Cell("loop", "cnn", k, 4) for k in (2, 3, 4, 5)]
    workers.run(cells, rows.extend, device="cuda", deadline=time.monotonic() + 60, cell_s=5, provider_s=lambda _: 60)
    assert [("lost" in row.note) for row in rows] == [False, True, False, False]
    assert _Fake.started == 2


def test_a_worker_tells_that_its_device_is_lost(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import io

    cell = {"provider": "loop", "architecture": "cnn", "k": 2, "n": 4}
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(map(json.dumps, ({"figure_s": 0.01, "best": []}, cell, cell))) + "\n"))
    monkeypatch.setattr(workers, "_lost", lambda device: "CUDA error: an illegal memory access")
    monkeypatch.setattr(workers, "beside", lambda *_: [])
    workers.main("cpu")
    said = [json.loads(line.removeprefix("rows:")) for line in capsys.readouterr().out.splitlines()]
    assert [reply["lost"] for reply in said] == [False, True], "it does not go on after it"
    assert "the device was lost: CUDA error: an illegal memory access" in json.dumps(said[1])


def test_parts_fill_nine_and_a_half_minutes() -> None:
    assert gpu_gate.TOTAL_S == 570
    assert list(gpu_gate.PARTS)[:3] == ["compile", "diagnose", "tests"]


def test_a_part_that_breaks_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def part(gate: Gate, name: str, deadline: float) -> None:
        ran.append(name)
        if name == "diagnose":
            raise OSError("no space")

    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(gpu_gate, "run_part", part)
    assert gpu_gate.main(["--rehearse"]) == 1
    assert ran == list(gpu_gate.PARTS)
    assert "failed: OSError: no space" in (tmp_path / gpu_gate.LOG).read_text()


def test_every_step_of_every_network_is_diagnosed() -> None:
    pytest.importorskip("triton")
    names = [job.name for job in gpu_gate.diagnose_jobs(False)]
    for step in (
        "pack",
        "stack",
        "forward 0",
        "forward 4",
        "dw 0",
        "dw 4",
        "dx 1",
        "dx 4",
        "head",
        "joint 1",
        "fold",
        "network forward",
        "network loss",
    ):
        assert f"cnn3 {'fp16' if step == 'joint 1' else 'tf32'} {step}" in names
    assert len(names) == len(set(names))
    compiled = [job.name for job in gpu_gate.compile_jobs(False)]
    assert compiled[:3] == ["cnn3 tf32", "lenet5 tf32", "cnn tf32"]
    assert "test:stride_2 bf16" in compiled
    proofs = [f"{job.name} proof" for job in gpu_gate.proof_jobs(False)]
    assert compiled[-len(proofs) :] == proofs


@pytest.mark.parametrize("step", ["pack", "stack", "forward 2", "dw 3", "dx 3", "joint 1", "fold"])
def test_a_kernel_alone_is_right_in_the_interpreter(step: str) -> None:
    triton = pytest.importorskip("triton")
    if not triton.knobs.runtime.interpret:
        pytest.skip("needs TRITON_INTERPRET=1")
    from benchmarks.kernels import diagnose

    # between its two gradients it rounds to fp16
    precision, bound = ("fp16", 5e-3) if step == "joint 1" else ("tf32", 1e-3)
    assert diagnose.run("cnn", precision, step, "cpu") < bound


@pytest.mark.parametrize(
    ("role", "step"), [("stage_forward", "forward 2"), ("stage_dw", "dw 3"), ("stage_dx", "dx 3"), ("stage_joint", "joint 1")]
)
def test_a_kernel_that_is_wrong_is_found(role: str, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    if not triton.knobs.runtime.interpret:
        pytest.skip("needs TRITON_INTERPRET=1")
    from benchmarks.kernels import diagnose

    real, output = getattr(diagnose, role), {"stage_forward": 4, "stage_dw": 5, "stage_dx": 4, "stage_joint": 9}[role]

    def wrong(*arguments: Any, **options: Any) -> None:
        real(*arguments, **options)
        arguments[output][0] *= 1.2  # one model's

    monkeypatch.setattr(diagnose, role, wrong)
    assert diagnose.run("cnn", "tf32", step, "cpu") > diagnose.bound("tf32", step)


STARTS = """
import importlib, sys
for name in ("tyro", "rich", "nvtx", "matplotlib", "sklearn", "jax", "pandas", "torchvision", "huggingface_hub", "tensorboard", "hypothesis"):
    sys.modules[name] = None
for name in ("gpu_gate", "workers", "__main__", "training_step", "zoo_building", "tune", "kernels.compile", "kernels.diagnose"):
    importlib.import_module("benchmarks." + name)
import wslfast.engine.trial
from wslfast import doctor
print(doctor())
"""


def test_what_it_starts_needs_torch_and_triton_alone() -> None:
    """On the machine with the GPU nothing can be installed: all parts begin without what is only convenient elsewhere."""
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, "-c", STARTS], cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": "."})
    assert done.returncode == 0, done.stderr[-2000:]
    assert "kernels" in done.stdout


def _install(name: str, monkeypatch: pytest.MonkeyPatch, jobs: list[Job]) -> None:
    monkeypatch.setattr(gpu_gate, f"{name}_jobs", lambda rehearse: jobs)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_faults_at_every_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the first part to the last with something wrong in each: every fault is written with its part and reason, nothing that comes after
    it is lost, what had no time is listed as not done and not as wrong, and the exit status says so."""
    segfault = "import os, signal; print('LLVM ERROR', flush=True); os.kill(os.getpid(), signal.SIGSEGV)"
    _install("compile", monkeypatch, [
        _job("compiler dies", segfault), _job("compiler hangs", "import time; time.sleep(600)", 1.0), _job("compiled", "print('12 kernels')"),
        *[_job(f"late {i}", "import time; time.sleep(600)") for i in range(4)],
    ])  # fmt: skip
    _install("diagnose", monkeypatch, [
        _job("dx 1", "import sys; print('cnn3 tf32 dx 1: error 0.3, bound 0.02'); sys.exit(1)"),
        _job("dw 1", "raise RuntimeError('CUDA error: an illegal memory access was encountered')"), _job("fold", "print('fold: 1e-7')"),
    ])  # fmt: skip
    _install("proof", monkeypatch, [_job("no verdict", "import os; os._exit(70)"), _job("verdict", "print('loss: kernels on')")])
    folder = tmp_path / "gpu"
    folder.mkdir()
    shutil.copy(ROOT / "tests" / "gpu" / "conftest.py", folder)
    (folder / "test_some.py").write_text(TESTS + "def test_hangs():\n    import time; time.sleep(600)\ndef test_last(): pass\n")
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs a GPU\n")
    command = ("-m", "pytest", "-m", "gpu", "-q", "--tb=short", "-p", "no:cacheprovider", "-c", str(folder / "pytest.ini"), str(folder))
    real = gpu_gate.run_tests
    monkeypatch.setattr(gpu_gate, "run_tests", lambda gate, deadline: real(gate, deadline, command, 1))
    monkeypatch.setattr(workers, "_Worker", _Fake)
    own = [Cell("wslfast-triton-layerwise", "cnn3", k, 4, precision="tf32") for k in (2, 3, 4)]
    monkeypatch.setattr(gpu_gate, "rehearsed_cells", lambda part: own)

    def section(gate: Gate, name: str, deadline: float) -> None:
        if name == "step":
            raise OSError(28, "No space left on device")
        gate.note(name, "rehearsed")

    monkeypatch.setattr(gpu_gate, "run_section", section)
    monkeypatch.setattr(gpu_gate, "PARTS", {part: {"compile": 4.0, "tests": 45.0}.get(part, 4.0) for part in gpu_gate.PARTS})
    monkeypatch.setattr(gpu_gate, "TOTAL_S", 90.0)
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    assert gpu_gate.main(["--rehearse"]) == 1
    lines = [json.loads(line) for line in (tmp_path / "out" / gpu_gate.LOG).read_text().splitlines()]
    wrong, undone = lines[-2]["what"], lines[-1]["what"]
    for expected in (
        "compile: compiler dies: died (SIGSEGV)", "compile: compiler hangs: stopped after",
        "diagnose: dx 1: failed (1): cnn3 tf32 dx 1: error 0.3, bound 0.02", "diagnose: dw 1: failed (1): RuntimeError: CUDA error: an illegal",
        "test_wrong: failed", "test_lost: failed", "test_dies: died in it", "the device was lost", "proof: no verdict: failed (70)",
        "step: OSError: [Errno 28] No space left on device",
    ):  # fmt: skip
        assert any(expected in line for line in wrong), (expected, wrong)
    assert not any("late" in line or "test_hangs" in line for line in wrong), wrong
    assert sum(line.startswith("compile: late") for line in undone) >= 2, undone
    assert any("test_hangs" in line for line in undone), undone
    said = {part: [line["what"] for line in lines if line["part"] == part] for part in gpu_gate.PARTS}
    assert any("compiled: well" in what for what in said["compile"])
    assert any("fold: well" in what for what in said["diagnose"])
    assert any("passed" in what for what in said["tests"])
    assert any("verdict: well" in what for what in said["proof"])
    assert said["zoo"][0] == "rehearsed"
    assert all(any(what.endswith(" s") for what in said[part]) for part in gpu_gate.PARTS), "every part says how long it took"


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: make gpu")
def test_the_rehearsal(tmp_path: Path) -> None:
    """The whole way: kernels compiled, diagnosed in the interpreter, tests in shares, cells in workers, the proof, and the report."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OUT": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu_gate.py", "--rehearse"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1100,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    lines = [json.loads(line) for line in (tmp_path / gpu_gate.LOG).read_text().splitlines()]
    said = {part: [line["what"] for line in lines if line["part"] == part] for part in gpu_gate.PARTS}
    assert said["compile"][0].startswith("test:mlp fp16: well")
    assert sum(": well" in what for what in said["diagnose"]) == 3
    assert any("passed" in what for what in said["tests"])
    for part, name in (("core", "wslfast-triton-layerwise"), ("nets", "wslfast-triton-network")):
        (cell,) = (what for what in said[part] if name in what)
        assert " ms, error " in cell, cell  # the kernels themselves, in the interpreter
    assert any("well" in what for what in said["proof"])
    assert any("well" in what for what in said["step"])
    assert lines[-2] == {"part": "wrong", "what": []}
