"""The library call: outputs of a population, and how far reconstructed models are from their originals in behaviour.

This module validates, gathers targets and reduces. It knows nothing of devices: ``engine.py`` runs the models.
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import Any, Union

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import engine
from .architecture import Architecture
from .errors import WslfastError, describe, require
from .kernels.reference import CRITERIA, criterion_values
from .population import Population, stack
from .tokens import layout, num_tokens

Weights = Union[Tensor, Mapping[str, Tensor], Population]
REDUCTIONS = ("mean", "sum", "none")
NAN_POLICIES = ("propagate", "omit", "raise")


def batched_forward(weights: Weights, queries: Tensor, architecture: Architecture, *, backend: str = "auto") -> Tensor:
    """Outputs of k models, each with its own weights, on shared queries, in evaluation mode.

    Args:
        weights: ``[k, P]`` rows of weights, ``[k, T, D]`` tokens, ``{name: [k, *shape]}``, or a Population.
        queries: ``[n, *architecture.input_shape]``, shared by all models; any strides.
        architecture: what every model is.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        ``[k, n, K]`` in float32 (float64 for float64 weights, autocast's dtype under autocast); differentiable in both
        weights and queries.

    Raises:
        WslfastError: naming the argument, what was expected and what came.
    """
    _check_call(architecture, backend)
    rows = _rows(weights, architecture, "weights")
    queries = _queries(queries, architecture, rows)
    return engine.forward(rows, queries, architecture, backend=backend)


def batched_behavioral_loss(
    reconstructed: Weights,
    original: Weights | None,
    queries: Tensor,
    architecture: Architecture,
    *,
    targets: Tensor | None = None,
    criterion: str = "mse",
    temperature: float = 2.0,
    reduction: str = "mean",
    nan_policy: str = "propagate",
    backend: str = "auto",
) -> Tensor:
    """Distance in behaviour between reconstructed models and their originals on shared queries (arXiv 2503.17138).

    Args:
        reconstructed: ``[k, P]`` weights, ``[k, T, D]`` tokens (token size read off D), or ``{name: [k, *shape]}``; gradients
            flow here, once (``create_graph`` raises).
        original: the same forms, or None when ``targets`` is given; never receives a gradient.
        queries: ``[n, *architecture.input_shape]``, shared by all models. If it requires a gradient, it gets one.
        architecture: what every model is.
        targets: ``[k, n, K]`` outputs of the originals on these queries; saves running them.
        criterion: per model, with f^ and f the outputs of reconstruction and original, ``[n, K]``:
            ``"mse"`` 1/(2n) sum_i ||f^(x_i) - f(x_i)||^2, whose mean over models is the paper's L_B;
            ``"softmax_mse"`` mean squared difference of probabilities (the published code's ``l2``);
            ``"cross_entropy"`` with the original's probabilities as soft labels;
            ``"distillation"`` T^2/n sum_i KL(softmax(f/T) || softmax(f^/T)).
        temperature: T > 0, of ``"distillation"`` alone.
        reduction: ``"mean"`` over the models kept, ``"sum"``, or ``"none"`` for per-model values ``[k]``.
        nan_policy: a model is bad if its value, or its gradient, is not finite. ``"propagate"`` lets that show in its own value and
            gradient; ``"omit"`` leaves it out (zero gradient; NaN under reduction ``"none"``), every other model's value and gradient
            bit-equal to a call without it; ``"raise"`` raises and names it. Without a gradient, values alone are judged.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        A scalar, or ``[k]`` for reduction ``"none"``; float32, or float64 for float64 weights.

    Raises:
        WslfastError: naming the argument, what was expected and what came; also when every model is omitted from a mean.
    """
    _check_call(architecture, backend)
    require(criterion in CRITERIA, f"criterion: expected one of {CRITERIA}, got {criterion!r}")
    require(reduction in REDUCTIONS, f"reduction: expected one of {REDUCTIONS}, got {reduction!r}")
    require(nan_policy in NAN_POLICIES, f"nan_policy: expected one of {NAN_POLICIES}, got {nan_policy!r}")
    number = isinstance(temperature, numbers.Real) and not isinstance(temperature, bool)
    require(number and 0 < temperature < float("inf"), f"temperature: expected a positive number, got {temperature!r}")
    rows = _rows(reconstructed, architecture, "reconstructed")
    queries = _queries(queries, architecture, rows)
    targets = _targets(targets, original, rows, queries, architecture, backend)
    call = _Call(architecture, criterion, float(temperature), nan_policy, backend)
    differentiate = torch.is_grad_enabled()
    if differentiate and queries.requires_grad:
        values, bad = _through_queries(rows, queries, targets, call)
    elif differentiate and rows.requires_grad:
        values, bad = _BehavioralLoss.apply(rows, queries, targets, call)
    else:
        with torch.no_grad():
            values, bad = call.judge(call.values(rows, queries, targets), None)
    if nan_policy == "raise" and bool(bad.any()):
        where = bad.nonzero().flatten().tolist()
        raise WslfastError(f"reconstructed: models {where[:10]} of {len(bad)} have a non-finite value or gradient (nan_policy='raise')")
    return _reduce(values, bad, reduction, nan_policy)


def _reduce(values: Tensor, bad: Tensor, reduction: str, nan_policy: str) -> Tensor:
    if nan_policy != "omit":
        return values if reduction == "none" else values.mean() if reduction == "mean" else values.sum()
    if reduction == "none":
        return torch.where(bad, torch.full_like(values, float("nan")), values)
    kept = len(bad) - int(bad.sum())
    nothing = f"nan_policy='omit': all {len(bad)} models have a non-finite value or gradient; nothing to average"
    require(kept > 0 or reduction == "sum", nothing)
    total = torch.where(bad, torch.zeros_like(values), values).sum()
    return total / kept if reduction == "mean" else total


class _Call:
    """What a loss call does to every model: the arguments that are not tensors, and the two things done with them."""

    def __init__(self, architecture: Architecture, criterion: str, temperature: float, nan_policy: str, backend: str) -> None:
        self.architecture, self.criterion, self.temperature = architecture, criterion, temperature
        self.nan_policy, self.backend = nan_policy, backend

    def values(self, rows: Tensor, queries: Tensor, targets: Tensor) -> Tensor:
        """Per-model values through a plain forward, with whatever graph torch keeps."""
        outputs = engine.forward(rows, queries, self.architecture, backend=self.backend).to(rows.dtype)
        return criterion_values(outputs, targets, self.criterion, self.temperature)

    def judge(self, values: Tensor, gradient: Tensor | None) -> tuple[Tensor, Tensor]:
        """The values, and which models are bad (all False when nobody asks: that costs nothing)."""
        if self.nan_policy == "propagate":
            return values, torch.zeros_like(values, dtype=torch.bool)
        bad = ~values.isfinite()
        # a sum is non-finite if any term is; overflow of finite terms would need gradients near 1e38
        return values, bad if gradient is None else bad | ~gradient.isfinite().all(1)


class _BehavioralLoss(torch.autograd.Function):
    """Values and gradient are computed together in the forward pass, so no activation of k models outlives the call."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, queries: Tensor, targets: Tensor, call: _Call) -> tuple[Tensor, Tensor]:
        values, gradient = engine.loss_and_gradient(
            rows, queries, targets, call.architecture, call.criterion, temperature=call.temperature, backend=call.backend
        )
        values, bad = call.judge(values, gradient)
        if call.nan_policy == "omit":
            gradient = torch.where(bad.unsqueeze(1), torch.zeros_like(gradient), gradient)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(bad)
        return values, bad

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_values: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_values.unsqueeze(1), None, None, None


def _through_queries(rows: Tensor, queries: Tensor, targets: Tensor, call: _Call) -> tuple[Tensor, Tensor]:
    """Values with a gradient to the queries as well: through torch's graph. A bad model is left out of the graph altogether,
    as the queries' gradient sums over models and zero times NaN is NaN."""
    if call.nan_policy == "propagate":
        return call.judge(call.values(rows, queries, targets), None)
    with torch.enable_grad():
        probe = rows.detach().requires_grad_()
        values = call.values(probe, queries.detach(), targets)
        (gradient,) = torch.autograd.grad(values.sum(), probe)
    values, bad = call.judge(values.detach(), gradient)
    if bool(bad.any()) and not bool(bad.all()):
        good = (~bad).nonzero().flatten()
        return values.index_copy(0, good, call.values(rows[good], queries, targets[good])), bad
    if bool(bad.all()):  # nothing to differentiate, and yet backward() has to work: zeros
        never = torch.zeros((), dtype=torch.bool, device=rows.device)
        return values + torch.where(never, rows, 0.0).sum() + torch.where(never, queries, 0.0).sum(), bad
    return call.values(rows, queries, targets), bad


# -- validation --------------------------------------------------------------------------------------------------------


def _check_call(architecture: Architecture, backend: str) -> None:
    require(isinstance(architecture, Architecture), f"architecture: expected an Architecture, got {describe(architecture)}")
    require(backend in engine.BACKENDS, f"backend: expected one of {engine.BACKENDS}, got {backend!r}")


def _rows(value: Any, architecture: Architecture, argument: str) -> Tensor:
    """Any accepted form of weights as ``[k, P]`` in a dtype the engine computes in (float32, or float64 as it came)."""
    if isinstance(value, Population):
        other = value.architecture
        same = other.layers == architecture.layers and other.parameters == architecture.parameters
        require(same, f"{argument}: expected a population of architecture {architecture.name!r}, got one of another, {other.name!r}")
        value = value.weights
    p = architecture.num_weights
    forms = f"[k, {p}] weights, [k, T, D] tokens or {{name: [k, *shape]}} of architecture {architecture.name!r}"
    try:
        if isinstance(value, Mapping):
            value = stack(value, architecture)
        require(isinstance(value, Tensor), f"expected {forms}, got {describe(value)}")
        require(value.is_floating_point(), f"expected floating {forms}, got {describe(value)}")
        if value.ndim == 3:
            t, d = value.shape[1:]  # compared before a layout of that size is made
            require(d > 0 and t == num_tokens(architecture, d), f"expected {forms}, got {describe(value)}")
            value = layout(architecture, value.shape[2]).detokenize(value)
        require(value.ndim == 2 and value.shape[1] == p, f"expected {forms}, got {describe(value)}")
        require(value.shape[0] > 0, f"expected at least one model, got {describe(value)}")
    except WslfastError as error:
        raise WslfastError(f"{argument}: {error}") from None
    return value if value.dtype == torch.float64 else value.to(torch.float32)


def _queries(queries: Any, architecture: Architecture, rows: Tensor) -> Tensor:
    shape = architecture.input_shape
    expected = f"queries: expected floating [n, {', '.join(map(str, shape))}] for architecture {architecture.name!r}"
    require(isinstance(queries, Tensor), f"{expected}, got {describe(queries)}")
    require(queries.is_floating_point() and tuple(queries.shape[1:]) == shape and queries.ndim > 1, f"{expected}, got {describe(queries)}")
    require(queries.shape[0] > 0, f"{expected} with n >= 1, got {describe(queries)}")
    require(queries.device == rows.device, f"queries: expected device {rows.device} (the weights'), got {queries.device}")
    if queries.is_inference() and not torch.is_inference_mode_enabled():
        queries = queries.clone()  # autograd may not save what inference mode made
    return queries.to(rows.dtype)


def _targets(
    targets: Any, original: Any, rows: Tensor, queries: Tensor, architecture: Architecture, backend: str
) -> Tensor:
    require(original is None or targets is None, "original: expected None when targets= is given (only one of the two is used)")
    either = "original: expected weights, or targets= with the originals' outputs; both are None"
    require(original is not None or targets is not None, either)
    k, n = len(rows), len(queries)
    if targets is None:
        with torch.no_grad():
            weights = _rows(original, architecture, "original").detach()
            require(len(weights) == k, f"original: expected {k} models (as many as reconstructed), got {len(weights)}")
            require(weights.device == rows.device, f"original: expected device {rows.device}, got {weights.device}")
            return engine.forward(weights.to(rows.dtype), queries.detach(), architecture, backend=backend).to(rows.dtype)
    shape = (k, n, architecture.num_classes)
    require(
        isinstance(targets, Tensor) and targets.is_floating_point() and tuple(targets.shape) == shape,
        f"targets: expected floating {list(shape)} (models, queries, classes), got {describe(targets)}",
    )
    require(targets.device == rows.device, f"targets: expected device {rows.device}, got {targets.device}")
    return targets.detach().to(rows.dtype)
