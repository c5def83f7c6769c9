"""The page's tables, from results."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from ..measure.reconstruction import collapse
from ..measure.results import Results
from . import published
from .markup import DASH, cell, head, note, number, over_seeds, percent, row_head, table

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


def zoos(results: Results) -> list[str]:
    return list(dict.fromkeys(str(r["zoo"]) for r in results.rows))


def trained(results: Results, zoo: str) -> list[str]:
    """Runs of a zoo that are not somebody's baseline: structure alone first, then with behaviour, then by name."""
    runs = [v for v in results.variants(zoo, "run") if not results.about(zoo, v).get("baseline")]
    return sorted(runs, key=lambda v: ("B" in str(results.about(zoo, v).get("losses", "")), len(v), v))


def grouped(results: Results, zoo: str) -> dict[str, list[str]]:
    """A zoo's variants by kind, in the page's order."""
    runs = trained(results, zoo)
    twins = [v for name in runs for v in results.variants(zoo, "run") if v == f"{name}-zero-layer"]
    twins += [v for v in results.variants(zoo, "run") if v not in runs and v not in twins]
    rest = {kind: results.variants(zoo, kind) for kind in ("code", "refined", "model", "features")}
    return {"run": runs, "twin": twins, **rest}


def best(results: Results, zoo: str, variants: Sequence[str], metric: str) -> str | None:
    """The variant with the highest mean of a metric; of those that have collapsed only where there is no other."""
    known = [(not collapsed(results, zoo, v), over_seeds(results, zoo, v, metric)[0], v) for v in variants]
    scored = [(kept, value, v) for kept, value, v in known if value is not None]
    return max(scored)[2] if scored else None


def collapsed(results: Results, zoo: str, variant: str) -> str:
    """What to say of a variant that answers every model with one network; nothing of the others."""
    return collapse(over_seeds(results, zoo, variant, "agreement_margin")[0])


def data_table(results: Results) -> str:
    """What was measured on what, plainly."""
    rows = []
    for zoo in zoos(results):
        a = results.about(zoo, "zoo")
        if "dataset" not in a:
            continue
        used, there = a.get("checkpoints_used", {}), a.get("checkpoints", {})
        models = ", ".join(f"{split} {used.get(split, n)}" + (f" of {n}" if used.get(split, n) != n else "") for split, n in there.items())
        images = a.get("images", [0, 0, 0])
        rows.append(
            "<tr>"
            + row_head(zoo)
            + cell(escape(f"{a['dataset']}, {'x'.join(map(str, a['image_shape']))}, {a['classes']} classes"), kind="left")
            + cell(escape(f"train {images[0]:,}, val {images[1]:,}, test {images[2]:,}" + f" ({a['images_used']:,} used)"), kind="left")
            + cell(escape(f"{a['models']:,} {a['architecture']} networks of {a['parameters']:,} parameters"), kind="left")
            + cell(escape(models), escape("epochs " + ", ".join(map(str, a.get("epochs", ())))), kind="left")
            + "</tr>"
        )
    names = (("Zoo", ""), ("Data set", ""), ("Images", ""), ("Models", ""), ("Checkpoints", ""))
    return table(head(names), rows, "plain data") if rows else ""


# -- reconstruction --------------------------------------------------------------------------------------------------------


def reconstruction_table(results: Results, zoo: str, palette: Mapping[str, str]) -> str:
    names = (
        ("Variant", ""),
        ("Latent", "numbers"),
        ("Agreement", "%"),
        ("With others", "%"),
        ("Margin", "points"),
        ("Identified", "%"),
        ("Accuracy", "before → after, %"),
        ("Change", "median, points"),
        ("Masked L2", "of weights"),
        ("Variance kept", "%"),
        ("Softmax L2", "of outputs"),
    )
    rows = []
    for kind, members in grouped(results, zoo).items():
        variants = [v for v in members if results.value(zoo, v, "agreement")]
        if variants:
            rows.append(f'<tr class="group"><th colspan="{len(names)}">{KINDS[kind]}</th></tr>')
        rows += [_reconstruction_row(results, zoo, v, palette) for v in variants]
    small = (
        "Means over models and seeds, except the change in accuracy (median over models); small print: ± standard deviation over seeds "
        "where there are several, else over models. <b>With others</b>: agreement with other models' originals. <b>Margin</b>: the "
        "difference; about 0 for a collapsed decoder. <b>Identified</b>: own original is the best match. <b>Masked L2</b>: over real "
        "weights only. <b>Softmax L2</b>: between class probabilities, 0 to 1.41."
    )
    return table(head(names), rows) + note(small)


def _reconstruction_row(results: Results, zoo: str, variant: str, palette: Mapping[str, str]) -> str:
    about = results.about(zoo, variant)

    def get(metric: str, column: str = "mean") -> float | None:
        return over_seeds(results, zoo, variant, metric, column)[0]

    def both(metric: str, column: str = "mean", shown: Callable[..., str] = percent, **options: Any) -> str:
        value, spread, count = over_seeds(results, zoo, variant, metric, column)
        if count < 2:
            spread = get(metric, "spread")
        return cell(shown(value, **options), f"± {shown(spread)}" if spread is not None else "")

    numbers, share = get("latent_numbers"), get("latent_share")
    latent = cell(number(numbers, 0), f"{100 * share:.0f} % of weights" if share is not None else "") if numbers else cell(DASH)
    seeds = len(results.value(zoo, variant, "agreement"))
    small = str(about.get("baseline") or settings(about)) + (f"; {seeds} seeds" if seeds > 1 else "")
    small = "; ".join(filter(None, (small, collapsed(results, zoo, variant))))
    cells = (
        latent,
        both("agreement"),
        both("agreement_others"),
        both("agreement_margin"),
        both("identified"),
        cell(f"{percent(get('accuracy_original'))} → {percent(get('accuracy_reconstructed'))}"),
        both("accuracy_change", "median", signed=True),
        both("l2_masked", shown=number),
        cell(percent(get("explained_variance"))),
        both("softmax_l2", shown=number),
    )
    return f"<tr>{row_head(variant, palette.get(variant), small)}{''.join(cells)}</tr>"


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

    ``extra``: the paper's row name -> the variant (or its beginning) that stands for it here.
    """
    ours = zoos(results)
    lines: list[tuple[str, str, dict[str, str]]] = []  # label, losses, variant by zoo
    for zoo in ours:
        for variant in trained(results, zoo):
            losses = str(results.about(zoo, variant).get("losses", ""))
            label = variant if variant == losses else f"{variant} ({losses})"
            line = next((x for x in lines if x[0] == label), None)
            if line is None:
                lines.append(line := (label, losses, {}))
            line[2][zoo] = variant
    for name, stands in (extra or {}).items():
        lines.insert(0, (name, name, {z: v for z in ours for v in results.variants(z) if v.startswith(stands)}))
    lines += [(name, name, {}) for name in paper if name not in {losses for _, losses, _ in lines}]
    order = list(paper)
    lines.sort(key=lambda x: order.index(x[1]) if x[1] in order else len(order))
    rows, told = [], set()
    for label, losses, by_zoo in lines:
        cells = [cell(shown(over_seeds(results, z, by_zoo[z], metric)[0]) if z in by_zoo else DASH) for z in ours]
        theirs = paper.get(losses, (None, None, None)) if losses not in told else (None, None, None)
        told.add(losses)
        cells += [cell(shown(v), kind="paper") for v in theirs]
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
    names = (
        ("Models", ""),
        ("Accuracy", "mean, %"),
        ("after fine-tuning", "%"),
        ("Diversity", "L2 of weights"),
        ("of outputs", "L2 of logits"),
        ("of classes", "% of images"),
        ("Distance to training", "a copy's"),
        ("Behaves unlike any", "% of images, a copy's"),
    )

    def line(label: str, variant: str, suffix: str, accuracy: str, novel: bool, small: str = "", color: str | None = None) -> str:
        get = lambda metric: over_seeds(results, zoo, variant, metric)[0]  # noqa: E731
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
        h = over_seeds(results, zoo, variant, "generated_bandwidth")[0]
        small = f"bandwidth {h:g}" if h is not None else ""
        rows.append(line(variant, variant, "", "generated_accuracy", True, small, palette.get(variant)))
        if variant in trained(results, zoo):
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
    found = results.table("samplings", zoo, variant)
    for r in [r for r in found if r["seed"] == min(x["seed"] for x in found)]:
        h = f"bandwidth {r['bandwidth']:g}" if r.get("bandwidth") is not None else ""
        label = _SAMPLERS.get(str(r["sampler"]), str(r["sampler"])) + (f", {r['select']}" if r["select"] != "none" else "")
        columns = (("test_acc", percent), ("diversity", number), ("diversity_disagreement", percent), ("novelty", number))
        values = [shown(r[name]) for name, shown in (*columns, ("novelty_behavior", percent))]
        rows.append(f"<tr>{row_head(label, small=h)}{''.join(cell(v) for v in values)}</tr>")
    if not rows:
        return ""
    names = (
        ("Sampler", ""),
        ("Accuracy", "mean, %"),
        ("Diversity", "L2"),
        ("of classes", "%"),
        ("Distance to training", "L2"),
        ("Unlike any", "%"),
    )
    return table(head(names), rows, "plain")


def best_table(results: Results) -> str:
    """The paper's headline, the best model of each set, beside ours. A maximum over models: it hides what the rest do."""
    ours = zoos(results)
    lines = [("zoo", "zoo", "best_original", dict.fromkeys(ours, "zoo"))]
    for metric, word in (("best_reconstructed", "reconstructed"), ("best_generated", "generated"), ("best_finetuned", "fine-tuned")):
        combos = dict.fromkeys(str(results.about(z, v).get("losses", v)) for z in ours for v in trained(results, z))
        for losses in dict.fromkeys([*combos, *published.BEST[word]]):
            by_zoo = {z: next((v for v in trained(results, z) if results.about(z, v).get("losses") == losses), "") for z in ours}
            lines.append((word, losses, metric, by_zoo))
    rows = []
    for word, losses, metric, by_zoo in lines:
        cells = [cell(percent(over_seeds(results, z, by_zoo[z], metric)[0])) for z in ours]
        cells += [cell(percent(v), kind="paper") for v in published.BEST[word].get(losses, (None, None, None))]
        rows.append(f"<tr>{row_head(word if losses == 'zoo' else f'{word}, {losses}')}{''.join(cells)}</tr>")
    return _with_paper("Best accuracy, %", ours, rows)


# -- probes and ablations --------------------------------------------------------------------------------------------------


def probe_table(results: Results, zoo: str, palette: Mapping[str, str]) -> str:
    targets = (("probe_r2", "test accuracy"), ("probe_r2_ggap", "generalisation gap"), ("probe_r2_epoch", "epoch"))
    more = (("probe_r2_whole", "whole latent"), ("probe_r2_decoded", "decoded"), ("probe_r2_decoded_drawn", "decoded, drawn images"))
    names = [("Features", ""), *((f"R2 of {what}", "mean token") for _, what in targets), *(("R2 of test accuracy", w) for _, w in more)]
    rows = []
    for kind, members in grouped(results, zoo).items():
        variants = [v for v in members if results.value(zoo, v, "probe_r2")]
        if variants:
            rows.append(f'<tr class="group"><th colspan="{len(names)}">{KINDS[kind]}</th></tr>')
        for variant in variants:
            cells = []
            for metric in (m for m, _ in (*targets, *more)):
                value, spread, count = over_seeds(results, zoo, variant, metric)
                if count < 2:
                    spread = next(iter(results.value(zoo, variant, metric, "spread")), None)
                cells.append(cell(number(value), f"± {number(spread)}" if spread is not None else ""))
            small = str(results.about(zoo, variant).get("baseline") or "")
            rows.append(f"<tr>{row_head(variant, palette.get(variant), small)}{''.join(cells)}</tr>")
    return table(head(names), rows, "plain") if rows else ""


def ablation_table(rows: Sequence[Mapping[str, Any]], metrics: Sequence[tuple[str, str, str]]) -> str:
    """One ablation: a row a variant, mean over seeds ± their standard deviation; metrics are (name, heading, unit)."""
    lines = []
    for variant in dict.fromkeys(r["variant"] for r in rows):
        own = [r for r in rows if r["variant"] == variant]
        seeds = {r["seed"] for r in own}
        cells = []
        for metric, _, unit in metrics:
            column = "median" if metric == "accuracy_change" else "mean"
            values = [r[column] for r in own if r["metric"] == metric and isinstance(r[column], (int, float))]
            shown = percent if unit.startswith("%") or unit == "points" else number
            mean = statistics.fmean(values) if values else None
            spread = statistics.stdev(values) if len(values) > 1 else None
            cells.append(cell(shown(mean), f"± {shown(spread)}" if spread is not None else ""))
        lines.append(f"<tr>{row_head(str(variant), small=f'{len(seeds)} seeds' if len(seeds) > 1 else '')}{''.join(cells)}</tr>")
    return table(head([("Variant", ""), *((heading, unit) for _, heading, unit in metrics)]), lines, "plain")
