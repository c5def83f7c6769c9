"""Train a zoo: all models at once, each from its own initialisation, with its own batches, learning rate and weight decay.

Weights, gradients and Adam's moments are ``[k, P]``; one step gathers every model's own batch from images that stay on the
device, asks the engine for all gradients, and updates all rows. Nothing crosses rows, so a model's trajectory depends on its
hyper-parameters and its seed alone: not on k, nor on its neighbours, nor on one of them that diverges.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import engine
from ..architecture import Architecture
from ..errors import WslfastError, check_device, logger, require, say_once
from ..population import Population
from ..profiling import region
from ..proof import proved
from .datasets import Dataset, image_shape, load_dataset
from .grid import Cell, Grid
from .identical import draw
from .manifest import MANIFEST
from .splits import Split
from .store import save_zoo

LARGEST_WEIGHT = 10_000.0  # a checkpoint with a larger one is dropped, as the published pipeline does
_EVALUATION_BLOCK = 256
_LONG_ROW = 16_384  # weights: with gradient and moments, 256 KiB a row
_ORDER = 0x5EED  # apart from the stream that draws the initial weights


def build_zoo(
    dataset: str | Path | Dataset = "digits",
    out: str | Path | None = None,
    *,
    architecture: Architecture | None = None,
    models: int = 64,
    epochs: int = 5,
    keep: Sequence[int] | None = None,
    grid: str | Grid = "small",
    batch_size: int = 32,
    seed: int = 0,
    split: Sequence[float] = (0.7, 0.15, 0.15),
    device: str | torch.device = "cpu",
    backend: str = "auto",
    progress: bool = False,
    overwrite: bool = False,
    root: str | Path | None = None,
) -> Population:
    """Train ``models`` networks and return their checkpoints at the kept epochs; with ``out``, store them as a zoo there.

    Args:
        dataset: a name ("digits", "fashion", "photos", "svhn", ...) or an ``.npz`` file (see :func:`wslfast.zoo.load_dataset`), or a
            :class:`Dataset`.
        out: folder of the zoo; None keeps it in memory only.
        architecture: what every model is; by default ``Architecture.cnn`` for 28x28 images and ``cnn3`` for 32x32 ones.
        models: how many; a sub-sample of the grid where it is larger.
        epochs: passes over the training images.
        keep: epochs whose weights become rows, 0 being the initial weights; by default three spread over the later half and
            more of the training (3, 5 and 8 of 8).
        grid: "small", "published", or a :class:`Grid`.
        batch_size: images a step; the last batch of an epoch is what is left.
        seed: draws the sub-sample of the grid and the split of the models. Images are always split by seed 0, so that every
            zoo of a dataset has the same held-out images.
        split: shares of the models for train, val and test.
        device: where to train.
        backend: what runs the networks: ``"auto"``, ``"triton"`` or ``"torch"``.
        progress: show a progress bar (with rich).
        overwrite: replace a zoo that is already in ``out``.
        root: folder with a named data set's files (see :func:`wslfast.zoo.load_dataset`).

    Returns:
        A population in model order, epochs ascending within a model. Properties: model, epoch, train_acc, val_acc, test_acc,
        ggap (train_acc - test_acc), train_loss (mean cross-entropy; all measured on whole splits after the epoch),
        init_type, lr, wd, seed, split. Checkpoints with weights that are not finite or above 10,000 in size are dropped, and those
        with the bits of one in another split (at epoch 0, where models share a seed); the log says how many.

    Raises:
        WslfastError: for arguments that do not fit, a zoo that is there already, or if every checkpoint is dropped.
    """
    chosen = Grid.of(grid)
    require(type(epochs) is int and epochs > 0, f"epochs: expected a positive integer, got {epochs!r}")
    require(type(batch_size) is int and batch_size > 0, f"batch_size: expected a positive integer, got {batch_size!r}")
    require(type(seed) is int and 0 <= seed < 1 << 62, f"seed: expected an integer >= 0, got {seed!r}")
    plan = Split(tuple(split), seed)  # type: ignore[arg-type]
    kept = _kept(epochs, keep)
    cells = chosen.cells(models, seed)
    where = check_device(device)
    engine.check_backend(backend)
    if out is not None:
        there = (Path(out) / MANIFEST).exists()
        require(overwrite or not there, f"out: {out}: there is a zoo already; overwrite=True (--overwrite) replaces it")
        try:
            Path(out).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise WslfastError(f"out: {out}: cannot be made: {error.strerror or error}") from None
    with region("dataset"):
        architecture, data = _matched(dataset, architecture, root)
    with engine.using(backend), _bar(progress, kept[-1] * math.ceil(len(data.train_labels) / batch_size)) as advance:
        with region("initialise"):
            weights = architecture.initial_weights([c.init_type for c in cells], [c.seed for c in cells]).to(where)
        with proved(architecture, where, ("indexed", "forward"), len(cells), batch_size):
            population, dropped = _split(plan, *_sound(_train(weights, architecture, data, cells, kept, batch_size, advance)))
    if out is not None:
        from .. import __version__

        provenance = {
            "made_by": "wslfast.build_zoo",
            "wslfast": __version__,
            "torch": torch.__version__,
            "device": where.type,
            "backend": backend,
            "dataset": {"name": data.name, "classes": data.classes, **data.provenance},
            "grid": chosen.to_dict(),
            "models": models,
            "epochs": epochs,
            "kept_epochs": list(kept),
            "batch_size": batch_size,
            "seed": seed,
            "optimizer": {"name": "adam", "betas": [0.9, 0.999], "eps": 1e-8},
            "dropped_rows": dropped,
        }
        save_zoo(population, out, splits=plan, provenance=provenance, overwrite=overwrite)
    return population


def fine_tune(
    population: Population,
    data: Dataset,
    *,
    epochs: int = 5,
    lr: float = 5e-4,
    weight_decay: float = 5e-4,
    batch_size: int = 64,
    seed: int = 0,
) -> Population:
    """Train every model of a population further on a data set's training images, all at once (the defaults are the published ones).

    Args:
        population: where training starts; its architecture is a plain chain of layers.
        seed: model j's batches are drawn from seed + j.

    Returns:
        ``k * (epochs + 1)`` rows, model-major, epoch 0 (the weights as given) to the last, with the properties that
        :func:`build_zoo` measures: model (0 to k - 1), epoch, train_acc, val_acc, test_acc, ggap, train_loss, ... Nothing is dropped:
        a model that diverges stays, with the accuracy it has.

    Raises:
        WslfastError: for arguments that do not fit one another.
    """
    require(type(epochs) is int and epochs > 0, f"epochs: expected a positive integer, got {epochs!r}")
    require(type(batch_size) is int and batch_size > 0, f"batch_size: expected a positive integer, got {batch_size!r}")
    _matched(data, population.architecture)
    cells = [Cell("given", lr, weight_decay, seed + j) for j in range(len(population))]
    weights = population.weights.clone()  # trained in place
    return _train(weights, population.architecture, data, cells, tuple(range(epochs + 1)), batch_size, lambda *_: None)


def default_keep(epochs: int) -> tuple[int, ...]:
    """The last epoch and those at 3/8 and 5/8 of the training: 3, 5, 8 of 8; 2, 3, 5 of 5; 1, 2, 3 of 3."""
    return tuple(sorted({max(1, int(epochs * share / 8 + 0.5)) for share in (3, 5, 8)}))


def _kept(epochs: int, keep: Sequence[int] | None) -> tuple[int, ...]:
    if keep is None:
        return default_keep(epochs)
    values = tuple(keep)
    require(
        len(values) > 0 and all(type(e) is int and 0 <= e <= epochs for e in values) and len(set(values)) == len(values),
        f"keep: expected different epochs from 0 to {epochs}, got {keep!r}",
    )
    return tuple(sorted(values))


def _matched(
    dataset: str | Path | Dataset, architecture: Architecture | None, root: str | Path | None = None
) -> tuple[Architecture, Dataset]:
    """Architecture and dataset that fit each other. Raises WslfastError saying what does not."""
    if architecture is None:
        shape = tuple(dataset.train_images.shape[1:]) if isinstance(dataset, Dataset) else image_shape(dataset)
        makers = {(28, 28): Architecture.cnn, (32, 32): Architecture.cnn3}
        require(tuple(shape[1:]) in makers, f"architecture: there is no default for images {list(shape)}; pass architecture=")
        architecture = makers[tuple(shape[1:])](shape[0])  # type: ignore[index]
    require(isinstance(architecture, Architecture), f"architecture: expected an Architecture, got {type(architecture).__name__}")
    require(architecture.planned, f"architecture: {architecture.name!r} is not a plain chain of layers; a zoo of it cannot be trained here")
    data = dataset if isinstance(dataset, Dataset) else load_dataset(dataset, architecture.input_shape, root=root)
    came, wanted = tuple(data.train_images.shape[1:]), architecture.input_shape
    require(came == wanted, f"dataset {data.name!r}: expected images {list(wanted)} for {architecture.name!r}, got {list(came)}")
    require(
        data.classes <= architecture.num_classes,
        f"dataset {data.name!r}: {data.classes} classes, and architecture {architecture.name!r} has {architecture.num_classes} outputs",
    )
    return architecture, data


# -- training ----------------------------------------------------------------------------------------------------------


class StackedAdam:
    """``torch.optim.Adam`` (L2 weight decay, no amsgrad) on k rows, each with its own learning rate and weight decay.

    On a CPU, rows too long for the second-level cache are left to torch's fused Adam, one pass a row instead of fifteen over all
    rows. Otherwise every operation is one call for all rows, in place, with two moments and one workspace ``[k, P]``; each
    rounds once (no fused multiply-add, whose rounding could depend on where in the tensor an element lies), so a row's bits do
    not depend on how many there are.
    """

    def __init__(
        self,
        weights: Tensor,
        lr: Sequence[float],
        weight_decay: Sequence[float],
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        self.weights, self.betas, self.eps, self.steps = weights, betas, eps, 0
        self._fused: torch.optim.Adam | None = None
        if weights.device.type == "cpu" and weights.shape[1] >= _LONG_ROW:
            self._rows = [torch.nn.Parameter(row) for row in weights]  # they share the rows' memory
            alike: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
            for row, settings in zip(self._rows, zip(lr, weight_decay, strict=True), strict=True):
                alike.setdefault(settings, []).append(row)
            groups = [{"params": rows, "lr": rate, "weight_decay": decay} for (rate, decay), rows in alike.items()]
            self._fused = torch.optim.Adam(groups, betas=betas, eps=eps, fused=True)
            return
        self.lr = torch.tensor(lr, dtype=torch.float64, device=weights.device)
        self.weight_decay = torch.tensor(weight_decay, dtype=weights.dtype, device=weights.device).unsqueeze(1)
        self.mean, self.square, self._work = torch.zeros_like(weights), torch.zeros_like(weights), torch.zeros_like(weights)

    def step(self, gradient: Tensor) -> None:
        """Update the rows in place; ``gradient [k, P]`` is overwritten."""
        if self._fused is not None:
            for row, g in zip(self._rows, gradient, strict=True):
                row.grad = g
            self._fused.step()
            return
        self.steps += 1
        b1, b2 = self.betas
        work = self._work
        gradient += torch.mul(self.weights, self.weight_decay, out=work)
        self.mean.mul_(b1).add_(torch.mul(gradient, 1 - b1, out=work))
        self.square.mul_(b2).add_(gradient.mul_(gradient).mul_(1 - b2))
        torch.sqrt(self.square, out=work).div_(math.sqrt(1 - b2**self.steps)).add_(self.eps)
        step_size = (self.lr / (1 - b1**self.steps)).to(work).unsqueeze(1)
        self.weights -= torch.div(self.mean, work, out=work).mul_(step_size)


def batch_generator(seed: int) -> torch.Generator:
    """The generator of a model's batch orders: one ``randperm`` of the training images an epoch."""
    return torch.Generator().manual_seed(seed << 16 | _ORDER)


def _train(
    weights: Tensor,
    architecture: Architecture,
    data: Dataset,
    cells: Sequence[Cell],
    kept: Sequence[int],
    batch_size: int,
    advance: Callable[[int, int, Tensor], None],
) -> Population:
    """Train ``weights [k, P]`` in place, on their device: every kept checkpoint, ``k * len(kept)`` rows, model-major, with what was
    measured."""
    k, n, device = len(cells), len(data.train_labels), weights.device
    adam = StackedAdam(weights, [c.lr for c in cells], [c.weight_decay for c in cells])
    generators = [batch_generator(c.seed) for c in cells]
    resident = {}
    for name in ("train", "val", "test"):
        own_images, own_labels = data.split(name)
        resident[name] = own_images.to(device), own_labels.to(device)
    images, labels = resident["train"]
    if images.ndim == 4:  # so that the gather of a batch copies whole images into the layout that convolutions want
        images = images.contiguous(memory_format=torch.channels_last)
    rows = torch.empty(k, len(kept), weights.shape[1])
    measured: list[dict[str, list[float | None]]] = []
    for epoch in range(kept[-1] + 1):
        if epoch > 0:
            order = torch.stack([torch.randperm(n, generator=g, dtype=torch.int32) for g in generators]).to(device)  # [k, n]
            for start in range(0, n, batch_size):
                chosen = order[:, start : start + batch_size]  # the last batch is what is left
                own = labels.index_select(0, chosen.reshape(-1)).view(chosen.shape)
                losses, gradient = engine.loss_and_gradient(weights, images, own, architecture, "cross_entropy", index=chosen)
                with region("optimise"):
                    adam.step(gradient)
                advance(epoch, kept[-1], losses)
        if epoch in kept:
            with region("evaluate"):
                measured.append(_measure(weights, resident, architecture))
            rows[:, len(measured) - 1] = weights.cpu()
    table: dict[str, list[Any]] = {"model": [j for j in range(k) for _ in kept], "epoch": [e for _ in range(k) for e in kept]}
    for name in measured[0]:
        table[name] = [at[name][j] for j in range(k) for at in measured]
    for name, field in (("init_type", "init_type"), ("lr", "lr"), ("wd", "weight_decay"), ("seed", "seed")):
        table[name] = [getattr(c, field) for c in cells for _ in kept]
    return Population(architecture, rows.flatten(0, 1), {name: tuple(column) for name, column in table.items()})


@torch.no_grad()
def _measure(weights: Tensor, splits: Mapping[str, tuple[Tensor, Tensor]], architecture: Architecture) -> dict[str, list[float | None]]:
    """Accuracies on whole splits, their gap, and the mean cross-entropy on train: k values each; None where not finite."""
    accuracy: dict[str, list[float]] = {}
    total = torch.zeros(len(weights), dtype=torch.float64, device=weights.device)
    for name, (images, labels) in splits.items():
        right = torch.zeros(len(weights), dtype=torch.int64, device=weights.device)
        for queries, target in zip(images.split(_EVALUATION_BLOCK), labels.split(_EVALUATION_BLOCK), strict=True):
            outputs = engine.forward(weights, queries, architecture)  # [k, b, K]
            right += (outputs.argmax(-1) == target).sum(1)
            if name == "train":
                total -= outputs.log_softmax(-1).gather(-1, target.expand(len(weights), -1).unsqueeze(-1)).sum((1, 2), dtype=torch.float64)
        accuracy[name] = (right.double() / len(labels)).tolist()
    loss = (total / len(splits["train"][1])).tolist()
    return {
        **{f"{name}_acc": list(values) for name, values in accuracy.items()},
        "ggap": [a - b for a, b in zip(accuracy["train"], accuracy["test"], strict=True)],
        "train_loss": [v if math.isfinite(v) else None for v in loss],
    }


def _sound(population: Population) -> tuple[Population, dict[str, int]]:
    """The rows whose weights are finite and at most 10,000 in size, and how many were dropped why; logged."""
    largest = population.weights.abs().amax(1)  # NaN if any weight is
    good, finite = largest <= LARGEST_WEIGHT, largest.isfinite()
    dropped = {"not_finite": int((~finite).sum()), "too_large": int((finite & ~good).sum())}
    count = sum(dropped.values())
    require(count < len(population), f"zoo: all {count} checkpoints diverged ({dropped}); choose smaller learning rates")
    if count == 0:
        logger.info("zoo: %d checkpoints, none dropped", len(population))
        return population, dropped
    models = {m for m, ok in zip(population.properties["model"], good.tolist(), strict=True) if not ok}
    logger.warning(
        "zoo: dropped %d of %d checkpoints, of %d models: %d with weights that are not finite, %d with weights above %g",
        count,
        len(population),
        len(models),
        dropped["not_finite"],
        dropped["too_large"],
        LARGEST_WEIGHT,
    )
    return population[good], dropped


def _split(plan: Split, population: Population, dropped: dict[str, int]) -> tuple[Population, dict[str, int]]:
    """The rows with their splits, without those whose weights are in another split already, and the counts with theirs; logged."""
    before = len(population)
    while True:
        table = population.properties
        drawn = draw(plan, population.weights, table["model"], table["epoch"])
        if not any(drawn.elsewhere):
            break
        population = population[[not there for there in drawn.elsewhere]]  # a model may have no row left, and then splits are drawn anew
    count = before - len(population)
    if count:
        logger.warning("zoo: dropped %d of %d checkpoints with weights that another split has, to the bit", count, before)
    return Population(population.architecture, population.weights, {**table, "split": drawn.names}), {**dropped, "identical": count}


@contextmanager
def _bar(show: bool, steps: int) -> Iterator[Callable[[int, int, Tensor], None]]:
    """What to call after each step with epoch, epochs and losses ``[k]``; a rich progress bar if ``show``."""
    if show:
        try:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        except ImportError:
            say_once("wslfast: a progress bar needs rich: pip install rich; going on without", logging.WARNING)
            show = False
    if not show:
        yield lambda epoch, epochs, losses: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"), TimeRemainingColumn())
    with Progress(*columns) as bar:
        task = bar.add_task("zoo", total=steps)
        done = 0

        def advance(epoch: int, epochs: int, losses: Tensor) -> None:
            nonlocal done
            done += 1
            if done % 10 == 0 or done == steps:  # reading the losses waits for the device
                bar.update(task, completed=done, description=f"zoo: epoch {epoch} of {epochs}, median loss {losses.nanmedian().item():.3f}")

        yield advance
