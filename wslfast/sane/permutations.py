"""Permutation specs under their published names, and what applies them to state dicts (Ainsworth et al. 2023, Git Re-Basin).

The core permutes whole populations (:mod:`wslfast.permutation`); this is the form in which published scripts name and use it.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..architecture import Architecture
from ..errors import WslfastError, check_positive, require
from ..permutation.groups import channel_groups
from .checkpoints import tokenize_checkpoint, tokens_to_checkpoint
from .semantics import Choice, resolve

Axes = dict[str, tuple[Any, ...]]
Permutation = Mapping[str, Tensor]


class PermutationSpec(NamedTuple):
    """Which permutation each axis of each tensor follows, both ways round."""

    perm_to_axes: dict[str, list[tuple[str, int]]]
    axes_to_perm: Axes


def permutation_spec_from_axes_to_perm(axes_to_perm: Axes) -> PermutationSpec:
    """A spec from the permutation (or None) of each axis of each tensor."""
    places: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for name, axes in axes_to_perm.items():
        for axis, permutation in enumerate(axes):
            if permutation is not None:
                places[permutation].append((name, axis))
    return PermutationSpec(dict(places), axes_to_perm)


# -- specs -------------------------------------------------------------------------------------------------------------


def _dense(name: str, p_in: str | None, p_out: str | None) -> Axes:
    return {f"{name}.weight": (p_out, p_in), f"{name}.bias": (p_out,)}


def _chain(names: Sequence[str]) -> PermutationSpec:
    """Layers in sequence, each with a bias, hidden channels free."""
    hidden = [None, *(f"P_bg{i}" for i in range(len(names) - 1)), None]
    axes: Axes = {}
    for name, p_in, p_out in zip(names, hidden, hidden[1:]):
        axes |= _dense(name, p_in, p_out)
    return permutation_spec_from_axes_to_perm(axes)


def zoo_cnn_permutation_spec() -> PermutationSpec:
    """``CNN`` and ``CNN2`` without dropout."""
    return _chain([f"module_list.{i}" for i in (0, 3, 6, 9, 11)])


def zoo_cnn_large_permutation_spec() -> PermutationSpec:
    """``CNN3``."""
    return _chain([f"module_list.{i}" for i in (0, 4, 8, 13, 16)])


def zoo_lenet_permutation_spec() -> PermutationSpec:
    """``LeNet5``."""
    return _chain([f"module_list.{i}" for i in (0, 4, 9, 12, 15)])


def mlp_permutation_spec(num_hidden_layers: int) -> PermutationSpec:
    """Linear layers called ``layer0``, ``layer1``, ..."""
    n = num_hidden_layers
    check_positive("num_hidden_layers", n)
    weights = {f"layer{i}.weight": (f"P_{i}", f"P_{i - 1}" if i else None) for i in range(n)}
    biases = {f"layer{i}.bias": (f"P_{i}",) for i in range(n)}
    return permutation_spec_from_axes_to_perm(weights | biases | {f"layer{n}.weight": (None, f"P_{n - 1}"), f"layer{n}.bias": (None,)})


def MiniAlexNet_permutation_spec(batchnorm: bool = True) -> PermutationSpec:
    """``MiniAlexNet``; convolutions with biases."""
    axes = _dense("conv1", None, "P_bg0") | _norm("batchnorm1", "P_bg0", batchnorm)
    axes |= _dense("conv2", "P_bg0", "P_bg1") | _norm("batchnorm2", "P_bg1", batchnorm)
    for name, p_in, p_out in (("fc1", "P_bg1", "P_bg2"), ("fc2", "P_bg2", "P_bg3"), ("fc3", "P_bg3", None)):
        axes |= _dense(name, p_in, p_out)
    return permutation_spec_from_axes_to_perm(axes)


def _conv(name: str, p_in: str | None, p_out: str | None) -> Axes:
    return {f"{name}.weight": (p_out, p_in, None, None)}


def _norm(name: str, p: str, statistics: bool = True) -> Axes:
    axes: Axes = {f"{name}.weight": (p,), f"{name}.bias": (p,)}
    if statistics:
        axes |= {f"{name}.running_mean": (p,), f"{name}.running_var": (p,), f"{name}.num_batches_tracked": ()}
    return axes


def _resnet(blocks: Sequence[int], convolutions: int, batchnorm: bool, match_last: bool) -> PermutationSpec:
    """A torchvision ResNet: one permutation along each stage's residual stream, one inside each block."""

    def unit(conv: str, norm: str, p_in: str | None, p_out: str) -> Axes:
        return _conv(conv, p_in, p_out) | (_norm(norm, p_out) if batchnorm else {})

    axes = unit("conv1", "bn1", None, "P_bg0")
    stream = "P_bg0"
    # a basic block keeps the stem's width in its first stage; a bottleneck widens there, too
    widths = [0, 1, 2, 3] if convolutions == 2 else [1, 2, 3, 4]
    for stage, (count, width) in enumerate(zip(blocks, widths, strict=True), 1):
        for block in range(count):
            name, out = f"layer{stage}.{block}", f"P_bg{width}"
            inner = [f"P_{name}_inner{i if convolutions == 3 else ''}" for i in range(1, convolutions)]
            path = [stream, *inner, out]
            for i, (p_in, p_out) in enumerate(pairwise(path), 1):
                axes |= unit(f"{name}.conv{i}", f"{name}.bn{i}", p_in, p_out)
            if stream != out:
                axes |= unit(f"{name}.downsample.0", f"{name}.downsample.1", stream, out)
            stream = out
    return permutation_spec_from_axes_to_perm(axes | _dense("fc", stream if match_last else None, None))


def resnet18_permutation_spec(batchnorm: bool = True, match_last: bool = True) -> PermutationSpec:
    """torchvision's ResNet-18."""
    return _resnet((2, 2, 2, 2), 2, batchnorm, match_last)


def resnet34_permutation_spec(batchnorm: bool = True, match_last: bool = True) -> PermutationSpec:
    """torchvision's ResNet-34."""
    return _resnet((3, 4, 6, 3), 2, batchnorm, match_last)


def resnet50_permutation_spec(batchnorm: bool = True, match_last: bool = True) -> PermutationSpec:
    """torchvision's ResNet-50."""
    return _resnet((3, 4, 6, 3), 3, batchnorm, match_last)


def resnet101_permutation_spec(batchnorm: bool = True, match_last: bool = True) -> PermutationSpec:
    """torchvision's ResNet-101."""
    return _resnet((3, 4, 23, 3), 3, batchnorm, match_last)


def resnet152_permutation_spec(batchnorm: bool = True, match_last: bool = True) -> PermutationSpec:
    """torchvision's ResNet-152."""
    return _resnet((3, 8, 36, 3), 3, batchnorm, match_last)


def permutation_spec_of(architecture: Architecture) -> PermutationSpec:
    """The spec of any architecture, derived from its graph: ``P_bg0``, ``P_bg1``, ... are the groups of ``hidden_channels``.

    A spec says one permutation per axis. Hidden channels for which that is not all there is to say keep their order: gates of recurrent
    layers, heads of attention, axes whose parts move apart.
    """
    groups = channel_groups(architecture)
    plain = set(range(len(groups.sizes)))
    for axes in groups.axes.values():
        for axis in axes:
            for part in () if axis is None else axis.parts:
                n, size = groups.sizes[part.groups[0]], len(part.places)
                whole = len(part.groups) == 1 and axis is not None and size == axis.size and size % n == 0
                if not whole or not torch.equal(part.channels[:, 0], torch.arange(n).repeat_interleave(size // n)):
                    plain -= set(part.groups)
    spec: Axes = {}
    for slot in architecture.parameters:
        of_slot = groups.axes.get(slot.name, (None,) * len(slot.shape))
        which = [None if axis is None or len(axis.parts) != 1 else axis.parts[0].groups[0] for axis in of_slot]
        spec[slot.name] = tuple(f"P_bg{g}" if g in plain else None for g in which)
    return permutation_spec_from_axes_to_perm(spec)


# -- applying ----------------------------------------------------------------------------------------------------------


def get_permuted_param(
    ps: PermutationSpec, perm: Permutation, k: str, params: Mapping[str, Tensor], except_axis: int | None = None
) -> Tensor:
    """Tensor ``k`` with every axis but ``except_axis`` permuted; an axis that is a multiple of its permutation moves in blocks.

    Raises:
        WslfastError: for a tensor that the spec does not know, or an axis that no block fits.
    """
    require(k in ps.axes_to_perm, lambda: f"params: {k!r} is not in the permutation spec {list(ps.axes_to_perm)[:4]}...")
    w = params[k]
    for axis, p in enumerate(ps.axes_to_perm[k]):
        if axis == except_axis or p is None:
            continue
        index = perm[p].to(w.device).long()
        size, n = w.shape[axis], len(index)
        if size % n:
            raise WslfastError(f"params: axis {axis} of {k!r} {list(w.shape)} does not divide into {n} blocks ({p})")
        w = w.index_select(axis, index if size == len(index) else blocks(index, size))
    return w


def blocks(index: Tensor, size: int) -> Tensor:
    """A permutation of ``len(index)`` channels as one of the ``size`` numbers of an axis on which each has a block."""
    width = size // len(index)
    return (index.unsqueeze(1) * width + torch.arange(width, device=index.device)).flatten()


def apply_permutation(ps: PermutationSpec, perm: Permutation, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict with its channels permuted: new channel c is old channel ``perm[p][c]``."""
    index = {p: value.long() for p, value in perm.items()}
    return {k: get_permuted_param(ps, index, k, params) for k in params}


# -- views as index maps -----------------------------------------------------------------------------------------------


def precompute_permutations(
    ref_checkpoint: Mapping[str, Tensor],
    permutation_number: int,
    perm_spec: PermutationSpec,
    tokensize: int,
    ignore_bn: bool,
    num_threads: int = 6,
    *,
    semantics: Choice = "published",
    **flags: bool,
) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Random views of a network as maps into its flat tokens, for :func:`permute_model_vector`.

    Published, padding of a view reads token entry 0, the first weight of the first channel; corrected
    (``corrupted_padding=False``) its map holds -1 there, which reads zero.

    Returns:
        ``permutation_number`` int32 maps ``[T, D]``, and the permutations themselves.
    """
    chosen = resolve(semantics, flags)
    sizes = {p: ref_checkpoint[axes[0][0]].shape[axes[0][1]] for p, axes in perm_spec.perm_to_axes.items()}
    torch.randperm(len(sizes))  # what matching the network to itself takes from the generator
    drawn = [{p: torch.randperm(n).float() for p, n in sizes.items()} for _ in range(permutation_number)]
    tokens, mask, positions = tokenize_checkpoint(ref_checkpoint, tokensize, ignore_bn=ignore_bn)
    flat = torch.arange(tokens.numel()).view(tokens.shape)
    places = tokens_to_checkpoint(flat, positions, copy.copy(ref_checkpoint), ignore_bn=ignore_bn)
    maps = []
    for perm in drawn:
        # in float64, as tokens are padded with float32 zeros, which hold no index beyond 2^24
        moved = {k: v.long() for k, v in apply_permutation(perm_spec, perm, places).items()}
        index = _tokenize_indices(moved, tokens.shape[1], ignore_bn, mask)
        maps.append((index if chosen.corrupted_padding else torch.where(mask, index, -1)).int())
    return maps, drawn


def _tokenize_indices(checkpoint: Mapping[str, Tensor], tokensize: int, ignore_bn: bool, mask: Tensor) -> Tensor:
    """Tokens of integers, exact at any size: in two halves, each of which float32 holds."""
    low, high = ({k: part(v).float() for k, v in checkpoint.items()} for part in (lambda v: v % 4096, lambda v: v // 4096))
    parts = [tokenize_checkpoint(half, tokensize, ignore_bn=ignore_bn)[0].long() for half in (low, high)]
    return parts[0] + 4096 * parts[1]


def permute_model_vector(wdx: Tensor, idx_start: int, window: int, perm: Tensor) -> Tensor:
    """Tokens ``[window, D]`` of one view, from the model's tokens ``[T, D]`` and a map of :func:`precompute_permutations`."""
    index = perm[idx_start : idx_start + window].to(wdx.device).long()
    values = wdx.flatten()[index.clamp_min(0)]
    return torch.where(index >= 0, values, torch.zeros((), dtype=wdx.dtype, device=wdx.device))
