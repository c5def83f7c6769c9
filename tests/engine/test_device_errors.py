"""Faults of a GPU show late, wherever somebody waits: what kernels ran is off from then on, and a user learns how to go on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_runs import ARCH, config

import wslfast
from wslfast import Population, WslfastError, proof
from wslfast.engine import device_errors, verdicts
from wslfast.engine.verdicts import FAILED, Decision, Verdict
from wslfast.training import loop
from wslfast.training.checkpoint import load_checkpoint

FAULT = "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be asynchronously reported"
ASSERT = "CUDA error: device-side assert triggered\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions."


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WSLFAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("WSLFAST_KERNELS", raising=False)
    monkeypatch.setattr(verdicts, "_known", {})
    monkeypatch.setattr(verdicts, "interpreted", lambda: False)
    monkeypatch.setattr(device_errors, "_ran", {})
    return tmp_path / "cache" / "kernels"


def _status(form: str, monkeypatch: pytest.MonkeyPatch) -> Decision:
    """As another process sees it."""
    monkeypatch.setattr(verdicts, "_known", {})
    return verdicts.decide(ARCH, "tf32", form)


def test_a_fault_that_shows_later_is_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    device_errors.ran(ARCH, "tf32", "loss", None)
    device_errors.ran(ARCH, "tf32", "forward", None)
    with pytest.raises(WslfastError, match=r"illegal memory access.*start it again") as raised, device_errors.watched():
        raise RuntimeError(FAULT)  # out of loss.item(), say
    assert "WSLFAST_KERNELS=auto|on|off" in str(raised.value)
    assert "\n" not in str(raised.value)
    for form in ("loss", "forward"):
        decision = _status(form, monkeypatch)
        assert (decision.on, decision.proved) == (False, True)
        assert "illegal memory access" in decision.reason
    assert not _status("indexed", monkeypatch).proved, "what did not run is not blamed"


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), torch.OutOfMemoryError("CUDA out of memory"), KeyError("x")])
def test_other_errors_pass(error: Exception, own_cache: Path) -> None:
    device_errors.ran(ARCH, "tf32", "loss", None)
    with pytest.raises(type(error)), device_errors.watched():
        raise error
    assert not own_cache.exists()


def test_without_kernels_nobody_is_blamed(own_cache: Path) -> None:
    with pytest.raises(RuntimeError, match="illegal memory access"), device_errors.watched():
        raise RuntimeError(FAULT)
    assert not own_cache.exists()


def test_an_assertion_is_an_operators_own(own_cache: Path) -> None:
    """torch's operators check indices on the device; our kernels assert nothing."""
    device_errors.ran(ARCH, "tf32", "loss", None)
    with pytest.raises(WslfastError, match="such as an index") as raised, device_errors.watched():
        raise RuntimeError(ASSERT)
    assert "start it again" in str(raised.value)
    assert not own_cache.exists()


EXIT = """
import sys
import torch
from wslfast.engine import device_errors
sys.path.insert(0, sys.argv[1])
from training_runs import ARCH
torch.cuda.is_initialized = lambda: True
def synchronize(device=None):
    raise RuntimeError(sys.argv[2])
torch.cuda.synchronize = synchronize
if sys.argv[3] == "trial":
    device_errors.on_trial()
device_errors.ran(ARCH, "tf32", "loss", None)
"""


@pytest.mark.parametrize(
    ("words", "mode", "files"), [(FAULT, "", 1), (ASSERT, "", 0), (FAULT, "trial", 0)], ids=["fault", "assert", "trial"]
)
def test_the_end_of_a_process_is_waited_for(words: str, mode: str, files: int, own_cache: Path) -> None:
    support = str(Path(__file__).parents[1] / "support")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", EXIT, support, words, mode], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    kept = list(own_cache.glob("*.json")) if own_cache.exists() else []
    assert len(kept) == files, done.stderr
    assert ("WSLFAST_KERNELS=auto|on|off" in done.stderr) == bool(files)
    for file in kept:
        assert json.loads(file.read_text())["verdict"]["status"] == FAILED


def test_a_run_that_died_of_its_kernels_goes_on_without_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    population = Population(ARCH, ARCH.initial_weights(["kaiming_normal"] * 20, range(20)))
    images = torch.randn(48, *ARCH.input_shape)
    graph = verdicts.graph_digest(ARCH)
    on = {(graph, "tf32", form): Decision(True, "proved", "joint") for form in ("loss", "forward")}
    monkeypatch.setattr(loop, "ensure", lambda *_: on)
    wslfast.train(config(tmp_path, steps=1), population=population, images=images)

    monkeypatch.setattr(verdicts, "key_of", lambda a, precision, form, index=None: verdicts.Key(verdicts.machine(), graph, precision, form))
    verdicts.keep(verdicts.key_of(ARCH, "tf32", "loss"), Verdict(FAILED, "a call ended in a device error: it was"))
    left = proof.standing(ARCH, torch.device("cuda", 0), on)
    assert {key[2]: d.on for key, d in left.items()} == {"loss": False, "forward": True}
    assert "it was" in left[graph, "tf32", "loss"].reason
    assert proof.standing(ARCH, torch.device("cpu"), on) == on

    monkeypatch.setattr(
        loop, "standing", lambda architecture, device, decisions: proof.standing(architecture, torch.device("cuda", 0), decisions)
    )
    wslfast.train(config(tmp_path, steps=2), population=population, images=images, resume=True)
    saved = {form: verdicts.decision_from(record) for _, _, form, record in load_checkpoint(tmp_path)["kernels"]}
    assert {form: d.on for form, d in saved.items()} == {"loss": False, "forward": True}, "and its checkpoint keeps that"
