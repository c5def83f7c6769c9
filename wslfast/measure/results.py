"""What an evaluation found, on disk: one JSON file a unit, and the CSV tables that a page is drawn from.

A unit is one variant on one zoo with one seed. It is computed once, written atomically under ``units/`` and kept until what it was
computed from changes (its fingerprint), so an interrupted evaluation goes on where it stopped. The tables are the units side by
side; a page needs them alone.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import WslfastError, require
from ..files import write_text
from .evaluation import json_ready
from .reconstruction import spread_of

SCHEMA = 1
KEY = ("zoo", "variant", "seed")
HEADER = (*KEY, "metric", "median", "mean", "spread")
TABLES = ("models", "samples", "samplings", "latents", "curves")
EXTRA = ("ablations", "gradients")  # tables that others put beside ours
Row = dict[str, Any]


@dataclass(frozen=True)
class Unit:
    """What one variant gave on one zoo.

    Attributes:
        zoo, variant, seed: its name, unique in a folder of results.
        kind: ``"zoo"`` (the originals themselves), ``"run"``, ``"code"`` (closed form), ``"refined"`` (latents refined at test
            time), ``"model"`` (one zoo model for every other), ``"features"`` (probe baselines).
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


def figures(values: Tensor) -> tuple[float | None, float | None, float | None]:
    """Median, mean and standard deviation of the defined values of a metric, one a model."""
    s = spread_of(values.double().cpu())
    return s["median"], s["mean"], s["std"]


def single(value: float, spread: float | None = None) -> tuple[float | None, float | None, float | None]:
    """The figures of a metric that is one number."""
    known = value if math.isfinite(value) else None
    return known, known, spread


def fingerprint(*parts: Any) -> str:
    """Digest of JSON-able values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def file_digest(path: Path) -> str:
    """SHA-256 of a file. Raises WslfastError if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise WslfastError(f"{path}: cannot be read: {error.strerror or error}") from None
    return digest.hexdigest()


# -- units -------------------------------------------------------------------------------------------------------------


def unit_path(folder: Path, zoo: str, variant: str, seed: int) -> Path:
    """A readable name, and a digest that keeps apart what the readable part does not."""
    readable = re.sub(r"[^A-Za-z0-9.+-]+", "_", f"{zoo}-{variant}-{seed}")[:80]
    return folder / "units" / f"{readable}-{fingerprint(zoo, variant, seed)[:6]}.json"


def read_unit(path: Path) -> Unit | None:
    """The unit in a file; None where there is none, or not a whole one of this version (it is computed again)."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(record, dict) or record.pop("schema", None) != SCHEMA:
        return None
    try:
        return Unit(**record)
    except TypeError:
        return None


def write_unit(folder: Path, unit: Unit) -> None:
    text = json.dumps(json_ready({"schema": SCHEMA, **asdict(unit)}), allow_nan=False, separators=(",", ":")) + "\n"
    write_text(unit_path(folder, *unit.key), text)


def read_units(folder: Path) -> list[Unit]:
    """Every unit of a folder, zoos and variants in the order of their names."""
    found = (read_unit(path) for path in sorted((folder / "units").glob("*.json")))
    return sorted((u for u in found if u is not None), key=lambda u: u.key)


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

    def value(self, zoo: str, variant: str, metric: str, column: str = "mean") -> list[float]:
        """The metric of every seed that has it."""
        wanted = (zoo, variant, metric)
        found = (r[column] for r in self.rows if (r["zoo"], r["variant"], r["metric"]) == wanted)
        return [float(v) for v in found if isinstance(v, (int, float))]

    def variants(self, zoo: str, *kinds: str) -> list[str]:
        """Variants of a zoo, of these kinds, in the page's order."""
        known = [v for v in self.facts["variants"] if v["zoo"] == zoo and (not kinds or v["kind"] in kinds)]
        return list(dict.fromkeys(v["variant"] for v in known))

    def about(self, zoo: str, variant: str) -> Mapping[str, Any]:
        """Facts of a variant (of its first seed)."""
        return next((v for v in self.facts["variants"] if v["zoo"] == zoo and v["variant"] == variant), {})

    def table(self, name: str, zoo: str, variant: str | None = None) -> list[Row]:
        """A table's rows of a zoo, and of a variant."""
        return [r for r in self.tables.get(name, ()) if r.get("zoo") == zoo and variant in (None, r.get("variant"))]


_KINDS = ("zoo", "run", "code", "refined", "model", "features")


def write_tables(folder: Path, units: Iterable[Unit], facts: Mapping[str, Any]) -> None:
    """Write ``rows.csv``, the other tables and ``report.json``: the zoo first, then runs, then baselines."""
    ordered = sorted(units, key=lambda u: (u.zoo, _KINDS.index(u.kind) if u.kind in _KINDS else len(_KINDS), u.variant, u.seed))
    key = [dict(zip(KEY, u.key)) for u in ordered]
    rows = [
        {**k, "metric": name, "median": values[0], "mean": values[1], "spread": values[2]}
        for k, u in zip(key, ordered)
        for name, values in u.metrics.items()
    ]
    write_text(folder / "rows.csv", to_csv(rows, HEADER))
    for table in TABLES:
        write_text(folder / f"{table}.csv", to_csv([{**k, **row} for k, u in zip(key, ordered) for row in u.tables.get(table, ())], KEY))
    variants = [{**k, "kind": u.kind, **u.facts} for k, u in zip(key, ordered)]
    write_text(folder / "report.json", json.dumps(json_ready({"schema": SCHEMA, **facts, "variants": variants}), indent=1) + "\n")


def read_results(folder: str | Path) -> Results:
    """Read the tables of a folder back. Raises WslfastError for a folder without results, or a table that is none."""
    place = Path(folder)
    beside = [place / f"{name}.csv" for name in EXTRA if (place / f"{name}.csv").is_file()]  # these alone make a page too
    there = (place / "rows.csv").is_file()
    require(there or bool(beside), f"{place}: no results here (expected rows.csv); wslfast evaluate --out writes them")
    rows = from_csv(place / "rows.csv") if there else []
    missing = [c for c in HEADER if rows and c not in rows[0]]
    require(not missing, f"{place / 'rows.csv'}: columns {missing} are missing; expected {','.join(HEADER)}")
    tables = {name: from_csv(place / f"{name}.csv") for name in (*TABLES, *EXTRA) if (place / f"{name}.csv").is_file()}
    facts = _json(place / "report.json") if (place / "report.json").is_file() else {}
    described = facts.get("variants")
    known = described if isinstance(described, list) else []
    if not known:  # so do rows
        known = [dict(t) for t in dict.fromkeys(tuple((k, r[k]) for k in KEY) for r in rows)]
        known = [{**v, "kind": "zoo" if v["variant"] == "zoo" else "run"} for v in known]
    extra = {name: _json(place / f"{name}.json") for name in EXTRA if (place / f"{name}.json").is_file()}
    return Results(rows, tables, {**facts, **extra, "variants": known})


def to_csv(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """CSV with these columns first and whatever else the rows hold after them; an undefined value is an empty cell."""
    names = list(dict.fromkeys([*columns, *(name for row in rows for name in row)]))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([_cell(row.get(name)) for name in names] for row in rows)
    return text.getvalue()


def from_csv(path: Path) -> list[Row]:
    """Rows of a CSV file; cells that read as numbers are numbers (integers where they are), empty ones None."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            return [{str(name): _value(str(name), cell) for name, cell in row.items() if name is not None} for row in csv.DictReader(file)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise WslfastError(f"{path}: not a CSV table: {error}") from None


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _value(name: str, cell: str | None) -> Any:
    if cell is None or cell == "":
        return None
    if name in ("zoo", "variant", "metric"):  # names, whatever they look like
        return cell
    for kind in (int, float):
        try:
            number = kind(cell)
        except ValueError:
            continue
        return number if math.isfinite(number) else None
    return cell


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WslfastError(f"{path}: not JSON: {error}") from None
    require(isinstance(value, dict), f"{path}: expected an object, got {type(value).__name__}")
    return value
