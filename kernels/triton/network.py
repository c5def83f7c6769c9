"""The whole network of every model in one launch: outputs alone, or losses and gradients in little memory.

A program takes a block of QB queries of one model through all stages. What lies between two stages goes to a scratch of the
program's own, is read back after a barrier, and never leaves the chip's caches for long; the stages are the device functions of
convolution.py, so that both paths compute the same numbers. The grid is persistent: as many programs as the GPU holds, each
walking over units of work, so that the scratch does not grow with k. The launchers: network_launch.py.

    forward   unit = (model, block of queries); the last stage writes the outputs

    loss      unit = (model, part of its queries), walked block by block:

              images --> X1 --> X2 --> ... --> f      scratch: activations, positions of maxima, slopes
                                               |      d = dL/df * gain
              dW1 <-- g1 <-- g2 <-- ... <------+      g overwrites X; sums: dW += partial / gain, fp32

              then sums -> parts [unit, P], one number a parameter; ``reduce`` adds a model's parts in order

Every block has its own gain (see criterion.py), a power of two that is taken out again when its weight gradients are added to the
sums: scaling changes no digit. Parts depend on n and the schedule, never on k or on the number of programs, so a model's bits depend
on nobody else. Barriers stand wherever one thread reads what another wrote; loops that contain them have ``num_stages=1``.
"""
# mypy: allow-untyped-defs

import triton
import triton.language as tl

from .convolution import forward_rows
from .criterion import criterion_terms, gain_for, read_targets, store_gradient
from .input_gradients import dx_rows
from .packing import gathered
from .tiles import synchronise, wide
from .weight_gradients import dw_rows


@triton.constexpr_function
def entry(net, name, i):
    """Stage i's stage, configuration or offset."""
    return getattr(net, name)[i]


@triton.jit
def _forward_stage(
    x,
    index,
    rows,
    w,
    bias,
    bias_step,
    y,
    codes,
    scratch,
    count,
    net: tl.constexpr,
    i: tl.constexpr,
    INDEXED: tl.constexpr,
    GRAD: tl.constexpr,
):
    s: tl.constexpr = entry(net, "stages", i)
    c: tl.constexpr = entry(net, "forward", i)
    WEIGHTS: tl.constexpr = entry(net, "weights", i)
    BIAS: tl.constexpr = entry(net, "biases", i)
    CODES: tl.constexpr = entry(net, "codes", i)
    SLOPES: tl.constexpr = entry(net, "slopes", i)
    NB: tl.constexpr = s.NB
    POSITIONS: tl.constexpr = s.POSITIONS
    for block in tl.range(0, NB, num_stages=1):
        forward_rows(
            x,
            index,
            rows,
            w + WEIGHTS,
            bias + BIAS * bias_step,
            bias_step,
            y,
            codes + CODES,
            scratch + SLOPES,
            0,
            count * POSITIONS,
            block,
            s,
            c,
            INDEXED,
            GRAD,
        )
    synchronise()


@triton.jit
def _between(scratch, ends, net: tl.constexpr, i: tl.constexpr, END: tl.constexpr):
    """What lies between stage i - 1 and stage i: numbers of the scratch, or ``ends`` at stage END, an end of the network."""
    AT: tl.constexpr = entry(net, "outputs", i - 1)
    if i == END:
        return ends
    else:
        return scratch + AT


@triton.jit
def _forward(x, index, rows, w, bias, bias_step, y, codes, scratch, count, net: tl.constexpr, INDEXED: tl.constexpr, GRAD: tl.constexpr):
    """A block of ``count`` queries through all stages."""
    DEPTH: tl.constexpr = net.DEPTH
    out = _between(scratch, y, net, 1, DEPTH)
    _forward_stage(x, index, rows, w, bias, bias_step, out, codes, scratch, count, net, 0, INDEXED, GRAD)
    for i in tl.static_range(1, DEPTH):
        given = _between(scratch, x, net, i, 0)
        out = _between(scratch, y, net, i + 1, DEPTH)
        _forward_stage(given, given, rows, w, bias, bias_step, out, codes, scratch, count, net, i, False, GRAD)


@triton.jit
def _backward_stage(
    x,
    index,
    rows,
    g,
    w,
    codes,
    scratch,
    sums,
    factor,
    keep,
    count,
    net: tl.constexpr,
    i: tl.constexpr,
    INDEXED: tl.constexpr,
):
    """Weight gradients of stage i on top of ``sums``; then its input gradient over its input, except for the first stage."""
    s: tl.constexpr = entry(net, "stages", i)
    c: tl.constexpr = entry(net, "dw", i)
    CODES: tl.constexpr = entry(net, "codes", i)
    SLOPES: tl.constexpr = entry(net, "slopes", i)
    SUMS: tl.constexpr = entry(net, "sums", i)
    PASSES: tl.constexpr = s.PASSES * c.TURNS
    POSITIONS: tl.constexpr = s.POSITIONS
    for turn in tl.range(0, PASSES, num_stages=1):
        dw_rows(
            x,
            index,
            rows,
            g,
            codes + CODES,
            scratch + SLOPES,
            sums + SUMS,
            factor,
            keep,
            0,
            count * POSITIONS,
            turn,
            s,
            c,
            INDEXED,
            True,
        )
    synchronise()
    if i > 0:
        below: tl.constexpr = entry(net, "stages", i - 1)
        cx: tl.constexpr = entry(net, "dx", i)
        BACK: tl.constexpr = entry(net, "back", i)
        BELOW: tl.constexpr = entry(net, "slopes", i - 1)
        CB: tl.constexpr = s.CB
        BLOCKS: tl.constexpr = s.HB * s.WB
        for cb in tl.range(0, CB, num_stages=1):
            dx_rows(g, codes + CODES, scratch + SLOPES, w + BACK, x, scratch + BELOW, 0, count * BLOCKS, cb, s, below, cx)
        synchronise()


@triton.jit(
    do_not_specialize=["n", "rows", "units", "walks", "bias_stride", "bias_step"], do_not_specialize_on_alignment=["index", "bias", "y"]
)
def network_forward_kernel(
    x,
    index,
    w,
    bias,
    y,
    scratch,
    n,
    rows,
    units,
    walks,
    w_stride,
    bias_stride,
    bias_step,
    net: tl.constexpr,
    SHARED: tl.constexpr,
    INDEXED: tl.constexpr,
):
    """Unit (model, block of queries)."""
    QB: tl.constexpr = net.QB
    SCRATCH: tl.constexpr = net.SCRATCH
    K: tl.constexpr = entry(net, "stages", net.DEPTH - 1).NOUT
    INPUTS: tl.constexpr = entry(net, "stages", 0).INPUTS
    pid = tl.program_id(0)
    zero = wide(pid) * 0
    scratch += (pid + zero) * SCRATCH
    for u in tl.range(pid, units, tl.num_programs(0), num_stages=1):
        unit = u + zero
        j = unit // walks
        q0 = unit % walks * QB
        count = tl.minimum(n - q0, QB).to(tl.int32)
        images = x + (q0 if SHARED else j * n + q0) * (0 if INDEXED else INPUTS)
        _forward(
            images,
            index + (j * n + q0),
            rows,
            w + j * w_stride,
            bias + j * bias_stride,
            bias_step,
            y + (j * n + q0) * K,
            scratch,
            scratch,
            count,
            net,
            INDEXED,
            False,
        )


@triton.jit
def _criterion(outs, targets, scratch, q0, count, q_stride, c_stride, temperature, net: tl.constexpr, CRITERION: tl.constexpr):
    """(terms of the loss [QB], 1 / gain) of a block; the gradient of its logits goes to the scratch."""
    QB: tl.constexpr = net.QB
    s: tl.constexpr = entry(net, "stages", net.DEPTH - 1)
    SLOPES: tl.constexpr = entry(net, "slopes", net.DEPTH - 1)
    GRADIENT: tl.constexpr = net.gradient
    PREC: tl.constexpr = entry(net, "dw", 0).PREC
    K: tl.constexpr = s.NOUT
    KP: tl.constexpr = net.KP
    q = tl.arange(0, QB)
    c = tl.arange(0, KP)
    f = tl.load(outs + q[:, None] * K + c[None, :], mask=(q < count)[:, None] & (c < K)[None, :], other=0.0)
    y = read_targets(targets + q0 * q_stride, q, count, q_stride, c_stride, K, KP, CRITERION)
    terms, d = criterion_terms(f, y, q, count, temperature, K, KP, CRITERION)
    gain = gain_for(tl.max(tl.max(tl.abs(d), axis=1), axis=0))
    store_gradient(scratch + GRADIENT, scratch + SLOPES, d * gain, f, q, count, s, KP, PREC)
    synchronise()
    return tl.sum(terms, axis=1), 1.0 / gain


@triton.jit(
    do_not_specialize=[
        "n", "rows", "units", "parts", "queries_per_part", "bias_stride", "bias_step", "k_stride", "q_stride", "c_stride", "temperature",
    ],
    do_not_specialize_on_alignment=["index", "bias", "targets"],
)  # fmt: skip
def network_loss_kernel(
    x,
    index,
    w,
    bias,
    targets,
    places,
    steps,
    counts,
    partials,
    terms,
    codes,
    scratch,
    outs,
    sums,
    n,
    rows,
    units,
    parts,
    queries_per_part,
    w_stride,
    bias_stride,
    bias_step,
    k_stride,
    q_stride,
    c_stride,
    temperature,
    net: tl.constexpr,
    CRITERION: tl.constexpr,
    SHARED: tl.constexpr,
    INDEXED: tl.constexpr,
):
    """Unit (model, part of its queries): its gradient [P] and the sum of its loss' terms."""
    QB: tl.constexpr = net.QB
    SCRATCH: tl.constexpr = net.SCRATCH
    CODES: tl.constexpr = net.CODES
    OUTS: tl.constexpr = net.OUTS
    SUMS: tl.constexpr = net.SUMS
    DEPTH: tl.constexpr = net.DEPTH
    GRADIENT: tl.constexpr = net.gradient
    PARAMETERS: tl.constexpr = net.PARAMETERS
    PLACES: tl.constexpr = net.PLACES
    INPUTS: tl.constexpr = entry(net, "stages", 0).INPUTS
    B: tl.constexpr = 512
    pid = tl.program_id(0)
    zero = wide(pid) * 0
    scratch += (pid + zero) * SCRATCH
    codes += (pid + zero) * CODES
    outs += (pid + zero) * OUTS
    sums += (pid + zero) * SUMS
    for u in tl.range(pid, units, tl.num_programs(0), num_stages=1):
        unit = u + zero
        j = unit // parts
        first = unit % parts * queries_per_part
        wj = w + j * w_stride
        loss = tl.zeros([QB], tl.float32)
        for t in tl.range(0, tl.minimum(queries_per_part, n - first).to(tl.int32), QB, num_stages=1):
            q0 = first + t
            count = tl.minimum(tl.minimum(queries_per_part - t, QB), n - q0).to(tl.int32)
            images = x + (q0 if SHARED else j * n + q0) * (0 if INDEXED else INPUTS)
            own = index + (j * n + q0)
            _forward(images, own, rows, wj, bias + j * bias_stride, bias_step, outs, codes, scratch, count, net, INDEXED, True)
            more, factor = _criterion(outs, targets + j * k_stride, scratch, q0, count, q_stride, c_stride, temperature, net, CRITERION)
            loss += more
            for up in tl.static_range(DEPTH - 1):
                g = _between(scratch, scratch + GRADIENT, net, DEPTH - up, DEPTH)
                below = _between(scratch, scratch, net, DEPTH - 1 - up, 0)
                _backward_stage(below, own, rows, g, wj, codes, scratch, sums, factor, t > 0, count, net, DEPTH - 1 - up, False)
            g = _between(scratch, scratch + GRADIENT, net, 1, DEPTH)
            _backward_stage(images, own, rows, g, wj, codes, scratch, sums, factor, t > 0, count, net, 0, INDEXED)
        for p0 in tl.range(0, PARAMETERS, B, num_stages=1):
            p = p0 + tl.arange(0, B)
            whole = gathered(sums, places, steps, counts, p, p < PARAMETERS, 1, PLACES)
            tl.store(partials + unit * PARAMETERS + p, whole, mask=p < PARAMETERS)
        tl.store(terms + unit, tl.sum(loss, axis=0))


@triton.jit(
    do_not_specialize=["programs", "parts", "parameters", "scale", "loss_scale"], do_not_specialize_on_alignment=["gradient", "losses"]
)
def reduce_kernel(partials, terms, gradient, losses, programs, parts, parameters, scale, loss_scale, B: tl.constexpr):
    """Program (model, block of parameters): a model's parts, added in order; its first program adds the loss' terms too."""
    pid = tl.program_id(0)
    j = wide(pid // programs)
    p = (pid % programs) * B + tl.arange(0, B)
    mask = p < parameters
    acc = tl.zeros([B], tl.float32)
    for part in tl.range(0, parts, num_stages=1):
        acc += tl.load(partials + (j * parts + part) * parameters + p, mask=mask, other=0.0)
    tl.store(gradient + j * parameters + p, acc * scale, mask=mask)
    if pid % programs == 0:
        total = 0.0
        for part in tl.range(0, parts, num_stages=1):
            total += tl.load(terms + j * parts + part)
        tl.store(losses + j, total * loss_scale)
