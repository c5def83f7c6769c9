"""The networks of the field's other zoos, as plain modules under the key names of their files; the importers trace them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...architecture import Architecture
from ...errors import WslfastError, present, require
from ...tracing.rebuilt import owner_of

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "selu": F.selu, "elu": F.elu, "gelu": F.gelu, "silu": F.silu,
    "swish": F.silu, "leakyrelu": F.leaky_relu, "none": lambda x: x, "linear": lambda x: x,
}  # fmt: skip


def function(name: Any) -> Callable[[Tensor], Tensor]:
    """An activation by the name that a configuration has for it. Raises WslfastError for one that is not known."""
    function = _FUNCTIONS.get(str(name).replace("_", "").lower())
    return present(function, f"activation: expected one of {sorted(_FUNCTIONS)}, got {name!r:.40}")


class SmallCNN(nn.Module):
    """The network of the Small CNN Zoo (Unterthiner et al. 2020): 3x3 convolutions with stride 2, a global average, one dense layer."""

    def __init__(self, widths: Sequence[int], classes: int, activation: str, padding: str) -> None:
        super().__init__()
        self.act, self.padding = function(activation), padding
        self.conv = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2) for a, b in pairwise(widths))
        self.dense = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.conv:
            if self.padding == "same":  # TensorFlow's: what is odd goes to the right and below
                right, below = (_same(size) for size in (x.shape[-1], x.shape[-2]))
                x = F.pad(x, (right // 2, right - right // 2, below // 2, below - below // 2))
            x = self.act(conv(x))
        return self.dense(x.mean((-2, -1)))


def _same(size: int) -> int:
    """Number of zeros to pad an axis with, both sides together, so that a kernel of 3 with stride 2 gives ceil(size / 2) outputs."""
    return max((-(-size // 2) - 1) * 2 + 3 - size, 0)


class Inr(nn.Module):
    """An implicit representation: linear layers under given names, sin(omega x) after all of them or all but the last, then an offset."""

    def __init__(self, names: Sequence[str], sizes: Sequence[int], omega: float, offset: float, last_sine: bool) -> None:
        super().__init__()
        self.omega, self.offset, self.names, self.last_sine = omega, offset, tuple(names), last_sine
        for name, (a, b) in zip(names, pairwise(sizes), strict=True):
            owner, leaf = owner_of(self, name)
            owner.add_module(leaf, nn.Linear(a, b))

    def forward(self, x: Tensor) -> Tensor:
        for i, name in enumerate(self.names):
            x = self.get_submodule(name)(x)
            if i + 1 < len(self.names) or self.last_sine:
                x = torch.sin(self.omega * x)
        return x + self.offset if self.offset else x


class ParkCNN(nn.Module):
    """A network of the CNN Wild Park (Kofinas et al. 2024): convolutions, each with its activation, the first channels of some joined by
    those of an earlier one; a global average and one linear layer."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.channels, self.residual = config["channels"], config["residual"]
        self.acts = [function(name) for name in config["activation"]]
        sizes = zip(config["kernel_size"], config["stride"], config["padding"], strict=True)
        pairs = zip(pairwise(self.channels), sizes, strict=True)
        self.layers = nn.ModuleList(nn.Conv2d(a, b, kernel, stride, padding) for (a, b), (kernel, stride, padding) in pairs)
        self.fc = nn.Linear(self.channels[-1], config["n_classes"])

    def forward(self, x: Tensor) -> Tensor:
        kept: dict[int, Tensor] = {}
        for i, (layer, act) in enumerate(zip(self.layers, self.acts, strict=True)):
            x = layer(x)
            source = self.residual[i]
            if source > -1:
                shared = min(self.channels[source + 1], self.channels[i + 1])
                x = torch.cat([x[:, :shared] + kept[source][:, :shared], x[:, shared:]], 1)
            x = act(x)
            kept[i] = x
        return self.fc(x.mean((-2, -1)))


class SlimBlock(nn.Module):
    """A block of WeightCLIP's slim ResNet-18: the shortcut has keys of its own where sizes change."""

    def __init__(self, channels: int, out: int, stride: int, activation: str) -> None:
        super().__init__()
        self.act = function(activation)
        self.conv1, self.bn1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.bn1(self.conv1(x)))
        return self.act(self.bn2(self.conv2(h)) + self.shortcut(x))


class SlimResNet(nn.Module):
    """WeightCLIP's ``ResNet18Slim`` for 32x32 images: four stages of two blocks, any widths, classes and activation."""

    def __init__(self, channels_in: int, widths: Sequence[int], classes: int, activation: str) -> None:
        super().__init__()
        self.act = function(activation)
        self.conv1, self.bn1 = nn.Conv2d(channels_in, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0])
        for stage, (a, b) in enumerate(pairwise((widths[0], *widths)), 1):
            stride = 1 if stage == 1 else 2
            self.add_module(f"layer{stage}", nn.Sequential(SlimBlock(a, b, stride, activation), SlimBlock(b, b, 1, activation)))
        self.fc = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn1(self.conv1(x)))
        for stage in range(1, 5):
            x = self.get_submodule(f"layer{stage}")(x)
        return self.fc(x.mean((-2, -1)))


# -- traced, once each ---------------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def small_cnn(widths: tuple[int, ...], classes: int, activation: str, padding: str, side: int) -> Architecture:
    """The Small CNN Zoo's network for images ``[widths[0], side, side]``."""
    return Architecture.from_module(SmallCNN(widths, classes, activation, padding), (widths[0], side, side), "small_cnn")


@lru_cache(maxsize=64)
def inr(names: tuple[str, ...], sizes: tuple[int, ...], omega: float, offset: float, last_sine: bool) -> Architecture:
    """An implicit representation with linear layers of these names and sizes."""
    return Architecture.from_module(Inr(names, sizes, omega, offset, last_sine), (sizes[0],), "siren")


@lru_cache(maxsize=16)
def slim_resnet(channels_in: int, widths: tuple[int, ...], classes: int, activation: str) -> Architecture:
    """WeightCLIP's slim ResNet-18."""
    return Architecture.from_module(SlimResNet(channels_in, widths, classes, activation), (channels_in, 32, 32), "resnet18slim")


def park_cnn(config: Any) -> Architecture:
    """The network of a Wild Park checkpoint, from its ``config``. Raises WslfastError for a configuration that is none."""
    require(isinstance(config, dict), "a Wild Park configuration: expected an object")
    lists = ("channels", "kernel_size", "stride", "padding", "residual", "activation")
    missing = [name for name in (*lists, "n_classes") if name not in config]
    require(not missing, f"a Wild Park configuration without {missing}")
    whole = all(isinstance(config[name], list) and 0 < len(config[name]) <= 64 for name in lists)
    number = all(type(v) is int and -1 <= v <= 4096 for name in lists[:-1] for v in (config[name] if whole else ()))
    require(
        whole and number and type(config["n_classes"]) is int and 0 < config["n_classes"] <= 10_000,
        "a Wild Park configuration of odd values",
    )
    frozen = tuple((name, tuple(config[name])) for name in lists)
    return _park_cnn((*frozen, ("n_classes", config["n_classes"])))


@lru_cache(maxsize=4096)
def _park_cnn(config: tuple[tuple[str, Any], ...]) -> Architecture:
    given = dict(config)
    try:
        return Architecture.from_module(ParkCNN(given), (given["channels"][0], 32, 32), "park_cnn")
    except (ValueError, KeyError, IndexError, RuntimeError) as error:
        raise WslfastError(f"a Wild Park configuration that makes no network: {error}") from None
