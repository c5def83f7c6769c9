"""A graph ready to run stacked: steps for all models at once, for a group of models, and for a group on a part of the queries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..dtypes import as_precise
from ..graph import Graph, size_of
from .calls import Layout, Values
from .rules import Rule


@dataclass(eq=False)
class Step:
    """One call: arguments that are known, and where the others come from.

    Attributes:
        run: the call, ``(arguments, models) -> value``.
        known: arguments that are no tensors.
        tensors: (argument, place among the values).
        lists: (argument, places) of arguments that are several tensors.
        sizes: (argument, place in it, text) of arguments that depend on the number of queries.
        out: place of the value.
        several: whether that is several tensors.
        rule: the rule of the call (``rules.py``) for the arguments whose gradients are wanted, if it has one.
        frees: places that nobody reads after it.
        flat: whether its value has no gradient: whole numbers, truths, and what is detached.
    """

    run: Callable[[Values, int], Any]
    known: Values
    tensors: list[tuple[str, int]]
    lists: list[tuple[str, list[int | None]]]
    sizes: list[tuple[str, int | None, str]]
    out: int
    several: bool = False
    rule: Callable[[frozenset[str]], Rule | None] | None = None
    frees: tuple[int, ...] = ()
    flat: bool = False

    def reads(self) -> set[int]:
        """Places of the values that the step reads."""
        return {i for _, i in self.tensors} | {i for _, where in self.lists for i in where if i is not None}

    def arguments(self, values: Sequence[Any], n: int) -> Values:
        """All arguments by name, for n queries."""
        a = dict(self.known)
        for name, i in self.tensors:
            a[name] = values[i]
        for name, where in self.lists:
            a[name] = [None if i is None else values[i] for i in where]
        for name, at, text in self.sizes:
            if at is None:
                a[name] = size_of(text, n)
            else:
                a[name] = list(a[name])
                a[name][at] = size_of(text, n)
        return a

    def __call__(self, values: list[Any], models: int, n: int) -> None:
        values[self.out] = self.run(self.arguments(values, n), models)
        for i in self.frees:
            values[i] = None


@dataclass(frozen=True)
class Program:
    """A graph ready to run.

    Attributes:
        graph: which.
        own: whether every model has its own queries.
        shared: steps whose results are the same for all models.
        made: steps that read weights alone; they run once a group, whatever its queries.
        steps: the others, in order.
        places: of the slots, among the values.
        carried: places of slots and of what ``made`` makes of them, as far as ``steps`` read them.
        constants: (place, tensor).
        query: place of the queries.
        output: place of the result, ``[M, n, *out]``.
        size: places in all.
        given: what the caller puts among the prepared values in training mode: (reference, place, layout that it has there).
    """

    graph: Graph
    own: bool
    shared: tuple[Step, ...]
    made: tuple[Step, ...]
    steps: tuple[Step, ...]
    places: tuple[int, ...]
    carried: tuple[int, ...]
    constants: tuple[tuple[int, Tensor], ...]
    query: int
    output: int
    size: int
    given: tuple[tuple[str, int, Layout], ...] = ()

    def prepare(self, queries: Tensor) -> list[Any]:
        """Values that all models share, from queries ``[n, *input]`` (``[M, n, *input]`` where they are each model's own)."""
        values = self.known(queries)
        values[self.query] = queries
        if not self.shared:
            return values
        n = queries.shape[int(self.own)]
        with torch.set_grad_enabled(torch.is_grad_enabled() and queries.requires_grad):
            for step in self.shared:
                step(values, 1, n)
        return values

    def known(self, like: Tensor) -> list[Any]:
        """Values at all places before anything has run: the constants, with device and dtype of a tensor."""
        values: list[Any] = [None] * self.size
        for place, constant in self.constants:
            values[place] = as_precise(constant.to(like.device), like.dtype)
        return values

    def weights(self, leaves: Sequence[Tensor]) -> list[Any]:
        """The values that :meth:`outputs` needs of the weights, computed from each slot's ``[M, *shape]``."""
        known = self.known(leaves[0])
        for place, leaf in zip(self.places, leaves, strict=True):
            known[place] = leaf
        for step in self.made:
            step(known, leaves[0].shape[0], 0)
        return [known[place] for place in self.carried]

    def outputs(self, shared: Sequence[Any], weights: Sequence[Any], models: int, n: int) -> Tensor:
        """``[M, n, *out]`` from what :meth:`prepare` and :meth:`weights` give."""
        values = list(shared)
        for place, value in zip(self.carried, weights, strict=True):
            values[place] = value
        for step in self.steps:
            step(values, models, n)
        result: Tensor = values[self.output]
        return result


def freeing(steps: list[Step], keep: set[int]) -> tuple[Step, ...]:
    """Steps that let go of what nobody reads any more."""
    made = {step.out for step in steps}
    seen: set[int] = set(keep)
    for step in reversed(steps):
        read = step.reads()
        step.frees = tuple((read & made) - seen)
        seen |= read
    return tuple(steps)
