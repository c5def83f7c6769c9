"""The checkpoint augmentations of ``sane`` 2.x: permuted views and alignment, the same draws, without copying a network's numbers twice."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..permutations import blocks
from ..rebasin import weight_matching
from .modules import copied, tensors_of


def permute(self: Any, checkpoint: Any, *, original: Callable[..., Any]) -> list[Any]:
    """The checkpoint itself, and ``num_permutations`` views of it; ``PermutationAugmentation.forward``."""
    spec = self.permutation_spec
    tensors = _movable(checkpoint, spec)
    if tensors is None:
        return original(self, checkpoint)  # type: ignore[no-any-return]
    # Matching a model to itself moves nothing. It is done for the numbers that it draws, of which the views' depend.
    names = weight_matching(spec, tensors, tensors)
    drawn = [{p: torch.randperm(len(index)) for p, index in names.items()} for _ in range(self.num_permutations)]
    return [checkpoint, *_views(checkpoint, spec, drawn, tensors)]


def align(self: Any, checkpoint: Any, *, original: Callable[..., Any]) -> list[Any]:
    """The checkpoint with its channels in the order that matches the reference; ``CheckpointAligner.forward``."""
    spec, reference = self.permutation_spec, self.reference_checkpoint.model.state_dict()
    tensors = _movable(checkpoint, spec)
    if tensors is None or any(reference[k].dtype != v.dtype or reference[k].shape != v.shape for k, v in tensors.items() if k in reference):
        return original(self, checkpoint)  # type: ignore[no-any-return]
    perm = weight_matching(spec, reference, tensors)
    return _views(checkpoint, spec, [perm], tensors)


def _movable(checkpoint: Any, spec: Any) -> dict[str, Tensor] | None:
    """The entries of the model's state dict, if they are all its own tensors on the CPU and the spec knows every one."""
    tensors = tensors_of(checkpoint.model)
    if tensors is None or any(name not in spec.axes_to_perm or value.device.type != "cpu" for name, value in tensors.items()):
        return None
    needed = {name for axes in spec.perm_to_axes.values() for name, _ in axes}
    if any(name not in tensors or tensors[name].dtype != torch.float32 for name in needed):
        return None
    sizes = {p: tensors[axes[0][0]].shape[axes[0][1]] for p, axes in spec.perm_to_axes.items()}
    for name, value in tensors.items():
        axes = [(axis, p) for axis, p in enumerate(spec.axes_to_perm[name]) if p is not None]
        if any(axis >= value.ndim or value.shape[axis] % sizes[p] for axis, p in axes):
            return None
    return tensors


@torch.no_grad()
def _views(checkpoint: Any, spec: Any, perms: Sequence[Mapping[str, Tensor]], tensors: Mapping[str, Tensor]) -> list[Any]:
    if not perms:
        return []
    stacked = {p: torch.stack([perm[p].long() for perm in perms]) for p in perms[0]}
    moved = {name: permuted_many(value, spec.axes_to_perm[name], stacked, len(perms)) for name, value in tensors.items()}
    ids = {name: id(value) for name, value in tensors.items()}
    out = []
    for j in range(len(perms)):
        made = copy.copy(checkpoint)
        model = copied(checkpoint.model, {ids[name]: many[j].clone() for name, many in moved.items()})
        rest = {name: value for name, value in vars(checkpoint).items() if name != "model"}
        vars(made).update(copy.deepcopy(rest), model=model)
        out.append(made)
    return out


def permuted_many(value: Tensor, per: Sequence[str | None], index: Mapping[str, Tensor], m: int) -> Tensor:
    """``[m, *shape]``: one tensor under m permutations ``{name: [m, n]}``, axis by axis as ``per`` says."""
    moves = [(axis, index[p]) for axis, p in enumerate(per) if p is not None]
    moves = [(axis, which if which.shape[1] == value.shape[axis] else _blocks(which, value.shape[axis])) for axis, which in moves]
    if not moves:
        return value.expand(m, *value.shape)
    (axis, which), *rest = moves
    if not rest:
        taken = value.index_select(axis, which.flatten())
        shape = (*value.shape[:axis], m, value.shape[axis], *value.shape[axis + 1 :])
        return taken.view(shape).movedim(axis, 0)
    if [axis for axis, _ in moves] == [0, 1]:
        return value[moves[0][1].unsqueeze(2), moves[1][1].unsqueeze(1)]
    views = []
    for j in range(m):
        view = value
        for axis, which in moves:
            view = view.index_select(axis, which[j])
        views.append(view)
    return torch.stack(views)


def _blocks(index: Tensor, size: int) -> Tensor:
    return torch.stack([blocks(row, size) for row in index])
