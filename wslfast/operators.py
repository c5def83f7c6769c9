"""The library call as torch operators, so that ``torch.compile(fullgraph=True)`` sees through and ``opcheck`` passes.

An operator is opaque to a compiler: whatever chooses a path, reads settings, logs or synchronises happens inside, at run time.
What a compiled graph would not bring along at run time (autocast, which a compiler bakes in) is an argument. An architecture is
its ``handle``, a text.

    wslfast::behavioral_loss   per-model values or their mean, which models are bad, the gradient [k, P] of each value to its own weights,
                               and what it is still to be divided by
    wslfast::forward           outputs [k, n, K]; only compiled code calls it, as eager code has torch's own graph
    wslfast::forward_backward  its backward, which runs the models again
    wslfast::detokenize, wslfast::tokenize   the two directions of a token layout, each other's transpose; compiled code only

The loss and the outputs can be differentiated once; a second time raises.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import engine
from .architecture import Architecture, from_handle
from .engine import in_chunks
from .kernels.cpu.replay import saving_is_watched
from .kernels.criteria import Named, criterion_values
from .kernels.once import link, once
from .nan_policy import bad_models, check_models, reduce
from .tokens import layout, num_tokens

_AUTOCAST = {"": None, "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def autocast_name(device: str) -> str:
    """What an operator is told of autocast: its dtype's name, or nothing where it is off."""
    if not torch.is_autocast_enabled(device):
        return ""
    kind = torch.get_autocast_dtype(device)
    return "bfloat16" if kind == torch.bfloat16 else "float16" if kind == torch.float16 else "float32"


@contextlib.contextmanager
def _inside(tensor: Tensor, autocast: str) -> Iterator[None]:
    """Autocast as the caller had it, and graphs: torch records none inside an operator, but some paths differentiate for themselves."""
    graphs = torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
    with graphs, torch.autocast(tensor.device.type, _AUTOCAST[autocast], enabled=bool(autocast)):
        yield


def _operator(name: str) -> Any:
    """An operator that changes no argument. Inside, something may wait for the device, so none belongs into a CUDA graph of a compiler's
    (``mode="reduce-overhead"``), which leaves out what is tagged so."""
    kept_out = getattr(torch.Tag, "cudagraph_unsafe", None)
    tags: dict[str, Any] = (
        {"tags": (kept_out,)} if kept_out is not None and "tags" in inspect.signature(torch.library.custom_op).parameters else {}
    )
    return torch.library.custom_op(name, mutates_args=(), **tags)


def detokenize(tokens: Tensor, architecture: Architecture) -> Tensor:
    """``[k, T, D] -> [k, P]`` by the cached layout, which no compiler could build."""
    if not torch.compiler.is_compiling():
        return layout(architecture, tokens.shape[2]).detokenize(tokens)
    return _detokenize(tokens, architecture.handle)


@_operator("wslfast::detokenize")
def _detokenize(tokens: Tensor, architecture: str) -> Tensor:
    return layout(from_handle(architecture), tokens.shape[2]).detokenize(tokens)


@_detokenize.register_fake
def _(tokens: Tensor, architecture: str) -> Tensor:
    return tokens.new_empty(tokens.shape[0], from_handle(architecture).num_weights)


@_operator("wslfast::tokenize")
def _tokenize(weights: Tensor, architecture: str, token_size: int) -> Tensor:
    """The transpose of :func:`_detokenize`."""
    return layout(from_handle(architecture), token_size).tokenize(weights).tokens


@_tokenize.register_fake
def _(weights: Tensor, architecture: str, token_size: int) -> Tensor:
    return weights.new_empty(weights.shape[0], num_tokens(from_handle(architecture), token_size), token_size)


def _keep_tokens(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.architecture, ctx.token_size = inputs[1], inputs[0].shape[2]


def _keep_rows(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.architecture = inputs[1]


_detokenize.register_autograd(lambda ctx, grad: (_tokenize(grad, ctx.architecture, ctx.token_size), None), setup_context=_keep_tokens)
_tokenize.register_autograd(lambda ctx, grad: (_detokenize(grad, ctx.architecture), None, None), setup_context=_keep_rows)


def _leave_transforms(*tensors: Tensor) -> None:
    """Ends a compiled graph inside a transform of torch.func that differentiates: torch has no rule there for operators written in Python.
    The transform then runs eagerly."""
    if torch._C._functorch.maybe_current_level() is not None and any(t.requires_grad for t in tensors):
        torch._dynamo.graph_break(msg="wslfast inside a transform of torch.func that differentiates; compile without fullgraph=True")


def forward(weights: Tensor, queries: Tensor, architecture: Architecture, backend: str) -> Tensor:
    """:func:`engine.forward`, behind an operator while a compiler looks."""
    if not torch.compiler.is_compiling():
        return engine.forward(weights, queries, architecture, backend=backend)
    _leave_transforms(weights, queries)
    graph = torch.is_grad_enabled() and (weights.requires_grad or queries.requires_grad)
    return _forward(weights, queries, architecture.handle, backend, autocast_name(weights.device.type), graph)


@_operator("wslfast::forward")
def _forward(weights: Tensor, queries: Tensor, architecture: str, backend: str, autocast: str, graph: bool) -> Tensor:
    """``graph``: whether eager code would record one, which picks the engine's path, and with it the bits."""
    with torch.set_grad_enabled(graph), _inside(weights, autocast):
        outputs = engine.forward(weights.detach().requires_grad_(graph), queries.detach(), from_handle(architecture), backend=backend)
    return outputs.detach().to(_AUTOCAST[autocast] or weights.dtype)


@_forward.register_fake
def _(weights: Tensor, queries: Tensor, architecture: str, backend: str, autocast: str, graph: bool) -> Tensor:
    network = from_handle(architecture)
    n = queries.shape[queries.ndim - len(network.input_shape) - 1]
    return weights.new_empty(weights.shape[0], n, *network.output_shape, dtype=_AUTOCAST[autocast] or weights.dtype)


@_operator("wslfast::forward_backward")
def _forward_backward(
    grad: Tensor,
    weights: Tensor,
    queries: Tensor,
    architecture: str,
    backend: str,
    autocast: str,
    to_weights: bool,
    to_queries: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`_forward` to weights and queries; a tensor of no elements for one that nobody asked for."""
    network = from_handle(architecture)
    own_queries = queries.ndim == len(network.input_shape) + 2
    grad_weights = torch.empty_like(weights, memory_format=torch.contiguous_format) if to_weights else weights.new_empty(0)
    grad_queries = torch.zeros_like(queries, memory_format=torch.contiguous_format) if to_queries else queries.new_empty(0)

    def piece(part: slice) -> None:
        rows = weights[part].detach().requires_grad_(to_weights)
        images = (queries[part] if own_queries else queries).detach().requires_grad_(to_queries)
        with torch.enable_grad(), _inside(weights, autocast):
            outputs = engine.forward(rows, images, network, backend=backend)
            wanted = [t for t, asked in ((rows, to_weights), (images, to_queries)) if asked]
            slopes = list(torch.autograd.grad(outputs, wanted, grad[part].to(outputs.dtype)))
        if to_weights:
            grad_weights[part] = slopes.pop(0)
        if to_queries:
            (grad_queries[part] if own_queries else grad_queries).add_(slopes[0])

    n = queries.shape[int(own_queries)]
    in_chunks(weights.shape[0], engine.models_per_chunk(network, n, weights.device.type), piece)
    return grad_weights, grad_queries


@_forward_backward.register_fake
def _(
    grad: Tensor,
    weights: Tensor,
    queries: Tensor,
    architecture: str,
    backend: str,
    autocast: str,
    to_weights: bool,
    to_queries: bool,
) -> tuple[Tensor, Tensor]:
    return (
        weights.new_empty(weights.shape if to_weights else (0,)),
        queries.new_empty(queries.shape if to_queries else (0,)),
    )


def _keep_forward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weights, queries, *ctx.options, _ = inputs
    ctx.save_for_backward(weights, queries)


def _differentiate_forward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weights, queries = ctx.saved_tensors
    needs = ctx.needs_input_grad[:2]
    slopes = _forward_backward(grad, weights, queries, *ctx.options, *needs)
    return *(slope if asked else None for slope, asked in zip(slopes, needs, strict=True)), None, None, None, None


_forward.register_autograd(_differentiate_forward, setup_context=_keep_forward)


class Options(NamedTuple):
    """What a behavioral loss is told beside its tensors."""

    architecture: Architecture
    criterion: str
    temperature: float
    reduction: str
    nan_policy: str
    backend: str


def behavioral_loss(rows: Tensor, queries: Tensor, targets: Tensor, options: Options, gradient: bool) -> Tensor:
    """The reduced loss, a scalar or ``[k]``; differentiable in ``rows`` where ``gradient``.

    Raises WslfastError for bad models under nan_policy ``raise``, and where ``omit`` leaves nothing for a mean.
    """
    if torch.compiler.is_compiling():
        _leave_transforms(rows)
        architecture, *rest = options
        autocast = autocast_name(rows.device.type)
        values, bad, _, _ = _behavioral_loss(rows, queries, targets, architecture.handle, *rest, autocast, gradient)
        if gradient and _is_plain_mean(options.reduction, options.nan_policy):
            return values
        return reduce(values, bad, options.reduction, options.nan_policy)
    if gradient:
        return _Loss.apply(rows, queries, targets, options, (link(rows),))
    with torch.no_grad():
        values, bad, _ = _evaluate(rows, queries, targets, options, False)
    return reduce(values, bad, options.reduction, options.nan_policy)


def _evaluate(
    rows: Tensor, queries: Tensor, targets: Tensor, options: Options, gradient: bool, through: Named | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(values ``[k]``, bad ``[k]``, gradient ``[k, P]`` of each value to its own weights, or what ``through`` makes of it).

    ``bad`` marks models that are not finite; it is None under ``"propagate"``. The gradient is zero for bad models under ``"omit"``, and
    None without ``gradient``: then values alone are judged. All are computed together, so that no activation of k models outlives the
    call. Called with gradient mode off.
    """
    architecture, criterion, temperature, reduction, nan_policy, backend = options
    slopes: Tensor | None = None
    if gradient:
        named = criterion if through is None else through
        values, slopes = engine.loss_and_gradient(rows, queries, targets, architecture, named, temperature=temperature, backend=backend)
    else:
        outputs = engine.forward(rows, queries, architecture, backend=backend).to(rows.dtype)
        values = criterion_values(outputs, targets, criterion, temperature)
    if nan_policy == "propagate":
        return values, None, slopes
    bad = bad_models(values, slopes)
    check_models(bad, nan_policy, reduction == "mean")
    if slopes is not None and nan_policy == "omit":
        slopes = torch.where(bad.unsqueeze(1), torch.zeros_like(slopes), slopes)
    return values, bad, slopes


def _is_plain_mean(reduction: str, nan_policy: str) -> bool:
    """Whether a loss is a mean over a number of models that is known beforehand."""
    return reduction == "mean" and nan_policy != "omit"


def _evaluated(rows: Tensor, queries: Tensor, targets: Tensor, options: Options) -> tuple[Tensor, Tensor | None, Tensor, bool]:
    """Values, bad models and gradients as :func:`_evaluate` has them; and whether gradients are divided by the number of models already."""
    criterion: Named = options.criterion
    if _is_plain_mean(options.reduction, options.nan_policy) and len(rows):
        criterion = engine.of_mean(options.criterion, options.architecture, rows, options.backend)
    values, bad, gradient = _evaluate(rows, queries, targets, options, True, criterion)
    assert gradient is not None
    return values, bad, gradient, criterion is not options.criterion


class _Loss(torch.autograd.Function):
    """What eager code runs: one node of the graph, reduction included."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, queries: Tensor, targets: Tensor, options: Options, linked: tuple[Tensor]) -> Tensor:
        values, bad, gradient, divided = _evaluated(rows, queries, targets, options)
        ctx.save_for_backward(gradient)
        ctx.watched = saving_is_watched()
        (ctx.link,) = linked  # in a tuple: to torch it is no input, whose gradient somebody would ask for
        count = values.shape[0] if bad is None or options.reduction != "mean" else (~bad).sum()
        ctx.divisor = count if options.reduction == "mean" and not divided else None
        ctx.omitted = bad if options.nan_policy == "omit" else None
        return reduce(values, bad, options.reduction, options.nan_policy)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.divisor is not None:
            grad = grad / ctx.divisor
        if ctx.omitted is not None:  # whose gradient is zero whatever the slope is at a NaN of the caller's
            grad = torch.where(ctx.omitted, 0.0, grad)
        return once(_times(ctx.saved_tensors[0], grad.unsqueeze(1) if grad.ndim else grad, ctx.watched), ctx.link), None, None, None, None


def _times(gradient: Tensor, factor: Tensor, watched: bool) -> Tensor:
    """Their product, over the memory of a gradient ``[k, P]`` that nobody will ask for again: for large networks fresh memory takes longer
    than the product. ``watched``: somebody's hook has been given the gradient, and may hold it."""
    several = torch._C._functorch.is_legacy_batchedtensor(factor)  # is_grads_batched: at once
    if watched or several or torch.is_grad_enabled() or _kept():
        return gradient * factor
    if factor.device.type == "cpu" and factor.ndim == 0 and factor.item() == 1:
        return gradient
    return gradient.mul_(factor)


def _always() -> bool:
    return True


# whether the backward pass that is running leaves its graph for another; where torch does not tell, it might
_kept: Callable[[], bool] = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", _always)


@_operator("wslfast::behavioral_loss")
def _behavioral_loss(
    rows: Tensor,
    queries: Tensor,
    targets: Tensor,
    architecture: str,
    criterion: str,
    temperature: float,
    reduction: str,
    nan_policy: str,
    backend: str,
    autocast: str,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`_evaluate` as an operator: a tensor of no elements for what it leaves out. The mean of the values, where a gradient of one is
    wanted whose models are known beforehand; and what gradients are still to be divided by."""
    slopes: Tensor | None = None
    divisor = rows.new_ones(())
    with torch.no_grad(), _inside(rows, autocast):
        options = Options(from_handle(architecture), criterion, temperature, reduction, nan_policy, backend)
        if gradient:
            values, bad, slopes, divided = _evaluated(rows, queries, targets, options)
            if _is_plain_mean(reduction, nan_policy):
                divisor = divisor if divided else divisor * len(rows)
                values = values.mean()
        else:
            values, bad, _ = _evaluate(rows, queries, targets, options, False)
    none = rows.new_zeros(rows.shape[0], dtype=torch.bool)
    return values, none if bad is None else bad, rows.new_empty(0, rows.shape[1]) if slopes is None else slopes, divisor


@_behavioral_loss.register_fake
def _(
    rows: Tensor,
    queries: Tensor,
    targets: Tensor,
    architecture: str,
    criterion: str,
    temperature: float,
    reduction: str,
    nan_policy: str,
    backend: str,
    autocast: str,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    k, p = rows.shape
    values = rows.new_empty(() if gradient and _is_plain_mean(reduction, nan_policy) else k)
    return values, rows.new_empty(k, dtype=torch.bool), rows.new_empty(k if gradient else 0, p), rows.new_empty(())


def _keep_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[2:])


def _differentiate_loss(ctx: Any, grad_values: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_values is None:
        return (None,) * 11
    slopes, divisor = ctx.saved_tensors
    factor = grad_values.unsqueeze(1) if grad_values.ndim else grad_values / divisor
    return once(slopes * factor), *(None,) * 10


_behavioral_loss.register_autograd(_differentiate_loss, setup_context=_keep_loss)
