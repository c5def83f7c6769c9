"""Networks that are one chain from their queries to their outputs once their norms are folded in: the CPU engine runs them, on folded
weights.

The fold is made once for all models of a call, and its gradient once. Each model's numbers are made by operators that are elementwise
over models, or sums along axes of its own: its bits do not depend on its company, as the engine's do not.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache, partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..cpu import engine as cpu
from ..cpu import jobs
from ..cpu.memory import fresh_like
from ..cpu.recording import Run
from ..cpu.replay import kind_of_loss, own_queries, replay, run_or_replay, unrecorded
from ..cpu.rewrites import joined
from ..criteria import Named
from ..graph import QUERY, Graph
from ..layers import Affine, Conv2d, Linear, numbers_of
from ..reference import value_shapes
from .leaves import leaves_of
from .planned_fold import FoldPlan, can_be_planned
from .rows import rows_of
from .segments import Segment, segments

_T = TypeVar("_T")
_BYTES = 64 << 20  # of folded weights at once: beside them are their gradients
_FEWEST = 1 << 18  # numbers of a job that folds: of fewer the calls take the time, which threads do not share


@lru_cache(maxsize=256)
def whole_segment(graph: Graph) -> Segment | None:
    """The one segment (segments.py) that is the whole graph; None if none is, or if it is of one dimension."""
    found = segments(graph, value_shapes(graph), graph.readers())
    whole = len(found) == 1 and len(found[0].nodes) == len(graph.nodes) and graph.output == f"@{len(graph.nodes) - 1}"
    return found[0] if whole and found[0].input == QUERY and not any(found[0].lifted) else None


@lru_cache(maxsize=256)
def supports(graph: Graph) -> bool:
    """Whether the functions below run a graph on float32 queries of a CPU."""
    segment = whole_segment(graph)
    if segment is None or not segment.flat:
        return False
    first = next((layer for layer in segment.layers if isinstance(layer, (Affine, Conv2d, Linear))), None)
    # one with groups the engine runs on a copy of the queries for each model, and a norm of queries makes them each model's own
    if not isinstance(first, Conv2d) or first.groups > 1:
        return False
    weights, query = (torch.zeros(1, *size, dtype=torch.float32, device="cpu") for size in ((1,), graph.input_shape))
    return can_be_planned(segment) and cpu.supports(weights, query, segment.layers)


def folded_rows(weights: Tensor, graph: Graph, segment: Segment) -> Tensor:
    """Folded weights ``[k, P']`` of a graph's ``[k, P]``, differentiable."""
    leaves = zip(graph.slots, leaves_of(weights, graph), strict=True)
    return rows_of(segment, {f"@w:{slot.name}": leaf for slot, leaf in leaves})


def forward(weights: Tensor, queries: Tensor, graph: Graph) -> Tensor:
    """Outputs ``[k, n, K]``, not differentiable. Arguments as :func:`wslfast.kernels.cpu.engine.forward` has them."""
    run = lambda weights, queries: (_forward(weights, queries, graph),)  # noqa: E731
    return run_or_replay((forward, graph), run, partial(_share, graph), weights, queries)[0]


def _forward(weights: Tensor, queries: Tensor, graph: Graph) -> Tensor:
    plan = _plan(graph)
    made = [plan.fold(part)[0] for part in weights.split(_models(graph))]
    with torch.no_grad():
        return cpu.forward(joined(made), queries, _segment(graph).layers)


def _share(graph: Graph, weights: Tensor, queries: Tensor) -> bool | None:
    """That products do not take all threads (False); None where a call is several jobs: each is replayed by itself."""
    k = len(weights)
    alone = k <= _a_job(weights) and cpu.models_of_a_job(weights, queries, _segment(graph).layers) >= k
    return False if alone else None


def loss_and_gradient(
    weights: Tensor,
    queries: Tensor,
    targets: Tensor,
    graph: Graph,
    criterion: Named,
    temperature: float = 2.0,
    index: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Per-model losses ``[k]`` and gradients ``[k, P]`` with respect to each model's own weights, norms' numbers included.

    Arguments as :func:`wslfast.kernels.cpu.engine.loss_and_gradient` has them. Memory beyond inputs and results: folded weights of some
    models, and their gradients.
    """

    queries, index, kind = own_queries(queries, index, kind_of_loss("folded chain", graph, criterion, temperature))

    def piece(weights: Tensor, queries: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        gradient = fresh_like(weights)
        return _piece(weights, queries, targets, graph, criterion, temperature, index, gradient), gradient

    def run(weights: Tensor, queries: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        k, threads = len(weights), torch.get_num_threads()
        own = index is None and queries.ndim == len(graph.input_shape) + 2
        size = cpu.models_of_a_job(weights, queries, _segment(graph).layers) if threads > 1 and kind is not None else 0
        if size < k <= size * threads:
            return _one_a_thread(size, piece, kind, weights, queries, targets, own)
        size = _models(graph)
        if k <= size:  # small calls are many, and a view is a microsecond
            return piece(weights, queries, targets)
        losses, gradient = weights.new_empty(k), fresh_like(weights)
        for start in range(0, k, size):
            part = slice(start, start + size)
            x, of = queries[part] if own else queries, None if index is None else index[part]
            losses[part] = _piece(weights[part], x, targets[part], graph, criterion, temperature, of, gradient[part])
        return losses, gradient

    losses, gradient = run_or_replay(kind, run, partial(_share, graph), weights, queries, targets)
    return losses, gradient


def _one_a_thread(
    size: int, piece: Run, kind: Hashable, weights: Tensor, queries: Tensor, targets: Tensor, own: bool
) -> tuple[Tensor, Tensor]:
    """Losses and gradients of so few models that each thread has one job, of ``size`` models: it folds their weights as well, and is
    replayed as a whole."""
    k, call = len(weights), object()
    losses, gradient = weights.new_empty(k), fresh_like(weights)

    def job(start: int) -> None:
        part = slice(start, start + size)
        inputs, places = (weights[part], queries[part] if own else queries, targets[part]), (losses[part], gradient[part])
        if replay((kind, size), piece, inputs, places, call=call) is None:
            with unrecorded():
                for place, made in zip(places, piece(*inputs), strict=True):
                    place.copy_(made)

    jobs.run([partial(job, start) for start in range(0, k, size)])
    return losses, gradient


def _piece(
    weights: Tensor,
    queries: Tensor,
    targets: Tensor,
    graph: Graph,
    criterion: Named,
    temperature: float,
    index: Tensor | None,
    out: Tensor,
) -> Tensor:
    """Losses of some models; their gradients are written to ``out``."""
    plan, layers, size = _plan(graph), _segment(graph).layers, _a_job(weights)
    folds = _side_by_side([partial(plan.fold, some) for some in weights.split(size)])
    losses, slopes = cpu.loss_and_gradient(joined([rows for rows, _ in folds]), queries, targets, layers, criterion, temperature, index)
    parts = zip(folds, slopes.split(size), out.split(size), strict=True)
    _side_by_side([partial(plan.unfold, slope, saved, mine) for (_, saved), slope, mine in parts])
    return losses


@lru_cache(maxsize=256)
def _plan(graph: Graph) -> FoldPlan:
    return FoldPlan(graph, _segment(graph))


def _segment(graph: Graph) -> Segment:
    segment = whole_segment(graph)
    assert segment is not None
    return segment


def _models(graph: Graph) -> int:
    """Models whose folded weights there are at once, a multiple of the engine's groups."""
    return _most(_segment(graph), torch.get_num_threads(), _BYTES)


@lru_cache(maxsize=256)
def _most(segment: Segment, threads: int, size: int) -> int:
    whole = cpu.group_shape(segment.layers, segment.input_shape)[0] * threads
    return max(whole, size // (4 * numbers_of(segment.layers)) // whole * whole)


def _a_job(weights: Tensor) -> int:
    """Models that one job folds."""
    k, numbers = weights.shape
    return max(1, _FEWEST // numbers, -(-k // torch.get_num_threads()))


def _side_by_side(calls: Sequence[Callable[[], _T]]) -> list[_T]:
    """What the calls return, each a job of one thread."""
    if len(calls) == 1:
        return [calls[0]()]
    made: list[Any] = [None] * len(calls)

    def run(i: int) -> None:
        made[i] = calls[i]()

    jobs.run([partial(run, i) for i in range(len(calls))])
    return made
