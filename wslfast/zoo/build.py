"""Train a zoo: all models at once, each from its own initialisation, with its own batches, learning rate and weight decay.

Weights, gradients and Adam's moments are ``[k, P]``; one step gathers every model's own batch from images that stay on the
device, asks the engine for all gradients, and updates all rows. Nothing crosses rows, so a model's trajectory depends on its
hyper-parameters and its seed alone: not on k, nor on its neighbours, nor on one of them that diverges.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

from .. import engine
from ..architecture import Architecture
from ..engine.ranks import joined
from ..errors import check_positive, logger, require
from ..files import check_folder, folder_made
from ..kernels.default_device import on_the_cpu
from ..population import Population
from ..profiling import region
from ..proof import proved
from .adam import BETAS, EPS, StackedAdam
from .datasets import Dataset, image_shape, load_dataset
from .fitting import batch_generator, dropout_generator
from .fitting import train_models as _train
from .grid import Cell, Grid
from .identical import draw
from .manifest import MANIFEST
from .parts import data_digest, discard_parts, trained_in_parts
from .progress import bar
from .signals import Signals
from .splits import Split
from .store import save_zoo
from .unfinished import Unfinished, finished

__all__ = ["LARGEST_WEIGHT", "StackedAdam", "batch_generator", "build_zoo", "default_keep", "dropout_generator", "fine_tune"]

_OWN = "pass architecture=, in a shell --network FILE.py:NAME"
LARGEST_WEIGHT = 10_000.0  # a checkpoint with a larger one is dropped, as the published pipeline does


@on_the_cpu
def build_zoo(
    dataset: str | Path | Dataset | Signals = "digits",
    out: str | Path | None = None,
    *,
    architecture: Architecture | None = None,
    models: int = 64,
    epochs: int = 5,
    keep: Sequence[int] | None = None,
    grid: str | Grid | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    split: Sequence[float] = (0.7, 0.15, 0.15),
    device: str | torch.device = "cpu",
    backend: str = "auto",
    progress: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    root: str | Path | None = None,
) -> Population:
    """Train ``models`` networks and return their checkpoints at the kept epochs; with ``out``, store them as a zoo there.

    Every model is trained as ``torch.optim.Adam`` would train it alone, to float tolerance. Training mode is each model's own: its dropout
    draws masks of its own, its batch norms use the statistics of its own batch, and their running averages are part of its row of weights.

    Under torchrun each process trains a part of the models. All processes return all models, and the first one stores them. What a process
    has finished is kept in ``out`` until the zoo is complete, so that the same call trains only what is missing after a process has died.

    Args:
        dataset: a name ("digits", "fashion", "photos", "svhn", ...) or an ``.npz`` file (see :func:`wslfast.zoo.load_dataset`), or a
            :class:`Dataset`: cross-entropy. Or :class:`wslfast.zoo.Signals`: mean squared error, one signal a model
            (:func:`wslfast.zoo.image_signals` for implicit neural representations) or the same for all.
        out: folder of the zoo; None keeps it in memory only.
        architecture: what every model is, any network that can be traced; by default ``Architecture.cnn`` for 28x28 images and ``cnn3``
            for 32x32 ones, and for signals ``siren``.
        models: how many. Where the grid is larger, they are a balanced sub-sample of it.
        epochs: passes over the training images.
        keep: epochs whose weights become rows; epoch 0 is the initial weights. By default three: those at 3/8, at 5/8 and at the end of
            the training.
        grid: "small", "published", "signals", or a :class:`Grid`; by default "small", for signals "signals".
        batch_size: images or points per step; the last batch of an epoch is what is left. By default 32, for signals all points.
        seed: draws the sub-sample of the grid and the split of the models. Images are always split by seed 0, so that every
            zoo of a dataset has the same held-out images.
        split: shares of the models for train, val and test.
        device: where to train.
        backend: what runs the networks: ``"auto"``, ``"triton"`` or ``"torch"``.
        progress: show a progress bar: in a terminal (with rich) and in a notebook.
        overwrite: replace a zoo that is already in ``out``, or an unfinished one.
        resume: go on with what an interrupted build of the same settings left in ``out``, from the end of its last epoch; from the
            beginning where there is nothing. A finished zoo of these settings is returned as it is. (Several processes always go on with
            the parts that are done.)
        root: folder with a named data set's files (see :func:`wslfast.zoo.load_dataset`).

    Returns:
        A population in model order, epochs ascending within a model. Properties: model, epoch, train_acc, val_acc, test_acc,
        ggap (train_acc - test_acc), train_loss (mean cross-entropy; all measured on whole splits after the epoch), or for signals
        signal (which one), train_loss, val_loss and test_loss (mean squared error, of the splits there are); then init_type, lr, wd,
        seed, split. Two kinds of checkpoints are dropped, and the log says how many: those with a weight that is not finite or larger
        than 10,000, and those that equal, to the bit, a checkpoint of another split (initial weights of models that share a seed).

    Raises:
        WslfastError: for arguments that do not fit, an architecture that cannot be trained (random in another way than dropout, say), a
            zoo that is there already, or if every checkpoint is dropped.
    """
    fitted = isinstance(dataset, Signals)
    chosen = Grid.of(grid if grid is not None else "signals" if fitted else "small")
    if batch_size is None:
        batch_size = len(dataset.train_inputs) if isinstance(dataset, Signals) else 32
    check_positive("epochs", epochs)
    check_positive("batch_size", batch_size)
    require(type(seed) is int and 0 <= seed < 1 << 62, f"seed: expected an integer >= 0, got {seed!r}")
    plan = Split(tuple(split), seed)  # type: ignore[arg-type]
    kept = _kept(epochs, keep)
    cells = chosen.cells(models, seed)
    engine.check_backend(backend)
    require(out is not None or not resume, "resume: expected out=, the folder of what is to be gone on with")
    exists = out is not None and (Path(out) / MANIFEST).exists()
    if out is not None:
        check_folder(Path(out), "zoo")
        require(overwrite or resume or not exists, f"out: {out}: there is a zoo already; overwrite=True (--overwrite) replaces it")
    with nullcontext() if out is None else folder_made(out):
        with region("dataset"):
            architecture, data = _matched(dataset, architecture, root)
        if isinstance(data, Signals) and data.count is not None:
            require(models <= data.count, f"models: expected at most {data.count}, one per signal of {data.name!r}, got {models}")
        kind = {"signals": "own", "classes": 0} if isinstance(data, Signals) else {"classes": data.classes}
        settings = {
            "dataset": {"name": data.name, **kind, **data.provenance},
            "architecture": hashlib.sha256(architecture.handle.encode()).hexdigest(),
            "grid": chosen.to_dict(),
            "models": models,
            "epochs": epochs,
            "kept_epochs": list(kept),
            "batch_size": batch_size,
            "seed": seed,
            **({"data": data_digest(data)} if isinstance(dataset, (Dataset, Signals)) else {}),  # nothing else says what is in it
        }
        if out is not None and exists and resume and not overwrite:
            return finished(out, settings, architecture, plan)
        steps = kept[-1] * math.ceil(_points(data) / batch_size)
        with joined(device, patient=True) as (world, where), engine.using(backend), bar(progress and world.writes, steps) as advance:
            alone = world.size == 1
            require(models >= world.size, f"models: expected at least one for each of the {world.size} processes, got {models}")
            own = isinstance(data, Signals) and data.count is not None
            require(alone or not own, "dataset: signals of each model's own are fitted by one process; start without torchrun")
            unfinished = Unfinished(out, settings) if out is not None and alone else None  # several processes keep whole parts
            if unfinished is not None and unfinished.exists() and not resume:
                again = "resume=True (--resume) goes on, overwrite=True (--overwrite) begins anew"
                require(overwrite, f"out: {out}: an unfinished zoo is there; {again}")
                unfinished.remove()

            def part(some: Sequence[Cell]) -> Population:
                with region("initialise"):
                    weights = architecture.initial_weights([c.init_type for c in some], [c.seed for c in some]).to(where)
                return _train(weights, architecture, data, some, kept, batch_size, advance, unfinished)

            ran = {"backend": backend, "device": where.type, "torch": torch.__version__}
            keyed = {**settings, **ran} | ({} if alone or "data" in settings else {"data": data_digest(data)})
            with proved(architecture, where, ("indexed", "forward"), math.ceil(models / world.size), batch_size):  # by all, or by none
                trained = trained_in_parts(world, architecture, cells, part, None if out is None else Path(out), keyed)
            population, dropped = _split(plan, *_sound(trained))
            if out is not None and world.writes:
                from .. import __version__

                provenance = {
                    "made_by": "wslfast.build_zoo",
                    "wslfast": __version__,
                    **ran,
                    **{key: value for key, value in settings.items() if key != "architecture"},
                    "optimizer": {"name": "adam", "betas": [*BETAS], "eps": EPS},
                    "dropped_rows": dropped,
                }
                save_zoo(population, out, splits=plan, provenance=provenance, overwrite=overwrite)
                discard_parts(Path(out))
                if unfinished is not None:
                    unfinished.remove()
            world.wait()
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
        population: where training starts.
        seed: model j's batches are drawn from seed + j.

    Returns:
        ``k * (epochs + 1)`` rows, model-major, epoch 0 (the weights as given) to the last, with the properties that
        :func:`build_zoo` measures: model (0 to k - 1), epoch, train_acc, val_acc, test_acc, ggap, train_loss, ... Nothing is dropped:
        a model that diverges stays, with the accuracy it has.

    Raises:
        WslfastError: for arguments that do not fit one another.
    """
    check_positive("epochs", epochs)
    check_positive("batch_size", batch_size)
    require(data.classes > 0, f"data: expected labelled images to train for, and {data.name} has no classes")
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


def _points(data: Dataset | Signals) -> int:
    """Points of an epoch."""
    return len(data.train_inputs if isinstance(data, Signals) else data.train_labels)


def _matched(
    dataset: str | Path | Dataset | Signals, architecture: Architecture | None, root: str | Path | None = None
) -> tuple[Architecture, Dataset | Signals]:
    """Architecture and dataset that fit each other. Raises WslfastError saying what does not."""
    if architecture is None:
        architecture = _default(dataset)
    require(isinstance(architecture, Architecture), f"architecture: expected an Architecture, got {type(architecture).__name__}")
    engine.check_trainable(architecture)
    data = dataset if isinstance(dataset, (Dataset, Signals)) else load_dataset(dataset, architecture.input_shape, root=root)
    what, inputs = ("points", data.train_inputs) if isinstance(data, Signals) else ("images", data.train_images)
    came, wanted = tuple(inputs.shape[1:]), architecture.input_shape
    require(came == wanted, f"dataset {data.name!r}: expected {what} {list(wanted)} for {architecture.name!r}, got {list(came)}")
    if isinstance(data, Signals):
        fits = data.output_shape == architecture.output_shape
        made, targets = list(architecture.output_shape), list(data.output_shape)
        require(fits, f"dataset {data.name!r}: expected targets {made} for {architecture.name!r}, got {targets}")
    else:
        flat = len(architecture.output_shape) == 1
        require(flat, f"architecture {architecture.name!r}: expected one number per class, got outputs {list(architecture.output_shape)}")
        classes = f"{data.classes} classes, and architecture {architecture.name!r} has {architecture.num_classes} outputs"
        require(data.classes <= architecture.num_classes, f"dataset {data.name!r}: {classes}")
    return architecture, data


def _default(dataset: str | Path | Dataset | Signals) -> Architecture:
    if isinstance(dataset, Signals):
        shapes = list(dataset.train_inputs.shape[1:]), list(dataset.output_shape)
        flat = all(len(shape) == 1 for shape in shapes)
        require(flat, f"architecture: there is no default for inputs {shapes[0]} and targets {shapes[1]}; {_OWN}")
        return Architecture.siren(shapes[0][0], out_features=shapes[1][0])
    shape = tuple(dataset.train_images.shape[1:]) if isinstance(dataset, Dataset) else image_shape(dataset)
    makers = {(28, 28): Architecture.cnn, (32, 32): Architecture.cnn3}
    require(tuple(shape[1:]) in makers, f"architecture: there is no default for images {list(shape)}; {_OWN}")
    return makers[tuple(shape[1:])](shape[0])  # type: ignore[index]


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
