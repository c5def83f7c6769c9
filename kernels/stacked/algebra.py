"""Rules (``rules.py``) of calls that move, join, reduce and multiply tensors: shapes, sums, matrix products, ``einsum``, attention, tables.

The twins are the forms (``forms.py``). Values ``[M, n, ...]`` have their models in front; where a call is on images among the channels, its
rule is in ``image_rules.py``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import filling
from .calls import Call, Layout, Values
from .forms import FORMS, by_form, length
from .layouts import ranked
from .product_forms import attention_shares, einsum_letters
from .rules import Gradients, Maker, Rule, Shaped, reduced

_aten = torch.ops.aten


# -- shapes ------------------------------------------------------------------------------------------------------------


def _reshaped(call: Call, known: Values, wanted: frozenset[str], owned: bool) -> Rule | None:
    """Calls that change the shape alone."""
    names = list(call.layouts)
    return Shaped(names[0], by_form(call), lambda g, shape: g.reshape(shape)) if len(names) == 1 else None


def _expand(call: Call, known: Values, wanted: frozenset[str], owned: bool) -> Rule | None:
    return Shaped("self", by_form(call), reduced) if list(call.layouts) == ["self"] and call.layout is Layout.MODELS else None


def _transpose(call: Call, known: Values, wanted: frozenset[str], owned: bool) -> Rule | None:
    return Shaped("self", by_form(call), lambda g, _: g.transpose(known["dim0"], known["dim1"]))


def _permute(call: Call, known: Values, wanted: frozenset[str], owned: bool) -> Rule | None:
    order = [d % call.rank for d in known["dims"]]
    back = [0, *(order.index(axis) + 1 for axis in range(call.rank))]
    return Shaped("self", by_form(call), lambda g, _: g.permute(back)) if call.layout is Layout.MODELS else None


def _flip(call: Call, known: Values, wanted: frozenset[str], owned: bool) -> Rule | None:
    return Shaped("self", by_form(call), lambda g, _: g.flip(known["dims"]))


class Pieces:
    """Gradients of some of the parts that a tensor was cut into, by number; their sum is that of tensors with zeros elsewhere."""

    def __init__(self, parts: dict[int, Tensor]) -> None:
        self.parts = parts

    def __add__(self, other: Pieces) -> Pieces:
        made = dict(self.parts)
        for i, part in other.parts.items():
            made[i] = part if i not in made else made[i] + part
        return Pieces(made)


class Apart:
    """A tensor cut into several along an axis. Its gradient comes as :class:`Pieces`."""

    def __init__(self, call: Call, axis: int, along: bool) -> None:
        self.call, self.axis, self.along = call, axis, along  # along: parts keep the axis

    def forward(self, a: Values, models: int) -> tuple[Any, Any]:
        parts = self.call.operation.invoke(a)
        return parts, [part.shape for part in parts]

    def backward(self, g: Any, saved: Any, models: int) -> Gradients:
        known = next(iter(g.parts.values()))
        parts = [g.parts[i] if i in g.parts else known.new_zeros(shape) for i, shape in enumerate(saved)]
        return {"self": torch.cat(parts, self.axis) if self.along else torch.stack(parts, self.axis)}


def _apart(call: Call, known: Values, wanted: frozenset[str], owned: bool) -> Rule | None:
    axis = known.get("dim", 0)
    return Apart(call, axis, call.operation.name != "unbind.int") if type(axis) is int and axis < 0 else None


class Part:
    """One of several."""

    def __init__(self, index: int) -> None:
        self.index = index

    def forward(self, a: Values, models: int) -> tuple[Tensor, Any]:
        return a["self"][self.index], None

    def backward(self, g: Tensor, saved: Any, models: int) -> Any:
        return {"self": Pieces({self.index: g})}


def _part(call: Call, known: Values, wanted: frozenset[str], owned: bool) -> Rule | None:
    return Part(known["index"])


class Beside:
    """Tensors one after another along an axis, or along a new one; those that all models share get no gradient."""

    def __init__(self, call: Call, known: Values, wanted: frozenset[str]) -> None:
        self.call, self.wanted, self.axis = call, wanted, known.get("dim", 0)
        self.stacks = call.operation.name == "stack"

    def forward(self, a: Values, models: int) -> tuple[Tensor, Any]:
        sizes = [] if self.stacks else [part.shape[self.axis] for part in a["tensors"]]
        return FORMS["join"](self.call, a, models), sizes

    def backward(self, g: Tensor, saved: list[int], models: int) -> Gradients:
        parts = g.unbind(self.axis) if self.stacks else g.split(saved, self.axis)
        return {name: parts[int(name.rpartition(".")[2])] for name in self.wanted}


def _beside(call: Call, known: Values, wanted: frozenset[str], owned: bool) -> Rule | None:
    axis = known.get("dim", 0)
    plain = call.layout is Layout.MODELS and type(axis) is int and axis < 0
    alike = {rank for rank in call.ranks["tensors"] if rank} == {call.rank - (call.operation.name == "stack")}
    return Beside(call, known, wanted) if plain and alike else None


# -- reductions ----------------------------------------------------------------------------------------------------------


class Extreme:
    """The largest or smallest along some axes; equal ones share the gradient, as torch has it."""

    def __init__(self, call: Call, axes: tuple[int, ...], keep: bool) -> None:
        self.call, self.axes, self.keep = call, axes, keep

    def forward(self, a: Values, models: int) -> tuple[Tensor, Any]:
        y = self.call.operation.invoke(a)
        return y, (a["self"], y)

    def backward(self, g: Tensor, saved: Any, models: int) -> Gradients:
        x, y = saved
        those = (x == _behind_axes(y, self.axes, self.keep, x.ndim)).to(x.dtype)
        share = _behind_axes(g, self.axes, self.keep, x.ndim) / those.sum(self.axes, True)
        return {"self": those.mul_(share)}


class Length:
    """``forms.length``."""

    def __init__(self, axes: tuple[int, ...], keep: bool) -> None:
        self.axes, self.keep = axes, keep

    def forward(self, a: Values, models: int) -> tuple[Tensor, Any]:
        x = a["self"]
        y = length(x, self.axes, self.keep)
        return y, (x, y)

    def backward(self, g: Tensor, saved: Any, models: int) -> Gradients:
        x, y = saved
        share = (g / y).masked_fill_(y == 0, 0)  # as torch has it where a vector is zero
        return {"self": x * _behind_axes(share, self.axes, self.keep, x.ndim)}


def _behind_axes(x: Tensor, axes: tuple[int, ...], kept: bool, rank: int) -> Tensor:
    """What is left after a reduction, with ones where the axes were."""
    if not kept:
        for axis in sorted(axis + rank for axis in axes):
            x = x.unsqueeze(axis)
    return x


def _reduction(call: Call, known: Values, wanted: frozenset[str], owned: bool) -> Rule | None:
    """Sums, means and extremes over axes that are counted from the end."""
    axes = known.get("dim")
    axes = (axes,) if type(axes) is int else tuple(axes or ())
    if not axes or not all(type(axis) is int and axis < 0 for axis in axes) or known.get("dtype") is not None:
        return None
    keep, name = bool(known.get("keepdim")), call.operation.name
    if name == "linalg_vector_norm":
        return Length(axes, keep) if known.get("ord", 2) == 2 else None
    if name in ("amax", "amin"):
        return Extreme(call, axes, keep)

    def backward(g: Tensor, shape: torch.Size) -> Tensor:
        g = _behind_axes(g, axes, keep, len(shape))
        return (g / math.prod(shape[axis] for axis in axes) if name == "mean.dim" else g).expand(shape)

    return Shaped("self", by_form(call), backward)


# -- products --------------------------------------------------------------------------------------------------------------


class Matmul:
    """Products of matrices, batched in any way."""

    def __init__(self, call: Call, wanted: frozenset[str]) -> None:
        self.call, self.wanted = call, wanted
        self.names = tuple(call.layouts)
        self.rank = max(call.ranks[name] for name in self.names)
        self.stacked = [call.stacked(name) for name in self.names]

    def forward(self, a: Values, models: int) -> tuple[Tensor, Any]:
        x, y = (ranked(self.call, a, name, self.rank, models) for name in self.names)
        before = x.shape, y.shape
        if self.call.aligned:
            x, y = filling.factors(x, y, self.stacked)
        made = torch.matmul(x, y)
        return filling.first(made, before[1][-1]), (x, y, before, made.shape, [a[name].shape for name in self.names])

    def backward(self, g: Tensor, saved: Any, models: int) -> Gradients:
        x, y, before, shape, shapes = saved
        g = filling.spread(g, shape)
        made: Gradients = {}
        if self.names[0] in self.wanted:
            slope = torch.matmul(g, y.transpose(-1, -2))
            made[self.names[0]] = reduced(filling.first(slope, before[0][-1]), shapes[0])
        if self.names[1] in self.wanted:
            slope = torch.matmul(x.transpose(-1, -2), g)
            made[self.names[1]] = reduced(filling.taken(slope, (*slope.shape[:-2], *before[1][-2:])), shapes[1])
        return made


def _matmul(call: Call, known: Values, wanted: frozenset[str], owned: bool) -> Rule | None:
    plain = len(call.layouts) == 2 and min(call.ranks.values()) >= 2 and all(call.stacked(name) for name in wanted)
    return Matmul(call, wanted) if plain and call.layout is Layout.MODELS else None


class Einsum:
    """``einsum`` of operands in which no letter comes twice: the gradient of one is an ``einsum`` of the output's and the others."""

    def __init__(self, letters: list[str], out: str, wanted: frozenset[str], aligned: bool) -> None:
        self.letters, self.out, self.aligned = letters, out, aligned
        self.wanted = {name: int(name.rpartition(".")[2]) for name in wanted}

    def forward(self, a: Values, models: int) -> tuple[Tensor, Any]:
        operands, before, shape = a["tensors"], [x.shape for x in a["tensors"]], None
        if self.aligned:
            operands, shape = filling.letters(operands, self.letters, self.out, self.out[0])
        made = torch.einsum(f"{','.join(self.letters)}->{self.out}", *operands)
        return made if shape is None else filling.taken(made, shape), (operands, before, made.shape)

    def backward(self, g: Tensor, saved: Any, models: int) -> Gradients:
        operands, before, shape = saved
        g = filling.spread(g, shape)
        made: Gradients = {}
        for name, i in self.wanted.items():
            others = [j for j in range(len(operands)) if j != i]
            equation = f"{','.join([self.out, *(self.letters[j] for j in others)])}->{self.letters[i]}"
            slope, filled = torch.einsum(equation, g, *(operands[j] for j in others)), operands[i].shape
            if slope.shape != filled:  # a letter is one long in some operands and longer in others
                slope = slope.expand(torch.broadcast_shapes(slope.shape, filled))
            made[name] = filling.taken(reduced(slope, filled), before[i])
        return made


def _einsum(call: Call, known: Values, wanted: frozenset[str], owned: bool) -> Rule | None:
    found = einsum_letters(call, known["equation"])
    if found is None:
        return None
    letters, out = found
    plain = len(letters) <= 2 and all(len(set(part)) == len(part) for part in (*letters, out))  # torch's graph takes more two by two
    for i, part in enumerate(letters):
        elsewhere = set(out).union(*(letters[j] for j in range(len(letters)) if j != i))
        plain = plain and set(part) <= elsewhere
    return Einsum(letters, out, wanted, call.aligned) if plain else None


class Attention:
    """softmax(q k^T * scale + mask) v. Axes ahead of the last two may be one long in some of the three, as for queries of a layer's own."""

    def __init__(self, call: Call, known: Values, wanted: frozenset[str]) -> None:
        self.call, self.wanted, self.scale = call, wanted, known.get("scale")

    def forward(self, a: Values, models: int) -> tuple[Tensor, Any]:
        query, key, value = a["query"], a["key"], a["value"]
        shares = attention_shares(self.call, a, query, key, models)
        return torch.matmul(shares, value), (query, key, value, shares)

    def backward(self, g: Tensor, saved: Any, models: int) -> Gradients:
        query, key, value, shares = saved
        made: Gradients = {}
        if "value" in self.wanted:
            made["value"] = reduced(torch.matmul(shares.transpose(-1, -2), g), value.shape)
        of_shares = reduced(torch.matmul(g, value.transpose(-1, -2)), shares.shape)
        slope = _aten._softmax_backward_data(of_shares, shares, -1, shares.dtype)
        slope = slope.mul_(1 / math.sqrt(query.shape[-1]) if self.scale is None else self.scale)
        if "query" in self.wanted:
            made["query"] = reduced(torch.matmul(slope, key), query.shape)
        if "key" in self.wanted:
            made["key"] = reduced(torch.matmul(slope.transpose(-1, -2), query), key.shape)
        return made


def _attention(call: Call, known: Values, wanted: frozenset[str], owned: bool) -> Rule | None:
    three = ("query", "key", "value")
    plain = all(call.stacked(name) and call.ranks[name] == call.rank for name in three)
    return Attention(call, known, wanted) if plain and wanted <= set(three) and not known.get("enable_gqa") else None


class Embedding:
    """Rows of each model's own table, by indices that all models share."""

    def __init__(self, call: Call, known: Values) -> None:
        self.call, self.padding = call, known.get("padding_idx", -1)

    def forward(self, a: Values, models: int) -> tuple[Tensor, Any]:
        weight, indices = a["weight"], a["indices"]
        rows = indices.flatten()
        return weight.index_select(1, rows).unflatten(1, tuple(indices.shape)), (rows, weight.shape)

    def backward(self, g: Tensor, saved: Any, models: int) -> Gradients:
        rows, shape = saved
        slope = g.new_zeros(shape).index_add_(1, rows, g.reshape(models, -1, shape[2]))
        if self.padding >= 0:  # torch gives that row no gradient
            slope[:, self.padding] = 0
        return {"weight": slope}


def _embedding(call: Call, known: Values, wanted: frozenset[str], owned: bool) -> Rule | None:
    plain = call.stacked("weight") and call.layouts["indices"] is Layout.SHARED
    return Embedding(call, known) if plain and not known.get("scale_grad_by_freq") else None


OF_ANY_SIZE = frozenset({"reshape", "expand"})  # rules that read arguments which depend on the number of queries at every call
PARTS = frozenset({"split.Tensor", "split_with_sizes", "chunk", "unbind.int"})  # calls with several results that have a rule
MAKERS: dict[str, Maker] = {
    **dict.fromkeys(PARTS, _apart),
    "getitem": _part,
    **dict.fromkeys(("unsqueeze", "squeeze.dim", "squeeze.dims", "unflatten.int", "reshape", "flatten.using_ints"), _reshaped),
    "expand": _expand,
    "transpose.int": _transpose,
    "permute": _permute,
    "flip": _flip,
    "stack": _beside,
    "cat": _beside,
    **dict.fromkeys(("sum.dim_IntList", "mean.dim", "amax", "amin", "linalg_vector_norm"), _reduction),
    **dict.fromkeys(("matmul", "mm", "bmm"), _matmul),
    "einsum": _einsum,
    "scaled_dot_product_attention": _attention,
    "embedding": _embedding,
}
