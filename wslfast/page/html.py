"""The pieces of a page: numbers, cells, tables, figures, sections, and the document around them, which loads nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

DASH = "–"
CSS = """
:root { color-scheme: light dark; --paper: #fff; --ink: #222; --soft: #666; --rule: #ddd; --tint: #f6f3ea; --good: #00724f;
  --bad: #b34700; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", Arial, "DejaVu Sans", sans-serif; }
main, footer { max-width: 1160px; margin: 0 auto; padding: 0 32px; }
.topic { font-size: 17px; font-weight: 600; color: var(--soft); margin: 44px 0 10px; }
h1 { font-size: 27px; line-height: 1.32; font-weight: 600; letter-spacing: -.01em; max-width: 34em; margin: 0 0 8px;
  text-wrap: pretty; overflow-wrap: anywhere; }
section { margin: 44px 0; }
section > p { max-width: 52em; }
h2 { font-size: 22px; margin: 60px 0 6px; }
h3 { font-size: 16px; margin: 30px 0 8px; }
h4 { font-size: 13px; font-weight: 600; color: var(--soft); margin: 22px 0 4px; }
figure { margin: 24px 0 0; }
figure.narrow { max-width: 800px; }
h3 + figure, h3 + .wide { margin-top: 0; }
.note + .wide, figure + .wide { margin-top: 24px; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, "DejaVu Sans", sans-serif !important; }
.lead { color: var(--soft); max-width: 52em; margin: 0 0 14px; }
figcaption, .note { color: var(--soft); font-size: 14px; max-width: 52em; margin: 10px 0 0; }
.note b { font-weight: 600; color: var(--ink); }
.pair { display: flex; flex-wrap: wrap; gap: 0 56px; }
.pair > div { min-width: 0; max-width: 100%; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { text-align: right; vertical-align: top; padding: 9px 0 9px 14px; white-space: nowrap; }
th:first-child { text-align: left; padding-left: 0; }
thead th { font-weight: 600; font-size: 13px; border-bottom: 1.5px solid var(--ink); vertical-align: bottom; white-space: normal; }
tbody tr { border-bottom: 1px solid var(--rule); }
tbody th { font-weight: 600; }
small { display: block; font-size: 11.5px; font-weight: 400; color: var(--soft); }
tbody th small { white-space: normal; max-width: 17em; padding-left: 18px; }
th i { display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 8px; }
table.plain, table.dense { width: auto; font-size: 13.5px; }
table.plain th, table.plain td { padding: 5px 0 5px 20px; }
table.dense th, table.dense td { padding: 3px 0 3px 22px; }
table.plain th:first-child, table.dense th:first-child { padding-left: 0; }
th.plain { text-align: left; font-weight: 400; }
.data { font-size: 14px; }
.data th, .data td, td.left { text-align: left; }
.data td, .data th, .goals td, td.left { white-space: normal; }
.goals td { max-width: 230px; } .goals tbody th small { max-width: 24em; }
table td.paper, table th.paper { background: var(--tint); padding-right: 12px; }
table.plain td.paper:last-child, table.plain th.paper:last-child { padding-right: 14px; }
td:not(.paper) + td.paper, th:not(.paper) + th.paper { border-left: 16px solid var(--paper); }
thead th.over { text-align: center; border-bottom: 0; padding-bottom: 0; color: var(--soft); font-weight: 400; }
tr.group th { font-size: 12px; color: var(--soft); font-weight: 600; padding-top: 16px; }
tr.group { border-bottom: 0; }
.met { color: var(--good); font-weight: 600; } .missed { color: var(--bad); font-weight: 600; }
.stamp { display: inline-block; background: var(--tint); padding: 0 6px; }
footer { border-top: 1px solid var(--rule); margin-top: 56px; padding-top: 20px; padding-bottom: 48px; }
footer dl { display: grid; grid-template-columns: max-content 1fr; gap: 3px 20px; margin: 0; font-size: 13px; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
h2, h3, h4 { overflow-wrap: anywhere; }
@media (max-width: 700px) {
  main, footer { padding: 0 16px; }
  h1 { font-size: 21px; }
  h2 { margin-top: 44px; }
  figure svg { width: 760px; }
  tbody th { white-space: normal; min-width: 7em; max-width: 11em; overflow-wrap: break-word; }
  .data td, .goals td { min-width: 9em; }
  footer dl { display: block; }
  dd { margin-bottom: 8px; }
}
@media (prefers-color-scheme: dark) {
  :root { --paper: #16181b; --ink: #e6e6e6; --soft: #a3a8ad; --rule: #34383d; --tint: #26241c; --good: #4cc79b; --bad: #f0935a; }
  figure svg, th i { filter: invert(.9) hue-rotate(180deg); }
}
@media print { section { break-inside: avoid; } }
"""


def worth(measure: str, value: float | None) -> str:
    """A value of the metric that variants are ranked by, with its unit: 58.3 %, or 31.2 dB."""
    return f"{number(value, 1)} dB" if measure == "psnr" else f"{percent(value)} %"


def number(value: float | None, digits: int | None = None) -> str:
    """With a minus sign that is one; a dash for what is not known. Two decimals, one from 10 on, unless ``digits`` says otherwise."""
    if value is None or not math.isfinite(value):
        return DASH
    places = digits if digits is not None else 2 if abs(value) < 9.95 else 1
    text = f"{value:,.{places}f}"
    return (text.lstrip("-") if not text.strip("-0.") else text).replace("-", "−")


def percent(value: float | None, *, signed: bool = False) -> str:
    if value is None or not math.isfinite(value):
        return DASH
    text = f"{100 * value:{'+' if signed else ''}.1f}"
    return (text.lstrip("+-") if float(text) == 0 else text).replace("-", "−")


def plus_minus(spread: float | None, shown: Callable[..., str]) -> str:
    """A spread as small print; empty for none."""
    return f"± {shown(spread)}" if spread is not None else ""


def cell(value: str, small: str = "", kind: str = "") -> str:
    attribute = f' class="{kind}"' if kind else ""
    return f"<td{attribute}>{value}{f'<small>{small}</small>' if small else ''}</td>"


def headings(text: str) -> list[tuple[str, str]]:
    """Names and units for :func:`head`, as in ``"Variant; Agreement: %"``."""
    return [(name, unit) for name, _, unit in (part.partition(": ") for part in text.split("; "))]


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
    """A figure and what it shows; nothing for a figure that has nothing to show."""
    kind = ' class="narrow"' if narrow else ""
    return f'<figure{kind}><div class="wide">{svg}</div><figcaption>{escape(caption)}</figcaption></figure>' if svg else ""


def section(heading: str, *parts: str, lead: str = "") -> str:
    """A section of the parts that are not empty, or nothing."""
    filled = [p for p in parts if p]
    if not filled:
        return ""
    opening = f'<p class="lead">{lead}</p>' if lead else ""
    return f"<section><h2>{escape(heading)}</h2>{opening}{''.join(filled)}</section>"


def document(title: str, topic: str, headline: str, body: str, facts: Mapping[str, str]) -> str:
    """The whole page; ``body`` is HTML, everything else is text. ``facts`` make the footer."""
    rows = "".join(f"<dt>{escape(str(k))}</dt><dd>{escape(str(v))}</dd>" for k, v in facts.items())
    # the policy makes "loads nothing" a fact that the browser enforces
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{CSS}</style>
</head>
<body>
<main>
<p class="topic">{escape(topic)}</p>
<h1>{escape(headline)}</h1>
{body}
</main>
<footer><dl>{rows}</dl></footer>
</body>
</html>
"""
