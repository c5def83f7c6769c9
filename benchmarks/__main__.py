"""``python -m benchmarks --suite cpu --out DIR``: the rows go to DIR/<suite>.csv, a table to the screen."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import bench_loss, zoo_building
from .recording import table, write_rows


def main() -> None:
    """Run a suite."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="wslfast beside what one would use instead, here")
    parser.add_argument("--suite", choices=("quick", "cpu"), default="quick", help="quick: a minute; cpu: all sizes, half an hour")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="folder for the CSV (%(default)s)")
    parser.add_argument("--only", choices=("loss", "zoo"), help="one half of the suite")
    options = parser.parse_args()
    rows = []
    if options.only != "zoo":
        rows += bench_loss.suite(options.suite, lambda line: print(line, flush=True))
    if options.only != "loss":
        rows += zoo_building.suite(options.suite, lambda line: print(line, flush=True))
    path = options.out / f"{options.suite}.csv"
    write_rows(rows, path)
    print(table(rows))
    print(f"{len(rows)} rows in {path}")


if __name__ == "__main__":
    main()
