"""Two columns at once, where a convolution makes so few channels that most of a vector would stay empty.

oneDNN puts 16 of the channels that a convolution makes into a vector. Two convolutions of a group of models make 8 or fewer a group:
the first one where every model has its own queries (zoo building), and the gradient of the input of a narrow layer. Both compute
two neighbouring columns together: twice the channels, of a kernel one column wider (the second column's weights moved by one), at
stride 2. For a 5 x 5 kernel that is 1.2 times the products in twice the lanes.

The columns come out on the wrong side of the models in memory, ``[q, H, W / 2, M, 2, C]``. Copying rows of C numbers through a table puts
them right for a tenth of what the convolution saves; elementwise operators on them, in runs of C, would cost more than all of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..layers import shapes
from .steps import ConvStep, FlattenStep, Packed, Program, bias_gradient, block, convolution, convolution_backward, put

_LANES = 16


def _two_columns(kernels: Tensor) -> Tensor:
    """``[M, C, height, width, C_in] -> [M * 2 * C, C_in, height, width + 1]`` channels-last: a group's C outputs in two columns."""
    models, out, height, width, channels = kernels.shape
    pair = kernels.new_zeros((models, 2, out, height, width + 1, channels))
    pair[:, 0, :, :, :width] = kernels
    pair[:, 1, :, :, 1:] = kernels
    return pair.view(models * 2 * out, height, width + 1, channels).permute(0, 3, 1, 2)


@lru_cache(maxsize=32)
def _columns_to_models(pairs: int, models: int) -> Tensor:
    """Rows of ``[pairs, M, 2, C]`` in the order ``[pairs, 2, M]``."""
    return torch.arange(pairs * models * 2, dtype=torch.int32).view(pairs, models, 2).transpose(1, 2).flatten()


@lru_cache(maxsize=32)
def _model_by_model(positions: int, models: int, real: int) -> Tensor:
    """Rows of ``[positions, M, C]`` in the order ``[M, positions]``, of the first ``real`` models."""
    return torch.arange(positions * models, dtype=torch.int32).view(positions, models).t()[:real].flatten()


@dataclass(frozen=True)
class PairedConvStep(ConvStep):
    """A first convolution of own queries, model by model: ``[m, q, C_in, H, W]`` of the m <= M models there are -> ``[q, M * C, H', W']``.

    For one model on its own both orders of columns are the same memory; the models meet in a copy of rows.
    """

    def pack(self, rows: Tensor, dtype: torch.dtype) -> Packed:
        pair = _two_columns(block(rows, self.weight).to(dtype).permute(0, 1, 3, 4, 2))
        return pair, None if self.bias is None else block(rows, self.bias).to(dtype).repeat(1, 2)

    def _geometry(self) -> tuple[Any, ...]:
        conv = self.layer
        return (conv.stride[0], 2), conv.padding, conv.spacing, False, (0, 0), 1

    def forward(self, x: Tensor, packed: Packed, models: int) -> tuple[Tensor, Any]:
        out = self.weight.shape[0]
        kernels, biases = packed[0].view(models, 2 * out, *packed[0].shape[1:]), packed[1]
        made = [convolution(mine, kernels[j], None if biases is None else biases[j], *self._geometry()) for j, mine in enumerate(x)]
        q, _, height, half = made[0].shape
        columns = [y.permute(0, 2, 3, 1).reshape(-1, out) for y in made]
        columns += [torch.zeros_like(columns[0])] * (models - len(made))
        return torch.cat(columns, 1).view(q, height, 2 * half, models * out).permute(0, 3, 1, 2), x

    def backward(self, g: Tensor, x: Any, packed: Packed, rows: Tensor, fresh: bool) -> None:
        models, real, (out, _, _, width) = rows.shape[0], len(x), self.weight.shape
        q, _, height, columns = g.shape
        mine = g.permute(0, 2, 3, 1).reshape(-1, out).index_select(0, _model_by_model(q * height * columns, models, real))
        mine = mine.view(real, q, height, columns // 2, 2 * out).permute(0, 1, 4, 2, 3)
        kernels = packed[0].view(models, 2 * out, *packed[0].shape[1:])
        gw = g.new_zeros((models, *kernels.shape[1:]))
        for j in range(real):
            gw[j] = convolution_backward(mine[j], x[j], kernels[j], None, *self._geometry(), (False, True, False))[1]
        gw = gw.unflatten(1, (2, out))
        put(rows, self.weight, gw[:, 0, ..., :width] + gw[:, 1, ..., 1:], fresh)
        if self.bias is not None and self.sums_bias:
            put(rows, self.bias, bias_gradient(g, models), fresh)


@dataclass(frozen=True)
class NarrowConvStep(ConvStep):
    """A convolution whose input gradient, a convolution of the output's gradient with the flipped kernels, makes two columns at once."""

    def pack(self, rows: Tensor, dtype: torch.dtype) -> Any:
        flipped = block(rows, self.weight).to(dtype).flip(3, 4).permute(0, 2, 3, 4, 1)
        return *super().pack(rows, dtype), _two_columns(flipped)

    def forward(self, x: Tensor, packed: Any, models: int) -> tuple[Tensor, Any]:
        return super().forward(x, packed[:2], models)

    def backward(self, g: Tensor, x: Any, packed: Any, rows: Tensor, fresh: bool) -> Tensor:
        self._backward(g, x, packed[0], rows, fresh, input_gradient=False)
        models, (_, channels, height, width) = rows.shape[0], self.weight.shape
        around = height - 1 - self.layer.padding[0], width - 1 - self.layer.padding[1]
        gx = convolution(g, packed[2], None, (1, 2), around, (1, 1), False, (0, 0), models).permute(0, 2, 3, 1)
        q, tall, half, _ = gx.shape
        gx = gx.reshape(-1, channels).index_select(0, _columns_to_models(q * tall * half, models))
        return gx.view(q, tall, 2 * half, models * channels).permute(0, 3, 1, 2)


def paired(program: Program, own_queries: bool) -> Program:
    """``program`` with two columns at once where that fills more lanes than it wastes."""
    steps, size = list(program.steps), program.crop
    for i, step in enumerate(steps):
        if isinstance(step, FlattenStep):
            break
        before, size = size, shapes((step.layer,), size)[-1]  # type: ignore[attr-defined]
        if not isinstance(step, ConvStep) or step.layer.groups != 1 or step.layer.spacing != (1, 1):
            continue
        conv = step.layer
        if i == 0 and own_queries:
            # with one channel in, model by model is slower than all models in one call
            if conv.stride[1] == 1 and size[2] % 2 == 0 and 2 * conv.out_channels <= _LANES and conv.in_channels > 1:
                steps[i] = PairedConvStep(conv, step.weight, step.bias, step.shared, step.input_gradient, step.sums_bias)
        elif step.input_gradient and conv.stride == (1, 1) and before[2] % 2 == 0 and 2 * conv.in_channels <= _LANES:
            reaches = all(p < k for p, k in zip(conv.padding, conv.kernel_size, strict=True))
            if reaches and conv.kernel_size[1] > 2:
                steps[i] = NarrowConvStep(conv, step.weight, step.bias, step.shared, step.input_gradient, step.sums_bias)
    return replace(program, steps=tuple(steps))
