"""The field's own zoos, as they are: ray-tune trees and pickled data sets become a zoo of this library, and nothing of them is run."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...architecture import Architecture
from ...errors import WslfastError, logger, require
from ...files import write_text
from ...population import Population
from ...profiling import region
from ..build import LARGEST_WEIGHT
from ..datasets import load_dataset
from ..identical import Identical, digest
from ..manifest import MANIFEST, SPLITS, Manifest, Shard, normalised, plain
from ..splits import Split
from ..store import SHARD_BYTES, write_shards
from . import pickled, ray
from .found import UNKNOWN, Found, Skips, State, unreadable
from .recognise import contradiction, fits, recognise

__all__ = ["Imported", "import_zoo"]

SKIPPED = "skipped.json"
_IDENTICAL = "identical weights"


@dataclass(frozen=True)
class Imported:
    """What an import gave.

    Attributes:
        rows, models: checkpoints in the new zoo, and the models they are of (copies of a trial are one).
        architecture: of all of them.
        skipped: ``{reason: count}``; OUT/skipped.json lists every one as ``{"where", "reason", "detail"}``.
    """

    rows: int
    models: int
    architecture: Architecture
    skipped: Mapping[str, int]


def import_zoo(
    source: str | Path,
    out: str | Path,
    *,
    epochs: Sequence[int] | None = None,
    architecture: Architecture | None = None,
    threshold: float = LARGEST_WEIGHT,
    split: Sequence[float] = (0.7, 0.15, 0.15),
    seed: int = 0,
    dataset: str | Path | None = None,
    overwrite: bool = False,
) -> Imported:
    """Read a published zoo and store it as one of this library.

    Args:
        source: a folder of ray-tune trials (``NN_tune_trainable_*`` and the like, at any depth), a folder with
            ``dataset_{train,val,test}.pt`` (trials come first where both are there), or one such file.
        out: folder of the new zoo. Rows are in order of sorted folders, then epochs; shards are written as they fill.
        epochs: those to keep; by default every one that is there.
        architecture: what the models are; by default recognised from ``params.json`` and the weights' names and shapes.
        threshold: a checkpoint with a larger weight (or NaN) is left out, as the published pipeline does.
        split: shares of the models for train, val and test; pickled data sets keep the split their names say.
        seed: draws that split.
        dataset: what the models were trained on (see :func:`wslfast.zoo.load_dataset`), recorded so that training and evaluation
            find their images, which are standardised.
        overwrite: replace a zoo that is already in ``out``.

    Raises:
        WslfastError: nothing usable in ``source``, a zoo already in ``out``, or a disk that refuses. What is merely missing or
            broken is skipped and reported.
    """
    folder, place = Path(source), Path(out)
    require(folder.exists(), f"source: {source}: no such file or folder")
    require(threshold > 0, f"threshold: expected a positive number, got {threshold!r}")
    require(overwrite or not (place / MANIFEST).exists(), f"out: {out}: there is a zoo already; overwrite=True (--overwrite) replaces it")
    kept = None if epochs is None else frozenset(epochs)
    require(kept is None or all(type(e) is int and e >= 0 for e in kept), f"epochs: expected integers >= 0, got {epochs!r}")
    plan = Split(tuple(split), seed)  # type: ignore[arg-type]
    rows = _Rows(folder, kept, architecture, threshold)
    first = next(iter(rows), None)
    nothing = "; ".join(f"{reason}: {count}" for reason, count in rows.skips.counts().items()) or "no trials, no dataset_*.pt"
    why = next((f"; {e['where']}: {e['detail']}" for e in rows.skips.entries if e["detail"]), "")
    require(first is not None and rows.architecture is not None, f"source: {source}: no usable checkpoint ({nothing}){why}")
    arch = rows.architecture
    assert arch is not None
    limit = threshold if math.isfinite(threshold) else None  # JSON has no infinity; the published default is one
    provenance: dict[str, Any] = {"made_by": "wslfast zoo import", "source": str(source), "threshold": limit}
    if dataset is not None:
        data = load_dataset(dataset, arch.input_shape)
        provenance["dataset"] = {"name": data.name, "classes": data.classes, **data.provenance}

    def describe(shards: Sequence[Shard]) -> Manifest:
        given = None if None in rows.splits else rows.splits
        names = _assigned(plan, rows) if given is None else _together(given, rows)
        moved = sum(one != other for one, other in zip(given or (), names))
        together = len(set(rows.numbers())) - len({rows.identical.family(model) for model in rows.models})
        left_out = rows.skips.counts().get(_IDENTICAL, 0)
        identical = {"left_out": left_out, "kept": rows.repeated, "together": together, "moved": moved}
        record: dict[str, Any] = {"by": "model", "seed": seed if given is None else None}
        record["fractions"] = list(plan.fractions) if given is None else None
        columns = {"model": rows.numbers(), "epoch": tuple(rows.epochs), **rows.columns(), "split": names}
        skipped = {**provenance, "skipped": rows.skips.counts(), "identical": identical}
        return Manifest(
            normalised(arch.to_dict(), "architecture"),
            arch.num_weights,
            len(rows.models),
            columns,
            record,
            normalised(skipped, "provenance"),
            tuple(shards),
        )

    with region("import"):
        manifest = write_shards(place, rows, describe)
    write_text(place / SKIPPED, json.dumps(rows.skips.entries, indent=1, ensure_ascii=False) + "\n")
    _say(place / SKIPPED, rows, manifest.provenance["identical"])
    return Imported(len(rows.models), len(set(rows.numbers())), arch, rows.skips.counts())


def _assigned(plan: Split, rows: _Rows) -> tuple[str, ...]:
    """The split of every row. All models of the source are dealt out, those left out too, so that another choice of epochs, or a checkpoint
    that is broken, moves no other model; unless that left a split without models that could have some. Copies of a trial go together."""
    families = [rows.identical.family(model) for model in rows.models]
    everybody = sorted({*map(rows.identical.family, rows.seen), *families})
    of = dict(zip(everybody, plan.assign(everybody), strict=True))
    names = tuple(of[family] for family in families)
    alone = plan.assign(families)
    return names if set(alone) <= set(names) else alone


def _together(given: Sequence[str | None], rows: _Rows) -> tuple[str, ...]:
    """The splits that the source names; of copies of a model in several, the first one's."""
    first: dict[int, str] = {}
    return tuple(first.setdefault(rows.identical.family(model), str(split)) for model, split in zip(rows.models, given, strict=True))


def _say(file: Path, rows: _Rows, identical: Mapping[str, int]) -> None:
    """What a user has to know of an import, a line each."""
    counts = rows.skips.counts()
    if UNKNOWN in counts:
        what = "zoo import: nothing says which results are those of %d checkpoints; their accuracies stay empty (%s)"
        logger.warning(what, counts[UNKNOWN], file)
    if identical["left_out"]:
        what = "zoo import: %d checkpoints have the weights of another one, to the bit, and are left out (%s)"
        logger.warning(what, identical["left_out"], file)
    if identical["together"]:
        logger.warning("zoo import: %d models share a checkpoint with another one, to the bit, and are in its split", identical["together"])
    if identical["moved"]:
        logger.warning("zoo import: %d checkpoints of models that are in two splits went to the first one", identical["moved"])
    if identical["kept"]:
        logger.info("zoo import: %d checkpoints have the weights of an earlier epoch of their own model; they are kept", identical["kept"])


class _Rows:
    """The source's checkpoints in shards, one in memory at a time; every pass over it reads the source again."""

    def __init__(self, source: Path, epochs: Collection[int] | None, architecture: Architecture | None, threshold: float) -> None:
        self._source, self._epochs, self._threshold = source, epochs, threshold
        self.architecture = architecture
        self._files = pickled.files_of(source)
        self._tree = not source.is_file() and (not self._files or ray.is_tree(source))
        self._guess: str | None = None  # where the architecture was recognised, if its activation is a guess
        self._begin()

    def _begin(self) -> None:
        self.skips = Skips()
        self._note_guess()
        self.seen: set[int] = set()  # models that the source has, whether or not anything of them is kept
        self.models: list[int] = []
        self.epochs: list[int] = []
        self.splits: list[str | None] = []
        self._properties: list[Mapping[str, Any]] = []
        self.identical = Identical()
        self.repeated = 0  # rows that repeat an earlier epoch of their own model

    def __iter__(self) -> Iterator[Tensor]:
        self._begin()
        waiting: list[Tensor] = []
        for found in self._found():
            row = self._row(found)
            if row is None:
                continue
            first = self.identical.add(digest(row), found.model, found.epoch, found.where)
            if first is not None and first.model == found.model and first.epoch != found.epoch:
                self.repeated += 1
            elif first is not None:
                self.skips.add(found.where, _IDENTICAL, f"the same as {first.where}")
                continue
            if found.unknown:
                self.skips.add(found.where, UNKNOWN, found.unknown)
            self.models.append(found.model)
            self.epochs.append(found.epoch)
            self.splits.append(found.split)
            self._properties.append(found.properties)
            waiting.append(row)
            if 4 * len(waiting) * len(row) >= SHARD_BYTES:
                yield torch.stack(waiting)
                waiting = []
        if waiting:
            yield torch.stack(waiting)

    def numbers(self) -> tuple[int, ...]:
        """The model of every row: one for the copies of a trial, unless two of them differ at one epoch."""
        epochs: dict[int, list[int]] = {}
        for model, epoch in zip(self.models, self.epochs, strict=True):
            epochs.setdefault(self.identical.family(model), []).append(epoch)
        one = {family for family, own in epochs.items() if len(set(own)) == len(own)}
        return tuple(family if (family := self.identical.family(model)) in one else model for model in self.models)

    def columns(self) -> dict[str, tuple[Any, ...]]:
        """The properties by name, None where a checkpoint lacks one."""
        names = dict.fromkeys(name for record in self._properties for name in record if name not in ("model", "epoch", "split"))
        table = {name: tuple(plain(record.get(name), name) for record in self._properties) for name in names}
        return {name: column for name, column in table.items() if any(value is not None for value in column)}

    def _found(self) -> Iterator[Found]:
        if not self._tree:
            yield from pickled.checkpoints(self._files, self.architecture, self._epochs, self.skips, self.seen)
            return
        for file in self._files.values():  # the published pipeline leaves what it made of the trials beside them
            self.skips.add(file.name, "a data set beside trials", "the trials are read; name the file itself to read it")
        yield from ray.checkpoints(self._source, self._epochs, self.skips, self.seen)

    def _settings(self, found: Found) -> Mapping[str, Any]:
        """A trial's settings; if they do not state the activation, with that of the first trial that does."""
        if "model::nlin" in found.config:
            return found.config
        others = ray.stated(self._source, "model::nlin") if self._tree else None
        if others is None:
            self._guess = found.where
            self._note_guess()
        return {**found.config, **({} if others is None else {"model::nlin": others})}

    def _note_guess(self) -> None:
        if self._guess is not None:
            self.skips.add(self._guess, "activation not stated", "taken for the default; pass the architecture if it is another")

    def _row(self, found: Found) -> Tensor | None:
        """The checkpoint's weights ``[P]``, or None and a note why not."""
        try:
            state = found.read()
            shapes = {name: tuple(value.shape) for name, value in state.items()}
            if self.architecture is None:
                self.architecture = recognise(self._settings(found), shapes)
            other = None if fits(self.architecture, shapes) else f"expected {self.architecture.name!r}"
            wrong = other or contradiction(self.architecture, found.config)
            if wrong is not None:
                self.skips.add(found.where, "another architecture", wrong)
                return None
            row = _weights(self.architecture, state)
        except WslfastError as error:
            self.skips.add(found.where, "unreadable checkpoint", unreadable(error))
            return None
        if not bool(row.isfinite().all()):
            self.skips.add(found.where, "not finite")
            return None
        if float(row.abs().max()) > self._threshold:
            self.skips.add(found.where, "weight above threshold", f"{float(row.abs().max()):g} > {self._threshold:g}")
            return None
        return row


def _weights(architecture: Architecture, state: State) -> Tensor:
    floating = {name: value for name, value in state.items() if value.is_floating_point() or name.endswith("num_batches_tracked")}
    require(len(floating) == len(state), "weights that are not floating-point numbers")
    return Population.from_state_dicts(architecture, [state]).weights[0]


assert set(pickled.SPLITS) == set(SPLITS)
