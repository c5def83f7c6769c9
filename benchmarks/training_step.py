"""One whole training step of the autoencoder: how long, and the share of each phase (``wslfast.profiling``)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from wslfast import Population, TrainConfig, profiling
from wslfast.training.trainer import Trainer

from .cases import ARCHITECTURES, models
from .recording import Row, digits, environment, with_values
from .timing import event_ms, synchronised_ms, take_turns

WHOLE = "whole step"
# two views of each model: 64 and 128 networks in the behavioral loss
SMALL: dict[str, Any] = {"batch_size": 32, "queries": 256, "query_pool": 512, "start": "random"}
PUBLISHED: dict[str, Any] = {"query_pool": 512, "steps": 100}


def trainer(net: str, device: str, published: bool, models_in_zoo: int = 128) -> Trainer:
    """A trainer on random networks and images: of the small preset's sizes, or of the published ones (arXiv 2503.17138)."""
    architecture = ARCHITECTURES[net]()
    population = Population(architecture, models(architecture, models_in_zoo, 0))
    images = torch.rand(512, *architecture.input_shape, generator=torch.Generator().manual_seed(0))
    if published:
        config = TrainConfig.paper(zoo="-", out="-", device=device, **PUBLISHED)
    else:
        config = TrainConfig(zoo="-", out="-", device=device, steps=100, **SMALL)
    made = Trainer(config, population, images)
    made.model.train()
    return made


def phase_rows(profile: profiling.Profile, row: Row, steps: int) -> list[Row]:
    """A row a phase: its own milliseconds a step and, in the note, its share of the profiled steps."""
    rows = []
    for phase in profile.rows():
        value = digits(phase["ms"] * phase["calls"] / steps)
        note = f"phase {phase['phase']}; share {phase['share']:.1%}; profiled over {steps} steps"
        rows.append(replace(row, metric="wall_ms", median=value, p20="", p80="", note=note))
    return rows


def measure(net: str, device: str, published: bool, repeats: int = 5, steps: int = 3, folder: Path | None = None) -> list[Row]:
    """Rows of the step and its phases. With ``folder``, one more step is traced into ``trace.json`` and ``phases.json`` there."""
    cuda = device == "cuda"
    made = trainer(net, device, published)
    precision = "tf32" if cuda else "highest"
    k = made.batch * (2 if made.two_views else 1)
    size = "published sizes" if published else "small preset"
    row = Row("wslfast", net, k, made.config.queries, "step", precision, "wall_ms", **environment(cuda))
    rows = []
    if cuda:
        for _ in range(3):
            made.step()
        torch.cuda.reset_peak_memory_stats()
        rows.append(with_values(row, synchronised_ms(made.step, repeats), f"{WHOLE}; {size}"))
        rows.append(with_values(replace(row, metric="gpu_ms"), event_ms(made.step, repeats), f"{WHOLE}; {size}"))
        peak = digits(torch.cuda.max_memory_allocated() / 1e6)
        rows.append(replace(row, metric="peak_mb", median=peak, note=f"{WHOLE}; {size}; model, optimiser and zoo included"))
    else:
        times = take_turns({"": lambda: made.step()}, tuple, repeats)[""]
        rows.append(with_values(row, times, f"{WHOLE}; {size}"))
    with profiling.profile(device=device) as profile:
        for _ in range(steps):
            made.step()
    rows += phase_rows(profile, row, steps)
    if folder is not None:
        with profiling.profile(folder, device=device):
            made.step()
    return rows
