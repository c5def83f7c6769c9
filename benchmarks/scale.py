"""A zoo larger than memory: peak host memory and steps a second, read from mapped shards against held in memory.

    python -m benchmarks.scale --models 100000 --steps 60 --out build/scale

The zoo is synthetic (Gaussian weights of a CNN3), written a shard at a time; each way of training is a process of its own, and the
two take turns. Prints one JSON object a run and the ratio.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from wslfast import Architecture, TrainConfig, train
from wslfast.zoo.manifest import Manifest, Shard, normalised
from wslfast.zoo.store import write_shards

SHARD_ROWS = 1500


class _Synthetic(Sequence[Tensor]):
    """Shards of rows, made when they are asked for."""

    def __init__(self, models: int, width: int) -> None:
        self.models, self.width = models, width

    def __len__(self) -> int:
        return -(-self.models // SHARD_ROWS)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]
        if index >= len(self):
            raise IndexError(index)
        rows = min(SHARD_ROWS, self.models - index * SHARD_ROWS)
        return 0.1 * torch.randn(rows, self.width, generator=torch.Generator().manual_seed(index))

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))


def make_zoo(folder: Path, models: int) -> None:
    """Write the synthetic zoo; all of it is training models."""
    architecture = Architecture.cnn3()
    numbers = tuple(range(models))

    def describe(shards: Sequence[Shard]) -> Manifest:
        record = normalised(architecture.to_dict(), "architecture")
        split = {"by": "model", "seed": None, "fractions": None}
        columns = {"model": numbers, "val_acc": tuple(i / models for i in numbers), "split": ("train",) * models}
        return Manifest(record, architecture.num_weights, models, columns, split, {"made_by": "benchmarks.scale"}, tuple(shards))

    write_shards(folder, _Synthetic(models, architecture.num_weights), describe)


def run(zoo: Path, out: Path, steps: int, memory_gb: float) -> dict[str, float]:
    """Train for some steps; models a second (median over records after the first) and the process's peak memory in GB."""
    rates: list[float] = []
    images = torch.randn(2048, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    settings = TrainConfig(
        zoo=str(zoo),
        out=str(out),
        steps=steps,
        queries=64,
        log_every=5,
        checkpoint_every=steps,
        memory_gb=memory_gb,
        query_pool=512,
    )
    train(settings, images=images, on_record=lambda record: rates.append(record["models_per_s"]))
    return {
        "memory_gb": memory_gb,
        "models_per_s": statistics.median(rates[2:]),
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=100_000, help="models of the zoo (43 kB each)")
    parser.add_argument("--steps", type=int, default=60, help="optimiser steps of a run")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each kind")
    parser.add_argument("--out", type=Path, default=Path("build/scale"), help="folder for zoo and runs")
    parser.add_argument("--memory-gb", type=float, help=argparse.SUPPRESS)  # of one run, in a process of its own
    arguments = parser.parse_args()
    zoo = arguments.out / f"zoo-{arguments.models}"
    if arguments.memory_gb is not None:
        out = arguments.out / f"run-{arguments.memory_gb:g}-{id(arguments):x}"
        print(json.dumps(run(zoo, out, arguments.steps, arguments.memory_gb)))
        return
    if not (zoo / "manifest.json").exists():
        make_zoo(zoo, arguments.models)
    found: dict[float, list[float]] = {}
    for _ in range(arguments.rounds):
        for memory in (4.0, 40.0):  # on disk; in memory, with the targets of all models cached
            command = [sys.executable, "-m", "benchmarks.scale", *sys.argv[1:], "--memory-gb", str(memory)]
            line = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
            print(line, flush=True)
            found.setdefault(memory, []).append(json.loads(line)["models_per_s"])
    mapped, resident = (statistics.median(found[memory]) for memory in (4.0, 40.0))
    print(json.dumps({"mapped / resident, models a second": round(mapped / resident, 3)}))


if __name__ == "__main__":
    main()
