"""One training step's losses and gradients: each model's own batch statistics and dropout masks.

The twin is a plain loop over modules in training mode, with ``torch.optim`` (tests/zoo). Groups of models are those of evaluation mode,
each on its whole batch at once, as statistics are of whole batches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..criteria import Named
from ..graph import Graph, Node
from ..operations import TABLE
from ..reference import value_shapes
from .calls import Layout
from .engine import Call, loss_and_gradient_of, sizes
from .layouts import channels_first
from .training_forms import Statistics, factors, noise_shape, probability

_BYTES = 64 << 20  # of what a group's forward pass leaves for its backward


class Noise:
    """The numbers that dropout draws, in the order of the graph's nodes: one call a model and step.

    Args:
        graph: of training mode.
        n: queries of the batch.
    """

    def __init__(self, graph: Graph, n: int) -> None:
        shapes = value_shapes(graph, n)
        self.nodes: list[tuple[int, Node, tuple[int, ...]]] = []
        for i, node in enumerate(graph.nodes):
            if probability(node) == 0:
                continue
            if TABLE[node.operation].form == "identity":
                self.nodes.append((i, node, noise_shape(node, shapes[f"@{i}"])))
            else:  # attention: a number for each query and key
                query, key = (shapes[str(node.argument(name))] for name in ("query", "key"))
                self.nodes.append((i, node, (*query[:-1], key[-2])))
        self.count = sum(math.prod(shape) for *_, shape in self.nodes)

    def draw(self, generators: Sequence[torch.Generator]) -> Tensor:
        """``[M, count]``, uniform on [0, 1), float32 on the CPU."""
        drawn = torch.empty(len(generators), self.count, dtype=torch.float32, device="cpu")
        for row, generator in zip(drawn, generators, strict=True):
            torch.rand(self.count, generator=generator, out=row)
        return drawn

    def given(self, drawn: Tensor) -> dict[str, Tensor]:
        """Factors and shifts of every dropout, ``[M, *shape]``, by reference."""
        made: dict[str, Tensor] = {}
        parts = drawn.split([math.prod(shape) for *_, shape in self.nodes], 1)
        for part, (i, node, shape) in zip(parts, self.nodes, strict=True):
            factor, shift = factors(node, part.view(len(part), *shape))
            made[f"@factor:{i}"] = factor
            if shift is not None:
                made[f"@shift:{i}"] = shift
        return made


class _Training(Call):
    """A call in training mode, one slab a group."""

    fill = 1  # a query that fills up would be in the statistics

    def __init__(
        self,
        weights: Tensor,
        queries: Tensor,
        graph: Graph,
        index: Tensor | None,
        generators: Sequence[torch.Generator],
        size: int | None = None,
    ) -> None:
        n = index.shape[1] if index is not None else queries.shape[int(queries.ndim == len(graph.input_shape) + 2)]
        self.noise, self.generators = Noise(graph, n), generators
        self.statistics: dict[int, list[Statistics]] = {}
        super().__init__(weights, queries, graph, index, size)
        self.slab = self.n

    @property
    def tried(self) -> int:
        return self.n

    def _sizes(self, full: int) -> tuple[int, int]:
        while full > 2 and 4 * full * sizes(self.graph)[0] * self.n > _BYTES:
            full //= 2
        return super()._sizes(full)

    def again(self, weights: Tensor, queries: Tensor, rows: list[int]) -> _Training:
        own = [torch.Generator().manual_seed(row) for row in rows]
        return _Training(weights, queries, self.graph, None, own, len(rows))

    def values(self, group: int, start: int) -> list[Any]:
        values = list(super().values(group, start))
        given: dict[str, Any] = {}
        if self.noise.nodes:
            drawn = self.noise.draw(self.generators[group : group + self.models])
            idle = self.filled(group) - len(drawn)
            drawn = torch.cat((drawn, drawn[-1:].expand(idle, -1))) if idle > 0 else drawn
            given = self.noise.given(drawn.to(self.weights.device, self.weights.dtype))
        given["@statistics"] = self.statistics[group] = []
        for reference, place, layout in self.program.given:
            value = given[reference]
            values[place] = channels_first(value, self.plain) if layout is Layout.CHANNELS else value
        return values


def training_step(
    weights: Tensor,
    queries: Tensor,
    targets: Tensor,
    graph: Graph,
    criterion: Named,
    temperature: float = 2.0,
    index: Tensor | None = None,
    generators: Sequence[torch.Generator] = (),
) -> tuple[Tensor, Tensor, Mapping[str, Tensor]]:
    """Per-model losses ``[k]``, gradients ``[k, P]`` and, by name, the running statistics ``[k, C]`` after this step.

    Args:
        weights, queries, targets, criterion, temperature, index: as in ``engine.loss_and_gradient``.
        graph: of training mode (``operations.training_graph``).
        generators: one a model, on the CPU, from which its dropout draws.
    """
    with torch.no_grad():
        call = _Training(weights.detach(), queries.detach(), graph, index, generators)
        losses, gradient = loss_and_gradient_of(call, targets, criterion, temperature)
        return losses, gradient, _running(call)


def _running(call: _Training) -> dict[str, Tensor]:
    """Running statistics after the step: (1 - momentum) old + momentum new, once for each time that a norm was run."""
    made: dict[str, Tensor] = {}
    groups = [call.statistics[start] for start in range(0, len(call.weights), call.models)]
    for found in zip(*groups, strict=True):
        first: Statistics = found[0]
        for part, reference in (("mean", first.running_mean), ("variance", first.running_var)):
            slot = call.graph.by_name[reference[3:]]
            old = made.get(slot.name, call.weights[:, slot.offset : slot.stop])
            new = torch.cat([getattr(statistics, part) for statistics in found])[: len(old)]
            made[slot.name] = old * (1 - first.momentum) + new * first.momentum
    return made


__all__ = ["Noise", "training_step"]
