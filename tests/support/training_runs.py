"""A tiny network, its configuration of training, and what two runs are compared by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wslfast import Architecture, TrainConfig
from wslfast.kernels.layers import Activation, Conv2d, Flatten, Linear, Pool2d

ARCH = Architecture.from_layers(
    (Conv2d("0", 1, 4, (3, 3)), Pool2d("1"), Activation("2"), Flatten("3"), Linear("4", 36, 6), Activation("5"), Linear("6", 6, 3)),
    (1, 8, 8),
    "tiny",
)


def config(out: Path, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "zoo": "unused",
        "out": str(out),
        "steps": 12,
        "batch_size": 6,
        "queries": 8,
        "d_model": 16,
        "heads": 2,
        "layers": 1,
        "latent": 8,
        "checkpoint_every": 4,
        "log_every": 3,
        "seed": 3,
    }
    return TrainConfig(**(values | changes))


def records(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k != "models_per_s"} for r in lines]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
