"""What is measured: networks, populations, queries, and the precision that all providers run under."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, lru_cache, partial
from math import prod

import torch
from torch import Tensor

from wslfast import engine
from wslfast.architecture import Architecture
from wslfast.kernels.cpu.program import compile_program
from wslfast.kernels.layers import Activation, Conv2d, Flatten, Layer, Layers, Linear, Pool2d, shapes
from wslfast.testing import oracle_loss, oracle_outputs

CRITERION = "softmax_mse"  # the published code's l2
PRECISIONS = ("highest", "tf32", "fp16", "bf16")
_HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def _wide(factor: int) -> Architecture:
    """CNN3 with ``factor`` times as many channels and hidden units."""
    channels = [3, *(factor * c for c in (16, 32, 15))]
    layers: list[Layer] = []
    for i in range(3):
        layers += [
            Conv2d(f"conv{i}", channels[i], channels[i + 1], (3, 3)),
            Pool2d(f"pool{i}"),
            Activation(f"relu{i}", "relu"),
        ]
    layers += [Flatten("flatten"), Linear("hidden", 60 * factor, 20 * factor), Activation("relu3", "relu")]
    return Architecture.from_layers([*layers, Linear("out", 20 * factor, 10)], (3, 32, 32), f"cnn3x{factor}")


ARCHITECTURES: dict[str, Callable[[], Architecture]] = {
    "cnn3": lambda: Architecture.cnn3(channels_in=3, activation="relu"),
    "cnn": lambda: Architecture.cnn(channels_in=1, activation="relu"),
    "lenet5": lambda: Architecture.lenet5(channels_in=3, activation="relu"),
}
WIDTHS: dict[str, Callable[[], Architecture]] = {f"cnn3x{factor}": partial(_wide, factor) for factor in (1, 2, 4)}


@lru_cache(maxsize=16)
def architecture_of(name: str) -> Architecture:
    """A network of this suite by name; the same object every time, as engines cache by it."""
    return {**ARCHITECTURES, **WIDTHS}[name]()


@lru_cache(maxsize=4)
def models(architecture: Architecture, k: int, seed: int) -> Tensor:
    """``[k, P]``: a zoo's initialisations, by turns. Beyond 256 models they repeat (drawing thousands takes longer than timing them)."""
    names, drawn = ["kaiming_uniform", "kaiming_normal", "xavier_uniform"], min(k, 256)
    rows = architecture.initial_weights([names[j % 3] for j in range(drawn)], range(seed, seed + drawn))
    return rows.repeat(-(-k // drawn), 1)[:k]


class Case:
    """One draw of reconstructions ``weights`` and originals ``[k, P]``, queries ``[n, C, H, W]``, the originals' outputs ``targets
    [k, n, K]``, and what float64 says of three of the models."""

    def __init__(self, architecture: Architecture, k: int, n: int, device: str = "cpu", seed: int = 1) -> None:
        self.architecture = architecture
        generator = torch.Generator(device).manual_seed(seed)
        base = models(architecture, k, 0).to(device)
        self.weights, self.original = (base * (1 + 0.1 * torch.randn(base.shape, generator=generator, device=device)) for _ in range(2))
        self.queries = torch.randn(n, *architecture.input_shape, generator=generator, device=device)
        self.rows = sorted({0, k // 2, k - 1})

    @cached_property
    def targets(self) -> Tensor:
        with numerics("highest", self.queries.device.type), torch.no_grad():
            return engine.forward(self.original, self.queries, self.architecture, backend="torch")

    def slice(self, start: int, stop: int) -> Case:
        """The same draw for some of the models."""
        part = copy.copy(self)
        part.weights, part.original, part.targets = (t[start:stop] for t in (self.weights, self.original, self.targets))
        return part

    @cached_property
    def outputs(self) -> Tensor:
        """float64 outputs of ``weights[rows]``."""
        return oracle_outputs(self.weights[self.rows], self.queries, self.architecture)

    @cached_property
    def truth(self) -> tuple[Tensor, Tensor]:
        """float64 losses and gradient of ``weights[rows]``."""
        targets = oracle_outputs(self.original[self.rows], self.queries, self.architecture)
        return oracle_loss(self.weights[self.rows], self.queries, targets, self.architecture, CRITERION)


def draws(architecture: Architecture, k: int, n: int, device: str = "cpu") -> Iterator[Case]:
    """Fresh cases without end."""
    seed = 1
    while True:
        yield Case(architecture, k, n, device, seed)
        seed += 1


@contextmanager
def numerics(precision: str, device: str = "cpu") -> Iterator[None]:
    """``highest`` and ``tf32``: torch's float32 settings, cuDNN's included; ``fp16`` and ``bf16``: autocast over those of tf32."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest" if precision == "highest" else "high")
    torch.backends.cudnn.allow_tf32 = precision != "highest"
    try:
        with torch.autocast(device, _HALVES.get(precision, torch.bfloat16), enabled=precision in _HALVES):
            yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


# -- the work that cannot be avoided ---------------------------------------------------------------------------------------


def multiply_adds(layers: Layers, input_shape: tuple[int, ...]) -> int:
    """Dense multiply-adds of one forward pass of one model on one query."""
    sizes = zip(layers, shapes(layers, input_shape)[1:], strict=False)
    return sum(prod(shape) * prod(layer.weight_shape[1:]) for layer, shape in sizes if isinstance(layer, (Conv2d, Linear)))


@lru_cache(maxsize=64)
def needed_flops(architecture: Architecture, direction: str, recomputed: bool = False) -> int:
    """Floating-point operations of one model on one query (a multiply-add counts twice), pixels that no output depends on left out.

    Loss and gradient: forward, weight gradient and input gradient of every layer but the first, which needs none; with targets
    recomputed, the originals' forward pass as well.
    """
    crop = compile_program(architecture.layers, architecture.input_shape, False).crop
    forward = multiply_adds(architecture.layers, crop)
    if direction == "forward":
        return 2 * forward
    sizes = shapes(architecture.layers, crop)[1:]
    layers = zip(architecture.layers, sizes, strict=False)
    first = next(prod(s) * prod(layer.weight_shape[1:]) for layer, s in layers if isinstance(layer, (Conv2d, Linear)))
    return 2 * (3 * forward - first + (forward if recomputed else 0))


def needed_bytes(architecture: Architecture, k: int, n: int, direction: str, recomputed: bool = False) -> int:
    """Bytes of float32 arguments and results, each moved once."""
    images, outputs = n * prod(architecture.input_shape), k * n * architecture.num_classes
    if direction == "forward":
        return 4 * (k * architecture.num_weights + images + outputs)
    return 4 * ((3 if recomputed else 2) * k * architecture.num_weights + images + k + (0 if recomputed else outputs))
