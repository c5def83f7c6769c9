"""The path on Triton kernels. Imported only where it was chosen, as the kernels import Triton."""

from __future__ import annotations

import importlib
import logging
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from types import ModuleType
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from ..architecture import Architecture
from ..errors import say_once
from ..kernels.criteria import Averaged, Named
from ..kernels.layers import Unplannable
from ..kernels.triton import budget
from ..kernels.triton.configurations import CHOICES, tuned
from ..kernels.triton.folding import Chain, chain
from ..kernels.triton.schedule import schedule
from . import device_errors
from .chunks import fitting
from .memory import memory_budget
from .paths import by_autograd, gathered, per_model
from .precision import kernel_precision

_T = TypeVar("_T")
unbuildable: dict[Architecture, str] = {}  # whose kernels failed to build in this process, and why


class Unbuildable(Exception):
    """The kernels of an architecture cannot be built on this machine; :data:`unbuildable` holds why."""


@dataclass(frozen=True)
class Triton:
    """Chains on a GPU, norms and averages folded into them: all models in one launch a layer, or in one launch. ``choice`` is one of
    ``configurations.CHOICES``."""

    architecture: Architecture
    reason: str
    choice: str = "default"
    name: ClassVar[str] = "triton"

    def forward(self, weights: Tensor, queries: Tensor, graph: bool) -> Tensor:
        outputs = self._built(lambda: fitting(memory_budget("cuda"), partial(self._run, weights, queries)), "forward", weights)
        return outputs.to(torch.get_autocast_dtype("cuda")) if torch.is_autocast_enabled("cuda") else outputs

    def _run(self, weights: Tensor, queries: Tensor, memory: int | None = None) -> Tensor:
        """Outputs in float32, with a graph where autograd records one."""
        rows = weights if self._chain.rows is None else self._chain.rows(weights)
        run = kernels("differentiable").differentiable_forward
        return run(rows, queries, self._chain.layers, kernel_precision(), memory=memory or memory_budget("cuda"))  # type: ignore[no-any-return]

    @property
    def _chain(self) -> Chain:
        assert self.architecture.graph is not None
        return chain(self.architecture.graph)

    def loss_and_gradient(
        self, weights: Tensor, queries: Tensor, targets: Tensor, criterion: Named, temperature: float, index: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        precision = kernel_precision()
        mode = self._mode(queries.shape[int(per_model(queries, self.architecture))] if index is None else index.shape[1], precision)

        def run() -> tuple[Tensor, Tensor]:
            made, found = kernels(), self._chain
            if isinstance(criterion, str) and criterion in made.CRITERIA:
                leaf, rows = weights, weights
                if found.rows is not None:
                    with torch.enable_grad():
                        leaf = weights.detach().requires_grad_()
                        rows = found.rows(leaf)
                call = partial(made.loss_and_gradient, rows.detach(), queries, targets, found.layers, criterion, temperature, precision)
                losses, gradient = fitting(memory_budget("cuda"), lambda memory: call(index=index, memory=memory, mode=mode))
                if found.rows is not None:  # through the fold, to the network's own numbers
                    (gradient,) = torch.autograd.grad(rows, leaf, gradient.to(rows.dtype))
                return losses, gradient
            if index is not None:
                return gathered(self, weights, queries, targets, index, self.architecture, criterion, temperature)
            return by_autograd(self._run, weights, queries, targets, self.architecture, criterion, temperature)

        return self._built(run, form_of(criterion, index), weights)

    def constants(self, n: int, device: torch.device) -> tuple[Any, ...]:
        """What calls with n queries read on the GPU besides their arguments, out of caches that forget: whoever records a call holds it."""
        found, tables = self._chain, kernels("tables")
        planned = schedule(found.layers, self.architecture.input_shape)
        made = (tables.pack_table(planned, device), tables.fold_tables(planned, n, device), tables.whole_tables(planned, device))
        return found, *made

    def _mode(self, n: int, precision: str) -> str:
        """``layers`` or ``network``: why the kernels leave their usual way, a launch a layer, is said once."""
        planned = schedule(self._chain.layers, self.architecture.input_shape)
        mode, reason = budget.choose_mode(planned, n, precision, True, memory_budget("cuda"))
        if mode == "network":
            say_once(f"wslfast: {self.architecture.name!r} runs as a whole network in one launch: {reason}", logging.INFO)
        return mode

    def _built(self, run: Callable[[], _T], form: str, weights: Tensor) -> _T:
        """What ``run`` gives. Raises Unbuildable where its kernels cannot be built on this machine, and WslfastError where the device
        failed: from then on they are off for this network here."""
        device_errors.ran(self.architecture, kernel_precision(), form, weights.device.index)
        try:
            with tuned(CHOICES[self.choice]):
                return run()
        except Exception as error:
            better = device_errors.explained(error)
            if better is not None:
                raise better from error
            words = build_failure(error)
            if words is None:
                raise
            unbuildable[self.architecture] = f"they cannot be built here: {words}"
        raise Unbuildable


def build_failure(error: BaseException) -> str | None:
    """Why kernels could not be built, of an error that came out of a call of them; None for one that is not the compiler's: wrong
    arguments, a device error, or memory that ran out.

    Triton's compiler ends in whatever exception its parts have: its own, RuntimeError of a pass, IndexError of a C++ map, an assertion.
    So what counts is whether one of its frames raised it.
    """
    text = str(error)
    if device_errors.out_of_memory(error) or device_errors.kind_of(error) is not None:
        return None
    raised_by = {module.partition(".")[0] for module in _modules(error)}
    system = isinstance(error, (ImportError, OSError, subprocess.CalledProcessError))  # a broken install, a read-only cache, gcc
    if "triton" in raised_by or type(error).__module__.partition(".")[0] == "triton" or system or "C compiler" in text:
        return f"{type(error).__name__}: {_words(text)}"
    return None


def _modules(error: BaseException) -> Iterator[str]:
    """The modules whose frames an exception went through."""
    frame = error.__traceback__
    while frame is not None:
        yield str(frame.tb_frame.f_globals.get("__name__", ""))
        frame = frame.tb_next


def _words(text: str) -> str:
    """An error in one line: compilers begin with where and end with why."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no message"]
    return f"{lines[0]:.200}" if len(lines) == 1 else f"{lines[0]:.120} ... {lines[-1]:.200}"


@lru_cache(maxsize=256)
def reaches_queries(architecture: Architecture) -> bool:
    """Whether the kernels' graph of outputs goes on to the queries. Imports Triton; False where it is not installed."""
    if architecture.graph is None:
        return False
    try:
        from ..kernels.triton.query_gradient import layers_on_queries

        layers_on_queries(chain(architecture.graph).layers, architecture.input_shape)
    except (ImportError, Unplannable):
        return False
    return True


def form_of(criterion: Named, index: Tensor | None) -> str:
    """The form of a loss call, one of ``verdicts.FORMS``: a criterion of the caller's own runs through the graph of the outputs."""
    if not isinstance(criterion, (str, Averaged)):
        return "forward"
    return "loss" if index is None else "indexed"


def kernels(module: str = "launch") -> ModuleType:
    """The kernels' functions; importing them imports Triton."""
    return importlib.import_module(f"..kernels.triton.{module}", __package__)
