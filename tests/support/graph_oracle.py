"""The float64 loop that graphs are compared with: the module itself, one model after another, and torch's own autograd."""

from __future__ import annotations

import copy
import json
import math
import pickle
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch_settings import default_dtype

from wslfast import engine
from wslfast.architecture import Architecture
from wslfast.testing import relative_error


class _Statistics(TorchFunctionMode):
    """Norms by running statistics as the formula says: torch's own have no gradient to mean and variance."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm and not kwargs.get("training", args[5] if len(args) > 5 else False):
            return _by_statistics(*args, **kwargs)
        if func is F.instance_norm and not kwargs.get("use_input_stats", args[5] if len(args) > 5 else True):
            return _by_statistics(*args, **kwargs)
        return func(*args, **kwargs)


def _by_statistics(
    input: Tensor, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None, *_: Any, eps: float = 1e-5, **__: Any
) -> Tensor:
    shape = (1, -1, *(1,) * (input.ndim - 2))
    mean, var, weight, bias = (None if t is None else t.reshape(shape) for t in (running_mean, running_var, weight, bias))
    x = (input - mean) / (var + (_[2] if len(_) > 2 else eps)).sqrt()
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def rows_near(module: nn.Module, arch: Architecture, k: int, seed: int = 0, spread: float = 0.3) -> Tensor:
    """Weights ``[k, P]`` in float64, around the module's own; variances stay positive."""
    generator = torch.Generator().manual_seed(seed)
    state = module.state_dict()
    parts = []
    for slot in arch.parameters:
        value = state[slot.name].detach().double().reshape(1, -1)
        noise = torch.randn(k, slot.size, generator=generator, dtype=torch.float64)
        scale = float(value.square().mean().sqrt()) if value.numel() else 0.0
        moved = value + spread * (scale or 1.0) * noise
        parts.append(moved.abs() + 0.1 if slot.name.endswith("running_var") else moved)
    return torch.cat(parts, 1)


def loop(module: nn.Module, arch: Architecture, weights: Tensor, queries: Tensor) -> Tensor:
    """Outputs ``[k, n, *out]`` in float64 of the module itself, differentiable in weights and queries; these may be each model's own."""
    twin = copy.deepcopy(module).double().eval()
    own = queries.ndim == len(arch.input_shape) + 2
    outputs = []
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        for j, row in enumerate(weights.double()):
            state = {s.name: row[s.offset : s.stop].view(s.shape).clone() for s in arch.parameters}  # as it lies in a module
            x = (queries[j] if own else queries).double()
            with _Statistics(), default_dtype(torch.float64):  # of what its forward makes
                outputs.append(torch.func.functional_call(twin, state, (x.clone(),)))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return torch.stack(outputs)


def looped(module: nn.Module, arch: Architecture, weights: Tensor, queries: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of :func:`loop`: outputs, random targets, the values ``[k]`` of criterion mse, and their gradients ``[k, P]``."""
    w = weights.clone().requires_grad_()
    outputs = loop(module, arch, w, queries)
    targets = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    values = criterion_value(outputs, targets, "mse")
    (slope,) = torch.autograd.grad(values.sum(), w)
    return outputs.detach(), targets, values.detach(), slope


def criterion_value(outputs: Tensor, targets: Tensor, criterion: str, temperature: float = 2.0) -> Tensor:
    """Per-model values ``[k]``, by torch's own losses; classes are the last axis."""
    values = []
    for f, y in zip(outputs, targets, strict=True):
        n = len(f)
        if criterion == "mse":
            value = F.mse_loss(f, y, reduction="sum") / (2 * n)
        elif criterion == "softmax_mse":
            value = F.mse_loss(f.softmax(-1), y.softmax(-1))
        elif criterion == "cross_entropy":
            value = -(y.softmax(-1) * f.log_softmax(-1)).sum() / n
        elif criterion == "distillation":
            log_p, log_q = (f / temperature).log_softmax(-1), (y / temperature).log_softmax(-1)
            value = temperature**2 * F.kl_div(log_p, log_q, reduction="sum", log_target=True) / n
        else:
            raise ValueError(criterion)
        values.append(value)
    return torch.stack(values)


def queries_like(module: nn.Module, arch: Architecture, *lead: int, seed: int = 1) -> Tensor:
    """Random queries ``[*lead, *input_shape]`` in float64: normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*lead, *arch.input_shape, generator=generator, dtype=torch.float64)


def close(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """Raise unless both are finite and alike, in relative L2."""
    assert actual.shape == expected.shape, (what, actual.shape, expected.shape)
    error = relative_error(actual, expected)
    if error == math.inf or float(expected.detach().norm()) > 1e-12:
        assert error < tolerance, f"{what}: relative error {error:.2e}"
    else:
        assert float(actual.detach().abs().max() if actual.numel() else 0) < 1e-9, what


def check(
    module: nn.Module,
    arch: Architecture,
    weights: Tensor,
    queries: Tensor,
    tolerances: tuple[float | None, float | None],
    criteria: tuple[str, ...] = ("mse",),
) -> None:
    """Outputs, losses and gradients of the engine in float64 and in float32 against the loop's in float64.

    Args:
        module: the network itself.
        arch: what it was traced to.
        weights: ``[k, P]`` in float64.
        queries: in float64, shared or each model's own.
        tolerances: of float64 and of float32; None for what is not to be compared.
        criteria: of the loss.
    """
    generator = torch.Generator().manual_seed(2)
    w, x = weights.clone().requires_grad_(), queries.clone().requires_grad_()
    outputs = loop(module, arch, w, x)
    slope, targets = (torch.randn(outputs.shape, generator=generator, dtype=torch.float64) for _ in range(2))
    through = torch.autograd.grad(outputs, (w, x), slope, retain_graph=True, allow_unused=True, materialize_grads=True)
    losses = [criterion_value(outputs, targets, name) for name in criteria]
    slopes = [torch.autograd.grad(v.sum(), w, retain_graph=True, allow_unused=True, materialize_grads=True)[0] for v in losses]
    outputs = outputs.detach()
    for dtype, tolerance in zip((torch.float64, torch.float32), tolerances, strict=True):
        if tolerance is None:
            continue
        rows, images, wanted = (t.to(dtype) for t in (weights, queries, targets))
        with torch.no_grad():
            close(engine.forward(rows, images, arch), outputs, tolerance, f"{dtype} outputs")
        leaves = rows.clone().requires_grad_(), images.clone().requires_grad_()
        actual = engine.forward(*leaves, arch)
        close(actual, outputs, tolerance, f"{dtype} outputs with a graph")
        found = torch.autograd.grad(actual, leaves, slope.to(actual.dtype), allow_unused=True, materialize_grads=True)
        for a, b, what in zip(found, through, ("weights", "queries"), strict=True):
            close(a, b, 3 * tolerance, f"{dtype} gradient to {what}")
        for name, value, gradient in zip(criteria, losses, slopes, strict=True):
            v, g = engine.loss_and_gradient(rows, images, wanted, arch, name)
            close(v, value, tolerance, f"{dtype} {name} values")
            close(g, gradient, 3 * tolerance, f"{dtype} {name} gradient")


def check_everything(
    module: nn.Module, arch: Architecture, k: int = 3, n: int = 5, tolerances: tuple[float, float] = (1e-7, 1e-5), criteria: tuple[str, ...] = ("mse",)
) -> None:  # fmt: skip
    """:func:`check` on shared queries and on each model's own. (A constant that a module makes is float32, whatever the module is.)"""
    weights = rows_near(module, arch, k)
    check(module, arch, weights, queries_like(module, arch, n), tolerances, criteria)
    check(module, arch, weights, queries_like(module, arch, k, n), tolerances, criteria)


def check_record(module: nn.Module, arch: Architecture) -> None:
    """JSON there and back, copies, pickles and a second trace are the same architecture."""
    again = Architecture.from_dict(json.loads(json.dumps(arch.to_dict(), allow_nan=False)))
    twin = Architecture.from_module(copy.deepcopy(module), arch.input_shape, arch.name)
    assert again == arch == twin == pickle.loads(pickle.dumps(arch)) == copy.deepcopy(arch)
    assert hash(again) == hash(arch) == hash(twin)
