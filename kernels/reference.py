"""The readable plain-torch twin of everything that is fast elsewhere: the oracle of tests and benchmarks.

Works in any floating dtype, float64 included, on any device, with autograd. Nothing here is tuned.

Shapes: weights ``[k, P]``, queries ``[n, C, H, W]`` shared by all models or ``[k, n, C, H, W]`` one set a model,
outputs ``[k, n, K]``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .criteria import criterion_values
from .dtypes import DTYPES, HELD, as_precise, is_continuous
from .graph import QUERY, Graph, Node, check, is_size, substitute
from .layers import ACTIVATIONS, Activation, Conv2d, Dropout, Flatten, Layers, Linear, Pool2d, layer_slots
from .operations import TABLE
from .picking import unstrided


def activation(x: Tensor, layer: Activation) -> Tensor:
    """The layer's elementwise function of ``x``: the operation that the table of activations names."""
    if layer.function not in ACTIVATIONS:
        raise ValueError(f"unknown activation {layer.function!r}")
    operation, _, argument, _ = ACTIVATIONS[layer.function]
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
            x, stride = unstrided(x, weight.shape[2:], layer.stride, layer.padding)
            x = F.conv2d(x, weight, bias, stride, layer.padding, layer.spacing, layer.groups)
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
    own_queries = per_model_queries(queries, layers)
    return beside([forward_one(w.clone(), queries[j].clone() if own_queries else queries, layers) for j, w in enumerate(weights)])


def beside(answers: Sequence[Tensor]) -> Tensor:
    """Answers of models that ran one after another, ``[k, ...]``. Gradients are copied, too: they come as rows of one tensor."""
    return torch.stack([answer * 1 if answer.requires_grad else answer for answer in answers])


def loss_and_gradient(
    weights: Tensor, queries: Tensor, targets: Tensor, layers: Layers, criterion: str, temperature: float = 2.0
) -> tuple[Tensor, Tensor]:
    """Per-model losses ``[k]`` and their gradients ``[k, P]`` with respect to each model's own weights.

    One model after another, its graph freed before the next begins: memory does not grow with k.
    """
    losses = weights.new_empty(weights.shape[0])
    gradient = torch.empty_like(weights, memory_format=torch.contiguous_format)
    own_queries = per_model_queries(queries, layers)
    for j in range(weights.shape[0]):
        with torch.enable_grad():
            row = weights[j].detach().clone().requires_grad_()  # copies, as in forward
            outputs = forward_one(row, queries[j].clone() if own_queries else queries, layers)
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
        values[f"@c:{constant.name}"] = as_precise(constant.value.to(queries.device), queries.dtype)
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


_MOST_NUMBERS = 1 << 28  # of one value of one model and query: a gigabyte
_CUTS = ("slice.Tensor", "narrow", "select.int", "slice_scatter", "select_scatter")
_MOST_PARTS = 1 << 12  # that one operation cuts a value into


@lru_cache(maxsize=256)
def value_shapes(graph: Graph, n: int = 2) -> dict[str, Any]:
    """Shape of every value for n queries, a list of shapes where an operation gives several tensors. Nothing is computed or allocated.
    Raises ValueError naming a node that does not fit what it reads, or makes more than any machine holds."""
    return {
        reference: [tuple(t.shape) for t in value] if isinstance(value, (tuple, list)) else tuple(value.shape)
        for reference, value in _unallocated(graph, n).items()
    }


@lru_cache(maxsize=256)
def complex_values(graph: Graph) -> frozenset[str]:
    """References of the values that are complex numbers."""
    return frozenset(r for r, parts in _parts(graph) if any(t.is_complex() for t in parts))


@lru_cache(maxsize=256)
def discrete_values(graph: Graph) -> frozenset[str]:
    """References of the values that are whole numbers or truths, and have no gradient."""
    return frozenset(r for r, parts in _parts(graph) if not any(map(is_continuous, parts)))


def _parts(graph: Graph) -> Iterator[tuple[str, Sequence[Tensor]]]:
    for reference, value in _unallocated(graph, 2).items():
        yield reference, value if isinstance(value, (tuple, list)) else (value,)


def check_values(graph: Graph) -> Graph:
    """The graph itself. Raises ValueError as :func:`value_shapes` does, and for an answer that is not floating ``[n, *out]`` or in which
    a query's place counts."""
    two, three = (_unallocated(graph, n) for n in (2, 3))
    for i, node in enumerate(graph.nodes):
        if node.operation in _CUTS and any(is_size(value) for _, value in node.arguments):
            source, axis = str(node.argument("self")), node.argument("dim", 0)
            if two[source].shape[axis] == three[source].shape[axis]:
                raise ValueError(f"node {i} ({node.operation}): it reads by the number of queries, so that a query's place would count")
    answers = [values[graph.output] for values in (two, three)]
    check(all(isinstance(a, Tensor) and a.is_floating_point() for a in answers), "output: expected one floating tensor")
    sizes = [list(a.shape) for a in answers]
    whole = sizes[0][:1] == [2] and sizes[1][:1] == [3] and sizes[0][1:] == sizes[1][1:]
    check(whole, f"output: expected one answer a query, got {sizes[0]} for 2 and {sizes[1]} for 3")
    return graph


@lru_cache(maxsize=64)
def _unallocated(graph: Graph, n: int) -> Mapping[str, Any]:
    """Every value for n queries as a tensor without memory; not to be written to."""
    values: dict[str, Any] = {QUERY: torch.empty(n, *graph.input_shape, device="meta", dtype=torch.float32)}
    for slot in graph.slots:
        values[f"@w:{slot.name}"] = torch.empty(slot.shape, device="meta", dtype=torch.float32)
    for constant in graph.constants:
        values[f"@c:{constant.name}"] = torch.empty(constant.shape, device="meta", dtype=HELD[constant.dtype])
    for i, node in enumerate(graph.nodes):
        try:
            with torch.no_grad():
                made = _without_memory(node, values, n)
            parts = made if isinstance(made, (tuple, list)) else (made,)
            most = max((t.numel() for t in parts), default=0)
            check(most <= n * _MOST_NUMBERS, f"it makes {most:,} numbers")
        except Exception as error:  # whatever an operator raises where arguments do not fit
            first = (str(error).strip() or type(error).__name__).splitlines()[0].removeprefix("graph: ")
            raise ValueError(f"node {i} ({node.operation}) does not fit: {first:.200}") from None
        values[f"@{i}"] = made
    return values


_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


def _check_recurrence(node: Node, values: Mapping[str, Any], x: Tensor) -> None:
    """Shapes of states and parameters: torch reads them without looking, and beyond their end."""
    given = {name: substitute(value, values.__getitem__, 0) for name, value in node.arguments}
    layers, directions, biases = int(given["num_layers"]), 1 + bool(given["bidirectional"]), bool(given["has_biases"])
    kind = node.operation.partition(".")[0]
    check(0 < layers <= len(given["params"]), "expected parameters of every layer")
    states = given["hx"] if isinstance(given["hx"], (list, tuple)) else [given["hx"]]
    check(len(states) == (2 if kind == "lstm" else 1), "expected another number of states")
    check(all(isinstance(s, Tensor) and s.ndim == 3 for s in states), "expected states of three axes")
    # the hidden state of an LSTM may be a projection of what is in its cells
    seen, width, queries = states[0].shape[-1], states[-1].shape[-1], x.shape[0 if given["batch_first"] else 1]
    fit = all(tuple(s.shape[:2]) == (layers * directions, queries) for s in states) and 0 < seen <= width
    check(fit, "expected states [layers, queries, width]")
    rows = _GATES[kind] * width
    behind = [*([(rows,)] * 2 if biases else []), *([(seen, width)] if seen < width else [])]
    wanted: list[tuple[int, ...]] = []
    for layer in range(layers):
        wanted += [(rows, x.shape[2] if layer == 0 else seen * directions), (rows, seen), *behind] * directions
    parameters = given["params"]
    shapes = [tuple(p.shape) for p in parameters if isinstance(p, Tensor)]
    check(len(shapes) == len(parameters) and shapes == wanted, "expected parameters of other shapes")


def _without_memory(node: Node, values: dict[str, Any], n: int) -> Any:
    """What one node gives, where that takes neither memory nor time."""
    form, name = TABLE[node.operation].form, node.operation.partition(".")[0]
    if form == "getitem":
        check(isinstance(values[str(node.argument("self"))], (tuple, list)), "it reads a part of what is one tensor")
    if name in ("split", "chunk", "unbind"):
        length = values[str(node.argument("self"))].shape[node.argument("dim", 0)]
        size, chunks = (substitute(node.argument(key, 1), values.__getitem__, n) for key in ("split_size", "chunks"))
        parts = {"split": -(-length // max(1, size)), "chunk": chunks, "unbind": length}[name]
        check(parts <= _MOST_PARTS, f"it makes {parts:,} parts")
    if form != "recurrent":
        return call_node(node, values, n)
    # torch goes through a recurrence step by step even here; one step has all the shapes
    first = str(node.argument("input"))
    whole, axis = values[first], int(bool(node.argument("batch_first")))
    check(whole.ndim == 3, "expected an input of three axes")
    _check_recurrence(node, values, whole)
    made = list(call_node(node, {**values, first: whole.narrow(axis, 0, 1)}, n))
    made[0] = made[0].expand(*(length if d == axis else -1 for d, length in enumerate(whole.shape)))
    return made
