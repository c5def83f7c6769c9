"""What computes the behavioural loss and its gradient: one registered function each, all from the same tensors.

A provider takes ``(weights [k, P], original [k, P], queries [n, C, H, W], targets [k, n, K] or None, architecture)`` and returns
``(losses [k], gradient [k, P])`` of the ``softmax_mse`` criterion (the published code's ``l2``). Without targets it computes the
originals' outputs itself, in its own way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Union

import torch
import torch.nn.functional as F
from torch import Tensor

from wslfast import engine
from wslfast.architecture import Architecture
from wslfast.kernels import reference
from wslfast.kernels.plan import layer_slots

CRITERION = "softmax_mse"
Result = tuple[Tensor, Tensor]
Provider = Callable[[Tensor, Tensor, Tensor, Union[Tensor, None], Architecture], Result]
PROVIDERS: dict[str, Provider] = {}


def provider(name: str) -> Callable[[Provider], Provider]:
    """Register a provider under its name in tables."""

    def register(function: Provider) -> Provider:
        PROVIDERS[name] = function
        return function

    return register


def float64_loop(weights: Tensor, original: Tensor, queries: Tensor, architecture: Architecture) -> Result:
    """What every provider is checked against."""
    layers, queries = architecture.layers, queries.double()
    targets = reference.forward(original.double(), queries, layers)
    return reference.loss_and_gradient(weights.double(), queries, targets, layers, CRITERION)


def relative_error(name: str, case: tuple[Tensor, Tensor, Tensor, Architecture], cached: bool = False) -> float:
    """The gate: relative L2 of the gradient (or of the losses, if that is worse) against the float64 loop; inf if not finite."""
    weights, original, queries, architecture = case
    losses, truth = float64_loop(weights, original, queries, architecture)
    targets = reference.forward(original, queries, architecture.layers) if cached else None
    found, gradient = PROVIDERS[name](weights, original, queries, targets, architecture)
    if not (found.isfinite().all() and gradient.isfinite().all()):
        return float("inf")
    errors = [((a.double() - b).norm() / b.norm()).item() for a, b in ((found, losses), (gradient, truth))]
    return float(f"{max(errors):.2g}")


# -- the published algorithm -------------------------------------------------------------------------------------------


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


def _from_tokens(tokens: Tensor, architecture: Architecture) -> Tensor:
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


@provider("published")
def published(weights: Tensor, original: Tensor, queries: Tensor, targets: Tensor | None, architecture: Architecture) -> Result:
    """The published loss, restated: vmap over models of token decoding and the network, originals run again at every call.

    Probabilities pass through nan_to_num, and non-finite models leave the mean. Targets that are given are not used: the
    published algorithm has no place for them.
    """
    tokens = to_tokens(weights, architecture).requires_grad_()

    def one(output: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = reference.forward_one(_from_tokens(target, architecture), queries, architecture.layers)
        found = reference.forward_one(_from_tokens(output, architecture), queries, architecture.layers)
        p, q = (torch.nan_to_num(x.softmax(-1), 0.0, 1.0, 0.0) for x in (found, wanted))
        return F.mse_loss(p, q)

    losses = torch.vmap(one)(tokens, to_tokens(original, architecture))
    losses[losses.isfinite()].mean().backward()
    assert tokens.grad is not None
    # of the mean over models, so each model's own gradient is k times that
    gradient = torch.stack([_from_tokens(g, architecture) for g in tokens.grad * len(tokens)])
    return losses.detach(), gradient


# -- what one would write by hand --------------------------------------------------------------------------------------


def _vmapped(weights: Tensor, queries: Tensor, targets: Tensor, architecture: Architecture) -> Result:
    def one(row: Tensor, target: Tensor) -> Tensor:
        outputs = reference.forward_one(row, queries, architecture.layers)
        return reference.criterion_values(outputs[None], target[None], CRITERION)[0]

    gradient, losses = torch.vmap(torch.func.grad_and_value(one))(weights, targets)
    return losses, gradient


def _vmap_forward(weights: Tensor, queries: Tensor, architecture: Architecture) -> Tensor:
    with torch.no_grad():
        return torch.vmap(lambda row: reference.forward_one(row, queries, architecture.layers))(weights)


@provider("vmap")
def vmap(weights: Tensor, original: Tensor, queries: Tensor, targets: Tensor | None, architecture: Architecture) -> Result:
    """``torch.func``: vmap of grad over models."""
    if targets is None:
        targets = _vmap_forward(original, queries, architecture)
    return _vmapped(weights, queries, targets, architecture)


@lru_cache(maxsize=1)
def _compiled() -> tuple[Callable[..., Result], Callable[..., Tensor]]:
    return torch.compile(_vmapped, dynamic=False), torch.compile(_vmap_forward, dynamic=False)


def compiled_vmap(weights: Tensor, original: Tensor, queries: Tensor, targets: Tensor | None, architecture: Architecture) -> Result:
    """The same under ``torch.compile``. Registered where a compiler can be expected (the GPU gate), not here."""
    both, forward = _compiled()
    if targets is None:
        targets = forward(original, queries, architecture)
    return both(weights, queries, targets, architecture)


@provider("grouped")
def grouped(weights: Tensor, original: Tensor, queries: Tensor, targets: Tensor | None, architecture: Architecture) -> Result:
    """All models in one call a layer: grouped convolutions, batched products, autograd."""
    layers = architecture.layers
    if targets is None:
        with torch.no_grad():
            targets = reference.forward_grouped(original, queries, layers)
    rows = weights.detach().requires_grad_()
    values = reference.criterion_values(reference.forward_grouped(rows, queries, layers), targets, CRITERION)
    (gradient,) = torch.autograd.grad(values.sum(), rows)
    return values.detach(), gradient


@provider("loop")
def loop(weights: Tensor, original: Tensor, queries: Tensor, targets: Tensor | None, architecture: Architecture) -> Result:
    """One model after another, autograd, images as they come (NCHW)."""
    layers = architecture.layers
    if targets is None:
        with torch.no_grad():
            targets = reference.forward(original, queries, layers)
    return reference.loss_and_gradient(weights, queries, targets, layers, CRITERION)


@provider("loop-channels-last")
def loop_channels_last(
    weights: Tensor, original: Tensor, queries: Tensor, targets: Tensor | None, architecture: Architecture
) -> Result:
    """The same loop, the queries made channels-last once."""
    return loop(weights, original, queries.contiguous(memory_format=torch.channels_last), targets, architecture)


@provider("wslfast")
def wslfast(
    weights: Tensor, original: Tensor, queries: Tensor, targets: Tensor | None, architecture: Architecture, backend: str = "auto"
) -> Result:
    """The engine, as a user meets it."""
    if targets is None:
        with torch.no_grad():
            targets = engine.forward(original, queries, architecture, backend=backend)
    return engine.loss_and_gradient(weights, queries, targets, architecture, CRITERION, backend=backend)


def wslfast_triton(weights: Tensor, original: Tensor, queries: Tensor, targets: Tensor | None, architecture: Architecture) -> Result:
    """The kernels, asked for: on a CUDA device alone."""
    return wslfast(weights, original, queries, targets, architecture, backend="triton")


# -- cases -------------------------------------------------------------------------------------------------------------

ARCHITECTURES: dict[str, Callable[[], Architecture]] = {
    "cnn3": lambda: Architecture.cnn3(channels_in=3, activation="relu"),
    "cnn": lambda: Architecture.cnn(channels_in=1, activation="relu"),
    "lenet5": lambda: Architecture.lenet5(channels_in=3, activation="relu"),
}


def models(architecture: Architecture, k: int, seed: int) -> Tensor:
    """``[k, P]``: a zoo's initialisations, by turns."""
    names = ["kaiming_uniform", "kaiming_normal", "xavier_uniform"]
    return architecture.initial_weights([names[j % 3] for j in range(k)], range(seed, seed + k))


def cases(architecture: Architecture, k: int, n: int, device: str = "cpu") -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Fresh reconstructions, originals and queries, without end."""
    generator = torch.Generator().manual_seed(1)
    base = models(architecture, 2 * k, 0)
    while True:
        noise = 1 + 0.1 * torch.randn(base.shape, generator=generator)
        weights, original = (base * noise).to(device).split(k)
        yield weights, original, torch.randn(n, *architecture.input_shape, generator=generator).to(device)


@contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """``fp32`` or ``tf32`` for products and cuDNN's convolutions, and back."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = name == "tf32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
