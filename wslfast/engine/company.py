"""Sizes of groups in which a model's result is the same bits as in a full group.

A batched product of two matrices may be another routine than one of sixty-four. Neither looks at the numbers, so random ones tell:
each size is tried once a process against a full group, and a group of a size that gives other bits is filled up to one that does not.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

SIZES = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48)
_agree: dict[tuple[Hashable, int, int], bool] = {}


def filled(count: int, full: int, key: Hashable, run: Callable[[int], Sequence[Tensor]]) -> int:
    """The smallest size from ``count`` to ``full`` that gives each model the bits it has in a full group.

    Args:
        count: models there are.
        full: models of a full group, whose bits count.
        key: all that the bits may depend on.
        run: results of that many models, a fixed random choice of which the first are always the same; first axis models.
    """
    if count >= full:
        return full
    for size in SIZES:
        if count <= size < full:
            if (key, size, full) not in _agree:
                _agree[key, size, full] = all(torch.equal(a, b[:size]) for a, b in zip(run(size), run(full), strict=True))
            if _agree[key, size, full]:
                return size
    return full
