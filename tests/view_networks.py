"""Networks of the field, small, as people write them: what tokens and views are tried on. Each with its input and its groups of channels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Case(NamedTuple):
    make: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    groups: tuple[int, ...]  # sizes of its groups of interchangeable channels
    indices: int = 0  # queries are whole numbers below this


def _seq(*modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(*modules)


class Basic(nn.Module):
    def __init__(self, channels: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.short = _seq() if stride == 1 and channels == out else _seq(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.short(x) + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class PadShortcut(nn.Module):
    """The CIFAR ResNet's parameter-free shortcut: every second pixel, channels of zeros around."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.b(F.relu(self.a(x))) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)))
        return self.fc(F.avg_pool2d(x, x.shape[3]).view(x.shape[0], -1))


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.layers = nn.ModuleList(_seq(nn.BatchNorm2d(4 + 3 * i), nn.ReLU(), nn.Conv2d(4 + 3 * i, 3, 3, padding=1)) for i in range(3))
        self.norm, self.fc = nn.BatchNorm2d(13), nn.Linear(13, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return self.fc(F.adaptive_avg_pool2d(F.relu(self.norm(x)), 1).flatten(1))


class Inverted(nn.Module):
    def __init__(self, channels: int, wide: int) -> None:
        super().__init__()
        self.body = _seq(
            nn.Conv2d(channels, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(),
            nn.Conv2d(wide, wide, 3, 1, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(),
            nn.Conv2d(wide, channels, 1, bias=False), nn.BatchNorm2d(channels),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Squeeze(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.down, self.up, self.out = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 2, 1), nn.Conv2d(2, 6, 1), nn.Conv2d(6, 4, 3)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.conv(x))
        x = x * F.hardsigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))
        return self.fc(self.out(x).amax((2, 3)))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enc1, self.enc2 = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.mid, self.up = nn.Conv2d(6, 8, 3, padding=1), nn.ConvTranspose2d(8, 5, 2, 2)
        self.dec, self.out = nn.Conv2d(11, 4, 3, padding=1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.enc1(x))
        b = F.relu(self.enc2(F.max_pool2d(a, 2)))
        c = self.up(F.relu(self.mid(F.max_pool2d(b, 2))))
        d = F.relu(self.dec(torch.cat([c, b], 1)))
        return self.out(torch.cat([F.interpolate(d, scale_factor=2.0, mode="bilinear"), a], 1))


class Decoder(nn.Module):
    """An image decoder of transposed convolutions, one of them grouped, from a flat code."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 6 * 4)
        self.body = _seq(
            nn.ConvTranspose2d(6, 8, 3, 2, 1, output_padding=1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.ConvTranspose2d(8, 4, 2, 2, groups=2), nn.LeakyReLU(0.2), nn.ConvTranspose2d(4, 3, 1), nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, z: Tensor) -> Tensor:
        return self.body(F.relu(self.fc(z)).view(-1, 6, 2, 2))


class TiedAutoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(7, 5), nn.Linear(5, 4)
        self.back, self.out = nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(7))

    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(self.second(torch.tanh(self.first(x))))
        return F.linear(torch.tanh(F.linear(z, self.second.weight.t(), self.back)), self.first.weight.t(), self.out)


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
        self.mlp = _seq(nn.Linear(width, 10), nn.GELU(), nn.Linear(10, width))

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
    """Rotary positions tie places in a head to angles: heads may move, places of queries and keys may not."""

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


class Recurrent(nn.Module):
    def __init__(self, layer: nn.RNNBase, out: int, last: bool = False) -> None:
        super().__init__()
        self.layer, self.fc, self.last = layer, nn.Linear(out, 3), last

    def forward(self, x: Tensor) -> Tensor:
        out, state = self.layer(x)
        return self.fc(state[-1] if self.last else out[:, -1])


class GatedCell(nn.Module):
    """A GRU written by hand, its gates chunks of one matrix, its start a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.x, self.h, self.start, self.out = nn.Linear(3, 12), nn.Linear(4, 12), nn.Parameter(torch.randn(4)), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.start.expand(len(x), -1)
        for t in range(3):
            a, b = self.x(x[:, t]).chunk(3, 1), self.h(h).chunk(3, 1)
            r, z = torch.sigmoid(a[0] + b[0]), torch.sigmoid(a[1] + b[1])
            h = (1 - z) * torch.tanh(a[2] + r * b[2]) + z * h
        return self.out(h)


class LoRA(nn.Module):
    def __init__(self, features: int, out: int, rank: int = 3) -> None:
        super().__init__()
        self.base = nn.Linear(features, out)
        self.A, self.B, self.scale = nn.Parameter(torch.randn(rank, features)), nn.Parameter(torch.randn(out, rank)), 0.5

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * (x @ self.A.T @ self.B.T)


class MergedLoRA(nn.Module):
    """The factors multiplied before the weight is used."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.W, self.A, self.B = nn.Linear(6, 5), nn.Parameter(torch.randn(4, 5)), nn.Parameter(torch.randn(2, 5)), nn.Parameter(torch.randn(4, 2))
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(F.linear(F.relu(self.first(x)), self.W + self.B @ self.A)))


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, 6, 4, 4)
        self.tokens, self.channels = _seq(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 4)), _seq(nn.Linear(6, 7), nn.GELU(), nn.Linear(7, 6))
        self.n1, self.n2, self.head = nn.LayerNorm(6), nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = x + self.tokens(self.n1(x).transpose(1, 2)).transpose(1, 2)
        return self.head((x + self.channels(self.n2(x))).mean(1))


class ConvMixer(nn.Module):
    """The same with convolutions of one tap over tokens, whose images are features."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.back, self.head = nn.Linear(9, 6), nn.Conv1d(4, 5, 1), nn.Conv1d(5, 4, 1), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head((x + self.back(F.gelu(self.mix(x)))).mean(1))


class Siren(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.omega = nn.ModuleList([nn.Linear(2, 6), nn.Linear(6, 6), nn.Linear(6, 1)]), nn.Parameter(torch.tensor(30.0))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = torch.sin(self.omega * layer(x))
        return self.layers[-1](x)


class NeRF(nn.Module):
    """Fourier features, and the input once more in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.out = nn.Linear(15, 6), nn.Linear(6, 5), nn.Linear(20, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        e = torch.cat([x, *(f(2.0**i * x) for i in range(2) for f in (torch.sin, torch.cos))], -1)
        h = F.relu(self.b(F.relu(self.a(e))))
        return self.out(F.relu(self.c(torch.cat([e, h], -1))))


class ConvNeXt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.dw, self.norm = nn.Conv2d(3, 6, 2, 2), nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.LayerNorm(6)
        self.up, self.down, self.gamma, self.head = nn.Linear(6, 8), nn.Linear(8, 6), nn.Parameter(torch.randn(6, 1, 1)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        h = self.down(F.gelu(self.up(self.norm(self.dw(x).permute(0, 2, 3, 1))))).permute(0, 3, 1, 2)
        return self.head((x + self.gamma * h).mean((-2, -1)))


class Shuffle(nn.Module):
    """Halves, groups, and channels shuffled between them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(1, 8, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(8, 6, 1, groups=2)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        left, right = x.chunk(2, 1)
        x = torch.cat([left, F.relu(self.a(right))], 1)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.fc(self.b(x).mean((2, 3)))


class Residual(nn.Module):
    """A policy: residual layers with layer norm, two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norms = nn.Linear(5, 6), nn.ModuleList(nn.LayerNorm(6) for _ in range(2))
        self.layers, self.mean, self.scale = nn.ModuleList(nn.Linear(6, 6) for _ in range(2)), nn.Linear(6, 2), nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for norm, layer in zip(self.norms, self.layers):
            x = x + torch.tanh(layer(norm(x)))
        mean = self.mean(x)
        return torch.cat([mean, self.scale.exp().expand_as(mean)], -1)


class Gated(nn.Module):
    """GLU, a learnt slope for each channel, maxout."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.act, self.b, self.c = nn.Linear(4, 10), nn.PReLU(5), nn.Linear(5, 12), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.act(F.glu(self.a(x), -1))).view(-1, 6, 2).amax(-1))


class Upscale(nn.Module):
    """Super-resolution by pixel shuffle; the first half of the features is not the second."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(3, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.pixel_shuffle(torch.tanh(self.b(F.relu(self.a(F.pad(x, (1, 1, 1, 1), mode="reflect"))))), 2))


class Film(nn.Module):
    """Features scaled and shifted by numbers that another part of the network makes; instance norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.make, self.out = nn.Conv1d(2, 5, 3), nn.InstanceNorm1d(5, affine=True), nn.Linear(2, 10), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.make(x.mean(2)).unsqueeze(2).chunk(2, 1)
        return self.out(F.relu(self.norm(self.conv(x)) * (1 + scale) + shift).flatten(2).max(2)[0])


class Experts(nn.Module):
    """A dense mixture of experts by einsum: experts are interchangeable, and hidden units, alike in all experts."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(4, 3), nn.Parameter(torch.randn(3, 4, 5)), nn.Parameter(torch.randn(3, 5, 6))
        self.bias, self.out = nn.Parameter(torch.randn(3, 5)), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(torch.einsum("ni,eih->neh", x, self.up) + self.bias)
        return self.out(torch.einsum("neh,eho,ne->no", h, self.down, self.gate(x).softmax(-1)))


class Ordered(nn.Module):
    """What nothing may be permuted in: running sums over features."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.cumsum(self.a(x), 1))


class Fourier(nn.Module):
    """A filter along the features, whose neighbours therefore stay neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.filter, self.b = nn.Linear(4, 8), nn.Conv1d(1, 2, 3), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.filter(self.a(x).unsqueeze(1))).flatten(1))


class Deep(nn.Module):
    """One block used three times."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block, self.out = nn.Linear(3, 6), _seq(nn.Linear(6, 4), nn.SiLU(), nn.Linear(4, 6)), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for _ in range(3):
            x = x + self.block(x)
        return self.out(x)


CASES: dict[str, Case] = {
    "resnet": Case(lambda: _seq(nn.Conv2d(3, 4, 3, padding=1), Basic(4, 4), Basic(4, 6, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)), (3, 6, 6), (4, 4, 6, 6)),
    "resnet-padded-shortcut": Case(PadShortcut, (3, 6, 6), (4, 8, 4)),
    "densenet": Case(Dense, (3, 6, 6), (4, 3, 3, 3)),
    "mobilenet": Case(lambda: _seq(nn.Conv2d(3, 4, 3, 2, 1), Inverted(4, 6), Inverted(4, 6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)), (3, 6, 6), (4, 6, 6)),
    "squeeze-excite": Case(Squeeze, (1, 8, 8), (6, 2, 4)),
    "vgg": Case(lambda: _seq(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 5, 3, padding="same"), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(20, 6), nn.Dropout(0.5), nn.ReLU(), nn.Linear(6, 3)), (3, 8, 8), (4, 5, 6)),
    "group-norm": Case(lambda: _seq(nn.Conv2d(1, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.GroupNorm(1, 6), nn.SiLU(), nn.Conv2d(6, 4, 1), nn.GroupNorm(4, 4), nn.Flatten(), nn.Linear(16, 2)), (1, 6, 6), (2, 4, 6, 4)),
    "unet": Case(UNet, (1, 8, 8), (4, 6, 8, 5, 4)),
    "decoder": Case(Decoder, (5,), (6, 2, 4, 2)),
    "tied-autoencoder": Case(TiedAutoencoder, (7,), (5, 4)),
    "vit": Case(ViT, (1, 8, 8), (8, 2, 4, 4, 12, 2, 4, 4, 12)),
    "transformer-post-norm": Case(lambda: ViT(False), (1, 8, 8), (8, 2, 4, 4, 12, 2, 4, 4, 12)),
    "fused-attention": Case(lambda: Patches(FusedAttention(), FusedAttention()), (4, 9), (8, 2, 4, 4, 10, 2, 4, 4, 10)),
    "gpt": Case(GPT, (4,), (6, 3, 2, 2, 9), 11),
    "rotary": Case(lambda: Patches(Rotary()), (4, 9), (8, 2, 4)),
    "window-attention": Case(lambda: Patches(Window(), width=6), (4, 9), (6, 2, 3, 3)),
    "lstm": Case(lambda: Recurrent(nn.LSTM(3, 5, 2, batch_first=True), 5), (4, 3), (5, 5)),
    "lstm-projected": Case(lambda: Recurrent(nn.LSTM(3, 5, 1, batch_first=True, proj_size=4), 4), (4, 3), (5, 4)),
    "gru-both-ways": Case(lambda: Recurrent(nn.GRU(3, 4, 2, batch_first=True, bidirectional=True), 8), (4, 3), (4, 4, 4, 4)),
    "rnn-last-state": Case(lambda: Recurrent(nn.RNN(3, 4, 2, batch_first=True), 4, last=True), (4, 3), (4, 4)),
    "gru-by-hand": Case(GatedCell, (3, 3), (4,)),
    "lora": Case(lambda: _seq(LoRA(6, 5), nn.ReLU(), LoRA(5, 3)), (6,), (3, 5, 3)),
    "lora-merged": Case(MergedLoRA, (6,), (5, 4, 2)),
    "mixer": Case(Mixer, (1, 8, 8), (6, 5, 7)),
    "mixer-convolutions": Case(ConvMixer, (4, 9), (6, 5)),
    "siren": Case(Siren, (2,), (6, 6)),
    "nerf": Case(NeRF, (3,), (6, 5, 6)),
    "convnext": Case(ConvNeXt, (3, 8, 8), (6, 8)),
    "shufflenet": Case(Shuffle, (1, 4, 4), ()),
    "policy": Case(Residual, (5,), (6, 6, 6)),
    "gated": Case(Gated, (4,), (5, 6, 2)),
    "pixel-shuffle": Case(Upscale, (1, 4, 4), (8, 3)),
    "film": Case(Film, (2, 6), (5,)),
    "experts": Case(Experts, (4,), (3, 5, 6)),
    "one-block": Case(Deep, (3,), (6, 4)),
    "logistic-regression": Case(lambda: nn.Linear(4, 3), (4,), ()),
    "running-sums": Case(Ordered, (4,), ()),
    "filter-over-features": Case(Fourier, (4,), (2,)),
}  # fmt: skip


def queries(case: Case, n: int, seed: int = 0) -> Tensor:
    """Queries ``[n, *input_shape]`` in float64."""
    generator = torch.Generator().manual_seed(seed)
    if case.indices:
        return torch.randint(case.indices, (n, *case.input_shape), generator=generator).double()
    return torch.randn(n, *case.input_shape, generator=generator, dtype=torch.float64)
