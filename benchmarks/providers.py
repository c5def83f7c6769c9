"""What computes the behavioral loss and its gradient: one registered function each, all from the same tensors.

A provider takes ``(weights [k, P], original [k, P], queries [n, C, H, W], targets [k, n, K] or None, architecture)`` and returns
``(losses [k], gradient [k, P])`` of the ``softmax_mse`` criterion (the published code's ``l2``). Without targets it computes the
originals' outputs itself, with the forward pass it is registered with. One that cannot run raises, and says why.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from functools import lru_cache
from math import gcd
from typing import Any, Union

import torch
import torch.nn.functional as F
from torch import Tensor

from wslfast import engine
from wslfast.architecture import Architecture
from wslfast.engine.precision import matmul_precision
from wslfast.kernels import criteria, reference
from wslfast.kernels.layers import Activation, Conv2d, Flatten, Linear, Pool2d, Unplannable, layer_slots

from .cases import CRITERION

Result = tuple[Tensor, Tensor]
Provider = Callable[[Tensor, Tensor, Tensor, Union[Tensor, None], Architecture], Result]
Forward = Callable[[Tensor, Tensor, Architecture], Tensor]
PROVIDERS: dict[str, Provider] = {}
FORWARDS: dict[str, Forward] = {}
OURS = ("wslfast-torch", "wslfast-triton-layerwise", "wslfast-triton-network")
_GAIN = 2.0**14  # gradients of a mean underflow fp16; what GradScaler does, a power of two and exact


class Unavailable(Exception):
    """Raised by a provider that this machine or this case is not for."""


def provider(name: str, forward: Forward) -> Callable[[Provider], Provider]:
    """Register a provider under its name in tables, with its forward pass ``(weights, queries, architecture) -> [k, n, K]``."""

    def register(function: Provider) -> Provider:
        PROVIDERS[name], FORWARDS[name] = function, forward
        return function

    return register


def _differentiated(forward: Forward, weights: Tensor, queries: Tensor, targets: Tensor, architecture: Architecture) -> Result:
    """Losses and gradient by autograd through ``forward``."""
    rows = weights.detach().requires_grad_()
    values = criteria.criterion_values(forward(rows, queries, architecture).float(), targets, CRITERION)
    (gradient,) = torch.autograd.grad(_GAIN * values.sum(), rows)  # models are independent: the sum's gradient is each model's own
    return values.detach(), gradient / _GAIN


def _targets(name: str, original: Tensor, queries: Tensor, targets: Tensor | None, architecture: Architecture) -> Tensor:
    """The targets given, else what the provider's own forward pass makes of the originals."""
    if targets is not None:
        return targets
    with torch.no_grad():
        return FORWARDS[name](original, queries, architecture).float()


# -- the published algorithm -----------------------------------------------------------------------------------------------


@lru_cache(maxsize=16)
def _recipe(architecture: Architecture) -> tuple[tuple[int, ...], int]:
    """First token of every layer with parameters (one token an output channel) and the token size, bias included."""
    starts, size, at = [], 0, 0
    for slots in layer_slots(architecture.layers):
        if slots.weight is not None:
            starts.append(at)
            at += slots.weight.shape[0]
            size = max(size, slots.weight.size // slots.weight.shape[0] + (slots.bias is not None))
    return (*starts, at), size


def to_tokens(weights: Tensor, architecture: Architecture) -> Tensor:
    """``[k, P] -> [k, T, D]``: a row an output channel, its bias last, zeros up to the widest."""
    starts, size = _recipe(architecture)
    tokens = weights.new_zeros(len(weights), starts[-1], size)
    parameterised = [s for s in layer_slots(architecture.layers) if s.weight is not None]
    for start, slots in zip(starts, parameterised, strict=False):
        assert slots.weight is not None
        rows = weights[:, slots.weight.offset : slots.weight.stop].unflatten(1, (slots.weight.shape[0], -1))
        if slots.bias is not None:
            rows = torch.cat((rows, weights[:, slots.bias.offset : slots.bias.stop].unsqueeze(-1)), -1)
        tokens[:, start : start + rows.shape[1], : rows.shape[2]] = rows
    return tokens


def from_tokens(tokens: Tensor, architecture: Architecture) -> Tensor:
    """One model's row ``[P]`` from its tokens ``[T, D]``: rows picked by index, padding dropped."""
    starts, _ = _recipe(architecture)
    pieces, position = [], 0
    for slots in layer_slots(architecture.layers):
        if slots.weight is None:
            continue
        rows = tokens[torch.arange(starts[position], starts[position + 1], device=tokens.device)]
        width = slots.weight.size // slots.weight.shape[0]
        pieces.append(rows[:, :width].reshape(-1))
        if slots.bias is not None:
            pieces.append(rows[:, width])
        position += 1
    return torch.cat(pieces)


def _published_forward(weights: Tensor, queries: Tensor, architecture: Architecture) -> Tensor:
    def one(tokens: Tensor) -> Tensor:
        return reference.forward_one(from_tokens(tokens, architecture), queries, architecture.layers)

    return torch.vmap(one)(to_tokens(weights, architecture))


@provider("published", _published_forward)
def published(weights: Tensor, original: Tensor, queries: Tensor, targets: Tensor | None, architecture: Architecture) -> Result:
    """The published loss, restated: vmap over models of token decoding and the network, originals run again at every call.

    Probabilities pass through nan_to_num, and non-finite models leave the mean.
    """
    if targets is not None:
        raise Unavailable("the published algorithm has no place for given targets")
    tokens = to_tokens(weights, architecture).requires_grad_()

    def one(output: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = reference.forward_one(from_tokens(target, architecture), queries, architecture.layers)
        found = reference.forward_one(from_tokens(output, architecture), queries, architecture.layers)
        p, q = (torch.nan_to_num(x.float().softmax(-1), 0.0, 1.0, 0.0) for x in (found, wanted))
        return F.mse_loss(p, q)

    losses = torch.vmap(one)(tokens, to_tokens(original, architecture))
    (_GAIN * losses[losses.isfinite()].mean()).backward()
    assert tokens.grad is not None
    # of the mean over models, so each model's own gradient is k times that
    gradient = torch.vmap(lambda g: from_tokens(g, architecture))(tokens.grad * (len(tokens) / _GAIN))
    return losses.detach(), gradient


# -- what one would write by hand ------------------------------------------------------------------------------------------


def _vmapped(weights: Tensor, queries: Tensor, targets: Tensor, architecture: Architecture) -> Result:
    def one(row: Tensor, target: Tensor) -> Tensor:
        outputs = reference.forward_one(row, queries, architecture.layers).float()
        return _GAIN * criteria.criterion_values(outputs[None], target[None], CRITERION)[0]

    gradient, losses = torch.vmap(torch.func.grad_and_value(one))(weights, targets)
    return losses / _GAIN, gradient / _GAIN


def _vmap_forward(weights: Tensor, queries: Tensor, architecture: Architecture) -> Tensor:
    return torch.vmap(lambda row: reference.forward_one(row, queries, architecture.layers))(weights)


@provider("vmap", _vmap_forward)
def vmap(weights: Tensor, original: Tensor, queries: Tensor, targets: Tensor | None, architecture: Architecture) -> Result:
    """``torch.func``: vmap of grad over models."""
    return _vmapped(weights, queries, _targets("vmap", original, queries, targets, architecture), architecture)


@lru_cache(maxsize=1)
def _compiled(*_: object) -> tuple[Callable[..., Result], Callable[..., Tensor]]:
    torch.compiler.reset()  # past eight shapes of one function the compiler would run it uncompiled, without a word
    return torch.compile(_vmapped, dynamic=False, fullgraph=True), torch.compile(_vmap_forward, dynamic=False, fullgraph=True)


def _compiled_for(weights: Tensor, queries: Tensor, architecture: Architecture) -> tuple[Callable[..., Result], Callable[..., Tensor]]:
    device = weights.device.type
    half = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    assert architecture.layers  # worked out here: a compiler does not enter the lock of a cached property
    return _compiled(architecture.name, weights.shape, queries.shape, device, half, matmul_precision())


def _compiled_forward(weights: Tensor, queries: Tensor, architecture: Architecture) -> Tensor:
    return _compiled_for(weights, queries, architecture)[1](weights, queries, architecture)


@provider("vmap-compiled", _compiled_forward)
def vmap_compiled(weights: Tensor, original: Tensor, queries: Tensor, targets: Tensor | None, architecture: Architecture) -> Result:
    """The same under ``torch.compile``, for one shape (needs a C++ compiler on a CPU)."""
    targets = _targets("vmap-compiled", original, queries, targets, architecture)
    return _compiled_for(weights, queries, architecture)[0](weights, queries, targets, architecture)


def _grouped_forward(weights: Tensor, queries: Tensor, architecture: Architecture) -> Tensor:
    """Outputs ``[k, n, K]`` with all models in one call a layer: models are the groups of a convolution, the batch of a matrix product."""
    layers = architecture.layers
    k = weights.shape[0]
    own = reference.per_model_queries(queries, layers)
    x = queries.transpose(0, 1) if own else queries.unsqueeze(1).expand(-1, k, *queries.shape[1:])  # [n, k, ...]
    n = x.shape[0]
    for layer, slots in zip(layers, layer_slots(layers), strict=True):
        if slots.weight is not None:
            weight = weights[:, slots.weight.offset : slots.weight.stop]
            bias = None if slots.bias is None else weights[:, slots.bias.offset : slots.bias.stop]
        if isinstance(layer, Conv2d):
            x = F.conv2d(
                x.reshape(n, -1, *x.shape[-2:]),
                weight.reshape(k * layer.out_channels, *layer.weight_shape[1:]),
                None if bias is None else bias.reshape(-1),
                layer.stride,
                layer.padding,
                layer.spacing,
                k * layer.groups,
            )
            x = x.view(n, k, layer.out_channels, *x.shape[-2:])
        elif isinstance(layer, Linear):
            x = torch.einsum("nki,koi->nko", x, weight.view(k, *layer.weight_shape))
            x = x if bias is None else x + bias
        elif isinstance(layer, Pool2d):
            pool = F.max_pool2d if layer.mode == "max" else F.avg_pool2d
            x = pool(x.reshape(n, -1, *x.shape[-2:]), layer.kernel_size, layer.stride)
            x = x.view(n, k, -1, *x.shape[-2:])
        elif isinstance(layer, Activation):
            x = reference.activation(x, layer)
        elif isinstance(layer, Flatten):
            x = x.flatten(2)
    return x.transpose(0, 1)


@provider("grouped", _grouped_forward)
def grouped(weights: Tensor, original: Tensor, queries: Tensor, targets: Tensor | None, architecture: Architecture) -> Result:
    """All models in one call a layer: grouped convolutions (cuDNN, oneDNN), batched products, autograd."""
    targets = _targets("grouped", original, queries, targets, architecture)
    return _differentiated(_grouped_forward, weights, queries, targets, architecture)


def _unfolded_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, layer: Conv2d, k: int) -> Tensor:
    """``[n, C, H, W]`` shared by all models or ``[k, n, C, H, W]`` -> ``[k, n, C', H', W']`` by unfolding and one product."""
    if layer.groups != 1:
        raise Unavailable("unfold-bmm is written for convolutions without groups")
    columns = F.unfold(x.flatten(0, -4), layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    if x.ndim == 4:
        out = (weight.reshape(k * layer.out_channels, -1) @ columns).unflatten(1, (k, layer.out_channels)).transpose(0, 1)
    else:
        out = torch.einsum("koc,kncl->knol", weight.flatten(2), columns.unflatten(0, (k, -1)))
    reach = [d * (size - 1) + 1 for d, size in zip(layer.dilation, layer.kernel_size, strict=True)]
    height = (x.shape[-2] + 2 * layer.padding[0] - reach[0]) // layer.stride[0] + 1
    out = out if bias is None else out + bias[:, None, :, None]
    return out.unflatten(-1, (height, -1))


def _unfold_forward(weights: Tensor, queries: Tensor, architecture: Architecture) -> Tensor:
    k, x = len(weights), queries
    for layer, slots in zip(architecture.layers, layer_slots(architecture.layers), strict=True):
        weight = None if slots.weight is None else weights[:, slots.weight.offset : slots.weight.stop].unflatten(1, slots.weight.shape)
        bias = None if slots.bias is None else weights[:, slots.bias.offset : slots.bias.stop]
        if isinstance(layer, Conv2d):
            assert weight is not None
            x = _unfolded_convolution(x, weight, bias, layer, k)
        elif isinstance(layer, Linear):
            assert weight is not None
            x = (x.expand(k, *x.shape) if x.ndim == 2 else x) @ weight.transpose(1, 2)
            x = x if bias is None else x + bias.unsqueeze(1)
        elif isinstance(layer, Pool2d):
            pool = F.max_pool2d if layer.mode == "max" else F.avg_pool2d
            x = pool(x.flatten(0, -4), layer.kernel_size, layer.stride).unflatten(0, x.shape[:-3])
        elif isinstance(layer, Activation):
            x = reference.activation(x, layer)
        elif isinstance(layer, Flatten):
            x = x.flatten(-3)
    return x


@provider("unfold-bmm", _unfold_forward)
def unfold_bmm(weights: Tensor, original: Tensor, queries: Tensor, targets: Tensor | None, architecture: Architecture) -> Result:
    """Convolutions as batched products of unfolded images, autograd."""
    targets = _targets("unfold-bmm", original, queries, targets, architecture)
    return _differentiated(_unfold_forward, weights, queries, targets, architecture)


def _loop_forward(weights: Tensor, queries: Tensor, architecture: Architecture) -> Tensor:
    return reference.forward(weights, queries, architecture.layers)


def _looped(weights: Tensor, queries: Tensor, targets: Tensor, architecture: Architecture) -> Result:
    """One model after another, its graph freed before the next begins."""
    parts = [_differentiated(_loop_forward, w[None], queries, t[None], architecture) for w, t in zip(weights, targets, strict=True)]
    losses, gradient = (torch.cat(part) for part in zip(*parts, strict=True))
    return losses, gradient


@provider("loop", _loop_forward)
def loop(weights: Tensor, original: Tensor, queries: Tensor, targets: Tensor | None, architecture: Architecture) -> Result:
    """One model after another, autograd, images as they come (NCHW)."""
    return _looped(weights, queries, _targets("loop", original, queries, targets, architecture), architecture)


def _channels_last(queries: Tensor) -> Tensor:
    return queries.contiguous(memory_format=torch.channels_last)


@provider("loop-channels-last", lambda w, q, a: _loop_forward(w, _channels_last(q), a))
def loop_channels_last(weights: Tensor, original: Tensor, queries: Tensor, targets: Tensor | None, architecture: Architecture) -> Result:
    """The same loop, the queries made channels-last once."""
    return loop(weights, original, _channels_last(queries), targets, architecture)


class _Captured:
    """A function of ``(rows, queries, *more)`` as a CUDA graph over some models at a time; its tensors stay where they are."""

    def __init__(self, function: Callable[..., tuple[Tensor, ...]], *arguments: Tensor) -> None:
        self.inputs = [a.clone() for a in arguments]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries allocate their workspaces before the capture
            function(*self.inputs)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = function(*self.inputs)

    def __call__(self, queries: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
        """The function of all ``rows``, as many at a time as were captured."""
        chunk = len(self.inputs[1])
        results = [rows[0].new_empty(len(rows[0]), *out.shape[1:]) for out in self.outputs]
        self.inputs[0].copy_(queries)
        for start in range(0, len(rows[0]), chunk):
            for place, given in zip(self.inputs[1:], rows, strict=True):
                place.copy_(given[start : start + chunk])
            self.graph.replay()
            for result, out in zip(results, self.outputs, strict=True):
                result[start : start + chunk] = out
        return tuple(results)


_captured: dict[object, _Captured] = {}  # of one shape: a graph holds its memory


def _graph_of(kind: str, architecture: Architecture, queries: Tensor, *rows: Tensor) -> _Captured:
    if not queries.is_cuda:
        raise Unavailable("CUDA graphs need a GPU")
    half = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
    key = (kind, architecture.name, queries.shape, len(rows[0]), half, matmul_precision())
    if key not in _captured:
        if len(_captured) > 1:
            _captured.clear()

        def forward(q: Tensor, w: Tensor) -> tuple[Tensor, ...]:
            return (_loop_forward(w, q, architecture).detach().float(),)

        def both(q: Tensor, w: Tensor, t: Tensor) -> tuple[Tensor, ...]:
            return _looped(w, q, t, architecture)

        few = gcd(len(rows[0]), 64)
        _captured[key] = _Captured(forward if kind == "forward" else both, queries, *(r[:few] for r in rows))
    return _captured[key]


def _graphed_forward(weights: Tensor, queries: Tensor, architecture: Architecture) -> Tensor:
    return _graph_of("forward", architecture, queries, weights)(queries, weights)[0]


@provider("loop-cudagraph", _graphed_forward)
def loop_cudagraph(weights: Tensor, original: Tensor, queries: Tensor, targets: Tensor | None, architecture: Architecture) -> Result:
    """The loop over up to 64 models captured as a CUDA graph, replayed on all models in turn."""
    targets = _targets("loop-cudagraph", original, queries, targets, architecture)
    losses, gradient = _graph_of("both", architecture, queries, weights, targets)(queries, weights, targets)
    return losses, gradient


# -- wslfast ---------------------------------------------------------------------------------------------------------------


def _engine_forward(weights: Tensor, queries: Tensor, architecture: Architecture) -> Tensor:
    return engine.forward(weights, queries, architecture, backend="torch" if weights.is_cuda else "auto")


@provider("wslfast-torch", _engine_forward)
def wslfast_torch(weights: Tensor, original: Tensor, queries: Tensor, targets: Tensor | None, architecture: Architecture) -> Result:
    """The engine without its Triton kernels, called as ``batched_behavioral_loss`` calls it: that one's checks and its part in autograd,
    tenths of a millisecond, are not on the clock."""
    targets = _targets("wslfast-torch", original, queries, targets, architecture)
    backend = "torch" if weights.is_cuda else "auto"
    return engine.loss_and_gradient(weights, queries, targets, architecture, CRITERION, backend=backend)


def _kernels(weights: Tensor) -> tuple[Any, str]:
    """The kernels' module, and the precision they are asked for: that of autocast, else of torch's float32 products. A rehearsal without a
    GPU runs them in Triton's interpreter."""
    if not weights.is_cuda and "WSLFAST_REHEARSE" not in os.environ:
        raise Unavailable("Triton kernels need a GPU")
    if importlib.util.find_spec("triton") is None:
        raise Unavailable("triton is not installed")
    precision = "tf32x3" if matmul_precision() == "highest" else "tf32"
    if torch.is_autocast_enabled("cuda"):
        precision = "bf16" if torch.get_autocast_dtype("cuda") == torch.bfloat16 else "fp16"
    return importlib.import_module("wslfast.kernels.triton.launch"), precision


def _on_kernels(function: str, mode: str, weights: Tensor, *arguments: Any) -> Any:
    """The kernels' ``forward`` or ``loss_and_gradient`` in a mode, ``layers`` or ``network``."""
    kernels, precision = _kernels(weights)
    try:
        return getattr(kernels, function)(weights, *arguments, precision=precision, memory=engine.memory_budget("cuda"), mode=mode)
    except Unplannable as error:
        raise Unavailable(f"not planned in mode {mode!r}: {error}") from None


def _triton_provider(name: str, mode: str, doc: str) -> Provider:
    """Register the kernels in one of their modes."""

    def forward(weights: Tensor, queries: Tensor, architecture: Architecture) -> Tensor:
        return _on_kernels("forward", mode, weights, queries, architecture.layers)

    def run(weights: Tensor, original: Tensor, queries: Tensor, targets: Tensor | None, architecture: Architecture) -> Result:
        targets = _targets(name, original, queries, targets, architecture)
        return _on_kernels("loss_and_gradient", mode, weights, queries, targets, architecture.layers, CRITERION)

    run.__doc__ = doc
    return provider(name, forward)(run)


wslfast_triton_layerwise = _triton_provider(
    "wslfast-triton-layerwise", "layers", "The kernels that run one layer of all models in a launch."
)
wslfast_triton_network = _triton_provider(
    "wslfast-triton-network", "network", "The kernels that run a whole network in a launch, its activations in a scratch of each program."
)
