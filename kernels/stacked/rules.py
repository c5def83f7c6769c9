"""Values and gradients of single calls, written out: what a backward pass through torch's graph computes, without building the graph.

A rule is made once for a call of a program (``RULES``); a call that has none runs through torch's own graph, alone (``tape.py``). The
twins are the forms (``forms.py``), which autograd sees through: a test holds every rule against its form.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..cpu.activations import dense, in_order_of, tanh
from ..cpu.products import weight_gradient
from .calls import Call, Layout, Values
from .layouts import added_as_they_lie, aligned, behind, channels_first, models_first, over_pixels
from .product_forms import products

_aten = torch.ops.aten
Gradients = dict[str, Any]  # tensors, :class:`Within`, or ``algebra.Pieces``


class Within:
    """A gradient that is zero outside of some parts of its tensor. Those of several readers are put together when somebody reads it.

    Args:
        shape: of the whole tensor.
        parts: for each, where it is in a whole tensor (a view of it), and the gradient there. They may overlap.
    """

    def __init__(self, shape: torch.Size, *parts: tuple[Callable[[Tensor], Tensor], Tensor]) -> None:
        self.shape, self.parts = shape, parts

    def __add__(self, other: Within | Tensor) -> Within | Tensor:
        return Within(self.shape, *self.parts, *other.parts) if isinstance(other, Within) else self._onto(other.clone())

    __radd__ = __add__

    def whole(self) -> Tensor:
        return self._onto(self.parts[0][1].new_zeros(self.shape))

    def _onto(self, made: Tensor) -> Tensor:
        for place, value in self.parts:
            place(made).add_(value)
        return made


class Rule(Protocol):
    """One call and its reverse. A rule with an attribute ``fresh`` that is true returns gradients that nobody else holds."""

    def forward(self, a: Values, models: int) -> tuple[Tensor, Any]:
        """The value, and what :meth:`backward` needs. ``a`` holds the arguments by name."""
        ...

    def backward(self, g: Tensor, saved: Any, models: int) -> Gradients:
        """Gradients of the arguments that are wanted, by name, from that of the value."""
        ...


# The rule of a call, given its known arguments, the names of those whose gradients are wanted, and whether it may write over
# what it reads; None where it has none.
Maker = Callable[[Call, Values, frozenset[str], bool], Rule | None]


class Linear:
    """Batched products, as in ``forms.linear``."""

    fresh = True

    def __init__(self, call: Call, wanted: frozenset[str]) -> None:
        self.own, self.aligned, self.wanted = call.stacked("input"), call.aligned, wanted

    def forward(self, a: Values, models: int) -> tuple[Tensor, Any]:
        x, weight = a["input"], a["weight"]
        made, rows, operand = products(x, weight, a.get("bias"), self.own, self.aligned)
        return made, (rows, operand, weight.shape[-1], x.shape)

    def backward(self, g: Tensor, saved: Any, models: int, into: Tensor | None = None) -> Gradients:
        """``into``: memory ``[M, out, in]`` for the weight's gradient, with any step between models."""
        rows, weight, features, shape = saved
        g = g if g.ndim == 3 else g.reshape(models, -1, g.shape[-1])
        g = g.contiguous()  # models that lie between each other would be added up in an order that depends on how many
        made: Gradients = {}
        if "weight" in self.wanted:
            slope = weight_gradient(g, rows, into if rows.shape[2] == features else None)
            made["weight"] = slope if slope.shape[2] == features else slope[..., :features]
        if "bias" in self.wanted:
            made["bias"] = g.sum(1)
        if "input" in self.wanted:
            slope = torch.bmm(g, weight)
            slope = slope if slope.shape[2] == features else slope[..., :features]
            made["input"] = slope if slope.shape == shape else slope.reshape(shape)
        return made


def _linear(call: Call, known: Values, wanted: frozenset[str], owned: bool) -> Rule | None:
    plain = call.stacked("weight") and ("bias" not in call.layouts or call.stacked("bias")) and call.ranks["weight"] == 2
    return Linear(call, wanted) if plain else None


# -- functions of one tensor -------------------------------------------------------------------------------------------


class Function:
    """A function of one tensor whose derivative is computed from its argument alone or from its value alone."""

    def __init__(self, entry: Entry, known: Values, name: str, owned: bool, light: bool = False) -> None:
        """``light``: it takes no longer than a copy of its argument."""
        self._entry, self._known, self._name = entry, known, name
        self._light = light
        self._run = entry.in_place if owned and entry.in_place is not None else entry.forward

    def forward(self, a: Values, models: int) -> tuple[Tensor, Any]:
        x = a[self._name] if self._light else dense(a[self._name])
        y = self._run(x, self._known)
        return y, y if self._entry.of_value else x

    def backward(self, g: Tensor, saved: Any, models: int) -> Gradients:
        return {self._name: self._entry.backward(in_order_of(g, saved), saved, self._known)}


class Entry(NamedTuple):
    """How a function and its derivative are computed.

    Attributes:
        forward: ``(x, known arguments) -> y``.
        backward: ``(gradient of y, y or x, known arguments) -> gradient of x``.
        of_value: whether that is y.
        in_place: ``forward`` over the memory of x.
    """

    forward: Callable[[Tensor, Values], Tensor]
    backward: Callable[[Tensor, Tensor, Values], Tensor]
    of_value: bool = False
    in_place: Callable[[Tensor, Values], Tensor] | None = None


def _power_gradient(g: Tensor, x: Tensor, a: Values) -> Tensor:
    exponent = a["exponent"]
    if exponent == 0:
        return torch.zeros_like(g)
    return (g * (x if exponent == 2 else x.pow(exponent - 1))).mul_(exponent)


def _clamp_gradient(g: Tensor, x: Tensor, a: Values) -> Tensor:
    least, most = a.get("min"), a.get("max")
    g = g if least is None else torch.where(x >= least, g, 0)
    return g if most is None else torch.where(x <= most, g, 0)


_SELU = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946  # alpha and scale
FUNCTIONS: dict[str, Entry] = {
    "relu": Entry(lambda x, a: x.relu(), lambda g, y, a: _aten.threshold_backward(g, y, 0), True, lambda x, a: x.relu_()),
    "tanh": Entry(lambda x, a: tanh(x), lambda g, y, a: _aten.tanh_backward(g, y), True),
    "sigmoid": Entry(lambda x, a: x.sigmoid(), lambda g, y, a: _aten.sigmoid_backward(g, y), True, lambda x, a: x.sigmoid_()),
    "leaky_relu": Entry(
        lambda x, a: _aten.leaky_relu(x, a["negative_slope"]),
        lambda g, x, a: _aten.leaky_relu_backward(g, x, a["negative_slope"], False),
    ),
    "silu": Entry(lambda x, a: _aten.silu(x), lambda g, x, a: _aten.silu_backward(g, x)),
    "gelu": Entry(
        lambda x, a: _aten.gelu(x, approximate=a["approximate"]),
        lambda g, x, a: _aten.gelu_backward(g, x, approximate=a["approximate"]),
    ),
    "elu": Entry(
        lambda x, a: _aten.elu(x, a["alpha"], a["scale"], a["input_scale"]),
        lambda g, y, a: _aten.elu_backward(g, a["alpha"], a["scale"], a["input_scale"], True, y),
        True,
    ),
    "celu": Entry(
        lambda x, a: _aten.celu(x, a["alpha"]),
        lambda g, y, a: _aten.elu_backward(g, a["alpha"], 1.0, 1 / a["alpha"], True, y),
        True,
    ),
    "selu": Entry(lambda x, a: _aten.selu(x), lambda g, y, a: _aten.elu_backward(g, *_SELU, 1.0, True, y), True),
    "softplus": Entry(
        lambda x, a: _aten.softplus(x, a["beta"], a["threshold"]),
        lambda g, x, a: _aten.softplus_backward(g, x, a["beta"], a["threshold"]),
    ),
    "hardswish": Entry(lambda x, a: _aten.hardswish(x), lambda g, x, a: _aten.hardswish_backward(g, x)),
    "hardsigmoid": Entry(lambda x, a: _aten.hardsigmoid(x), lambda g, x, a: _aten.hardsigmoid_backward(g, x)),
    "mish": Entry(lambda x, a: _aten.mish(x), lambda g, x, a: _aten.mish_backward(g, x)),
    "relu6": Entry(lambda x, a: _aten.hardtanh(x, 0, 6), lambda g, x, a: _aten.hardtanh_backward(g, x, 0, 6)),
    "hardtanh": Entry(
        lambda x, a: _aten.hardtanh(x, a["min_val"], a["max_val"]),
        lambda g, x, a: _aten.hardtanh_backward(g, x, a["min_val"], a["max_val"]),
    ),
    "sin": Entry(lambda x, a: x.sin(), lambda g, x, a: x.cos().mul_(g)),
    "cos": Entry(lambda x, a: x.cos(), lambda g, x, a: x.sin().neg_().mul_(g)),
    "exp": Entry(lambda x, a: x.exp(), lambda g, y, a: g * y, True),
    "neg": Entry(lambda x, a: x.neg(), lambda g, x, a: g.neg()),
    "abs": Entry(lambda x, a: x.abs(), lambda g, x, a: g * x.sgn()),
    "sqrt": Entry(lambda x, a: x.sqrt(), lambda g, y, a: g / (2 * y), True),
    "square": Entry(lambda x, a: x.square(), lambda g, x, a: (g * x).mul_(2)),
    "log": Entry(lambda x, a: x.log(), lambda g, x, a: g / x),
    "rsqrt": Entry(lambda x, a: x.rsqrt(), lambda g, y, a: (g * y).mul_(y).mul_(y).mul_(-0.5), True),
    "reciprocal": Entry(lambda x, a: x.reciprocal(), lambda g, y, a: (g * y).mul_(y).neg_(), True),
    "rsub.Scalar": Entry(lambda x, a: torch.rsub(x, a["other"], alpha=a["alpha"]), lambda g, x, a: g * -a["alpha"]),
    "pow.Tensor_Scalar": Entry(lambda x, a: x.pow(a["exponent"]), _power_gradient),
    "log_sigmoid": Entry(lambda x, a: torch.nn.functional.logsigmoid(x), lambda g, x, a: x.neg().sigmoid_().mul_(g)),
    "clamp": Entry(lambda x, a: x.clamp(a["min"], a["max"]), _clamp_gradient),
    "clamp_min": Entry(lambda x, a: x.clamp_min(a["min"]), _clamp_gradient),
    "clamp_max": Entry(lambda x, a: x.clamp_max(a["max"]), _clamp_gradient),
    "glu": Entry(
        lambda x, a: _aten.glu(x.contiguous(), a["dim"]),
        lambda g, x, a: _aten.glu_backward(g.contiguous(), x.contiguous(), a["dim"]),
    ),
    "softmax.int": Entry(
        lambda x, a: x.softmax(a["dim"]), lambda g, y, a: _aten._softmax_backward_data(g, y, a["dim"], y.dtype), True
    ),
    "log_softmax.int": Entry(
        lambda x, a: x.log_softmax(a["dim"]), lambda g, y, a: _aten._log_softmax_backward_data(g, y, a["dim"], y.dtype), True
    ),
}  # fmt: skip
_LIGHT = frozenset({"relu", "leaky_relu", "relu6", "hardtanh", "hardswish", "hardsigmoid", "clamp", "clamp_min", "clamp_max"})
_LIGHT |= {"neg", "abs", "square", "rsqrt", "reciprocal", "rsub.Scalar"}
_LIGHT |= {"glu", "softmax.int", "log_softmax.int"}  # which lay their argument out themselves


def _function(call: Call, known: Values, wanted: frozenset[str], owned: bool) -> Rule | None:
    entry = FUNCTIONS.get(call.operation.name)
    if entry is None or list(call.layouts) != ["self"] or known.get("dtype") is not None:
        return None
    if entry.of_value and known.get("alpha", 1) <= 0:
        return None  # an ELU that falls has no derivative that its value tells
    return Function(entry, known, "self", owned, call.operation.name in _LIGHT)


def reduced(slope: Tensor, shape: torch.Size) -> Tensor:
    """A gradient ``[M, ...]`` summed to the shape of a tensor that was broadcast: ones between its models and its other axes."""
    if slope.shape == shape:
        return slope
    if shape == (*slope.shape[:2], 1, 1) and added_as_they_lie(slope):
        return over_pixels(slope)
    slope = slope.contiguous()  # models that lie between each other would be added up in an order that depends on how many
    return slope.sum_to_size((shape[0], *(1,) * (slope.ndim - len(shape)), *shape[1:])).reshape(shape)


def of_own(call: Call, wanted: frozenset[str]) -> bool:
    """Whether each tensor whose gradient is wanted has its models in front where the result of an elementwise call has."""
    return call.layout is not Layout.MODELS or all(call.stacked(name) for name in wanted)


# -- arithmetic of two tensors, or of one and a number --------------------------------------------------------------------


class Arithmetic:
    """``add``, ``sub``, ``mul`` and ``div``."""

    def __init__(self, call: Call, known: Values, wanted: frozenset[str]) -> None:
        self.kind = call.operation.name.partition(".")[0]
        self.call, self.wanted = call, wanted
        self.alpha = known.get("alpha", 1)

    def forward(self, a: Values, models: int) -> tuple[Tensor, Any]:
        x, y = (aligned(self.call, a, name, models) for name in ("self", "other"))
        shapes = {name: a[name].shape for name in self.wanted}
        if self.kind == "mul":
            return x * y, (x if "other" in self.wanted else None, y if "self" in self.wanted else None, shapes)
        if self.kind == "div":
            made = x / y
            return made, (made if "other" in self.wanted else None, y, shapes)
        made = torch.add(x, y, alpha=self.alpha) if self.kind == "add" else torch.sub(x, y, alpha=self.alpha)
        return made, (None, None, shapes)

    def backward(self, g: Tensor, saved: Any, models: int) -> Gradients:
        x, y, shapes = saved
        made: Gradients = {}
        for name in self.wanted:
            if self.kind == "mul":
                other = y if name == "self" else x
                slope = g * other
            elif self.kind == "div":
                slope = g / y
                slope = slope if name == "self" else slope.mul_(x).neg_()  # x: the quotient
            else:
                factor = 1 if name == "self" else self.alpha if self.kind == "add" else -self.alpha
                slope = g if factor == 1 else g * factor
            made[name] = reduced(slope, shapes[name])
        return made


def _arithmetic(call: Call, known: Values, wanted: frozenset[str], owned: bool) -> Rule | None:
    overload = call.operation.name.partition(".")[2]
    names = set(call.layouts)
    if overload not in ("Tensor", "Scalar") or not names <= {"self", "other"} or known.get("rounding_mode") is not None:
        return None
    return Arithmetic(call, known, wanted) if of_own(call, wanted) else None


# -- norms ----------------------------------------------------------------------------------------------------------------


class LayerNorm:
    """Layer norm over the last axes, with each model's own scale and shift."""

    def __init__(self, call: Call, known: Values, wanted: frozenset[str]) -> None:
        self.axes, self.eps, self.wanted, self.rank = list(known["normalized_shape"]), float(known.get("eps", 1e-5)), wanted, call.rank

    def forward(self, a: Values, models: int) -> tuple[Tensor, Any]:
        x = a["input"].contiguous()
        normed, mean, rstd = torch.native_layer_norm(x, self.axes, None, None, self.eps)
        own = (a.get("weight"), a.get("bias"))
        scale, shift = (None if value is None else behind(value, self.rank, value.ndim - 1, models) for value in own)
        made = normed
        if scale is not None:
            made = normed * scale if shift is None else torch.addcmul(shift, normed, scale)
        elif shift is not None:
            made = normed + shift
        return made, (x, mean, rstd, normed, scale)

    def backward(self, g: Tensor, saved: Any, models: int) -> Gradients:
        x, mean, rstd, normed, scale = saved
        made: Gradients = {}
        g = g.contiguous()  # for sums whose order does not depend on how many models there are
        over = tuple(range(1, g.ndim - len(self.axes)))  # none for a norm of a parameter, and a sum over no axes would be one over all
        if "weight" in self.wanted:
            made["weight"] = (g * normed).sum(over) if over else g * normed
        if "bias" in self.wanted:
            made["bias"] = g.sum(over) if over else g
        if "input" in self.wanted:
            g = g if scale is None else g * scale
            made["input"] = _aten.native_layer_norm_backward(g, x, self.axes, mean, rstd, None, None, [True, False, False])[0]
        return made


def _layer_norm(call: Call, known: Values, wanted: frozenset[str], owned: bool) -> Rule | None:
    names = set(call.layouts)
    plain = call.layout is Layout.MODELS and all(call.stacked(name) for name in names) and names <= {"input", "weight", "bias"}
    return LayerNorm(call, known, wanted) if plain and call.ranks.get("weight", 1) == len(known["normalized_shape"]) else None


# -- views ----------------------------------------------------------------------------------------------------------------


class Shaped:
    """A call of one tensor whose gradient is made of its value's and of the shape that the tensor had: views, cuts, sums."""

    def __init__(
        self, name: str, forward: Callable[[Values, int], Tensor], backward: Callable[[Tensor, torch.Size], Tensor | Within]
    ) -> None:
        self._name, self._forward, self._backward = name, forward, backward

    def forward(self, a: Values, models: int) -> tuple[Tensor, Any]:
        shape = a[self._name].shape
        return self._forward(a, models), shape

    def backward(self, g: Tensor, saved: Any, models: int) -> Gradients:
        return {self._name: self._backward(g, saved)}


class Moved:
    """A value in another layout: models in front, or among the channels."""

    def __init__(self, forward: Callable[[Tensor, int], Tensor], backward: Callable[[Tensor, int], Tensor]) -> None:
        self._forward, self._backward = forward, backward

    def forward(self, a: Values, models: int) -> tuple[Tensor, Any]:
        return self._forward(a["x"], models), None

    def backward(self, g: Tensor, saved: Any, models: int) -> Gradients:
        return {"x": self._backward(g, models)}


TO_MODELS = Moved(models_first, lambda g, models: channels_first(g, True))
TO_CHANNELS = Moved(lambda x, models: channels_first(x, True), models_first)


def _identity(call: Call, known: Values, wanted: frozenset[str], owned: bool) -> Rule | None:
    return Shaped("input", lambda a, models: a["input"], lambda g, shape: g) if "input" in call.layouts else None


# By form, then by name.
FORM_MAKERS: dict[str, Maker] = {
    "linear": _linear,
    "elementwise": _function,
    "layer_norm": _layer_norm,
    "identity": _identity,
}
NAME_MAKERS: dict[str, Maker] = {
    **{f"{kind}.{overload}": _arithmetic for kind in ("add", "sub", "mul", "div") for overload in ("Tensor", "Scalar")},
    "glu": _function,
    "softmax.int": _function,
    "log_softmax.int": _function,
}
