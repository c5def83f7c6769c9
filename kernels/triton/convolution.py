"""A stage of every model in one launch: convolution (or linear layer), pooling, activation; and its two gradients.

Layouts (C, N padded channels, see stages.py; k models, n queries):

    x      [k, n, H, W, C]      stage input, or images [n, H, W, C] shared by all models or gathered through index [k, n]
    w      [k, packed]          forward form [NB, KR, NCH, KD, ND], input-gradient form [CB, KH, NX, NB, P * BN, PS * BC]
    y, g   [k, n, HO, WO, N]    output, overwritten by its gradient; the last stage's output is fp32 and not padded
    code   like y, int8         which position of the window was the maximum: dy * P + dx
    slope  like y, or one for each position of the window [k, n, HO, WO, P * P, N]: act' where y does not determine it
    part   [k, row]             weight-gradient partials, splits outermost within a stage

With z = W * x + b the forward kernel stores y = pool(act(z)) or act(pool(z)). ``g`` holds dL/dz at the position that pooling
chose (for averages: the share of each position). The gradients gather, so nothing is added from two programs:

    dW[n, c, i, j] = sum over queries and outputs of  G(o, n) * x(o * S + (i, j) - padding, c)
    dX(p, c)       = sum over n, i, j of              G((p + padding - (i, j)) / S, n) * W[n, c, i, j]

where G spreads ``g`` over the pooling window: to the maximum alone, or to every position with its slope.
"""
# mypy: allow-untyped-defs

from dataclasses import replace as replace_field

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import matmul, rounded, slope_of_output
from .schedule import Configuration, configuration, launch_options, splits
from .stages import Stage, blocks
from .tables import step
from .tiles import between, deposit, held, output_gradient, patches, pool_and_store, query, replace, share, spread, weights, wide, zeros


@triton.jit
def _convolve(x, w, ws, acc0, acc1, q, oy, ox, mask, ch, s: tl.constexpr, c: tl.constexpr):
    """acc[dy] += A[a] @ W[a - dy * S] over the patch rows a, for run ``ch``; A, a tile of patches, is read once."""
    S: tl.constexpr = s.S
    ND: tl.constexpr = s.ND
    KD: tl.constexpr = s.KD
    KR: tl.constexpr = s.KR
    NCH: tl.constexpr = s.NCH
    TILES: tl.constexpr = s.TILES
    ACCS: tl.constexpr = s.ACCS
    PATCH: tl.constexpr = s.PATCH
    EXACT: tl.constexpr = s.EXACT
    PREC: tl.constexpr = c.PREC
    HOIST: tl.constexpr = c.HOIST
    for a in tl.static_range(TILES):
        A = patches(x, q, oy, ox, mask, a, ch * KD, s, PATCH, KD, EXACT, False)
        if between(a, 0, KR):
            acc0 = matmul(A, weights(w, ws, a * NCH + ch, KD * ND, HOIST), acc0, PREC)
        if ACCS == 2 and between(a - S, 0, KR):
            acc1 = matmul(A, weights(w, ws, (a - S) * NCH + ch, KD * ND, HOIST), acc1, PREC)
    return acc0, acc1


@triton.jit
def forward_rows(
    x,
    index,
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
    """Rows t0 to t1 of one model's output block; pointers are at the model's own numbers."""
    HO: tl.constexpr = s.HO
    WO: tl.constexpr = s.WO
    BN: tl.constexpr = s.BN
    ND: tl.constexpr = s.ND
    KD: tl.constexpr = s.KD
    NCH: tl.constexpr = s.NCH
    TILE: tl.constexpr = s.KD * s.ND
    COUNT: tl.constexpr = s.KR * s.NCH
    NOUT: tl.constexpr = s.NOUT
    HOIST: tl.constexpr = c.HOIST
    BM: tl.constexpr = c.BM
    nd = tl.arange(0, ND)
    wp = w + block * (COUNT * TILE) + tl.arange(0, KD)[:, None] * ND + nd[None, :]  # [KD, ND]
    ws = held(wp, COUNT, TILE, HOIST)
    b = tl.zeros([ND], tl.float32)
    if s.BIAS:
        channel = block * BN + nd % BN
        b = tl.load(bias + wide(channel) * bias_step, mask=channel < NOUT, other=0.0).to(tl.float32)
    for t in tl.range(t0, t1, BM, num_stages=c.STAGES):
        m = t + tl.arange(0, BM)
        mask = m < t1
        q = query(index, m // (HO * WO), mask, INDEXED)
        oy = (m % (HO * WO)) // WO
        ox = m % WO
        acc0 = tl.zeros([BM, ND], tl.float32) + b[None, :]
        acc1 = acc0
        if HOIST:
            for ch in tl.static_range(NCH):
                acc0, acc1 = _convolve(x, wp, ws, acc0, acc1, q, oy, ox, mask, ch, s, c)
        else:
            for ch in tl.range(0, NCH, num_stages=c.STAGES):
                acc0, acc1 = _convolve(x, wp, ws, acc0, acc1, q, oy, ox, mask, ch, s, c)
        pool_and_store(acc0, acc1, y, code, slope, m, mask, block, s, c, GRAD)


@triton.jit(do_not_specialize=["n", "tiles", "programs"])
def forward_kernel(
    x,
    index,
    w,
    bias,
    y,
    code,
    slope,
    n,
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


@triton.jit
def dw_rows(
    x,
    index,
    g,
    code,
    slope,
    part,
    factor,
    keep,
    t0,
    t1,
    turn,
    s: tl.constexpr,
    c: tl.constexpr,
    INDEXED: tl.constexpr,
    ADD: tl.constexpr,
):
    """One model's dW[i] = A[i + dy * S]^T @ G[dy] over rows t0 to t1, for pass ``turn``; pointers as in forward_rows. When FLAT,
    i is not a kernel row but a tile over all of them."""
    HO: tl.constexpr = s.HO
    WO: tl.constexpr = s.WO
    S: tl.constexpr = s.S
    N: tl.constexpr = s.N
    BN: tl.constexpr = s.BN
    ND: tl.constexpr = s.ND
    KD: tl.constexpr = s.KDW
    KR: tl.constexpr = s.KRW
    FLAT: tl.constexpr = s.FLAT > 0
    NI: tl.constexpr = s.NI
    NCH: tl.constexpr = s.NCHW
    P: tl.constexpr = s.P
    ACCS: tl.constexpr = s.ACCS
    SUMS: tl.constexpr = s.ND if s.POOL == "avg" else s.BN
    BIAS_AT: tl.constexpr = s.NB * s.KRW * s.NCHW * s.KDW * s.ND
    PATCH: tl.constexpr = s.PATCH
    EXACT: tl.constexpr = s.EXACTW
    PREC: tl.constexpr = c.PREC
    BM: tl.constexpr = c.BM
    block = turn // (NCH * (KR // NI))  # turn = (output block, run, group of kernel rows or tiles)
    ch = turn // (KR // NI) % NCH
    i0 = turn % (KR // NI) * NI
    nd = tl.arange(0, ND)
    bn = tl.arange(0, BN)
    col = block * BN + nd % BN  # [ND]
    accs = zeros(NI, KD, ND)
    # Summed over rows once, after the loop: a reduction across threads in every tile costs more than the tile.
    sums = tl.zeros([BM, SUMS], tl.float32)
    for t in tl.range(t0, t1, BM, num_stages=c.STAGES):
        m = t + tl.arange(0, BM)
        mask = m < t1
        q = query(index, m // (HO * WO), mask, INDEXED)
        oy = (m % (HO * WO)) // WO
        ox = m % WO
        G, at = output_gradient(g, code, m, col, mask[:, None], s)
        G0 = spread(G, at, slope, m, col, mask[:, None], nd // BN, s)
        G1 = G0
        if ACCS == 2:
            G1 = spread(G, at, slope, m, col, mask[:, None], nd // BN + P, s)
        if s.POOL == "avg":
            sums += G0.to(tl.float32)
            if ACCS == 2:
                sums += G1.to(tl.float32)
        elif s.POOL == "max":
            sums += tl.load(g + m[:, None] * N + (block * BN + bn)[None, :], mask=mask[:, None], other=0.0).to(tl.float32)
        else:
            sums += G0.to(tl.float32)
        if FLAT:
            for i in tl.static_range(NI):
                A = tl.trans(patches(x, q, oy, ox, mask, 0, (i0 + i) * KD, s, False, KD, EXACT, True))
                acc = matmul(A, G0, accs[i], PREC)
                if ACCS == 2:
                    A = tl.trans(patches(x, q, oy, ox, mask, S, (i0 + i) * KD, s, False, KD, EXACT, True))
                    acc = matmul(A, G1, acc, PREC)
                accs = replace(accs, i, acc, NI)
        else:
            for a in tl.static_range(NI + (ACCS - 1) * S):
                A = tl.trans(patches(x, q, oy, ox, mask, i0 + a, ch * KD, s, PATCH, KD, EXACT, False))
                if between(a, 0, NI):
                    accs = replace(accs, a, matmul(A, G0, accs[a], PREC), NI)
                if ACCS == 2 and between(a - S, 0, NI):
                    accs = replace(accs, a - S, matmul(A, G1, accs[a - S], PREC), NI)
    tile = tl.arange(0, KD)[:, None] * ND + nd[None, :]
    for i in tl.static_range(NI):
        deposit(part + ((block * KR + i0 + i) * NCH + ch) * (KD * ND) + tile, accs[i], factor, keep, ADD)
    if (i0 == 0) & (ch == 0):
        bias = part + BIAS_AT + block * ND
        if s.POOL == "avg":
            deposit(bias + nd, tl.sum(sums, axis=0), factor, keep, ADD)
        else:
            deposit(bias + bn, tl.sum(sums, axis=0), factor, keep, ADD)


@triton.jit(do_not_specialize=["n", "count", "rows_per_split"])
def dw_kernel(
    x,
    index,
    g,
    code,
    slope,
    part,
    n,
    count,
    rows_per_split,
    part_stride,
    part_step,
    s: tl.constexpr,
    c: tl.constexpr,
    SHARED: tl.constexpr,
    INDEXED: tl.constexpr,
):
    """Program (model, pass, split): a partial of its own."""
    POSITIONS: tl.constexpr = s.POSITIONS
    PASSES: tl.constexpr = s.PASSES
    INPUTS: tl.constexpr = s.INPUTS
    CODES: tl.constexpr = s.CODES
    SLOPES: tl.constexpr = s.SLOPES
    j, turn, t0, t1 = share(count, PASSES, n * POSITIONS, rows_per_split)
    split = tl.program_id(0) % count
    if INDEXED:
        index += j * n
    elif not SHARED:
        x += j * n * INPUTS
    dw_rows(
        x,
        index,
        g + j * n * CODES,
        code + j * n * CODES,
        slope + j * n * SLOPES,
        part + j * part_stride + split * part_step,
        1.0,
        True,
        t0,
        t1,
        turn,
        s,
        c,
        INDEXED,
        False,
    )


@triton.jit
def _gather(g, code, slope, w, ws, accs, q, by, bx, mask, nb, s: tl.constexpr, c: tl.constexpr):
    """acc[ry] += G @ W[i] over the pooled positions whose patch meets the block, i = ry + ny * PS - dy * S, for output
    block ``nb``. A product takes JX columns of the pooling window at once: reading them one by one reads ``g`` once."""
    HO: tl.constexpr = s.HO
    WO: tl.constexpr = s.WO
    S: tl.constexpr = s.S
    P: tl.constexpr = s.P
    PS: tl.constexpr = s.PS
    BN: tl.constexpr = s.BN
    NB: tl.constexpr = s.NB
    NY: tl.constexpr = s.NY
    NX: tl.constexpr = s.NX
    KH: tl.constexpr = s.KH
    JX: tl.constexpr = s.JX
    TURNS: tl.constexpr = s.P // s.JX
    HOIST: tl.constexpr = c.HOIST
    PREC: tl.constexpr = c.PREC
    TILE: tl.constexpr = s.JX * s.BN * s.PS * s.BC
    kx = tl.arange(0, JX * BN)
    col = nb * BN + kx % BN
    for ny in tl.static_range(NY):
        for nx in tl.static_range(NX):
            oy = by - ny
            ox = bx - nx
            inside = mask & (oy >= 0) & (oy < HO) & (ox >= 0) & (ox < WO)
            m = (q * HO + oy) * WO + ox
            G, at = output_gradient(g, code, m, col, inside[:, None], s)
            for dy in tl.static_range(P):
                for dx in tl.static_range(TURNS):
                    A = spread(G, at, slope, m, col, inside[:, None], kx // BN + (dy * P + dx), s)
                    for ry in tl.static_range(PS):
                        if between(ry + ny * PS - dy * S, 0, KH):
                            B = weights(w, ws, (((ry + ny * PS - dy * S) * NX + nx) * NB + nb) * TURNS + dx, TILE, HOIST)
                            accs = replace(accs, ry, matmul(A, B, accs[ry], PREC), PS)
    return accs


@triton.jit
def dx_rows(g, code, slope, w, xg, below_slope, t0, t1, cb, s: tl.constexpr, below: tl.constexpr, c: tl.constexpr):
    """Rows t0 to t1 of one model's input gradient, channel block ``cb``; a row is a block of PS x PS input pixels."""
    H: tl.constexpr = s.H
    W: tl.constexpr = s.W
    C: tl.constexpr = s.C
    PS: tl.constexpr = s.PS
    PY: tl.constexpr = s.PY
    PX: tl.constexpr = s.PX
    BC: tl.constexpr = s.BC
    NB: tl.constexpr = s.NB
    HB: tl.constexpr = s.HB
    WB: tl.constexpr = s.WB
    KX: tl.constexpr = s.JX * s.BN
    NXD: tl.constexpr = s.PS * s.BC
    TILE: tl.constexpr = s.JX * s.BN * s.PS * s.BC
    COUNT: tl.constexpr = s.KH * s.NX * s.NB * (s.P // s.JX)
    SHARE: tl.constexpr = 0.25 if below.POOL == "avg" else 1.0
    ACT: tl.constexpr = below.ACT
    PARAM: tl.constexpr = below.PARAM
    HOIST: tl.constexpr = c.HOIST
    PREC: tl.constexpr = c.PREC
    BM: tl.constexpr = c.BM
    rc = tl.arange(0, NXD)
    wp = w + cb * (COUNT * TILE) + tl.arange(0, KX)[:, None] * NXD + rc[None, :]  # [KX, NXD]
    ws = held(wp, COUNT, TILE, HOIST)
    for t in tl.range(t0, t1, BM, num_stages=c.STAGES):
        m = t + tl.arange(0, BM)
        mask = m < t1
        q = m // (HB * WB)
        by = (m % (HB * WB)) // WB
        bx = m % WB
        accs = zeros(PS, BM, NXD)
        if HOIST:
            for nb in tl.static_range(NB):
                accs = _gather(g, code, slope, wp, ws, accs, q, by, bx, mask, nb, s, c)
        else:
            for nb in tl.range(0, NB, num_stages=c.STAGES):
                accs = _gather(g, code, slope, wp, ws, accs, q, by, bx, mask, nb, s, c)
        channel = cb * BC + rc % BC
        ix = (bx * PS - PX)[:, None] + (rc // BC)[None, :]
        for ry in tl.static_range(PS):
            iy = by * PS + (ry - PY)
            inside = (mask & (iy >= 0) & (iy < H))[:, None] & (ix >= 0) & (ix < W) & (channel < C)[None, :]
            p = ((q * H + iy)[:, None] * W + ix) * C + channel[None, :]  # [BM, NXD]
            out = accs[ry] * SHARE
            if below.SLOPE == "output":
                y = tl.load(xg + p, mask=inside, other=0.0).to(tl.float32)
                out = out * slope_of_output(y, ACT, PARAM)
            elif below.SLOPE == "pooled":
                out = out * tl.load(below_slope + p, mask=inside, other=0.0).to(tl.float32)
            tl.store(xg + p, rounded(out, PREC), mask=inside)


@triton.jit(do_not_specialize=["n", "tiles", "programs"])
def dx_kernel(
    g,
    code,
    slope,
    w,
    xg,
    below_slope,
    n,
    tiles,
    programs,
    w_stride,
    s: tl.constexpr,
    below: tl.constexpr,
    c: tl.constexpr,
):
    """Program (model, channel block, run of row tiles). dL/dz of the stage below is written over that stage's stored output
    ``xg``, which nothing reads any more."""
    BLOCKS: tl.constexpr = s.HB * s.WB
    CB: tl.constexpr = s.CB
    INPUTS: tl.constexpr = s.INPUTS
    CODES: tl.constexpr = s.CODES
    SLOPES: tl.constexpr = s.SLOPES
    BM: tl.constexpr = c.BM
    j, cb, t0, t1 = share(programs, CB, n * BLOCKS, tiles * BM)
    dx_rows(
        g + j * n * CODES,
        code + j * n * CODES,
        slope + j * n * SLOPES,
        w + j * w_stride,
        xg + j * n * INPUTS,
        below_slope + j * n * INPUTS,
        t0,
        t1,
        cb,
        s,
        below,
        c,
    )


def _programs(rows: int, c: Configuration) -> tuple[int, int]:
    """(row tiles a program, programs a model): several tiles keep the weights that a program holds busy."""
    tiles = blocks(rows, c.BM)
    each = min(c.TILES, tiles)
    return each, blocks(tiles, each)


def _given(tensor: Tensor | None, other: Tensor) -> Tensor:
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
    each, programs = _programs(n * stage.POSITIONS, config)
    forward_kernel[(k * stage.NB * programs,)](
        x,
        _given(index, x),
        packed,
        bias,
        y,
        _given(code, y),
        _given(slope, y),
        n,
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
        **launch_options(config.WARPS, config.REGISTERS),
    )


def stage_dw(
    x: Tensor,
    index: Tensor | None,
    g: Tensor,
    code: Tensor | None,
    slope: Tensor | None,
    partials: Tensor,
    k: int,
    n: int,
    stage: Stage,
    config: Configuration,
    *,
    shared: bool,
) -> None:
    """Launch the weight-gradient kernel; ``partials`` ``[k, ...]`` begins at the stage's first split."""
    count = splits(stage, n)
    per_split = blocks(blocks(n * stage.POSITIONS, count), config.BM) * config.BM
    dw_kernel[(k * stage.PASSES * count,)](
        x,
        _given(index, x),
        g,
        _given(code, g),
        _given(slope, g),
        partials,
        n,
        count,
        per_split,
        partials.stride(0),
        step(stage),
        s=stage,
        c=config,
        SHARED=shared,
        INDEXED=index is not None,
        **launch_options(config.WARPS, config.REGISTERS),
    )


def stage_dx(
    g: Tensor,
    code: Tensor | None,
    slope: Tensor | None,
    packed: Tensor,
    xg: Tensor,
    below_slope: Tensor | None,
    k: int,
    n: int,
    stage: Stage,
    below: Stage,
    config: Configuration,
) -> None:
    """Launch the input-gradient kernel: ``xg`` holds the stage's input and receives dL/dz of the stage ``below``."""
    each, programs = _programs(n * stage.HB * stage.WB, config)
    dx_kernel[(k * stage.CB * programs,)](
        g,
        _given(code, g),
        _given(slope, g),
        packed,
        xg,
        _given(below_slope, xg),
        n,
        each,
        programs,
        packed.stride(0),
        s=stage,
        below=below,
        c=config,
        **launch_options(config.WARPS, config.REGISTERS),
    )


def launch_configuration(role: str, stage: Stage, precision: str, device: torch.device) -> Configuration:
    """``configuration`` for a device; in the interpreter with a precision that it gets right."""
    hopper = device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= 9
    chosen = configuration(role, stage, precision, hopper)
    if precision == "bf16" and triton.knobs.runtime.interpret:
        return replace_field(chosen, PREC="bf16_emulated")
    return chosen
