"""Networks, weights and the torch.func oracle for tests of the behavioral loss."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from small_networks import SMALL, Residual
from torch import Tensor, nn

from wslfast.architecture import Architecture
from wslfast.behavior import batched_behavioral_loss
from wslfast.testing import as_module, relative_error


class PlainNorm(nn.Module):
    """Batch norm in evaluation mode by its formula: torch's own has no gradient to the running statistics."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, mean, var = (t.view(1, 2, 1, 1) for t in self.buffers())
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias


NETS = {
    "cnn": Architecture.cnn(),
    "cnn3": Architecture.cnn3(),
    "lenet5": Architecture.lenet5(1, "gelu"),
    "mlp": Architecture.mlp(),
    "small": SMALL,
}


REDUCTIONS = ("mean", "sum", "none")


def stored_weights(arch: Architecture, k: int, seed: int) -> Tensor:
    if arch.planned:
        return arch.initial_weights((["kaiming_uniform", "default", "xavier_normal"] * k)[:k], range(seed, seed + k))
    weights = torch.randn(k, arch.num_weights, generator=torch.Generator().manual_seed(seed)) / 3
    for slot in arch.parameters:
        if slot.name.endswith("running_var"):
            weights[:, slot.offset : slot.stop] = weights[:, slot.offset : slot.stop].abs() + 0.5
    return weights


def case(arch: Architecture, k: int = 4, n: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Reconstructed and original weights, and queries."""
    queries = torch.randn(n, *arch.input_shape, generator=torch.Generator().manual_seed(9))
    return stored_weights(arch, k, 0), stored_weights(arch, k, 50), queries


def module_of(arch: Architecture) -> nn.Module:
    if arch.planned:
        return as_module(arch).double()
    module = Residual().double()
    module.bn = PlainNorm().double()  # type: ignore[assignment]
    return module


def functional_oracle(
    weights: Tensor, original: Tensor, queries: Tensor, arch: Architecture, criterion: str, temperature: float = 2.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Per-model values, gradients to the weights and whole gradients to the queries ``[k, n, ...]``, those through the original's
    outputs included, by torch.func in float64."""
    module = module_of(arch)

    def outputs(row: Tensor, x: Tensor) -> Tensor:
        return torch.func.functional_call(module, {s.name: row[s.offset : s.stop].view(s.shape) for s in arch.parameters}, (x,))

    def value(row: Tensor, other: Tensor, x: Tensor) -> Tensor:
        y, target = outputs(row, x), outputs(other, x)
        if criterion == "mse":
            return (y - target).pow(2).sum() / (2 * y.shape[0])
        if criterion == "huber":
            return F.huber_loss(y, target, reduction="sum") / y.shape[0]
        if criterion == "softmax_mse":
            return (F.softmax(y, -1) - F.softmax(target, -1)).pow(2).mean()
        if criterion == "cross_entropy":
            return F.cross_entropy(y, F.softmax(target, -1))
        p, q = F.softmax(y / temperature, -1), F.softmax(target / temperature, -1)
        return temperature**2 * (q * (q / p).log()).sum() / y.shape[0]

    w, o, x = (t.detach().double() for t in (weights, original, queries))
    (row_gradients, query_gradients), values = torch.vmap(torch.func.grad_and_value(value, argnums=(0, 2)), in_dims=(0, 0, None))(w, o, x)
    return values, row_gradients, query_gradients


def largest_error(actual: Tensor, expected: Tensor, arch: Architecture) -> float:
    return max(
        relative_error(a[s.offset : s.stop], e[s.offset : s.stop]) for a, e in zip(actual, expected, strict=True) for s in arch.parameters
    )


def loss_and_gradient(rows: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """The loss and its gradient to fresh leaf weights."""
    leaf = rows.detach().clone().requires_grad_()
    value = batched_behavioral_loss(leaf, *args, **options)
    value.sum().backward()
    assert leaf.grad is not None
    return value.detach(), leaf.grad
