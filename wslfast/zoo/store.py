"""A zoo on disk: safetensors shards of stacked weights and one ``manifest.json`` that lists them.

Writing is atomic. Shards are written under temporary names, synced and renamed; the manifest comes last and replaces the old one
in one step; shards of an overwritten zoo have other names and are removed afterwards. So whoever reads while a zoo is replaced,
and whoever comes after a crash, finds the old zoo or the new one. One writer a folder at a time.

Reading trusts nothing: the manifest is validated (``manifest.py``), file names cannot leave the folder, and each shard's size,
SHA-256, header, shape and dtype are checked before a row is used. No pickle is ever opened.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import compress
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from ..architecture import Architecture
from ..errors import WslfastError, logger, require, say_once
from ..files import write_bytes
from ..population import Population
from ..profiling import region
from .identical import digests, draw, elsewhere
from .manifest import MANIFEST, SPLITS, Manifest, Shard, normalised, plain
from .splits import Split

SHARD_BYTES = 64 << 20
_OURS = re.compile(r"shard-\d{5,}(?P<generation>(?:\.[0-9a-f]{12})?)\.safetensors")
_TEMPORARY = re.compile(r"\.(shard-.*\.safetensors|manifest\.json)\.\d+\.tmp")
_PATIENCE = 5  # readings of the manifest while somebody replaces the zoo


# -- writing -----------------------------------------------------------------------------------------------------------


def save_zoo(
    population: Population,
    path: str | Path,
    *,
    splits: Split | Sequence[str],
    provenance: Mapping[str, Any],
    shard_rows: int | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Write ``population`` as a zoo in the folder ``path`` and return its manifest.

    Args:
        population: any; a ``model`` property (int) says which rows are checkpoints of one model, else each row is a model.
        path: the folder; made if absent. Files in it that are not a zoo's are left alone.
        splits: a :class:`Split`, drawn by model and recorded with its seed, or one of train / val / test for each row. Drawn, models
            that share a trained checkpoint to the bit are in one split.
        provenance: JSON-able facts about how the zoo came to be.
        shard_rows: rows a shard; by default what makes shards of 64 MiB.
        overwrite: replace a zoo that is already there.

    Raises:
        WslfastError: for a zoo that is there, a model in two splits, values JSON cannot hold, weights that are not finite, or a
            disk that refuses (what was there before is intact, and no stray file stays).
    """
    folder = Path(path)
    require(len(population) > 0, "population: expected at least one model to save, got none")
    require(overwrite or not (folder / MANIFEST).exists(), f"{folder}: there is a zoo already; overwrite=True replaces it")
    weights = population.weights.detach().to("cpu", torch.float32)
    require(bool(weights.isfinite().all()), "population: expected finite weights; drop diverged models first")
    rows_each = shard_rows or max(1, SHARD_BYTES // (4 * weights.shape[1]))
    require(type(rows_each) is int and rows_each > 0, f"shard_rows: expected a positive integer, got {shard_rows!r}")
    columns, split = _table(population, splits)
    counts = [len(part) for part in torch.empty(len(weights), 0).split(rows_each)]

    def manifest(shards: Sequence[Shard]) -> Manifest:
        return Manifest(
            normalised(population.architecture.to_dict(), "architecture"),
            population.architecture.num_weights,
            len(weights),
            columns,
            split,
            normalised(provenance, "provenance"),
            tuple(shards),
        )

    # what would be refused when read is refused now, before anything is written
    sketch = manifest([Shard(f"shard-{i:05d}.safetensors", rows, 1, "0" * 64) for i, rows in enumerate(counts)])
    Manifest.parse(sketch.to_json(), str(folder / MANIFEST))
    with region("save"):
        return write_shards(folder, weights.split(rows_each), manifest)


def _table(population: Population, splits: Split | Sequence[str]) -> tuple[dict[str, tuple[Any, ...]], dict[str, Any]]:
    """The property columns as JSON holds them, ``model`` first and ``split`` last, and the manifest's split record."""
    columns = {
        name: tuple(plain(v, f"properties[{name!r}]") for v in column) for name, column in population.properties.items() if name != "split"
    }
    columns = {"model": columns.pop("model", tuple(range(len(population)))), **columns}
    if isinstance(splits, Split):
        split: dict[str, Any] = {"by": "model", "seed": splits.seed, "fractions": list(splits.fractions)}
        wrong = [m for m in columns["model"] if type(m) is not int]
        require(not wrong, f"properties['model']: expected integers, got {wrong[:1]}")
        drawn = draw(splits, population.weights, columns["model"], columns.get("epoch"))
        if drawn.copies:
            logger.warning("zoo: %d models share a checkpoint with another one, to the bit, and are in its split", drawn.copies)
        names, twice = drawn.names, sum(drawn.elsewhere)
    else:
        require(
            not isinstance(splits, str) and len(splits) == len(population),
            f"splits: expected a Split or {len(population)} names of {SPLITS}, got {splits!r:.60}",
        )
        split = {"by": "model", "seed": None, "fractions": None}
        names = tuple(splits)
        twice = sum(elsewhere(digests(population.weights), names))
    if twice:
        logger.warning("zoo: %d checkpoints have weights that another split has, to the bit", twice)
    return {**columns, "split": names}, split


def write_shards(folder: Path, parts: Iterable[torch.Tensor], describe: Callable[[Sequence[Shard]], Manifest]) -> Manifest:
    """Shards first, one in memory at a time, synced; then the manifest in one step; then what of ours it does not list goes.

    ``parts`` can be gone through more than once; ``describe`` is called when all shards are written.
    """
    made: list[Path] = []
    shards: list[Shard] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        generation = _generation(folder, parts)
        for i, part in enumerate(parts):
            blob = safetensors.torch.save({"weights": part.contiguous()})
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
        need = f" (about {4 * sum(part.numel() for part in parts):,} bytes)" if isinstance(parts, Sequence) else ""
        raise WslfastError(f"{folder}: cannot write the zoo{need}: {error}") from error
    finally:
        for stray in made:
            stray.unlink(missing_ok=True)
    listed = {shard.file for shard in shards}
    with contextlib.suppress(OSError):  # the zoo is complete: what cannot be removed now goes with the next writing
        for name in os.listdir(folder):
            if name not in listed and (_OURS.fullmatch(name) or _TEMPORARY.fullmatch(name)):
                (folder / name).unlink(missing_ok=True)
    return manifest


def _generation(folder: Path, parts: Iterable[torch.Tensor]) -> str:
    """What shard names carry: nothing in a fresh folder, else a digest of the content, so that no other content is written over."""
    if not any(_OURS.fullmatch(name) for name in os.listdir(folder)):
        return ""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part.contiguous().numpy().data)
    return "." + digest.hexdigest()[:12]


# -- reading -----------------------------------------------------------------------------------------------------------


def read_manifest(path: str | Path) -> Manifest:
    """The validated manifest of the zoo in folder ``path``. Raises WslfastError naming the file and the field that is wrong."""
    file = Path(path) / MANIFEST
    return Manifest.parse(_bytes(Path(path), MANIFEST), str(file))


def load_zoo(
    path: str | Path, split: str | None = None, *, architecture: Architecture | None = None, verify: bool = True, skip_bad: bool = False
) -> Population:
    """The population stored in folder ``path``: every row in manifest order, or one split's rows.

    Args:
        path: a folder written by :func:`save_zoo`.
        split: None for every row, or "train", "val", "test".
        architecture: what the models are, for a zoo whose architecture cannot be rebuilt from its manifest; where it can, both must agree.
        verify: check every shard's SHA-256. The rest is always checked.
        skip_bad: leave out shards that are missing or damaged, with one warning that counts them and their rows, instead of raising.

    Raises:
        WslfastError: naming the manifest's field or the shard that is missing, damaged or not what the manifest says.
    """
    require(split is None or split in SPLITS, f"split: expected None or one of {SPLITS}, got {split!r}")
    folder = Path(path)
    raw = _bytes(folder, MANIFEST)
    for _ in range(_PATIENCE):
        try:
            return _load(folder, Manifest.parse(raw, str(folder / MANIFEST)), split, architecture, verify, skip_bad)
        except (WslfastError, OSError) as error:
            before, raw = raw, _bytes(folder, MANIFEST)
            if raw == before and isinstance(error, WslfastError):
                raise
            if raw == before:
                raise WslfastError(f"{folder}: cannot be read: {error}") from error
    raise WslfastError(f"{folder}: the zoo was replaced {_PATIENCE} times while it was read")


def _load(
    folder: Path, manifest: Manifest, split: str | None, architecture: Architecture | None, verify: bool, skip_bad: bool
) -> Population:
    where = str(folder / MANIFEST)
    width = manifest.num_weights
    if skip_bad:
        manifest = sound_part(folder, manifest, verify)
    else:
        check_shards(folder, manifest)  # before anything is allocated
    if architecture is None:
        architecture = manifest.rebuild(where)
    else:
        agree(architecture, manifest, where)
    chosen = [split is None or s == split for s in manifest.properties["split"]]
    require(any(chosen), f"{where}: no row is in split {split!r}; there are {sorted(set(manifest.properties['split']))}")
    weights = torch.empty(sum(chosen), width)
    row = at = 0
    for shard in manifest.shards:
        kept = torch.tensor(chosen[row : row + shard.rows])
        part = _shard(folder, shard, width, verify)[kept]
        weights[at : at + len(part)] = part
        row, at = row + shard.rows, at + len(part)
    columns = {
        name: tuple(value for value, keep in zip(column, chosen, strict=True) if keep) for name, column in manifest.properties.items()
    }
    return Population(architecture, weights, columns)


def check_shards(folder: Path, manifest: Manifest) -> None:
    """Every shard that the manifest lists is a file of the folder and of the right size, and no other one is there."""
    for extra in _extra_shards(folder, manifest):
        raise WslfastError(f"{folder / extra}: extra shard: the manifest does not list it")
    for shard in manifest.shards:
        _check_size(folder, shard, manifest.num_weights)


def sound_part(folder: Path, manifest: Manifest, verify: bool) -> Manifest:
    """The manifest of the shards that can be read: without the others and their rows, which one warning counts.

    Raises WslfastError if none can be read.
    """
    bad: dict[str, str] = {}
    kept: list[bool] = []
    for shard in manifest.shards:
        try:
            _check_size(folder, shard, manifest.num_weights)
            _shard(folder, shard, manifest.num_weights, verify)
        except WslfastError as error:
            bad[shard.file] = str(error)
        kept += [shard.file not in bad] * shard.rows
    reasons = "; ".join([*bad.values()][:3]) + ("; ..." if len(bad) > 3 else "")
    require(any(kept), f"{folder}: none of the zoo's {len(bad)} shards can be read: {reasons}")
    extra = len(_extra_shards(folder, manifest))
    if bad or extra:
        lost = f"{len(bad)} of {len(manifest.shards)} shards with {kept.count(False)} of {manifest.rows} rows left out"
        say_once(f"wslfast: {folder}: {lost}, {extra} extra shards ignored{': ' if bad else ''}{reasons}")
    return replace(
        manifest,
        rows=kept.count(True),
        properties={name: tuple(compress(column, kept)) for name, column in manifest.properties.items()},
        shards=tuple(shard for shard in manifest.shards if shard.file not in bad),
    )


def _extra_shards(folder: Path, manifest: Manifest) -> list[str]:
    """Shards in the folder that are of the zoo's own generation (others belong to a writer at work or one that died) and not listed."""
    names = {shard.file for shard in manifest.shards}
    generations = {m["generation"] for m in map(_OURS.fullmatch, names) if m}
    found = ((name, _OURS.fullmatch(name)) for name in sorted(set(os.listdir(folder)) - names))
    return [name for name, match in found if match is not None and match["generation"] in generations]


def _check_size(folder: Path, shard: Shard, width: int) -> None:
    size = regular_file(folder, shard.file).stat().st_size
    require(size == shard.bytes, f"{folder / shard.file}: expected {shard.bytes:,} bytes, got {size:,}")
    require(size >= 4 * shard.rows * width, f"{folder / shard.file}: {size:,} bytes cannot hold [{shard.rows}, {width}] float32")


def _shard(folder: Path, shard: Shard, width: int, verify: bool) -> torch.Tensor:
    where = folder / shard.file
    data = _bytes(folder, shard.file, shard.bytes)
    if verify:
        digest = hashlib.sha256(data).hexdigest()
        require(
            digest == shard.sha256,
            f"{where}: the shard is damaged or not the manifest's: expected sha256 {shard.sha256[:12]}..., got {digest[:12]}...",
        )
    try:
        tensors = safetensors.torch.load(data)
    except Exception as error:  # whatever the parser makes of bytes that nobody wrote
        raise WslfastError(f"{where}: not a safetensors file: {error}") from error
    return check_weights(tensors, shard, width, str(where))


def check_weights(tensors: Mapping[str, torch.Tensor], shard: Shard, width: int, where: str) -> torch.Tensor:
    """The one tensor that a shard holds, of the dtype and shape that the manifest promises."""
    require(set(tensors) == {"weights"}, f"{where}: expected one tensor 'weights', got {sorted(tensors)[:5]}")
    weights = tensors["weights"]
    require(
        weights.dtype == torch.float32 and weights.shape == (shard.rows, width),
        f"{where}: expected float32 [{shard.rows}, {width}], got {str(weights.dtype).removeprefix('torch.')} {list(weights.shape)}",
    )
    return weights


def agree(architecture: Architecture, manifest: Manifest, where: str) -> None:
    """``architecture`` has the manifest's P and, where names are recorded, its names and shapes."""
    require(isinstance(architecture, Architecture), f"architecture: expected an Architecture, got {type(architecture).__name__}")
    require(
        architecture.num_weights == manifest.num_weights,
        f"{where}: architecture: the zoo has {manifest.num_weights} weights a model, architecture= has {architecture.num_weights}",
    )
    recorded, ours = manifest.architecture, normalised(architecture.to_dict(), "architecture")
    for key in ("layers", "recipe", "parameters"):
        if key in recorded and key in ours:
            require(recorded[key] == ours[key], f"{where}: architecture: {key} differ from those of architecture={architecture.name!r}")


def regular_file(folder: Path, name: str) -> Path:
    """The regular file ``name`` of the folder itself. Raises WslfastError for anything else: a link out, a pipe, nothing."""
    file = folder / name
    try:
        real, home = file.resolve(strict=True), folder.resolve(strict=True)
        mode = real.stat().st_mode
    except FileNotFoundError:
        raise WslfastError(f"{file}: no such file; expected a zoo's {'manifest' if name == MANIFEST else 'shard'}") from None
    except (OSError, RuntimeError, ValueError) as error:
        raise WslfastError(f"{file}: cannot be read: {error}") from None
    require(real.parent == home, f"{file}: expected a file of the zoo's own folder, got a link to elsewhere")
    require(stat.S_ISREG(mode), f"{file}: expected a regular file")
    return real


def _bytes(folder: Path, name: str, size: int = -1) -> bytes:
    """What the file holds; at most one byte more than ``size``, so that a file that grows is noticed and not swallowed."""
    try:
        with open(regular_file(folder, name), "rb") as file:
            data = file.read(size + 1 if size >= 0 else -1)
    except OSError as error:
        raise WslfastError(f"{folder / name}: cannot be read: {error.strerror or error}") from error
    require(size < 0 or len(data) == size, f"{folder / name}: expected {size:,} bytes, got {len(data):,}")
    return data


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
        "architecture": str(manifest.architecture.get("name")),
        "input_shape": manifest.architecture.get("input_shape"),
        "weights_per_model": manifest.num_weights,
        "shards": len(manifest.shards),
        "bytes": sum(shard.bytes for shard in manifest.shards),
        "properties": list(table),
        "provenance": dict(manifest.provenance),
    }
