"""The page of an evaluation: from tables to one HTML file that loads nothing. It draws what rows say and measures nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..errors import WslfastError
from ..files import write_text
from ..measure.results import Results, read_results
from ..training.hooks import LogTo, hook_of
from . import analysis, drawing, figures, psnr, published, tables
from .finding import MANY, headline, joined, named, small_samples, title
from .html import beside, document, figure, note, number, percent, section

__all__ = ["Inline", "headline", "pictures", "render", "report"]


def report(out: str | Path, *, page: str | Path | None = None, log_to: LogTo = None) -> Path:
    """Draw the page from the tables in ``out``, and return its path; nothing is computed again.

    ``ablations.csv`` and ``gradients.csv`` (and JSON files of those names) are shown where they are there, or in ``out/analysis``.

    Args:
        out: folder that an evaluation wrote.
        page: where to write the page; default: ``out/report.html``.
        log_to: also tell ``"tensorboard"`` (in ``out/tensorboard``), or an object with the three methods of
            :class:`~wslfast.training.hooks.LogHook`, the page's pictures and a table of its main figures.

    Raises:
        WslfastError: no results there, a damaged table, or matplotlib is missing.
    """
    path = Path(page) if page is not None else Path(out) / "report.html"
    results = read_results(out)
    write_text(path, render(results))
    hook = hook_of(log_to, Path(out))
    if hook is not None:
        for name, png in pictures(results).items():
            hook.picture(name, png)
        hook.table("figures", *tables.main_figures(results))
    return path


class Inline:
    """A page as a notebook shows it, in a frame of its own: ``wslfast.page.Inline("runs/results")`` as a cell's last line.

    Args:
        page: an HTML file, or the folder of an evaluation.
        height: of the frame, in pixels.

    Raises:
        WslfastError: no such page.
    """

    def __init__(self, page: str | Path, height: int = 700) -> None:
        path = Path(page)
        self.path, self.height = path / "report.html" if path.is_dir() else path, height
        try:
            self._page = self.path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise WslfastError(f"{self.path}: cannot be shown: {error}") from None

    def __repr__(self) -> str:
        return f"Inline({str(self.path)!r})"

    def _repr_html_(self) -> str:
        style = f"width: 100%; height: {self.height}px; border: 1px solid #8888"
        return f'<iframe sandbox srcdoc="{escape(self._page)}" style="{style}"></iframe>'


def pictures(results: Results) -> dict[str, bytes]:
    """The page's figures by name (``"digits/overview"``), as PNG files. Raises WslfastError if matplotlib is missing."""
    with drawing.collected() as collected:
        render(results)
    return collected


def render(results: Results) -> str:
    """The page. Raises WslfastError if matplotlib is missing."""
    drawing.require_matplotlib()
    body = [
        tables.data_table(results),
        note(escape(few)) if (few := small_samples(results)) else "",
        _glance(results),
        _reconstruction(results),
        _probes(results),
        _generation(results),
        _maps(results),
        _training(results),
        analysis.ablations(results),
        analysis.gradients(results),
    ]
    several = len(results.zoos) > MANY
    topic = "Weight-space autoencoders on " + (f"{len(results.zoos)} zoos" if several else joined(results.zoos))
    return document(title(results), topic, headline(results), "\n".join(body), _facts(results))


def _glance(results: Results) -> str:
    """The best variant by each measure. Whether goals are met or missed is said where the results have goals: those of this project's
    own evaluation (``"goals": true`` in report.json)."""
    best = "the best run or closed-form code of at most 55 % latent numbers on each zoo. All figures are from test models and test images."
    if results.facts.get("goals") is True:
        return section("Where we stand", tables.goals_table(results), lead=f"The goals of this evaluation, and {best}")
    return section("At a glance", tables.glance_table(results), lead=f"By each measure, {best}")


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
        if results.measure(zoo) == "psnr":
            return psnr.parts(results, zoo, colors)
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
    classes = any(results.measure(zoo) == "agreement" for zoo in results.zoos)  # the paper's networks are classifiers
    return section("Reconstruction", *_by_zoo(results, parts), *(paper if classes else []), lead=lead)


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
    if not any(shown):
        return ""
    titles = {"R2 of test accuracy": "probe_r2", "R2 of the generalisation gap": "probe_r2_ggap"}
    paper_figures = {"probe_r2": published.PROBE_ACCURACY, "probe_r2_ggap": published.PROBE_GGAP}
    extra = {"untrained": "untrained-"}
    paper = _beside_the_paper(
        *((title, tables.side_by_side(results, m, paper_figures[m], number, extra=extra)) for title, m in titles.items()),
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
            f"<h4>Every sampler, {escape(named(run))}</h4>{tables.samplings_table(results, zoo, run)}" if run else "",
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
        run = results.best_run(zoo)
        caption = f"{named(run or '')}: one mark per model, its mean latent token on the two directions in which these vary most."
        return [figure(figures.latent_map(results, zoo, run), caption, narrow=True)] if run else []

    return section("Latent maps", *_by_zoo(results, parts))


def _training(results: Results) -> str:
    caption = "Each term is divided by its value for an answer that knows nothing of the model, so 1 is no knowledge."
    drawn = lambda zoo: figures.training(results, zoo, figures.palette(results, zoo))  # noqa: E731
    return section("Training", *_by_zoo(results, lambda zoo: [figure(drawn(zoo), caption)]))


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
