"""The launchers through Triton's own launch path, on a machine without a GPU: everything but the launch itself.

A stand-in (``benchmarks/kernels/standin.py``) answers what the launch path asks of a GPU; kernels are compiled and their arguments bound,
grids computed, and then nothing runs. Shows what no interpreter can: that launching works at all, how many launches a call makes, and
that one network in one precision has one set of kernels, whatever a caller's tensors look like.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from wslfast.kernels.triton import devices
from wslfast.kernels.triton.configurations import CHOICES, configuration
from wslfast.kernels.triton.schedule import schedule

pytest.importorskip("triton")
ROOT = Path(__file__).parents[3]

SCRIPT = """
import json, sys
import torch
from benchmarks.kernels.standin import standing_in
from kernel_cases import SMALL, count
from wslfast.kernels.triton import launch
from wslfast.kernels.triton.budget import model_bytes
from wslfast.kernels.triton.configurations import CHOICES, tuned
from wslfast.kernels.triton.differentiable import differentiable_forward
from wslfast.kernels.triton.schedule import schedule

layers, shape = SMALL.layers, SMALL.shape
P, planned = count(layers), schedule(layers, shape)
mode, each = sys.argv[1], model_bytes(planned, 64, "fp16", True)
launched, compiled = [], []
def record(l):
    launched.append(l.name)
    if l.new:
        compiled.append(l.name)

def loss(w, n, q=None, **more):
    queries = torch.randn(n, *shape) if q is None else q
    launched.clear(); compiled.clear()
    launch.loss_and_gradient(w, queries, torch.randn(len(w), n, 3), layers, "mse", 2.0, "fp16", mode=mode, **more)
    return len(launched), list(compiled)

def outputs(w, n, graph=False, **more):
    launched.clear(); compiled.clear()
    if not graph:
        launch.forward(w, torch.randn(n, *shape), layers, "fp16", mode=mode, **more)
    else:
        w = w.clone().requires_grad_()
        differentiable_forward(w, torch.randn(n, *shape), layers, "fp16").sum().backward()
    return len(launched), list(compiled)

found = {}
with standing_in("sm_90", planned, record):
    launch.warmup(layers, shape, 64, "mse", "fp16", "cpu", mode=mode)
    found["warmup"] = len(compiled)
    population = torch.randn(64, P)
    found["first"] = loss(population, 64)
    found["fewer models, more queries"] = loss(population[:16].clone(), 100)
    found["population[1:]"] = loss(population[1:], 64)
    found["population[2:]"] = loss(population[2:], 64)
    found["columns of a wider tensor"] = loss(torch.randn(16, 2 * P + 1)[:, 1 : P + 1], 64)
    found["an odd n"] = loss(population, 37)
    found["one model"] = loss(population[:1], 64)
    found["one query"] = loss(population, 1)
    found["channels-last queries"] = loss(population, 64, torch.randn(64, *shape).contiguous(memory_format=torch.channels_last))
    found["a slice of queries"] = loss(population, 32, torch.randn(65, *shape)[1::2])
    found["each model's own"] = loss(population, 8, torch.randn(64, 8, *shape))
    found["rows of a pool"] = loss(population, 6, torch.randn(50, *shape), index=torch.zeros(64, 6, dtype=torch.long))
    found["rows of a pool, of some models"] = loss(population[3:], 6, torch.randn(50, *shape), index=torch.zeros(64, 6, dtype=torch.int32)[3:])
    found["chunks"] = loss(population, 64, memory=9 * each)
    found["small chunks"] = loss(population, 64, memory=3 * each)
    found["outputs"] = outputs(population, 37)
    found["outputs in chunks"] = outputs(population[1:], 37, memory=5 * each)
    launch.warmup(layers, shape, 64, "gradient", "fp16", "cpu")  # those name no mode, and take either
    found["outputs with a graph"] = outputs(population, 7, graph=True) if mode == "layers" else [0, []]
    if mode == "layers":
        found["outputs of an odd population"] = outputs(population[5:], 3)
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", [pytest.param("layers", marks=pytest.mark.thorough), "network"])
def test_one_network_one_precision_one_set_of_kernels(mode: str) -> None:
    """Counted: neither sizes, alignments, strides, chunks nor forms of a call compile anything after ``warmup``."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support"), environment.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", SCRIPT, mode], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    warm = found.pop("warmup")
    assert 0 < warm <= (30 if mode == "layers" else 14), warm
    again = {name: compiled for name, (_, compiled) in found.items() if compiled}
    assert not again, again
    launches = {name: launched for name, (launched, _) in found.items()}
    if mode == "network":
        assert launches["first"] == 3  # prepare, the network, reduce
        assert launches["outputs"] == 2
    else:
        assert launches["first"] <= 12
        assert launches["chunks"] > launches["first"]


# -- which GPUs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("capability", "unit"), [((8, 0), "warp"), ((8, 6), "warp"), ((8, 9), "warp"), ((9, 0), "warpgroup"),
                                                  ((10, 0), "warpgroup"), ((11, 0), "warpgroup"), ((12, 0), "warp"), ((13, 0), "warp")])  # fmt: skip
def test_the_matrix_unit_decides_the_tiles(capability: tuple[int, int], unit: str) -> None:
    assert devices.matrix_unit(capability) == unit
    assert devices.refusal("a GPU", capability, rocm=False) is None


def test_what_the_kernels_are_not_for_says_why() -> None:
    assert "compute capability 7.5: the kernels need 8.0 or newer" in str(devices.refusal("Tesla T4", (7, 5), rocm=False))
    assert "AMD GPU" in str(devices.refusal("gfx942", (9, 4), rocm=True))


def test_hopper_and_the_others_get_tiles_of_their_own() -> None:
    from kernel_cases import cnn3

    stage = schedule(cnn3().layers, (3, 32, 32)).stages[1]
    hopper, others = (configuration("dx", stage, "tf32", unit) for unit in ("warpgroup", "warp"))
    assert hopper.BM > others.BM
    assert set(CHOICES) == {"default", "pipelined", "joint"}
