"""From one traced forward pass to nodes: canonical arguments, so that two traces of one network are equal."""

from __future__ import annotations

import math
import operator
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..kernels.dtypes import DTYPES, HELD
from ..kernels.graph import QUERY, Argument, Node
from ..kernels.operations import AXES, PER_AXIS, TABLE, WITH_AXES, Operation
from .rewriting import Rewriting, dtype_of, is_complex, shape_of
from .spelling import spelled

_NOT_THEIRS = (os.path.dirname(torch.__file__), os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "<frozen", "<eval")
_SAME = frozenset(
    {"alias", "clone", "contiguous", "lift_fresh_copy", "lift_fresh", "_to_copy", "to", "type_as", "positive", "resolve_conj"}
)
_FILLED = {name: f"new_{name.removeprefix('new_')}" for name in ("zeros", "ones", "full", "new_zeros", "new_ones", "new_full")}
_FILLED |= dict.fromkeys(("empty", "new_empty"), "new_zeros")  # which holds anything
_MADE = frozenset(
    {*_FILLED, "scalar_tensor", "arange", "eye", "linspace", "logspace", "tril_indices", "triu_indices", "fft_fftfreq", "fft_rfftfreq"}
)
_MADE |= {f"{name}_window" for name in ("hann", "hamming", "blackman", "bartlett", "kaiser")}
_ADJOINT = frozenset({"mH", "adjoint", "matrix_H"})
_TRANSFORM = "it uses a transform of torch.func inside; write it for a batch of queries"


class Untraceable(Exception):
    """Why a module has no graph."""


def written_in(trace: str | None) -> str:
    """The last line of a stack that is neither torch's nor ours, as ``(file.py:3: its text)``; nothing where there is none."""
    shown = ""
    for place, text in re.findall(r'File "([^\n]*)\n\s*([^\n]*)', trace or ""):
        path, line = re.fullmatch(r'(.*)", line (\d+).*', place).groups()  # type: ignore[union-attr]
        if not path.startswith(_NOT_THEIRS):
            shown = f" ({os.path.basename(path)}:{line}: {text.strip():.100})"
    return shown


@dataclass(frozen=True)
class Pass:
    """One forward pass with one number of queries.

    Attributes:
        nodes: what was called, in order.
        output: reference of the result.
        constants: tensors that the module holds or makes, by name.
        shapes: of what has one, by reference.
    """

    nodes: list[Node]
    output: str
    constants: dict[str, Tensor]
    shapes: dict[str, tuple[int, ...]]


class Converter(Rewriting):
    """Turns one traced pass into nodes.

    Args:
        traced: inputs are the state's tensors, then the queries.
        state: names of the state's tensors.
        names: of other tensors that the module holds, by identity.
        training: whether the module was in training mode.
    """

    def __init__(self, traced: fx.GraphModule, state: Sequence[str], names: Mapping[int, str], training: bool = False) -> None:
        self.traced, self.state, self.names, self.training = traced, state, names, training
        self.references: dict[fx.Node, Any] = {}
        self.nodes: list[Node] = []
        self.constants: dict[str, Tensor] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.detached = False  # inside torch.no_grad()

    def converted(self) -> Pass:
        """All calls of the pass, as nodes."""
        inputs = iter([*(f"@w:{name}" for name in self.state), QUERY])
        output: Any = None
        for node in self.traced.graph.nodes:
            if node.op == "placeholder":
                self.references[node] = next(inputs)
            elif node.op == "get_attr":
                self.references[node] = self._constant(_attribute(self.traced, str(node.target)))
            elif node.op == "call_function":
                try:
                    self.references[node] = self._call(node)
                except Untraceable as reason:
                    raise Untraceable(f"{reason}{written_in(node.stack_trace)}") from None
            elif node.op == "output":
                output = node.args[0]
            shape = shape_of(node)
            if shape is not None and isinstance(self.references.get(node), str):
                self.shapes.setdefault(self.references[node], shape)
        while isinstance(output, (list, tuple)) and len(output) == 1:
            output = output[0]
        if not isinstance(output, fx.Node):
            raise Untraceable("it returns something other than one tensor; name a part of it with output=")
        return Pass(self.nodes, self.reference(output), self.constants, self.shapes)

    # -- calls ---------------------------------------------------------------------------------------------------------

    def _call(self, node: fx.Node) -> Any:
        if node.target is operator.getitem:
            value, index = node.args[0], int(str(node.args[1]))
            whole = self.reference(value)
            if isinstance(whole, list):
                return whole[index] if index < len(whole) else None  # which nobody reads
            return self.append("getitem", [("self", whole), ("index", index)])
        if node.target is torch._C._set_grad_enabled:
            self.detached = not node.args[0]
            return None
        target = node.target
        if "autocast" in getattr(target, "__name__", ""):
            raise Untraceable("it turns autocast on or off itself; leave that to whoever calls wslfast")
        if getattr(target, "__module__", "").startswith("torch._functorch"):
            raise Untraceable(_TRANSFORM)
        if not isinstance(target, torch._ops.OpOverload):
            raise Untraceable(f"it calls {getattr(target, '__name__', target)}, which is no tensor operation")
        result = self._operation(target, node)
        return self.append("detach", [("self", result)]) if self.detached and isinstance(result, str) else result

    def _operation(self, target: torch._ops.OpOverload, node: fx.Node) -> Any:
        packet = target.overloadpacket.__name__
        if packet == "_assert_tensor_metadata":  # what the exporter says of a conversion
            return None
        if packet.endswith("_") and not packet.endswith("__"):  # in place; the check of the graph finds views that are written to
            packet = packet[:-1]
        several, as_called = packet == "_native_batch_norm_legit_no_training", packet
        packet, overload, given = spelled(packet, target._overloadname, self._given(target, node), shape_of(node), shape_of)
        if packet in _SAME:
            return self._cast(given, node)
        if packet in _MADE:
            return self._made(packet, given, node)
        if packet == "stft" and given.get("return_complex") and (made := self.short_transforms(given)) is not None:
            return made
        if packet == "embedding_bag" and (parts := self.bags(given)) is not None:
            return parts
        if packet == "bilinear":
            return self.bilinear(given)
        if packet == "index_put" and (chosen := self.mask_of(given)) is not None:
            packet, overload, given = "where", "self", chosen
        if overload == "Scalar" and any(type(value) is complex for value in given.values()):
            overload = "Tensor"  # which takes it as a constant
        name = packet if overload == "default" else f"{packet}.{overload}"
        if name not in TABLE:
            draws = torch.Tag.nondeterministic_seeded in target.tags
            raise Untraceable(f"it draws random numbers (aten.{name})" if draws else f"operation aten.{name} is not in the table")
        operation = TABLE[name]
        if operation.form == "identity" and "self" in given:  # as it is called in place
            given = {"input": given["self"], **{key: value for key, value in given.items() if key != "self"}}
        train = given.get("train", given.get("training")) is True
        if train and operation.form == "identity" and given.get("p") == 0:
            if not self.training:
                return self.reference(given["input"])
            train, given = False, {**given, "train": False}
        if train and not self.training:
            raise Untraceable(f"aten.{name} in training mode")
        if given.get("scale_grad_by_freq"):
            raise Untraceable("an embedding whose gradient depends on how often a row is read")
        arguments = self._canonical(operation, given, node)
        if name.startswith("conv") and name.endswith(".padding"):
            name, arguments = self.numbered(name, arguments, given)
        wanted, came = dtype_of(node), dtype_of(given.get("self"))
        if isinstance(given.get("dtype"), torch.dtype) and given["dtype"].is_floating_point:  # which a node does not say
            arguments = [(key, self._converted(value, came, given["dtype"]) if key == "self" else value) for key, value in arguments]
        alike = name == "slice_scatter" and dtype_of(given["src"]) == dtype_of(node)
        if alike and given.get("step", 1) == 1 and self.is_nothing(dict(arguments)["self"]):
            return self.padded(dict(arguments), node)
        if operation.form == "scatter" and is_complex(node):
            return self.scattered_pairs(name, dict(arguments), given)
        made = self.append(name, arguments)
        if as_called in _ADJOINT and is_complex(node):
            made = self.append("conj_physical", [("self", made)])
        if name == "expand" and wanted != came and wanted is not None and came is not None:  # what is copied is converted
            made = self._converted(made, came, wanted)
        return [made] if several else made

    def _given(self, target: torch._ops.OpOverload, node: fx.Node) -> dict[str, Any]:
        """Arguments by name, as they were given."""
        names = [a.name for a in target._schema.arguments]
        return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)

    def _canonical(self, operation: Operation, given: Mapping[str, Any], node: fx.Node) -> list[tuple[str, Any]]:
        shape = shape_of(node)
        arguments: list[tuple[str, Any]] = []
        for name, parameter in operation.parameters.items():
            if name not in given:
                if name in AXES and isinstance(parameter.default, int) and operation.form in WITH_AXES:
                    value: Any = parameter.default
                else:
                    continue
            else:
                value = given[name]
            if name in ("size", "shape") and operation.form == "shape" and shape is not None:
                value = shape  # as it came out: no -1
            if name in AXES and operation.form in WITH_AXES:
                value = self._from_the_end(operation, value, given, node)
            value = self._argument(value)
            axes = operation.axes
            if isinstance(value, tuple) and len(value) == 1 and axes > 1 and name in PER_AXIS:
                value = value * axes
            if name == "dilation" and operation.form == "convolution":  # along an axis of one tap it means nothing
                value = tuple(d if k > 1 else 1 for d, k in zip(value, (shape_of(given["weight"]) or ())[2:], strict=True))
            if name == "dtype":
                value = None if value is None or value.startswith("float") else value
            if name == "stride" and operation.form == "image" and value == self._argument(given.get("kernel_size")):
                value = ()
            kept = name in AXES and operation.form in WITH_AXES
            if not (parameter.optional and value == parameter.default and not kept):
                arguments.append((name, value))
        return arguments

    def _from_the_end(self, operation: Operation, value: Any, given: Mapping[str, Any], node: fx.Node) -> Any:
        """Axes counted from the end, where a further axis in front does not move them."""
        first = given.get("self", given.get("input", given.get("tensors")))
        first = first[0] if isinstance(first, (list, tuple)) else first
        rank = len(shape_of(first) or ()) + (operation.name in ("unsqueeze", "stack"))
        if isinstance(value, (list, tuple)):
            return tuple(d - rank if isinstance(d, int) and d >= 0 else d for d in value)
        return value - rank if isinstance(value, int) and value >= 0 else value

    def _cast(self, given: Mapping[str, Any], node: fx.Node) -> Any:
        value = given.get("self", given.get("input"))
        return self._converted(self.reference(value), dtype_of(value), dtype_of(node))

    def _converted(self, reference: str, came: torch.dtype | None, made: torch.dtype | None) -> str:
        """Conversions: between floating types they are nothing, as a population computes in one; nor are they between complex ones."""
        if made is not None and made.is_complex:
            return reference if came is not None and came.is_complex else self.as_complex(self._converted(reference, came, made.to_real()))
        if made is not None and came is not None and came.is_complex:
            raise Untraceable("a conversion that leaves out imaginary parts; torch.real says so")
        if made is not None and made.is_floating_point and made.itemsize < 4:
            raise Untraceable(f"a conversion to {made}: a population computes in one type; leave the choice to autocast")
        if made is None or made == came or (made.is_floating_point and came is not None and came.is_floating_point):
            return reference
        if made.is_floating_point:
            return self.append("type_as", [("self", reference), ("other", QUERY)])
        name = str(made).removeprefix("torch.")
        if name not in DTYPES:
            raise Untraceable(f"a conversion to {name}")
        return self.append("to.dtype", [("self", reference), ("dtype", name)])

    def _made(self, packet: str, given: Mapping[str, Any], node: fx.Node) -> str:
        """A tensor made in the forward: of a size that may depend on the number of queries, or a constant."""
        name = _FILLED.get(packet)
        if name is None:
            value = _value(node)
            if value is None:
                raise Untraceable(f"aten.{packet} of a size that depends on the number of queries")
            return self._constant(value)
        arguments = [("self", QUERY), ("size", self._argument(shape_of(node)))]
        if name == "new_full":
            arguments.append(("fill_value", self._argument(given["fill_value"])))
        made = dtype_of(node)
        if made is not None and made.is_complex:  # in the precision that the queries have
            return self.filled_with(complex(given.get("fill_value", name == "new_ones")), arguments)
        if made is not None and not made.is_floating_point:
            arguments.append(("dtype", str(made).removeprefix("torch.")))
        return self.append(name, arguments)

    # -- values --------------------------------------------------------------------------------------------------------

    def _constant(self, value: Tensor) -> str:
        if torch._C._functorch.is_functorch_wrapped_tensor(value):
            raise Untraceable(_TRANSFORM)
        dtype = str(value.dtype).removeprefix("torch.")
        if not (value.is_floating_point() or value.is_complex() or dtype in HELD):
            raise Untraceable(f"it holds a tensor of {dtype} that is no parameter")
        name = self.names.get(id(value)) or f"constant.{len(self.constants)}"
        self.constants[name] = value.detach()
        return f"@c:{name}"

    def reference(self, value: Any) -> Any:
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
        if isinstance(value, float) and not math.isfinite(value):
            return "@nan" if math.isnan(value) else "@inf" if value > 0 else "@-inf"
        if value is None or type(value) in (bool, int, float, str):
            return value
        if type(value) is complex:
            return self._constant(torch.tensor(value, dtype=torch.complex128))
        raise Untraceable(f"an argument of type {type(value).__name__}")


def _attribute(module: Any, target: str) -> Tensor:
    for part in target.split("."):
        module = getattr(module, part)
    if not isinstance(module, Tensor):
        raise Untraceable(f"it reads {target}, which is no tensor")
    return module


def _value(node: fx.Node) -> Tensor | None:
    """The value of a node that reads no other node."""
    if any(isinstance(a, fx.Node) for a in (*node.args, *node.kwargs.values())) or not isinstance(node.target, torch._ops.OpOverload):
        return None
    with torch.no_grad():
        value = node.target(*node.args, **node.kwargs)
    return value if isinstance(value, Tensor) else None
