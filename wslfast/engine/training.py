"""Losses and gradients of one training step: dropout and batch statistics where the architecture has them, the usual paths where not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from ..architecture import Architecture
from ..errors import WslfastError, require
from ..kernels import stacked
from ..kernels.criteria import Named
from ..kernels.graph import Graph, Training
from ..kernels.operations import training_graph
from ..kernels.reference import value_shapes
from ..profiling import region
from .memory import models_per_chunk
from .paths import flushing
from .preference import preferred


def check_trainable(architecture: Architecture) -> None:
    """Raises WslfastError, saying why, for an architecture whose models cannot be trained all at once."""
    if architecture.graph is None:
        raise WslfastError(f"architecture {architecture.name!r} cannot be trained: it cannot be traced, as {architecture.reason}")
    try:
        value_shapes(training_graph(architecture.graph))
    except ValueError as error:
        raise WslfastError(f"architecture {architecture.name!r} cannot be trained: {error}") from None


def random_in_training(architecture: Architecture) -> bool:
    """Whether a training step differs from evaluation mode: it draws random numbers, or uses statistics of the batch."""
    return _own_graph(architecture) is not None


def _own_graph(architecture: Architecture) -> Graph | None:
    """The graph of training mode, or None if it equals the graph of evaluation mode."""
    assert architecture.graph is not None
    return _made(architecture.graph, architecture.graph.training)


@lru_cache(maxsize=64)
def _made(graph: Graph, training: Training) -> Graph | None:
    """As :func:`_own_graph`. ``training`` is an argument of its own as two graphs are equal if their evaluation modes are."""
    made = training_graph(replace(graph, training=training))
    return None if made.nodes == graph.nodes and made.output == graph.output else made


def training_step(
    weights: Tensor,
    queries: Tensor,
    targets: Tensor,
    architecture: Architecture,
    criterion: Named,
    *,
    index: Tensor | None = None,
    generators: Sequence[torch.Generator] = (),
) -> tuple[Tensor, Tensor, Mapping[str, Tensor]]:
    """Per-model losses ``[k]``, gradients ``[k, P]`` and, by name, running statistics ``[k, C]`` after the step; in training mode.

    Args:
        weights, queries, targets, architecture, criterion, index: as in :func:`wslfast.engine.loss_and_gradient`.
        generators: one per model, on the CPU, from which its dropout draws; each model's numbers are its own.
    """
    from . import loss_and_gradient

    graph = _own_graph(architecture)
    if graph is None:
        return (*loss_and_gradient(weights, queries, targets, architecture, criterion, index=index), {})
    wanted = preferred("auto")
    require(wanted != "triton", "backend='triton' has no batch statistics and no dropout; use backend='torch'")
    k, own = len(weights), queries.ndim == len(architecture.input_shape) + 2
    size = k if weights.device.type == "cpu" else models_per_chunk(architecture, targets.shape[1], weights.device.type)
    parts = []
    step = flushing(graph, weights, stacked.training_step, criterion)
    with region("loss"):
        for start in range(0, k, size):
            part = slice(start, start + size)
            x, rows = queries[part] if own and index is None else queries, None if index is None else index[part]
            try:
                made = step(weights[part], x, targets[part], graph, criterion, index=rows, generators=generators[part])
            except ValueError as error:
                raise WslfastError(f"architecture {architecture.name!r}: {error}") from None
            parts.append(made)
    if len(parts) == 1:
        return parts[0]
    losses, gradients, statistics = zip(*parts, strict=True)
    return torch.cat(losses), torch.cat(gradients), {name: torch.cat([s[name] for s in statistics]) for name in statistics[0]}
