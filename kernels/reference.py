"""The readable plain-torch twin of everything that is fast elsewhere: the oracle of tests and benchmarks.

Works in any floating dtype, float64 included, on any device, with autograd. Nothing here is tuned.

Shapes: weights ``[k, P]``, queries ``[n, C, H, W]`` shared by all models or ``[k, n, C, H, W]`` one set a model,
outputs ``[k, n, K]``.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .criteria import criterion_values
from .graph import DTYPES, QUERY, Graph, Node, substitute
from .layers import ACTIVATIONS, Activation, Conv2d, Dropout, Flatten, Layers, Linear, Pool2d, layer_slots
from .operations import TABLE


def activation(x: Tensor, layer: Activation) -> Tensor:
    """The layer's elementwise function of ``x``: the operation that the table of activations names."""
    if layer.function not in ACTIVATIONS:
        raise ValueError(f"unknown activation {layer.function!r}")
    operation, argument, _ = ACTIVATIONS[layer.function]
    if not operation:
        return x
    given = {argument: layer.parameter} if argument is not None else {"approximate": layer.approximate} if layer.function == "gelu" else {}
    return TABLE[operation].call({"self": x, **given})  # type: ignore[no-any-return]


def forward_one(weights: Tensor, queries: Tensor, layers: Layers) -> Tensor:
    """Outputs ``[n, K]`` of the one model whose row of weights is ``[P]``, in evaluation mode."""
    x = queries
    for layer, slots in zip(layers, layer_slots(layers), strict=True):
        if slots.weight is not None:
            weight = weights[slots.weight.offset : slots.weight.stop].view(slots.weight.shape)
            bias = None if slots.bias is None else weights[slots.bias.offset : slots.bias.stop]
        if isinstance(layer, Conv2d):
            x = F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.spacing, layer.groups)
        elif isinstance(layer, Linear):
            x = F.linear(x, weight, bias)
        elif isinstance(layer, Pool2d):
            pool = F.max_pool2d if layer.mode == "max" else F.avg_pool2d
            x = pool(x, layer.kernel_size, layer.stride)
        elif isinstance(layer, Activation):
            x = activation(x, layer)
        elif isinstance(layer, Flatten):
            x = x.flatten(1)
        elif not isinstance(layer, Dropout):
            raise ValueError(f"unknown layer {layer!r}")
    return x


def per_model_queries(queries: Tensor, layers: Layers) -> bool:
    """Whether ``queries`` carries a leading axis over models."""
    return queries.ndim in (3, 5)  # one query has one axis or three


def forward(weights: Tensor, queries: Tensor, layers: Layers) -> Tensor:
    """Outputs ``[k, n, K]``: one model after another, so no model can depend on its neighbours.

    Rows are copied: BLAS rounds differently at addresses of other alignment, and a row's would depend on its place among the models.
    """
    own = per_model_queries(queries, layers)
    return torch.stack([forward_one(w.clone(), queries[j].clone() if own else queries, layers) for j, w in enumerate(weights)])


def forward_grouped(weights: Tensor, queries: Tensor, layers: Layers) -> Tensor:
    """The same outputs with all models in one call a layer: models are the groups of a convolution, batches of a matmul.

    The formulation that torch offers for a GPU, where a loop over models is bound by launches.
    """
    k = weights.shape[0]
    own = per_model_queries(queries, layers)
    x = queries.transpose(0, 1) if own else queries.unsqueeze(1).expand(-1, k, *queries.shape[1:])  # [n, k, ...]
    n = x.shape[0]
    for layer, slots in zip(layers, layer_slots(layers), strict=True):
        if slots.weight is not None:
            weight = weights[:, slots.weight.offset : slots.weight.stop]
            bias = None if slots.bias is None else weights[:, slots.bias.offset : slots.bias.stop]
        if isinstance(layer, Conv2d):
            x = F.conv2d(
                x.reshape(n, -1, *x.shape[-2:]),
                weight.reshape(k * layer.out_channels, *layer.weight_shape[1:]),
                None if bias is None else bias.reshape(-1),
                layer.stride,
                layer.padding,
                layer.spacing,
                k * layer.groups,
            )
            x = x.view(n, k, layer.out_channels, *x.shape[-2:])
        elif isinstance(layer, Linear):
            x = torch.einsum("nki,koi->nko", x, weight.view(k, *layer.weight_shape))
            x = x if bias is None else x + bias
        elif isinstance(layer, Pool2d):
            pool = F.max_pool2d if layer.mode == "max" else F.avg_pool2d
            x = pool(x.reshape(n, -1, *x.shape[-2:]), layer.kernel_size, layer.stride)
            x = x.view(n, k, -1, *x.shape[-2:])
        elif isinstance(layer, Activation):
            x = activation(x, layer)
        elif isinstance(layer, Flatten):
            x = x.flatten(2)
    return x.transpose(0, 1)


def loss_and_gradient(
    weights: Tensor, queries: Tensor, targets: Tensor, layers: Layers, criterion: str, temperature: float = 2.0
) -> tuple[Tensor, Tensor]:
    """Per-model losses ``[k]`` and their gradients ``[k, P]`` with respect to each model's own weights.

    One model after another, its graph freed before the next begins: memory does not grow with k.
    """
    losses = weights.new_empty(weights.shape[0])
    gradient = torch.empty_like(weights, memory_format=torch.contiguous_format)
    own = per_model_queries(queries, layers)
    for j in range(weights.shape[0]):
        with torch.enable_grad():
            row = weights[j].detach().clone().requires_grad_()  # copies, as in forward
            outputs = forward_one(row, queries[j].clone() if own else queries, layers)
            value = criterion_values(outputs[None].to(weights.dtype), targets[j][None], criterion, temperature)[0]
        losses[j] = value.detach()
        (gradient[j],) = torch.autograd.grad(value, row)
    return losses, gradient


# -- graphs ------------------------------------------------------------------------------------------------------------


def run_graph(weights: Tensor, queries: Tensor, graph: Graph) -> Tensor:
    """Outputs ``[n, *out]`` of the one model whose row of weights is ``[P]``: node after node, each one plain call. In a graph of training
    mode, dropout draws from torch's own generator."""
    return dict(graph_values(weights, queries, graph))[graph.output]  # type: ignore[no-any-return]


def graph_values(weights: Tensor, queries: Tensor, graph: Graph) -> Iterator[tuple[str, Any]]:
    """Every value of a graph for one model, with its reference, in the order in which it is computed."""
    values: dict[str, Any] = {QUERY: queries}
    for slot in graph.slots:
        values[f"@w:{slot.name}"] = weights[slot.offset : slot.stop].view(slot.shape)
    for constant in graph.constants:
        value = constant.value.to(queries.device)
        values[f"@c:{constant.name}"] = value.to(queries.dtype) if value.is_floating_point() else value
    yield from values.items()
    for i, node in enumerate(graph.nodes):
        values[f"@{i}"] = call_node(node, values, len(queries))
        yield f"@{i}", values[f"@{i}"]


def call_node(node: Node, values: dict[str, Any], n: int) -> Any:
    """What one node gives."""
    arguments = {name: substitute(value, values.__getitem__, n) for name, value in node.arguments}
    if isinstance(arguments.get("dtype"), str):
        arguments["dtype"] = DTYPES[arguments["dtype"]]
    operation = TABLE[node.operation]
    still = operation.form == "identity" and not arguments.get("train")
    return arguments["input"] if still else operation.call(arguments)


@lru_cache(maxsize=256)
def value_shapes(graph: Graph, n: int = 2) -> dict[str, Any]:
    """Shape of every value for n queries, a list of shapes where an operation gives several tensors. Nothing is computed or allocated.
    Raises ValueError naming a node that does not fit what it reads."""
    shapes: dict[str, Any] = {}
    weights = torch.empty(graph.parameters, device="meta", dtype=torch.float32)
    queries = torch.empty(n, *graph.input_shape, device="meta", dtype=torch.float32)
    try:
        with torch.no_grad():
            for reference, value in graph_values(weights, queries, graph):
                shapes[reference] = [tuple(t.shape) for t in value] if isinstance(value, (tuple, list)) else tuple(value.shape)
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as error:
        at = sum(reference[1:].isdigit() for reference in shapes)
        what = graph.nodes[at].operation if at < len(graph.nodes) else "a parameter"
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"node {at} ({what}) does not fit: {first:.200}") from None
    return shapes
