"""First layers where every model has its own queries (zoo building): two columns of a narrow convolution at once.

A first convolution on shared queries has the outputs of all models beside each other in its vectors. With queries of their own
models are groups, and a group of 6 or 8 outputs fills half a vector. So the convolution computes two neighbouring columns at
once: twice the outputs, of a kernel one column wider (the second column's weights moved by one), at stride 2,

    y [q, H, W / 2, M, 2, C]   in memory,

which costs 1.2 times the products of a 5 x 5 kernel and fills twice the lanes. The 2 x 2 max pooling that has to follow takes the
maximum over both columns, and leaves the group's own layout ``[q, H / 2, W / 2, M, C]``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .cpu_layers import (
    CHANNELS_LAST,
    ActivationStep,
    ConvStep,
    Packed,
    PoolStep,
    Program,
    bias_gradient,
    block,
    convolution,
    convolution_backward,
    put,
)
from .plan import Conv2d, Slot, shapes

_LANES = 16


@dataclass(frozen=True)
class PairedConvStep:
    """The convolution of two columns at once: ``[q, M * C_in, H, W] -> [q, M * 2 * C, H', W' / 2]``."""

    layer: Conv2d
    weight: Slot
    bias: Slot | None

    def pack(self, rows: Tensor, dtype: torch.dtype) -> Packed:
        models, (out, channels, height, width) = rows.shape[0], self.weight.shape
        weight = block(rows, self.weight).permute(0, 1, 3, 4, 2)  # [M, C, height, width, C_in]
        pair = weight.new_zeros((models, 2, out, height, width + 1, channels), dtype=dtype)
        pair[:, 0, :, :, :width] = weight
        pair[:, 1, :, :, 1:] = weight
        kernels = pair.view(models * 2 * out, height, width + 1, channels).permute(0, 3, 1, 2)
        return kernels, None if self.bias is None else block(rows, self.bias).to(dtype).repeat(1, 2).view(-1)

    def _geometry(self, models: int) -> tuple[Any, ...]:
        conv = self.layer
        return (conv.stride[0], 2), conv.padding, conv.dilation, False, (0, 0), models

    def forward(self, x: Tensor, packed: Packed, models: int) -> tuple[Tensor, Any]:
        return convolution(x, *packed, *self._geometry(models)), x

    def backward(self, g: Tensor, x: Any, packed: Packed, rows: Tensor, fresh: bool) -> None:
        models, (out, _, _, width) = rows.shape[0], self.weight.shape
        _, gw, _ = convolution_backward(g, x, packed[0], None, *self._geometry(models), (False, True, False))
        gw = gw.unflatten(0, (models, 2, out))
        put(rows, self.weight, gw[:, 0, ..., :width] + gw[:, 1, ..., 1:], fresh)


@dataclass(frozen=True)
class PairedPoolStep:
    """2 x 2 max pooling of paired columns: ``[q, M * 2 * C, H, W / 2] -> [q, M * C, H / 2, W / 2]``; ties go to the first, as torch's."""

    channels: int
    bias: Slot | None

    def _corners(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The four numbers of every window, ``[q, H / 2, W / 2, M, C]`` each."""
        rows = y.permute(0, 2, 3, 1).unflatten(3, (-1, 2, self.channels))
        upper, lower = rows[:, 0 : y.shape[2] // 2 * 2 : 2], rows[:, 1 : y.shape[2] // 2 * 2 : 2]
        return upper[..., 0, :], upper[..., 1, :], lower[..., 0, :], lower[..., 1, :]

    def forward(self, y: Tensor, packed: None, models: int) -> tuple[Tensor, Any]:
        a, b, c, d = self._corners(y)
        upper, lower = torch.maximum(a, b), torch.maximum(c, d)
        routes = b > a, d > c, lower > upper
        return torch.maximum(upper, lower, out=upper).flatten(3).permute(0, 3, 1, 2), (y.shape, routes)

    def values(self, y: Tensor) -> Tensor:
        return self.forward(y, None, 1)[0]

    def backward(self, g: Tensor, saved: Any, packed: None, rows: Tensor, fresh: bool) -> Tensor:
        shape, (right_above, right_below, below) = saved
        if self.bias is not None:
            put(rows, self.bias, bias_gradient(g, rows.shape[0]), fresh)
        gy = torch.empty(shape, dtype=g.dtype, memory_format=CHANNELS_LAST)
        if shape[2] % 2:
            gy[:, :, -1] = 0
        g = g.permute(0, 2, 3, 1).unflatten(3, (-1, self.channels))
        zero = g.new_zeros(())
        upper, lower = torch.where(below, zero, g), torch.where(below, g, zero)
        a, b, c, d = self._corners(gy)
        a.copy_(torch.where(right_above, zero, upper))
        b.copy_(torch.where(right_above, upper, zero))
        c.copy_(torch.where(right_below, zero, lower))
        d.copy_(torch.where(right_below, lower, zero))
        return gy


def paired(program: Program) -> Program:
    """``program`` (of models with their own queries) with its first layers in pairs of columns, where that fills more lanes."""
    first = program.steps[0]
    pool = next((i for i, step in enumerate(program.steps) if isinstance(step, PoolStep)), None)
    if not isinstance(first, ConvStep) or pool is None or not all(isinstance(s, ActivationStep) for s in program.steps[1:pool]):
        return program
    conv, last = first.layer, program.steps[pool]
    assert isinstance(last, PoolStep)
    plain = conv.groups == 1 and conv.stride[1] == 1 and conv.dilation == (1, 1)
    halves = last.layer.mode == "max" and last.layer.kernel_size == last.layer.stride == (2, 2)
    width = shapes((conv,), program.crop)[-1][2]
    if not plain or not halves or width % 2 or 2 * conv.out_channels > _LANES:
        return program
    # the bias is summed behind the pooling, which hands every gradient on once; through an activation it is not the same gradient
    if first.sums_bias and first.bias is not None:
        return program
    steps = (PairedConvStep(conv, first.weight, first.bias), *program.steps[1:pool], PairedPoolStep(conv.out_channels, last.bias))
    return replace(program, steps=(*steps, *program.steps[pool + 1 :]))
