"""From a graph back to a module: torch's own layers for a plain chain, one reference call per operation for any other network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.chains import chain_of
from ..kernels.graph import Graph
from ..kernels.layers import ACTIVATIONS, Activation, Conv2d, Dropout, Flatten, Layer, Layers, Linear, Pool2d
from ..kernels.reference import run_graph


def rebuilt(graph: Graph) -> nn.Module:
    """A float32 module in evaluation mode that computes what the graph does, its state-dict keys the graph's; its weights are fresh."""
    layers = chain_of(graph)
    plain = layers and all(type(layer) in _MODULES for layer in layers)
    return (_Chain(layers) if plain else GraphModule(graph)).to(torch.float32).eval()  # whatever torch's default type is


def _activation(layer: Activation) -> nn.Module:
    entry = ACTIVATIONS[layer.function]
    given = {"approximate": layer.approximate} if layer.function == "gelu" else {entry.argument: layer.parameter} if entry.argument else {}
    module: nn.Module = getattr(nn, entry.module)(**given)
    return module


# torch's own layer for each record. A chain with a record that is not here is rebuilt as a graph.
_MODULES: dict[type[Layer], Callable[[Any], nn.Module]] = {
    Conv2d: lambda r: nn.Conv2d(r.in_channels, r.out_channels, r.kernel_size, r.stride, r.padding, r.dilation, r.groups, r.bias),
    Linear: lambda r: nn.Linear(r.in_features, r.out_features, r.bias),
    Pool2d: lambda r: (nn.MaxPool2d if r.mode == "max" else nn.AvgPool2d)(r.kernel_size, r.stride),
    Flatten: lambda r: nn.Flatten(),
    Dropout: lambda r: nn.Dropout(r.p),
    Activation: _activation,
}


class _Chain(nn.Module):
    """Modules registered under the records' dotted names, so that state dicts fit."""

    def __init__(self, layers: Layers) -> None:
        super().__init__()
        self._order = []
        for layer in layers:
            owner, leaf = owner_of(self, layer.name)
            owner.add_module(leaf, _MODULES[type(layer)](layer))
            self._order.append(layer.name)

    def forward(self, x: Tensor) -> Tensor:
        for name in self._order:
            x = self.get_submodule(name)(x)
        return x


class GraphModule(nn.Module):
    """A graph as a module: parameters and buffers under their state-dict keys, one reference call per node."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self._graph = graph
        for slot in graph.slots:
            owner, leaf = owner_of(self, slot.name)
            if leaf.startswith("running_"):
                owner.register_buffer(leaf, torch.zeros(slot.shape))
            else:
                owner.register_parameter(leaf, nn.Parameter(torch.zeros(slot.shape)))
        for constant in graph.constants:
            if constant.kept:
                owner, leaf = owner_of(self, constant.name)
                owner.register_buffer(leaf, constant.value.clone())
        for key, name in graph.aliases:
            owner, leaf = owner_of(self, key)
            setattr(owner, leaf, _at(self, name))

    def forward(self, x: Tensor) -> Tensor:
        values = [_at(self, slot.name).reshape(-1) for slot in self._graph.slots]
        weights = torch.cat(values)
        return run_graph(weights, x if x.is_floating_point() else x.to(weights.dtype), self._graph)


def owner_of(module: nn.Module, key: str) -> tuple[nn.Module, str]:
    """The submodule that a dotted ``key`` is an entry of, and the entry's name in it. Submodules on the way that are absent are made."""
    *path, leaf = key.split(".")
    for part in path:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    return module, leaf


def _at(module: nn.Module, key: str) -> Any:
    *path, leaf = key.split(".")
    for part in path:
        module = module._modules[part]  # type: ignore[assignment]
    return getattr(module, leaf)
