"""The shell: ``wslfast zoo build | zoo show | train | evaluate | generate | demo | info``."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import logging
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import torch
import tyro
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from . import __version__
from .downstream import evaluate, generate
from .downstream.demo import DemoConfig, demo
from .errors import WslfastError
from .training import TrainConfig, train
from .zoo import build_zoo, image_shape, network, summarize

console = Console(highlight=False)
_FIGURES = {  # of evaluate and demo: figure -> column
    "agreement": "agreement", "agreement_others": "others", "accuracy_original": "acc orig", "accuracy_reconstructed": "acc rec",
    "accuracy_change": "change", "l2_masked": "L2", "latent_numbers": "latent",
}  # fmt: skip


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
        _show(summary, self.json)


@dataclass(frozen=True)
class Zoo:
    """Build and show zoos of trained networks."""

    command: Union[
        Annotated[ZooBuild, tyro.conf.subcommand("build")],
        Annotated[ZooShow, tyro.conf.subcommand("show")],
    ]

    def run(self) -> None:
        self.command.run()


@dataclass(frozen=True)
class Train(TrainConfig):
    """Train a weight autoencoder on a zoo.

    The folder receives config.toml, log.jsonl (one record a line) and checkpoint/. An interrupted run goes on with --resume,
    to the bit on a CPU.

    Example: wslfast train --zoo runs/zoo --out runs/ae --steps 1000 --seed 0
    """

    config: str | None = None
    """TOML file of settings; flags win over it."""
    resume: bool = False
    """Continue from the folder's checkpoint (starts afresh where there is none)."""
    profile: bool = False
    """Record 20 steps: profile/trace.json, profile/phases.json and a table of phases."""

    def run(self) -> None:
        settings = {f.name: getattr(self, f.name) for f in dataclasses.fields(TrainConfig)}
        text, rate = TextColumn("{task.description}"), TextColumn("{task.fields[rate]}")
        columns = (text, BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            task = progress.add_task("training", total=self.steps, rate="")

            def on_record(record: dict[str, Any]) -> None:
                parts = " ".join(f"{n} {record[n]:.4f}" for n in ("loss", "contrastive", "structural", "behavioral") if n in record)
                progress.update(task, completed=record["step"], description=parts, rate=f"{record['models_per_s']:.0f} models/s")
                if not console.is_terminal:
                    console.print(f"step {record['step']} {parts} {record['models_per_s']:.0f} models/s", soft_wrap=True)

            run = train(TrainConfig(**settings), resume=self.resume, profiled=self.profile, on_record=on_record)
        console.print(f"{run.out}: {run.step} steps; next: wslfast evaluate --run {run.out}", soft_wrap=True)


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
    json: bool = False
    """Print JSON instead of a table."""

    def run(self) -> None:
        out = self.out or str(Path(self.run_folder) / f"evaluation-{self.split}.json")
        results = evaluate(self.run_folder, self.zoo, split=self.split, out=out, device=self.device)
        if self.json:
            print(Path(out).read_text())
        else:
            _figures_table(results)
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

    def run(self) -> None:
        made = generate(
            self.run_folder, self.zoo, samples=self.samples, anchors=self.anchors, bandwidth=self.bandwidth, seed=self.seed,
            out=self.out, device=self.device,
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
        _figures_table({name: value for name, value in results.items() if name != "facts"})
        console.print(f"{results['facts']['time']}; the page: {Path(self.out) / 'report.html'}", soft_wrap=True)


@dataclass(frozen=True)
class Info:
    """Versions, devices and optional packages, for a bug report."""

    json: bool = False
    """Print JSON."""

    def run(self) -> None:
        optional = ("triton", "nvtx", "sklearn", "matplotlib", "torchvision", "tensorboard")
        cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        _show(
            {
                "wslfast": __version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
                "platform": platform.platform(),
                "threads": torch.get_num_threads(),
                "cuda": cuda or "none",
                "float32 matmul precision": torch.get_float32_matmul_precision(),
                "optional packages": {name: importlib.util.find_spec(name) is not None for name in optional},
            },
            self.json,
        )


def _show(values: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(values, indent=1))
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in values.items():
        lines = [f"{k}: {_text(v)}" for k, v in value.items()] if isinstance(value, dict) else [_text(value)]
        table.add_row(f"[bold]{escape(name.replace('_', ' '))}[/bold]", escape("\n".join(lines)))
    console.print(table)


def _figures_table(results: dict[str, dict[str, Any]]) -> None:
    table = Table("variant", box=None, pad_edge=False, header_style="bold")
    for column in _FIGURES.values():
        table.add_column(column, justify="right", no_wrap=True)
    for name, figures in results.items():
        table.add_row(name, *(_text(figures.get(f)) for f in _FIGURES))
    console.print(table)


def _text(value: Any) -> str:
    """A value as a reader wants it in a table cell."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) >= 0.001 or value == 0 else f"{value:g}"
    if isinstance(value, dict):
        return ", ".join(f"{k} {_text(v)}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return " ".join(map(_text, value))
    return "-" if value is None else str(value)


def _commands(argv: Sequence[str]) -> Any:
    """All commands; ``train``'s defaults come from ``--config`` where that is given."""
    options: dict[str, Any] = {}
    for flag, value in zip(argv, [*argv[1:], ""]):
        if argv[0] == "train" and (flag == "--config" or flag.startswith("--config=")):
            path = flag.partition("=")[2] or value
            given = {name: "" for name in ("zoo", "out") if any(a.split("=")[0] == f"--{name}" for a in argv)}  # flags fill these in
            options = {"default": Train(**TrainConfig.from_toml(path, **given).to_dict(), config=path)}
    return Union[
        Annotated[Zoo, tyro.conf.subcommand("zoo")],
        Annotated[Train, tyro.conf.subcommand("train", **options)],
        Annotated[Evaluate, tyro.conf.subcommand("evaluate")],
        Annotated[Generate, tyro.conf.subcommand("generate")],
        Annotated[Demo, tyro.conf.subcommand("demo")],
        Annotated[Info, tyro.conf.subcommand("info")],
    ]


class _ConsoleHandler(logging.Handler):
    """Log lines through the console, so that they stand above a progress bar and not in it."""

    def emit(self, record: logging.LogRecord) -> None:
        console.print(record.getMessage(), markup=False, soft_wrap=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``wslfast``. Exits with 2 and one line on wrong input, 130 when interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    handler = _ConsoleHandler()
    logger = logging.getLogger("wslfast")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        command: Any = tyro.cli(
            _commands(arguments), args=arguments, prog="wslfast",
            description="Weight-space learning, fast: zoos of small networks, autoencoders over their weights, and how the rebuilt "
            "networks behave (arXiv 2503.17138). Start with: wslfast demo",
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes, tyro.conf.FlagCreatePairsOff),
        )  # fmt: skip
        command.run()
    except WslfastError as error:
        print(f"wslfast: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except BrokenPipeError:  # the reader, say `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except KeyboardInterrupt:
        print("wslfast: interrupted (a training run goes on with --resume)", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        logger.removeHandler(handler)
