"""Networks after those that the field trains, small: on vectors and coordinates."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from registered import registry
from torch import Tensor, nn
from torch.nn.utils import parametrizations

VECTORS, takes = registry()


@takes(7)
def mlp_of_every_activation() -> nn.Module:
    kinds = (
        nn.Softplus(),
        nn.Hardswish(),
        nn.SELU(),
        nn.ReLU6(),
        nn.PReLU(),
        nn.Mish(),
        nn.GELU("tanh"),
        nn.Threshold(0.1, 0.0),
        nn.GLU(),
        nn.Softsign(),
    )
    widths = [6, 6, 6, 6, 6, 6, 6, 6, 3, 6]
    layers, before = [], 7
    for kind, width in zip(kinds, widths, strict=True):
        layers += [nn.Linear(before, 6), kind]
        before = width
    return nn.Sequential(*layers, nn.Linear(before, 4), nn.Softmax(-1))


@takes(6)
class ResidualMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.blocks = nn.ModuleDict(
            {f"b{i}": nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)) for i in range(2)}
        )
        self.last = nn.RMSNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks.values():
            x = x + block(x)
        return self.head(self.last(x))


@takes(6)
def mlp_with_batch_norm() -> nn.Module:
    first = (nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.BatchNorm1d(8, affine=False))
    return nn.Sequential(*first, nn.Linear(8, 5), nn.AlphaDropout(0.1), nn.Tanh(), nn.Linear(5, 1))


@takes(130)
def wide_mlp_with_batch_norm() -> nn.Module:
    """The first norms are factors of outputs, the last one, behind fewer inputs, is folded."""
    first = (nn.Linear(130, 140, bias=False), nn.BatchNorm1d(140), nn.ReLU(), nn.Linear(140, 9), nn.BatchNorm1d(9, affine=False))
    return nn.Sequential(*first, nn.Tanh(), nn.Linear(9, 5), nn.BatchNorm1d(5))


class _Sine(nn.Module):
    def __init__(self, i: int, o: int, omega: float = 30.0) -> None:
        super().__init__()
        self.linear, self.omega = nn.Linear(i, o), omega
        with torch.no_grad():
            self.linear.weight.uniform_(-math.sqrt(6 / i) / omega, math.sqrt(6 / i) / omega)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.omega * self.linear(x))


@takes(2)
def siren() -> nn.Module:
    return nn.Sequential(_Sine(2, 8, 5.0), _Sine(8, 8, 5.0), nn.Linear(8, 1))


@takes(2)
class FourierFeatures(nn.Module):
    frequencies: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(2, 5), persistent=False)
        self.net = nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        angles = 2 * torch.pi * x @ self.frequencies
        return self.net(torch.cat([angles.sin(), angles.cos()], dim=-1))


@takes(3)
class RadianceField(nn.Module):
    """Positional encoding, a skip to the middle, density and colour beside each other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Sequential(nn.Linear(15, 8), nn.ReLU()), nn.Sequential(nn.Linear(23, 8), nn.ReLU())
        self.density, self.colour = nn.Linear(8, 1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        parts = [x]
        for i in range(2):
            parts += [torch.sin(2.0**i * x), torch.cos(2.0**i * x)]
        encoded = torch.cat(parts, -1)
        h = self.second(torch.cat((self.first(encoded), encoded), -1))
        return torch.cat((F.softplus(self.density(h)), self.colour(h).sigmoid()), -1)


@takes(2)
class Gabor(nn.Module):
    """A wavelet INR, and a multiplicative filter network behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(2, 6), nn.Linear(2, 6), nn.Linear(6, 1)
        self.centres, self.widths = nn.Parameter(torch.randn(6, 2)), nn.Parameter(torch.rand(6) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        near = (x**2).sum(-1, keepdim=True) + (self.centres**2).sum(-1)[None] - 2 * x @ self.centres.T
        return self.out(torch.sin(self.a(x)) * torch.exp(-0.5 * near * self.widths[None]) * torch.cos(self.b(x)))


@takes(8)
class GaussianPolicy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.mean = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh()), nn.Linear(8, 3)
        self.log_std = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        mean = self.mean(self.body(x.clamp(-5.0, 5.0)))
        return torch.stack((mean, self.log_std.expand_as(mean).exp()), -1)


@takes(6)
class TiedAutoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.bias = nn.Linear(6, 4), nn.Parameter(torch.zeros(6))
        self.copy = self.encoder

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.copy(x)), self.encoder.weight.t(), self.bias)


@takes(6)
class VariationalAutoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enc, self.mean, self.log_variance, self.dec = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 3), nn.Linear(3, 6)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = F.relu(self.enc(x))
        mean, log_variance = self.mean(h), self.log_variance(h)
        z = mean + torch.randn_like(mean) * (0.5 * log_variance).exp() if self.training else mean
        return {"reconstruction": self.dec(z), "divergence": 0.5 * (log_variance.exp() + mean**2 - 1 - log_variance).sum(1)}


@takes(6)
class CouplingFlow(nn.Module):
    mask: Tensor
    order: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.tensor([1.0, 0, 1, 0, 1, 0]))
        self.register_buffer("order", torch.tensor([3, 1, 5, 0, 2, 4]))
        self.scale, self.shift = nn.Sequential(nn.Linear(6, 6), nn.Tanh()), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            kept = x * self.mask
            x = kept + (1 - self.mask) * (x * self.scale(kept).exp() + self.shift(kept))
            x = x[:, self.order]
        return x


class _Masked(nn.Linear):
    mask: Tensor

    def __init__(self, i: int, o: int) -> None:
        super().__init__(i, o)
        self.register_buffer("mask", torch.ones(o, i).tril().bool())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.mask * self.weight, self.bias)


@takes(6)
def masked_autoregressive() -> nn.Module:
    return nn.Sequential(_Masked(6, 6), nn.ELU(0.5), _Masked(6, 6))


@takes(6)
class LowRank(nn.Module):
    """LoRA factors beside frozen weights, a weight that is generated, and one that is normed."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.a, self.b = nn.Linear(6, 6), nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.randn(6, 2))
        self.hyper, self.code = nn.Linear(3, 18), nn.Parameter(torch.randn(3))
        self.normed = parametrizations.weight_norm(nn.Linear(3, 4))
        self.bounded = nn.utils.spectral_norm(nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.base(x) + 0.5 * (x @ self.a.T) @ self.b.T
        x = F.linear(F.silu(x), self.hyper(self.code).view(3, 6))
        return self.bounded(self.normed(x).relu())


@takes(4)
class RadialBasis(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.centres, self.width, self.out = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.ones(5)), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.exp(-F.softplus(self.width) * torch.cdist(x, self.centres)))


@takes(6)
class Cascade(nn.Module):
    """Everything written by hand: gates, in-place writes, a mixture of experts, lists of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ParameterList(nn.Parameter(torch.randn(6, 6) * 0.4) for _ in range(3))
        self.gate, self.carry, self.out = nn.Linear(6, 3), nn.Linear(6, 6), nn.Bilinear(6, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(-1)
        made = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            made += weights[:, i : i + 1] * (x @ expert)
        t = self.carry(x).sigmoid()
        made = t * made + (1 - t) * x
        made[:, 0] = made[:, 1].clone() * 2
        made[..., 4:] += x[..., :2]
        return self.out(made, x)
