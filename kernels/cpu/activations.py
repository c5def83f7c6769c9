"""Activations of the CPU wing: one table of values and derivatives. A new activation is one entry here.

torch's fused sigmoid, silu, elu, celu, softplus and tanh-gelu compute the elements that fill vector registers with one formula and those
left over at the end of a thread's share with another, which differs in the last bit. Which models those elements belong to
depends on the place in the group, so a model's loss would depend on its neighbors. They serve tensors of whole vectors alone, which nothing
is left over of (:func:`_whole`). Others are built from operators that round every element alike (``exp``, ``expm1``, ``erf``-gelu and
correctly rounded arithmetic; a test runs them all at odd offsets). torch's ``erf``-gelu does so on contiguous memory alone, so it is given
the contiguous view of a channels-last tensor.

    sigmoid s = 1 / (1 + exp(-x))        silu' = s (1 + x (1 - s))
    tanh: torch's, which is Intel's on Intel's processors; elsewhere t / (t + 2) with t = expm1(2 x), exact to three units where torch's is
        to one. On an Intel Xeon torch's takes an eighth to a fifth of the time of that, on an AMD EPYC half as long again
    elu, celu y = max(x, 0) + a expm1(min(x, 0) / b)   with b = 1 and b = a; derivative 1, or (y + a) / b for x <= 0
    softplus = (max(u, 0) + log1p(exp(-|u|))) / b with u = b x; derivative 1 / (1 + exp(-u))
    gelu' = (1 + t) / 2 + x / 2 (1 - t^2) u',  t = tanh(u),  u = c (x + 0.044715 x^3),  c = sqrt(2 / pi)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..layers import Activation
from . import jobs
from .products import intel

_aten = torch.ops.aten
_threshold_backward = _aten.threshold_backward.grad_input
_tanh_backward = _aten.tanh_backward.grad_input
_sigmoid_backward = _aten.sigmoid_backward.grad_input
_leaky_relu = _aten.leaky_relu.default
_leaky_relu_backward = _aten.leaky_relu_backward.default
_gelu = _aten.gelu.default
_gelu_backward = _aten.gelu_backward.default
_silu_backward = _aten.silu_backward.grad_input
_elu = _aten.elu.default
_elu_backward = _aten.elu_backward.grad_input
_softplus = _aten.softplus.default
_softplus_backward = _aten.softplus_backward.grad_input
WHOLE = 128  # bytes that torch's loops take at once, with AVX-512: two vectors; what is left over goes by another formula
BY_TWO_FORMULAS = frozenset(  # operations of which torch computes whole vectors by another formula than the numbers left over
    {"sigmoid", "glu", "silu", "gelu", "mish", "softplus", "elu", "selu", "celu", "exp2", "sinh", "cosh", "atanh", "atan2", "logaddexp"}
    | {"pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar"}
)
_LARGE = 20.0  # beyond it softplus is x and 2 tanh(x) is 2, to float32

_C = math.sqrt(2 / math.pi)
_CUBE = 0.044715


class Function(NamedTuple):
    """One activation.

    Attributes:
        forward: ``(x, record, owned) -> (f(x), saved)``. ``saved`` is the result where the derivative can be read off it, else ``x``.
            ``owned``: nobody else reads ``x``, so the result may take its memory.
        backward: ``(g, saved, record) -> gradient of x``. ``g``, the gradient of the result, may be overwritten.
        monotone: ``record -> bool``: whether max pooling may go first, as max(f(a), f(b)) = f(max(a, b)): a quarter of the evaluations.
    """

    forward: Callable[[Tensor, Activation, bool], tuple[Tensor, Tensor]]
    backward: Callable[[Tensor, Tensor, Activation], Tensor]
    monotone: Callable[[Activation], bool]


def function_of(record: Activation) -> Function | None:
    """The table's entry for a record, None where it has none."""
    return TABLE.get("gelu_tanh" if record.function == "gelu" and record.approximate == "tanh" else record.function)


def _in_usual_order(x: Tensor) -> bool:
    """Whether the numbers lie side by side, contiguous or channels-last."""
    return x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))


def _whole(x: Tensor) -> bool:
    """Whether torch computes all of x by one formula: whole vectors, side by side in memory, in one thread."""
    return _in_usual_order(x) and x.nbytes % WHOLE == 0 and x.device.type == "cpu" and jobs.threads_inside() == 1


def dense(x: Tensor) -> Tensor:
    """x, or a copy of it where its numbers do not fill the memory between its first and its last one: a gate's part of the channels, a cut
    of an image. Of such torch computes runs of neighbors, by vectors and what is left over by another formula; where models lie between
    each other, how long a run is depends on how many there are, and a model's bits would. (Numbers in short runs take three to ten times as
    long, besides: a vector function is called for each run.)"""
    if _in_usual_order(x) or x.device.type != "cpu":
        return x
    span = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride != span:
                return x.clone()
            span *= size
    return x


def in_order_of(g: Tensor, x: Tensor) -> Tensor:
    """g, or a copy of it whose numbers lie in memory in the order of those of ``x``: torch computes a function of two orders number by
    number, by another formula than that of vectors."""
    if g.stride() == x.stride() or g.shape != x.shape or g.device.type != "cpu":
        return g
    return torch.empty_like(x, dtype=g.dtype).copy_(g)


# -- functions whose derivative is read off the result -------------------------------------------------------------------


def _relu(x: Tensor, _: Activation, owned: bool) -> tuple[Tensor, Tensor]:
    y = x.relu_() if owned else x.relu()
    return y, y


def _relu_gradient(g: Tensor, y: Tensor, _: Activation) -> Tensor:
    return _threshold_backward(g, y, 0, grad_input=g)


def tanh(x: Tensor, owned: bool = False) -> Tensor:
    """tanh(x), within three units of the last place; in the memory of ``x`` where that is ``owned``."""
    if intel() or x.dtype not in (torch.float32, torch.float64):  # whose digits the steps between would use up
        return x.tanh_() if owned else x.tanh()
    t = (x.mul_(2) if owned else x * 2).clamp_(-_LARGE, _LARGE).expm1_()
    return t.div_(t + 2)


def _tanh(x: Tensor, _: Activation, owned: bool) -> tuple[Tensor, Tensor]:
    y = tanh(x, owned)
    return y, y


def _tanh_gradient(g: Tensor, y: Tensor, _: Activation) -> Tensor:
    return _tanh_backward(g, y, grad_input=g)


def _logistic(x: Tensor) -> Tensor:
    if _whole(x):
        return x.sigmoid()
    return x.neg().exp_().add_(1).reciprocal_()


def _sigmoid(x: Tensor, _: Activation, owned: bool) -> tuple[Tensor, Tensor]:
    y = _logistic(x)
    return y, y


def _sigmoid_gradient(g: Tensor, y: Tensor, _: Activation) -> Tensor:
    return _sigmoid_backward(g, y, grad_input=g)


def _exponential_scales(record: Activation) -> tuple[float, float]:
    """``a`` and ``b`` of the formula above."""
    return record.parameter, record.parameter if record.function == "celu" else 1.0


def _exponential(x: Tensor, record: Activation, owned: bool) -> tuple[Tensor, Tensor]:
    a, b = _exponential_scales(record)
    if _whole(x):
        y = _elu(x, a, 1.0, 1 / b)
        return y, y if a > 0 else x
    below = x.clamp_max(0)
    below = (below if b == 1 else below.div_(b)).expm1_()
    y = (below if a == 1 else below.mul_(a)).add_(x.clamp_min_(0) if owned and a > 0 else x.clamp_min(0))
    return y, y if a > 0 else x


def _exponential_gradient(g: Tensor, saved: Tensor, record: Activation) -> Tensor:
    a, b = _exponential_scales(record)
    if a > 0:  # of the result; with torch's names for the two slopes and for the factor within the exponential
        return _elu_backward(g, a, 1.0, 1 / b, True, saved, grad_input=g)
    return torch.where(saved > 0, g, saved.clamp_max(0).div_(b).exp_().mul_(a / b).mul_(g))


# -- functions whose derivative needs the argument -----------------------------------------------------------------------


def _leaky(x: Tensor, record: Activation, owned: bool) -> tuple[Tensor, Tensor]:
    return _leaky_relu(x, record.parameter), x


def _leaky_gradient(g: Tensor, x: Tensor, record: Activation) -> Tensor:
    return _leaky_relu_backward(g, x, record.parameter, False)


def _silu(x: Tensor, _: Activation, owned: bool) -> tuple[Tensor, Tensor]:
    return (_aten.silu(x) if _whole(x) else _logistic(x).mul_(x)), x


def _silu_gradient(g: Tensor, x: Tensor, _: Activation) -> Tensor:
    if _whole(x) and _whole(g):
        return _silu_backward(g, x, grad_input=g)
    s = _logistic(x)
    return s.neg().add_(1).mul_(x).add_(1).mul_(s).mul_(g)


def _soft(x: Tensor, record: Activation, owned: bool) -> tuple[Tensor, Tensor]:
    if _whole(x):
        return _softplus(x, record.parameter, _LARGE), x
    u = x * record.parameter
    return u.abs().neg_().exp_().log1p_().add_(u.clamp_min_(0)).div_(record.parameter), x


def _soft_gradient(g: Tensor, x: Tensor, record: Activation) -> Tensor:
    if _whole(x) and _whole(g):
        return _softplus_backward(g, x, record.parameter, _LARGE, grad_input=g)
    return _logistic(x * record.parameter).mul_(g)


def _contiguous_view(x: Tensor) -> Tensor:
    """A contiguous view of a dense channels-last tensor; any other as it is."""
    return x.permute(0, 2, 3, 1) if x.ndim == 4 and not x.is_contiguous() else x


def _erf_gelu(x: Tensor, _: Activation, owned: bool) -> tuple[Tensor, Tensor]:
    view = _contiguous_view(x)
    y = torch.nn.functional.gelu(view.contiguous())
    return y if view is x else y.permute(0, 3, 1, 2), x


def _erf_gelu_gradient(g: Tensor, x: Tensor, _: Activation) -> Tensor:
    view = _contiguous_view(x)
    if view is x:
        return _gelu_backward(g.contiguous(), x.contiguous())
    return _gelu_backward(g.permute(0, 2, 3, 1).contiguous(), view.contiguous()).permute(0, 3, 1, 2)


def _tanh_of_gelu(x: Tensor) -> Tensor:
    return tanh((x * x).mul_(_CUBE).add_(1).mul_(x).mul_(_C))


def _tanh_gelu(x: Tensor, _: Activation, owned: bool) -> tuple[Tensor, Tensor]:
    if _whole(x):
        return _gelu(x, approximate="tanh"), x
    return _tanh_of_gelu(x).add_(1).mul_(x).mul_(0.5), x


def _tanh_gelu_gradient(g: Tensor, x: Tensor, _: Activation) -> Tensor:
    if _whole(x) and _whole(g):
        return _gelu_backward(g, x, approximate="tanh")
    t = _tanh_of_gelu(x)
    slope = (x * x).mul_(3 * _CUBE).add_(1).mul_(_C)
    slope = (t * t).neg_().add_(1).mul_(slope).mul_(x)
    return slope.add_(t).add_(1).mul_(0.5).mul_(g)


def _always(_: Activation) -> bool:
    return True


def _never(_: Activation) -> bool:
    return False


def _if_positive(record: Activation) -> bool:
    return record.parameter > 0


# "identity" is no entry: it is left out of a compiled network.
TABLE: dict[str, Function] = {
    "relu": Function(_relu, _relu_gradient, _always),
    "leakyrelu": Function(_leaky, _leaky_gradient, _if_positive),
    "tanh": Function(_tanh, _tanh_gradient, _always),
    "sigmoid": Function(_sigmoid, _sigmoid_gradient, _always),
    "silu": Function(_silu, _silu_gradient, _never),
    "gelu": Function(_erf_gelu, _erf_gelu_gradient, _never),
    "gelu_tanh": Function(_tanh_gelu, _tanh_gelu_gradient, _never),
    "elu": Function(_exponential, _exponential_gradient, _if_positive),
    "celu": Function(_exponential, _exponential_gradient, _if_positive),
    "softplus": Function(_soft, _soft_gradient, _always),
}
