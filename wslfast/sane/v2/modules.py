"""Copies of a network with other numbers: its structure is copied, its tensors are not."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

_KEPT = {int, float, str, bool, bytes, type(None), torch.Size, torch.dtype, torch.device, type}  # what cannot change is shared
_CONTAINERS = {dict, OrderedDict, set, list}


def tensors_of(module: nn.Module) -> dict[str, Tensor] | None:
    """The entries of its state dict, each the parameter or buffer itself; None if some entry is neither (a state of its own making)."""
    held = {id(t) for t in module.parameters()} | {id(t) for t in module.buffers()}
    state = module.state_dict(keep_vars=True)
    plain = all(isinstance(value, Tensor) and id(value) in held and type(value) in (Tensor, nn.Parameter) for value in state.values())
    unchanged = all(not vars(value) and value.grad is None for value in state.values()) if plain else False
    return dict(state) if plain and unchanged else None


def copied(module: nn.Module, tensors: Mapping[int, Tensor]) -> nn.Module:
    """A deep copy of the module in which the tensor of each id is the given one, as a parameter where the old one is.

    Tensors that are not named are copied. A part of the module that says itself how it is copied is asked.
    """
    return _copied(module, tensors, {})


def _copied(module: nn.Module, tensors: Mapping[int, Tensor], memo: dict[int, Any]) -> nn.Module:
    if id(module) in memo:
        return memo[id(module)]  # type: ignore[no-any-return]
    kind = type(module)
    if _copies_itself(kind):  # type: ignore[arg-type]  # a class is hashed as an object, whatever its instances do
        for t in (*module.parameters(), *module.buffers()):
            memo.setdefault(id(t), _tensor(t, tensors, memo))
        return copy.deepcopy(module, memo)
    new = kind.__new__(kind)
    memo[id(module)] = new
    attributes = vars(new)
    for name, value in vars(module).items():
        kept = type(value)
        if kept in _KEPT or (kept is tuple and all(type(v) in _KEPT for v in value)):
            attributes[name] = value
        elif kept in _CONTAINERS and not value:
            attributes[name] = kept()
        elif name in ("_parameters", "_buffers"):
            attributes[name] = kept([(key, None if t is None else _tensor(t, tensors, memo)) for key, t in value.items()])
        elif name == "_modules":
            attributes[name] = kept([(key, None if m is None else _copied(m, tensors, memo)) for key, m in value.items()])
        elif name == "_compiled_call_impl":
            attributes[name] = None
        else:
            attributes[name] = copy.deepcopy(value, memo)
    return new


def _tensor(old: Tensor, tensors: Mapping[int, Tensor], memo: dict[int, Any]) -> Tensor:
    if id(old) not in memo:
        new = tensors.get(id(old))
        if new is None:
            memo[id(old)] = copy.deepcopy(old)
        else:
            memo[id(old)] = nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new
    return memo[id(old)]  # type: ignore[no-any-return]


@lru_cache(maxsize=256)
def _copies_itself(kind: type[nn.Module]) -> bool:
    """Whether copying takes more than copying attributes: methods of its own for it, or weak references to its weights."""
    if issubclass(kind, nn.RNNBase) or hasattr(kind, "__deepcopy__"):
        return True
    homes = [next(c for c in kind.__mro__ if name in vars(c)) for name in ("__getstate__", "__setstate__") if hasattr(kind, name)]
    reduced = kind.__reduce_ex__ is not object.__reduce_ex__ or kind.__reduce__ is not object.__reduce__
    return reduced or any(home is not object and not home.__module__.startswith("torch.nn.") for home in homes)
