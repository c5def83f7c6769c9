"""Second moments of layer inputs in networks that are no plain chain of layers: what the nodes of their graph read."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..architecture import Architecture
from ..errors import require
from ..kernels.graph import Node
from ..kernels.reference import graph_values
from ..permutation import hidden_channels, random_views
from ..tokens import Layer, layers_of

_VIEWS, _CHUNK = 8, 128


def graph_second_moments(weights: Tensor, queries: Tensor, architecture: Architecture) -> list[Tensor]:
    """``E[x x^T]`` of the inputs of every tokenised layer that a linear or an ungrouped two-dimensional convolution node multiplies with
    its parameter, over queries, positions and models, each in eight views drawn at random. The identity for every other layer (norms,
    running statistics, grouped convolutions, tables), whose rows count as they are.

    Args:
        weights: ``[k, P]``. Models with a non-finite input are left out.
        queries: ``[n, *input_shape]``.
        architecture: one that has a graph.

    Returns:
        float64 ``[width, width]`` a layer, x laid out like a row of it.

    Raises:
        WslfastError: a module that cannot be traced, or no model with finite inputs.
    """
    graph, layers = architecture.graph, layers_of(architecture)
    require(graph is not None, f"architecture {architecture.name!r} cannot be traced, so its layers' inputs cannot be followed; use plain")
    assert graph is not None
    of_weight = {f"@w:{layer.slot.name}": i for i, layer in enumerate(layers)}
    uses = [(node, of_weight[w]) for node in graph.nodes if (w := str(node.argument("weight"))) in of_weight]
    uses = [(node, i) for node, i in uses if _followed(node, layers[i])]
    queries = queries.to(weights.device, torch.float32)
    sums: dict[int, Tensor] = {}
    kept = 0
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(_VIEWS if hidden_channels(architecture) else 1):
            for row in random_views(weights, architecture, generator):
                own: dict[int, Tensor] = {}
                for images in queries.split(_CHUNK):
                    values: dict[str, Any] = dict(graph_values(row, images, graph))
                    for node, i in uses:
                        x = _inputs(node, layers[i], values[str(node.argument("input"))])
                        own[i] = own.get(i, 0) + (x.mT @ x).double() / len(x) * (len(images) / len(queries))
                if all(bool(moment.isfinite().all()) for moment in own.values()):
                    kept += 1
                    for i, moment in own.items():
                        sums[i] = sums.get(i, torch.zeros_like(moment)) + moment
    require(kept > 0, "the activation metric: none of the models drawn has finite activations")
    eyes = (torch.eye(layer.width, dtype=torch.float64, device=weights.device) for layer in layers)
    return [sums[i] / kept if i in sums else eye for i, eye in enumerate(eyes)]


def _followed(node: Node, layer: Layer) -> bool:
    """Whether the layer's rows are what the node multiplies its input with."""
    plain = node.operation == "linear" or (node.operation == "conv2d" and node.argument("groups", 1) == 1)
    width = layer.slot.size // max(layer.channels, 1)
    return plain and layer.axes == (0,) and layer.width in (width, width + 1)


def _inputs(node: Node, layer: Layer, x: Tensor) -> Tensor:
    """``[m, width]``: what the rows meet, 1 last if they have a bias."""
    if node.operation == "linear":
        met = x.reshape(-1, x.shape[-1])
    else:
        settings = [_pair(node.argument(name, default)) for name, default in (("dilation", 1), ("padding", 0), ("stride", 1))]
        met = F.unfold(x, layer.slot.shape[2:], *settings).mT.reshape(-1, layer.slot.size // layer.channels)
    return F.pad(met, (0, 1), value=1.0) if layer.bias is not None else met


def _pair(value: Any) -> tuple[int, int]:
    sizes = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return (int(sizes[0]), int(sizes[-1]))
