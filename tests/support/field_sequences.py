"""Networks after those that the field trains, small: on sequences, signals, sets and graphs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from einops.layers.torch import Rearrange, Reduce
from registered import registry
from torch import Tensor, nn

SEQUENCES, takes = registry()


# -- attention ---------------------------------------------------------------------------------------------------------


@takes(3, 8, 8)
class VisionTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Sequential(Rearrange("n c (h p) (w q) -> n (h w) (p q c)", p=4, q=4), nn.LayerNorm(48), nn.Linear(48, 8))
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 5, 8))
        self.norm1, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 24, bias=False), nn.Linear(8, 8)
        self.norm2, self.wide, self.narrow, self.head = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x)
        x = torch.cat((repeat(self.token, "1 1 d -> n 1 d", n=x.shape[0]), x), dim=1) + self.positions
        q, k, v = (rearrange(t, "n t (h d) -> n h t d", h=2) for t in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        attention = torch.einsum("nhid,nhjd->nhij", q, k).mul(0.5).softmax(-1)
        x = x + self.out(rearrange(attention @ v, "n h t d -> n t (h d)"))
        x = x + self.narrow(F.gelu(self.wide(self.norm2(x))))
        return self.head(x[:, 0])


@takes(3, 8, 8)
class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches, self.norm1, self.norm2 = nn.Conv2d(3, 6, 4, 4), nn.LayerNorm(6), nn.LayerNorm(6)
        self.tokens = nn.Sequential(Rearrange("n t c -> n c t"), nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 4), Rearrange("n c t -> n t c"))
        self.channels = nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Dropout(0.1), nn.Linear(9, 6))
        self.head = nn.Sequential(Reduce("n t c -> n c", "mean"), nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x + self.tokens(self.norm1(x))
        return self.head(x + self.channels(self.norm2(x)))


@takes(5)
class Encoder(nn.Module):
    """torch's own transformer encoder behind an embedding of whole numbers; the fused path would hide its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(4, 8, padding_idx=0), nn.Embedding(5, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 12, 0.1, "gelu", batch_first=True, norm_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2, nn.LayerNorm(8), enable_nested_tensor=False), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x.long().abs() % 4) + self.positions(torch.arange(x.shape[1], device=x.device))
        return self.head(self.encoder(h).mean(1))


@takes(5)
class LanguageModel(nn.Module):
    """A causal decoder whose last layer is its embedding."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attend = nn.Embedding(6, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm, self.mlp, self.head = (
            nn.LayerNorm(8),
            nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)),
            nn.Linear(8, 6, bias=False),
        )
        self.head.weight = self.embed.weight
        self.register_buffer("mask", torch.full((5, 5), float("-inf")).triu(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x.long().abs() % 6)
        normed = self.norm(h)
        h = h + self.attend(normed, normed, normed, attn_mask=self.mask, need_weights=False)[0]
        return self.head(h + self.mlp(h))


@takes(6, 4)
class Perceiver(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.latents, self.k, self.v, self.q = nn.Parameter(torch.randn(3, 6)), nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 6)
        self.decode = nn.MultiheadAttention(6, 3, kdim=6, vdim=6, batch_first=True)
        self.query = nn.Parameter(torch.randn(1, 1, 6))

    def forward(self, x: Tensor) -> Tensor:
        latents = self.latents.unsqueeze(0).expand(x.size(0), -1, -1)
        h = latents + F.scaled_dot_product_attention(self.q(latents), self.k(x), self.v(x))
        return self.decode(self.query.repeat(x.shape[0], 1, 1), h, h)[0].squeeze(1)


# -- recurrences, signals, sets, graphs ----------------------------------------------------------------------------------


@takes(5, 3)
class LstmClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 5, num_layers=2, batch_first=True, dropout=0.2), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.lstm(x)
        return self.head(out[:, -1])


@takes(5, 3)
class GruBothWays(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(3, 4, bidirectional=True), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        _, h = self.gru(x.transpose(0, 1))
        return self.head(torch.cat((h[-2], h[-1]), 1))


@takes(5, 3)
class CellByCell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.cell, self.start = nn.RNN(3, 4, batch_first=True), nn.GRUCell(4, 4), nn.Parameter(torch.zeros(1, 4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.start.expand(len(x), -1)
        for step in self.rnn(x)[0].unbind(1):
            h = self.cell(step, h)
        return h


@takes(2, 12)
class CausalConvolutions(nn.Module):
    """A temporal convolutional network with gates, as WaveNet's."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(2, 4, 1)
        self.gates = nn.ModuleList(nn.Conv1d(4, 8, 2, dilation=2**i) for i in range(3))
        self.mix, self.norm, self.out = nn.Conv1d(4, 4, 1), nn.GroupNorm(2, 4), nn.Conv1d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for i, gate in enumerate(self.gates):
            a, b = gate(F.pad(x, (2**i, 0))).split(4, 1)
            x = x + self.mix(torch.tanh(a) * torch.sigmoid(b))
        return self.out(self.norm(x))


@takes(2, 20)
def signals() -> nn.Module:
    first = (
        nn.Conv1d(2, 4, 5, 2),
        nn.BatchNorm1d(4),
        nn.ReLU(),
        nn.MaxPool1d(2),
        nn.Conv1d(4, 5, 3, padding=1),
        nn.ReLU(),
        nn.BatchNorm1d(5),
    )
    return nn.Sequential(*first, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(5, 3))


@takes(3, 6, 6)
class ConvLstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gates, self.head = nn.Conv2d(1 + 4, 16, 3, 1, 1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = cell = x.new_zeros(len(x), 4, 6, 6)
        for t in range(3):
            enter, keep, leave, new = self.gates(torch.cat((x[:, t : t + 1], state), 1)).chunk(4, 1)
            cell = torch.sigmoid(keep) * cell + torch.sigmoid(enter) * torch.tanh(new)
            state = torch.sigmoid(leave) * torch.tanh(cell)
        return self.head(state.mean((2, 3)))


@takes(3, 7)
class PointNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.each = nn.Sequential(nn.Conv1d(3, 6, 1), nn.BatchNorm1d(6), nn.ReLU(), nn.Conv1d(6, 8, 1))
        self.whole = nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.whole(torch.max(self.each(x), 2)[0])


@takes(5, 3)
class GraphConvolutions(nn.Module):
    adjacency: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("adjacency", torch.eye(5) * 0.5 + 0.25 * torch.eye(5).roll(1, 0) + 0.25 * torch.eye(5).roll(-1, 0))
        self.first, self.second, self.out = nn.Linear(3, 6), nn.Linear(6, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.adjacency @ self.first(x), 0.2)
        x = torch.matmul(self.adjacency, self.second(x)).relu()
        return self.out(reduce(x, "n v d -> n d", "max"))
