"""What each operation does to the names of numbers, and which permutations it leaves: a graph followed once, from the queries to the
answer.

A rule says along which axes an operation treats all places alike and which of its operands' axes meet; :meth:`~.names.Names.close` does the
rest. An operation without a rule keeps the order of everything that it reads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.graph import QUERY, Graph, Node, substitute
from ..kernels.operations import TABLE
from ..kernels.reference import value_shapes
from .layer_rules import NOTHING, LayerRules
from .names import Names
from .values import Value, moved


def _set(names: str) -> frozenset[str]:
    return frozenset(names.split())


# numbers are moved about and not changed
_MOVES = _set(
    "select.int slice.Tensor narrow unsqueeze squeeze.dim squeeze.dims transpose.int unflatten.int split.Tensor split_with_sizes chunk "
    "unbind.int movedim.int movedim.intlist repeat_interleave.self_int flip roll view reshape expand repeat permute flatten.using_ints "
    "tile mT numpy_T t pixel_shuffle pixel_unshuffle channel_shuffle im2col reflection_pad1d reflection_pad2d reflection_pad3d "
    "replication_pad1d replication_pad2d replication_pad3d"
)
_APART = _set("cat stack constant_pad_nd pad")  # moves that put numbers of different origins side by side
_BY_CONSTANTS = _set("index.Tensor index_select gather")  # moves, if what they index with is a constant
_SUMS = _set(
    "sum.dim_IntList mean.dim amax amin var.correction std.correction var.dim std.dim logsumexp prod.dim_int norm.ScalarOpt_dim "
    "linalg_vector_norm"
)
_CHOICES = _set("argmax argmin max.dim min.dim median.dim topk sort cumsum cumprod diff")  # the order along an axis counts
_SAME = _set("softmax.int log_softmax.int")
_UNIFORM = _set("zeros_like ones_like full_like")


class Followed(NamedTuple):
    """What is known of a graph's parameters.

    Attributes:
        names: of everything.
        own: what the places of each axis of a parameter are called, ``[size]`` each.
        kept_by: of the same places, the operation at which it came out that they keep their order, by its number; -1 where they do
            not, and the number of operations where it is the answer that has an order.
    """

    names: Names
    own: dict[str, list[Tensor]]
    kept_by: dict[str, list[Tensor]]


def followed(graph: Graph) -> Followed:
    """Every parameter's axes after one way through the graph."""
    follower = _Follower(graph)
    ids = torch.cat([torch.empty(0, dtype=torch.long), *(axis for slot in graph.slots for axis in follower.own[slot.name])])
    kept = torch.full_like(ids, -1)
    for i, node in enumerate(graph.nodes):
        follower.values[f"@{i}"] = follower.follow(f"@{i}", node)
        kept[(kept < 0) & ~follower.names.move(ids)] = i
    for value in _operands(follower.values[graph.output]):
        value.fix()
    kept[(kept < 0) & ~follower.names.move(ids)] = len(graph.nodes)
    parts = iter(kept.split([size for slot in graph.slots for size in slot.shape]))
    own = {slot.name: follower.own[slot.name] for slot in graph.slots}
    return Followed(follower.names, own, {slot.name: [next(parts) for _ in slot.shape] for slot in graph.slots})


class _Follower(LayerRules):
    def __init__(self, graph: Graph) -> None:
        self.names = Names()
        self.shapes = value_shapes(graph, 1)
        self.constants: dict[str, Tensor] = {f"@c:{c.name}": c.value for c in graph.constants}
        self.values: dict[str, Any] = {QUERY: Value.placed(self.names, (1, *graph.input_shape))}
        self.own: dict[str, list[Tensor]] = {}
        read = {reference for node in graph.nodes for reference in node.references()}
        for slot in graph.slots:
            kept = f"@w:{slot.name}" not in read  # nothing depends on it, so nothing says how it may be permuted
            self.own[slot.name] = [self.names.new(size, fixed=kept) for size in slot.shape]
            columns = [ids.unsqueeze(1) if len(ids) > 1 else torch.empty(len(ids), 0).long() for ids in self.own[slot.name]]
            self.values[f"@w:{slot.name}"] = Value(self.names, slot.shape, columns)
        for name, constant in self.constants.items():
            changes = [a for a in range(constant.ndim) if bool((constant != constant[(slice(None),) * a + (slice(0, 1),)]).any())]
            self.values[name] = Value.placed(self.names, constant.shape, changes)

    def follow(self, here: str, node: Node) -> Any:
        """The value of a node, or a tuple of them."""
        form, name = TABLE[node.operation].form, node.operation
        given = {key: substitute(value, self.values.__getitem__, 1) for key, value in node.arguments}
        result: Any = None
        if form == "identity":
            result = given["input"]
        elif form == "getitem":
            result = given["self"][given["index"]]
        elif name in _MOVES or name in _APART or (name in _BY_CONSTANTS and self._constant_index(node)):
            result = self._move(node)
        elif (rule := getattr(self, f"_{form}", None)) is not None:
            result = rule(name, given, self.shapes[here])
        return self._unknown(given, self.shapes[here]) if result is None else result

    # -- moves and what is not known -----------------------------------------------------------------------------------

    def _unknown(self, given: dict[str, Any], shapes: Any) -> Any:
        for value in _operands(given):
            value.fix()
        return _several(shapes, lambda shape: Value.placed(self.names, shape))

    def _constant_index(self, node: Node) -> bool:
        return all(r in self.constants for key, value in node.arguments if key != "self" for r in Node("", ((key, value),)).references())

    def _move(self, node: Node) -> Any:
        operation = TABLE[node.operation]
        read = [node.argument("self")] if node.operation in _BY_CONSTANTS else list(dict.fromkeys(node.references()))
        values = [self.values[r] for r in read]
        changed = {"value": 0.0} if node.operation in ("constant_pad_nd", "pad") and node.argument("value") is not None else {}

        def move(tensors: list[Tensor]) -> Any:
            def of(reference: str) -> Any:
                return tensors[read.index(reference)] if reference in read else self.constants[reference]

            return operation.call({key: substitute(value, of, 1) for key, value in node.arguments} | changed)

        return moved(self.names, move, values, node.operation in _APART)

    def _einsum(self, name: str, given: dict[str, Any], shapes: Any) -> Any:
        return self.einsum(given["equation"], given["tensors"])

    def _vmap(self, name: str, given: dict[str, Any], shapes: Any) -> Any:
        if name == "bilinear":
            a, b, w = given["input1"].axes, given["input2"].axes, given["weight"].axes
            self.meet(a[-1], w[1])
            self.meet(b[-1], w[2])
            front = [self.meet(x, y) for x, y in zip(a[:-1], b[:-1])]
            return self.made([*front, self.along(w[0], given.get("bias"))])
        if name == "_weight_norm":
            return self.together([given["v"], given["g"]])
        if name == "outer":
            return self.made([given["self"].axes[0], given["vec2"].axes[0]])
        if name == "cdist":
            a, b = given["x1"].axes, given["x2"].axes
            self.meet(a[-1], b[-1])
            return self.made([*(self.meet(x, y) for x, y in zip(a[:-2], b[:-2])), a[-2], b[-2]]) if len(a) == len(b) else None
        if name in ("cosine_similarity", "pairwise_distance"):
            joined = self.together([given["x1"], given["x2"]])
            return self._summed(joined, given.get("dim", 1) if name == "cosine_similarity" else -1, bool(given.get("keepdim")))
        if name == "grid_sampler":
            given["grid"].fix()
            return self._image(name, {"self": given["input"], "spatial": given["input"].shape[2:]}, shapes)
        return None

    def _elementwise(self, name: str, given: dict[str, Any], shapes: Any) -> Any:
        return self.together(_operands(given))

    def _create(self, name: str, given: dict[str, Any], shapes: Any) -> Any:
        return Value.unnamed(self.names, shapes)

    def _axes(self, name: str, given: dict[str, Any], shapes: Any) -> Any:
        if name in _UNIFORM:
            return Value.unnamed(self.names, shapes)
        x: Value = given["self"]
        if name in ("type_as", "to.dtype"):
            return x
        if name in _SAME:
            return self.made(x.axes)
        if name in _SUMS:
            return self._summed(x, given.get("dim"), bool(given.get("keepdim")))
        if name == "glu":
            axis, half = given.get("dim", -1), shapes[given.get("dim", -1)]
            return self.together([moved(self.names, _narrow(axis, start, half), [x], False) for start in (0, half)])
        if name in ("tril", "triu"):
            return self.together([x, Value.placed(self.names, x.shape[-2:])])
        if name in _CHOICES:
            return self._ordered(x, given.get("dim", None if name.startswith("arg") else -1), shapes)
        return None

    def _summed(self, x: Value, dims: Any, keep: bool) -> Value:
        rank = len(x.shape)
        gone = {d % rank for d in ([dims] if isinstance(dims, int) else dims or range(rank))}
        return self.made([NOTHING if a in gone else columns for a, columns in enumerate(x.axes) if keep or a not in gone])

    def _ordered(self, x: Value, dim: int | None, shapes: Any) -> Any:
        rank, axes = len(x.shape), list(x.axes)
        which = range(rank) if dim is None else [dim % rank]
        for axis in which:
            self.keep(axes[axis])

        def one(shape: tuple[int, ...]) -> Value:
            if len(shape) == rank:
                return self.made([self.places(size) if a in which else axes[a] for a, size in enumerate(shape)])
            return self.made([axes[a] for a in range(rank) if a not in which])

        return _several(shapes, one)

    def _image(self, name: str, given: dict[str, Any], shapes: Any) -> Any:
        x: Value = given["self"] if "self" in given else given["input"]
        digit = next((c for c in name if c.isdigit()), "")
        if name == "col2im" or not (digit or "spatial" in given):
            return None
        spatial = len(given["spatial"]) if "spatial" in given else int(digit)
        for columns in x.axes[-spatial:]:
            self.keep(columns)
        front = x.axes[:-spatial]
        return _several(shapes, lambda shape: self.made([*front, *(self.places(size) for size in shape[len(front) :])]))


def _narrow(axis: int, start: int, size: int) -> Callable[[list[Tensor]], Tensor]:
    """Places ``start:start + size`` of an axis."""
    return lambda tensors: tensors[0].narrow(axis, start, size)


def _operands(given: Any) -> list[Value]:
    """Every value among arguments, in order."""
    if isinstance(given, Value):
        return [given]
    if isinstance(given, dict):
        given = list(given.values())
    return [value for item in given for value in _operands(item)] if isinstance(given, (list, tuple)) else []


def _several(shapes: Any, one: Callable[[tuple[int, ...]], Value]) -> Any:
    """A value, or one of each shape where an operation gives several."""
    return tuple(one(shape) for shape in shapes) if isinstance(shapes, list) else one(shapes)
