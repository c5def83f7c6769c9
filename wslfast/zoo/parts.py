"""A zoo trained by several processes: each trains its part of the models, keeps it when it is done, and all get all of them.

A model's training depends on its own settings alone, so the zoo is the one that a process alone would have trained. A part that is
done is a file; when a process dies, the rest is kept, and the same call trains only what is missing.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..architecture import Architecture
from ..engine.ranks import World
from ..errors import WslfastError, logger
from ..files import write_tensors
from ..population import Population
from ..safe.state import load_plain
from .datasets import Dataset
from .grid import Cell
from .manifest import SPLITS
from .signals import Signals

FOLDER = ".parts"


def trained_in_parts(
    world: World,
    architecture: Architecture,
    cells: Sequence[Cell],
    train: Callable[[Sequence[Cell]], Population],
    kept_in: Path | None,
    settings: Mapping[str, Any],
) -> Population:
    """All rows of ``train(cells)``, in the order of cells, on every process; each process trains its own part of the cells.

    Args:
        train: maps cells to rows, as many of each, model-major, with properties of which ``model`` counts cells from 0.
        kept_in: folder of the zoo to be, where parts that are done stay until :func:`discard_parts`; None keeps none.
        settings: JSON-able, whatever else the rows depend on.
    """
    if world.size == 1:
        return train(cells)
    span = world.span(len(cells))
    share = list(cells[span.start : span.stop])
    record = json.dumps([[tuple(c) for c in share], architecture.to_dict(), settings], sort_keys=True, default=str)
    digest = hashlib.sha256(record.encode()).hexdigest()
    path = None if kept_in is None else kept_in / FOLDER / f"{span.start:06d}-{span.stop:06d}-{digest[:16]}.pt"
    part = None if path is None else _kept(path, digest)
    if part is None:
        trained = train(share)
        part = trained.weights, {name: list(column) for name, column in trained.properties.items()}
        if path is not None:
            write_tensors(path, {"digest": digest, "weights": part[0], "properties": json.dumps(part[1])})
    else:
        logger.info("zoo: models %d to %d were trained before", span.start, span.stop - 1)
    weights, table = part
    each = len(weights) // len(share)  # rows per model
    whole = world.rows(weights.reshape(len(share), -1), len(cells)).reshape(len(cells) * each, -1)
    columns: dict[str, list[Any]] = {name: [] for name in table}
    for rank, others in enumerate(world.collected(table)):
        start = World(rank, world.size).span(len(cells)).start
        for name, values in others.items():
            columns[name] += [value + start for value in values] if name == "model" else values
    return Population(architecture, whole, {name: tuple(values) for name, values in columns.items()})


def discard_parts(folder: Path) -> None:
    """Delete the parts, when the zoo itself has been written."""
    shutil.rmtree(folder / FOLDER, ignore_errors=True)


def data_digest(data: Dataset | Signals) -> str:
    """SHA-256 of a data set's images and labels, or of inputs and targets."""
    digest = hashlib.sha256()
    for split in SPLITS:
        for tensor in data.split(split) or ():
            digest.update(tensor.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _kept(path: Path, digest: str) -> tuple[torch.Tensor, dict[str, list[Any]]] | None:
    """Weights and properties of a finished part, or None if there is none with these settings that is undamaged."""
    if not path.is_file():
        return None
    try:
        state = load_plain(path, torch.device("cpu"))
        if state["digest"] != digest or not isinstance(state["weights"], torch.Tensor):
            return None
        return state["weights"], json.loads(state["properties"])
    except (WslfastError, OSError, LookupError, TypeError, ValueError):
        return None  # it is trained again
