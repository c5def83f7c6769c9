"""A zoo on disk: safetensors shards of stacked weights and one ``manifest.json`` that lists them.

Writing is atomic. Shards are written under temporary names, synced and renamed; the manifest comes last and replaces the old one
in one step; shards of an overwritten zoo have other names and are removed afterwards. So whoever reads while a zoo is replaced,
and whoever comes after a crash, finds the old zoo or the new one. One writer a folder at a time. Reading is in ``reading.py``.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Union

import safetensors.torch
import torch
from torch import Tensor

from ..errors import WslfastError, check_positive, describe, logger, require
from ..files import check_folder, write_bytes
from ..kernels.default_device import on_the_cpu
from ..population import Population
from ..profiling import region
from .datasets import Dataset
from .identical import digest, draw, elsewhere
from .manifest import KIND, MANIFEST, SPLITS, Kind, Manifest, Shard, normalised, plain
from .shards import OURS
from .splits import Split
from .trained_on import described

Part = Union[Tensor, Sequence[Tensor]]  # a shard's rows: [rows, P], or, where they differ in length, one after another
SHARD_BYTES = 64 << 20
_TEMPORARY = re.compile(r"\.(shard-.*\.safetensors|manifest\.json)\.\d+\.tmp")


@on_the_cpu
def save_zoo(
    population: Population | Mapping[str, Population],
    path: str | Path,
    *,
    dataset: str | Path | Dataset | None = None,
    splits: Split | Sequence[str] | None = None,
    provenance: Mapping[str, Any] | None = None,
    standardise: bool = False,
    shard_rows: int | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Write a population as a zoo in the folder ``path``, as ``train``, ``evaluate`` and ``generate`` will read it; returns its manifest.

    Args:
        population: one population; or, for a zoo of several architectures, a mapping of labels to populations. Rows with the same
            ``model`` property (int) are checkpoints of one model; without that property each row is a model.
        path: the folder; made if absent. Files in it that are not a zoo's are left alone.
        dataset: what the models were trained on: a name or a file (see :func:`wslfast.zoo.load_dataset`), or a :class:`Dataset`, whose
            images are then kept in the folder unless they come from a file. Without it, training and evaluation have to be given images.
        splits: a :class:`Split`, which is drawn by model and recorded with its seed; or "train", "val" or "test" for each row. By default
            the property ``split``, and ``Split()`` where there is none. A drawn split puts models that share a trained checkpoint, to
            the bit, together.
        provenance: JSON-able facts about how the zoo came to be.
        standardise: whether the models saw the images of ``dataset`` standardised (see :func:`wslfast.zoo.load_dataset`); by default as
            they are.
        shard_rows: rows per shard; by default what makes shards of 64 MiB.
        overwrite: replace a zoo that is already there.

    Raises:
        WslfastError: for a zoo that is there, a model in two splits, values JSON cannot hold, weights that are not finite, images that
            do not fit the models, or a disk that refuses (what was there before is intact, and no stray file stays).
    """
    folder = Path(path)
    populations = _by_label(population)
    rows = sum(len(p) for p in populations.values())
    require(rows > 0, "population: expected at least one model to save, got none")
    require(overwrite or not (folder / MANIFEST).exists(), f"{folder}: there is a zoo already; overwrite=True replaces it")
    check_folder(folder, "zoo")
    weights = {label: p.weights.detach().to("cpu", torch.float32) for label, p in populations.items()}
    sound = all(bool(w.isfinite().all()) for w in weights.values())
    require(sound, "population: expected finite weights; drop diverged models first")
    facts: dict[str, Any] = dict(provenance) if provenance is not None else {"made_by": "wslfast.save_zoo"}
    images = None
    if dataset is not None:
        images = described(dataset, [p.architecture for p in populations.values()], standardise)
        facts["dataset"] = images.record
    widest = max(w.shape[1] for w in weights.values())
    rows_each = shard_rows or max(1, SHARD_BYTES // (4 * widest))
    check_positive("shard_rows", rows_each)
    columns, split = _table(populations, splits)
    parts: Sequence[Part]
    if len(weights) == 1:
        parts = next(iter(weights.values())).split(rows_each)
    else:
        every = [row for w in weights.values() for row in w]
        parts = [every[i : i + rows_each] for i in range(0, rows, rows_each)]
    table = {label: Kind(normalised(p.architecture.to_dict(), "architecture"), p.weights.shape[1]) for label, p in populations.items()}

    def manifest(shards: Sequence[Shard]) -> Manifest:
        return described_by(table, columns, split, normalised(facts, "provenance"), shards)

    # what would be refused when read is refused now, before anything is written
    sketch = manifest([Shard(f"shard-{i:05d}.safetensors", len(part), 1, "0" * 64) for i, part in enumerate(parts)])
    Manifest.parse(sketch.to_json(), str(folder / MANIFEST))
    with region("save"):
        if images is not None:
            facts["dataset"] = images.keep(folder)
        return write_shards(folder, parts, manifest)


def described_by(
    table: Mapping[str, Kind],
    columns: Mapping[str, tuple[Any, ...]],
    split: Mapping[str, Any],
    provenance: Mapping[str, Any],
    shards: Sequence[Shard],
) -> Manifest:
    """The manifest of a zoo with this table of architectures: of one (schema 1), or of several (schema 2)."""
    rows = len(columns["model"])
    if len(table) > 1:
        return Manifest({}, 0, rows, columns, split, provenance, tuple(shards), dict(table))
    (kind,) = table.values()
    return Manifest(kind.architecture, kind.num_weights, rows, columns, split, provenance, tuple(shards))


def _by_label(population: Any) -> dict[str, Population]:
    """One population, or several by label."""
    if isinstance(population, Population):
        return {population.architecture.name: population}
    named = isinstance(population, Mapping) and all(isinstance(k, str) and isinstance(p, Population) for k, p in population.items())
    require(named and len(population) > 0, lambda: f"population: expected a Population, or several by label, got {describe(population)}")
    return dict(population)


def _table(
    populations: Mapping[str, Population], splits: Split | Sequence[str] | None
) -> tuple[dict[str, tuple[Any, ...]], dict[str, Any]]:
    """The property columns as JSON holds them, ``model`` first and ``split`` last, and the manifest's split record."""
    columns = _columns(populations)
    rows = [row for p in populations.values() for row in p.weights.detach().cpu()]
    if splits is None:
        given = [value for p in populations.values() for value in p.properties.get("split", (None,) * len(p))]
        splits = Split() if any(value not in SPLITS for value in given) else given
    if isinstance(splits, Split):
        split: dict[str, Any] = {"by": "model", "seed": splits.seed, "fractions": list(splits.fractions)}
        wrong = [m for m in columns["model"] if type(m) is not int]
        require(not wrong, f"properties['model']: expected integers, got {wrong[:1]}")
        drawn = draw(splits, rows, columns["model"], columns.get("epoch"))
        if drawn.copies:
            logger.warning("zoo: %d models share a checkpoint with another one, to the bit, and are in its split", drawn.copies)
        names, twice = drawn.names, sum(drawn.elsewhere)
    else:
        require(
            not isinstance(splits, str) and len(splits) == len(rows),
            f"splits: expected a Split or {len(rows)} names of {SPLITS}, got {splits!r:.60}",
        )
        split = {"by": "model", "seed": None, "fractions": None}
        names = tuple(splits)
        twice = sum(elsewhere([digest(row) for row in rows], names))
    if twice:
        logger.warning("zoo: %d checkpoints have weights that another split has, to the bit", twice)
    return {**columns, "split": names}, split


def _columns(populations: Mapping[str, Population]) -> dict[str, tuple[Any, ...]]:
    """The properties of all rows, ``model`` first; of several populations with each row's label, and models numbered through."""
    if len(populations) == 1:
        (population,) = populations.values()
        table = {n: tuple(plain(v, f"properties[{n!r}]") for v in c) for n, c in population.properties.items() if n != "split"}
        return {"model": table.pop("model", tuple(range(len(population)))), **table}
    names = dict.fromkeys(n for p in populations.values() for n in p.properties if n not in ("model", "split", KIND))
    every: dict[str, list[Any]] = {"model": [], KIND: [], **{name: [] for name in names}}
    first = 0
    for label, p in populations.items():
        models = p.properties.get("model", tuple(range(len(p))))
        numbers = {model: first + i for i, model in enumerate(dict.fromkeys(models))}
        first += len(numbers)
        every["model"] += [numbers[model] for model in models]
        every[KIND] += [label] * len(p)
        for name in names:
            every[name] += [plain(v, f"properties[{name!r}]") for v in p.properties.get(name, (None,) * len(p))]
    return {name: tuple(column) for name, column in every.items()}


def write_shards(folder: Path, parts: Iterable[Part], describe: Callable[[Sequence[Shard]], Manifest]) -> Manifest:
    """Shards first, one in memory at a time, synced; then the manifest in one step; then what of ours it does not list goes.

    ``parts`` can be gone through more than once; ``describe`` is called when all shards are written.
    """
    made: list[Path] = []
    shards: list[Shard] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        generation = _generation(folder, parts)
        for i, part in enumerate(parts):
            blob = safetensors.torch.save({"weights": _tensor(part)})
            shard = Shard(f"shard-{i:05d}{generation}.safetensors", len(part), len(blob), hashlib.sha256(blob).hexdigest())
            existed = (folder / shard.file).exists()
            write_bytes(folder / shard.file, blob)
            shards.append(shard)
            if not existed:
                made.append(folder / shard.file)
        manifest = describe(shards)
        write_bytes(folder / MANIFEST, manifest.to_json())
        made.clear()
    except (OSError, WslfastError) as error:
        need = f" (about {4 * sum(_tensor(part).numel() for part in parts):,} bytes)" if isinstance(parts, Sequence) else ""
        raise WslfastError(f"{folder}: cannot write the zoo{need}: {error}") from error
    finally:
        for stray in made:
            stray.unlink(missing_ok=True)
    listed = {shard.file for shard in shards}
    with contextlib.suppress(OSError):  # the zoo is complete: what cannot be removed now goes with the next writing
        for name in os.listdir(folder):
            if name not in listed and (OURS.fullmatch(name) or _TEMPORARY.fullmatch(name)):
                (folder / name).unlink(missing_ok=True)
    return manifest


def _tensor(part: Part) -> Tensor:
    return part.contiguous() if isinstance(part, Tensor) else torch.cat([row.reshape(-1) for row in part])


def _generation(folder: Path, parts: Iterable[Part]) -> str:
    """What shard names carry: nothing in a fresh folder, else a digest of the content, so that no other content is written over."""
    if not any(OURS.fullmatch(name) for name in os.listdir(folder)):
        return ""
    content = hashlib.sha256()
    for part in parts:
        content.update(len(part).to_bytes(8, "little"))
        content.update(_tensor(part).numpy().data)
    return "." + content.hexdigest()[:12]
