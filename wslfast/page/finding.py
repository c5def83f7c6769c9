"""What an evaluation found, in words: the page's title, its headline, and how much a sample of that size can say."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence

from ..measure.results import Results, Row
from .html import percent, worth

MANY = 4  # zoos that a sentence can list
SMALL = 30  # test networks below which a sample is called small


def named(variant: str) -> str:
    """A variant's name inside a sentence, where a run called ``a`` would be read as a word."""
    return f"“{variant}”"


def joined(names: Sequence[str]) -> str:
    """Names as a list in a sentence."""
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1] if names else "nothing"


def title(results: Results) -> str:
    """The finding as a browser's tab shows it: the best run of each zoo and its agreement."""
    parts = []
    if len(results.zoos) > MANY:
        run, values = common_run(results)
        return f"{named(run)} on {len(results.zoos)} zoos" if run and values else "Nothing evaluated yet"
    for zoo in results.zoos:
        run, measure = results.best_run(zoo), results.measure(zoo)
        if run is not None:
            what = f"{worth(measure, results.mean(zoo, run, measure))} {'PSNR' if measure == 'psnr' else 'agreement'}"
            parts.append(f"{named(run)}: {'collapse' if results.collapsed(zoo, run) else what} on {zoo}")
    return "; ".join(parts) or "Nothing evaluated yet"


def headline(results: Results) -> str:
    """The result in a sentence, whichever way it came out: the best run of each zoo, and beside it the best run on structure alone
    and the best closed-form code that is no larger. A collapse is called one, and a small sample small."""
    parts = []
    alone = len(results.zoos) == 1
    if len(results.zoos) > MANY:
        return _of_many(results)
    for zoo in results.zoos:
        runs, measure = results.trained(zoo), results.measure(zoo)
        run = results.best(zoo, runs, measure)
        if run is None:
            continue
        share, identified = results.mean(zoo, run, "latent_share"), results.mean(zoo, run, "identified")
        codes = [v for v in results.variants(zoo, "code") if share is None or (results.mean(zoo, v, "latent_share") or 0) <= share + 0.005]
        structure = [v for v in runs if v != run and results.losses(zoo, v) and "B" not in results.losses(zoo, v)]
        others = {"structure alone": results.best(zoo, structure, measure), "best closed form": results.best(zoo, codes, measure)}
        words = [] if identified is None else [f"{percent(identified)} % identified"]
        value = {v: worth(measure, results.mean(zoo, v, measure)) for v in (run, *others.values()) if v}
        networks = test_networks(results, zoo)
        few = [f"{networks} test networks, a small sample"] if networks is not None and networks < SMALL else []
        fallen = bool(results.collapsed(zoo, run))
        if alone:
            size = f" at {100 * share:.0f} % of the numbers" if share else ""
            about = f" ({', '.join(words + few)})" if words + few else ""
            without, code = others.values()
            to = "to" if measure == "psnr" else "on"
            rest = f"; by {named(without)}, without behavior, {to} {value[without]}" if without else ""
            rest += f"; the best closed-form code, {named(code)}, {to} {value[code]}" if code else ""
            if measure == "psnr":
                what = f"outputs of reconstructions by {named(run)} are like their originals' to {value[run]} (PSNR)"
                return f"On {zoo}, {what}{size}{about}{rest}."
            if fallen:
                strangers = percent(results.mean(zoo, run, "agreement_others"))
                first = (
                    f"{named(run)} has collapsed: its reconstructions agree with other models' originals ({strangers} % of images) as much"
                )
                return f"On {zoo}, {first} as with their own ({value[run]}{', ' + few[0] if few else ''}){rest}."
            return f"On {zoo}, reconstructions by {named(run)} agree with their originals on {value[run]} of images{size}{about}{rest}."
        words += [f"{named(run)} has collapsed: as much agreement with other models' originals"] if fallen else []
        words += [f"{what} {value[v]}" for what, v in others.items() if v] + few
        parts.append(f"{value[run]} {'PSNR' if measure == 'psnr' else 'of images'} on {zoo}" + (f" ({'; '.join(words)})" if words else ""))
    return f"Agreement of reconstructions with their originals: {joined(parts)}." if parts else "Nothing was evaluated yet."


def common_run(results: Results) -> tuple[str | None, dict[str, float]]:
    """The run that is on most zoos, and its value on each zoo by the zoo's own measure; of several the one with the highest mean over the
    zoos of the commonest measure."""
    values: dict[str, dict[str, float]] = {}
    for zoo in results.zoos:
        for run in results.trained(zoo):
            value = results.mean(zoo, run, results.measure(zoo))
            if value is not None:
                values.setdefault(run, {})[zoo] = value
    commonest = _commonest(results, results.zoos)

    def rank(run: str) -> tuple[int, float]:
        alike = [value for zoo, value in values[run].items() if results.measure(zoo) == commonest]
        return len(values[run]), statistics.fmean(alike) if alike else -math.inf

    best = max(values, key=rank, default=None)
    return best, values.get(best or "", {})


def _commonest(results: Results, zoos: Iterable[str]) -> str:
    """The measure of most of these zoos; empty without zoos."""
    counts = Counter(results.measure(zoo) for zoo in zoos)
    return counts.most_common(1)[0][0] if counts else ""


def _of_many(results: Results) -> str:
    """The headline of more zoos (or architectures of a zoo) than a sentence can list: the mean, the least and the greatest."""
    run, values = common_run(results)
    if run is None:
        return "Nothing was evaluated yet."
    measure, all_zoos = _commonest(results, values), len(values)
    values = {zoo: value for zoo, value in values.items() if results.measure(zoo) == measure}  # the others have another unit
    low, high = min(values, key=lambda zoo: values[zoo]), max(values, key=lambda zoo: values[zoo])
    mean = worth(measure, statistics.fmean(values.values()))
    fallen = sum(bool(results.collapsed(zoo, run)) for zoo in values)
    more = f"; on {fallen} of them it has collapsed" if fallen else ""
    what = "are like their originals' to" if measure == "psnr" else "agree with their originals on"
    unit = " (PSNR)" if measure == "psnr" else " of images"
    over = f"{len(values)}" if len(values) == all_zoos else f"{len(values)} of {all_zoos}"
    return (
        f"Over {over} zoos, reconstructions by {named(run)} {what} {mean}{unit} in the mean: from {worth(measure, values[low])} on "
        f"{low} to {worth(measure, values[high])} on {high}{more}."
    )


def test_networks(results: Results, zoo: str) -> int | None:
    """Networks (not checkpoints) among the test models; None where tables do not say."""
    rows = [r for r in results.tables.get("models", ()) if r.get("zoo") == zoo]
    return len({r.get("model") for r in rows}) or None


def small_samples(results: Results) -> str:
    """What a reader should know of zoos with few test networks: how far the best run's agreement is known. Empty where there are many."""
    sentences = []
    for zoo in results.zoos:
        networks, run = test_networks(results, zoo), results.best_run(zoo)
        if networks is None or networks >= SMALL:
            continue
        classes = results.measure(zoo) == "agreement"
        error = _standard_error(results.table("models", zoo, run, first_seed=True)) if run and classes else None
        uncertainty = "" if error is None else f", so that the agreement of {named(str(run))} is known to about ±{200 * error:.1f} points"
        sentences.append(f"{zoo} has {networks} test network{'s' if networks != 1 else ''}{uncertainty}")
    if not sentences:
        return ""
    text = "; ".join(sentences[:MANY]) + (f"; and {len(sentences) - MANY} more have few" if len(sentences) > MANY else "")
    probes = ", and R2 of probes on so few networks means little" if any(results.measure(z) == "agreement" for z in results.zoos) else ""
    return f"Small samples: {text}. Differences of that size between variants may be chance{probes}."


def _standard_error(rows: Sequence[Row]) -> float | None:
    """Of the mean agreement over networks, each the mean of its checkpoints; None of fewer than two."""
    of: dict[object, list[float]] = {}
    for row in rows:
        if isinstance(row.get("agreement"), (int, float)):
            of.setdefault(row.get("model"), []).append(row["agreement"])
    means = [statistics.fmean(values) for values in of.values()]
    return statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else None
