"""Networks with attention, small, as people write them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ViT(nn.Module):
    """Class token, position table, torch's own encoder layer."""

    def __init__(self, norm_first: bool = True) -> None:
        super().__init__()
        self.patch, self.cls = nn.Conv2d(1, 8, 4, 4), nn.Parameter(torch.randn(1, 1, 8))
        self.positions = nn.Parameter(torch.randn(1, 5, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, norm_first=norm_first, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.encoder(x))[:, 0])


class FusedAttention(nn.Module):
    """The block of timm: one matrix for queries, keys and values, cut by a reshape; norms of queries and keys; layer scale."""

    def __init__(self, width: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.q_norm, self.k_norm = nn.LayerNorm(width // heads), nn.LayerNorm(width // heads)
        self.scale1, self.scale2 = nn.Parameter(torch.randn(width)), nn.Parameter(torch.randn(width))
        self.mlp = nn.Sequential(nn.Linear(width, 10), nn.GELU(), nn.Linear(10, width))

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        h = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v).transpose(1, 2).reshape(n, t, c)
        x = x + self.scale1 * self.proj(h)
        return x + self.scale2 * self.mlp(self.norm2(x))


class Patches(nn.Module):
    def __init__(self, *blocks: nn.Module, width: int = 8, patches: int = 4) -> None:
        super().__init__()
        self.embed, self.blocks, self.head = nn.Linear(9, width), nn.ModuleList(blocks), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class GPT(nn.Module):
    """Causal, queries, keys and values split, head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(11, 6), nn.Embedding(4, 6)
        self.attn, self.proj, self.up, self.down = nn.Linear(6, 18), nn.Linear(6, 6), nn.Linear(6, 9), nn.Linear(9, 6)
        self.ln1, self.ln2, self.head = nn.LayerNorm(6), nn.LayerNorm(6), nn.Linear(6, 11, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, x: Tensor) -> Tensor:
        x = x.long()
        n, t = x.shape
        h = self.wte(x) + self.wpe(torch.arange(t))
        q, k, v = (y.view(n, t, 3, 2).transpose(1, 2) for y in self.attn(self.ln1(h)).split(6, dim=2))
        a = (q @ k.transpose(-2, -1)) / math.sqrt(2)
        a = a.masked_fill(torch.tril(torch.ones(t, t)) == 0, float("-inf")).softmax(-1)
        h = h + self.proj((a @ v).transpose(1, 2).contiguous().view(n, t, 6))
        return self.head(h + self.down(F.gelu(self.up(self.ln2(h)))))


class Rotary(nn.Module):
    """Rotary positions pair places in a head, each pair with a frequency: heads may move, and pairs with their frequencies, which are
    buffers and so part of a row of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8, bias=False) for _ in range(4))
        self.norm = nn.RMSNorm(8)
        angle = torch.arange(4.0)[:, None] * torch.tensor([1.0, 0.3])
        self.register_buffer("cos", angle.repeat(1, 2).cos())
        self.register_buffer("sin", angle.repeat(1, 2).sin())

    def turn(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * self.cos + torch.cat([-b, a], -1) * self.sin

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        h = self.norm(x)
        q, k, v = (layer(h).view(n, t, 2, 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return x + self.o(F.scaled_dot_product_attention(self.turn(q), self.turn(k), v, is_causal=True).transpose(1, 2).flatten(2))


class Window(nn.Module):
    """Attention in shifted windows with a table of relative positions, by einsum (Swin's way)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj, self.table = nn.Linear(6, 18), nn.Linear(6, 6), nn.Parameter(torch.randn(3, 2))
        self.register_buffer("index", torch.tensor([[1, 2], [0, 1]]))

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        h = torch.roll(x, -1, 1).view(n, t // 2, 2, c)
        q, k, v = self.qkv(h).view(n, t // 2, 2, 3, 2, 3).unbind(3)
        scores = torch.einsum("nwqhd,nwkhd->nwhqk", q, k) + self.table[self.index.view(-1)].view(2, 2, 2).permute(2, 0, 1)
        h = torch.einsum("nwhqk,nwkhd->nwqhd", scores.softmax(-1), v).reshape(n, t, c)
        return x + torch.roll(self.proj(h), 1, 1)
