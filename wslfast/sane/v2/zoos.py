"""Zoos both ways: those of ``sane`` 2.x as a population, and a zoo of this library as its ``ZooDataset`` reads it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ...architecture import Architecture
from ...errors import WslfastError, describe, require
from ...files import write_text
from ...population import Population
from ...zoo.export import export_zoo as export_tree
from ...zoo.reading import read_manifest
from ...zoo.trained_on import dataset_of
from . import images
from .networks import shape_of

_SLIM = "ResNet18Slim"
_STEM = 64  # channels of its first convolution at width 1


def population(source: Any, input_shape: Sequence[int] | None = None) -> Population:
    """The checkpoints of a data set of ``sane`` 2.x (``ZooDataset``, a subset, a list of checkpoints), stacked.

    Args:
        source: what gives checkpoints, each with ``model`` and ``metadata``. Of augmented ones the first view counts.
        input_shape: of one query; by default what the settings of the models say.

    Returns:
        A population; its properties are the numbers and words of each checkpoint's results, and of its settings.

    Raises:
        WslfastError: no checkpoint, or networks that differ, be it in an activation alone.
    """
    checkpoints = list(_checkpoints(source))
    require(bool(checkpoints), "source: expected at least one checkpoint, got none")
    first = checkpoints[0]
    shape = shape_of(first, input_shape)
    architecture = Architecture.from_module(first.model, shape)
    layers = _layers(first.model)
    states, rows = [], []
    for j, checkpoint in enumerate(checkpoints):
        states.append(checkpoint.model.state_dict())
        rows.append(_properties(checkpoint))
        same = type(checkpoint.model) is type(first.model)
        require(same, f"source[{j}]: expected a {type(first.model).__name__} like the first, got a {type(checkpoint.model).__name__}")
        other = next((f"{b}, not {a}" for a, b in zip(layers, _layers(checkpoint.model)) if a != b), None)
        require(other is None, f"source[{j}]: expected the layers of the first, got {other}; a population is of one network")
    names = list(dict.fromkeys(name for row in rows for name in row))
    return Population(
        architecture,
        Population.from_state_dicts(architecture, states).weights,
        {name: tuple(row.get(name) for row in rows) for name in names},
    )


def _checkpoints(source: Any) -> Iterator[Any]:
    require(
        hasattr(source, "__len__") and hasattr(source, "__getitem__"), f"source: expected a data set of checkpoints, got {describe(source)}"
    )
    for j in range(len(source)):
        item = source[j]
        item = item[0] if isinstance(item, (list, tuple)) else item
        require(isinstance(getattr(item, "model", None), torch.nn.Module), f"source[{j}]: expected a checkpoint, got {describe(item)}")
        yield item


def _layers(model: torch.nn.Module) -> list[str]:
    """What each layer is; dropout has no part in evaluation."""
    modules = (m for m in model.modules() if not isinstance(m, torch.nn.modules.dropout._DropoutNd))
    return [f"{type(m).__name__}({m.extra_repr()})" for m in modules]


def _properties(checkpoint: Any) -> dict[str, Any]:
    properties: dict[str, Any] = {}
    metadata = checkpoint.metadata if isinstance(getattr(checkpoint, "metadata", None), dict) else {}
    for part in ("model_config", "eval_results"):
        held = metadata.get(part)
        for name, value in (held if isinstance(held, dict) else {}).items():
            if isinstance(value, (int, float, str)):
                properties[str(name)] = value
    if getattr(checkpoint, "zoo_root_dir", None) is not None:
        properties["zoo"] = str(checkpoint.zoo_root_dir)
    return properties


def export_zoo(zoo: str | Path, out: str | Path, *, split: str | None = None, with_images: bool | None = None) -> int:
    """Writes a zoo as the ``ZooDataset`` of ``sane`` 2.x reads it, with ``dataset.pt`` beside the models; returns how many checkpoints.

    Args:
        zoo: folder of a zoo of this library.
        out: a new or empty folder.
        split: "train", "val" or "test" alone.
        with_images: write the images the models were trained on, normalised as they were for them; None: if the zoo still finds them.

    Raises:
        WslfastError: what :func:`wslfast.zoo.export_zoo` refuses; images asked for that are not there.
    """
    record = read_manifest(zoo)
    data = None
    try:
        data = None if with_images is False else dataset_of(zoo, Architecture.from_dict(record.architecture))
    except WslfastError:
        if with_images:  # said before anything is written
            raise
    count = export_tree(zoo, out, format="ray", split=split)
    folder = Path(out)
    for file in sorted(folder.glob("*/params.json")):
        settings = json.loads(file.read_bytes())
        write_text(file, json.dumps(_settings(settings, file.parent), indent=1) + "\n")
    if data is not None:
        images.write({name: data.split(name) for name in images.SPLITS}, folder / images.FILE)
    return count


def _settings(settings: dict[str, Any], trial: Path) -> dict[str, Any]:
    """Settings with what the published code asks for to build the network; loading overwrites whatever it initialises."""
    settings.setdefault("model::init_type", "kaiming_uniform")
    if settings.get("model::type") == _SLIM:
        settings.setdefault("model::nlin", "relu")
        state = torch.load(next(iter(sorted(trial.glob("checkpoint_*/checkpoints")))), map_location="cpu", weights_only=True)
        settings["model::width_mult"] = len(state["conv1.weight"]) / _STEM
    return settings
