"""Rules of calls that choose between numbers, each against torch's own graph through its form, and with no call left to it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tape_cases import WIDTH, check, check_without_islands
from torch import Tensor, nn

CASES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...]]] = {
    "where of both": (lambda x, w: torch.where(x > 0, x * w, (x * w).sin()), (WIDTH,)),
    "where of a parameter": (lambda x, w: torch.where((x > 0.2).unsqueeze(1), w, (x * x).unsqueeze(1) * w), (2, WIDTH)),
    "where by a mask of fewer axes": (lambda x, w: torch.where(torch.arange(WIDTH) % 2 == 0, x * w, w), (WIDTH,)),
    "where of a number, if true": (lambda x, w: torch.where(x * w > 0.3, 0.5, x * w), (WIDTH,)),
    "where of a number, if not": (lambda x, w: torch.where(x * w > 0.3, x * w, -0.5), (WIDTH,)),
    "masked_fill": (lambda x, w: (x * w).masked_fill(x > 0, 0.25), (WIDTH,)),
    "masked_fill before a softmax": (lambda x, w: (x * w).masked_fill(torch.arange(WIDTH) > 3, float("-inf")).softmax(-1), (WIDTH,)),
    "maximum": (lambda x, w: torch.maximum(x * w, x.sin() * w), (WIDTH,)),
    "minimum of equal numbers": (lambda x, w: torch.minimum((x * w).relu(), (x * w).sin().relu()), (WIDTH,)),
    "maximum with a parameter": (lambda x, w: torch.maximum(x.unsqueeze(1) * w, w), (3, WIDTH)),
    "maximum of what all share": (lambda x, w: torch.maximum(x, x * w), (WIDTH,)),
}


@pytest.mark.parametrize("name", list(CASES))
def test_values_and_gradients_without_an_island(name: str) -> None:
    check_without_islands(*CASES[name])


def test_images_among_the_channels() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.first, self.last = nn.Linear(4, 84), nn.Conv2d(2, 3, 3), nn.Linear(60, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(self.wide(x).unflatten(1, (2, 6, 7)))
            x = torch.maximum(x, 0.5 * x).masked_fill(x > 1, 1.0)
            return self.last(torch.where(x > 0.2, x.sin(), x).flatten(1))

    check(Gated)
