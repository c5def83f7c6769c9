"""Activations of the CPU wing: one table of values and derivatives. A new activation is one entry here.

torch's fused sigmoid, silu, elu and tanh-gelu compute the elements that fill a vector register with one formula and the few
left over at the end of a thread's share with another, which differs in the last bit. Which models those elements belong to
depends on the place in the group, so a model's loss would depend on its neighbors. These functions are therefore built from operators
that round every element alike (``exp``, ``expm1``, ``tanh``, ``erf``-gelu and correctly rounded arithmetic; a test runs them all at odd
offsets). torch's ``erf``-gelu does so on contiguous memory alone, so it is given the contiguous view of a channels-last tensor.

    sigmoid s = 1 / (1 + exp(-x))        silu' = s (1 + x (1 - s))
    elu, celu = max(x, 0) + a expm1(min(x, 0) / b)   with b = 1 and b = a; derivative 1, or a / b exp(x / b) for x <= 0
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

_aten = torch.ops.aten
_threshold_backward = _aten.threshold_backward.grad_input
_tanh_backward = _aten.tanh_backward.grad_input
_sigmoid_backward = _aten.sigmoid_backward.grad_input
_leaky_relu = _aten.leaky_relu.default
_leaky_relu_backward = _aten.leaky_relu_backward.default
_gelu_backward = _aten.gelu_backward.default

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


# -- functions whose derivative is read off the result -------------------------------------------------------------------


def _relu(x: Tensor, _: Activation, owned: bool) -> tuple[Tensor, Tensor]:
    y = x.relu_() if owned else x.relu()
    return y, y


def _relu_gradient(g: Tensor, y: Tensor, _: Activation) -> Tensor:
    return _threshold_backward(g, y, 0, grad_input=g)


def _tanh(x: Tensor, _: Activation, owned: bool) -> tuple[Tensor, Tensor]:
    y = x.tanh_() if owned else x.tanh()
    return y, y


def _tanh_gradient(g: Tensor, y: Tensor, _: Activation) -> Tensor:
    return _tanh_backward(g, y, grad_input=g)


def _logistic(x: Tensor) -> Tensor:
    return x.neg().exp_().add_(1).reciprocal_()


def _sigmoid(x: Tensor, _: Activation, owned: bool) -> tuple[Tensor, Tensor]:
    y = _logistic(x)
    return y, y


def _sigmoid_gradient(g: Tensor, y: Tensor, _: Activation) -> Tensor:
    return _sigmoid_backward(g, y, grad_input=g)


# -- functions whose derivative needs the argument -----------------------------------------------------------------------


def _leaky(x: Tensor, record: Activation, owned: bool) -> tuple[Tensor, Tensor]:
    return _leaky_relu(x, record.parameter), x


def _leaky_gradient(g: Tensor, x: Tensor, record: Activation) -> Tensor:
    return _leaky_relu_backward(g, x, record.parameter, False)


def _silu(x: Tensor, _: Activation, owned: bool) -> tuple[Tensor, Tensor]:
    return _logistic(x).mul_(x), x


def _silu_gradient(g: Tensor, x: Tensor, _: Activation) -> Tensor:
    s = _logistic(x)
    return s.neg().add_(1).mul_(x).add_(1).mul_(s).mul_(g)


def _exponential_scales(record: Activation) -> tuple[float, float]:
    """``a`` and ``b`` of the formula above."""
    return record.parameter, record.parameter if record.function == "celu" else 1.0


def _exponential(x: Tensor, record: Activation, owned: bool) -> tuple[Tensor, Tensor]:
    a, b = _exponential_scales(record)
    return x.clamp_max(0).div_(b).expm1_().mul_(a).add_(x.clamp_min(0)), x


def _exponential_gradient(g: Tensor, x: Tensor, record: Activation) -> Tensor:
    a, b = _exponential_scales(record)
    return torch.where(x > 0, g, x.clamp_max(0).div_(b).exp_().mul_(a / b).mul_(g))


def _softplus(x: Tensor, record: Activation, owned: bool) -> tuple[Tensor, Tensor]:
    u = x * record.parameter
    return u.abs().neg_().exp_().log1p_().add_(u.clamp_min_(0)).div_(record.parameter), x


def _softplus_gradient(g: Tensor, x: Tensor, record: Activation) -> Tensor:
    return _logistic(x * record.parameter).mul_(g)


def _contiguous_view(x: Tensor) -> Tensor:
    """A contiguous view of a dense channels-last tensor; any other as it is."""
    return x.permute(0, 2, 3, 1) if x.ndim == 4 and not x.is_contiguous() else x


def _gelu(x: Tensor, _: Activation, owned: bool) -> tuple[Tensor, Tensor]:
    view = _contiguous_view(x)
    y = torch.nn.functional.gelu(view.contiguous())
    return y if view is x else y.permute(0, 3, 1, 2), x


def _gelu_gradient(g: Tensor, x: Tensor, _: Activation) -> Tensor:
    view = _contiguous_view(x)
    if view is x:
        return _gelu_backward(g.contiguous(), x.contiguous())
    return _gelu_backward(g.permute(0, 2, 3, 1).contiguous(), view.contiguous()).permute(0, 3, 1, 2)


def _tanh_of_gelu(x: Tensor) -> Tensor:
    return (x * x).mul_(_CUBE).add_(1).mul_(x).mul_(_C).tanh_()


def _tanh_gelu(x: Tensor, _: Activation, owned: bool) -> tuple[Tensor, Tensor]:
    return _tanh_of_gelu(x).add_(1).mul_(x).mul_(0.5), x


def _tanh_gelu_gradient(g: Tensor, x: Tensor, _: Activation) -> Tensor:
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
    "gelu": Function(_gelu, _gelu_gradient, _never),
    "gelu_tanh": Function(_tanh_gelu, _tanh_gelu_gradient, _never),
    "elu": Function(_exponential, _exponential_gradient, _if_positive),
    "celu": Function(_exponential, _exponential_gradient, _if_positive),
    "softplus": Function(_softplus, _softplus_gradient, _always),
}
