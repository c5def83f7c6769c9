"""Networks run one layer with weights at a time, all models at once, with the patches that each layer's rows meet in hand.

What a layer's rows are multiplied with is wanted twice: its second moment says which directions matter, and its product with the
rows is the layer's output. So it is laid out once, ``[k, R, width]``, channels-last (runs of whole pixels are copied, not single numbers),
and the small things, moments and rows, are put in order instead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Union

import torch
import torch.nn.functional as F
from torch import Tensor

from ..architecture import Architecture
from ..kernels.layers import Conv2d, Layers, Linear, shapes
from ..kernels.reference import forward_one


@dataclass(frozen=True)
class Unit:
    """A layer with weights and what follows it up to the next one.

    Activations between units are ``[m, ...]``: the n queries of one model after another (m = k n), or once for all models (m = n).

    Attributes:
        layer: the one with weights.
        rest: layers behind it, without weights.
        outputs: shape of what ``layer`` makes of one query.
    """

    layer: Union[Conv2d, Linear]
    rest: Layers
    outputs: tuple[int, ...]

    @property
    def width(self) -> int:
        """Numbers of a row: the weights of one output, then its bias if there is one."""
        return math.prod(self.layer.weight_shape[1:]) + self.layer.bias

    @property
    def positions(self) -> int:
        """Places of one query at which the rows are applied."""
        return math.prod(self.outputs[1:])

    def patches(self, x: Tensor, k: int = 1) -> Tensor:
        """``[k n, *input] -> [k, n * positions, width]``: what the rows meet, pixels before channels, 1 last if there is a bias."""
        layer, width = self.layer, self.width - self.layer.bias
        if isinstance(layer, Linear):
            if not layer.bias:
                return x.view(k, -1, width)
            out = x.new_empty(len(x), width + 1)
            out[:, :width] = x
        else:
            (down, right), (height, size) = layer.padding, layer.kernel_size
            x = F.pad(x, (right, right, down, down)) if down or right else x
            x = x.permute(0, 2, 3, 1).contiguous()
            image, line, pixel = x.stride()[:3]
            (sy, sx), (dy, dx) = layer.stride, layer.spacing
            windows = x.as_strided(
                (len(x), *self.outputs[1:], height, size, x.shape[3]), (image, sy * line, sx * pixel, dy * line, dx * pixel, 1)
            )
            out = x.new_empty(len(x) * self.positions, self.width)
            out[:, :width].unflatten(1, (height, size, -1)).unflatten(0, windows.shape[:3]).copy_(windows)
        if layer.bias:
            out[:, width] = 1
        return out.view(k, -1, self.width)

    def _order(self, device: torch.device) -> Tensor:
        """Places in a row, ``[C, kh, kw]`` and bias, of a patch's numbers, ``[kh, kw, C]`` and bias."""
        places = torch.arange(self.width, device=device)
        if isinstance(self.layer, Conv2d):
            width = self.width - self.layer.bias
            places[:width] = places[:width].view(self.layer.weight_shape[1:]).permute(1, 2, 0).flatten()
        return places

    def moment(self, patches: Tensor, others: Tensor) -> Tensor:
        """``E[x y^T]`` over queries and positions, ``[k, width, width]``, in the order of the rows."""
        back = self._order(patches.device).argsort()
        return (patches.mT @ others / patches.shape[1])[:, back][:, :, back]

    def __call__(self, rows: Tensor, patches: Tensor) -> Tensor:
        """Rows ``[k, channels, width]`` on patches ``[k, R, width]`` or ``[1, R, width]``: what reaches the next unit, ``[k n, ...]``."""
        made = patches @ rows[..., self._order(rows.device)].mT  # [k, R, channels]
        if isinstance(self.layer, Linear):
            made = made.flatten(0, 1)
        else:
            made = made.view(-1, *self.outputs[1:], self.outputs[0]).permute(0, 3, 1, 2)
        return forward_one(made.new_zeros(0), made, self.rest)


def units_of(architecture: Architecture) -> tuple[Layers, tuple[Unit, ...]]:
    """What comes before the first layer with weights, and the units of a planned architecture without grouped convolutions."""
    layers = architecture.layers
    sizes = shapes(layers, architecture.input_shape)
    starts = [i for i, layer in enumerate(layers) if isinstance(layer, (Conv2d, Linear))]
    ends = [*starts[1:], len(layers)]
    made = (Unit(layers[a], layers[a + 1 : b], sizes[a + 1]) for a, b in zip(starts, ends, strict=True))  # type: ignore[arg-type]
    return layers[: starts[0]], tuple(made)


def before_units(queries: Tensor, head: Layers) -> Tensor:
    """What reaches the first unit, ``[n, ...]``: the same for every model."""
    return forward_one(queries.new_zeros(0), queries, head)
