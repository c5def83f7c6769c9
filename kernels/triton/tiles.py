"""Pieces of a kernel: reading patches, pooling a tile of outputs, spreading a gradient over the pooling window.

``s`` is the stage a kernel is specialised on (stages.py), ``c`` its launch configuration. In-model offsets are 32-bit: the
launchers refuse queries that would pass 2^31 numbers in one model; offsets of models are 64-bit.
"""
# mypy: allow-untyped-defs, disable-error-code="assignment"

import triton
import triton.language as tl

from .activations import activate, rounded, slope_of_input


@triton.constexpr_function
def between(value, low, high):
    """low <= value < high."""
    return low <= value < high


@triton.jit
def wide(x):
    """64 bits: for what is multiplied by a model's, a query's or an argument's stride. Every such offset goes through here."""
    return x.to(tl.int64)


@triton.jit
def share(programs, BLOCKS: tl.constexpr, rows, each):
    """(model, block, first row, end) of the program (model, block, one of ``programs`` runs of ``each`` rows)."""
    pid = tl.program_id(0)
    t0 = (pid % programs) * each
    return wide(pid // (programs * BLOCKS)), (pid // programs) % BLOCKS, t0, tl.minimum(t0 + each, rows)


@triton.jit
def deposit(p, value, factor, keep, ADD: tl.constexpr):
    """Store a partial sum, or with ADD its product with ``factor`` on top of what is there (when ``keep``)."""
    if ADD:
        value = value * factor + tl.load(p, mask=keep, other=0.0)
    tl.store(p, value)


@triton.jit
def replace(values, at: tl.constexpr, value, SIZE: tl.constexpr):
    """A tuple with one entry exchanged."""
    out = ()
    for i in tl.static_range(SIZE):
        if i == at:
            out = out + (value,)  # noqa: RUF005 (Triton knows no starred tuple)
        else:
            out = out + (values[i],)  # noqa: RUF005 (Triton knows no starred tuple)
    return out


@triton.jit
def zeros(COUNT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """COUNT accumulators [ROWS, COLS]."""
    out = ()
    for _ in tl.static_range(COUNT):
        out = out + (tl.zeros([ROWS, COLS], tl.float32),)  # noqa: RUF005 (Triton knows no starred tuple)
    return out


@triton.jit
def held(w, COUNT: tl.constexpr, SIZE: tl.constexpr, HOIST: tl.constexpr):
    """COUNT weight tiles, SIZE numbers apart, read before the loop over rows, or none."""
    out = ()
    if HOIST:
        for i in tl.static_range(COUNT):
            out = out + (tl.load(w + i * SIZE),)  # noqa: RUF005 (Triton knows no starred tuple)
    return out


@triton.jit
def weights(w, ws, i, SIZE: tl.constexpr, HOIST: tl.constexpr):
    """Weight tile i: held, or read now."""
    if HOIST:
        return ws[i]
    else:
        return tl.load(w + i * SIZE)


@triton.jit
def synchronise():
    """Every thread of the program has done what stands before: what one wrote, another may read. The one name for it here."""
    tl.debug_barrier()


@triton.jit
def query(index, q, mask, rows, INDEXED: tl.constexpr):
    """Row of the image pool behind query q, -1 where there is no such row; a pool may pass 2^31 numbers, a model's own block may not."""
    if INDEXED:
        row = wide(tl.load(index + q, mask=mask, other=0))
        return tl.where((row >= 0) & (row < rows), row, -1)
    else:
        return q


@triton.jit
def patches(
    x,
    q,
    oy,
    ox,
    mask,
    row,
    first,
    s: tl.constexpr,
    PATCH: tl.constexpr,
    KD: tl.constexpr,
    EXACT: tl.constexpr,
    FLAT: tl.constexpr,
    INDEXED: tl.constexpr,
):
    """A tile [BM, KD] of patch elements: from patch row ``row`` the run that begins at element ``first``; when FLAT, going on into
    the rows below it; or, when PATCH, all patch rows, RUN elements apart. What lies outside the run or the image is zero: it is
    masked, not only multiplied by zero weights, because a buffer's neighbour may hold NaN. A query that is not in the pool is NaN."""
    H: tl.constexpr = s.H
    W: tl.constexpr = s.W
    C: tl.constexpr = s.C
    PY: tl.constexpr = s.PY
    PX: tl.constexpr = s.PX
    PS: tl.constexpr = s.PS
    RUN: tl.constexpr = s.RUN
    R: tl.constexpr = s.R
    KH: tl.constexpr = s.KH
    RUNLEN: tl.constexpr = s.RUNLEN
    e = tl.arange(0, KD)
    if PATCH:
        r = e // RUN
        run = e % RUN
    elif FLAT:
        r = (first + e) // RUNLEN + row
        run = (first + e) % RUNLEN
    else:
        r = e * 0 + row
        run = e + first
    base = ((q * H + (oy * PS - PY)) * W + (ox * PS - PX)) * C  # [BM]
    p = x + base[:, None] + (r * (W * C) + run)[None, :]  # [BM, KD]
    m = mask[:, None]
    if not EXACT:
        if FLAT:
            m = m & (first + e < KH * RUNLEN)[None, :]
        else:
            m = m & ((r < R) & (run < RUNLEN))[None, :]
    if PY > 0:
        iy = (oy * PS - PY)[:, None] + r[None, :]
        m = m & (iy >= 0) & (iy < H)
    if PX > 0:
        ix = (ox * PS - PX)[:, None] + (run // C)[None, :]
        m = m & (ix >= 0) & (ix < W)
    if INDEXED:
        known = (q >= 0)[:, None]
        # Of the type that is stored: a bare NaN would make the tile fp32.
        missing = tl.full([1], float("nan"), x.dtype.element_ty)
        return tl.where(known, tl.load(p, mask=m & known, other=0.0), missing)
    else:
        return tl.load(p, mask=m, other=0.0)


@triton.jit
def larger(v0, at0, v1, at1):
    """The larger of two and its position: the first on ties, NaN if either is NaN."""
    return tl.maximum(v0, v1, propagate_nan=tl.PropagateNan.ALL), tl.where(v1 > v0, at1, at0)


@triton.jit
def maximum(v, BM: tl.constexpr, PP: tl.constexpr, BN: tl.constexpr):
    """Maximum over the window's columns and its position. The columns of a window lie in one thread's registers, so taking
    them apart moves nothing, and pairs cost less than a reduction that carries positions."""
    if PP == 4:
        left, right = tl.split(tl.permute(tl.reshape(v, (BM, 2, 2, BN)), (0, 3, 1, 2)))  # [BM, BN, dy]
        best, at = larger(left, 0, right, 1)
        top, bottom = tl.split(best)
        top_at, bottom_at = tl.split(at)
        return larger(top, top_at, bottom, bottom_at + 2)
    else:
        left, right = tl.split(tl.permute(tl.reshape(v, (BM, 2, BN)), (0, 2, 1)))
        return larger(left, 0, right, 1)


@triton.jit
def chosen(v, at, BM: tl.constexpr, PP: tl.constexpr, BN: tl.constexpr):
    """The value at position ``at`` of the window."""
    w = tl.reshape(v, (BM, PP, BN))
    return tl.sum(tl.where(tl.arange(0, PP)[None, :, None] == at[:, None, :], w, 0.0), axis=1)


@triton.jit
def pool_and_store(acc0, acc1, y, code, slope, m, mask, block, s: tl.constexpr, c: tl.constexpr, GRAD: tl.constexpr):
    """Pooling, activation, and what the backward pass needs, from the accumulators [BM, ND] of one tile."""
    BM: tl.constexpr = c.BM
    BN: tl.constexpr = s.BN
    N: tl.constexpr = s.N
    ND: tl.constexpr = s.ND
    P: tl.constexpr = s.P
    PP: tl.constexpr = s.PP
    ACCS: tl.constexpr = s.ACCS
    ACT: tl.constexpr = s.ACT
    PARAM: tl.constexpr = s.PARAM
    PREC: tl.constexpr = c.PREC
    n = block * BN + tl.arange(0, BN)
    o = m[:, None] * N + n[None, :]  # [BM, BN]
    if s.POOL == "max":
        v0 = acc0
        v1 = acc1
        if s.ACT_FIRST:
            v0 = activate(acc0, ACT, PARAM)
            v1 = activate(acc1, ACT, PARAM)
        best, at = maximum(v0, BM, PP, BN)
        z = best
        if s.ACT_FIRST:
            z = chosen(acc0, at, BM, PP, BN)
        if ACCS == 2:
            best1, at1 = maximum(v1, BM, PP, BN)
            if s.ACT_FIRST:
                z = tl.where(best1 > best, chosen(acc1, at1, BM, PP, BN), z)
            best, at = larger(best, at, best1, at1 + P)
        if s.ACT_FIRST:
            out = best
        else:
            z = best
            out = activate(best, ACT, PARAM)
        if GRAD:
            tl.store(code + o, at.to(tl.int8), mask=mask[:, None])
    elif s.POOL == "avg":
        v0 = acc0
        v1 = acc1
        if s.ACT_FIRST:
            v0 = activate(acc0, ACT, PARAM)
            v1 = activate(acc1, ACT, PARAM)
        z = tl.sum(tl.reshape(v0, (BM, PP, BN)), axis=1)
        if ACCS == 2:
            z += tl.sum(tl.reshape(v1, (BM, PP, BN)), axis=1)
        z = z * (1.0 / (P * P))
        out = z if s.ACT_FIRST else activate(z, ACT, PARAM)
    else:
        z = acc0
        out = activate(acc0, ACT, PARAM)
    if GRAD:
        if s.SLOPE == "pooled":
            tl.store(slope + o, rounded(slope_of_input(z, ACT, PARAM), PREC), mask=mask[:, None])
        elif s.SLOPE == "window":
            nd = tl.arange(0, ND)
            ow = m[:, None] * (P * P * N) + ((nd // BN) * N + block * BN + nd % BN)[None, :]  # [BM, ND]
            tl.store(slope + ow, rounded(slope_of_input(acc0, ACT, PARAM), PREC), mask=mask[:, None])
            if ACCS == 2:
                tl.store(slope + ow + P * N, rounded(slope_of_input(acc1, ACT, PARAM), PREC), mask=mask[:, None])
    if s.LAST:
        NOUT: tl.constexpr = s.NOUT
        tl.store(y + m[:, None] * NOUT + n[None, :], out, mask=mask[:, None] & (n < NOUT)[None, :])
    else:
        tl.store(y + o, rounded(out, PREC), mask=mask[:, None])


@triton.jit
def output_gradient(g, code, m, n, mask, s: tl.constexpr):
    """``g`` and the maxima's positions at pooled positions m [BM] and columns n [COLS]; ``mask`` [BM, COLS] or [BM, 1]."""
    o = m[:, None] * s.N + n[None, :]
    G = tl.load(g + o, mask=mask, other=0.0)
    at = G
    if s.POOL == "max":
        at = tl.load(code + o, mask=mask, other=0)
    return G, at


@triton.jit
def spread(G, at, slope, m, n, mask, position, s: tl.constexpr):
    """What of ``output_gradient`` reaches position ``position`` [COLS] = dy * P + dx of the pooling window."""
    if s.POOL == "max":
        return tl.where(at == position[None, :], G, 0.0)
    elif s.SLOPE == "window":
        o = m[:, None] * (s.P * s.P * s.N) + (position * s.N + n)[None, :]
        return (G.to(tl.float32) * tl.load(slope + o, mask=mask, other=0.0).to(tl.float32)).to(G.dtype)
    else:
        return G
