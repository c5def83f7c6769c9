"""Ablations: settings of training varied one at a time, each with the same seeds, from a TOML file (docs/analysis.md).

A *cell* is one variant with one seed. It is trained and measured in a folder named by a hash of everything that its result
depends on, so a finished cell is never computed again, whichever file asks for it, and one that was killed goes on from its last
checkpoint. Seeds are paired: the same seed draws the same batches, views and queries in every variant that does not change them.
"""

from __future__ import annotations

import csv
import hashlib
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import WslfastError, check_device, require
from ..files import write_text
from ..measure.evaluation import Code, embeddings, reconstruct, write_json
from ..measure.probe import probe
from ..measure.reconstruction import compare
from ..measure.recorded import check_recorded
from ..measure.rows import Row, write_rows
from ..population import Population
from ..training import TrainConfig, load_run, train
from ..training.checkpoint import checkpoint_path, load_checkpoint
from ..training.query_sets import set_names
from ..zoo import Dataset, build_zoo, dataset_of, load_zoo, read_manifest
from ..zoo.manifest import MANIFEST
from .ablation_file import Ablation, settings_of
from .loaded_zoo import Bench, Protocol
from .protocol import generative

COLUMNS = ("zoo", "variant", "seed", "metric", "median", "mean", "spread", "ablation", "axis", "value")
_VERSION = 1  # of what a cell is; part of its hash
_NO_RESULT = ("zoo", "out", "log_every", "checkpoint_every", "memory_gb")  # settings that change no result
_CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "process": time.process_time}


@dataclass(frozen=True, eq=False)
class Trained:
    """What a cell has trained: maps ``[k, P] -> [k, P]`` and ``[k, P] -> [k, features]``, latent numbers a model, steps taken, and the
    code to sample new models from, where it is one."""

    reconstruct: Callable[[Tensor], Tensor]
    embed: Callable[[Tensor], Tensor]
    latent_numbers: int
    steps: int
    code: Code | None = None


class Stop:
    """Counts a cell's seconds over all its sittings and says when its budget is spent. Asked after every step.

    The count at every checkpoint is kept beside the run, so that one that was killed goes on with what was left then.
    """

    def __init__(self, folder: Path, clock: str, budget: float | None, every: int, steps: int) -> None:
        self.path, self.clock, self.budget, self.every, self.steps = folder / "clock.json", _CLOCKS[clock], budget, every, steps
        self.seconds, self.last = 0.0, self.clock()
        try:
            self.known: dict[str, float] = json.loads(self.path.read_text())
        except (OSError, ValueError):
            self.known = {}

    def resume(self, step: int) -> bool:
        """Go on from a checkpoint; whether there is anything left to spend."""
        self.seconds, self.last = self.known.get(str(step), 0.0), self.clock()
        return self.budget is None or self.seconds < self.budget

    def __call__(self, step: int) -> bool:
        now = self.clock()
        self.seconds, self.last = self.seconds + now - self.last, now
        spent = self.budget is not None and self.seconds >= self.budget
        if spent or step % self.every == 0 or step == self.steps:
            self.known[str(step)] = self.seconds
            write_text(self.path, json.dumps(self.known))
        return spent


class Cell(NamedTuple):
    """One training run of an ablation: what a system is asked to do, on the zoo's training models."""

    config: TrainConfig
    zoo: Population
    stop: Stop


System = Callable[[Cell], Trained]


def core(cell: Cell) -> Trained:
    """The system ``"core"``: :func:`wslfast.train`."""
    config, stop = cell.config, cell.stop
    there = checkpoint_path(config.out).exists()
    left = not there or stop.resume(load_checkpoint(config.out)["step"])
    if not left:
        run = load_run(config.out, device=config.device)
    else:
        run = train(config, resume=True, population=cell.zoo, stop=stop)
    model = run.autoencoder
    return Trained(lambda w: reconstruct(model, w), lambda w: embeddings(model, w), model.latent_numbers, run.step, model)


def run_ablation(
    ablation: Ablation,
    out: str | Path,
    *,
    zoo: str | Path | None = None,
    systems: Mapping[str, System] | None = None,
    protocol: Protocol | None = None,
    on_cell: Callable[[str], None] | None = None,
) -> list[Row]:
    """Train and measure every cell that is not there yet; returns all rows and writes them to ``out/ablations.csv``
    (``ablations-val.csv`` for validation models, on validation images).

    Rows have :data:`COLUMNS`: median, mean and standard deviation over held-out models of every metric of
    :class:`~wslfast.measure.Reconstruction`, for one variant and seed, and figures of the cell as a whole (``probe_r2`` of test
    accuracy, ``probe_r2_ggap``, ``latent_numbers``, ``steps``, ``seconds``); with ``generate`` those of new models as well, for systems
    that can be sampled from (:func:`~wslfast.study.protocol.generative`). Rows of other ablations, and of other zoos, that are in the
    file stay.

    Args:
        ablation: from :meth:`Ablation.from_toml`.
        out: folder; cells go to ``out/cells``, a zoo that the file describes to ``out/zoo-...``.
        zoo: folder of a zoo to use instead of the file's.
        systems: what ``semantics`` may ask for, by name; by default ``{"core": core}``.
        protocol: sizes of what ``generate`` measures; by default the full ones.
        on_cell: told about every cell before it runs.

    Raises:
        WslfastError: before anything is trained, for whatever does not fit.
    """
    out, known = Path(out), {"core": core, **(systems or {})}
    wanted = {settings.get("semantics", "core") for settings in ablation.variants.values()}
    unknown = sorted(wanted - set(known))
    require(not unknown, f"ablation {ablation.name}: semantics: expected one of {sorted(known)}, got {unknown}")
    folder = _zoo(ablation, out, zoo)
    data = _Data(folder, ablation, protocol or Protocol())
    rows: list[Row] = []
    cells: list[tuple[int, str, str, TrainConfig, str]] = []
    for seed in ablation.seeds:  # what is wrong with the last cell is said before the first is trained
        for name in ablation.variants:
            try:
                system, config = settings_of(ablation, name, str(folder), seed)
                check_device(config.device)
                cells.append((seed, name, system, config, _key(data.digest, system, config, ablation)))
            except WslfastError as error:
                raise WslfastError(f"ablation {ablation.name}: {name}: {error}") from None
    for number, (seed, name, system, config, key) in enumerate(cells, 1):
        place = out / "cells" / key
        if on_cell is not None:
            done = " (done before)" if (place / data.finished).exists() else ""
            on_cell(f"{number} of {len(cells)}: {name}, seed {seed}{done}")
        figures = _figures(place, known[system], config, ablation, data)
        rows += _rows(figures, ablation, data.name, name, seed)
        _write(out / rows_file(ablation), ablation.name, data.name, rows)
    return rows


def rows_file(ablation: Ablation) -> str:
    """``ablations.csv``, or ``ablations-val.csv`` for validation models."""
    return "ablations.csv" if ablation.split == "test" else f"ablations-{ablation.split}.csv"


def read_rows(path: str | Path) -> list[Row]:
    """Rows of an ``ablations.csv``, numbers as floats (None where empty). Raises WslfastError if it is not one."""
    try:
        with Path(path).open(newline="", encoding="utf-8") as file:
            table = list(csv.DictReader(file))
            missing = [c for c in COLUMNS if table and c not in table[0]]
            require(not missing, f"{path}: expected columns {', '.join(COLUMNS)}; {missing} missing")
            return [{**r, "seed": int(r["seed"])} | {c: float(r[c]) if r[c] else None for c in ("median", "mean", "spread")} for r in table]
    except (OSError, ValueError, TypeError) as error:
        raise error if isinstance(error, WslfastError) else WslfastError(f"{path}: {error}") from None


def over_seeds(rows: Sequence[Row], figure: str = "mean") -> dict[str, dict[str, tuple[float, float | None, int]]]:
    """``{variant: {metric: (mean, standard deviation, count)}}`` over seeds of the rows' means or medians (``figure``)."""
    table: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if row[figure] is not None:
            table.setdefault(row["variant"], {}).setdefault(row["metric"], []).append(row[figure])
    return {
        variant: {m: (statistics.fmean(v), statistics.stdev(v) if len(v) > 1 else None, len(v)) for m, v in metrics.items()}
        for variant, metrics in table.items()
    }


# -- one cell ------------------------------------------------------------------------------------------------------------


class _Data:
    """What all cells of an ablation share: models by split, images, the name and digest of the zoo, and what new models are measured on."""

    def __init__(self, folder: Path, ablation: Ablation, protocol: Protocol) -> None:
        split = ablation.split
        self.protocol = protocol if ablation.generate and split == "test" else None
        # a cell's file of figures; one training serves validation models and test models
        self.finished = f"figures-{split}{f'-{protocol.digest}' if self.protocol is not None else ''}.json"
        manifest = read_manifest(folder)
        self.folder, self.digest = folder, hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
        self.splits: dict[str, Population] = {name: load_zoo(folder, name) for name in ("train", "val", "test")}
        self.held_out = self.splits[split]
        require(len(self.held_out) > 0, f"zoo {folder} has no {split} models")
        self.dataset: Dataset = dataset_of(folder, self.held_out.architecture)
        self.split, self.images = split, self.dataset.split(split if split == "val" else "test")
        record: Any = manifest.provenance.get("dataset")
        self.name = str(record["name"]) if isinstance(record, Mapping) and "name" in record else folder.name
        self._bench: Bench | None = None

    def bench(self, device: str) -> Bench:
        """The zoo as new models are measured on it, kept for the next cell on the same device."""
        assert self.protocol is not None
        if self._bench is None or self._bench.device != device:
            self._bench = Bench(self.folder, self.protocol, device=device)
        return self._bench


def _key(zoo: str, system: str, config: TrainConfig, ablation: Ablation) -> str:
    """A hash of all that a cell's figures depend on; query files by content, not by name."""
    settings = {name: value for name, value in config.to_dict().items() if name not in _NO_RESULT}
    files = {}
    for name in set_names(config.query_set):
        if name.endswith(".npz"):
            require(Path(name).is_file(), f"query_set: {name}: no such file")
            files[Path(name).name] = hashlib.sha256(Path(name).read_bytes()).hexdigest()
    if files:
        settings["query_set"] = "+".join(files.get(Path(name).name, name) for name in set_names(config.query_set))
    everything = {
        "version": _VERSION,
        "zoo": zoo,
        "system": system,
        "config": settings,
        "seconds": ablation.seconds,
        "clock": ablation.clock if ablation.seconds is not None else None,
    }
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()[:16]


def _figures(place: Path, system: System, config: TrainConfig, ablation: Ablation, data: _Data) -> dict[str, dict[str, float | None]]:
    finished = place / data.finished
    if finished.exists():
        try:
            return json.loads(finished.read_text())["figures"]
        except (OSError, ValueError, KeyError, TypeError):
            pass  # half a file, or another's: measured again from the run that is there
    config = TrainConfig.from_dict({**config.to_dict(), "out": str(place)})
    stop = Stop(place, ablation.clock, ablation.seconds, config.checkpoint_every, config.steps)
    trained = system(Cell(config, data.splits["train"].to(config.device), stop))
    held_out = data.held_out.to(config.device)
    pixels, labels = (t.to(config.device) for t in data.images)
    with torch.no_grad():
        rebuilt = trained.reconstruct(held_out.weights)
    groups: Any = held_out.properties.get("model")
    result = compare(held_out.weights, rebuilt, pixels, labels, held_out.architecture, groups=groups)
    if data.split != "val":  # validation models are measured on validation images
        check_recorded(held_out, result.accuracy_original, data.dataset, data.folder)
    summary = result.summary()
    figures = {name: {c: f[c] for c in ("median", "mean", "std")} for name, f in summary["spread"].items()}
    alone = {"steps": trained.steps, "seconds": stop.seconds, "latent_numbers": trained.latent_numbers, "non_finite": result.non_finite}
    figures |= {name: {"median": float(v), "mean": float(v), "std": None} for name, v in (alone | _probes(trained, data)).items()}
    if data.protocol is not None and trained.code is not None:
        with torch.no_grad():
            sampled, _ = generative(data.bench(config.device), trained.code, full=True)
        figures |= {name: dict(zip(("median", "mean", "std"), values, strict=True)) for name, values in sampled.items()}
    write_json(finished, {"config": config.to_dict(), "figures": figures})
    return json.loads(finished.read_text())["figures"]


def _probes(trained: Trained, data: _Data) -> dict[str, float]:
    """R2 of a linear probe on the split that is measured, of test accuracy and of the generalisation gap."""
    splits = {name: p for name, p in data.splits.items() if len(p) > 0}
    if "train" not in splits:
        return {}
    with torch.no_grad():
        features = {name: trained.embed(p.weights) for name, p in splits.items()}
    if not all(bool(f.isfinite().all()) for f in features.values()):
        return {}
    found = {}
    for metric, target in (("probe_r2", "test_acc"), ("probe_r2_ggap", "ggap")):
        if all(target in p.properties for p in splits.values()):
            found[metric] = probe(features, {name: p.column(target) for name, p in splits.items()})[data.split]
    return found


# -- rows ------------------------------------------------------------------------------------------------------------------


def _rows(figures: Mapping[str, Mapping[str, float | None]], ablation: Ablation, zoo: str, name: str, seed: int) -> list[Row]:
    tail = {"ablation": ablation.name, "axis": ablation.axis, "value": ablation.value(name)}
    head = {"zoo": zoo, "variant": name, "seed": seed}
    return [
        {**head, "metric": metric, "median": f["median"], "mean": f["mean"], "spread": f["std"], **tail} for metric, f in figures.items()
    ]


def _write(path: Path, name: str, zoo: str, rows: Sequence[Row]) -> None:
    others = [row for row in read_rows(path) if (row["ablation"], row["zoo"]) != (name, zoo)] if path.exists() else []
    write_rows(path, COLUMNS, (*others, *rows))


def _zoo(ablation: Ablation, out: Path, given: str | Path | None) -> Path:
    """The zoo's folder; one that the file describes is built the first time."""
    if given is not None or isinstance(ablation.zoo, str):
        return Path(given if given is not None else str(ablation.zoo))
    described = json.dumps(dict(ablation.zoo), sort_keys=True)
    folder = out / f"zoo-{hashlib.sha256(described.encode()).hexdigest()[:8]}"
    if not (folder / MANIFEST).exists():
        build_zoo(out=folder, **dict(ablation.zoo))
    return folder
