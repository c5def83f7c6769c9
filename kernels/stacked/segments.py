"""Runs of layers inside a graph that the CPU wing's steps compute: convolutions, norms, activations, pooling, and what follows to the end.

A segment begins with a convolution, or with a norm of images, and goes on as long as one layer reads the one before it and nobody else
does. Its norms, in evaluation mode, are folded into weights: into the layer before, or, behind an activation, into the layer after (for
that a convolution must not pad: it would pad with zeros that the norm had moved). Any other norm stays a step of its own.

One-dimensional convolutions are images of height 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..chains import activation_of
from ..cpu.activations import function_of
from ..graph import Graph, Node
from ..layers import Affine, Conv2d, Dropout, Flatten, Layer, Layers, Linear, Pool2d
from ..operations import TABLE
from .norms import PARAMETERS

Shape = tuple[int, ...]


@dataclass(frozen=True)
class NormPart:
    """References of a batch norm's numbers, and its eps."""

    parameters: tuple[str | None, ...]  # as in PARAMETERS
    eps: float


@dataclass(frozen=True)
class Part:
    """One layer of a segment.

    Attributes:
        layer: its record.
        weight: reference of its weight, None without, and of an affine step, whose numbers are those of ``after``.
        bias: likewise.
        after: the norm that is folded in behind it.
        before: the norm that is folded in ahead of it.
    """

    layer: Layer
    weight: str | None = None
    bias: str | None = None
    after: NormPart | None = None
    before: NormPart | None = None

    def references(self) -> list[str]:
        """References of the layer's own parameters and of its norms'."""
        norms = [norm.parameters for norm in (self.after, self.before) if norm is not None]
        return [r for r in (self.weight, self.bias, *(r for norm in norms for r in norm)) if r is not None]


@dataclass(frozen=True)
class Segment:
    """A run of layers.

    Attributes:
        nodes: of the graph, in order.
        parts: the layers that they come down to.
        input: reference of the value that is read.
        input_shape: of one model and query, ``[C, H, W]`` (``[C, 1, L]`` in one dimension).
        lifted: whether that value has one dimension, and whether the result has.
        flat: whether the result is ``[F]``.
    """

    nodes: tuple[int, ...]
    parts: tuple[Part, ...]
    input: str
    input_shape: Shape
    lifted: tuple[bool, bool]
    flat: bool

    @property
    def layers(self) -> Layers:
        """Records, with a bias wherever a norm gives one."""
        return tuple(part.layer for part in self.parts)

    def references(self) -> list[str]:
        """References of all parameters of the segment, each once."""
        return list(dict.fromkeys(r for part in self.parts for r in part.references()))


def segments(graph: Graph, shapes: Mapping[str, Any], users: Mapping[str, Sequence[int]]) -> list[Segment]:
    """The segments of a graph, of whose values ``shapes`` (with n queries in front) and ``users`` (nodes that read them) are given."""
    found: list[Segment] = []
    taken: set[int] = set()
    for i in range(len(graph.nodes)):
        if i in taken:
            continue
        run = _Run(graph, shapes, users)
        if run.starts(i):
            found.append(run.segment())
            taken.update(found[-1].nodes)
    return found


@dataclass
class _Run:
    """One segment in the making."""

    graph: Graph
    shapes: Mapping[str, Any]
    users: Mapping[str, Sequence[int]]
    nodes: list[int] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    shape: Shape = ()  # of what the last layer gives, one-dimensional values lifted
    flat: bool = False

    def starts(self, i: int) -> bool:
        """Whether node ``i`` is a convolution or a norm that begins a segment; if so, the whole of it is taken in."""
        node = self.graph.nodes[i]
        if node.operation.partition(".")[0] not in ("conv1d", "conv2d", "batch_norm"):
            return False
        self.input = str(node.argument("input"))
        self.shape = self.input_shape = self._lift(self._shape(self.input))
        if len(self.shape) != 3 or not self._take(i, node):
            return False
        while (following := self._next()) is not None and self._take(following, self.graph.nodes[following]):
            pass
        return True

    def segment(self) -> Segment:
        lifted = len(self._shape(self.input)) == 2, not self.flat and len(self._shape(f"@{self.nodes[-1]}")) == 2
        return Segment(tuple(self.nodes), tuple(_folded_ahead(self.parts)), self.input, self.input_shape, lifted, self.flat)

    def _shape(self, reference: str) -> Shape:
        shape = self.shapes[reference]
        return tuple(shape[1:]) if isinstance(shape, tuple) else ()

    @staticmethod
    def _lift(shape: Shape) -> Shape:
        return (shape[0], 1, shape[1]) if len(shape) == 2 else shape

    def _next(self) -> int | None:
        """The one node that reads what was made last."""
        reference = f"@{self.nodes[-1]}"
        readers = self.users.get(reference, ())
        return readers[0] if len(readers) == 1 and reference != self.graph.output else None

    def _take(self, i: int, node: Node) -> bool:
        """Append a node as the next layer, and say whether that was possible: False for a node that no segment can hold."""
        below = f"@{self.nodes[-1]}" if self.nodes else self.input
        if node.argument("input", node.argument("self")) != below:
            return False
        parts = self._parts(i, node, dict(node.arguments), len(self._shape(below)))
        if parts is None:
            return False
        made = self._shape(f"@{i}")
        self.nodes.append(i)
        self.parts = parts
        self.flat = self.flat or len(made) == 1
        self.shape = self._lift(made)
        return True

    def _parts(self, i: int, node: Node, given: dict[str, Any], rank: int) -> list[Part] | None:
        """The parts so far and those of a node whose input has ``rank`` axes for one query; None for a node that no segment can hold."""
        name, kind, parts = f"{i}", node.operation.partition(".")[0], self.parts
        if TABLE[node.operation].form == "identity":
            return None if given.get("train") else parts
        if kind == "batch_norm":
            return self._norm(name, given)
        if (activation := activation_of(node, name)) is not None:
            return [*parts, Part(activation)] if function_of(activation) is not None else None
        if kind == "linear":
            return self._weighted(_linear(self.graph, name, given)) if rank == 1 else None
        if self.flat:
            return None
        if kind in ("conv1d", "conv2d"):
            return self._weighted(_convolution(self.graph, name, given)) if rank == int(kind[4]) + 1 else None
        layers = _pooling(name, kind, given, self.shape, rank)
        if layers is None and (kind == "flatten" and (given.get("start_dim"), given.get("end_dim")) == (-rank, -1)):
            layers = [Flatten(name)]
        if layers is None and kind == "squeeze" and math.prod(self.shape[1:]) == 1:
            axes = given["dim"] if isinstance(given["dim"], tuple) else (given["dim"],)
            if all(-rank < axis < 0 for axis in axes):
                layers = [Flatten(name)] if len(axes) == rank - 1 else []
        return None if layers is None else [*parts, *(Part(layer) for layer in layers)]

    def _weighted(self, part: Part | None) -> list[Part] | None:
        return None if part is None else [*self.parts, part]

    def _norm(self, name: str, given: dict[str, Any]) -> list[Part] | None:
        """A batch norm in evaluation mode: folded into the layer before, or a part of its own."""
        parameters = tuple(given.get(key) for key in PARAMETERS)
        if given.get("training") or not all(p is None or _is_parameter(p) for p in parameters) or None in parameters[:2]:
            return None
        norm = NormPart(parameters, float(given.get("eps", 1e-5)))
        last = self.parts[-1] if self.parts else None
        if last is not None and isinstance(last.layer, (Conv2d, Linear)) and last.after is None:
            return [*self.parts[:-1], replace(last, layer=replace(last.layer, bias=True), after=norm)]
        return [*self.parts, Part(Affine(name, self.shape[0]), after=norm)]


def _is_parameter(reference: Any) -> bool:
    return isinstance(reference, str) and reference.startswith("@w:")


def _parameters(graph: Graph, given: dict[str, Any]) -> tuple[Shape, str, str | None] | None:
    """Shape and references of a layer's weight and bias, if they are parameters."""
    weight, bias = given["weight"], given.get("bias")
    if not _is_parameter(weight) or not (bias is None or _is_parameter(bias)):
        return None
    return graph.by_name[weight[3:]].shape, weight, bias


def _linear(graph: Graph, name: str, given: dict[str, Any]) -> Part | None:
    found = _parameters(graph, given)
    if found is None or len(found[0]) != 2:
        return None
    (out, features), weight, bias = found
    return Part(Linear(name, features, out, bias is not None), weight, bias)


def _convolution(graph: Graph, name: str, given: dict[str, Any]) -> Part | None:
    found = _parameters(graph, given)
    if found is None:
        return None
    shape, weight, bias = found
    stride, dilation = (_pair(given.get(key, 1), 1) for key in ("stride", "dilation"))
    kernel, groups = (1, *shape[2:])[-2:], given.get("groups", 1)
    padding = given.get("padding", 0)
    if isinstance(padding, str):
        around = tuple(d * (k - 1) for d, k in zip(dilation, kernel, strict=True)) if padding == "same" else (0, 0)
        if any(p % 2 for p in around):
            return None  # one pixel more on one side
        padding = tuple(p // 2 for p in around)
    elif len(shape) == 3:
        padding = _pair(padding, 0)
    else:
        padding = _pair(padding)
    layer = Conv2d(name, shape[1] * groups, shape[0], _pair(kernel), stride, _pair(padding), dilation, groups, bias is not None)
    return Part(layer, weight, bias)


def _pair(value: Any, ahead: int | None = None) -> tuple[int, int]:
    """An argument of an operation as a pair (rows, columns); ``ahead`` is the value for rows if the operation has one dimension."""
    first, *rest = value if isinstance(value, tuple) else (value,)
    if rest:
        return first, rest[0]
    return (first, first) if ahead is None else (ahead, first)


def _pooling(name: str, kind: str, given: dict[str, Any], shape: Shape, rank: int) -> list[Layer] | None:
    """Records of a pooling node over ``[C, H, W]`` (of ``[C, L]``, where ``rank`` is 2, as height 1); None for other poolings."""
    image = shape[1:]
    if kind == "mean":  # over all pixels
        axes = given.get("dim")
        if not isinstance(axes, tuple) or sorted(axes) != list(range(1 - rank, 0)) or given.get("dtype") is not None:
            return None
        return [Pool2d(name, "avg", _pair(image), _pair(image)), *([] if given.get("keepdim") else [Flatten(name)])]
    if kind in ("adaptive_avg_pool1d", "adaptive_avg_pool2d"):
        size = _pair(given["output_size"], 1 if kind[-2] == "1" else None)
        if any(whole % part for whole, part in zip(image, size, strict=True)):
            return None
        window = tuple(whole // part for whole, part in zip(image, size, strict=True))
        return [Pool2d(name, "avg", _pair(window), _pair(window))]
    if kind not in ("max_pool1d", "avg_pool1d", "max_pool2d", "avg_pool2d"):
        return None
    if given.get("ceil_mode") or not given.get("count_include_pad", True) or given.get("divisor_override") is not None:
        return None
    one = 1 if kind[-2] == "1" else None
    kernel = _pair(given["kernel_size"], one)
    stride = _pair(given["stride"], one) if given.get("stride", ()) != () else kernel
    padding = _pair(given.get("padding", 0), None if one is None else 0)
    if _pair(given.get("dilation", 1), one) != (1, 1):
        return None
    return [Pool2d(name, kind[:3], kernel, stride, padding)]


def _folded_ahead(parts: Sequence[Part]) -> list[Part]:
    """``parts`` with every norm that stands alone folded into the layer after it, where only averages and flattening are in between."""
    made = list(parts)
    for i in range(len(parts) - 1, -1, -1):
        if not isinstance(made[i].layer, Affine):
            continue
        j = i + 1
        while j < len(made) and _commutes(made[j].layer):
            j += 1
        above = made[j] if j < len(made) else None
        if above is None or above.before is not None or not isinstance(above.layer, (Conv2d, Linear)):
            continue
        if isinstance(above.layer, Linear) or above.layer.padding == (0, 0):
            made[j] = replace(above, layer=replace(above.layer, bias=True), before=made[i].after)
            del made[i]
    return made


def _commutes(layer: Layer) -> bool:
    """Whether a factor and a shift per channel give the same result before this layer and after it."""
    return isinstance(layer, (Flatten, Dropout)) or (isinstance(layer, Pool2d) and layer.mode == "avg" and layer.padding == (0, 0))
