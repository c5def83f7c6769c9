"""The full resource table and the full race run, kept in ``benchmarks/data/kernels.jsonl`` with the hash of the sources that they hold for.

    python -m benchmarks.kernels.record [--target sm_90 ...] [--architecture cnn3 ...] [--precision fp16 ...] [--races] [--processes 2]

``make kernels`` runs all of it (an hour on two cores); rows that are there for the same sources and Triton are not made again, so it goes
on where it was stopped. Continuous integration compares the hash (``stale``), compiles two rows a role again and races one network a
role (``tests/test_kernels_record.py``). No GPU is needed, and none of these rows is a measurement on one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from wslfast.kernels.triton import sources

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "benchmarks" / "data" / "kernels.jsonl"
KEY = ("architecture", "precision", "target")
PARTS = {"layers": ("forward", "dx", "dw", "joint", "tail", "layout"), "network": ("network_forward", "network_loss")}  # by role


def read(path: Path = FILE) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(header, rows): the header says what sources and Triton the rows hold for; rows have a ``kind``, ``resources`` or ``races``."""
    if not path.exists():
        return {}, []
    lines = [json.loads(line) for line in path.read_text().splitlines() if line]
    return lines[0], lines[1:]


def stale(path: Path = FILE) -> str | None:
    """None if the rows hold for the sources that are here, else why not."""
    header, _ = read(path)
    if header.get("sources") == sources.digest(compiled=True):
        return None
    return f"{path.name} holds for sources {header.get('sources')}, here are {sources.digest(compiled=True)}: run `make kernels`"


def write(rows: list[dict[str, Any]], path: Path = FILE) -> None:
    """Replace the file."""
    import triton

    order = sorted(rows, key=lambda r: tuple(str(r.get(name, "")) for name in ("kind", *KEY, "role", "kernel")))
    header = {"sources": sources.digest(compiled=True), "triton": triton.__version__}
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in [header, *order]))
    temporary.replace(path)


def _lines(module: str, *arguments: str, interpret: bool = False) -> list[dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= {"TRITON_INTERPRET": "1"} if interpret else {}
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{module} {' '.join(arguments)}: {done.stderr[-1500:]}{done.stdout[-500:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def resources(architecture: str, precision: str, target: str, part: str) -> list[dict[str, Any]]:
    """Rows of a part's kernels of a network in one precision for one target."""
    given = ("--target", target, "--precision", precision, "--architecture", architecture, "--role", *PARTS[part], "--json")
    # without the seconds, which are the machine's
    made = _lines("benchmarks.kernels.inspect", *given)
    for row in made:
        del row["seconds"]
    return [{"kind": "resources", **row} for row in made]


def races(architecture: str, precision: str) -> list[dict[str, Any]]:
    """One row: launches, accesses, barriers and races of a network."""
    return [{"kind": "races", **row} for row in _lines("benchmarks.kernels.races", architecture, "--precision", precision, "--json",
                                                       interpret=True)]  # fmt: skip


def main() -> int:
    """Command line."""
    from benchmarks.kernels import inspect

    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels.record", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--target", nargs="+", choices=inspect.TARGETS, default=list(inspect.TARGETS))
    parser.add_argument("--architecture", nargs="+", choices=sorted(inspect.ARCHITECTURES), default=list(inspect.ARCHITECTURES))
    parser.add_argument("--precision", nargs="+", default=["fp16", "tf32", "tf32x3", "bf16"])
    parser.add_argument("--part", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--races", action="store_true", help="race every network as well")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    rows = read()[1] if stale() is None else []
    part_of = {role: part for part, roles in PARTS.items() for role in roles}
    there = {(*(row[name] for name in KEY), part_of[row["role"]]) for row in rows if row["kind"] == "resources"}
    raced = {(row["architecture"], row["precision"]) for row in rows if row["kind"] == "races"}
    cells = [c for c in itertools.product(options.architecture, options.precision, options.target, options.part) if c not in there]
    tracks = [(a, "fp16") for a in options.architecture if options.races and (a, "fp16") not in raced]

    def work() -> Iterator[Any]:
        yield from ((races, track) for track in tracks)
        yield from ((resources, cell) for cell in cells)

    with ThreadPoolExecutor(options.processes) as pool:
        for made in pool.map(lambda job: job[0](*job[1]), work()):
            rows += made
            write(rows)
            last = made[0]
            print(f"{len(rows)} rows, the last of {last['architecture']} {last['precision']} {last.get('target', 'races')}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
