"""A small population, and the settings of its trials, as published zoos are laid out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from wslfast import Architecture, Population

ARCH = Architecture.cnn()


def population(k: int = 6, epochs: tuple[int, ...] = (0, 2, 5), arch: Architecture = ARCH) -> Population:
    rows = [(m, e) for m in range(k) for e in epochs]
    weights = arch.initial_weights(["kaiming_uniform"] * len(rows), range(len(rows)))
    accuracy = tuple(0.1 + 0.01 * i for i in range(len(rows)))
    table: dict[str, tuple[Any, ...]] = {
        "model": tuple(m for m, _ in rows),
        "epoch": tuple(e for _, e in rows),
        "train_acc": accuracy,
        "test_acc": tuple(a / 2 for a in accuracy),
        "ggap": tuple(a - a / 2 for a in accuracy),
        "init_type": ("uniform",) * len(rows),
        "lr": (1e-3,) * len(rows),
        "wd": (0.0,) * len(rows),
        "seed": tuple(m for m, _ in rows),
    }
    return Population(arch, weights, table)


def restate(trial: Path, **settings: Any) -> None:
    """Change a trial's settings; None takes one away."""
    config = json.loads((trial / "params.json").read_text()) | settings
    (trial / "params.json").write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
