"""Networks that are one chain from their queries to their outputs once their norms are folded in: the CPU engine runs them, on folded
weights.

The fold is made once for all models of a call, and its gradient once. Each model's numbers are made by operators that are elementwise
over models, or sums along axes of its own: its bits do not depend on its company, as the engine's do not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..cpu import engine as cpu
from ..cpu import jobs
from ..cpu.memory import fresh_like
from ..cpu.rewrites import joined
from ..criteria import Named
from ..graph import QUERY, Graph
from ..layers import Affine, Conv2d, Linear, numbers_of
from ..reference import value_shapes
from .engine import leaves_of
from .rows import Rows, rows_of
from .segments import Segment, segments

_T = TypeVar("_T")
_BYTES = 64 << 20  # of folded weights at once: beside them are their gradients
_FEWEST = 8  # models of a job that folds: fewer are done before another thread has begun


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
    return cpu.supports(weights, query, segment.layers)


def folded_rows(weights: Tensor, graph: Graph, segment: Segment) -> Tensor:
    """Folded weights ``[k, P']`` of a graph's ``[k, P]``, differentiable."""
    return rows_of(segment, _parameters(weights, graph))


def forward(weights: Tensor, queries: Tensor, graph: Graph) -> Tensor:
    """Outputs ``[k, n, K]``, not differentiable. Arguments as :func:`wslfast.kernels.cpu.engine.forward` has them."""
    segment = _segment(graph)
    with torch.no_grad():
        made = [folded_rows(part, graph, segment) for part in weights.detach().split(_models(segment, len(weights)))]
        return cpu.forward(joined(made), queries, segment.layers)


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
    segment, k, weights = _segment(graph), len(weights), weights.detach()
    own = index is None and queries.ndim == len(graph.input_shape) + 2
    losses, gradient = weights.new_empty(k), fresh_like(weights)
    for start in range(0, k, size := _models(segment, k)):
        part = slice(start, start + size)
        mine = weights[part]
        with torch.no_grad():
            folds = _side_by_side([partial(_Fold, some, graph, segment) for some in mine.split(_a_job(len(mine)))])
        x, of = queries[part] if own else queries, None if index is None else index[part]
        folded = joined([fold.rows for fold in folds])
        losses[part], slopes = cpu.loss_and_gradient(folded, x, targets[part], segment.layers, criterion, temperature, of)
        with torch.no_grad():
            parts = zip(folds, slopes.split(_a_job(len(mine))), gradient[part].split(_a_job(len(mine))), strict=True)
            _side_by_side([partial(fold.unfold, slope, out) for fold, slope, out in parts])
    return losses, gradient


class _Fold:
    """Folded weights of some models, and what their gradient's way back needs."""

    def __init__(self, weights: Tensor, graph: Graph, segment: Segment) -> None:
        self.graph, self.rule = graph, Rows(segment, frozenset())
        with torch.no_grad():
            self.rows, self.saved = self.rule.forward(_parameters(weights, graph), len(weights))

    def unfold(self, slopes: Tensor, out: Tensor) -> None:
        """Write gradients ``[k, P]`` of the graph's own weights, from those of the folded ones."""
        with torch.no_grad():
            found = self.rule.backward(slopes, self.saved, len(slopes))
            parts = [(slot, found.get(f"@w:{slot.name}")) for slot in self.graph.slots]  # what no layer reads has none
            torch.cat([out.new_zeros(len(out), s.size) if x is None else x.reshape(len(out), -1) for s, x in parts], 1, out=out)


def _segment(graph: Graph) -> Segment:
    segment = whole_segment(graph)
    assert segment is not None
    return segment


def _parameters(weights: Tensor, graph: Graph) -> dict[str, Any]:
    """Each parameter of every model, ``[k, *shape]``, by reference."""
    return {f"@w:{slot.name}": leaf for slot, leaf in zip(graph.slots, leaves_of(weights, graph), strict=True)}


def _models(segment: Segment, k: int) -> int:
    """Models whose folded weights there are at once, a multiple of the engine's groups."""
    whole = cpu.group_shape(segment.layers, segment.input_shape)[0] * torch.get_num_threads()
    return min(max(1, k), max(whole, _BYTES // (4 * numbers_of(segment.layers)) // whole * whole))


def _a_job(models: int) -> int:
    return max(_FEWEST, -(-models // torch.get_num_threads()))


def _side_by_side(calls: Sequence[Callable[[], _T]]) -> list[_T]:
    """What the calls return, each a job of one thread."""
    made: list[Any] = [None] * len(calls)

    def run(i: int) -> None:
        made[i] = calls[i]()

    jobs.run([partial(run, i) for i in range(len(calls))])
    return made
