"""The figures of docs/findings.md: every row of its tables is what rows of docs/results/scratch.csv give."""

from __future__ import annotations

import csv
import re
from collections import Counter, defaultdict
from pathlib import Path
from statistics import mean, stdev

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "findings.md"
ROWS = ROOT / "docs" / "results" / "scratch.csv"
METRICS = {
    "own": "agreement",
    "others'": "agreement_others",
    "margin": "agreement_margin",
    "identified": "identified",
    "EV": "explained_variance",
    "accuracy": "accuracy_reconstructed",
}
ZOOS = ("digits", "fashion", "photos")
NEW_MODELS = {
    "accuracy of new models": ("generated_accuracy",),
    "the anchors rebuilt": ("anchor_reconstruction_accuracy",),
    "after 2 epochs": ("finetuned_accuracy",),
    "L2 between pairs": ("diversity", "diversity_matched"),
    "disagreement between pairs": ("diversity_disagreement", "diversity_disagreement_matched"),
    "L2 to the nearest": ("novelty", "novelty_reconstruction"),
}

Runs = dict[tuple[str, str], dict[str, dict[str, float]]]  # (zoo, variant): seed: metric: mean
Shown = dict[str, tuple[str, str | None]]  # metric: what the page says, and behind its ±


def recorded() -> list[dict[str, str]]:
    with ROWS.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def runs() -> Runs:
    found: Runs = defaultdict(lambda: defaultdict(dict))
    for row in recorded():
        found[row["zoo"], row["variant"]][row["seed"]][row["metric"]] = float(row["mean"])
    # the originals are their own reconstructions; their accuracy stands in every other variant's rows
    found["digits", "originals"]["0"]["accuracy_reconstructed"] = found["digits", "linear-55"]["0"]["accuracy_original"]
    return found


def fits(shown: str, value: float) -> bool:
    """Whether a figure is a value rounded to its digits; the last of them may be rounded twice."""
    return abs(float(shown) - value) <= 0.51 * 10 ** -len(shown.partition(".")[2])


def holds(shown: Shown, seeds: list[dict[str, float]], spread: bool) -> bool:
    """Whether the figures are those of some runs: of one, or means over several with their standard deviation behind ±."""
    for metric, (figure, deviation) in shown.items():
        if any(metric not in seed for seed in seeds):
            return False
        values = [seed[metric] for seed in seeds]
        if not fits(figure, mean(values)):
            return False
        if spread and deviation is not None and not fits(deviation, stdev(values) if len(values) > 1 else float("nan")):
            return False
    return True


def matching(shown: Shown, runs: Runs, zoo: str | None = None) -> list[tuple[str, str]]:
    """Variants that have the figures: in one seed (what stands behind ± is then a spread over models), or over all their seeds."""
    found = []
    for key, seeds in runs.items():
        if zoo in (None, key[0]):
            every = list(seeds.values())
            found += [key] * (any(holds(shown, [one], False) for one in every) or (len(every) > 1 and holds(shown, every, True)))
    return found


def figures(cell: str) -> list[tuple[str, str | None]]:
    """``".97 ± .01 (.83)"`` has two figures, the first with a deviation."""
    plain = re.sub(r"[*]", "", cell)
    return [(a, b or None) for a, b in re.findall(r"(-?\d*\.?\d+)(?: ± (\d*\.\d+))?", plain)]


def tables() -> list[list[list[str]]]:
    """Tables of the page: rows of cells."""
    found = re.findall(r"(?:^\|.*\n)+", PAGE.read_text(), re.MULTILINE)
    return [[[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()] for table in found]


def rows_of(table: list[list[str]]) -> list[tuple[str, Shown]]:
    """Rows of a table whose columns are metrics."""
    columns = {i: METRICS[name.split()[0]] for i, name in enumerate(table[0]) if name and name.split()[0] in METRICS}
    return [(cells[0], {metric: figures(cells[i])[0] for i, metric in columns.items() if figures(cells[i])}) for cells in table[2:]]


def test_rows_are_recorded_once() -> None:
    keys = Counter((row["zoo"], row["variant"], row["seed"], row["metric"]) for row in recorded())
    assert [key for key, count in keys.items() if count > 1] == []


def test_tables_of_metrics_are_what_rows_give(runs: Runs) -> None:
    wrong, seen = [], 0
    for table in tables():
        if "own" in [name.split()[0] for name in table[0][1:] if name]:
            for name, shown in rows_of(table):
                seen += 1
                wrong += [] if matching(shown, runs) else [(name, shown)]
    assert wrong == []
    assert seen > 50


def test_tables_of_zoos_are_what_rows_give(runs: Runs) -> None:
    """Own agreement, others' in brackets; a column is a zoo."""
    wrong, seen = [], 0
    for table in tables():
        if table[0][0].startswith("own agreement"):
            places = {i: zoo for i, zoo in enumerate(table[0]) if zoo in ZOOS}
            for cells in table[2:]:
                for i, zoo in places.items():
                    shown = dict(zip(("agreement", "agreement_others"), figures(cells[i]), strict=False))
                    seen += bool(shown)
                    wrong += [] if not shown or matching(shown, runs, zoo) else [(cells[0], zoo, shown)]
    assert wrong == []
    assert seen > 15


def test_table_of_new_models_is_what_rows_give(runs: Runs) -> None:
    """Means of three seeds; a column is a variant."""
    (table,) = [table for table in tables() if table[0][1:] == ["structure", "direct", "scheduled"]]
    assert len(table) - 2 == len(NEW_MODELS)
    for cells in table[2:]:
        (metrics,) = [metrics for label, metrics in NEW_MODELS.items() if cells[0].startswith(label)]
        for name, cell in zip(table[0][1:], cells[1:], strict=True):
            seeds = list(runs["digits", f"scratch-{name}"].values())
            assert holds(dict(zip(metrics, figures(cell), strict=True)), seeds, True), (cells[0], name)


def test_a_wrong_figure_is_found(runs: Runs) -> None:
    right: Shown = {"agreement": (".798", None), "agreement_margin": (".067", None)}
    assert ("digits", "scratch-scheduled") in matching(right, runs)
    assert matching({**right, "agreement_margin": (".167", None)}, runs) == []
