"""Loss and gradient of k models on n shared queries, provider beside provider."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from wslfast import engine

from .providers import ARCHITECTURES, PROVIDERS, Provider, cases, relative_error
from .recording import Row, environment, quantiles, take_turns

BOUND = 1e-4  # float32 against float64, losses and gradients; a provider above it is not timed
CACHED, RECOMPUTED = "loss+gradient", "targets+loss+gradient"
HAND_WRITTEN = ("vmap", "grouped", "loop", "loop-channels-last")


def _calls(names: Sequence[str], targets: bool, architecture_name: str) -> dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], object]]:
    architecture = ARCHITECTURES[architecture_name]()

    def bind(function: Provider) -> Callable[[Tensor, Tensor, Tensor, Tensor], object]:
        return lambda w, o, q, t: function(w, o, q, t if targets else None, architecture)

    return {name: bind(PROVIDERS[name]) for name in names}


def gate(architecture_name: str, names: Sequence[str]) -> dict[str, float]:
    """Error of every provider on a small case of this network."""
    architecture = ARCHITECTURES[architecture_name]()
    case = next(cases(architecture, 3, 16))
    return {name: relative_error(name, (*case, architecture)) for name in names}


def measure(
    architecture_name: str, k: int, n: int, names: Sequence[str], errors: dict[str, float], rounds: int, budget_s: float
) -> list[Row]:
    """Milliseconds of each provider that passed the gate, with targets recomputed and cached, and the ratios the bars speak of."""
    architecture = ARCHITECTURES[architecture_name]()
    rows: list[Row] = []
    passed = [name for name in names if errors[name] <= BOUND]
    for name in names:
        if name not in passed:
            row = Row(name, architecture_name, k, n, "", "fp32", "ms", relative_error=errors[name], note="gate: not timed")
            rows.append(replace(row, **environment()))
    stream = cases(architecture, k, n)

    def arguments() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        weights, original, queries = next(stream)
        return weights, original, queries, engine.forward(original, queries, architecture).detach()

    medians: dict[tuple[str, str], float] = {}
    for direction in (RECOMPUTED, CACHED):
        # the published algorithm always recomputes, so it is timed once
        mine = [name for name in passed if direction == RECOMPUTED or name != "published"]
        times = take_turns(_calls(mine, direction == CACHED, architecture_name), arguments, rounds, budget_s)
        for name, values in times.items():
            median, low, high = quantiles(values)
            medians[name, direction] = median
            rows.append(
                Row(name, architecture_name, k, n, direction, "fp32", "ms", median, low, high, errors[name],
                    note=f"{len(values)} repeats", **environment())
            )  # fmt: skip
    return rows + _ratios(medians, architecture_name, k, n)


def _ratios(medians: dict[tuple[str, str], float], architecture_name: str, k: int, n: int) -> list[Row]:
    rows = []
    for direction in (RECOMPUTED, CACHED):
        mine = medians.get(("wslfast", direction))
        if mine is None:
            continue
        if ("published", RECOMPUTED) in medians:
            ratio = float(f"{medians['published', RECOMPUTED] / mine:.3g}")
            rows.append(Row("wslfast", architecture_name, k, n, direction, "fp32", "x published", ratio, **environment()))
        peers = {name: medians[name, direction] for name in HAND_WRITTEN if (name, direction) in medians}
        if peers:
            best = min(peers, key=peers.__getitem__)
            ratio = float(f"{peers[best] / mine:.3g}")
            row = Row("wslfast", architecture_name, k, n, direction, "fp32", "x best peer", ratio, note=f"peer: {best}")
            rows.append(replace(row, **environment()))
    return rows


QUICK = [("cnn3", 8, 16), ("cnn", 8, 16)]
FULL = [(name, k, n) for name in ARCHITECTURES for k, n in ((8, 16), (32, 128), (64, 256))]
LOOPS_ONLY = [(name, k, n) for name in ARCHITECTURES for k, n in ((32, 256), (128, 128))]


def suite(name: str, say: Callable[[str], None] = print) -> list[Row]:
    """All rows of ``quick`` (under a minute) or ``cpu``."""
    rows: list[Row] = []
    everyone = list(PROVIDERS)
    loops = ["loop", "loop-channels-last", "wslfast"]
    plan = [(*case, everyone) for case in (QUICK if name == "quick" else FULL)]
    if name != "quick":
        plan += [(*case, loops) for case in LOOPS_ONLY]
    errors = {net: gate(net, everyone) for net in {case[0] for case in plan}}
    for net, k, n, names in plan:
        rounds = 20 if k * n < 1024 else 7
        part = measure(net, k, n, names, errors[net], rounds, 2.0 if name == "quick" else 30.0)
        for row in part:
            if row.metric != "ms":
                say(f"{row.architecture} k={row.k} n={row.n} {row.direction}: {row.median} {row.metric} {row.note}")
        rows += part
    return rows
