"""The input gradient of a stage of every model in one launch.

Layouts as in weight_gradients.py, and

    w      [k, packed]          input-gradient form [CB, KH, NX, NB, P * BN, PS * BC]

    dX(p, c)  = sum over n, i, j of  G((p + padding - (i, j)) / S, n) * W[n, c, i, j]

It gathers, so nothing is added from two programs; dL/dz of the stage below is written over that stage's stored output.
"""
# mypy: allow-untyped-defs

import triton
import triton.language as tl
from torch import Tensor

from .activations import matmul, rounded, slope_of_output
from .configurations import Configuration
from .convolution import given, programs_of
from .launcher import launch
from .stages import Stage
from .tiles import between, held, output_gradient, replace, share, spread, synchronise, weights, zeros


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
    TURNS: tl.constexpr = s.P // s.JX
    CUT: tl.constexpr = c.CUT
    PART: tl.constexpr = s.JX * s.BN // c.CUT
    HOIST: tl.constexpr = c.HOIST
    PREC: tl.constexpr = c.PREC
    TILE: tl.constexpr = s.JX * s.BN * s.PS * s.BC // c.CUT
    for ny in tl.static_range(NY):
        for nx in tl.static_range(NX):
            oy = by - ny
            ox = bx - nx
            inside = mask & (oy >= 0) & (oy < HO) & (ox >= 0) & (ox < WO)
            m = (q * HO + oy) * WO + ox
            for part in tl.static_range(CUT):
                kx = part * PART + tl.arange(0, PART)
                col = nb * BN + kx % BN
                G, at = output_gradient(g, code, m, col, inside[:, None], s)
                for dy in tl.static_range(P):
                    for dx in tl.static_range(TURNS):
                        A = spread(G, at, slope, m, col, inside[:, None], kx // BN + (dy * P + dx), s)
                        for ry in tl.static_range(PS):
                            if between(ry + ny * PS - dy * S, 0, KH):
                                B = weights(w, ws, ((((ry + ny * PS - dy * S) * NX + nx) * NB + nb) * TURNS + dx) * CUT + part, TILE, HOIST)
                                accs = replace(accs, ry, matmul(A, B, accs[ry], PREC), PS)
    return accs


@triton.jit
def dx_weights(w, cb, s: tl.constexpr, c: tl.constexpr):
    """(pointers to the first tile of channel block ``cb``'s weights, its tiles where they are held)."""
    PART: tl.constexpr = s.JX * s.BN // c.CUT
    NXD: tl.constexpr = s.PS * s.BC
    TILE: tl.constexpr = PART * NXD
    COUNT: tl.constexpr = s.KH * s.NX * s.NB * (s.P // s.JX) * c.CUT
    HOIST: tl.constexpr = c.HOIST
    wp = w + cb * (COUNT * TILE) + tl.arange(0, PART)[:, None] * NXD + tl.arange(0, NXD)[None, :]  # [PART, NXD]
    return wp, held(wp, COUNT, TILE, HOIST)


@triton.jit
def dx_tile(g, code, slope, wp, ws, q, by, bx, mask, s: tl.constexpr, c: tl.constexpr):
    """Gradients of a tile of input blocks, before the activation below: PS rows of pixels [BM, PS * BC]."""
    PS: tl.constexpr = s.PS
    NB: tl.constexpr = s.NB
    NXD: tl.constexpr = s.PS * s.BC
    BM: tl.constexpr = c.BM
    HOIST: tl.constexpr = c.HOIST
    accs = zeros(PS, BM, NXD)
    if HOIST:
        for nb in tl.static_range(NB):
            accs = _gather(g, code, slope, wp, ws, accs, q, by, bx, mask, nb, s, c)
    else:
        for nb in tl.range(0, NB, num_stages=c.STAGES):
            accs = _gather(g, code, slope, wp, ws, accs, q, by, bx, mask, nb, s, c)
    return accs


@triton.jit
def through_activation(out, y, slope, p, inside, below: tl.constexpr):
    """dL/dz of the stage ``below`` from the gradient of its outputs ``p``, of which ``y`` holds the values and ``slope`` the slopes."""
    SHARE: tl.constexpr = 0.25 if below.POOL == "avg" else 1.0
    ACT: tl.constexpr = below.ACT
    PARAM: tl.constexpr = below.PARAM
    out = out * SHARE
    if below.SLOPE == "output":
        value = tl.load(y + p, mask=inside, other=0.0).to(tl.float32)
        out = out * slope_of_output(value, ACT, PARAM)
    elif below.SLOPE == "pooled":
        out = out * tl.load(slope + p, mask=inside, other=0.0).to(tl.float32)
    return out


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
    HB: tl.constexpr = s.HB
    WB: tl.constexpr = s.WB
    NXD: tl.constexpr = s.PS * s.BC
    PREC: tl.constexpr = c.PREC
    BM: tl.constexpr = c.BM
    rc = tl.arange(0, NXD)
    wp, ws = dx_weights(w, cb, s, c)
    for t in tl.range(t0, t1, BM, num_stages=c.STAGES):
        m = t + tl.arange(0, BM)
        mask = m < t1
        q = m // (HB * WB)
        by = (m % (HB * WB)) // WB
        bx = m % WB
        accs = dx_tile(g, code, slope, wp, ws, q, by, bx, mask, s, c)
        channel = cb * BC + rc % BC
        ix = (bx * PS - PX)[:, None] + (rc // BC)[None, :]
        for ry in tl.static_range(PS):
            iy = by * PS + (ry - PY)
            inside = (mask & (iy >= 0) & (iy < H))[:, None] & (ix >= 0) & (ix < W) & (channel < C)[None, :]
            p = ((q * H + iy)[:, None] * W + ix) * C + channel[None, :]  # [BM, NXD]
            out = through_activation(accs[ry], xg, below_slope, p, inside, below)
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
