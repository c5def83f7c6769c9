"""What a call of the kernels holds: its queries in the kernels' layout, and the activations of one chunk of models."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from .packing import stack, stack_pool, storage
from .stages import Schedule


def axes_of(queries: Tensor) -> int:
    """Axes of one query, three or one. Told by the queries, not by the layers: a network that begins by flattening takes both."""
    if not 2 <= queries.ndim <= 5:
        raise ValueError(f"expected queries [n, C, H, W] or [n, features], or with a leading axis over models, got {list(queries.shape)}")
    return 1 if queries.ndim < 4 else 3


class Activations:
    """Buffers of one chunk of ``k`` models; allocated once and used by every chunk."""

    def __init__(self, schedule: Schedule, k: int, n: int, precision: str, gradient: bool, device: torch.device) -> None:
        kind = storage(precision)
        self.outputs: list[Tensor] = []
        self.codes: list[Tensor | None] = []
        self.slopes: list[Tensor | None] = []
        for stage in schedule.stages:
            stored = torch.float32 if stage.LAST else kind
            self.outputs.append(torch.empty(k * n * stage.OUTPUTS, dtype=stored, device=device))
            code = gradient and stage.POOL == "max"
            self.codes.append(torch.empty(k * n * stage.CODES, dtype=torch.int8, device=device) if code else None)
            slope = gradient and stage.SLOPE in ("pooled", "window")
            self.slopes.append(torch.empty(k * n * stage.SLOPES, dtype=kind, device=device) if slope else None)
        if gradient:
            last = schedule.stages[-1]
            self.gradient = torch.empty(k * n * last.CODES, dtype=kind, device=device)


class Queries:
    """Queries as the first stage reads them, and how a model finds its own."""

    def __init__(self, queries: Tensor, index: Tensor | None, schedule: Schedule, k: int, precision: str) -> None:
        rank = axes_of(queries)
        if index is not None and queries.ndim != rank + 1:
            raise ValueError(f"expected a pool of {rank + 1} axes with an index, got {queries.ndim}")
        self.shared = queries.ndim == rank + 1 and index is None
        self.n = queries.shape[0] if self.shared else queries.shape[1] if index is None else index.shape[1]
        self.queries, self.rank, self.layout = queries, rank, (schedule, rank, precision)
        self.index = None if index is None else index.long().contiguous()
        self.per_model = 0 if self.shared else self.n
        if self.n < 1:
            raise ValueError("expected at least one query")
        if index is not None and (index.ndim != 2 or index.shape[0] != k or index.is_floating_point()):
            raise ValueError(f"expected an index [{k}, n] of integers, got {list(index.shape)} {index.dtype}")
        if index is None and not self.shared and queries.shape[0] != k:
            raise ValueError(f"expected queries for {k} models, got {queries.shape[0]}")

    @cached_property
    def images(self) -> Tensor:
        return (stack if self.index is None else stack_pool)(self.queries, *self.layout)

    def of(self, start: int, count: int) -> tuple[Tensor, Tensor | None]:
        """(images, index) of the chunk of ``count`` models that begins at model ``start``."""
        if self.index is not None:
            return self.images, self.index[start:]
        return (self.images if self.shared else stack(self.queries[start : start + count], *self.layout)), None
