"""Activations of the CPU path and their derivatives, in operators that round every element alike.

torch's fused sigmoid, silu, elu and tanh-gelu compute the elements that fill a vector register with one formula and the few
left over at the end of a thread's share with another, which differs in the last bit. Which models those elements belong to
depends on the place in the group, so a model's loss would depend on its neighbours. These are therefore built from operators without
that seam (``exp``, ``expm1``, ``tanh``, ``erf``-gelu and correctly rounded arithmetic; a test runs them all at odd offsets). torch's
``erf``-gelu is without it on contiguous memory alone, so a channels-last tensor is shown to it as what lies in memory.

    sigmoid s = 1 / (1 + exp(-x))        silu' = s (1 + x (1 - s))
    elu, celu = max(x, 0) + a expm1(min(x, 0) / b)   with b = 1 and b = a; derivative 1, or a / b exp(x / b) for x <= 0
    gelu' = (1 + t) / 2 + x / 2 (1 - t^2) u',  t = tanh(u),  u = c (x + 0.044715 x^3),  c = sqrt(2 / pi)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..layers import Activation, Unplannable

_aten = torch.ops.aten
_threshold_backward = _aten.threshold_backward.grad_input
_tanh_backward = _aten.tanh_backward.grad_input
_sigmoid_backward = _aten.sigmoid_backward.grad_input
_leaky_relu = _aten.leaky_relu.default
_leaky_relu_backward = _aten.leaky_relu_backward.default
_gelu_backward = _aten.gelu_backward.default

_C = math.sqrt(2 / math.pi)
_CUBE = 0.044715


def is_monotone(act: Activation) -> bool:
    """Whether max pooling may go first: max(f(a), f(b)) = f(max(a, b)), at a quarter of the evaluations of f."""
    if act.function in ("leakyrelu", "elu", "celu"):
        return act.parameter > 0
    return act.function in ("relu", "tanh", "sigmoid")


def _sigmoid(x: Tensor) -> Tensor:
    return x.neg().exp_().add_(1).reciprocal_()


def _elu_scales(act: Activation) -> tuple[float, float]:
    """``a`` and ``b`` of the formula above."""
    return act.parameter, act.parameter if act.function == "celu" else 1.0


def _tanh_of_gelu(x: Tensor) -> Tensor:
    return (x * x).mul_(_CUBE).add_(1).mul_(x).mul_(_C).tanh_()


def _as_it_lies(x: Tensor) -> Tensor:
    """A contiguous view of a dense channels-last tensor; any other as it is."""
    return x.permute(0, 2, 3, 1) if x.ndim == 4 and not x.is_contiguous() else x


def _gelu(x: Tensor) -> Tensor:
    lies = _as_it_lies(x)
    y = torch.nn.functional.gelu(lies.contiguous())
    return y if lies is x else y.permute(0, 3, 1, 2)


def _gelu_gradient(g: Tensor, x: Tensor) -> Tensor:
    lies = _as_it_lies(x)
    if lies is x:
        return _gelu_backward(g.contiguous(), x.contiguous())
    return _gelu_backward(g.permute(0, 2, 3, 1).contiguous(), lies.contiguous()).permute(0, 3, 1, 2)


def forward(x: Tensor, act: Activation, owned: bool) -> tuple[Tensor, Tensor]:
    """``f(x)``, and what :func:`backward` wants to see: the result where the derivative can be read off it, else ``x``.

    ``owned``: nobody else looks at ``x``, so the result may take its place.
    """
    match act.function:
        case "relu":
            y = x.relu_() if owned else x.relu()
            return y, y
        case "tanh":
            y = x.tanh_() if owned else x.tanh()
            return y, y
        case "sigmoid":
            y = _sigmoid(x)
            return y, y
        case "silu":
            return _sigmoid(x).mul_(x), x
        case "gelu":
            if act.approximate == "tanh":
                return _tanh_of_gelu(x).add_(1).mul_(x).mul_(0.5), x
            return _gelu(x), x
        case "leakyrelu":
            return _leaky_relu(x, act.parameter), x
        case "elu" | "celu":
            a, b = _elu_scales(act)
            return x.clamp_max(0).div_(b).expm1_().mul_(a).add_(x.clamp_min(0)), x
    raise Unplannable(f"layer {act.name!r} (activation): unknown function {act.function!r}")


def backward(g: Tensor, saved: Tensor, act: Activation) -> Tensor:
    """Gradient of the input, from the gradient ``g`` of the output, which may be overwritten."""
    x = saved
    match act.function:
        case "relu":
            return _threshold_backward(g, saved, 0, grad_input=g)
        case "tanh":
            return _tanh_backward(g, saved, grad_input=g)
        case "sigmoid":
            return _sigmoid_backward(g, saved, grad_input=g)
        case "silu":
            s = _sigmoid(x)
            return s.neg().add_(1).mul_(x).add_(1).mul_(s).mul_(g)
        case "gelu":
            if act.approximate != "tanh":
                return _gelu_gradient(g, x)
            t = _tanh_of_gelu(x)
            slope = (x * x).mul_(3 * _CUBE).add_(1).mul_(_C)
            slope = (t * t).neg_().add_(1).mul_(slope).mul_(x)
            return slope.add_(t).add_(1).mul_(0.5).mul_(g)
        case "leakyrelu":
            return _leaky_relu_backward(g, x, act.parameter, False)
    a, b = _elu_scales(act)
    return torch.where(x > 0, g, x.clamp_max(0).div_(b).exp_().mul_(a / b).mul_(g))
