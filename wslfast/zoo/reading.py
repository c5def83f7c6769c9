"""Reading a stored zoo: the population of its rows, its manifest, a summary.

Nothing is trusted: the manifest is validated (``manifest.py``), file names cannot leave the folder, and each shard's size,
SHA-256, header, shape and dtype are checked before a row is used (``shards.py``). No pickle is ever opened.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import compress
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from ..architecture import Architecture
from ..errors import WslfastError, require
from ..kernels.default_device import on_the_cpu
from ..population import Population
from .manifest import KIND, MANIFEST, SPLITS, Manifest, normalised
from .shards import bytes_of, check_shards, read_shard, rows_of, sound_part

_PATIENCE = 5  # readings of the manifest while somebody replaces the zoo


class _OfOneArchitecture(Protocol):
    @property
    def architecture(self) -> Architecture: ...


Part = TypeVar("Part", bound=_OfOneArchitecture)  # a Population, or a MappedZoo


def read_manifest(path: str | Path) -> Manifest:
    """The validated manifest of the zoo in folder ``path``. Raises WslfastError naming the file and the field that is wrong."""
    file = Path(path) / MANIFEST
    return Manifest.parse(bytes_of(Path(path), MANIFEST), str(file))


@on_the_cpu
def load_zoo(
    path: str | Path,
    split: str | None = None,
    *,
    architecture: Architecture | str | None = None,
    verify: bool = True,
    skip_bad: bool = False,
) -> Population:
    """The population that is stored in the folder ``path``: every row, or the rows of one split, in the order of the manifest.

    Args:
        path: a folder written by :func:`save_zoo`.
        split: None for every row, or "train", "val", "test".
        architecture: in a zoo of several architectures, the one to load: its label, or the architecture itself (:func:`load_parts` loads
            all). For a zoo whose architecture cannot be rebuilt from its manifest, what its models are. Otherwise it has to agree with the
            manifest.
        verify: check every shard's SHA-256. The rest is always checked.
        skip_bad: leave out shards that are missing or damaged, with one warning that counts them and their rows, instead of raising.

    Raises:
        WslfastError: naming the manifest's field or the shard that is missing, damaged or not what the manifest says.
    """
    require(split is None or split in SPLITS, f"split: expected None or one of {SPLITS}, got {split!r}")
    folder = Path(path)
    raw = bytes_of(folder, MANIFEST)
    for _ in range(_PATIENCE):
        try:
            return _load(folder, Manifest.parse(raw, str(folder / MANIFEST)), split, architecture, verify, skip_bad)
        except (WslfastError, OSError) as error:
            before, raw = raw, bytes_of(folder, MANIFEST)
            if raw == before and isinstance(error, WslfastError):
                raise
            if raw == before:
                raise WslfastError(f"{folder}: cannot be read: {error}") from error
    raise WslfastError(f"{folder}: the zoo was replaced {_PATIENCE} times while it was read")


@on_the_cpu
def load_parts(path: str | Path, split: str | None = None, *, skip_bad: bool = False) -> dict[str, Population]:
    """The populations of a zoo, by the label of their architecture; in a zoo of one architecture the label is its name. Architectures
    without a row in the split are left out."""
    return parts_of(path, split, lambda label: load_zoo(path, split, architecture=label, skip_bad=skip_bad))


def parts_of(path: str | Path, split: str | None, read: Callable[[str | None], Part]) -> dict[str, Part]:
    """What ``read`` returns for each architecture of which the split has a row, by label. A zoo of one architecture is read with None,
    and is under the architecture's name. Raises WslfastError if the split has no row."""
    manifest = read_manifest(path)
    if not manifest.kinds:
        whole = read(None)
        return {whole.architecture.name: whole}
    rows = zip(manifest.properties[KIND], manifest.properties["split"], strict=True)
    in_split = {label for label, own in rows if split in (None, own)}
    require(bool(in_split), f"{path}: no row is in split {split!r}; there are {sorted(set(manifest.properties['split']))}{dealt(split)}")
    return {label: read(label) for label in manifest.kinds if label in in_split}


def _load(
    folder: Path, manifest: Manifest, split: str | None, architecture: Architecture | str | None, verify: bool, skip_bad: bool
) -> Population:
    manifest, network, chosen, properties = selection(folder, manifest, split, architecture, verify, skip_bad)
    weights = torch.empty(sum(chosen), network.num_weights, dtype=torch.float32)
    at = 0
    for shard, shape, kept, places in zip(manifest.shards, manifest.shapes, *in_shards(manifest, chosen), strict=True):
        if len(kept) == 0 and manifest.kinds:
            continue
        part = rows_of(read_shard(folder, shard, shape, verify), places, network.num_weights)
        weights[at : at + len(part)] = part
        at += len(part)
    return Population(network, weights, properties)


def selection(
    folder: Path, manifest: Manifest, split: str | None, architecture: Architecture | str | None, verify: bool, skip_bad: bool
) -> tuple[Manifest, Architecture, list[bool], dict[str, tuple[Any, ...]]]:
    """The manifest (with ``skip_bad`` that of the sound shards), the architecture that is asked for, which rows are of it and in the
    split, and the properties of these."""
    if skip_bad:
        manifest = sound_part(folder, manifest, verify)
    else:
        check_shards(folder, manifest)  # a hole is named now: before anything is allocated, not in the middle of an epoch
    where = str(folder / MANIFEST)
    network, of_it = _kind(manifest, architecture, where)
    chosen = _rows(manifest, of_it, split, where)
    return manifest, network, chosen, {name: tuple(compress(column, chosen)) for name, column in manifest.properties.items()}


def _kind(manifest: Manifest, architecture: Architecture | str | None, where: str) -> tuple[Architecture, list[bool]]:
    """The architecture that is asked for, and which rows are of it. Raises WslfastError where a zoo of several is asked for none."""
    if not manifest.kinds:
        if isinstance(architecture, str):
            name = manifest.architecture.get("name")
            require(architecture == name, f"{where}: architecture: it is a zoo of {name!r} alone, got {architecture!r}")
            architecture = None
        if architecture is None:
            return manifest.rebuild(where), [True] * manifest.rows
        _agree(architecture, manifest, where)
        return architecture, [True] * manifest.rows
    need = f"{where}: it is a zoo of several architectures: {manifest.labels}"
    require(architecture is not None, f"{need}; choose one (architecture=, --architecture), or read all with wslfast.zoo.load_parts")
    if isinstance(architecture, Architecture):
        labels = [label for label in manifest.kinds if manifest.rebuild(where, label).same_network(architecture)]
        require(len(labels) > 0, f"{need}; none is architecture={architecture.name!r}")
        label = labels[0]
    else:
        label = str(architecture)
        require(label in manifest.kinds, f"{need}; got {architecture!r}")
    return manifest.rebuild(where, label), [own == label for own in manifest.properties[KIND]]


def _rows(manifest: Manifest, of_it: Sequence[bool], split: str | None, where: str) -> list[bool]:
    """Which rows are of an architecture (``of_it``) and in the split. Raises WslfastError if none is."""
    splits = [own for own, kept in zip(manifest.properties["split"], of_it, strict=True) if kept]
    chosen = [kept and split in (None, own) for own, kept in zip(manifest.properties["split"], of_it, strict=True)]
    require(any(chosen), f"{where}: no row is in split {split!r}; there are {sorted(set(splits))}{dealt(split)}")
    return chosen


def in_shards(manifest: Manifest, chosen: Sequence[bool]) -> tuple[list[Tensor], list[Tensor]]:
    """Of every shard: the numbers of the chosen rows, counted in the shard, and where they are in its tensor (:func:`rows_of`)."""
    numbers, places = [], []
    widths, at = manifest.widths if manifest.kinds else [], 0
    for shard in manifest.shards:
        kept = torch.tensor(chosen[at : at + shard.rows]).nonzero().flatten()
        numbers.append(kept)
        if manifest.kinds:
            starts = torch.tensor([0, *widths[at : at + shard.rows]]).cumsum(0)
            places.append(starts[kept])
        else:
            places.append(kept)
        at += shard.rows
    return numbers, places


def _agree(architecture: Architecture, manifest: Manifest, where: str) -> None:
    """``architecture`` is the manifest's network, where that can be rebuilt; else it has its P, and its names and shapes."""
    require(isinstance(architecture, Architecture), f"architecture: expected an Architecture, got {type(architecture).__name__}")
    require(
        architecture.num_weights == manifest.num_weights,
        f"{where}: architecture: the zoo has {manifest.num_weights} weights per model, architecture= has {architecture.num_weights}",
    )
    recorded, ours = manifest.architecture, normalised(architecture.to_dict(), "architecture")
    if "parameters" in recorded and "parameters" in ours:
        same = recorded["parameters"] == ours["parameters"]
        require(same, f"{where}: architecture: parameters differ from those of architecture={architecture.name!r}")
    if "graph" in recorded or "layers" in recorded or "recipe" in recorded:
        other = f"{where}: architecture: the zoo's is another network than architecture={architecture.name!r}"
        require(manifest.rebuild(where).same_network(architecture), other)


def dealt(split: str | None) -> str:
    """What to do where a zoo has no model in a split."""
    if split == "train":
        return " (wslfast generate --split drawn deals new models out to all three)"
    return " (split='train', --split train, takes the models that are trained on)" if split == "test" else ""


def summarize(path: str | Path) -> dict[str, Any]:
    """What ``wslfast zoo show`` prints: rows, models, splits, epochs, accuracy quantiles, architecture, provenance, bytes.

    Reads the manifest alone; ``quantiles`` holds minimum, quartiles and maximum of each accuracy column.
    """
    manifest = read_manifest(path)
    table = manifest.properties
    quantiles = {}
    for name in ("train_acc", "val_acc", "test_acc", "ggap"):
        values = [v for v in table.get(name, ()) if type(v) in (int, float)]
        if values:
            at = torch.tensor([0, 0.25, 0.5, 0.75, 1], dtype=torch.float64)
            quantiles[name] = torch.tensor(values, dtype=torch.float64).quantile(at).tolist()
    return {
        "rows": manifest.rows,
        "models": len(set(table["model"])),
        "splits": {
            name: {"rows": table["split"].count(name), "models": len({m for m, s in zip(table["model"], table["split"]) if s == name})}
            for name in SPLITS
        },
        "split_seed": manifest.split["seed"],
        "epochs": sorted({e for e in table.get("epoch", ()) if type(e) is int}),
        "quantiles": quantiles,
        **_kinds(manifest),
        "shards": len(manifest.shards),
        "bytes": sum(shard.bytes for shard in manifest.shards),
        "properties": list(table),
        "provenance": dict(manifest.provenance),
    }


def _kinds(manifest: Manifest) -> dict[str, Any]:
    if not manifest.kinds:
        architecture = manifest.architecture
        return {
            "architecture": str(architecture.get("name")),
            "input_shape": architecture.get("input_shape"),
            "weights_per_model": manifest.num_weights,
        }
    labels = manifest.properties[KIND]
    by_label = {label: [m for m, at in zip(manifest.properties["model"], labels, strict=True) if at == label] for label in manifest.kinds}
    return {
        "architectures": {
            label: {"rows": len(models), "models": len(set(models)), "weights_per_model": manifest.kinds[label].num_weights}
            for label, models in by_label.items()
        }
    }
