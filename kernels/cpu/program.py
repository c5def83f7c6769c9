"""A chain of layers compiled for the CPU: its steps, in an order that does less, on the part of the image that is looked at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..layers import Activation, Affine, Conv2d, Dropout, Flatten, Layer, Layers, Linear, Pool2d, Slot, Unplannable, layer_slots, shapes
from .activations import Function, function_of
from .steps import ActivationStep, AffineStep, ConvStep, FlattenStep, LinearStep, PoolStep, Step, needs_sixteen

Slotted = tuple[Layer, "Slot | None", "Slot | None"]  # a layer, its weight and its bias


@dataclass(frozen=True)
class Program:
    """A network compiled for the CPU: its steps, and the part of the image on which its outputs depend."""

    steps: tuple[Step, ...]
    crop: tuple[int, ...]  # of one query, no batch axis
    outputs: int
    first: int  # index of the first step with parameters
    fewest: int = 2  # images of a slab
    model_by_model: bool = False  # whether that first step wants each model's own queries apart, [m, q, C, H, W]


def _canonical(layers: Layers) -> list[Slotted]:
    """Layers with their slots: identities dropped, monotone activations moved behind the max pooling that follows them."""
    order: list[Slotted] = [
        (layer, slots.weight, slots.bias)
        for layer, slots in zip(layers, layer_slots(layers), strict=True)
        if not isinstance(layer, Dropout) and not (isinstance(layer, Activation) and layer.function == "identity")
    ]
    for i in range(len(order) - 1):
        act, above = order[i][0], order[i + 1][0]
        if isinstance(act, Activation) and _function(act).monotone(act) and isinstance(above, Pool2d) and above.mode == "max":
            order[i], order[i + 1] = order[i + 1], order[i]
    return order


def _function(layer: Activation) -> Function:
    function = function_of(layer)
    if function is None:
        raise Unplannable(f"layer {layer.name!r} (activation): the CPU engine does not know {layer.function!r}")
    return function


def _needed(layers: Sequence[Layer], sizes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Shape of the corner of the query that the outputs depend on (a pooling that floors leaves rows and columns unread)."""
    need = sizes[-1]
    for layer, full in zip(reversed(layers), reversed(sizes[:-1]), strict=True):
        if isinstance(layer, Pool2d):
            if layer.padding != (0, 0):
                need = full
                continue
            need = (full[0], *((n - 1) * s + k for n, s, k in zip(need[1:], layer.stride, layer.kernel_size, strict=True)))
        elif isinstance(layer, Conv2d):
            if layer.padding != (0, 0):  # padding belongs at the image's true edge
                need = full
                continue
            reach = (d * (k - 1) + 1 for d, k in zip(layer.spacing, layer.kernel_size, strict=True))
            need = (full[0], *((n - 1) * s + r for n, s, r in zip(need[1:], layer.stride, reach, strict=True)))
        elif not isinstance(layer, (Activation, Affine, Dropout)):  # which leave an image's size as it is
            need = full
    return need


def compile_program(layers: Layers, input_shape: tuple[int, ...], own_queries: bool) -> Program:
    """Steps for ``layers`` on queries of ``input_shape``; ``own_queries``: every model has its own, so nothing is shared."""
    slotted = _canonical(layers)
    order = [layer for layer, _, _ in slotted]
    sizes = shapes(tuple(order), input_shape)
    crop = _needed(order, sizes)
    if shapes(tuple(order), crop)[-1] != sizes[-1]:
        crop = tuple(input_shape)
    sizes = shapes(tuple(order), crop)
    if len(sizes[-1]) != 1:
        raise Unplannable(f"layer {layers[-1].name!r} ({layers[-1].kind}): a network ends in [K] outputs, not {list(sizes[-1])}")
    first = next((i for i, (_, weight, _) in enumerate(slotted) if weight is not None), None)
    if first is None:
        raise Unplannable(f"layer {layers[0].name!r} ({layers[0].kind}): no layer of the network has parameters")
    steps = _steps(slotted, sizes, -1 if own_queries else first, first)
    return Program(steps, crop, sizes[-1][0], first, _fewest(order))


def compile_segment(layers: Layers, input_shape: tuple[int, ...], shared: bool, input_gradient: bool) -> Program:
    """Steps for a chain that begins with a convolution, inside a larger network.

    ``shared``: its input is common to all models; ``input_gradient``: somebody wants the gradient of it. Only an input that is shared and
    wants none is cropped.
    """
    slotted = _canonical(layers)
    order = tuple(layer for layer, _, _ in slotted)
    crop = tuple(input_shape)
    if shared and not input_gradient:
        sizes = shapes(order, crop)
        needed = _needed(order, sizes)
        crop = needed if shapes(order, needed)[-1] == sizes[-1] else crop
    steps = _steps(slotted, shapes(order, crop), 0 if shared else -1, -1 if input_gradient else 0)
    return Program(steps, crop, 0, 0, _fewest(order))


def _fewest(order: Sequence[Layer]) -> int:
    return 16 if any(needs_sixteen(layer) for layer in order) else 2


def _steps(slotted: list[Slotted], sizes: Sequence[tuple[int, ...]], last_shared: int, last_without: int) -> tuple[Step, ...]:
    """A step a layer. Up to ``last_shared`` the input is common to all models, up to ``last_without`` nobody wants its gradient."""
    steps: list[Step] = []
    for i, (layer, weight, bias) in enumerate(slotted):
        shared, gradient = i <= last_shared, i > last_without
        below = steps[-1] if steps else None
        if isinstance(layer, Conv2d):
            assert weight is not None
            if shared and layer.groups > 1:
                raise Unplannable(f"layer {layer.name!r} (conv2d): a first layer with groups is left to the reference")
            steps.append(ConvStep(layer, weight, bias, shared, gradient))
        elif isinstance(layer, Linear):
            assert weight is not None
            steps.append(LinearStep(layer, weight, bias, shared, gradient))
        elif isinstance(layer, Pool2d):
            if isinstance(below, ConvStep) and (layer.mode == "max" or layer.padding == (0, 0)):  # padding would swallow some of the sum
                steps[-1] = replace(below, sums_bias=False)
                steps.append(PoolStep(layer, below.bias))
            else:
                steps.append(PoolStep(layer))
        elif isinstance(layer, Activation):
            steps.append(ActivationStep(layer, _function(layer), owned=isinstance(below, (ConvStep, LinearStep, PoolStep, AffineStep))))
        elif isinstance(layer, Flatten):
            steps.append(FlattenStep(layer, sizes[i], shared))
        elif isinstance(layer, Affine):
            assert weight is not None
            assert bias is not None
            steps.append(AffineStep(layer, weight, bias))
        else:
            raise Unplannable(f"layer {layer!r}: unknown kind")
    return tuple(steps)
