"""Networks in 16-bit floats with channels that are multiples of eight: oneDNN's convolutions are up to three times slower with others, as
they multiply two or more channels of an input at once.

The channels that are added have no weights: they hold what the activation makes of zero, and nothing is made of them. Queries and
outputs stay. What the first layer makes is by far the most, and no gradient of the queries is made of it: its channels are only made even,
as with an odd number a model would read its neighbor's (convolutions.py). Twin: the network as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from torch import Tensor

from ..layers import Activation, Affine, Conv2d, Dropout, Flatten, Layer, Layers, Linear, Pool2d, layer_slots, numbers_of, shapes
from .steps import block

_CHANNELS, _FIRST = 8, 2  # of which their numbers are multiples: in general, and of what the first layer makes


@dataclass(frozen=True)
class Wide:
    """A network with more channels.

    Attributes:
        narrow: its layers as they are.
        layers: its layers with the channels that are added.
    """

    narrow: Layers
    layers: Layers

    def rows(self, weights: Tensor, models: int) -> Tensor:
        """Rows ``[models, P']`` of the wide network from those of the narrow one, ``[m, P]``; zeros where there is nothing to copy."""
        made = weights.new_zeros(models, numbers_of(self.layers))  # also of models that are not there
        for own, wide in self._pairs(weights, made[: len(weights)]):
            wide.copy_(own)
        return made

    def narrowed(self, gradient: Tensor, out: Tensor) -> None:
        """Write gradients ``[m, P]`` from those of the wide network, ``[m, P']``."""
        for own, wide in self._pairs(out, gradient):
            own.copy_(wide)

    def _pairs(self, narrow: Tensor, wide: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Views of each parameter in rows of both networks, of the same shape."""
        for own, other in zip(layer_slots(self.narrow), layer_slots(self.layers), strict=True):
            for a, b in ((own.weight, other.weight), (own.bias, other.bias)):
                if a is not None and b is not None:
                    yield block(narrow, a), block(wide, b)[tuple(slice(size) for size in (len(wide), *a.shape))]


@lru_cache(maxsize=256)
def widened(layers: Layers, input_shape: tuple[int, ...]) -> Wide | None:
    """A network with as many channels between its layers as these convolutions want; None where it has them, or where a layer has groups
    or numbers of each channel."""
    if any(isinstance(layer, Affine) or (isinstance(layer, Conv2d) and layer.groups > 1) for layer in layers):
        return None
    made: list[Layer] = []
    channels, sizes = 0, shapes(layers, input_shape)  # channels of what was made last, if they are more than the network's
    for i, layer in enumerate(layers):
        if isinstance(layer, Conv2d):
            unit = _CHANNELS if any(isinstance(below, (Conv2d, Linear)) for below in layers[:i]) else _FIRST
            wanted = -(-layer.out_channels // unit) * unit if _read(layers[i + 1 :]) else layer.out_channels
            made.append(replace(layer, in_channels=channels or layer.in_channels, out_channels=wanted))
            channels = wanted
        elif isinstance(layer, Linear):
            made.append(replace(layer, in_features=channels or layer.in_features))
            channels = 0
        else:
            channels = channels * sizes[i][1] * sizes[i][2] if isinstance(layer, Flatten) and len(sizes[i]) == 3 else channels
            made.append(layer)
    return Wide(layers, tuple(made)) if tuple(made) != layers else None


def _read(above: Layers) -> bool:
    """Whether a layer with weights reads what these layers are given, channel by channel up to there."""
    for layer in above:
        if isinstance(layer, (Conv2d, Linear)):
            return True
        if not isinstance(layer, (Activation, Dropout, Flatten, Pool2d)):
            return False
    return False


__all__ = ["Wide", "widened"]
