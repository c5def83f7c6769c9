"""``wslfast train``."""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass
from typing import Literal

from ..training import TrainConfig, train
from ..training.progress import shown
from .console import console, say
from .options import Networks, NumberOrNone


@dataclass(frozen=True)
class Train(TrainConfig):
    """Train a weight autoencoder on a zoo.

    The folder receives config.toml, log.jsonl (one record per line) and checkpoint/. An interrupted run goes on with --resume,
    to the bit on a CPU.

    Example: wslfast train --zoo runs/zoo --out runs/ae --steps 1000 --seed 0
    """

    clip: NumberOrNone = TrainConfig.clip
    """Largest gradient norm; none switches clipping off."""
    config: str | None = None
    """TOML file of settings; flags win over it."""
    preset: Literal["small", "paper"] = "small"
    """What settings are that neither flags nor --config give: small, the defaults shown here, a CPU's; paper, the published ones (arXiv
    2503.17138: d 256, 8 + 8 blocks, 64 models and 256 queries per step, lr 1e-5, 30,000 steps)."""
    resume: bool = False
    """Continue from the folder's checkpoint (starts afresh where there is none)."""
    profile: bool = False
    """Record 20 steps: profile/trace.json, profile/phases.json and a table of phases."""
    log_to: Literal["tensorboard"] | None = None
    """Also write every record, and the phases of 20 steps, for TensorBoard, into OUT/tensorboard (pip install 'wslfast[tensorboard]')."""
    network: Networks = ()

    def run(self) -> None:
        settings = {f.name: getattr(self, f.name) for f in dataclasses.fields(TrainConfig)}
        with shown(console, self.steps) as on_record:
            run = train(TrainConfig(**settings), resume=self.resume, profiled=self.profile, on_record=on_record, log_to=self.log_to)
        again = f" --network {shlex.join(self.network)}" if self.network else ""
        say(f"{run.out}: {run.step} steps; next: wslfast evaluate --run {shlex.quote(str(run.out))}{again}")
