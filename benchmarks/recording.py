"""Rows of a benchmark: what one holds, what it was measured on, and the CSV in which it ends up."""

from __future__ import annotations

import csv
import datetime
import io
import platform
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Union

import torch

from wslfast.files import write_text
from wslfast.profiling import processor

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "benchmarks" / "data"
METRICS = ("gpu_ms", "graph_ms", "wall_ms", "peak_mb", "launches", "flops")
GIVEN, RECOMPUTED = "targets given", "targets recomputed"
Number = Union[float, str]  # "" where there is none


@dataclass(frozen=True)
class Row:
    """One measured number. The field order is the header of ``data/*.csv``.

    ``flops`` is a rate (multiply-adds count twice), ``peak_mb`` is in 10^6 bytes. ``note`` begins with the variant, up to the first
    semicolon: whether targets were given or recomputed, which phase of a step, which ceiling.
    """

    provider: str
    architecture: str
    k: int
    n: int
    direction: str
    precision: str
    metric: str
    median: Number = ""
    p20: Number = ""
    p80: Number = ""
    relative_error: Number = ""
    device: str = ""
    driver: str = ""
    torch: str = ""
    triton: str = ""
    python: str = ""
    commit: str = ""
    date: str = ""
    note: str = ""

    @property
    def variant(self) -> str:
        """What distinguishes rows whose other columns agree."""
        return self.note.partition(";")[0].strip()

    @property
    def details(self) -> str:
        """The rest of the note."""
        return self.note.partition(";")[2].strip()

    @property
    def key(self) -> tuple[Any, ...]:
        """Two rows with the same key measure the same thing (perhaps on two machines)."""
        return (self.provider, self.architecture, self.k, self.n, self.direction, self.precision, self.metric, self.variant)

    @property
    def value(self) -> float | None:
        """The median, or None where the row says why there is none."""
        return self.median if isinstance(self.median, float) else None


HEADER = [f.name for f in fields(Row)]
_NUMBERS = ("median", "p20", "p80", "relative_error")


def _first_line(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else ""


def _processor() -> str:
    """Its name, and the widest instructions that it has for these products."""
    flags = set(Path("/proc/cpuinfo").read_text().split()) if Path("/proc/cpuinfo").exists() else set()
    return " ".join([processor(), *[flag for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if flag in flags][:1]])


@lru_cache(maxsize=2)
def environment(cuda: bool = False) -> dict[str, str]:
    """The columns from ``device`` to ``date``."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        triton = version("triton")
    except PackageNotFoundError:
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


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile, four digits each."""
    at = torch.tensor(sorted(values), dtype=torch.float64).quantile(torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64))
    median, low, high = (digits(v) for v in at.tolist())
    return median, low, high


def digits(value: float, count: int = 4) -> float:
    """``value`` to so many significant digits."""
    return float(f"{value:.{count}g}")


def with_values(row: Row, values: Sequence[float], note: str) -> Row:
    """The row with the quantiles of ``values``; ``note`` begins with the variant."""
    median, low, high = quantiles(values)
    return replace(row, median=median, p20=low, p80=high, note=f"{note}; {len(values)} repeats")


def write_rows(rows: Iterable[Row], path: Path) -> None:
    """Write a CSV of exactly these rows, with Unix line ends, whole or not at all."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HEADER)
    writer.writerows([[getattr(row, name) for name in HEADER] for row in rows])
    write_text(path, text.getvalue())


def read_rows(path: Path) -> list[Row]:
    """The rows of a CSV. Raises ValueError if its header is another."""
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.reader(file)
        header = next(reader, [])
        if header != HEADER:
            raise ValueError(f"{path}: expected the header {','.join(HEADER)}, got {','.join(header)}")
        return [parse(dict(zip(HEADER, record, strict=True))) for record in reader]


def parse(record: dict[str, Any]) -> Row:
    """A row from text or JSON."""
    numbers = {name: "" if record[name] == "" else float(record[name]) for name in _NUMBERS}
    return Row(**{**record, **numbers, "k": int(record["k"]), "n": int(record["n"])})


def as_record(row: Row) -> dict[str, Any]:
    """What :func:`parse` reads back."""
    return asdict(row)


def merge(path: Path, rows: Sequence[Row]) -> None:
    """Put rows into a CSV: they replace those of the same key, which keep their place; the others stay as they are."""
    known = read_rows(path) if path.exists() else []
    place = {row.key: i for i, row in enumerate(known)}
    for row in rows:
        if row.key in place:
            known[place[row.key]] = row
        else:
            place[row.key] = len(known)
            known.append(row)
    write_rows(known, path)


_COLUMNS = ("provider", "architecture", "k", "n", "direction", "precision", "metric", "median", "p20", "p80", "relative_error", "note")


def cells(row: Row) -> list[str]:
    """A row's columns that a reader of the screen wants, as text."""
    return [f"{v:.4g}" if isinstance(v, float) else str(v) for v in (getattr(row, name) for name in _COLUMNS)]


def plain_table(rows: Sequence[Row]) -> str:
    """The rows as fixed-width text."""
    lines = [list(_COLUMNS), *map(cells, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(_COLUMNS))]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip() for line in lines)


def show(rows: Sequence[Row]) -> None:
    """Print the rows: with rich where it is installed."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(plain_table(rows))
        return
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, width=240)  # a file's lines are not wrapped
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in _COLUMNS:
        numeric = name in ("k", "n", *_NUMBERS)
        table.add_column(name, justify="right" if numeric else "left", no_wrap=name != "note")
    for row in rows:
        table.add_row(*cells(row), style=None if row.value is not None else "dim")
    console.print(table)
