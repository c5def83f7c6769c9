"""Some fifty networks that the field trains many of, in sizes as it has them: name, how to make one, shape of a query."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wslfast.architecture import Architecture

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {}


def network(name: str, *shape: int) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    def keep(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        NETWORKS[name] = make, shape
        return make

    return keep


@lru_cache(maxsize=64)
def architecture_of_network(name: str) -> Architecture:
    """The network's architecture; the same object every time, as engines cache by it."""
    make, shape = NETWORKS[name]
    return Architecture.from_module(make(), shape, name)


class Residual(nn.Module):
    """x + inner(x), or skip(x) + inner(x), and an activation after it."""

    def __init__(self, inner: nn.Module, skip: nn.Module | None = None, after: nn.Module | None = None) -> None:
        super().__init__()
        self.inner, self.skip, self.after = inner, skip or nn.Identity(), after or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.skip(x) + self.inner(x))  # type: ignore[no-any-return]


class Apply(nn.Module):
    """A function without parameters; ``elementwise``: it does not look at axes."""

    def __init__(self, function: Callable[[Tensor], Tensor], elementwise: bool = False) -> None:
        super().__init__()
        self.function, self.elementwise = function, elementwise

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Sine(nn.Module):
    """sin(30 x)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(30 * x)


def mlp(sizes: Sequence[int], act: Callable[[], nn.Module] = nn.ReLU, norm: Callable[[int], nn.Module] | None = None) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(pairwise(sizes)):
        layers.append(nn.Linear(a, b))
        if i < len(sizes) - 2:
            layers += [*([norm(b)] if norm else []), act()]
    return nn.Sequential(*layers)


def convs(
    widths: Sequence[int], kernel: int, *, pool: bool = True, norm: Callable[[int], nn.Module] | None = None, pad: int = 0
) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Conv2d(a, b, kernel, padding=pad), *([norm(b)] if norm else []), nn.ReLU(), *([nn.MaxPool2d(2)] if pool else [])]
    return layers


def head(width: int, classes: int = 10) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)]


# -- classifiers of images -------------------------------------------------------------------------------------------------


@network("small-cnn-zoo", 1, 28, 28)  # Unterthiner et al. 2020
def small_cnn_zoo() -> nn.Module:
    layers: list[nn.Module] = []
    for a in (1, 16, 16):
        layers += [nn.Conv2d(a, 16, 3, stride=2), nn.ReLU()]
    return nn.Sequential(*layers, *head(16))


@network("cnn3", 3, 32, 32)
def cnn3() -> nn.Module:
    return nn.Sequential(*convs((3, 16, 32, 15), 3), nn.Flatten(), *mlp((60, 20, 10)))


@network("cnn", 1, 28, 28)
def cnn() -> nn.Module:
    return nn.Sequential(*convs((1, 8, 6), 5), nn.Conv2d(6, 4, 2), nn.ReLU(), nn.Flatten(), *mlp((36, 20, 10)))


@network("lenet5", 3, 32, 32)
def lenet5() -> nn.Module:
    return nn.Sequential(*convs((3, 6, 16), 5), nn.Flatten(), *mlp((400, 120, 84, 10)))


@network("cnn-tanh-avgpool", 3, 32, 32)
def cnn_tanh() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 5), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(8, 16, 5), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(400, 10)
    )


@network("cnn-batch-norm", 3, 32, 32)
def cnn_batch_norm() -> nn.Module:
    return nn.Sequential(*convs((3, 16, 32, 32), 3, norm=nn.BatchNorm2d, pad=1), *head(32))


@network("cnn-group-norm", 3, 32, 32)
def cnn_group_norm() -> nn.Module:
    return nn.Sequential(*convs((3, 16, 32, 32), 3, norm=lambda c: nn.GroupNorm(4, c), pad=1), *head(32))


@network("cnn-dropout-log-softmax", 1, 28, 28)  # torch's MNIST example, narrow
def mnist_example() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25), nn.Flatten(), nn.Linear(2304, 32),
        nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 10), nn.LogSoftmax(1),
    )  # fmt: skip


@network("vgg-small", 3, 32, 32)
def vgg() -> nn.Module:
    layers: list[nn.Module] = []
    for a, b in ((3, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.Conv2d(b, b, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, *head(64))


@network("cnn-wide", 3, 32, 32)
def cnn_wide() -> nn.Module:
    return nn.Sequential(*convs((3, 64, 64, 64), 3), *head(64))


def _block(a: int, b: int, stride: int = 1, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> nn.Module:
    inner = nn.Sequential(nn.Conv2d(a, b, 3, stride, 1, bias=False), norm(b), nn.ReLU(), nn.Conv2d(b, b, 3, 1, 1, bias=False), norm(b))
    skip = None if a == b and stride == 1 else nn.Sequential(nn.Conv2d(a, b, 1, stride, bias=False), norm(b))
    return Residual(inner, skip, nn.ReLU())


@network("resnet8", 3, 32, 32)
def resnet8() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        _block(16, 16),
        _block(16, 32, 2),
        _block(32, 64, 2),
        *head(64),
    )


@network("resnet8-group-norm", 3, 32, 32)
def resnet8_group_norm() -> nn.Module:
    def norm(channels: int) -> nn.Module:
        return nn.GroupNorm(4, channels)

    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), _block(16, 16, 1, norm), _block(16, 32, 2, norm), *head(32))


@network("resnet18-width-8", 3, 32, 32)
def resnet18() -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    for a, b, stride in ((8, 8, 1), (8, 16, 2), (16, 32, 2), (32, 64, 2)):
        layers += [_block(a, b, stride), _block(b, b)]
    return nn.Sequential(*layers, *head(64))


@network("preactivation", 3, 32, 32)
def preactivation() -> nn.Module:
    def block(c: int) -> nn.Module:
        return Residual(
            nn.Sequential(
                nn.BatchNorm2d(c), nn.ReLU(), nn.Conv2d(c, c, 3, padding=1), nn.BatchNorm2d(c), nn.ReLU(), nn.Conv2d(c, c, 3, padding=1)
            )
        )

    return nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), block(16), block(16), nn.BatchNorm2d(16), nn.ReLU(), *head(16))


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.out = nn.Conv2d(3, 16, 3, 2, 1), nn.Linear(48, 10)
        self.layers = nn.ModuleList(nn.Sequential(nn.BatchNorm2d(c), nn.ReLU(), nn.Conv2d(c, 8, 3, padding=1)) for c in (16, 24, 32, 40))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = torch.cat((x, layer(x)), 1)
        return self.out(x.mean((2, 3)))  # type: ignore[no-any-return]


network("densenet", 3, 32, 32)(Dense)


@network("mobilenet", 3, 32, 32)
def mobilenet() -> nn.Module:
    def block(a: int, b: int, stride: int) -> list[nn.Module]:
        return [
            nn.Conv2d(a, a, 3, stride, 1, groups=a, bias=False),
            nn.BatchNorm2d(a),
            nn.ReLU6(),
            nn.Conv2d(a, b, 1, bias=False),
            nn.BatchNorm2d(b),
            nn.ReLU6(),
        ]

    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6(), *block(16, 32, 1), *block(32, 64, 2), *head(64)
    )


@network("convmixer", 3, 32, 32)
def convmixer() -> nn.Module:
    def block() -> list[nn.Module]:
        mixed = nn.Sequential(nn.Conv2d(24, 24, 5, groups=24, padding=2), nn.GELU(), nn.BatchNorm2d(24))
        return [Residual(mixed), nn.Conv2d(24, 24, 1), nn.GELU(), nn.BatchNorm2d(24)]

    return nn.Sequential(nn.Conv2d(3, 24, 4, 4), nn.GELU(), nn.BatchNorm2d(24), *block(), *block(), *head(24))


class ChannelNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@network("convnext", 3, 32, 32)
def convnext() -> nn.Module:
    def block() -> nn.Module:
        return Residual(
            nn.Sequential(
                nn.Conv2d(24, 24, 7, padding=3, groups=24), ChannelNorm(24), nn.Conv2d(24, 48, 1), nn.GELU(), nn.Conv2d(48, 24, 1)
            )
        )

    return nn.Sequential(nn.Conv2d(3, 24, 4, 4), ChannelNorm(24), block(), block(), *head(24))


@network("atari-policy", 4, 42, 42)  # Mnih et al. 2015, at half the size
def atari() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 16, 8, 4), nn.ReLU(), nn.Conv2d(16, 32, 4, 2), nn.ReLU(), nn.Flatten(), *mlp((288, 128, 6)))


class Dueling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(4, 16, 5, 2), nn.ReLU(), nn.Conv2d(16, 16, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(576, 32), nn.ReLU()
        )
        self.value, self.advantage = nn.Linear(32, 1), nn.Linear(32, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        a = self.advantage(h)
        return self.value(h) + a - a.mean(1, keepdim=True)  # type: ignore[no-any-return]


network("dueling-policy", 4, 30, 30)(Dueling)


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.middle = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
        self.up, self.out = nn.ConvTranspose2d(16, 8, 2, 2), nn.Conv2d(16, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.down(x).relu()
        return self.out(torch.cat((h, self.up(self.middle(F.max_pool2d(h, 2)).relu())), 1))  # type: ignore[no-any-return]


network("unet", 1, 24, 24)(UNet)


@network("convolutional-autoencoder", 1, 28, 28)
def conv_autoencoder() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 4, 3, 2, 1), nn.ReLU(), nn.ConvTranspose2d(4, 8, 2, 2), nn.ReLU(),
        nn.ConvTranspose2d(8, 1, 2, 2), nn.Sigmoid(),
    )  # fmt: skip


@network("conv1d-signals", 2, 128)
def signals() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 16, 7, 2), nn.BatchNorm1d(16), nn.ReLU(), nn.Conv1d(16, 32, 5, 2), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(),
        nn.Linear(32, 5),
    )  # fmt: skip


@network("temporal-convolutions", 4, 64)
def temporal() -> nn.Module:
    def block(d: int) -> nn.Module:
        return Residual(nn.Sequential(nn.ConstantPad1d((2 * d, 0), 0.0), nn.Conv1d(16, 16, 3, dilation=d), nn.ReLU()))

    return nn.Sequential(nn.Conv1d(4, 16, 1), block(1), block(2), block(4), Apply(lambda x: x[..., -1]), nn.Linear(16, 3))


# -- implicit neural representations -----------------------------------------------------------------------------------------


@network("siren-32", 2)  # of the zoos of DWSNets (Navon et al. 2023)
def siren() -> nn.Module:
    return mlp((2, 32, 32, 1), Sine)


@network("siren-64-colour", 2)
def siren_colour() -> nn.Module:
    return mlp((2, 64, 64, 64, 3), Sine)


class Fourier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", 10 * torch.randn(2, 16))
        self.layers = mlp((32, 32, 32, 3))

    def forward(self, x: Tensor) -> Tensor:
        angles = 2 * math.pi * x @ self.frequencies
        return self.layers(torch.cat((angles.sin(), angles.cos()), -1))  # type: ignore[no-any-return]


network("fourier-features", 2)(Fourier)


class Radiance(nn.Module):
    """Positional encoding, a skip to the middle (Mildenhall et al. 2020), narrow."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = mlp((27, 32, 32)), mlp((59, 32, 32)), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        waves = [f(2.0**i * x) for i in range(4) for f in (torch.sin, torch.cos)]
        p = torch.cat((x, *waves), -1)
        return self.out(self.second(torch.cat((p, self.first(p).relu()), -1)).relu())  # type: ignore[no-any-return]


network("radiance-field", 3)(Radiance)


@network("gaussian-activations", 2)
def gaussians() -> nn.Module:
    return mlp((2, 32, 32, 3), lambda: Apply(lambda x: torch.exp(-50 * x.square()), True))


@network("signed-distance", 3)
def signed_distance() -> nn.Module:
    return mlp((3, 64, 64, 64, 1), lambda: nn.Softplus(100))


# -- vectors -----------------------------------------------------------------------------------------------------------------


@network("mlp-mnist", 784)
def mlp_mnist() -> nn.Module:
    return mlp((784, 64, 64, 10))


network("mlp-mnist-wide", 784)(lambda: mlp((784, 256, 128, 10)))
network("mlp-mnist-wide-batch-norm", 784)(lambda: mlp((784, 128, 128, 10), norm=nn.BatchNorm1d))


@network("mlp-tiny", 2)
def mlp_tiny() -> nn.Module:
    return mlp((2, 16, 16, 1), nn.Tanh)


@network("mujoco-policy", 17)
def mujoco() -> nn.Module:
    return mlp((17, 64, 64, 6), nn.Tanh)


@network("critic", 23)
def critic() -> nn.Module:
    return mlp((23, 256, 256, 1))


@network("mlp-batch-norm", 64)
def mlp_batch_norm() -> nn.Module:
    return mlp((64, 32, 32, 10), norm=nn.BatchNorm1d)


@network("mlp-residual", 32)
def mlp_residual() -> nn.Module:
    def block() -> nn.Module:
        return Residual(nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)))

    return nn.Sequential(block(), block(), nn.LayerNorm(32), nn.Linear(32, 10))


@network("mlp-autoencoder", 64)
def mlp_autoencoder() -> nn.Module:
    return mlp((64, 32, 8, 32, 64), nn.SiLU)


class Coupling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList(mlp((4, 32, 8)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        for net in self.nets:
            scale, shift = net(a).chunk(2, -1)
            a, b = b * torch.exp(scale.tanh()) + shift, a
        return torch.cat((a, b), -1)


network("coupling-flow", 8)(Coupling)


# -- sets and sequences --------------------------------------------------------------------------------------------------------


@network("deep-sets", 32, 3)
def deep_sets() -> nn.Module:
    return nn.Sequential(mlp((3, 32, 32)), nn.ReLU(), Apply(lambda x: x.amax(1)), mlp((32, 32, 10)))


class Scaled(nn.Module):
    """A branch whose channels are weighed by what it makes of its images' means (squeeze and excitation)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Conv2d(channels, channels, 3, 1, 1), nn.ReLU(), nn.Conv2d(channels, channels, 3, 1, 1))
        self.factor = nn.Sequential(mlp((channels, channels // 4, channels)), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        made = self.branch(x)
        return F.relu(x + made * self.factor(made.mean((2, 3)))[:, :, None, None])


@network("squeeze-and-excitation", 3, 32, 32)
def squeeze_and_excitation() -> nn.Module:
    pooled = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    return nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), Scaled(16), Scaled(16), *pooled)


class ConvLstm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gates, self.out, self.width = nn.Conv2d(1 + width, 4 * width, 3, 1, 1), nn.Linear(width, 3), width

    def forward(self, x: Tensor) -> Tensor:
        state = cell = x.new_zeros(len(x), self.width, *x.shape[2:])
        for t in range(x.shape[1]):
            enter, keep, leave, new = self.gates(torch.cat((x[:, t : t + 1], state), 1)).chunk(4, 1)
            cell = torch.sigmoid(keep) * cell + torch.sigmoid(enter) * torch.tanh(new)
            state = torch.sigmoid(leave) * torch.tanh(cell)
        return self.out(state.mean((2, 3)))  # type: ignore[no-any-return]


network("conv-lstm", 4, 12, 12)(lambda: ConvLstm(8))


class Spectral(nn.Module):
    """Products of the lowest frequencies of images, beside a product of pixels (a layer of a Fourier neural operator)."""

    def __init__(self, width: int, modes: int) -> None:
        super().__init__()
        self.low = nn.Parameter(torch.randn(width, width, modes, modes, 2) / width)
        self.local, self.modes = nn.Conv2d(width, width, 1), modes

    def forward(self, x: Tensor) -> Tensor:
        m, spectrum = self.modes, torch.fft.rfft2(x)
        made = torch.zeros_like(spectrum)
        made[:, :, :m, :m] = torch.einsum("bixy,ioxy->boxy", spectrum[:, :, :m, :m], torch.view_as_complex(self.low))
        return F.gelu(torch.fft.irfft2(made, s=x.shape[2:]) + self.local(x))


@network("fourier-operator", 1, 16, 16)
def fourier_operator() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 8, 1), Spectral(8, 4), Spectral(8, 4), nn.Conv2d(8, 1, 1))


class StateSpaces(nn.Module):
    """Diagonal state spaces, as convolutions with kernels as long as the sequence."""

    def __init__(self, width: int, states: int) -> None:
        super().__init__()
        self.decay, self.step = nn.Parameter(torch.randn(width, states) * 0.1), nn.Parameter(torch.rand(width) - 3)
        self.turn = nn.Parameter(math.pi * torch.arange(float(states)).repeat(width, 1))
        self.size, self.skip = nn.Parameter(torch.randn(width, states, 2)), nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        u, length = x.transpose(1, 2), x.shape[1]
        rate = torch.complex(-self.decay.exp(), self.turn) * self.step.exp()[:, None]
        size = torch.view_as_complex(self.size) * (rate.exp() - 1) / rate
        kernel = 2 * torch.einsum("hn,hnl->hl", size, (rate[..., None] * torch.arange(length)).exp()).real
        both = torch.fft.rfft(u, n=2 * length) * torch.fft.rfft(kernel, n=2 * length)
        return F.gelu(torch.fft.irfft(both, n=2 * length)[..., :length] + u * self.skip[:, None])


network("state-spaces", 32, 2)(lambda: nn.Sequential(nn.Linear(2, 8), StateSpaces(8, 4), Apply(lambda x: x.mean(-1)), nn.Linear(8, 3)))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.inside, self.out, self.heads, self.causal = nn.Linear(width, 3 * width), nn.Linear(width, width), heads, causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.inside(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def _layer(width: int, causal: bool = False) -> nn.Module:
    attention = Residual(nn.Sequential(nn.LayerNorm(width), Attention(width, 4, causal)))
    return nn.Sequential(
        attention, Residual(nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)))
    )


class Positions(nn.Module):
    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(0.02 * torch.randn(count, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table


@network("vision-transformer", 3, 32, 32)
def vision_transformer() -> nn.Module:
    patches = nn.Sequential(nn.Conv2d(3, 32, 8, 8), nn.Flatten(2), Apply(lambda x: x.transpose(1, 2)), Positions(16, 32))
    return nn.Sequential(patches, _layer(32), _layer(32), nn.LayerNorm(32), Apply(lambda x: x.mean(1)), nn.Linear(32, 10))


@network("language-model", 16)  # queries of normal numbers, as whole ones
def language_model() -> nn.Module:
    whole = Apply(lambda x: (x.abs() * 8).long().clamp(max=31))
    return nn.Sequential(whole, nn.Embedding(32, 32), Positions(16, 32), _layer(32, True), nn.LayerNorm(32), nn.Linear(32, 32))


@network("mlp-mixer", 3, 32, 32)
def mixer() -> nn.Module:
    def along(width: int) -> nn.Module:
        return mlp((width, 32, width), nn.GELU)

    turn = Apply(lambda x: x.transpose(1, 2))
    tokens = Residual(nn.Sequential(nn.LayerNorm(24), turn, along(16), turn))
    channels = Residual(nn.Sequential(nn.LayerNorm(24), along(24)))
    return nn.Sequential(nn.Conv2d(3, 24, 8, 8), nn.Flatten(2), turn, tokens, channels, Apply(lambda x: x.mean(1)), nn.Linear(24, 10))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.cells, self.out = kind(8, 32, batch_first=True), nn.Linear(32, 5)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.cells(x)[0][:, -1])  # type: ignore[no-any-return]


network("lstm", 20, 8)(lambda: Recurrent(nn.LSTM))
network("gru", 20, 8)(lambda: Recurrent(nn.GRU))
