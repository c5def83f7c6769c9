"""Forward and backward passes of a program without torch's graph: a tape of rules, and torch's own graph where a call has no rule.

A call with a rule (``rules.py``) runs by it. Neighboring calls without one are an *island*: they run under autograd from inputs that were
cut off, and their backward is one ``torch.autograd.grad``. Calls that no weight reaches keep nothing.

The twin is the program under autograd (``engine.plain``), which a test holds every network against.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .program import Program, Step
from .rules import Rule


@dataclass(frozen=True)
class Ruled:
    """One call that runs by its rule."""

    step: Step
    rule: Rule
    places: dict[str, int]  # of its arguments

    def forward(self, values: list[Any], models: int, n: int) -> Any:
        values[self.step.out], saved = self.rule.forward(self.step.arguments(values, n), models)
        for place in self.step.frees:
            values[place] = None
        return saved

    def backward(self, gradients: list[Tensor | None], saved: Any, models: int) -> None:
        g = gradients[self.step.out]
        if g is None:
            return
        gradients[self.step.out] = None
        for name, part in self.rule.backward(g, saved, models).items():
            _add(gradients, self.places[name], part)


@dataclass(frozen=True)
class Island:
    """Neighboring calls without rules, differentiated together by torch's own graph, which ends at their inputs and outputs."""

    steps: tuple[Step, ...]
    inputs: tuple[int, ...]  # places that weights reach
    outputs: tuple[int, ...]  # places that others read

    def forward(self, values: list[Any], models: int, n: int) -> Any:
        cut = {place: values[place].detach().requires_grad_() for place in self.inputs if values[place].is_floating_point()}
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

    def backward(self, gradients: list[Tensor | None], saved: Any, models: int) -> None:
        cut, made = saved
        given = [(value, gradients[place]) for place, value in made]
        for place in self.outputs:
            gradients[place] = None
        given = [(value, g) for value, g in given if g is not None]
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

    def backward(self, gradients: list[Tensor | None], saved: Any, models: int) -> None:
        gradients[self.step.out] = None


def _add(gradients: list[Tensor | None], place: int, part: Tensor) -> None:
    known = gradients[place]
    gradients[place] = part if known is None else known + part


@dataclass(frozen=True)
class Tape:
    """A program's calls, ready to run forward and back."""

    program: Program
    calls: tuple[Ruled | Island | Constant, ...]

    def forward(self, shared: Sequence[Any], weights: Sequence[Any], models: int, n: int) -> tuple[Tensor, list[Any]]:
        """``[M, n, *out]`` from what ``prepare`` and ``weights`` of the program give, and what :meth:`backward` needs."""
        values = list(shared)
        for place, value in zip(self.program.carried, weights, strict=True):
            values[place] = value
        saved = [call.forward(values, models, n) for call in self.calls]
        return values[self.program.output], saved

    def backward(self, g: Tensor, saved: list[Any], models: int) -> list[Tensor | None]:
        """Gradients of the carried values from that of the outputs, None where there is none. Empties ``saved``, to free memory."""
        gradients: list[Tensor | None] = [None] * self.program.size
        gradients[self.program.output] = g
        for call in reversed(self.calls):
            call.backward(gradients, saved.pop(), models)
        return [gradients[place] for place in self.program.carried]


def tape_of(program: Program) -> Tape:
    """The tape of a program."""
    reached = set(program.carried)
    ruled: list[tuple[Step, Rule | None, bool]] = []
    for step in program.steps:
        wanted = frozenset(name for name, place in step.tensors if place in reached)
        reaches = bool(step.reads() & reached)
        rule = step.rule(wanted) if reaches and step.rule is not None and not step.lists else None
        ruled.append((step, rule, reaches))
        if reaches:
            reached.add(step.out)
    inside = _inside_of_lists(program.steps)
    calls: list[Ruled | Island | Constant] = []
    island: list[Step] = []
    for i, (step, rule, reaches) in enumerate(ruled):
        if i not in inside and (rule is not None or not reaches):
            _close(calls, island, program, reached)
            calls.append(Constant(step) if rule is None else Ruled(step, rule, dict(step.tensors)))
        else:
            island.append(step)
    _close(calls, island, program, reached)
    return Tape(program, tuple(calls))


def _inside_of_lists(steps: Sequence[Step]) -> set[int]:
    """Numbers of the calls from one that returns several tensors to the last that reads them: these stay in one island."""
    inside: set[int] = set()
    for i, step in enumerate(steps):
        if step.several:
            last = max((j for j, reader in enumerate(steps) if step.out in reader.reads()), default=i)
            inside.update(range(i, last + 1))
    return inside


def _close(calls: list[Ruled | Island | Constant], island: list[Step], program: Program, reached: set[int]) -> None:
    """End the current island: its calls become one."""
    if not island:
        return
    steps = tuple(island)
    made = {step.out for step in steps}
    read = {place for step in steps for place in step.reads()} - made
    after = program.steps[program.steps.index(steps[-1]) + 1 :]
    later = {place for step in after for place in step.reads()} | {program.output}
    calls.append(Island(steps, tuple(sorted(read & reached)), tuple(sorted(made & later))))
    island.clear()


__all__ = ["Tape", "tape_of"]
