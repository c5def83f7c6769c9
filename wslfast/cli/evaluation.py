"""``wslfast evaluate | report | generate | demo``: what a trained run is good for."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from .. import engine
from ..engine.ranks import first
from ..errors import require
from ..measure import evaluate, generate, generate_each
from ..measure.results import column_of, read_results
from ..page import report
from ..population import Population
from ..study.demo import DemoConfig, demo
from ..study.study import study
from ..training import load_run
from .console import console, figures_table, say, say_stage
from .options import Networks


@dataclass(frozen=True)
class Evaluate:
    """Rebuild held-out models with trained runs and measure how they behave, beside the closed-form codes of the same size.

    One run without --out prints a table of reconstruction figures (means over models; accuracy change: the median). With --out DIR, one
    run or several go through all three downstream tasks (reconstruction, probes, new models), with every standing baseline, into
    DIR/report.html and the CSV tables it is drawn from. What is in DIR already is not computed again unless its checkpoint changed, so
    an interrupted evaluation goes on, and zoos can be evaluated into one page one after another. docs/evaluation.md is the protocol.

    Example: wslfast evaluate --zoo runs/zoo --run runs/S runs/S+B-seed0 runs/S+B-seed1 --out runs/results
    """

    run_folders: Annotated[tuple[str, ...], tyro.conf.arg(name="run")]
    """Folders of runs; a name that ends in -seedN is a seed of the variant before it."""
    zoo: str | None = None
    """Folder of the zoo (default: the one the first run was trained on)."""
    split: Literal["test", "val", "train"] = "test"
    """Which models, for the table of one run (the page is always of test models)."""
    out: str | None = None
    """Folder for page and tables; a name ending in .json: the figures of one run (default: RUN/evaluation-SPLIT.json; of
    another zoo than the run's RUN/evaluation-ZOO-SPLIT.json)."""
    quick: bool = False
    """Fewer models, images and samples: minutes instead of up to an hour."""
    zero_layer: bool = True
    """For the page, also train each run's twin without transformer blocks (a baseline), with the same settings and steps."""
    name: str | None = None
    """What the page calls the zoo (default: its data set)."""
    device: str = "cpu"
    """cpu, cuda or cuda:N."""
    backend: Literal["auto", "triton", "torch"] = "auto"
    """What runs the networks: Triton kernels, plain torch, or whatever is best and proved."""
    skip_bad: bool = False
    """Leave out shards of the zoo that are missing or damaged, with a count, instead of stopping."""
    log_to: Literal["tensorboard"] | None = None
    """Also write the page's pictures and main figures for TensorBoard, into OUT/tensorboard (of one run without --out: the table of
    figures, into RUN/tensorboard)."""
    json: bool = False
    """Print JSON instead of a table."""
    network: Networks = ()

    def run(self) -> None:
        require(len(self.run_folders) > 0, "run: expected at least one folder")
        run = self.run_folders[0]
        if len(self.run_folders) == 1 and (self.out is None or self.out.endswith(".json")):
            require(not self.quick, "quick: the table of one run has no quick form; --quick is for the page (--out DIR)")
            require(self.name is None, "name: the table of one run names no zoo; --name is for the page (--out DIR)")
            out = self.out or str(Path(run) / f"evaluation-{self._label(run)}.json")
            settings: dict[str, Any] = {"device": self.device, "backend": self.backend, "skip_bad": self.skip_bad, "log_to": self.log_to}
            results = evaluate(run, self.zoo, split=self.split, out=out, **settings)
            if not first():
                return
            if self.json:
                print(Path(out).read_text(encoding="utf-8"))
            else:
                figures_table(_rows(results))
                say(f"written to {out}")
            return
        require(self.out is not None and not self.out.endswith(".json"), "out: expected a folder (--out) for the page of several runs")
        require(not self.skip_bad, "skip_bad: the page is of a whole zoo; --skip-bad is for the table of one run")
        require(self.split == "test", "split: the page is of test models; --split is for the table of one run")
        zoo = self.zoo or load_run(run, device=self.device).zoo
        with engine.using(self.backend):
            page = study(
                zoo,
                self.run_folders,
                str(self.out),
                quick=self.quick,
                zero_layer=self.zero_layer,
                name=self.name,
                device=self.device,
                log_to=self.log_to,
                # beside JSON stages are log lines, which go to standard error
                on_stage=None if self.json else say_stage,
            )
        if first():
            _told(page, self.json)

    def _label(self, run: str) -> str:
        """The split, after the zoo's name where it is not the one that the run was trained on."""
        if self.zoo is None or Path(self.zoo).resolve() == Path(load_run(run, device=self.device).zoo).resolve():
            return self.split
        return f"{Path(self.zoo).resolve().name}-{self.split}"


@dataclass(frozen=True)
class Report:
    """Draw the page of an evaluation again from its tables; nothing is computed.

    ablations.csv and gradients.csv (wslfast ablate, wslfast gradients) are shown where they lie in the folder, or in its analysis/.

    Example: wslfast report runs/results
    """

    folder: tyro.conf.Positional[str] = ""
    """Folder that wslfast evaluate --out wrote."""
    out: str = ""
    """The same, as a flag."""
    page: str | None = None
    """Where to write the page (default: report.html in the folder)."""
    log_to: Literal["tensorboard"] | None = None
    """Also write the page's pictures and main figures for TensorBoard, into FOLDER/tensorboard."""
    json: bool = False
    """Print JSON instead of a table."""

    def run(self) -> None:
        folder = self.folder or self.out
        require(bool(folder), "folder: expected the folder of an evaluation (wslfast report FOLDER)")
        _told(report(folder, page=self.page, log_to=self.log_to), self.json, folder)


def _rows(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Figures by variant, and below each those by architecture where there are several."""
    rows = {}
    for variant, figures in results.items():
        rows[variant] = figures
        rows |= {
            f"  {label}" if variant == "run" else f"  {label}, {variant}": own for label, own in figures.get("architectures", {}).items()
        }
    return rows


def _told(page: Path, as_json: bool, folder: str | None = None) -> None:
    """A table of the main figures, and where the page is."""
    results = read_results(folder or page.parent)
    figures: dict[str, dict[str, Any]] = {}
    for row in results.rows:
        key = f"{row['zoo']} {row['variant']} {row['seed']}"
        figures.setdefault(key, {})[row["metric"]] = row[column_of(row["metric"])]
    if as_json:
        print(json.dumps(figures, indent=1))
        return
    figures_table({name: f for name, f in figures.items() if "l2_masked" in f})
    say(f"the page: {page}")


@dataclass(frozen=True)
class Generate:
    """Sample new models around the latents of a zoo's best training models, and measure all of them.

    The figures are over all samples, none selected unless --select is given (on validation images). A small bandwidth copies its anchors
    with noise: read the novelty.

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
    sampler: Literal["joint", "token", "individual", "uniform", "neighbours"] = "joint"
    """Kernel density over whole latents, tokens or numbers; uniform in the anchors' box; between neighbouring anchors."""
    select: Literal["none", "subsampled", "bootstrapped"] = "none"
    """Keep every sample, the best of many by validation accuracy, or those of several rounds whose survivors are the next anchors."""
    candidates: int | None = None
    """Draws per round, to select from (default: 4 per sample)."""
    rounds: int = 3
    """Rounds of --select bootstrapped."""
    finetune: int = 0
    """Epochs of further training, of all samples at once. The figures after each epoch are stored."""
    seed: int = 0
    """Seed of the draw."""
    device: str = "cpu"
    """cpu, cuda or cuda:N."""
    backend: Literal["auto", "triton", "torch"] = "auto"
    """What runs the networks: Triton kernels, plain torch, or whatever is best and proved."""
    skip_bad: bool = False
    """Leave out shards of the zoo that are missing or damaged, with a count, instead of stopping."""
    architecture: str | None = None
    """Of a zoo of several architectures, which one (wslfast zoo show lists them; default: models of each)."""
    split: Literal["test", "train", "val", "drawn"] = "test"
    """Of the models in --out: all in one (test is what evaluate measures), or dealt out to all three, to train on them."""
    network: Networks = ()

    def run(self) -> None:
        settings: dict[str, Any] = {
            name: getattr(self, name)
            for name in (
                "samples", "anchors", "bandwidth", "sampler", "select", "candidates", "rounds", "finetune", "seed", "out", "device",
                "backend", "skip_bad", "split",
            )
        }  # fmt: skip
        if self.architecture is not None:
            populations = {"": generate(self.run_folder, self.zoo, architecture=self.architecture, **settings)}
        else:
            populations = generate_each(self.run_folder, self.zoo, **settings)
        for label, population in populations.items():
            if len(populations) > 1:
                say(f"{label}: {self.samples} models")
            self._told(population, "  " if len(populations) > 1 else "")

    def _told(self, made: Population, indent: str) -> None:
        epoch = made.column("epoch")
        for e in range(self.finetune + 1):
            names = ("test_acc", "novelty", "novelty_behavior") if e == 0 else ("test_acc",)
            after = f" after {e} epoch{'s' * (e > 1)}" if e else ""
            for name in names:
                every = made.column(name)[epoch == e]
                values = every[every.isfinite()]
                if len(values) == 0:  # no classes, no accuracy
                    continue
                spread = f"from {values.min():.3f} to {values.max():.3f}"
                broken = f"; {len(every) - len(values)} of {len(every)} have none" if len(values) < len(every) else ""
                say(f"{indent}{name}{after}: mean {values.mean():.3f}, median {values.median():.3f}, {spread}{broken}")


@dataclass(frozen=True)
class Demo(DemoConfig):
    """The paper's effect on your own machine in a few minutes: zoo, two autoencoders, baselines, one page.

    The folder receives the zoo, the runs, and page and tables of their evaluation. An interrupted demo goes on when it is run again.

    Example: wslfast demo --out runs/demo
    """

    def run(self) -> None:
        settings = {f.name: getattr(self, f.name) for f in dataclasses.fields(DemoConfig)}
        _told(demo(DemoConfig(**settings), progress=console.is_terminal, on_stage=say_stage), as_json=False)
