"""The page's tables, from results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from html import escape
from typing import Any

from ..measure import goals
from ..measure.goals import Verdict
from ..measure.results import OverSeeds, Results
from . import published
from .html import DASH, cell, head, headings, note, number, percent, plus_minus, row_head, table

KINDS = {
    "run": "Trained", "twin": "The same without transformer blocks", "code": "Closed form",
    "refined": "Closed form, latents refined at test time on training images",
    "model": "A zoo model in its place", "features": "No code",
}  # fmt: skip
_SAMPLERS = {
    "joint": "kernel density, whole latents",
    "token": "kernel density by token",
    "individual": "kernel density by number",
    "uniform": "uniform in the anchors' box",
    "neighbours": "between neighbouring anchors",
}
PAPER_NOTE = (
    '<span class="stamp">Tinted: the paper\'s own figures</span> (arXiv 2503.17138), on its zoos of SVHN, CIFAR-10 and EuroSAT models. '
    "Other data, other models, one seed: compare the order of the rows, not the numbers."
)


def grouped(results: Results, zoo: str) -> dict[str, list[str]]:
    """A zoo's variants by kind, in the page's order."""
    runs = results.trained(zoo)
    twins = [v for name in runs for v in results.variants(zoo, "run") if v == f"{name}-zero-layer"]
    twins += [v for v in results.variants(zoo, "run") if v not in runs and v not in twins]
    rest = {kind: results.variants(zoo, kind) for kind in ("code", "refined", "model", "features")}
    return {"run": runs, "twin": twins, **rest}


def by_kind(results: Results, zoo: str, metric: str, columns: int, line: Callable[[str], str]) -> list[str]:
    """A line for each variant that has the metric, under a heading for each kind."""
    rows = []
    for kind, members in grouped(results, zoo).items():
        lines = [line(v) for v in members if results.value(zoo, v, metric)]
        rows += [f'<tr class="group"><th colspan="{columns}">{KINDS[kind]}</th></tr>', *lines] if lines else []
    return rows


def data_table(results: Results) -> str:
    """What was measured on what, plainly."""
    rows = []
    for zoo in results.zoos:
        a = results.about(zoo, "zoo")
        if "dataset" not in a:
            continue
        used, counts = a.get("checkpoints_used", {}), a.get("checkpoints", {})
        models = ", ".join(f"{split} {used.get(split, n)}" + (f" of {n}" if used.get(split, n) != n else "") for split, n in counts.items())
        images = a.get("images", [0, 0, 0])
        shape, sizes = "x".join(map(str, a["image_shape"])), f"train {images[0]:,}, val {images[1]:,}, test {images[2]:,}"
        cells = {
            f"{a['dataset']}, {shape}, {a['classes'] or 'no'} classes": "",
            f"{sizes} ({a['images_used']:,} used)": "",
            f"{a['models']:,} {a['architecture']} networks of {a['parameters']:,} parameters": "",
            models: "epochs " + ", ".join(map(str, a.get("epochs", ()))),
        }
        text = "".join(cell(escape(words), escape(small), "left") for words, small in cells.items())
        rows.append(f"<tr>{row_head(zoo)}{text}</tr>")
    return table(head(headings("Zoo; Data set; Images; Models; Checkpoints")), rows, "plain data") if rows else ""


_MAIN = ("agreement", "agreement_others", "identified", "accuracy_change", "l2_masked", "probe_r2", "generated_accuracy")


def main_figures(results: Results) -> tuple[list[str], list[list[Any]]]:
    """The main figures of every variant as columns and rows, means over seeds; None for what was not measured."""
    rows: list[list[Any]] = []
    for zoo in results.zoos:
        for variants in grouped(results, zoo).values():
            rows += [[zoo, v, *(results.mean(zoo, v, metric) for metric in _MAIN)] for v in variants]
    return ["zoo", "variant", *_MAIN], rows


_GOALS: dict[str, tuple[str, Callable[[Results, str], Verdict], Callable[[Verdict], str]]] = {
    "Accuracy kept": ("median change within 1 point", goals.accuracy_kept, lambda v: f"{percent(v.value, signed=True)} points"),
    "Agreement": ("at least 95 % of images", goals.agreement, lambda v: f"{percent(v.value)} %"),
    "Agreement, 40 %": (
        "10 points above the metric code", goals.small_agreement, lambda v: f"{percent(v.value)} against {percent(v.against)} %",
    ),
    "Probe": (
        "R2 of accuracy at least .95, or above weight statistics", goals.probe, lambda v: f"{number(v.value)} against {number(v.against)}",
    ),
    "New models": (
        "as accurate as their anchors, newer than copies, half as diverse", goals.new_models,
        lambda v: f"{percent(v.value)} of {percent(v.against)} %",
    ),
}  # fmt: skip
_ALL = {**_GOALS, "Outputs": ("no goal", goals.outputs, lambda v: f"{number(v.value, 1)} dB")}  # of all sorts of networks
_GLANCE = {
    "Outputs": "PSNR against the originals'",
    "Accuracy kept": "median change against the originals",
    "Agreement": "with the own original, share of images",
    "Agreement, 40 %": "at most 40 % latent numbers, against the metric code",
    "Probe": "R2 of test accuracy, against weight statistics",
    "New models": "mean accuracy, of their anchors'",
}


def goals_table(results: Results) -> str:
    """Where we stand: the goals, and what the best run or code of at most 55 % latent numbers makes of them."""
    return _judged(results, "Goal", lambda name: _GOALS[name][0], lambda verdict: _mark(verdict.met))


def glance_table(results: Results) -> str:
    """The same figures for whoever has no goals: nothing is met or missed."""
    return _judged(results, "Measure", _GLANCE.__getitem__, lambda verdict: "", _ALL, known=True)


def _judged(
    results: Results, heading: str, words: Callable[[str], str], mark: Callable[[Verdict], str], of: Any = None, known: bool = False
) -> str:
    """A row a goal, or, with ``known``, a row for each that can be judged on some zoo; the words under its name, and what stands before
    its figures."""
    rows = []
    for name, (_, judge, shown) in (of or _GOALS).items():
        verdicts = [judge(results, zoo) for zoo in results.zoos]
        if known and not any(v.who for v in verdicts):
            continue
        cells = [cell(mark(v) + shown(v), escape(_who(v))) if v.who else cell(DASH) for v in verdicts]
        rows.append(f"<tr>{row_head(name, small=words(name))}{''.join(cells)}</tr>")
    if not rows:
        return ""
    return table(head([(heading, "at 55 % latent numbers or fewer"), *((z, "") for z in results.zoos)]), rows, "plain goals")


def _mark(met: bool | None) -> str:
    word = "met" if met else "missed"
    return "" if met is None else f'<span class="{word}">{word}</span> '


def _who(verdict: Verdict) -> str:
    if not verdict.more:
        return f"{verdict.who}: {verdict.features}" if verdict.features else verdict.who
    distance, copy, diversity = (verdict.more.get(name) for name in ("distance", "copy", "diversity"))
    spread = "" if diversity is None else f", diversity {100 * diversity:.0f} % of theirs"
    return f"{verdict.who}: distance {number(distance)} (a copy: {number(copy)}){spread}"


# -- reconstruction --------------------------------------------------------------------------------------------------------


def reconstruction_table(results: Results, zoo: str, palette: Mapping[str, str]) -> str:
    names = headings(
        "Variant; Latent: numbers; Agreement: %; With others: %; Margin: points; Identified: %; "
        "Accuracy: before → after, %; Change: median, points; Masked L2: of weights; Variance kept: %; "
        "Softmax L2: of outputs"
    )
    rows = by_kind(results, zoo, "agreement", len(names), lambda v: _reconstruction_row(results, zoo, v, palette))
    small = (
        "Means over models and seeds, except the change in accuracy (median over models); small print: ± standard deviation over seeds "
        "where there are several, else over models. <b>With others</b>: agreement with other models' originals. <b>Margin</b>: the "
        "difference; about 0 for a collapsed decoder. <b>Identified</b>: own original is the best match. <b>Masked L2</b>: over real "
        "weights only. <b>Softmax L2</b>: between class probabilities, 0 to 1.41."
    )
    return table(head(names), rows) + note(small)


def _reconstruction_row(results: Results, zoo: str, variant: str, palette: Mapping[str, str]) -> str:
    about = results.about(zoo, variant)

    def get(metric: str) -> float | None:
        return results.mean(zoo, variant, metric)

    both = partial(figure_cell, results, zoo, variant)
    seeds = len(results.value(zoo, variant, "agreement"))
    small = str(about.get("baseline") or settings(about)) + (f"; {seeds} seeds" if seeds > 1 else "")
    broken = sum(results.value(zoo, variant, "non_finite"))
    lost = f"{number(broken, 0)} reconstruction{'s' if broken > 1 else ''} not finite: wrong everywhere" if broken else ""
    small = "; ".join(filter(None, (small, results.collapsed(zoo, variant), lost)))
    cells = (
        latent_cell(results, zoo, variant),
        both("agreement"),
        both("agreement_others"),
        both("agreement_margin"),
        both("identified"),
        cell(f"{percent(get('accuracy_original'))} → {percent(get('accuracy_reconstructed'))}"),
        both("accuracy_change", signed=True),
        both("l2_masked", shown=number),
        cell(percent(get("explained_variance"))),
        both("softmax_l2", shown=number),
    )
    return f"<tr>{row_head(variant, palette.get(variant), small)}{''.join(cells)}</tr>"


def latent_cell(results: Results, zoo: str, variant: str) -> str:
    """The cell with a variant's latent numbers and their share of the parameters."""
    numbers, share = (results.mean(zoo, variant, name) for name in ("latent_numbers", "latent_share"))
    return cell(number(numbers, 0), f"{100 * share:.0f} % of weights" if share is not None else "") if numbers else cell(DASH)


def figure_cell(results: Results, zoo: str, variant: str, metric: str, shown: Callable[..., str] = percent, **options: Any) -> str:
    """The cell with a metric's mean over seeds, and its spread in small print."""
    value, spread = results.over_seeds(zoo, variant, metric)
    return cell(shown(value, **options), plus_minus(spread, shown))


def settings(about: Mapping[str, Any]) -> str:
    """A run's settings in a few words."""
    if not about.get("losses"):
        return ""
    words = [str(about["losses"])]
    words += [f"beta {about['beta']:g}"] if about.get("beta") is not None and "B" in words[0] and "S" in words[0] else []
    words += [str(about["criterion"])] if "B" in words[0] and about.get("criterion") else []
    words += [f"{about['steps']:,} steps"] if about.get("steps") else []
    return ", ".join(words)


def side_by_side(
    results: Results, metric: str, paper: published.Rows, shown: Callable[[float | None], str], *, extra: Mapping[str, str] | None = None
) -> str:
    """One metric of our runs on our zoos, beside the paper's on its own; rows are loss combinations.

    ``extra``: the paper's row name -> the variant (or its beginning) that stands for it here, which is no run.
    """
    ours = results.zoos
    lines: list[tuple[str, str, dict[str, str]]] = []  # label, losses, variant by zoo
    for zoo in ours:
        for variant in results.trained(zoo):
            losses = results.losses(zoo, variant)
            label = variant if variant == losses else f"{variant} ({losses})"
            line = next((x for x in lines if x[0] == label), None)
            if line is None:
                lines.append(line := (label, losses, {}))
            line[2][zoo] = variant
    for name, stands in (extra or {}).items():
        no_runs = {z: [v for v in results.variants(z) if v.startswith(stands) and not results.losses(z, v)] for z in ours}
        lines.insert(0, (name, name, {z: named[0] for z, named in no_runs.items() if named}))
    lines += [(name, name, {}) for name in paper if name not in {losses for _, losses, _ in lines}]
    order = list(paper)
    lines.sort(key=lambda x: order.index(x[1]) if x[1] in order else len(order))
    rows, told = [], set()
    for label, losses, by_zoo in lines:
        cells = [cell(shown(results.mean(z, by_zoo[z], metric)) if z in by_zoo else DASH) for z in ours]
        paper_values = paper.get(losses, (None, None, None)) if losses not in told else (None, None, None)
        told.add(losses)
        cells += [cell(shown(v), kind="paper") for v in paper_values]
        rows.append(f"<tr>{row_head(label)}{''.join(cells)}</tr>")
    return _with_paper("Losses", ours, rows)


def _with_paper(first: str, ours: Sequence[str], rows: Sequence[str]) -> str:
    """Columns of our zoos, then the paper's, tinted."""
    n = len(ours)
    here, theirs = f'<th class="over" colspan="{n}">here</th>', '<th class="over paper" colspan="3">the paper</th>'
    names = [(first, ""), *((z, "") for z in ours), *((z, "") for z in published.ZOOS)]
    header = f'<tr><th class="over"></th>{here}{theirs}</tr>' + head(names, dict.fromkeys(range(n + 1, n + 4), "paper"))
    return table(header, rows, "plain")


# -- generation ------------------------------------------------------------------------------------------------------------


def generation_table(results: Results, zoo: str, palette: Mapping[str, str]) -> str:
    names = headings(
        "Models; Accuracy: mean, %; after fine-tuning: %; Diversity: L2 of weights; of outputs: L2 of logits; "
        "of classes: % of images; Distance to training: a copy's; Behaves unlike any: % of images, a copy's"
    )

    def line(label: str, variant: str, suffix: str, accuracy: str, novel: bool, small: str = "", color: str | None = None) -> str:
        get = lambda metric: results.mean(zoo, variant, metric)  # noqa: E731
        copy = lambda text: f"copy {text}"  # noqa: E731
        cells = (
            cell(percent(get(accuracy))),
            cell(percent(get("finetuned_accuracy")) if novel else DASH),
            cell(number(get(f"diversity{suffix}")), f"sorted {number(get('diversity_sorted'))}" if not suffix else ""),
            cell(number(get(f"diversity_behavior{suffix}"))),
            cell(percent(get(f"diversity_disagreement{suffix}"))),
            cell(number(get("novelty")), copy(number(get("novelty_reconstruction")))) if novel else cell(DASH),
            cell(percent(get("novelty_behavior")), copy(percent(get("novelty_behavior_reconstruction")))) if novel else cell(DASH),
        )
        return f"<tr>{row_head(label, color, small)}{''.join(cells)}</tr>"

    rows = [line("zoo: anchors", "zoo", "", "accuracy_anchors", False, "the best training models")]
    members = [v for kind in ("run", "twin", "code") for v in grouped(results, zoo)[kind]]
    for variant in [v for v in members if results.value(zoo, v, "generated_accuracy")]:
        h = results.mean(zoo, variant, "generated_bandwidth")
        small = f"bandwidth {h:g}" if h is not None else ""
        rows.append(line(variant, variant, "", "generated_accuracy", True, small, palette.get(variant)))
        if variant in results.trained(zoo):
            small = f"matched one to one to {variant}"
            rows.append(line("↳ zoo models as accurate", variant, "_matched", "accuracy_matched", False, small))
    small = (
        "Every sample is counted; none is selected. The bandwidth is the widest whose models keep, on validation images, the mean accuracy "
        "of their anchors' reconstructions (within 2 points). <b>Sorted</b>: after sorting every model's channels, so that permuted copies "
        "are the same. <b>Distance to training</b>: L2 to the nearest training model; a copy's is "
        "that of the anchors' reconstructions. <b>Behaves unlike any</b>: images on which the class differs from that of the most similar "
        "training model."
    )
    return table(head(names), rows) + note(small)


def samplings_table(results: Results, zoo: str, variant: str) -> str:
    """Every sampler of one run, of its first seed."""
    rows = []
    for r in results.table("samplings", zoo, variant, first_seed=True):
        h = f"bandwidth {r['bandwidth']:g}" if r.get("bandwidth") is not None else ""
        label = _SAMPLERS.get(str(r["sampler"]), str(r["sampler"])) + (f", {r['select']}" if r["select"] != "none" else "")
        columns = (("test_acc", percent), ("diversity", number), ("diversity_disagreement", percent), ("novelty", number))
        values = [shown(r[name]) for name, shown in (*columns, ("novelty_behavior", percent))]
        rows.append(f"<tr>{row_head(label, small=h)}{''.join(cell(v) for v in values)}</tr>")
    if not rows:
        return ""
    names = headings("Sampler; Accuracy: mean, %; Diversity: L2; of classes: %; Distance to training: L2; Unlike any: %")
    return table(head(names), rows, "plain")


def best_table(results: Results) -> str:
    """The paper's headline, the best model of each set, beside ours. A maximum over models: it hides what the rest do."""
    ours = results.zoos

    def best(zoo: str, losses: str, metric: str) -> str:
        """The run with the best model of those that were trained so; a run whose losses are not known stands under its name."""
        runs = [v for v in results.trained(zoo) if (results.losses(zoo, v) or v) == losses]
        return max(runs, key=lambda v: results.mean(zoo, v, metric) or 0.0, default="")

    lines = [("zoo", "zoo", "best_original", dict.fromkeys(ours, "zoo"))]
    for metric, word in (("best_reconstructed", "reconstructed"), ("best_generated", "generated"), ("best_finetuned", "fine-tuned")):
        combos = dict.fromkeys(results.losses(z, v) or v for z in ours for v in results.trained(z))
        for losses in dict.fromkeys([*combos, *published.BEST[word]]):
            lines.append((word, losses, metric, {z: best(z, losses, metric) for z in ours}))
    rows = []
    for word, losses, metric, by_zoo in lines:
        cells = [cell(percent(results.mean(z, by_zoo[z], metric))) for z in ours]
        cells += [cell(percent(v), kind="paper") for v in published.BEST[word].get(losses, (None, None, None))]
        rows.append(f"<tr>{row_head(word if losses == 'zoo' else f'{word}, {losses}')}{''.join(cells)}</tr>")
    return _with_paper("Best accuracy, %", ours, rows)


# -- probes and ablations --------------------------------------------------------------------------------------------------


def probe_table(results: Results, zoo: str, palette: Mapping[str, str]) -> str:
    targets = (("probe_r2", "test accuracy"), ("probe_r2_ggap", "generalisation gap"), ("probe_r2_epoch", "epoch"))
    more = (("probe_r2_whole", "whole latent"), ("probe_r2_decoded", "decoded"), ("probe_r2_decoded_drawn", "decoded, drawn images"))
    names = [("Features", ""), *((f"R2 of {what}", "mean token") for _, what in targets), *(("R2 of test accuracy", w) for _, w in more)]

    def line(variant: str) -> str:
        small = str(results.about(zoo, variant).get("baseline") or "")
        cells = "".join(figure_cell(results, zoo, variant, metric, number) for metric, _ in (*targets, *more))
        return f"<tr>{row_head(variant, palette.get(variant), small)}{cells}</tr>"

    rows = by_kind(results, zoo, "probe_r2", len(names), line)
    return table(head(names), rows, "plain") if rows else ""


def ablation_table(figures: Mapping[str, Mapping[str, OverSeeds]], metrics: Sequence[tuple[str, str, str]]) -> str:
    """One ablation: a row per variant, mean over seeds ± their standard deviation; metrics are (name, heading, unit)."""
    lines = []
    for variant, own in figures.items():
        cells, seeds = [], max((count for *_, count in own.values()), default=0)
        for metric, _, unit in metrics:
            shown = percent if unit.startswith("%") or unit == "points" else number
            mean, spread, _ = own.get(metric, (None, None, 0))
            cells.append(cell(shown(mean), plus_minus(spread, shown)))
        lines.append(f"<tr>{row_head(variant, small=f'{seeds} seeds' if seeds > 1 else '')}{''.join(cells)}</tr>")
    return table(head([("Variant", ""), *((heading, unit) for _, heading, unit in metrics)]), lines, "plain")
