"""Where we stand: the goals, and what the best run or code of a zoo makes of them."""

from __future__ import annotations

from collections.abc import Callable
from html import escape

from ..measure.results import Results
from .markup import DASH, cell, head, number, over_seeds, percent, row_head, table
from .tables import best, collapsed, zoos


def goals_table(results: Results) -> str:
    """Where we stand: the goals, and what the best run or code of at most 55 % latent numbers makes of them."""
    lines: list[tuple[str, str, Callable[[str], tuple[str, bool | None, str]]]] = [
        ("Accuracy kept", "median change within 1 point", lambda zoo: _kept_goal(results, zoo)),
        ("Agreement", "at least 95 % of images", lambda zoo: _agreement_goal(results, zoo)),
        ("Agreement, 40 %", "10 points above the metric code", lambda zoo: _small_goal(results, zoo)),
        ("Probe", "R2 of accuracy at least .95, or above weight statistics", lambda zoo: _probe_goal(results, zoo)),
        ("New models", "as accurate as their anchors, newer than copies, half as diverse", lambda zoo: _new_goal(results, zoo)),
    ]
    rows = []
    for name, what, of in lines:
        cells = []
        for zoo in zoos(results):
            value, met, who = of(zoo)
            mark = "" if met is None else f'<span class="{"met" if met else "missed"}">{"met" if met else "missed"}</span> '
            cells.append(cell(f"{mark}{value}", escape(who)))
        rows.append(f"<tr>{row_head(name, small=what)}{''.join(cells)}</tr>")
    return table(head([("Goal", "at 55 % latent numbers or fewer"), *((z, "") for z in zoos(results))]), rows, "plain goals")


def _within(results: Results, zoo: str, share: float = 0.555) -> list[str]:
    """Runs and codes of that size. One that has collapsed reaches no goal, whatever its figures."""
    found = [v for v in results.variants(zoo, "run", "code") if not collapsed(results, zoo, v)]
    return [v for v in found if (over_seeds(results, zoo, v, "latent_share")[0] or 0) <= share]


def _best(results: Results, zoo: str, metric: str, column: str, share: float = 0.555, but: str = "") -> tuple[float, str] | None:
    """The largest value, and whose; of changes, the smallest change."""
    scored = [(over_seeds(results, zoo, v, metric, column)[0], v) for v in _within(results, zoo, share) if v != but]
    known = [(value, v) for value, v in scored if value is not None]
    if not known:
        return None
    return min(known, key=lambda pair: abs(pair[0])) if metric == "accuracy_change" else max(known)


def _kept_goal(results: Results, zoo: str) -> tuple[str, bool | None, str]:
    """Either way: a decoder that answers with one good network gains accuracy over weak originals."""
    found = _best(results, zoo, "accuracy_change", "median")
    if found is None:
        return DASH, None, ""
    return percent(found[0], signed=True) + " points", abs(found[0]) <= 0.01, found[1]


def _agreement_goal(results: Results, zoo: str) -> tuple[str, bool | None, str]:
    found = _best(results, zoo, "agreement", "mean")
    return (DASH, None, "") if found is None else (percent(found[0]) + " %", found[0] >= 0.95, found[1])


def _small_goal(results: Results, zoo: str) -> tuple[str, bool | None, str]:
    found = _best(results, zoo, "agreement", "mean", 0.405, but="linear-metric-40")
    base = over_seeds(results, zoo, "linear-metric-40", "agreement")[0]
    if found is None or base is None:
        return DASH, None, ""
    return f"{percent(found[0])} against {percent(base)} %", found[0] >= base + 0.1, found[1]


def _probe_goal(results: Results, zoo: str) -> tuple[str, bool | None, str]:
    """Of the published features, mean tokens, or of what decoded networks answer, whichever says more."""
    found = []
    for metric, features in (("probe_r2", "mean token"), ("probe_r2_decoded", "answers of decoded networks")):
        who = best(results, zoo, _within(results, zoo), metric)
        value = over_seeds(results, zoo, who, metric)[0] if who else None
        if who and value is not None:
            found.append((value, f"{who}: {features}", max([0.0, *results.value(zoo, who, metric, "spread")])))
    if not found:
        return DASH, None, ""
    mine, who, noise = max(found)
    base = over_seeds(results, zoo, "weight-statistics", "probe_r2")[0]
    met = mine >= 0.95 or (base is not None and mine > base + noise)
    return f"{number(mine)} against {number(base)}", met, who


def _new_goal(results: Results, zoo: str) -> tuple[str, bool | None, str]:
    """Of runs and of codes, whichever's new models are the most accurate."""
    who = best(results, zoo, _within(results, zoo), "generated_accuracy")
    if who is None:
        return DASH, None, ""
    get = lambda metric, variant=who: over_seeds(results, zoo, variant, metric)[0] or 0.0  # noqa: E731
    accurate = get("generated_accuracy") >= get("accuracy_anchors", "zoo") - 0.02
    newer = get("novelty") > get("novelty_reconstruction")
    share = get("diversity") / max(get("diversity", "zoo"), 1e-12)
    text = f"{percent(get('generated_accuracy'))} of {percent(get('accuracy_anchors', 'zoo'))} %"
    distance = f"distance {number(get('novelty'))} (a copy: {number(get('novelty_reconstruction'))})"
    small = f"{who}: {distance}, diversity {100 * share:.0f} % of theirs"
    return text, accurate and newer and share >= 0.5, small
