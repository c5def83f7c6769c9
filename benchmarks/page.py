"""One self-contained HTML page of a run: verdicts, log-log figures, a roofline, and every table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from wslfast.errors import WslfastError
from wslfast.files import write_text
from wslfast.page import drawing
from wslfast.page.html import document

from . import ceilings, tables
from .cases import architecture_of, needed_bytes, needed_flops
from .derived import Rows, by_device
from .providers import OURS
from .recording import GIVEN, RECOMPUTED, Row
from .tables import Table

# ours in blues and green, the published loss in vermilion; a provider looks the same in every figure
_COLORS = {
    "published": "#d55e00", "vmap": "#e69f00", "vmap-compiled": "#b8860b", "grouped": "#cc79a7", "unfold-bmm": "#7f3c8d",
    "loop": "#999999", "loop-channels-last": "#555555", "loop-cudagraph": "#000000",
    "wslfast-torch": "#0072b2", "wslfast-triton-layerwise": "#56b4e9", "wslfast-triton-network": "#009e73",
}  # fmt: skip
_MARKS = dict(zip(_COLORS, "osD^vPX*hd>", strict=True))
_LINES = ("-", "--", ":", "-.")


def _style(provider: str) -> dict[str, Any]:
    ours = provider in OURS
    look = {"color": _COLORS.get(provider, drawing.INK), "marker": _MARKS.get(provider, "."), "zorder": 4 if ours else 3}
    return {**look, "linewidth": 2.0 if ours else 1.1, "markersize": 6.5 if ours else 5}


def _plain_decades(axis: Any) -> None:
    """Labels of a log axis as plain numbers, large ones with their prefix."""

    def label(value: float, _: object) -> str:
        for size, letter in ((1e12, " T"), (1e9, " G"), (1e6, " M")):
            if value >= size:
                return f"{value / size:g}{letter}"
        return f"{value:g}"

    axis.set_major_formatter(label)


def _log_log(axes: Any, x: str, y: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(axis="both")
    _plain_decades(axes.xaxis)
    _plain_decades(axes.yaxis)


def _legend(figure: Any, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=min(4, len(labels)), fontsize=7.5)


def times(rows: Rows) -> str | None:
    """Milliseconds over k and over n, a line a provider and network, on log-log axes; None if nothing grows."""
    lines: dict[str, list[tuple[str, str, list[int], list[float]]]] = {"k": [], "n": []}
    timed = [r for r in rows.timed() if r.variant == GIVEN]
    for along, fixed in (("k", "n"), ("n", "k")):
        groups: dict[tuple[str, str, str, int], dict[int, float]] = {}
        for r in timed:
            groups.setdefault((r.provider, r.architecture, r.precision, getattr(r, fixed)), {})[getattr(r, along)] = r.value or 0.0
        for (provider, net, precision, at), found in groups.items():
            if len(found) >= 3:
                xs = sorted(found)
                lines[along].append((provider, f"{net} {precision} {fixed}={at}", xs, [found[x] for x in xs]))
    panels = {along: some for along, some in lines.items() if some}
    if not panels:
        return None
    with drawing.sheet(5.0) as (figure, svg):
        for axes, (along, some) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
            nets = list(dict.fromkeys(where for _, where, _, _ in some))
            for provider, where, xs, ys in some:
                dash = _LINES[nets.index(where) % len(_LINES)]
                axes.plot(xs, ys, label=f"{provider}: {where}", linestyle=dash, **_style(provider))
            xs, ys = max(some, key=lambda line: len(line[2]))[2:]
            linear = (ys[-1] * xs[0] / xs[-1], ys[-1])
            axes.plot((xs[0], xs[-1]), linear, color=drawing.RULE, linewidth=4, zorder=1, label="linear")
            _log_log(axes, "models k" if along == "k" else "queries n", "ms, loss and gradient")
            axes.set_title(f"Growth in {along}")
            axes.legend(fontsize=6.5)
        return svg()


def ratios(rows: Rows) -> str | None:
    """How many times as long as the fastest of ours, a panel a variant, a column a shape; None without peers."""
    panels: dict[str, dict[tuple[str, str], float]] = {}
    for row in rows.timed():
        best = rows.best(OURS, *row.key[1:4], row.variant, row.precision)
        if best and row.value and row.variant in (GIVEN, RECOMPUTED):
            shape = f"{row.architecture} {row.k}, {row.n}" + ("" if row.precision == "highest" else f" {row.precision}")
            panels.setdefault(row.variant, {})[row.provider, shape] = row.value / best[1]
    panels = {title: points for title, points in panels.items() if any(name not in OURS for name, _ in points)}
    if not panels:
        return None
    with drawing.sheet(3.3 * len(panels)) as (figure, svg):
        seen: dict[str, Any] = {}
        for axes, (title, points) in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels.items(), strict=True):
            peers = {shape for name, shape in points if name not in OURS}
            shapes = [s for s in dict.fromkeys(shape for _, shape in points) if s in peers]
            for name in dict.fromkeys(name for name, _ in points):
                xs = [i for i, shape in enumerate(shapes) if (name, shape) in points]
                (seen[name],) = axes.plot(xs, [points[name, shapes[i]] for i in xs], **{**_style(name), "linewidth": 0}, label=name)
            axes.set_yscale("log")
            _plain_decades(axes.yaxis)
            axes.axhline(1, color=drawing.SOFT, linewidth=0.8)
            axes.set_xticks(range(len(shapes)), shapes, rotation=35, ha="right", fontsize=7)
            axes.set_ylabel("times as long as ours")
            axes.set_title(title)
            axes.grid(axis="y")
        figure.legend(seen.values(), seen.keys(), loc="outside upper left", ncols=6, fontsize=7.5)
        return svg()


def roofline(rows: Rows) -> str | None:
    """Achieved FLOP/s over arithmetic intensity, under the ceilings of the same run; None without ceilings."""
    device = rows.all[0].device
    precisions = [p for p in dict.fromkeys(r.precision for r in rows.all) if ceilings.of(rows.all, p, device)[0]]
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows.all:
        if row.metric == "flops" and row.value and row.direction == "loss+gradient":
            architecture, again = architecture_of(row.architecture), row.variant == RECOMPUTED
            work = row.k * row.n * needed_flops(architecture, row.direction, again)
            points.setdefault(row.provider, []).append((work / needed_bytes(architecture, row.k, row.n, row.direction, again), row.value))
    if not precisions or not points:
        return None
    with drawing.sheet(4.6, width=8.4) as (figure, svg):
        axes = figure.subplots()
        for name, some in points.items():
            axes.plot([x for x, _ in some], [y for _, y in some], **{**_style(name), "linewidth": 0}, label=name)
        knees = [flops / bandwidth for flops, bandwidth in (ceilings.of(rows.all, p, device) for p in precisions) if flops and bandwidth]
        low = min(*knees, *(x for some in points.values() for x, _ in some)) / 4
        high = max(x for some in points.values() for x, _ in some) * 4
        for precision in precisions:
            flops, bandwidth = ceilings.of(rows.all, precision, device)
            if flops and bandwidth:
                knee = flops / bandwidth
                xs = [low, min(max(knee, low), high), high]
                axes.plot(xs, [min(flops, bandwidth * x) for x in xs], color=drawing.SOFT, linewidth=1)
                axes.text(high, flops, f" {precision}", color=drawing.SOFT, fontsize=7.5, va="bottom", ha="right")
        _log_log(axes, "needed FLOP a needed byte", "FLOP/s")
        _legend(figure, axes)
        return svg()


_FIGURES: dict[str, Callable[[Rows], str | None]] = {
    "Beside the others": ratios,
    "Growth": times,
    "Roofline: what the work that cannot be avoided reached, under what the machine gave": roofline,
}


def _table(table: Table) -> str:
    if not table.rows:
        return f"<section><h2>{escape(table.title)}</h2><p class='note'>{escape(table.caption)}</p></section>"

    def line(cells: Sequence[str], tag: str) -> str:
        words = [f"<th class=plain>{escape(c)}</th>" for c in cells[: table.words]]
        return "<tr>" + "".join([*words, *(f"<{tag}>{escape(c)}</{tag}>" for c in cells[table.words :])]) + "</tr>"

    head, body = line(table.header, "th"), "".join(line(row, "td") for row in table.rows)
    note = f"<p class='note'>{escape(table.caption)}</p>" if table.caption else ""
    cells = f"<table class='dense'><thead>{head}</thead><tbody>{body}</tbody></table>"
    return f"<section><h2>{escape(table.title)}</h2>{note}<div class='wide'>{cells}</div></section>"


def html(rows: Sequence[Row]) -> str:
    """The page for these rows."""
    sections = []
    for device, some in by_device(rows).items():
        sections.append(f"<section><p class='headline'>{escape(device)}</p><p class='note'>{escape(tables.machine(some))}</p></section>")
        verdicts, *rest = tables.everything(some)
        sections.append(_table(verdicts))
        try:
            drawing.require_matplotlib()
            drawn = {title: draw(some) for title, draw in _FIGURES.items()}
        except WslfastError as error:
            drawn = {str(error): ""}
        sections += [f"<section><h2>{escape(t)}</h2><figure>{svg}</figure></section>" for t, svg in drawn.items() if svg is not None]
        sections += [_table(table) for table in rest]
    sections.append("<section><h2>Method</h2>" + "".join(f"<p class='note'>{escape(text)}</p>" for text in tables.METHOD) + "</section>")
    facts = {"rows": str(len(rows)), "commits": _all(r.commit for r in rows), "dates": _all(r.date for r in rows)}
    headline = "Loss and gradient of many small networks: times side by side"
    return document("wslfast: benchmarks", "Benchmarks", headline, "\n".join(sections), facts)


def _all(values: Iterable[str]) -> str:
    return ", ".join(sorted(set(values)))


def write_page(rows: Sequence[Row], path: Path) -> Path:
    """Write the page; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, html(rows))
    return path
