"""Random networks of linear layers, norms, products and of everything that moves features about: a test draws the numbers they are made of."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (4, 6, 8, 12)


class RandomNetwork(nn.Module):
    """Values ``[n, features]`` or ``[n, groups, features]``, each made of earlier ones by an operation drawn from a seed."""

    def __init__(self, seed: int, steps: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        self.layers = nn.ModuleList()
        self.program: list[tuple[str, tuple[int, ...], int]] = []
        self.shapes: list[tuple[int, ...]] = [(5,)]
        self._step("linear", draw)
        while len(self.program) < steps:
            self._step(draw.choice(OPERATIONS), draw)
        self.head = nn.Linear(self.shapes[-1][-1], 3)

    def _add(self, name: str, of: tuple[int, ...], shape: tuple[int, ...], number: int = 0) -> None:
        self.program.append((name, of, number))
        self.shapes.append(shape)

    def _layer(self, layer: nn.Module) -> int:
        self.layers.append(layer)
        return len(self.layers) - 1

    def _step(self, name: str, draw: random.Random) -> None:
        recent = list(range(max(0, len(self.shapes) - 4), len(self.shapes)))
        a = draw.choice(recent)
        shape = self.shapes[a]
        others = [b for b, s in enumerate(self.shapes) if s == shape and b]
        last = shape[-1]
        if name == "linear":
            width = draw.choice(WIDTHS)
            self._add(name, (a,), (*shape[:-1], width), self._layer(nn.Linear(last, width, bias=draw.random() < 0.7)))
        elif a == 0:
            return
        elif name in ("relu", "softmax"):
            self._add(name, (a,), shape)
        elif name == "norm":
            self._add(name, (a,), shape, self._layer(nn.LayerNorm(last)))
        elif name == "group_norm" and len(shape) == 1 and last % 2 == 0:
            self._add("norm", (a,), shape, self._layer(nn.GroupNorm(2, last)))
        elif name == "batch_norm":
            self._add("norm", (a,), shape, self._layer(nn.BatchNorm1d(shape[0])))
        elif name in ("add", "mul"):
            self._add(name, (a, draw.choice(others)), shape)
        elif name == "cat":
            b = draw.choice(others)
            self._add(name, (a, b), (*shape[:-1], 2 * last))
        elif (name == "half" and last % 2 == 0 and last > 2) or (name == "every_second" and last % 2 == 0 and last > 2):
            self._add(name, (a,), (*shape[:-1], last // 2), draw.randrange(2))
        elif name == "glu" and last % 2 == 0:
            self._add(name, (a,), (*shape[:-1], last // 2))
        elif name == "split" and len(shape) == 1:
            by = draw.choice([d for d in (2, 3) if last % d == 0] or [1])
            self._add(name, (a,), (by, last // by), by)
        elif name == "flatten" and len(shape) == 2 and shape[0] * last <= 32:
            self._add(name, (a,), (shape[0] * last,))
        elif name == "swap" and len(shape) == 2:
            self._add(name, (a,), shape[::-1])
        elif name == "mean" and len(shape) == 2:
            self._add(name, (a,), (last,))
        elif name == "attend" and len(shape) == 2:
            self._add(name, (a, draw.choice(others), draw.choice(others)), shape)
        elif name == "gate":
            self._add(name, (a, draw.choice(others)), shape, draw.randrange(last))
        elif name == "pick" and len(shape) == 2:
            self._add(name, (a,), (last,), draw.randrange(shape[0]))
        elif name == "flip":
            self._add(name, (a,), shape)
        elif name == "conv" and len(shape) == 2:
            self._add(name, (a,), (6, last - 1), self._layer(nn.Conv1d(shape[0], 6, 2))) if last > 2 else None
        elif name == "mix" and len(shape) == 2:
            self._add(name, (a,), (4, last), self._layer(nn.Conv1d(shape[0], 4, 1)))

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for name, of, number in self.program:
            values.append(self._value(name, [values[i] for i in of], number))
        answer = self.head(values[-1])
        return answer if answer.ndim == 2 else answer.tanh().sum(1)

    def _value(self, name: str, v: list[Tensor], number: int) -> Tensor:
        a = v[0]
        if name in ("linear", "norm", "conv", "mix"):
            return self.layers[number](a)
        if name == "half":
            return a.chunk(2, -1)[number]
        if name == "every_second":
            return a[..., number::2]
        if name == "split":
            return a.view(len(a), number, -1)
        return {
            "relu": lambda: F.relu(a), "softmax": lambda: a.softmax(-1), "add": lambda: a + v[1], "mul": lambda: a * v[1],
            "cat": lambda: torch.cat([a, v[1]], -1), "glu": lambda: F.glu(a, -1), "flatten": lambda: a.flatten(1),
            "swap": lambda: a.transpose(1, 2), "mean": lambda: a.mean(1), "gate": lambda: a * v[1][..., number : number + 1], "pick": lambda: a[:, number], "flip": lambda: a.flip(-1),
            "attend": lambda: (a @ v[1].transpose(1, 2)).softmax(-1) @ v[2],
        }[name]()  # fmt: skip


OPERATIONS = [
    "linear",
    "linear",
    "linear",
    "relu",
    "softmax",
    "norm",
    "group_norm",
    "batch_norm",
    "add",
    "add",
    "mul",
    "cat",
    "cat",
    "half",
    "every_second",
    "glu",
    "split",
    "split",
    "flatten",
    "flatten",
    "swap",
    "mean",
    "attend",
    "flip",
    "conv",
    "mix",
    "gate",
    "pick",
]
