"""Networks after those that the field trains, small: with Fourier transforms and other complex numbers inside."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from registered import registry
from torch import Tensor, nn

SPECTRA, takes = registry()


class _Spectral(nn.Module):
    """Products of the lowest frequencies of both signs, written into a spectrum of zeros."""

    def __init__(self, channels: int, modes: int) -> None:
        super().__init__()
        self.modes = modes
        self.low, self.high = (nn.Parameter(torch.randn(channels, channels, modes, modes, 2) / channels) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        m, spectrum = self.modes, torch.fft.rfft2(x)
        made = torch.zeros(x.shape[0], x.shape[1], x.shape[-2], x.shape[-1] // 2 + 1, dtype=spectrum.dtype)
        made[:, :, :m, :m] = torch.einsum("bixy,ioxy->boxy", spectrum[:, :, :m, :m], torch.view_as_complex(self.low))
        made[:, :, -m:, :m] = torch.einsum("bixy,ioxy->boxy", spectrum[:, :, -m:, :m], torch.view_as_complex(self.high))
        return torch.fft.irfft2(made, s=x.shape[-2:])


@takes(1, 8, 8)
class FourierOperator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lift, self.project = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 1, 1)
        self.spectral = nn.ModuleList(_Spectral(4, 3) for _ in range(2))
        self.local = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.lift(x)
        for spectral, local in zip(self.spectral, self.local, strict=True):
            x = F.gelu(spectral(x) + local(x))
        return self.project(x)


@takes(2, 12)
class FourierOperatorOfSignals(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lift, self.local, self.project = nn.Linear(2, 4), nn.Conv1d(4, 4, 1), nn.Linear(4, 1)
        self.low = nn.Parameter(torch.randn(4, 4, 3, 2) / 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.lift(x.transpose(1, 2)).transpose(1, 2)
        low = torch.einsum("bix,iox->box", torch.fft.rfft(x)[..., :3], torch.view_as_complex(self.low))
        x = F.gelu(torch.fft.irfft(F.pad(low, (0, 4)), n=x.shape[-1]) + self.local(x))
        return self.project(x.transpose(1, 2))


@takes(10, 2)
class StateSpaces(nn.Module):
    """Diagonal state spaces, as convolutions with kernels as long as the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.decay, self.step = nn.Parameter(torch.randn(4, 3) * 0.1), nn.Parameter(torch.rand(4) - 3)
        self.turn = nn.Parameter(math.pi * torch.arange(3.0).repeat(4, 1))
        self.out, self.skip = nn.Parameter(torch.randn(4, 3, 2)), nn.Parameter(torch.randn(4))
        self.enter, self.head = nn.Linear(2, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        u, length = self.enter(x).transpose(1, 2), x.shape[1]
        rate = torch.complex(-self.decay.exp(), self.turn) * self.step.exp()[:, None]
        size = torch.view_as_complex(self.out) * (rate.exp() - 1) / rate
        kernel = 2 * torch.einsum("hn,hnl->hl", size, (rate[..., None] * torch.arange(length)).exp()).real
        both = torch.fft.rfft(u, n=2 * length) * torch.fft.rfft(kernel, n=2 * length)
        y = torch.fft.irfft(both, n=2 * length)[..., :length] + u * self.skip[:, None]
        return self.head(F.gelu(y).mean(-1))


@takes(6, 8)
class MixedByFourier(nn.Module):
    """A transformer whose tokens are mixed by a transform instead of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(2))
        self.wide, self.narrow, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norms[0](x + torch.fft.fft2(x).real)
        return self.head(self.norms[1](x + self.narrow(F.gelu(self.wide(x)))).mean(1))


@takes(5, 8)
class ComplexRotations(nn.Module):
    """Attention whose queries and keys are turned by their positions, as complex numbers that a buffer holds."""

    turns: Tensor

    def __init__(self) -> None:
        super().__init__()
        angles = torch.outer(torch.arange(5.0), 100 ** -(torch.arange(2.0) / 2))
        self.register_buffer("turns", torch.polar(torch.ones_like(angles), angles), persistent=False)
        self.norm, self.qkv, self.out, self.head = nn.RMSNorm(8), nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).view(-1, 5, 3, 2, 4).unbind(2)
        q, k = (torch.view_as_real(torch.view_as_complex(t.unflatten(-1, (2, 2))) * self.turns[:, None]).flatten(-2) for t in (q, k))
        made = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True)
        return self.head(x[:, -1] + self.out(made.transpose(1, 2).flatten(2))[:, -1])


@takes(64)
class Spectrogram(nn.Module):
    """A network of sounds: lengths of short transforms, in decibels."""

    window: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(16))
        self.first, self.head = nn.Conv1d(9, 4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.stft(x, 16, 8, window=self.window, return_complex=True)
        return self.head(self.first((spectrum.abs() ** 2 + 1e-3).log10()).relu().mean(2))
