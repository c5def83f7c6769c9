"""How objects show themselves in a notebook: as tables in plain HTML, in whatever colours the notebook has."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

ROWS = 8  # of a longer table, the first ones


def html_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], caption: str = "", total: int | None = None) -> str:
    """An HTML table; ``total`` rows are there where only the first are given."""
    head = "".join(f"<th>{escape(str(name))}</th>" for name in columns)
    lines = "".join(f"<tr>{''.join(f'<td>{escape(cell(value))}</td>' for value in row)}</tr>" for row in rows)
    more = f'<tr><td colspan="{len(columns)}">… {total - len(rows):,} more</td></tr>' if total is not None and total > len(rows) else ""
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{lines}{more}</tbody></table>"


def cell(value: Any) -> str:
    """A value as a reader wants it in a table."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1 or abs(value) >= 1e4 else f"{value:.4g}"
    return str(value)
