"""The first convolution and its pooling, a few queries at a time.

What a first convolution makes is the largest thing in a small network, and the pooling right above keeps a quarter of it. A whole
slab of it leaves the caches, so that pooling, its backward (which begins by writing zeros) and the gradient of the weights would each
wait for memory: a query of CNN3 costs them two to three times as much in twelve megabytes as in three. All other layers are small
enough for the slab, and there fewer, larger calls are better.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from ..layers import Activation, Conv2d, Dropout, Layers, Linear, Pool2d, shapes
from .pairs import PairedConvStep
from .steps import FlattenStep, PoolStep, Program, block, needs_sixteen, put

_BYTES = 4 << 20  # of the largest activation of eight models, at once
_FEWEST = 4  # queries: cut evenly, no part is then a single image, which torch gives to another library


@dataclass(frozen=True)
class BlockedSteps:
    """A first convolution and what follows it up to a pooling, ``queries`` at a time; a step like any other from outside."""

    steps: tuple[Any, ...]  # ConvStep, ..., PoolStep
    queries: int

    def pack(self, rows: Tensor, dtype: torch.dtype) -> Any:
        return self.steps[0].pack(rows, dtype)

    def _parts(self, x: Tensor) -> Sequence[Tensor]:
        return x.tensor_split(-(-x.shape[0] // self.queries))

    def forward(self, x: Tensor, packed: Any, models: int) -> tuple[Tensor, Any]:
        outputs, saved = [], []
        for y in self._parts(x):
            keeps = []
            for step, weights in self._with(packed):
                y, keep = step.forward(y, weights, models)
                keeps.append(keep)
            outputs.append(y)
            saved.append(keeps)
        return _joined(outputs), saved

    def values(self, x: Tensor, packed: Any, models: int) -> Tensor:
        """Output alone, where no backward will follow."""
        outputs = []
        for y in self._parts(x):
            for step, weights in self._with(packed):
                y = step.values(y, weights, models) if isinstance(step, PoolStep) else step.forward(y, weights, models)[0]
            outputs.append(y)
        return _joined(outputs)

    def _with(self, packed: Any) -> Iterable[tuple[Any, Any]]:
        """Steps from the convolution up, each with its weights or None."""
        return zip_longest(self.steps, (packed,))

    def backward(self, g: Tensor, saved: Any, packed: Any, rows: Tensor, fresh: bool) -> None:
        # Blocks add up on their own, so that a slab's share of the sum is the same bits whenever the slab is added.
        mine = rows if fresh else torch.empty_like(rows)
        for i, part in enumerate(g.tensor_split(len(saved))):
            for step, weights in reversed(tuple(self._with(packed))):
                part = step.backward(part, saved[i].pop(), weights, mine, i == 0)
        if not fresh:
            for slot in (self.steps[0].weight, self.steps[0].bias):
                if slot is not None:
                    put(rows, slot, block(mine, slot), fresh=False)


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def in_blocks(layers: Layers) -> range:
    """Indices of the layers whose outputs are never whole: the first convolution and what follows it below a pooling."""
    first = next((i for i, layer in enumerate(layers) if isinstance(layer, (Conv2d, Linear))), len(layers))
    last = first + 1
    while last < len(layers) and isinstance(layers[last], (Activation, Dropout)):
        last += 1
    found = last < len(layers) and isinstance(layers[first], Conv2d) and isinstance(layers[last], Pool2d)
    return range(first, last) if found else range(0)


def blocked(program: Program) -> Program:
    """``program`` with its first convolution and the pooling above it in blocks of queries."""
    steps = program.steps
    cut = in_blocks(tuple(step.layer for step in steps if not isinstance(step, FlattenStep)))  # type: ignore[attr-defined]
    if not cut or isinstance(steps[cut.start], PairedConvStep):  # which works on one model after another as it is
        return program
    if needs_sixteen(steps[cut.start].layer):  # type: ignore[attr-defined]
        return program
    size = program.crop
    for step in steps[: cut.start + 1]:
        size = shapes((step.layer,), size)[-1]  # type: ignore[attr-defined]
    queries = max(_FEWEST, _BYTES // (4 * 8 * math.prod(size)))
    head = BlockedSteps(steps[cut.start : cut.stop + 1], queries)
    return replace(program, steps=(*steps[: cut.start], head, *steps[cut.stop + 1 :]))
