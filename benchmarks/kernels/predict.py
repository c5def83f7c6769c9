"""Resources and predictions of docs/kernels.md: compiled for sm_90, counted by the model of pipes.py, written as tables.

    python -m benchmarks.kernels.predict [--write docs/kernels.md]

Takes some minutes; the resources of whole networks are those of ``make kernels`` (record.py). ``--write`` replaces
what stands between ``<!-- NAME: generated -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

from benchmarks.kernels import inspect, pipes, record
from wslfast.kernels.triton.configurations import configuration
from wslfast.kernels.triton.schedule import executed_multiply_adds, needed_multiply_adds
from wslfast.kernels.triton.schedule import schedule as schedule_of
from wslfast.kernels.triton.stages import Schedule

PRECISIONS = ("fp16", "tf32", "tf32x3")
_COUNTED = re.compile(r"(forward|dw|dx) (\d+)")
_JOINT = "joint 1"
_LISTED = ("pack", "stack", "criterion mse", "head mse", "fold")
TITLES = {"cnn3": "CNN3", "lenet5": "LeNet-5", "cnn": "CNN (28 x 28)"}


@dataclass(frozen=True)
class Prediction:
    """One kernel of one stage: what a (model, query) pair takes."""

    kernel: str
    programs: int  # an SM holds at once
    needed: int
    executed: int
    clocks: pipes.Clocks
    traffic: float

    @property
    def time(self) -> tuple[float, str]:
        return pipes.nanoseconds(self.clocks, self.traffic)


def _wanted(kernel: str) -> bool:
    return _COUNTED.fullmatch(kernel) is not None or kernel in (*_LISTED, _JOINT)


def predict(schedule: Schedule, row: dict[str, Any], sass: str) -> Prediction | None:
    """The prediction behind a row of inspect, None for kernels that are not counted (layouts, the criterion, the head)."""
    joint, counted = row["kernel"] == _JOINT, _COUNTED.fullmatch(row["kernel"])
    if not (joint or counted):
        return None
    role, i = ("joint", 1) if counted is None else (counted[1], int(counted[2]))
    stage, precision = schedule.stages[i], row["precision"]
    config = configuration(role, stage, precision)
    tiles, turns = pipes.tiles_per_query(stage, role, config)
    clocks = pipes.tile_clocks(sass, 1 if config.HOIST else turns, config.WARPS) * tiles
    held = pipes.programs_per_sm(row["registers"], row["shared_bytes"], config.WARPS)
    pieces = [("dx", 1), ("dw", 0)] if joint else [(role, i)]
    needed = sum(needed_multiply_adds(schedule.stages[at], schedule.placements[at], part) for part, at in pieces)
    executed = sum(executed_multiply_adds(schedule.stages[at], part) for part, at in pieces)
    traffic = pipes.joint_traffic(stage, schedule.stages[0], precision) if joint else pipes.query_traffic(stage, role, precision)
    return Prediction(row["kernel"], held, needed, executed, clocks, traffic)


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def kernel_table(predictions: Sequence[Prediction]) -> str:
    """One line a kernel of one network and precision, and the sum."""
    lines: list[Sequence[object]] = []
    for p in predictions:
        ns, why = p.time
        clk = (round(p.clocks.tensor), round(p.clocks.issue), round(p.clocks.memory))
        lines.append((p.kernel, p.programs, f"{p.executed / 1e3:.0f}", *clk, f"{p.traffic / 1e3:.1f}", f"{ns:.2f}", why))
    total = sum((p.clocks for p in predictions), pipes.Clocks())
    clk = (round(total.tensor), round(total.issue), round(total.memory))
    executed, traffic, ns = sum(p.executed for p in predictions), sum(p.traffic for p in predictions), sum(p.time[0] for p in predictions)
    lines.append(("**sum**", "", f"{executed / 1e3:.0f}", *clk, f"{traffic / 1e3:.0f}", f"**{ns:.1f}**", ""))
    header = ("kernel", "CTAs/SM", "kMAC executed", "clk tensor", "clk issue", "clk load/store", "KB", "ns", "bound by")
    return _table(header, lines)


def summary_table(predictions: dict[tuple[str, str], list[Prediction]]) -> str:
    """One line a network and precision: the bound a pair, and milliseconds for n = 256."""
    lines = []
    for (architecture, precision), kernels in predictions.items():
        ns = sum(p.time[0] for p in kernels)
        needed = sum(p.needed for p in kernels)
        executed = sum(p.executed for p in kernels)
        products = sum(p.clocks.products for p in kernels) / (3 if precision == "tf32x3" else 1)  # three for each
        ms = {k: ns * k * pipes.QUERIES / 1e6 for k in (128, 1024, 4096)}
        lines.append(
            (
                f"{TITLES[architecture]} {precision}",
                f"{ns:.1f}",
                f"{ms[128]:.2g}",
                f"{ms[1024]:.1f} / {ms[1024] / pipes.PLAN:.1f}",
                f"{ms[4096] / pipes.PLAN:.0f}",
                f"{sum(p.traffic for p in kernels) / 1e3:.0f}",
                f"{executed / needed:.2f}",
                f"{products / needed:.2f}",
            )
        )
    header = (
        "loss and gradient, n = 256, targets given",
        "bound ns/pair",
        "k = 128, ms",
        "k = 1024 bound / plan, ms",
        "k = 4096 plan, ms",
        "KB/pair",
        "executed / needed",
        "the same in machine code",
    )
    return _table(header, lines)


def joint_table(apart: dict[tuple[str, str], list[Prediction]], joint: dict[tuple[str, str], tuple[dict[str, Any], Prediction]]) -> str:
    """One line a network and precision that has the launch: what it takes, beside the two that it stands for."""
    lines = []
    for (architecture, precision), (row, one) in joint.items():
        kernels = apart[architecture, precision]
        two = [p for p in kernels if p.kernel in ("dx 1", "dw 0")]
        step, before, (ns, why) = sum(p.time[0] for p in kernels), sum(p.time[0] for p in two), one.time
        clk = " / ".join(str(round(value)) for value in (one.clocks.tensor, one.clocks.issue, one.clocks.memory))
        lines.append(
            (
                f"{TITLES[architecture]} {precision}",
                f"{row['registers']} / {row['spill_bytes']} / {row['shared_bytes']}",
                one.programs,
                clk,
                f"{sum(p.traffic for p in two) / 1e3:.1f} / {one.traffic / 1e3:.1f}",
                f"{before:.2f} / {ns:.2f}",
                why,
                f"{step:.1f} / {step - before + ns:.1f}",
            )
        )
    header = (
        "network",
        "registers / spill_bytes / shared_bytes",
        "CTAs/SM",
        "clk tensor / issue / load/store",
        "KB, two launches / one",
        "ns, two launches / one",
        "bound by",
        "step ns, two launches / one",
    )
    return _table(header, lines)


def network_table() -> str:
    """Registers, spills and shared memory of the whole network in one launch, as recorded: a line a network and target."""
    lines, roles = [], ("network_forward", "network_loss")
    recorded = {
        (row["architecture"], row["target"], row["role"], row["precision"]): row
        for row in record.read()[1]
        if row["kind"] == "resources" and row["role"] in roles
    }
    for architecture in TITLES:
        for target in inspect.TARGETS:
            rows = [recorded.get((architecture, target, role, p)) for role in roles for p in PRECISIONS]
            cells = ("-" if row is None else f"{row['registers']} / {row['spill_bytes']} / {row['shared_bytes']}" for row in rows)
            if any(rows):
                lines.append((TITLES[architecture], target, *cells))
    return _table(("network", "target", *(f"{what} {p}" for what in ("forward", "loss") for p in PRECISIONS)), lines)


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels.predict", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--write", type=Path, help="a page with places for the tables")
    options = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        print("predict compiles; unset TRITON_INTERPRET", file=sys.stderr)
        return 2
    resources: list[dict[str, Any]] = []
    predictions: dict[tuple[str, str], list[Prediction]] = {(a, p): [] for a in TITLES for p in PRECISIONS}
    joint: dict[tuple[str, str], tuple[dict[str, Any], Prediction]] = {}
    for row, sass in inspect.listings("sm_90", PRECISIONS, tuple(TITLES), wanted=_wanted):
        prediction = predict(schedule_of(*inspect.ARCHITECTURES[row["architecture"]]), row, sass)
        if prediction and row["kernel"] == _JOINT:
            joint[row["architecture"], row["precision"]] = row, prediction
            continue
        if row["architecture"] == "cnn3":
            resources.append(row)
        if prediction:
            predictions[row["architecture"], row["precision"]].append(prediction)
    columns = ("kernel", "precision", "registers", "spill_bytes", "shared_bytes", "dots", "mma")
    tables = {
        "resources": _table(columns, [[row[c] for c in columns] for row in resources]),
        "summary": summary_table(predictions),
        "joint": joint_table(predictions, joint),
        "network": network_table(),
        **{f"cnn3 {p}": kernel_table(predictions["cnn3", p]) for p in PRECISIONS},
    }
    if options.write is None:
        print("\n\n".join(f"{name}\n\n{table}" for name, table in tables.items()))
        return 0
    page = options.write.read_text()
    for name, table in tables.items():
        place = re.compile(rf"(<!-- {re.escape(name)}: generated -->\n).*?(<!-- end -->)", re.DOTALL)
        if not place.search(page):
            print(f"{options.write} has no place for {name!r}", file=sys.stderr)
            return 1
        page = place.sub(rf"\g<1>\n{table}\n\n\g<2>", page)
    options.write.write_text(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
