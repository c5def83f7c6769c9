"""JAX's ``jit(vmap(value_and_grad))`` of the networks that are sequences of layers and residual blocks, where JAX is installed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from wslfast.architecture import Architecture

from .network_peers import STILL, Fused, flat
from .networks import Residual, Sine
from .providers import Unavailable


class Jax(Fused, name="jax-vmap"):
    """Weights and queries are JAX arrays before the clock runs; results are waited for."""

    def __init__(self, module: nn.Module, architecture: Architecture, k: int) -> None:
        if importlib.util.find_spec("jax") is None:
            raise Unavailable("jax is not installed")
        super().__init__(module, architecture, k)
        self.jax: Any = importlib.import_module("jax")
        self.numpy: Any = importlib.import_module("jax.numpy")

        def loss(parameters: Any, buffers: Any, queries: Any, target: Any) -> Any:
            outputs = self._run(module, "", queries, {**parameters, **buffers})
            return ((outputs - target) ** 2).sum() / (2 * outputs.shape[0])

        mapped = self.jax.vmap(self.jax.value_and_grad(loss), in_axes=(0, 0, None, 0))
        self.call = self.jax.jit(mapped)

    def _check(self, module: nn.Module) -> None:
        super()._check(module)
        for _, layer in flat(module):
            if type(layer).__name__ == "Apply":
                raise Unavailable("its forward is written in torch")

    def load(self, weights: Tensor) -> None:
        super().load(weights)
        self.parameters, self.buffers = ({n: self.numpy.asarray(v.numpy()) for n, v in d.items()} for d in (self.parameters, self.buffers))
        self.known: dict[int, Any] = {}

    def _array(self, tensor: Tensor) -> Any:
        """The tensor as an array, made once."""
        return self.known.setdefault(id(tensor), self.numpy.asarray(tensor.numpy()))

    def __call__(self, queries: Tensor, targets: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        losses, gradients = self.jax.block_until_ready(self.call(self.parameters, self.buffers, self._array(queries), self._array(targets)))
        return losses, gradients

    def rows(self, gradients: Mapping[str, Any]) -> Tensor:
        return super().rows({name: torch.from_numpy(self.jax.device_get(value).copy()) for name, value in gradients.items()})

    def _run(self, module: nn.Module, path: str, x: Any, of: Mapping[str, Any]) -> Any:
        for name, layer in flat(module, path):
            if isinstance(layer, Residual):
                made = self._run(layer.inner, f"{name}inner.", x, of) + self._run(layer.skip, f"{name}skip.", x, of)
                x = self._run(layer.after, f"{name}after.", made, of)
            else:
                x = self._one(layer, name, x, of)
        return x

    def _one(self, layer: nn.Module, path: str, x: Any, of: Mapping[str, Any]) -> Any:
        jnp, lax, functions = self.numpy, self.jax.lax, self.jax.nn
        weight, bias = of.get(f"{path}weight"), of.get(f"{path}bias")
        along = (1, -1, *(1,) * (x.ndim - 2))
        if isinstance(layer, (nn.Conv1d, nn.Conv2d)):
            if isinstance(layer.padding, str):
                raise Unavailable("padding by name")
            letters = "NCHW"[: x.ndim], "OIHW"[: x.ndim], "NCHW"[: x.ndim]
            around = [(p, p) for p in layer.padding]
            x = lax.conv_general_dilated(
                x, weight, layer.stride, around, rhs_dilation=layer.dilation, dimension_numbers=letters, feature_group_count=layer.groups
            )
            return x if bias is None else x + bias.reshape(along)
        if isinstance(layer, nn.Linear):
            return x @ weight.T if bias is None else x @ weight.T + bias
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            mean, variance = of[f"{path}running_mean"], of[f"{path}running_var"]
            x = (x - mean.reshape(along)) * lax.rsqrt(variance + layer.eps).reshape(along)
            return x if weight is None else x * weight.reshape(along) + bias.reshape(along)
        if isinstance(layer, nn.GroupNorm):
            grouped = x.reshape(x.shape[0], layer.num_groups, -1)
            made = (grouped - grouped.mean(-1, keepdims=True)) * lax.rsqrt(grouped.var(-1, keepdims=True) + layer.eps)
            return made.reshape(x.shape) * weight.reshape(along) + bias.reshape(along)
        if isinstance(layer, nn.LayerNorm):
            return (x - x.mean(-1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True) + layer.eps) * weight + bias
        if isinstance(layer, (nn.MaxPool2d, nn.AvgPool2d)):
            size = (layer.kernel_size,) * 2 if isinstance(layer.kernel_size, int) else layer.kernel_size
            window = (1, 1, *size)
            if isinstance(layer, nn.MaxPool2d):
                return lax.reduce_window(x, -jnp.inf, lax.max, window, window, "VALID")
            return lax.reduce_window(x, 0.0, lax.add, window, window, "VALID") / (size[0] * size[1])
        if isinstance(layer, (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)):
            return x.mean(tuple(range(2, x.ndim)), keepdims=True)
        if isinstance(layer, nn.Flatten):
            return x.reshape(x.shape[0], -1)
        made_by = {
            nn.ReLU: functions.relu, nn.Tanh: jnp.tanh, nn.Sigmoid: functions.sigmoid, nn.SiLU: functions.silu, nn.ReLU6: functions.relu6,
            nn.GELU: lambda v: functions.gelu(v, approximate=False), nn.LogSoftmax: lambda v: functions.log_softmax(v, -1),
            Sine: lambda v: jnp.sin(30 * v), nn.Softplus: lambda v: functions.softplus(100 * v) / 100,
        }  # fmt: skip
        return x if isinstance(layer, STILL) else made_by[type(layer)](x)
