"""A file of networks that somebody wrote, modules of it, and images for them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

NET = '''
import torch.nn.functional as F
from torch import nn

class Net(nn.Module):
    """Batch norm and a residual."""

    def __init__(self, classes=3):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.inner, self.fc = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, classes)

    def forward(self, x):
        x = F.relu(self.bn(self.conv(x)))
        return self.fc((x + self.inner(x)).mean((2, 3)))

class Tanh(Net):
    def forward(self, x):
        x = self.bn(self.conv(x)).tanh()
        return self.fc((x + self.inner(x)).mean((2, 3)))

def wide():
    return Net(5)

class Needs(nn.Module):
    def __init__(self, width):
        super().__init__()

number = 3
'''


SHAPE = (1, 6, 6)


def module(name: str = "Net") -> nn.Module:
    """One of the modules of NET with weights of its own, running statistics that are not the initial ones, in training mode."""
    names: dict[str, Any] = {"__name__": "net"}
    exec(NET, names)
    made = names[name]()
    with torch.no_grad():
        made(torch.randn(32, *SHAPE) * 2 + 1)
    return made


def images(folder: Path, labels: bool = True) -> Path:
    """A file with its owner's split: 24, 8 and 16 images."""
    rng, arrays = np.random.default_rng(0), {}
    for split, n in (("train", 24), ("val", 8), ("test", 16)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (n, 6, 6), dtype=np.uint8)
        if labels:
            arrays[f"{split}_labels"] = np.arange(n) % 3
    np.savez(folder / "images.npz", **arrays)  # type: ignore[arg-type]
    return folder / "images.npz"


def own_answers(modules: list[nn.Module], x: Tensor) -> Tensor:
    """The oracle: each module by itself, in evaluation mode."""
    with torch.no_grad():
        return torch.stack([copy.deepcopy(m).eval()(x) for m in modules])
