"""What a model is: the static description that all models of a population share.

An :class:`Architecture` is either *planned*, a tuple of layer records (``kernels/layers.py``) that every engine can run on
stacked weights, or *opaque*, any other ``torch.nn.Module``, run through ``torch.func.functional_call``. The published
networks are class methods; their module orders, key names and initialisations are those of the model-zoo code that the
field's zoos were made with (``module_list.{i}``, all biases 0.01).
"""

from __future__ import annotations

import itertools
import json
import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from . import networks, tracing
from .errors import WslfastError, describe, require
from .kernels.layers import (
    ACTIVATIONS,
    RECORDS,
    Activation,
    Conv2d,
    Dropout,
    Flatten,
    Layer,
    Layers,
    Linear,
    Pool2d,
    Slot,
    check_layer,
    layer_from_dict,
    layer_slots,
    layer_to_dict,
    shapes,
)

INITIALISATIONS = (
    "uniform", "normal", "kaiming_uniform", "kaiming_normal", "xavier_uniform", "xavier_normal", "default",
)  # fmt: skip
_BIAS = 0.01  # every bias of a published zoo starts here


@dataclass(frozen=True)
class Architecture:
    """A frozen layer list with the names and shapes of its parameters.

    Attributes:
        name: what to call it.
        input_shape: shape of one query, ``(C, H, W)`` or ``(features,)``.
        layers: the layer records; empty for an opaque architecture.
        parameters: name, shape and offset of every entry of a row of weights, in state-dict key order. Batch norm's
            running statistics are entries too (a network is not the same function without them); its step counter is not.
            A parameter that several keys share is one entry, under its first key.
        module: the opaque architecture's template, in evaluation mode; None when planned.
    """

    name: str
    input_shape: tuple[int, ...]
    layers: Layers
    parameters: tuple[Slot, ...]
    module: nn.Module | None = field(default=None, repr=False)
    recipe: tuple[str, tuple[tuple[str, Any], ...]] | None = field(default=None, repr=False)
    handle: str = field(init=False, repr=False, compare=False)  # what torch operators take in its place, see from_handle

    def __post_init__(self) -> None:
        object.__setattr__(self, "handle", _handle(self))

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        object.__setattr__(self, "handle", _handle(self))

    # -- sizes ---------------------------------------------------------------------------------------------------------

    @property
    def planned(self) -> bool:
        """Whether the engines can run it on stacked weights without ``functional_call``."""
        return self.module is None

    @cached_property
    def num_weights(self) -> int:
        """P: numbers in one row of weights (trainable parameters, and running statistics where there are any)."""
        return sum(p.size for p in self.parameters)

    @cached_property
    def num_parameters(self) -> int:
        """Trainable parameters."""
        if self.module is None:
            return self.num_weights
        return sum(p.numel() for p in self.module.parameters())

    @cached_property
    def num_classes(self) -> int:
        """K: numbers in one output."""
        if self.module is None:
            return shapes(self.layers, self.input_shape)[-1][0]
        with torch.no_grad():
            return int(self.module(torch.zeros(1, *self.input_shape)).shape[-1])

    @cached_property
    def aliases(self) -> dict[str, str]:
        """Further state-dict keys of tied parameters, by the name of the one entry that holds each."""
        return {} if self.module is None else _aliases(self.module)

    @cached_property
    def constants(self) -> dict[str, Tensor]:
        """Integer and boolean buffers by name: part of the network, the same for all models, not of a row of weights."""
        if self.module is None:
            return {}
        state = self.module.state_dict().items()
        return {key: t for key, t in state if not t.is_floating_point() and not key.endswith("num_batches_tracked")}

    @cached_property
    def slots(self) -> dict[str, Slot]:
        """Parameters by name."""
        return {p.name: p for p in self.parameters}

    # -- construction --------------------------------------------------------------------------------------------------

    @classmethod
    def from_layers(cls, layers: Sequence[Layer], input_shape: Sequence[int], name: str = "custom") -> Architecture:
        """An architecture from layer records. Raises WslfastError naming a layer that does not fit its input."""
        layers, shape = tuple(layers), _input_shape(input_shape)
        wrong = [describe(layer) for layer in layers if type(layer) not in RECORDS.values()]
        require(not wrong, f"layers: expected records of wslfast.kernels.layers, got {wrong[:3]}")
        try:
            for layer in layers:
                check_layer(layer)
            out = shapes(layers, shape)[-1]
        except ValueError as error:
            raise WslfastError(f"architecture {name!r}: {error}") from None
        require(len(out) == 1, f"architecture {name!r}: expected outputs [n, K], got [n, {', '.join(map(str, out))}]; add a Flatten")
        slots = [s for pair in layer_slots(layers) for s in (pair.weight, pair.bias) if s is not None]
        require(bool(slots), f"architecture {name!r}: it has no parameters")
        require(len({s.name for s in slots}) == len(slots), f"architecture {name!r}: two layers share a name")
        return cls(name, shape, layers, tuple(slots))

    @classmethod
    def from_module(cls, module: nn.Module, input_shape: Sequence[int], name: str | None = None) -> Architecture:
        """An architecture from any module that maps ``[n, *input_shape]`` to ``[n, K]``.

        A chain of convolutions, pools, activations, flattens, linears and dropouts (nn.Sequential, a ModuleList walked in
        ``forward``, functional calls) becomes a planned architecture; its plan is checked against the module on random
        input. Anything else (residuals, batch norm, ...) stays opaque and runs through ``torch.func.functional_call``.
        The module's own weights are not kept.
        """
        require(isinstance(module, nn.Module), f"module: expected a torch.nn.Module, got {type(module).__name__}")
        shape = _input_shape(input_shape)
        template = tracing.unwrapped(module, name or type(module).__name__)
        name = name or type(template).__name__
        layers = tracing.layers_of(template, shape)
        if layers is not None:
            return cls.from_layers(layers, shape, name)
        return cls._from_template(template, shape, name)

    @classmethod
    def _opaque(cls, module: nn.Module, input_shape: tuple[int, ...], name: str, recipe: Any = None) -> Architecture:
        return cls._from_template(tracing.unwrapped(module, name), input_shape, name, recipe)

    @classmethod
    def _from_template(cls, template: nn.Module, input_shape: tuple[int, ...], name: str, recipe: Any = None) -> Architecture:
        slots, offset = [], 0
        aliases = _aliases(template)
        for key, tensor in template.state_dict().items():
            if tensor.is_floating_point() and key not in aliases:
                slots.append(Slot(key, tuple(tensor.shape), offset))
                offset = slots[-1].stop
        require(bool(slots), f"architecture {name!r}: it has no parameters")
        if recipe is None:  # a published network is known to pass
            out = tracing.check_template(template, input_shape, name)
            require(isinstance(out, Tensor) and out.ndim == 2 and len(out) == 4, f"architecture {name!r}: expected outputs [n, K]")
        return cls(name, input_shape, (), tuple(slots), template, recipe)

    @classmethod
    def cnn(cls, channels_in: int = 1, activation: str = "relu", dropout: float = 0.0) -> Architecture:
        """The published 28x28 ``CNN``: 2,464 parameters for one input channel."""
        return _cnn28("cnn", channels_in, (8, 6, 4), activation, dropout)

    @classmethod
    def cnn2(cls, channels_in: int = 1, activation: str = "relu", dropout: float = 0.0) -> Architecture:
        """The published 28x28 ``CNN2``: 3,047 parameters for one input channel."""
        return _cnn28("cnn2", channels_in, (6, 9, 6), activation, dropout)

    @classmethod
    def cnn3(cls, channels_in: int = 3, activation: str = "relu", dropout: float = 0.0) -> Architecture:
        """The published 32x32 ``CNN3``: 10,853 parameters for three input channels."""
        build = _Builder()
        channels = channels_in
        for out in (16, 32, 15):
            build.conv(channels, out, 3).pool().act(activation).dropout(dropout)
            channels = out
        build.flatten().linear(60, 20).act(activation).dropout(dropout).linear(20, 10)
        return cls.from_layers(build.layers, (channels_in, 32, 32), "cnn3")

    @classmethod
    def lenet5(cls, channels_in: int = 3, activation: str = "relu", dropout: float = 0.0) -> Architecture:
        """The published 32x32 ``LeNet5`` (activation before pooling): 62,006 parameters for three input channels."""
        build = _Builder()
        build.conv(channels_in, 6, 5).act(activation).pool().dropout(dropout)
        build.conv(6, 16, 5).act(activation).pool().dropout(dropout)
        build.flatten().linear(400, 120).act(activation).dropout(dropout)
        build.linear(120, 84).act(activation).dropout(dropout).linear(84, 10)
        return cls.from_layers(build.layers, (channels_in, 32, 32), "lenet5")

    @classmethod
    def mlp(
        cls,
        i_dim: int = 14,
        h_dim: Sequence[int] = (30, 15),
        o_dim: int = 10,
        activation: str = "leakyrelu",
        dropout: float = 0.2,
        use_bias: bool = True,
    ) -> Architecture:
        """The published ``MLP`` on flat inputs: 1,075 parameters with the defaults."""
        build, dropout = _Builder(), _probability(dropout)
        sizes = [i_dim, *h_dim]
        for a, b in pairwise(sizes):
            build.linear(a, b, use_bias).act(activation)
            if dropout > 0:
                build.dropout(dropout)
        return cls.from_layers(build.linear(sizes[-1], o_dim, use_bias).layers, (i_dim,), "mlp")

    @classmethod
    def resnet18(cls, channels_in: int = 3, num_classes: int = 10, width: int = 64) -> Architecture:
        """ResNet-18 for 32x32 images (3x3 stem, no stem pooling), torchvision's key names; opaque: 11,173,962 parameters."""
        arguments = {"channels_in": channels_in, "num_classes": num_classes, "width": width}
        for argument, value in arguments.items():
            _positive(argument, value)
        recipe = ("resnet18", tuple(arguments.items()))
        with torch.random.fork_rng(devices=[]):
            module = networks.ResNet18(**arguments)
        return cls._opaque(module, (channels_in, 32, 32), "resnet18", recipe)

    # -- weights -------------------------------------------------------------------------------------------------------

    def initial_weights(self, initialisations: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Fresh weights ``[k, P]`` of k models, each from its own initialisation and seed (reference: the zoo code's ``init_type``).

        ``uniform`` is U[0, 1] and ``normal`` N(0, 1), as published; ``default`` is torch's own layer initialisation with its
        biases. A model's row depends on its own initialisation and seed alone.
        """
        require(self.planned, f"initial_weights: architecture {self.name!r} is opaque; initialise its module instead")
        require(len(initialisations) == len(seeds), f"initial_weights: {len(initialisations)} initialisations for {len(seeds)} seeds")
        weights = torch.empty(len(seeds), self.num_weights)
        for row, initialisation, seed in zip(weights, initialisations, seeds, strict=True):
            require(initialisation in INITIALISATIONS, f"initialisation: expected one of {INITIALISATIONS}, got {initialisation!r}")
            generator = torch.Generator().manual_seed(int(seed))
            for pair in layer_slots(self.layers):
                if pair.weight is not None:
                    weight = row[pair.weight.offset : pair.weight.stop].view(pair.weight.shape)
                    bias = None if pair.bias is None else row[pair.bias.offset : pair.bias.stop]
                    _initialise(weight, bias, initialisation, generator)
        return weights

    # -- JSON ----------------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form for a zoo's manifest; an opaque architecture that is not a published one keeps names and shapes only."""
        record: dict[str, Any] = {"name": self.name, "input_shape": list(self.input_shape)}
        if self.planned:
            return record | {"layers": [layer_to_dict(layer) for layer in self.layers]}
        if self.recipe is not None:
            return record | {"recipe": [self.recipe[0], dict(self.recipe[1])]}
        return record | {"parameters": [[p.name, list(p.shape)] for p in self.parameters]}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Architecture:
        """Rebuild from :meth:`to_dict`'s form. Raises WslfastError for an opaque one, which must be passed by its user."""
        require(isinstance(record, Mapping), f"architecture: expected an object, got {type(record).__name__}")
        shape = record.get("input_shape")
        require(
            isinstance(shape, (list, tuple)) and len(shape) in (1, 3) and all(type(s) is int and 0 < s < 1 << 20 for s in shape),
            f"architecture: input_shape is one or three positive integers, got {shape!r}",
        )
        assert isinstance(shape, (list, tuple))
        name = str(record.get("name", "custom"))
        if isinstance(record.get("layers"), list):
            try:
                return cls.from_layers([layer_from_dict(r) for r in record["layers"]], shape, name)
            except ValueError as error:
                raise WslfastError(f"architecture {name!r}: {error}") from None
        recipe = record.get("recipe")
        if isinstance(recipe, (list, tuple)) and len(recipe) == 2 and recipe[0] == "resnet18" and isinstance(recipe[1], dict):
            require(
                set(recipe[1]) <= {"channels_in", "num_classes", "width"}
                and all(type(v) is int and 0 < v <= 256 for v in recipe[1].values()),  # a manifest must not allocate at will
                f"architecture {name!r}: expected resnet18 arguments up to 256, got {recipe[1]!r}",
            )
            return cls.resnet18(**recipe[1])
        raise WslfastError(f"architecture {name!r} has no layer list; pass architecture= (the module the zoo was made with)")


_opaque_handles = itertools.count()
_opaque_architectures: weakref.WeakValueDictionary[str, Architecture] = weakref.WeakValueDictionary()


def _handle(architecture: Architecture) -> str:
    if architecture.planned:
        return json.dumps(architecture.to_dict())
    handle = f"{architecture.name} ({next(_opaque_handles)})"
    _opaque_architectures[handle] = architecture
    return handle


def from_handle(handle: str) -> Architecture:
    """The architecture behind a ``handle``: a planned one anywhere, an opaque one while somebody holds it in this process."""
    found = _opaque_architectures.get(handle)
    return found if found is not None else _planned(handle)


@lru_cache(maxsize=64)
def _planned(handle: str) -> Architecture:
    require(handle.startswith("{"), f"architecture {handle!r}: an opaque architecture has to be kept as long as what was compiled with it")
    return Architecture.from_dict(json.loads(handle))


def _input_shape(value: Sequence[int]) -> tuple[int, ...]:
    sizes = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else ()
    whole = all(isinstance(s, int) and not isinstance(s, bool) and s > 0 for s in sizes)
    require(whole and len(sizes) in (1, 3), f"input_shape: expected (C, H, W) or (features,), positive integers, got {value!r:.80}")
    return tuple(int(s) for s in sizes)


def _positive(argument: str, value: object) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool) and value > 0
    require(whole, f"{argument}: expected a positive integer, got {value!r:.40}")


def _probability(p: float) -> float:
    number = isinstance(p, (int, float)) and not isinstance(p, bool)
    require(number and 0.0 <= p < 1.0, f"dropout: expected a probability in [0, 1), got {p!r:.40}")
    return float(p)


def _aliases(module: nn.Module) -> dict[str, str]:
    first: dict[int, str] = {}
    names = {key: first.setdefault(id(tensor), key) for key, tensor in module.state_dict(keep_vars=True).items()}
    return {key: name for key, name in names.items() if key != name}


class _Builder:
    """Appends records named ``module_list.{i}``, i counting every module as the published code does."""

    def __init__(self) -> None:
        self.layers: list[Layer] = []

    @property
    def _name(self) -> str:
        return f"module_list.{len(self.layers)}"

    def conv(self, channels_in: int, channels_out: int, kernel: int) -> _Builder:
        _positive("channels_in", channels_in)
        self.layers.append(Conv2d(self._name, channels_in, channels_out, (kernel, kernel)))
        return self

    def linear(self, features_in: int, features_out: int, bias: bool = True) -> _Builder:
        self.layers.append(Linear(self._name, features_in, features_out, bias))
        return self

    def pool(self) -> _Builder:
        self.layers.append(Pool2d(self._name))
        return self

    def act(self, function: str) -> _Builder:
        function = str(function).replace("_", "")
        require(function in ACTIVATIONS, f"activation: expected one of {ACTIVATIONS}, got {function!r}")
        self.layers.append(Activation(self._name, function))
        return self

    def flatten(self) -> _Builder:
        self.layers.append(Flatten(self._name))
        return self

    def dropout(self, p: float) -> _Builder:
        self.layers.append(Dropout(self._name, _probability(p)))
        return self


def _cnn28(name: str, channels_in: int, widths: tuple[int, int, int], activation: str, dropout: float) -> Architecture:
    build, dropout = _Builder(), _probability(dropout)

    def drop() -> None:
        if dropout > 0:
            build.dropout(dropout)

    build.conv(channels_in, widths[0], 5).pool().act(activation)
    drop()
    build.conv(widths[0], widths[1], 5).pool().act(activation)
    drop()
    build.conv(widths[1], widths[2], 2).act(activation).flatten().linear(9 * widths[2], 20).act(activation)
    drop()
    return Architecture.from_layers(build.linear(20, 10).layers, (channels_in, 28, 28), name)


def _initialise(weight: Tensor, bias: Tensor | None, initialisation: str, generator: torch.Generator) -> None:
    if initialisation == "default":
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)
        if bias is not None:
            bound = 1 / math.sqrt(math.prod(weight.shape[1:]))
            nn.init.uniform_(bias, -bound, bound, generator=generator)
        return
    getattr(nn.init, f"{initialisation}_")(weight, generator=generator)
    if bias is not None:
        bias.fill_(_BIAS)
