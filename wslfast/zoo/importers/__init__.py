"""The field's own zoos, and a user's: trials, state dicts and matrices become a zoo of this library, and nothing of them is run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ...architecture import Architecture
from ...errors import logger, require
from ...files import check_folder, folder_made, write_text
from ...profiling import region
from ..build import LARGEST_WEIGHT
from ..datasets import image_shape
from ..manifest import KIND, MANIFEST, SPLITS, Manifest, Shard, normalised
from ..splits import Split
from ..store import described_by, write_shards
from ..trained_on import described
from . import inr, network_files, own, pickled, ray, small_cnn
from .checkpoint import UNKNOWN, Skips, is_note
from .files import ENDINGS, state_files
from .rows import IDENTICAL, Reader, Rows

__all__ = ["Imported", "import_zoo"]

SKIPPED = "skipped.json"


@dataclass(frozen=True)
class Imported:
    """What an import gave.

    Attributes:
        rows, models: checkpoints in the new zoo, and the models they are of (copies of a trial are one).
        architecture: of all of them; of several, the first one's.
        skipped: ``{reason: count}``; OUT/skipped.json lists every one as ``{"where", "reason", "detail"}``.
        architectures: those of a zoo of several by label; of one alone by its name.
        has_dataset: whether the zoo records what its models were trained on.
    """

    rows: int
    models: int
    architecture: Architecture
    skipped: Mapping[str, int]
    architectures: Mapping[str, Architecture]
    has_dataset: bool = False


def import_zoo(
    source: str | Path,
    out: str | Path,
    *,
    epochs: Sequence[int] | None = None,
    architecture: Architecture | None = None,
    network: str | Sequence[str] | None = None,
    table: str | Path | None = None,
    input_shape: Sequence[int] | None = None,
    output: str | int | None = None,
    threshold: float = LARGEST_WEIGHT,
    split: Sequence[float] = (0.7, 0.15, 0.15),
    seed: int = 0,
    dataset: str | Path | None = None,
    standardise: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    padding: str = "valid",
    omega: float = inr.OMEGA,
    overwrite: bool = False,
) -> Imported:
    """Read trained networks, those of a published zoo or your own, and store them as a zoo of this library; returns what was imported.

    Args:
        source: a folder, or one file, of one of these forms (docs/zoos.md has them in full).
            Your own networks, one file each (``.pt``, ``.pth``, ``.ckpt``, ``.safetensors``, ``.npz``), with ``network``: a state dict,
            bare or under one of the usual keys, at any depth. Ray-tune trials (``NN_tune_trainable_*`` and the like), those of the CNN Wild
            Park included. ``dataset_{train,val,test}.pt``, or one such file. The Small CNN Zoo: ``weights.npy``, ``layout.csv``,
            ``metrics.csv.gz``. Implicit representations of DWSNets and NFN. What :func:`export_zoo` wrote.
        out: folder of the new zoo. Rows are in order of sorted names, then epochs; shards are written as they fill.
        epochs: epochs to keep; by default all of them.
        architecture: what the models are; by default recognised. Models of several architectures make one zoo of several.
        network: ``FILE.py:NAME``, a class or a function that is called without arguments and gives the module; or several of them. That
            file is the only code that runs.
        table: CSV file with a column ``file``. Its other columns become properties; ``model``, ``epoch`` and ``split`` say which model,
            epoch and split a file is of.
        input_shape: of one query of ``network``; by default that of the data set's images.
        output: which part of its answer counts, where it returns a tuple (a number) or a dict (a name).
        threshold: a checkpoint with a larger weight (or NaN) is left out, as the published pipeline does.
        split: shares of the models for train, val and test; a split that the source states is kept.
        seed: draws that split.
        dataset: what the models were trained on (see :func:`wslfast.zoo.load_dataset`), recorded so that training, evaluation and
            generation find it. Implicit representations need none: they are asked a grid of coordinates.
        standardise: the models saw its images standardised, by the training images' own mean and deviation (a named set's published ones);
            by default as they are: bytes in [0, 1], other numbers unchanged.
        mean, std: the models saw ``(image - mean) / std``, one number per channel or one for all.
        padding: of the Small CNN Zoo's convolutions, ``"valid"`` or ``"same"``.
        omega: frequency of implicit representations of DWSNets and NFN.
        overwrite: replace a zoo that is already in ``out``.

    Raises:
        WslfastError: nothing usable in ``source``, a zoo already in ``out``, or a disk that refuses. What is merely missing or
            broken is skipped and reported.
    """
    folder, place = Path(source), Path(out)
    require(folder.exists(), f"source: {source}: no such file or folder")
    ours = folder.is_dir() and (folder / MANIFEST).is_file() and any(folder.glob("shard-*.safetensors"))
    require(not ours, f"source: {source}: it is a zoo already, and is read as it is: wslfast zoo show, train --zoo, load_zoo")
    apart = not folder.is_dir() or place.resolve() != folder.resolve()
    require(apart, f"out: {out}: expected another folder than the source, among whose files a zoo's would lie")
    require(threshold > 0, f"threshold: expected a positive number, got {threshold!r}")
    require(overwrite or not (place / MANIFEST).exists(), f"out: {out}: there is a zoo already; overwrite=True (--overwrite) replaces it")
    check_folder(place, "zoo")
    kept = None if epochs is None else frozenset(epochs)
    require(kept is None or all(type(e) is int and e >= 0 for e in kept), f"epochs: expected integers >= 0, got {epochs!r}")
    require(architecture is None or network is None, "network: expected None beside architecture= (only one of the two is used)")
    for argument, value in (("input_shape", input_shape), ("output", output)):
        wanted = f"{argument}: expected None without network= (--network FILE.py:NAME), which it is said of, got {value!r}"
        require(network is not None or value is None, wanted)
    for argument, given_as in (("standardise", standardise or None), ("mean", mean), ("std", std)):
        wanted = f"{argument}: expected none without dataset=, whose images it is said of, got {given_as!r}"
        require(dataset is not None or given_as is None, wanted)
    require(padding in small_cnn.PADDINGS, f"padding: expected one of {small_cnn.PADDINGS}, got {padding!r}")
    sensible = isinstance(omega, (int, float)) and not isinstance(omega, bool) and 0 < omega < math.inf
    require(sensible, f"omega: expected a positive number, got {omega!r}")
    plan = Split(tuple(split), seed)  # type: ignore[arg-type]
    named = [] if network is None else [network] if isinstance(network, str) else list(network)
    networks = [(name.rpartition(":")[2], network_files.architecture_of(name, input_shape, dataset, output)) for name in named]
    chosen = _Source.of(folder, networks, own.Table.read(table), architecture, kept, padding, omega, dataset)
    rows = Rows(chosen.read, chosen.architecture or architecture, threshold, chosen.stated)
    first = next(iter(rows), None)
    require(first is not None and len(rows.kinds) > 0, lambda: _nothing(source, folder, rows, networks, kept))
    provenance: dict[str, Any] = {"made_by": "wslfast zoo import", "source": str(source), "kind": chosen.kind}
    provenance["threshold"] = threshold if math.isfinite(threshold) else None  # JSON has no infinity; the published default is one
    if networks:
        provenance["network"] = named
    trained_on = dataset
    given: dict[str, Any] = {"standardise": standardise, "mean": mean, "std": std}
    further: dict[str, Any] = {}
    if dataset is None and chosen.kind == "implicit representations":
        family = inr.KINDS[rows.architectures[0].parameters[0].name.partition(".")[0]]
        trained_on, further = inr.grid_of(rows.architectures[0], family), {"peak": family.peak}
    if dataset is not None and chosen.kind == "Small CNN Zoo" and not standardise and mean is None:
        given |= {"mean": [0.5], "std": [0.5], "grey": True}  # its networks saw grey pixels from -1 to 1
    checked: list[Architecture] = []

    def images(architectures: Sequence[Architecture]) -> None:
        """Record the data set in the shape of every architecture, as soon as one is known."""
        if trained_on is not None and len(checked) < len(architectures):
            record = described(trained_on, architectures[len(checked) :], **given, **further).record
            provenance.setdefault("dataset", record)
            provenance["dataset"]["classes"] = max(provenance["dataset"]["classes"], record["classes"])
            checked.extend(architectures[len(checked) :])

    images(rows.architectures)

    def describe(shards: Sequence[Shard]) -> Manifest:
        images(rows.architectures)
        states = _assigned(plan, rows) if None in rows.splits else _together(rows.splits, rows)
        moved = 0 if None in rows.splits else sum(one != other for one, other in zip(rows.splits, states))
        together = len(set(rows.numbers())) - len({rows.identical.family(model) for model in rows.models})
        left_out = rows.skips.counts().get(IDENTICAL, 0)
        identical = {"left_out": left_out, "kept": rows.repeated, "together": together, "moved": moved}
        record: dict[str, Any] = {"by": "model", "seed": seed if None in rows.splits else None}
        record["fractions"] = list(plan.fractions) if None in rows.splits else None
        columns = {"model": rows.numbers(), "epoch": tuple(rows.epochs), **rows.columns(), "split": states}
        skipped = {**provenance, "skipped": rows.skips.counts(), "identical": identical}
        return described_by(rows.table(), columns, record, normalised(skipped, "provenance"), shards)

    with region("import"), folder_made(place):
        manifest = write_shards(place, rows, describe)
    absent = sorted((kept or frozenset()) - set(rows.epochs))
    if absent:
        logger.warning("zoo import: no model has a checkpoint of epoch %s", ", ".join(map(str, absent)))
    write_text(place / SKIPPED, json.dumps(rows.skips.entries, indent=1, ensure_ascii=False) + "\n")
    _say(place / SKIPPED, rows, manifest)
    every = {label: manifest.rebuild(str(place), label) for label in manifest.kinds} or {rows.kinds[0].name: rows.kinds[0]}
    return Imported(len(rows.models), len(set(rows.numbers())), rows.kinds[0], rows.skips.counts(), every, "dataset" in provenance)


@dataclass(frozen=True)
class _Source:
    """What a source is, and how its checkpoints are read."""

    kind: str
    read: Reader
    stated: Callable[[], Any] = lambda: None
    architecture: Architecture | None = None

    @classmethod
    def of(
        cls,
        folder: Path,
        networks: list[tuple[str, Architecture]],
        table: own.Table,
        architecture: Architecture | None,
        epochs: frozenset[int] | None,
        padding: str,
        omega: float,
        dataset: str | Path | None,
    ) -> _Source:
        def own_networks(those: list[tuple[str, Architecture]], known: own.Table) -> Reader:
            return lambda skips, seen: own.checkpoints(folder, those, known, epochs, skips, seen)

        trees = not folder.is_file() and ray.is_tree(folder)
        files = pickled.files_of(folder)
        only = set(state_files(folder, Skips())) <= set(files.values()) if networks else True
        sets = bool(files) and only and (not folder.is_file() or pickled.is_data_set(folder))
        if own.is_exported(folder):
            made, index = own.exported(folder)
            if networks:  # by the names that they were given now
                index = index.without("network")
            return cls("exported state dicts", own_networks(networks or made, table if table.where else index))
        if networks and not trees and not sets:
            return cls("state dicts", own_networks(networks, table))
        if small_cnn.is_there(folder):
            table.refused("the Small CNN Zoo")
            shape = None if dataset is None else input_side(dataset)
            return cls("Small CNN Zoo", lambda skips, seen: small_cnn.checkpoints(folder, padding, shape, epochs, skips, seen))
        if trees:

            def trials(skips: Skips, seen: set[int]) -> Any:
                for file in files.values():  # the published pipeline leaves what it made of the trials beside them
                    skips.add(file.name, "a data set beside trials", "the trials are read; name the file itself to read it")
                return own.of_trials(ray.checkpoints(folder, epochs, skips, seen), networks, table, folder, skips)

            return cls("ray trials", trials, partial(ray.stated, folder, "model::nlin"))
        if sets:
            table.refused("a pickled data set")
            require(len(networks) < 2, f"network: expected one for pickled data sets, got {len(networks)}")
            kind = networks[0][1] if networks else architecture
            read: Reader = lambda skips, seen: pickled.checkpoints(files, kind, epochs, skips, seen)  # noqa: E731
            return cls("pickled data sets", read, architecture=kind)
        if inr.is_there(folder) and architecture is None:
            table.refused("a zoo of implicit representations")
            return cls("implicit representations", lambda skips, seen: inr.checkpoints(folder, omega, epochs, skips, seen))
        if state_files(folder, Skips()):
            given = [] if architecture is None else [(architecture.name, architecture)]
            return cls("state dicts", own_networks(given, table))
        return cls("ray trials", lambda skips, seen: ray.checkpoints(folder, epochs, skips, seen))  # says what of a tree is missing


def input_side(dataset: str | Path) -> int:
    """Pixels along a side of a data set's images."""
    return image_shape(dataset)[1]


def _nothing(source: str | Path, folder: Path, rows: Rows, networks: Sequence[Any], epochs: Collection[int] | None) -> str:
    """Why an import found nothing to store, and what to do."""
    counts = rows.skips.counts()
    if epochs is not None and rows.seen and all(map(is_note, counts)):
        return f"epochs: {source}: none of its {len(rows.seen)} models has a checkpoint of epoch {', '.join(map(str, sorted(epochs)))}"
    reasons = "; ".join(f"{reason}: {count}" for reason, count in counts.items())
    nothing = reasons or "no trials, no dataset_*.pt, no files of state dicts"
    detailed = [e for e in rows.skips.entries if e["detail"]]
    unknown = [e for e in detailed if "no known network" in e["detail"]]
    shown = (unknown or sorted(detailed, key=lambda e: -counts[e["reason"]]))[:1]  # what can be mended, else the first of the commonest
    why = "".join(f"; {e['where']}: {e['detail']}" for e in shown)
    remedy = ""
    if not networks and unknown:
        remedy = "; networks of your own: --network FILE.py:NAME (network=)"
    elif not reasons:
        other = sorted({path.suffix or path.name for path in folder.rglob("*") if path.is_file()})[:6] if folder.is_dir() else []
        remedy = f"; files of state dicts end in {', '.join(ENDINGS)}" + (f"; there are {', '.join(other)}" if other else "")
    return f"source: {source}: no usable checkpoint ({nothing}){why}{remedy}"


def _assigned(plan: Split, rows: Rows) -> tuple[str, ...]:
    """The split of every row. All models of the source are dealt out, those left out too, so that another choice of epochs, or a checkpoint
    that is broken, moves no other model; unless that left a split without models that could have some. Copies of a trial go together.
    Where the source states the split of some models, the others are dealt out among the splits it does not state. Where an architecture of
    several would have no model in a split, each architecture's models are dealt out on their own."""
    families = [rows.identical.family(model) for model in rows.models]
    stated: dict[int, str] = {}
    for family, name in zip(families, rows.splits, strict=True):
        if name is not None:
            stated.setdefault(family, name)
    if stated and len(stated) < len(set(families)):
        shares = [0.0 if name in stated.values() else share for name, share in zip(SPLITS, plan.fractions, strict=True)]
        shares = shares if shares[0] > 0 else list(plan.fractions)
        plan = Split(tuple(share / sum(shares) for share in shares), plan.seed)  # type: ignore[arg-type]
    everybody = sorted({*map(rows.identical.family, rows.seen), *families} - set(stated))
    of = {**dict(zip(everybody, plan.assign(everybody), strict=True)), **stated} if everybody else stated
    names = tuple(of[family] for family in families)
    free = [family for family in families if family not in stated]
    alone = dict(zip(free, plan.assign(free), strict=True)) if free else {}
    if len(rows.architectures) > 1:
        groups: dict[int, list[int]] = {}
        for family, kind in dict(zip(families, rows.kinds, strict=True)).items():
            groups.setdefault(id(kind), []).extend([] if family in stated else [family])
        apart = {f: name for group in groups.values() if group for f, name in zip(group, plan.assign(group), strict=True)}
        if any(not {apart[f] for f in group} <= {of[f] for f in group} for group in groups.values()):
            return tuple(stated.get(f) or apart[f] for f in families)
    return names if set(alone.values()) <= set(names) else tuple(stated.get(f) or alone[f] for f in families)


def _together(given: Sequence[str | None], rows: Rows) -> tuple[str, ...]:
    """The splits that the source names; of copies of a model in several, the first one's."""
    first: dict[int, str] = {}
    return tuple(first.setdefault(rows.identical.family(model), str(split)) for model, split in zip(rows.models, given, strict=True))


def _say(file: Path, rows: Rows, manifest: Manifest) -> None:
    """What a user has to know of an import, a line each."""
    counts, identical = rows.skips.counts(), manifest.provenance["identical"]
    tested = {label for label, split in zip(manifest.properties.get(KIND, ()), manifest.properties["split"]) if split == "test"}
    if untested := len(manifest.kinds) - len(tested):
        what = "zoo import: %d of %d architectures have too few models to hold some back for a test: evaluate --split train measures those"
        logger.warning(what, untested, len(manifest.kinds))
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
