"""Rules (``rules.py``) of calls that take each number from one tensor or from another: where a mask says so, or where it is the larger.

The twin is the form of elementwise calls (``forms.elementwise``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .calls import Call, Values
from .layouts import aligned
from .rules import Gradients, Maker, Rule, of_own, reduced

_MASKS = {"where": "condition", "masked_fill": "mask"}


class Chosen:
    """``where`` and ``masked_fill``, by a mask that has no gradient."""

    def __init__(self, call: Call, wanted: frozenset[str]) -> None:
        self.call, self.wanted = call, wanted
        self.mask = _MASKS[call.operation.name.partition(".")[0]]
        self.where_true = "self" if self.mask == "condition" else "value"

    def forward(self, a: Values, models: int) -> tuple[Tensor, Any]:
        shapes = {name: a[name].shape for name in self.wanted}
        a.update((name, aligned(self.call, a, name, models)) for name in self.call.layouts)
        return self.call.operation.invoke(a), (a[self.mask], shapes)

    def backward(self, g: Tensor, saved: Any, models: int) -> Gradients:
        mask, shapes = saved
        made: Gradients = {}
        for name in self.wanted:
            slope = torch.where(mask, g, 0) if name == self.where_true else torch.where(mask, 0, g)
            made[name] = reduced(slope, shapes[name])
        return made


class Larger:
    """``maximum`` and ``minimum`` of two tensors; equal numbers share the gradient, as torch has it."""

    def __init__(self, call: Call, wanted: frozenset[str]) -> None:
        self.call, self.wanted = call, wanted

    def forward(self, a: Values, models: int) -> tuple[Tensor, Any]:
        shapes = {name: a[name].shape for name in self.wanted}
        x, y = (aligned(self.call, a, name, models) for name in ("self", "other"))
        made: Tensor = self.call.operation.invoke({"self": x, "other": y})
        return made, (x, y, shapes)

    def backward(self, g: Tensor, saved: Any, models: int) -> Gradients:
        x, y, shapes = saved
        less = "other" if self.call.operation.name == "maximum" else "self"
        shared = torch.where(x == y, g * 0.5, g)
        made: Gradients = {}
        for name in self.wanted:
            passed_over = x > y if name == less else x < y
            made[name] = reduced(shared.masked_fill(passed_over, 0), shapes[name])
        return made


def _chosen(call: Call, known: Values, wanted: frozenset[str], owned: bool) -> Rule | None:
    mask = _MASKS[call.operation.name.partition(".")[0]]
    return Chosen(call, wanted) if of_own(call, wanted) and mask in call.layouts and mask not in wanted else None


def _larger(call: Call, known: Values, wanted: frozenset[str], owned: bool) -> Rule | None:
    return Larger(call, wanted) if of_own(call, wanted) and set(call.layouts) == {"self", "other"} else None


MAKERS: dict[str, Maker] = {
    **dict.fromkeys(("where.self", "where.ScalarSelf", "where.ScalarOther", "masked_fill.Scalar"), _chosen),
    **dict.fromkeys(("maximum", "minimum"), _larger),
}
