"""The report's figures: each a function from data to one inline SVG. Needs matplotlib, which is imported here alone."""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import WslfastError
from ..measure.reconstruction import Reconstruction

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Compared = Sequence[tuple[str, Reconstruction]]
Curves = Sequence[tuple[str, Sequence[Mapping[str, Any]]]]

INK, SOFT, RULE, ORIGINAL = "#222222", "#666666", "#d9d9d9", "#b3b3b3"
# Okabe and Ito's palette, told apart with every common colour-blindness; grey is kept for originals
_KNOWN = {"structure": "#d55e00", "structure+behavior": "#0072b2", "linear": "#cc79a7", "linear-metric": "#009e73"}
_OTHERS = ("#e69f00", "#56b4e9", "#000000", "#8c6d31", "#7f3c8d", "#3969ac")
_MARKERS = "osD^vPX*"
_WIDTH = 10.6  # inches; the page scales a figure to its column
_RASTER = 3_000  # points beyond which a scatter is a bitmap inside the SVG
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
        raise WslfastError(f"the report's figures need matplotlib: pip install 'wslfast[plot]' ({error})") from error


def colors(names: Sequence[str]) -> dict[str, str]:
    """A colour a variant: the demo's have their own, others take theirs in order."""
    spare: Iterator[str] = iter(_OTHERS * (1 + len(names) // len(_OTHERS)))
    return {name: _KNOWN[name] if name in _KNOWN else next(spare) for name in names}


def overview(compared: Compared) -> str:
    """Means and the middle 60 % of models: agreement with own and other originals, accuracy before and after."""
    palette = colors([name for name, _ in compared])
    with _figure(0.85 + 0.46 * len(compared)) as (figure, svg):
        left, right = figure.subplots(1, 2, sharey=True)
        for axes, first, second in ((left, "agreement_others", "agreement"), (right, "accuracy_original", "accuracy_reconstructed")):
            for row, (name, result) in enumerate(compared):
                _interval(axes, row - 0.16, getattr(result, first), SOFT, filled=False)
                _interval(axes, row + 0.16, getattr(result, second), palette[name], filled=True)
            axes.set_xlim(0, 100)
            axes.grid(axis="x")
            axes.spines["left"].set_visible(False)
            axes.tick_params(axis="y", length=0)
        left.set_yticks(range(len(compared)), [name for name, _ in compared], color=INK, fontsize=9.5)
        left.set_ylim(len(compared) - 0.55, -0.55)
        left.set_title("Agreement with own (filled) and others' originals (open)")
        right.set_title("Accuracy of reconstructions (filled) and originals (open)")
        left.set_xlabel("% of test images")
        right.set_xlabel("% of test images")
        return svg()


def accuracy_histograms(compared: Compared) -> str:
    """Test accuracy of originals (grey) and reconstructions (colour), one panel a variant."""

    def draw(axes: Axes, result: Reconstruction, color: str) -> None:
        _histogram(axes, result.accuracy_original, ORIGINAL, filled=True)
        _histogram(axes, result.accuracy_reconstructed, color, filled=False)

    return _small_multiples(compared, draw, "test accuracy (%)", "models", 2.0)


def agreement_histograms(compared: Compared) -> str:
    """Agreement with the own original (colour) and, mean over them, with other models' originals (grey)."""

    def draw(axes: Axes, result: Reconstruction, color: str) -> None:
        _histogram(axes, result.agreement_others, ORIGINAL, filled=True)
        _histogram(axes, result.agreement, color, filled=False)

    return _small_multiples(compared, draw, "agreement (% of test images)", "models", 2.0)


def accuracy_scatter(compared: Compared) -> str:
    """Each model's accuracy before and after; on the diagonal, nothing was lost."""

    def draw(axes: Axes, result: Reconstruction, color: str) -> None:
        axes.plot((0, 100), (0, 100), color=SOFT, linewidth=0.8, zorder=1)
        x, y = _percent(result.accuracy_original), _percent(result.accuracy_reconstructed)
        axes.scatter(x, y, s=13, color=color, alpha=0.65, linewidths=0, rasterized=len(x) > _RASTER, clip_on=False)
        axes.set_ylim(0, 100)
        axes.set_yticks(range(0, 101, 25))
        axes.set_aspect("equal")
        axes.grid(axis="both")

    return _small_multiples(compared, draw, "original's test accuracy (%)", "reconstruction's (%)", 2.75)


def training_curves(curves: Curves, palette: Mapping[str, str] | None = None) -> str | None:
    """Loss parts over steps, one panel a part, one line a variant; None if no record holds a loss."""
    parts = [key for key in _PARTS if any(_series(records, key)[0] for _, records in curves)]
    if not parts:
        return None
    palette = palette or colors([name for name, _ in curves])
    with _figure(2.3) as (figure, svg):
        panels = figure.subplots(1, max(3, len(parts)), squeeze=False)[0]
        for axes in panels[len(parts) :]:
            axes.set_visible(False)
        for axes, part in zip(panels, parts):
            everything = []
            for name, records in curves:
                steps, values = _series(records, part)
                everything += values
                axes.plot(steps, values, color=palette[name], linewidth=1.4, label=name)
            if min(everything) > 0 and max(everything) > 3 * min(everything):
                _decades(axes)
            axes.set_title(_PARTS[part])
            axes.set_xlabel("optimiser step")
            axes.grid(axis="y")
        panels[0].set_ylabel("loss (1 = no knowledge)")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=len(labels), fontsize=9)
        return svg()


def latent_map(latents: Tensor, accuracy: Tensor | None, groups: Sequence[str] | None) -> str | None:
    """First two principal components of ``latents [k, d]``, coloured by accuracy, one marker a group; None for k < 3."""
    rows = latents.detach().double().cpu()
    kept = rows.isfinite().all(1)
    if int(kept.sum()) < 3:
        return None
    centred = rows[kept] - rows[kept].mean(0)
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    share = [*(s.square() / s.square().sum().clamp_min(1e-300) * 100).tolist(), 0.0]
    xy = torch.nn.functional.pad(u * s, (0, 2))[:, :2]
    level = None if accuracy is None else _cpu(accuracy)[kept] * 100
    return scatter_map(xy, share, level, [g for g, keep in zip(groups, kept.tolist()) if keep] if groups is not None else None)


def scatter_map(xy: Tensor, share: Sequence[float], level: Tensor | None, groups: Sequence[str] | None) -> str:
    """Models at ``xy [k, 2]`` whose axes hold ``share`` per cent of variance, coloured by ``level [k]`` per cent, one marker a group."""
    from matplotlib.lines import Line2D

    marks = groups if groups is not None else ["models"] * len(xy)
    with _figure(4.4, width=7.4) as (figure, svg):
        axes = figure.subplots()
        scale = {} if level is None else _color_scale(level)
        shown = None
        for index, group in enumerate(dict.fromkeys(marks)):
            member = torch.tensor([m == group for m in marks])
            value = {"color": "#0072b2"} if level is None else {"c": level[member].numpy(), **scale}
            x, y = xy[member].T.numpy()
            shown = axes.scatter(
                x,
                y,
                s=26,
                marker=_MARKERS[index % len(_MARKERS)],
                edgecolors="white",
                linewidths=0.4,
                label=group,
                rasterized=len(xy) > _RASTER,
                **value,
            )
        axes.set_xlabel(f"first principal component ({share[0]:.0f} % of variance)")
        axes.set_ylabel(f"second principal component ({share[1]:.0f} %)")
        axes.grid(axis="both")
        if groups is not None:
            handles = [
                Line2D([], [], color=SOFT, marker=_MARKERS[i % len(_MARKERS)], linestyle="none", label=group)
                for i, group in enumerate(dict.fromkeys(marks))
            ]
            figure.legend(handles=handles, loc="outside upper left", ncols=6, fontsize=9, handletextpad=0.2)
        if level is not None and shown is not None:
            bar = figure.colorbar(shown, ax=axes, pad=0.02, aspect=28)
            bar.set_label("test accuracy (%)")
            bar.outline.set_visible(False)  # type: ignore[operator]
        return svg()


# -- drawing ---------------------------------------------------------------------------------------------------------------


@contextmanager
def _figure(height: float, width: float = _WIDTH) -> Iterator[tuple[Figure, Callable[[], str]]]:
    """A figure in the house style, and what turns it into SVG. No pyplot: nothing global, no backend, no window."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(wspace=0.05, hspace=0.06))
        yield figure, lambda: _to_svg(figure)


def _to_svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, dpi=160)
    svg = buffer.getvalue()
    # inside HTML the prolog and metadata are noise, and the namespaces are implied
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'\s(xmlns(:xlink)?)="[^"]*"', "", svg, count=2)
    # every figure calls its parts axes_1 and so on; in one page names must differ, and the same figure must give the same text
    mark = hashlib.sha256(svg.encode()).hexdigest()[:8]
    return re.sub(r'((?:\bid="|xlink:href="#|url\(#))', rf"\g<1>f{mark}-", svg)


def _small_multiples(compared: Compared, draw: Callable[[Axes, Reconstruction, str], None], x: str, y: str, height: float) -> str:
    """One panel a variant, at most five in a row, on common axes in per cent."""
    from matplotlib.ticker import MaxNLocator

    columns = min(5 if len(compared) == 5 else 4, max(3, len(compared)))  # one or two variants do not become giants
    rows = math.ceil(len(compared) / columns)
    palette = colors([name for name, _ in compared])
    with _figure(0.35 + height * rows) as (figure, svg):
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        panels = list(grid.flat)
        for axes in panels[len(compared) :]:
            axes.set_visible(False)
        for index, (axes, (name, result)) in enumerate(zip(panels, compared)):
            draw(axes, result, palette[name])
            axes.set_title(name, color=palette[name], pad=10)  # above the median marks
            axes.set_xlim(0, 100)
            axes.set_xticks(range(0, 101, 25))
            axes.set_xlabel(x)
            axes.tick_params(labelbottom=True)
            if y == "models":
                axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
            if index % columns == 0:
                axes.set_ylabel(y)
        return svg()


def _interval(axes: Axes, y: float, values: Tensor, color: str, filled: bool) -> None:
    percent = torch.tensor(_percent(values), dtype=torch.float64)
    if len(percent) == 0:
        return
    low, high = torch.quantile(percent, torch.tensor([0.2, 0.8], dtype=torch.float64)).tolist()
    axes.plot((low, high), (y, y), color=color, linewidth=2.2 if filled else 1.2, alpha=0.55, solid_capstyle="round")
    mean = float(percent.mean())
    axes.plot(mean, y, "o", color=color, markersize=6.5, markerfacecolor=color if filled else "white", markeredgewidth=1.3)
    # the mean in figures, past the bar's end, or before its start where there is no room left
    end, align = (max(high, mean) + 2, "left") if max(high, mean) < 90 else (min(low, mean) - 2, "right")
    axes.text(end, y, f"{mean:.1f}", color=color, ha=align, va="center_baseline", fontsize=8, fontweight="bold" if filled else "normal")


def _histogram(axes: Axes, values: Tensor, color: str, filled: bool) -> None:
    percent = _percent(values)
    bins = [4 * i for i in range(26)]
    kind = {"histtype": "stepfilled", "linewidth": 0.0, "alpha": 0.6} if filled else {"histtype": "step", "linewidth": 1.5}
    if percent:
        axes.hist(percent, bins=bins, color=color, **kind)  # type: ignore[arg-type]
        median = float(torch.tensor(percent).median())
        top = axes.get_xaxis_transform()
        axes.plot(median, 1.0, marker="v", color=SOFT if filled else color, markersize=5.5, transform=top, clip_on=False, linestyle="none")
    axes.grid(axis="y")


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


def _color_scale(level: Tensor) -> dict[str, Any]:
    """Colour limits that a few broken models cannot stretch: the 2nd percentile up."""
    known = level[level.isfinite()]
    if len(known) == 0:
        return {"cmap": "viridis", "vmin": 0.0, "vmax": 100.0}
    low, high = float(torch.quantile(known, 0.02)), float(known.max())
    return {"cmap": "viridis", "vmin": min(low, high - 1.0), "vmax": high, "plotnonfinite": True}


def _cpu(values: Tensor) -> Tensor:
    return torch.as_tensor(values).detach().double().cpu()


def _percent(values: Tensor) -> list[float]:
    kept = _cpu(values)
    return (kept[kept.isfinite()] * 100).tolist()
