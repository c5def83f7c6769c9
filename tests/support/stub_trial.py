"""A trial of kernels that are none: ``python tests/support/stub_trial.py MODE``, with MODE what is wrong with them. Runs on a CPU, with a clock
that counts calls and not time."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from wslfast.engine import trial
from wslfast.engine.paths import Loop
from wslfast.engine.triton_path import Triton, Unbuildable, unbuildable

ELAPSED = 0.0


@dataclass(frozen=True)
class Stub:
    """The loop, ill in one way."""

    architecture: Any
    choice: str
    seconds: float
    mode: str = ""
    name: ClassVar[str] = "stub"
    reason: ClassVar[str] = "a test"

    def _run(self, results: tuple[Tensor, ...], form: str) -> tuple[Tensor, ...]:
        global ELAPSED
        ELAPSED += self.seconds
        mode, _, where = self.mode.partition("@")
        if where and where not in (form, self.choice):
            return results
        if mode == "wrong":
            return tuple(r * 1.1 for r in results)
        if mode == "noisy":
            return tuple(r * (1 + 1e-6 * torch.rand(())) for r in results)
        if mode == "bad neighbour":
            return tuple(r + r[trial.BROKEN].sum() * 0 for r in results)
        if mode == "hides NaN":
            return tuple(r.nan_to_num(nan=0.0) for r in results)
        if mode == "unwritten":
            return tuple(torch.cat([r[:, :-1], torch.empty_like(r[:, -1:])], 1) if r.ndim > 1 else r for r in results)
        if mode == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if mode == "exit":
            sys.stderr.write("LLVM ERROR: out of registers\n")
            os._exit(70)
        if mode == "chatty":  # what a compiler prints, and what a library's C code does to the first lines of a pipe
            os.write(1, b"\xff\xfe no line end ")
            print("wslfast-trial:{", end="", flush=True)
        if mode == "hang":
            time.sleep(600)
        if mode == "unbuildable":
            unbuildable[self.architecture] = "they cannot be built here: no such luck"
            raise Unbuildable
        if mode == "raises":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if mode == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return results

    def forward(self, weights: Tensor, queries: Tensor, graph: bool) -> Tensor:
        return self._run((Loop(self.architecture, "").forward(weights, queries, graph),), "forward")[0]

    def loss_and_gradient(self, weights: Tensor, queries: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        form = "loss" if rest[-1] is None else "indexed"
        losses, gradient = self._run(Loop(self.architecture, "").loss_and_gradient(weights, queries, *rest), form)
        return losses, gradient


def install(mode: str, put: Callable[[Any, str, Any], None] = setattr) -> None:
    """Make ``trial`` try the stand-in for kernels; ``put`` as setattr."""

    def kernels(architecture: Any, choice: str) -> Any:
        if mode == "interpreter":
            return Triton(architecture, "a test", choice)
        seconds = {"default": 3.0, "pipelined": 2.0, "joint": 5.0}[choice] * (10 if mode == "slow" else 1)
        return Stub(architecture, choice, seconds, mode)

    put(trial, "kernels", kernels)
    put(trial, "torch_path", lambda architecture, device, form: Stub(architecture, "torch", 10.0))
    put(trial, "clock", lambda: ELAPSED)
    if mode == "busy":  # what CUDA says in exclusive-process mode
        zeros = torch.zeros

        def refused(*a: Any, device: Any = None, **kw: Any) -> Tensor:
            if str(device).startswith("cuda"):
                raise RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable\nCompile with ...")
            return zeros(*a, device=device, **kw)

        put(torch, "zeros", refused)


if __name__ == "__main__":
    install(sys.argv[1])
    job = json.loads(sys.stdin.readline())
    job["device"] = "cpu"
    trial.serve(job)
