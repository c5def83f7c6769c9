"""What figures are made with: a sheet in one style, its SVG, and plots that know nothing of results.

Needs matplotlib, which is imported when it is drawn with.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import WslfastError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, SOFT, RULE, ORIGINAL = "#222222", "#666666", "#d9d9d9", "#b3b3b3"
_MARKERS = "osD^vPX*"
_WIDTH = 10.6  # inches; the page scales a figure to its column
RASTER = 3_000  # points beyond which a scatter is a bitmap inside the SVG
_PARTS = {"loss": "total loss", "structural": "structural loss", "behavioral": "behavioral loss", "contrastive": "contrastive loss"}

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text, in the page's own face
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "svg.hashsalt": "wslfast",  # same data, same bytes
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "text.color": INK,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "grid.color": "#ececec",
    "grid.linewidth": 0.7,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


def require_matplotlib() -> None:
    """Raise WslfastError, saying what to install, if figures cannot be drawn."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise WslfastError(f"the page's figures need matplotlib: pip install 'wslfast[plot]' ({error})") from error


_pictures: ContextVar[dict[str, bytes] | None] = ContextVar("pictures", default=None)


@contextmanager
def collected() -> Iterator[dict[str, bytes]]:
    """The figures that are drawn in the block, as PNG by name; their SVG is left empty."""
    pictures: dict[str, bytes] = {}
    token = _pictures.set(pictures)
    try:
        yield pictures
    finally:
        _pictures.reset(token)


@contextmanager
def sheet(height: float, width: float = _WIDTH, *, name: str = "figure") -> Iterator[tuple[Figure, Callable[[], str]]]:
    """A figure in the house style, and what turns it into SVG. No pyplot: nothing global, no backend, no window."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(wspace=0.05, hspace=0.06))
        yield figure, lambda: _drawn(figure, name)


def _drawn(figure: Figure, name: str) -> str:
    pictures = _pictures.get()
    if pictures is None:
        return to_svg(figure)
    pictures[name] = to_png(figure)
    return "<svg></svg>"


def to_png(figure: Figure, dpi: int = 110) -> bytes:
    """The figure as a PNG on white; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def to_svg(figure: Figure) -> str:
    """The figure as an SVG element for inside HTML; the same figure gives the same text."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, dpi=160)
    svg = buffer.getvalue()
    # inside HTML the prolog and metadata are noise, and the namespaces are implied
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'\s(xmlns(:xlink)?)="[^"]*"', "", svg, count=2)
    # every figure calls its parts axes_1 and so on; in one page names must differ
    mark = hashlib.sha256(svg.encode()).hexdigest()[:8]
    return re.sub(r'((?:\bid="|xlink:href="#|url\(#))', rf"\g<1>f{mark}-", svg)


def lines(axes: Axes, title: str, x: str) -> None:
    """Axes whose rows are names: no rule on the left, a grid along ``x``."""
    axes.grid(axis="x")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_title(title)
    axes.set_xlabel(x)


def interval(axes: Axes, y: float, values: Sequence[float], color: str, filled: bool) -> None:
    """Shares, 0 to 1, in per cent at a height: the middle 60 % as a bar, the mean as a dot with its figure."""
    if not values:
        return
    percent = 100 * np.asarray(values)
    low, high = np.quantile(percent, (0.2, 0.8)).tolist()
    mean = float(percent.mean())
    axes.plot((low, high), (y, y), color=color, linewidth=2.2 if filled else 1.2, alpha=0.55, solid_capstyle="round")
    axes.plot(mean, y, "o", color=color, markersize=6.5, markerfacecolor=color if filled else "white", markeredgewidth=1.3)
    # the mean in figures, past the bar's end, or before its start where there is no room left
    end, align = (max(high, mean) + 2, "left") if max(high, mean) < 90 else (min(low, mean) - 2, "right")
    axes.text(end, y, f"{mean:.1f}", color=color, ha=align, va="center_baseline", fontsize=8, fontweight="bold" if filled else "normal")


def histogram(axes: Axes, values: Sequence[float], color: str, filled: bool) -> None:
    """Shares, 0 to 1, in per cent, and a triangle at their median."""
    kind = {"histtype": "stepfilled", "linewidth": 0.0, "alpha": 0.6} if filled else {"histtype": "step", "linewidth": 1.5}
    if values:
        percent = 100 * np.asarray(values)
        axes.hist(percent, bins=list(range(0, 101, 4)), color=color, **kind)  # type: ignore[arg-type]
        top, hue = axes.get_xaxis_transform(), SOFT if filled else color
        axes.plot(float(np.median(percent)), 1.0, "v", color=hue, markersize=5.5, transform=top, clip_on=False)
    axes.grid(axis="y")


def errors(axes: Axes, points: Sequence[tuple[Any, float | None, float | None]], color: str, label: str, unit: float = 1.0) -> None:
    """Points with their spread over seeds where there is one, joined by a line; points without a value are left out."""
    finite = [(x, y, s) for x, y, s in points if y is not None and math.isfinite(y)]
    if not finite:
        return
    xs, ys = [x for x, _, _ in finite], [unit * y for _, y, _ in finite]
    bars = [unit * (s or 0.0) for _, _, s in finite]
    axes.errorbar(xs, ys, bars, color=color, label=label, fmt="o-", markersize=4, linewidth=1.3, elinewidth=1.0)


def training_curves(curves: Mapping[str, Sequence[Mapping[str, Any]]], palette: Mapping[str, str], *, name: str = "training") -> str:
    """Loss parts over steps, one panel per part, one line per variant; empty if no record holds a loss."""
    parts = [key for key in _PARTS if any(_series(records, key)[0] for records in curves.values())]
    if not parts:
        return ""
    with sheet(2.3, name=name) as (figure, svg):
        panels = figure.subplots(1, max(3, len(parts)), squeeze=False)[0]
        for axes in panels[len(parts) :]:
            axes.set_visible(False)
        for axes, part in zip(panels, parts):
            everything = []
            for variant, records in curves.items():
                steps, values = _series(records, part)
                everything += values
                axes.plot(steps, values, color=palette[variant], linewidth=1.4, label=variant)
            if min(everything) > 0 and max(everything) > 3 * min(everything):
                _decades(axes)
            axes.set_title(_PARTS[part])
            axes.set_xlabel("optimiser step")
            axes.grid(axis="y")
        panels[0].set_ylabel("loss (1 = no knowledge)")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=len(labels), fontsize=9)
        return svg()


def scatter_map(xy: np.ndarray, share: Sequence[float], level: np.ndarray, groups: Sequence[str], *, name: str = "map") -> str:
    """Models at ``xy [k, 2]`` whose axes hold ``share`` per cent of variance, coloured by ``level [k]`` per cent, one marker per group."""
    with sheet(4.4, width=7.4, name=name) as (figure, svg):
        axes = figure.subplots()
        for mark, group in zip(_MARKERS * len(groups), dict.fromkeys(groups)):
            member = np.asarray([g == group for g in groups])
            x, y = xy[member].T
            look: dict[str, Any] = {"edgecolors": "white", "linewidths": 0.4, "rasterized": len(xy) > RASTER}
            look |= {"c": level[member], **_color_scale(level)} if bool(np.isfinite(level).any()) else {"color": SOFT}
            shown = axes.scatter(x, y, s=26, marker=mark, **look)
            axes.plot([], [], mark, color=SOFT, linestyle="none", label=group)
        axes.set_xlabel(f"first principal component ({share[0]:.0f} % of variance)")
        axes.set_ylabel(f"second principal component ({share[1]:.0f} %)")
        axes.grid(axis="both")
        figure.legend(loc="outside upper left", ncols=6, fontsize=9, handletextpad=0.2)
        if bool(np.isfinite(level).any()):  # where answers are no classes there is no accuracy to colour by
            bar = figure.colorbar(shown, ax=axes, pad=0.02, aspect=28)
            bar.set_label("test accuracy (%)")
            bar.outline.set_visible(False)  # type: ignore[operator]
        return svg()


def _series(records: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    pairs = [(r["step"], r[key]) for r in records if _is_finite(r.get("step")) and _is_finite(r.get(key))]
    return [float(s) for s, _ in pairs], [float(v) for _, v in pairs]


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _decades(axes: Axes) -> None:
    """A log axis labelled with plain numbers: one, two or more a decade, the fewer the more decades there are."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    steps = (1.0,) if high / low > 1e3 else (1.0, 3.0) if high / low > 10 else (1.0, 1.5, 2.0, 3.0, 5.0)
    axes.yaxis.set_major_locator(LogLocator(subs=steps))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _color_scale(level: np.ndarray) -> dict[str, Any]:
    """Colour limits that a few broken models cannot stretch: the 2nd percentile up."""
    finite = level[np.isfinite(level)]
    if len(finite) == 0:
        return {"cmap": "viridis", "vmin": 0.0, "vmax": 100.0}
    low, high = float(np.quantile(finite, 0.02)), float(finite.max())
    return {"cmap": "viridis", "vmin": min(low, high - 1.0), "vmax": high, "plotnonfinite": True}
