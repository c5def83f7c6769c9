"""The networks of a zoo of ``sane`` 2.x, by how many classes each has, and the running statistics that their tokens leave out."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...architecture import Architecture
from ...errors import WslfastError, describe, require
from ...tracing.module import call_with
from .layout import Layout, layout_for, numbers_of
from .loading import load

STATISTICS = ("queries", "reference")
_SIZES = {"CNN": 28, "CNN2": 28, "ResCNN": 28, "CNN_more_layers": 28, "CNN_residual": 28, "CNN_more_layers_residual": 28}
_MOST_CLASSES = 100_000


class Networks:
    """One network, with any number of classes.

    Args:
        module: the network, with the weights that stand in for what tokens leave out; it is copied.
        input_shape: of one query.

    Attributes:
        classes: of the module as it came.
        numbers: tokenised numbers of the module.
        step: how many more each class adds.
        has_statistics: whether it has running statistics, which no token holds.
    """

    def __init__(self, module: nn.Module, input_shape: Sequence[int]) -> None:
        require(isinstance(module, nn.Module), f"network: expected a torch.nn.Module, got {describe(module)}")
        self.input_shape = tuple(input_shape)
        self._module = copy.deepcopy(module).cpu().eval().requires_grad_(False)
        self._made: dict[int, Architecture] = {}
        first = Architecture.from_module(self._module, self.input_shape)
        tied = "network: expected parameters of their own, got {!r} tied to {!r}: sane 2.x has tokens of each copy, which may differ"
        require(not first.aliases, lambda: tied.format(*next(iter(first.aliases.items()))))
        self.classes = first.num_classes
        self._made[self.classes] = first
        self.numbers, last, width = numbers_of(first)
        head = self._module.get_submodule(last.rpartition(".")[0])
        # another number of classes is another last layer; a network that ends another way has the classes that it has
        fits = isinstance(head, nn.Linear) and head.out_features == self.classes and last.endswith(".weight")
        self._head = last.rpartition(".")[0] if fits else None
        self.step = width if fits else 0
        self.has_statistics = any(slot.name.endswith(("running_mean", "running_var")) for slot in first.parameters)
        self._rows: dict[int, Tensor] = {}

    def classes_of(self, numbers: int) -> int | None:
        """How many classes a network of so many tokenised numbers has; None if it is none of these."""
        more = numbers - self.numbers
        if more == 0:
            return self.classes
        if self.step == 0 or more % self.step:
            return None
        classes = self.classes + more // self.step
        return classes if 0 < classes <= _MOST_CLASSES else None

    def architecture(self, classes: int) -> Architecture:
        """The network with so many classes."""
        if classes not in self._made:
            self._made[classes] = Architecture.from_module(self.module(classes), self.input_shape)
        return self._made[classes]

    def module(self, classes: int) -> nn.Module:
        """A copy of the module with so many classes; a new head is of no particular weights."""
        module = copy.deepcopy(self._module)
        if classes != self.classes:
            assert self._head is not None
            parent, _, name = self._head.rpartition(".")
            old = module.get_submodule(self._head)
            assert isinstance(old, nn.Linear)
            with torch.random.fork_rng(devices=[]):
                head = nn.Linear(old.in_features, classes, bias=old.bias is not None).requires_grad_(False).eval()
            setattr(module.get_submodule(parent) if parent else module, name, head)
        return module

    def layout(self, kind: str, token_size: int, classes: int) -> Layout:
        """Its tokens; rows are the architecture's."""
        return layout_for(kind, token_size, self.architecture(classes))

    def reference_row(self, classes: int) -> Tensor:
        """``[P]``: the module's own numbers, for what tokens leave out."""
        if classes not in self._rows:
            architecture, state = self.architecture(classes), self.module(classes).state_dict()
            self._rows[classes] = torch.cat([state[slot.name].reshape(-1).float() for slot in architecture.parameters])
        return self._rows[classes]

    @torch.no_grad()
    def statistics(self, rows: Tensor, queries: Tensor, classes: int) -> Tensor:
        """``[k, P]``: the rows with the running statistics that each network has on the queries ``[n, ...]``.

        These are the means and variances that batch norm meets in training mode, layer after layer: what the published scripts let
        run over a decoded network before they use it.
        """
        module, slots = self.module(classes).to(rows.device), self.architecture(classes).slots
        named = [(name, part) for name, part in module.named_modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
        norms = {name: part for name, part in named if part.track_running_stats}
        counts: dict[str, int] = {}  # numbers per channel

        def note(name: str) -> Any:
            def hook(part: nn.Module, arguments: tuple[Tensor, ...]) -> None:
                counts[name] = arguments[0][:, 0].numel()
                one = f"n_queries: expected 2 or more, as batch norm {name!r} has one number a channel; or statistics='reference'"
                require(counts[name] > 1, one)

            return hook

        for name, part in norms.items():
            part.train()
            part.momentum = 1.0  # what it keeps is then of this batch alone, and costs no passes of its own
            part.register_forward_pre_hook(note(name))
        if queries.ndim == 4:
            queries = queries.contiguous(memory_format=torch.channels_last)
        out = rows.clone()
        for row in out:
            state = {name: row[slot.offset : slot.stop].view(slot.shape).clone() for name, slot in slots.items()}
            for name in norms:
                state[f"{name}.running_mean"].zero_()
                state[f"{name}.running_var"].zero_()
            call_with(module, state, queries)
            for name in counts:
                n = counts[name]
                for kind, factor in (("running_mean", 1.0), ("running_var", (n - 1) / n)):  # theirs is unbiased
                    slot = slots[f"{name}.{kind}"]
                    row[slot.offset : slot.stop] = state[f"{name}.{kind}"].reshape(-1) * factor
        return out


def networks_of(source: Any, input_shape: Sequence[int] | None) -> tuple[Networks, ...]:
    """The networks of what a user names: a zoo's folder or several, a checkpoint of ``sane`` 2.x, or a module.

    Args:
        source: one or a list of them.
        input_shape: of one query; by default what the settings of a zoo's models say (28x28 or 32x32, as the published networks).

    Raises:
        WslfastError: naming what is missing.
    """
    several = source if isinstance(source, (list, tuple)) else [source]
    require(len(several) > 0 and all(s is not None for s in several), "zoo: expected a zoo's folder, a checkpoint or a module, got nothing")
    distinct: list[Networks] = []
    for one in several:
        module, settings = _module(one)
        made = Networks(module, _shape(settings, input_shape))
        equal = next((n for n in distinct if n.classes_of(made.numbers) is not None and n.input_shape == made.input_shape), None)
        if equal is None or equal.architecture(made.classes).layers != made.architecture(made.classes).layers:
            distinct.append(made)
    return tuple(distinct)


def shape_of(checkpoint: Any, input_shape: Sequence[int] | None = None) -> tuple[int, ...]:
    """The shape of one query of a checkpoint's network: the given one, else what its settings say. Raises WslfastError if they do not."""
    return _shape(_module(checkpoint)[1], input_shape)


def _shape(settings: Mapping[str, Any], input_shape: Sequence[int] | None) -> tuple[int, ...]:
    if input_shape is not None:
        return tuple(input_shape)
    channels = settings.get("model::channels_in")
    require(isinstance(channels, int), "input_shape: expected (C, H, W), as the network's settings do not say it; got None")
    assert isinstance(channels, int)
    size = _SIZES.get(str(settings.get("model::type")), 32)
    return channels, size, size


def _module(source: Any) -> tuple[nn.Module, Mapping[str, Any]]:
    if isinstance(source, nn.Module):
        return source, {}
    if isinstance(source, (str, Path)):
        return _of_folder(Path(source).expanduser())
    model, metadata = getattr(source, "model", None), getattr(source, "metadata", None)
    require(isinstance(model, nn.Module), f"zoo: expected a zoo's folder, a checkpoint or a module, got {describe(source)}")
    settings = metadata.get("model_config", {}) if isinstance(metadata, Mapping) else {}
    assert isinstance(model, nn.Module)
    return model, settings if isinstance(settings, Mapping) else {}


def _of_folder(zoo: Path) -> tuple[nn.Module, Mapping[str, Any]]:
    """The first model of a zoo, at its last checkpoint, as the published code builds it."""
    require(zoo.is_dir(), f"zoo: {zoo}: no such folder")
    for trial in sorted(p for p in zoo.iterdir() if (p / "params.json").is_file()):
        states = sorted(p for p in trial.glob("checkpoint_*/checkpoints") if p.is_file())
        if not states:
            continue
        try:
            from sane.data.datasets import zoo_dataset as published
        except ImportError as error:
            raise WslfastError(f"zoo: {zoo}: its networks are built by sane 2.x, which cannot be imported ({error})") from None
        try:
            settings = json.loads((trial / "params.json").read_bytes())
            state = published._unwrap_state_dict(load(states[-1]))
            settings = published._reconcile_model_output_dim(settings, state)
            with torch.random.fork_rng(devices=[]):
                model = published.get_model(settings)
            model.load_state_dict(state)
        except Exception as error:  # whatever torch, json and the published code make of files that nobody has checked
            raise WslfastError(f"zoo: {trial}: no network can be made of it: {error}") from None
        return model, settings
    raise WslfastError(f"zoo: {zoo}: no folder in it has params.json and checkpoint_*/checkpoints")
