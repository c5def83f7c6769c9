"""The two gradients of a stage of every model, in one launch each.

Layouts as in convolution.py, and

    w      [k, packed]          input-gradient form [CB, KH, NX, NB, P * BN, PS * BC]
    g      [k, n, HO, WO, N]    gradient of the output; written over the stored output of the stage below
    part   [k, row]             weight-gradient partials, splits outermost within a stage

``g`` holds dL/dz at the position that pooling chose (for averages: the share of each position). The gradients gather, so nothing is
added from two programs:

    dW[n, c, i, j] = sum over queries and outputs of  G(o, n) * x(o * S + (i, j) - padding, c)
    dX(p, c)       = sum over n, i, j of              G((p + padding - (i, j)) / S, n) * W[n, c, i, j]

where G spreads ``g`` over the pooling window: to the maximum alone, or to every position with its slope.
"""
# mypy: allow-untyped-defs

import triton
import triton.language as tl
from torch import Tensor

from .activations import matmul, rounded, slope_of_output
from .convolution import given, programs_of, rows_of
from .launcher import launch
from .schedule import Configuration, splits
from .stages import Stage, blocks
from .tables import step
from .tiles import between, deposit, held, output_gradient, patches, query, replace, share, spread, synchronise, weights, zeros


@triton.jit
def dw_rows(
    x,
    index,
    rows,
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
    NI: tl.constexpr = s.NI // c.TURNS
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
        q = query(index, m // (HO * WO), mask, rows, INDEXED)
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
                A = tl.trans(patches(x, q, oy, ox, mask, 0, (i0 + i) * KD, s, False, KD, EXACT, True, INDEXED))
                acc = matmul(A, G0, accs[i], PREC)
                if ACCS == 2:
                    A = tl.trans(patches(x, q, oy, ox, mask, S, (i0 + i) * KD, s, False, KD, EXACT, True, INDEXED))
                    acc = matmul(A, G1, acc, PREC)
                accs = replace(accs, i, acc, NI)
        else:
            for a in tl.static_range(NI + (ACCS - 1) * S):
                A = tl.trans(patches(x, q, oy, ox, mask, i0 + a, ch * KD, s, PATCH, KD, EXACT, False, INDEXED))
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


@triton.jit(do_not_specialize=["n", "rows", "count", "rows_per_split"], do_not_specialize_on_alignment=["index"])
def dw_kernel(
    x,
    index,
    g,
    code,
    slope,
    part,
    n,
    rows,
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
    PASSES: tl.constexpr = s.PASSES * c.TURNS
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
        rows,
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
            # The tile is read as a whole before any of it is overwritten, whichever thread holds which number.
            synchronise()
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
    launch(
        dw_kernel,
        k * stage.PASSES * config.TURNS * count,
        x,
        given(index, x),
        g,
        given(code, g),
        given(slope, g),
        partials,
        n,
        rows_of(x, stage),
        count,
        per_split,
        partials.stride(0),
        step(stage),
        s=stage,
        c=config,
        SHARED=shared,
        INDEXED=index is not None,
        warps=config.WARPS,
        registers=config.REGISTERS,
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
    each, programs = programs_of(n * stage.HB * stage.WB, config)
    launch(
        dx_kernel,
        k * stage.CB * programs,
        g,
        given(code, g),
        given(slope, g),
        packed,
        xg,
        given(below_slope, xg),
        n,
        each,
        programs,
        packed.stride(0),
        s=stage,
        below=below,
        c=config,
        warps=config.WARPS,
        registers=config.REGISTERS,
    )
