"""One tiny network for each operation of the table, and each way of calling it: weights of its own in front and behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Run = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """One call of one operation.

    Attributes:
        operation: name in the table.
        run: ``run(h, *weights)``; h is ``[n, *shape]``.
        shape: of one query.
        weights: shapes of further parameters.
        fronts: what comes before: "m" a factor a model (models in front), "c" a convolution (models among the channels), "s" nothing (the
            queries as they are, the same for all models).
        smooth: whether it has a gradient (comparisons have not).
    """

    operation: str
    run: Run
    shape: tuple[int, ...] = (6,)
    weights: tuple[tuple[int, ...], ...] = ()
    fronts: str = "m"


class Alone(nn.Module):
    """The operation between two layers of its own."""

    def __init__(self, case: Case, front: str) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator) * 0.5 + 0.1)

        self.front, self.case = front, case
        if front == "c":
            make = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(case.shape) - 2]
            self.first: Any = make(case.shape[0], case.shape[0], 1)
        elif front == "m":
            self.first = parameter(*case.shape)
        self.own = nn.ParameterList([parameter(*shape) for shape in case.weights])
        with torch.no_grad():
            self.behind = parameter(*self._middle(torch.rand(2, *case.shape) + 0.1)[1].shape[1:])

    def _middle(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.first(x) if self.front == "c" else x * self.first if self.front == "m" else x
        made = self.case.run(h, *self.own)
        made = made if isinstance(made, (tuple, list)) else (made,)
        return h, torch.cat([m.to(x.dtype).reshape(len(x), -1) for m in made], 1)

    def forward(self, x: Tensor) -> Tensor:
        h, made = self._middle(x)
        return made * self.behind + h.flatten(1).sum(1, keepdim=True)


CASES: list[Case] = []


def add(operation: str, run: Run, shape: tuple[int, ...] = (6,), *weights: tuple[int, ...], fronts: str = "m") -> None:
    CASES.append(Case(operation, run, shape, weights, fronts))


def positive(x: Tensor) -> Tensor:
    return x.abs() + 0.2


def unit(x: Tensor) -> Tensor:
    return 0.9 * x.tanh()


def constant(x: Tensor, *shape: int) -> Tensor:
    """A tensor that all models share, in the queries' dtype: of eighths, which float32 holds exactly."""
    return (torch.arange(torch.Size(shape).numel()) * 0.375 - 1.25).remainder(2.125).sub(1).reshape(shape).to(x.dtype)


# -- elementwise: one tensor -------------------------------------------------------------------------------------------

IMAGE, SIGNAL = (4, 5, 6), (4, 7)

for _name, _run in {
    "relu": F.relu, "relu6": lambda x: F.relu6(9 * x), "tanh": torch.tanh, "sigmoid": torch.sigmoid, "softplus": lambda x: F.softplus(x, 2.0, 1.0), "selu": F.selu,
    "hardtanh": lambda x: F.hardtanh(x, -0.4, 0.6), "hardsigmoid": lambda x: F.hardsigmoid(3 * x), "log_sigmoid": F.logsigmoid,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2), "elu": lambda x: F.elu(x, 0.7), "celu": lambda x: F.celu(x, 1.3), "gelu": F.gelu, "silu": F.silu, "mish": F.mish,
    "hardswish": lambda x: F.hardswish(3 * x), "hardshrink": lambda x: F.hardshrink(x, 0.3), "softshrink": lambda x: F.softshrink(x, 0.3), "threshold": lambda x: F.threshold(x, 0.2, -0.7),
    "rrelu": lambda x: F.rrelu(x, 0.1, 0.4),
    "abs": torch.abs, "neg": torch.neg, "exp": torch.exp, "exp2": torch.exp2, "expm1": torch.expm1, "log": lambda x: positive(x).log(), "log1p": lambda x: positive(x).log1p(),
    "log2": lambda x: positive(x).log2(), "log10": lambda x: positive(x).log10(), "sin": lambda x: torch.sin(30 * x), "cos": torch.cos, "tan": lambda x: unit(x).tan(), "asin": lambda x: unit(x).asin(),
    "acos": lambda x: unit(x).acos(), "atan": torch.atan, "sinh": torch.sinh, "cosh": torch.cosh, "asinh": torch.asinh, "acosh": lambda x: (1 + positive(x)).acosh(),
    "atanh": lambda x: unit(x).atanh(), "erf": torch.erf, "erfc": torch.erfc, "sqrt": lambda x: positive(x).sqrt(), "rsqrt": lambda x: positive(x).rsqrt(), "square": torch.square,
    "reciprocal": lambda x: positive(x).reciprocal(), "sign": torch.sign, "sgn": torch.sgn, "floor": torch.floor, "ceil": torch.ceil, "round": torch.round, "trunc": torch.trunc, "frac": torch.frac,
    "sinc": torch.sinc, "logit": lambda x: torch.logit(x.sigmoid()), "isfinite": lambda x: torch.isfinite(x.clamp_min(0.1).reciprocal()), "isnan": torch.isnan,
    "nan_to_num": lambda x: torch.nan_to_num(torch.where(x > 0.3, x, float("nan")), 0.3, 2.0, -2.0), "logical_not": lambda x: torch.logical_not(x > 0.1), "bitwise_not": lambda x: ~(x > 0.1),
}.items():  # fmt: skip
    add(_name, _run, IMAGE, fronts="mc")
add("gelu", lambda x: F.gelu(x, approximate="tanh"), IMAGE, fronts="mc")
add("round.decimals", lambda x: torch.round(x, decimals=1))
add("logit", lambda x: torch.logit(x, eps=0.2))

# -- elementwise: numbers ----------------------------------------------------------------------------------------------

for _name, _run in {
    "add.Tensor": lambda x: x + 2, "sub.Tensor": lambda x: x - 0.5, "rsub.Scalar": lambda x: 3 - x, "mul.Tensor": lambda x: 3.5 * x, "div.Tensor": lambda x: x / 3,
    "pow.Tensor_Scalar": lambda x: x**3, "pow.Scalar": lambda x: 2.5**x, "clamp": lambda x: x.clamp(-0.3, 0.4), "clamp_min": lambda x: x.clamp_min(0.1), "clamp_max": lambda x: x.clamp_max(0.1),
    "remainder.Scalar": lambda x: x % 0.7, "fmod.Scalar": lambda x: torch.fmod(x, 0.7), "div.Tensor_mode": lambda x: torch.div(x, 0.3, rounding_mode="floor"),
    "gt.Scalar": lambda x: x > 0.2, "lt.Scalar": lambda x: x < 0.2, "ge.Scalar": lambda x: x >= 0.2, "le.Scalar": lambda x: x <= 0.2, "eq.Scalar": lambda x: x.round() == 0, "ne.Scalar": lambda x: x.round() != 0,
    "floor_divide": lambda x: (9 * x.detach()) // 0.7,
    "masked_fill.Scalar": lambda x: x.masked_fill(x > 0.3, float("-inf")).exp(),
    "where.ScalarOther": lambda x: torch.where(x > 0, x, 0.3), "where.ScalarSelf": lambda x: torch.where(x > 0, 0.3, x), "where.Scalar": lambda x: torch.where(x > 0, 0.5, -1.0),
    "clamp_min.Tensor": lambda x: torch.clamp_min(x, torch.tensor(0.2)), "clamp_max.Tensor": lambda x: torch.clamp_max(x, torch.tensor(0.2)),
    "clamp.Tensor": lambda x: torch.clamp(x, torch.tensor(-0.2), torch.tensor(0.4)), "lerp.Scalar": lambda x: torch.lerp(x, x.sin(), 0.3),
}.items():  # fmt: skip
    add(_name, _run, IMAGE, fronts="mc")
add("rsub.Scalar", lambda x: torch.rsub(x, 2.0, alpha=0.5))
add("add.Tensor", lambda x: torch.add(x, x.sin(), alpha=0.3))
add("sub.Tensor", lambda x: torch.sub(x, x.sin(), alpha=0.3))
add("add.Scalar", lambda x: torch.ops.aten.add.Scalar(x, 0.3, 2))
add("sub.Scalar", lambda x: torch.ops.aten.sub.Scalar(x, 0.3, 2))
add("mul.Scalar", lambda x: torch.ops.aten.mul.Scalar(x, 0.3))
add("div.Scalar", lambda x: torch.ops.aten.div.Scalar(x, 0.3))

# -- elementwise: two tensors, of any layout and rank ------------------------------------------------------------------

for _name, _f in {
    "add.Tensor": torch.add, "sub.Tensor": torch.sub, "mul.Tensor": torch.mul, "div.Tensor": lambda a, b: a / positive(b), "maximum": torch.maximum, "minimum": torch.minimum, "fmax": torch.fmax, "fmin": torch.fmin,
    "atan2": torch.atan2, "hypot": torch.hypot, "logaddexp": torch.logaddexp, "copysign.Tensor": torch.copysign, "pow.Tensor_Tensor": lambda a, b: positive(a) ** b,
    "remainder.Tensor": lambda a, b: torch.remainder(a, positive(b)), "fmod.Tensor": lambda a, b: torch.fmod(a, positive(b)), "rsub.Tensor": lambda a, b: torch.rsub(a, b, alpha=2),
    "gt.Tensor": torch.gt, "lt.Tensor": torch.lt, "ge.Tensor": torch.ge, "le.Tensor": torch.le, "eq.Tensor": lambda a, b: a.round() == b.round(), "ne.Tensor": lambda a, b: a.round() != b.round(),
    "logical_and": lambda a, b: torch.logical_and(a > 0, b > 0), "logical_or": lambda a, b: torch.logical_or(a > 0, b > 0), "logical_xor": lambda a, b: torch.logical_xor(a > 0, b > 0),
    "bitwise_and.Tensor": lambda a, b: (a > 0) & (b > 0), "bitwise_or.Tensor": lambda a, b: (a > 0) | (b > 0), "bitwise_xor.Tensor": lambda a, b: (a > 0) ^ (b > 0),
    "div.Tensor_mode": lambda a, b: torch.div(a, positive(b), rounding_mode="trunc"), "floor_divide": lambda a, b: a.detach() // positive(b).detach(), "xlogy.Tensor": lambda a, b: torch.xlogy(a, positive(b)),
    "lerp.Tensor": lambda a, b: torch.lerp(a, b, a.sigmoid()), "lerp.Scalar": lambda a, b: torch.lerp(a, b, 0.3), "where.self": lambda a, b: torch.where(a > b, a, b),
    "masked_fill.Tensor": lambda a, b: a.masked_fill(b > 0, torch.tensor(0.4)), "addcmul": lambda a, b: torch.addcmul(a, a, b, value=0.3), "addcdiv": lambda a, b: torch.addcdiv(a, a, positive(b), value=0.3),
    "clamp.Tensor": lambda a, b: torch.clamp(a, min=b), "clamp_min.Tensor": lambda a, b: torch.clamp_min(a, b), "clamp_max.Tensor": lambda a, b: torch.clamp_max(a, b),
}.items():  # fmt: skip
    add(_name, lambda x, w, f=_f: f(x, w), (3, 4), (4,), fronts="ms")  # a parameter of fewer axes
    add(_name, lambda x, w, f=_f: f(w, x), (3, 4), (3, 1), fronts="ms")
    add(_name, lambda x, f=_f: f(x, constant(x, 3, 4)), (3, 4))
    add(_name, lambda x, f=_f: f(x, x.flip(-1)), (2, 3, 4), fronts="c")

# -- along axes --------------------------------------------------------------------------------------------------------

for _name, _run in {
    "softmax.int": lambda x: x.softmax(1), "log_softmax.int": lambda x: F.log_softmax(x, -1), "sum.dim_IntList": lambda x: x.sum((2, 3)), "mean.dim": lambda x: x.mean((-1, -2), keepdim=True),
    "amax": lambda x: x.amax((2, 3)), "amin": lambda x: x.amin(1), "var.correction": lambda x: x.var((2, 3), correction=0), "std.correction": lambda x: x.std((2, 3), correction=1), "logsumexp": lambda x: x.logsumexp((2, 3)),
    "var.dim": lambda x: x.var((2, 3), unbiased=True), "std.dim": lambda x: x.std((2, 3), unbiased=False),
    "cumsum": lambda x: x.cumsum(1), "cumprod": lambda x: x.cumprod(-1), "flip": lambda x: x.flip((1, 3)), "roll": lambda x: torch.roll(x, (1, -2), (2, 3)), "glu": lambda x: F.glu(x, 1),
    "select.int": lambda x: x[:, 1], "slice.Tensor": lambda x: x[:, :, 1::2], "narrow": lambda x: x.narrow(2, 1, 3), "unsqueeze": lambda x: x.unsqueeze(1).sum(2), "squeeze.dim": lambda x: x[:, :1].squeeze(1),
    "squeeze.dims": lambda x: x[:, :1, :, :1].squeeze((1, 3)), "transpose.int": lambda x: x.transpose(1, 2).reshape(-1, 4, 30), "unflatten.int": lambda x: x.unflatten(1, (2, 2)).flatten(2).cumsum(2),
    "constant_pad_nd": lambda x: torch.constant_pad_nd(x, (1, -2, 0, 3), 0.7), "argmax": lambda x: x.argmax(1) + x[:, 0], "argmin": lambda x: x.argmin(-1) + x[..., 0], "max.dim": lambda x: x.max(1).values, "min.dim": lambda x: x.min(2),
    "topk": lambda x: x.topk(2, 1).values, "sort": lambda x: x.sort(-1), "split.Tensor": lambda x: x.split(3, 2), "split_with_sizes": lambda x: torch.split(x, [1, 3], 1), "chunk": lambda x: x.chunk(2, 3)[1],
    "unbind.int": lambda x: x.unbind(1)[2], "prod.dim_int": lambda x: x.prod(1), "norm.ScalarOpt_dim": lambda x: torch.ops.aten.norm.ScalarOpt_dim(x, 2, [1]), "linalg_vector_norm": lambda x: torch.linalg.vector_norm(x, dim=(1, 2)),
    "movedim.int": lambda x: torch.movedim(x, 1, 3), "movedim.intlist": lambda x: torch.movedim(x, (1, 2), (2, 3)), "diff": lambda x: torch.diff(x, dim=2), "repeat_interleave.self_int": lambda x: x.repeat_interleave(2, 1),
    "any.dim": lambda x: (x > 0.9).any(1), "all.dim": lambda x: (x > -0.9).all(-1, keepdim=True), "any.dims": lambda x: (x > 0.9).any((2, 3)), "all.dims": lambda x: (x > -0.9).all((1, 2)), "argsort": lambda x: x.argsort(1) * x,
    "std_mean.correction": lambda x: torch.std_mean(x, (2, 3), correction=0), "var_mean.correction": lambda x: torch.var_mean(x, (1,), correction=1), "std_mean.dim": lambda x: torch.std_mean(x, (2, 3), unbiased=False), "var_mean.dim": lambda x: torch.var_mean(x, 1, True),
    "tril": lambda x: x.tril(1), "triu": lambda x: x.triu(-1), "median.dim": lambda x: x.median(1).values, "getitem": lambda x: x.max(1)[0],
    "zeros_like": lambda x: torch.zeros_like(x) + x, "ones_like": lambda x: torch.ones_like(x[:, :1]) * x, "full_like": lambda x: torch.full_like(x, 0.3) * x, "type_as": lambda x: (x > 0).type_as(x),
    "to.dtype": lambda x: (3 * x).int() + x,
    "flatten.using_ints": lambda x: x.flatten(2).cumsum(2), "permute": lambda x: x.permute(0, 2, 3, 1).reshape(-1, 30, 4), "reshape": lambda x: x.reshape(x.shape[0], 2, -1).cumsum(2), "expand": lambda x: x[:, :1].expand(-1, 4, -1, -1) * x,
    "repeat": lambda x: x.repeat(1, 2, 1, 1), "tile": lambda x: x.tile((1, 2, 1, 3)), "cat": lambda x: torch.cat((x, x.sin()), 1), "stack": lambda x: torch.stack((x, x.sin()), 1).flatten(1, 2),
}.items():  # fmt: skip
    add(_name, _run, IMAGE, fronts="mcs")
add("softmax.int", lambda x: x.softmax(-1), IMAGE, fronts="c")
add("log_softmax.int", lambda x: x.log_softmax(1), IMAGE, fronts="c")
add("sum.dim_IntList", lambda x: x.sum(1), IMAGE, fronts="c")
add("sum.dim_IntList", lambda x: (x > 0).sum(-1), IMAGE)
add("mean.dim", lambda x: x.mean(1, keepdim=True) * x, IMAGE, fronts="c")
add("amax", lambda x: x.amax(1), IMAGE, fronts="c")
add("cumsum", lambda x: x.cumsum(2), IMAGE, fronts="c")
add("flip", lambda x: x.flip(-1), IMAGE, fronts="c")
add("squeeze.dim", lambda x: x[:, :, :1].squeeze(2).sum(1), IMAGE, fronts="mc")
add("slice.Tensor", lambda x: x[:, 1:3] * x[:, :2], IMAGE, fronts="c")
add("roll", lambda x: x.roll(1, 1), IMAGE, fronts="c")
add("diff", lambda x: torch.diff(x, n=2, prepend=x[..., :1]), IMAGE)
add("type_as", lambda x: (x > 0).float().cumsum(-1) * x, fronts="ms")
add("mul.Tensor", lambda x: torch.arange(6).type_as(x) * x, fronts="ms")
add("add.Tensor", lambda x: torch.arange(6, device=x.device).to(x.dtype).unsqueeze(0) + x, fronts="ms")
# of parameters alone, and of all axes at once
for _name, _run in {
    "sum": lambda w: w / w.sum(), "mean": lambda w: w - w.mean(), "prod": lambda w: w * w.prod(), "norm": lambda w: w / w.norm(), "linalg_norm": lambda w: w / torch.linalg.norm(w), "vector_norm": lambda w: w / torch.linalg.vector_norm(w),
    "frobenius": lambda w: w / torch.linalg.matrix_norm(w), "max": lambda w: w / w.max(), "min": lambda w: w - w.min(), "amax": lambda w: w - w.amax(), "amin": lambda w: w - torch.amin(w), "var": lambda w: w / w.var(), "std": lambda w: w / (w.std() + 1),
    "std_mean": lambda w: (w - torch.std_mean(w)[1]) / torch.std_mean(w)[0], "var_mean": lambda w: (w - torch.var_mean(w, dim=1, keepdim=True)[1]) / torch.var_mean(w)[0].sqrt(),
    "logsumexp": lambda w: w - torch.logsumexp(w, (0, 1)), "flip": lambda w: w.flip(0, 1), "roll": lambda w: w.roll(2), "argmax": lambda w: w * w.argmax(), "softmax": lambda w: w.softmax(0), "median": lambda w: w * w.median(),
    "squeeze": lambda w: w[:1].squeeze() + w, "flatten": lambda w: w.flatten()[:5] + w, "ravel": lambda w: w.ravel().cumsum(0).view(3, 5), "repeat_interleave": lambda w: w.repeat_interleave(2)[:5] + w, "cumsum": lambda w: w.cumsum(0), "t": lambda w: w.t() @ w @ w.T @ w,
    "mT": lambda w: (w.mT @ w).sum(0) + w, "norm_p": lambda w: w / w.norm(p=1), "norm_dim": lambda w: w / w.norm(dim=1, keepdim=True), "normalize": lambda w: F.normalize(w, dim=0), "transpose": lambda w: w.transpose(0, 1).reshape(3, 5),
    "sort": lambda w: w.sort(0).values, "trace": lambda w: w * (w @ w.mT).trace(), "outer": lambda w: torch.outer(w[0], w[1])[:3] + w, "diag": lambda w: torch.diag(w[0]).mean(0) + w, "kron": lambda w: torch.kron(w[:1], w[:, :1])[:3] + w,
    "numel": lambda w: w / w.numel() + w.size(0), "amaxdims": lambda w: w.amax((0, 1)) * w, "unflatten": lambda w: w.unflatten(1, (5, 1)).squeeze(2), "pad": lambda w: F.pad(w[0], (1, 2))[:5] + w,
}.items():  # fmt: skip
    add(f"of parameters: {_name}", lambda x, w, f=_run: F.linear(x, f(w)), (5,), (3, 5), fronts="ms")

# -- shapes and joins --------------------------------------------------------------------------------------------------

add("reshape", lambda x: x.view(x.size(0), 2, 3).transpose(1, 2).reshape(len(x), 6).cumsum(1), fronts="ms")
add("reshape", lambda x: x.reshape(-1, 2).cumsum(1).reshape(-1, 6), fronts="ms")  # queries and features in one axis
add("expand", lambda x, w: w.expand(x.shape[0], -1) * x, (6,), (1, 6), fronts="ms")
add("expand", lambda x, w: w.expand(x.shape[0], -1, -1), (6,), (1, 2, 6), fronts="ms")
add("expand", lambda x, w: w.expand(x.shape[0], 3, 6) + x.unsqueeze(1).expand_as(w.expand(x.shape[0], 3, 6)), (6,), (6,), fronts="ms")
add("repeat", lambda x, w: w.repeat(x.shape[0], 2) + x, (6,), (1, 3), fronts="ms")
add("repeat", lambda x, w: w.repeat(x.shape[0], 1, 1).sum(1) + x, (6,), (6,), fronts="ms")
add("tile", lambda x, w: w.tile((x.shape[0], 2)) + x, (6,), (3,), fronts="ms")
add("cat", lambda x, w: torch.cat((w.expand(x.shape[0], 1, 3), x.view(-1, 2, 3)), 1).flatten(1), (6,), (1, 1, 3), fronts="ms")
add(
    "cat",
    lambda x, w: torch.cat((torch.zeros(x.shape[0], 2), x, constant(x, 1, 3).expand(x.shape[0], 3)), -1) * w,
    (6,),
    (11,),
    fronts="ms",
)
add("stack", lambda x, w: torch.stack((x, w.expand_as(x), x.sin()), -1).flatten(1), (6,), (6,), fronts="ms")
add("stack", lambda x, w: torch.stack((x, x * w, x.cos())).sum(0), (6,), (6,), fronts="ms")
add("new_zeros", lambda x: torch.zeros(x.shape[0], 3) + x[:, :3], fronts="ms")
add("new_zeros", lambda x: torch.cat((x.new_zeros(x.shape[0], 1).unsqueeze(-1) + 0.5, x.unsqueeze(-1)), 1), fronts="ms")
add("new_ones", lambda x: torch.ones(len(x), 1) @ torch.ones(1, 6) * x, fronts="ms")
add("new_full", lambda x: torch.full((x.size(0), 6), 0.3) * x, fronts="ms")
add("new_full", lambda x: torch.full((x.size(0), 6), 2, dtype=torch.int64) * x, fronts="ms")

# -- images ------------------------------------------------------------------------------------------------------------

VOLUME = (2, 4, 5, 4)
for _name, _run, _shape in [
    ("max_pool1d", lambda x: F.max_pool1d(x, 3, 2, 1), SIGNAL), ("max_pool2d", lambda x: F.max_pool2d(x, 2, padding=1, ceil_mode=True), IMAGE), ("max_pool2d", lambda x: F.max_pool2d(x, 2, 1, dilation=2), IMAGE), ("max_pool3d", lambda x: F.max_pool3d(x, 2), VOLUME),
    ("avg_pool1d", lambda x: F.avg_pool1d(x, 3, 2, 1, count_include_pad=False), SIGNAL), ("avg_pool2d", lambda x: F.avg_pool2d(x, (2, 3), 2, 1, ceil_mode=True, count_include_pad=False), IMAGE), ("avg_pool2d", lambda x: F.avg_pool2d(x, 2, divisor_override=3), IMAGE),
    ("avg_pool3d", lambda x: F.avg_pool3d(x, 2), VOLUME), ("adaptive_avg_pool1d", lambda x: F.adaptive_avg_pool1d(x, 3), SIGNAL), ("adaptive_avg_pool2d", lambda x: F.adaptive_avg_pool2d(x, (2, 3)), IMAGE), ("adaptive_avg_pool2d", lambda x: F.adaptive_avg_pool2d(x, (1, None)), IMAGE),
    ("adaptive_avg_pool3d", lambda x: F.adaptive_avg_pool3d(x, 2), VOLUME), ("adaptive_max_pool1d", lambda x: F.adaptive_max_pool1d(x, 3), SIGNAL), ("adaptive_max_pool2d", lambda x: F.adaptive_max_pool2d(x, (2, 3)), IMAGE), ("adaptive_max_pool3d", lambda x: F.adaptive_max_pool3d(x, 2), VOLUME),
    ("pixel_shuffle", lambda x: F.pixel_shuffle(x, 2), IMAGE), ("pixel_unshuffle", lambda x: F.pixel_unshuffle(x, 2), (4, 4, 6)), ("channel_shuffle", lambda x: F.channel_shuffle(x, 2), IMAGE), ("im2col", lambda x: F.unfold(x, (2, 3), padding=1), IMAGE),
    ("col2im", lambda x: F.fold(x.flatten(2), (3, 4), 2, stride=1), (4, 2, 3)), ("pad", lambda x: F.pad(x, (1, 2), mode="reflect"), SIGNAL), ("pad", lambda x: F.pad(x, (1, 2, 0, 1), mode="reflect"), IMAGE),
    ("pad", lambda x: F.pad(x, (1, 2), mode="replicate"), SIGNAL), ("pad", lambda x: F.pad(x, (1, 2, 0, 1), mode="replicate"), IMAGE), ("pad", lambda x: F.pad(x, (1, 1, 1, 1, 0, 1), mode="reflect"), VOLUME),
    ("pad", lambda x: F.pad(x, (1, 1, 1, 1, 0, 1), mode="replicate"), VOLUME), ("pad", lambda x: F.pad(x, (1, 0, 2, 1), mode="circular"), IMAGE), ("constant_pad_nd", lambda x: F.pad(x, (1, 0), value=0.5), IMAGE), ("constant_pad_nd", lambda x: F.pad(x, (0, 0, 0, 0, 1, 2)), IMAGE),
    ("upsample_nearest1d.vec", lambda x: F.interpolate(x, scale_factor=2), SIGNAL), ("upsample_nearest2d.vec", lambda x: F.interpolate(x, size=(7, 9)), IMAGE), ("upsample_nearest2d.vec", lambda x: F.interpolate(x, scale_factor=2), IMAGE),
    ("upsample_bilinear2d.vec", lambda x: F.interpolate(x, scale_factor=(2, 1.5), mode="bilinear", align_corners=True), IMAGE), ("upsample_bilinear2d.vec", lambda x: F.interpolate(x, size=(3, 3), mode="bilinear"), IMAGE),
    ("upsample_bicubic2d.vec", lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"), IMAGE), ("upsample_linear1d.vec", lambda x: F.interpolate(x, scale_factor=2, mode="linear"), SIGNAL), ("upsample_nearest3d.vec", lambda x: F.interpolate(x, scale_factor=2), VOLUME),
    ("upsample_trilinear3d.vec", lambda x: F.interpolate(x, scale_factor=2, mode="trilinear"), VOLUME),
    ("max_pool2d_with_indices", lambda x: F.max_pool2d(x, 2, return_indices=True)[0], IMAGE), ("max_unpool2d", lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2), (4, 6, 6)), ("lp_pool2d", lambda x: F.lp_pool2d(x.abs(), 2, 2), IMAGE),
    ("local_response_norm", lambda x: F.local_response_norm(x, 3), IMAGE), ("_upsample_bilinear2d_aa.vec", lambda x: F.interpolate(x, size=(3, 3), mode="bilinear", antialias=True), IMAGE),
    ("_upsample_nearest_exact1d.vec", lambda x: F.interpolate(x, size=9, mode="nearest-exact"), SIGNAL), ("_upsample_nearest_exact2d.vec", lambda x: F.interpolate(x, size=(7, 9), mode="nearest-exact"), IMAGE),
    ("_upsample_nearest_exact3d.vec", lambda x: F.interpolate(x, scale_factor=2, mode="nearest-exact"), VOLUME), ("_upsample_bicubic2d_aa.vec", lambda x: F.interpolate(x, size=(3, 3), mode="bicubic", antialias=True), IMAGE),
]:  # fmt: skip
    add(_name, _run, _shape, fronts="mcs")
# images without an axis of queries: torch takes the queries for channels
add("max_pool1d", lambda x: F.max_pool1d(x, 2), (6,), fronts="ms")
add("avg_pool1d", lambda x: F.avg_pool1d(x.mean(-1), 2), (5, 6), fronts="c")
add("max_pool2d", lambda x: F.max_pool2d(x, 2), (5, 6), fronts="mcs")
add("adaptive_avg_pool1d", lambda x: F.adaptive_avg_pool1d(x.mean((-1, -2)), 3), (5, 3, 2), fronts="mc")
add("upsample_bilinear2d.vec", lambda x, w: F.interpolate(w, size=(5, 6), mode="bilinear") * x, IMAGE, (1, 4, 2, 3), fronts="mcs")
add("upsample_bicubic2d.vec", lambda x, w: F.interpolate(w, size=(5, 6), mode="bicubic") + x, IMAGE, (1, 4, 3, 3), fronts="mcs")
add("pixel_shuffle", lambda x, w: F.pixel_shuffle(w, 2) + x, (1, 4, 6), (4, 2, 3), fronts="mcs")
add("avg_pool2d", lambda x, w: F.avg_pool2d(w, 2) + x, (2, 2, 3), (2, 4, 6), fronts="mcs")

# -- layers with weights -----------------------------------------------------------------------------------------------

add("linear", lambda x, w, b: F.linear(x, w, b), (6,), (4, 6), (4,), fronts="ms")
add("linear", lambda x, w: F.linear(x, w), (3, 2, 6), (5, 6), fronts="mcs")
add("linear", lambda x, w: F.linear(x, w), (6,), (6,), fronts="ms")  # a single row
add("linear", lambda x, b: F.linear(x, constant(x, 4, 6), b), (6,), (4,), fronts="ms")
add("linear", lambda x: F.linear(x, constant(x, 4, 6), constant(x, 4)), (6,), fronts="ms")
add("linear", lambda x, w: F.linear(x, w, constant(x, 4)), (6,), (4, 6), fronts="ms")
add("linear", lambda x, w, v: F.linear(x, F.linear(w, v.t())), (6,), (4, 2), (2, 6), fronts="ms")  # low-rank factors
for _d, _shape in ((1, SIGNAL), (2, IMAGE), (3, VOLUME)):
    conv, transposed = getattr(F, f"conv{_d}d"), getattr(F, f"conv_transpose{_d}d")
    c, one = _shape[0], (2,) * _d
    three = (3,) * _d
    add(f"conv{_d}d", lambda x, w, b, f=conv: f(x, w, b, 2, 1), _shape, (3, c, *three), (3,), fronts="mcs")
    add(f"conv{_d}d", lambda x, w, b, f=conv: f(x, w, b, groups=2), _shape, (6, c // 2, *one), (6,), fronts="mcs")
    add(f"conv{_d}d", lambda x, w, f=conv, g=c: f(x, w, padding=1, groups=g), _shape, (c, 1, *three), fronts="mcs")
    add(f"conv{_d}d", lambda x, w, f=conv: f(x, w, dilation=2, padding=2), _shape, (1, c, *three), fronts="mcs")
    add(
        f"conv{_d}d", lambda x, w, f=conv, s=(2, c, *one): f(x, constant(x, *s), w), _shape, (2,), fronts="mcs"
    )  # a fixed filter, an offset a model
    add(f"conv{_d}d", lambda x, f=conv, s=(2, c, *one): f(x, constant(x, *s)), _shape, fronts="mcs")
    add(f"conv{_d}d", lambda x, f=conv, s=(c, 1, *one), g=c: f(x, constant(x, *s), constant(x, g), groups=g), _shape, fronts="mcs")
    add(f"conv{_d}d.padding", lambda x, w, f=conv: f(x, w, padding="same"), _shape, (3, c, *one), fronts="mcs")
    add(f"conv{_d}d", lambda x, w, f=conv: f(x, w, padding="same"), _shape, (3, c, *three), fronts="mcs")
    name = f"conv_transpose{_d}d" + ("" if _d == 1 else ".input")
    add(name, lambda x, w, b, f=transposed: f(x, w, b, 2, 1, 1), _shape, (c, 3, *three), (3,), fronts="mcs")
    add(name, lambda x, w, f=transposed: f(x, w, groups=2, dilation=2), _shape, (c, 2, *one), fronts="mcs")
    add(name, lambda x, f=transposed, s=(c, 2, *one): f(x, constant(x, *s)), _shape, fronts="mcs")
add("conv2d", lambda x, w, v: F.conv2d(v, w).expand(len(x), -1, -1, -1), (2,), (2, 3, 2, 2), (1, 3, 4, 5), fronts="m")  # of a learned image
add("conv2d", lambda x, w, v: F.conv2d(v, w).expand(len(x), -1, -1, -1), (2,), (2, 3, 2, 2), (3, 4, 5), fronts="m")
add("conv1d", lambda x, w: F.conv1d(x[:, 0].t(), w).t(), (1, 4), (2, 4, 1), fronts="ms")  # without an axis of queries
add("conv2d", lambda x, w: F.conv2d(x, w.view(3, 4, 1, 1) / w.norm(dim=1)[:, None, None, None]), IMAGE, (3, 4), fronts="mcs")

for _shape in ((6,), SIGNAL, IMAGE, VOLUME):
    c = _shape[0]
    _fronts = "ms" if len(_shape) == 1 else "mcs"
    add("prelu", F.prelu, _shape, (c,), fronts=_fronts)
    add("prelu", F.prelu, _shape, (1,), fronts=_fronts)
    add("group_norm", lambda x, w, b: F.group_norm(x, 2, w, b), _shape, (c,), (c,), fronts=_fronts)
    add("group_norm", lambda x: F.group_norm(x, 1), _shape, fronts=_fronts)
    add(
        "batch_norm",
        lambda x, w, b: F.batch_norm(x, constant(x, x.shape[1]), constant(x, x.shape[1]).abs() + 0.5, w, b),
        _shape,
        (c,),
        (c,),
        fronts=_fronts,
    )
    add("batch_norm", lambda x, w: F.batch_norm(x, w, w.exp()), _shape, (c,), fronts=_fronts)
    if len(_shape) > 1:
        add("instance_norm", lambda x, w, b: F.instance_norm(x, None, None, w, b, eps=1e-2), _shape, (c,), (c,), fronts="mcs")
        add("instance_norm", lambda x: F.instance_norm(x, None, None, eps=1e-2), _shape, fronts="mcs")
        add("instance_norm", lambda x, w, b: F.instance_norm(x, b, b.exp(), w, b, use_input_stats=False), _shape, (c,), (c,), fronts="mcs")
add("prelu", lambda x: F.prelu(x, constant(x, 4)), IMAGE, fronts="mcs")
for _name, _f in {"layer_norm": F.layer_norm, "rms_norm": F.rms_norm}.items():
    add(_name, lambda x, w, f=_f: f(x, (6,), w, eps=1e-2), (6,), (6,), fronts="ms")
    add(_name, lambda x, w, f=_f: f(x, (5, 6), w, eps=1e-2), IMAGE, (5, 6), fronts="mcs")
    add(_name, lambda x, f=_f: f(x, IMAGE, eps=1e-2), IMAGE, fronts="mcs")
    add(_name, lambda x, f=_f: f(x, (6,), constant(x, 6), eps=1e-2), IMAGE, fronts="mcs")
add("layer_norm", lambda x, w, b: F.layer_norm(x, (6,), w, b), (3, 6), (6,), (6,), fronts="ms")
add("rms_norm", lambda x, w: F.rms_norm(x, (6,), w), (3, 6), (6,), fronts="ms")


def indices(x: Tensor, most: int) -> Tensor:
    return (10 * x).long() % most


add("embedding", lambda x, w: F.embedding(indices(x, 5), w), (4,), (5, 3), fronts="ms")
add("embedding", lambda x, w: F.embedding(indices(x, 5), w, padding_idx=2), (2, 3), (5, 3), fronts="ms")
add("embedding", lambda x: F.embedding(indices(x, 5), constant(x, 5, 3)), (4,), fronts="ms")
add("embedding", lambda x, w: F.embedding(torch.arange(4), w) + x.unsqueeze(-1), (4,), (5, 3), fronts="ms")

# -- recurrent ---------------------------------------------------------------------------------------------------------


def _recurrent(
    kind: str, gates: int, layers: int, both: bool, biases: bool, first: bool, learned: bool, width: int = 3, project: int = 0
) -> None:
    out = project or width
    shapes: list[tuple[int, ...]] = []
    for layer in range(layers):
        for _ in range(1 + both):
            shapes += [(gates * width, 2 if layer == 0 else out * (1 + both)), (gates * width, out)]
            shapes += [(gates * width,)] * 2 if biases else []
            shapes += [(project, width)] if project else []
    states = [(layers * (1 + both), 1, size) for size in ((out, width) if kind == "lstm" else (out,))]

    def run(x: Tensor, *w: Tensor) -> Any:
        n = len(x)
        held = [s.expand(-1, n, -1) for s in w[len(shapes) :]] if learned else [torch.zeros(s[0], n, s[2]).to(x) for s in states]
        x = x if first else x.transpose(0, 1)
        made = getattr(torch, kind)(x, held if kind == "lstm" else held[0], list(w[: len(shapes)]), biases, layers, 0.0, False, both, first)
        return (made[0] if first else made[0].transpose(0, 1), *(m.transpose(0, 1) for m in made[1:]))

    add(f"{kind}.input", run, (4, 2), *shapes, *(states if learned else []), fronts="ms")


for _kind, _gates in {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}.items():
    _recurrent(_kind, _gates, 1, False, True, True, False)
    _recurrent(_kind, _gates, 2, True, False, False, True)
_recurrent("lstm", 4, 2, True, True, True, True, width=4, project=3)
_recurrent("lstm", 4, 1, False, False, True, False, width=4, project=3)

# -- products ----------------------------------------------------------------------------------------------------------

add("matmul", lambda x, w: x @ w, (6,), (6, 4), fronts="ms")
add("matmul", lambda x, w: (w @ x.t()).t(), (6,), (4, 6), fronts="ms")  # queries last
add("matmul", lambda x, w: x @ w, (6,), (6,), fronts="ms")
add("matmul", lambda x, w: (x @ w).flatten(1), (2, 3, 6), (6, 4), fronts="mcs")
add("matmul", lambda x, w: w @ x, (2, 3, 6), (2, 4, 3), fronts="mcs")
add("matmul", lambda x: x @ x.transpose(-1, -2), (3, 6), fronts="mcs")
add("matmul", lambda x: x @ constant(x, 6, 3), (3, 6), fronts="mcs")
add("matmul", lambda x, w: x @ (w @ w.t()), (3,), (3, 4), fronts="ms")
add("matmul", lambda x, w: constant(x, 3, 4) @ w @ x.unsqueeze(-1), (2,), (4, 2), fronts="ms")
add("mm", lambda x, w: torch.mm(x, w), (6,), (6, 4), fronts="ms")
add("bmm", lambda x, w: torch.bmm(x, w.expand(len(x), -1, -1)), (3, 6), (6, 4), fronts="ms")
add("mv", lambda x, w: torch.mv(x, w), (6,), (6,), fronts="ms")
add("dot", lambda x, w: torch.dot(w, w) * x, (6,), (6,), fronts="ms")
add("addmm", lambda x, w, b: torch.addmm(b, x, w, beta=0.5, alpha=2), (6,), (6, 4), (4,), fronts="ms")
add("addmm", lambda x, b: torch.addmm(b, x, constant(x, 6, 4)), (6,), (4,), fronts="ms")
add("addmm", lambda x, w: torch.addmm(constant(x, 4), x, w), (6,), (6, 4), fronts="ms")
add("baddbmm", lambda x, w, b: torch.baddbmm(b, x, w.expand(len(x), -1, -1)), (3, 6), (6, 4), (1, 3, 4), fronts="ms")
add("baddbmm", lambda x, b: torch.baddbmm(b, x, constant(x, 6, 4).expand(len(x), 6, 4)), (3, 6), (4,), fronts="ms")


def _heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (2, 3)).transpose(1, 2)


attend = F.scaled_dot_product_attention
add("scaled_dot_product_attention", lambda x, w: attend(_heads(x), _heads(x * w), _heads(x)), (4, 6), (6,), fronts="ms")
add(
    "scaled_dot_product_attention",
    lambda x, w: attend(_heads(x), _heads(x * w), _heads(x), is_causal=True, scale=0.7),
    (4, 6),
    (6,),
    fronts="ms",
)
add(
    "scaled_dot_product_attention",
    lambda x, w: attend(_heads(x), _heads(x), _heads(x * w), attn_mask=w.expand(4, 4)),
    (4, 6),
    (4, 1),
    fronts="ms",
)
add(
    "scaled_dot_product_attention",
    lambda x: attend(_heads(x), _heads(x), _heads(x), attn_mask=torch.ones(4, 4, dtype=torch.bool).tril()),
    (4, 6),
    fronts="ms",
)
add(
    "scaled_dot_product_attention", lambda x: attend(x, x, x, attn_mask=(x[:, None, :, 0] > -0.3)), (4, 6), fronts="ms"
)  # some rows see nothing
add("scaled_dot_product_attention", lambda x, w: attend(w.expand(len(x), -1, -1), x, x), (4, 6), (1, 2, 6), fronts="ms")
add("scaled_dot_product_attention", lambda x, w: attend(x, w, w), (4, 6), (5, 6), fronts="ms")  # a learned memory
add(
    "scaled_dot_product_attention",
    lambda x: attend(x.view(-1, 4, 2, 3), x.view(-1, 4, 2, 3)[:, :2], x.view(-1, 4, 2, 3)[:, :2], enable_gqa=True),
    (4, 6),
    fronts="ms",
)
add("einsum", lambda x, w: torch.einsum("nij,jk->nik", x, w), (3, 6), (6, 4), fronts="ms")
add("einsum", lambda x, w: torch.einsum("nij,nkj,k->nik", x, x, w), (3, 6), (3,), fronts="ms")
add("bilinear", lambda x, w, b: F.bilinear(x, x.sin(), w, b), (6,), (4, 6, 6), (4,), fronts="ms")
add("index.Tensor", lambda x, w: w[indices(x, 5)], (4,), (5, 3), fronts="ms")
add("index.Tensor", lambda x: x[:, torch.tensor([3, 0, 1])], (4,), fronts="ms")
add("index.Tensor", lambda x: x[:, :, torch.tensor([[1], [0]]), torch.tensor([2, 0])], IMAGE, fronts="mcs")
add("index.Tensor", lambda x, w: w[:, torch.arange(4), torch.tensor([0, 2, 1, 2])] + x, (4,), (1, 4, 3), fronts="ms")
add("index_select", lambda x: x.index_select(1, torch.tensor([3, 0, 1])), (4,), fronts="ms")
add("index_select", lambda x, w: w.index_select(0, torch.tensor([3, 0])) + x[:, :1], (4,), (5,), fronts="ms")
add("gather", lambda x: x.gather(1, indices(x, 4)), (4,), fronts="ms")
add("gather", lambda x, w: w.expand(len(x), -1).gather(1, indices(x, 4)), (4,), (4,), fronts="ms")
add("cosine_similarity", lambda x, w: F.cosine_similarity(x, w, -1), (3, 6), (3, 6), fronts="ms")
add("pairwise_distance", lambda x, w: F.pairwise_distance(x, w), (3, 6), (3, 6), fronts="ms")
add("cdist", lambda x, w: torch.cdist(x, w), (3, 6), (4, 6), fronts="ms")
add("cdist", lambda x, w: torch.cdist(x, w), (6,), (4, 6), fronts="ms")  # a radial basis
add("outer", lambda x, w: torch.outer(w, w[:2]).flatten() * x, (6,), (3,), fronts="ms")
add("kron", lambda x, w: torch.kron(w, w).reshape(-1) * x, (6 * 6,), (2, 3), fronts="ms")
add(
    "grid_sampler",
    lambda x, w: F.grid_sample(x, F.affine_grid(w.expand(len(x), 2, 3), [len(x), 2, 4, 4], align_corners=False), align_corners=False),
    (2, 4, 4),
    (1, 2, 3),
    fronts="mcs",
)
add("linalg_matrix_norm.str_ord", lambda x, w: x / torch.linalg.matrix_norm(w), (6,), (4, 6), fronts="ms")
add("linalg_matrix_norm", lambda x, w: x / torch.linalg.matrix_norm(w, 1), (6,), (4, 6), fronts="ms")
add("mT", lambda x, w: x.mT @ w, (3, 6), (3, 2), fronts="ms")
add("numpy_T", lambda x, w: x @ w.T, (6,), (4, 6), fronts="ms")
add("t", lambda x, w: x @ w.t(), (6,), (4, 6), fronts="ms")
add("searchsorted.Tensor", lambda x: torch.searchsorted(torch.arange(5).to(x.dtype) / 4 - 0.5, x), (6,), fronts="ms")
add("one_hot", lambda x: F.one_hot(indices(x, 5), 5), (4,), fronts="ms")
add("scatter.src", lambda x: torch.zeros_like(x).scatter(1, indices(x, 4).argsort(1), x), (4,), fronts="ms")
add("index_add", lambda x: torch.zeros_like(x).index_add(1, torch.tensor([0, 2, 2, 1]), x), (4,), fronts="ms")
add("scatter.value", lambda x: x.scatter(1, indices(x, 4), 0.5), (4,), fronts="ms")
add("scatter_add", lambda x: torch.zeros_like(x).scatter_add(1, indices(x, 4), x), (4,), fronts="ms")
add("index_copy", lambda x: x.index_copy(1, torch.tensor([3, 0]), x[:, 1:3]), (4,), fronts="ms")
add("index_put", lambda x: torch.index_put(x.t(), (torch.tensor([3, 0]),), x.t()[1:3]).t(), (4,), fronts="ms")
add("slice_scatter", lambda x: x.slice_scatter(x[..., :2].sin(), -1, 2, 4), IMAGE, fronts="mcs")
add("slice_scatter", lambda x, w: x.slice_scatter(w.expand(len(x), -1), 1, 1, 3), (4,), (1, 2), fronts="ms")
add("select_scatter", lambda x, w: w.expand(len(x), 4, 5, 6).select_scatter(x[:, 0], 1, 2), IMAGE, (1, 4, 1, 1), fronts="mcs")
add("take_along_dim", lambda x: x.take_along_dim(indices(x, 4), 1), (4,), fronts="ms")
add("tensordot", lambda x, w: torch.tensordot(x, w, ([2], [0])), (3, 4), (4, 2), fronts="ms")
add("inner", lambda x, w: torch.inner(x, w), (4,), (3, 4), fronts="ms")
add("diagonal", lambda x: x.diagonal(0, 2, 3), IMAGE, fronts="mcs")
add("detach", lambda x: x + (x.round() - x).detach(), fronts="ms")  # straight through
add("detach", lambda x, w: x * w.detach(), (6,), (6,), fronts="ms")


def _cell(kind: str, gates: int, biases: bool) -> None:
    def run(x: Tensor, w: Tensor, v: Tensor, *b: Tensor) -> Any:
        state: Any = x.new_zeros(len(x), 3)
        state = (state, state) if kind == "lstm_cell" else state
        for step in x.unbind(1):
            state = getattr(torch, kind)(step, state, w, v, *b)
        return state

    add(kind, run, (4, 2), (gates * 3, 2), (gates * 3, 3), *([(gates * 3,)] * 2 if biases else []), fronts="ms")


for _kind, _gates in {"lstm_cell": 4, "gru_cell": 3, "rnn_tanh_cell": 1, "rnn_relu_cell": 1}.items():
    _cell(_kind, _gates, True)
    _cell(_kind, _gates, False)
for _name, _f in {name: getattr(torch, name) for name in ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")}.items():
    add(_name, lambda x, f=_f: f(x, 0.5, False), IMAGE, fronts="mcs")
add("prod", lambda x, w: x * w.prod(), (6,), (3,), fronts="ms")
add("median", lambda x, w: x * w.median(), (6,), (5,), fronts="ms")
add("trace", lambda x, w: x * w.trace(), (6,), (3, 3), fronts="ms")
add("diag", lambda x, w: x @ torch.diag(w), (6,), (6,), fronts="ms")
add(
    "affine_grid_generator",
    lambda x, w: F.affine_grid(w.expand(len(x), 2, 3), [len(x), 1, 2, 3], align_corners=True).flatten(1) * x,
    (12,),
    (1, 2, 3),
    fronts="ms",
)
