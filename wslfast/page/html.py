"""The document around a page's sections: one HTML file that loads nothing."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

CSS = """
:root { color-scheme: light; --ink: #222; --soft: #666; --rule: #ddd; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue",
  Arial, "DejaVu Sans", sans-serif; }
main, footer { max-width: 1160px; margin: 0 auto; padding: 0 32px; }
h1 { font-size: 17px; font-weight: 600; color: var(--soft); margin: 44px 0 10px; }
.headline { font-size: 27px; line-height: 1.32; font-weight: 600; letter-spacing: -.01em; max-width: 34em; margin: 0 0 8px;
  text-wrap: pretty; }
section { margin: 44px 0; }
h2 { font-size: 18px; margin: 0 0 12px; }
figure { margin: 0; }
figure.narrow { max-width: 800px; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, "DejaVu Sans", sans-serif !important; }
figcaption, .note { color: var(--soft); font-size: 14px; max-width: 52em; margin: 10px 0 0; }
.note b { font-weight: 600; color: var(--ink); }
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
table.dense { font-size: 13px; width: auto; }
table.dense th, table.dense td { padding: 3px 0 3px 22px; }
table.dense th:first-child { padding-left: 0; }
th.plain { text-align: left; font-weight: 400; }
summary { cursor: pointer; color: var(--soft); font-size: 14px; }
footer { border-top: 1px solid var(--rule); margin-top: 56px; padding-top: 20px; padding-bottom: 48px; }
footer dl { display: grid; grid-template-columns: max-content 1fr; gap: 3px 20px; margin: 0; font-size: 13px; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
@media print { section { break-inside: avoid; } }
"""


def document(title: str, headline: str, body: str, facts: Mapping[str, str], css: str = CSS) -> str:
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
<style>{css}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
<p class="headline">{escape(headline)}</p>
{body}
</main>
<footer><dl>{rows}</dl></footer>
</body>
</html>
"""
