"""Ablations and the gradient analysis, where their rows lie beside ours (``ablations.csv``, ``gradients.csv``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from ..measure.results import OverSeeds, Results, Row, over_seeds
from .drawing import INK, SOFT, errors, sheet
from .html import figure, note, section
from .tables import ablation_table

_HUES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f3c8d", "#555555")
_METRICS = (
    ("agreement", "Agreement", "%"), ("psnr", "PSNR", "dB"), ("agreement_others", "With others", "%"),
    ("identified", "Identified", "%"), ("explained_variance", "Variance kept", "%"), ("accuracy_change", "Accuracy change", "points"),
    ("l2_masked", "Masked L2", "of weights"), ("probe_r2", "Probe", "R2 of accuracy"),
    ("probe_r2_ggap", "Probe", "R2 of the gap"), ("generated_accuracy", "New models", "%"), ("diversity", "Their diversity", "L2"),
)  # fmt: skip
_DRAWN = ("agreement", "psnr", "identified", "accuracy_change", "l2_masked")
_DIRECTIONS = {
    "random": "any direction", "layer": "any, scaled by layer", "top": "where outputs move most", "bottom": "where they move least",
    "reconstruction": "the reconstruction's own error",
}  # fmt: skip


def ablations(results: Results) -> str:
    """A table and a figure for each ablation on each zoo."""
    rows = results.tables.get("ablations", [])
    parts = []
    groups = dict.fromkeys((str(r.get("ablation") or "ablation"), str(r["zoo"])) for r in rows)
    for name, zoo in groups:
        of_zoo = [r for r in rows if str(r.get("ablation") or "ablation") == name and str(r["zoo"]) == zoo]
        figures = over_seeds(of_zoo)
        metrics = [m for m in _METRICS if any(m[0] in of for of in figures.values())]
        axis = next((str(r["axis"]) for r in of_zoo if r.get("axis")), name)
        parts.append(f"<h3>{escape(name)}, {escape(zoo)}</h3>{ablation_table(figures, metrics)}")
        if len(figures) > 1:
            setting = {str(r["variant"]): r.get("value") for r in of_zoo}
            drawn = [m for m in metrics if m[0] in _DRAWN]
            parts.append(figure(_ablation(figures, setting, drawn, axis, f"{zoo}/ablation {name}"), f"{name} on {zoo}."))
    if not parts:
        return ""
    small = note(
        "Means over held-out models, of the change in accuracy the median; ± and bars: standard deviation over seeds. Settings that are "
        "not named are those of the file."
    )
    return section("Ablations", *parts, small, lead="One setting varied at a time, every variant with the same seeds, on the zoos here.")


def _ablation(
    figures: Mapping[str, Mapping[str, OverSeeds]],
    setting: Mapping[str, object],
    metrics: Sequence[tuple[str, str, str]],
    axis: str,
    name: str,
) -> str:
    """Metrics against the setting; a number axis where all settings are numbers."""
    variants, places = list(figures), {v: float(s) for v, s in setting.items() if isinstance(s, (int, float))}
    numeric = len(set(places.values())) == len(variants)
    if numeric:
        variants.sort(key=places.__getitem__)
    else:
        places = {v: float(i) for i, v in enumerate(variants)}
    words = [str(v if setting[v] is None else setting[v]) for v in variants]
    with sheet(2.5, name=name) as (page, svg):
        for axes, (metric, heading, unit) in zip(page.subplots(1, max(3, len(metrics)), squeeze=False)[0], metrics):
            scale = 100.0 if unit in ("%", "points") else 1.0
            points = [(places[v], *figures[v].get(metric, (None, None))[:2]) for v in variants]
            errors(axes, points, _HUES[0], heading, scale)
            if not numeric:
                axes.set_xticks(range(len(variants)), words, rotation=35, ha="right", fontsize=7.5)
                for line in axes.get_lines():
                    line.set_linestyle("none")
                axes.set_xlim(-0.5, len(variants) - 0.5)
            else:
                axes.set_xlabel(axis)
            low, high = axes.get_ylim()
            short = (5.0 if scale == 100 else 0.1 * max(abs(low), abs(high), 1.0)) - (high - low)
            if short > 0:  # a difference of nothing should look like one
                axes.set_ylim(low - short / 2, high + short / 2)
            axes.set_title(f"{heading} ({unit})")
            axes.grid(axis="y")
        for axes in page.axes[len(metrics) :]:
            axes.set_visible(False)
        return svg()


def gradients(results: Results) -> str:
    """How far the first-order picture of the behavioral loss holds, and what the directions have in common."""
    rows = results.tables.get("gradients", [])
    swept = [r for r in rows if r.get("direction")]
    if not swept:
        return ""
    names = dict.fromkeys((str(r["zoo"]), str(r["variant"])) for r in swept)
    parts = []
    for zoo, variant in names:
        of_variant = [r for r in rows if (str(r["zoo"]), str(r["variant"])) == (zoo, variant)]
        parts.append(
            f"<h3>{escape(variant)}, {escape(zoo)}</h3>"
            + figure(
                _sweeps([r for r in of_variant if r.get("direction")], f"{zoo}/gradients {variant}"),
                "A model's weights moved by an error of a given size, relative to their norm, in several directions: medians over models. "
                "Left, the quadratic form over the measured behavioral loss (1 where the first-order step holds); then accuracy, and "
                "agreement with the model that was moved.",
            )
        )
        alone = [r for r in of_variant if not r.get("direction")]
        if alone:
            words = "; ".join(f"<b>{escape(str(r['metric']).replace('_', ' '))}</b> {_short(r)}" for r in alone)
            parts.append(note(f"Medians over models: {words}."))
    lead = "How weights and behavior are related around reconstructions (docs/analysis.md)."
    return section("Gradients", *parts, lead=lead)


def _short(row: Row) -> str:
    value = row["median"]
    return f"{value:.3g}".replace("-", "−") if isinstance(value, (int, float)) else "–"


def _sweeps(rows: Sequence[Row], name: str) -> str:
    from matplotlib.ticker import FuncFormatter

    plain = FuncFormatter(lambda value, _: f"{value:g}")
    directions = list(dict.fromkeys(str(r["direction"]) for r in rows))
    panels = (("ratio", "quadratic form / measured loss", 1.0), ("accuracy", "accuracy (%)", 100.0), ("agreement", "agreement (%)", 100.0))
    with sheet(2.9, name=name) as (page, svg):
        for axes, (metric, title, scale) in zip(page.subplots(1, 3), panels):
            for i, direction in enumerate(directions):
                swept = sorted((r for r in rows if r["direction"] == direction and r["metric"] == metric), key=lambda r: r["magnitude"])
                points = [(r["magnitude"], scale * r["median"]) for r in swept if isinstance(r["median"], (int, float))]
                label, hue = _DIRECTIONS.get(direction, direction), _HUES[i % len(_HUES)]
                axes.plot([x for x, _ in points], [y for _, y in points], "o-", color=hue, markersize=3.5, linewidth=1.3, label=label)
            axes.set_xscale("log")
            axes.set_title(title)
            axes.xaxis.set_major_formatter(plain)
            axes.set_xlabel("size of the weight error (of the weights' norm)")
            axes.grid(axis="both")
            if metric == "ratio":
                axes.set_yscale("log")
                axes.yaxis.set_major_formatter(plain)
                axes.set_ylim(0.02, 50)  # where outputs do not move to first order the ratio is 0 to rounding: off the scale
                axes.axhline(1, color=SOFT, linewidth=0.9)
            else:
                axes.set_ylim(0, 102)
        handles, labels = page.axes[0].get_legend_handles_labels()
        page.legend(handles, labels, loc="outside upper left", ncols=5, fontsize=8, labelcolor=INK)
        return svg()
