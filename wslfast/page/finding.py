"""What an evaluation found, in words: the page's title, its headline, and how much a sample of that size can say."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from ..measure.results import Results, Row
from .html import percent

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
    for zoo in results.zoos:
        run = results.best(zoo, results.trained(zoo), "agreement")
        if run is not None:
            value = "collapse" if results.collapsed(zoo, run) else f"{percent(results.mean(zoo, run, 'agreement'))} % agreement"
            parts.append(f"{named(run)}: {value} on {zoo}")
    return "; ".join(parts) or "Nothing evaluated yet"


def headline(results: Results) -> str:
    """The result in a sentence, whichever way it came out: the best run of each zoo, and beside it the best run on structure alone
    and the best closed-form code that is no larger. A collapse is called one, and a small sample small."""
    parts = []
    alone = len(results.zoos) == 1
    for zoo in results.zoos:
        runs = results.trained(zoo)
        run = results.best(zoo, runs, "agreement")
        if run is None:
            continue
        share, identified = results.mean(zoo, run, "latent_share"), results.mean(zoo, run, "identified")
        codes = [v for v in results.variants(zoo, "code") if share is None or (results.mean(zoo, v, "latent_share") or 0) <= share + 0.005]
        structure = [v for v in runs if v != run and results.losses(zoo, v) and "B" not in results.losses(zoo, v)]
        others = {"structure alone": results.best(zoo, structure, "agreement"), "best closed form": results.best(zoo, codes, "agreement")}
        known = [] if identified is None else [f"{percent(identified)} % identified"]
        value = {v: f"{percent(results.mean(zoo, v, 'agreement'))} %" for v in (run, *others.values()) if v}
        networks = test_networks(results, zoo)
        few = [f"{networks} test networks, a small sample"] if networks is not None and networks < SMALL else []
        fallen = bool(results.collapsed(zoo, run))
        if alone:
            size = f" at {100 * share:.0f} % of the numbers" if share else ""
            about = f" ({', '.join(known + few)})" if known + few else ""
            without, code = others.values()
            rest = f"; by {named(without)}, without behavior, on {value[without]}" if without else ""
            rest += f"; the best closed-form code, {named(code)}, on {value[code]}" if code else ""
            if fallen:
                strangers = percent(results.mean(zoo, run, "agreement_others"))
                first = (
                    f"{named(run)} has collapsed: its reconstructions agree with other models' originals ({strangers} % of images) as much"
                )
                return f"On {zoo}, {first} as with their own ({value[run]}{', ' + few[0] if few else ''}){rest}."
            return f"On {zoo}, reconstructions by {named(run)} agree with their originals on {value[run]} of images{size}{about}{rest}."
        known += [f"{named(run)} has collapsed: as much agreement with other models' originals"] if fallen else []
        known += [f"{what} {value[v]}" for what, v in others.items() if v] + few
        parts.append(f"{value[run]} of images on {zoo}" + (f" ({'; '.join(known)})" if known else ""))
    return f"Agreement of reconstructions with their originals: {joined(parts)}." if parts else "Nothing was evaluated yet."


def test_networks(results: Results, zoo: str) -> int | None:
    """Networks (not checkpoints) among the test models; None where tables do not say."""
    rows = [r for r in results.tables.get("models", ()) if r.get("zoo") == zoo]
    return len({r.get("model") for r in rows}) or None


def small_samples(results: Results) -> str:
    """What a reader should know of zoos with few test networks: how far the best run's agreement is known. Empty where there are many."""
    sentences = []
    for zoo in results.zoos:
        networks, run = test_networks(results, zoo), results.best(zoo, results.trained(zoo), "agreement")
        if networks is None or networks >= SMALL:
            continue
        error = _standard_error(results.table("models", zoo, run, first_seed=True)) if run else None
        known = "" if error is None else f", so that the agreement of {named(str(run))} is known to about ±{200 * error:.1f} points"
        sentences.append(f"{zoo} has {networks} test network{'s' if networks != 1 else ''}{known}")
    if not sentences:
        return ""
    text = "; ".join(sentences)
    return (
        f"Small samples: {text}. Differences of that size between variants may be chance, and R2 of probes on so few networks means little."
    )


def _standard_error(rows: Sequence[Row]) -> float | None:
    """Of the mean agreement over networks, each the mean of its checkpoints; None of fewer than two."""
    of: dict[object, list[float]] = {}
    for row in rows:
        if isinstance(row.get("agreement"), (int, float)):
            of.setdefault(row.get("model"), []).append(row["agreement"])
    means = [statistics.fmean(values) for values in of.values()]
    return statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else None
