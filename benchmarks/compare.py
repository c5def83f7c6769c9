"""Two CSVs of rows: what became slower, larger or wrong. ``python -m benchmarks compare A.csv B.csv``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .losses import OF_THE_PROCESS
from .recording import Row, read_rows

THRESHOLD = 0.1


@dataclass(frozen=True)
class Change:
    """One key of both files. ``worse``: b's cost over a's, above 1 if b is worse; None where a number is missing in one."""

    before: Row
    after: Row
    worse: float | None

    def regressed(self, threshold: float) -> bool:
        """Worse by more than the threshold, or a number that has gone."""
        if self.worse is None:
            return self.before.value is not None and self.after.value is None
        return self.worse > 1 + threshold


def changes(before: Sequence[Row], after: Sequence[Row]) -> list[Change]:
    """The keys that both hold, but for ceilings, which are the machine's, and a CPU process's peak memory, which depends on what it ran
    before."""
    old = {row.key: row for row in before if row.provider != "ceiling" and not row.details.startswith(OF_THE_PROCESS)}
    found = []
    for row in after:
        past = old.get(row.key)
        if past is None:
            continue
        a, b = past.value, row.value
        found.append(Change(past, row, _ratio(b, a) if row.metric == "flops" else _ratio(a, b)))  # a rate: more is better
    return found


def _ratio(before: float | None, after: float | None) -> float | None:
    """How many times as large; None where a number is missing."""
    if before is None or after is None:
        return None
    if before == 0:  # what held no memory, say, holds some
        return 1.0 if after == 0 else float("inf")
    return after / before


def _line(change: Change) -> str:
    row = change.after
    where = f"{row.provider} {row.architecture} k={row.k} n={row.n} {row.direction} ({row.variant}) {row.precision} {row.metric}"
    if change.worse is None:
        return f"{where}: {change.before.median} -> none ({row.details})"
    return f"{where}: {change.before.median:g} -> {row.median:g} ({change.worse:.2f} of the cost)"


def main(arguments: Sequence[str]) -> int:
    """Print regressions, then gains; exit status 1 if there is a regression, 2 if the files cannot be compared."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks compare", description="what became slower, larger or wrong from A to B")
    parser.add_argument("a", type=Path, help="rows before")
    parser.add_argument("b", type=Path, help="rows after")
    parser.add_argument("--threshold", type=float, default=THRESHOLD, help="a regression is worse by more than this share (%(default)s)")
    options = parser.parse_args(list(arguments))
    try:
        before, after = read_rows(options.a), read_rows(options.b)
    except (OSError, ValueError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    both = changes(before, after)
    if not both:
        print("compare: the files have no row in common", file=sys.stderr)
        return 2
    devices = {row.device for row in (*before, *after) if row.device}
    if len(devices) > 1:
        print(f"different machines: {'; '.join(sorted(devices))}")
    regressions = [c for c in both if c.regressed(options.threshold)]
    gains = [c for c in both if c.worse is not None and c.worse < 1 / (1 + options.threshold)]
    for title, some in (("regressions", regressions), ("gains", gains)):
        print(f"{len(some)} {title} beyond {options.threshold:.0%}")
        for change in sorted(some, key=lambda c: c.worse or float("inf"), reverse=title == "regressions"):
            print(f"  {_line(change)}")
    gone = len({r.key for r in before if r.provider != "ceiling"} - {r.key for r in after})
    print(f"{len(both)} rows in both; {gone} of A are not in B")
    return 1 if regressions else 0
