"""``wslfast evaluate | generate | demo``: what a trained run is good for."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..downstream import evaluate, generate
from ..downstream.demo import DemoConfig, demo
from .console import console, figures_table


@dataclass(frozen=True)
class Evaluate:
    """Rebuild held-out models with a trained run and measure how they behave, beside the closed-form codes of the same size.

    All figures are means over models (accuracy change: the median); nothing is best-of.

    Example: wslfast evaluate --run runs/ae
    """

    run_folder: Annotated[str, tyro.conf.arg(name="run")]
    """Folder of the run."""
    zoo: str | None = None
    """Folder of the zoo (default: the one the run was trained on)."""
    split: Literal["test", "val", "train"] = "test"
    """Which models."""
    out: str | None = None
    """JSON file for the figures (default: RUN/evaluation-SPLIT.json)."""
    device: str = "cpu"
    """cpu, cuda or cuda:N."""
    skip_bad: bool = False
    """Leave out shards of the zoo that are missing or damaged, with a count, instead of stopping."""
    json: bool = False
    """Print JSON instead of a table."""

    def run(self) -> None:
        out = self.out or str(Path(self.run_folder) / f"evaluation-{self.split}.json")
        results = evaluate(self.run_folder, self.zoo, split=self.split, out=out, device=self.device, skip_bad=self.skip_bad)
        if self.json:
            print(Path(out).read_text())
        else:
            figures_table(results)
            console.print(f"written to {out}", soft_wrap=True)


@dataclass(frozen=True)
class Generate:
    """Sample new models around the latents of a zoo's best training models, and measure all of them.

    The figures are over all samples, none selected. A small bandwidth copies its anchors with noise: read the novelty.

    Example: wslfast generate --run runs/ae --samples 64 --out runs/generated
    """

    run_folder: Annotated[str, tyro.conf.arg(name="run")]
    """Folder of the run."""
    out: str | None = None
    """Folder to store the generated models in, as a zoo."""
    zoo: str | None = None
    """Folder of the zoo (default: the one the run was trained on)."""
    samples: int = 64
    """Models to generate."""
    anchors: float = 0.3
    """Share of the training models, best validation accuracy first, to sample around."""
    bandwidth: float = 0.05
    """Noise, in units of each latent number's standard deviation over the anchors."""
    seed: int = 0
    """Seed of the draw."""
    device: str = "cpu"
    """cpu, cuda or cuda:N."""
    skip_bad: bool = False
    """Leave out shards of the zoo that are missing or damaged, with a count, instead of stopping."""

    def run(self) -> None:
        made = generate(
            self.run_folder, self.zoo, samples=self.samples, anchors=self.anchors, bandwidth=self.bandwidth, seed=self.seed,
            out=self.out, device=self.device, skip_bad=self.skip_bad,
        )  # fmt: skip
        for name in ("test_acc", "novelty"):
            values = made.column(name)
            console.print(f"{name}: mean {values.mean():.3f}, median {values.median():.3f}, from {values.min():.3f} to {values.max():.3f}")


@dataclass(frozen=True)
class Demo(DemoConfig):
    """The paper's effect on your own machine in a few minutes: zoo, two autoencoders, baselines, one page.

    Writes metrics.json, report.html, the weights and the runs.

    Example: wslfast demo --out runs/demo
    """

    def run(self) -> None:
        settings = {f.name: getattr(self, f.name) for f in dataclasses.fields(DemoConfig)}
        stage = functools.partial(console.print, "-", soft_wrap=True)
        results = demo(DemoConfig(**settings), progress=console.is_terminal, on_stage=stage)
        figures_table({name: value for name, value in results.items() if name != "facts"})
        console.print(f"{results['facts']['time']}; the page: {Path(self.out) / 'report.html'}", soft_wrap=True)
