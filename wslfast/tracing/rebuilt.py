"""From a graph back to a module: torch's own layers for a plain chain, one reference call an operation for any other network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.chains import chain_of
from ..kernels.graph import Graph
from ..kernels.layers import Activation, Conv2d, Dropout, Flatten, Layer, Layers, Linear, Pool2d
from ..kernels.reference import run_graph

_ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "silu": nn.SiLU, "identity": nn.Identity}
_WITH_PARAMETER = {"leakyrelu": nn.LeakyReLU, "elu": nn.ELU, "celu": nn.CELU, "softplus": nn.Softplus}


def rebuilt(graph: Graph) -> nn.Module:
    """A module in evaluation mode that computes what the graph does, its state-dict keys the graph's; its weights are fresh."""
    layers = chain_of(graph)
    return (_Chain(layers) if layers else GraphModule(graph)).eval()


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

    def __init__(self, layers: Layers) -> None:
        super().__init__()
        self._order = []
        for layer in layers:
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
