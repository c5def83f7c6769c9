"""The library call as torch operators, so that ``torch.compile(fullgraph=True)`` sees through and ``opcheck`` passes.

An operator is opaque to a compiler: whatever chooses a path, reads settings, logs or synchronises happens inside, at run time.
What a compiled graph would not bring along at run time (autocast, which a compiler bakes in) is an argument. An architecture is
its ``handle``, a text.

    wslfast::behavioral_loss   per-model values, which models are bad, and the gradient [k, P] of each value to its own weights
    wslfast::forward           outputs [k, n, K]; only compiled code calls it, as eager code has torch's own graph
    wslfast::forward_backward  its backward, which runs the models again
    wslfast::detokenize, wslfast::tokenize   the two directions of a token layout, each other's transpose; compiled code only

The loss and the outputs can be differentiated once; a second time raises.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import engine
from ._chunks import in_chunks
from .architecture import Architecture, from_handle
from .errors import WslfastError, require
from .kernels.once import once
from .kernels.reference import criterion_values
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


def detokenize(tokens: Tensor, architecture: Architecture) -> Tensor:
    """``[k, T, D] -> [k, P]`` by the cached layout, which no compiler could build."""
    if not torch.compiler.is_compiling():
        return layout(architecture, tokens.shape[2]).detokenize(tokens)
    return _detokenize(tokens, architecture.handle)


@torch.library.custom_op("wslfast::detokenize", mutates_args=())
def _detokenize(tokens: Tensor, architecture: str) -> Tensor:
    return layout(from_handle(architecture), tokens.shape[2]).detokenize(tokens)


@_detokenize.register_fake
def _(tokens: Tensor, architecture: str) -> Tensor:
    return tokens.new_empty(tokens.shape[0], from_handle(architecture).num_weights)


@torch.library.custom_op("wslfast::tokenize", mutates_args=())
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


def forward(weights: Tensor, queries: Tensor, architecture: Architecture, backend: str) -> Tensor:
    """:func:`engine.forward`, behind an operator while a compiler looks."""
    if not torch.compiler.is_compiling():
        return engine.forward(weights, queries, architecture, backend=backend)
    graph = torch.is_grad_enabled() and (weights.requires_grad or queries.requires_grad)
    return _forward(weights, queries, architecture.handle, backend, autocast_name(weights.device.type), graph)


@torch.library.custom_op("wslfast::forward", mutates_args=())
def _forward(weights: Tensor, queries: Tensor, architecture: str, backend: str, autocast: str, graph: bool) -> Tensor:
    """``graph``: whether eager code would record one, which picks the engine's path, and with it the bits."""
    with torch.set_grad_enabled(graph), _inside(weights, autocast):
        outputs = engine.forward(weights.detach().requires_grad_(graph), queries.detach(), from_handle(architecture), backend=backend)
    return outputs.detach().to(_AUTOCAST[autocast] or weights.dtype)


@_forward.register_fake
def _(weights: Tensor, queries: Tensor, architecture: str, backend: str, autocast: str, graph: bool) -> Tensor:
    found = from_handle(architecture)
    n = queries.shape[queries.ndim - len(found.input_shape) - 1]
    return weights.new_empty(weights.shape[0], n, found.num_classes, dtype=_AUTOCAST[autocast] or weights.dtype)


@torch.library.custom_op("wslfast::forward_backward", mutates_args=())
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
    found = from_handle(architecture)
    own = queries.ndim == len(found.input_shape) + 2
    grad_weights = torch.empty_like(weights, memory_format=torch.contiguous_format) if to_weights else weights.new_empty(0)
    grad_queries = torch.zeros_like(queries, memory_format=torch.contiguous_format) if to_queries else queries.new_empty(0)

    def piece(part: slice) -> None:
        rows = weights[part].detach().requires_grad_(to_weights)
        images = (queries[part] if own else queries).detach().requires_grad_(to_queries)
        with torch.enable_grad(), _inside(weights, autocast):
            outputs = engine.forward(rows, images, found, backend=backend)
            wanted = [t for t, asked in ((rows, to_weights), (images, to_queries)) if asked]
            slopes = list(torch.autograd.grad(outputs, wanted, grad[part].to(outputs.dtype)))
        if to_weights:
            grad_weights[part] = slopes.pop(0)
        if to_queries:
            (grad_queries[part] if own else grad_queries).add_(slopes[0])

    n = queries.shape[int(own)]
    in_chunks(len(weights), engine.models_per_chunk(found, n, weights.device.type), piece)
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
    found = _forward_backward(grad, weights, queries, *ctx.options, *needs)
    return *(slope if asked else None for slope, asked in zip(found, needs, strict=True)), None, None, None, None


_forward.register_autograd(_differentiate_forward, setup_context=_keep_forward)


def behavioral_loss(
    rows: Tensor,
    queries: Tensor,
    targets: Tensor,
    architecture: Architecture,
    criterion: str,
    temperature: float,
    nan_policy: str,
    backend: str,
    gradient: bool,
    mean: bool,
) -> tuple[Tensor, Tensor]:
    """Per-model values ``[k]``, differentiable in ``rows`` where ``gradient``, and which models are bad ``[k]`` (all False under
    ``propagate``, where nobody asks).

    Raises WslfastError for bad models under ``raise``, and where ``omit`` leaves nothing for a ``mean``.
    """
    options = (criterion, temperature, nan_policy, backend)
    if torch.compiler.is_compiling():
        autocast = autocast_name(rows.device.type)
        values, bad, _ = _behavioral_loss(rows, queries, targets, architecture.handle, *options, autocast, gradient, mean)
    elif gradient:
        values, bad = _BehavioralLoss.apply(rows, queries, targets, architecture, *options, mean)
    else:
        values, bad, _ = _evaluate(rows, queries, targets, architecture, *options, False, mean)
    return values, bad


@torch.no_grad()
def _evaluate(
    rows: Tensor,
    queries: Tensor,
    targets: Tensor,
    architecture: Architecture,
    criterion: str,
    temperature: float,
    nan_policy: str,
    backend: str,
    gradient: bool,
    mean: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Values ``[k]``, bad models ``[k]`` and gradient ``[k, P]``, zero for bad models under ``omit``; without ``gradient``, values alone
    are judged and the last tensor has no rows. Computed together, so no activation of k models outlives the call."""
    if gradient:
        values, slopes = engine.loss_and_gradient(rows, queries, targets, architecture, criterion, temperature=temperature, backend=backend)
    else:
        outputs = engine.forward(rows, queries, architecture, backend=backend).to(rows.dtype)
        values, slopes = criterion_values(outputs, targets, criterion, temperature), rows.new_empty(0, rows.shape[1])
    bad = judge(values, slopes if gradient else None, nan_policy)
    refuse(bad, nan_policy, mean)
    if gradient and nan_policy == "omit":
        slopes = torch.where(bad.unsqueeze(1), torch.zeros_like(slopes), slopes)
    return values, bad, slopes


class _BehavioralLoss(torch.autograd.Function):
    """What eager code runs."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        queries: Tensor,
        targets: Tensor,
        architecture: Architecture,
        criterion: str,
        temperature: float,
        nan_policy: str,
        backend: str,
        mean: bool,
    ) -> tuple[Tensor, Tensor]:
        options = (criterion, temperature, nan_policy, backend)
        values, bad, gradient = _evaluate(rows, queries, targets, architecture, *options, True, mean)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(bad)
        return values, bad

    @staticmethod
    def backward(ctx: Any, grad_values: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return once(ctx.saved_tensors[0] * grad_values.unsqueeze(1)), *(None,) * 8


@torch.library.custom_op("wslfast::behavioral_loss", mutates_args=())
def _behavioral_loss(
    rows: Tensor,
    queries: Tensor,
    targets: Tensor,
    architecture: str,
    criterion: str,
    temperature: float,
    nan_policy: str,
    backend: str,
    autocast: str,
    gradient: bool,
    mean: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`_evaluate` as an operator."""
    with _inside(rows, autocast):
        options = (criterion, temperature, nan_policy, backend)
        return _evaluate(rows, queries, targets, from_handle(architecture), *options, gradient, mean)


@_behavioral_loss.register_fake
def _(
    rows: Tensor,
    queries: Tensor,
    targets: Tensor,
    architecture: str,
    criterion: str,
    temperature: float,
    nan_policy: str,
    backend: str,
    autocast: str,
    gradient: bool,
    mean: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    k, p = rows.shape
    return rows.new_empty(k), rows.new_empty(k, dtype=torch.bool), rows.new_empty(k if gradient else 0, p)


def judge(values: Tensor, gradient: Tensor | None, nan_policy: str) -> Tensor:
    """Which models are bad; all False where nobody asks, which costs nothing."""
    if nan_policy == "propagate":
        return torch.zeros_like(values, dtype=torch.bool)
    bad = ~values.isfinite()
    # a sum is non-finite if any term is; overflow of finite terms would need gradients near 1e38
    return bad if gradient is None else bad | ~gradient.isfinite().all(1)


def refuse(bad: Tensor, nan_policy: str, mean: bool) -> None:
    """Raise WslfastError for bad models under ``raise``, and for a mean over none under ``omit``."""
    if nan_policy == "raise" and bool(bad.any()):
        where = bad.nonzero().flatten().tolist()
        raise WslfastError(f"reconstructed: models {where[:10]} of {len(bad)} have a non-finite value or gradient (nan_policy='raise')")
    if nan_policy == "omit" and mean:
        nothing = f"nan_policy='omit': all {len(bad)} models have a non-finite value or gradient; nothing to average"
        require(not bool(bad.all()), nothing)


def _keep_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[2])


def _differentiate_loss(ctx: Any, grad_values: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    slope = None if grad_values is None else once(ctx.saved_tensors[0] * grad_values.unsqueeze(1))
    return slope, *(None,) * 10


_behavioral_loss.register_autograd(_differentiate_loss, setup_context=_keep_loss)
