"""Compile a network's kernels into Triton's cache, for the GPU that is here or for one that is named, and launch nothing.

    PYTHONPATH=. python3 -m benchmarks.kernels.compile NETWORK PRECISION TARGET [proof]

So that what runs afterwards, tests, timings and a proof, finds its kernels made: sixteen of these run at once. What is compiled is what
calls compile (``inspect.make_calls``, or with ``proof`` what a proof calls, through ``standin.py``). NETWORK is one of inspect.py's, or
one of the tests' as ``test:NAME``.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from benchmarks.kernels.inspect import ARCHITECTURES, make_calls
from benchmarks.kernels.standin import Launch, standing_in
from wslfast.kernels.layers import Layers, Unplannable
from wslfast.kernels.triton import launch
from wslfast.kernels.triton.configurations import CHOICES, Tuning, tuned
from wslfast.kernels.triton.criterion import CRITERIA
from wslfast.kernels.triton.query_gradient import gradients, layers_on_queries
from wslfast.kernels.triton.schedule import schedule
from wslfast.kernels.triton.stages import Schedule

Call = Callable[[], object]


def network_of(name: str) -> tuple[Layers, tuple[int, ...]]:
    """Layers and input shape of a network by name."""
    if not name.startswith("test:"):
        return ARCHITECTURES[name]
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "support"))
    import kernel_cases

    known = {"small": kernel_cases.SMALL, "mlp": kernel_cases.MLP, **kernel_cases.CASES, **kernel_cases.HEADS}
    case = known[name.removeprefix("test:")]
    return case.layers, case.shape


def proof_calls(layers: Layers, shape: tuple[int, ...], planned: Schedule, precision: str) -> Iterator[tuple[Schedule, Call]]:
    """Calls that a proof (``engine/trial.py``) makes, each with the schedule of its network: every criterion, labels, a pool, slopes of
    outputs, slopes of queries; in the mode that is chosen, and in every choice of launch parameters."""
    weights, queries = torch.zeros(1, planned.parameters), torch.zeros(2, *shape)
    targets, labels, index = torch.zeros(1, 2, planned.classes), torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 2, dtype=torch.long)
    losses = [(name, targets, None) for name in (*CRITERIA, "gradient")] + [("cross_entropy", labels, None)]
    losses += [("mse", targets, index), ("cross_entropy", labels, index)]

    def loss(criterion: str, y: torch.Tensor, rows: torch.Tensor | None) -> Call:
        return lambda: launch.loss_and_gradient(weights, queries, y, layers, criterion, 2.0, precision, index=rows)

    def to_queries(x: torch.Tensor) -> Call:
        return lambda: gradients(weights, x, targets, layers, precision)

    calls = [(planned, loss(*of)) for of in losses] + [(planned, lambda: launch.forward(weights, queries, layers, precision))]
    with contextlib.suppress(Unplannable):
        behind = schedule(layers_on_queries(layers, shape), shape)
        calls += [(behind, to_queries(x)) for x in (queries, queries.unsqueeze(0))]
    for choice in CHOICES.values():
        yield from ((of, partial(_chosen, choice, call)) for of, call in calls)


def _chosen(choice: Tuning, call: Call) -> None:
    with tuned(choice):
        call()


def main() -> int:
    """Command line."""
    name, precision, target = sys.argv[1:4]
    layers, shape = network_of(name)
    planned, began, made = schedule(layers, shape), time.perf_counter(), 0

    def count(launched: Launch) -> None:
        nonlocal made
        made += launched.new

    proof = sys.argv[4:] == ["proof"]
    usual = ((planned, call) for call in make_calls(layers, shape, planned, precision))
    for of, call in proof_calls(layers, shape, planned, precision) if proof else usual:
        with contextlib.suppress(Unplannable), standing_in(target, of, count):
            call()
    print(f"{' '.join(sys.argv[1:])}: {made} kernels in {time.perf_counter() - began:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
