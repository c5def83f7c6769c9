"""What all commands print with: one console, a table of settings, a table of figures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..measure.reconstruction import collapse

console = Console(highlight=False)
_FIGURES = {  # of evaluate and demo: figure -> column; with names of 18 letters the table fits a terminal of 80
    "agreement": "agree", "agreement_others": "others", "identified": "iden-\ntified", "accuracy_original": "acc\norig",
    "accuracy_reconstructed": "acc\nrec", "accuracy_change": "change", "psnr": "PSNR", "explained_variance": "EV", "l2_masked": "L2",
    "latent_numbers": "latent",
}  # fmt: skip


def say(text: str) -> None:
    """Print a line as it is, however long, and whatever of it looks like markup: a folder, a variant, a URL."""
    console.print(text, soft_wrap=True, markup=False)


def say_stage(text: str) -> None:
    """Print what is being done."""
    say(f"- {text}")


def show(values: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(values, indent=1))
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    longest, half = max(map(len, values), default=0), console.width // 2
    table.add_column(no_wrap=longest <= half, max_width=max(half, 1))  # names take no more, so that there is room for the values
    table.add_column(overflow="fold")  # a digest that is longer than the terminal is wide stays whole
    for name, value in values.items():
        lines = [f"{k}: {_text(v)}" for k, v in value.items()] if isinstance(value, dict) else [_text(value)]
        words = name if name.isupper() else name.replace("_", " ")  # a variable of the environment has its own name
        table.add_row(f"[bold]{escape(words)}[/bold]", escape("\n".join(lines)))
    console.print(table)


def figures_table(results: dict[str, dict[str, Any]]) -> None:
    """Figures that anything has a value of, a row per variant; where they are more than fit the terminal, a table below another."""
    shown = {
        _FIGURES[f]: [_figure(f, figures.get(f)) for figures in results.values()]
        for f in _FIGURES
        if any(r.get(f) is not None for r in results.values())
    }
    stacked_table("variant", list(results), shown)
    for name, figures in results.items():
        if figures.get("psnr") is None and (words := collapse(figures.get("agreement_margin"))):
            say(f"{name}: {words}")


def stacked_table(head: str, names: Sequence[str], columns: Mapping[str, Sequence[str]], title: str | None = None) -> None:
    """A table with a row per name, whole at any width: columns that do not fit the terminal are in a table below, with the names again."""
    left = dict(columns)
    width = {header: max(map(len, (*header.split("\n"), *cells))) + 1 for header, cells in left.items()}
    first = max(map(len, (head, *names)), default=len(head))
    while left:
        table = Table(box=None, pad_edge=False, collapse_padding=True, header_style="bold", title=title)
        table.add_column(escape(head), no_wrap=True)
        room = console.width - first
        taken: list[str] = []
        for header in left:
            room -= width[header]
            if room < 0 and taken:
                break
            taken.append(header)
            table.add_column(header, justify="right", no_wrap=True)
        for name, cells in zip(names, zip(*(left.pop(header) for header in taken), strict=True), strict=True):
            table.add_row(escape(name), *cells)
        console.print(table)


def _figure(name: str, value: Any) -> str:
    """A figure's cell: latent numbers are counted, all others measured."""
    if not isinstance(value, (int, float)):
        return _text(value)
    return f"{value:.0f}" if name == "latent_numbers" else _text(float(value))


def _text(value: Any) -> str:
    """A value as a reader wants it in a table cell."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) >= 0.001 or abs(value) < 1e-12 else f"{value:g}"
    if isinstance(value, dict):
        return ", ".join(f"{k} {_text(v)}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return " ".join(map(_text, value))
    return "-" if value is None else str(value)
