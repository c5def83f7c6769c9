"""Networks of the field, small, as people write them: what tokens and views are tried on. Each with its input and its groups of channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from view_attention import GPT, FusedAttention, Patches, Rotary, ViT, Window
from view_images import (
    Basic,
    ConvMixer,
    ConvNeXt,
    Decoder,
    Dense,
    Film,
    Fourier,
    Inverted,
    Mixer,
    PadShortcut,
    Shuffle,
    Squeeze,
    UNet,
    Upscale,
)


class Case(NamedTuple):
    make: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    groups: tuple[int, ...]  # sizes of its groups of interchangeable channels
    indices: int = 0  # queries are whole numbers below this


def _seq(*modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(*modules)


class TiedAutoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(7, 5), nn.Linear(5, 4)
        self.back, self.out = nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(7))

    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(self.second(torch.tanh(self.first(x))))
        return F.linear(torch.tanh(F.linear(z, self.second.weight.t(), self.back)), self.first.weight.t(), self.out)


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
        self.first, self.W, self.A, self.B = (
            nn.Linear(6, 5),
            nn.Parameter(torch.randn(4, 5)),
            nn.Parameter(torch.randn(2, 5)),
            nn.Parameter(torch.randn(4, 2)),
        )
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(F.linear(F.relu(self.first(x)), self.W + self.B @ self.A)))


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
    "rotary": Case(lambda: Patches(Rotary()), (4, 9), (8, 2, 2, 4)),
    "window-attention": Case(lambda: Patches(Window(), width=6), (4, 9), (6, 2, 3, 3)),
    "lstm": Case(lambda: Recurrent(nn.LSTM(3, 5, 2, batch_first=True), 5), (4, 3), (5, 5)),
    "lstm-projected": Case(lambda: Recurrent(nn.LSTM(3, 5, 1, batch_first=True, proj_size=4), 4), (4, 3), (5, 4)),
    "gru-both-ways": Case(lambda: Recurrent(nn.GRU(3, 4, 2, batch_first=True, bidirectional=True), 8), (4, 3), (4, 4, 4, 4)),
    "rnn-last-state": Case(lambda: Recurrent(nn.RNN(3, 4, 2, batch_first=True), 4, last=True), (4, 3), (4, 4)),
    "gru-by-hand": Case(GatedCell, (3, 3), (4,)),
    "lora": Case(lambda: _seq(LoRA(6, 5), nn.ReLU(), LoRA(5, 3)), (6,), (3, 5, 3)),
    "lora-merged": Case(MergedLoRA, (6,), (4, 5, 2)),
    "mixer": Case(Mixer, (1, 8, 8), (6, 5, 7)),
    "mixer-convolutions": Case(ConvMixer, (4, 9), (6, 5)),
    "siren": Case(Siren, (2,), (6, 6)),
    "nerf": Case(NeRF, (3,), (6, 5, 6)),
    "convnext": Case(ConvNeXt, (3, 8, 8), (6, 8)),
    "shufflenet": Case(Shuffle, (1, 4, 4), (2, 2, 4, 2, 3)),
    "policy": Case(Residual, (5,), (6,)),
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
