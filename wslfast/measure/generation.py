"""New models from the latents of good ones: sampled, decoded and measured, all at once."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import engine
from ..errors import check_positive, check_seed, logger, require
from ..files import check_folder
from ..kernels.default_device import on_the_cpu
from ..population import Population
from ..profiling import region
from ..proof import proved
from ..training import Run, load_run
from ..zoo import Dataset, Split, dataset_of, load_zoo, read_manifest, save_zoo
from ..zoo.build import fine_tune
from ..zoo.manifest import KIND, MANIFEST
from ..zoo.reading import dealt
from ..zoo.trained_on import dataset_record
from .diversity import accuracy, accuracy_of_classes, answers, behavioral_novelty, classes_of, labels_of, nearest, outputs_of
from .evaluation import Code, decode, encode
from .recorded import check_recorded
from .sampling import SAMPLERS, bootstrapped, draw, subsampled

SELECTIONS = ("none", "subsampled", "bootstrapped")


def val_accuracy(population: Population, data: Dataset) -> Tensor:
    """Validation accuracy ``[k]`` of every model, on the CPU: the zoo's own figure; measured where a zoo, an imported one say, has none.
    NaN where there are no classes."""
    if any(value is not None for value in population.properties.get("val_acc", ())):
        return population.column("val_acc")
    labels = labels_of(data, "val", population.architecture)
    if labels is None:
        return torch.full((len(population),), float("nan"), dtype=torch.float64)
    return accuracy_of_classes(classes_of(population.weights, data.val_images, population.architecture), labels)


def best_rows(value: Tensor, share: float) -> Tensor:
    """Rows ``[m]`` of the best ``share`` of models by their ``value [k]``, at least one, best first; rows without a value are last. All
    rows, where none has a value."""
    require(0 < share <= 1, f"anchors: expected a share in (0, 1], got {share!r}")
    if not bool(value.isfinite().any()):
        return torch.arange(len(value))
    order = torch.nan_to_num(value, nan=-torch.inf).argsort(descending=True, stable=True)
    return order[: max(1, round(share * len(value)))]


@dataclass(frozen=True, eq=False)
class Source:
    """What all samplings of one trained code share: the training models, the good ones among them and their latents.

    Attributes:
        code: an autoencoder, or a closed-form one.
        train: training models; ``novelty`` is measured against all of them.
        rows: ``[m]`` anchors' rows in ``train``, best first.
        latents: ``[m, T, W]``, theirs.
        data: labelled images of the zoo.
        known_classes: ``[K, n]``, classes that the training models choose on test images, where they are known already.
    """

    code: Code
    train: Population
    rows: Tensor
    latents: Tensor
    data: Dataset
    known_classes: Tensor | None = None

    @classmethod
    def of(cls, code: Code, train: Population, data: Dataset, rows: Tensor, classes: Tensor | None = None) -> Source:
        """Around the models ``rows [m]`` of ``train``; a model whose latent is not finite is no anchor."""
        latents = encode(code, train.weights[rows.to(train.weights.device)])
        sound = latents.isfinite().flatten(1).all(1)
        require(bool(sound.any()), "anchors: none of them has a finite latent")
        return cls(code, train, rows[sound.to(rows.device)], latents[sound], data, classes)

    def decode(self, latents: Tensor) -> Tensor:
        """``[k, T, W] -> [k, P]``."""
        return decode(self.code, latents)

    @cached_property
    def train_classes(self) -> Tensor:
        """Classes that the training models choose on test images, ``[K, n]``."""
        if self.known_classes is not None:
            return self.known_classes
        return classes_of(self.train.weights, self.data.split("test")[0], self.train.architecture)

    @property
    def train_accuracy(self) -> Tensor:
        """Share of the test images that each training model gets right, ``[K]`` on the CPU."""
        labels = labels_of(self.data, "test", self.train.architecture)
        if labels is None:
            return torch.full((len(self.train),), float("nan"), dtype=torch.float64)
        return accuracy_of_classes(self.train_classes, labels)

    def outputs(self, weights: Tensor, split: str) -> Tensor:
        """Raw outputs ``[k, n, *out]`` on a split's images."""
        return outputs_of(weights, self.data.split(split)[0], self.train.architecture)

    def accuracy(self, weights: Tensor, split: str) -> Tensor:
        """``[k]`` on a split's images; NaN where there are no classes."""
        return accuracy(self.outputs(weights, split), labels_of(self.data, split, self.train.architecture))

    def novelty(self, outputs: Tensor) -> Tensor:
        """How new the behavior of models with these outputs on test images is, ``[k]``: the share of classes in which each differs from the
        training model most like it; where an answer is one number, the least distance to a training model's, as a share of the
        deviation of the training models' answers."""
        if outputs.shape[-1] > 1:
            return behavioral_novelty(answers(outputs).argmax(-1), self.train_classes)
        own, theirs = (answers(y).flatten(1).double() for y in (outputs, self.outputs(self.train.weights, "test")))
        unit = theirs.std(0, correction=0).norm().clamp_min(1e-300)
        return torch.cdist(own, theirs).amin(1) / unit

    def sample(
        self,
        samples: int,
        generator: torch.Generator,
        *,
        sampler: str = "joint",
        bandwidth: float = 0.05,
        select: str = "none",
        candidates: int | None = None,
        rounds: int = 3,
    ) -> tuple[Tensor, Tensor | None]:
        """Weights ``[samples, P]``, and the row in ``train`` of the anchor each was drawn around, None where there is no such one.

        Args:
            select: ``"none"``; ``"subsampled"``: the best of ``candidates`` by validation accuracy, best first; ``"bootstrapped"``:
                that, ``rounds`` times over, the survivors being the next round's anchors.
            candidates: draws per round; default: 4 per sample.
        """
        require(select in SELECTIONS, f"select: expected one of {SELECTIONS}, got {select!r}")
        rated = select == "none" or labels_of(self.data, "val", self.train.architecture) is not None
        require(rated, f"select: {select!r} needs labelled images to choose by, and the zoo's have no classes; use 'none'")
        if select == "none":
            latents, of = draw(self.latents, samples, generator, sampler=sampler, bandwidth=bandwidth)
        else:
            choose: Any = subsampled if select == "subsampled" else bootstrapped
            settings = {"candidates": candidates or 4 * samples, "sampler": sampler, "bandwidth": bandwidth}
            settings |= {"rounds": rounds} if select == "bootstrapped" else {}
            kept = choose(self.latents, samples, generator, lambda z: self.accuracy(self.decode(z), "val"), **settings)
            latents, of = kept.latents, kept.anchors
        return self.decode(latents), None if of is None else self.rows[of.cpu()]


@on_the_cpu
def generate(
    run: str | Path | Run,
    zoo: str | Path | None = None,
    *,
    samples: int = 64,
    anchors: float = 0.3,
    bandwidth: float = 0.05,
    sampler: str = "joint",
    select: str = "none",
    candidates: int | None = None,
    rounds: int = 3,
    finetune: int = 0,
    seed: int = 0,
    out: str | Path | None = None,
    device: str = "cpu",
    backend: str = "auto",
    skip_bad: bool = False,
    architecture: str | None = None,
    split: str = "test",
) -> Population:
    """Sample new models from a trained run: latents around those of its zoo's best training models, decoded.

    Args:
        run: folder of a training run, or a run that is loaded already.
        zoo: folder of the zoo; by default the one that the run was trained on.
        samples: how many models.
        anchors: share of the training models, best validation accuracy first, whose latents are sampled around.
        bandwidth: of the kernel density, in units of each latent number's standard deviation over the anchors. Small ones copy the
            anchors with noise: read ``novelty``.
        sampler: a kernel density whose kernel covers a whole latent (``"joint"``), a token (``"token"``) or a number
            (``"individual"``); ``"uniform"`` in the anchors' box; ``"neighbours"``: between an anchor and a near one.
        select: ``"none"`` keeps every sample; ``"subsampled"`` and ``"bootstrapped"`` keep those of ``candidates`` draws (default: 4 a
            sample) that are best on *validation* images, best first, the latter over ``rounds`` rounds.
        finetune: epochs of training of all samples at once (Adam 5e-4, weight decay 5e-4, batches of 64: the published setting).
        seed: of the draw, and of the fine-tuning's batches.
        out: folder to store the generated models in, as a zoo.
        device: where to run.
        backend: what runs the networks: ``"auto"``, ``"triton"`` or ``"torch"``.
        skip_bad: leave out shards of the zoo that are missing or damaged, with a count, instead of raising.
        architecture: label of one of a zoo's several architectures; by default the one that most training models are of.
        split: which split all models in ``out`` are in. ``"test"``: :func:`evaluate` measures them. ``"train"`` or ``"val"``. ``"drawn"``:
            they are dealt out to all three, so that they can be trained on.

    Returns:
        A population, with ``finetune + 1`` rows per sample. Properties: ``epoch`` of fine-tuning (0: as decoded); ``anchor``, the zoo's
        ``model`` that the sample was drawn around, and ``anchor_epoch`` (None where there is no single one); ``val_acc`` and ``test_acc``
        on the zoo's data set; ``novelty``, the L2 distance in weights to the nearest training model; ``novelty_behavior``, the share of
        test images on which it differs from the training model that is most like it.

    Raises:
        WslfastError: unreadable run or zoo, arguments out of range.
    """
    given = {"samples": samples, "bandwidth": bandwidth, "sampler": sampler, "finetune": finetune, "seed": seed, "backend": backend}
    _check({**given, "candidates": candidates, "split": split})
    if out is not None:
        _free(out)
    loaded = run if isinstance(run, Run) else load_run(run, device=device)
    folder = str(zoo if zoo is not None else loaded.zoo)
    if architecture is None and len(every := training_architectures(folder)) > 1:
        architecture = max(every, key=lambda label: every[label])
        how = "architecture= chooses another, wslfast.measure.generate_each gives models of each"
        logger.info("generate: of %s architectures, models of %r, which most training models are of; %s", len(every), architecture, how)
    train = load_zoo(folder, "train", architecture=architecture, skip_bad=skip_bad).to(device)
    data = dataset_of(folder, train.architecture)
    tunable = not finetune or labels_of(data, "train", train.architecture) is not None
    require(tunable, f"finetune: expected 0, as the zoo's data set ({data.name}) has no classes to train for; got {finetune}")
    forms = ["forward", "indexed"] if finetune else ["forward"]
    with engine.using(backend), proved(train.architecture, torch.device(device), forms, samples, 256), region("generate"), torch.no_grad():
        source = Source.of(loaded.of(train.architecture), train, data, best_rows(val_accuracy(train, data), anchors))
        generator = torch.Generator().manual_seed(seed)
        weights, of = source.sample(
            samples, generator, sampler=sampler, bandwidth=bandwidth, select=select, candidates=candidates, rounds=rounds
        )
        tuned = fine_tune(Population(train.architecture, weights), data, epochs=finetune, seed=seed) if finetune else None
        weights = weights if tuned is None else tuned.weights.to(device)
        population = Population(train.architecture, weights.cpu(), _properties(source, weights, samples, of))
    check_recorded(train, source.train_accuracy, data, folder)
    if out is not None:
        settings = {"samples": samples, "sampler": sampler, "bandwidth": bandwidth, "anchors": anchors, "select": select, "seed": seed}
        settings |= {"candidates": candidates, "rounds": rounds, "finetune": finetune, "backend": backend}
        _store(out, {train.architecture.name: population}, loaded, folder, split, settings)
    return population


def generate_each(
    run: str | Path | Run, zoo: str | Path | None = None, *, out: str | Path | None = None, split: str = "test", **settings: Any
) -> dict[str, Population]:
    """New models of every architecture of a run's zoo, by label: :func:`generate` for each, with ``samples`` models of each.

    Args:
        run, zoo, split, settings: as :func:`generate` has them.
        out: folder to store all of them in, as one zoo.
    """
    require("architecture" not in settings, "architecture: generate makes models of one")
    defaults = {n: own.default for n, own in inspect.signature(generate).parameters.items() if own.kind is own.KEYWORD_ONLY}
    unknown = sorted(set(settings) - set(defaults))
    require(not unknown, f"generate_each: unknown arguments {unknown}")
    given = {**defaults, **settings, "split": split}
    _check(given)
    if out is not None:
        _free(out)
    loaded = run if isinstance(run, Run) else load_run(run, device=settings.get("device", "cpu"))
    folder = str(zoo if zoo is not None else loaded.zoo)
    labels = training_architectures(folder)
    require(len(labels) > 0, lambda: f"{folder}: no row is in split 'train'{dealt('train')}")
    populations = {label: generate(loaded, zoo, architecture=label, split=split, **settings) for label in labels}
    if out is not None:
        left_out = ("out", "split", "architecture", "device", "skip_bad")
        _store(out, populations, loaded, folder, split, {n: v for n, v in given.items() if n not in left_out})
    return populations


def _check(given: Mapping[str, Any]) -> None:
    """Raise WslfastError for arguments of :func:`generate` that are out of range, before anything is loaded."""
    samples, bandwidth, finetune, candidates = (given[name] for name in ("samples", "bandwidth", "finetune", "candidates"))
    check_positive("samples", samples)
    require(0 <= bandwidth < float("inf"), f"bandwidth: expected a non-negative number, got {bandwidth!r}")
    require(given["sampler"] in SAMPLERS, f"sampler: expected one of {SAMPLERS}, got {given['sampler']!r}")
    require(type(finetune) is int and finetune >= 0, f"finetune: expected a number of epochs >= 0, got {finetune!r}")
    check_seed(given["seed"])
    engine.check_backend(given["backend"])
    if candidates is not None:
        check_positive("candidates", candidates)
    valid = given["split"] in ("train", "val", "test", "drawn")
    require(valid, f"split: expected train, val, test or drawn, got {given['split']!r}")


def training_architectures(zoo: str | Path) -> dict[str, int]:
    """The architectures of a zoo's training models by label, with the number of models of each."""
    manifest = read_manifest(zoo)
    label = str(manifest.architecture.get("name"))
    labels = manifest.properties[KIND] if manifest.kinds else [label] * manifest.rows
    rows = zip(manifest.properties["model"], labels, manifest.properties["split"], strict=True)
    models = {(model, own) for model, own, split in rows if split == "train"}
    return {label: count for label in dict.fromkeys(labels) if (count := sum(own == label for _, own in models))}


def _free(out: str | Path) -> None:
    """Raise WslfastError where a zoo is already, or something else."""
    check_folder(Path(out), "zoo")
    require(not (Path(out) / MANIFEST).exists(), f"out: {out}: there is a zoo already; name another folder")


def _store(out: str | Path, made: Mapping[str, Population], run: Run, folder: str, split: str, settings: Mapping[str, Any]) -> None:
    """Write generated models, by architecture, as one zoo on the data set of the zoo that they were made from."""
    known = dict(settings)
    if known["select"] == "none":
        known = {name: value for name, value in known.items() if name not in ("candidates", "rounds")}
    else:
        known["candidates"] = known["candidates"] or 4 * known["samples"]
    provenance = {"made_by": "wslfast.generate", "run": str(run.out), "zoo": folder, **known}
    provenance["dataset"] = dataset_record(folder)  # so that the new models can be evaluated, and trained on
    drawn = Split(seed=known["seed"])
    if len(made) == 1:
        (population,) = made.values()
        save_zoo(population, out, splits=drawn if split == "drawn" else [split] * len(population), provenance=provenance)
        return
    parts = ((p, drawn.assign(p.properties["model"]) if split == "drawn" else [split] * len(p)) for p in made.values())
    save_zoo(made, out, splits=[name for _, names in parts for name in names], provenance=provenance)


def _properties(source: Source, weights: Tensor, samples: int, of: Tensor | None) -> dict[str, tuple[Any, ...]]:
    """The table of :func:`generate`; ``weights`` holds ``samples`` models, each at as many epochs as divide it."""
    train, epochs = source.train, len(weights) // samples
    anchors = [None] * samples if of is None else of.tolist()
    test = source.outputs(weights, "test")
    return {
        "model": tuple(j for j in range(samples) for _ in range(epochs)),
        "epoch": tuple(e for _ in range(samples) for e in range(epochs)),
        **{
            name: tuple(
                None if j is None or column not in train.properties else train.properties[column][j] for j in anchors for _ in range(epochs)
            )
            for name, column in (("anchor", "model"), ("anchor_epoch", "epoch"))
            if column in train.properties  # a zoo of somebody's modules may know no epochs
        },
        "val_acc": tuple(source.accuracy(weights, "val").tolist()),
        "test_acc": tuple(accuracy(test, labels_of(source.data, "test", source.train.architecture)).tolist()),
        "novelty": tuple(nearest(weights, train.weights).tolist()),
        "novelty_behavior": tuple(source.novelty(test).tolist()),
    }
