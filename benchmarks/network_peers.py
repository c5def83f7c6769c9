"""What one would use for any network instead: each a class that is given a module and k models' weights, and computes the loss and the
gradients of all parameters. Making it and loading weights are not on the clock.

The loss is ``1 / 2n`` of the squared differences to given targets, of each model. Running statistics and other buffers are no parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wslfast.architecture import Architecture
from wslfast.behavior import batched_behavioral_loss
from wslfast.population import Population, unstack

from .networks import Apply, Residual, Sine
from .providers import Unavailable

PEERS: dict[str, type[Peer]] = {}
OURS = "wslfast-torch"


def loss_of(outputs: Tensor, targets: Tensor) -> Tensor:
    """1 / 2n sum (f - y)^2 of one model."""
    return (outputs - targets).square().sum() / (2 * len(outputs))


class Peer:
    """k models of a module.

    Args:
        module: a network, in evaluation mode.
        architecture: the same, for names and places of its parameters.
        k: models.
    """

    def __init__(self, module: nn.Module, architecture: Architecture, k: int) -> None:
        self.module, self.architecture, self.k = module, architecture, k

    def __init_subclass__(cls, name: str) -> None:
        PEERS[name] = cls

    def load(self, weights: Tensor) -> None:
        """Take the models' weights ``[k, P]``."""
        parts = unstack(weights, self.architecture)
        parts |= {key: parts[name] for key, name in self.architecture.aliases.items()}
        self.buffers = {name: value for name, value in parts.items() if name in self.architecture.untrained}
        self.parameters = {name: value.contiguous() for name, value in parts.items() if name not in self.architecture.untrained}

    def __call__(self, queries: Tensor, targets: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Losses ``[k]``, and gradients ``[k, *shape]`` by name or, of a loop, one after another."""
        raise NotImplementedError

    def rows(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """Gradients as rows ``[k, P]``, zeros for what is no parameter; not on the clock."""
        parts = [
            gradients[s.name].reshape(self.k, -1) if s.name in gradients else torch.zeros(self.k, s.size)
            for s in self.architecture.parameters
        ]
        return torch.cat([part.double() for part in parts], 1)


class Loop(Peer, name="loop"):
    """k modules, one after another."""

    last = False

    def load(self, weights: Tensor) -> None:
        population = Population(self.architecture, weights)
        self.modules = []
        for j in range(self.k):
            module = copy.deepcopy(self.module)
            module.load_state_dict(population.state_dict(j), strict=False)
            if self.last:
                module = module.to(memory_format=torch.channels_last)
            self.modules.append(module.to(weights.dtype))

    def __call__(self, queries: Tensor, targets: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        if self.last:
            queries = queries.contiguous(memory_format=torch.channels_last)
        losses, found = [], []
        for module, target in zip(self.modules, targets, strict=True):
            loss = loss_of(module(queries), target)
            found.append(torch.autograd.grad(loss, list(module.parameters())))
            losses.append(loss.detach())
        names = [name for name, _ in self.modules[0].named_parameters()]
        self.found = found
        return torch.stack(losses), {name: found[0][i] for i, name in enumerate(names)}

    def rows(self, gradients: Mapping[str, Tensor]) -> Tensor:
        return super().rows({name: torch.stack([one[i] for one in self.found]) for i, name in enumerate(gradients)})


class LoopChannelsLast(Loop, name="loop-channels-last"):
    """The same with images and kernels channels-last."""

    last = True

    def __init__(self, module: nn.Module, architecture: Architecture, k: int) -> None:
        if len(architecture.input_shape) != 3:
            raise Unavailable("its queries are no images")
        super().__init__(module, architecture, k)


class Vmap(Peer, name="vmap"):
    """``torch.func``: vmap of grad over the models."""

    def __init__(self, module: nn.Module, architecture: Architecture, k: int) -> None:
        super().__init__(module, architecture, k)
        self.run = self._mapped()

    def _mapped(self) -> Callable[..., Any]:
        def one(parameters: dict[str, Tensor], buffers: dict[str, Tensor], queries: Tensor, target: Tensor) -> Tensor:
            return loss_of(torch.func.functional_call(self.module, (parameters, buffers), (queries,)), target)

        return torch.vmap(torch.func.grad_and_value(one), in_dims=(0, 0, None, 0))

    def __call__(self, queries: Tensor, targets: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        gradients, losses = self.run(self.parameters, self.buffers, queries, targets)
        return losses, gradients


class VmapCompiled(Vmap, name="vmap-compiled"):
    """The same under ``torch.compile``, for one shape (needs a C++ compiler on a CPU)."""

    def _mapped(self) -> Callable[..., Any]:
        torch.compiler.reset()
        return torch.compile(super()._mapped(), dynamic=False)  # type: ignore[no-any-return]


class VmapForward(Peer, name="vmap-forward"):
    """vmap of the forward pass, and one ordinary backward."""

    def __call__(self, queries: Tensor, targets: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        leaves = {name: value.detach().requires_grad_() for name, value in self.parameters.items()}
        forward = torch.vmap(lambda p, b: torch.func.functional_call(self.module, (p, b), (queries,)))
        return _differentiated(forward(leaves, self.buffers), targets, leaves)


def _differentiated(outputs: Tensor, targets: Tensor, leaves: dict[str, Tensor]) -> tuple[Tensor, Mapping[str, Tensor]]:
    losses = (outputs - targets).square().flatten(1).sum(1) / (2 * outputs.shape[1])
    gradients = torch.autograd.grad(losses.sum(), list(leaves.values()))
    return losses.detach(), dict(zip(leaves, gradients, strict=True))


def flat(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The layers of nested sequences, in order, with their paths; a residual block stays one layer."""
    if isinstance(module, nn.Sequential):
        for name, child in module.named_children():
            yield from flat(child, f"{path}{name}.")
    else:
        yield path, module


ELEMENTWISE = (nn.ReLU, nn.Tanh, nn.Sigmoid, nn.SiLU, nn.GELU, nn.ReLU6, nn.Softplus, Sine)
STILL = (nn.Dropout, nn.Identity)


class Fused(Peer, name="fused"):
    """Horizontally fused layers, as HFTA has them (Wang et al. 2021): convolutions with the models as groups, norms over all models'
    channels, linear layers as batched products, one ordinary backward. For sequences of layers and residual blocks."""

    def __init__(self, module: nn.Module, architecture: Architecture, k: int) -> None:
        super().__init__(module, architecture, k)
        self._check(module)

    def _check(self, module: nn.Module) -> None:
        for _, layer in flat(module):
            if isinstance(layer, Residual):
                for part in (layer.inner, layer.skip, layer.after):
                    self._check(part)
                continue
            fits = (nn.Conv1d, nn.Conv2d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm, nn.Flatten, nn.MaxPool2d, nn.AvgPool2d)
            known = (*fits, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.LayerNorm, nn.LogSoftmax, *ELEMENTWISE, *STILL)
            if not (type(layer) in known or (isinstance(layer, Apply) and layer.elementwise)):
                raise Unavailable(f"it has no fused form for {type(layer).__name__}")

    def __call__(self, queries: Tensor, targets: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        leaves = {name: value.detach().requires_grad_() for name, value in self.parameters.items()}
        x = self._through(self.module, "", queries, {**leaves, **self.buffers})
        return _differentiated(x, targets, leaves)

    def _through(self, module: nn.Module, path: str, x: Tensor, of: Mapping[str, Tensor]) -> Tensor:
        for name, layer in flat(module, path):
            if isinstance(layer, Residual):
                if not self._stacked(x):
                    x = self._spread(x)
                made = self._through(layer.inner, f"{name}inner.", x, of) + self._through(layer.skip, f"{name}skip.", x, of)
                x = self._through(layer.after, f"{name}after.", made, of)
            else:
                x = self._layer(layer, name, x, of)
        return x

    def _stacked(self, x: Tensor) -> bool:
        """Whether the models are in it: before the first layer with weights they are not."""
        return (x.ndim == 3 and x.shape[0] == self.k) or (x.ndim > 2 and x.shape[1] % self.k == 0 and x.shape[1] >= self.k)

    def _spread(self, x: Tensor) -> Tensor:
        return x.repeat(1, self.k, *(1,) * (x.ndim - 2)) if x.ndim > 2 else x.expand(self.k, *x.shape)

    def _layer(self, layer: nn.Module, path: str, x: Tensor, of: Mapping[str, Tensor]) -> Tensor:
        k = self.k
        weight, bias = of.get(f"{path}weight", None), of.get(f"{path}bias", None)
        if isinstance(layer, (nn.Conv1d, nn.Conv2d)):
            assert weight is not None
            shared = x.shape[1] == layer.in_channels and k > 1
            if shared and layer.groups > 1:
                x, shared = self._spread(x), False
            convolution: Any = F.conv1d if isinstance(layer, nn.Conv1d) else F.conv2d
            groups = layer.groups * (1 if shared else k)
            return convolution(  # type: ignore[no-any-return]
                x, weight.flatten(0, 1), None if bias is None else bias.flatten(), layer.stride, layer.padding, layer.dilation, groups
            )
        if isinstance(layer, nn.Linear):
            assert weight is not None
            x = x if x.ndim == 3 else x.expand(k, *x.shape)
            return torch.bmm(x, weight.mT) if bias is None else torch.baddbmm(bias.unsqueeze(1), x, weight.mT)
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            columns = layer.num_features == x.shape[-1] and x.ndim == 3 and isinstance(layer, nn.BatchNorm1d)
            y = x.transpose(0, 1).flatten(1) if columns else x
            parts = [p if p is None else p.flatten() for p in (of[f"{path}running_mean"], of[f"{path}running_var"], weight, bias)]
            y = F.batch_norm(y, parts[0], parts[1], parts[2], parts[3], False, 0.0, layer.eps)
            return y.unflatten(1, (k, -1)).transpose(0, 1) if columns else y
        if isinstance(layer, nn.GroupNorm):
            assert weight is not None
            assert bias is not None
            return F.group_norm(x, layer.num_groups * k, weight.flatten(), bias.flatten(), layer.eps)
        if isinstance(layer, nn.LayerNorm):
            assert weight is not None
            assert bias is not None
            return F.layer_norm(x, layer.normalized_shape, eps=layer.eps) * weight.unsqueeze(1) + bias.unsqueeze(1)
        if isinstance(layer, nn.Flatten):
            return x.unflatten(1, (k, -1)).transpose(0, 1).flatten(2)
        if isinstance(layer, nn.LogSoftmax):
            return x.log_softmax(-1)
        return layer(x)  # type: ignore[no-any-return]


class Ours(Peer, name=OURS):
    """The library's own call, as a user on this device meets it: its checks and its part in autograd are on the clock."""

    def load(self, weights: Tensor) -> None:
        self.weights = weights

    def __call__(self, queries: Tensor, targets: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        leaf = self.weights.detach().requires_grad_()
        losses = batched_behavioral_loss(leaf, None, queries, self.architecture, targets=targets, reduction="none")
        (gradient,) = torch.autograd.grad(losses.sum(), leaf)
        return losses.detach(), {"rows": gradient}

    def rows(self, gradients: Mapping[str, Tensor]) -> Tensor:
        trained = torch.ones(self.architecture.num_weights, dtype=torch.float64)
        for slot in self.architecture.parameters:
            if slot.name in self.architecture.untrained:
                trained[slot.offset : slot.stop] = 0
        return gradients["rows"].double() * trained
