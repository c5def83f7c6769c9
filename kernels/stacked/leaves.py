"""The parameters of a group of models, each ``[M, *shape]``, from their rows ``[M, P]``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..graph import Graph

__all__ = ["PACKED", "copies_of", "leaves_of"]

PACKED = 1 << 15  # numbers of one model's parameter: from there on a BLAS packs it


def leaves_of(rows: Tensor, graph: Graph) -> list[Tensor]:
    """Each parameter of every model, ``[M, *shape]``, through one split: its backward is one concatenation."""
    parts = rows.split([slot.size for slot in graph.slots], 1)
    return [part.reshape(rows.shape[0], *slot.shape) for part, slot in zip(parts, graph.slots, strict=True)]


def copies_of(rows: Tensor, graph: Graph) -> list[Tensor]:
    """The same in memory of their own, as how small operands lie there decides a BLAS's bits; large ones it packs, and they stay."""
    if max(graph.sizes) >= PACKED:
        parts: Any = [
            part if part.shape[1] >= PACKED else part.clone(memory_format=torch.contiguous_format) for part in rows.split(graph.sizes, 1)
        ]
    else:
        parts = torch.split_with_sizes_copy(rows, graph.sizes, 1)  # type: ignore[func-returns-value]
    models = rows.shape[0]
    return [part if len(s.shape) == 1 else part.view(models, *s.shape) for part, s in zip(parts, graph.slots, strict=True)]
