"""The page of an evaluation: from tables to one HTML file that loads nothing."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from ..measure.results import Results
from . import drawing, extras, figures, goals, published, tables
from .html import document
from .markup import CSS, beside, figure, note, number, over_seeds, percent, section

__all__ = ["render"]


def render(results: Results) -> str:
    """The page. Raises WslfastError if matplotlib is missing."""
    drawing.require_matplotlib()
    zoos = tables.zoos(results)
    body = [
        tables.data_table(results),
        section(
            "Where we stand",
            goals.goals_table(results),
            lead="The goals of this evaluation, and the best run or closed-form code of "
            "at most 55 % latent numbers on each zoo. All figures are from test models and test images.",
        ),
        _reconstruction(results, zoos),
        _probes(results, zoos),
        _generation(results, zoos),
        _maps(results, zoos),
        _training(results, zoos),
        extras.ablations(results),
        extras.gradients(results),
    ]
    title = "Weight-space autoencoders on " + _join(zoos)
    return document(title, headline(results), "\n".join(body), _facts(results), CSS)


def headline(results: Results) -> str:
    """The result in a sentence, whichever way it came out: the best run of each zoo, and the best closed-form code that is no larger."""
    parts = []
    zoos = tables.zoos(results)
    for zoo in zoos:
        run = tables.best(results, zoo, tables.trained(results, zoo), "agreement")
        get = lambda variant, metric="agreement", z=zoo: over_seeds(results, z, variant, metric)[0]  # noqa: E731
        if run is None:
            continue
        share = get(run, "latent_share")
        codes = [v for v in results.variants(zoo, "code") if share is None or (get(v, "latent_share") or 0) <= share + 0.005]
        code = tables.best(results, zoo, codes, "agreement")
        size = f" at {100 * share:.0f} % of the numbers" if share else ""
        known = [f"{percent(get(run, 'identified'))} % identified"] if get(run, "identified") is not None else []
        known += [words] if (words := tables.collapsed(results, zoo, run)) else []
        more = f" ({', '.join(known)})" if known else ""
        if len(zoos) == 1:
            text = f"On {zoo}, reconstructions by {run} agree with their originals on {percent(get(run))} % of images{size}{more}"
            return text + (f"; the best closed-form code, {code}, on {percent(get(code))} %." if code else ".")
        best = [f"best closed form {percent(get(code))} %"] if code else []
        more = f" ({'; '.join([*known, *best])})" if known or best else ""
        parts.append(f"{percent(get(run))} % of images on {zoo}{more}")
    return f"Agreement of reconstructions with their originals: {_join(parts)}." if parts else "Nothing was evaluated yet."


def _reconstruction(results: Results, zoos: list[str]) -> str:
    parts = []
    for zoo in zoos:
        colors = figures.palette(results, zoo)
        shown = [*tables.trained(results, zoo)[:4]]
        code = tables.best(results, zoo, results.variants(zoo, "code"), "agreement")
        shown += [code] if code else []
        parts += [
            _zoo_heading(zoo, zoos),
            _figure(
                figures.overview(results, zoo, colors),
                "Dots are means over models, bars the middle 60 % of models. A reconstruction that has collapsed to one good network "
                "agrees with everybody's original: its filled and open dots coincide.",
            ),
            tables.reconstruction_table(results, zoo, colors),
            _figure(
                figures.histograms(results, zoo, shown, colors),
                "Above, agreement with the own original (outline) and, mean over them, with other models' originals (grey). Below, test "
                "accuracy of reconstructions (outline) and originals (grey). Triangles mark medians.",
            ),
        ]
    if not any(tables.trained(results, z) for z in zoos):
        return ""
    paper = [
        "<h3>Beside the paper</h3>",
        beside(
            ("Agreement with the own original, %", tables.side_by_side(results, "agreement", published.AGREEMENT, percent)),
            ("L2 distance in weights", tables.side_by_side(results, "l2_masked", published.L2, number)),
        ),
        note(
            tables.PAPER_NOTE + " Its L2 includes the decoder's output on padding; ours is over real weights alone. Its encoder attends "
            "over the batch, so a model's code depends on its neighbours; ours does not."
        ),
    ]
    lead = "Encode a held-out model, decode it, and compare the network that comes out with the one that went in."
    return section("Reconstruction", *parts, *paper, lead=lead)


def _probes(results: Results, zoos: list[str]) -> str:
    parts = []
    for zoo in zoos:
        colors = figures.palette(results, zoo)
        drawn = figures.probes(results, zoo, colors)
        if not drawn:
            continue
        caption = (
            "Dots: R2 on test models; bars: standard deviation over seeds, or over resamples of the test models. Values below −0.5 are at "
            "the edge. Decoded: features are what the network that a latent decodes to answers on images without labels (how sure it is, "
            "how far it answers as the others do), so they hold nothing that the latent does not."
        )
        parts += [_zoo_heading(zoo, zoos), _figure(drawn, caption), tables.probe_table(results, zoo, colors)]
    if not parts:
        return ""
    untrained = {"untrained": "untrained-"}
    paper = [
        "<h3>Beside the paper</h3>",
        beside(
            *(
                (title, tables.side_by_side(results, metric, theirs, number, extra=untrained))
                for title, metric, theirs in (
                    ("R2 of test accuracy", "probe_r2", published.PROBE_ACCURACY),
                    ("R2 of the generalisation gap", "probe_r2_ggap", published.PROBE_GGAP),
                )
            )
        ),
        note(tables.PAPER_NOTE + " Its repeats of one setting differ by .03 on SVHN and .01 on the others."),
    ]
    lead = "Ridge regression from a model's latents to what is known of it: fitted on training models, penalty chosen on validation models."
    return section("What latents know: probes", *parts, *paper, lead=lead)


def _generation(results: Results, zoos: list[str]) -> str:
    parts = []
    for zoo in zoos:
        colors = figures.palette(results, zoo)
        drawn = figures.generation(results, zoo, colors)
        if not drawn:
            continue
        run = tables.best(results, zoo, tables.trained(results, zoo), "generated_accuracy")
        parts += [
            _zoo_heading(zoo, zoos),
            _figure(
                drawn,
                "Left: every model a tick, the middle 60 % a bar, the mean a dot. Middle: samplers, joint densities of rising bandwidth "
                "joined; the filled mark is the one in the tables; on the dotted line, samples are as near to a training model as a copy. "
                "Right: mean and middle 60 % while all new models are trained on.",
            ),
            tables.generation_table(results, zoo, colors),
            f"<h4>Every sampler, {escape(run)}</h4>{tables.samplings_table(results, zoo, run)}" if run else "",
        ]
    if not parts:
        return ""
    beta = figures.against_beta(results)
    if beta:
        parts.append("<h3>Against beta</h3>" + figure(beta, "Dashed: the zoo's anchors. Bars: standard deviation over seeds."))
    paper = [
        "<h3>Beside the paper</h3>",
        beside(
            (
                "Structural diversity: mean L2 over pairs of new models",
                tables.side_by_side(results, "diversity", published.DIVERSITY, number, extra={"zoo": "zoo"}),
            ),
            ("Best model of each set, test accuracy", tables.best_table(results)),
        ),
        note(tables.PAPER_NOTE + " The best of many is the paper's headline; it says nothing of the rest, so read the means above."),
    ]
    lead = "Sample latents around those of the zoo's best training models, decode them, and measure every network that comes out."
    return section("New models", *parts, *paper, lead=lead)


def _maps(results: Results, zoos: list[str]) -> str:
    parts = []
    for zoo in zoos:
        run = tables.best(results, zoo, tables.trained(results, zoo), "agreement")
        drawn = figures.latent_map(results, zoo, run) if run else ""
        if drawn:
            caption = f"{run}: one mark a model, its mean latent token on the two directions in which these vary most."
            parts += [_zoo_heading(zoo, zoos), figure(drawn, caption, narrow=True)]
    return section("Latent maps", *parts)


def _training(results: Results, zoos: list[str]) -> str:
    parts = []
    for zoo in zoos:
        drawn = figures.training(results, zoo, figures.palette(results, zoo))
        if drawn:
            caption = "Each term is divided by its value for an answer that knows nothing of the model, so 1 is no knowledge."
            parts += [_zoo_heading(zoo, zoos), figure(drawn, caption)]
    return section("Training", *parts)


def _zoo_heading(zoo: str, zoos: list[str]) -> str:
    return f"<h3>{escape(zoo)}</h3>" if len(zoos) > 1 else ""


def _figure(svg: str, caption: str) -> str:
    return figure(svg, caption) if svg else ""


def _join(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1] if names else "nothing"


def _facts(results: Results) -> Mapping[str, str]:
    facts: dict[str, Any] = results.facts
    protocol = facts.get("protocol") or {}
    sizes = ", ".join(f"{name.replace('_', ' ')} {_text(value)}" for name, value in protocol.items())
    seeds = {zoo: sorted({r["seed"] for r in results.rows if r["zoo"] == zoo and r["variant"] != "zoo"}) for zoo in tables.zoos(results)}
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
        "rows": "rows.csv and the other tables beside this page hold every figure on it",
    }
    return {name: text for name, text in lines.items() if text}


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "/".join(f"{v:g}" for v in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
