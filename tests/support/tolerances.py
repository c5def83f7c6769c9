"""How close is close: relative L2 distance to a float64 loop (``wslfast.testing.relative_error``; NaN is never close).

A number here is design, not measurement: who needs more says why beside the test. Tests of one file may ask for a stated share of a bar
(``FP32 / 2`` where a kernel has margin to spare).
"""

from __future__ import annotations

from typing import NamedTuple

from wslfast.kernels.layers import Conv2d, Layers, Linear

FP64 = 1e-10  # values in float64, whatever the path
FP64_GRADIENT = 1e-8  # and their gradients: sums of more terms
FP32 = 1e-5  # outputs, and every gradient by name


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
