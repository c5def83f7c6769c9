"""The evaluation protocol: what is measured of one code on one zoo, in the three downstream tasks (docs/evaluation.md)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..codes.layer_inputs import spaced
from ..measure.diversity import Diversity, accuracy, behavioral_novelty, diversity, matched_rows, nearest, outputs_of, sorted_channels
from ..measure.evaluation import Code, compare_models, decode, embeddings, encode, latent_numbers, reconstruct
from ..measure.generation import Source
from ..measure.probe import RidgeProbe, behavior_statistics, consensus_of
from ..measure.reconstruction import Reconstruction
from ..measure.results import Figures, Row, figures, single
from ..population import Population
from ..queries import synthetic_queries
from ..zoo.build import fine_tune
from .loaded_zoo import LoadedZoo, Protocol, evenly

TARGETS = {"probe_r2": "test_acc", "probe_r2_ggap": "ggap", "probe_r2_epoch": "epoch"}
_RESAMPLES = 500
Metrics = dict[str, Figures]


class Measured(NamedTuple):
    """What a unit holds: figures by metric, rows by table, and facts about it (see :class:`~wslfast.measure.results.Unit`)."""

    metrics: Mapping[str, Figures]
    tables: Mapping[str, Sequence[Row]] = {}
    facts: Mapping[str, Any] = {}


# -- the tasks -----------------------------------------------------------------------------------------------------------


def reconstructive(zoo: LoadedZoo, reconstructed: Tensor) -> tuple[Metrics, list[Row]]:
    """Every metric of :class:`Reconstruction`, and one row a test model."""
    result, values = compared(zoo, zoo.test, reconstructed, "test", zoo.targets)
    metrics: Metrics = {name: figures(v) for name, v in values.items()}
    metrics["non_finite"] = single(float(result.non_finite))
    if zoo.labelled:
        metrics["accuracy_change_abs"] = figures(result.accuracy_change.abs())
        metrics["best_original"] = single(float(result.accuracy_original.nan_to_num(0).max()))
        metrics["best_reconstructed"] = single(float(result.accuracy_reconstructed.nan_to_num(0).max()))
    table = zoo.test.properties
    rows = [
        {"model": table["model"][j], "epoch": table["epoch"][j] if "epoch" in table else None}
        | {name: float(v[j]) for name, v in values.items()}
        for j in range(len(result))
    ]
    return metrics, rows


def compared(
    zoo: LoadedZoo, models: Population, reconstructed: Tensor, split: str, targets: Tensor | None = None
) -> tuple[Reconstruction, dict[str, Tensor]]:
    """Reconstructions held against models on the images of a split, and what has a value: nothing of accuracy where answers are no
    classes."""
    images, labels = zoo.data.split(split)
    result = compare_models(models, reconstructed, images, labels if zoo.labelled else None, targets, zoo.data.provenance.get("peak"))
    every = result.metrics().items()
    return result, {name: v for name, v in every if zoo.labelled or not (name.startswith("accuracy") or bool(v.isnan().all()))}


def discriminative(zoo: LoadedZoo, features: Mapping[str, Tensor], prefix: str = "") -> Metrics:
    """R2 of ridge probes for test accuracy, generalisation gap and epoch, on test models.

    Fitted on training models, the penalty chosen on validation models; models whose features are not finite are left out. The spread
    is that of the test score over resamples of the test *models* (checkpoints of one model are drawn together).
    """
    metrics: Metrics = {}
    models = {split: p.properties["model"] for split, p in zoo.splits.items()}
    sound = {split: f.isfinite().all(1) for split, f in features.items()}  # a code may have nothing to say of a model that overflows
    features = {split: f[sound[split]] for split, f in features.items()}
    if any(len(f) == 0 for f in features.values()):
        return metrics
    of_test = [m for m, kept in zip(models["test"], sound["test"].tolist()) if kept]
    for name, column in TARGETS.items():
        if any(column not in p.properties for p in zoo.splits.values()):
            continue
        target = {split: p.column(column).to(features[split].device)[sound[split]] for split, p in zoo.splits.items()}
        if all(bool(t.isnan().all()) for t in target.values()):
            continue
        judge = (features["val"], target["val"]) if "val" in target else None
        fitted = RidgeProbe.fit(features["train"], target["train"], validation=judge)
        spread = _bootstrap(fitted.predict(features["test"]), target["test"], of_test, zoo.protocol.seed)
        metrics[name + prefix] = single(fitted.r2(features["test"], target["test"]), spread)
        for split in ("train", "val"):
            if split in target:
                metrics[f"{name}{prefix}_{split}"] = single(fitted.r2(features[split], target[split]))
    return metrics


def _bootstrap(predicted: Tensor, target: Tensor, models: Sequence[Any], seed: int) -> float | None:
    """Standard deviation of R2 over resamples of models with replacement; None where it is not defined."""
    labelled = ~target.isnan()
    predicted, target = predicted[labelled].cpu(), target[labelled].cpu()
    ids = {m: i for i, m in enumerate(dict.fromkeys(m for m, k in zip(models, labelled.tolist()) if k))}
    group = torch.tensor([ids[m] for m, k in zip(models, labelled.tolist()) if k])
    if len(ids) < 3:
        return None
    drawn = torch.randint(len(ids), (_RESAMPLES, len(ids)), generator=torch.Generator().manual_seed(seed))
    weight = torch.zeros(_RESAMPLES, len(ids), dtype=torch.float64).scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
    weight = weight[:, group]
    low, high = (torch.where(weight > 0, target, end) for end in (math.inf, -math.inf))
    varies = low.amin(1) < high.amax(1)  # told by the numbers: rounding gives equal ones a variance, and R2 of -1e15
    weight = (weight / weight.sum(1, keepdim=True))[varies]
    spread = target - target.mean()  # the variance of numbers around 0 loses no digits
    r2 = 1 - weight @ (predicted - target).square() / (weight @ spread.square() - (weight @ spread).square())
    finite = r2[r2.isfinite()]
    return float(finite.std()) if len(finite) > 1 else None


def latent_features(zoo: LoadedZoo, latents: Mapping[str, Tensor], rebuilt: Mapping[str, Tensor]) -> Metrics:
    """Probes of the mean token (the published features), of the whole latent, and of what the networks decoded from it answer.

    Args:
        latents: ``{split: [m, T, W]}``. rebuilt: the weights ``[m, P]`` they decode to.
    """
    metrics = discriminative(zoo, {s: z.mean(1) for s, z in latents.items()})
    further = discriminative(zoo, {s: z.flatten(1) for s, z in latents.items()}, "_whole")
    further |= discriminative(zoo, behavior_features(zoo, rebuilt), "_decoded")
    further |= discriminative(zoo, behavior_features(zoo, rebuilt, drawn=True), "_decoded_drawn")
    return metrics | {k: v for k, v in further.items() if not k.endswith(("_train", "_val"))}


def behavior_features(zoo: LoadedZoo, weights: Mapping[str, Tensor], *, drawn: bool = False) -> dict[str, Tensor]:
    """:func:`behavior_statistics` of networks on training images without their labels, or on images ``drawn`` without any data
    (``strokes`` of :func:`~wslfast.queries.synthetic_queries`); the consensus is that of the training split.

    Args:
        weights: ``{split: [m, P]}``, ``"train"`` among them.
    """
    protocol, arch = zoo.protocol, zoo.architecture
    if drawn:
        images = synthetic_queries("strokes", protocol.probe_images, arch, seed=protocol.seed).to(zoo.device)
    else:
        images = spaced(zoo.data.train_images, protocol.probe_images).to(zoo.device)
    outputs = {split: outputs_of(rows, images, arch) for split, rows in weights.items()}
    consensus = consensus_of(outputs["train"])
    return {split: behavior_statistics(y, consensus) for split, y in outputs.items()}


def spreads(pairs: Diversity, suffix: str = "") -> Metrics:
    """Figures of a set's pairwise distances."""
    return {
        f"diversity{suffix}": figures(pairs.structural),
        f"diversity_behavior{suffix}": figures(pairs.behavioral),
        f"diversity_disagreement{suffix}": figures(pairs.disagreement),
    }


class _Sampling(NamedTuple):
    """One sampler's models, what is known of each ``[k]``, and the figures of all, by name."""

    settings: Row
    weights: Tensor
    values: dict[str, Tensor]
    figures: Metrics

    def row(self, main: bool) -> Row:
        """A row of ``samplings``."""
        columns = {f"{n}{c}": v for n, of in self.figures.items() for c, v in zip(("_median", "", "_spread"), of)}
        return {**self.settings, **columns, "main": int(main)}


def _sampled(source: Source, protocol: Protocol, sampler: str, bandwidth: float | None, select: str) -> _Sampling:
    generator = torch.Generator().manual_seed(protocol.seed)
    weights, _ = source.sample(protocol.samples, generator, sampler=sampler, bandwidth=bandwidth or 0.0, select=select)
    outputs = source.outputs(weights, "test")
    values = {
        "val_acc": source.accuracy(weights, "val"),
        "test_acc": accuracy(outputs, source.data.test_labels),
        "novelty": nearest(weights, source.train.weights),
        "novelty_behavior": behavioral_novelty(outputs.argmax(-1), source.train_classes),
    }
    measured = {name: figures(value) for name, value in values.items()} | spreads(diversity(weights, outputs))
    settings: Row = {"sampler": sampler, "bandwidth": bandwidth, "select": select, "samples": protocol.samples}
    return _Sampling(settings, weights, {name: value.cpu() for name, value in values.items()}, measured)


def generative(zoo: LoadedZoo, code: Code, *, full: bool) -> tuple[Metrics, dict[str, list[Row]]]:
    """New models from a code: every sampler's figures, and one of them in detail (``full``: with samplers other than the joint density,
    and fine-tuned).

    The one is the joint density with the widest bandwidth whose models keep, on *validation* images, the mean accuracy of the
    anchors' reconstructions within ``protocol.tolerance`` (the narrowest where none does).
    """
    protocol = zoo.protocol
    source = Source.of(code, zoo.train, zoo.data, zoo.anchors, zoo.train_classes)
    rebuilt = source.decode(source.latents)
    bar = float(source.accuracy(rebuilt, "val").mean()) - protocol.tolerance
    densities = [_sampled(source, protocol, "joint", h, "none") for h in sorted(protocol.bandwidths)]
    keeps = [s for s in densities if (s.figures["val_acc"][1] or 0.0) >= bar]
    main = keeps[-1] if keeps else densities[0]
    middle = sorted(protocol.bandwidths)[len(protocol.bandwidths) // 2]
    others = [("token", middle, "none"), ("individual", middle, "none"), ("uniform", None, "none")]
    others += [("neighbours", None, "none")] if len(source.latents) > 1 else []
    others += [("joint", middle, "subsampled"), ("joint", middle, "bootstrapped")]
    samplings = [s.row(s is main) for s in densities]
    samplings += [_sampled(source, protocol, *setting).row(False) for setting in (others if full else [])]

    metrics: Metrics = {
        **{name: of for name, of in main.figures.items() if name not in ("val_acc", "test_acc")},
        "generated_accuracy": main.figures["test_acc"],
        "best_generated": single(float(main.values["test_acc"].max())),
        "generated_bandwidth": single(main.settings["bandwidth"]),
        # what a copy would score: the anchors' own reconstructions
        "novelty_reconstruction": figures(nearest(rebuilt, zoo.train.weights)),
        "novelty_behavior_reconstruction": figures(behavioral_novelty(source.outputs(rebuilt, "test").argmax(-1), source.train_classes)),
        "anchor_reconstruction_accuracy": figures(source.accuracy(rebuilt, "test")),
        # the same distances, blind to permutations of channels
        "diversity_sorted": figures(torch.pdist(sorted_channels(main.weights, zoo.architecture).double())),
        "novelty_sorted": figures(nearest(sorted_channels(main.weights, zoo.architecture), zoo.train_sorted)),
        "novelty_sorted_reconstruction": figures(nearest(sorted_channels(rebuilt, zoo.architecture), zoo.train_sorted)),
    }
    _, partners = matched_rows(main.values["test_acc"], zoo.train_accuracy)
    if len(partners) > 1:
        alike = zoo.train.weights[partners.to(zoo.train.weights.device)]
        metrics["accuracy_matched"] = figures(zoo.train_accuracy[partners])
        metrics |= spreads(diversity(alike, outputs_of(alike, zoo.data.test_images, zoo.architecture)), "_matched")
    rows: list[Row] = [
        {"set": "generated", "model": j, "epoch": 0} | {n: float(v[j]) for n, v in main.values.items()} for j in range(protocol.samples)
    ]
    if full and protocol.finetune_epochs and zoo.architecture.planned:
        tuned_rows, tuned_metrics = _tuned(zoo, main.weights)
        rows += tuned_rows
        metrics |= tuned_metrics
    return metrics, {"samples": rows, "samplings": samplings}


def _tuned(zoo: LoadedZoo, weights: Tensor) -> tuple[list[Row], Metrics]:
    """Test accuracy of the generated models after each epoch of fine-tuning, all of them at once."""
    protocol, data = zoo.protocol, zoo.data
    some = spaced(torch.arange(len(data.train_labels)), protocol.finetune_images)
    few = replace(data, train_images=data.train_images[some], train_labels=data.train_labels[some])
    tuned = fine_tune(Population(zoo.architecture, weights), few, epochs=protocol.finetune_epochs, seed=protocol.seed)
    table = tuned.properties
    rows = [
        {"set": "finetuned", **{name: table[name][j] for name in ("model", "epoch", "val_acc", "test_acc")}}
        for j in range(len(tuned))
        if table["epoch"][j] > 0
    ]
    last = torch.tensor([e == protocol.finetune_epochs for e in table["epoch"]])
    test = tuned.column("test_acc")
    metrics: Metrics = {"finetuned_accuracy": figures(test[last]), "best_finetuned": single(float(test[tuned.column("epoch") > 0].max()))}
    ends = tuned.weights[last].to(weights.device)
    return rows, metrics | spreads(diversity(ends, outputs_of(ends, data.test_images, zoo.architecture)), "_finetuned")


# -- what the tasks are done with ----------------------------------------------------------------------------------------


def measure_code(zoo: LoadedZoo, code: Code, *, new: bool = True, full: bool = False) -> Measured:
    """All three tasks for one code; without ``new`` models only two, and the first alone where answers are no classes: the others are
    about accuracy. ``full``: as in :func:`generative`."""
    if not zoo.labelled:
        metrics, models = reconstructive(zoo, reconstruct(code, zoo.test.weights))
        return with_sizes(zoo, code, Measured(metrics, {"models": models}))
    latents = {split: encode(code, p.weights) for split, p in zoo.splits.items()}
    rebuilt = {split: decode(code, z) for split, z in latents.items()}
    metrics, models = reconstructive(zoo, rebuilt["test"])
    metrics |= latent_features(zoo, latents, rebuilt)
    sampled, tables = generative(zoo, code, full=full) if new else ({}, {})
    return with_sizes(zoo, code, Measured({**metrics, **sampled}, {**tables, "models": models}))


def with_sizes(zoo: LoadedZoo, code: Code, measured: Measured) -> Measured:
    """The same with the code's latent size, in numbers and as a share of the parameters, among metrics and facts."""
    numbers = latent_numbers(code)
    sizes = {"latent_numbers": numbers, "latent_share": numbers / zoo.architecture.num_weights}
    metrics = {**measured.metrics, **{name: single(float(value)) for name, value in sizes.items()}}
    return measured._replace(metrics=metrics, facts={**measured.facts, **sizes})


def latent_rows(zoo: LoadedZoo, code: Code) -> list[Row]:
    """Mean-token latents of models of every split on their first two principal components."""
    each = max(1, zoo.protocol.map_models // len(zoo.splits))
    parts = {split: evenly(p, each) for split, p in zoo.splits.items()}
    latents = torch.cat([embeddings(code, p.weights) for p in parts.values()]).double().cpu()
    centred = latents - latents.mean(0)
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    xy = torch.nn.functional.pad(u * s, (0, 2))[:, :2]
    share = torch.nn.functional.pad(s.square() / s.square().sum().clamp_min(1e-300), (0, 2))[:2].tolist()
    rows: list[Row] = []
    for split, p in parts.items():
        for j in range(len(p)):
            properties = {name: p.properties[name][j] for name in ("model", "epoch", "test_acc") if name in p.properties}
            x, y = xy[len(rows)].tolist()
            rows.append({"split": split, **properties, "x": x, "y": y, "share_x": share[0], "share_y": share[1]})
    return rows


def measure_originals(zoo: LoadedZoo) -> Measured:
    """The originals: their accuracy, and the anchors' diversity (the published "Model zoo" rows); where answers are no classes, what the
    zoo holds."""
    if not zoo.labelled:
        return Measured({}, {}, zoo.facts)
    rows = zoo.anchors
    anchors = zoo.train.weights[rows.to(zoo.train.weights.device)]
    pick = torch.linspace(
        0, len(rows) - 1, min(len(rows), 4 * zoo.protocol.samples), dtype=torch.float32
    ).long()  # pairs grow with the square
    accuracies = accuracy(zoo.targets, zoo.data.test_labels)
    metrics: Metrics = {
        "accuracy": figures(accuracies),
        "accuracy_anchors": figures(zoo.train_accuracy[rows]),
        "best_original": single(float(accuracies.max())),
    }
    if len(pick) > 1:
        few = anchors[pick.to(anchors.device)]
        metrics |= spreads(diversity(few, outputs_of(few, zoo.data.test_images, zoo.architecture)))
        metrics["diversity_sorted"] = figures(torch.pdist(sorted_channels(few, zoo.architecture).double()))
    table, accurate = zoo.train.properties, zoo.train_accuracy
    samples: list[Row] = [
        {
            "set": "anchors",
            "model": table["model"][row],
            "epoch": table["epoch"][row] if "epoch" in table else None,
            "test_acc": float(accurate[row]),
        }
        for row in rows.tolist()
    ]
    return Measured(metrics, {"samples": samples}, zoo.facts)
