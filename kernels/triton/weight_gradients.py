"""The weight gradient of a stage of every model in one launch. The input gradient: input_gradients.py.

Layouts as in convolution.py, and

    g      [k, n, HO, WO, N]    gradient of the output; written over the stored output of the stage below
    part   [k, row]             weight-gradient partials, splits outermost within a stage

``g`` holds dL/dz at the position that pooling chose (for averages: the share of each position). The gradients gather, so nothing is
added from two programs:

    dW[n, c, i, j] = sum over queries and outputs of  G(o, n) * x(o * S + (i, j) - padding, c)

where G spreads ``g`` over the pooling window: to the maximum alone, or to every position with its slope. Partials are summed up by
the fold (packing.py), in a fixed order. The bias' gradient is the sum of ``g``, beside them.
Twin: ``reference.loss_and_gradient``.
"""
# mypy: allow-untyped-defs

import triton
import triton.language as tl
from torch import Tensor

from .activations import matmul
from .configurations import Configuration, splits
from .convolution import given, rows_of
from .launcher import launch
from .stages import Stage, blocks
from .tables import step
from .tiles import between, deposit, output_gradient, patches, query, replace, share, spread, zeros


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
