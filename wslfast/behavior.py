"""The library call: outputs of a population, and how far reconstructed models are from their originals in behavior.

This module validates, gathers targets and reduces. It knows nothing of devices: ``engine.py`` runs the models.
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import Any, Union

import torch
from torch import Tensor, nn

from . import engine, operators
from .architecture import Architecture
from .errors import WslfastError, describe, require
from .kernels.criteria import CRITERIA, TABLE, criterion_values
from .kernels.operations import reads_integers
from .nan_policy import NAN_POLICIES, REDUCTIONS, bad_models, check_models, reduce
from .population import Population, stack
from .tokens import num_tokens
from .tracing import handed_integers

_COMPUTED = (torch.float32, torch.float64)
_INDICES = (torch.int64, torch.int32)  # of queries that a network reads as indices
Weights = Union[Tensor, Mapping[str, Tensor], Population]


def batched_forward(weights: Weights, queries: Tensor, architecture: Architecture, *, backend: str = "auto") -> Tensor:
    """Outputs of k models, each with its own weights, in evaluation mode.

    Args:
        weights: ``[k, P]`` rows of weights, ``[k, T, D]`` tokens, ``{name: [k, *shape]}``, or a Population.
        queries: ``[n, *architecture.input_shape]`` shared by all models, or ``[k, n, *architecture.input_shape]``, each model's own; any
            strides. Floating, or integers where the network reads nothing else of them (an embedding of tokens).
        architecture: what every model is.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        ``[k, n, *architecture.output_shape]`` (``[k, n, K]`` for a classifier) in float32 (float64 for float64 weights, autocast's
        dtype under autocast); differentiable in both weights and queries.

    Raises:
        WslfastError: naming the argument, what was expected and what came.
    """
    _check_call(architecture, backend)
    rows = _rows(weights, architecture, "weights")
    queries = _queries(queries, architecture, rows)
    return operators.forward(rows, queries, architecture, backend)


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
    class_axis: int = -1,
) -> Tensor:
    """Distance in behavior between reconstructed models and their originals on shared queries (arXiv 2503.17138).

    Args:
        reconstructed: ``[k, P]`` weights, ``[k, T, D]`` tokens (token size read off D), or ``{name: [k, *shape]}``; gradients
            flow here, once (``create_graph`` raises).
        original: the same forms, or None when ``targets`` is given; never receives a gradient.
        queries: ``[n, *architecture.input_shape]`` shared by all models, or ``[k, n, *architecture.input_shape]``, each model's own (and
            its original's). If it requires a gradient, it gets the loss's whole gradient: through the reconstructed models and, with
            ``original``, through the originals too.
        architecture: what every model is.
        targets: ``[k, n, *out]`` outputs of the originals on these queries; saves running them. They are constants: a gradient to the
            queries then leaves the originals' part out.
        criterion: per model, with f^ and f the outputs of reconstruction and original, ``[n, *out]``, ``[n, K]`` for a classifier (sums
            over i are over queries, those inside over everything else):
            ``"mse"`` 1/(2n) sum_i ||f^(x_i) - f(x_i)||^2, whose mean over models is the paper's L_B;
            ``"huber"`` 1/n sum_i h(f^(x_i) - f(x_i)), h(d) = d^2/2 up to |d| = 1 and |d| - 1/2 beyond: no class can weigh too much;
            ``"softmax_mse"`` mean squared difference of probabilities (the published code's ``l2``);
            ``"cross_entropy"`` with the original's probabilities as soft labels;
            ``"distillation"`` T^2/n sum_i KL(softmax(f/T) || softmax(f^/T)).
        temperature: T > 0, of ``"distillation"`` alone.
        reduction: ``"mean"`` over the models kept, ``"sum"``, or ``"none"`` for per-model values ``[k]``.
        nan_policy: a model is bad if its value, or its gradient, is not finite. ``"propagate"`` lets that show in its own value and
            gradient; ``"omit"`` leaves it out (zero gradient; NaN under reduction ``"none"``), every other model's value and gradient
            bit-equal to a call without it (that says ``"omit"`` as well); ``"raise"`` raises and names it. Without a gradient, values alone
            are judged.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.
        class_axis: axis of one answer ``[*out]`` that the classes are on, for criteria over classes (all but ``"mse"`` and ``"huber"``).

    Returns:
        A scalar, or ``[k]`` for reduction ``"none"``; float32, or float64 for float64 weights.

    Raises:
        WslfastError: naming the argument, what was expected and what came; also when every model is omitted from a mean.
    """
    _check_call(architecture, backend)
    require(criterion in CRITERIA, lambda: f"criterion: expected one of {CRITERIA}, got {criterion!r}")
    require(reduction in REDUCTIONS, lambda: f"reduction: expected one of {REDUCTIONS}, got {reduction!r}")
    require(nan_policy in NAN_POLICIES, lambda: f"nan_policy: expected one of {NAN_POLICIES}, got {nan_policy!r}")
    number = isinstance(temperature, numbers.Real) and not isinstance(temperature, bool)
    require(number and 0 < temperature < float("inf"), lambda: f"temperature: expected a positive number, got {temperature!r}")
    rows = _rows(reconstructed, architecture, "reconstructed")
    queries = _queries(queries, architecture, rows)
    if TABLE[criterion].over_classes and (class_axis != -1 or not architecture.output_shape):
        targets, original = _classes_last(targets, original, architecture, class_axis)
        architecture = architecture.with_classes_last(class_axis)
    looked_through = engine.looked_through(rows, queries, targets)
    graph = torch.is_grad_enabled()
    through = looked_through or (graph and queries.requires_grad)  # the originals' answers depend on the queries, too
    originals = _originals(original, targets, rows, architecture)
    targets = _targets(targets, originals, rows, queries, architecture, backend, through)
    options = operators.Options(architecture, criterion, float(temperature), reduction, nan_policy, backend)
    if looked_through:
        remedy = "cannot be looked through by a torch transform, as it depends on values; use nan_policy='propagate'"
        require(nan_policy == "propagate", lambda: f"nan_policy={nan_policy!r} {remedy}")
        return reduce(_values(rows, queries, targets, options), None, reduction, nan_policy)
    if through:
        return _through_queries(rows, queries, targets, options, originals)
    return operators.behavioral_loss(rows, queries, targets, options, graph and rows.requires_grad)


def _values(rows: Tensor, queries: Tensor, targets: Tensor, options: operators.Options) -> Tensor:
    """Per-model values ``[k]`` through torch's own graph."""
    outputs = operators.forward(rows, queries, options.architecture, options.backend).to(rows.dtype)
    return criterion_values(outputs, targets, options.criterion, options.temperature)


def _through_queries(rows: Tensor, queries: Tensor, targets: Tensor, options: operators.Options, originals: Tensor | None) -> Tensor:
    """The loss with a gradient to the queries as well: through torch's graph, that of the targets included. A bad model is left out of the
    graph altogether, and so is its original, as the queries' gradient sums over models and zero times NaN is NaN."""
    reduction, nan_policy = options.reduction, options.nan_policy
    if nan_policy == "propagate":
        return reduce(_values(rows, queries, targets, options), None, reduction, nan_policy)
    with torch.enable_grad():
        probe = rows.detach().requires_grad_()
        values = _values(probe, queries.detach(), targets.detach(), options)
        (gradient,) = torch.autograd.grad(values.sum(), probe)
    values = values.detach()
    bad = bad_models(values, gradient)
    check_models(bad, nan_policy, reduction == "mean")
    if bool(bad.all()):  # nothing to differentiate, and yet backward() has to work: zeros
        never = torch.zeros((), dtype=torch.bool, device=rows.device)
        values = values + torch.where(never, rows, 0.0).sum() + torch.where(never, queries, 0.0).sum()
    elif bool(bad.any()):
        good = (~bad).nonzero().flatten()
        mine = queries[good] if queries.ndim == len(options.architecture.input_shape) + 2 else queries
        if originals is not None:  # whose answers hang together in one graph
            targets = operators.forward(originals[good], mine, options.architecture, options.backend).to(rows.dtype)
        else:
            targets = targets[good]
        values = values.index_copy(0, good, _values(rows[good], mine, targets, options))
    else:
        values = _values(rows, queries, targets, options)
    return reduce(values, bad, reduction, nan_policy)


# -- validation --------------------------------------------------------------------------------------------------------


def _check_call(architecture: Architecture, backend: str) -> None:
    require(isinstance(architecture, Architecture), lambda: f"architecture: expected an Architecture, got {describe(architecture)}")
    engine.check_backend(backend)


def _rows(value: Any, architecture: Architecture, argument: str) -> Tensor:
    """Any accepted form of weights as ``[k, P]`` in a dtype the engine computes in (float32, or float64 as it came)."""
    p = architecture.num_weights
    if isinstance(value, Tensor) and not value.is_nested:  # the usual case first: a training step pays for every check
        if value.ndim == 2 and value.dtype in _COMPUTED and value.shape[1] == p and value.shape[0] > 0:
            return _dense(value, argument)
    elif isinstance(value, Population):
        other = value.architecture
        same = other.same_network(architecture)
        wrong = f"{argument}: expected a population of architecture {architecture.name!r}, got one of another, {other.name!r}"
        alike = None in (architecture.graph, other.graph) and architecture.parameters == other.parameters
        wrong += "; a module that cannot be traced is known by itself alone: pass the population's .architecture" if alike else ""
        require(same, wrong)
        value = value.weights
    if isinstance(value, (list, tuple, nn.Module)):
        raise WslfastError(f"{argument}: {_remedy(value)}")
    forms = f"[k, {p}] weights, [k, T, D] tokens or {{name: [k, *shape]}} of architecture {architecture.name!r}"
    try:
        if isinstance(value, Mapping):
            value = stack(value, architecture)
        require(isinstance(value, Tensor) and not value.is_nested, lambda: f"expected {forms}, got {describe(value)}")
        require(value.is_floating_point(), lambda: f"expected floating {forms}, got {describe(value)}")
        if value.ndim == 3:
            t, d = value.shape[1:]  # compared before a layout of that size is made
            require(d > 0 and t == num_tokens(architecture, d), lambda: f"expected {forms}, got {describe(value)}")
            value = operators.detokenize(value, architecture)
        require(value.ndim == 2 and value.shape[1] == p, lambda: f"expected {forms}, got {describe(value)}")
        require(value.shape[0] > 0, lambda: f"expected at least one model, got {describe(value)}")
    except WslfastError as error:
        raise WslfastError(f"{argument}: {error}") from None
    value = _dense(value, argument)
    return value if value.dtype == torch.float64 else value.to(torch.float32)


def _dense(value: Tensor, argument: str) -> Tensor:
    dense = value.layout == torch.strided and value.device.type != "meta"
    require(dense, lambda: f"{argument}: expected a dense tensor that holds numbers, got {describe(value)}, {value.layout}")
    return value


def _remedy(value: Any) -> str:
    """What to do with models that come one by one."""
    if isinstance(value, nn.Module) or (len(value) > 0 and all(isinstance(v, nn.Module) for v in value)):
        which = "modules" if not isinstance(value, nn.Module) else "[module]"
        came = f"a list of {len(value)} modules" if which == "modules" else f"a module ({type(value).__name__})"
        return f"expected a population, got {came}; stack them with Population.from_modules({which}, input_shape=...)"
    if len(value) > 0 and all(isinstance(v, Mapping) for v in value):
        remedy = "stack them with Population.from_state_dicts(architecture, [...])"
        return f"expected a population, got a list of {len(value)} state dicts; {remedy}"
    if len(value) > 0 and all(isinstance(v, Tensor) for v in value):
        return f"expected [k, P] weights, got a list of {len(value)} tensors; stack them with torch.stack(rows)"
    came = f"got a {type(value).__name__} of {len(value)}"
    return f"expected a population or [k, P] weights, {came}; Population.from_modules makes one of modules"


def _queries(queries: Any, architecture: Architecture, rows: Tensor) -> Tensor:
    shape = architecture.input_shape

    def expected() -> str:
        sizes = ", ".join(map(str, shape))
        came = f"queries: expected floating [n, {sizes}] or [{len(rows)}, n, {sizes}] for architecture {architecture.name!r}"
        return f"{came} with n >= 1, got {describe(queries)}"

    graph = architecture.graph
    integers = getattr(queries, "dtype", None) in _INDICES and (
        handed_integers(architecture.module) if graph is None else reads_integers(graph)
    )
    require(isinstance(queries, Tensor) and not queries.is_nested and (queries.is_floating_point() or integers), expected)
    own_queries = queries.ndim == len(shape) + 2
    fits = tuple(queries.shape[1 + own_queries :]) == shape and queries.ndim in (len(shape) + 1, len(shape) + 2)
    require(fits and queries.shape[int(own_queries)] > 0 and (not own_queries or queries.shape[0] == rows.shape[0]), expected)
    require(queries.device == rows.device, lambda: f"queries: expected device {rows.device} (the weights'), got {queries.device}")
    if not torch.compiler.is_compiling() and queries.is_inference() and not torch.is_inference_mode_enabled():
        queries = queries.clone()  # autograd may not save what inference mode made
    return _dense(queries, "queries").to(rows.dtype)


def _classes_last(targets: Any, original: Any, architecture: Architecture, axis: Any) -> tuple[Any, Any]:
    """Targets as those of a network whose classes are last, and originals that are a population as plain weights."""
    rank = len(architecture.output_shape)
    fits = type(axis) is int and -rank <= axis < rank
    require(fits, lambda: f"class_axis: expected an axis of one answer {list(architecture.output_shape)}, got {axis!r}")
    if isinstance(targets, Tensor) and not targets.is_nested and targets.ndim == rank + 2:
        targets = targets.movedim(axis - rank if axis >= 0 else axis, -1)
    return targets, _rows(original, architecture, "original") if isinstance(original, Population) else original


def _originals(original: Any, targets: Any, rows: Tensor, architecture: Architecture) -> Tensor | None:
    """The originals' weights ``[k, P]``, as constants of the type of ``rows``; None where their outputs are given."""
    require(original is None or targets is None, "original: expected None when targets= is given (only one of the two is used)")
    either = "original: expected weights, or targets= with the originals' outputs; both are None"
    require(original is not None or targets is not None, either)
    if original is None:
        return None
    weights, k = _rows(original, architecture, "original").detach(), rows.shape[0]
    require(weights.shape[0] == k, lambda: f"original: expected {k} models (as many as reconstructed), got {len(weights)}")
    require(weights.device == rows.device, lambda: f"original: expected device {rows.device}, got {weights.device}")
    return weights.to(rows.dtype)


def _targets(
    targets: Any, originals: Tensor | None, rows: Tensor, queries: Tensor, architecture: Architecture, backend: str, through: bool
) -> Tensor:
    """The originals' outputs ``[k, n, K]``: those given, as constants, or computed; ``through``: with their dependence on the queries."""
    k, n = rows.shape[0], queries.shape[int(queries.ndim == len(architecture.input_shape) + 2)]
    if originals is not None:
        if through:
            return operators.forward(originals, queries, architecture, backend).to(rows.dtype)
        with torch.no_grad():
            return operators.forward(originals, queries.detach(), architecture, backend).to(rows.dtype)
    shape = (k, n, *architecture.output_shape)
    require(
        isinstance(targets, Tensor) and not targets.is_nested and targets.is_floating_point() and tuple(targets.shape) == shape,
        lambda: f"targets: expected floating {list(shape)} (models, queries, classes), got {describe(targets)}",
    )
    require(targets.device == rows.device, lambda: f"targets: expected device {rows.device}, got {targets.device}")
    return _dense(targets, "targets").detach().to(rows.dtype)
