"""The launchers through Triton's own launch path, on a machine without a GPU: everything but the launch itself.

A stand-in driver answers what the launch path asks of a GPU; kernels are compiled and their arguments bound, grids computed,
and then nothing runs. Shows what no interpreter can: that launching works at all, how many launches a call makes, and that
neither k nor n compiles a kernel again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[3]

SCRIPT = """
import collections, json, sys, time
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

class Driver:
    launcher_cls = None
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_active_torch_device(self): return torch.device("cpu")

triton.runtime.driver.set_active(Driver())
run, launched, grids = JITFunction.run, collections.Counter(), []

def bind(self, *arguments, grid, warmup, **options):
    launched[self.fn.__name__] += 1
    grids.append(grid)
    return run(self, *arguments, grid=grid, warmup=True, **options)

JITFunction.run = bind
from benchmarks.kernels import inspect
from wslfast.kernels import layers as records
from wslfast.kernels.triton import launch
from wslfast.kernels.triton.network import network_forward_kernel, network_loss_kernel
layers, shape = inspect.ARCHITECTURES["cnn3"]

def call(k, n):
    launched.clear()
    weights, targets = torch.randn(k, 10853), torch.randn(k, n, 10)
    launch.loss_and_gradient(weights, torch.randn(n, *shape), targets, layers, "mse", 2.0, "fp16")
    return dict(launched)

def variants():
    kernels = (launch.stage_forward.__globals__[name] for name in ("forward_kernel", "dw_kernel", "dx_kernel"))
    return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

def whole(k, n):
    launched.clear()
    weights, targets = torch.randn(k, 30), torch.randn(k, n, 3)
    launch.loss_and_gradient(weights, torch.randn(n, 5), targets, MLP, "mse", 2.0, "fp16", mode="network")
    both = dict(launched)
    launched.clear()
    launch.forward(weights, torch.randn(n, 5), MLP, "fp16", mode="network")
    return [both, dict(launched)]

MLP = (records.Linear("a", 5, 3), records.Activation("b"), records.Linear("c", 3, 3))
network = whole(3, 7)
whole(300, 70), whole(1, 1), whole(5, 256)
whole_variants = sum(len(c[0]) for k in (network_forward_kernel, network_loss_kernel) for c in k.device_caches.values())
first = call(3, 7)
before = variants()
call(16, 64), call(1, 1), call(5, 256)
time_began = time.perf_counter()
for _ in range(20):
    call(5, 256)
host = (time.perf_counter() - time_began) / 20
print(json.dumps({"launched": first, "before": before, "after": variants(), "host": host, "network": network, "whole_variants": whole_variants,
                  "grids": all(0 < g[0] < 2**31 for g in grids)}))
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_launches_without_a_gpu() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert sum(found["launched"].values()) <= 12, found["launched"]
    assert found["after"] == found["before"] == 3 + 3 + 2, "k or n compiled a kernel again"
    assert found["grids"]
    both, forward = found["network"]
    assert both == {"prepare_kernel": 1, "network_loss_kernel": 1, "reduce_kernel": 1}
    assert forward == {"prepare_kernel": 1, "network_forward_kernel": 1}
    assert found["whole_variants"] == 2, "k or n compiled a whole-network kernel again"
    assert found["host"] < 0.05, "binding arguments takes longer than the work"
