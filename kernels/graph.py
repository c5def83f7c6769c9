"""The graph of a network: which operation follows which, as plain data.

A :class:`Graph` is what an architecture is made of, whatever module it was traced from: a tuple of nodes, each one operation of
the table in ``operations.py`` with its arguments. Everything is frozen, hashable, comparable and JSON-able, so that a graph is a cache
key, an entry in a zoo's manifest and part of a checkpoint; running it needs no module and no code of its owner's.

An argument is a number, a text, a tuple, or a *reference*, a text that begins with ``@``:

    @x        the queries ``[n, *input_shape]``
    @3        the output of node 3
    @w:NAME   the parameter of that name, one per model
    @c:NAME   a constant, the same for all models
    @n, @n*4  the number of queries, or a multiple of it, where a size is meant
    @inf      infinity, which JSON has not; and @-inf, @nan
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .default_device import with_numbers
from .dtypes import HELD, held

QUERY = "@x"
SIZE = "@n"
INFINITE = {"@inf": float("inf"), "@-inf": float("-inf"), "@nan": float("nan")}
_MOST_NODES = 100_000
_MOST_CONSTANTS = 1 << 24  # numbers of one constant
_MOST_WEIGHTS = 1 << 40
_LARGEST = 1 << 53  # of whole numbers: what a float holds

Argument = Any  # a number, a text, None, or a tuple of these
Arguments = tuple[tuple[str, Argument], ...]


@dataclass(frozen=True)
class Slot:
    """Where one parameter lives in a row of weights."""

    name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:  # not kept: torch.compile does not see through the lock of a cached_property
        return math.prod(self.shape)

    @property
    def stop(self) -> int:
        return self.offset + self.size


def slots_of(shapes: Mapping[str, tuple[int, ...]]) -> tuple[Slot, ...]:
    """Slots of parameters that lie one after another, in this order."""
    slots, offset = [], 0
    for name, shape in shapes.items():
        slots.append(Slot(name, tuple(shape), offset))
        offset = slots[-1].stop
    return tuple(slots)


@dataclass(frozen=True)
class Constant:
    """A tensor that all models share: an integer buffer, a position table that is no parameter, a mask.

    Attributes:
        name: its state-dict key, or one that was made up.
        kept: whether it is an entry of the module's state dict.
        data: the values, little-endian, in base64.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: str
    kept: bool = False

    @classmethod
    def of(cls, name: str, value: Tensor, kept: bool = False) -> Constant:
        value = held(value)
        raw = value.reshape(-1).view(torch.uint8) if value.numel() else value.new_empty(0, dtype=torch.uint8)
        return cls(name, str(value.dtype).removeprefix("torch."), tuple(value.shape), base64.b64encode(bytes(raw.tolist())).decode(), kept)

    @cached_property
    @with_numbers
    def value(self) -> Tensor:
        """The tensor, on the CPU; not to be written to."""
        raw = torch.frombuffer(bytearray(base64.b64decode(self.data) or b"\0"), dtype=torch.uint8)
        dtype = HELD[self.dtype]
        return raw[: math.prod(self.shape) * dtype.itemsize].clone().view(dtype).reshape(self.shape)


@dataclass(frozen=True)
class Node:
    """One operation. ``arguments`` are in the order of its signature, defaults left out."""

    operation: str
    arguments: Arguments

    def references(self) -> Iterator[str]:
        """Everything it reads, in order."""
        for _, value in self.arguments:
            yield from references(value)

    def argument(self, name: str, default: Argument = None) -> Argument:
        """An argument's value, or the default where it is left out."""
        return next((value for key, value in self.arguments if key == name), default)


def references(value: Argument) -> Iterator[str]:
    """References to tensors in an argument."""
    if isinstance(value, str) and value.startswith("@") and value not in INFINITE and not is_size(value):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from references(item)


def is_size(value: Argument) -> bool:
    """Whether an argument stands for the number of queries, or a multiple of it."""
    return isinstance(value, str) and (value == SIZE or value.startswith(f"{SIZE}*"))


def size_of(value: str, n: int) -> int:
    """The number that ``@n`` or ``@n*4`` is for n queries."""
    return n * int(value[3:] or 1)


def substitute(value: Argument, of: Callable[[str], Any], n: int) -> Any:
    """An argument with its references replaced by what ``of`` gives, its sizes by numbers and its tuples by lists."""
    if isinstance(value, str) and value.startswith("@"):
        return INFINITE[value] if value in INFINITE else size_of(value, n) if is_size(value) else of(value)
    if isinstance(value, tuple):
        return [substitute(item, of, n) for item in value]
    return value


@dataclass(frozen=True)
class Training:
    """What a graph, which is of evaluation mode, does not tell of training mode.

    Attributes:
        fixed: entries of a row of weights that no optimiser trains, running statistics aside: floating buffers, frozen parameters
            (``requires_grad``), and those that no gradient comes to.
        graph: of training mode, where that is another one than the graph itself with its norms and dropout in training mode.
        refused: why it cannot be trained here, in words; empty where it can.
    """

    fixed: tuple[str, ...] = ()
    graph: Graph | None = None
    refused: str = ""


@dataclass(frozen=True, eq=False)
class Graph:
    """A network as data. Two graphs are equal if they compute the same in the same way from parameters of the same names and shapes, in
    evaluation mode.

    Attributes:
        input_shape: of one query.
        nodes: operations, each after what it reads.
        output: reference to the result.
        slots: parameters in the order of a row of weights.
        constants: tensors that all models share.
        aliases: further state-dict keys of tied parameters: (key, name of the slot).
        training: what it does not tell of training mode; no part of what makes two graphs equal.
    """

    input_shape: tuple[int, ...]
    nodes: tuple[Node, ...]
    output: str
    slots: tuple[Slot, ...]
    constants: tuple[Constant, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()
    training: Training = field(default=Training(), repr=False)
    digest: str = field(init=False, repr=False, default="")

    def __post_init__(self) -> None:
        record = self.to_dict()
        record.pop("training", None)
        text = json.dumps(record, sort_keys=True, separators=(",", ":"))
        object.__setattr__(self, "digest", hashlib.sha256(text.encode()).hexdigest())
        object.__setattr__(self, "_hash", hash(self.digest))

    def __hash__(self) -> int:
        return self._hash  # type: ignore[attr-defined,no-any-return]

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Graph) and self.digest == other.digest)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({"training": Training(), **state})  # of an older version
        object.__setattr__(self, "_hash", hash(self.digest))  # of texts, another in every process

    @cached_property
    def parameters(self) -> int:
        """Numbers in a row of weights."""
        return self.slots[-1].stop if self.slots else 0

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of each slot."""
        return tuple(slot.size for slot in self.slots)

    @cached_property
    def by_name(self) -> dict[str, Slot]:
        """Slots by name."""
        return {slot.name: slot for slot in self.slots}

    @cached_property
    def constant(self) -> dict[str, Constant]:
        """Constants by name."""
        return {c.name: c for c in self.constants}

    @cached_property
    def per_model(self) -> tuple[bool, ...]:
        """Of each node: whether its output differs between models that see the same queries."""
        differs: list[bool] = []
        for node in self.nodes:
            differs.append(any(r.startswith("@w:") or (r[1:].isdigit() and differs[int(r[1:])]) for r in node.references()))
        return tuple(differs)

    def readers(self) -> dict[str, list[int]]:
        """Nodes that read each value, by its reference, once for each time."""
        found: dict[str, list[int]] = {}
        for i, node in enumerate(self.nodes):
            for reference in node.references():
                found.setdefault(reference, []).append(i)
        return found

    # -- JSON ----------------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; the inverse of :meth:`from_dict`."""
        record: dict[str, Any] = {
            "input_shape": list(self.input_shape),
            "parameters": [[slot.name, list(slot.shape)] for slot in self.slots],
            "nodes": [{"op": node.operation, **{name: _jsonable(value) for name, value in node.arguments}} for node in self.nodes],
            "output": self.output,
        }
        if self.constants:
            record["constants"] = [
                {"name": c.name, "dtype": c.dtype, "shape": list(c.shape), "data": c.data, "kept": c.kept} for c in self.constants
            ]
        if self.aliases:
            record["aliases"] = [list(pair) for pair in self.aliases]
        if self.training != Training():
            own = self.training.graph
            record["training"] = {
                "fixed": list(self.training.fixed),
                "graph": None if own is None else own.to_dict(),
                "refused": self.training.refused,
            }
        return record

    @classmethod
    def from_dict(cls, record: Any) -> Graph:
        """Rebuild from :meth:`to_dict`'s form. Raises ValueError for anything else; nothing is run and nothing large allocated. What its
        operations are is for ``operations.check_graph`` to say."""
        check(isinstance(record, Mapping), f"expected an object, got {type(record).__name__}")
        unknown = set(record) - {"input_shape", "parameters", "nodes", "output", "constants", "aliases", "training"}
        check(not unknown, f"unknown entries {sorted(map(str, unknown))[:5]}")
        slots = slots_of(dict(_parameters(record.get("parameters"))))
        check(bool(slots), "it has no parameters")
        check(slots[-1].stop <= _MOST_WEIGHTS, f"parameters: {slots[-1].stop:,.3g} numbers")
        nodes = record.get("nodes")
        check(isinstance(nodes, list) and len(nodes) <= _MOST_NODES, "nodes: expected a list")
        constants = tuple(_constant(c) for c in _list(record.get("constants", []), "constants"))
        aliases = tuple(_alias(pair) for pair in _list(record.get("aliases", []), "aliases"))
        output = record.get("output")
        check(isinstance(output, str), "output: expected a reference")
        graph = cls(
            _sizes(record.get("input_shape"), "input_shape"),
            tuple(_node(n) for n in nodes),
            output,
            slots,
            constants,
            aliases,
            _training(record["training"], slots) if "training" in record else Training(),
        )
        graph._check_references()
        return graph

    def _check_references(self) -> None:
        names = {f"@w:{s.name}" for s in self.slots} | {f"@c:{c.name}" for c in self.constants} | {QUERY}
        check(len(names) == 1 + len(self.slots) + len(self.constants), "two parameters or constants share a name")
        for i, node in enumerate(self.nodes):
            for r in node.references():
                check(_is_node(r, i) or r in names, f"node {i} ({node.operation:.40}): it reads {r!r:.60}, which is not there")
        r = self.output
        check(_is_node(r, len(self.nodes)) or r in names, f"output: {r!r:.60} is not there")
        slot_names = {s.name for s in self.slots}
        check(all(name in slot_names for _, name in self.aliases), "aliases: a key of no parameter")
        keys = [key for key, _ in self.aliases]
        check(len(set(keys)) == len(keys) and not slot_names & set(keys), "aliases: a key that is there twice")


# -- reading JSON ------------------------------------------------------------------------------------------------------


def check(condition: bool, message: str) -> None:
    """Raise ValueError unless the condition holds."""
    if not condition:
        raise ValueError(f"graph: {message}")


def _is_node(reference: str, count: int) -> bool:
    """Whether it stands for one of the first ``count`` nodes, in the one spelling that there is."""
    number = reference[1:]
    plain = reference.startswith("@") and number.isascii() and number.isdigit() and len(number) < 10
    return plain and str(int(number)) == number and int(number) < count


def _jsonable(value: Argument) -> Any:
    return [_jsonable(item) for item in value] if isinstance(value, tuple) else value


def _argument(value: Any, depth: int = 0) -> Argument:
    check(depth < 8, "arguments nested too deep")
    if isinstance(value, list):
        return tuple(_argument(item, depth + 1) for item in value)
    check(value is None or type(value) in (bool, int, float, str), f"an argument of type {type(value).__name__}")
    check(not isinstance(value, float) or math.isfinite(value), "an argument that is no finite number")
    check(type(value) is not int or abs(value) <= _LARGEST, "an argument out of all proportion")
    if isinstance(value, str) and value.startswith(SIZE) and value not in INFINITE:
        times = value[len(SIZE) + 1 :]
        check(value == SIZE or (times.isdecimal() and len(times) < 10 and value[len(SIZE)] == "*"), f"a size {value!r:.40}")
    return value


def _node(record: Any) -> Node:
    check(isinstance(record, Mapping) and isinstance(record.get("op"), str), "a node is an object with an op")
    return Node(record["op"], tuple((str(name), _argument(value)) for name, value in record.items() if name != "op"))


def _list(value: Any, what: str) -> list[Any]:
    check(isinstance(value, list), f"{what}: expected a list")
    return list(value)


def _sizes(value: Any, what: str) -> tuple[int, ...]:
    whole = isinstance(value, (list, tuple)) and all(type(s) is int and 0 <= s < 1 << 31 for s in value) and len(value) <= 16
    check(whole, f"{what}: expected sizes, got {value!r:.60}")
    return tuple(value)


def _parameters(value: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    seen = set()
    for pair in _list(value, "parameters"):
        check(isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str), "a parameter is [name, shape]")
        check(pair[0] not in seen, f"parameter {pair[0]!r:.60} is there twice")
        seen.add(pair[0])
        yield pair[0], _sizes(pair[1], f"parameter {pair[0]!r:.60}")


def _constant(record: Any) -> Constant:
    check(
        isinstance(record, Mapping) and set(record) == {"name", "dtype", "shape", "data", "kept"},
        "a constant has name, dtype, shape, data, kept",
    )
    shape = _sizes(record["shape"], "a constant's shape")
    check(
        isinstance(record["dtype"], str) and record["dtype"] in HELD and math.prod(shape) <= _MOST_CONSTANTS,
        f"a constant of {record['dtype']!r:.20} {list(shape)}",
    )
    check(all(isinstance(record[key], str) for key in ("name", "data")) and isinstance(record["kept"], bool), "a constant's entries")
    try:
        size = len(base64.b64decode(record["data"], validate=True))
    except ValueError:
        size = -1
    check(size == math.prod(shape) * HELD[record["dtype"]].itemsize, f"constant {record['name']!r:.60} does not hold its numbers")
    return Constant(record["name"], record["dtype"], shape, record["data"], record["kept"])


def _training(record: Any, slots: tuple[Slot, ...]) -> Training:
    check(isinstance(record, Mapping) and set(record) == {"fixed", "graph", "refused"}, "training has fixed, graph, refused")
    fixed = tuple(_list(record["fixed"], "training: fixed"))
    check(set(map(repr, fixed)) <= {repr(slot.name) for slot in slots}, "training: fixed: a name of no parameter")
    check(isinstance(record["refused"], str), "training: refused: expected a text")
    own = record["graph"]
    check(own is None or (isinstance(own, Mapping) and "training" not in own), "training: graph: expected a graph")
    graph = None if own is None else Graph.from_dict(own)
    check(graph is None or graph.slots == slots, "training: graph: it has other parameters")
    return Training(fixed, graph, record["refused"])


def _alias(pair: Any) -> tuple[str, str]:
    check(isinstance(pair, list) and len(pair) == 2 and all(isinstance(p, str) for p in pair), "an alias is [key, name]")
    return pair[0], pair[1]
