"""Forms (``forms.py``) of matrix products: linear layers, ``matmul``, ``einsum``, attention, tables of embeddings."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cpu.products import product
from .calls import Call, Layout, Values
from .layouts import behind, everyone, mapped, ranked


def linear(call: Call, a: Values, models: int) -> Tensor:
    """Batched products; inputs that all models share are read once for each."""
    x, weight, bias = a["input"], a["weight"], a.get("bias")
    if not call.stacked("weight") and not call.stacked("bias"):
        return F.linear(x, weight, bias)
    if call.ranks["weight"] != 2:
        return mapped(call, a, models)  # type: ignore[no-any-return]
    return products(call, x, weight, bias, models)[0]


def products(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None, models: int) -> tuple[Tensor, Tensor, Tensor]:
    """The output of a linear layer, and the operands ``[M, rows, in']`` and ``[M, out, in']`` of its product, filled up where they are
    to lie aligned."""
    out, features = weight.shape[-2:]
    lead = x.shape[1:-1] if call.stacked("input") else x.shape[:-1]
    rows = x.reshape(models, -1, features) if call.stacked("input") else x.reshape(-1, features)
    if call.aligned and out * features % 4:
        missing = -features % 4
        weight, rows = F.pad(weight, (0, missing)), F.pad(rows, (0, missing))
    if rows.ndim == 2:
        rows = rows.expand(models, *rows.shape)
    weight = everyone(weight, models, call.stacked("weight"))
    made = product(rows, weight, bias)
    return made if len(lead) == 1 else made.reshape(models, *lead, out), rows, weight


def matmul(call: Call, a: Values, models: int) -> Tensor:
    """Products of matrices, batched in any way."""
    names = list(call.layouts)
    ranks = [call.ranks[name] for name in names]
    if min(ranks) < 2:
        return mapped(call, a, models)
    return torch.matmul(*(ranked(call, a, name, max(ranks), models) for name in names))


def addmm(call: Call, a: Values, models: int) -> Tensor:
    """beta * self + alpha * a @ b."""
    first, second = (a[name] for name in call.layouts if name != "self")
    return a.get("beta", 1) * ranked(call, a, "self", call.rank, models) + a.get("alpha", 1) * torch.matmul(first, second)


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
    return torch.einsum(f"{','.join(found[0])}->{found[1]}", *a["tensors"])


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
