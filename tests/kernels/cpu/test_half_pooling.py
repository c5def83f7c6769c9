"""Pooling in 16-bit floats beside torch's own operators, to the bit: odd sizes, ties, zeros of both signs, infinities and NaN."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from wslfast.kernels.cpu import half_pooling
from wslfast.kernels.layers import Pool2d

SHAPES = [(3, 16, 4, 6), (2, 24, 5, 7), (1, 1, 2, 2), (2, 40, 9, 4), (5, 3, 3, 3)]


def images(shape: tuple[int, ...], dtype: torch.dtype, levels: int | None = None) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x = x if levels is None else (x * levels).round() / levels + 0.0  # ties, of zeros without a sign
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def torchs(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    y, indices = F.max_pool2d_with_indices(x, 2)
    backward = torch.ops.aten.max_pool2d_with_indices_backward
    return y, backward(g, x, [2, 2], [2, 2], [0, 0], [1, 1], False, indices)


def ours(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    y, winners = half_pooling.maxima(x)
    gx = torch.empty(x.shape, dtype=x.dtype, memory_format=torch.channels_last).fill_(float("nan"))
    return y, half_pooling.to_maxima(g, winners, gx)


@pytest.mark.parametrize("dtype", half_pooling.HALVES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("levels", [None, 2])
def test_values_and_gradients_are_torchs(shape: tuple[int, ...], dtype: torch.dtype, levels: int | None) -> None:
    x = images(shape, dtype, levels)
    g = images((*shape[:2], shape[2] // 2, shape[3] // 2), dtype)
    for mine, expected in zip(ours(x, g), torchs(x, g), strict=True):
        assert torch.equal(mine, expected)
        assert mine.stride() == expected.stride() or 1 in shape


def test_infinities_win_and_lose_as_torchs_do() -> None:
    x = images((2, 8, 4, 4), torch.bfloat16)
    x[0, :, 0, 0], x[0, :, 3, 3], x[1] = float("inf"), -float("inf"), -float("inf")
    g = images((2, 8, 2, 2), torch.bfloat16)
    for mine, expected in zip(ours(x, g), torchs(x, g), strict=True):
        assert torch.equal(mine, expected)


def test_nan_stays_in_its_window_and_its_channel() -> None:
    x = images((2, 8, 4, 4), torch.bfloat16)
    clean, g = x.clone(), images((2, 8, 2, 2), torch.bfloat16)
    x[1, 3, 2, 1] = float("nan")
    (y, gx), (expected, slope) = ours(x, g), ours(clean, g)
    assert y[1, 3, 1, 0].isnan()
    y[1, 3, 1, 0] = expected[1, 3, 1, 0]
    assert torch.equal(y, expected)
    gx[1, 3, 2:, :2] = slope[1, 3, 2:, :2]
    assert torch.equal(gx, slope)


@pytest.mark.parametrize(
    ("dtype", "pool"),
    [
        (torch.float32, Pool2d("p")),
        (torch.bfloat16, Pool2d("p", "avg")),
        (torch.bfloat16, Pool2d("p", "max", (3, 3), (2, 2))),
        (torch.bfloat16, Pool2d("p", "max", (2, 2), (1, 1))),
        (torch.bfloat16, Pool2d("p", "max", (2, 2), (2, 2), (1, 1))),
    ],
)
def test_other_poolings_are_left_to_torch(dtype: torch.dtype, pool: Pool2d) -> None:
    assert not half_pooling.applies(torch.zeros(1, 2, 4, 4, dtype=dtype), pool)
