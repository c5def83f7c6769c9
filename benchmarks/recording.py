"""Rows of a benchmark: taking turns, medians, what they were measured on, and the CSV they end up in."""

from __future__ import annotations

import csv
import datetime
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Row:
    """One measured number. The field order is the header of ``data/*.csv``."""

    provider: str
    architecture: str
    k: int
    n: int
    direction: str
    precision: str
    metric: str
    median: float | str = ""
    p20: float | str = ""
    p80: float | str = ""
    relative_error: float | str = ""
    device: str = ""
    driver: str = ""
    torch: str = ""
    triton: str = ""
    python: str = ""
    commit: str = ""
    date: str = ""
    note: str = ""


HEADER = [f.name for f in fields(Row)]


def _first_line(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else ""


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    best = [flag for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if any(flag in line.split() for line in lines)]
    return f"{model} {' '.join(best[:1])}".strip()


@lru_cache(maxsize=2)
def environment(cuda: bool = False) -> dict[str, Any]:
    """The columns from ``device`` to ``date``."""
    try:
        from importlib.metadata import version

        triton = version("triton")
    except ImportError:
        triton = ""
    return {
        "device": torch.cuda.get_device_name() if cuda else f"{_processor()}, {torch.get_num_threads()} threads",
        "driver": _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else "",
        "torch": torch.__version__,
        "triton": triton,
        "python": platform.python_version(),
        # a plus: the tree held changes or files that are not in that commit
        "commit": _first_line("git", "rev-parse", "--short=12", "HEAD") + ("+" if _first_line("git", "status", "--porcelain") else ""),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    at = torch.tensor(sorted(values), dtype=torch.float64).quantile(torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64))
    median, low, high = (float(f"{v:.4g}") for v in at.tolist())
    return median, low, high


def take_turns(
    calls: Mapping[str, Callable[..., Any]], arguments: Callable[[], tuple[Any, ...]], rounds: int, budget_s: float = 60.0
) -> dict[str, list[float]]:
    """Milliseconds of each call in ``rounds`` rounds, all calls once a round on that round's fresh arguments.

    One untimed round goes first. A call that has used ``budget_s`` sits out the remaining rounds (three at least): the published
    algorithm takes seconds where others take milliseconds.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        given = arguments()
        for name, call in calls.items():
            if len(times[name]) >= 3 and sum(times[name]) > 1e3 * budget_s:
                continue
            began = time.perf_counter()
            call(*given)
            if turn:
                times[name].append(1e3 * (time.perf_counter() - began))
    return times


def write_rows(rows: list[Row], path: Path) -> None:
    """Write a CSV of exactly these rows, with Unix line ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(HEADER)
        writer.writerows([[getattr(row, name) for name in HEADER] for row in rows])


def table(rows: list[Row]) -> str:
    """The rows as a short table, one line each."""
    head = f"{'provider':20}{'net':8}{'k':>6}{'n':>5}  {'direction':22}{'precision':10}{'metric':22}"
    lines = [head + f"{'median':>9}{'p20':>9}{'p80':>9}  note"]
    for r in rows:
        values = (f"{v:.4g}" if isinstance(v, float) else v for v in (r.median, r.p20, r.p80))
        where = f"{r.provider:20}{r.architecture:8}{r.k:>6}{r.n:>5}  {r.direction:22}{r.precision:10}{r.metric:22}"
        lines.append(where + "".join(f"{v:>9}" for v in values) + f"  {r.note}")
    return "\n".join(lines)
