"""How much of a call is computed at a time: models of a group, queries of a slab."""

from __future__ import annotations

import math
from functools import lru_cache

from ..layers import Layers, shapes
from .rewrites import in_blocks

__all__ = ["activations", "group_shape"]

_MODELS = 8  # of a group


@lru_cache(maxsize=256)
def group_shape(layers: Layers, input_shape: tuple[int, ...]) -> tuple[int, int]:
    """Models a group and queries a slab; k plays no part, or a model's bits would depend on its company.

    - Models: 8. Of the networks met in practice, eight fill the vectors of the first convolution (48 outputs and more); more would be
      waste where the last group is filled up with idle models.
    - Queries: up to 128, while the largest activation that is whole at any time stays below 12 MiB (the first convolution's
      is cut up, :func:`~.rewrites.blocked`). More leaves the caches, fewer spend their time on calls.
    """
    cut = in_blocks(layers)
    largest = max(math.prod(shape) for i, shape in enumerate(shapes(layers, input_shape)[1:]) if i not in cut)
    queries = 2
    while queries < 128 and 2 * 4 * _MODELS * queries * largest <= 12 << 20:
        queries *= 2
    return _MODELS, queries


@lru_cache(maxsize=256)
def activations(layers: Layers, input_shape: tuple[int, ...]) -> int:
    """Activations of one model and query."""
    return sum(math.prod(shape) for shape in shapes(layers, input_shape)[1:])
