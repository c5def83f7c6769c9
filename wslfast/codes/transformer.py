"""The parts of the weight autoencoder: transformer blocks, the position embedding, the projection head, windows of tokens."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_BLOCK_TOKENS = 16_384  # tokens whose activations are held at once when a sequence is in windows
_SHORT = 1024  # tokens up to which attention may hold its scores


class Attention(nn.Module):
    """Multi-head self-attention over tokens, not causal: ``[k, T, d] -> [k, T, d]``."""

    def __init__(self, d_model: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.c_attn = nn.Linear(d_model, 3 * d_model, bias=False)
        self.c_proj = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.c_attn(x), "models tokens (qkv heads d) -> qkv models heads tokens d", qkv=3, heads=self.heads)
        y = attention(q, k, v, self.dropout if self.training else 0.0)
        y = self.c_proj(rearrange(y, "models heads tokens d -> models tokens (heads d)"))
        return F.dropout(y, self.dropout, self.training)


def attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """``softmax(q k^T / sqrt(d)) v`` of ``[k, heads, T, d]`` each, not causal.

    On a CPU in half precision torch's own attention takes six times as long as in float32, nearly all of it in its backward pass; the
    same in products does not, and float32 is the way out where the scores of a long sequence would take too much memory.
    """
    if q.device.type != "cpu" or q.dtype == torch.float32:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    if q.shape[-2] > _SHORT:
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), dropout_p=dropout).to(q.dtype)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return F.dropout(scores.float().softmax(-1).to(v.dtype), dropout) @ v


class MLP(nn.Module):
    """``[k, T, d] -> [k, T, 4 d] -> [k, T, d]``, GELU (erf)."""

    def __init__(self, d_model: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.c_fc = nn.Linear(d_model, 4 * d_model, bias=False)
        self.c_proj = nn.Linear(4 * d_model, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.c_proj(F.gelu(self.c_fc(x))), self.dropout, self.training)


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, d_model: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(d_model, bias=False)
        self.attn = Attention(d_model, heads, dropout)
        self.ln_2 = nn.LayerNorm(d_model, bias=False)
        self.mlp = MLP(d_model, dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of blocks, no final norm."""

    def __init__(self, d_model: int, heads: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.transformer = nn.ModuleList(Block(d_model, heads, dropout) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.transformer:
            x = block(x)
        return x


class PositionEmbedding(nn.Module):
    """Three learned tables: ``concat(E1[token] + E2[layer], E3[channel])``, positions ``[T, 3] -> [T, d]``."""

    def __init__(self, sizes: tuple[int, int, int], d_model: int) -> None:
        super().__init__()
        self.pe1 = nn.Embedding(sizes[0], d_model // 2)
        self.pe2 = nn.Embedding(sizes[1], d_model // 2)
        self.pe3 = nn.Embedding(sizes[2], d_model // 2)

    def forward(self, positions: Tensor) -> Tensor:
        token, layer, channel = positions.unbind(-1)
        return torch.cat([self.pe1(token) + self.pe2(layer), self.pe3(channel)], -1)


class ProjectionHead(nn.Module):
    """``[k, T, latent] -> [k, out]``: what the contrastive loss sees."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.head = nn.Sequential(
            nn.Linear(d_in, d_out, bias=False),
            nn.LayerNorm(d_out),
            nn.ReLU(),
            nn.Linear(d_out, d_out, bias=False),
            nn.LayerNorm(d_out),
            nn.ReLU(),
        )

    def forward(self, z: Tensor) -> Tensor:
        return self.head(z.flatten(1))


class Windows:
    """A sequence of T tokens in windows of ``size``: ``count`` of them, as equal as they can be, the last filled up with zeros."""

    def __init__(self, tokens: int, window: int) -> None:
        self.tokens = tokens
        self.count = 1 if window == 0 else math.ceil(tokens / window)
        self.size = math.ceil(tokens / self.count)

    def cut(self, x: Tensor) -> Tensor:
        """``[k, T, d] -> [k * count, size, d]``."""
        return F.pad(x, (0, 0, 0, self.count * self.size - self.tokens)).unflatten(1, (self.count, self.size)).flatten(0, 1)

    def through(self, transformer: nn.Module, x: Tensor) -> Tensor:
        """``transformer`` on every window, ``[k, T, d] -> [k, T, d]``; many windows a block at a time, recomputed in the backward pass."""
        if self.count == 1:
            return transformer(x)
        parts = self.cut(x).split(max(1, _BLOCK_TOKENS // self.size))
        if len(parts) > 1 and torch.is_grad_enabled():
            done = [checkpoint(transformer, part, use_reentrant=False) for part in parts]
        else:
            done = [transformer(part) for part in parts]
        return torch.cat(done).unflatten(0, (len(x), self.count)).flatten(1, 2)[:, : self.tokens]
