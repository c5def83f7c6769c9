"""Rows of figures as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import write_text

Row = dict[str, Any]


def write_rows(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a table, atomically; floats to six digits, None as an empty cell."""
    text = io.StringIO()
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writeheader()
    table.writerows({c: f"{v:.6g}" if isinstance(v, float) else "" if v is None else v for c, v in row.items()} for row in rows)
    write_text(path, text.getvalue())
