"""The last two linear layers of every model, its criterion, and their backward, in one launch.

Seven launches of small layers become one. A program is a model; it walks over its queries twice, first for the loss and the
largest gradient (the gain, see criterion.py), then forward again and backward, with both weight gradients in registers:

    x  [k, n, C]    the map below, flattened; overwritten by dL/dz of the stage below
    h = act(x W1 + b1)      f = act2(h W2 + b2)      d = dL/df * gain
    g2 = d act2'            dW2 += h^T g2            g1 = (g2 W2^T) act'        dW1 += x^T g1        dx = g1 W1^T

Nothing but x, the partials, the loss and the gain goes to memory. ``fits`` says when a network's head is narrow enough; the
answer depends on the schedule and on n, so that a model's bits depend on neither k nor chunks. Every product reads operands rounded
as the layer-by-layer path rounds them.
"""
# mypy: allow-untyped-defs

import triton
import triton.language as tl
from torch import Tensor

from .activations import activate, matmul, rounded, slope_of_input, slope_of_output
from .configurations import Configuration
from .criterion import criterion_terms, gain_for, loss_scale, read_targets, target_strides
from .launcher import launch
from .stages import Schedule
from .tiles import synchronise, wide

MOST_QUERIES = 1024  # one program walks over all of a model's queries


@triton.jit
def _slope(z, y, SLOPE: tl.constexpr, ACT: tl.constexpr, PARAM: tl.constexpr):
    """act' of a layer whose input z and stored output y are both at hand."""
    if SLOPE == "output":
        return slope_of_output(y.to(tl.float32), ACT, PARAM)
    elif SLOPE == "pooled":
        return slope_of_input(z, ACT, PARAM)
    else:
        return z * 0.0 + 1.0


@triton.jit
def _bias(bias, step, N: tl.constexpr, NOUT: tl.constexpr, BIAS: tl.constexpr):
    n = tl.arange(0, N)
    b = tl.zeros([N], tl.float32)
    if BIAS:
        b = tl.load(bias + wide(n) * step, mask=n < NOUT, other=0.0).to(tl.float32)
    return b


@triton.jit
def _forward(x, w1, w2, b1, b2, q, n, s1: tl.constexpr, s2: tl.constexpr, PREC: tl.constexpr, BM: tl.constexpr):
    """(x, z1, h, z2, f) of queries q."""
    C: tl.constexpr = s1.C
    KD: tl.constexpr = s1.KD
    N1: tl.constexpr = s1.N
    N2: tl.constexpr = s2.N
    ACT1: tl.constexpr = s1.ACT
    PARAM1: tl.constexpr = s1.PARAM
    ACT2: tl.constexpr = s2.ACT
    PARAM2: tl.constexpr = s2.PARAM
    e = tl.arange(0, KD)
    A = tl.load(x + q[:, None] * C + e[None, :], mask=(q < n)[:, None] & (e < C)[None, :], other=0.0)
    z1 = matmul(A, w1, tl.zeros([BM, N1], tl.float32) + b1[None, :], PREC)
    h = rounded(activate(z1, ACT1, PARAM1), PREC)
    z2 = matmul(h, w2, tl.zeros([BM, N2], tl.float32) + b2[None, :], PREC)
    return A, z1, h, z2, activate(z2, ACT2, PARAM2)


@triton.jit(
    do_not_specialize=["n", "temperature", "loss_scale", "bias_stride", "bias_step", "k_stride", "q_stride", "c_stride"],
    do_not_specialize_on_alignment=["bias1", "bias2", "targets", "losses"],
)
def head_kernel(
    x,
    below_slope,
    w1,
    w2,
    w1x,
    w2x,
    bias1,
    bias2,
    targets,
    losses,
    gain,
    part1,
    part2,
    n,
    w_stride,
    bias_stride,
    bias_step,
    part_stride,
    k_stride,
    q_stride,
    c_stride,
    temperature,
    loss_scale,
    s1: tl.constexpr,
    s2: tl.constexpr,
    below: tl.constexpr,
    c: tl.constexpr,
    CRITERION: tl.constexpr,
):
    C: tl.constexpr = s1.C
    KD: tl.constexpr = s1.KD
    BC: tl.constexpr = s1.BC
    N1: tl.constexpr = s1.N
    N2: tl.constexpr = s2.N
    K: tl.constexpr = s2.NOUT
    NOUT1: tl.constexpr = s1.NOUT
    BIAS1: tl.constexpr = s1.BIAS
    BIAS2: tl.constexpr = s2.BIAS
    SLOPE1: tl.constexpr = s1.SLOPE
    SLOPE2: tl.constexpr = s2.SLOPE
    ACT1: tl.constexpr = s1.ACT
    PARAM1: tl.constexpr = s1.PARAM
    ACT2: tl.constexpr = s2.ACT
    PARAM2: tl.constexpr = s2.PARAM
    ACT: tl.constexpr = below.ACT
    PARAM: tl.constexpr = below.PARAM
    SHARE: tl.constexpr = 0.25 if below.POOL == "avg" else 1.0
    BM: tl.constexpr = c.BM
    PREC: tl.constexpr = c.PREC
    j = wide(tl.program_id(0))
    x += j * n * C
    below_slope += j * n * C
    targets += j * k_stride
    kd = tl.arange(0, KD)
    n1 = tl.arange(0, N1)
    n2 = tl.arange(0, N2)
    bc = tl.arange(0, BC)
    W1 = tl.load(w1 + j * w_stride + kd[:, None] * N1 + n1[None, :])  # [KD, N1]
    W2 = tl.load(w2 + j * w_stride + n1[:, None] * N2 + n2[None, :])  # [N1, N2]
    b1 = _bias(bias1 + j * bias_stride, bias_step, N1, NOUT1, BIAS1)
    b2 = _bias(bias2 + j * bias_stride, bias_step, N2, K, BIAS2)
    loss = tl.zeros([BM], tl.float32)
    largest = tl.zeros([BM], tl.float32)
    for t in tl.range(0, n, BM, num_stages=c.STAGES):
        q = t + tl.arange(0, BM)
        A, z1, h, z2, f = _forward(x, W1, W2, b1, b2, q, n, s1, s2, PREC, BM)
        y = read_targets(targets, q, n, q_stride, c_stride, K, N2, CRITERION)
        terms, d = criterion_terms(f, y, q, n, temperature, K, N2, CRITERION)
        loss += tl.sum(terms, axis=1)
        largest = tl.maximum(largest, tl.max(tl.abs(d), axis=1))
    tl.store(losses + j, tl.sum(loss, axis=0) * loss_scale)
    power = gain_for(tl.max(largest, axis=0))
    tl.store(gain + j, power)
    W1x = tl.load(w1x + j * w_stride + n1[:, None] * BC + bc[None, :])  # [N1, BC]
    W2x = tl.load(w2x + j * w_stride + n2[:, None] * N1 + n1[None, :])  # [N2, N1]
    dW1 = tl.zeros([KD, N1], tl.float32)
    dW2 = tl.zeros([N1, N2], tl.float32)
    db1 = tl.zeros([BM, N1], tl.float32)
    db2 = tl.zeros([BM, N2], tl.float32)
    for t in tl.range(0, n, BM, num_stages=c.STAGES):
        q = t + tl.arange(0, BM)
        A, z1, h, z2, f = _forward(x, W1, W2, b1, b2, q, n, s1, s2, PREC, BM)
        y = read_targets(targets, q, n, q_stride, c_stride, K, N2, CRITERION)
        terms, d = criterion_terms(f, y, q, n, temperature, K, N2, CRITERION)
        g2 = rounded(d * power * _slope(z2, f, SLOPE2, ACT2, PARAM2), PREC)  # [BM, N2]
        dW2 = matmul(tl.trans(h), g2, dW2, PREC)
        db2 += g2.to(tl.float32)
        back = matmul(g2, W2x, tl.zeros([BM, N1], tl.float32), PREC)
        g1 = rounded(back * _slope(z1, h, SLOPE1, ACT1, PARAM1), PREC)  # [BM, N1]
        dW1 = matmul(tl.trans(A), g1, dW1, PREC)
        db1 += g1.to(tl.float32)
        out = matmul(g1, W1x, tl.zeros([BM, BC], tl.float32), PREC) * SHARE  # [BM, BC]
        inside = (q < n)[:, None] & (bc < C)[None, :]
        at = q[:, None] * C + bc[None, :]
        if below.SLOPE == "output":
            out = out * slope_of_output(tl.load(x + at, mask=inside, other=0.0).to(tl.float32), ACT, PARAM)
        elif below.SLOPE == "pooled":
            out = out * tl.load(below_slope + at, mask=inside, other=0.0).to(tl.float32)
        # Every thread has read its share of these rows before any is overwritten.
        synchronise()
        tl.store(x + at, rounded(out, PREC), mask=inside)
    part1 += j * part_stride
    part2 += j * part_stride
    tl.store(part1 + kd[:, None] * N1 + n1[None, :], dW1)
    tl.store(part1 + KD * N1 + n1, tl.sum(db1, axis=0))
    tl.store(part2 + n1[:, None] * N2 + n2[None, :], dW2)
    tl.store(part2 + N1 * N2 + n2, tl.sum(db2, axis=0))


def fits(schedule: Schedule, n: int) -> bool:
    """Whether the last two stages are linear layers narrow enough for one tile each, and the queries few enough for one
    program to walk over them."""
    if len(schedule.stages) < 3 or n > MOST_QUERIES:
        return False
    one, two = schedule.stages[-2:]
    narrow = all(
        not s.PATCH and (s.KH, s.KW, s.H, s.W) == (1, 1, 1, 1) and s.NB == s.NCH == s.NCHW == s.CB == 1 and s.KD == s.KDW
        for s in (one, two)
    )
    return narrow and two.C == two.KD == two.BC == one.N


def head_loss_and_gradient(
    x: Tensor,
    below_slope: Tensor | None,
    packed: Tensor,
    weights: Tensor,
    targets: Tensor,
    losses: Tensor,
    gain: Tensor,
    partials: Tensor,
    bases: list[int],
    k: int,
    n: int,
    schedule: Schedule,
    config: Configuration,
    criterion: str,
    temperature: float,
) -> None:
    """Launch the fused head: ``x`` ``[k, n, C]`` becomes its own gradient; losses, gain and both partials are filled."""
    below, one, two = schedule.stages[-3:]
    first, second = schedule.placements[-2:]
    biases = [weights if p.bias is None else weights[:, p.bias.offset :] for p in (first, second)]
    launch(
        head_kernel,
        k,
        x,
        x if below_slope is None else below_slope,
        packed[:, first.forward :],
        packed[:, second.forward :],
        packed[:, first.backward :],
        packed[:, second.backward :],
        *biases,
        targets,
        losses,
        gain,
        partials[:, bases[-2] :],
        partials[:, bases[-1] :],
        n,
        packed.stride(0),
        weights.stride(0),
        weights.stride(1),
        partials.stride(0),
        *target_strides(targets),
        temperature,
        loss_scale(criterion, n, two.NOUT, temperature),
        s1=one,
        s2=two,
        below=below,
        c=config,
        CRITERION=criterion,
        warps=config.WARPS,
        registers=config.REGISTERS,
    )
