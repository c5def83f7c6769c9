"""Views: permutations of a model's hidden channels that leave its function unchanged, drawn for every model at once.

Permuting the output channels of one layer and the input channels of the next by the same permutation changes the weights
and not the outputs, as everything between (pooling, elementwise functions, flattening) treats channels alike
(Ainsworth et al. 2023, Git Re-Basin). Weights are permuted first and tokenised after, so padding stays zero.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from .architecture import Architecture
from .errors import describe, require
from .kernels.layers import Conv2d, Linear, layer_slots

Permutations = tuple[Tensor, ...]  # one [k, channels] per hidden layer


@lru_cache(maxsize=64)
def hidden_channels(architecture: Architecture) -> tuple[int, ...]:
    """Sizes of the permutable hidden layers, in order; empty where nothing may be permuted (opaque architectures).

    The outputs of the last layer keep their order (they are classes), and so do channels that meet a grouped convolution.
    """
    layers = [layer for layer in architecture.layers if isinstance(layer, (Conv2d, Linear))]
    pairs = pairwise(layers)
    return tuple(a.weight_shape[0] if _free(a) and _free(b) else 0 for a, b in pairs)


def _free(layer: Conv2d | Linear) -> bool:
    return isinstance(layer, Linear) or layer.groups == 1


def random_permutations(
    architecture: Architecture, k: int, generator: torch.Generator | None = None, device: torch.device | str | None = None
) -> Permutations:
    """Uniform permutations for k models, drawn on the generator's device: one ``[k, channels]`` per hidden layer."""
    device = device if device is not None else (generator.device if generator is not None else "cpu")
    source = generator.device if generator is not None else torch.device(device)
    draw = [torch.rand(k, c, generator=generator, device=source, dtype=torch.float64) for c in hidden_channels(architecture)]
    return tuple(d.argsort(1).to(device) for d in draw)


def inverse(permutations: Permutations) -> Permutations:
    """The permutations that undo ``permutations``."""
    return tuple(p.argsort(1) for p in permutations)


def permute(weights: Tensor, architecture: Architecture, permutations: Permutations, inputs: Permutations | None = None) -> Tensor:
    """Apply one permutation a model and hidden layer: new channel c of a layer is its old channel ``permutation[:, c]``.

    Args:
        weights: ``[k, P]``.
        permutations: as from :func:`random_permutations`; for an opaque architecture, an empty tuple (the identity).
        inputs: of the input channels of the layer after each hidden layer; by default the same, which preserves the function. Others
            scramble a model: the control of what views are good for.

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
    if not sizes:
        return weights
    return weights.gather(1, _index(architecture, permutations, permutations if inputs is None else inputs))


def random_views(weights: Tensor, architecture: Architecture, generator: torch.Generator | None = None) -> Tensor:
    """One uniformly drawn view of every model: ``[k, P] -> [k, P]``."""
    return permute(weights, architecture, random_permutations(architecture, len(weights), generator, weights.device))


def _index(architecture: Architecture, permutations: Permutations, inputs: Permutations) -> Tensor:
    """``[k, P]``: where each weight of the permuted models is read from."""
    k, device = permutations[0].shape[0], permutations[0].device
    parts: list[Tensor] = []
    rows_in: Tensor | None = None  # the permutation of this layer's input channels, [k, channels]
    parametric = [slots for slots in layer_slots(architecture.layers) if slots.weight is not None]
    for position, slots in enumerate(parametric):
        assert slots.weight is not None
        out, width = slots.weight.shape[0], slots.weight.size // slots.weight.shape[0]
        rows_out = permutations[position] if position < len(permutations) and permutations[position].shape[1] else None
        rows = torch.arange(out, device=device).expand(k, out) if rows_out is None else rows_out
        if rows_in is None:
            columns = torch.arange(width, device=device).expand(k, width)
        else:  # kernels, and after a flatten whole feature maps, move in blocks of their channel
            block = width // rows_in.shape[1]
            columns = (rows_in.unsqueeze(2) * block + torch.arange(block, device=device)).flatten(1)
        parts.append((slots.weight.offset + rows.unsqueeze(2) * width + columns.unsqueeze(1)).flatten(1))
        if slots.bias is not None:
            parts.append(slots.bias.offset + rows)
        rows_in = None if rows_out is None else inputs[position]
    return torch.cat(parts, 1)
