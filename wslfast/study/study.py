"""Several runs on a zoo, beside every standing baseline: units, tables and the page, resumable."""

from __future__ import annotations

import datetime
import json
import logging
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..engine.ranks import ALONE, World, apart, joined
from ..errors import check_device, require
from ..files import check_folder
from ..measure.results import Unit, kept_unit, read_unit, read_units, unit_path, write_tables, write_unit
from ..page import report
from ..profiling import processor, region
from ..training import load_run
from ..training.hooks import LogTo
from ..zoo import read_manifest
from ..zoo.manifest import KIND
from .loaded_zoo import LoadedZoo, Protocol
from .trained import NamedRun, zero_layer_twins
from .units import TABLE, Inputs, reserved, run_facts

logger = logging.getLogger("wslfast")


def study(
    zoo: str | Path,
    runs: Sequence[str | Path],
    out: str | Path,
    *,
    protocol: Protocol | None = None,
    quick: bool = False,
    zero_layer: bool = True,
    name: str | None = None,
    device: str = "cpu",
    notes: Mapping[str, str] | None = None,
    on_stage: Callable[[str], None] | None = None,
    log_to: LogTo = None,
) -> Path:
    """Evaluate runs on a zoo in all three downstream tasks, and write the tables and the page.

    What is measured is the table of :mod:`wslfast.study.units`. A unit that is there already, and was computed from the same
    checkpoint, zoo and protocol, is not computed again. Several calls with one ``out`` (other runs, other zoos) make one page. Under
    torchrun units are dealt out to the processes, and the first of them draws the page.

    Args:
        zoo: folder of the zoo.
        runs: folders of training runs; a run's variant is its folder's name without a trailing ``-seedN`` or ``-sN``.
        out: folder for ``report.html``, ``rows.csv``, the other tables and ``units/``.
        protocol: sizes; default: the full ones, or with ``quick`` those of a few minutes.
        zero_layer: also train each variant's twin without transformer blocks, same settings and steps (a baseline), in ``out``.
        name: what tables call the zoo; default: its data set.
        device: where to run.
        notes: lines for the foot of the page, by name.
        on_stage: told what is being done.
        log_to: as for :func:`wslfast.page.report`.

    Returns:
        The page.

    Raises:
        WslfastError: unreadable zoo or runs, two runs of one name, or results of another zoo of that name in ``out``.
    """
    say = on_stage or logger.info
    check_device(device)
    with joined(device, patient=True) as (world, _), apart():
        folder = Path(out)
        check_folder(folder, "results")
        require(len(runs) > 0, "runs: expected at least one")
        folders = dict.fromkeys(Path(path).resolve() for path in runs)
        loaded = [(_variant(path), load_run(path, device=device)) for path in folders]
        keys = [(variant, run.config.seed) for variant, run in loaded]
        twice = [f"{variant}, seed {seed}" for variant, seed in dict.fromkeys(keys) if keys.count((variant, seed)) > 1]
        distinct = len(folders) == len(runs) and not twice
        require(distinct, f"runs: expected distinct variants and seeds, got {', '.join(twice) or [str(r) for r in runs]} more than once")
        for variant, names in _mixed(loaded).items():
            say(f"{variant}: its runs differ in {', '.join(names)}, and the page shows their mean; other folder names keep them apart")
        taken = sorted({variant for variant, _ in loaded if reserved(variant)})
        require(not taken, f"runs: {', '.join(taken)}: the page calls baselines so; rename the folder")
        sizes = protocol or (Protocol.quick() if quick else Protocol())
        done: list[tuple[str, str]] = []
        for label in _architectures(zoo, say):  # a zoo of several architectures has a block on the page for each
            models = LoadedZoo(zoo, sizes, device=device, name=name, architecture=label)
            of_kind = [(variant, run.only(models.architecture)) for variant, run in loaded]
            _check_folder(folder, models)
            if zero_layer and world.size > 1:  # each process trains its share; after that all are there for all
                list(zero_layer_twins(loaded, models, folder / "zero-layer", quick=quick, say=say, world=world))
                world.wait()
            twins = zero_layer_twins(loaded, models, folder / "zero-layer", quick=quick, say=say) if zero_layer else ()
            with region("evaluate"), torch.no_grad():
                make_units(Inputs(models, of_kind, twins), folder, say, world)
            done.append((models.name, sizes.digest))
        world.wait()
        if not world.writes:
            return folder / "report.html"
        facts = {"protocol": asdict(sizes), "quick": quick, **_machine(device), "date": datetime.date.today().isoformat()}
        facts |= {"goals": True} if _has_goals(folder) else {}
        write_tables(folder, _comparable(read_units(folder), dict(done), say), {**facts, "notes": dict(notes or {})})
        return report(folder, log_to=log_to)


def make_units(inputs: Inputs, folder: Path, say: Callable[[str], None], world: World = ALONE) -> None:
    """Every unit of the table that is not in the folder yet; of several processes, those that are this one's."""
    zoo, seen = inputs.zoo, set()
    for family in TABLE:
        for task in family.tasks(inputs):
            variant = family.name.format(**task.names)
            key = (zoo.name, variant, task.seed)
            if key in seen:  # runs share their baselines
                continue
            seen.add(key)
            if not world.mine(len(seen) - 1):  # counted over all units, so that processes agree whatever is there already
                continue
            stage, path = f"{zoo.name}: {variant}, seed {task.seed}", unit_path(folder, *key)
            fingerprint, *wider = (zoo.fingerprint(*parts) for parts in (task.parts, task.within) if parts)
            if kept_unit(path, fingerprint, *wider):
                say(f"{stage}: there already")
                continue
            say(stage)
            began = time.perf_counter()
            measured = task.make(zoo)
            if measured is not None:
                seconds = round(time.perf_counter() - began, 1)
                note = {"baseline": family.baseline} if family.baseline else {}
                facts = {**note, **measured.facts, "seconds": seconds, "sizes": zoo.protocol.digest}
                write_unit(path, Unit(*key, family.kind, fingerprint, facts, measured.metrics, measured.tables))


def _architectures(zoo: str | Path, say: Callable[[str], None]) -> list[str | None]:
    """Labels of a zoo of several architectures, of those with training and test models; of one of one, None."""
    manifest = read_manifest(zoo)
    if not manifest.kinds:
        return [None]
    rows = set(zip(manifest.properties[KIND], manifest.properties["split"], strict=True))
    labels = [label for label in manifest.kinds if {(label, "train"), (label, "test")} <= rows]
    left = [label for label in manifest.kinds if label not in labels]
    require(bool(labels), f"zoo {zoo}: expected an architecture with train and test models, got none of {left}")
    if left:
        say(f"left out, as they have no train or no test models: {', '.join(left)}")
    return list(labels)


def _comparable(units: Sequence[Unit], zoos: Mapping[str, str], say: Callable[[str], None]) -> list[Unit]:
    """Units of other zoos, and of these (by name, the digest of their sizes) those that were measured with their sizes."""
    current = [u for u in units if u.facts.get("sizes", zoos.get(u.zoo)) == zoos.get(u.zoo, u.facts.get("sizes"))]
    for zoo in zoos:
        others = sorted({u.variant for u in units if u.zoo == zoo} - {u.variant for u in current if u.zoo == zoo})
        if others:
            say(f"{zoo}: left out, as they were measured with other sizes: {', '.join(others)}")
    return current


def _variant(folder: Path) -> str:
    """Variant of a run by its folder: ``runs/S+B-seed1`` is ``S+B``. A single s has to stand apart: ``layers4`` is a name of its own, and
    not seed 4 of ``layer``."""
    return re.sub(r"(?:(?:^|[-_.])s|[-_.]?seed)[-_]?\d+$", "", folder.name) or folder.parent.name


def _mixed(runs: Sequence[NamedRun]) -> dict[str, list[str]]:
    """Of variants whose runs are not one setting with several seeds, the settings that differ."""
    facts: dict[str, list[dict[str, Any]]] = {}
    for variant, run in runs:
        facts.setdefault(variant, []).append(run_facts(run))
    differ = {
        v: [name for name in own[0] if name not in ("folder", "step") and any(f[name] != own[0][name] for f in own)]
        for v, own in facts.items()
    }
    return {variant: names for variant, names in differ.items() if names}


def _check_folder(folder: Path, zoo: LoadedZoo) -> None:
    unit = read_unit(unit_path(folder, zoo.name, "zoo", 0))
    if unit is not None and unit.facts.get("digest") != zoo.facts["digest"]:
        conflict = f"out: {folder} holds results of another zoo called {zoo.name!r} ({unit.facts.get('folder')})"
        require(False, f"{conflict}; choose another folder (--out), or another name for this one (--name)")


def _has_goals(folder: Path) -> bool:
    """Whether the results that are there are held against this project's goals: a mark by hand in report.json, which stays."""
    try:
        return json.loads((folder / "report.json").read_text(encoding="utf-8")).get("goals") is True
    except (OSError, ValueError, AttributeError):
        return False


def _machine(device: str) -> dict[str, Any]:
    count = torch.get_num_threads()
    threads = f"{count} thread{'s' if count > 1 else ''}"
    where = f"{processor()}, {threads}" if torch.device(device).type == "cpu" else torch.cuda.get_device_name(device)
    return {"machine": where, "versions": f"wslfast {__version__}, torch {torch.__version__}, Python {platform.python_version()}"}
