"""``python -m benchmarks``: run a suite here; ``compare``: two CSVs; ``readme``: README.md from the tracked rows."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from . import compare, readme
from .network_suite import SECTIONS as NETWORK_SECTIONS
from .network_suite import run_networks
from .networks import NETWORKS
from .recording import DATA, Row, merge, read_rows, show
from .suites import GPU_SECTIONS, QUICK, SECTIONS, run_cpu, run_gpu


def _run(options: argparse.Namespace) -> int:
    cuda = options.suite == "gpu"
    if cuda and not torch.cuda.is_available():
        print("python -m benchmarks: no CUDA device here, --suite gpu has nothing to run on", file=sys.stderr)
        return 2
    known = {"gpu": GPU_SECTIONS, "cpu": SECTIONS, "quick": QUICK, "networks": (*NETWORK_SECTIONS, *NETWORKS)}[options.suite]
    unknown = sorted(set(options.only) - set(known))
    if unknown:
        print(
            f"python -m benchmarks: --only: expected some of {', '.join(known)} for --suite {options.suite}, got {unknown}", file=sys.stderr
        )
        return 2
    path = options.out / f"{options.suite}.csv"
    if path.exists() and not options.only:
        path.unlink()  # a whole run begins anew; a section alone replaces its own rows
    try:
        before = read_rows(path) if path.exists() else []
    except ValueError as error:
        print(f"python -m benchmarks: {error}", file=sys.stderr)
        return 2
    rows: list[Row] = []

    def emit(new: list[Row]) -> None:
        merge(path, new)
        rows.extend(new)

    def say(line: str) -> None:
        print(line, flush=True)

    if cuda:
        run_gpu(options.only, before, emit, say, options.out)
    elif options.suite == "networks":
        run_networks(options.only, emit, say)
    else:
        run_cpu(options.suite, options.only, before, emit, say)
    clock = "gpu_ms" if cuda else "wall_ms"
    show([row for row in rows if row.metric == clock or row.provider == "ceiling" or row.direction in ("step", "zoo")])
    print(f"{len(rows)} rows in {path}")
    if options.page:
        from .page import write_page

        print(write_page(read_rows(path), options.out / f"{options.suite}.html"))
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns its exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["compare"]:
        return compare.main(given[1:])
    if given[:1] == ["readme"]:
        return readme.main(given[1:])
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="wslfast beside what one would use instead, on this machine",
        epilog="also: python -m benchmarks compare A.csv B.csv; python -m benchmarks readme",
    )
    parser.add_argument(
        "--suite",
        choices=("quick", "cpu", "networks", "gpu"),
        default="quick",
        help="quick: a minute; cpu and networks: about ten; gpu: hours",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/benchmarks"), help=f"folder of CSV and page (%(default)s; tracked rows: {DATA})"
    )
    parser.add_argument("--no-page", dest="page", action="store_false", help="rows alone, no HTML page")
    sections = (
        f"quick: {', '.join(QUICK)}; cpu: {', '.join(SECTIONS)}; gpu: {', '.join(GPU_SECTIONS)}; networks: "
        f"{', '.join(NETWORK_SECTIONS)}, or a network's name"
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="SECTION", help=sections)
    return _run(parser.parse_args(given))


if __name__ == "__main__":
    raise SystemExit(main())
