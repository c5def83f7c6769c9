"""The published networks, as layers or graphs with the key names of the code that their zoos were made with, and fresh weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from .errors import check_positive, require
from .kernels.graph import QUERY, Graph, Node, Slot, slots_of
from .kernels.layers import ACTIVATIONS, Activation, Conv2d, Dropout, Flatten, Layer, Linear, Pool2d
from .kernels.operations import TABLE

INITIALISATIONS = (
    "uniform", "normal", "kaiming_uniform", "kaiming_normal", "xavier_uniform", "xavier_normal", "default", "siren",
)  # fmt: skip
_BIAS = 0.01  # every bias of a published zoo starts here


# -- chains: module_list.{i}, i counting every module as the published code does ---------------------------------------


def cnn28(channels_in: int, widths: tuple[int, int, int], activation: str, dropout: float, classes: int) -> list[Layer]:
    """The published CNNs for 28x28 images (``CNN``, ``CNN2``)."""
    build, dropout = _Layers(), _probability(dropout)

    def drop() -> None:
        if dropout > 0:
            build.dropout(dropout)

    build.conv(channels_in, widths[0], 5).pool().act(activation)
    drop()
    build.conv(widths[0], widths[1], 5).pool().act(activation)
    drop()
    build.conv(widths[1], widths[2], 2).act(activation).flatten().linear(9 * widths[2], 20).act(activation)
    drop()
    return build.linear(20, classes).layers


def cnn3(channels_in: int, activation: str, dropout: float, classes: int) -> list[Layer]:
    """The published ``CNN3`` for 32x32 images."""
    build, channels = _Layers(), channels_in
    for out in (16, 32, 15):
        build.conv(channels, out, 3).pool().act(activation).dropout(dropout)
        channels = out
    return build.flatten().linear(60, 20).act(activation).dropout(dropout).linear(20, classes).layers


def lenet5(channels_in: int, activation: str, dropout: float, classes: int) -> list[Layer]:
    """The published ``LeNet5`` for 32x32 images (activation before pooling)."""
    build = _Layers()
    build.conv(channels_in, 6, 5).act(activation).pool().dropout(dropout)
    build.conv(6, 16, 5).act(activation).pool().dropout(dropout)
    build.flatten().linear(400, 120).act(activation).dropout(dropout)
    return build.linear(120, 84).act(activation).dropout(dropout).linear(84, classes).layers


def mlp(i_dim: int, h_dim: Sequence[int], o_dim: int, activation: str, dropout: float, use_bias: bool) -> list[Layer]:
    """The published ``MLP``."""
    build, dropout = _Layers(), _probability(dropout)
    sizes = [i_dim, *h_dim]
    for a, b in pairwise(sizes):
        build.linear(a, b, use_bias).act(activation)
        if dropout > 0:
            build.dropout(dropout)
    return build.linear(sizes[-1], o_dim, use_bias).layers


class _Layers:
    """Appends records named ``module_list.{i}``."""

    def __init__(self) -> None:
        self.layers: list[Layer] = []

    def _add(self, record: Callable[..., Layer], *settings: Any) -> _Layers:
        self.layers.append(record(f"module_list.{len(self.layers)}", *settings))
        return self

    def conv(self, channels_in: int, channels_out: int, kernel: int) -> _Layers:
        check_positive("channels_in", channels_in)
        return self._add(Conv2d, channels_in, channels_out, (kernel, kernel))

    def linear(self, features_in: int, features_out: int, bias: bool = True) -> _Layers:
        check_positive("num_classes", features_out)
        return self._add(Linear, features_in, features_out, bias)

    def pool(self) -> _Layers:
        return self._add(Pool2d)

    def act(self, function: str) -> _Layers:
        function = str(function).replace("_", "")
        require(function in ACTIVATIONS, f"activation: expected one of {tuple(ACTIVATIONS)}, got {function!r}")
        return self._add(Activation, function)

    def flatten(self) -> _Layers:
        return self._add(Flatten)

    def dropout(self, p: float) -> _Layers:
        return self._add(Dropout, _probability(p))


def _probability(p: float) -> float:
    number = isinstance(p, (int, float)) and not isinstance(p, bool)
    require(number and 0.0 <= p < 1.0, f"dropout: expected a probability in [0, 1), got {p!r:.40}")
    return float(p)


# -- graphs ------------------------------------------------------------------------------------------------------------


class _Nodes:
    """Appends nodes, and the shapes of the parameters that they read."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.shapes: dict[str, tuple[int, ...]] = {}

    def add(self, operation: str, *arguments: tuple[str, Any]) -> str:
        self.nodes.append(Node(operation, arguments))
        return f"@{len(self.nodes) - 1}"

    def parameter(self, name: str, *shape: int) -> str:
        self.shapes[name] = shape
        return f"@w:{name}"

    def linear(self, x: str, name: str, features: int, out: int) -> str:
        weight, bias = self.parameter(f"{name}.weight", out, features), self.parameter(f"{name}.bias", out)
        return self.add("linear", ("input", x), ("weight", weight), ("bias", bias))

    def conv(self, x: str, name: str, channels: int, out: int, kernel: int, stride: int) -> str:
        weight = self.parameter(f"{name}.weight", out, channels, kernel, kernel)
        further = [("stride", (stride, stride))] if stride != 1 else []
        padding = [("padding", (kernel // 2, kernel // 2))] if kernel > 1 else []
        return self.add("conv2d", ("input", x), ("weight", weight), *further, *padding)

    def norm(self, x: str, name: str, channels: int) -> str:
        parts = {part: self.parameter(f"{name}.{part}", channels) for part in ("weight", "bias", "running_mean", "running_var")}
        return self.add("batch_norm", ("input", x), *parts.items(), ("training", False), ("momentum", 0.1), ("eps", 1e-5))

    def graph(self, input_shape: tuple[int, ...], output: str) -> Graph:
        return Graph(input_shape, tuple(self.nodes), output, slots_of(self.shapes))


def siren(in_features: int, hidden: Sequence[int], out_features: int, omega: float, offset: float) -> Graph:
    """Linear layers with sin(omega x) between them (Sitzmann et al. 2020)."""
    for size in (in_features, *hidden, out_features):
        check_positive("hidden", size)
    build, x, features = _Nodes(), QUERY, in_features
    for i, size in enumerate((*hidden, out_features)):
        x = build.linear(x, f"seq.{i}", features, size)
        if i < len(hidden):
            x = build.add("sin", ("self", build.add("mul.Tensor", ("self", x), ("other", float(omega)))))
        features = size
    if offset:
        x = build.add("add.Tensor", ("self", x), ("other", float(offset)))
    return build.graph((in_features,), x)


def resnet18(channels_in: int, num_classes: int, width: int) -> Graph:
    """3x3 stem without pooling, four stages of two blocks, global average pooling, one linear layer (He et al. 2016)."""
    for argument, value in (("channels_in", channels_in), ("num_classes", num_classes), ("width", width)):
        check_positive(argument, value)
    build = _Nodes()

    def block(x: str, name: str, channels: int, out: int, stride: int) -> str:
        h = build.add("relu", ("self", build.norm(build.conv(x, f"{name}.conv1", channels, out, 3, stride), f"{name}.bn1", out)))
        h = build.norm(build.conv(h, f"{name}.conv2", out, out, 3, 1), f"{name}.bn2", out)
        if stride != 1 or channels != out:
            x = build.norm(build.conv(x, f"{name}.downsample.0", channels, out, 1, stride), f"{name}.downsample.1", out)
        return build.add("relu", ("self", build.add("add.Tensor", ("self", h), ("other", x))))

    x = build.add("relu", ("self", build.norm(build.conv(QUERY, "conv1", channels_in, width, 3, 1), "bn1", width)))
    channels = width
    for stage in range(1, 5):
        out, stride = width * 2 ** (stage - 1), 1 if stage == 1 else 2
        x = block(x, f"layer{stage}.0", channels, out, stride)
        x = block(x, f"layer{stage}.1", out, out, 1)
        channels = out
    x = build.add("mean.dim", ("self", x), ("dim", (-2, -1)))
    return build.graph((channels_in, 32, 32), build.linear(x, "fc", channels, num_classes))


# -- fresh weights -----------------------------------------------------------------------------------------------------


def initial_weights(graph: Graph, initialisations: Sequence[str], seeds: Sequence[int]) -> Tensor:
    """``[k, P]``: see :meth:`wslfast.Architecture.initial_weights`."""
    require(len(initialisations) == len(seeds), f"initial_weights: {len(initialisations)} initialisations for {len(seeds)} seeds")
    roles, sines = _roles(graph), _sines(graph)
    weights = torch.empty(len(seeds), graph.parameters, dtype=torch.float32, device="cpu")  # where the generators are
    for row, initialisation, seed in zip(weights, initialisations, seeds, strict=True):
        require(initialisation in INITIALISATIONS, f"initialisation: expected one of {INITIALISATIONS}, got {initialisation!r}")
        generator = torch.Generator().manual_seed(int(seed))
        for slot in graph.slots:
            value = row[slot.offset : slot.stop].view(slot.shape)
            if initialisation == "siren" and slot.name in sines:
                nn.init.uniform_(value, -sines[slot.name], sines[slot.name], generator=generator)
            else:
                _initialise(value, roles.get(slot.name, ("other", None)), initialisation, generator)
    return weights


def _sines(graph: Graph) -> dict[str, float]:
    """Bounds of uniform weights before and behind a sine: 1 / inputs in the first layer, sqrt(6 / inputs) / omega in the others (Sitzmann
    et al. 2020)."""
    omega: dict[str, float] = {}  # of the sine that a value is, or is about to be
    bounds: dict[str, float] = {}
    for i, node in enumerate(graph.nodes):
        x = str(node.argument("self"))
        if node.operation == "mul.Tensor" and isinstance(node.argument("other"), float):
            omega[f"@{i}"] = node.argument("other")
        elif node.operation == "sin":
            omega[f"@{i}"] = omega.get(x, 1.0)
    behind = {f"@{i}" for i, node in enumerate(graph.nodes) if node.operation == "sin"}
    if not behind:
        return {}
    for node in graph.nodes:
        weight, x = str(node.argument("weight")), str(node.argument("input"))
        if node.operation == "linear" and weight.startswith("@w:") and (x in behind or x == QUERY):
            features = graph.by_name[weight[3:]].shape[1]
            bounds[weight[3:]] = 1 / features if x == QUERY else math.sqrt(6 / features) / omega[x]
    return bounds


def _roles(graph: Graph) -> dict[str, tuple[str, Slot | None]]:
    """What each parameter is: a weight, a bias (and of which weight), a norm's scale, ...; ``other`` where nothing tells."""
    roles: dict[str, tuple[str, Slot | None]] = {}

    def note(reference: Any, role: str, of: Any = None) -> None:
        if isinstance(reference, str) and reference.startswith("@w:"):
            weight = graph.by_name[of[3:]] if isinstance(of, str) and of.startswith("@w:") else None
            roles.setdefault(reference[3:], (role, weight))

    for node in graph.nodes:
        form, given = TABLE[node.operation].form, dict(node.arguments)
        if form in ("linear", "convolution", "transposed"):
            note(given["weight"], "weight")
            note(given.get("bias"), "bias", given["weight"])
        elif form in ("batch_norm", "instance_norm", "group_norm", "layer_norm", "rms_norm"):
            for name, role in (("weight", "one"), ("running_var", "one"), ("bias", "zero"), ("running_mean", "zero")):
                note(given.get(name), role)
        elif form == "recurrent":
            for reference in given["params"]:
                note(reference, "recurrent", given["params"][1])
        elif form == "embedding":
            note(given["weight"], "table")
        elif form == "prelu":
            note(given["weight"], "slope")
    return roles


def _initialise(value: Tensor, role: tuple[str, Slot | None], initialisation: str, generator: torch.Generator) -> None:
    kind, weight = role
    if kind == "weight" and value.ndim > 1:
        if initialisation in ("default", "siren"):
            nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=generator)
        else:
            getattr(nn.init, f"{initialisation}_")(value, generator=generator)
    elif kind == "bias":
        if initialisation in ("default", "siren") and weight is not None:
            bound = 1 / math.sqrt(math.prod(weight.shape[1:]))
            nn.init.uniform_(value, -bound, bound, generator=generator)
        else:
            value.fill_(_BIAS)
    elif kind == "one":
        value.fill_(1.0)
    elif kind == "zero":
        value.zero_()
    elif kind == "recurrent" and weight is not None:
        bound = 1 / math.sqrt(weight.shape[1])
        nn.init.uniform_(value, -bound, bound, generator=generator)
    elif kind == "table":
        nn.init.normal_(value, generator=generator)
    elif kind == "slope":
        value.fill_(0.25)
    else:  # positions, tokens, factors: as transformers have them
        nn.init.normal_(value, std=0.02, generator=generator)
