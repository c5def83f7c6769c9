"""The schedule of a network: a layer list becomes stages, or a layer is refused by name.

``schedule(layers, input_shape)`` folds the layers into stages (stages.py), each one convolution or linear layer with the
pooling and the activation behind it, decides how each is tiled and where its numbers lie. How a kernel is launched: configurations.py.
All pure functions of shapes: no tensors and no Triton here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

from ..layers import Activation, Conv2d, Dropout, Flatten, Layer, Layers, Linear, Pool2d, Slot, Unplannable, layer_slots, shapes
from .stages import Placement, Schedule, Stage, blocks, power_of_two

MONOTONE = ("identity", "relu", "leakyrelu", "tanh", "sigmoid", "elu", "celu")  # their slope can be read off their output
ACTIVATIONS = (*MONOTONE, "silu", "gelu", "softplus")  # those of activations.py
PRECISIONS = ("fp16", "bf16", "tf32", "tf32x3", "ieee")
MAX_CHANNELS, MAX_FEATURES, MAX_KERNEL = 64, 16384, 7
GRADIENT_ACCUMULATORS = 96 * 128  # fp32 numbers a dW program holds: 96 registers in each of 128 threads


@dataclass(frozen=True)
class _Block:
    """The layers of one stage, collected."""

    layer: Conv2d | Linear
    slots: tuple[Slot, Slot | None]
    features: tuple[int, int, int]
    rows: tuple[int, int, int]  # the layer's input [C, H, W]
    activation: Activation | None = None
    pool: Pool2d | None = None
    act_first: bool = False


def _refuse(layer: Layer, why: str) -> Unplannable:
    return Unplannable(f"layer {layer.name!r} ({layer.kind}): {why}")


def _check_conv(layer: Conv2d) -> None:
    if layer.groups != 1:
        raise _refuse(layer, f"{layer.groups} groups; the kernels know 1")
    if layer.dilation != (1, 1):
        raise _refuse(layer, f"dilation {layer.dilation}; the kernels know 1")
    if layer.stride[0] != layer.stride[1] or layer.stride[0] not in (1, 2):
        raise _refuse(layer, f"stride {layer.stride}; the kernels know 1 and 2")
    if max(layer.kernel_size) > MAX_KERNEL:
        raise _refuse(layer, f"kernel {layer.kernel_size}; the kernels know 1 to {MAX_KERNEL}")
    if any(p >= k for p, k in zip(layer.padding, layer.kernel_size, strict=True)):
        raise _refuse(layer, f"padding {layer.padding}; the kernels know less than the kernel's size {layer.kernel_size}")
    if max(layer.in_channels, layer.out_channels) > MAX_CHANNELS:
        raise _refuse(layer, f"{layer.in_channels} -> {layer.out_channels} channels; the kernels know up to {MAX_CHANNELS}")


def _collect(layers: Layers, input_shape: tuple[int, ...]) -> list[_Block]:
    collected: list[_Block] = []
    flattened: tuple[int, ...] | None = None if len(input_shape) == 3 else (input_shape[0], 1, 1)
    where = shapes(layers, input_shape)
    for layer, slots, shape in zip(layers, layer_slots(layers), where[:-1], strict=True):
        if isinstance(layer, Dropout) or (isinstance(layer, Activation) and layer.function == "identity"):
            continue
        if isinstance(layer, Flatten):
            if len(shape) == 3:
                flattened = shape
            continue
        if isinstance(layer, Conv2d):
            _check_conv(layer)
            assert slots.weight is not None
            collected.append(_Block(layer, (slots.weight, slots.bias), (0, 0, 0), (shape[0], shape[1], shape[2])))
            continue
        if isinstance(layer, Linear):
            if layer.in_features > MAX_FEATURES or layer.out_features > MAX_FEATURES:
                raise _refuse(layer, f"{layer.weight_shape} weights; the kernels know up to {MAX_FEATURES} features")
            c, h, w = flattened if flattened is not None else (layer.in_features, 1, 1)
            flattened = None
            assert slots.weight is not None
            collected.append(_Block(layer, (slots.weight, slots.bias), (c, h, w), (layer.in_features, 1, 1)))
            continue
        if not collected:
            raise _refuse(layer, "comes before the first convolution or linear layer")
        last = collected[-1]
        if isinstance(layer, Activation):
            if last.activation is not None:
                raise _refuse(layer, "a second activation behind one layer")
            if layer.function not in ACTIVATIONS:
                raise _refuse(layer, f"{layer.function!r}; the kernels know {', '.join(ACTIVATIONS)}")
            if layer.function in ("elu", "celu") and layer.parameter <= 0:
                raise _refuse(layer, f"alpha {layer.parameter}; the kernels know alpha > 0")
            if layer.function == "softplus" and layer.parameter <= 0:
                raise _refuse(layer, f"beta {layer.parameter}; the kernels know beta > 0")
            collected[-1] = replace(last, activation=layer, act_first=last.pool is None)
            continue
        if not isinstance(layer, Pool2d):
            raise _refuse(layer, "unknown to the kernels")
        if flattened is not None or isinstance(last.layer, Linear):
            raise _refuse(layer, "pools what is not a map")
        if last.pool is not None:
            raise _refuse(layer, "a second pooling behind one layer")
        if layer.kernel_size != (2, 2) or layer.stride != (2, 2):
            raise _refuse(layer, f"window {layer.kernel_size} at stride {layer.stride}; the kernels know (2, 2)")
        collected[-1] = replace(last, pool=layer)
    if not collected:
        raise Unplannable("no convolution and no linear layer: nothing to run")
    if len(where[-1]) != 1 or isinstance(collected[-1].layer, Conv2d):
        raise _refuse(collected[-1].layer, f"the network ends in a map {list(where[-1])}; the kernels need a linear layer last")
    return collected


def _runs(length: int, columns: int) -> tuple[int, int]:
    """(elements a tile, tiles) that cover a patch row of ``length``: a tile costs its elements and a few more."""
    choices = [kd for kd in (64, 32, 16) if kd * columns <= 8192 and kd <= power_of_two(max(16, length))]
    kd = min(choices, key=lambda kd: (kd + 6) * blocks(length, kd))
    return kd, blocks(length, kd)


def _gradient_tiles(run: int, rows: int, columns: int, accumulators: int) -> tuple[int, int, int, int]:
    """(elements a tile, tiles, kernel rows a program, 0) of the weight gradient, or (elements a tile, 1, tiles a program, tiles) where
    tiles run on over kernel rows.

    Every pass reads the gradient again, and the matrix unit takes 64 elements at a time: fewer are repeated over warps. Tiles of
    one kernel row share what they read between the rows of the pooling window; tiles over all rows do not, but waste no
    elements at the end of a row. They are taken where products would be repeated, or where they save a tenth of them and 16
    columns make that the larger part.
    """
    fit = GRADIENT_ACCUMULATORS // columns
    by_row = [
        (kd, blocks(run, kd), taps, 0)
        for kd in (128, 64, 32, 16)
        if kd <= power_of_two(max(16, run))
        for taps in range(rows, 0, -1)
        if rows % taps == 0 and kd * taps <= fit
    ]
    best = min(by_row, key=lambda c: c[1] * (rows // c[2]) * (c[0] * c[2] + 4 * columns + 64))
    if rows == 1:
        return best
    flat = [
        (kd, 1, count, blocks(run * rows, kd))
        for kd in (128, 64)
        for count in range(blocks(run * rows, kd), 0, -1)
        if blocks(run * rows, kd) % count == 0 and kd * count <= fit
    ]
    other = min(flat, key=lambda c: (c[0] * c[3], c[3] // c[2] * (accumulators * c[0] * c[2] + 4 * columns + 64)), default=None)
    products = max(best[0], 64) * best[1] * rows
    saves = other is not None and 10 * other[0] * other[3] <= 9 * products
    return other if other is not None and saves and (best[0] < 64 or columns <= 16) else best


def _extent(size: int, kernel: int, stride: int, padding: int, pool: int) -> int:
    """Pooled outputs along one axis."""
    return ((size + 2 * padding - kernel) // stride + 1) // pool


def _maps(collected: list[_Block]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """(input, output) map of every block, rows and columns that no later layer reads left out: a pooling drops what does not
    fill a window, and then nobody needs the rows below that only the dropped ones saw."""
    out: list[tuple[tuple[int, int], tuple[int, int]]] = [((1, 1), (1, 1))] * len(collected)
    read: tuple[int, int] | None = None  # what the block above reads of this one's outputs
    for i in range(len(collected) - 1, -1, -1):
        layer, pool = collected[i].layer, 1 if collected[i].pool is None else 2
        if isinstance(layer, Linear):
            read = None
            continue
        geometry = list(zip(collected[i].rows[1:], layer.kernel_size, layer.stride, layer.padding, strict=True))
        outputs = read or tuple(_extent(*axis, pool) for axis in geometry)
        inputs = tuple(
            min(size, ((count - 1) * pool + pool - 1) * stride + kernel - padding)
            for count, (size, kernel, stride, padding) in zip(outputs, geometry, strict=True)
        )
        out[i], read = (inputs, outputs), inputs  # type: ignore[assignment]
    return out


def _stage(block: _Block, maps: tuple[tuple[int, int], tuple[int, int]], stored: int, first: bool, last: bool) -> Stage:
    """``maps``: see :func:`_maps`; ``stored``: channels (linear: features) of the input as the stage below stores them."""
    layer, act, pool = block.layer, block.activation, block.pool
    if isinstance(layer, Conv2d):
        (kh, kw), s, (py, px) = layer.kernel_size, layer.stride[0], layer.padding
        nout = layer.out_channels
    else:
        (kh, kw), s, (py, px) = (1, 1), 1, (0, 0)
        nout = layer.out_features
    p = 1 if pool is None else 2
    (h, w), (ho, wo) = maps
    # A dot needs 8 columns forward and, as the inner dimension of dX, P * N >= 16.
    n = max(16 // p, power_of_two(nout))
    name = "identity" if act is None else act.function
    if act is not None and name == "gelu" and act.approximate == "tanh":
        name = "gelu_tanh"
    parameter = 0.0 if act is None else float(act.parameter)
    monotone = name in MONOTONE and (name != "leakyrelu" or parameter >= 0)
    mode = "none" if pool is None else pool.mode
    act_first = block.act_first and pool is not None and name != "identity" and not (monotone and mode == "max")
    if name == "identity":
        slope = "one"
    elif act_first and mode == "avg":
        slope = "window"
    else:
        slope = "output" if monotone else "pooled"
    r, rx = (p - 1) * s + kh, (p - 1) * s + kw
    run = power_of_two(rx * stored)
    patch = r > 1 and power_of_two(r) * run <= 64
    bn = min(n, 16 if patch else 32) if p == 2 else min(n, 64)
    nd = bn * (p * p if patch else p)
    if patch:
        kd, nch = max(16, power_of_two(r) * run), 1
        kdw, nchw, ni, flat = kd, 1, 1, 0
    else:
        kd, nch = _runs(rx * stored, nd)
        kdw, nchw, ni, flat = _gradient_tiles(rx * stored, kh, nd, p)
    bc = min(power_of_two(stored), 64, max(8, 128 // (p * s) ** 2))
    return Stage(
        H=h,
        W=w,
        C=stored,
        KH=kh,
        KW=kw,
        S=s,
        PY=py,
        PX=px,
        P=p,
        POOL=mode,
        HO=ho,
        WO=wo,
        N=n,
        NOUT=nout,
        ACT=name,
        PARAM=parameter,
        ACT_FIRST=act_first,
        SLOPE=slope,
        BIAS=layer.bias,
        LAST=last,
        INPUT=first,
        PATCH=patch,
        RUN=run,
        KD=kd,
        NCH=nch,
        BN=bn,
        KDW=kdw,
        NCHW=nchw,
        NI=ni,
        FLAT=flat,
        BC=bc,
    )


@lru_cache(maxsize=256)
def schedule(layers: Layers, input_shape: tuple[int, ...]) -> Schedule:
    """The stages of a network for inputs of ``input_shape`` (no batch axis). Raises Unplannable naming a layer that does not fit."""
    collected = _collect(layers, tuple(input_shape))
    maps = _maps(collected)
    stages: list[Stage] = []
    placements: list[Placement] = []
    offset = 0
    for i, block in enumerate(collected):
        linear = isinstance(block.layer, Linear)
        if i == 0:
            # Pixels are stored with channels padded to a power of two; a vector to a multiple of 16.
            stored = blocks(block.rows[0], 16) * 16 if linear else power_of_two(block.rows[0])
        else:
            stored = stages[-1].OUTPUTS if linear else stages[-1].N
        stage = _stage(block, maps[i], stored, first=i == 0, last=i == len(collected) - 1)
        stages.append(stage)
        forward, backward = offset, offset + blocks(stage.WSIZE, 16) * 16
        offset = backward + blocks(stage.XSIZE, 16) * 16
        placements.append(Placement(block.layer.name, *block.slots, forward, backward, block.features))
    parameters = sum(p.weight.size + (p.bias.size if p.bias else 0) for p in placements)
    return Schedule(tuple(stages), tuple(placements), parameters, offset, stages[-1].NOUT, isinstance(collected[0].layer, Linear))


def needed_multiply_adds(stage: Stage, placement: Placement, role: str) -> int:
    """Multiply-adds a (model, query) pair that the maths needs, rows that nobody reads left out."""
    if stage.INPUT and role == "dx":
        return 0
    return stage.POSITIONS * stage.P**2 * math.prod(placement.weight.shape)


def executed_multiply_adds(stage: Stage, role: str) -> int:
    """Multiply-adds a (model, query) pair that the tiles execute, tails of the last tile left out."""
    if role == "dx":
        dots = (
            sum(
                1
                for ry in range(stage.PS)
                for y in range(stage.NY)
                for dy in range(stage.P)
                if 0 <= ry + y * stage.PS - dy * stage.S < stage.KH
            )
            * stage.NX
        )
        return 0 if stage.INPUT else stage.HB * stage.WB * dots * stage.P * stage.N * stage.CB * stage.PS * stage.BC
    tiles = stage.KRW * stage.NCHW * stage.KDW if role == "dw" else stage.KR * stage.NCH * stage.KD
    return stage.POSITIONS * stage.NB * stage.ACCS * tiles * stage.ND
