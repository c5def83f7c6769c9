"""State dicts of wrapped, parametrised and pruned modules, as the entries that they compute."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import WslfastError

_STEP = "num_batches_tracked"  # batch norm's counter, which no answer depends on
_PARAMETRISED = re.compile(r"^(?P<path>(?:.*\.)?)parametrizations\.(?P<name>[^.]+)\.(?P<rest>.+)$")


def effective_state(state: Mapping[str, Any], known: Container[str]) -> dict[str, Any]:
    """A state dict with the keys that an architecture knows: prefixes of wrappers taken off (``module.`` of DataParallel, ``_orig_mod.`` of
    torch.compile), weights in place of what weight norm, spectral norm and pruning store. Other keys stay as they are.

    Raises WslfastError where two keys name one entry and hold other numbers."""
    plain: dict[str, Any] = {}
    for key, value in state.items():
        name = _plain(key, known) if isinstance(key, str) else key
        if name in plain and not (isinstance(value, Tensor) and isinstance(plain[name], Tensor) and torch.equal(value, plain[name])):
            raise WslfastError(f"{key!r} and another key both name {name!r}, with other numbers")
        plain[name] = value
    if all(key in known or str(key).endswith(_STEP) for key in plain):
        return plain
    made: dict[str, Any] = {}
    groups: dict[str, dict[str, Tensor]] = {}
    for key, value in plain.items():
        part = _part(key, known) if isinstance(key, str) and isinstance(value, Tensor) else None
        if part is None:
            made[key] = value
        else:
            groups.setdefault(part[0], {})[part[1]] = value
    for name, parts in groups.items():
        weight = _weight(parts)
        if weight is None:
            made |= {key: value for key, value in plain.items() if isinstance(key, str) and (_part(key, known) or ("",))[0] == name}
        else:
            made[_plain(name, known)] = weight
    return made


def _plain(key: str, known: Container[str]) -> str:
    short, longer = key, ""
    while short not in known and short != longer:
        short, longer = short.replace("_orig_mod.", "").removeprefix("module."), short
    return short if short in known else key


def _part(key: str, known: Container[str]) -> tuple[str, str] | None:
    """The parameter to whose making an entry belongs, and which part of it: ``("fc.weight", "_g")``."""
    if key in known:
        return None
    if match := _PARAMETRISED.match(key):
        return match["path"] + match["name"], match["rest"]
    for suffix in ("_orig", "_mask", "_g", "_v", "_u"):
        whole = key.removesuffix(suffix)
        if whole != key and _plain(whole, known) in known:
            return whole, suffix
    return None


def _weight(parts: Mapping[str, Tensor]) -> Tensor | None:
    """The tensor that the parts compute in evaluation mode; None if they are of no known kind."""
    kinds = set(parts)
    if kinds == {"_orig", "_mask"}:
        return parts["_orig"] * parts["_mask"]
    if kinds in ({"_g", "_v"}, {"original0", "original1"}):
        g, v = (parts["_g"], parts["_v"]) if "_g" in parts else (parts["original0"], parts["original1"])
        axes = [d for d in range(v.ndim) if g.ndim != v.ndim or g.shape[d] == 1]
        norm = torch.linalg.vector_norm(v, dim=axes, keepdim=True) if axes else v.abs()  # no axes are all axes to torch
        return v * (g / norm)
    if kinds in ({"_orig", "_u", "_v"}, {"_orig", "_u"}, {"original", "0._u", "0._v"}):
        weight = parts["_orig"] if "_orig" in parts else parts["original"]
        if not kinds & {"_v", "0._v"}:
            return None
        u, v = (parts[f"_{x}" if f"_{x}" in parts else f"0._{x}"] for x in "uv")
        matrices = [weight.transpose(0, axis).flatten(1) for axis in (0, 1) if axis < weight.ndim and len(u) == weight.shape[axis]]
        if len(matrices) == 2 and weight.ndim > 2:  # a transposed convolution is normed along its second axis, and both are as long
            matrices.sort(key=lambda matrix: -float(torch.cosine_similarity(matrix.T @ u, v, dim=0)))  # v was made so by training
        return weight / torch.dot(u, matrices[0] @ v)
    return None
