"""Three rewrites of a compiled program: the same function, in steps that run faster on a CPU.

**Two columns at once** (:func:`paired`), where a convolution makes so few channels that most of a vector would stay empty. oneDNN puts 16
of the channels that a convolution makes into a vector. Two convolutions of a group of models make 8 or fewer a group:
the first one where every model has its own queries (zoo building), and the gradient of the input of a narrow layer. Both compute
two neighboring columns together: twice the channels, of a kernel one column wider (the second column's weights moved by one), at
stride 2. For a 5 x 5 kernel that is 1.2 times the products in twice the lanes. The columns come out on the wrong side of the models in
memory, ``[q, H, W / 2, M, 2, C]``. Copying rows of C numbers through a table puts them right for a tenth of what the convolution saves;
elementwise operators on them, in runs of C, would cost more than all of it.

**Blocks** (:func:`blocked`): the first convolution and its pooling, a few queries at a time. What a first convolution makes is the largest
thing in a small network, and the pooling right above keeps a quarter of it. A whole slab of it leaves the caches, so that pooling, its
backward (which begins by writing zeros) and the gradient of the weights would each wait for memory: a query of CNN3 costs them two to
three times as much in twelve megabytes as in three. All other layers are small enough for the slab, and there fewer, larger calls are
better.

**Flattened once** (:func:`flattened`): the copy that flattens images for a linear layer writes what its product wants to read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..layers import Activation, Conv2d, Dropout, Layers, Linear, Pool2d, Slot, shapes
from .convolutions import convolution, convolution_backward
from .products import LANES, vector
from .program import Program
from .steps import (
    ConvStep,
    FlatLinearStep,
    FlattenStep,
    LinearStep,
    Packed,
    Step,
    backward_through,
    bias_gradient,
    block,
    forward_through,
    needs_sixteen,
    put,
    values_through,
)

_BYTES = 4 << 20  # of the largest activation of eight models, at once
_NUMBER = 4  # bytes
_FEWEST = 4  # queries: cut evenly, no part is then a single image, which torch gives to another library


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
    """``program`` with two columns at once where that fills more lanes than it wastes.

    For gradients of inputs that is where they fit into a vector together: of six or eight channels two columns took 1.1 to 1.3 times as
    long with AVX2, of four .8.
    """
    steps, size = list(program.steps), program.crop
    apart = False
    for i, step in enumerate(steps):
        before, size = size, shapes((step.layer,), size)[-1]
        if not isinstance(step, ConvStep) or step.layer.groups != 1 or step.layer.spacing != (1, 1):
            continue
        conv = step.layer
        if i == 0 and own_queries:
            # with one channel in, model by model is slower than all models in one call
            if conv.stride[1] == 1 and size[2] % 2 == 0 and 2 * conv.out_channels <= LANES and conv.in_channels > 1:
                steps[i] = PairedConvStep(conv, step.weight, step.bias, step.shared, step.input_gradient, step.sums_bias)
                apart = True
        elif step.input_gradient and conv.stride == (1, 1) and before[2] % 2 == 0 and 2 * conv.in_channels <= vector():
            reaches = all(p < k for p, k in zip(conv.padding, conv.kernel_size, strict=True))
            if reaches and conv.kernel_size[1] > 2:
                steps[i] = NarrowConvStep(conv, step.weight, step.bias, step.shared, step.input_gradient, step.sums_bias)
    return replace(program, steps=tuple(steps), model_by_model=apart)


@dataclass(frozen=True)
class BlockedSteps(Step):
    """A first convolution and what follows it up to a pooling, ``queries`` at a time (of 16-bit numbers twice as many); a step like any
    other from outside."""

    layer: Conv2d
    slots: tuple[Slot, ...]  # of the convolution's parameters
    steps: tuple[Step, ...]  # ConvStep, ..., PoolStep
    queries: int

    def pack(self, rows: Tensor, dtype: torch.dtype) -> list[Any]:
        return [step.pack(rows, dtype) for step in self.steps]

    def _parts(self, x: Tensor) -> Sequence[Tensor]:
        return x.tensor_split(-(-x.shape[0] // (self.queries * _NUMBER // x.element_size())))

    def forward(self, x: Tensor, packed: list[Any], models: int) -> tuple[Tensor, Any]:
        outputs, saved = zip(*(forward_through(self.steps, packed, part, models) for part in self._parts(x)))
        return joined(outputs), saved

    def values(self, x: Tensor, packed: list[Any], models: int) -> Tensor:
        return joined([values_through(self.steps, packed, part, models) for part in self._parts(x)])

    def backward(self, g: Tensor, saved: Any, packed: list[Any], rows: Tensor, fresh: bool) -> None:
        # Blocks add up on their own, so that a slab's share of the sum is the same bits whenever the slab is added.
        sums = rows if fresh else torch.empty_like(rows)
        for i, part in enumerate(g.tensor_split(len(saved))):
            backward_through(self.steps, packed, part, saved[i], sums, i == 0)
        if not fresh:
            for slot in self.slots:
                put(rows, slot, block(sums, slot), fresh=False)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Parts one behind another; a single one as it is."""
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]


def in_blocks(layers: Layers) -> range:
    """Indices of the layers whose outputs are never whole: the first convolution and what follows it below a pooling. Empty without."""
    first = next((i for i, layer in enumerate(layers) if isinstance(layer, (Conv2d, Linear))), len(layers))
    last = first + 1
    while last < len(layers) and isinstance(layers[last], (Activation, Dropout)):
        last += 1
    pooled = last < len(layers) and isinstance(layers[first], Conv2d) and isinstance(layers[last], Pool2d)
    return range(first, last) if pooled else range(0)


def blocked(program: Program) -> Program:
    """``program`` with its first convolution and the pooling above it in blocks of queries."""
    steps = program.steps
    cut = in_blocks(tuple(step.layer for step in steps))
    if not cut or program.model_by_model:  # such a first step works on one model after another as it is
        return program
    first = steps[cut.start]
    assert isinstance(first, ConvStep)
    if needs_sixteen(first.layer):
        return program
    size = program.crop
    for step in steps[: cut.start + 1]:
        size = shapes((step.layer,), size)[-1]
    queries = max(_FEWEST, _BYTES // (_NUMBER * 8 * math.prod(size)))
    slots = tuple(slot for slot in (first.weight, first.bias) if slot is not None)
    head = BlockedSteps(first.layer, slots, steps[cut.start : cut.stop + 1], queries)
    return replace(program, steps=(*steps[: cut.start], head, *steps[cut.stop + 1 :]))


def flattened(program: Program) -> Program:
    """``program`` with each flattening of images joined to the linear layer above it, where layers with parameters come before it."""
    steps: list[Step] = []
    for i, step in enumerate(program.steps):
        below = steps[-1] if steps else None
        if i - 1 > program.first and isinstance(step, LinearStep) and isinstance(below, FlattenStep) and len(below.shape) == 3:
            steps[-1] = FlatLinearStep(step.layer, step.weight, step.bias, step.shared, step.input_gradient, below.shape)
        else:
            steps.append(step)
    return replace(program, steps=tuple(steps))
