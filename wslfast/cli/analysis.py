"""``wslfast queries | ablate | gradients``: what a result depends on."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from .. import queries
from ..errors import require
from ..measure.first_order import GradientSettings, analyse
from ..measure.results import Row, over_seeds
from ..study.ablation_file import Ablation
from ..study.ablations import rows_file, run_ablation
from ..study.loaded_zoo import Protocol
from ..training.query_sets import query_images
from ..zoo import MappedZoo
from .console import say, say_stage, stacked_table
from .options import Networks

_SHOWN = (
    "agreement", "psnr", "agreement_others", "identified", "accuracy_reconstructed", "explained_variance", "l2_masked", "probe_r2",
    "seconds",
)  # fmt: skip


@dataclass(frozen=True)
class Queries:
    """Make a set of query images for a zoo and keep it in a file: wslfast train --query-set FILE.npz.

    Kinds: data, val, test (the zoo's own images), uniform, noise, smooth, strokes, blend, optimised (made without any image of the
    zoo's), a file, or several joined by +.

    Example: wslfast queries --zoo runs/zoo --kind optimised --n 128 --out runs/queries.npz
    """

    zoo: str
    """Folder of the zoo."""
    out: str
    """The file to write, ending in .npz."""
    kind: str = "optimised"
    """What to make."""
    n: int | None = None
    """How many images (default: 128 of a synthetic set, all of the others)."""
    seed: int = 0
    """Seed of what is drawn."""
    architecture: str | None = None
    """Which architecture, in a zoo of several (wslfast zoo show lists them)."""
    network: Networks = ()

    def run(self) -> None:
        source = MappedZoo(self.zoo, "train", architecture=self.architecture)
        images = query_images(self.kind, self.zoo, source, n=128 if self.n is None else self.n, seed=self.seed, exactly=self.n is not None)
        queries.save_queries(self.out, images)
        say(f"{self.out}: {len(images)} query images {list(images.shape[1:])}")


@dataclass(frozen=True)
class Ablate:
    """Train and measure every variant of an ablation file with every seed. What is finished is not done again.

    Rows go to OUT/ablations.csv. A killed run goes on where it stopped. Examples of files: examples/ablations/.

    Example: wslfast ablate examples/ablations/beta.toml --out runs/ablations
    """

    file: Annotated[str, tyro.conf.Positional]
    """TOML file: a zoo, base settings, what is varied, seeds."""
    out: str = "runs/ablations"
    """Folder of rows, cells and, where the file describes one, the zoo."""
    zoo: tuple[str, ...] = ()
    """Folders of zoos to use, one after another, instead of the file's."""
    steps: int | None = None
    """Steps of every cell instead of the file's: --steps 3 --quick tries a file out (give it another --out)."""
    quick: bool = False
    """Where the file samples new models: fewer of them, on fewer images."""
    split: Literal["test", "val"] | None = None
    """Split whose models are measured, instead of the file's; use val to choose settings (rows go to ablations-val.csv). Nothing is trained
    twice."""
    network: Networks = ()

    def run(self) -> None:
        from ..sane import ablation as published
        from ..study import closed_form

        ablation = Ablation.from_toml(self.file)
        if self.split is not None:
            ablation = dataclasses.replace(ablation, split=self.split)
        if self.steps is not None:
            variants = {name: {**settings, "steps": self.steps} for name, settings in ablation.variants.items()}
            ablation = dataclasses.replace(ablation, variants=variants)
        systems = {**closed_form.systems(), **published.systems()}
        protocol = Protocol.quick() if self.quick else Protocol()
        for zoo in self.zoo or (None,):
            rows = run_ablation(ablation, self.out, zoo=zoo, systems=systems, protocol=protocol, on_cell=say_stage)
            self._table(ablation, rows, zoo)
        rows_at = Path(self.out) / rows_file(ablation)
        say(f"means over models, mean ± standard deviation over seeds; rows in {rows_at}")

    def _table(self, ablation: Ablation, rows: list[Row], zoo: str | None) -> None:
        figures = over_seeds(rows)
        columns = {}
        for column in _SHOWN:
            cells = [metrics.get(column) for metrics in figures.values()]
            if not any(cells):  # of networks whose answers are no classes there is no accuracy, of others no PSNR
                continue
            texts = ["-" if c is None else f"{c[0]:.3f}" + (f" ± {c[1]:.3f}" if c[1] is not None else "") for c in cells]
            columns[column.replace("_", "\n")] = texts
        if len(self.zoo) > 1:
            say(str(zoo))
        stacked_table(ablation.axis, list(figures), columns)


@dataclass(frozen=True)
class Gradients(GradientSettings):
    """Measure how the gradients of structure and behavior differ at a run's reconstructions, and how far a first-order model holds.

    Writes gradients.csv and gradients.json (docs/analysis.md says what is in them).

    Example: wslfast gradients --run runs/ae --out runs/gradients
    """

    run_folder: Annotated[str, tyro.conf.arg(name="run")] = ""
    """Folder of the run."""
    out: str | None = None
    """Folder for the figures (default: RUN/gradients)."""
    zoo: str | None = None
    """Folder of the zoo (default: the one the run was trained on)."""
    name: str | None = None
    """What to call the run in the rows (default: its folder's name)."""
    architecture: str | None = None
    """Which architecture, in a zoo of several (wslfast zoo show lists them)."""
    network: Networks = ()

    def run(self) -> None:
        require(bool(self.run_folder), "run: expected the folder of a run (--run DIR)")
        settings = GradientSettings(**{f.name: getattr(self, f.name) for f in dataclasses.fields(GradientSettings)})
        out = Path(self.out) if self.out is not None else Path(self.run_folder) / "gradients"
        rows = analyse(self.run_folder, out, settings, self.zoo, self.name, self.architecture)
        at_reconstruction = [row for row in rows if not row["direction"]]
        values = {c: ["-" if row[c] is None else f"{row[c]:.4g}" for row in at_reconstruction] for c in ("median", "mean", "spread")}
        stacked_table("at the reconstruction", [row["metric"].replace("_", " ") for row in at_reconstruction], values)
        directions = list(dict.fromkeys(row["direction"] for row in rows if row["direction"]))
        ratios = [[r["median"] for r in rows if r["direction"] == d and r["metric"] == "ratio"] for d in directions]
        swept = {
            f"{magnitude:g}": ["-" if of[i] is None else f"{of[i]:.3g}" for of in ratios] for i, magnitude in enumerate(settings.magnitudes)
        }
        stacked_table("direction", directions, swept, "quadratic form / measured loss, median over models")
        say(f"written to {out}")
