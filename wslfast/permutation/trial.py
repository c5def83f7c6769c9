"""Whether permutations that were derived from a graph leave its outputs alone: tried with random weights, in float64.

The rules of ``following.py`` are a proof only as far as they are right; a network is believed to have the views that a trial shows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..kernels.graph import Graph
from ..kernels.reference import run_graph
from .axes import ChannelGroups, Permutations

_QUERIES = 2
_TOLERANCE = 1e-6  # of outputs in float64, whose rounding is some 1e-12
_LARGEST = 1 << 26  # numbers of a network that is tried


def failing(graph: Graph, groups: ChannelGroups) -> tuple[int, ...]:
    """Numbers of the groups of which a permutation changes the outputs; none where nothing could be run."""
    if not sum(groups.sizes) or graph.parameters > _LARGEST:
        return ()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # not those of GPUs, which nobody draws from here
        weights, queries = _weights(graph), torch.randn(_QUERIES, *graph.input_shape, dtype=torch.float64)
        try:
            expected = run_graph(weights, queries, graph)
        except (IndexError, RuntimeError):  # indices, not numbers
            queries = torch.randint(0, 2, queries.shape).double()
            expected = run_graph(weights, queries, graph)

        def same(permutations: Permutations) -> bool:
            read = groups.source(graph.slots, graph.parameters, permutations, permutations)
            actual = run_graph(weights[read[0]], queries, graph)
            difference, scale = (actual - expected).nan_to_num(0.0).abs().max(), expected.nan_to_num(0.0).abs().max()
            return bool(difference <= _TOLERANCE * scale) and torch.equal(actual.isnan(), expected.isnan())

        still = [torch.arange(size).unsqueeze(0) for size in groups.sizes]
        tries = [[p.roll(1, 1) for p in still], [_shuffled(size) for size in groups.sizes]]
        if all(same(tuple(drawn)) for drawn in tries):
            return ()
        alone = [g for g in range(len(still)) if not all(same((*still[:g], drawn[g], *still[g + 1 :])) for drawn in tries)]
        return tuple(alone or range(len(still)))


def _weights(graph: Graph) -> Tensor:
    """Random numbers ``[P]`` through which a network still says something: of the size that its layers begin with."""
    parts = []
    for slot in graph.slots:
        numbers = torch.randn(slot.shape, dtype=torch.float64)
        if len(slot.shape) > 1:
            numbers *= math.sqrt(2 * slot.shape[0] / max(slot.size, 1))
        elif slot.name.endswith(("weight", "running_var")):
            numbers = 1 + 0.5 * numbers.tanh()
        parts.append(numbers.flatten())
    return torch.cat(parts)


def _shuffled(size: int) -> Tensor:
    drawn = torch.randperm(size).unsqueeze(0)
    return drawn.roll(1, 1) if bool((drawn == torch.arange(size)).all()) else drawn
