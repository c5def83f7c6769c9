"""Rows as tables for people, of the README and of the page: every number comes from a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from . import derived
from .cases import WIDTHS, architecture_of, needed_flops
from .derived import Rows
from .losses import FORWARD
from .recording import GIVEN, RECOMPUTED, Row, digits

STEP = "A whole training step"
METHOD = (
    "Every provider is one function that computes the same loss and gradient from the same tensors (`benchmarks/providers.py`). "
    "Before it is timed, its losses and gradient of the first, the middle and the last model are compared with a float64 loop "
    "(`wslfast.testing`); the larger relative L2 error is the column *error*, and above the bound of its precision "
    "(`benchmarks/gate.py`) there is no number.",
    "On a CPU the providers take turns in one process, with fresh weights and queries at every round; the clock is the host's "
    "(`wall_ms`). On a GPU cells run one after another in a worker process, which a fault costs its cell and not the run. Three clocks "
    "there, the L2 cache overwritten before each call: CUDA events (`gpu_ms`, which tables compare by), the replay of the call "
    "captured as a CUDA graph (`graph_ms`), the host's clock around a call and a synchronisation (`wall_ms`).",
    "Numbers are the median, with the 20th and 80th percentile. FLOP/s count the operations that no method can avoid (pixels that "
    "no output depends on are left out, a recomputed target's forward pass is counted) and stand beside the rate of a large matrix "
    "product and of a large copy, measured in the same run. Peak memory is what a call needs above its arguments: torch's allocator on "
    "a GPU, the process's resident memory on a CPU (memory that was freed before and is used again does not show).",
)


@dataclass(frozen=True)
class Table:
    """A title, a sentence, and cells; numbers begin after the ``words`` first columns."""

    title: str
    caption: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    words: int = 1


def plain(table: Table) -> str:
    """Fixed-width text."""
    lines = [table.header, *table.rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.header))]
    texts = ("  ".join(c.ljust(w) if i < table.words else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))) for line in lines)
    return "\n".join([table.title, *(text.rstrip() for text in texts)])


def number(value: float | None) -> str:
    """Three digits, no exponent for what fits a column."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{digits(value, 3):g}"


def _between(row: Row) -> str:
    return f"{number(row.p20)} to {number(row.p80)}" if isinstance(row.p20, float) and isinstance(row.p80, float) else ""


def bars(rows: Rows) -> Table:
    lines = [
        (
            b.what,
            f"{'at most ' if b.at_most else ''}{number(b.bar)} {b.unit}",
            f"{number(b.moonshot)} {b.unit}",
            f"{number(b.obtained)} {b.unit}" if b.obtained is not None else "",
            b.verdict,
            b.detail,
        )
        for b in derived.bars(rows)
    ]
    return Table("Bars", "What the project holds itself to.", ("", "bar", "moonshot", "obtained", "", "with"), lines)


def peers(rows: Rows) -> Table:
    lines = [
        (f"{p.architecture} k={p.k} n={p.n}", f"{p.variant}, {p.precision}", p.provider, f"{ratio:.2f}")
        for p, _, ratio in derived.peers_ahead(rows)
    ]
    caption = (
        "Shapes at which somebody else is faster than the fastest of ours, and how many times."
        if lines
        else ("At no shape measured here is another provider faster than the fastest of ours.")
    )
    return Table("Where a peer wins", caption, ("shape", "what", "fastest", "times faster"), lines, 3)


def growth(rows: Rows) -> Table:
    """Time per (model, query) pair over k, n and width, of each suite for itself."""
    lines: list[tuple[str, ...]] = []
    for suite in rows.suites:
        timed = [r for r in rows.timed(suite=suite) if r.variant == GIVEN]
        lines += [*_growth_in_size(timed), *_growth_in_width(timed)]
    return Table(
        "Growth",
        "Time per pair of a model and a query, over that of the first point: 1 is linear growth.",
        ("provider", "", "over"),
        lines,
        3,
    )


def _growth_in_size(timed: Sequence[Row]) -> list[tuple[str, ...]]:
    """Time per pair over k and over n, wherever four points or more share the rest."""
    lines: list[tuple[str, ...]] = []
    for provider, net, precision in sorted({(r.provider, r.architecture, r.precision) for r in timed}):
        mine = [r for r in timed if (r.provider, r.architecture, r.precision) == (provider, net, precision)]
        for along, fixed in (("k", "n"), ("n", "k")):
            for at in sorted({getattr(r, fixed) for r in mine}):
                line = sorted((r for r in mine if getattr(r, fixed) == at), key=lambda r: getattr(r, along))
                if len(line) >= 4:
                    base = line[0].value / line[0].k / line[0].n  # type: ignore[operator]
                    text = ", ".join(f"{getattr(r, along)}: {r.value / r.k / r.n / base:.2f}" for r in line)  # type: ignore[operator]
                    lines.append((provider, f"{net} {precision}, {fixed}={at}", f"{along} = {text}"))
    return lines


def _growth_in_width(timed: Sequence[Row]) -> list[tuple[str, ...]]:
    """Time per pair over the channels' multiple, and how many times the operations grew."""
    lines: list[tuple[str, ...]] = []
    wide = [r for r in timed if r.architecture in WIDTHS]
    for provider, k, n, precision in sorted({(r.provider, r.k, r.n, r.precision) for r in wide}):
        same = [r for r in wide if (r.provider, r.k, r.n, r.precision) == (provider, k, n, precision)]
        mine = {r.architecture: r.value for r in same if r.value}
        first = next((net for net in WIDTHS if net in mine), "")
        if len(mine) >= 2:
            work = {net: needed_flops(architecture_of(net), "loss+gradient") for net in WIDTHS}
            texts = (
                f"{net}: {mine[net] / mine[first]:.2f} ({work[net] / work[first]:.1f} times the operations)"
                for net in WIDTHS
                if net in mine
            )
            lines.append((provider, f"{precision}, k={k}, n={n}", f"width = {', '.join(texts)}"))
    return lines


def losses(rows: Rows, direction: str) -> list[Table]:
    """One table a shape and precision: providers, the fastest first."""
    shapes: dict[tuple[str, int, int, str], list[Row]] = {}
    for row in rows.all:
        if row.metric == rows.clock and row.direction == direction and row.variant in (GIVEN, RECOMPUTED, FORWARD):
            shapes.setdefault((row.architecture, row.k, row.n, row.precision), []).append(row)
    tables = []
    for (net, k, n, precision), some in shapes.items():
        if len({r.provider for r in some}) < 3:
            continue  # growth has a table of its own
        lines = []
        for row in sorted(some, key=lambda r: (r.variant, r.value is None, r.value or 0.0)):
            ratio, rate = derived.against(rows, row), derived.rates(rows, row)
            lines.append(
                (
                    row.provider,
                    row.variant,
                    number(row.value) if row.value is not None else row.details,
                    _between(row),
                    number(ratio),
                    f"{row.relative_error:.1e}" if isinstance(row.relative_error, float) else "",
                    number(rate.value / 1e9) if rate and rate.value else "",
                    *_more(rows, row),
                )
            )
        header = (
            "provider",
            "",
            "ms",
            "p20 to p80",
            "x ours",
            "error",
            "GFLOP/s",
            "peak MB",
            *(("graph ms", "wall ms", "launches") if rows.cuda else ()),
        )
        tables.append(Table(f"{direction}: {net}, k={k}, n={n}, {precision}", "", header, lines, 2))
    return tables


def _more(rows: Rows, row: Row) -> tuple[str, ...]:
    names = ("peak_mb", *(("graph_ms", "wall_ms", "launches") if rows.cuda else ()))
    where = (row.provider, row.architecture, row.k, row.n, row.variant, row.precision, row.direction)
    return tuple(number(rows.get(*where, metric=name)) for name in names)


def others(rows: Rows) -> list[Table]:
    """Ceilings, the training step, zoo building, tokens: those of which there are rows."""
    tables = []
    ceilings = [
        (r.variant, r.precision, f"{number((r.value or 0.0) / 1e9)} GFLOP/s" if r.metric == "flops" else r.details.partition(";")[0])
        for r in rows.all
        if r.provider == "ceiling" and r.value is not None
    ]
    tables.append(Table("Ceilings", "What this machine gave in the same run.", ("", "precision", "rate"), ceilings, 2))
    step = [
        (f"{r.architecture} k={r.k} n={r.n}", r.variant, f"{number(r.value)} {'ms' if 'ms' in r.metric else 'MB'}", r.details)
        for r in derived.whole_steps(rows)
    ]
    tables.append(Table(STEP, "", ("", "phase", "", ""), step, 2))
    zoo = [(r.architecture, r.provider, str(r.k), number(r.value), _between(r), r.details) for r in rows.all if r.direction == "zoo"]
    header: tuple[str, ...] = ("", "provider", "models", "ms", "p20 to p80", "")
    tables.append(Table("Zoo building", "Milliseconds a model and training step.", header, zoo, 2))
    coding = [
        (f"{r.architecture}, {r.k} models", r.variant, r.provider, number(r.value), _between(r))
        for r in rows.all
        if r.direction == "forward" and "token" in r.variant
    ]
    tables.append(Table("Tokens", "", ("", "direction", "provider", "ms", "p20 to p80"), coding, 3))
    return [table for table in tables if table.rows]


def everything(rows: Rows) -> list[Table]:
    """All tables of a device, the verdicts first, where any of them was measured."""
    verdicts = [bars(rows)] if any(bar.obtained is not None for bar in derived.bars(rows)) else []
    return [*verdicts, peers(rows), growth(rows), *losses(rows, "loss+gradient"), *losses(rows, "forward"), *others(rows)]


def machine(rows: Rows) -> str:
    """What the rows were measured on, in a line."""
    columns = {"driver": "driver", "torch": "torch", "triton": "triton", "Python": "python", "commit": "commit"}
    parts = [rows.all[0].device]
    for word, column in columns.items():  # rows of several sittings may differ in any of them
        found = sorted({getattr(row, column) for row in rows.all if getattr(row, column)})
        parts += [f"{word} {', '.join(found)}"] if found else []
    dates = sorted({r.date for r in rows.all})
    return "; ".join([*parts, " to ".join(dict.fromkeys((dates[0], dates[-1])))])
