"""``wslfast train``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..training import TrainConfig, train
from .console import console


@dataclass(frozen=True)
class Train(TrainConfig):
    """Train a weight autoencoder on a zoo.

    The folder receives config.toml, log.jsonl (one record a line) and checkpoint/. An interrupted run goes on with --resume,
    to the bit on a CPU.

    Example: wslfast train --zoo runs/zoo --out runs/ae --steps 1000 --seed 0
    """

    config: str | None = None
    """TOML file of settings; flags win over it."""
    preset: Literal["small", "paper"] = "small"
    """What settings are that neither flags nor --config give: small, the defaults shown here, a CPU's; paper, the published ones (arXiv
    2503.17138: d 256, 8 + 8 blocks, 64 models and 256 queries a step, lr 1e-5, 30,000 steps)."""
    resume: bool = False
    """Continue from the folder's checkpoint (starts afresh where there is none)."""
    profile: bool = False
    """Record 20 steps: profile/trace.json, profile/phases.json and a table of phases."""
    log_to: Literal["tensorboard"] | None = None
    """Also write every record, and the phases of 20 steps, for TensorBoard, into OUT/tensorboard (pip install 'wslfast[tensorboard]')."""

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

            run = train(TrainConfig(**settings), resume=self.resume, profiled=self.profile, on_record=on_record, log_to=self.log_to)
        console.print(f"{run.out}: {run.step} steps; next: wslfast evaluate --run {run.out}", soft_wrap=True)
