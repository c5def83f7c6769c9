"""One whole training step of the autoencoder: how long, and the share of each phase (``wslfast.profiling``)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from wslfast import Population, TrainConfig, engine, profiling
from wslfast.engine.choice import Call
from wslfast.training.trainer import Trainer, behavior_precision

from .cases import ARCHITECTURES, models
from .recording import Row, digits, environment, with_values
from .timing import event_ms, synchronised_ms, take_turns

WHOLE, GRAPHED = "whole step", "whole step with cuda_graph"
# two views of each model: 64 and 128 networks in the behavioral loss
SMALL: dict[str, Any] = {"batch_size": 32, "queries": 256, "query_pool": 512, "start": "random"}
PUBLISHED: dict[str, Any] = {"query_pool": 512, "steps": 100}


def trainer(net: str, device: str, published: bool, models_in_zoo: int = 128, **changes: Any) -> Trainer:
    """A trainer on random networks and images: of the small preset's sizes, or of the published ones (arXiv 2503.17138)."""
    architecture = ARCHITECTURES[net]()
    population = Population(architecture, models(architecture, models_in_zoo, 0))
    images = torch.rand(512, *architecture.input_shape, generator=torch.Generator().manual_seed(0))
    if published:
        config = TrainConfig.paper(zoo="-", out="-", device=device, **PUBLISHED, **changes)
    else:
        config = TrainConfig(zoo="-", out="-", device=device, steps=100, **SMALL, **changes)
    made = Trainer(config, population, images)
    made.model.train()
    return made


def path_of(made: Trainer, k: int) -> str:
    """What runs the networks of a step: figures of the kernels and of torch are not to be taken for each other."""
    with behavior_precision(made.config, made.device):
        call = Call("loss", k, made.queries)
        return f"networks on {engine.choose(made.architecture, made.device.type, torch.float32, call=call).name}"


def phase_rows(profile: profiling.Profile, row: Row, steps: int) -> list[Row]:
    """A row a phase: its own milliseconds a step and, in the note, its share of the profiled steps."""
    rows = []
    for phase in profile.rows():
        value = digits(phase["ms"] * phase["calls"] / steps)
        note = f"phase {phase['phase']}; share {phase['share']:.1%}; profiled over {steps} steps"
        rows.append(replace(row, metric="wall_ms", median=value, p20="", p80="", note=note))
    return rows


def beside_a_graph(plain: Trainer, graphed: Trainer, row: Row, size: str, repeats: int) -> list[Row]:
    """Host times of a step with its kernels launched one by one and with their recorded call replayed, in turns: row 20 of
    docs/notes/tuning.md."""
    for _ in range(3):
        graphed.step()
    if graphed.recorder is None or not graphed.recorder.recorded:
        timed, why = {WHOLE: plain}, [replace(row, note=f"{GRAPHED}; {size}; not run: nothing was recorded, see the log")]
    else:
        timed, why = {WHOLE: plain, GRAPHED: graphed}, []
    times: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(repeats):
        for name, made in timed.items():
            times[name] += synchronised_ms(made.step, 1)
    return [with_values(row, values, f"{name}; {size}") for name, values in times.items()] + why


def measure(net: str, device: str, published: bool, repeats: int = 5, steps: int = 3, folder: Path | None = None) -> list[Row]:
    """Rows of the step and its phases. With ``folder``, one more step is traced into ``trace.json`` and ``phases.json`` there."""
    cuda = device == "cuda"
    made = trainer(net, device, published)
    precision = "tf32" if cuda else "highest"
    k = made.batch * (2 if made.two_views else 1)
    size = f"{'published sizes' if published else 'small preset'}; {path_of(made, k)}"
    row = Row("wslfast", net, k, made.config.queries, "step", precision, "wall_ms", **environment(cuda))
    rows = []
    if cuda:
        for _ in range(3):
            made.step()
        torch.cuda.reset_peak_memory_stats()
        rows.append(with_values(replace(row, metric="gpu_ms"), event_ms(made.step, repeats), f"{WHOLE}; {size}"))
        peak = digits(torch.cuda.max_memory_allocated() / 1e6)
        rows.append(replace(row, metric="peak_mb", median=peak, note=f"{WHOLE}; {size}; model, optimiser and zoo included"))
        rows += beside_a_graph(made, trainer(net, device, published, cuda_graph=True), row, size, 3 * repeats)
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
