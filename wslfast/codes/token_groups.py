"""Groups of tokens that share one linear map: the tokens of one layer, or, where rows are cut, of one piece of a layer's rows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from ..tokens import TokenLayout


@dataclass(frozen=True)
class Span:
    """One layer: tokens ``start:stop``, channel after channel, each channel cut into ``chunks`` tokens; groups ``first:first + chunks``."""

    start: int
    stop: int
    chunks: int
    first: int

    @property
    def channels(self) -> int:
        return (self.stop - self.start) // self.chunks


class TokenGroups:
    """The groups of a layout, layer after layer. All tokens of a group have the same real columns, which are its first ones.

    Attributes:
        spans: one a layer.
        sizes: real columns of each group.
        members: tokens (channels) of each group.
        layer: the layer of each group.
    """

    def __init__(self, layout: TokenLayout) -> None:
        self.layout = layout
        positions = layout.positions.long()
        spans: list[Span] = []
        sizes: list[int] = []
        members: list[int] = []
        layers: list[int] = []
        start = 0
        for layer in range(len(layout.layers)):
            tokens = int((positions[:, 1] == layer).sum())
            channels = int(positions[start : start + tokens, 2].max()) + 1
            span = Span(start, start + tokens, tokens // channels, len(sizes))
            spans.append(span)
            sizes += layout.mask[start : start + span.chunks].sum(1).tolist()
            members += [channels] * span.chunks
            layers += [layer] * span.chunks
            start += tokens
        self.spans, self.sizes, self.members, self.layer = tuple(spans), tuple(sizes), tuple(members), tuple(layers)

    def __len__(self) -> int:
        return len(self.sizes)

    @cached_property
    def of_token(self) -> Tensor:
        """``[T]``: the group of each token."""
        return torch.cat([s.first + torch.arange(s.chunks).repeat(s.channels) for s in self.spans])

    def split(self, tokens: Tensor) -> list[Tensor]:
        """``[k, T, D] -> [k, channels, size]`` for every group: its tokens, real columns alone (views)."""
        pieces = [(s.start + c, s.stop, s.chunks) for s in self.spans for c in range(s.chunks)]
        return [tokens[:, slice(*piece), :size] for piece, size in zip(pieces, self.sizes, strict=True)]

    def rows(self, tokens: Tensor) -> list[Tensor]:
        """``[k, T, D] -> [k, channels, width]`` for every layer: its rows, uncut."""
        widths = [sum(self.sizes[s.first : s.first + s.chunks]) for s in self.spans]
        rows = [tokens[:, s.start : s.stop].reshape(len(tokens), s.channels, -1) for s in self.spans]
        return [r[..., :w] for r, w in zip(rows, widths, strict=True)]

    def join(self, rows: list[Tensor]) -> Tensor:
        """The inverse of :meth:`rows`: ``[k, channels, width]`` of every layer -> tokens ``[k, T, D]``, zero where there is no weight."""
        wide, parts = self.layout.token_size, []
        for span, own in zip(self.spans, rows, strict=True):
            padded = F.pad(own, (0, span.chunks * wide - own.shape[-1]))
            parts.append(padded.reshape(len(own), span.stop - span.start, wide))
        return torch.cat(parts, 1)

    def cut(self, layers: list[Tensor]) -> list[Tensor]:
        """A vector ``[width]`` or matrix ``[width, width]`` of every layer's rows -> its (diagonal) part for every group."""
        out = []
        for span, value in zip(self.spans, layers, strict=True):
            start = 0
            for size in self.sizes[span.first : span.first + span.chunks]:
                out.append(value[(slice(start, start + size),) * value.ndim])
                start += size
        return out

    def linear(self, tokens: Tensor, matrices: Tensor) -> Tensor:
        """Every token times its group's matrix: ``[k, T, A], [G, A, B] -> [k, T, B]``; no matrix is copied per token."""
        parts = []
        for s in self.spans:
            block = tokens[:, s.start : s.stop]
            if s.chunks == 1:
                parts.append(block @ matrices[s.first])
            else:
                rows = block.unflatten(1, (s.channels, s.chunks))
                parts.append(torch.einsum("kcpa,pab->kcpb", rows, matrices[s.first : s.first + s.chunks]).flatten(1, 2))
        return torch.cat(parts, 1)
