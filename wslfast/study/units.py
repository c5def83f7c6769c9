"""The table of what an evaluation measures: the name of every unit, what it is computed from, and how it is made."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from string import Formatter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..codes.autoencoder import Autoencoder
from ..codes.layer_inputs import spaced
from ..files import sha256_of
from ..measure.diversity import classes_of
from ..measure.evaluation import BASELINES, decode, embeddings, linear_baselines
from ..measure.probe import weight_statistics
from ..measure.refinement import REFINED, refine
from ..training import Run
from ..training.checkpoint import checkpoint_path
from .loaded_zoo import LoadedZoo
from .protocol import Measured, behavior_features, discriminative, latent_rows, measure_code, measure_originals, reconstructive, with_sizes
from .trained import NamedRun

_CODES = 3  # version of how closed-form codes are fitted; part of their fingerprints
_RAW = 100_000  # parameters up to which raw weights are probe features
_RUN = "{run}"


class Inputs(NamedTuple):
    """What an evaluation is given: a zoo, runs by their variants, and the runs' twins without transformer blocks."""

    zoo: LoadedZoo
    runs: Sequence[NamedRun]
    twins: Iterable[NamedRun]


class Task(NamedTuple):
    """One unit to make.

    Attributes:
        make: measures it on the zoo; None where the zoo's architecture has no such thing.
        parts: what it is computed from, besides zoo and protocol, as JSON-able values: with these two its fingerprint.
        names: what stands in the braces of the variant's name.
        seed: of the unit.
        within: the parts of a unit that would hold all of this one's figures and more, which is then not made again.
    """

    make: Callable[[LoadedZoo], Measured | None]
    parts: tuple[Any, ...]
    names: Mapping[str, Any] = {}
    seed: int = 0
    within: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Family:
    """Units of one sort, a row of the table.

    Attributes:
        name: of their variant; what is in braces differs within the family (``:d``: a number).
        kind: see :class:`~wslfast.measure.results.Unit`.
        tasks: the units of this sort in an evaluation; the first of several with one name counts.
        baseline: what the page says of them; empty for what is evaluated.
    """

    name: str
    kind: str
    tasks: Callable[[Inputs], Iterable[Task]]
    baseline: str = ""

    def reserves(self, variant: str) -> bool:
        """Whether a unit of this family may have that name."""
        patterns = {None: "", "d": r"\d+"}  # of nothing, of a number; else of anything
        parts = Formatter().parse(self.name)
        return re.fullmatch("".join(re.escape(text) + patterns.get(spec, ".+") for text, _, spec, _ in parts), variant) is not None


def reserved(variant: str) -> bool:
    """Whether a unit that is no run may have that name."""
    return any(family.reserves(variant) for family in TABLE if family.name != _RUN)


# -- tasks -----------------------------------------------------------------------------------------------------------------


def _runs(inputs: Inputs) -> Iterator[Task]:
    return (_task_of(variant, run, full=True) for variant, run in inputs.runs)


def _twins(inputs: Inputs) -> Iterator[Task]:
    return (_task_of(variant, run, full=False) for variant, run in inputs.twins)


def _task_of(variant: str, run: Run, full: bool) -> Task:
    parts = ("run", sha256_of(checkpoint_path(run.out)))
    return Task(partial(_measure_run, run=run, full=full), parts, {"run": variant}, run.config.seed)


def _codes(name: str, inputs: Inputs) -> Iterator[Task]:
    """At the latent size of each run, and at the protocol's shares, where no models are sampled from them."""
    parameters = inputs.zoo.architecture.num_weights
    sizes = [(run.autoencoder.latent_numbers, run.config.token_size, True) for _, run in inputs.runs]
    for numbers, token_size, new in (*sizes, *((round(s * parameters), 0, False) for s in inputs.zoo.protocol.shares)):
        if (share := round(100 * numbers / parameters)) <= 100:  # with more numbers than weights nothing is compressed
            make = partial(_fit_and_measure, name=name, numbers=numbers, token_size=token_size, new=new)
            parts = ("code", _CODES, name, numbers, token_size)
            yield Task(make, (*parts, new), {"share": share}, within=(*parts, True))


def _refined(name: str, inputs: Inputs) -> Iterator[Task]:
    zoo, protocol = inputs.zoo, inputs.zoo.protocol
    shares = protocol.shares if protocol.refine_steps > 0 and zoo.architecture.planned else ()
    for numbers in (round(share * zoo.architecture.num_weights) for share in shares):
        sizes = {"refine_steps": protocol.refine_steps, "refine_images": protocol.refine_images}
        names = {"share": round(100 * numbers / zoo.architecture.num_weights)}
        yield Task(partial(_refine_and_measure, name=name, numbers=numbers, sizes=sizes), ("refined", _CODES, name, numbers, sizes), names)


def _untrained(inputs: Inputs) -> Iterator[Task]:
    for _, run in inputs.runs:
        sizes = {**run.autoencoder.config(), "start": "random"}
        yield Task(partial(_probe_untrained, like=run.autoencoder, sizes=sizes), ("untrained", sizes), sizes)


def _once(name: str, make: Callable[[LoadedZoo], Measured]) -> Callable[[Inputs], list[Task]]:
    """One unit per zoo, computed from nothing else."""
    return lambda inputs: [Task(make, (name,))]


def _stand_in(name: str, baseline: str, rows: Callable[[LoadedZoo], Tensor], classes: bool = True) -> Family:
    """Training models in the places of reconstructions, by their ``rows [k]``; with ``classes``, chosen by their answers' classes."""
    tasks = _once(name, partial(_put_in_place, rows=rows))
    return Family(name, "model", _labelled(tasks) if classes else tasks, baseline)


def _features(name: str, baseline: str, of: Callable[[LoadedZoo], Mapping[str, Tensor]], most: int | None = None) -> Family:
    """Probes of features that come from no code; of networks of at most so many parameters."""
    one = _labelled(_once(name, lambda zoo: Measured(discriminative(zoo, of(zoo)))))
    return Family(name, "features", lambda i: one(i) if most is None or i.zoo.architecture.num_weights <= most else [], baseline)


def _labelled(tasks: Callable[[Inputs], Iterable[Task]]) -> Callable[[Inputs], Iterable[Task]]:
    """The tasks of a zoo whose answers are classes; none of another."""
    return lambda inputs: tasks(inputs) if inputs.zoo.labelled else []


# -- how they are made -----------------------------------------------------------------------------------------------------


def _measure_run(zoo: LoadedZoo, run: Run, full: bool) -> Measured:
    metrics, tables, sizes = measure_code(zoo, run.autoencoder, full=full)
    more = {"curves": curve_of(run.out), "latents": latent_rows(zoo, run.autoencoder)}
    return Measured(metrics, {**tables, **more}, {**run_facts(run), **sizes})


def _fit_and_measure(zoo: LoadedZoo, name: str, numbers: int, token_size: int, new: bool) -> Measured | None:
    code = linear_baselines(zoo.train, zoo.data, numbers, token_size, only=(name,)).get(name)
    if code is None:
        return None
    measured = measure_code(zoo, code, new=new)
    return measured._replace(facts={"code": name, **measured.facts})


def _refine_and_measure(zoo: LoadedZoo, name: str, numbers: int, sizes: Mapping[str, int]) -> Measured | None:
    """Latents of a closed-form code, refined for each model at test time on training images."""
    code = linear_baselines(zoo.train, zoo.data, numbers, only=(name,)).get(name)
    if code is None:
        return None
    images = spaced(zoo.data.train_images, sizes["refine_images"]).to(zoo.device)
    latents = refine(code, zoo.test.weights, images, steps=sizes["refine_steps"], seed=zoo.protocol.seed)
    metrics, models = reconstructive(zoo, decode(code, latents))
    note = {"baseline": f"{sizes['refine_steps']} steps per model", "code": name, **sizes}
    return with_sizes(zoo, code, Measured(metrics, {"models": models}, note))


def _probe_untrained(zoo: LoadedZoo, like: Autoencoder, sizes: Mapping[str, Any]) -> Measured:
    with torch.random.fork_rng():
        torch.manual_seed(zoo.protocol.seed)
        fresh = Autoencoder.from_config(like.layout, dict(sizes)).to(zoo.device).eval()
    return Measured(discriminative(zoo, {s: embeddings(fresh, p.weights) for s, p in zoo.splits.items()}))


def _put_in_place(zoo: LoadedZoo, rows: Callable[[LoadedZoo], Tensor]) -> Measured:
    metrics, models = reconstructive(zoo, zoo.train.weights[rows(zoo).to(zoo.train.weights.device)])
    return Measured(metrics, {"models": models})


def _nearest_rows(zoo: LoadedZoo) -> Tensor:
    parts = zoo.test.weights.split(256)
    return torch.cat([torch.cdist(part.double(), zoo.train.weights.double()).argmin(1) for part in parts])


def _best_row(zoo: LoadedZoo) -> Tensor:
    return zoo.anchors[:1].expand(len(zoo.test))


def _typical_row(zoo: LoadedZoo) -> Tensor:
    """The model that agrees most with the others on validation images: the zoo's mean behavior, as a model."""
    classes = classes_of(zoo.train.weights, zoo.data.val_images, zoo.architecture)
    votes = torch.stack([(classes == c).double().mean(0) for c in range(zoo.architecture.num_classes)])  # [K, n]
    agreed = votes.gather(0, classes.clamp_min(0).long()).where(classes >= 0, 0)  # a broken model agrees with nobody
    return agreed.mean(1).argmax().cpu().expand(len(zoo.test))


def _weights(zoo: LoadedZoo) -> dict[str, Tensor]:
    return {split: p.weights for split, p in zoo.splits.items()}


def _statistics(zoo: LoadedZoo) -> dict[str, Tensor]:
    return {split: weight_statistics(w, zoo.architecture) for split, w in _weights(zoo).items()}


def _answers(zoo: LoadedZoo, drawn: bool = False) -> dict[str, Tensor]:
    return behavior_features(zoo, _weights(zoo), drawn=drawn)


TABLE: tuple[Family, ...] = (
    Family("zoo", "zoo", _once("zoo", measure_originals)),
    Family(_RUN, "run", _runs),
    Family("{run}-zero-layer", "run", _twins, "zero-layer autoencoder, same steps"),
    *(Family(f"{code}-{{share:d}}", "code", partial(_codes, code), "closed form") for code in BASELINES),
    Family("untrained-{d_model}x{layers}-{latent}", "features", _labelled(_untrained), "mean token of an encoder with fresh weights"),
    *(Family(f"{code}-{{share:d}}-refined", "refined", partial(_refined, code)) for code in REFINED),
    _stand_in("nearest-zoo-model", "the training model nearest in weights", _nearest_rows, classes=False),
    _stand_in("best-zoo-model", "the training model with the best validation accuracy, for every other", _best_row),
    _stand_in("typical-zoo-model", "the training model that agrees most with the others, for every other", _typical_row),
    _features("weight-statistics", "mean, deviation and quantiles of every layer", _statistics),
    _features("behavior-statistics", "what the originals answer on training images, no labels", _answers),
    _features("behavior-statistics-drawn", "what the originals answer on drawn images, no data", partial(_answers, drawn=True)),
    _features("raw-weights", "every weight", _weights, _RAW),
)


# -- what is said of a run -------------------------------------------------------------------------------------------------


def run_facts(run: Run) -> dict[str, Any]:
    """What the page says of a run: which losses it was trained with, and its settings."""
    c = run.config
    used = [("C", c.gamma > 0), ("S", c.uses_structure), ("B", c.uses_behavior)]
    names = ("gamma", "beta", "criterion", "steps", "lr", "batch_size", "queries", "start", "metric", "layers", "d_model", "views")
    losses = "+".join(letter for letter, on in used if on)
    return {"folder": str(run.out), "losses": losses, "step": run.step, **{n: getattr(c, n) for n in names}}


def curve_of(folder: Path) -> list[dict[str, Any]]:
    """Records of a run's log that hold a loss, at most 200, evenly spaced."""
    columns = ("step", "loss", "structural", "behavioral", "contrastive")
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
            records.append({name: record[name] for name in columns if name in record})
    stride = -(-len(records) // 200) or 1
    return records[::stride]
