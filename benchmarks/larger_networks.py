"""Memory and time of the behavioral loss on ResNet-18s, up to the published width, and of a training step on them.

    python -m benchmarks.larger_networks              # memory of several widths, beside the model of docs/scaling.md
    python -m benchmarks.larger_networks --beside 64  # width 64 in turns with a loop over modules
    python -m benchmarks.larger_networks --step 64    # steps of an autoencoder whose tokens attend in windows

One thread; Linux. Every measurement is a process of its own. Prints Markdown.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wslfast import Architecture, Population, TrainConfig, engine
from wslfast.kernels import stacked
from wslfast.training.trainer import Trainer

from .network_peers import LoopChannelsLast

CASES = [(2, 8, 8), (2, 16, 8), (2, 32, 8), (4, 16, 8), (2, 16, 16), (2, 16, 32), (4, 64, 64)]  # k, n, width
BESIDE = 4, 64  # k, n
STEP = {"batch_size": 2, "queries": 16, "token_size": 288, "window": 256, "d_model": 64, "heads": 4, "layers": 2, "latent": 32}


def _resident() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def _grown(run: Callable[[], object]) -> float:
    """Most memory that a call holds at any time beyond what the process held before, in MB: looked up every millisecond (Linux)."""
    ctypes.CDLL(None).malloc_trim(0)  # what was freed and kept for later would not be seen to grow
    before, seen, done = _resident(), [0.0], threading.Event()

    def look() -> None:
        while not done.wait(0.001):
            seen.append(_resident())

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        run()
    finally:
        done.set()
        watcher.join()
    return max(seen) - before


def _case(k: int, n: int, width: int) -> tuple[Architecture, Tensor, Tensor, Tensor]:
    architecture = Architecture.resnet18(width=width)
    weights = architecture.initial_weights(["default"] * k, range(k))
    generator = torch.Generator().manual_seed(0)
    return architecture, weights, torch.randn(n, 3, 32, 32, generator=generator), torch.randn(k, n, 10, generator=generator)


def _seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def memory(k: int, n: int, width: int) -> dict[str, float]:
    """Memory of a loss and gradient beyond what was held before it, in MB, and its seconds."""
    architecture, weights, queries, targets = _case(k, n, width)
    run = _side("ours", architecture, weights, queries, targets)
    run()  # trials of how models are grouped, once a process
    grown = _grown(run)
    assert architecture.graph is not None
    models, slab = stacked.group_shape(architecture.graph, n)  # that one thread holds at a time
    expected = 4 * min(models, k) * slab * engine.activation_elements(architecture) + 4 * k * architecture.num_weights  # and the gradient
    return {"mb": grown, "model_mb": expected / 1e6, "seconds": _seconds(run), "parameters": architecture.num_weights}


def side(which: str, width: int) -> dict[str, float]:
    """Memory of one side by itself beyond weights, modules and queries, in MB."""
    run = _side(which, *_case(*BESIDE, width))
    run()
    return {"mb": _grown(run)}


def _side(which: str, architecture: Architecture, weights: Tensor, queries: Tensor, targets: Tensor) -> Callable[[], Any]:
    if which == "ours":
        return lambda: engine.loss_and_gradient(weights, queries, targets, architecture, "mse")
    loop = LoopChannelsLast(Population(architecture, weights).module(0).eval(), architecture, len(weights))
    loop.load(weights)
    return lambda: loop(queries, targets)


def beside(width: int, rounds: int = 3) -> dict[str, float]:
    """Seconds of both sides, which take turns; the least of each."""
    case = _case(*BESIDE, width)
    sides = {which: _side(which, *case) for which in ("ours", "loop")}
    found: dict[str, list[float]] = {which: [] for which in sides}
    for _ in range(rounds):
        for which, run in sides.items():
            found[which].append(_seconds(run))
    return {which: min(values) for which, values in found.items()}


def step(width: int, steps: int = 2) -> dict[str, float]:
    """Seconds of a training step after the first, without the optimiser's update, those of its behavior, and its memory in MB."""
    architecture, weights, queries, _ = _case(4, 32, width)
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(zoo="none", out=str(Path(folder) / "run"), steps=1000, start="linear", **STEP)  # type: ignore[arg-type]
        trainer = Trainer(config, Population(architecture, weights), queries)
        rows, images = torch.arange(STEP["batch_size"]), torch.arange(STEP["queries"])  # type: ignore[arg-type]
        skipped: list[float] = []

        def one() -> None:
            total, found = trainer.losses(rows, images)
            total.backward()  # type: ignore[no-untyped-call]
            skipped.append(float(found["skipped_models"]))

        one()
        spent = [_seconds(one) for _ in range(steps)]
        grown = _grown(one)
        rebuilt = weights[rows].clone()
        outputs = engine.forward(rebuilt, queries[images], architecture)
        behavior = 2 * _seconds(lambda: engine.loss_and_gradient(rebuilt, queries[images], outputs, architecture, "mse"))  # of two views
        return {
            "seconds": min(spent), "behavior": behavior, "mb": grown, "tokens": trainer.layout.num_tokens,
            "windows": trainer.model._windows.count, "skipped": skipped[-1], "parameters": architecture.num_weights,
        }  # fmt: skip


def _in_a_process(*arguments: object) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.larger_networks", "--one", *map(str, arguments)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, float] = json.loads(output.splitlines()[-1])
    return found


def _memory_table() -> None:
    print("| k | n | width | weights | memory, MB | model, MB | time (k n width^2 = 1 for the first row) |\n|---|---|---|---|---|---|---|")
    first: float | None = None
    for k, n, width in CASES:
        found = _in_a_process("memory", k, n, width)
        work = k * n * width**2 / (CASES[0][0] * CASES[0][1] * CASES[0][2] ** 2)
        first = first or found["seconds"]
        figures = f"{found['mb']:.0f} | {found['model_mb']:.0f} | {found['seconds'] / first:.2f} ({work:g})"
        print(f"| {k} | {n} | {width} | {int(found['parameters']):,} | {figures} |", flush=True)


def _beside_table(width: int) -> None:
    k, n = BESIDE
    times = _in_a_process("beside", width)
    print(f"ResNet-18 of width {width}, k={k}, n={n}, loss and gradient, CPU seconds of one thread\n")
    print("| | seconds | memory beyond weights, MB |\n|---|---|---|")
    for which, name in (("loop", "loop over modules, channels-last"), ("ours", "wslfast")):
        print(f"| {name} | {times[which]:.2f} | {_in_a_process('side', which, width)['mb']:.0f} |", flush=True)
    print(f"\nratio {times['loop'] / times['ours']:.2f}")


def _step_table(width: int) -> None:
    found = _in_a_process("step", width)
    settings = ", ".join(f"{name} {value}" for name, value in STEP.items())
    print(f"One training step on ResNet-18s of width {width} ({int(found['parameters']):,} weights): {settings}\n")
    print("| tokens | windows | seconds | of them behavior | memory of a step, MB | models skipped |\n|---|---|---|---|---|---|")
    share = f"{found['seconds']:.1f} | {found['behavior']:.1f}"
    print(f"| {int(found['tokens']):,} | {int(found['windows'])} | {share} | {found['mb']:.0f} | {int(found['skipped'])} |")


def main() -> None:
    """Print the table that was asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.larger_networks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--beside", type=int, metavar="WIDTH", help="in turns with a loop over modules")
    parser.add_argument("--step", type=int, metavar="WIDTH", help="a training step")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)  # of one process
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.one:
        kind, *rest = arguments.one
        kinds: dict[str, Callable[..., dict[str, float]]] = {"memory": memory, "side": side, "beside": beside, "step": step}
        print(json.dumps(kinds[kind](*(int(value) if value.isdigit() else value for value in rest))))
    elif arguments.beside:
        _beside_table(arguments.beside)
    elif arguments.step:
        _step_table(arguments.step)
    else:
        _memory_table()


if __name__ == "__main__":
    main()
