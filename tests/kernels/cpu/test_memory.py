"""Memory: fresh, of the shape and type asked for, whole and anybody's own; what is freed stays with the process, in every thread."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import wslfast
from wslfast.kernels.cpu import memory

CALLS = """
import resource
import torch
from torch import nn
import wslfast

class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.inner = nn.Sequential(
            nn.Conv2d(width, width, 3, 1, 1), nn.GroupNorm(4, width), nn.ReLU(), nn.Conv2d(width, width, 3, 1, 1), nn.GroupNorm(4, width)
        )
    def forward(self, x):
        return torch.relu(x + self.inner(x))

net = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1), nn.ReLU(), Block(16), Block(16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
arch = wslfast.Architecture.from_module(net, (3, 32, 32))
weights = arch.initial_weights(["kaiming_uniform"] * 16, range(16)).requires_grad_()
queries, targets = torch.randn(32, 3, 32, 32), torch.randn(16, 32, 10)

def call():
    wslfast.batched_behavioral_loss(weights, None, queries, arch, targets=targets).backward()
    weights.grad = None

for _ in range(4):
    call()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    call()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 4)
"""


@pytest.mark.parametrize("numbers", [0, 1, 1000, (33 << 20) // 4, (70 << 20) // 4 + 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fresh_memory_can_be_written_and_read(numbers: int, dtype: torch.dtype) -> None:
    like = torch.empty(0, dtype=dtype).expand(0) if numbers == 0 else torch.empty(1, dtype=dtype).expand(numbers)
    made = memory.fresh_like(like)
    assert (made.shape, made.dtype, made.is_contiguous()) == (like.shape, dtype, True)
    made.fill_(3.5)
    other = memory.fresh_like(like).fill_(1.0)
    assert bool((made == 3.5).all())
    assert bool((other == 1.0).all())


def test_a_transposed_tensor_gives_contiguous_memory() -> None:
    made = memory.fresh_like(torch.empty(7, 5).T)
    assert (tuple(made.shape), made.is_contiguous()) == ((5, 7), True)


def test_a_system_that_gives_no_large_pages_gives_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(memory, "_LARGE", 100)
    monkeypatch.setattr(memory, "_advise", lambda: lambda address, size, advice: asked.append(size.value) or -1)
    assert memory.fresh_like(torch.empty(10_000)).fill_(2.0).sum() == 20_000
    assert len(asked) == 1
    assert asked[0] <= 40_000
    monkeypatch.setattr(memory, "_advise", lambda: None)
    assert memory.fresh_like(torch.empty(10_000)).fill_(2.0).sum() == 20_000


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="how other libraries keep memory is their own")
def test_threads_keep_what_groups_free() -> None:
    """Pages that are new to the process, a call of groups that take more than a heap each: a good ten thousand where heaps are handed back."""
    environment = {name: value for name, value in os.environ.items() if name not in ("MALLOC_TOP_PAD_", "GLIBC_TUNABLES")}
    where = Path(wslfast.__file__).parent.parent
    code = [sys.executable, "-c", CALLS]
    ended = subprocess.run(code, capture_output=True, text=True, cwd=where, env={**environment, "OMP_NUM_THREADS": "2"})
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) < 3000


@pytest.mark.parametrize(("name", "value"), [("MALLOC_TOP_PAD_", "131072"), ("GLIBC_TUNABLES", "glibc.malloc.top_pad=131072")])
def test_what_somebody_has_decided_stays(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(memory.ctypes, "CDLL", asked.append)
    monkeypatch.setenv(name, value)
    memory.keep_freed_memory.__wrapped__()
    assert not asked


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MALLOC_TOP_PAD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    memory.keep_freed_memory.__wrapped__()
