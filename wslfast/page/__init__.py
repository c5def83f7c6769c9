"""The page of an evaluation: from tables to one HTML file that loads nothing. It draws what rows say and measures nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..files import write_text
from ..measure.results import Results, read_results
from . import drawing, extras, figures, published, tables
from .html import beside, document, figure, note, number, percent, section

__all__ = ["render", "report"]


def report(out: str | Path, *, page: str | Path | None = None) -> Path:
    """Draw the page from the tables in ``out``, and return its path; nothing is computed again.

    ``ablations.csv`` and ``gradients.csv`` (and JSON files of those names) are shown where they are there, or in ``out/analysis``.

    Args:
        out: folder that an evaluation wrote.
        page: where to write the page; default: ``out/report.html``.

    Raises:
        WslfastError: no results there, a damaged table, or matplotlib is missing.
    """
    path = Path(page) if page is not None else Path(out) / "report.html"
    write_text(path, render(read_results(out)))
    return path


def render(results: Results) -> str:
    """The page. Raises WslfastError if matplotlib is missing."""
    drawing.require_matplotlib()
    body = [
        tables.data_table(results),
        section(
            "Where we stand",
            tables.goals_table(results),
            lead="The goals of this evaluation, and the best run or closed-form code of "
            "at most 55 % latent numbers on each zoo. All figures are from test models and test images.",
        ),
        _reconstruction(results),
        _probes(results),
        _generation(results),
        _maps(results),
        _training(results),
        extras.ablations(results),
        extras.gradients(results),
    ]
    title = "Weight-space autoencoders on " + _join(results.zoos)
    return document(title, headline(results), "\n".join(body), _facts(results))


def headline(results: Results) -> str:
    """The result in a sentence, whichever way it came out: the best run of each zoo, and beside it the best run on structure alone
    and the best closed-form code that is no larger."""
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
        known += [words] if (words := results.collapsed(zoo, run)) else []
        value = {v: f"{percent(results.mean(zoo, v, 'agreement'))} %" for v in (run, *others.values()) if v}
        if alone:
            size = f" at {100 * share:.0f} % of the numbers" if share else ""
            about = f" ({', '.join(known)})" if known else ""
            without, code = others.values()
            rest = f"; by {without}, without behavior, on {value[without]}" if without else ""
            rest += f"; the best closed-form code, {code}, on {value[code]}" if code else ""
            return f"On {zoo}, reconstructions by {run} agree with their originals on {value[run]} of images{size}{about}{rest}."
        known += [f"{what} {value[v]}" for what, v in others.items() if v]
        parts.append(f"{value[run]} of images on {zoo}" + (f" ({'; '.join(known)})" if known else ""))
    return f"Agreement of reconstructions with their originals: {_join(parts)}." if parts else "Nothing was evaluated yet."


def _by_zoo(results: Results, parts: Callable[[str], Sequence[str]]) -> list[str]:
    """The parts of each zoo that are not empty, under its name where there are several zoos."""
    shown = {zoo: [part for part in parts(zoo) if part] for zoo in results.zoos}
    names = {zoo: f"<h3>{escape(zoo)}</h3>" if len(shown) > 1 else "" for zoo in shown}
    return [part for zoo, own in shown.items() if own for part in (names[zoo], *own)]


def _beside_the_paper(*titled: tuple[str, str], text: str) -> list[str]:
    return ["<h3>Beside the paper</h3>", beside(*titled), note(f"{tables.PAPER_NOTE} {text}")]


def _reconstruction(results: Results) -> str:
    def parts(zoo: str) -> list[str]:
        colors = figures.palette(results, zoo)
        code = results.best(zoo, results.variants(zoo, "code"), "agreement")
        shown = [*results.trained(zoo)[:4], *([code] if code else [])]
        return [
            figure(
                figures.overview(results, zoo, colors),
                "Dots are means over models, bars the middle 60 % of models. A reconstruction that has collapsed to one good network "
                "agrees with everybody's original: its filled and open dots coincide.",
            ),
            tables.reconstruction_table(results, zoo, colors),
            figure(
                figures.histograms(results, zoo, shown, colors),
                "Above, agreement with the own original (outline) and, mean over them, with other models' originals (grey). Below, test "
                "accuracy of reconstructions (outline) and originals (grey). Triangles mark medians.",
            ),
        ]

    if not any(results.trained(zoo) for zoo in results.zoos):
        return ""
    paper = _beside_the_paper(
        ("Agreement with the own original, %", tables.side_by_side(results, "agreement", published.AGREEMENT, percent)),
        ("L2 distance in weights", tables.side_by_side(results, "l2_masked", published.L2, number)),
        text="Its L2 includes the decoder's output on padding; ours is over real weights alone. Its encoder attends over the batch, so "
        "a model's code depends on its neighbours; ours does not.",
    )
    lead = "Encode a held-out model, decode it, and compare the network that comes out with the one that went in."
    return section("Reconstruction", *_by_zoo(results, parts), *paper, lead=lead)


def _probes(results: Results) -> str:
    def parts(zoo: str) -> list[str]:
        colors = figures.palette(results, zoo)
        caption = (
            "Dots: R2 on test models; bars: standard deviation over seeds, or over resamples of the test models. Values below −0.5 are at "
            "the edge. Decoded: features are what the network that a latent decodes to answers on images without labels (how sure it is, "
            "how far it answers as the others do), so they hold nothing that the latent does not."
        )
        return [figure(figures.probes(results, zoo, colors), caption), tables.probe_table(results, zoo, colors)]

    shown = _by_zoo(results, parts)
    if not shown:
        return ""
    titles = {"R2 of test accuracy": "probe_r2", "R2 of the generalisation gap": "probe_r2_ggap"}
    theirs = {"probe_r2": published.PROBE_ACCURACY, "probe_r2_ggap": published.PROBE_GGAP}
    extra = {"untrained": "untrained-"}
    paper = _beside_the_paper(
        *((title, tables.side_by_side(results, m, theirs[m], number, extra=extra)) for title, m in titles.items()),
        text="Its repeats of one setting differ by .03 on SVHN and .01 on the others.",
    )
    lead = "Ridge regression from a model's latents to what is known of it: fitted on training models, penalty chosen on validation models."
    return section("What latents know: probes", *shown, *paper, lead=lead)


def _generation(results: Results) -> str:
    def parts(zoo: str) -> list[str]:
        if not any(results.value(zoo, v, "generated_accuracy") for v in results.variants(zoo, "run", "code")):
            return []
        colors, run = figures.palette(results, zoo), results.best(zoo, results.trained(zoo), "generated_accuracy")
        return [
            figure(
                figures.generation(results, zoo, colors),
                "Left: every model a tick, the middle 60 % a bar, the mean a dot. Middle: samplers, joint densities of rising bandwidth "
                "joined; the filled mark is the one in the tables; on the dotted line, samples are as near to a training model as a copy. "
                "Right: mean and middle 60 % while all new models are trained on.",
            ),
            tables.generation_table(results, zoo, colors),
            f"<h4>Every sampler, {escape(run)}</h4>{tables.samplings_table(results, zoo, run)}" if run else "",
        ]

    shown = _by_zoo(results, parts)
    if not shown:
        return ""
    beta = figure(figures.against_beta(results), "Dashed: the zoo's anchors. Bars: standard deviation over seeds.")
    diversity = tables.side_by_side(results, "diversity", published.DIVERSITY, number, extra={"zoo": "zoo"})
    paper = _beside_the_paper(
        ("Structural diversity: mean L2 over pairs of new models", diversity),
        ("Best model of each set, test accuracy", tables.best_table(results)),
        text="The best of many is the paper's headline; it says nothing of the rest, so read the means above.",
    )
    lead = "Sample latents around those of the zoo's best training models, decode them, and measure every network that comes out."
    return section("New models", *shown, f"<h3>Against beta</h3>{beta}" if beta else "", *paper, lead=lead)


def _maps(results: Results) -> str:
    def parts(zoo: str) -> list[str]:
        run = results.best(zoo, results.trained(zoo), "agreement")
        caption = f"{run}: one mark a model, its mean latent token on the two directions in which these vary most."
        return [figure(figures.latent_map(results, zoo, run), caption, narrow=True)] if run else []

    return section("Latent maps", *_by_zoo(results, parts))


def _training(results: Results) -> str:
    caption = "Each term is divided by its value for an answer that knows nothing of the model, so 1 is no knowledge."
    drawn = lambda zoo: figures.training(results, zoo, figures.palette(results, zoo))  # noqa: E731
    return section("Training", *_by_zoo(results, lambda zoo: [figure(drawn(zoo), caption)]))


def _join(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1] if names else "nothing"


def _facts(results: Results) -> Mapping[str, str]:
    facts: dict[str, Any] = results.facts
    protocol = facts.get("protocol") or {}
    sizes = ", ".join(f"{name.replace('_', ' ')} {_text(value)}" for name, value in protocol.items())
    seeds = {zoo: sorted({r["seed"] for r in results.rows if r["zoo"] == zoo and r["variant"] != "zoo"}) for zoo in results.zoos}
    runs: dict[str, list[str]] = {}
    for v in facts.get("variants", ()):
        if v.get("folder") and v.get("kind") == "run":
            words = f"{tables.settings(v)}, lr {v.get('lr', '')}, {v.get('layers', '')} layers, start {v.get('start', '')}"
            runs.setdefault(f"{v['zoo']}/{v['variant']} ({words})", []).append(str(v["seed"]))
    lines = {
        "measured on": f"{facts.get('machine', '')}{'; quick sizes' if facts.get('quick') else ''}",
        "date": str(facts.get("date", "")),
        "versions": str(facts.get("versions", "")),
        "seeds": "; ".join(f"{zoo}: {', '.join(map(str, s))}" for zoo, s in seeds.items()),
        "sizes": sizes,
        "runs": "; ".join(f"{run} seed {', '.join(of)}" for run, of in runs.items()),
        **{str(name): str(text) for name, text in (facts.get("notes") or {}).items()},
        "rows": "rows.csv and the other tables beside this page hold every figure on it",
    }
    return {name: text for name, text in lines.items() if text}


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "/".join(f"{v:g}" for v in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
