"""Chains of layer records as graphs, and back: a graph that is a plain chain runs on the wings that are made for chains."""

from __future__ import annotations

from typing import Any

from .graph import QUERY, Graph, Node, slots_of
from .layers import (
    ACTIVATIONS,
    Activation,
    Affine,
    Conv2d,
    Dropout,
    Flatten,
    Layer,
    Layers,
    Linear,
    Pool2d,
    layer_slots,
    output_shape,
    shapes,
)

_FUNCTIONS = {entry.operation: (function, entry.argument) for function, entry in ACTIVATIONS.items() if entry.operation}


def graph_of(layers: Layers, input_shape: tuple[int, ...]) -> Graph:
    """The graph of a chain of layers. Raises ValueError naming a layer that does not fit its input."""
    sizes = shapes(layers, input_shape)
    slots = [s for pair in layer_slots(layers) for s in (pair.weight, pair.bias) if s is not None]
    if not slots:
        raise ValueError("it has no parameters")
    if len({s.name for s in slots}) != len(slots):
        raise ValueError("two layers share a name")
    nodes: list[Node] = []
    x = QUERY
    for layer, size in zip(layers, sizes, strict=False):
        node = _node_of(layer, x, size)
        if node is not None:
            nodes.append(node)
            x = f"@{len(nodes) - 1}"
    return Graph(tuple(input_shape), tuple(nodes), x, slots_of({s.name: s.shape for s in slots}))


def _node_of(layer: Layer, x: str, size: tuple[int, ...]) -> Node | None:
    """The node of a layer that reads ``x``; None for the identity."""
    if isinstance(layer, (Conv2d, Linear)):
        arguments: list[tuple[str, Any]] = [("input", x), ("weight", f"@w:{layer.name}.weight")]
        if layer.bias:
            arguments.append(("bias", f"@w:{layer.name}.bias"))
        if isinstance(layer, Linear):
            return Node("linear", tuple(arguments))
        further = (
            ("stride", layer.stride, (1, 1)),
            ("padding", layer.padding, (0, 0)),
            ("dilation", layer.spacing, (1, 1)),
            ("groups", layer.groups, 1),
        )
        return Node("conv2d", (*arguments, *((name, value) for name, value, default in further if value != default)))
    if isinstance(layer, Pool2d):
        stride = () if layer.stride == layer.kernel_size else (("stride", layer.stride),)
        return Node(f"{layer.mode}_pool2d", (("self", x), ("kernel_size", layer.kernel_size), *stride))
    if isinstance(layer, Flatten):
        return Node("flatten.using_ints", (("self", x), ("start_dim", -len(size)), ("end_dim", -1)))
    if isinstance(layer, Dropout):
        return Node("dropout", (("input", x), ("p", float(layer.p)), ("train", False)))
    if isinstance(layer, Affine):
        raise TypeError("an affine step is part of a batch norm, not a layer of a network")
    if layer.function == "identity":
        return None
    operation, _, argument, default = ACTIVATIONS[layer.function]
    given: tuple[tuple[str, Any], ...] = (("self", x),)
    if argument is not None and layer.parameter != default:
        given = (*given, (argument, float(layer.parameter)))
    if layer.approximate != "none":
        given = (*given, ("approximate", layer.approximate))
    return Node(operation, given)


def chain_of(graph: Graph) -> Layers:
    """The layer records of a graph that is a plain chain of them, to one number per class; no records for any other."""
    x, layers, shape = QUERY, [], graph.input_shape
    for i, node in enumerate(graph.nodes):
        layer = _layer_of(node, i, x, graph, shape)
        if layer is None:
            return ()
        layers.append(layer)
        x, shape = f"@{i}", output_shape(layer, shape)
    records = tuple(layers)
    slots = [s.name for pair in layer_slots(records) for s in (pair.weight, pair.bias) if s is not None]
    plain = graph.output == x and len(shape) == 1 and slots == [s.name for s in graph.slots] and bool(slots)
    return records if plain and not graph.constants and not graph.aliases else ()


def _layer_of(node: Node, i: int, x: str, graph: Graph, shape: tuple[int, ...]) -> Layer | None:
    given = dict(node.arguments)
    source = given.pop("input", given.pop("self", None))
    if source != x:
        return None
    name = f"{node.operation.partition('.')[0]}{i}"
    if node.operation in ("conv2d", "linear"):
        weight, bias = str(given.pop("weight")), given.pop("bias", None)
        path = weight.removeprefix("@w:").removesuffix(".weight")
        if weight != f"@w:{path}.weight" or bias not in (None, f"@w:{path}.bias") or len(shape) != (3 if node.operation == "conv2d" else 1):
            return None
        size = graph.by_name[f"{path}.weight"].shape
        if node.operation == "linear":
            return Linear(path, size[1], size[0], bias is not None)
        groups = given.get("groups", 1)
        places = {key: given[key] for key in ("stride", "padding", "dilation") if key in given}
        return Conv2d(path, size[1] * groups, size[0], size[2:], **places, groups=groups, bias=bias is not None)  # type: ignore[arg-type]
    if node.operation in ("max_pool2d", "avg_pool2d") and len(shape) == 3:
        kernel, stride = given.pop("kernel_size"), given.pop("stride", ())
        return None if given else Pool2d(name, node.operation[:3], kernel, stride or kernel)
    if node.operation == "adaptive_avg_pool2d" and given == {"output_size": (1, 1)} and len(shape) == 3:
        return Pool2d(name, "avg", shape[1:], shape[1:])  # one window: the whole map
    if node.operation == "flatten.using_ints":
        return Flatten(name) if given == {"start_dim": -len(shape), "end_dim": -1} else None
    if node.operation in ("dropout", "feature_dropout"):  # both the identity in evaluation mode
        return Dropout(name, float(given["p"]))
    return activation_of(node, name)


def activation_of(node: Node, name: str) -> Activation | None:
    """The record of a node that is an elementwise function of the table above, None for any other."""
    if node.operation not in _FUNCTIONS:
        return None
    given = {key: value for key, value in node.arguments if key != "self"}
    function, argument = _FUNCTIONS[node.operation]
    parameter = given.pop(argument, None) if argument else None
    approximate = str(given.pop("approximate", "none"))
    return None if given else Activation(name, function, None if parameter is None else float(parameter), approximate)  # type: ignore[arg-type]
