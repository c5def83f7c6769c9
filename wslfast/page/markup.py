"""Pieces of HTML: numbers, cells, tables, sections."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from html import escape

from ..measure.results import Results
from .html import CSS as _BASE

DASH = "–"

CSS = (
    _BASE
    + """
section > p { max-width: 52em; }
h2 { font-size: 22px; margin: 60px 0 6px; }
h3 { font-size: 16px; margin: 30px 0 8px; }
h4 { font-size: 13px; font-weight: 600; color: var(--soft); margin: 22px 0 4px; }
h3 + figure, h3 + .wide { margin-top: 0; }
figure, .note + .wide, figure + .wide { margin-top: 24px; }
.pair { display: flex; flex-wrap: wrap; gap: 0 56px; }
.lead { color: var(--soft); max-width: 52em; margin: 0 0 14px; }
.data { font-size: 14px; }
.data td, .data th, .goals td { white-space: normal; }
.goals td { max-width: 230px; } .goals tbody th small { max-width: 24em; }
table.plain { width: auto; font-size: 13.5px; }
table.plain th, table.plain td { padding: 5px 0 5px 20px; }
table.plain th:first-child { padding-left: 0; }
table td.paper, table th.paper { background: #f6f3ea; padding-right: 12px; }
table.plain td.paper:last-child, table.plain th.paper:last-child { padding-right: 14px; }
td:not(.paper) + td.paper, th:not(.paper) + th.paper { border-left: 16px solid #fff; }
thead th.over { text-align: center; border-bottom: 0; padding-bottom: 0; color: var(--soft); font-weight: 400; }
.data th, .data td { text-align: left; }
tr.group th { font-size: 12px; color: var(--soft); font-weight: 600; padding-top: 16px; }
tr.group { border-bottom: 0; }
td.best { font-weight: 700; }
.met { color: #00724f; font-weight: 600; } .missed { color: #b34700; font-weight: 600; }
.stamp { display: inline-block; background: #f6f3ea; padding: 0 6px; }
td.left { text-align: left; white-space: normal; }
"""
)


def number(value: float | None, digits: int | None = None) -> str:
    """With a minus sign that is one; a dash for what is not known. Two decimals, one from 10 on, unless ``digits`` says otherwise."""
    if value is None or not math.isfinite(value):
        return DASH
    places = digits if digits is not None else 2 if abs(value) < 9.95 else 1
    text = f"{value:,.{places}f}"
    return (text.lstrip("-") if not text.strip("-0.") else text).replace("-", "−")


def percent(value: float | None, *, signed: bool = False, digits: int = 1) -> str:
    if value is None or not math.isfinite(value):
        return DASH
    text = f"{100 * value:{'+' if signed else ''}.{digits}f}"
    return (text.lstrip("+-") if float(text) == 0 else text).replace("-", "−")


def over_seeds(results: Results, zoo: str, variant: str, metric: str, column: str = "mean") -> tuple[float | None, float | None, int]:
    """Mean and standard deviation (None for one seed) over seeds of a metric, and how many seeds have it."""
    values = results.value(zoo, variant, metric, column)
    if not values:
        return None, None, 0
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values)


def cell(value: str, small: str = "", kind: str = "") -> str:
    attribute = f' class="{kind}"' if kind else ""
    return f"<td{attribute}>{value}{f'<small>{small}</small>' if small else ''}</td>"


def head(names: Sequence[tuple[str, str]], kinds: Mapping[int, str] | None = None) -> str:
    """A header row: names, and units in small print."""
    cells = []
    for i, (name, unit) in enumerate(names):
        kind = f' class="{kinds[i]}"' if kinds and i in kinds else ""
        cells.append(f'<th scope="col"{kind}>{escape(name)}{f"<small>{escape(unit)}</small>" if unit else ""}</th>')
    return f"<tr>{''.join(cells)}</tr>"


def row_head(name: str, color: str | None = None, small: str = "") -> str:
    dot = f'<i style="background:{color}"></i>' if color else ""
    return f'<th scope="row">{dot}{escape(name)}{f"<small>{escape(small)}</small>" if small else ""}</th>'


def table(header: str, rows: Sequence[str], kind: str = "") -> str:
    attribute = f' class="{kind}"' if kind else ""
    return f'<div class="wide"><table{attribute}><thead>{header}</thead><tbody>{"".join(rows)}</tbody></table></div>'


def beside(*titled: tuple[str, str]) -> str:
    """Small tables under their titles, next to one another where there is room."""
    return f'<div class="pair">{"".join(f"<div><h4>{escape(title)}</h4>{body}</div>" for title, body in titled)}</div>'


def note(text: str) -> str:
    """Small print under a table; ``text`` is HTML."""
    return f'<p class="note">{text}</p>'


def figure(svg: str, caption: str, narrow: bool = False) -> str:
    kind = ' class="narrow"' if narrow else ""
    return f"<figure{kind}>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def section(heading: str, *parts: str, lead: str = "") -> str:
    """A section of the parts that are not empty, or nothing."""
    kept = [p for p in parts if p]
    if not kept:
        return ""
    opening = f'<p class="lead">{lead}</p>' if lead else ""
    return f"<section><h2>{escape(heading)}</h2>{opening}{''.join(kept)}</section>"
