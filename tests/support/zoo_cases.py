"""A small zoo, and damage to its files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from wslfast.architecture import Architecture
from wslfast.population import Population
from wslfast.zoo import Split, save_zoo
from wslfast.zoo.manifest import Manifest

ARCH = Architecture.mlp(5, (4,), 3)


def make(models: int = 7, epochs: int = 3, seed: int = 0, architecture: Architecture = ARCH) -> Population:
    generator = torch.Generator().manual_seed(seed)
    k = models * epochs
    weights = torch.randn(k, architecture.num_weights, generator=generator)
    accuracy = torch.rand(k, 2, generator=generator, dtype=torch.float64)
    return Population(
        architecture,
        weights,
        {
            "model": [j for j in range(models) for _ in range(epochs)],
            "epoch": [e for _ in range(models) for e in range(1, epochs + 1)],
            "train_acc": accuracy[:, 0].tolist(),
            "test_acc": accuracy[:, 1].tolist(),
            "ggap": (accuracy[:, 0] - accuracy[:, 1]).tolist(),
            "init_type": ["kaiming_uniform"] * k,
            "lr": [1e-05] * k,
            "note": [None, True, "é\n"] * (k // 3) + [None] * (k % 3),
        },
    )


def save(population: Population, path: Path, **options: Any) -> Manifest:
    return save_zoo(population, path, **{"splits": Split(seed=3), "provenance": {"dataset": "made up"}, **options})


def same(a: Population, b: Population) -> bool:
    return torch.equal(a.weights, b.weights) and dict(a.properties) == dict(b.properties) and a.architecture == b.architecture


def names(path: Path) -> list[str]:
    return sorted(os.listdir(path))


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
