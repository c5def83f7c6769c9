"""What the page shows of networks whose answers are no classes: outputs against outputs, in decibels, and who is recognised."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from ..measure.results import Results
from .drawing import INK, lines, sheet
from .figures import column, placed
from .html import figure, head, headings, note, number, percent, row_head, table
from .tables import by_kind, figure_cell, latent_cell, settings

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def parts(results: Results, zoo: str, colors: Mapping[str, str]) -> list[str]:
    """The figure and the table of a zoo, for the page's section on reconstruction."""
    caption = (
        "Dots are means over models, bars the middle 60 % of models. Left: peak signal-to-noise ratio of the outputs of reconstructions "
        "against those of their originals; 6 dB more is half the error. Right: share of the population's variance in weights that is kept."
    )
    return [figure(_overview(results, zoo, colors), caption), _table(results, zoo, colors)]


def _overview(results: Results, zoo: str, colors: Mapping[str, str]) -> str:
    places = [(y, v) for y, v in placed(results, zoo, "psnr") if results.table("models", zoo, v)]
    if not places:
        return ""
    bottom = max(y for y, _ in places)
    with sheet(0.9 + 0.3 * (bottom + 1), name=f"{zoo}/overview") as (sheet_, svg):
        left, right = sheet_.subplots(1, 2, sharey=True)
        for axes, metric, unit in ((left, "psnr", 1.0), (right, "explained_variance", 100.0)):
            shown = {y: [unit * x for x in column(results.table("models", zoo, v), metric)] for y, v in places}
            for y, variant in places:
                _interval(axes, y, shown[y], colors.get(variant, INK))
            axes.margins(x=0.14)
        right.set_xlim(left=max(right.get_xlim()[0], -100.0))  # a zoo model in the place of another keeps less than nothing
        left.set_yticks([y for y, _ in places], [v for _, v in places], color=INK, fontsize=9)
        left.set_ylim(bottom + 0.5, -0.5)
        lines(left, "Outputs against the originals'", "PSNR (dB)")
        lines(right, "Variance of weights kept", "% (below -100 at the edge)")
        return svg()


def _interval(axes: Axes, y: float, values: list[float], color: str) -> None:
    if not values:
        return
    low, high = np.quantile(values, (0.2, 0.8)).tolist()
    mean = float(np.mean(values))
    axes.plot((low, high), (y, y), color=color, linewidth=2.2, alpha=0.55, solid_capstyle="round")
    axes.plot(mean, y, "o", color=color, markersize=6.5)
    axes.annotate(f"{mean:.1f}", (mean, y), (0, 7), textcoords="offset points", color=color, fontsize=8, ha="center", annotation_clip=True)


def _table(results: Results, zoo: str, colors: Mapping[str, str]) -> str:
    names = headings(
        "Variant; Latent: numbers; PSNR: dB; Identified: %; Agreement: %; Margin: points; Output L2: mean; Masked L2: of weights; "
        "Variance kept: %"
    )

    def line(variant: str) -> str:
        about = results.about(zoo, variant)
        shown: dict[str, Callable[[float | None], str]] = {
            "psnr": number,
            "identified": percent,
            "agreement": percent,
            "agreement_margin": percent,
            "output_l2": number,
            "l2_masked": number,
            "explained_variance": percent,
        }
        cells = [figure_cell(results, zoo, variant, metric, as_text) for metric, as_text in shown.items()]
        small = str(about.get("baseline") or settings(about))
        return f"<tr>{row_head(variant, colors.get(variant), small)}{latent_cell(results, zoo, variant)}{''.join(cells)}</tr>"

    words = (
        "Means over models and seeds; small print: ± standard deviation over seeds where there are several, else over models. <b>PSNR</b>: "
        "10 log10(peak² / mean squared difference of outputs), the peak being the range of the outputs unless the zoo states one. "
        "<b>Identified</b>: the own original is the best match. <b>Agreement</b>: on which output is the largest, where there are several; "
        "<b>margin</b>: less that with other models' originals."
    )
    rows = by_kind(results, zoo, "l2_masked", len(names), line)
    return table(head(names), rows) + note(words)
