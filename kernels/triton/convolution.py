"""A stage of every model in one launch: convolution (or linear layer), pooling, activation. Its gradients: *_gradients.py.

Layouts (C, N padded channels, see stages.py; k models, n queries):

    x      [k, n, H, W, C]      stage input, or images [n, H, W, C] shared by all models or gathered through index [k, n]
    w      [k, packed]          forward form [NB, KR, NCH, KD, ND]
    y      [k, n, HO, WO, N]    output; the last stage's is fp32 and not padded
    code   like y, int8         which position of the window was the maximum: dy * P + dx
    slope  like y, or one for each position of the window [k, n, HO, WO, P * P, N]: act' where y does not determine it

With z = W * x + b the kernel stores y = pool(act(z)) or act(pool(z)).
"""
# mypy: allow-untyped-defs

from dataclasses import replace as replace_field

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launcher
from .activations import matmul
from .configurations import Configuration, configuration
from .devices import matrix_unit
from .launcher import launch
from .stages import Stage, blocks
from .tiles import between, held, patches, pool_and_store, query, share, weights, wide


@triton.jit
def _convolve(x, w, ws, acc0, acc1, q, oy, ox, mask, ch, s: tl.constexpr, c: tl.constexpr, INDEXED: tl.constexpr):
    """acc[dy] += A[a] @ W[a - dy * S] over the patch rows a, for run ``ch``; A, a tile of patches, is read once, in ``c.CUT`` parts."""
    S: tl.constexpr = s.S
    KD: tl.constexpr = s.KD
    CUT: tl.constexpr = c.CUT
    PART: tl.constexpr = s.KD // c.CUT
    SIZE: tl.constexpr = s.KD * s.ND // c.CUT
    KR: tl.constexpr = s.KR
    NCH: tl.constexpr = s.NCH
    TILES: tl.constexpr = s.TILES
    ACCS: tl.constexpr = s.ACCS
    PATCH: tl.constexpr = s.PATCH
    EXACT: tl.constexpr = s.EXACT
    PREC: tl.constexpr = c.PREC
    HOIST: tl.constexpr = c.HOIST
    for a in tl.static_range(TILES):
        for part in tl.static_range(CUT):
            A = patches(x, q, oy, ox, mask, a, ch * KD + part * PART, s, PATCH, PART, EXACT, False, INDEXED)
            if between(a, 0, KR):
                acc0 = matmul(A, weights(w, ws, (a * NCH + ch) * CUT + part, SIZE, HOIST), acc0, PREC)
            if ACCS == 2 and between(a - S, 0, KR):
                acc1 = matmul(A, weights(w, ws, ((a - S) * NCH + ch) * CUT + part, SIZE, HOIST), acc1, PREC)
    return acc0, acc1


@triton.jit
def forward_rows(
    x,
    index,
    rows,
    w,
    bias,
    bias_step,
    y,
    code,
    slope,
    t0,
    t1,
    block,
    s: tl.constexpr,
    c: tl.constexpr,
    INDEXED: tl.constexpr,
    GRAD: tl.constexpr,
):
    """Rows t0 to t1 of one model's output block; pointers are at the model's own numbers. ``rows``: images of the pool, when INDEXED."""
    HO: tl.constexpr = s.HO
    WO: tl.constexpr = s.WO
    BN: tl.constexpr = s.BN
    ND: tl.constexpr = s.ND
    NCH: tl.constexpr = s.NCH
    PART: tl.constexpr = s.KD // c.CUT
    SIZE: tl.constexpr = s.KD * s.ND // c.CUT
    COUNT: tl.constexpr = s.KR * s.NCH * c.CUT
    NOUT: tl.constexpr = s.NOUT
    HOIST: tl.constexpr = c.HOIST
    BM: tl.constexpr = c.BM
    nd = tl.arange(0, ND)
    wp = w + block * (COUNT * SIZE) + tl.arange(0, PART)[:, None] * ND + nd[None, :]  # [KD / CUT, ND]
    ws = held(wp, COUNT, SIZE, HOIST)
    b = tl.zeros([ND], tl.float32)
    if s.BIAS:
        channel = block * BN + nd % BN
        b = tl.load(bias + wide(channel) * bias_step, mask=channel < NOUT, other=0.0).to(tl.float32)
    for t in tl.range(t0, t1, BM, num_stages=c.STAGES):
        m = t + tl.arange(0, BM)
        mask = m < t1
        q = query(index, m // (HO * WO), mask, rows, INDEXED)
        oy = (m % (HO * WO)) // WO
        ox = m % WO
        acc0 = tl.zeros([BM, ND], tl.float32) + b[None, :]
        acc1 = acc0
        if HOIST:
            for ch in tl.static_range(NCH):
                acc0, acc1 = _convolve(x, wp, ws, acc0, acc1, q, oy, ox, mask, ch, s, c, INDEXED)
        else:
            for ch in tl.range(0, NCH, num_stages=c.STAGES):
                acc0, acc1 = _convolve(x, wp, ws, acc0, acc1, q, oy, ox, mask, ch, s, c, INDEXED)
        pool_and_store(acc0, acc1, y, code, slope, m, mask, block, s, c, GRAD)


# Not specialised on what differs between calls of one network: sizes, and how the caller's tensors are aligned and laid out.
@triton.jit(
    do_not_specialize=["n", "rows", "tiles", "programs", "bias_stride", "bias_step"], do_not_specialize_on_alignment=["index", "bias"]
)
def forward_kernel(
    x,
    index,
    w,
    bias,
    y,
    code,
    slope,
    n,
    rows,
    tiles,
    programs,
    w_stride,
    bias_stride,
    bias_step,
    s: tl.constexpr,
    c: tl.constexpr,
    SHARED: tl.constexpr,
    INDEXED: tl.constexpr,
    GRAD: tl.constexpr,
):
    """Program (model, output block, run of ``tiles`` row tiles)."""
    NB: tl.constexpr = s.NB
    INPUTS: tl.constexpr = s.INPUTS
    OUTPUTS: tl.constexpr = s.OUTPUTS
    CODES: tl.constexpr = s.CODES
    SLOPES: tl.constexpr = s.SLOPES
    POSITIONS: tl.constexpr = s.POSITIONS
    BM: tl.constexpr = c.BM
    j, block, t0, t1 = share(programs, NB, n * POSITIONS, tiles * BM)
    if INDEXED:
        index += j * n
    elif not SHARED:
        x += j * n * INPUTS
    forward_rows(
        x,
        index,
        rows,
        w + j * w_stride,
        bias + j * bias_stride,
        bias_step,
        y + j * n * OUTPUTS,
        code + j * n * CODES,
        slope + j * n * SLOPES,
        t0,
        t1,
        block,
        s,
        c,
        INDEXED,
        GRAD,
    )


def programs_of(rows: int, c: Configuration) -> tuple[int, int]:
    """(row tiles a program, programs a model): several tiles keep the weights that a program holds busy."""
    tiles = blocks(rows, c.BM)
    each = min(c.TILES, tiles)
    return each, blocks(tiles, each)


def rows_of(x: Tensor, stage: Stage) -> int:
    """Images behind ``x``: of a pool, those that an index may name."""
    return x.numel() // stage.INPUTS


def given(tensor: Tensor | None, other: Tensor) -> Tensor:
    """A kernel's argument that it does not read where there is none."""
    return other if tensor is None else tensor


def stage_forward(
    x: Tensor,
    index: Tensor | None,
    packed: Tensor,
    bias: Tensor,
    y: Tensor,
    code: Tensor | None,
    slope: Tensor | None,
    k: int,
    n: int,
    stage: Stage,
    config: Configuration,
    *,
    shared: bool,
    gradient: bool,
) -> None:
    """Launch the forward kernel of ``stage`` for all k models. ``packed`` begins at the stage's forward form, ``bias``
    ``[k, ...]`` at its bias in a row of weights; ``code`` and ``slope`` are written when ``gradient``."""
    each, programs = programs_of(n * stage.POSITIONS, config)
    launch(
        forward_kernel,
        k * stage.NB * programs,
        x,
        given(index, x),
        packed,
        bias,
        y,
        given(code, y),
        given(slope, y),
        n,
        rows_of(x, stage),
        each,
        programs,
        packed.stride(0),
        bias.stride(0),
        bias.stride(1),
        s=stage,
        c=config,
        SHARED=shared,
        INDEXED=index is not None,
        GRAD=gradient,
        warps=config.WARPS,
        registers=config.REGISTERS,
    )


def launch_configuration(role: str, stage: Stage, precision: str, device: torch.device) -> Configuration:
    """``configuration`` for a device; in the interpreter with a precision that it gets right."""
    chosen = configuration(role, stage, precision, matrix_unit(launcher.capability_of(device)))
    if precision == "bf16" and triton.knobs.runtime.interpret:
        return replace_field(chosen, PREC="bf16_emulated")
    return chosen
