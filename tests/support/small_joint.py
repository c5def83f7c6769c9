"""A small network with models, images and a joint code of it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from wslfast import Architecture, Population, batched_behavioral_loss
from wslfast.codes.joint import JointCodec
from wslfast.kernels.layers import Activation, Conv2d, Flatten, Linear, Pool2d

LAYERS = (
    Conv2d("a", 1, 3, (3, 3)), Pool2d("p"), Activation("r", "leakyrelu", 0.3), Conv2d("b", 3, 4, (2, 2), bias=False),
    Activation("s", "leakyrelu", 0.3), Flatten("f"), Linear("c", 36, 5), Activation("t", "leakyrelu", 0.3), Linear("d", 5, 3),
)  # fmt: skip
ARCH = Architecture.from_layers(LAYERS, (1, 10, 10), "small")


def models(k: int, seed: int = 0) -> Population:
    return Population(ARCH, ARCH.initial_weights(["kaiming_uniform"] * k, [seed * 100 + j for j in range(k)]))


def images(n: int, seed: int = 1) -> Tensor:
    return F.interpolate(torch.randn(n, 1, 4, 4, generator=torch.Generator().manual_seed(seed)), (10, 10), mode="bilinear")


def fitted(**changes: object) -> JointCodec:
    return JointCodec(models(40), **{"queries": images(48), "latent": 0.4, "joint": 0.25, "models": 8, **changes})  # type: ignore[arg-type]


def distance(weights: Tensor, others: Tensor, seen: Tensor) -> Tensor:
    return batched_behavioral_loss(others, weights, seen, ARCH, reduction="none")
