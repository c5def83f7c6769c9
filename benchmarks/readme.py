"""``README.md`` from the tracked rows: ``python -m benchmarks readme`` writes it, ``--check`` says whether it is what would be written."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from . import tables
from .derived import by_device
from .recording import DATA, ROOT, Row, read_rows
from .tables import Table

PATH = ROOT / "benchmarks" / "README.md"
_HEAD = """# Benchmarks

wslfast side by side with what one would use instead. From a checkout, on your own machine:

```sh
python -m benchmarks --suite quick           # a minute; rows, a table, and a page with figures in runs/benchmarks
python -m benchmarks --suite cpu             # about ten minutes; --only SECTION takes one section again
python -m benchmarks --suite networks        # 44 networks of the field, zoos of four of them; --only NETWORK takes one
python -m benchmarks --suite gpu             # everything, hours; make gpu takes the core of it in ten minutes
pytest benchmarks/ --benchmark-only          # the same providers under pytest-benchmark
python -m benchmarks compare A.csv B.csv     # what became slower; exit status 1 if something did
python benchmarks/launch_overhead.py         # what an empty launch costs
```

This page is written by `python -m benchmarks readme` from the rows in `benchmarks/data/`; no number in it is typed by hand.

## Method
"""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _markdown(table: Table) -> str:
    if not table.rows:
        return f"### {table.title}\n\n{table.caption}\n"
    lines = [f"### {table.title}", ""] + ([table.caption, ""] if table.caption else [])
    lines.append("| " + " | ".join(map(_cell, table.header)) + " |")
    lines.append("|" + "|".join("---" if i < table.words else "---:" for i in range(len(table.header))) + "|")
    lines += ["| " + " | ".join(map(_cell, row)) + " |" for row in table.rows]
    return "\n".join(lines) + "\n"


def text(*suites: Sequence[Row]) -> str:
    """The page for the rows of these suites."""
    parts = [_HEAD, "\n\n".join(tables.METHOD) + "\n"]
    devices = by_device(*suites)
    if not any(some.cuda for some in devices.values()):
        parts.append("No rows of a GPU are tracked yet: nothing here speaks of one.\n")
    for device, some in devices.items():
        parts.append(f"## {device}\n\n{tables.machine(some)}\n")
        parts += [_markdown(table) for table in tables.everything(some)]
    return "\n".join(parts)


def tracked() -> list[list[Row]]:
    """All rows of ``benchmarks/data``, those of each suite for itself: it has a file."""
    return [read_rows(path) for path in sorted(DATA.glob("*.csv"))]


def main(arguments: Sequence[str]) -> int:
    """Write README.md, or check it; exit status 1 if the check fails."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks readme", description="README.md from the tracked rows")
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if the page is stale")
    options = parser.parse_args(list(arguments))
    wanted = text(*tracked())
    if options.check:
        fresh = PATH.exists() and PATH.read_text() == wanted
        print(f"{PATH.name} is {'fresh' if fresh else 'stale: python -m benchmarks readme'}")
        return 0 if fresh else 1
    PATH.write_text(wanted)
    print(PATH)
    return 0
