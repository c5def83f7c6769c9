"""How close is close. Tests take their bounds from here, as a relative L2 distance to a float64 loop (``wslfast.testing.relative_error``;
NaN is never close) or as ``rtol``, ``atol``, ``rel`` and ``abs`` of numbers of order one.

A number here is design, not measurement: who needs more says why beside the test. Tests of one file may ask for a stated share of a bar
(``FP32 / 2`` where a kernel has margin to spare). What is not about rounding, such as the bound of a statistic, stays in its test.
"""

from __future__ import annotations

from typing import NamedTuple

from wslfast.kernels.layers import Conv2d, Layers, Linear

FP64_ROUNDING = 1e-12  # float64: a short sum in another order
FP64 = 1e-10  # values in float64, whatever the path
FP64_GRADIENT = 1e-8  # and their gradients: sums of more terms

FP32_SMALL = 1e-7  # float32, of numbers that are themselves at most a hundredth
PRINTED = 5e-7  # an expected value that is written down with six decimals
FP32_ROUNDING = 1e-6  # float32: a few roundings, each of 6e-8, of a short sum, a mean or a norm
FP32 = 1e-5  # outputs, and every gradient by name
FP32_DEEP = 1e-4  # float32, element by element: many layers or long sums one after another (transformers, losses of whole networks)
FP32_AMPLIFIED = 1e-3  # float32 where rounding is magnified: matrices that are solved, small differences, steps of an optimiser


class Bars(NamedTuple):
    """What a precision of matrix products may cost: outputs, and the gradients of linear layers, convolutions, and the first convolution
    (where a maximum that rounding moved to its neighbor moves a gradient from one pixel to another)."""

    outputs: float
    linear: float
    convolution: float
    first: float


BARS = {
    "ieee": Bars(FP32, FP32, FP32, FP32),
    "tf32x3": Bars(FP32, FP32, FP32, FP32),
    "tf32": Bars(2e-3, 2e-3, 2e-2, 8e-2),
    "fp16": Bars(2e-3, 2e-3, 2e-2, 8e-2),
    "bf16": Bars(3e-2, 6e-2, 1e-1, 2e-1),
}


def allowed(layers: Layers, precision: str) -> dict[str, float]:
    """The bar of every layer's gradients, by the layer's name."""
    bars = BARS[precision]
    weighted = [layer for layer in layers if isinstance(layer, (Conv2d, Linear))]
    of = {layer.name: bars.linear if isinstance(layer, Linear) else bars.convolution for layer in weighted}
    if isinstance(weighted[0], Conv2d):
        of[weighted[0].name] = bars.first
    return of
