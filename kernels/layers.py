"""Layer records: what a network is, before any weights.

A network that wslfast can run as a *population* (k models of one architecture with their own weights) is a tuple of
these records. Everything here is plain data: frozen, hashable, comparable, JSON-able, so that a tuple of records can be
a cache key, the constexpr a kernel is specialised on, and an entry in a zoo's manifest.

Weights of one model are a row of ``P`` numbers: layer after layer, weight before bias, C-order within each (which is
state-dict order for a sequential module).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, NamedTuple, Union

from .graph import Slot

Pair = tuple[int, int]

_LARGEST = (1 << 31) - 1
_LONGEST_NAME = 500


class Elementwise(NamedTuple):
    """What an activation is: its operation in operations.py (none for the identity), its class in torch.nn, the argument that a record's
    ``parameter`` is, and torch's default for it."""

    operation: str
    module: str
    argument: str | None = None
    default: float = 0.0


# ONE table of the activations that a record may name. The wings for chains may have an entry of their own (``cpu/activations.py``,
# ``triton/activations.py``): a network with an activation that a wing does not know runs elsewhere.
ACTIVATIONS: dict[str, Elementwise] = {
    "relu": Elementwise("relu", "ReLU"),
    "leakyrelu": Elementwise("leaky_relu", "LeakyReLU", "negative_slope", 0.01),
    "tanh": Elementwise("tanh", "Tanh"),
    "sigmoid": Elementwise("sigmoid", "Sigmoid"),
    "silu": Elementwise("silu", "SiLU"),
    "gelu": Elementwise("gelu", "GELU"),
    "elu": Elementwise("elu", "ELU", "alpha", 1.0),
    "celu": Elementwise("celu", "CELU", "alpha", 1.0),
    "softplus": Elementwise("softplus", "Softplus", "beta", 1.0),
    "identity": Elementwise("", "Identity"),
}


class Unplannable(ValueError):
    """A layer that a kernel cannot be specialised on; the message names the layer."""


@dataclass(frozen=True)
class Conv2d:
    """2-d cross-correlation, zero padding; weight ``[out_channels, in_channels / groups, *kernel_size]``."""

    kind: ClassVar[str] = "conv2d"
    name: str
    in_channels: int
    out_channels: int
    kernel_size: Pair
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    bias: bool = True

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    @property
    def spacing(self) -> Pair:
        """Pixels from tap to tap: the dilation, but 1 along an axis with a single tap, where it means nothing. oneDNN's channels-last
        convolutions (torch 2.13) end the process for some images if they are told another dilation there."""
        return tuple(d if k > 1 else 1 for d, k in zip(self.dilation, self.kernel_size, strict=True))  # type: ignore[return-value]


@dataclass(frozen=True)
class Linear:
    """Affine map; weight ``[out_features, in_features]``."""

    kind: ClassVar[str] = "linear"
    name: str
    in_features: int
    out_features: int
    bias: bool = True

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.out_features, self.in_features)


@dataclass(frozen=True)
class Pool2d:
    """Max or average pooling; windows that do not fit are dropped (floor). Only chains inside a graph have padding."""

    kind: ClassVar[str] = "pool2d"
    name: str
    mode: str = "max"
    kernel_size: Pair = (2, 2)
    stride: Pair = (2, 2)
    padding: Pair = (0, 0)

    def tiles(self, image: tuple[int, ...]) -> bool:
        """Whether every pixel of an image ``[H, W]`` is in exactly one window."""
        whole = all(size % kernel == 0 for size, kernel in zip(image, self.kernel_size, strict=True))
        return whole and self.kernel_size == self.stride and self.padding == (0, 0)


@dataclass(frozen=True)
class Activation:
    """Elementwise nonlinearity. ``parameter`` is leakyrelu's slope (0.01), elu's and celu's alpha (1) or softplus' beta (1), and 0 for the
    others."""

    kind: ClassVar[str] = "activation"
    name: str
    function: str = "relu"
    parameter: float = None  # type: ignore[assignment]  # None: torch's default, filled in below
    approximate: str = "none"  # gelu only: "none" or "tanh"

    def __post_init__(self) -> None:
        if self.parameter is None:
            entry = ACTIVATIONS.get(self.function) if isinstance(self.function, str) else None
            object.__setattr__(self, "parameter", entry.default if entry is not None else 0.0)


@dataclass(frozen=True)
class Flatten:
    """``[n, C, H, W] -> [n, C * H * W]``, C-order."""

    kind: ClassVar[str] = "flatten"
    name: str


@dataclass(frozen=True)
class Dropout:
    """Kept for its place in the key names; a population is always run in evaluation mode, where it is the identity."""

    kind: ClassVar[str] = "dropout"
    name: str
    p: float = 0.0


@dataclass(frozen=True)
class Affine:
    """A factor and a shift a channel: a norm in evaluation mode. Only chains inside a graph have it, files never."""

    kind: ClassVar[str] = "affine"
    name: str
    channels: int
    bias: ClassVar[bool] = True

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.channels,)


Layer = Union[Conv2d, Linear, Pool2d, Activation, Flatten, Dropout, Affine]
Layers = tuple[Layer, ...]
RECORDS: dict[str, type] = {r.kind: r for r in (Conv2d, Linear, Pool2d, Activation, Flatten, Dropout)}


@dataclass(frozen=True)
class LayerSlots:
    """The slots of one layer; both None for a layer without parameters."""

    weight: Slot | None = None
    bias: Slot | None = None


def layer_slots(layers: Layers) -> tuple[LayerSlots, ...]:
    """Slots of every layer's weight and bias, in layer order."""
    slots, offset = [], 0
    for layer in layers:
        if not isinstance(layer, (Conv2d, Linear, Affine)):
            slots.append(LayerSlots())
            continue
        weight = Slot(f"{layer.name}.weight", layer.weight_shape, offset)
        offset = weight.stop
        bias = None
        if layer.bias:
            bias = Slot(f"{layer.name}.bias", (layer.weight_shape[0],), offset)
            offset = bias.stop
        slots.append(LayerSlots(weight, bias))
    return tuple(slots)


def numbers_of(layers: Layers) -> int:
    """Numbers in a row of weights."""
    return max((slot.stop for pair in layer_slots(layers) for slot in (pair.weight, pair.bias) if slot is not None), default=0)


def _window(size: int, kernel: int, stride: int, padding: int = 0, dilation: int = 1) -> int:
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def _refuse(layer: Layer, shape: tuple[int, ...], why: str) -> ValueError:
    return ValueError(f"layer {layer.name!r} ({layer.kind}): {why}; its input is {list(shape)}")


def output_shape(layer: Layer, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of ``layer``'s output for one query of ``shape`` (no batch axis). Raises ValueError naming a layer that does not fit."""
    if isinstance(layer, Linear):
        if len(shape) != 1 or shape[0] != layer.in_features:
            raise _refuse(layer, shape, f"expected [{layer.in_features}]")
        return (layer.out_features,)
    if isinstance(layer, Flatten):
        return (math.prod(shape),)
    if isinstance(layer, (Activation, Dropout, Affine)):
        return shape
    if len(shape) != 3:
        raise _refuse(layer, shape, "expected [C, H, W]")
    channels, height, width = shape
    if isinstance(layer, Conv2d):
        if channels != layer.in_channels:
            raise _refuse(layer, shape, f"expected {layer.in_channels} channels")
        channels = layer.out_channels
        height, width = (
            _window(size, layer.kernel_size[i], layer.stride[i], layer.padding[i], layer.dilation[i])
            for i, size in enumerate((height, width))
        )
    else:
        height, width = (_window(size, layer.kernel_size[i], layer.stride[i], layer.padding[i]) for i, size in enumerate((height, width)))
    if height < 1 or width < 1:
        raise _refuse(layer, shape, "nothing is left of the image")
    return (channels, height, width)


def shapes(layers: Layers, input_shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Input shape of every layer, then the network's output shape (``len(layers) + 1`` shapes, no batch axis)."""
    out = [tuple(input_shape)]
    for layer in layers:
        out.append(output_shape(layer, out[-1]))
    return tuple(out)


def layer_to_dict(layer: Layer) -> dict[str, Any]:
    """JSON-able form; the inverse of :func:`layer_from_dict`."""
    return {"kind": layer.kind, **asdict(layer)}


def check_layer(layer: Layer) -> None:
    """Raises ValueError, naming the layer, for a record whose values no network can have."""

    def must(condition: bool, what: str) -> None:
        if not condition:
            raise ValueError(f"layer {layer.name!r} ({layer.kind}): {what}")

    if not isinstance(layer.name, str) or not 0 < len(layer.name) <= _LONGEST_NAME:
        raise ValueError(f"a {layer.kind} record's name is a text of 1 to {_LONGEST_NAME} characters")
    for f in fields(layer):
        value = getattr(layer, f.name)
        if f.type in ("int", "Pair"):
            low = 0 if f.name == "padding" else 1
            numbers = value if f.type == "Pair" else (value,)
            fits = isinstance(numbers, tuple) and len(numbers) == (2 if f.type == "Pair" else 1)
            what = f"{'a pair of integers' if f.type == 'Pair' else 'an integer'} from {low} to {_LARGEST}"
            must(fits and all(type(v) is int and low <= v <= _LARGEST for v in numbers), f"{f.name} is {what}, got {value!r:.40}")
        elif f.type == "float":
            must(type(value) is float and math.isfinite(value), f"{f.name} is a finite float, got {value!r:.40}")
        else:
            must(type(value).__name__ == f.type, f"{f.name} is a {f.type}, got {value!r:.40}")
    if isinstance(layer, Conv2d):
        divides = layer.in_channels % layer.groups == 0 and layer.out_channels % layer.groups == 0
        must(divides, f"{layer.groups} groups do not divide {layer.in_channels} -> {layer.out_channels} channels")
    elif isinstance(layer, Pool2d):
        must(layer.mode in ("max", "avg"), f"pooling is 'max' or 'avg', got {layer.mode!r:.40}")
    elif isinstance(layer, Dropout):
        must(0.0 <= layer.p <= 1.0, f"p is a probability, got {layer.p!r}")
    elif isinstance(layer, Activation):
        must(layer.function in ACTIVATIONS, f"unknown activation {layer.function!r:.40}; known: {list(ACTIVATIONS)}")
        must(layer.function != "celu" or layer.parameter != 0, "celu's alpha is not 0")
        must(layer.approximate in ("none", "tanh"), f"approximate is 'none' or 'tanh', got {layer.approximate!r:.40}")


def layer_from_dict(record: dict[str, Any]) -> Layer:
    """Rebuild a record from :func:`layer_to_dict`'s form. Raises ValueError for anything else."""
    if not isinstance(record, dict):
        raise ValueError(f"a layer record is an object, got {type(record).__name__}")
    kind = record.get("kind")
    cls = RECORDS.get(kind) if isinstance(kind, str) else None
    if cls is None:
        raise ValueError(f"unknown layer kind {kind!r:.40}; known: {sorted(RECORDS)}")
    types = {f.name: f.type for f in fields(cls)}
    values = {k: v for k, v in record.items() if k != "kind"}
    if unknown := [k for k in values if k not in types]:
        raise ValueError(f"layer {record.get('name')!r:.40} has unknown fields {unknown!r:.80}")
    for key, value in values.items():  # what JSON cannot tell apart
        if types[key] == "Pair" and isinstance(value, list):
            values[key] = tuple(value)
        elif types[key] == "float" and type(value) is int and abs(value) <= _LARGEST:
            values[key] = float(value)
    try:
        layer: Layer = cls(**values)
    except TypeError as error:
        raise ValueError(f"layer {record.get('name')!r:.40}: {error}") from None
    check_layer(layer)
    return layer
