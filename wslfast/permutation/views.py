"""Views: permutations of a model's hidden channels that leave its function unchanged, drawn for every model at once.

Permuting the output channels of one layer and the input channels of the next by the same permutation changes the weights
and not the outputs, as everything between (pooling, elementwise functions, flattening) treats channels alike
(Ainsworth et al. 2023, Git Re-Basin). Weights are permuted first and tokenised after, so padding stays zero.

Of a graph, the same is followed through every operation (``following.py``): what residual connections add shares one permutation, heads of
attention move as blocks, gates of recurrent layers alike.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..architecture import Architecture
from ..errors import describe, require
from .axes import Permutations
from .groups import channel_groups

_AT_ONCE = 1 << 26  # numbers whose places are held at a time


def hidden_channels(architecture: Architecture) -> tuple[int, ...]:
    """Sizes of the groups of hidden channels that may be permuted, in order; empty where nothing may be, or nothing is known as the module
    could not be traced.

    Of a plain chain of layers there is one a hidden layer, empty where its channels meet a grouped convolution. Inputs and outputs keep
    their order.
    """
    return channel_groups(architecture).sizes


def kept_channels(architecture: Architecture) -> dict[str, str]:
    """Hidden channels that views leave in their order: the parameter that makes them, how many of its outputs stay, and why.

    Their order counts (for a running sum over features, or where they are added to something that has an order, as patches of an image
    have), or an operation has no rule, so that nothing is known. The order of the network's own outputs is not listed. Of a module that
    could not be traced, everything is.
    """
    return dict(channel_groups(architecture).kept)


def random_permutations(
    architecture: Architecture, k: int, generator: torch.Generator | None = None, device: torch.device | str | None = None
) -> Permutations:
    """Uniform permutations for k models, drawn on the generator's device: one ``[k, channels]`` per group of hidden channels."""
    device = device if device is not None else (generator.device if generator is not None else "cpu")
    source = generator.device if generator is not None else torch.device(device)
    draw = [torch.rand(k, c, generator=generator, device=source, dtype=torch.float64) for c in hidden_channels(architecture)]
    return tuple(d.argsort(1).to(device) for d in draw)


def inverse(permutations: Permutations) -> Permutations:
    """The permutations that undo ``permutations``."""
    return tuple(p.argsort(1) for p in permutations)


def permute(weights: Tensor, architecture: Architecture, permutations: Permutations, inputs: Permutations | None = None) -> Tensor:
    """Apply one permutation per model and group of channels: new channel c of a group is its old channel ``permutation[:, c]``.

    Args:
        weights: ``[k, P]``.
        permutations: as from :func:`random_permutations`; an empty tuple (the identity) where there are no groups.
        inputs: of the axes of parameters that do not count outputs (the columns of the layers that read a group, the features of a
            position table); by default the same, which preserves the function. Others scramble a model: the control of what views are
            good for.

    Returns:
        ``[k, P]``, the same functions (unless ``inputs`` are others); differentiable.
    """
    sizes = hidden_channels(architecture)
    if inputs is not None:
        require([p.shape for p in inputs] == [p.shape for p in permutations], "inputs: expected the shapes of permutations")
    require(
        weights.ndim == 2 and weights.shape[1] == architecture.num_weights,
        f"weights: expected [k, {architecture.num_weights}], got {describe(weights)}",
    )
    require(
        len(permutations) == len(sizes) and all(tuple(p.shape) == (len(weights), c) for p, c in zip(permutations, sizes, strict=True)),
        f"permutations: expected {[[len(weights), c] for c in sizes]}, got {[list(p.shape) for p in permutations]}",
    )
    if not sum(sizes):
        return weights
    groups = channel_groups(architecture, permutations[0].device)
    size = max(1, _AT_ONCE // architecture.num_weights)
    if inputs is None:
        inputs = permutations
    moved = []
    for start in range(0, max(len(weights), 1), size):
        part = slice(start, start + size)
        index = groups.source(
            architecture.parameters, architecture.num_weights, *(tuple(p[part] for p in x) for x in (permutations, inputs))
        )
        moved.append(weights[part].gather(1, index))
    return moved[0] if len(moved) == 1 else torch.cat(moved)


def random_views(weights: Tensor, architecture: Architecture, generator: torch.Generator | None = None) -> Tensor:
    """One uniformly drawn view of every model: ``[k, P] -> [k, P]``."""
    return permute(weights, architecture, random_permutations(architecture, len(weights), generator, weights.device))


def channel_norms(weights: Tensor, architecture: Architecture) -> tuple[Tensor, ...]:
    """Norms of all weights that belong to each channel of a group, ``[k, channels]`` float64 a group: the same in every view but for
    their order."""
    groups = channel_groups(architecture, weights.device)
    totals = [weights.new_zeros(len(weights), size, dtype=torch.float64) for size in groups.sizes]
    for slot in architecture.parameters:
        square = weights[:, slot.offset : slot.stop].double().square().view(-1, *slot.shape)
        for at, axis in enumerate(groups.axes.get(slot.name, ())):
            along = square.movedim(at + 1, 1).reshape(len(weights), slot.shape[at], -1).sum(2)
            for part in () if axis is None else axis.parts:
                for i, group in enumerate(part.groups):
                    totals[group].index_add_(1, part.channels[:, i], along[:, part.places])
    return tuple(total.sqrt() for total in totals)
