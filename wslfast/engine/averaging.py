"""The gradient of a mean over models, divided where it is smallest."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ..architecture import Architecture
from ..kernels.criteria import Averaged, Named
from ..kernels.graph import Graph
from .preference import preferred

_NUMBER = 4  # bytes


def of_mean(criterion: str, architecture: Architecture, weights: Tensor, backend: str) -> Named:
    """The criterion whose gradients are those of a mean over these models, where a path can divide them early: a pass over gradients
    ``[k, P]`` less. As it is where it cannot, and where 16-bit floats inside of a network would lose numbers that are so much smaller.
    """
    graph, device = architecture.graph, weights.device.type
    if (
        graph is None
        or weights.element_size() < _NUMBER
        or device != "cpu"
        or preferred(backend) == "triton"
        or torch.is_autocast_enabled(device)
        or _halved(graph)
    ):
        return criterion
    return Averaged(criterion, weights.shape[0])


@lru_cache(maxsize=256)
def _halved(graph: Graph) -> bool:
    return any("float16" in str(value) for node in graph.nodes for _, value in node.arguments)
