"""No GPU, no Triton, kernels that cannot be built, a cache that cannot be written: one warning with the reason and the same numbers."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from matrix import reached
from training_runs import ARCH

from wslfast import WslfastError, batched_behavioral_loss, batched_forward, engine, errors
from wslfast.engine import chunks, device_errors, paths, triton_path, verdicts
from wslfast.engine.memory import memory_budget

WEIGHTS = ARCH.initial_weights(["kaiming_normal"] * 5, range(5))
QUERIES = torch.randn(7, 1, 8, 8, generator=torch.Generator().manual_seed(0))
TARGETS = torch.randn(5, 7, 3, generator=torch.Generator().manual_seed(1))


class CompilationError(Exception):
    """As Triton's own: it is recognised by its module."""


CompilationError.__module__ = "triton.compiler.errors"
FAILURES: dict[str, Exception] = {
    "compile error": CompilationError("at 3:4: invalid operand"),
    "a GPU too small": type("OutOfResources", (Exception,), {"__module__": "triton.runtime.errors"})("shared memory, required 300000"),
    "no C compiler": RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
    "gcc fails": subprocess.CalledProcessError(1, ["gcc", "main.c"]),
    "read-only cache": PermissionError(13, "Permission denied", "/root/.triton/cache"),
    "full disk": OSError(28, "No space left on device"),
    "broken installation": ImportError("libtriton.so: undefined symbol"),
}


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice that a GPU whose kernels are verified would get, for tensors on the CPU."""
    real = engine.choose

    def choose(architecture: Any, device: str, *rest: Any) -> paths.Path:
        return real(architecture, "cuda", *rest)

    monkeypatch.setattr(engine, "choose", choose)
    monkeypatch.setenv("WSLFAST_KERNELS", "on")
    monkeypatch.setattr(verdicts, "interpreted", lambda: False)
    monkeypatch.setattr(triton_path, "unbuildable", {})
    monkeypatch.setattr(device_errors, "_ran", {})
    monkeypatch.setattr(errors, "_said", set())


def _loss(backend: str = "auto") -> tuple[torch.Tensor, torch.Tensor]:
    rows = WEIGHTS.clone().requires_grad_()
    value = batched_behavioral_loss(rows, None, QUERIES, ARCH, targets=TARGETS, reduction="none", backend=backend)
    return value.detach(), torch.autograd.grad(value.sum(), rows)[0]


def _broken(monkeypatch: pytest.MonkeyPatch, failure: Exception) -> list[str]:
    """Kernels that fail in this way when they are first launched; returns the attempts."""
    attempts: list[str] = []

    def load(*_: str) -> Any:
        attempts.append("kernels")
        raise failure

    monkeypatch.setattr(triton_path, "kernels", load)
    return attempts


@pytest.mark.parametrize("failure", FAILURES)
def test_kernels_that_cannot_be_built_are_replaced_with_one_warning(
    as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, failure: str
) -> None:
    expected = _loss("torch"), batched_forward(WEIGHTS, QUERIES, ARCH, backend="torch")
    attempts = _broken(monkeypatch, FAILURES[failure])
    caplog.set_level(logging.INFO, "wslfast")
    for _ in range(3):
        for a, b in zip(_loss(), expected[0], strict=True):
            assert torch.equal(a, b)
        assert torch.equal(batched_forward(WEIGHTS, QUERIES, ARCH), expected[1])
    assert len(attempts) == 1  # not tried again at every call
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert type(FAILURES[failure]).__name__ in warning
    assert str(FAILURES[failure]).splitlines()[0][:60] in warning
    with pytest.raises(WslfastError, match="backend='triton' cannot run this"):
        batched_forward(WEIGHTS, QUERIES, ARCH, backend="triton")
    if failure == "broken installation":
        reached("backends", "ways for kernels not to be built: one warning, equal numbers, backend='triton' raises", len(FAILURES), "all")


@pytest.mark.parametrize("failure", FAILURES)
def test_asked_for_by_name_they_raise_at_once(as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch, failure: str) -> None:
    _broken(monkeypatch, FAILURES[failure])
    with pytest.raises(WslfastError, match="backend='triton' cannot run this: they cannot be built here"):
        _loss("triton")


@pytest.mark.parametrize(
    "error",
    [AssertionError("wrong result"), RuntimeError("expected 3 channels"), torch.OutOfMemoryError("CUDA")],
    ids=lambda e: type(e).__name__,
)
def test_other_errors_of_kernels_are_not_hidden(as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    _broken(monkeypatch, error)
    with pytest.raises(type(error)):
        batched_forward(WEIGHTS, QUERIES, ARCH)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("PassManager::run failed"),
        IndexError("map::at"),
        AssertionError("ptr layout"),
        ValueError("line 3\n  ^\nwhy it is not so"),
    ],
    ids=lambda e: type(e).__name__,
)
def test_whatever_the_compiler_ends_in_is_a_failure_to_build(as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Its own classes are the least of it: what counts is that one of Triton's frames raised it; and the reason is in the last line."""
    compiler: dict[str, Any] = {"__name__": "triton.compiler.compiler", "error": error}
    exec("def compile(*_): raise error", compiler)
    monkeypatch.setattr(triton_path, "kernels", compiler["compile"])
    with pytest.raises(WslfastError, match=f"cannot be built here: {type(error).__name__}: .*{str(error).splitlines()[-1]}"):
        _loss("triton")
    assert torch.equal(_loss()[1], _loss("torch")[1])


@pytest.mark.parametrize("words", ["CUDA error: an illegal memory access was encountered", "Triton Error [CUDA]: misaligned address"])
def test_a_device_error_turns_the_kernels_off(as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: str) -> None:
    monkeypatch.setenv("WSLFAST_CACHE", str(tmp_path))
    monkeypatch.setattr(verdicts, "_known", {})
    _broken(monkeypatch, RuntimeError(words))
    with pytest.raises(WslfastError, match=r"WSLFAST_KERNELS=auto\|on\|off.*start it again") as raised:
        _loss()
    assert words in str(raised.value)
    monkeypatch.setenv("WSLFAST_KERNELS", "auto")
    verdicts.forget()  # as the next process
    decision = verdicts.decide(ARCH, "tf32x3", "loss")
    assert not decision.on
    assert words in decision.reason
    assert verdicts.decide(ARCH, "tf32x3", "forward").proved is False  # another form: nobody has looked
    assert torch.equal(_loss()[1], _loss("torch")[1])


def test_no_triton_is_one_warning(as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    expected = _loss("torch")
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "triton" else real(name, *rest))
    for _ in range(2):
        for a, b in zip(_loss(), expected, strict=True):
            assert torch.equal(a, b)
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == [
        "wslfast: no Triton kernels for architecture 'tiny': triton is not installed; using torch"
    ]
    with pytest.raises(WslfastError, match="triton is not installed"):
        _loss("triton")


CODE = """
import json, sys
if "without" in sys.argv:
    sys.modules["triton"] = None
import torch
sys.path.insert(0, "FOLDER")
from test_backends import ARCH, QUERIES, WEIGHTS, _loss
from wslfast import WslfastError, batched_forward
said = ""
try:
    batched_forward(WEIGHTS, QUERIES, ARCH, backend="triton")
except WslfastError as error:
    said = str(error)
value, gradient = _loss()
print(json.dumps({"error": said, "values": value.tolist(), "gradient": gradient.sum(1).tolist(), "cuda": torch.cuda.is_available()}))
""".replace("FOLDER", str(Path(__file__).parent))


def _process(*arguments: str, **environment: str) -> dict[str, Any]:
    path = {"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", CODE, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **path, **environment},
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("state", ["no Triton", "no GPU and a read-only cache"])
def test_a_process_without_them_gives_the_same_numbers(tmp_path: Path, state: str) -> None:
    """Whole processes, tensors on the CPU: there is nothing to warn of, and an explicit request says why it cannot be met."""
    nowhere = dict.fromkeys(("TRITON_CACHE_DIR", "HOME", "XDG_CACHE_HOME"), "/proc/nowhere")
    found = _process("without") if state == "no Triton" else _process(**nowhere)
    value, gradient = _loss()
    assert found["values"] == value.tolist()
    assert found["gradient"] == gradient.sum(1).tolist()
    assert found["error"].startswith("backend='triton' cannot run this: ")
    assert not found["cuda"]
    reached("backends", f"a process with {state}: the same numbers", 1, 1)


def test_kernels_that_run_out_of_memory_take_smaller_chunks(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("WSLFAST_MEMORY_MB", "1000")
    monkeypatch.setattr(errors, "_said", set())
    tried: list[int] = []

    def run(memory: int) -> str:
        tried.append(memory >> 20)
        if memory > most << 20:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.00 GiB")
        return "done"

    most = 300
    with caplog.at_level(logging.WARNING, "wslfast"):
        assert chunks.fitting(memory_budget("cuda"), run) == "done"
    assert tried == [1000, 500, 250]
    assert "WSLFAST_MEMORY_MB" in caplog.text
    tried.clear()
    most = 1
    with pytest.raises(torch.OutOfMemoryError):
        chunks.fitting(memory_budget("cuda"), run)
    assert tried == [1000, 500, 250, 125, 62]
