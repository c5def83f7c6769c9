"""The input gradient of the second stage and the weight gradient of the first in one launch: what lies between is never written.

Elsewhere a tile of dL/dz of the first stage goes to memory (input_gradients.py) and comes back with the positions of its maxima
(weight_gradients.py). Here a program keeps the first stage's weight gradient in registers, makes dL/dz for a tile of blocks of PS x PS
pixels, and multiplies each pixel's column of blocks with the image patches behind it at once:

    block (by, bx) of the first stage's outputs, PS = 2        dW += patches(iy, ix)^T @ spread(dL/dz at (iy, ix))
        +-------------+-------------+
        | (2by, 2bx)  | (2by, 2bx+1)|                          once for each of the PS x PS pixels of the blocks,
        +-------------+-------------+                          rows are (query, block)
        | (2by+1, 2bx)| ...         |
        +-------------+-------------+

The partials are those of weight_gradients.py, as many and where it puts them, summed in another order. ``configurations.joins`` says
for which networks it is.
Twin: ``stage_dx`` of the second stage, then ``stage_dw`` of the first.
"""
# mypy: allow-untyped-defs

import triton
import triton.language as tl
from torch import Tensor

from .activations import matmul, rounded
from .configurations import Configuration, splits
from .convolution import given, rows_of
from .input_gradients import dx_tile, dx_weights, through_activation
from .launcher import launch
from .stages import Stage, blocks
from .tables import step
from .tiles import deposit, patches, query, replace, share, zeros


@triton.jit
def _pixels(v, BM: tl.constexpr, PS: tl.constexpr, BC: tl.constexpr):
    """[BM, PS * BC] -> a tile [BM, BC] for each of the PS pixels; they lie in one thread's registers."""
    if PS == 2:
        left, right = tl.split(tl.permute(tl.reshape(v, (BM, 2, BC)), (0, 2, 1)))
        return (left, right)
    else:
        return (v,)


@triton.jit(do_not_specialize=["n", "rows", "count", "rows_per_split"], do_not_specialize_on_alignment=["index"])
def joint_kernel(
    g,
    code,
    slope,
    w,
    y,
    below_code,
    below_slope,
    x,
    index,
    part,
    n,
    rows,
    count,
    rows_per_split,
    w_stride,
    part_stride,
    part_step,
    s: tl.constexpr,
    below: tl.constexpr,
    c: tl.constexpr,
    SHARED: tl.constexpr,
    INDEXED: tl.constexpr,
):
    """Program (model, split): a partial of the first stage's weights and biases of its own."""
    H: tl.constexpr = s.H
    W: tl.constexpr = s.W
    PS: tl.constexpr = s.PS
    PY: tl.constexpr = s.PY
    PX: tl.constexpr = s.PX
    HB: tl.constexpr = s.HB
    WB: tl.constexpr = s.WB
    BC: tl.constexpr = s.BC
    BLOCKS: tl.constexpr = s.HB * s.WB
    CODES: tl.constexpr = s.CODES
    SLOPES: tl.constexpr = s.SLOPES
    INPUTS: tl.constexpr = s.INPUTS
    IMAGE: tl.constexpr = below.INPUTS
    KD: tl.constexpr = below.KDW
    ND: tl.constexpr = below.ND
    PP: tl.constexpr = below.PP
    EXACT: tl.constexpr = below.EXACTW
    BIAS_AT: tl.constexpr = below.KDW * below.ND
    PREC: tl.constexpr = c.PREC
    BM: tl.constexpr = c.BM
    j, _, t0, t1 = share(count, 1, n * BLOCKS, rows_per_split)
    split = tl.program_id(0) % count
    g += j * n * CODES
    code += j * n * CODES
    slope += j * n * SLOPES
    y += j * n * INPUTS
    below_code += j * n * INPUTS
    below_slope += j * n * INPUTS
    part += j * part_stride + split * part_step
    if INDEXED:
        index += j * n
    elif not SHARED:
        x += j * n * IMAGE
    wp, ws = dx_weights(w + j * w_stride, 0, s, c)
    channel = tl.arange(0, BC)
    acc = zeros(PP, KD, BC)
    sums = tl.zeros([BM, BC], tl.float32)
    for t in tl.range(t0, t1, BM, num_stages=c.STAGES):
        m = t + tl.arange(0, BM)
        mask = m < t1
        q = m // (HB * WB)
        by = (m % (HB * WB)) // WB
        bx = m % WB
        accs = dx_tile(g, code, slope, wp, ws, q, by, bx, mask, s, c)
        row = query(index, q, mask, rows, INDEXED)
        for ry in tl.static_range(PS):
            iy = by * PS + (ry - PY)
            columns = _pixels(accs[ry], BM, PS, BC)
            for rx in tl.static_range(PS):
                ix = bx * PS + (rx - PX)
                inside = mask & (iy >= 0) & (iy < H) & (ix >= 0) & (ix < W)
                p = ((q * H + iy) * W + ix)[:, None] * BC + channel[None, :]  # [BM, BC]
                G = rounded(through_activation(columns[rx], y, below_slope, p, inside[:, None], below), PREC)
                G = tl.where(inside[:, None], G, 0.0)
                sums += G.to(tl.float32)
                at = tl.load(below_code + p, mask=inside[:, None], other=0)
                A = tl.trans(patches(x, row, iy, ix, inside, 0, 0, below, True, KD, EXACT, False, INDEXED))
                for position in tl.static_range(PP):
                    acc = replace(acc, position, matmul(A, tl.where(at == position, G, 0.0), acc[position], PREC), PP)
    for position in tl.static_range(PP):
        deposit(part + tl.arange(0, KD)[:, None] * ND + (position * BC + channel)[None, :], acc[position], 1.0, True, False)
    deposit(part + BIAS_AT + channel, tl.sum(sums, axis=0), 1.0, True, False)


def stage_joint(
    g: Tensor,
    code: Tensor | None,
    slope: Tensor | None,
    packed: Tensor,
    y: Tensor,
    below_code: Tensor | None,
    below_slope: Tensor | None,
    x: Tensor,
    index: Tensor | None,
    partials: Tensor,
    k: int,
    n: int,
    stage: Stage,
    below: Stage,
    config: Configuration,
    *,
    shared: bool,
) -> None:
    """Launch the kernel for the second ``stage`` and the first, ``below``: ``y`` holds the first's outputs, ``x`` the queries, ``partials``
    begins at the first stage's first split. Nothing else is written."""
    count = splits(below, n)
    per_split = blocks(blocks(n * stage.HB * stage.WB, count), config.BM) * config.BM
    launch(
        joint_kernel,
        k * count,
        g,
        given(code, g),
        given(slope, g),
        packed,
        y,
        given(below_code, y),
        given(below_slope, y),
        x,
        given(index, x),
        partials,
        n,
        rows_of(x, below),
        count,
        per_split,
        packed.stride(0),
        partials.stride(0),
        step(below),
        s=stage,
        below=below,
        c=config,
        SHARED=shared,
        INDEXED=index is not None,
        warps=config.WARPS,
        registers=config.REGISTERS,
    )
