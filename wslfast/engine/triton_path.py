"""The path on Triton kernels. Imported only where it was chosen, as the kernels import Triton."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from ..architecture import Architecture
from ..errors import say_once
from ..kernels.criteria import Named
from ..kernels.triton import budget
from ..kernels.triton.schedule import schedule
from .memory import memory_budget
from .paths import by_autograd, gathered, per_model

_T = TypeVar("_T")
unbuildable: dict[Architecture, str] = {}  # whose kernels failed to build in this process, and why


class Unbuildable(Exception):
    """The kernels of an architecture cannot be built on this machine; :data:`unbuildable` holds why."""


@dataclass(frozen=True)
class Triton:
    """Plain chains on a GPU: all models in one launch a layer, or in one launch."""

    architecture: Architecture
    reason: str
    name: ClassVar[str] = "triton"

    def forward(self, weights: Tensor, queries: Tensor, graph: bool) -> Tensor:
        outputs = self._built(lambda: self._run(weights, queries))
        return outputs.to(torch.get_autocast_dtype("cuda")) if torch.is_autocast_enabled("cuda") else outputs

    def _run(self, weights: Tensor, queries: Tensor) -> Tensor:
        """Outputs in float32, with a graph where autograd records one."""
        return kernels().differentiable_forward(
            weights, queries, self.architecture.layers, kernel_precision(), memory=memory_budget("cuda")
        )

    def loss_and_gradient(
        self, weights: Tensor, queries: Tensor, targets: Tensor, criterion: Named, temperature: float, index: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        precision, memory = kernel_precision(), memory_budget("cuda")
        self._say_mode(queries.shape[int(per_model(queries, self.architecture))] if index is None else index.shape[1], precision)

        def run() -> tuple[Tensor, Tensor]:
            made, layers = kernels(), self.architecture.layers
            if isinstance(criterion, str) and criterion in made.CRITERIA:
                return made.loss_and_gradient(
                    weights, queries, targets, layers, criterion, temperature, precision, index=index, memory=memory
                )
            if index is not None:
                return gathered(self, weights, queries, targets, index, self.architecture, criterion, temperature)
            return by_autograd(self._run, weights, queries, targets, self.architecture, criterion, temperature)

        return self._built(run)

    def _say_mode(self, n: int, precision: str) -> None:
        """Why the kernels leave their usual way, a launch a layer."""
        planned = schedule(self.architecture.layers, self.architecture.input_shape)
        mode, reason = budget.choose_mode(planned, n, precision, True, memory_budget("cuda"))
        if mode == "network":
            say_once(f"wslfast: {self.architecture.name!r} runs as a whole network in one launch: {reason}", logging.INFO)

    def _built(self, run: Callable[[], _T]) -> _T:
        """What ``run`` gives. Raises Unbuildable where its kernels cannot be built on this machine."""
        try:
            return run()
        except Exception as error:
            triton = type(error).__module__.partition(".")[0] == "triton"  # its compiler, or a kernel that wants more than the GPU has
            system = isinstance(error, (ImportError, OSError, subprocess.CalledProcessError))  # a broken install, a read-only cache, gcc
            if not (triton or system or "C compiler" in str(error)):
                raise
            first = (str(error).strip() or "no message").splitlines()[0]
            unbuildable[self.architecture] = f"they cannot be built here: {type(error).__name__}: {first:.200}"
        raise Unbuildable


def kernels() -> ModuleType:
    """The kernels' functions; importing them imports Triton."""
    from ..kernels.triton import launch

    return launch


def kernel_precision() -> str:
    """What the kernels compute in: autocast's dtype, else torch's float32 matmul precision."""
    if torch.is_autocast_enabled("cuda"):
        return "bf16" if torch.get_autocast_dtype("cuda") == torch.bfloat16 else "fp16"
    if torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    say_once(
        "wslfast: float32 matmul precision is 'highest': the kernels take three TF32 products for each; "
        'torch.set_float32_matmul_precision("high") takes one',
        logging.INFO,
    )
    return "tf32x3"
