"""Kernels prove themselves where they run: what is kept of it, what calls make of it, who looks and when, with stand-ins for kernels and GPU.
No GPU is needed; what a GPU says is not claimed."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import proof_machine
import pytest
import stub_trial
import torch
from proof_machine import ARCH, FLAT, GPU, INTERPRETED, MACHINE, ROOT, command

import wslfast
from wslfast import Architecture, WslfastError, engine, proof
from wslfast.engine import verdicts
from wslfast.engine.verdicts import FAILED, RIGHT, UNKNOWN, WRONG, Decision, Machine, Speed, Verdict


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As on a machine with a GPU that the kernels are for; the verdicts' folder."""
    return proof_machine.install(tmp_path, monkeypatch)


def _new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdicts, "_known", {})
    monkeypatch.setattr(proof, "_looked_at", set())


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
    for k, n in ((64, 1), (100, 1024), (127, 256), (4096, 8)):  # far from both: nobody has looked, whatever the nearest says
        decision = verdicts.judge(verdict, k, n)
        assert (decision.on, decision.proved) == (False, False)
        assert f"wslfast.doctor(architecture, k={k}, n={n})" in decision.reason
        assert "k=4, n=64, k=1024, n=256" in decision.reason
    assert verdicts.judge(verdict, 10**6, 10**5).on  # of a large call, 512 models and 1,024 queries would be timed, which are near
    usual = Verdict(RIGHT, "", {}, tuple(Speed(k, n, 5.0, 1.0, "default") for k, n in proof.SIZES))
    sizes = [(k, n) for k in (2, 16, 64, 100, 10**4) for n in (2, 16, 32, 100, 10**4)]
    assert [s for s in sizes if not verdicts.judge(usual, *s).on] == [(2, 10**4), (10**4, 2), (10**4, 16)]  # of what doctor times by itself
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
    out = capsys.readouterr().out
    assert json.loads(out[out.index("{") :])["kept in"].startswith("memory alone (Could not determine home directory.)")


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
    first = subprocess.Popen([sys.executable, "-c", WAITS, "1", "600"], stdout=subprocess.PIPE, text=True, cwd=ROOT)
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


def test_speeds_of_two_processes_are_put_together(fitting: list[list[str]]) -> None:
    """Each has read that there is none, and proves another size."""
    key = verdicts.key_of(ARCH, "tf32", "loss")
    assert verdicts.read(key) is None
    other = Verdict(RIGHT, "of another", {}, (Speed(1024, 6, 10.0, 2.0, "joint"),))
    verdicts.keep(key, other)
    verdicts._known[key] = None
    proof.ensure(ARCH, GPU, [("loss", "tf32")], 4, 6)
    assert fitting == [["loss"]]
    verdicts._known.clear()
    both = verdicts.read(key)
    assert both is not None
    assert sorted((s.k, s.n) for s in both.speeds) == [(4, 6), (1024, 6)]


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


def test_a_choice_of_an_earlier_version_goes_on_with_the_same_bits() -> None:
    record = verdicts.to_dict(Decision(True, "of the run", "default", True))
    assert verdicts.decision_from({**record, "choice": "long"}) == verdicts.decision_from(record)
    for choice in ("fastest", None, ["long"]):
        with pytest.raises(WslfastError, match="kernels: expected a decision"):
            verdicts.decision_from({**record, "choice": choice})


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
        said = proof_machine.run({**job, "sizes": [list(size) for size in sizes]})
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


def test_a_gpu_that_is_too_full_is_looked_at_once_in_a_process(fitting: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "COMMAND", proof_machine.command("busy"))
    wanted = [("loss", "tf32")]
    assert not any(d.on for d in proof.ensure(ARCH, GPU, wanted, 4, 6).values())
    assert proof.ensure(ARCH, GPU, wanted, 5, 7) == proof.ensure(ARCH, GPU, wanted, 4, 6)
    assert fitting == [["loss"]]
    proof.ensure(ARCH, GPU, wanted, 64, 6)  # another size may fit
    _new_process(monkeypatch)
    proof.ensure(ARCH, GPU, wanted, 4, 6)
    assert fitting == [["loss"]] * 3


def test_what_is_found_is_kept_while_other_forms_are_tried(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any, found: Any, **__: Any) -> Any:
        found("loss", GOOD)
        raise KeyboardInterrupt

    monkeypatch.setattr(proof, "prove", stopped)
    with pytest.raises(KeyboardInterrupt):
        proof._make(ARCH, [("loss", "tf32"), ("forward", "tf32")], [(128, 256)], GPU)
    _new_process(monkeypatch)
    assert verdicts.read(verdicts.key_of(ARCH, "tf32", "loss")) == GOOD
    assert verdicts.read(verdicts.key_of(ARCH, "tf32", "forward")) is None


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
        monkeypatch.setattr(proof, "COMMAND", command(mode))
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
    monkeypatch.setattr(proof, "COMMAND", command("crash"))
    found = wslfast.doctor(ARCH, k=4, n=6, precision="tf32")
    assert list(found) == list(verdicts.FORMS)
    assert all("kernels off for 'tiny'" in line and "SIGSEGV" in line for line in found.values())
    monkeypatch.setattr(proof, "COMMAND", command("right"))
    assert not verdicts.decide(ARCH, "tf32", "loss").on
    found = wslfast.doctor(ARCH, k=4, n=6, precision="tf32")
    assert "kernels on for 'tiny', loss in tf32: kernels, proved on this GPU: 2e+03 ms against torch's 1e+04 (k=4, n=6)" in found["loss"]
    assert verdicts.decide(ARCH, "tf32", "loss").on, "the process's verdict is replaced at once"
    for wrong in ({"precision": "fp8"}, {"k": 0}, {"n": "x"}):
        with pytest.raises(WslfastError, match=next(iter(wrong))):
            wslfast.doctor(ARCH, **wrong)


def test_doctor_for_a_device_that_is_no_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On a machine with one: torch names GPUs alone."""
    from wslfast.cli.doctor import Doctor

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: pytest.fail(f"{device} has no name"))
    Doctor(device="cpu", json=True).run()
    said = json.loads(capsys.readouterr().out)
    assert said["gpu"] == "none"
    assert "cpu is no GPU" in said["kernels"]


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
from pathlib import Path
import torch
import torch.distributed as dist
from wslfast import WslfastError, proof
from wslfast.engine import verdicts
from wslfast.engine.verdicts import RIGHT, Speed, Verdict, judge
dist.init_process_group("gloo")
rank, kind, folder = dist.get_rank(), 0, Path(__file__).parent
# two nodes, the second with two processes; in one case these have GPUs of two kinds
os.environ["GROUP_RANK"] = "0" if rank < 1 else "1"
verdicts.machine = lambda index=None: verdicts.Machine(f"GPU {kind}", "9.0", "1", "2", "3", "4")
for case in ("nodes", "kinds", "settings"):
    kind = rank if case == "kinds" else 0
    os.environ["WSLFAST_KERNELS"] = "off" if case == "settings" and rank == 1 else "auto"
    try:
        looks = proof._looks(torch.device("cuda", 0))
    except WslfastError as error:
        (folder / f"{case} {rank}").write_text(str(error))
        continue
    mine = [Verdict(RIGHT, "", {}, (Speed(4, 4, 2.0, 1.0 + rank * 0.95, "default"),)), Verdict(RIGHT, "", {}, (Speed(4, 4, 2.0, 1.0, "joint"),))]
    agreed = proof._agreed(mine if looks else [None, None], looks)
    (folder / f"{case} {rank}").write_text(f"{'looks' if looks else 'waits'} {[judge(v, 4, 4).on for v in agreed]}")
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
    said = {case: [(tmp_path / f"{case} {rank}").read_text() for rank in range(3)] for case in ("nodes", "kinds", "settings")}
    assert said["nodes"] == ["looks [False, True]", "looks [False, True]", "waits [False, True]"]
    assert said["kinds"] == ["looks [False, True]"] * 3
    assert said["settings"] == ["WSLFAST_KERNELS: expected the same in all processes of a job, got auto, off"] * 3


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
