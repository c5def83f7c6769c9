"""Networks that come down to a chain which the kernels know: norms in evaluation mode folded into the layers beside them, averages of any
window into the linear layer above them.

The fold is plain torch on ``[k, P]`` rows of weights, so that torch's autograd carries the kernels' gradient through it to the network's
own weights, running statistics included. It is elementwise over models: a model's bits do not depend on its company. Twin: the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..chains import chain_of
from ..graph import Graph
from ..layers import Dropout, Flatten, Layer, Layers, Linear, Pool2d, Unplannable, layer_slots, shapes
from ..stacked.folded_chain import folded_rows, whole_segment
from .schedule import schedule

Rows = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Chain:
    """A network as the kernels run it.

    Attributes:
        layers: what their schedule is made of.
        rows: the chain's rows of weights from the network's; None where they are the same.
    """

    layers: Layers
    rows: Rows | None


@lru_cache(maxsize=256)
def chain(graph: Graph) -> Chain:
    """The chain of a graph. Raises Unplannable naming what the kernels do not know."""
    layers = chain_of(graph)
    rows: Rows | None = None
    if not layers:
        segment = whole_segment(graph)
        if segment is None:
            raise Unplannable("it is not a chain of convolutions, norms, activations, poolings and linear layers from the query to the end")
        layers, rows = segment.layers, partial(folded_rows, graph=graph, segment=segment)
    try:
        schedule(layers, graph.input_shape)
    except Unplannable:
        folded = _without_averages(layers, graph.input_shape)
        if folded is None:
            raise
        layers, averaged = folded
        schedule(layers, graph.input_shape)
        first = rows
        rows = averaged if first is None else lambda weights: averaged(first(weights))
    return Chain(layers, rows)


def _without_averages(layers: Layers, input_shape: tuple[int, ...]) -> tuple[Layers, Rows] | None:
    """Layers without the averages whose result a linear layer reads, and the rows that make up for them; None if there are none."""
    where, slots = shapes(layers, input_shape), layer_slots(layers)
    folds: dict[int, Tensor] = {}  # linear layer -> [pooled pixels, pixels]
    dropped: set[int] = set()
    for i, layer in enumerate(layers):
        if not isinstance(layer, Pool2d) or layer.mode != "avg":
            continue
        j = i + 1
        while j < len(layers) and isinstance(layers[j], (Flatten, Dropout)):
            j += 1
        if j < len(layers) and isinstance(layers[j], Linear) and any(isinstance(between, Flatten) for between in layers[i:j]):
            height, width = where[i][1:]
            pixels = torch.eye(height * width, dtype=torch.float64).view(-1, 1, height, width)
            folds[j] = F.avg_pool2d(pixels, layer.kernel_size, layer.stride, layer.padding).flatten(1).T.contiguous()
            dropped.add(i)
    if not folds:
        return None
    made: list[Layer] = []
    for i, layer in enumerate(layers):
        if i in folds:
            assert isinstance(layer, Linear)
            pooled, whole = folds[i].shape
            made.append(Linear(layer.name, layer.in_features // pooled * whole, layer.out_features, layer.bias))
        elif i not in dropped:
            made.append(layer)

    def rows(weights: Tensor) -> Tensor:
        pieces = []
        for i, (layer, own) in enumerate(zip(layers, slots, strict=True)):
            if own.weight is None:
                continue
            part = weights[:, own.weight.offset : own.weight.stop]
            if i in folds:
                assert isinstance(layer, Linear)
                spread = folds[i].to(part)
                narrow = part.view(len(part), layer.out_features, -1, len(spread))  # [k, out, C, pooled]
                wide = narrow[..., :1] * spread[0]
                for p in range(1, len(spread)):  # one after another: a product of matrices could sum otherwise for other k
                    wide = torch.addcmul(wide, narrow[..., p : p + 1], spread[p])
                part = wide.flatten(1)
            pieces.append(part)
            if own.bias is not None:
                pieces.append(weights[:, own.bias.offset : own.bias.stop])
        return torch.cat(pieces, 1)

    return tuple(made), rows
