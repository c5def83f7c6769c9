"""Channel-wise tokens: a model as a sequence (Schuerholt et al. 2024, SANE), for all models of a population at once.

A *layer* is every tensor whose key holds ``weight``, ``running_mean`` or ``running_var``. It is flattened to
``(out_channels, rest)``, its bias (if there is one) appended as last column, each row padded with zeros to a multiple of
the token size and cut into consecutive tokens. All of that is one index map, made once per architecture and token size;
tokenising is one gather, and so is its inverse.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .architecture import Architecture
from .errors import describe, require
from .kernels.graph import Slot

_BATCH_NORM = ("bn", "downsample.1", "batchnorm")  # key parts that mark batch norm in the published code


class Tokens(NamedTuple):
    """``tokens [k, T, D]``, and what all models share: ``mask [T, D]`` (True on real weights), ``positions [T, 3]``."""

    tokens: Tensor
    mask: Tensor
    positions: Tensor


class TokenLayout:
    """Where each weight of an architecture lives in its token sequence.

    Args:
        architecture: what is tokenised.
        token_size: D; 0 finds it as the published code does: the longest row (with its bias) of any layer that has a bias or
            is a running statistic. Longer rows are cut into several tokens.
        ignore_bn: leave batch-norm keys out; :meth:`detokenize` then takes them from its ``reference``.

    Attributes:
        mask: ``[T, D]`` bool, True on real weights.
        positions: ``[T, 3]`` (token, layer, channel), int16 or int32.
        num_tokens, token_size: T and D.
        layers: names of the tokenised layers, by layer index.
    """

    def __init__(self, architecture: Architecture, token_size: int = 0, *, ignore_bn: bool = False) -> None:
        require(isinstance(architecture, Architecture), f"architecture: expected an Architecture, got {describe(architecture)}")
        require(
            isinstance(token_size, int) and not isinstance(token_size, bool) and token_size >= 0,
            f"token_size: expected a non-negative integer, got {token_size!r}",
        )
        self.architecture = architecture
        layers = _layers(architecture, ignore_bn)
        require(bool(layers), f"architecture {architecture.name!r} has nothing to tokenise")
        self.token_size = token_size or _discover(architecture, layers)
        self.layers = tuple(weight.name for weight, _ in layers)
        rows, positions = [], []
        for index, (weight, bias) in enumerate(layers):
            row = _row_index(weight, bias)  # [channels, width] of offsets into a row of weights
            chunks = -(-row.shape[1] // self.token_size)
            row = torch.nn.functional.pad(row, (0, chunks * self.token_size - row.shape[1]), value=-1)
            rows.append(row.view(-1, self.token_size))
            channel = torch.arange(row.shape[0]).repeat_interleave(chunks)
            positions.append(torch.stack([torch.full_like(channel, index), channel], 1))
        self.index = torch.cat(rows)  # [T, D], -1 on padding
        place = torch.cat(positions)
        place = torch.cat([torch.arange(len(place)).unsqueeze(1), place], 1)
        self.positions = place.to(torch.int16 if int(place.max()) <= 32_767 else torch.int32)
        self.mask = self.index >= 0
        self.num_tokens = len(self.index)
        self.token_layer = place[:, 1]  # [T], the layer of each token
        flat = self.index.flatten()
        self._gather = torch.where(flat < 0, architecture.num_weights, flat)  # padding reads the zero appended to a row
        self._scatter = torch.full((architecture.num_weights,), flat.numel())  # untokenised weights read the appended zero
        self._scatter[flat[flat >= 0]] = torch.arange(flat.numel())[flat >= 0]
        self.complete = bool((self._scatter < flat.numel()).all())
        self._on: dict[torch.device, tuple[Tensor, Tensor, Tensor, Tensor]] = {}

    def __repr__(self) -> str:
        return f"TokenLayout({self.architecture.name!r}, T={self.num_tokens}, D={self.token_size})"

    def _maps(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if device not in self._on:
            self._on[device] = tuple(t.to(device) for t in (self._gather, self._scatter, self.mask, self.positions))  # type: ignore[assignment]
        return self._on[device]

    def tokenize(self, weights: Tensor) -> Tokens:
        """``[k, P] -> tokens [k, T, D], mask [T, D], positions [T, 3]``, padding zero; differentiable.

        Raises WslfastError for weights of another shape or type.
        """
        p = self.architecture.num_weights
        require(
            isinstance(weights, Tensor) and weights.ndim == 2 and weights.shape[1] == p and weights.is_floating_point(),
            f"weights: expected floating [k, {p}] for architecture {self.architecture.name!r}, got {describe(weights)}",
        )
        gather, scatter, mask, positions = self._maps(weights.device)
        tokens = _Move.apply(weights, gather, scatter).view(-1, self.num_tokens, self.token_size)
        return Tokens(tokens, mask, positions)

    def detokenize(self, tokens: Tensor, reference: Tensor | None = None) -> Tensor:
        """``[k, T, D] -> [k, P]``, padding discarded; differentiable.

        Weights that have no token (``ignore_bn``) come from ``reference`` (``[P]`` or ``[k, P]``), which is then required.
        Raises WslfastError for tokens of another shape or type.
        """
        require(
            isinstance(tokens, Tensor)
            and tokens.ndim == 3
            and tuple(tokens.shape[1:]) == (self.num_tokens, self.token_size)
            and tokens.is_floating_point(),
            f"tokens: expected floating [k, {self.num_tokens}, {self.token_size}] for architecture {self.architecture.name!r}, "
            f"got {describe(tokens)}",
        )
        gather, scatter, _, _ = self._maps(tokens.device)
        weights = _Move.apply(tokens.flatten(1), scatter, gather)
        if self.complete:
            return weights
        require(reference is not None, "reference: this layout leaves weights out; pass the row they are taken from")
        expected = (self.architecture.num_weights,)
        require(
            isinstance(reference, Tensor) and tuple(reference.shape) in (expected, (len(tokens), *expected)),
            f"reference: expected {list(expected)} or {[len(tokens), *expected]}, got {describe(reference)}",
        )
        assert reference is not None
        return torch.where(scatter < self.mask.numel(), weights, reference.to(weights))


class _Move(torch.autograd.Function):
    """``out[:, i] = x[:, take[i]]``, or 0 where ``take[i]`` is past the end; ``give`` is the inverse map, so that the
    backward is the same gather the other way: exact, deterministic, no atomics, and differentiable again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, take: Tensor, give: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (0, 1)).index_select(1, take)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        take, give = ctx.saved_tensors
        return _Move.apply(gradient, give, take), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return _Move.apply(tangent, *ctx.saved_tensors)


def _layers(architecture: Architecture, ignore_bn: bool) -> list[tuple[Slot, Slot | None]]:
    """(weight, bias) slots of every tokenised layer, in key order."""
    layers: list[tuple[Slot, Slot | None]] = []
    for slot in architecture.parameters:
        if not any(part in slot.name for part in ("weight", "running_mean", "running_var")):
            continue
        if ignore_bn and any(part in slot.name for part in _BATCH_NORM):
            continue
        bias = architecture.slots.get(slot.name.replace("weight", "bias")) if "weight" in slot.name else None
        layers.append((slot, bias))
    return layers


def _row_index(weight: Slot, bias: Slot | None) -> Tensor:
    channels = _channels(weight)
    row = (torch.arange(weight.size) + weight.offset).view(channels, -1)
    if bias is not None:
        fits = bias.size % channels == 0  # more than one number a row: layer norm over several axes
        require(fits, f"{weight.name!r} cannot be tokenised: its {channels} rows cannot share a bias of {bias.size} numbers")
        row = torch.cat([row, (torch.arange(bias.size) + bias.offset).view(channels, -1)], 1)
    return row


def _discover(architecture: Architecture, layers: list[tuple[Slot, Slot | None]]) -> int:
    """The published token-size discovery: bias-free layers take no part, running statistics do (and count one column more)."""
    sizes = [w.size // _channels(w) + 1 for w, bias in layers if bias is not None or "running" in w.name]
    return max(sizes) if sizes else max(w.size // _channels(w) for w, _ in layers)


def num_tokens(architecture: Architecture, token_size: int) -> int:
    """T at a token size, without making the layout."""
    widths = [(_channels(w), (w.size + (0 if b is None else b.size)) // _channels(w)) for w, b in _layers(architecture, False)]
    return sum(channels * -(-width // token_size) for channels, width in widths)


def _channels(weight: Slot) -> int:
    return weight.shape[0] if weight.shape else 1


@lru_cache(maxsize=32)
def layout(architecture: Architecture, token_size: int = 0) -> TokenLayout:
    """The cached layout of an architecture at a token size."""
    return TokenLayout(architecture, token_size)
