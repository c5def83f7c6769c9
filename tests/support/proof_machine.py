"""A machine with a GPU that the kernels are for, as far as proofs can tell, and a trial by a stand-in (stub_trial.py)."""

from __future__ import annotations

import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

from wslfast import Architecture, errors, proof
from wslfast.engine import trial, triton_path, verdicts
from wslfast.engine.verdicts import Machine, Verdict
from wslfast.kernels.layers import Activation, Conv2d, Flatten, Linear, Pool2d

ARCH = Architecture.from_layers(
    [Conv2d("a", 1, 3, (3, 3)), Pool2d("b"), Activation("c", "tanh"), Flatten("d"), Linear("e", 12, 3)], (1, 6, 6), "tiny"
)
FLAT = Architecture.from_layers([Linear("a", 5, 3), Activation("b"), Linear("c", 3, 3)], (5,), "flat")
MACHINE = Machine("Test GPU", "9.0", "1", "2", "3", "sources")
ROOT = Path(__file__).resolve().parents[2]
GPU = torch.device("cuda", 0)
COMMAND, INTERPRETED = proof.COMMAND, verdicts.interpreted  # as they are


def command(mode: str) -> list[str]:
    """The stand-in's, ill in one way."""
    return [sys.executable, str(Path(__file__).with_name("stub_trial.py")), mode]


def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make this process believe in the machine; returns the verdicts' folder."""
    monkeypatch.setenv("WSLFAST_CACHE", str(tmp_path))
    monkeypatch.delenv("WSLFAST_KERNELS", raising=False)
    monkeypatch.setattr(verdicts, "interpreted", lambda: False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(verdicts, "machine", lru_cache(lambda index=None: MACHINE))
    monkeypatch.setattr(verdicts, "_known", {})
    monkeypatch.setattr(triton_path, "unbuildable", {})
    monkeypatch.setattr(errors, "_said", set())
    monkeypatch.setattr(proof, "COMMAND", command("right"))
    return tmp_path / "kernels"


def run(job: dict[str, Any]) -> list[dict[str, Any]]:
    """What a trial in this process says."""
    said: list[dict[str, Any]] = []
    trial.run(job, said.append)
    return said


def prove(mode: str, forms: tuple[str, ...] = verdicts.FORMS, limit_s: float = 60.0, **more: Any) -> dict[str, Verdict]:
    """A proof by the stand-in."""
    return proof.prove(ARCH, forms, "tf32", [(4, 6)], GPU, limit_s=limit_s, command=command(mode), **more)
