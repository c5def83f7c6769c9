"""Forms (``forms.py``) of matrix products: linear layers, ``matmul``, ``einsum``, attention, tables of embeddings."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cpu.products import product
from . import filling
from .calls import Call, Layout, Values
from .layouts import behind, everyone, mapped, ranked


def linear(call: Call, a: Values, models: int) -> Tensor:
    """Batched products; inputs that all models share are read once for each."""
    x, weight, bias = a["input"], a["weight"], a.get("bias")
    if not call.stacked("weight") and not call.stacked("bias"):
        return F.linear(x, weight, bias)
    if call.ranks["weight"] != 2:
        return mapped(call, a, models)  # type: ignore[no-any-return]
    own = call.stacked("weight")
    return products(x, everyone(weight, models, own), bias, call.stacked("input"), call.aligned and own)[0]


def products(x: Tensor, weight: Tensor, bias: Tensor | None, own: bool, aligned: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The output of a linear layer of weights ``[M, out, in]``, and the operands ``[M, rows, in']`` and ``[M, out, in']`` of its product.

    ``own``: whether models are in front of the input, too; ``aligned``: whether operands are filled up to lie aligned.
    """
    models, out, features = weight.shape
    lead = x.shape[own:-1]
    rows = x if len(lead) == 1 else x.reshape(models, -1, features) if own else x.reshape(-1, features)
    if aligned:
        rows, weight = filling.rows_and_weight(rows, weight)
    if not own:
        rows = rows.expand(models, *rows.shape)
    made = product(rows, weight, bias)
    return made if len(lead) == 1 else made.reshape(models, *lead, out), rows, weight


def matmul(call: Call, a: Values, models: int) -> Tensor:
    """Products of matrices and vectors, batched in any way."""
    names = list(call.layouts)
    row, column = (call.ranks[name] == 1 for name in names)  # vectors
    x, y = a[names[0]], a[names[1]]
    operands = x.unsqueeze(-2) if row else x, y.unsqueeze(-1) if column else y
    ranks = [max(2, call.ranks[name]) for name in names]
    stacked = [call.stacked(name) for name in names]
    x, y = (behind(t, max(ranks), rank, models) if own else t for t, rank, own in zip(operands, ranks, stacked, strict=True))
    made = _matrices(call, x, y, stacked)
    made = made.squeeze(-1) if column else made
    return made.squeeze(-1 if column else -2) if row else made


def _matrices(call: Call, x: Tensor, y: Tensor, stacked: Sequence[bool]) -> Tensor:
    """x @ y, of operands that broadcast."""
    if not call.aligned:
        return torch.matmul(x, y)
    wide, (x, y) = y.shape[-1], filling.factors(x, y, stacked)
    return filling.first(torch.matmul(x, y), wide)


def addmm(call: Call, a: Values, models: int) -> Tensor:
    """beta * self + alpha * a @ b."""
    names = [name for name in call.layouts if name != "self"]
    made = _matrices(call, a[names[0]], a[names[1]], [call.stacked(name) for name in names])
    return a.get("beta", 1) * ranked(call, a, "self", call.rank, models) + a.get("alpha", 1) * made


def attention(call: Call, a: Values, models: int) -> Tensor:
    """softmax(q k^T * scale + mask) v, written out: for short sequences faster than torch's fused forms, and so is its backward."""
    query, key, value = (ranked(call, a, name, call.rank, models) for name in ("query", "key", "value"))
    if a.get("enable_gqa"):  # a key for several queries
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    shares = attention_shares(call, a, query, key, models)
    if "dropped" in a:  # in training mode, as dropout's factors
        shares = shares * a["dropped"]
    return torch.matmul(shares, value)


def attention_shares(call: Call, a: Values, query: Tensor, key: Tensor, models: int) -> Tensor:
    """softmax(q k^T * scale + mask)."""
    mask, scale = a.get("attn_mask"), a.get("scale")
    scores = torch.matmul(query, key.transpose(-1, -2)) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if a.get("is_causal"):
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is None:
        return scores.softmax(-1)
    if call.stacked("attn_mask"):
        mask = behind(mask, call.rank, call.ranks["attn_mask"], models)
    scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return torch.ops.aten._safe_softmax(scores, -1)  # type: ignore[no-any-return]  # of what sees nothing, zeros


def einsum(call: Call, a: Values, models: int) -> Tensor:
    """The same equation with a letter for the models."""
    found = einsum_letters(call, a["equation"])
    if found is None:
        return mapped(call, a, models)  # type: ignore[no-any-return]
    return _by_letters(call, a["tensors"], *found)


def _by_letters(call: Call, operands: Sequence[Tensor], given: Sequence[str], out: str) -> Tensor:
    """An ``einsum`` whose output's first letter is the models', of two after two: so is its gradient, and all that lies between."""
    free, operands, given = out[0], list(operands), list(given)
    while len(operands) > 2:
        needed = set(out).union(*given[2:])
        between = "".join(sorted(set(given[0] + given[1]) & needed, key=lambda c: (c != free, c)))
        operands[:2], given[:2] = [_of_two(call, operands[:2], given[:2], between, free)], [between]
    return _of_two(call, operands, given, out, free)


def _of_two(call: Call, operands: Sequence[Tensor], given: Sequence[str], out: str, free: str) -> Tensor:
    shape = None
    if call.aligned:
        operands, shape = filling.letters(operands, given, out, free)
    made = torch.einsum(f"{','.join(given)}->{out}", *operands)
    return made if shape is None else filling.taken(made, shape)


def tensordot(call: Call, a: Values, models: int) -> Tensor:
    """Sums of products over axes of each of two tensors; ``inner``: over the last."""
    names = list(call.layouts)
    ranks, stacked = [call.ranks[name] for name in names], [call.stacked(name) for name in names]
    if 0 in ranks:
        return mapped(call, a, models)  # type: ignore[no-any-return]
    axes = ([-1], [-1]) if call.operation.name == "inner" else (a["dims_self"], a["dims_other"])
    first, second = list("abcdefghijklm"[: ranks[0]]), list("nopqrstuvwxyz"[: ranks[1]])
    for i, j in zip(*axes, strict=True):
        second[j] = first[i]
    out = "".join(c for c in first + second if (c in first) != (c in second))
    given = ["A" * own + "".join(part) for own, part in zip(stacked, (first, second), strict=True)]
    return _by_letters(call, [a[name] for name in names], given, "A" + out)


def cdist(call: Call, a: Values, models: int) -> Tensor:
    """Distances between rows: of many, torch's own is a product of matrices."""
    names, sizes = ("x1", "x2"), [a[name].shape[-2] for name in ("x1", "x2")]
    if call.aligned:
        a = {**a, **{name: filling.even_rows(a[name]) for name in names}}
    made: Tensor = mapped(call, a, models)
    return filling.taken(made, (*made.shape[:-2], *sizes))


def einsum_letters(call: Call, equation: str) -> tuple[list[str], str] | None:
    """Letters of each operand and of the output with one for the models in front where it has some; None where dots stand for axes."""
    given, arrow, out = equation.replace(" ", "").partition("->")
    free = next((c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in equation), None)
    if "." in equation or free is None:
        return None
    if not arrow:
        out = "".join(sorted(c for c in set(given) - {","} if given.count(c) == 1))
    stacked = [layout is Layout.MODELS for layout in call.layouts["tensors"]]
    return [free * own + part for own, part in zip(stacked, given.split(","), strict=True)], free + out


def embedding(call: Call, a: Values, models: int) -> Tensor:
    """Rows of each model's own table."""
    weight, indices, padding = a["weight"], a["indices"], a.get("padding_idx", -1)
    if not call.stacked("weight"):
        return F.embedding(indices, weight)
    if padding >= 0:  # torch gives that row no gradient
        row = torch.arange(weight.shape[1], device=weight.device) == padding
        weight = torch.where(row[:, None], weight.detach(), weight)
    if call.stacked("indices"):
        first = torch.arange(models, device=indices.device) * weight.shape[1]
        return weight.flatten(0, 1)[indices + first.view(models, *(1,) * (indices.ndim - 1))]
    return weight.index_select(1, indices.flatten()).unflatten(1, tuple(indices.shape))
