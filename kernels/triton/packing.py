"""Into the kernels' layout and out of it: weights, queries, weight gradients. Each is one launch for all models.

    pack    packed[j, t] = round(weights[j, table[t]]), 0 where table[t] = -1
    stack   images[q, y, x, c] = round(queries[q, c, y, x]), padded channels 0
    fold    gradient[j, p] = scale / gain[j] * sum over splits s and places d of partials[j, places[p, d] + s * steps[p]]

``prepare`` packs and stacks in one launch. Twins: ``pack`` and ``fold`` in tables.py.
"""
# mypy: allow-untyped-defs

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .activations import rounded
from .launcher import launch
from .stages import Schedule, blocks
from .tables import FoldTables, pack_table
from .tiles import wide

TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def storage(precision: str) -> torch.dtype:
    """What activations, gradients and packed weights are stored as."""
    return TYPES.get(precision, torch.float32)


@triton.jit
def _pack(weights, table, out, programs, packed, stride, step, pid, B: tl.constexpr, PREC: tl.constexpr):
    j = wide(pid // programs)
    t = (pid % programs) * B + tl.arange(0, B)
    mask = t < packed
    at = tl.load(table + t, mask=mask, other=-1)
    v = tl.load(weights + j * stride + wide(at) * step, mask=at >= 0, other=0.0).to(tl.float32)
    tl.store(out + j * packed + t, rounded(v, PREC), mask=mask)


@triton.jit
def _stack(
    queries,
    out,
    count,
    channels,
    q_stride,
    c_stride,
    y_stride,
    x_stride,
    pid,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    B: tl.constexpr,
    PREC: tl.constexpr,
):
    e = wide(pid) * B + tl.arange(0, B)
    mask = e < count
    c = e % C
    pixel = e // C
    x = pixel % W
    y = pixel // W % H
    q = pixel // (W * H)
    at = q * q_stride + c * c_stride + y * y_stride + x * x_stride
    v = tl.load(queries + at, mask=mask & (c < channels), other=0.0).to(tl.float32)
    tl.store(out + e, rounded(v, PREC), mask=mask)


@triton.jit(do_not_specialize=["programs", "packed", "stride", "step"], do_not_specialize_on_alignment=["weights"])
def pack_kernel(weights, table, out, programs, packed, stride, step, B: tl.constexpr, PREC: tl.constexpr):
    _pack(weights, table, out, programs, packed, stride, step, tl.program_id(0), B, PREC)


@triton.jit(
    do_not_specialize=["count", "channels", "q_stride", "c_stride", "y_stride", "x_stride"], do_not_specialize_on_alignment=["queries"]
)
def stack_kernel(
    queries,
    out,
    count,
    channels,
    q_stride,
    c_stride,
    y_stride,
    x_stride,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    B: tl.constexpr,
    PREC: tl.constexpr,
):
    _stack(queries, out, count, channels, q_stride, c_stride, y_stride, x_stride, tl.program_id(0), H, W, C, B, PREC)


@triton.jit(
    do_not_specialize=[
        "first", "programs", "packed", "stride", "step", "count", "channels", "q_stride", "c_stride", "y_stride", "x_stride",
    ],
    do_not_specialize_on_alignment=["weights", "queries"],
)  # fmt: skip
def prepare_kernel(
    weights,
    table,
    out,
    first,
    programs,
    packed,
    stride,
    step,
    queries,
    images,
    count,
    channels,
    q_stride,
    c_stride,
    y_stride,
    x_stride,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    B: tl.constexpr,
    PREC: tl.constexpr,
):
    """The first ``first`` programs pack, the others stack."""
    pid = tl.program_id(0)
    if pid < first:
        _pack(weights, table, out, programs, packed, stride, step, pid, B, PREC)
    else:
        _stack(queries, images, count, channels, q_stride, c_stride, y_stride, x_stride, pid - first, H, W, C, B, PREC)


@triton.jit
def gathered(partials, places, steps, counts, p, mask, most, D: tl.constexpr):
    """Gradients of the parameters p: the sum over splits s < counts[p] and places d, s outermost."""
    count = tl.load(counts + p, mask=mask, other=0)
    step = tl.load(steps + p, mask=mask, other=0)
    acc = tl.zeros(p.shape, tl.float32)
    for s in tl.range(0, most, num_stages=1):
        for d in tl.static_range(D):
            at = tl.load(places + p * D + d, mask=mask, other=-1)
            acc += tl.load(partials + at + s * step, mask=(at >= 0) & (s < count), other=0.0)
    return acc


@triton.jit(do_not_specialize=["programs", "parameters", "most", "scale"], do_not_specialize_on_alignment=["out"])
def fold_kernel(
    partials,
    places,
    steps,
    counts,
    gain,
    out,
    programs,
    parameters,
    most,
    row,
    scale,
    D: tl.constexpr,
    B: tl.constexpr,
):
    pid = tl.program_id(0)
    j = wide(pid // programs)
    p = (pid % programs) * B + tl.arange(0, B)
    mask = p < parameters
    acc = gathered(partials + j * row, places, steps, counts, p, mask, most, D)
    tl.store(out + j * parameters + p, acc * (scale / tl.load(gain + j)), mask=mask)


def _packing(weights: Tensor, schedule: Schedule, precision: str) -> tuple[Tensor, int, tuple[Tensor, ...], tuple[int, ...]]:
    """(packed weights to fill, programs, the kernel's tensors, its sizes)."""
    k = weights.shape[0]
    out = torch.empty(k, schedule.packed, dtype=storage(precision), device=weights.device)
    programs = blocks(schedule.packed, 1024)
    table = pack_table(schedule, weights.device)
    return out, k * programs, (weights, table, out), (programs, schedule.packed, weights.stride(0), weights.stride(1))


def _stacking(queries: Tensor, schedule: Schedule, rank: int, precision: str) -> tuple[Tensor, tuple[Any, ...], dict[str, int]]:
    """(images to fill, the kernel's arguments, its constants)."""
    stage = schedule.stages[0]
    queries = queries.reshape(-1, *queries.shape[queries.ndim - rank :])
    if schedule.flat_input:
        queries = queries.flatten(1)
    out = torch.empty(queries.shape[0], stage.INPUTS, dtype=storage(precision), device=queries.device)
    strides = (*queries.stride(), 0, 0) if schedule.flat_input else queries.stride()
    return out, (queries, out, out.numel(), queries.shape[1], *strides), {"H": stage.H, "W": stage.W, "C": stage.C}


def pack(weights: Tensor, schedule: Schedule, precision: str) -> Tensor:
    """``[k, P]`` weights of any strides -> ``[k, packed]`` operands."""
    out, programs, tensors, sizes = _packing(weights, schedule, precision)
    launch(pack_kernel, programs, *tensors, *sizes, B=1024, PREC=precision)
    return out


def stack(queries: Tensor, schedule: Schedule, rank: int, precision: str) -> Tensor:
    """Queries ``[..., C, H, W]`` (``rank`` 3) or ``[..., features]`` (1) -> ``[rows, H * W * C]`` as the first stage reads
    them. A network that begins with a linear layer reads an image as a vector in C-order."""
    out, arguments, shape = _stacking(queries, schedule, rank, precision)
    launch(stack_kernel, blocks(out.numel(), 1024), *arguments, **shape, B=1024, PREC=precision)
    return out


def prepare(weights: Tensor, queries: Tensor, schedule: Schedule, rank: int, precision: str) -> tuple[Tensor, Tensor]:
    """``pack`` and ``stack`` in one launch."""
    packed, first, tensors, sizes = _packing(weights, schedule, precision)
    images, arguments, shape = _stacking(queries, schedule, rank, precision)
    programs = first + blocks(images.numel(), 1024)
    launch(prepare_kernel, programs, *tensors, first, *sizes, *arguments, **shape, B=1024, PREC=precision)
    return packed, images


_pools: WeakIdKeyDictionary = WeakIdKeyDictionary()  # pool -> (what its stacked form depends on, that form)


def stack_pool(pool: Tensor, schedule: Schedule, rank: int, precision: str) -> Tensor:
    """:func:`stack` of a pool that many calls index: stacked once and kept as long as the pool lives and nobody writes to it.

    Kept for one stream, the one that wrote it, and not while a CUDA graph is being captured, whose memory is the graph's own.
    """
    if pool.is_inference() or (pool.is_cuda and torch.cuda.is_current_stream_capturing()):
        return stack(pool, schedule, rank, precision)
    stream = torch.cuda.current_stream(pool.device).cuda_stream if pool.is_cuda else 0
    stage = schedule.stages[0]
    state = (pool._version, pool.data_ptr(), pool.shape, pool.stride(), stage.H, stage.W, stage.C, rank, precision, stream)
    stacked_as, images = _pools.get(pool, (None, None))
    if stacked_as != state or images is None:
        images = stack(pool, schedule, rank, precision)
        _pools[pool] = (state, images)
    return images


def fold(partials: Tensor, gain: Tensor, out: Tensor, schedule: Schedule, tables: FoldTables, scale: float) -> None:
    """``[k, row]`` partials -> ``out`` ``[k, P]``, contiguous."""
    k = partials.shape[0]
    programs = blocks(schedule.parameters, 256)
    launch(
        fold_kernel,
        k * programs,
        partials,
        tables.places,
        tables.steps,
        tables.counts,
        gain,
        out,
        programs,
        schedule.parameters,
        max(tables.splits),
        tables.row,
        scale,
        D=tables.places.shape[1],
        B=256,
    )
