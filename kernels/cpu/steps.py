"""Steps of a compiled network on the CPU: one operator call a layer for a whole group of models, with hand-written backward.

A group of M models runs on a slab of q queries. Before ``Flatten`` an activation is

    x [q, M * C, H, W]   in channels-last memory, i.e. [q, H, W, M, C]: the models are the groups of a convolution,

and afterwards it is ``x [M, q, F]``, where a linear layer is a batched product. Layers ahead of the first one with
parameters see the queries that all models share, ``[q, C, H, W]`` or ``[q, F]``, once instead of M times, and that first layer, if
a convolution, has M * C_out outputs.

:class:`Step` is what the engine knows of all of them. There is no autograd graph, and nothing is computed for the queries. A
convolution's bias gradient is summed after the pooling that follows: a pooling window hands its gradient on exactly once, so the sums
agree and a smaller tensor is read.

Every operator here treats a model's slice without regard to its place in the group: equal bits whatever the slot, and no
NaN crosses over. That rules out plain reductions over rows (their vector and remainder columns round differently), some of
torch's activations (activations.py), and batched products whose slices lie at any address: on some processors MKL sums in
another order where an operand or the result is not on 16 bytes, so both are padded (:class:`LinearStep`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Union

import torch
from torch import Tensor

from ..layers import Activation, Affine, Conv2d, Flatten, Layer, Linear, Pool2d, Slot
from .activations import Function
from .convolutions import convolution, convolution_backward
from .half_pooling import applies, maxima, to_maxima

# Overloads resolved once: looking one up costs as much as a small operator.
_aten = torch.ops.aten
_max_pool = _aten.max_pool2d_with_indices.default
_max_pool_backward = _aten.max_pool2d_with_indices_backward.grad_input
_avg_pool = _aten.avg_pool2d.default
_avg_pool_backward = _aten.avg_pool2d_backward.grad_input

CHANNELS_LAST = torch.channels_last
Packed = tuple[Tensor, Union[Tensor, None]]


def block(rows: Tensor, slot: Slot, *shape: int) -> Tensor:
    """View of one parameter of every model of a group, ``[M, *shape]``."""
    return rows[:, slot.offset : slot.stop].view(rows.shape[0], *(shape or slot.shape))


def put(rows: Tensor, slot: Slot, value: Tensor, fresh: bool) -> None:
    """Write one parameter's gradient to ``rows``, or add it to what they hold."""
    gradient = block(rows, slot)
    value = value if value.shape == gradient.shape else value.view(gradient.shape)
    if fresh:
        gradient.copy_(value)
    else:
        gradient.add_(value)


def bias_gradient(g: Tensor, models: int) -> Tensor:
    """Sum ``[M, C]`` of ``g [q, M * C, H, W]`` over queries and positions, in an order that no model's slot can change.

    An average pooling with divisor 1 adds every channel's numbers one after another, whatever vector the channel is in. First over
    the positions of every query, then over the queries, which are the rows of one image ``[q, 1]``.
    """
    q, channels, height, width = g.shape
    if height * width > 1:
        g = _avg_pool(g, [height, width], [1, 1], [0, 0], False, False, 1)
    column = g.permute(0, 2, 3, 1).reshape(1, q, 1, channels).permute(0, 3, 1, 2)
    return _avg_pool(column, [q, 1], [1, 1], [0, 0], False, False, 1).view(models, -1)


def needs_sixteen(layer: Layer) -> bool:
    """Whether torch gives a slab of this layer to another library where it has fewer than 16 images: 1 x 1 kernels without stride and one
    thread. A model's bits depend on its place there, as they do with a single image of any other convolution."""
    return isinstance(layer, Conv2d) and layer.kernel_size == (1, 1) and layer.stride == (1, 1)


def _padded(size: int) -> int:
    """The next multiple of 8: then slices of batched operands and results begin on 16 bytes in every dtype used here."""
    return -size % 8 + size


class Step(ABC):
    """One step of a program: all that the engine knows of it.

    Attributes:
        layer: the record behind it, whose shape rule is the step's (of steps that a rewrite joined: that of the first).
    """

    layer: Layer

    def pack(self, rows: Tensor, dtype: torch.dtype) -> Any:
        """The weights of a group ``[M, P]`` as this step wants them, None without weights."""
        return None

    @abstractmethod
    def forward(self, x: Tensor, packed: Any, models: int) -> tuple[Tensor, Any]:
        """The output, and what :meth:`backward` will want to see."""

    def values(self, x: Tensor, packed: Any, models: int) -> Tensor:
        """The output alone, the same bits, where no backward will follow."""
        return self.forward(x, packed, models)[0]

    @abstractmethod
    def backward(self, g: Tensor, saved: Any, packed: Any, rows: Tensor, fresh: bool) -> Tensor | None:
        """The gradient of the input (None where nobody wants it) from that of the output, which may be overwritten.

        The parameters' share is written to ``rows``, the gradient ``[M, P]`` of the group: over what it holds for the first slab
        (``fresh``), on top of it afterwards.
        """


def forward_through(steps: Sequence[Step], packed: Sequence[Any], x: Tensor, models: int) -> tuple[Tensor, list[Any]]:
    """The output of the last step, and what the backward of each wants to see."""
    saved = []
    for step, weights in zip(steps, packed, strict=True):
        x, seen = step.forward(x, weights, models)
        saved.append(seen)
    return x, saved


def values_through(steps: Sequence[Step], packed: Sequence[Any], x: Tensor, models: int) -> Tensor:
    """The output of the last step alone: the same bits, with nothing kept for a backward."""
    for step, weights in zip(steps, packed, strict=True):
        x = step.values(x, weights, models)
    return x


def backward_through(steps: Sequence[Step], packed: Sequence[Any], g: Tensor, saved: list[Any], rows: Tensor, fresh: bool) -> Tensor | None:
    """The gradient of the first step's input. ``saved`` is emptied on the way, so that memory is freed while it is in cache."""
    gradient: Tensor | None = g
    for step, weights in zip(reversed(steps), reversed(packed), strict=True):
        assert gradient is not None  # only a first step leaves the gradient of its input out
        gradient = step.backward(gradient, saved.pop(), weights, rows, fresh)
    return gradient


@dataclass(frozen=True)
class ConvStep(Step):
    """Convolution. ``shared``: its input is common to all models; ``sums_bias``: no pooling above does it instead."""

    layer: Conv2d
    weight: Slot
    bias: Slot | None
    shared: bool
    input_gradient: bool
    sums_bias: bool = True

    def pack(self, rows: Tensor, dtype: torch.dtype) -> Packed:
        channels, *rest = self.weight.shape
        weight = block(rows, self.weight).reshape(rows.shape[0] * channels, *rest)
        weight = weight.to(dtype, memory_format=CHANNELS_LAST)
        return weight, None if self.bias is None else block(rows, self.bias).reshape(-1).to(dtype)

    def _groups(self, models: int) -> int:
        return self.layer.groups * (1 if self.shared else models)

    def forward(self, x: Tensor, packed: Packed, models: int) -> tuple[Tensor, Any]:
        conv = self.layer
        y = convolution(x, *packed, conv.stride, conv.padding, conv.spacing, False, (0, 0), self._groups(models))
        return y, x

    def backward(self, g: Tensor, x: Any, packed: Packed, rows: Tensor, fresh: bool) -> Tensor | None:
        return self._backward(g, x, packed[0], rows, fresh, self.input_gradient)

    def _backward(self, g: Tensor, x: Any, weight: Tensor, rows: Tensor, fresh: bool, input_gradient: bool) -> Tensor | None:
        conv, models = self.layer, rows.shape[0]
        wanted = input_gradient, True, False
        gx, gw, _ = convolution_backward(
            g, x, weight, None, conv.stride, conv.padding, conv.spacing, False, (0, 0), self._groups(models), wanted
        )
        put(rows, self.weight, gw, fresh)
        if self.bias is not None and self.sums_bias:
            put(rows, self.bias, bias_gradient(g, models), fresh)
        return gx


@dataclass(frozen=True)
class LinearStep(Step):
    """Linear layer on ``[M, q, F]``, or on queries ``[q, F]`` that all models share.

    Operands are padded to ``x [M, q', F']`` and ``w [M, out, F']``. The first number of the padding is 1 in ``x`` and the bias in
    ``w``: one product adds the bias, and one has its gradient beside that of the weight.
    """

    layer: Linear
    weight: Slot
    bias: Slot | None
    shared: bool
    input_gradient: bool

    def _width(self) -> int:
        return _padded(self.weight.shape[1] + (self.bias is not None))

    def pack(self, rows: Tensor, dtype: torch.dtype) -> Packed:
        out, features = self.weight.shape
        weight = rows.new_empty((rows.shape[0], out, self._width()), dtype=dtype)
        weight[..., :features] = block(rows, self.weight)
        weight[..., features:] = 0
        if self.bias is not None:
            weight[..., features] = block(rows, self.bias)
        return weight, None

    def _padding(self, x: Tensor, models: Sequence[int], q: int) -> Tensor:
        """The padded input ``[*models, q', F']`` in whose corner ``[*models, q, F]`` the numbers are still to be written."""
        features = self.weight.shape[1]
        wide = x.new_empty((*models, _padded(q), self._width()))
        wide[..., q:, :features] = 0
        wide[..., features:] = 0
        if self.bias is not None:
            wide[..., features] = 1
        return wide

    def forward(self, x: Tensor, packed: Packed, models: int) -> tuple[Tensor, Any]:
        q, features = x.shape[-2:]
        wide = self._padding(x, x.shape[:-2], q)
        wide[..., :q, :features] = x
        if self.shared:
            wide = wide.expand(models, *wide.shape)
        return torch.bmm(wide, packed[0].transpose(1, 2))[:, :q], wide

    def backward(self, g: Tensor, x: Any, packed: Packed, rows: Tensor, fresh: bool) -> Tensor | None:
        gx = self._backward(g, x, packed, rows, fresh)
        return gx.contiguous() if gx is not None else None

    def _backward(self, g: Tensor, x: Any, packed: Packed, rows: Tensor, fresh: bool) -> Tensor | None:
        """The gradient of the input as a corner of a padded product."""
        q, features = g.shape[1], self.weight.shape[1]
        if q != x.shape[1] or not g.is_contiguous():
            tall = g.new_zeros((g.shape[0], x.shape[1], g.shape[2]))
            tall[:, :q] = g
            g = tall
        gw = torch.bmm(g.transpose(1, 2), x)
        put(rows, self.weight, gw[..., :features], fresh)
        if self.bias is not None:
            put(rows, self.bias, gw[..., features], fresh)
        return torch.bmm(g, packed[0])[:, :q, :features] if self.input_gradient else None


@dataclass(frozen=True)
class FlatLinearStep(LinearStep):
    """:class:`FlattenStep` and the linear layer that follows it: images ``[q, M * C, H, W]`` are copied once, into the padded operand.

    ``shape``: of one model's image.
    """

    shape: tuple[int, ...]

    def forward(self, x: Tensor, packed: Packed, models: int) -> tuple[Tensor, Any]:
        q, features = x.shape[0], self.weight.shape[1]
        wide = self._padding(x, (models,), q)
        wide[:, :q, :features].unflatten(2, self.shape).copy_(x.unflatten(1, (models, -1)).transpose(0, 1))
        return torch.bmm(wide, packed[0].transpose(1, 2))[:, :q], wide

    def backward(self, g: Tensor, x: Any, packed: Packed, rows: Tensor, fresh: bool) -> Tensor | None:
        gx = self._backward(g, x, packed, rows, fresh)
        if gx is None:
            return None
        images = gx.unflatten(2, self.shape).permute(1, 3, 4, 0, 2).contiguous()  # [q, H, W, M, C]
        return images.flatten(3).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class PoolStep(Step):
    """Max or average pooling; ``bias`` is that of the convolution right below, whose gradient is summed here.

    Of its input only the shape is kept: the memory goes to the next layer while it is still in cache.
    """

    layer: Pool2d
    bias: Slot | None = None

    def forward(self, x: Tensor, packed: None, models: int) -> tuple[Tensor, Any]:
        pool = self.layer
        if pool.mode == "avg":
            return _avg_pool(x, pool.kernel_size, pool.stride, pool.padding), (x.shape, None)
        found = maxima(x) if applies(x, pool) else _max_pool(x, pool.kernel_size, pool.stride, pool.padding)
        return found[0], (x.shape, found[1])

    def values(self, x: Tensor, packed: None, models: int) -> Tensor:
        """Without the 64-bit indices: half the time of the operator above."""
        pool = self.layer
        if pool.mode != "max" or pool.kernel_size != (2, 2) or pool.stride != (2, 2) or pool.padding != (0, 0):
            return self.forward(x, None, 1)[0]
        height, width = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
        x = x.permute(0, 2, 3, 1)
        x = torch.maximum(x[:, 0:height:2], x[:, 1:height:2])
        return torch.maximum(x[:, :, 0:width:2], x[:, :, 1:width:2]).permute(0, 3, 1, 2)

    def backward(self, g: Tensor, saved: Any, packed: None, rows: Tensor, fresh: bool) -> Tensor:
        pool, (shape, indices) = self.layer, saved
        if self.bias is not None:
            put(rows, self.bias, bias_gradient(g, rows.shape[0]), fresh)
        # The operators look at their "input" for its shape and layout alone, so the output may stand in for it.
        gx = torch.empty(shape, dtype=g.dtype, device=g.device, memory_format=CHANNELS_LAST)
        if pool.mode == "avg" and pool.tiles(shape[2:]):
            return _spread(g, gx, pool.kernel_size)
        g = as_channels_last(g)
        if isinstance(indices, tuple):
            return to_maxima(g, indices, gx)
        if pool.mode == "avg":
            return _avg_pool_backward(g, gx, pool.kernel_size, pool.stride, pool.padding, False, True, None, grad_input=gx)
        return _max_pool_backward(g, gx, pool.kernel_size, pool.stride, pool.padding, (1, 1), False, indices, grad_input=gx)


def _spread(g: Tensor, gx: Tensor, window: tuple[int, int]) -> Tensor:
    """The gradient of an average over windows that tile the image: each pixel's share of its window's, in one pass over memory."""
    (height, width), (q, channels, rows, columns) = window, g.shape
    tiles = gx.permute(0, 2, 3, 1).view(q, rows, height, columns, width, channels)
    tiles.copy_(g.permute(0, 2, 3, 1).div(height * width).reshape(q, rows, 1, columns, 1, channels))
    return gx


def as_channels_last(x: Tensor) -> Tensor:
    """An image that is dense in channels-last memory with strides that say so, also where one pixel or one channel leaves them open:
    torch's operators would read them as the other layout, and copy."""
    channels, height, width = x.shape[1:]
    if (height * width > 1 and channels > 1) or not x.is_contiguous(memory_format=CHANNELS_LAST):
        return x
    return x.as_strided(x.shape, (height * width * channels, 1, width * channels, channels))


@dataclass(frozen=True)
class ActivationStep(Step):
    """Elementwise function. ``owned``: the layer below made the input and does not look at it again, so it is overwritten."""

    layer: Activation
    function: Function
    owned: bool

    def forward(self, x: Tensor, packed: None, models: int) -> tuple[Tensor, Any]:
        return self.function.forward(x, self.layer, self.owned)

    def backward(self, g: Tensor, saved: Any, packed: None, rows: Tensor, fresh: bool) -> Tensor:
        return self.function.backward(g, saved, self.layer)


@dataclass(frozen=True)
class AffineStep(Step):
    """A factor and a shift a channel: a norm that could be folded into no layer."""

    layer: Affine
    weight: Slot
    bias: Slot

    def pack(self, rows: Tensor, dtype: torch.dtype) -> Packed:
        return block(rows, self.weight).to(dtype).flatten(), block(rows, self.bias).to(dtype).flatten()

    def forward(self, x: Tensor, packed: Any, models: int) -> tuple[Tensor, Any]:
        factor, shift = (_beside(p, x, models) for p in packed)
        return torch.addcmul(shift, x, factor), x

    def backward(self, g: Tensor, x: Any, packed: Any, rows: Tensor, fresh: bool) -> Tensor:
        models = rows.shape[0]
        factor = _beside(packed[0], x, models)
        product = g * x
        if x.ndim == 4:
            put(rows, self.weight, bias_gradient(product, models), fresh)
            put(rows, self.bias, bias_gradient(g, models), fresh)
        else:  # [M, q, F]
            put(rows, self.weight, product.sum(1), fresh)
            put(rows, self.bias, g.sum(1), fresh)
        return torch.mul(g, factor, out=product)


def _beside(parameter: Tensor, x: Tensor, models: int) -> Tensor:
    """A number a channel ``[M * C]`` laid out for ``[q, M * C, H, W]`` or ``[M, q, F]``."""
    return parameter.view(1, -1, 1, 1) if x.ndim == 4 else parameter.view(models, 1, -1)


@dataclass(frozen=True)
class FlattenStep(Step):
    """``[q, M * C, H, W] -> [M, q, C * H * W]`` in C-order, or ``[q, C, H, W] -> [q, C * H * W]`` while shared."""

    layer: Flatten
    shape: tuple[int, ...]  # of one model's input
    shared: bool

    def forward(self, x: Tensor, packed: None, models: int) -> tuple[Tensor, Any]:
        if self.shared or len(self.shape) == 1:
            return x.flatten(-len(self.shape)), None
        return x.unflatten(1, (models, -1)).transpose(0, 1).flatten(2), None

    def backward(self, g: Tensor, saved: None, packed: None, rows: Tensor, fresh: bool) -> Tensor:
        if len(self.shape) == 1:
            return g
        return g.unflatten(2, self.shape).transpose(0, 1).flatten(1, 2).contiguous(memory_format=CHANNELS_LAST)
