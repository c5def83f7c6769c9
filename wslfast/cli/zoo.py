"""``wslfast zoo``: build, import, export and show zoos."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, Union

import tyro

from ..architecture import Architecture
from ..errors import require
from ..zoo import Signals, build_zoo, export_zoo, image_shape, image_signals, import_zoo, load_dataset, network, summarize
from .console import console, show


@dataclass(frozen=True)
class ZooBuild:
    """Train a zoo: many small networks at once, each with its own initialisation, learning rate, decay, seed and batch order.

    The folder receives manifest.json (what every model is and how well it does) and safetensors shards of stacked weights.

    Example: wslfast zoo build --dataset digits --models 64 --epochs 8 --seed 0 --out runs/zoo
    """

    out: str
    """Folder of the new zoo."""
    dataset: str = "digits"
    """digits, fashion, fashion-full, photos, svhn, cifar10, eurosat or stl10 (local files, nothing is downloaded), or an .npz file
    with images and labels."""
    data: str | None = None
    """Folder with a named data set's files, as torchvision lays them out (default: data; fashion is also looked for where Debian's
    dataset-fashion-mnist puts it; digits and photos need none)."""
    architecture: Literal["auto", "cnn", "cnn2", "cnn3", "lenet5", "resnet18", "siren"] = "auto"
    """The published networks; auto takes the one that fits the images. siren makes a zoo of implicit neural representations: one network
    an image, fitted to its pixels."""
    dropout: float = 0.0
    """Probability of dropout in a published CNN; every model draws its own."""
    width: int = 16
    """Channels of resnet18's first stage (64 in the paper)."""
    models: int = 64
    """Networks to train."""
    epochs: int = 5
    """Epochs of training."""
    keep: tuple[int, ...] = ()
    """Epochs whose weights are kept (default: three, spread over the last half)."""
    grid: Literal["auto", "small", "published", "signals"] = "auto"
    """Hyper-parameters that models are drawn from; published is the paper's (50 epochs), signals is for siren."""
    batch_size: int = 0
    """Images a step, of each model (default: 32, and for siren every pixel)."""
    seed: int = 0
    """Seed of the draw from the grid, of the split and of every model."""
    device: str = "cpu"
    """cpu, cuda or cuda:N."""
    backend: Literal["auto", "triton", "torch"] = "auto"
    """What runs the networks: Triton kernels, plain torch, or whatever is best and proved."""
    overwrite: bool = False
    """Replace a zoo that is already there."""
    resume: bool = False
    """Go on with a build that was interrupted, from the end of its last epoch; pass the same flags."""

    def run(self) -> None:
        data: str | Signals = self.dataset
        if self.architecture == "siren":
            data = image_signals(load_dataset(self.dataset, image_shape(self.dataset), root=self.data, standardise=False))
        population = build_zoo(
            data,
            self.out,
            architecture=self._architecture(),
            models=self.models,
            epochs=self.epochs,
            keep=self.keep or None,
            grid=None if self.grid == "auto" else self.grid,
            batch_size=self.batch_size or None,
            seed=self.seed,
            device=self.device,
            backend=self.backend,
            progress=console.is_terminal,
            overwrite=self.overwrite,
            resume=self.resume,
            root=self.data,
        )
        column, what = ("test_acc", "test accuracy") if "test_acc" in population.properties else ("train_loss", "mean squared error")
        found = population.column(column)
        console.print(f"{self.out}: {len(population)} rows, {what} {found.mean():.3g} +- {found.std():.3g}", soft_wrap=True)

    def _architecture(self) -> Architecture | None:
        if self.architecture in ("auto", "siren"):
            require(self.dropout == 0, f"--dropout: name a network with --architecture, got {self.architecture}")
            return None
        channels = image_shape(self.dataset)[0]
        if self.architecture == "resnet18":
            require(self.dropout == 0, "--dropout: resnet18 has none")
            return Architecture.resnet18(channels, width=self.width)
        return network(self.architecture, channels, dropout=self.dropout)


@dataclass(frozen=True)
class ZooShow:
    """Show what a zoo holds: models, splits, epochs, accuracies, how it was made.

    Example: wslfast zoo show runs/zoo
    """

    path: tyro.conf.Positional[str]
    """Folder of the zoo."""
    json: bool = False
    """Print JSON."""

    def run(self) -> None:
        summary = summarize(self.path)
        if not self.json:
            summary["accuracies (least, quartiles, greatest)"] = summary.pop("quantiles")
        show(summary, self.json)


@dataclass(frozen=True)
class ZooImport:
    """Read a published zoo: ray-tune trees (NN_tune_trainable_*) or pickled dataset_{train,val,test}.pt files.

    Nothing in the files is run, whatever they contain. What is missing, broken, not finite, too large or there twice is left out; the
    counts are printed, and OUT/skipped.json lists every case.

    Example: wslfast zoo import ~/zoos/svhn_cnn3 runs/svhn --epochs 20 30 40 50
    """

    source: tyro.conf.Positional[str]
    """Folder (or .pt file) to read."""
    out: tyro.conf.Positional[str]
    """Folder of the new zoo."""
    epochs: tuple[int, ...] = ()
    """Epochs to keep (default: every one that is there)."""
    architecture: Literal["auto", "cnn", "cnn2", "cnn3", "lenet5", "resnet18"] = "auto"
    """What the models are; auto reads params.json, and the names and shapes of the weights."""
    activation: str = "relu"
    """Activation of a named architecture."""
    channels: int = 3
    """Input channels of a named architecture."""
    threshold: float = 10_000.0
    """Leave out checkpoints with a larger weight."""
    split: tuple[float, float, float] = (0.7, 0.15, 0.15)
    """Shares of the models for train, val and test (pickled data sets keep theirs)."""
    seed: int = 0
    """Seed of the split."""
    dataset: str | None = None
    """What the models were trained on (as for zoo build), so that training finds its query images. Images of a file are standardised."""
    overwrite: bool = False
    """Replace a zoo that is already there."""

    def run(self) -> None:
        done = import_zoo(
            self.source,
            self.out,
            epochs=self.epochs or None,
            architecture=self._architecture(),
            threshold=self.threshold,
            split=self.split,
            seed=self.seed,
            dataset=self.dataset,
            overwrite=self.overwrite,
        )
        console.print(f"{self.out}: {done.rows} rows of {done.models} models, architecture {done.architecture.name}", soft_wrap=True)
        for reason, count in done.skipped.items():
            console.print(f"  skipped: {count} x {reason}", soft_wrap=True)

    def _architecture(self) -> Architecture | None:
        if self.architecture == "auto":
            return None
        if self.architecture == "resnet18":
            return Architecture.resnet18(self.channels)
        return getattr(Architecture, self.architecture)(self.channels, self.activation)


@dataclass(frozen=True)
class ZooExport:
    """Write a zoo's checkpoints for other code: as a ray-tune tree that the published loaders read, or one .pt a checkpoint.

    Example: wslfast zoo export runs/zoo exported --format ray
    """

    path: tyro.conf.Positional[str]
    """Folder of the zoo."""
    out: tyro.conf.Positional[str]
    """A new or empty folder."""
    format: Literal["ray", "state-dicts"] = "ray"
    """ray: params.json, result.json, checkpoint_000020/checkpoints a model; state-dicts: 00000.pt ... and index.json."""
    split: Literal["all", "train", "val", "test"] = "all"
    """Which models."""
    skip_bad: bool = False
    """Leave out shards that are missing or damaged, with a count, instead of stopping."""

    def run(self) -> None:
        split = None if self.split == "all" else self.split
        count = export_zoo(self.path, self.out, format=self.format, split=split, skip_bad=self.skip_bad)
        console.print(f"{self.out}: {count} checkpoints", soft_wrap=True)


@dataclass(frozen=True)
class Zoo:
    """Build, import, export and show zoos of trained networks."""

    command: Union[
        Annotated[ZooBuild, tyro.conf.subcommand("build")],
        Annotated[ZooImport, tyro.conf.subcommand("import")],
        Annotated[ZooExport, tyro.conf.subcommand("export")],
        Annotated[ZooShow, tyro.conf.subcommand("show")],
    ]

    def run(self) -> None:
        self.command.run()
