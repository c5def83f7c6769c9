"""Which architecture a published checkpoint is of: from its ``params.json``, else from the names and shapes of its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ...architecture import Architecture
from ...errors import WslfastError, describe
from ...kernels.layers import ACTIVATIONS
from .modules import slim_resnet

Shapes = Mapping[str, tuple[int, ...]]
_CNNS: dict[str, Callable[..., Architecture]] = {
    "CNN": Architecture.cnn, "CNN2": Architecture.cnn2, "CNN3": Architecture.cnn3, "LeNet5": Architecture.lenet5,
}  # fmt: skip


def recognise(config: Mapping[str, Any], shapes: Shapes) -> Architecture:
    """The architecture of a checkpoint.

    Args:
        config: the trial's ``params.json`` with the published keys (``model::type``, ``model::channels_in``, ``model::nlin``,
            ``model::dropout``, ...); may be empty.
        shapes: of the checkpoint's entries, by name.

    Raises:
        WslfastError: if no supported network has these names and shapes (pass ``architecture=`` then).
    """
    kind = config.get("model::type")
    if kind == "MLP":
        candidates = [_mlp(config)]
    elif isinstance(kind, str) and kind.lower().startswith("resnet18"):
        candidates = [_resnet(shapes), _slim(config, shapes)]
    elif isinstance(kind, str) and kind in _CNNS:
        candidates = _cnns({kind: _CNNS[kind]}, config, shapes)
    else:
        candidates = [*_cnns(_CNNS, config, shapes), _resnet(shapes), _slim(config, shapes)]
    for candidate in candidates:
        if candidate is not None and fits(candidate, shapes):
            return candidate
    first = ", ".join(f"{name} {list(shape)}" for name, shape in list(shapes.items())[:3])
    named = f"model::type {describe(kind)}" if kind is not None else "no model::type"
    raise WslfastError(f"no known network has these weights ({named}; {first}, ...); pass the architecture")


def fits(architecture: Architecture, shapes: Shapes) -> bool:
    """Whether a checkpoint with these shapes is of the architecture (step counters of batch norm do not matter)."""
    wanted = {slot.name: slot.shape for slot in architecture.parameters}
    held = {name: shape for name, shape in shapes.items() if not name.endswith("num_batches_tracked") and name not in architecture.aliases}
    return wanted == held


def contradiction(architecture: Architecture, config: Mapping[str, Any]) -> str | None:
    """What in a trial's settings says that it is another network of the same shapes (its activation), or None."""
    stated = str(config.get("model::nlin")).replace("_", "").lower()
    used = {name.replace("_", "") for name in activations(architecture)}
    names = {*ACTIVATIONS, *(name.replace("_", "") for name in _ACTIVATIONS)}
    if stated not in names or not used or stated in used or architecture.name == "resnet18":  # whose class does not look at the setting
        return None
    return f"expected activation {' or '.join(sorted(used))}, got {stated!r}"


_ACTIVATIONS = {entry.operation for entry in ACTIVATIONS.values() if entry.operation} | {"selu", "hardswish", "hardtanh", "sin", "relu6"}


def activations(architecture: Architecture) -> list[str]:
    """The activations of a network by torch's names, in the order in which they come."""
    if architecture.graph is None:
        return []
    names = (node.operation.partition(".")[0].rstrip("_") for node in architecture.graph.nodes)
    return list(dict.fromkeys(name for name in names if name in _ACTIVATIONS))


def _cnns(makers: Mapping[str, Callable[..., Architecture]], config: Mapping[str, Any], shapes: Shapes) -> list[Architecture | None]:
    """The published CNNs with the channels of the first convolution and the config's activation; dropout shifts the names of some."""
    first = next((shape for shape in shapes.values() if len(shape) == 4), None)
    activation, dropout = config.get("model::nlin", "relu"), config.get("model::dropout", 0.0)
    if first is None or not isinstance(activation, str) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        return []
    last = [shape for shape in shapes.values() if len(shape) == 2]
    classes = last[-1][0] if last and last[-1][0] <= 10_000 else 10
    networks: list[Architecture | None] = []
    for make in makers.values():
        for share in dict.fromkeys((float(dropout), 0.0, 0.1)):
            networks.append(_or_none(make, first[1], activation, share, classes))
    return networks


def _mlp(config: Mapping[str, Any]) -> Architecture | None:
    hidden = config.get("model::h_dim")
    if not isinstance(hidden, list):
        return None
    return _or_none(
        Architecture.mlp,
        config.get("model::i_dim"),
        tuple(hidden),
        config.get("model::o_dim"),
        config.get("model::nlin", "leakyrelu"),
        config.get("model::dropout", 0.2),
        config.get("model::use_bias", True),
    )


def _resnet(shapes: Shapes) -> Architecture | None:
    stem, head = shapes.get("conv1.weight"), shapes.get("fc.weight")
    if stem is None or head is None or len(stem) != 4 or len(head) != 2 or stem[0] > 512 or head[0] > 10_000:
        return None
    return _or_none(Architecture.resnet18, stem[1], head[0], stem[0])


def _slim(config: Mapping[str, Any], shapes: Shapes) -> Architecture | None:
    """WeightCLIP's ResNet18Slim: its shortcuts are called so; the activation is its settings'."""
    stem, head = shapes.get("conv1.weight"), shapes.get("fc.weight")
    widths = [shapes.get(f"layer{stage}.0.conv1.weight", ()) for stage in range(1, 5)]
    fits = stem is not None and head is not None and len(stem) == 4 and len(head) == 2 and all(len(w) == 4 for w in widths)
    if not fits or not any(".shortcut." in name for name in shapes) or max(w[0] for w in widths) > 2048:
        return None
    assert stem is not None
    assert head is not None
    return _or_none(slim_resnet, stem[1], tuple(w[0] for w in widths), head[0], str(config.get("model::nlin", "relu")))


def _or_none(make: Callable[..., Architecture], *arguments: Any) -> Architecture | None:
    try:
        return make(*arguments)
    except (WslfastError, TypeError, ValueError):
        return None
