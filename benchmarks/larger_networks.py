"""Memory and time of the behavioral loss on ResNet-18s of several widths, beside the model of docs/scaling.md.

    python -m benchmarks.larger_networks

Every case is a process of its own (peak memory is a process's). Prints a Markdown table; times are relative to the first row.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import torch

from wslfast import Architecture, engine

CASES = [(2, 8, 8), (2, 16, 8), (2, 32, 8), (4, 16, 8), (2, 16, 16), (2, 16, 32)]  # k, n, width


def one(k: int, n: int, width: int) -> dict[str, float]:
    """Peak memory of a loss and gradient over what was held before it, in MB, and its seconds."""
    architecture = Architecture.resnet18(width=width)
    assert architecture.module is not None
    row = torch.cat([v.flatten() for v in architecture.module.state_dict().values() if v.is_floating_point()])
    weights, queries = row.expand(k, -1).contiguous(), torch.randn(n, 3, 32, 32)
    targets = torch.randn(k, n, 10)
    engine.loss_and_gradient(weights[:1], queries[:1], targets[:1, :1], architecture, "mse")  # what is made once
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    engine.loss_and_gradient(weights, queries, targets, architecture, "mse")
    seconds = time.perf_counter() - start
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    # activations of one model at a time (on a CPU), and rows of weights and gradients of all
    expected = 4 * n * engine.activation_elements(architecture) + 4 * (k + 1) * architecture.num_weights
    return {"mb": grown / 1e6, "model_mb": expected / 1e6, "seconds": seconds, "parameters": architecture.num_weights}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", type=int, nargs=3, help=argparse.SUPPRESS)  # of one process
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(one(*arguments.case)))
        return
    print("| k | n | width | weights | memory, MB | model, MB | time (k n width^2 = 1 for the first row) |\n|---|---|---|---|---|---|---|")
    first: float | None = None
    for k, n, width in CASES:
        command = [sys.executable, "-m", "benchmarks.larger_networks", "--case", str(k), str(n), str(width)]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
        work = k * n * width**2 / (CASES[0][0] * CASES[0][1] * CASES[0][2] ** 2)
        first = first or found["seconds"]
        figures = f"{found['mb']:.0f} | {found['model_mb']:.0f} | {found['seconds'] / first:.2f} ({work:g})"
        print(f"| {k} | {n} | {width} | {found['parameters']:,} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
