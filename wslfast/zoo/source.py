"""Back from a zoo to the images its models were trained on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..architecture import Architecture
from ..errors import WslfastError, describe, require
from .catalogue import NAMES
from .datasets import Dataset, load_dataset
from .signals import grid_points
from .store import read_manifest

NETWORKS = {"cnn": Architecture.cnn, "cnn2": Architecture.cnn2, "cnn3": Architecture.cnn3, "lenet5": Architecture.lenet5}


def dataset_of(zoo: str | Path, architecture: Architecture) -> Dataset:
    """The data set that a zoo's manifest names, in the architecture's shape, split and standardised as it was for the zoo.

    A manifest that does not say whether images were standardised is of a version that always did.

    Raises:
        WslfastError: the manifest names none, or the file has moved or is not the one the zoo was trained on.
    """
    provenance = read_manifest(zoo).provenance
    record: Any = provenance.get("dataset")
    require(
        isinstance(record, Mapping) and isinstance(record.get("name"), str) and type(record.get("seed", 0)) is int,
        f"zoo {zoo}: its manifest does not say which data set it was trained on; pass images=",
    )
    fitted = "signals" in record
    require(not fitted, f"zoo {zoo}: its models are fitted to signals ({record['name']!r}), one each: there are no labelled images to read")
    source = record["name"] if record["name"] in NAMES else _file(Path(zoo), record)
    root = record.get("root")
    if root is not None and not Path(str(root)).is_dir():
        root = None  # from another machine: perhaps the files are in the usual places
    standardise = record.get("standardise", True)
    require(type(standardise) is bool, f"zoo {zoo}: its manifest says standardise {describe(standardise)}; expected true or false")
    try:
        data = load_dataset(str(source), architecture.input_shape, seed=record.get("seed", 0), root=root, standardise=standardise)
    except WslfastError as error:
        raise WslfastError(f"zoo {zoo}: the data set it was trained on cannot be read: {error}") from None
    known, found = record.get("sha256"), data.provenance.get("sha256")
    what = f"data set {source!r} is not what" if record["name"] in NAMES else f"{source} is not the file"
    require(known == found, f"zoo {zoo}: {what} it was trained on (its SHA-256 differs)")
    return data


def points_of(zoo: str | Path) -> Tensor | None:
    """Where the models of a zoo of implicit neural representations are asked, ``[H * W, 2]``; None for any other zoo."""
    record: Any = read_manifest(zoo).provenance.get("dataset")
    if not isinstance(record, Mapping) or record.get("signals") != "images":
        return None
    size = record.get("points")
    whole = isinstance(size, (list, tuple)) and len(size) == 2 and all(type(s) is int and 0 < s <= 1 << 14 for s in size)
    require(whole, f"zoo {zoo}: its manifest says points {describe(size)}; expected height and width")
    assert size is not None
    return grid_points(*size)


def _file(zoo: Path, record: Mapping[str, Any]) -> Path:
    """The data set's file: beside the zoo or in its folder, so that both can move together, else where it was."""
    name = Path(str(record["name"])).name
    for place in (zoo / name, zoo.resolve().parent / name):
        if place.is_file():
            return place
    return Path(str(record.get("path", name)))


def network(name: str, channels: int | None = None, *, dropout: float = 0.0) -> Architecture:
    """A published network by name, with ``channels`` input channels (default: the published number)."""
    require(name in NETWORKS, f"architecture: expected one of {sorted(NETWORKS)}, got {name!r}")
    return NETWORKS[name](dropout=dropout) if channels is None else NETWORKS[name](channels, dropout=dropout)
