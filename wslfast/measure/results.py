"""What was measured, on disk: one JSON file for each unit, and the CSV tables that a page is drawn from.

A unit is one variant on one zoo with one seed. It is computed once, written atomically and kept until what it was computed from
changes (its fingerprint), so that an interrupted evaluation goes on where it stopped. Evaluations keep their units under ``units/``,
ablations in the folders of their cells. The tables are the units side by side; a page needs only the tables.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import WslfastError, require
from ..files import json_ready, write_text
from ..zoo.importers.tables import number_of
from .reconstruction import collapse, spread_of

SCHEMA = 1
KEY = ("zoo", "variant", "seed")
NAMES = ("zoo", "variant", "metric")  # columns that hold text, whatever it looks like
HEADER = (*KEY, "metric", "median", "mean", "spread")
# tables, and the columns of theirs that the page reads by name
_COLUMNS = {
    "models": KEY,
    "samples": (*KEY, "set", "epoch", "test_acc"),
    "samplings": (*KEY, "sampler", "bandwidth", "select", "test_acc", "diversity", "diversity_disagreement", "novelty", "novelty_behavior"),
    "latents": (*KEY, "split", "x", "y", "share_x", "share_y"),
    "curves": KEY,
    "ablations": HEADER,
    "gradients": (*HEADER, "direction", "magnitude"),
}
TABLES = ("models", "samples", "samplings", "latents", "curves")
EXTRA = ("ablations", "gradients")  # tables that other commands put beside these
Row = dict[str, Any]
Figures = tuple["float | None", "float | None", "float | None"]
OverSeeds = tuple["float | None", "float | None", int]


@dataclass(frozen=True)
class Unit:
    """What one variant gave on one zoo.

    Attributes:
        zoo, variant, seed: its name, unique in a folder of results.
        kind: ``"zoo"`` (the originals themselves), ``"run"``, ``"code"`` (closed form), ``"refined"`` (latents refined at test
            time), ``"model"`` (a zoo model in the place of each), ``"features"`` (probe baselines), ``"cell"`` (of an ablation).
        fingerprint: digest of everything it was computed from.
        facts: JSON-able settings and sizes.
        metrics: name -> (median, mean, spread) over models; spread is the standard deviation. A figure that is one number has it
            as median and mean.
        tables: rows by table (``TABLES``).
    """

    zoo: str
    variant: str
    seed: int
    kind: str
    fingerprint: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Sequence[float | None]] = field(default_factory=dict)
    tables: Mapping[str, Sequence[Row]] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, int]:
        return self.zoo, self.variant, self.seed

    def rows(self) -> list[Row]:
        """One row for each metric, with the columns of ``HEADER``."""
        return [dict(zip(HEADER, (*self.key, name, *values))) for name, values in self.metrics.items()]


def column_of(metric: str) -> str:
    """The column of a row that tables show: of the change in accuracy the median over models, of all else the mean."""
    return "median" if metric == "accuracy_change" else "mean"


def figures(values: Tensor) -> Figures:
    """Median, mean and standard deviation of the defined values of a metric, one per model."""
    s = spread_of(values.double().cpu())
    return s["median"], s["mean"], s["std"]


def single(value: float, spread: float | None = None) -> Figures:
    """The figures of a metric that is one number."""
    finite = value if math.isfinite(value) else None
    return finite, finite, spread


def fingerprint(*parts: Any) -> str:
    """Digest of JSON-able values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


# -- units -------------------------------------------------------------------------------------------------------------


def unit_path(folder: Path, zoo: str, variant: str, seed: int) -> Path:
    """A readable name, and a digest that keeps apart what the readable part does not."""
    readable = re.sub(r"[^A-Za-z0-9.+-]+", "_", f"{zoo}-{variant}-{seed}")[:80]
    return folder / "units" / f"{readable}-{fingerprint(zoo, variant, seed)[:6]}.json"


def read_unit(path: Path) -> Unit | None:
    """The unit in a file; None where there is none, or not a whole one of this version (it is computed again)."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if "figures" in record:  # a cell of an ablation, as they were before cells were units; its folder is named by its fingerprint
            metrics = {name: (f["median"], f["mean"], f["std"]) for name, f in record["figures"].items()}
            return Unit("", "", 0, "cell", path.parent.name, {"config": record["config"]}, metrics)
        return Unit(**record) if record.pop("schema", None) == SCHEMA else None
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        return None


def kept_unit(path: Path, *fingerprints: str) -> Unit | None:
    """The unit in a file if it was computed from what one of the fingerprints says, else None."""
    unit = read_unit(path)
    return unit if unit is not None and unit.fingerprint in fingerprints else None


def write_unit(path: Path, unit: Unit) -> None:
    """Write a unit, atomically; what is not finite becomes null."""
    text = json.dumps(json_ready({"schema": SCHEMA, **asdict(unit)}), allow_nan=False, separators=(",", ":")) + "\n"
    write_text(path, text)


def read_units(folder: Path) -> list[Unit]:
    """Every unit of a folder, zoos and variants in the order of their names."""
    units = (read_unit(path) for path in sorted((folder / "units").glob("*.json")))
    return sorted((u for u in units if u is not None), key=lambda u: u.key)


# -- tables ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Results:
    """Everything a page is drawn from, as read from a folder.

    Attributes:
        rows: ``rows.csv``, one row a (zoo, variant, seed, metric), with the columns of ``HEADER``.
        tables: the other CSV files by name, those of ``EXTRA`` where they are there.
        facts: ``report.json``: zoos, variants, machine, versions, settings; and ``<extra>.json`` beside an extra table.
    """

    rows: list[Row]
    tables: dict[str, list[Row]]
    facts: dict[str, Any]

    @property
    def zoos(self) -> list[str]:
        return list(dict.fromkeys(str(r["zoo"]) for r in self.rows))

    def value(self, zoo: str, variant: str, metric: str, column: str = "") -> list[float]:
        """The metric of every seed that has it; the column is by default that of :func:`column_of`."""
        wanted, column = (zoo, variant, metric), column or column_of(metric)
        values = (r[column] for r in self.rows if (r["zoo"], r["variant"], r["metric"]) == wanted)
        return [float(v) for v in values if isinstance(v, (int, float))]

    def mean(self, zoo: str, variant: str, metric: str) -> float | None:
        """The metric's mean over seeds; None where no seed has it."""
        return mean_and_spread(self.value(zoo, variant, metric))[0]

    def over_seeds(self, zoo: str, variant: str, metric: str) -> tuple[float | None, float | None]:
        """The metric's mean over seeds and its spread: over seeds where there are several, else that of the one row."""
        value, spread, count = mean_and_spread(self.value(zoo, variant, metric))
        return value, spread if count > 1 else mean_and_spread(self.value(zoo, variant, metric, "spread"))[0]

    def variants(self, zoo: str, *kinds: str) -> list[str]:
        """Variants of a zoo, of these kinds, in the order of the tables."""
        names = [v["variant"] for v in self.facts["variants"] if v["zoo"] == zoo and (not kinds or v["kind"] in kinds)]
        return list(dict.fromkeys(names))

    def about(self, zoo: str, variant: str) -> Mapping[str, Any]:
        """Facts of a variant (of its first seed)."""
        return next((v for v in self.facts["variants"] if v["zoo"] == zoo and v["variant"] == variant), {})

    def table(self, name: str, zoo: str, variant: str | None = None, *, first_seed: bool = False) -> list[Row]:
        """A table's rows of a zoo, and of a variant; of its lowest seed alone if asked for."""
        rows = [r for r in self.tables.get(name, ()) if r.get("zoo") == zoo and variant in (None, r.get("variant"))]
        lowest = min((r["seed"] for r in rows if r["seed"] is not None), default=None)
        return [r for r in rows if r["seed"] == lowest] if first_seed else rows

    def losses(self, zoo: str, variant: str) -> str:
        """The losses that a run was trained with (``C+S+B``: contrastive, structural, behavioral); empty where that is not known."""
        return str(self.about(zoo, variant).get("losses", ""))

    def trained(self, zoo: str) -> list[str]:
        """Runs of a zoo that are nobody's baseline: structure alone first, then with behavior, then by name."""
        runs = [v for v in self.variants(zoo, "run") if not self.about(zoo, v).get("baseline")]
        return sorted(runs, key=lambda v: ("B" in self.losses(zoo, v), len(v), v))

    def measure(self, zoo: str) -> str:
        """The metric that variants of a zoo are ranked by: agreement, or, where answers are no classes, PSNR of the outputs."""
        return "psnr" if self.about(zoo, "zoo").get("classes") == 0 else "agreement"

    def best_run(self, zoo: str) -> str | None:
        """The best of the zoo's runs by its :meth:`measure`."""
        return self.best(zoo, self.trained(zoo), self.measure(zoo))

    def collapsed(self, zoo: str, variant: str) -> str:
        """What to say of a variant that answers every model with one network; nothing of the others, nor where answers are no classes."""
        if self.measure(zoo) == "psnr":
            return ""
        return collapse(self.mean(zoo, variant, "agreement_margin"))

    def best(self, zoo: str, variants: Sequence[str], metric: str) -> str | None:
        """The variant with the highest mean of a metric; of those that have collapsed only where there is no other."""
        scored = [(not self.collapsed(zoo, v), value, v) for v in variants if (value := self.mean(zoo, v, metric)) is not None]
        return max(scored)[2] if scored else None


def over_seeds(rows: Iterable[Row], column: str = "") -> dict[str, dict[str, OverSeeds]]:
    """``{variant: {metric: (mean, standard deviation, count)}}`` over seeds of rows; the standard deviation of one seed is None.

    Of each row the ``column`` counts, by default that of :func:`column_of`.
    """
    values: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        of = values.setdefault(str(row["variant"]), {})
        value = row[column or column_of(row["metric"])]
        if isinstance(value, (int, float)):
            of.setdefault(str(row["metric"]), []).append(value)
    return {variant: {m: mean_and_spread(v) for m, v in metrics.items()} for variant, metrics in values.items()}


def mean_and_spread(values: Sequence[float]) -> OverSeeds:
    """Mean, standard deviation (None of one value) and count of values over seeds."""
    if not values:
        return None, None, 0
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values)


_KINDS = ("zoo", "run", "code", "refined", "model", "features")


def write_tables(folder: Path, units: Iterable[Unit], facts: Mapping[str, Any]) -> None:
    """Write ``rows.csv``, the other tables and ``report.json``: the zoo first, then runs, then baselines."""
    ordered = sorted(units, key=lambda u: (u.zoo, _KINDS.index(u.kind) if u.kind in _KINDS else len(_KINDS), u.variant, u.seed))
    key = [dict(zip(KEY, u.key)) for u in ordered]
    write_text(folder / "rows.csv", to_csv([row for u in ordered for row in u.rows()], HEADER))
    for table in TABLES:
        write_text(folder / f"{table}.csv", to_csv([{**k, **row} for k, u in zip(key, ordered) for row in u.tables.get(table, ())], KEY))
    variants = [{**k, "kind": u.kind, **u.facts} for k, u in zip(key, ordered)]
    write_text(folder / "report.json", json.dumps(json_ready({"schema": SCHEMA, **facts, "variants": variants}), indent=1) + "\n")


def read_results(folder: str | Path) -> Results:
    """Read the tables of a folder back. Raises WslfastError for a folder without results, or a table that is none.

    The tables of ``EXTRA`` are looked for in the folder and in its ``analysis/``; they alone are results, too.
    """
    place = Path(folder)
    beside = {name: at for name in EXTRA for at in (place / "analysis", place) if (at / f"{name}.csv").is_file()}
    has_rows = (place / "rows.csv").is_file()
    require(has_rows or bool(beside), f"{place}: no results here (expected rows.csv); wslfast evaluate --out writes them")
    rows = from_csv(place / "rows.csv", HEADER) if has_rows else []
    paths = {name: place / f"{name}.csv" for name in TABLES} | {name: at / f"{name}.csv" for name, at in beside.items()}
    tables = {name: from_csv(path, _COLUMNS[name]) for name, path in paths.items() if path.is_file()}
    facts = _json(place / "report.json") if (place / "report.json").is_file() else {}
    variants = facts.get("variants")
    if not (variants and isinstance(variants, list)):  # rows alone make a page too
        keys = dict.fromkeys(tuple(r[k] for k in KEY) for r in rows)
        variants = [{**dict(zip(KEY, key)), "kind": "zoo" if key[1] == "zoo" else "run"} for key in keys]
    whole = all(isinstance(v, dict) and {"zoo", "variant", "kind"} <= set(v) for v in variants)
    require(whole, f"{place / 'report.json'}: variants: expected objects with zoo, variant and kind")
    extra = {name: _json(at / f"{name}.json") for name, at in beside.items() if (at / f"{name}.json").is_file()}
    return Results(rows, tables, {**facts, **extra, "variants": variants})


def to_csv(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """CSV with these columns first and whatever else the rows hold after them; an undefined value is an empty cell."""
    names = list(dict.fromkeys([*columns, *(name for row in rows for name in row)]))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([_cell(row.get(name)) for name in names] for row in rows)
    return text.getvalue()


def from_csv(path: Path, expected: Sequence[str] = (), *, names: Sequence[str] = NAMES) -> list[Row]:
    """Rows of a CSV file; cells that read as numbers are numbers (integers where they are), empty ones None.

    Cells of the columns ``names`` stay text. Raises WslfastError for a file that is no table, or lacks one of the ``expected`` columns.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            table = [{str(name): cell for name, cell in row.items() if name is not None} for row in csv.DictReader(file)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise WslfastError(f"{path}: not a CSV table: {error}") from None
    missing = [c for c in expected if table and c not in table[0]]
    require(not missing, f"{path}: columns {missing} are missing; expected {','.join(expected)}")
    return [{name: cell or None if name in names else number_of(cell or "") for name, cell in row.items()} for row in table]


def update_csv(path: Path, columns: Sequence[str], rows: Sequence[Row], key: Sequence[str]) -> None:
    """Write rows into a table, atomically; rows there that equal one of these in every column of ``key`` are replaced, others stay."""
    others = from_csv(path, columns, names=columns) if path.exists() else []
    new = {tuple(str(row[c]) for c in key) for row in rows}
    write_text(path, to_csv([*(row for row in others if tuple(str(row[c]) for c in key) not in new), *rows], columns))


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WslfastError(f"{path}: not JSON: {error}") from None
    require(isinstance(value, dict), f"{path}: expected an object, got {type(value).__name__}")
    return value
