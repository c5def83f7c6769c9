"""Ablations: settings of training varied one at a time, each with the same seeds, from a TOML file (docs/analysis.md).

A *cell* is one variant with one seed. It is trained and measured in a folder named by a hash of everything that its result
depends on, so a finished cell is never computed again, whichever file asks for it, and one that was killed goes on from its last
checkpoint. Seeds are paired: the same seed draws the same batches, views and queries in every variant that does not change them.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..engine.ranks import World, apart, joined
from ..errors import WslfastError, check_device, require
from ..files import check_folder, sha256_of, write_text
from ..measure.evaluation import Code, embeddings, reconstruct
from ..measure.recorded import check_recorded
from ..measure.results import HEADER, Row, Unit, figures, kept_unit, single, update_csv, write_unit
from ..population import Population
from ..training import TrainConfig, load_run, train
from ..training.checkpoint import checkpoint_path, load_checkpoint
from ..training.config import RETIRED
from ..training.query_sets import set_names
from ..zoo import build_zoo
from ..zoo.manifest import MANIFEST
from .ablation_file import Ablation, settings_of
from .loaded_zoo import LoadedZoo, Protocol, evenly
from .protocol import compared, discriminative, generative

COLUMNS = (*HEADER, "ablation", "axis", "value")
_VERSION = 1  # of what a cell is; part of its hash
# settings that change no result but by rounding
_NO_RESULT = ("zoo", "out", "log_every", "checkpoint_every", "memory_gb", "backend", "cuda_graph")
# settings that came later, and what cells had before: not part of their hash
_LATER = {"behavior_of": "outputs", "structure_unit": "zoo", "structure_metric": "plain", "coordinates": "plain", "maps_lr": 1.0}
_CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "process": time.process_time}


@dataclass(frozen=True, eq=False)
class Trained:
    """What a cell has trained: maps ``[k, P] -> [k, P]`` and ``[k, P] -> [k, features]``, latent numbers per model, steps taken, and the
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
            self.known = {str(step): float(seconds) for step, seconds in json.loads(self.path.read_text()).items()}
        except (OSError, ValueError, TypeError, AttributeError):  # nothing there, or nothing of ours: it counts from here
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
    if checkpoint_path(config.out).exists() and not stop.resume(load_checkpoint(config.out)["step"]):
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
    accuracy, ``probe_r2_ggap``, ``latent_numbers``, ``steps``, ``seconds``, and ``coding_seconds``, the CPU time that encoding and
    decoding a model takes); with ``generate`` those of new models as well, for systems that can be sampled from
    (:func:`~wslfast.study.protocol.generative`). Rows of other ablations, and of other zoos, that are in the
    file stay. Under torchrun cells are dealt out to the processes, each trained by one of them alone.

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
    check_folder(out, "results")
    unknown = sorted(wanted - set(known))
    require(not unknown, f"ablation {ablation.name}: semantics: expected one of {sorted(known)}, got {unknown}")
    with joined(_device(ablation), patient=True) as (world, _):
        folder = _zoo(ablation, out, zoo)  # one that is described is built by all processes
        with apart():  # a cell is one process's
            return _all_cells(ablation, out, folder, known, protocol or Protocol(), on_cell or (lambda text: None), world)


def _all_cells(
    ablation: Ablation,
    out: Path,
    folder: Path,
    systems: Mapping[str, System],
    samples: Protocol,
    say: Callable[[str], None],
    world: World,
) -> list[Row]:
    """The rows of every cell; those that are not there yet are made, each by one of the processes."""
    digest = sha256_of(folder / MANIFEST)
    cells: list[tuple[int, str, str, TrainConfig, str]] = []
    for seed in ablation.seeds:  # what is wrong with the last cell is said before the first is trained
        for name in ablation.variants:
            try:
                system, config = settings_of(ablation, name, str(folder), seed)
                check_device(config.device)
                cells.append((seed, name, system, config, _key(digest, system, config, ablation)))
            except WslfastError as error:
                raise WslfastError(f"ablation {ablation.name}: {name}: {error}") from None
    devices = {config.device for *_, config, _ in cells}
    zoos = {device: LoadedZoo(folder, Protocol.whole(), device=device) for device in devices}
    held_out = all(ablation.split in models.splits for models in zoos.values())
    require(held_out, f"zoo {folder} has no {ablation.split} models")
    labelled = all(models.labelled for models in zoos.values())
    require(
        labelled or not ablation.generate, f"ablation {ablation.name}: generate: new models are judged by accuracy; {folder} has no classes"
    )
    sampled = {d: LoadedZoo(folder, samples, device=d) for d in devices if ablation.generate and ablation.split == "test"}
    # one training serves validation models, test models and several protocols
    few = "" if ablation.models is None else f"-{ablation.models}"
    what = "" if labelled else "-outputs"
    file = f"figures-{ablation.split}{few}{what}{f'-{samples.digest}' if sampled else ''}.json"
    mine = set(world.dealt(list(dict.fromkeys(key for *_, key in cells))))  # cells of one key are one training
    rows: list[Row] = []
    for final in (False, True) if world.size > 1 else (True,):
        for number, (seed, name, system, config, key) in enumerate(cells, 1):
            if not final and key not in mine:
                continue
            models = zoos[config.device]
            place = out / "cells" / key
            unit = kept_unit(place / file, key)
            if not final or world.size == 1:
                say(f"{number} of {len(cells)}: {name}, seed {seed}{' (done before)' if unit else ''}")
            if unit is None:
                unit = _measured(key, systems[system], replace(config, out=str(place)), ablation, models, sampled.get(config.device))
                write_unit(place / file, unit)
            if not final:
                continue
            # a cell has another name in another file
            own = replace(unit, zoo=models.name, variant=name, seed=seed).rows()
            rows += [{**row, "ablation": ablation.name, "axis": ablation.axis, "value": ablation.value(name)} for row in own]
            if world.writes and (world.size == 1 or number == len(cells)):
                update_csv(out / rows_file(ablation), COLUMNS, rows, ("ablation", "zoo"))
        world.wait()
    return rows


def _device(ablation: Ablation) -> str:
    """Where cells are trained: cuda if any of them is, and then each process has its own."""
    devices = {str(settings.get("device", "cpu")) for settings in ablation.variants.values()}
    return next((device for device in sorted(devices) if device != "cpu"), "cpu")


def rows_file(ablation: Ablation) -> str:
    """``ablations.csv``, or ``ablations-val.csv`` for validation models."""
    return "ablations.csv" if ablation.split == "test" else f"ablations-{ablation.split}.csv"


# -- one cell ------------------------------------------------------------------------------------------------------------


def _key(zoo: str, system: str, config: TrainConfig, ablation: Ablation) -> str:
    """A hash of all that a cell's figures depend on; query files by content, not by name."""
    # settings that are no more count as they did, or every cell that there is would be computed again
    settings = RETIRED | {n: v for n, v in config.to_dict().items() if n not in _NO_RESULT and _LATER.get(n, ...) != v}
    files = {}
    for name in set_names(config.query_set):
        if name.endswith(".npz"):
            require(Path(name).is_file(), f"query_set: {name}: no such file")
            files[Path(name).name] = sha256_of(Path(name))
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


def _measured(key: str, system: System, config: TrainConfig, ablation: Ablation, zoo: LoadedZoo, sampled: LoadedZoo | None) -> Unit:
    """Train a cell, or go on with it, and measure it on the models of the ablation's split and the images of that split; new models of it
    on ``sampled``, where that is given."""
    stop = Stop(Path(config.out), ablation.clock, ablation.seconds, config.checkpoint_every, config.steps)
    trained = system(Cell(config, zoo.train, stop))
    held_out = zoo.splits[ablation.split]
    if ablation.models is not None:
        held_out = evenly(held_out, ablation.models)
    with torch.no_grad():
        begun = time.process_time()
        rebuilt = trained.reconstruct(held_out.weights)
        coding = (time.process_time() - begun) / len(held_out)
        result, values = compared(zoo, held_out, rebuilt, ablation.split)
        new = {} if sampled is None or trained.code is None else generative(sampled, trained.code, full=True)[0]
        probes = {}
        if ablation.models is None:
            probes = discriminative(zoo, {split: trained.embed(p.weights) for split, p in zoo.splits.items()})
    if ablation.split == "test":  # validation models are measured on validation images
        check_recorded(held_out, result.accuracy_original, zoo.data, zoo.folder)
    alone = {"steps": trained.steps, "seconds": stop.seconds, "latent_numbers": trained.latent_numbers, "non_finite": result.non_finite}
    alone["coding_seconds"] = coding
    metrics = {name: figures(value) for name, value in values.items()}
    metrics |= {name: single(float(value)) for name, value in alone.items()}
    suffix = "" if ablation.split == "test" else f"_{ablation.split}"
    metrics |= {m: (*probes[m + suffix][:2], None) for m in ("probe_r2", "probe_r2_ggap") if m + suffix in probes}
    return Unit(zoo.name, key, config.seed, "cell", key, {"config": config.to_dict()}, {**metrics, **new})


def _zoo(ablation: Ablation, out: Path, given: str | Path | None) -> Path:
    """The zoo's folder; one that the file describes is built the first time."""
    if given is not None or isinstance(ablation.zoo, str):
        return Path(given if given is not None else str(ablation.zoo))
    described = json.dumps(dict(ablation.zoo), sort_keys=True)
    folder = out / f"zoo-{hashlib.sha256(described.encode()).hexdigest()[:8]}"
    if not (folder / MANIFEST).exists():
        build_zoo(**{"resume": True, **ablation.zoo, "out": folder})  # goes on with one that was interrupted
    return folder
