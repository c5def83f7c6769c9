"""Forward and backward passes of a program without torch's graph: a tape of rules, and torch's own graph where a call has no rule.

A call with a rule (``rules.py``) runs by it. Neighboring calls without one are an *island*: they run under autograd from inputs that were
cut off, and their backward is one ``torch.autograd.grad``. Calls that no weight reaches keep nothing.

A program has two tapes: of what is made of the weights alone, and of the rest. The twin is the program under autograd
(``engine.plain``), which a test holds every network against.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..dtypes import is_continuous
from .program import Step
from .rules import Linear, Rule, Within

Into = Mapping[int, Tensor]  # memory for gradients, by place
NOWHERE: Into = {}


class Ruled:
    """One call that runs by its rule. What is known beforehand is looked up beforehand: of a small call, Python takes a third of the time.

    Args:
        places: of its arguments.
    """

    def __init__(self, step: Step, rule: Rule, places: dict[str, int]) -> None:
        self._step, self._rule, self._places = step, rule, places
        self._out, self._frees = step.out, step.frees
        self._fresh = getattr(rule, "fresh", False)
        self._linear = rule if isinstance(rule, Linear) else None
        self._weight = places.get("weight", -1)

    def forward(self, values: list[Any], models: int, n: int) -> Any:
        values[self._out], saved = self._rule.forward(self._step.arguments(values, n), models)
        for place in self._frees:
            values[place] = None
        return saved

    def backward(self, gradients: list[Any], saved: Any, models: int, into: Into) -> None:
        g = _taken(gradients, self._out)
        if g is None:
            return
        if self._linear is not None and self._weight in into and gradients[self._weight] is None:
            found = self._linear.backward(g, saved, models, into[self._weight])
        else:
            found = self._rule.backward(g, saved, models)
        for name, part in found.items():
            _add(gradients, self._places[name], part, self._fresh)


@dataclass(frozen=True)
class Island:
    """Neighboring calls without rules, differentiated together by torch's own graph, which ends at their inputs and outputs."""

    steps: tuple[Step, ...]
    inputs: tuple[int, ...]  # places that weights reach
    outputs: tuple[int, ...]  # places that others read

    def forward(self, values: list[Any], models: int, n: int) -> Any:
        cut = {place: values[place].detach().requires_grad_() for place in self.inputs if is_continuous(values[place])}
        inside = list(values)
        for place, value in cut.items():
            inside[place] = value
        with torch.enable_grad():
            for step in self.steps:
                step(inside, models, n)
        saved = []
        for place in self.outputs:
            made = inside[place]
            values[place] = made.detach()
            if made.requires_grad:
                saved.append((place, made))
        for step in self.steps:
            for place in step.frees:
                if place not in self.outputs:
                    values[place] = None
        return cut, saved

    def backward(self, gradients: list[Tensor | None], saved: Any, models: int, into: Into) -> None:
        cut, made = saved
        given = [(value, _taken(gradients, place)) for place, value in made]
        for place in self.outputs:
            gradients[place] = None
        # models that lie between each other would be added up in an order that depends on where each is
        given = [(value, g.contiguous() if value.is_contiguous() else g) for value, g in given if g is not None]
        if not given or not cut:
            return
        parts = torch.autograd.grad([value for value, _ in given], list(cut.values()), [g for _, g in given], allow_unused=True)
        for place, part in zip(cut, parts, strict=True):
            if part is not None:
                _add(gradients, place, part)


@dataclass(frozen=True)
class Constant:
    """A call without a gradient: its result does not depend on weights, or is not differentiable (integers, booleans)."""

    step: Step

    def forward(self, values: list[Any], models: int, n: int) -> Any:
        self.step(values, models, n)

    def backward(self, gradients: list[Tensor | None], saved: Any, models: int, into: Into) -> None:
        gradients[self.step.out] = None


def _taken(gradients: list[Any], place: int) -> Tensor | None:
    """The gradient at a place, where none is left."""
    g, gradients[place] = gradients[place], None
    return g.whole() if isinstance(g, Within) else g


def _add(gradients: list[Any], place: int, part: Any, fresh: bool = False) -> None:
    """``fresh``: nobody else holds ``part``, a tensor that may be written over."""
    known = gradients[place]
    if known is None:
        gradients[place] = part
    elif fresh and isinstance(known, Tensor) and part.stride() == known.stride():
        gradients[place] = part.add_(known)
    else:
        gradients[place] = known + part


@dataclass(frozen=True)
class Tape:
    """Calls, ready to run forward and back.

    Attributes:
        calls: in order.
        inputs: places of what is differentiated by.
        outputs: places of what comes out.
    """

    calls: tuple[Ruled | Island | Constant, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    def forward(self, values: list[Any], inputs: Sequence[Any], models: int, n: int) -> tuple[list[Tensor], list[Any]]:
        """The outputs, and what :meth:`backward` needs; ``values`` holds all others that are known, and is written over."""
        for place, value in zip(self.inputs, inputs, strict=True):
            values[place] = value
        saved = [call.forward(values, models, n) for call in self.calls]
        return [values[place] for place in self.outputs], saved

    def backward(
        self, slopes: Sequence[Tensor | None], saved: list[Any], models: int, size: int, into: Into = NOWHERE
    ) -> list[Tensor | None]:
        """Gradients of the inputs from those of the outputs, None where there is none. Empties ``saved``; ``size``: number of places;
        ``into``: memory for the gradients of some inputs, which may come there or elsewhere."""
        gradients: list[Tensor | None] = [None] * size
        for place, slope in zip(self.outputs, slopes, strict=True):
            gradients[place] = slope
        for call in reversed(self.calls):
            call.backward(gradients, saved.pop(), models, into)
        return [_taken(gradients, place) for place in self.inputs]


def tape_of(steps: Sequence[Step], inputs: Sequence[int], outputs: Sequence[int]) -> Tape:
    """The tape of steps that read values at the places ``inputs``, of which gradients are wanted."""
    reached = set(inputs)
    ruled: list[tuple[Step, Rule | None, bool]] = []
    for step in steps:
        wanted = frozenset(name for name, place in _places(step).items() if place in reached)
        reaches = not step.flat and bool(step.reads() & reached)
        rule = step.rule(wanted) if reaches and step.rule is not None else None
        ruled.append((step, rule, reaches))
        if reaches:
            reached.add(step.out)
    inside = _inside_of_lists(steps, {step.out for step, rule, _ in ruled if rule is not None})
    calls: list[Ruled | Island | Constant] = []
    island: list[Step] = []
    for i, (step, rule, reaches) in enumerate(ruled):
        if i not in inside and (rule is not None or not reaches):
            _close(calls, island, steps, outputs, reached)
            calls.append(Constant(step) if rule is None else Ruled(step, rule, _places(step)))
        else:
            island.append(step)
    _close(calls, island, steps, outputs, reached)
    return Tape(tuple(calls), tuple(inputs), tuple(outputs))


def _places(step: Step) -> dict[str, int]:
    """Places of a call's tensors by argument; ``name.0`` and so on in a list."""
    lists = {f"{name}.{i}": place for name, where in step.lists for i, place in enumerate(where) if place is not None}
    return dict(step.tensors) | lists


def _inside_of_lists(steps: Sequence[Step], ruled: set[int]) -> set[int]:
    """Numbers of the calls from one that returns several tensors to the last that reads them: these stay in one island, unless all
    have rules."""
    inside: set[int] = set()
    for i, step in enumerate(steps):
        if not step.several:
            continue
        readers = [j for j, reader in enumerate(steps) if step.out in reader.reads()]
        if not {step.out, *(steps[j].out for j in readers)} <= ruled:
            last = max(readers, default=i)
            inside.update(range(i, last + 1))
    return inside


def _close(
    calls: list[Ruled | Island | Constant], island: list[Step], steps: Sequence[Step], outputs: Sequence[int], reached: set[int]
) -> None:
    """The island so far becomes one call."""
    if not island:
        return
    inside = tuple(island)
    made = {step.out for step in inside}
    read = {place for step in inside for place in step.reads()} - made
    after = steps[steps.index(inside[-1]) + 1 :]
    later = {place for step in after for place in step.reads()} | set(outputs)
    calls.append(Island(inside, tuple(sorted(read & reached)), tuple(sorted(made & later))))
    island.clear()


__all__ = ["Tape", "tape_of"]
