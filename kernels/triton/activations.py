"""Elementwise functions inside kernels: activations, their derivatives, and how a number is rounded when stored.

Comparisons are written so that NaN stays NaN. The derivative comes in two forms: of a stored output, for monotone
functions, and of the input, for silu and gelu, whose output does not determine it, and for softplus, whose rounded one does not.
"""
# mypy: allow-untyped-defs

import triton
import triton.language as tl


@triton.jit
def sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def tanh(z):
    # exp of a negative number: no overflow, whatever the sign.
    t = tl.exp(-2.0 * tl.abs(z))
    y = (1.0 - t) / (1.0 + t)
    return tl.where(z < 0, -y, y)


@triton.jit
def gelu_tanh_argument(z):
    return 0.7978845608028654 * (z + 0.044715 * z * z * z)


@triton.jit
def activate(z, ACT: tl.constexpr, PARAM: tl.constexpr):
    """act(z), fp32."""
    if ACT == "relu":
        return tl.where(z < 0, 0.0, z)
    elif ACT == "leakyrelu":
        return tl.where(z < 0, PARAM * z, z)
    elif ACT == "tanh":
        return tanh(z)
    elif ACT == "sigmoid":
        return sigmoid(z)
    elif ACT == "silu":
        return z * sigmoid(z)
    elif ACT == "gelu":
        return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        return 0.5 * z * (1.0 + tanh(gelu_tanh_argument(z)))
    elif ACT == "elu":
        return tl.where(z < 0, PARAM * (tl.exp(z) - 1.0), z)
    elif ACT == "celu":
        return tl.where(z < 0, PARAM * (tl.exp(z / PARAM) - 1.0), z)
    elif ACT == "softplus":
        u = PARAM * z
        return (tl.where(u < 0, 0.0, u) + tl.log(1.0 + tl.exp(-tl.abs(u)))) / PARAM
    else:
        tl.static_assert(ACT == "identity", "unknown activation")
        return z


@triton.jit
def slope_of_output(y, ACT: tl.constexpr, PARAM: tl.constexpr):
    """act'(z) from y = act(z), for monotone functions."""
    if ACT == "relu":
        return tl.where(y > 0, 1.0, 0.0)
    elif ACT == "leakyrelu":
        return tl.where(y > 0, 1.0, PARAM)
    elif ACT == "tanh":
        return 1.0 - y * y
    elif ACT == "sigmoid":
        return y * (1.0 - y)
    elif ACT == "elu":
        return tl.where(y > 0, 1.0, y + PARAM)
    else:
        tl.static_assert(ACT == "celu", "this activation's derivative is not a function of its output")
        return tl.where(y > 0, 1.0, y / PARAM + 1.0)


@triton.jit
def slope_of_input(z, ACT: tl.constexpr, PARAM: tl.constexpr):
    """act'(z)."""
    if ACT == "silu":
        s = sigmoid(z)
        return s * (1.0 + z * (1.0 - s))
    elif ACT == "gelu":
        return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    elif ACT == "gelu_tanh":
        t = tanh(gelu_tanh_argument(z))
        inner = 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * z * z)
        return 0.5 * (1.0 + t) + 0.5 * z * (1.0 - t * t) * inner
    elif ACT == "leakyrelu":
        return tl.where(z > 0, 1.0, PARAM)
    elif ACT == "elu":
        return tl.where(z > 0, 1.0, PARAM * tl.exp(z))
    elif ACT == "celu":
        return tl.where(z > 0, 1.0, tl.exp(z / PARAM))
    elif ACT == "softplus":
        return sigmoid(PARAM * z)
    else:
        return slope_of_output(activate(z, ACT, PARAM), ACT, PARAM)


@triton.jit
def rounded(v, PREC: tl.constexpr):
    """fp32 -> what a matrix product at PREC reads, to nearest: the tensor cores truncate what they are given, so TF32 is
    rounded here; fp16 saturates, so that a large but finite number does not become infinite."""
    if PREC == "tf32":
        bits = (v.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        # NaN's mantissa is all ones on a GPU: the addition would carry into the sign.
        return tl.where(v == v, bits.to(tl.float32, bitcast=True), v)
    elif PREC == "fp16":
        big = tl.where(v > 65504.0, 65504.0, v)
        return tl.where(big < -65504.0, -65504.0, big).to(tl.float16)
    elif PREC == "bf16" or PREC == "bf16_emulated":
        return v.to(tl.bfloat16)
    else:
        return v


@triton.jit
def high_part(v):
    """The TF32 number nearest to an fp32 number; what is left, v - high_part(v), is then at most half a digit, of either sign. NaN leaves
    NaN, whatever its high part is."""
    return ((v.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def matmul(a, b, acc, PREC: tl.constexpr):
    """acc + a @ b, accumulated in fp32."""
    if PREC == "fp16" or PREC == "bf16":
        return tl.dot(a, b, acc, input_precision="ieee")
    elif PREC == "tf32x3":
        # Each operand is the sum of two TF32 numbers; the product of the two small ones is below fp32's own rounding. Small terms come
        # first. Triton's "tf32x3" needs an accumulator of its own for them, and registers are what these kernels lack.
        ah = high_part(a)
        bh = high_part(b)
        acc = tl.dot(a - ah, bh, acc, input_precision="tf32")
        acc = tl.dot(ah, b - bh, acc, input_precision="tf32")
        return tl.dot(ah, bh, acc, input_precision="tf32")
    elif PREC == "bf16_emulated":
        # The interpreter's bf16 product is wrong: widen first, which is exact.
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision=PREC)
