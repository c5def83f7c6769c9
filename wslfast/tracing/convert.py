"""From one traced forward pass to nodes of a graph: canonical arguments, so that two traces of one network are equal."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..kernels.graph import DTYPES, QUERY, Argument, Node, is_size
from ..kernels.operations import TABLE, Operation
from ..kernels.reference import call_node

_SAME = frozenset(
    {"detach", "alias", "clone", "contiguous", "lift_fresh_copy", "lift_fresh", "view_as_real_copy", "_to_copy", "to", "type_as"}
)
_AXES = ("dim", "dims", "dim0", "dim1", "start_dim", "end_dim", "source", "destination")
_MADE = ("zeros", "ones", "full", "empty", "new_empty", "new_zeros", "new_ones", "new_full", "scalar_tensor", "arange", "eye", "linspace")
_LARGEST_CONSTANT = 1 << 22


class Untraceable(Exception):
    """Why a module has no graph."""


class Converter:
    """Turns one traced pass with ``n`` queries into nodes.

    Args:
        traced: inputs are the state's tensors, then the queries.
        state: names of the state's tensors.
        names: of other tensors that the module holds, by identity, and whether they are entries of its state dict.
        n: number of queries of this pass.
        training: whether the module was in training mode.
    """

    def __init__(
        self, traced: fx.GraphModule, state: Sequence[str], names: Mapping[int, tuple[str, bool]], n: int, training: bool = False
    ) -> None:
        self.traced, self.state, self.names, self.n, self.training = traced, state, names, n, training
        self.references: dict[fx.Node, Any] = {}
        self.nodes: list[Node] = []
        self.constants: dict[str, Tensor] = {}
        self.known: dict[str, Any] = {}  # values of what depends on constants alone

    def converted(self) -> tuple[list[Node], str, dict[str, Tensor]]:
        """Nodes that the output needs, the reference of the output, and constants by name."""
        inputs = iter([*(f"@w:{name}" for name in self.state), QUERY])
        output: Any = None
        for node in self.traced.graph.nodes:
            if node.op == "placeholder":
                self.references[node] = next(inputs)
            elif node.op == "get_attr":
                self.references[node] = self._constant(_attribute(self.traced, str(node.target)))
            elif node.op == "call_function":
                self.references[node] = self._call(node)
            elif node.op == "output":
                output = node.args[0]
        while isinstance(output, (list, tuple)) and len(output) == 1:
            output = output[0]
        if not isinstance(output, fx.Node):
            raise Untraceable("it returns something other than one tensor; name a part of it with output=")
        return self._needed(self._reference(output))

    # -- calls ---------------------------------------------------------------------------------------------------------

    def _call(self, node: fx.Node) -> Any:
        if node.target is operator.getitem:
            value, index = node.args
            return self._append("getitem", [("self", self._reference(value)), ("index", index)], node)
        target = node.target
        if not isinstance(target, torch._ops.OpOverload):
            raise Untraceable(f"it calls {target}, which is no tensor operation")
        packet, overload = target.overloadpacket.__name__, target._overloadname
        given = self._given(target, node)
        if packet.endswith("_") and not packet.endswith("__"):  # in place; the check of the graph finds views that are written to
            packet = packet[:-1]
        if packet in ("copy", "fill", "set"):
            raise Untraceable(f"it writes into a part of a tensor (aten.{packet}_)")
        if packet in _SAME:
            return self._cast(packet, given, node)
        if packet in _MADE:
            return self._made(packet, given, node)
        if packet in ("expand_as", "view_as", "reshape_as"):
            packet, overload, given = packet[:-3], "default", {"self": given["self"], "size": None, "shape": None}
        if packet in ("view", "_unsafe_view"):  # a value's strides are nobody's business
            packet, given = "reshape", {"self": given["self"], "shape": None}
        name = packet if overload == "default" else f"{packet}.{overload}"
        name = name if name in TABLE else next((n for n in (packet, f"{packet}.default") if n in TABLE), name)
        if name not in TABLE:
            raise Untraceable(f"operation aten.{name} is not in the table")
        operation = TABLE[name]
        train = given.get("train", given.get("training"))
        if train is True and operation.form == "identity" and given.get("p") == 0:
            if not self.training:
                return self._reference(given["input"])
            train, given = False, {**given, "train": False}
        if train is True and not self.training:
            raise Untraceable(f"aten.{name} in training mode")
        arguments = self._canonical(operation, given, node)
        if name == "reshape" and (flat := self._flattened(given, node)) is not None:
            return self._append("flatten.using_ints", flat, node)
        if name.startswith("conv") and name.endswith(".padding"):
            name, arguments = self._numbered(name, arguments, given)
        return self._append(name, arguments, node)

    def _flattened(self, given: Mapping[str, Any], node: fx.Node) -> list[tuple[str, Any]] | None:
        """A view of ``[n, C, H, W]`` as ``[n, C * H * W]`` is a flatten, however it was written."""
        before, after = _shape(given["self"]), _shape(node)
        if before is None or after is None or len(after) != 2 or len(before) < 3 or before[0] != self.n or after[0] != self.n:
            return None
        return [("self", self._reference(given["self"])), ("start_dim", 1 - len(before)), ("end_dim", -1)]

    def _numbered(self, name: str, arguments: list[tuple[str, Any]], given: Mapping[str, Any]) -> tuple[str, list[tuple[str, Any]]]:
        """Convolutions padded by "valid" or "same" as those of numbers; "same" stays where it needs an uneven border."""
        kernel = _shape(given["weight"])
        assert kernel is not None
        sizes = kernel[2:]
        spacing = given.get("dilation", [1])
        spacing = list(spacing) * (len(sizes) if len(spacing) == 1 else 1)
        total = [d * (k - 1) for d, k in zip(spacing, sizes, strict=True)]
        if given.get("padding", "valid") == "same" and any(t % 2 for t in total):
            return name, arguments
        padding = tuple(t // 2 for t in total) if given.get("padding", "valid") == "same" else (0,) * len(sizes)
        order = list(TABLE[name.removesuffix(".padding")].parameters)
        values = {**dict(arguments), "padding": padding}
        if not any(padding):
            del values["padding"]
        return name.removesuffix(".padding"), [(key, values[key]) for key in order if key in values]

    def _given(self, target: torch._ops.OpOverload, node: fx.Node) -> dict[str, Any]:
        """Arguments by name, as they were given."""
        names = [a.name for a in target._schema.arguments]
        return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)

    def _canonical(self, operation: Operation, given: Mapping[str, Any], node: fx.Node) -> list[tuple[str, Any]]:
        shape = _shape(node)
        arguments: list[tuple[str, Any]] = []
        for name, parameter in operation.parameters.items():
            if name not in given:
                if name in _AXES and isinstance(parameter.default, int) and operation.form in ("axes", "join", "shape"):
                    value: Any = parameter.default
                else:
                    continue
            else:
                value = given[name]
            if name in ("size", "shape") and operation.form == "shape" and shape is not None:
                value = shape  # as it came out: no -1
            if name in _AXES and operation.form in ("axes", "join", "shape"):
                value = self._from_the_end(operation, value, given, node)
            value = self._argument(value)
            axes = _axes(operation)
            if isinstance(value, tuple) and len(value) == 1 and axes > 1 and name in _PER_AXIS:
                value = value * axes
            if name == "dilation" and operation.form == "convolution":  # along an axis of one tap it means nothing
                value = tuple(d if k > 1 else 1 for d, k in zip(value, (_shape(given["weight"]) or ())[2:], strict=True))
            if name == "dtype":
                value = None if value is None or value.startswith("float") else value
            if name == "stride" and operation.form == "image" and value == self._argument(given.get("kernel_size")):
                value = ()
            kept = name in _AXES and operation.form in ("axes", "join", "shape")
            if not (parameter.optional and value == parameter.default and not kept):
                arguments.append((name, value))
        return arguments

    def _from_the_end(self, operation: Operation, value: Any, given: Mapping[str, Any], node: fx.Node) -> Any:
        """Axes counted from the end, where a further axis in front does not move them."""
        first = given.get("self", given.get("input", given.get("tensors")))
        first = first[0] if isinstance(first, (list, tuple)) else first
        rank = len(_shape(first) or ()) + (operation.name in ("unsqueeze", "stack"))
        if isinstance(value, (list, tuple)):
            return tuple(d - rank if isinstance(d, int) and d >= 0 else d for d in value)
        return value - rank if isinstance(value, int) and value >= 0 else value

    def _cast(self, packet: str, given: Mapping[str, Any], node: fx.Node) -> Any:
        """Conversions: between floating types they are nothing, as a population computes in one."""
        value = given.get("self", given.get("input"))
        made, came = _dtype(node), _dtype(value)
        reference = self._reference(value)
        if made is None or made == came or (made.is_floating_point and came is not None and came.is_floating_point):
            return reference
        if made.is_floating_point:
            return self._append("type_as", [("self", reference), ("other", QUERY)], node)
        name = str(made).removeprefix("torch.")
        if name not in DTYPES:
            raise Untraceable(f"a conversion to {name}")
        return self._append("to.dtype", [("self", reference), ("dtype", name)], node)

    def _made(self, packet: str, given: Mapping[str, Any], node: fx.Node) -> Any:
        """A tensor made in the forward: a constant, or one whose size is the number of queries."""
        value = _value(self.traced, node)
        if value is not None and self.n not in value.shape and not any(s and s % self.n == 0 for s in value.shape):
            return self._constant(value)
        if packet in ("zeros", "ones", "full", "new_zeros", "new_ones", "new_full"):
            name = packet if packet.startswith("new_") else f"new_{packet}"
            arguments = [("self", QUERY), ("size", self._argument(_shape(node)))]
            if name == "new_full":
                arguments.append(("fill_value", self._argument(given["fill_value"])))
            made = _dtype(node)
            if made is not None and not made.is_floating_point:
                arguments.append(("dtype", str(made).removeprefix("torch.")))
            return self._append(name, arguments, node)
        if value is not None and value.numel() <= _LARGEST_CONSTANT:
            return self._constant(value)
        raise Untraceable(f"aten.{packet} of a size that depends on the number of queries")

    def _append(self, name: str, arguments: list[tuple[str, Any]], node: fx.Node) -> str:
        made = Node(name, tuple(arguments))
        reads = list(made.references())
        if reads and all(r in self.known for r in reads) and not any(_sized(value) for _, value in made.arguments):
            value = call_node(made, self.known, self.n)  # of constants alone: a constant
            if isinstance(value, Tensor):
                return self._constant(value)
        self.nodes.append(made)
        return f"@{len(self.nodes) - 1}"

    # -- values --------------------------------------------------------------------------------------------------------

    def _constant(self, value: Tensor) -> str:
        if value.numel() > _LARGEST_CONSTANT:
            raise Untraceable(f"it holds a tensor of {value.numel():,} numbers that is no parameter")
        dtype = str(value.dtype).removeprefix("torch.")
        if not (value.is_floating_point() or dtype in DTYPES):
            raise Untraceable(f"it holds a tensor of {dtype} that is no parameter")
        name, _ = self.names.get(id(value), (f"constant.{len(self.constants)}", False))
        self.constants[name] = value.detach()
        self.known[f"@c:{name}"] = value.detach()
        return f"@c:{name}"

    def _reference(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            return self.references[value]
        return self._argument(value)

    def _argument(self, value: Any) -> Argument:
        if isinstance(value, fx.Node):
            return self.references[value]
        if isinstance(value, (list, tuple)):
            return tuple(self._argument(item) for item in value)
        if isinstance(value, torch.dtype):
            return str(value).removeprefix("torch.")
        if isinstance(value, (torch.device, torch.layout, torch.memory_format)):
            return None
        if isinstance(value, float) and math.isinf(value):
            return "@inf" if value > 0 else "@-inf"
        if value is None or type(value) in (bool, int, float, str):
            return value
        raise Untraceable(f"an argument of type {type(value).__name__}")

    def _needed(self, output: str) -> tuple[list[Node], str, dict[str, Tensor]]:
        """Only what the output depends on, numbered anew; constants named in the order in which they are read."""
        wanted: set[str] = set()
        stack = [output]
        while stack:
            reference = stack.pop()
            if reference in wanted:
                continue
            wanted.add(reference)
            if reference[1:].isdigit():
                stack += list(self.nodes[int(reference[1:])].references())
        new: dict[str, str] = {}
        constants: dict[str, Tensor] = {}
        nodes: list[Node] = []
        for i, node in enumerate(self.nodes):
            if f"@{i}" not in wanted:
                continue
            for r in node.references():
                if r.startswith("@c:") and r not in new:
                    named = not r.startswith("@c:constant.")
                    new[r] = r if named else f"@c:constant.{sum(name.startswith('constant.') for name in constants)}"
                    constants[new[r][3:]] = self.constants[r[3:]]
            nodes.append(Node(node.operation, tuple((name, _renamed(value, new)) for name, value in node.arguments)))
            new[f"@{i}"] = f"@{len(nodes) - 1}"
        return nodes, new.get(output, output), constants


_PER_AXIS = ("kernel_size", "stride", "padding", "dilation", "output_padding", "output_size")


def _axes(operation: Operation) -> int:
    """Axes of the images that an operation reads, by its name; 0 for none."""
    name = operation.name.partition(".")[0]
    return int(name[-2]) if name.endswith("d") and name[-2:-1].isdigit() else 0


def unified(first: Node, second: Node, numbers: tuple[int, int]) -> Node:
    """One node of two passes with other numbers of queries: what differs are multiples of that number."""
    if first.operation != second.operation or [k for k, _ in first.arguments] != [k for k, _ in second.arguments]:
        raise Untraceable("another number of queries takes another way through its forward")
    pairs = zip(first.arguments, second.arguments, strict=True)
    return Node(first.operation, tuple((name, _joined(a, b, numbers)) for (name, a), (_, b) in pairs))


def _joined(a: Argument, b: Argument, numbers: tuple[int, int]) -> Argument:
    if isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b):
        return tuple(_joined(x, y, numbers) for x, y in zip(a, b, strict=True))
    if type(a) is type(b) and a == b:
        return a
    if type(a) is int and type(b) is int and a % numbers[0] == 0 and a // numbers[0] * numbers[1] == b:
        times = a // numbers[0]
        return "@n" if times == 1 else f"@n*{times}"
    raise Untraceable(f"an argument that depends on the number of queries in another way than as a multiple: {a!r:.40} and {b!r:.40}")


def _renamed(value: Argument, names: Mapping[str, str]) -> Argument:
    if isinstance(value, tuple):
        return tuple(_renamed(item, names) for item in value)
    return names.get(value, value) if isinstance(value, str) else value


def _sized(value: Argument) -> bool:
    return any(_sized(item) for item in value) if isinstance(value, tuple) else is_size(value)


def _shape(node: Any) -> tuple[int, ...] | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return tuple(int(s) for s in value.shape) if isinstance(value, Tensor) else None


def _dtype(node: Any) -> torch.dtype | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value.dtype if isinstance(value, Tensor) else None


def _attribute(module: Any, target: str) -> Tensor:
    for part in target.split("."):
        module = getattr(module, part)
    if not isinstance(module, Tensor):
        raise Untraceable(f"it reads {target}, which is no tensor")
    return module


def _value(traced: fx.GraphModule, node: fx.Node) -> Tensor | None:
    """What a node that reads no other node gives."""
    if any(isinstance(a, fx.Node) for a in (*node.args, *node.kwargs.values())) or not isinstance(node.target, torch._ops.OpOverload):
        return None
    with torch.no_grad():
        value = node.target(*node.args, **node.kwargs)
    return value if isinstance(value, Tensor) else None
