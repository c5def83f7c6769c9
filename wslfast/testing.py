"""The float64 oracle for tests and benchmarks: each model as an ordinary ``torch.nn`` module, one after another.

Shares no computing code with the engines: records become ``nn`` modules, weights are loaded into them, torch's autograd
does the rest. Slow on purpose.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .architecture import Architecture
from .errors import present
from .population import unstack
from .tracing import rebuilt


def as_module(architecture: Architecture) -> nn.Module:
    """An architecture as an ordinary module in evaluation mode, its state-dict keys the architecture's."""
    return rebuilt(present(architecture.graph, f"architecture {architecture.name!r} could not be traced; its template is .module"))


def oracle_outputs(weights: Tensor, queries: Tensor, architecture: Architecture) -> Tensor:
    """Outputs ``[k, n, K]`` in float64, one model after another."""
    module = as_module(architecture).double()
    parameters = unstack(weights.detach().double().cpu(), architecture)
    outputs = []
    with torch.no_grad():
        for j in range(len(weights)):
            module.load_state_dict({name: value[j] for name, value in parameters.items()})
            outputs.append(module(queries.detach().double().cpu()))
    return torch.stack(outputs)


def oracle_loss(
    weights: Tensor, queries: Tensor, targets: Tensor, architecture: Architecture, criterion: str, temperature: float = 2.0
) -> tuple[Tensor, Tensor]:
    """Per-model values ``[k]`` and gradients ``[k, P]`` in float64, one model after another, by torch's own losses."""
    module = as_module(architecture).double()
    parameters = unstack(weights.detach().double().cpu(), architecture)
    values, gradients = [], []
    for j in range(len(weights)):
        module.load_state_dict({name: value[j] for name, value in parameters.items()})
        module.zero_grad()
        target = targets[j].detach().double().cpu()
        outputs = module(queries.detach().double().cpu())
        if criterion == "mse":
            value = F.mse_loss(outputs, target, reduction="sum") / (2 * len(outputs))
        elif criterion == "huber":
            value = F.huber_loss(outputs, target, reduction="sum") / len(outputs)
        elif criterion == "softmax_mse":
            value = F.mse_loss(outputs.softmax(1), target.softmax(1))
        elif criterion == "cross_entropy":
            value = F.cross_entropy(outputs, target.softmax(1))
        elif criterion == "distillation":
            log_p, q = (outputs / temperature).log_softmax(1), (target / temperature).softmax(1)
            value = temperature**2 * F.kl_div(log_p, q, reduction="batchmean")
        else:
            raise ValueError(f"unknown criterion {criterion!r}")
        value.backward()
        values.append(value.detach())
        named = dict(module.named_parameters())
        gradients.append(torch.cat([named[s.name].grad.flatten() for s in architecture.parameters]))  # type: ignore[union-attr]
    return torch.stack(values), torch.stack(gradients)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Relative L2 distance in float64; infinite if either side is not finite (no NaN counts as equal)."""
    a, b = actual.detach().double().cpu().flatten(), expected.detach().double().cpu().flatten()
    if a.shape != b.shape or not bool(a.isfinite().all() and b.isfinite().all()):
        return float("inf")
    return float((a - b).norm() / b.norm().clamp_min(1e-300))
