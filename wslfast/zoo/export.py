"""A zoo back to the forms that others read: ray-tune trees, or one state dict a checkpoint."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..architecture import Architecture
from ..errors import require
from ..files import check_empty, make_folder, write_tensors, write_text
from ..kernels.layers import Activation, Conv2d, Dropout
from ..population import Population
from .mapped import MappedZoo, mapped_parts

FORMATS = ("ray", "state-dicts")
PUBLISHED = {"cnn": "CNN", "cnn2": "CNN2", "cnn3": "CNN3", "lenet5": "LeNet5", "mlp": "MLP", "resnet18": "Resnet18"}
_SETTINGS = {"init_type": "model::init_type", "lr": "optim::lr", "wd": "optim::wd", "dropout": "model::dropout", "seed": "seed"}
RECORD = "wslfast::architecture"  # in params.json: the network, where it is none of the published ones
PROPERTIES = "wslfast::properties"  # in a line of result.json: what is known of a checkpoint besides RESULTS
RESULTS = ("train_acc", "val_acc", "test_acc", "train_loss", "val_loss", "test_loss")
_BLOCK = 256


def export_zoo(zoo: str | Path, out: str | Path, *, format: str = "ray", split: str | None = None, skip_bad: bool = False) -> int:
    """Write a zoo's checkpoints for other code; returns how many.

    Args:
        zoo: folder of the zoo.
        out: a new or empty folder.
        format: ``"ray"``: ``NN_tune_trainable_00000/{params.json, result.json, checkpoint_000020/checkpoints}`` with the published
            keys, which the published loaders read, and :func:`wslfast.zoo.import_zoo` too, to the bit. ``"state-dicts"``: one
            ``.pt`` a checkpoint and ``index.json`` with the properties of each.
        split: "train", "val" or "test" alone.
        skip_bad: leave out shards that are missing or damaged, with a count, instead of raising.

    Raises:
        WslfastError: unreadable zoo, a folder that is not empty, unknown format, two checkpoints of a model at one epoch.
    """
    require(format in FORMATS, f"format: expected one of {FORMATS}, got {format!r}")
    folder = Path(out)
    check_empty(out)
    parts = mapped_parts(zoo, split, skip_bad=skip_bad)
    make_folder(out)
    return sum(_ray(models, folder) for models in parts.values()) if format == "ray" else _state_dicts(parts, folder)


def _ray(models: MappedZoo, folder: Path) -> int:
    table, config = models.properties, _config(models.architecture)
    epochs = table.get("epoch", (0,) * len(models))
    of_model: dict[int, list[int]] = {}
    for row, model in enumerate(table["model"]):
        of_model.setdefault(model, []).append(row)
    for model, rows in of_model.items():
        rows.sort(key=lambda row: epochs[row])
        numbers = [epochs[row] for row in rows]
        fit = all(type(e) is int and e >= 0 for e in numbers) and len(set(numbers)) == len(numbers)
        require(fit, f"model {model}: expected one checkpoint per epoch, got epochs {numbers[:8]}")
        trial = folder / f"NN_tune_trainable_{model:05d}"
        first = {name: column[rows[0]] for name, column in table.items()}
        settings = {**config, **{theirs: first[ours] for ours, theirs in _SETTINGS.items() if first.get(ours) is not None}}
        write_text(trial / "params.json", json.dumps(settings, indent=1) + "\n")
        repeated = {name: value for name, value in settings.items() if name != RECORD}
        write_text(trial / "result.json", _results(table, rows, numbers, repeated))
        population = models.load(torch.tensor(rows))
        for i, epoch in enumerate(numbers):
            _save(population, i, trial / f"checkpoint_{epoch:06d}" / "checkpoints")
    return len(models)


def _results(table: Mapping[str, tuple[Any, ...]], rows: list[int], epochs: list[int], config: Mapping[str, Any]) -> str:
    """A line per iteration from 0 on, as the published loaders count lines; iterations that were not kept know only their number."""
    columns = {n: c for n, c in table.items() if n not in (*_SETTINGS, "model", "epoch", "ggap")}
    known: dict[int, dict[str, Any]] = {}
    for row, epoch in zip(rows, epochs, strict=True):
        known[epoch] = {n: column[row] for n, column in columns.items() if column[row] is not None}
        further = {n: v for n, v in known[epoch].items() if n not in RESULTS}
        known[epoch] = {n: v for n, v in known[epoch].items() if n not in ("name", "split")}
        known[epoch] |= {PROPERTIES: further} if further else {}  # so that an import knows them from what ray writes of its own
    lines = ({"training_iteration": e, **known.get(e, {}), "config": config} for e in range(epochs[-1] + 1))
    return "".join(json.dumps(line) + "\n" for line in lines)


def _state_dicts(parts: Mapping[str, MappedZoo], folder: Path) -> int:
    index: list[dict[str, Any]] = []
    count = sum(map(len, parts.values()))
    digits = max(5, int(math.log10(max(1, count))) + 1)
    for models in parts.values():
        for start in range(0, len(models), _BLOCK):
            block = models.load(torch.arange(start, min(start + _BLOCK, len(models))))
            for i in range(len(block)):
                name = f"{len(index):0{digits}d}.pt"
                _save(block, i, folder / name)
                index.append({"file": name, **{column: values[i] for column, values in block.properties.items()}})
    records = {label: models.architecture.to_dict() for label, models in parts.items()}
    head = {"architecture": next(iter(records.values()))} if len(records) == 1 else {"architectures": records}
    write_text(folder / "index.json", json.dumps({**head, "checkpoints": index}, indent=1) + "\n")
    return count


def _save(population: Population, row: int, file: Path) -> None:
    write_tensors(file, population.state_dict(row))


def _config(architecture: Architecture) -> dict[str, Any]:
    """The published config keys of an architecture, as far as it has them."""
    config: dict[str, Any] = {"model::type": PUBLISHED.get(architecture.name, architecture.name)}
    if architecture.name not in PUBLISHED:
        config[RECORD] = architecture.to_dict()  # published loaders pass over it; an import takes the network from it
    activation = next((layer.function for layer in architecture.layers if isinstance(layer, Activation)), None)
    if activation is not None:
        config["model::nlin"] = activation
    config["model::dropout"] = max((layer.p for layer in architecture.layers if isinstance(layer, Dropout)), default=0.0)
    first = next((layer for layer in architecture.layers if isinstance(layer, Conv2d)), None)
    config["model::channels_in"] = first.in_channels if first is not None else architecture.input_shape[0]
    config["model::o_dim"] = architecture.num_classes
    if architecture.name == "mlp":
        widths = [slot.shape[0] for slot in architecture.parameters if len(slot.shape) == 2]
        config |= {"model::i_dim": architecture.input_shape[0], "model::h_dim": widths[:-1]}
        config["model::use_bias"] = any(len(slot.shape) == 1 for slot in architecture.parameters)
    return config
