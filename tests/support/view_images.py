"""Networks of images, small, as people write them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Basic(nn.Module):
    def __init__(self, channels: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.short = (
            nn.Sequential()
            if stride == 1 and channels == out
            else nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.short(x) + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class PadShortcut(nn.Module):
    """The CIFAR ResNet's parameter-free shortcut: every second pixel, channels of zeros around."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.fc = (
            nn.Conv2d(3, 4, 3, padding=1),
            nn.Conv2d(4, 8, 3, 2, 1),
            nn.Conv2d(8, 8, 3, 1, 1),
            nn.Linear(8, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.b(F.relu(self.a(x))) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)))
        return self.fc(F.avg_pool2d(x, x.shape[3]).view(x.shape[0], -1))


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(4 + 3 * i), nn.ReLU(), nn.Conv2d(4 + 3 * i, 3, 3, padding=1)) for i in range(3)
        )
        self.norm, self.fc = nn.BatchNorm2d(13), nn.Linear(13, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return self.fc(F.adaptive_avg_pool2d(F.relu(self.norm(x)), 1).flatten(1))


class Inverted(nn.Module):
    def __init__(self, channels: int, wide: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
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
        self.body = nn.Sequential(
            nn.ConvTranspose2d(6, 8, 3, 2, 1, output_padding=1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.ConvTranspose2d(8, 4, 2, 2, groups=2), nn.LeakyReLU(0.2), nn.ConvTranspose2d(4, 3, 1), nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, z: Tensor) -> Tensor:
        return self.body(F.relu(self.fc(z)).view(-1, 6, 2, 2))


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, 6, 4, 4)
        self.tokens, self.channels = (
            nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 4)),
            nn.Sequential(nn.Linear(6, 7), nn.GELU(), nn.Linear(7, 6)),
        )
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


class Fourier(nn.Module):
    """A filter along the features, whose neighbours therefore stay neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.filter, self.b = nn.Linear(4, 8), nn.Conv1d(1, 2, 3), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.filter(self.a(x).unsqueeze(1))).flatten(1))
