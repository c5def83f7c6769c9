"""Which models of a batch are one function in two views, so that an original need not run twice.

Channels are ordered layer by layer, by a number that their own row alone decides (part of its product with a fixed vector, the
inputs being in that order already). The two orders say which channel of one model would be which of the other; if the weights
then agree to the bit, the two are permutations of each other, and so the same function. Where orders have ties, weights differ and
both are run; and so they are of networks that are no plain chain of layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..architecture import Architecture
from ..kernels.layers import layer_slots
from ..permutation import hidden_channels

_COLUMNS = 32  # of a row decide its channel's place: enough to tell channels apart


def shared_functions(rows: Tensor, architecture: Architecture) -> tuple[Tensor | None, Tensor | None]:
    """For weights ``[k, P]`` whose second half may be views of the first: rows to run, and for each model the one that serves it.

    Returns:
        ``(first, of)``: indices ``[m]`` into ``rows`` and ``[k]`` into those; ``(None, None)`` if nothing is shared.
    """
    k = len(rows)
    half = k // 2
    if k % 2 or k == 0:
        return None, None
    same = same_functions(rows, architecture)
    if not bool(same.any()):
        return None, None
    low = torch.arange(half, device=rows.device)
    first = torch.cat([low, half + (~same).nonzero().flatten()])
    return first, torch.cat([low, torch.where(same, low, half + (~same).cumsum(0) - 1)])


def same_functions(rows: Tensor, architecture: Architecture) -> Tensor:
    """``[k / 2]``: whether model j and model k / 2 + j are views of one another. One with a NaN is not even one of itself."""
    k, half = len(rows), len(rows) // 2
    sizes = hidden_channels(architecture)
    if not sizes or 0 in sizes or not architecture.planned:
        return (rows[:half] == rows[half:]).all(1)
    same = torch.ones(half, dtype=torch.bool, device=rows.device)
    order: Tensor | None = None  # of the layer's input channels, [k, channels]
    partner: Tensor | None = None  # the first view's input channel that is the second's, [k / 2, channels]
    layers = [slots for slots in layer_slots(architecture.layers) if slots.weight is not None]
    for position, slots in enumerate(layers):
        assert slots.weight is not None
        out = slots.weight.shape[0]
        w = rows[:, slots.weight.offset : slots.weight.stop].unflatten(1, (out, -1))
        b = rows.new_zeros(k, out) if slots.bias is None else rows[:, slots.bias.offset : slots.bias.stop]
        moved, mine_b = None, b[:half]
        if position < len(sizes):
            few = w[:, :, :_COLUMNS] if order is None else _first_columns(w, order)
            # summed along the row in one fixed order, whatever the row's place: equal rows have equal sums to the bit
            order = ((few * _vector(few.shape[2], rows)).sum(2) + b).argsort(1)
            moved = order[:half].gather(1, order[half:].argsort(1))
            mine_b = mine_b.gather(1, moved)
        mine = _moved(w[:half], moved, partner)
        same &= (mine == w[half:]).flatten(1).all(1) & (mine_b == b[half:]).all(1)
        partner = moved
    return same


def _first_columns(w: Tensor, inputs: Tensor) -> Tensor:
    """Of ``w [k, out, width]`` the columns of as many input channels, in the order ``inputs [k, channels]``, as make 32 numbers."""
    k, out, width = w.shape
    block = width // inputs.shape[1]
    index = inputs[:, : -(-_COLUMNS // block), None] * block + torch.arange(block, device=w.device)
    return w.gather(2, index.view(k, 1, -1).expand(-1, out, -1))


def _moved(w: Tensor, outputs: Tensor | None, inputs: Tensor | None) -> Tensor:
    """``w [k, out, width]`` with its output channels and its input channels in an order.

    Kernels, and after a flatten whole feature maps, move with their channel: one copy of rows of such blocks.
    """
    k, out, _ = w.shape
    channels = 1 if inputs is None else inputs.shape[1]
    row = torch.arange(k, device=w.device).unsqueeze(1) * out
    row = row + (torch.arange(out, device=w.device) if outputs is None else outputs)  # [k, out]
    column = row.new_zeros(k, 1) if inputs is None else inputs
    index = row.unsqueeze(2) * channels + column.unsqueeze(1)  # [k, out, channels]
    return w.reshape(k * out * channels, -1).index_select(0, index.flatten()).view(k, out, -1)


def _vector(width: int, like: Tensor) -> Tensor:
    return torch.arange(1, width + 1, device=like.device, dtype=like.dtype).mul(0.7548776662).sin()
