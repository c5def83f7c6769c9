"""The end of the forward pass and the beginning of the backward one: criterion values and the gradient of the logits.

One program a model reads its logits ``[n, K]`` twice: once for the loss and the largest gradient, once to write the
gradient ``[n, N]`` as an operand of the backward matrix products. The gradient is scaled by a power of two, ``gain[j]``,
that brings its largest entry of model j to about 16: fp16 neither overflows for a reconstruction that is far off nor loses
small differences of probabilities. ``fold`` takes the gain out again. A model that is not finite spoils its own row alone.

With f the outputs, y the targets, p = softmax, T the temperature, and the sum over queries and classes:

    mse             1/(2n) sum (f - y)^2                                   d = f - y                       scale 1/n
    softmax_mse     1/(nK) sum (p(f) - p(y))^2                             d = p(f) * (e - sum_c p(f) e)   scale 2/(nK)
    cross_entropy  -1/n   sum p(y) log p(f)   (labels: p(y) is one-hot)    d = p(f) - p(y)                 scale 1/n
    distillation    T^2/n sum p(y/T) (log p(y/T) - log p(f/T))             d = p(f/T) - p(y/T)             scale T/n
    gradient        0                                                      d = y, dL/df from outside       scale 1

with e = p(f) - p(y). Twin: ``criteria.criterion_values``.
"""
# mypy: allow-untyped-defs

import triton
import triton.language as tl
from torch import Tensor

from .activations import rounded, slope_of_output
from .launcher import launch
from .stages import Stage, power_of_two
from .tiles import wide

CRITERIA = ("mse", "softmax_mse", "cross_entropy", "distillation")  # of the table in criteria.py, those that these kernels know


@triton.jit
def _log_softmax(v, classes):
    """Rows of log softmax over the columns where ``classes``; -inf elsewhere."""
    v = tl.where(classes, v, float("-inf"))
    # A row of -inf or with NaN must come out NaN, as in torch; v - max does that by itself.
    v = v - tl.max(v, axis=1)[:, None]
    return v - tl.log(tl.sum(tl.exp(v), axis=1))[:, None]


@triton.jit
def _terms(f, y, classes, temperature, CRITERION: tl.constexpr):
    """Terms of the loss and d, both [BQ, KP], zero outside ``classes``."""
    if CRITERION == "mse":
        d = f - y
        terms = d * d
    elif CRITERION == "gradient":
        d = y
        terms = y * 0.0
    elif CRITERION == "softmax_mse":
        p = tl.exp(_log_softmax(f, classes))
        e = p - tl.exp(_log_softmax(y, classes))
        terms = e * e
        d = p * (e - tl.sum(p * e, axis=1)[:, None])
    elif CRITERION == "distillation":
        log_p = _log_softmax(f / temperature, classes)
        log_q = _log_softmax(y / temperature, classes)
        q = tl.exp(log_q)
        terms = tl.where(q > 0, q * (log_q - log_p), q * 0.0)
        d = tl.exp(log_p) - q
    else:
        log_p = _log_softmax(f, classes)
        q = y
        if CRITERION == "cross_entropy":
            q = tl.exp(_log_softmax(y, classes))
        terms = tl.where(q > 0, -q * log_p, q * 0.0)
        d = tl.exp(log_p) - q
    return tl.where(classes, terms, 0.0), tl.where(classes, d, 0.0)


@triton.jit
def gain_for(largest):
    """2^e with largest * 2^e in [16, 32); 1 for zero and for what is not finite."""
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 255
    wanted = tl.minimum(254 - exponent + 4, 254)
    gain = (wanted << 23).to(tl.float32, bitcast=True)
    return tl.where((exponent > 0) & (exponent < 255), gain, 1.0)


@triton.jit
def read_targets(targets, q, n, q_stride, c_stride, K: tl.constexpr, KP: tl.constexpr, CRITERION: tl.constexpr):
    """Targets [BQ, KP] of queries q; one-hot for labels."""
    c = tl.arange(0, KP)
    mask = (q < n)[:, None] & (c < K)[None, :]
    at = wide(q)
    if CRITERION == "labels":
        label = tl.load(targets + at * q_stride, mask=q < n, other=-1)
        y = tl.where(label[:, None] == c[None, :], 1.0, 0.0)
        # A label that names no class: NaN, not a silent zero.
        return tl.where(((label < 0) | (label >= K))[:, None] & mask, float("nan"), y)
    else:
        at = at[:, None] * q_stride + wide(c)[None, :] * c_stride
        return tl.load(targets + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def criterion_terms(f, y, q, n, temperature, K: tl.constexpr, KP: tl.constexpr, CRITERION: tl.constexpr):
    """Terms of the loss and d of outputs f and targets y, zero beyond the queries and the classes."""
    c = tl.arange(0, KP)
    terms, d = _terms(f, y, (c < K)[None, :], temperature, CRITERION)
    return tl.where((q < n)[:, None], terms, 0.0), tl.where((q < n)[:, None], d, 0.0)


@triton.jit
def store_gradient(g, slope, d, f, q, n, s: tl.constexpr, KP: tl.constexpr, PREC: tl.constexpr):
    """dL/dz of the last stage for queries q, as an operand; ``d`` is dL/df, f = act(z)."""
    ACT: tl.constexpr = s.ACT
    PARAM: tl.constexpr = s.PARAM
    N: tl.constexpr = s.N
    c = tl.arange(0, KP)
    stored = (q < n)[:, None] & (c < N)[None, :]
    if s.SLOPE == "output":
        d = d * slope_of_output(f, ACT, PARAM)
    elif s.SLOPE == "pooled":
        d = d * tl.load(slope + q[:, None] * N + c[None, :], mask=stored, other=0.0).to(tl.float32)
    # Padded columns too: the matrix products read all N of them.
    tl.store(g + q[:, None] * N + c[None, :], rounded(d, PREC), mask=stored)


@triton.jit(
    do_not_specialize=["n", "temperature", "loss_scale", "k_stride", "q_stride", "c_stride"],
    do_not_specialize_on_alignment=["targets", "losses"],
)
def criterion_kernel(
    outputs,
    targets,
    slope,
    losses,
    gain,
    g,
    n,
    k_stride,
    q_stride,
    c_stride,
    temperature,
    loss_scale,
    s: tl.constexpr,
    CRITERION: tl.constexpr,
    KP: tl.constexpr,
    BQ: tl.constexpr,
    PREC: tl.constexpr,
):
    K: tl.constexpr = s.NOUT
    N: tl.constexpr = s.N
    j = wide(tl.program_id(0))
    outputs += j * n * K
    targets += j * k_stride
    g += j * n * N
    slope += j * n * N
    c = tl.arange(0, KP)
    loss = tl.zeros([BQ], tl.float32)
    largest = tl.zeros([BQ], tl.float32)
    for t in tl.range(0, n, BQ):
        q = t + tl.arange(0, BQ)
        f = tl.load(outputs + q[:, None] * K + c[None, :], mask=(q < n)[:, None] & (c < K)[None, :], other=0.0)
        y = read_targets(targets, q, n, q_stride, c_stride, K, KP, CRITERION)
        terms, d = criterion_terms(f, y, q, n, temperature, K, KP, CRITERION)
        loss += tl.sum(terms, axis=1)
        largest = tl.maximum(largest, tl.max(tl.abs(d), axis=1))
    tl.store(losses + j, tl.sum(loss, axis=0) * loss_scale)
    power = gain_for(tl.max(largest, axis=0))
    tl.store(gain + j, power)
    for t in tl.range(0, n, BQ):
        q = t + tl.arange(0, BQ)
        f = tl.load(outputs + q[:, None] * K + c[None, :], mask=(q < n)[:, None] & (c < K)[None, :], other=0.0)
        y = read_targets(targets, q, n, q_stride, c_stride, K, KP, CRITERION)
        terms, d = criterion_terms(f, y, q, n, temperature, K, KP, CRITERION)
        store_gradient(g, slope, d * power, f, q, n, s, KP, PREC)


def gradient_scale(criterion: str, n: int, classes: int, temperature: float) -> float:
    """What the gradient of ``criterion`` is multiplied by after the backward pass."""
    if criterion == "softmax_mse":
        return 2.0 / (n * classes)
    if criterion == "gradient":
        return 1.0
    return (temperature if criterion == "distillation" else 1.0) / n


def loss_scale(criterion: str, n: int, classes: int, temperature: float) -> float:
    """What the summed terms of ``criterion`` are multiplied by."""
    scales = {"mse": 0.5 / n, "softmax_mse": 1.0 / (n * classes), "distillation": temperature**2 / n, "gradient": 0.0}
    return scales.get(criterion, 1.0 / n)


def target_strides(targets: Tensor) -> tuple[int, ...]:
    """(model, query, class) strides of targets ``[k, n, K]`` or labels ``[k, n]``."""
    return targets.stride() if targets.ndim == 3 else (*targets.stride(), 0)


def query_block(stage: Stage) -> int:
    """Queries a step of the criterion kernel: about a thousand logits."""
    return max(1, 1024 // stage.N)


def criterion_forward_backward(
    outputs: Tensor,
    targets: Tensor,
    slope: Tensor | None,
    losses: Tensor,
    gain: Tensor,
    g: Tensor,
    k: int,
    n: int,
    stage: Stage,
    criterion: str,
    temperature: float,
    precision: str,
) -> None:
    """Fill ``losses`` ``[k]``, ``gain`` ``[k]`` and ``g`` ``[k, n, N]`` from outputs ``[k, n, K]`` and targets ``[k, n, K]``
    (``[k, n]`` integers for ``labels``) of any strides."""
    launch(
        criterion_kernel,
        k,
        outputs,
        targets,
        g if slope is None else slope,
        losses,
        gain,
        g,
        n,
        *target_strides(targets),
        temperature,
        loss_scale(criterion, n, stage.NOUT, temperature),
        s=stage,
        CRITERION=criterion,
        KP=max(stage.N, power_of_two(stage.NOUT)),
        BQ=query_block(stage),
        PREC=precision,
    )
