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
