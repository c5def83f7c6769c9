"""The page's figures, from tables to inline SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..measure.results import Results, Row, mean_and_spread
from . import drawing
from .drawing import INK, ORIGINAL, SOFT, errors, histogram, interval, lines, sheet
from .html import number
from .tables import grouped

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# trained with behavior in blues and violets, without in oranges; closed forms green, zoo models grey
_BEHAVIOR = ("#0072b2", "#7f3c8d", "#56b4e9", "#3d3d9e", "#cc79a7")
_STRUCTURE = ("#d55e00", "#e69f00", "#8c6d31")
_CODES = ("#009e73", "#5ab48f", "#2f6f4f", "#a5c93d")
_MODELS = ("#555555", "#888888", "#aaaaaa")
_SAMPLERS = {"joint": "o", "token": "s", "individual": "D", "uniform": "^", "neighbours": "P"}


def palette(results: Results, zoo: str) -> dict[str, str]:
    """A colour for each variant of a zoo."""
    colors: dict[str, str] = {}
    runs = results.trained(zoo)
    groups: list[tuple[list[str], Sequence[str]]] = [
        ([v for v in runs if "B" in (results.losses(zoo, v) or "B")], _BEHAVIOR),
        ([v for v in runs if "B" not in (results.losses(zoo, v) or "B")], _STRUCTURE),
        ([v for v in results.variants(zoo, "run") if v not in runs], ("#9aa5ad", "#b9a58c", "#a9b8a0", "#b5a5b8")),
        *((results.variants(zoo, kind), _CODES) for kind in ("code", "refined")),
        *((results.variants(zoo, kind), _MODELS) for kind in ("model", "features")),
    ]
    for variants, hues in groups:
        colors |= {v: hues[i % len(hues)] for i, v in enumerate(variants)}
    return colors


def column(rows: Sequence[Row], name: str) -> list[float]:
    """The numbers of a column."""
    return [float(r[name]) for r in rows if isinstance(r.get(name), (int, float))]


def placed(results: Results, zoo: str, metric: str) -> list[tuple[float, str]]:
    """A height for each variant that has the metric, a gap between kinds."""
    places, y = [], 0.0
    for members in grouped(results, zoo).values():
        measured = [v for v in members if results.value(zoo, v, metric)]
        places += [(y + i, v) for i, v in enumerate(measured)]
        y += len(measured) + (0.6 if measured else 0)
    return places


def overview(results: Results, zoo: str, colors: Mapping[str, str]) -> str:
    """Agreement with own and others' originals, and accuracy before and after: means and the middle 60 % of models."""
    rows = {v: r for _, v in placed(results, zoo, "agreement") if (r := results.table("models", zoo, v))}
    if not rows:
        return ""
    place = {v: y for y, v in placed(results, zoo, "agreement")}
    bottom = max(place.values())
    with sheet(0.9 + 0.36 * (bottom + 1), name=f"{zoo}/overview") as (figure, svg):
        left, right = figure.subplots(1, 2, sharey=True)
        for axes, first, second in ((left, "agreement_others", "agreement"), (right, "accuracy_original", "accuracy_reconstructed")):
            for variant, own in rows.items():
                y = place[variant]
                interval(axes, y - 0.17, column(own, first), SOFT, filled=False)
                interval(axes, y + 0.17, column(own, second), colors.get(variant, INK), filled=True)
            axes.set_xlim(0, 100)
        left.set_yticks([place[v] for v in rows], list(rows), color=INK, fontsize=9)
        left.set_ylim(bottom + 0.5, -0.5)
        lines(left, "Agreement with own (filled) and others' originals (open)", "% of test images")
        lines(right, "Accuracy of reconstructions (filled) and originals (open)", "% of test images")
        return svg()


def histograms(results: Results, zoo: str, variants: Sequence[str], colors: Mapping[str, str]) -> str:
    """A column per variant: agreement with own (outline) and others' (grey) above, accuracy after (outline) and before (grey) below."""
    shown = [v for v in variants if results.table("models", zoo, v)][:6]
    if not shown:
        return ""
    with sheet(4.0, name=f"{zoo}/histograms") as (figure, svg):
        grid = figure.subplots(2, max(4, len(shown)), sharex=True, sharey="row", squeeze=False)
        for axes in grid.flat:
            axes.set_visible(False)
        pairs = (
            ("agreement_others", "agreement", "agreement (% of images)"),
            ("accuracy_original", "accuracy_reconstructed", "accuracy (%)"),
        )
        for at, variant in enumerate(shown):
            rows = results.table("models", zoo, variant)
            for row, (grey, hue, label) in enumerate(pairs):
                axes = grid[row, at]
                axes.set_visible(True)
                histogram(axes, column(rows, grey), ORIGINAL, filled=True)
                histogram(axes, column(rows, hue), colors.get(variant, INK), filled=False)
                axes.set_xlim(0, 100)
                axes.set_xticks(range(0, 101, 25))
                axes.tick_params(labelbottom=True)
                axes.set_xlabel(label)
                if at == 0:
                    axes.set_ylabel("models")
            grid[0, at].set_title(variant, color=colors.get(variant, INK), pad=10)
        return svg()


def probes(results: Results, zoo: str, colors: Mapping[str, str]) -> str:
    """R2 of every probe on test models, with the standard deviation over resamples of them (or over seeds)."""
    places = placed(results, zoo, "probe_r2")
    variants, bottom = [v for _, v in places], max([y for y, _ in places], default=0.0)
    titles = {"": "test accuracy", "_decoded": "the same, decoded", "_ggap": "generalisation gap", "_epoch": "epoch"}
    targets = [(f"probe_r2{m}", t) for m, t in titles.items() if any(results.value(zoo, v, f"probe_r2{m}") for v in variants)]
    if not targets:
        return ""
    with sheet(0.9 + 0.29 * (bottom + 1), name=f"{zoo}/probes") as (figure, svg):
        panels = figure.subplots(1, max(2, len(targets)), sharey=True, squeeze=False)[0]
        for axes in panels[len(targets) :]:
            axes.set_visible(False)
        for axes, (metric, title) in zip(panels, targets):
            for y, variant in places:
                value, spread = results.over_seeds(zoo, variant, metric)
                if value is None:
                    continue
                color, shown = colors.get(variant, INK), max(value, -0.5)
                if spread is not None and value > -0.5:
                    axes.plot((max(value - spread, -0.5), min(value + spread, 1)), (y, y), color=color, linewidth=1.6, alpha=0.55)
                axes.plot(shown, y, "o" if value > -0.5 else "<", color=color, markersize=5.5)
                axes.text(1.04, y, number(value, 2), color=color, va="center_baseline", fontsize=8)
            axes.axvline(0, color=SOFT, linewidth=0.8)
            axes.set_xlim(-0.55, 1.0)
            lines(axes, title, "R2 on test models")
        panels[0].set_yticks([y for y, _ in places], variants, color=INK, fontsize=9)
        panels[0].set_ylim(bottom + 0.5, -0.5)
        return svg()


def generation(results: Results, zoo: str, colors: Mapping[str, str]) -> str:
    """Accuracies of originals, reconstructions and new models; what samplers trade; fine-tuning."""
    runs = [v for v in results.trained(zoo) if results.table("samples", zoo, v)][:4]
    if not runs:
        return ""
    strips = [
        ("zoo: test models", column(results.table("models", zoo, runs[0]), "accuracy_original"), SOFT),
        ("zoo: anchors", column(results.table("samples", zoo, "zoo"), "test_acc"), SOFT),
    ]
    for v in runs:
        rows = results.table("samples", zoo, v)
        last = max(column([r for r in rows if r["set"] == "finetuned"], "epoch"), default=None)
        strips.append((f"{v}: reconstructed", column(results.table("models", zoo, v), "accuracy_reconstructed"), colors[v]))
        strips.append((f"{v}: generated", column([r for r in rows if r["set"] == "generated"], "test_acc"), colors[v]))
        if last is not None:
            strips.append((f"{v}: fine-tuned", column([r for r in rows if r["epoch"] == last], "test_acc"), colors[v]))
    with sheet(max(3.4, 0.8 + 0.3 * len(strips)), name=f"{zoo}/generation") as (figure, svg):
        left, middle, right = figure.subplots(1, 3, width_ratios=(1.25, 1.0, 0.8))
        for y, (_, values, color) in enumerate(strips):
            _strip(left, y, values, color)
        left.set_yticks(range(len(strips)), [name for name, _, _ in strips], color=INK, fontsize=8.5)
        left.set_ylim(len(strips) - 0.4, -0.6)
        left.set_xlim(0, 100)
        lines(left, "Test accuracy, every model", "% of test images")
        _tradeoff(middle, results, zoo, runs, colors)
        _finetuning(right, results, zoo, runs, colors)
        return svg()


def _strip(axes: Axes, y: float, values: Sequence[float], color: str) -> None:
    """Every value as a faint tick, the middle 60 % as a bar, the mean as a dot with its figure."""
    percent = [100 * value for value in values]
    axes.plot(percent, [y + 0.22] * len(percent), "|", color=color, markersize=4, alpha=0.35, rasterized=len(percent) > 1000)
    interval(axes, y - 0.08, values, color, filled=True)


def _tradeoff(axes: Axes, results: Results, zoo: str, runs: Sequence[str], colors: Mapping[str, str]) -> None:
    """Accuracy against distance to the nearest training model, in units of a copy's."""
    used: dict[str, str] = {}
    for v in runs:
        every = results.table("samplings", zoo, v, first_seed=True)  # models that are all broken have no distance
        rows = [r for r in every if r["select"] == "none" and None not in (r["novelty"], r["test_acc"])]
        copy = results.mean(zoo, v, "novelty_reconstruction")
        if not copy:
            continue
        joint = sorted((r for r in rows if r["sampler"] == "joint"), key=lambda r: r["bandwidth"] or 0.0)
        axes.plot([r["novelty"] / copy for r in joint], [100 * r["test_acc"] for r in joint], color=colors[v], linewidth=1.0, alpha=0.6)
        for r in rows:
            name = str(r["sampler"])
            used[name] = _SAMPLERS.get(name, "X")
            axes.plot(
                r["novelty"] / copy,
                100 * r["test_acc"],
                used[name],
                color=colors[v],
                markersize=5.5,
                markerfacecolor=colors[v] if r.get("main") else "white",
            )
    anchors = results.mean(zoo, "zoo", "accuracy_anchors")
    if anchors is not None:
        axes.axhline(100 * anchors, color=SOFT, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.text(1, 100 * anchors + 1.5, "anchors", color=SOFT, fontsize=8, ha="right", transform=axes.get_yaxis_transform())
    axes.axvline(1, color=SOFT, linewidth=0.9, linestyle=(0, (1, 2)))
    axes.set_ylim(0, 104)
    axes.grid(axis="both")
    axes.set_title("What samplers trade")
    axes.set_xlabel("distance to training models (a copy's = 1)")
    axes.set_ylabel("mean test accuracy (%)")
    for name, marker in used.items():
        axes.plot([], [], marker, color=SOFT, markerfacecolor="white", markersize=5, label=name)
    if used:
        axes.legend(fontsize=7.5, loc="lower left", handletextpad=0.1, borderpad=0.2)


def _finetuning(axes: Axes, results: Results, zoo: str, runs: Sequence[str], colors: Mapping[str, str]) -> None:
    for v in runs:
        rows = [r for r in results.table("samples", zoo, v) if None not in (r["epoch"], r["test_acc"])]
        if not rows:
            continue
        epochs = sorted({r["epoch"] for r in rows})
        after = [100 * np.asarray(column([r for r in rows if r["epoch"] == e], "test_acc")) for e in epochs]
        lows, highs = zip(*(np.quantile(values, (0.2, 0.8)) for values in after))
        axes.fill_between(epochs, lows, highs, color=colors[v], alpha=0.13, linewidth=0)
        axes.plot(epochs, [values.mean() for values in after], "o-", color=colors[v], linewidth=1.4, markersize=3.5, label=v)
        axes.set_xticks(epochs)
    axes.grid(axis="y")
    axes.set_title("Fine-tuning")
    axes.set_xlabel("epoch (0: as decoded)")
    axes.set_ylabel("mean test accuracy (%)")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7.5, loc="lower right")


def latent_map(results: Results, zoo: str, variant: str) -> str:
    """Mean-token latents on two principal components, coloured by accuracy, one mark per split."""
    rows = [r for r in results.table("latents", zoo, variant, first_seed=True) if None not in (r["x"], r["y"])]
    if len(rows) < 3:
        return ""
    level = [float("nan") if r.get("test_acc") is None else 100 * r["test_acc"] for r in rows]
    share = (100 * (rows[0]["share_x"] or 0.0), 100 * (rows[0]["share_y"] or 0.0))
    xy, groups = np.asarray([[r["x"], r["y"]] for r in rows]), [str(r["split"]) for r in rows]
    return drawing.scatter_map(xy, share, np.asarray(level), groups, name=f"{zoo}/latent map")


def training(results: Results, zoo: str, colors: Mapping[str, str]) -> str:
    """Loss parts over steps, of each variant's first seed."""
    curves = {v: rows for v in results.trained(zoo) if (rows := results.table("curves", zoo, v, first_seed=True))}
    return drawing.training_curves(curves, colors, name=f"{zoo}/training")


def against_beta(results: Results) -> str:
    """Agreement, and diversity of new models, against beta; one line per zoo and choice of gamma."""
    series: dict[str, list[tuple[float, str, str]]] = {}
    for zoo in results.zoos:
        for variant in results.trained(zoo):
            about = results.about(zoo, variant)
            if about.get("beta") is not None:
                name = f"{zoo}, {'with' if about.get('gamma') else 'without'} contrast"
                series.setdefault(name, []).append((about["beta"], zoo, variant))
    series = {name: sorted(points) for name, points in series.items() if len({b for b, _, _ in points}) > 1}
    if not series:
        return ""
    panels = (
        ("agreement", "agreement (%)", 100.0),
        ("generated_accuracy", "accuracy of new models (%)", 100.0),
        ("diversity", "their diversity (L2 of weights)", 1.0),
        ("diversity_disagreement", "their disagreement (%)", 100.0),
    )
    with sheet(2.6, name="against beta") as (figure, svg):
        for axes, (metric, title, unit) in zip(figure.subplots(1, len(panels)), panels):
            for i, (name, points) in enumerate(series.items()):
                hue, zoo = _BEHAVIOR[i % len(_BEHAVIOR)], points[0][1]
                errors(axes, [(b, *mean_and_spread(results.value(z, v, metric))[:2]) for b, z, v in points], hue, name, unit)
                level = results.mean(zoo, "zoo", {"generated_accuracy": "accuracy_anchors"}.get(metric, metric))
                if level is not None:
                    axes.axhline(unit * level, color=hue, linewidth=0.8, linestyle=(0, (4, 3)), alpha=0.7)
            axes.set_title(title)
            axes.set_xlabel("beta (1: structure alone)")
            axes.set_ylim(bottom=0)
            axes.grid(axis="y")
            if metric == "agreement":
                axes.legend(fontsize=7.5, loc="lower left")
        return svg()
