"""Two traced passes with different numbers of queries, as one: sizes are multiples of that number, nothing is unused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..kernels.graph import QUERY, SIZE, Argument, Node, is_size, references
from ..kernels.reference import call_node
from .convert import Pass, Untraceable

_LARGEST_CONSTANT = 1 << 22
_ANOTHER_WAY = "another number of queries takes another way through its forward"


def joined(first: Pass, second: Pass, numbers: tuple[int, int]) -> tuple[tuple[Node, ...], str, dict[str, Tensor]]:
    """Nodes that the output needs, the reference of the output, and constants by name. Raises Untraceable where the passes differ in more
    than sizes that are multiples of their numbers of queries."""
    if first.output != second.output or len(first.nodes) != len(second.nodes) or set(first.constants) != set(second.constants):
        raise Untraceable(_ANOTHER_WAY)
    nodes = [_unified(a, b, numbers) for a, b in zip(first.nodes, second.nodes, strict=True)]
    for name, value in first.constants.items():
        if value.shape != second.constants[name].shape or not _same(value, second.constants[name]):
            raise Untraceable("it makes a tensor that depends on the number of queries")
    shapes = {r: _unified_argument(shape, second.shapes[r], numbers) for r, shape in first.shapes.items() if r in second.shapes}
    return _needed(*_folded([_flattened(node, f"@{i}", shapes) for i, node in enumerate(nodes)], first.output, first.constants))


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(), b.nan_to_num()) and torch.equal(a.isnan(), b.isnan())


def _unified(first: Node, second: Node, numbers: tuple[int, int]) -> Node:
    """One node for the same call in both passes; sizes that differ are multiples of the number of queries."""
    if first.operation != second.operation or [k for k, _ in first.arguments] != [k for k, _ in second.arguments]:
        raise Untraceable(_ANOTHER_WAY)
    pairs = zip(first.arguments, second.arguments, strict=True)
    return Node(first.operation, tuple((name, _unified_argument(a, b, numbers)) for (name, a), (_, b) in pairs))


def _unified_argument(a: Argument, b: Argument, numbers: tuple[int, int]) -> Argument:
    if isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b):
        return tuple(_unified_argument(x, y, numbers) for x, y in zip(a, b, strict=True))
    if type(a) is type(b) and a == b:
        return a
    if type(a) is int and type(b) is int and a % numbers[0] == 0 and a // numbers[0] * numbers[1] == b:
        times = a // numbers[0]
        return SIZE if times == 1 else f"{SIZE}*{times}"
    raise Untraceable(f"an argument that depends on the number of queries in another way than as a multiple: {a!r:.40} and {b!r:.40}")


def _flattened(node: Node, reference: str, shapes: Mapping[str, Any]) -> Node:
    """A view of ``[n, C, H, W]`` as ``[n, C * H * W]`` is a flatten, however it was written."""
    before, after = shapes.get(str(node.argument("self"))), shapes.get(reference)
    if node.operation not in ("reshape", "flatten.using_ints") or before is None or after is None:
        return node
    plain = len(after) == 2 and len(before) > 2 and before[0] == after[0] == SIZE and not any(map(is_size, (*before[1:], *after[1:])))
    return Node("flatten.using_ints", (*node.arguments[:1], ("start_dim", 1 - len(before)), ("end_dim", -1))) if plain else node


def _folded(nodes: list[Node], output: str, constants: Mapping[str, Tensor]) -> tuple[list[Node | None], str, dict[str, Tensor]]:
    """The nodes, the output's reference and the constants, after calls on constants alone were replaced by their results: these are new
    constants, and None stands in place of the call."""
    values: dict[str, Any] = {f"@c:{name}": value for name, value in constants.items()}
    new: dict[str, str] = {}
    left: list[Node | None] = []
    for i, node in enumerate(nodes):
        node = Node(node.operation, tuple((name, renamed(value, new)) for name, value in node.arguments))
        node = _unmasked(node, values)
        kind = node.operation.startswith("new_") or node.operation == "type_as"  # of the queries it takes the dtype alone
        reads = [value for name, value in node.arguments if not (kind and value == QUERY)]
        value = None
        drawn = node.argument("train") or node.argument("dropout_p")
        if all(r in values for r in references(tuple(reads))) and not _sized(tuple(reads)) and not drawn:
            with torch.no_grad():
                value = call_node(node, {**values, QUERY: torch.empty(1, dtype=torch.float32, device="cpu")}, 1)
        if isinstance(value, Tensor) and value.numel() <= _LARGEST_CONSTANT:
            new[f"@{i}"] = f"@c:computed.{i}"
            values[new[f"@{i}"]] = value.contiguous()
            left.append(None)
        else:
            left.append(node)
    return left, new.get(output, output), {r.removeprefix("@c:"): value for r, value in values.items()}


def _unmasked(node: Node, known: dict[str, Any]) -> Node:
    """A constant mask as an index is the places where it is true; these become constants."""
    if node.operation not in ("index.Tensor", "index_put"):
        return node
    places: list[Argument] = []
    for reference in node.argument("indices"):
        mask = known.get(reference) if isinstance(reference, str) else None
        if isinstance(mask, Tensor) and mask.dtype in (torch.bool, torch.uint8):
            for axis, place in enumerate(mask.nonzero(as_tuple=True)):
                places.append(f"@c:computed.{reference[3:]}.{axis}")
                known[places[-1]] = place
        else:
            places.append(reference)
    return Node(node.operation, tuple((name, tuple(places) if name == "indices" else value) for name, value in node.arguments))


def _sized(value: Argument) -> bool:
    return any(_sized(item) for item in value) if isinstance(value, tuple) else is_size(value)


def _needed(nodes: list[Node | None], output: str, constants: Mapping[str, Tensor]) -> tuple[tuple[Node, ...], str, dict[str, Tensor]]:
    """Only what the output depends on, numbered anew; constants that have no key of the module's are named in the order of being read."""
    wanted: set[str] = set()
    stack = [output]
    while stack:
        reference = stack.pop()
        if reference in wanted:
            continue
        wanted.add(reference)
        node = nodes[int(reference[1:])] if reference[1:].isdigit() else None
        if node is not None:
            stack += list(node.references())
    new: dict[str, str] = {}
    held: dict[str, Tensor] = {}
    kept: list[Node] = []

    def hold(reference: str) -> None:
        if reference.startswith("@c:") and reference not in new:
            made = reference.startswith(("@c:constant.", "@c:computed."))
            new[reference] = f"@c:constant.{sum(name.startswith('constant.') for name in held)}" if made else reference
            value = constants[reference.removeprefix("@c:")]
            if value.numel() > _LARGEST_CONSTANT:
                raise Untraceable(f"it holds a tensor of {value.numel():,} numbers that is no parameter")
            held[new[reference].removeprefix("@c:")] = value

    for i, node in enumerate(nodes):
        if node is None or f"@{i}" not in wanted:
            continue
        for reference in node.references():
            hold(reference)
        kept.append(Node(node.operation, tuple((name, renamed(value, new)) for name, value in node.arguments)))
        new[f"@{i}"] = f"@{len(kept) - 1}"
    hold(output)
    return tuple(kept), new.get(output, output), held


def renamed(value: Argument, names: Mapping[str, str]) -> Argument:
    """The argument, with its references renamed."""
    if isinstance(value, tuple):
        return tuple(renamed(item, names) for item in value)
    return names.get(value, value) if isinstance(value, str) else value
