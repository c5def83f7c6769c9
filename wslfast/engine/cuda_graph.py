"""The kernels' losses and gradients as one launch: recorded in a CUDA graph, and replayed with the numbers of every later call.

A call of the kernels launches a dozen of them, and for a small call that takes the host longer than the GPU takes to run them. A piece of
work whose calls are alike, such as a training run, records the call once. What is recorded is the kernels' call alone, from rows of weights
to losses and gradients: whatever torch records of it for autograd, and the optimiser, are outside. A replay gives the bits that the call
itself gives, which is checked after recording.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import WslfastError, first_line, say_once
from ..kernels.criteria import Named
from . import triton_path
from .memory import memory_budget
from .paths import Path
from .precision import kernel_precision
from .triton_path import Triton

MOST = 4  # graphs of one piece of work: each holds the memory of its call's activations for as long as it lives
_current: ContextVar[Recorder | None] = ContextVar("wslfast_recorder", default=None)


@dataclass(frozen=True)
class _Recording:
    """A call with its arguments and results in memory of its own. ``held`` is what the graph reads besides."""

    graph: Any
    arguments: tuple[Tensor, ...]
    results: tuple[Tensor, Tensor]
    held: Any

    def replay(self, arguments: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Losses and gradient in memory of the caller's: the next replay writes over the graph's own."""
        with torch.no_grad():
            for here, given in zip(self.arguments, arguments, strict=True):
                here.copy_(given)
        self.graph.replay()
        losses, gradient = self.results
        return losses.clone(), gradient.clone()


class Recorder:
    """The graphs of one piece of work. They live as long as this object."""

    def __init__(self) -> None:
        self._recordings: dict[Any, _Recording | None] = {}  # None: calls of this kind are run

    @property
    def recorded(self) -> int:
        """Kinds of calls that are replayed."""
        return sum(recording is not None for recording in self._recordings.values())

    def loss_and_gradient(
        self, path: Path, weights: Tensor, queries: Tensor, targets: Tensor, criterion: Named, temperature: float, index: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """What ``path.loss_and_gradient`` returns, to the bit: recorded at the first call of a kind, replayed at later ones. Calls of other
        paths than the kernels', with a criterion of the caller's own or with an index, are run.

        Raises:
            WslfastError: where CUDA broke the recording off, after which torch's memory is in no known state.
        """
        arguments = (weights, queries, targets)
        if not isinstance(path, Triton):
            say_once("wslfast: cuda_graph: nothing is recorded where torch runs the networks", logging.INFO)
        if not isinstance(path, Triton) or not isinstance(criterion, str) or index is not None:
            return path.loss_and_gradient(weights, queries, targets, criterion, temperature, index)
        shapes = tuple((tuple(t.shape), t.dtype, t.device) for t in arguments)
        kind = (path.architecture, path.choice, kernel_precision(), memory_budget("cuda"), criterion, temperature, shapes)
        if kind not in self._recordings:
            if len(self._recordings) < MOST:
                return self._record(kind, path, arguments, criterion, temperature)
            say_once(f"wslfast: cuda_graph: calls of more than {MOST} sizes or settings: further ones are run, not replayed")
        recording = self._recordings.get(kind)
        if recording is None:
            return path.loss_and_gradient(weights, queries, targets, criterion, temperature, None)
        return recording.replay(arguments)

    def _record(self, kind: Any, path: Triton, arguments: tuple[Tensor, ...], criterion: str, temperature: float) -> tuple[Tensor, Tensor]:
        """The call's result, of a run that comes first: it compiles what is to be compiled. Then the same call is recorded, not run."""
        own = tuple(t.detach().clone(memory_format=torch.contiguous_format) for t in arguments)
        weights, queries, targets = own

        def run() -> tuple[Tensor, Tensor]:
            return path.loss_and_gradient(weights, queries, targets, criterion, temperature, None)

        device = weights.device
        failed: Exception | None = None
        with torch.cuda.device(device):
            before, stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)
            stream.wait_stream(before)
            with torch.cuda.stream(stream):
                expected = run()
            before.wait_stream(stream)
            graph, held = torch.cuda.CUDAGraph(), path.constants(targets.shape[1], device)
            try:
                # other threads may go on with what is forbidden while a graph is recorded: NCCL's asks for events all the time
                with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                    try:
                        results = run()
                    except Exception as error:  # the recording has to end all the same
                        failed = error
            except RuntimeError as error:
                torch.cuda.set_stream(before)  # torch leaves the other one current
                raise WslfastError(
                    f"cuda_graph: CUDA broke the recording of the behavioral loss off ({first_line(failed or error):.160}); "
                    "start again without cuda_graph, a run goes on with --resume"
                ) from error
            if failed is None:
                graph.replay()
                same = all(torch.equal(_bits(a), _bits(b)) for a, b in zip(results, expected, strict=True))
        if failed is not None:
            why = triton_path.unbuildable.pop(path.architecture, None) or first_line(failed)  # they were built a moment ago
            say_once(f"wslfast: cuda_graph: the call cannot be recorded, so it is run at every step: {why:.160}")
            self._recordings[kind] = None
        elif not same:
            say_once("wslfast: cuda_graph: a replay gave other numbers than the call itself, so the call is run at every step")
            self._recordings[kind] = None
        else:
            self._recordings[kind] = _Recording(graph, own, results, held)
        return expected


def _bits(numbers: Tensor) -> Tensor:
    """The bits of float32 numbers, in which NaN equals itself."""
    return numbers.view(torch.int32)


@contextmanager
def recording(recorder: Recorder | None) -> Iterator[None]:
    """A block whose loss calls go through a recorder; None: they are run."""
    token = _current.set(recorder)
    try:
        yield
    finally:
        _current.reset(token)


def recorder() -> Recorder | None:
    """That of the block around the call."""
    return _current.get()
