"""The paths in plain torch and the tuned CPU path: each an object that runs the models of one architecture."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..architecture import Architecture
from ..errors import WslfastError, describe, first_line
from ..kernels import reference, stacked
from ..kernels.cpu import engine as cpu
from ..kernels.cpu.denormals import flushed, makes_many
from ..kernels.cpu.memory import fresh_like
from ..kernels.criteria import Averaged, Named, share_of_loss
from ..kernels.graph import Graph
from ..kernels.layers import Layers
from ..kernels.stacked import folded_chain
from ..profiling import region
from .chunks import in_chunks, is_shortage
from .memory import memory_budget, models_per_chunk, stacks_well

Run = Callable[[Tensor, Tensor], Tensor]
_T = TypeVar("_T")


class Path(Protocol):
    """One way to run k models of one architecture, each with its own weights.

    Attributes:
        name: loop | stacked | module | cpu | triton.
        reason: why this one, in words.
        backend: what the caller asked for.
    """

    name: ClassVar[str]

    @property
    def reason(self) -> str: ...

    def forward(self, weights: Tensor, queries: Tensor, graph: bool) -> Tensor:
        """Outputs ``[k, n, *out]``; ``graph``: with torch's graph for a backward pass."""
        ...

    def loss_and_gradient(
        self, weights: Tensor, queries: Tensor, targets: Tensor, criterion: Named, temperature: float, index: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Per-model values ``[k]`` and gradients ``[k, P]``, as :func:`wslfast.engine.loss_and_gradient` documents them."""
        ...


def per_model(queries: Tensor, architecture: Architecture) -> bool:
    """Whether ``queries`` has a leading axis over models."""
    return queries.ndim == len(architecture.input_shape) + 2


@contextmanager
def _named(architecture: Architecture, queries: Tensor) -> Iterator[None]:
    """What torch's operators raise, as the error of this network: an index that a table has not, a number that a type does not hold."""
    try:
        yield
    except (RuntimeError, LookupError, ValueError) as error:
        if is_shortage(error) or isinstance(error, WslfastError):
            raise
        raise WslfastError(f"architecture {architecture.name!r} cannot run on queries {describe(queries)}: {first_line(error)}") from error


def in_pieces(run: Run, weights: Tensor, queries: Tensor, architecture: Architecture, graph: bool, size: int | None = None) -> Tensor:
    """Outputs of ``run(weights, queries)``, models cut into chunks of ``size`` (default: as many as fit the memory budget). With a graph
    that does not fit as a whole, chunks are recomputed in the backward pass."""
    own_queries = per_model(queries, architecture)
    n, k = queries.shape[int(own_queries)], weights.shape[0]
    if k == 0:
        return run(weights, queries)
    pieces: list[Tensor] = []
    fitting = models_per_chunk(architecture, n, weights.device.type)
    planned = min(k, fitting if size is None else size)

    def piece(part: slice) -> None:
        arguments = weights[part], queries[part] if own_queries else queries
        scarce = part.stop - part.start < planned and part.stop < k  # memory ran out, and the chunk was halved
        again = graph and (fitting < k or scarce)
        pieces.append(checkpoint(run, *arguments, use_reentrant=False) if again else run(*arguments))

    in_chunks(k, planned, piece)
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0]


def by_autograd(
    run: Run, weights: Tensor, queries: Tensor, targets: Tensor, architecture: Architecture, criterion: Named, temperature: float
) -> tuple[Tensor, Tensor]:
    """Values and gradients of ``run`` through torch's graph, one chunk of models after another."""
    own_queries = per_model(queries, architecture)
    n = queries.shape[int(own_queries)]
    losses, gradient = weights.new_empty(weights.shape[0]), fresh_like(weights)

    def piece(part: slice) -> None:
        with torch.enable_grad():
            rows = weights[part].detach().requires_grad_()
            outputs = run(rows, queries[part] if own_queries else queries)
        losses[part], slope = share_of_loss(outputs.detach().to(weights.dtype), targets[part], n, criterion, temperature)
        # models are independent: the gradient of the sum is each model's own
        (gradient[part],) = torch.autograd.grad(outputs, rows, slope.to(outputs.dtype))

    in_chunks(weights.shape[0], models_per_chunk(architecture, n, weights.device.type), piece)
    return losses, gradient


def gathered(
    path: Path,
    weights: Tensor,
    pool: Tensor,
    targets: Tensor,
    index: Tensor,
    architecture: Architecture,
    criterion: Named,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Values and gradients of a path that wants each model's queries as a tensor: gathered from the pool for some models at a time."""
    losses, gradient = weights.new_empty(weights.shape[0]), fresh_like(weights)
    size = pool.element_size() * index.shape[1] * math.prod(architecture.input_shape)

    def piece(part: slice) -> None:
        with region("gather"):
            own = pool.index_select(0, index[part].reshape(-1)).unflatten(0, index[part].shape)
        losses[part], gradient[part] = path.loss_and_gradient(weights[part], own, targets[part], criterion, temperature, None)

    in_chunks(weights.shape[0], max(1, memory_budget(weights.device.type) // (4 * size)), piece)
    return losses, gradient


def flushing(graph: Graph | None, weights: Tensor, call: Callable[..., _T], criterion: Named = "mse") -> Callable[..., _T]:
    """The same call, with numbers below 1.2e-38 as zeros where a network makes many, and neither it nor the criterion (of ours) minds."""
    fits = graph is not None and weights.device.type == "cpu" and isinstance(criterion, (str, Averaged)) and makes_many(graph)
    return partial(flushed, call) if fits else call


@dataclass(frozen=True)
class Loop:
    """Plain chains, one model after another, channels-last: for float64, autocast, graphs, and as the oracle's twin."""

    architecture: Architecture
    reason: str
    name: ClassVar[str] = "loop"

    def _run(self, weights: Tensor, queries: Tensor) -> Tensor:
        return reference.forward(weights, _channels_last(queries), self.architecture.layers)

    def forward(self, weights: Tensor, queries: Tensor, graph: bool) -> Tensor:
        if not graph:  # a loop without a graph holds one model's activations
            return self._run(weights, queries)
        return in_pieces(self._run, weights, queries, self.architecture, graph)

    def loss_and_gradient(
        self, weights: Tensor, queries: Tensor, targets: Tensor, criterion: Named, temperature: float, index: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if index is not None:
            return gathered(self, weights, queries, targets, index, self.architecture, criterion, temperature)
        if not isinstance(criterion, str):
            return by_autograd(self._run, weights, queries, targets, self.architecture, criterion, temperature)
        return reference.loss_and_gradient(weights, _channels_last(queries), targets, self.architecture.layers, criterion, temperature)


def _channels_last(queries: Tensor) -> Tensor:
    # oneDNN runs small convolutions 3-6 times faster on channels-last images than on a loop's NCHW ones
    return queries.contiguous(memory_format=torch.channels_last) if queries.ndim == 4 else queries


@dataclass(frozen=True)
class Stacked:
    """Any graph on any device: many models in one plain torch call per operation."""

    architecture: Architecture
    reason: str
    name: ClassVar[str] = "stacked"

    @property
    def _graph(self) -> Graph:
        assert self.architecture.graph is not None
        return self.architecture.graph

    def forward(self, weights: Tensor, queries: Tensor, graph: bool) -> Tensor:
        k, n = weights.shape[0], queries.shape[int(per_model(queries, self.architecture))]
        if k == 0 or n == 0:
            return weights.new_zeros(k, n, *self.architecture.output_shape)
        size = None if graph else self._models(k, n, weights.device.type)
        with _named(self.architecture, queries):
            return in_pieces(partial(self._run, graph), weights, queries, self.architecture, graph, size)

    def _run(self, graph: bool, weights: Tensor, queries: Tensor) -> Tensor:
        if graph:
            return stacked.differentiable(weights, queries, self._graph)
        return flushing(self._graph, weights, stacked.forward)(weights, queries, self._graph)

    def _models(self, k: int, n: int, device: str) -> int:
        """Models of one call below: on a CPU all, which are cut into groups that fit the caches."""
        return k if device == "cpu" else models_per_chunk(self.architecture, n, device)

    def loss_and_gradient(
        self, weights: Tensor, queries: Tensor, targets: Tensor, criterion: Named, temperature: float, index: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        k, own = weights.shape[0], per_model(queries, self.architecture)
        pieces: list[tuple[Tensor, Tensor]] = []

        def piece(part: slice) -> None:
            if part == slice(0, k):  # small calls are many, and a view of a tensor is a microsecond
                pieces.append(self._piece(weights, queries, targets, criterion, temperature, index))
                return
            x = queries[part] if own and index is None else queries
            rows = None if index is None else index[part]
            pieces.append(self._piece(weights[part], x, targets[part], criterion, temperature, rows))

        with _named(self.architecture, queries):
            in_chunks(k, self._models(k, targets.shape[1], weights.device.type), piece)
        if len(pieces) == 1:
            return pieces[0]
        losses, gradients = zip(*pieces) if pieces else ((weights.new_empty(0),), (torch.empty_like(weights),))
        return torch.cat(losses), torch.cat(gradients)

    def _piece(
        self, weights: Tensor, queries: Tensor, targets: Tensor, criterion: Named, temperature: float, index: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        run = flushing(self._graph, weights, stacked.loss_and_gradient, criterion)
        return run(weights, queries, targets, self._graph, criterion, temperature, index)


@dataclass(frozen=True)
class Cpu:
    """Chains in float32 on the CPU, plain or with norms folded in: the hand-written engine. Where a graph over models is asked for,
    torch's own calls: stacked, or of one model after another where each is plain and large enough to keep the processor busy."""

    architecture: Architecture
    reason: str
    name: ClassVar[str] = "cpu"

    def forward(self, weights: Tensor, queries: Tensor, graph: bool) -> Tensor:
        if graph:
            n = queries.shape[int(per_model(queries, self.architecture))]
            kind = Stacked if self._folded or stacks_well(self.architecture, n) else Loop
            return kind(self.architecture, self.reason).forward(weights, queries, graph)
        run, network = self._engine
        outputs = flushing(self.architecture.graph, weights, run.forward)(weights, queries, network)
        return outputs.to(torch.get_autocast_dtype("cpu")) if torch.is_autocast_enabled("cpu") else outputs

    def loss_and_gradient(
        self, weights: Tensor, queries: Tensor, targets: Tensor, criterion: Named, temperature: float, index: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        run, network = self._engine
        call = flushing(self.architecture.graph, weights, run.loss_and_gradient, criterion)
        return call(weights, queries, targets, network, criterion, temperature, index)

    @property
    def _engine(self) -> tuple[Any, Layers | Graph]:
        """The module that runs it, and what that takes for the network."""
        folded = self._folded
        return (cpu, self.architecture.layers) if folded is None else (folded_chain, folded)

    @property
    def _folded(self) -> Graph | None:
        """The graph whose norms are to be folded; None for a plain chain."""
        return None if self.architecture.planned else self.architecture.graph
