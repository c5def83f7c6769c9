"""Resources of every shipped kernel, compiled for GPUs that are not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from benchmarks.kernels import inspect
from benchmarks.kernels.standin import number
from wslfast import Architecture
from wslfast.kernels.triton.configurations import joins
from wslfast.kernels.triton.devices import matrix_unit
from wslfast.kernels.triton.schedule import schedule

ROOT = Path(__file__).parents[3]
SHARED_LIMIT = 99 * 1024  # what a block gets on the smaller GPUs of sm_80's family
# Bytes of stack: none on Hopper; elsewhere up to 16 (joint: 24) where the assembler makes room for one more program on a multiprocessor.
SPILLS = {"forward": 0, "dx": 0, "dw": 0, "joint": 0, "layout": 0, "tail": 512, "network_forward": 512, "network_loss": 2048}
LAYERS, WHOLE = ("forward", "dx", "dw", "joint", "tail"), ("network_forward", "network_loss")


def _run(*arguments: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support"), environment.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_layer_lists_are_the_architectures() -> None:
    for name, (layers, shape) in inspect.ARCHITECTURES.items():
        architecture = getattr(Architecture, name)()
        assert Architecture.from_layers(layers, shape, name) == architecture
        assert schedule(layers, shape) == schedule(architecture.layers, shape)


def test_refuses_to_run_interpreted() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "benchmarks.kernels.inspect"], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 2
    assert "TRITON_INTERPRET" in done.stderr


def _check(row: dict[str, Any]) -> list[str]:
    wrong = []
    room = row["target"] != "sm_90" and row["registers"] <= 168 and row["precision"] != "tf32x3"
    frame = (24 if row["role"] == "joint" else 16) if room else 0
    if row["spill_bytes"] > max(SPILLS[row["role"]], frame):
        wrong.append(f"{row['spill_bytes']} bytes of spills")
    if row["shared_bytes"] > SHARED_LIMIT:
        wrong.append(f"{row['shared_bytes']} bytes of shared memory")
    if row["dots"] and row["mma"] not in inspect.MMA.values():
        wrong.append("matrix products without tensor cores")
    return wrong


def _rows(*arguments: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in _run("-m", "benchmarks.kernels.inspect", "--json", *arguments).splitlines()]
    assert all(tuple(row) == inspect.FIELDS for row in rows)
    wrong = {(r["architecture"], r["precision"], r["kernel"]): _check(r) for r in rows if _check(r)}
    assert not wrong, wrong
    return rows


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("architecture", list(inspect.ARCHITECTURES))
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_120"])
def test_three_products_of_tf32_spill_nothing(architecture: str, target: str) -> None:
    rows = _rows("--target", target, "--architecture", architecture, "--precision", "tf32x3", "--role", *LAYERS)
    assert {r["role"] for r in rows} >= set(LAYERS) - {"joint"}
    assert not [r for r in rows if r["spill_bytes"] and r["role"] != "tail"]


def test_a_whole_network_compiles() -> None:
    (row,) = _rows("--architecture", "cnn", "--precision", "fp16", "--role", "network_forward")
    assert row["dots"]
    assert row["mma"] == "HGMMA"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("target", inspect.TARGETS)
@pytest.mark.parametrize("roles", [(*LAYERS, "layout"), WHOLE], ids=["layers", "network"])
def test_resources(target: str, roles: tuple[str, ...]) -> None:
    rows = _rows("--target", target, "--role", *roles)
    covered = {(r["role"], r["architecture"], r["precision"]) for r in rows}
    for role in set(roles) - {"layout"}:
        for architecture in inspect.ARCHITECTURES:
            for precision in ("fp16", "tf32"):
                if role == "joint" and not joins(
                    schedule(*inspect.ARCHITECTURES[architecture]), precision, matrix_unit(divmod(number(target), 10))
                ):
                    continue
                assert (role, architecture, precision) in covered
    if target == "sm_90":  # the big products use Hopper's own instruction
        big = ("forward 1", "dw 1", "dx 1", *WHOLE)
        assert all(r["mma"] == "HGMMA" for r in rows if r["architecture"] == "cnn3" and r["kernel"] in big)


COMPILE = """
import sys
from kernel_cases import CASES
from benchmarks.kernels import inspect
from benchmarks.kernels.standin import number
for name in sys.argv[2:]:
    inspect.ARCHITECTURES[name] = (CASES[name].layers, CASES[name].shape)
for row in inspect.rows("sm_90", (sys.argv[1],), tuple(sys.argv[2:])):
    assert row["shared_bytes"] <= 227 * 1024, row
    print(row["kernel"])
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_every_branch_compiles(precision: str) -> None:
    """The interpreter runs Python; this shows that the compiler accepts what it ran."""
    names = {
        "fp16": ["stride_2_and_pool", "act_then_average", "gelu_before_max", "elu_celu"],
        "bf16": ["average_then_act", "silu_before_max", "activation_last"],
    }
    assert _run("-c", COMPILE, precision, *names[precision]).splitlines()


FORMS = """
import torch
from benchmarks.kernels.standin import standing_in
from kernel_cases import SMALL
from wslfast.kernels.triton import launch
from wslfast.kernels.triton.schedule import schedule
planned, layers = schedule(SMALL.layers, SMALL.shape), SMALL.layers
w, own, pool = torch.zeros(2, planned.parameters), torch.zeros(2, 3, *SMALL.shape), torch.zeros(3, *SMALL.shape)
index, y, labels = torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3, 3), torch.zeros(2, 3, dtype=torch.long)
def loss(q, y, criterion, **more):
    launch.loss_and_gradient(w, q, y, layers, criterion, 2.0, "fp16", mode="network", **more)
with standing_in("sm_90", planned, lambda l: print(l.name, l.compiled.metadata.shared) if l.new and l.role.startswith("network") else None):
    launch.forward(w, own, layers, "fp16", mode="network")
    launch.forward(w, pool, layers, "fp16", mode="network", index=index)
    loss(pool, labels, "cross_entropy", index=index)
    loss(own, y, "distillation")
    for criterion in ("gradient", "softmax_mse", "cross_entropy"):
        loss(pool, y, criterion)
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_form_of_the_whole_network_compiles() -> None:
    assert len(_run("-c", FORMS).splitlines()) == 7
