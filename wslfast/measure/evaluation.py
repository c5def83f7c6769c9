"""Evaluating a run on held-out models of its zoo, beside the standing baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Union

import torch
from torch import Tensor

from .. import engine
from ..architecture import Architecture
from ..codes.adaptive import AdaptiveCodec
from ..codes.autoencoder import Autoencoder
from ..codes.layer_inputs import spaced
from ..codes.linear import LinearCodec
from ..engine.ranks import apart, joined
from ..errors import logger, require
from ..files import check_writable, write_json
from ..kernels.default_device import on_the_cpu
from ..population import Population, html_table
from ..profiling import region
from ..proof import proved
from ..tokens import layout
from ..training import Run, load_run
from ..training.hooks import LogTo, hook_of
from ..zoo import Dataset, dataset_of, load_parts, read_manifest
from ..zoo.manifest import MANIFEST, SPLITS
from .diversity import labels_of, outputs_of
from .reconstruction import Reconstruction, compare
from .recorded import check_recorded

Code = Union[Autoencoder, LinearCodec]
BASELINES = ("linear", "linear-views", "linear-metric", "adaptive")  # what linear_baselines returns, where the architecture allows


def encode(code: Code, weights: Tensor, *, block: int = 256) -> Tensor:
    """Latents ``[k, T, W]`` of rows of weights ``[k, P]``, canonical (unpermuted), a block of models at a time."""
    if isinstance(code, LinearCodec):
        return code.encode(weights)
    tokens_of = layout(code.layout.architecture, code.layout.token_size)
    with torch.no_grad():
        return torch.cat([code.encode(tokens_of.tokenize(part).tokens).float() for part in weights.split(block)])


def decode(code: Code, latents: Tensor, *, block: int = 256) -> Tensor:
    """The inverse, as far as the code has one: ``[k, T, W] -> [k, P]``."""
    if isinstance(code, LinearCodec):
        return code.decode(latents)
    tokens_of = layout(code.layout.architecture, code.layout.token_size)
    with torch.no_grad():
        return torch.cat([tokens_of.detokenize(code.decode(part).float()) for part in latents.split(block)])


def reconstruct(code: Code, weights: Tensor, *, block: int = 256) -> Tensor:
    """Encode and decode rows of weights ``[k, P] -> [k, P]``, a block of models at a time."""
    return torch.cat([decode(code, encode(code, part)) for part in weights.split(block)])


def embeddings(code: Code, weights: Tensor, *, block: int = 256) -> Tensor:
    """Mean-token latents ``[k, W]``, the features of the paper's discriminative tasks."""
    return torch.cat([encode(code, part).mean(1) for part in weights.split(block)])


def compare_models(
    population: Population,
    reconstructed: Tensor,
    images: Tensor,
    labels: Tensor | None,
    targets: Tensor | None = None,
    peak: float | None = None,
) -> Reconstruction:
    """:func:`compare` with the models of a population, checkpoints of one model a group; images may be on any device."""
    weights, groups = population.weights, population.properties.get("model")
    images, labels = images.to(weights.device), None if labels is None else labels.to(weights.device)
    return compare(weights, reconstructed, images, labels, population.architecture, groups=groups, targets=targets, peak=peak)


def evaluate_code(code: Code, population: Population, images: Tensor, labels: Tensor | None) -> Reconstruction:
    """Reconstruct every model of a population with a code and compare it with its original on labelled images."""
    with region("evaluate"), torch.no_grad():
        return compare_models(population, reconstruct(code, population.weights), images, labels)


class Figures(dict[str, dict[str, Any]]):
    """Figures by variant: a dictionary that a notebook shows as a table."""

    def _repr_html_(self) -> str:
        names = (
            "agreement",
            "agreement_others",
            "identified",
            "accuracy_original",
            "accuracy_reconstructed",
            "accuracy_change",
            "l2_masked",
        )
        columns = ["variant", *(name.replace("_", " ") for name in names)]
        few = next((of.get("n_models") for of in self.values()), None)
        return html_table(columns, [[v, *map(of.get, names)] for v, of in self.items()], f"means over {few} models; change: the median")


@on_the_cpu
def evaluate(
    run: str | Path,
    zoo: str | Path | None = None,
    *,
    split: str = "test",
    baselines: bool = True,
    out: str | Path | None = None,
    device: str = "cpu",
    backend: str = "auto",
    skip_bad: bool = False,
    log_to: LogTo = None,
) -> dict[str, dict[str, Any]]:
    """Reconstruct a split of a zoo with a trained run and measure how its models behave.

    Where the originals' accuracy and the zoo's ``test_acc`` differ by more than half a point, one warning names the likely causes. Under
    torchrun the variants are dealt out to the processes, which all return all figures; the first writes.

    Args:
        run: folder of a training run.
        zoo: folder of the zoo; by default the one that the run was trained on.
        split: ``"train"``, ``"val"`` or ``"test"``: held-out models, on the data set's test images.
        baselines: also evaluate the closed-form codes at the same latent size (see :func:`linear_baselines`).
        out: file to write the figures to, as JSON.
        device: where to run.
        backend: what runs the networks: ``"auto"``, ``"triton"`` or ``"torch"``.
        skip_bad: leave out shards of the zoo that are missing or damaged, with a count, instead of raising.
        log_to: also tell ``"tensorboard"`` (in ``run/tensorboard``), or an object with the three methods of
            :class:`~wslfast.training.hooks.LogHook`, the figures as a table.

    Returns:
        Figures by variant (``"run"`` and the baselines), means over models: accuracy of original and of reconstruction, agreement with the
        own original and with others' originals, the margin between the two, identified, explained variance, masked L2, latent numbers per
        model; medians and spreads are beside them. Where there are no classes (coordinates, observations without labels) the accuracies
        are None, and ``psnr`` says how near the outputs are. For a zoo of several architectures these are means over all models (of a
        median: of each architecture's, by its number of models), and ``architectures`` holds the figures of each one.

    Raises:
        WslfastError: unreadable run or zoo, an empty split.
    """
    require(split in SPLITS, f"split: expected train, val or test, got {split!r}")
    engine.check_backend(backend)
    if out is not None:
        check_writable(Path(out).parent)
    with joined(device, patient=True) as (world, _):
        loaded = load_run(run, device=device)
        hook = hook_of(log_to, Path(run), loaded.step) if world.writes else None
        folder = str(zoo if zoo is not None else loaded.zoo)
        with apart():
            own = _figures(loaded, folder, split, world.dealt(["run", *(BASELINES if baselines else ())]), device, backend, skip_bad)
        collected = world.collected(own)
        each: dict[str, dict[str, Any]] = {}
        for label in own:
            by_name = {name: figures for part in collected for name, figures in part[label].items()}
            each[label] = {name: by_name[name] for name in ("run", *BASELINES) if name in by_name}
        results = Figures(next(iter(each.values())) if len(each) == 1 else by_architecture(each))
    if not world.writes:
        return results
    if out is not None:
        write_json(out, {"run": str(run), "zoo": folder, "split": split, "backend": backend, "variants": results})
    if hook is not None:
        names = list(dict.fromkeys(name for figures in results.values() for name in figures if name not in ("spread", "architectures")))
        hook.table(f"evaluation of {split} models", ["variant", *names], [[v, *map(f.get, names)] for v, f in results.items()])
    return results


def _figures(
    run: Run, folder: str, split: str, names: Sequence[str], device: str, backend: str, skip_bad: bool
) -> dict[str, dict[str, dict[str, Any]]]:
    """By architecture, the figures of the run (``"run"``) and of closed-form codes at its latent size, of those in ``names``."""
    parts = load_parts(folder, split, skip_bad=skip_bad)
    closed = [name for name in names if name != "run"]
    training = _training(run, folder, skip_bad) if closed else []
    return {
        label: _evaluated(run, folder, population.to(device), _of(training, population.architecture), names, backend, device)
        for label, population in parts.items()
    }


def _training(run: Run, folder: str, skip_bad: bool) -> list[Population]:
    """What closed-form codes are fitted to: the zoo's training models; of one that has none (a generated one), those of the run's."""
    for zoo in dict.fromkeys((folder, run.zoo)):
        if (zoo == folder or (Path(zoo) / MANIFEST).is_file()) and "train" in read_manifest(zoo).properties["split"]:
            if zoo != folder:
                logger.info("closed-form codes: fitted to the training models of %s, as %s has none", zoo, folder)
            return list(load_parts(zoo, "train", skip_bad=skip_bad).values())
    logger.info("closed-form codes: left out, as %s has no training models", folder)
    return []


def _of(training: Sequence[Population], architecture: Architecture) -> Population | None:
    return next((population for population in training if population.architecture.same_network(architecture)), None)


def by_architecture(each: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Figures of a zoo of several architectures: of each variant the means over all models, and under ``architectures`` those of each."""
    results: dict[str, dict[str, Any]] = {}
    for variant in dict.fromkeys(name for figures in each.values() for name in figures):
        by_label = {label: figures[variant] for label, figures in each.items() if variant in figures}
        pooled: dict[str, Any] = {}
        for name in dict.fromkeys(name for figures in by_label.values() for name in figures if name != "spread"):
            known = [(f[name], f["n_models"]) for f in by_label.values() if isinstance(f.get(name), (int, float))]
            counted = name in ("n_models", "non_finite", "non_finite_original")
            total = sum(count for _, count in known)
            pooled[name] = sum(v for v, _ in known) if counted else sum(v * c for v, c in known) / total if total else None
        results[variant] = {**pooled, "architectures": by_label}
    return results


def _evaluated(
    loaded: Run, folder: str, population: Population, train: Population | None, names: Sequence[str], backend: str, device: str
) -> dict[str, dict[str, Any]]:
    """:func:`_figures` for models of one architecture; with baselines fitted to ``train``."""
    autoencoder = loaded.of(population.architecture)
    dataset = dataset_of(folder, population.architecture)
    images, labels = dataset.split("test")[0], labels_of(dataset, "test", population.architecture)
    codes: dict[str, Code] = {"run": autoencoder} if "run" in names else {}
    results = {}
    work = population.architecture, torch.device(device), ["forward"], len(population), len(images)
    with engine.using(backend), proved(*work), region("evaluate"), torch.no_grad():
        closed = [name for name in names if name != "run"]
        if train is not None and closed:
            size = autoencoder.layout.token_size
            codes |= linear_baselines(train.to(device), dataset, autoencoder.latent_numbers, size, only=closed)
        # the originals run once for all codes
        targets = outputs_of(population.weights, images, population.architecture) if len(codes) > 1 else None
        for name, code in codes.items():
            result = compare_models(
                population, reconstruct(code, population.weights), images, labels, targets, dataset.provenance.get("peak")
            )
            if name == "run":  # the originals are the same for all
                check_recorded(population, result.accuracy_original, dataset, folder)
            numbers = latent_numbers(code)
            results[name] = {**result.summary(), "latent_numbers": numbers, "latent_share": numbers / population.architecture.num_weights}
    return results


def linear_baselines(
    train: Population, dataset: Dataset, latent: int, token_size: int = 0, seed: int = 0, only: Sequence[str] = BASELINES
) -> dict[str, LinearCodec]:
    """The closed-form codes of a zoo with ``latent`` numbers per model: what any trained autoencoder has to beat; ``only`` some of them.

    See :func:`closed_form` for what they are. ``linear-metric`` and ``adaptive`` are left out where they do not fit the architecture.
    """
    images = spaced(dataset.train_images, 512)
    unfit = {"linear-metric"} if not train.architecture.planned else set()
    unfit |= set() if AdaptiveCodec.supports(train.architecture) else {"adaptive"}
    names = (name for name in only if name not in unfit)
    return {name: closed_form(name, train, min(latent, train.architecture.num_weights), images, token_size, seed) for name in names}


def closed_form(
    name: str, train: Population, latent: Union[int, float], images: Tensor | None, token_size: int = 0, seed: int = 0
) -> LinearCodec:
    """One of ``BASELINES``, fitted to training models: ``linear`` is PCA of the stored weights, ``linear-views`` PCA over all their
    permuted views, ``linear-metric`` the same in the activation metric, ``adaptive`` in the metric of each model's own activations (see
    :mod:`wslfast.codes.adaptive`).

    Args:
        latent: numbers per model, or as a float their share of the parameters.
        images: ``[n, *input_shape]`` that activations are on; None for ``linear`` and ``linear-views``.
    """
    sizes: dict[str, Any] = {"latent": latent, "token_size": token_size, "seed": seed}
    queries: Any = None if images is None else images.to(train.weights.device)
    if name == "adaptive":
        return AdaptiveCodec(train, queries=queries, **sizes)
    if name == "linear-metric":
        return LinearCodec(train, metric="activation", queries=queries, **sizes)
    return LinearCodec(train, views=name != "linear", **sizes)


def latent_numbers(code: Code) -> int:
    """Numbers that a code keeps of one model."""
    return code.latent_size if isinstance(code, LinearCodec) else code.latent_numbers
