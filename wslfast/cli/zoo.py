"""``wslfast zoo``: build and show zoos."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, Union

import tyro

from ..zoo import build_zoo, image_shape, network, summarize
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
    """digits (scikit-learn's, nothing is downloaded), or an .npz file with images and labels."""
    architecture: Literal["auto", "cnn", "cnn2", "cnn3", "lenet5"] = "auto"
    """The published networks; auto takes the one that fits the images."""
    models: int = 64
    """Networks to train."""
    epochs: int = 5
    """Epochs of training."""
    keep: tuple[int, ...] = ()
    """Epochs whose weights are kept (default: three, spread over the last half)."""
    grid: Literal["small", "published"] = "small"
    """Hyper-parameters that models are drawn from; published is the paper's (50 epochs)."""
    batch_size: int = 32
    """Images a step, of each model."""
    seed: int = 0
    """Seed of the draw from the grid, of the split and of every model."""
    device: str = "cpu"
    """cpu, cuda or cuda:N."""
    overwrite: bool = False
    """Replace a zoo that is already there."""

    def run(self) -> None:
        arch = None if self.architecture == "auto" else network(self.architecture, image_shape(self.dataset)[0])
        population = build_zoo(
            self.dataset, self.out, architecture=arch, models=self.models, epochs=self.epochs, keep=self.keep or None, grid=self.grid,
            batch_size=self.batch_size, seed=self.seed, device=self.device, progress=console.is_terminal, overwrite=self.overwrite,
        )  # fmt: skip
        accuracy = population.column("test_acc")
        console.print(f"{self.out}: {len(population)} rows, test accuracy {accuracy.mean():.3f} +- {accuracy.std():.3f}")


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
class Zoo:
    """Build and show zoos of trained networks."""

    command: Union[
        Annotated[ZooBuild, tyro.conf.subcommand("build")],
        Annotated[ZooShow, tyro.conf.subcommand("show")],
    ]

    def run(self) -> None:
        self.command.run()
