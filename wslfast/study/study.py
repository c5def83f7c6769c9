"""Several runs on a zoo, beside every standing baseline: units, tables and the page, resumable."""

from __future__ import annotations

import datetime
import json
import logging
import platform
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..codes.autoencoder import Autoencoder
from ..codes.layer_inputs import spaced
from ..errors import WslfastError, check_device, require
from ..files import write_text
from ..measure.diversity import classes_of
from ..measure.evaluation import BASELINES, Code, decode, latent_numbers, linear_baselines
from ..measure.probe import weight_statistics
from ..measure.refinement import REFINED, refine
from ..measure.results import Unit, file_digest, read_results, read_unit, read_units, single, unit_path, write_tables, write_unit
from ..page import render
from ..profiling import region
from ..training import Run, TrainConfig, load_run, train
from ..training.checkpoint import checkpoint_path
from .loaded_zoo import Bench, Protocol
from .protocol import behavior_features, code_unit, discriminative, embeddings, reconstructive, zoo_unit

logger = logging.getLogger("wslfast")
_CODES = 2  # of how closed-form codes are fitted; part of their fingerprints
_RESERVED = re.compile(
    r"zoo|.*-zoo-model|.*-zero-layer|(raw-weights|weight-statistics|behavior-statistics.*|untrained-.*)|"
    rf"({'|'.join(BASELINES)})-\d+(-refined)?"
)
_RAW = 100_000  # parameters up to which raw weights are probe features
_ZERO_LAYER_QUICK = 500  # steps up to which a quick evaluation trains the zero-layer autoencoder


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
    on_stage: Callable[[str], None] | None = None,
) -> Path:
    """Evaluate runs on a zoo in all three downstream tasks, and write the tables and the page.

    What is there already, and was computed from the same checkpoint, zoo and protocol, is not computed again; several calls with
    one ``out`` (other runs, other zoos) make one page.

    Args:
        zoo: folder of the zoo.
        runs: folders of training runs; a run's variant is its folder's name without a trailing ``-seedN`` or ``-sN``.
        out: folder for ``report.html``, ``rows.csv``, the other tables and ``units/``.
        protocol: sizes; default: the full ones, or with ``quick`` those of a few minutes.
        zero_layer: also train each variant's twin without transformer blocks, same settings and steps (a baseline), in ``out``.
        name: what tables call the zoo; default: its data set.
        device: where to run.
        on_stage: told what is being done.

    Returns:
        The page.

    Raises:
        WslfastError: unreadable zoo or runs, two runs of one name, or results of another zoo of that name in ``out``.
    """
    say = on_stage or logger.info
    check_device(device)
    folder = Path(out)
    require(not folder.is_file(), f"out: expected a folder, got the file {out}")
    require(len(runs) > 0, "runs: expected at least one")
    loaded = {_named(path): load_run(path, device=device) for path in runs}
    names = [(variant, run.config.seed) for (variant, _), run in loaded.items()]
    twice = [f"{variant}, seed {seed}" for variant, seed in dict.fromkeys(names) if names.count((variant, seed)) > 1]
    same = len(loaded) == len(runs) and not twice
    require(same, f"runs: expected distinct variants and seeds, got {', '.join(twice) or [str(r) for r in runs]} more than once")
    taken = sorted({variant for variant, _ in names if _RESERVED.fullmatch(variant)})
    require(not taken, f"runs: {', '.join(taken)}: the page calls baselines so; rename the folder")
    bench = Bench(zoo, protocol or (Protocol.quick() if quick else Protocol()), device=device, name=name)
    for run in loaded.values():
        same = run.autoencoder.layout.architecture.parameters == bench.architecture.parameters
        require(same, f"run {run.out}: trained on models of another architecture than zoo {zoo}'s {bench.architecture.name!r}")
    _check_folder(folder, bench)
    work = _Work(bench, folder, say)
    with region("evaluate"), torch.no_grad():
        work.need("zoo", 0, bench.fingerprint("zoo"), lambda: zoo_unit(bench))
        for (variant, _), run in loaded.items():
            work.run(variant, run)
        if zero_layer:
            for variant, run in _twins(loaded, quick, say).items():
                work.zero_layer(variant, run)
        for run in loaded.values():
            work.codes(latent_numbers(run.autoencoder), run.config.token_size)
            work.untrained(run)
        for share in bench.protocol.shares:
            work.codes(round(share * bench.architecture.num_weights), new=False)
            work.refined(round(share * bench.architecture.num_weights))
        work.constants()
        work.features()
    facts = {"protocol": asdict(bench.protocol), "quick": quick, **_machine(device), "date": datetime.date.today().isoformat()}
    units = read_units(folder)
    kept = [u for u in units if u.zoo != bench.name or u.facts.get("sizes", bench.sizes) == bench.sizes]
    if len(kept) < len(units):
        others = sorted({u.variant for u in units} - {u.variant for u in kept})
        say(f"{bench.name}: left out, as they were measured with other sizes: {', '.join(others)}")
    write_tables(folder, kept, facts)
    return report(folder)


def report(out: str | Path, *, page: str | Path | None = None) -> Path:
    """Draw the page from the tables in ``out``, and return its path; nothing is computed again.

    ``ablations.csv`` and ``gradients.csv`` (and JSON files of those names) are shown where they are there.
    """
    path = Path(page) if page is not None else Path(out) / "report.html"
    write_text(path, render(read_results(out)))
    return path


class _Work:
    """Units of one zoo: each computed if it is not there."""

    def __init__(self, bench: Bench, folder: Path, say: Callable[[str], None]) -> None:
        self.bench, self.folder, self.say = bench, folder, say
        self.seen: set[tuple[str, int]] = set()

    def need(self, variant: str, seed: int, print_: str, make: Callable[[], Unit | None], *, more: str | None = None) -> None:
        """``more``: the fingerprint of a unit that holds all of this one's figures and others."""
        if (variant, seed) in self.seen:  # runs share their baselines
            return
        self.seen.add((variant, seed))
        there = read_unit(unit_path(self.folder, self.bench.name, variant, seed))
        if there is not None and there.fingerprint in (print_, more):
            self.say(f"{self.bench.name}: {variant}, seed {seed}: there already")
            return
        self.say(f"{self.bench.name}: {variant}, seed {seed}")
        unit = make()
        if unit is not None:
            write_unit(self.folder, replace(unit, facts={**unit.facts, "sizes": self.bench.sizes}))

    def run(self, variant: str, run: Run, **more: Any) -> None:
        print_ = self.bench.fingerprint("run", file_digest(checkpoint_path(run.out)))
        facts = {**run_facts(run), **more}
        seed = run.config.seed
        self.need(
            variant, seed, print_, lambda: code_unit(self.bench, run.autoencoder, variant, seed, "run", print_, facts, curve_of(run.out))
        )

    def zero_layer(self, variant: str, run: Run) -> None:
        """The run's settings without transformer blocks, trained here."""
        out = self.folder / "zero-layer" / f"{self.bench.name}-{variant}-seed{run.config.seed}"
        config = replace(run.config, layers=0, zoo=str(self.bench.zoo), out=str(out), device=self.bench.device)
        if not _finished(config):
            self.say(f"{self.bench.name}: training {variant} without transformer blocks, {config.steps} steps")
            with torch.enable_grad():
                train(config, resume=checkpoint_path(out).exists() and _same_config(config))
        self.run(f"{variant}-zero-layer", load_run(out, device=self.bench.device), baseline="zero-layer autoencoder, same steps")

    def codes(self, numbers: int, token_size: int = 0, new: bool = True) -> None:
        """The closed-form codes of a latent size; ``new``: models are sampled from them as well."""
        share = round(100 * numbers / self.bench.architecture.num_weights)
        if share > 100:
            return  # more numbers than weights: nothing to compress
        codes: dict[str, Code] = {}

        def fitted(name: str) -> Code | None:
            if not codes:
                codes.update(linear_baselines(self.bench.train, self.bench.data, numbers, token_size))
            return codes.get(name)

        for name in BASELINES:
            variant = f"{name}-{share}"
            sampled, plain = (self.bench.fingerprint("code", _CODES, name, numbers, token_size, s) for s in (True, False))
            print_ = sampled if new else plain

            def make(name: str = name, variant: str = variant, print_: str = print_) -> Unit | None:
                code = fitted(name)  # None: not for this architecture
                facts = {"baseline": "closed form", "code": name}
                return None if code is None else code_unit(self.bench, code, variant, 0, "code", print_, facts, new=new)

            self.need(variant, 0, print_, make, more=sampled)

    def refined(self, numbers: int) -> None:
        """Closed-form codes of a latent size, their latents refined model by model at test time, on training images."""
        bench, protocol = self.bench, self.bench.protocol
        share = round(100 * numbers / bench.architecture.num_weights)
        sizes = {"refine_steps": protocol.refine_steps, "refine_images": protocol.refine_images}
        if protocol.refine_steps == 0 or not bench.architecture.planned:
            return

        for name in REFINED:
            variant, print_ = f"{name}-{share}-refined", bench.fingerprint("refined", _CODES, name, numbers, sizes)

            def make(name: str = name, variant: str = variant, print_: str = print_) -> Unit | None:
                began = time.perf_counter()
                code = linear_baselines(bench.train, bench.data, numbers, only=(name,)).get(name)
                if code is None:  # not for this architecture
                    return None
                images = spaced(bench.data.train_images, protocol.refine_images).to(bench.device)
                latents = refine(code, bench.test.weights, images, steps=protocol.refine_steps, seed=protocol.seed)
                metrics, models = reconstructive(bench, decode(code, latents))
                held = {"latent_numbers": latent_numbers(code), "latent_share": latent_numbers(code) / bench.architecture.num_weights}
                metrics |= {name: single(float(value)) for name, value in held.items()}
                note = {"baseline": f"{protocol.refine_steps} steps a model", "code": name, **sizes, **held}
                facts = {**note, "seconds": round(time.perf_counter() - began, 1)}
                return Unit(bench.name, variant, 0, "refined", print_, facts, metrics, {"models": models})

            self.need(variant, 0, print_, make)

    def untrained(self, run: Run) -> None:
        """Probes of an encoder of the run's sizes with fresh weights (the published iteration 0)."""
        sizes = {**run.autoencoder.config(), "start": "random"}
        variant = f"untrained-{sizes['d_model']}x{sizes['layers']}-{sizes['latent']}"
        print_ = self.bench.fingerprint("untrained", sizes)

        def make() -> Unit:
            with torch.random.fork_rng():
                torch.manual_seed(self.bench.protocol.seed)
                fresh = Autoencoder.from_config(run.autoencoder.layout, sizes).to(self.bench.device).eval()
            features = {s: embeddings(fresh, p.weights) for s, p in self.bench.splits.items()}
            return self._probed(variant, print_, features, "mean token of an encoder with fresh weights")

        self.need(variant, 0, print_, make)

    def features(self) -> None:
        """Probes without any code: weight statistics, the weights themselves, and what the networks answer."""
        bench, arch = self.bench, self.bench.architecture
        weights = {split: p.weights for split, p in bench.splits.items()}
        kinds: dict[str, tuple[str, Callable[[], Mapping[str, Tensor]]]] = {
            "weight-statistics": (
                "mean, deviation and quantiles of every layer",
                lambda: {s: weight_statistics(w, arch) for s, w in weights.items()},
            ),
            "behavior-statistics": ("what the originals answer on training images, no labels", lambda: behavior_features(bench, weights)),
            "behavior-statistics-drawn": (
                "what the originals answer on drawn images, no data",
                lambda: behavior_features(bench, weights, drawn=True),
            ),
        }
        if arch.num_weights <= _RAW:
            kinds["raw-weights"] = ("every weight", lambda: weights)
        for variant, (note, of) in kinds.items():
            print_ = bench.fingerprint(variant)

            def make(variant: str = variant, print_: str = print_, note: str = note, of: Callable[[], Mapping[str, Tensor]] = of) -> Unit:
                return self._probed(variant, print_, of(), note)

            self.need(variant, 0, print_, make)

    def _probed(self, variant: str, print_: str, features: Mapping[str, Tensor], note: str) -> Unit:
        return Unit(self.bench.name, variant, 0, "features", print_, {"baseline": note}, discriminative(self.bench, features))

    def constants(self) -> None:
        """Zoo models in place of reconstructions: the nearest one, and one for all."""
        bench = self.bench

        def nearest_rows() -> Tensor:
            parts = bench.test.weights.split(256)
            return torch.cat([torch.cdist(part.double(), bench.train.weights.double()).argmin(1) for part in parts])

        def best_row() -> Tensor:
            return torch.nan_to_num(bench.train.column("val_acc"), nan=-1.0).argmax().expand(len(bench.test))

        def typical_row() -> Tensor:
            """The model that agrees most with the others on validation images: the zoo's mean behaviour, as a model."""
            classes = classes_of(bench.train.weights, bench.data.val_images, bench.architecture)
            votes = torch.stack([(classes == c).double().mean(0) for c in range(bench.architecture.num_classes)])  # [K, n]
            return votes.gather(0, classes.clamp_min(0).long()).mean(1).argmax().cpu().expand(len(bench.test))

        choices: dict[str, tuple[str, Callable[[], Tensor]]] = {
            "nearest-zoo-model": ("the training model nearest in weights", nearest_rows),
            "best-zoo-model": ("the training model with the best validation accuracy, for every other", best_row),
            "typical-zoo-model": ("the training model that agrees most with the others, for every other", typical_row),
        }
        for variant, (note, rows) in choices.items():
            print_ = bench.fingerprint(variant)

            def make(variant: str = variant, note: str = note, rows: Callable[[], Tensor] = rows, print_: str = print_) -> Unit:
                instead = bench.train.weights[rows().to(bench.train.weights.device)]
                metrics, models = reconstructive(bench, instead)
                return Unit(bench.name, variant, 0, "model", print_, {"baseline": note}, metrics, {"models": models})

            self.need(variant, 0, print_, make)


def run_facts(run: Run) -> dict[str, Any]:
    """What the page says of a run: which losses it was trained with, and its settings."""
    c = run.config
    used = [("C", c.gamma > 0), ("S", c.uses_structure), ("B", c.uses_behavior)]
    names = ("gamma", "beta", "criterion", "steps", "lr", "batch_size", "queries", "start", "metric", "layers", "d_model", "views")
    return {
        "folder": str(run.out),
        "losses": "+".join(letter for letter, on in used if on),
        "step": run.step,
        **{n: getattr(c, n) for n in names},
    }


def curve_of(folder: Path, most: int = 200) -> list[dict[str, Any]]:
    """Records of a run's log that hold a loss, at most so many, evenly spaced."""
    kept = ("step", "loss", "structural", "behavioral", "contrastive")
    try:
        lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:  # the last line of a run that was killed
            continue
        if isinstance(record, dict) and "step" in record and "loss" in record:
            records.append({name: record[name] for name in kept if name in record})
    stride = -(-len(records) // most) or 1
    return records[::stride]


def _named(path: str | Path) -> tuple[str, Path]:
    """Variant and folder of a run: ``runs/S+B-seed1`` is ``S+B``."""
    folder = Path(path).resolve()
    variant = re.sub(r"[-_.]?s(eed)?[-_]?\d+$", "", folder.name)
    return (variant or folder.parent.name), folder


def _twins(loaded: Mapping[tuple[str, Path], Run], quick: bool, say: Callable[[str], None]) -> dict[str, Run]:
    """Of each variant, the run with the lowest seed, unless it has no blocks itself."""
    chosen: dict[str, Run] = {}
    for (variant, _), run in loaded.items():
        if run.config.layers > 0 and (variant not in chosen or run.config.seed < chosen[variant].config.seed):
            chosen[variant] = run
    if quick:
        long = [v for v, run in chosen.items() if run.config.steps > _ZERO_LAYER_QUICK]
        if long:
            say(f"no zero-layer autoencoder for {', '.join(long)}: more than {_ZERO_LAYER_QUICK} steps, and this is quick")
        chosen = {v: run for v, run in chosen.items() if v not in long}
    return chosen


def _finished(config: TrainConfig) -> bool:
    if not checkpoint_path(config.out).exists() or not _same_config(config):
        return False
    return load_run(config.out).finished


def _same_config(config: TrainConfig) -> bool:
    try:
        return load_run(config.out).config == config
    except WslfastError:
        return False


def _check_folder(folder: Path, bench: Bench) -> None:
    there = read_unit(unit_path(folder, bench.name, "zoo", 0))
    other = there is not None and there.facts.get("digest") != bench.facts["digest"]
    require(
        not other,
        f"out: {folder} holds results of another zoo called {bench.name!r} ({there.facts.get('folder') if there else ''}); "
        "choose another folder (--out), or another name for this one (--name)",
    )


def _machine(device: str) -> dict[str, Any]:
    count = torch.get_num_threads()
    threads = f"{count} thread{'s' if count > 1 else ''}"
    where = f"{_processor()}, {threads}" if torch.device(device).type == "cpu" else torch.cuda.get_device_name(device)
    return {"machine": where, "versions": f"wslfast {__version__}, torch {torch.__version__}, Python {platform.python_version()}"}


def _processor() -> str:
    try:
        lines: Iterable[str] = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = ()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
