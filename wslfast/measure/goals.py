"""The goals of an evaluation, and how its best run or closed-form code of at most 55 % latent numbers stands (docs/evaluation.md)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .results import Results

SHARE, SMALL_SHARE = 0.555, 0.405  # of the parameters, to rounding
METRIC_CODE, STATISTICS = "linear-metric-40", "weight-statistics"  # the variants that goals are held against


@dataclass(frozen=True)
class Verdict:
    """How one goal stands on one zoo.

    Attributes:
        who: the variant that was judged; empty where there is none.
        value: its figure. against: what the figure is held against, where the goal is relative.
        met: whether the goal is reached; None where it cannot be judged.
        features: of a probe, what it reads.
        more: further figures of the same variant.
    """

    who: str = ""
    value: float | None = None
    against: float | None = None
    met: bool | None = None
    features: str = ""
    more: Mapping[str, float] = field(default_factory=dict)


def accuracy_kept(results: Results, zoo: str) -> Verdict:
    """Median change in accuracy within 1 point, either way: a decoder that answers with one good network gains accuracy over weak
    originals."""
    changes = {v: results.mean(zoo, v, "accuracy_change") for v in _judged(results, zoo)}
    measured = {v: change for v, change in changes.items() if change is not None}
    if not measured:
        return Verdict()
    who = min(measured, key=lambda v: abs(measured[v]))
    return Verdict(who, measured[who], met=abs(measured[who]) <= 0.01)


def agreement(results: Results, zoo: str) -> Verdict:
    """Agreement on at least 95 % of images; of networks whose answers are classes."""
    if results.measure(zoo) == "psnr":
        return Verdict()
    who = results.best(zoo, _judged(results, zoo), "agreement")
    value = results.mean(zoo, who, "agreement") if who else None
    return Verdict() if who is None or value is None else Verdict(who, value, met=value >= 0.95)


def outputs(results: Results, zoo: str) -> Verdict:
    """PSNR of the outputs, of networks whose answers are no classes. No goal is set for it."""
    who = results.best(zoo, _judged(results, zoo), "psnr")
    return Verdict() if who is None else Verdict(who, results.mean(zoo, who, "psnr"))


def small_agreement(results: Results, zoo: str) -> Verdict:
    """With at most 40 % latent numbers, agreement 10 points above the metric code's at 40 %."""
    others = [v for v in _judged(results, zoo, SMALL_SHARE) if v != METRIC_CODE and results.measure(zoo) == "agreement"]
    who, base = results.best(zoo, others, "agreement"), results.mean(zoo, METRIC_CODE, "agreement")
    value = results.mean(zoo, who, "agreement") if who else None
    return Verdict() if who is None or value is None or base is None else Verdict(who, value, base, value >= base + 0.1)


def probe(results: Results, zoo: str) -> Verdict:
    """R2 of test accuracy of at least .95, or above weight statistics by more than the spread: of mean tokens, the published features,
    or of what decoded networks answer, whichever says more."""
    scores = []
    for metric, features in (("probe_r2", "mean token"), ("probe_r2_decoded", "answers of decoded networks")):
        who = results.best(zoo, _judged(results, zoo), metric)
        value = results.mean(zoo, who, metric) if who else None
        if who and value is not None:
            scores.append((value, who, features, max([0.0, *results.value(zoo, who, metric, "spread")])))
    if not scores:
        return Verdict()
    value, who, features, noise = max(scores)
    base = results.mean(zoo, STATISTICS, "probe_r2")
    return Verdict(who, value, base, value >= 0.95 or (base is not None and value > base + noise), features)


def new_models(results: Results, zoo: str) -> Verdict:
    """New models of whichever run or code has the most accurate ones: as accurate as their anchors (within 2 points), further from
    training models than copies, and half as diverse as the anchors."""
    who = results.best(zoo, _judged(results, zoo), "generated_accuracy")
    if who is None:
        return Verdict()
    get = lambda metric, variant=who: results.mean(zoo, variant, metric) or 0.0  # noqa: E731
    value, against = get("generated_accuracy"), get("accuracy_anchors", "zoo")
    more = {"distance": get("novelty"), "copy": get("novelty_reconstruction")}
    if get("diversity", "zoo") > 0:  # a zoo of few models has one anchor, which has none
        more["diversity"] = get("diversity") / get("diversity", "zoo")
    met = value >= against - 0.02 and more["distance"] > more["copy"] and more.get("diversity", 0.0) >= 0.5
    return Verdict(who, value, against, met, more=more)


def _judged(results: Results, zoo: str, share: float = SHARE) -> list[str]:
    """Runs and codes of at most that size. One that has collapsed reaches no goal, whatever its figures."""
    candidates = [v for v in results.variants(zoo, "run", "code") if not results.collapsed(zoo, v)]
    return [v for v in candidates if (results.mean(zoo, v, "latent_share") or 0) <= share]
