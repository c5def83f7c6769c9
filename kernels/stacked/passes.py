"""Forward and backward of one group of models over its slabs of queries: by the tape, or by torch's graph, which is its twin."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .program import Program
from .tape import NOWHERE, Into, Tape, tape_of

# A slab: its first query, and the values that ``Program.prepare`` gives for it.
Slabs = Iterable[tuple[int, Sequence[Any]]]
# (first query, outputs [M, n, *out]) -> (shares of the losses [M], gradient of their sum with respect to the outputs).
Share = Callable[[int, Tensor], tuple[Tensor, Tensor]]


_NOTHING = nullcontext()


def no_gradients() -> AbstractContextManager[None]:
    """``torch.no_grad()``, and nothing where that holds already: it is ten calls of Python, of the four hundred of a small loss."""
    return torch.no_grad() if torch.is_grad_enabled() else _NOTHING


@lru_cache(maxsize=256)
def tapes_of(program: Program) -> tuple[Tape, Tape]:
    """Of what is made of the weights alone, and of the rest."""
    return tape_of(program.made, program.places, program.carried), tape_of(program.steps, program.carried, (program.output,))


def by_tape(program: Program, leaves: Sequence[Tensor], slabs: Slabs, share: Share, into: Into = NOWHERE) -> tuple[Tensor, list[Tensor]]:
    """Losses ``[M]`` and gradients of each slot's ``[M, *shape]``, through rules written out and, where there is none, islands.

    ``into``: memory for the gradients of some slots, by place, where there is one slab; they may come there or elsewhere.
    """
    made, rest = tapes_of(program)
    models = leaves[0].shape[0]

    def slab(start: int, prepared: Sequence[Any]) -> tuple[Tensor, list[Tensor | None]]:
        (outputs,), saved = rest.forward(list(prepared), carried, models, prepared[program.query].shape[int(program.own)])
        value, slope = share(start, outputs)
        return value, rest.backward([slope], saved, models, program.size, into)

    with no_gradients():
        carried, kept = made.forward(program.known(leaves[0]), leaves, models, 0)
        total, sums = _over(slabs, slab)
        gradients = made.backward(sums, kept, models, program.size)
    return total, [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, gradients, strict=True)]


def by_graph(
    program: Program, leaves: Sequence[Tensor], slabs: Slabs, share: Share, context: Callable[[], Any]
) -> tuple[Tensor, list[Tensor]]:
    """The same through torch's graph, in a ``context`` such as autocast."""
    models = leaves[0].shape[0]
    with context():
        carried, made = _cut(program, leaves)
    wanted = [value.requires_grad_(source.requires_grad) for value, source in zip(carried, made, strict=True) if source.requires_grad]

    def slab(start: int, prepared: Sequence[Any]) -> tuple[Tensor, list[Tensor | None]]:
        with torch.enable_grad(), context():
            outputs = program.outputs(prepared, carried, models, prepared[program.query].shape[int(program.own)])
        with torch.no_grad():
            value, slope = share(start, outputs.detach())
        # models are independent: the gradient of the sum is each model's own
        found = iter(torch.autograd.grad(outputs, wanted, slope.to(outputs.dtype), allow_unused=True))
        return value, [next(found) if source.requires_grad else None for source in made]

    total, sums = _over(slabs, slab)
    return total, _to_leaves(leaves, made, sums)


def _over(slabs: Slabs, run: Callable[[int, Sequence[Any]], tuple[Tensor, list[Tensor | None]]]) -> tuple[Tensor, list[Tensor | None]]:
    """The sums over all slabs of the value and of the gradients that ``run`` returns for each."""
    each = (run(start, prepared) for start, prepared in slabs)
    total, sums = next(each)
    for value, parts in each:
        total = total + value
        sums = [_sum(a, b) for a, b in zip(sums, parts, strict=True)]
    return total, sums


def _cut(program: Program, leaves: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The values that the program computes from the weights alone: detached from torch's graph, and with it.

    They are computed once, whatever the number of slabs. Slabs differentiate with respect to the detached ones; the sum of those gradients
    then goes through the graph to the weights once.
    """
    with torch.enable_grad():
        made = program.weights([leaf.requires_grad_() for leaf in leaves])
    return [value.detach() for value in made], made


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _to_leaves(leaves: Sequence[Tensor], made: Sequence[Tensor], sums: Sequence[Tensor | None]) -> list[Tensor]:
    """Gradients of the parameters, from the gradients of the values that were computed from them; zeros where there is none."""
    pairs = [(value, g) for value, g in zip(made, sums, strict=True) if g is not None and value.requires_grad]
    if not pairs:
        return [torch.zeros_like(leaf) for leaf in leaves]
    return list(torch.autograd.grad([v for v, _ in pairs], list(leaves), [g for _, g in pairs], materialize_grads=True))


__all__ = ["by_graph", "by_tape", "no_gradients", "tapes_of"]
