"""The float64 oracle for tests and benchmarks: each model as an ordinary ``torch.nn`` module, one after another.

Shares no computing code with the engines: records become ``nn`` modules, weights are loaded into them, torch's autograd
does the rest. Slow on purpose.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .architecture import Architecture
from .errors import require
from .kernels.graph import Graph
from .kernels.layers import Activation, Conv2d, Dropout, Flatten, Layer, Linear, Pool2d
from .kernels.reference import run_graph
from .population import unstack

_ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "silu": nn.SiLU, "identity": nn.Identity}
_WITH_PARAMETER = {"leakyrelu": nn.LeakyReLU, "elu": nn.ELU, "celu": nn.CELU, "softplus": nn.Softplus}


def _module(layer: Layer) -> nn.Module:
    if isinstance(layer, Conv2d):
        return nn.Conv2d(
            layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups, layer.bias
        )
    if isinstance(layer, Linear):
        return nn.Linear(layer.in_features, layer.out_features, layer.bias)
    if isinstance(layer, Pool2d):
        return (nn.MaxPool2d if layer.mode == "max" else nn.AvgPool2d)(layer.kernel_size, layer.stride)
    if isinstance(layer, Flatten):
        return nn.Flatten()
    if isinstance(layer, Dropout):
        return nn.Dropout(layer.p)
    assert isinstance(layer, Activation)
    if layer.function == "gelu":
        return nn.GELU(layer.approximate)
    if layer.function in _WITH_PARAMETER:
        return _WITH_PARAMETER[layer.function](layer.parameter)
    return _ACTIVATIONS[layer.function]()


class _Chain(nn.Module):
    """Modules registered under the records' dotted names, so that state dicts fit."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self._order = []
        for layer in architecture.layers:
            parent: nn.Module = self
            *path, leaf = layer.name.split(".")
            for part in path:
                if not hasattr(parent, part):
                    parent.add_module(part, nn.Module())
                parent = getattr(parent, part)
            parent.add_module(leaf, _module(layer))
            self._order.append(layer.name)

    def forward(self, x: Tensor) -> Tensor:
        for name in self._order:
            x = self.get_submodule(name)(x)
        return x


class GraphModule(nn.Module):
    """A graph as a module: parameters and buffers under their state-dict keys, one reference call a node."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self._graph = graph
        for slot in graph.slots:
            owner, leaf = self._owner(slot.name)
            if leaf.startswith("running_"):
                owner.register_buffer(leaf, torch.zeros(slot.shape))
            else:
                owner.register_parameter(leaf, nn.Parameter(torch.zeros(slot.shape)))
        for constant in graph.constants:
            if constant.kept:
                owner, leaf = self._owner(constant.name)
                owner.register_buffer(leaf, constant.value.clone())
        for key, name in graph.aliases:
            owner, leaf = self._owner(key)
            setattr(owner, leaf, _at(self, name))

    def _owner(self, key: str) -> tuple[nn.Module, str]:
        *path, leaf = key.split(".")
        owner: nn.Module = self
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner._modules[part]  # type: ignore[assignment]
        return owner, leaf

    def forward(self, x: Tensor) -> Tensor:
        values = [_at(self, slot.name).reshape(-1) for slot in self._graph.slots]
        return run_graph(torch.cat(values), x, self._graph)


def _at(module: nn.Module, key: str) -> Any:
    *path, leaf = key.split(".")
    for part in path:
        module = module._modules[part]  # type: ignore[assignment]
    return getattr(module, leaf)


def as_module(architecture: Architecture) -> nn.Module:
    """An architecture as an ordinary module in evaluation mode, its state-dict keys the architecture's."""
    if architecture.planned:
        return _Chain(architecture).eval()
    require(architecture.graph is not None, f"architecture {architecture.name!r} could not be traced; its template is .module")
    assert architecture.graph is not None
    return GraphModule(architecture.graph).eval()


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
