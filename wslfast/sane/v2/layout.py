"""Where each number of a network lies in the tokens of ``sane`` 2.x: one index map a tokenizer, a token size and a set of shapes.

Every tensor whose name holds "weight" is a layer; its bias, if there is one, is one more column. ``"dense"``: a layer's numbers run on
across its tokens. ``"sparse"``: every channel begins a token. Names without "weight" that are no bias (running statistics) have no token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...architecture import Architecture
from ...errors import check_positive, describe, present, require
from ...tokens import Tokens

KINDS = ("dense", "sparse")
Signature = tuple[tuple[str, tuple[int, ...]], ...]


class Layer(NamedTuple):
    """One layer: its tensors, ``channels`` rows of ``width`` numbers (the bias is one of them), and its tokens."""

    name: str
    bias: str | None
    shape: tuple[int, ...]
    channels: int
    width: int
    first: int  # of its tokens
    stop: int


class Layout:
    """The tokens of one network, both ways.

    Args:
        kind: ``"dense"`` or ``"sparse"``.
        token_size: D.
        signature: names and shapes, in the order of a state dict.
        offsets: where each tensor begins in a row of weights ``[P]``; by default rows hold the tokenised tensors alone, each weight before
            its bias.
        num_weights: P, where ``offsets`` is given.

    Attributes:
        layers: one :class:`Layer` a tensor with "weight" in its name.
        names: the tokenised tensors, in the order of a default row.
        index: ``[T, D]`` places in a row, -1 on padding.
        mask: ``[T, D]`` bool.
        positions: ``[T, 3]`` int32: token, layer, and token in the layer (dense) or channel (sparse).
        num_tokens, num_real: T, and the numbers that have a place.
    """

    def __init__(
        self, kind: str, token_size: int, signature: Signature, offsets: Mapping[str, int] | None = None, num_weights: int = 0
    ) -> None:
        require(kind in KINDS, f"tokenizer: expected one of {list(KINDS)}, got {kind!r}")
        check_positive("token size", token_size)
        self.kind, self.token_size = kind, token_size
        shapes = dict(signature)
        layers: list[Layer] = []
        parts: list[Tensor] = []
        places: list[Tensor] = []
        at, token = 0, 0
        names: list[str] = []
        for name, bias, shape, channels, width in _layers(signature):
            size = channels * (width - (bias is not None))
            start = at if offsets is None else offsets[name]
            rows = torch.arange(start, start + size).view(channels, -1)
            names.append(name)
            if bias is not None:
                start = at + size if offsets is None else offsets[bias]
                rows = torch.cat([rows, torch.arange(start, start + channels).unsqueeze(1)], 1)
                names.append(bias)
            at += channels * width
            if kind == "dense":
                rows = rows.reshape(1, -1)
            chunks = -(-rows.shape[1] // token_size)
            rows = torch.nn.functional.pad(rows, (0, chunks * token_size - rows.shape[1]), value=-1).view(-1, token_size)
            inside = torch.arange(len(rows)) if kind == "dense" else torch.arange(channels).repeat_interleave(chunks)
            places.append(torch.stack([torch.arange(token, token + len(rows)), torch.full((len(rows),), len(parts)), inside], 1))
            layers.append(Layer(name, bias, shape, channels, width, token, token + len(rows)))
            token += len(rows)
            parts.append(rows)
        require(bool(parts), f"nothing to tokenise: no name with 'weight' among {list(shapes)[:5]}")
        self.layers = tuple(layers)
        self.names = tuple(names)
        self._shapes = tuple(shapes[name] for name in names)
        self._sizes = [_size(shape) for shape in self._shapes]
        self.index = torch.cat(parts)
        self.mask = self.index >= 0
        self.positions = torch.cat(places).int()
        self.num_tokens, self.num_real = token, at
        self.num_weights = at if offsets is None else num_weights
        flat = self.index.flatten()
        self._take = torch.where(flat < 0, self.num_weights, flat)
        self._pieces = _pieces(self.layers, kind, token_size, offsets)
        self._give = torch.full((self.num_weights,), flat.numel())
        self._give[flat[flat >= 0]] = torch.arange(flat.numel())[flat >= 0]
        self.complete = at == self.num_weights
        self._on: dict[torch.device, tuple[Tensor, ...]] = {}

    def __repr__(self) -> str:
        return f"Layout({self.kind!r}, T={self.num_tokens}, D={self.token_size}, numbers={self.num_real})"

    def on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``(take, give, mask, positions)`` on a device: places in a row by entry of the tokens, and the other way round."""
        if device not in self._on:
            self._on[device] = tuple(t.to(device) for t in (self._take, self._give, self.mask, self.positions))
        return self._on[device]  # type: ignore[return-value]

    # -- rows of weights -----------------------------------------------------------------------------------------------

    def tokenize(self, rows: Tensor) -> Tokens:
        """``[k, P] -> tokens [k, T, D], mask [T, D], positions [T, 3]``, padding zero; differentiable."""
        fits = isinstance(rows, Tensor) and rows.ndim == 2 and rows.shape[1] == self.num_weights and rows.is_floating_point()
        require(fits, f"rows: expected floating [k, {self.num_weights}], got {describe(rows)}")
        _, _, mask, positions = self.on(rows.device)
        return Tokens(_Cut.apply(rows, self).view(-1, self.num_tokens, self.token_size), mask, positions)

    def detokenize(self, tokens: Tensor, reference: Tensor | None = None) -> Tensor:
        """``[k, T, D] -> [k, P]``, padding dropped; differentiable.

        What has no token (running statistics) comes from ``reference``, ``[P]`` or ``[k, P]``, which is then required.
        """
        expected = (self.num_tokens, self.token_size)
        fits = isinstance(tokens, Tensor) and tokens.ndim == 3 and tuple(tokens.shape[1:]) == expected and tokens.is_floating_point()
        require(fits, f"tokens: expected floating [k, {expected[0]}, {expected[1]}], got {describe(tokens)}")
        rows = _Join.apply(tokens.flatten(1), self)
        if self.complete:
            return rows
        reference = present(reference, "reference: the tokens hold no running statistics; pass the row they are taken from")
        return torch.where(self.on(tokens.device)[1] < self.mask.numel(), rows, reference.to(rows))

    # -- state dicts ---------------------------------------------------------------------------------------------------

    def rows_of(self, state_dicts: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """The default rows ``[k, P]`` of state dicts: one concatenation for all of them."""
        parts = [state[name].reshape(-1) for state in state_dicts for name in self.names]
        return torch.cat(parts).view(len(state_dicts), -1)

    def fill(self, tokens: Tensor) -> dict[str, Tensor]:
        """The tokenised tensors of one model by name, from its tokens ``[T, D]``: views of one copy, in the tokens' dtype."""
        numbers = tokens.reshape(-1).index_select(0, self.on(tokens.device)[1])
        return {name: part.view(shape) for name, shape, part in zip(self.names, self._shapes, numbers.split(self._sizes))}


class _Piece(NamedTuple):
    """A block of numbers that lies in rows of its own both in a row of weights and in the tokens: ``channels`` times ``width``."""

    channels: int
    width: int
    weights: int  # where it begins in a row of weights, without gaps
    tokens: int  # where it begins in the flat tokens
    step: int  # from one channel to the next there


def _pieces(layers: Sequence[Layer], kind: str, token_size: int, offsets: Mapping[str, int] | None) -> list[_Piece]:
    out, at = [], 0
    for layer in layers:
        features = layer.width - (layer.bias is not None)
        step = layer.width if kind == "dense" else -(-layer.width // token_size) * token_size
        start = layer.first * token_size
        out.append(_Piece(layer.channels, features, at if offsets is None else offsets[layer.name], start, step))
        at += layer.channels * features
        if layer.bias is not None:
            out.append(_Piece(layer.channels, 1, at if offsets is None else offsets[layer.bias], start + features, step))
            at += layer.channels
    return out


def _blocks(rows: Tensor, tokens: Tensor, layout: Layout) -> list[tuple[Tensor, Tensor]]:
    """Views of the same numbers in rows ``[k, P]`` and in flat tokens ``[k, T D]``, both contiguous."""
    k, p, n = len(rows), rows.shape[1], tokens.shape[1]
    return [
        (
            rows.as_strided((k, c, w), (p, w, 1), rows.storage_offset() + a),
            tokens.as_strided((k, c, w), (n, step, 1), tokens.storage_offset() + b),
        )
        for c, w, a, b, step in layout._pieces
    ]


class _Cut(torch.autograd.Function):
    """Rows to flat tokens, block by block; the backward is the way back, so that it is exact and differentiable again."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, layout: Layout) -> Tensor:
        ctx.layout = layout
        tokens = rows.new_zeros(len(rows), layout.mask.numel())
        for there, here in _blocks(rows.contiguous(), tokens, layout):
            here.copy_(there)
        return tokens

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Join.apply(gradient, ctx.layout), None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, layout: Layout) -> Tensor:
        ctx.layout = layout
        rows = (tokens.new_empty if layout.complete else tokens.new_zeros)(len(tokens), layout.num_weights)
        for here, there in _blocks(rows, tokens.contiguous(), layout):
            here.copy_(there)
        return rows

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Cut.apply(gradient, ctx.layout), None


def _layers(signature: Signature) -> list[tuple[str, str | None, tuple[int, ...], int, int]]:
    """``(name, bias, shape, channels, width)`` of every tensor with "weight" in its name. Raises WslfastError where one has no rows."""
    shapes, out = dict(signature), []
    for name, shape in signature:
        if "weight" not in name:
            continue
        require(len(shape) > 0 and 0 not in shape, f"{name!r} {list(shape)} has no channels to tokenise")
        bias = name.replace("weight", "bias")
        fits = bias not in shapes or shapes[bias] == (shape[0],)
        require(fits, f"{bias!r}: expected [{shape[0]}] (a number per channel), got {list(shapes.get(bias, ()))}")
        held = bias in shapes
        out.append((name, bias if held else None, shape, shape[0], _size(shape) // shape[0] + held))
    return out


def numbers_of(architecture: Architecture) -> tuple[int, str, int]:
    """How many numbers of a network have a token, and name and width of its last layer."""
    layers = _layers(tuple((slot.name, tuple(slot.shape)) for slot in architecture.parameters))
    require(bool(layers), f"architecture {architecture.name!r} has nothing to tokenise")
    return sum(channels * width for *_, channels, width in layers), layers[-1][0], layers[-1][4]


def _size(shape: Sequence[int]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size


def signature_of(state: Mapping[str, Any]) -> Signature:
    """Names and shapes of a state dict."""
    return tuple([(name, tuple(value.shape)) for name, value in state.items()])


@lru_cache(maxsize=128)
def layout_of(kind: str, token_size: int, signature: Signature) -> Layout:
    """The cached layout of a tokenizer, a token size, and the names and shapes of a state dict."""
    return Layout(kind, token_size, signature)


@lru_cache(maxsize=128)
def layout_for(kind: str, token_size: int, architecture: Architecture) -> Layout:
    """The cached layout whose rows are an architecture's ``[P]``."""
    signature = tuple((slot.name, tuple(slot.shape)) for slot in architecture.parameters)
    offsets = {slot.name: slot.offset for slot in architecture.parameters}
    return Layout(kind, token_size, signature, offsets, architecture.num_weights)
