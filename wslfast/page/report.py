"""One self-contained HTML page about a zoo's reconstructions: what came out, in a headline, a table and six figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import describe, require
from ..files import write_text
from ..measure.reconstruction import Reconstruction, collapse
from . import drawing
from .html import document


@dataclass(frozen=True, eq=False)
class Variant:
    """One row of the report: a way of reconstructing, and what it gave.

    Attributes:
        name: e.g. ``structure+behavior``; unique in a report.
        comparison: its figures on held-out models.
        curve: records of its ``log.jsonl`` (``{"step": ..., "loss": ..., "structural": ..., ...}``); None if it was not trained.
        latent_numbers: numbers in one model's latent.
        share: latent_numbers / parameters, 0 to 1 and beyond.
        notes: a few words under its name.
    """

    name: str
    comparison: Reconstruction
    curve: list[dict[str, Any]] | None
    latent_numbers: int
    share: float
    notes: str = ""


def write_report(
    path: str | Path,
    *,
    title: str,
    headline: str,
    variants: Sequence[Variant],
    latents: Tensor | None = None,
    latent_accuracy: Tensor | None = None,
    latent_groups: Sequence[str] | None = None,
    facts: Mapping[str, str],
) -> Path:
    """Write the page: one HTML file that loads nothing, from anywhere; all text is escaped.

    Args:
        path: the file to write (atomically; folders are made).
        title: of the page and its first heading.
        headline: the result in one sentence with figures.
        variants: rows of the table and panels of the figures, in this order.
        latents: ``[k, d]``, one vector a model (say, the mean of its latent tokens), drawn in its first two principal components.
        latent_accuracy: ``[k]``, 0 to 1, their colour.
        latent_groups: k names (split, epoch, ...), their marker.
        facts: the footer: machine, versions, seeds, settings, dates.

    Returns:
        The path written.

    Raises:
        WslfastError: matplotlib is missing, an argument does not fit, or the file cannot be written.
    """
    drawing.require_matplotlib()
    require(len(variants) > 0 and all(isinstance(v, Variant) for v in variants), "variants: expected at least one Variant")
    names = [v.name for v in variants]
    require(len(set(names)) == len(names), f"variants: expected distinct names, got {names}")
    require(all(len(v.comparison) > 0 for v in variants), "variants: expected comparisons of at least one model")
    if latents is not None:
        require(isinstance(latents, Tensor) and latents.ndim == 2, f"latents: expected [k, d], got {describe(latents)}")
        k = len(latents)
        known = latent_accuracy is None or latent_accuracy.shape == (k,)
        require(known, f"latent_accuracy: expected [{k}], got {describe(latent_accuracy)}")
        require(latent_groups is None or len(latent_groups) == k, f"latent_groups: expected {k} names, got {len(latent_groups or ())}")
    page = _page(title, headline, variants, _sections(variants, latents, latent_accuracy, latent_groups), facts)
    write_text(Path(path), page)
    return Path(path)


# -- sections ----------------------------------------------------------------------------------------------------------------


def _sections(variants: Sequence[Variant], latents: Tensor | None, accuracy: Tensor | None, groups: Sequence[str] | None) -> str:
    compared = [(v.name, v.comparison) for v in variants]
    palette = drawing.colors([v.name for v in variants])
    parts = [
        _figure_block(
            "At a glance",
            drawing.overview(compared),
            "Dots are means over models, bars the middle 60 % of models. A reconstruction that has collapsed to one good network "
            "agrees with everybody's original: its filled and open dots coincide.",
        ),
        f"<section><h2>All variants</h2>{_table(variants, palette)}</section>",
        _figure_block(
            "Accuracy",
            drawing.accuracy_histograms(compared),
            "Grey, originals; outline, reconstructions. Triangles mark medians.",
        ),
        _figure_block(
            "Accuracy, model by model",
            drawing.accuracy_scatter(compared),
            "One dot a model. On the diagonal, the reconstruction is as accurate as its original.",
        ),
        _figure_block(
            "Agreement",
            drawing.agreement_histograms(compared),
            "Outline, with the own original; grey, with the originals of other models (mean over them). Triangles mark medians. "
            "The distance between the two is what a reconstruction knows about its own model.",
        ),
    ]
    curves = drawing.training_curves([(v.name, v.curve) for v in variants if v.curve])
    if curves is not None:
        parts.append(
            _figure_block(
                "Training",
                curves,
                "Each term is divided by its value for an answer that knows nothing of the model, so 1 is no knowledge.",
            )
        )
    latent_map = None if latents is None else drawing.latent_map(latents, accuracy, groups)
    if latent_map is not None:
        parts.append(
            _figure_block(
                "Latent map",
                latent_map,
                "One mark a model: its latent, projected on the two directions in which latents vary most.",
                narrow=True,
            )
        )
    parts.append(f"<section><details><summary>Every metric: mean, median, spread</summary>{_spread_table(variants)}</details></section>")
    return "\n".join(parts)


def _figure_block(heading: str, svg: str, caption: str, narrow: bool = False) -> str:
    kind = ' class="narrow"' if narrow else ""
    return f"<section><h2>{escape(heading)}</h2><figure{kind}>{svg}<figcaption>{escape(caption)}</figcaption></figure></section>"


def _table(variants: Sequence[Variant], palette: Mapping[str, str]) -> str:
    heads = (
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
    )
    head = "".join(f'<th scope="col">{escape(a)}<small>{escape(b)}</small></th>' for a, b in heads)
    body = "".join(_row(v, palette[v.name]) for v in variants)
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        '<p class="note">Means over models, except the change in accuracy (median of the per-model change); small print: 20th to 80th '
        "percentile. <b>Agreement</b>: test images on which reconstruction and own original choose the same class. <b>With "
        "others</b>: the same with the originals of other models. <b>Margin</b>: the difference; about 0 for a collapsed decoder. "
        "<b>Identified</b>: own original is the best match. <b>Masked L2</b>: distance over real weights only.</p>"
    )


def _row(variant: Variant, color: str) -> str:
    result = variant.comparison
    s = result.summary()
    spread = s["spread"]
    notes = [escape(variant.notes)] if variant.notes else []
    if collapsed := collapse(s["agreement_margin"]):
        notes.append(f"<b>{escape(collapsed)}</b>")
    if result.non_finite:
        notes.append(f"{result.non_finite:,} of {len(result):,} reconstructions not finite: wrong everywhere")
    if result.non_finite_original:
        notes.append(f"{_count(result.non_finite_original, 'model')} left out: original not finite")
    note = "".join(f"<small>{n}</small>" for n in notes)
    change = spread["accuracy_change"]
    cells = (
        _cell(f"{variant.latent_numbers:,}", f"{100 * variant.share:.0f} % of weights"),
        _cell(_percent(s["agreement"]), _range(spread["agreement"])),
        _cell(_percent(s["agreement_others"]), _range(spread["agreement_others"])),
        _cell(_percent(s["agreement_margin"]), _range(spread["agreement_margin"])),
        _cell(_percent(s["identified"])),
        _cell(f"{_percent(s['accuracy_original'])} → {_percent(s['accuracy_reconstructed'])}", _range(spread["accuracy_reconstructed"])),
        _cell(_percent(change["median"], signed=True), _range(change, signed=True)),
        _cell(_number(s["l2_masked"]), _range(spread["l2_masked"], percent=False)),
        _cell(_percent(s["explained_variance"])),
    )
    name = f'<th scope="row"><i style="background:{color}"></i>{escape(variant.name)}{note}</th>'
    return f"<tr>{name}{''.join(cells)}</tr>"


def _cell(value: str, small: str = "") -> str:
    return f"<td>{value}{f'<small>{small}</small>' if small else ''}</td>"


def _spread_table(variants: Sequence[Variant]) -> str:
    columns = ("mean", "median", "std", "p20", "p80")
    head = "".join(f'<th scope="col">{c}</th>' for c in ("variant", "metric", *columns))
    rows = []
    for variant in variants:
        for metric, figures in variant.comparison.summary()["spread"].items():
            cells = "".join(f"<td>{_number(figures[c])}</td>" for c in columns)
            rows.append(f'<tr><th scope="row">{escape(variant.name)}</th><th scope="row" class="plain">{metric}</th>{cells}</tr>')
    return f'<div class="wide"><table class="dense"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _percent(value: float | None, signed: bool = False) -> str:
    return "–" if value is None or not math.isfinite(value) else _minus(f"{100 * value:{'+' if signed else ''}.1f}")


def _number(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else _minus(f"{value:.4g}" if abs(value) < 1 else f"{value:,.2f}")


def _minus(text: str) -> str:
    return text.replace("-", "−") if "e" not in text else text


def _range(figures: Mapping[str, float | None], percent: bool = True, signed: bool = False) -> str:
    low, high = figures["p20"], figures["p80"]
    if low is None or high is None or low == high:
        return ""
    return f"{_percent(low, signed)} to {_percent(high, signed)}" if percent else f"{_number(low)} to {_number(high)}"


def _page(title: str, headline: str, variants: Sequence[Variant], sections: str, facts: Mapping[str, str]) -> str:
    measured = f"{_count(len(variants[0].comparison), 'held-out model')} and {_count(variants[0].comparison.images, 'test image')}"
    return document(title, headline, f'<p class="note">Measured on {measured}.</p>\n{sections}', facts)
