"""``manifest.json``: what a zoo's folder says about its shards, written canonically and read with suspicion.

A manifest comes from anybody. Every field is checked for type and range before it is used, numbers and keys must be in the
form that :func:`Manifest.to_json` writes, and a checksum covers everything this version understands, so that a changed
digit is an error and not another accuracy. Fields of later versions that keep the schema number are ignored.

A zoo of one architecture has schema 1. One of several has schema 2: a table of architectures by label, a column ``architecture`` that
holds each row's label, and shards whose rows lie one after another, as they differ in length.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from ..architecture import Architecture
from ..errors import WslfastError, describe, require

MANIFEST = "manifest.json"
FORMAT = "wslfast-zoo"
SCHEMA = 2  # the latest that is read; zoos of one architecture are written with 1
KIND = "architecture"  # the column of labels of a zoo of several architectures
SPLITS = ("train", "val", "test")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,126}\.safetensors")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_SCALARS = (int, float, str, bool, type(None))


@dataclass(frozen=True)
class Shard:
    """One file of rows: its name in the zoo's folder, rows of weights, size in bytes, SHA-256 of the file."""

    file: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Kind:
    """An entry in the table of architectures: ``Architecture.to_dict()``'s record, not yet rebuilt, and P."""

    architecture: Mapping[str, Any]
    num_weights: int


@dataclass(frozen=True, repr=False)
class Manifest:
    """A validated manifest.

    Attributes:
        architecture: ``Architecture.to_dict()``'s record, not yet rebuilt; empty for a zoo of several.
        num_weights: P, numbers in one row; 0 for a zoo of several architectures.
        rows: rows in all shards together, in the order of ``shards``.
        properties: column name -> one value per row; ``model`` (int) and ``split`` are always there.
        split: how rows were split: ``{"by": "model", "seed": int or None, "fractions": [train, val, test] or None}``.
        provenance: whatever the writer recorded.
        shards: the files.
        kinds: the table of architectures of a zoo of several, by label; empty for a zoo of one.
    """

    architecture: Mapping[str, Any]
    num_weights: int
    rows: int
    properties: Mapping[str, tuple[Any, ...]]
    split: Mapping[str, Any]
    provenance: Mapping[str, Any]
    shards: tuple[Shard, ...]
    kinds: Mapping[str, Kind] = field(default_factory=dict)

    def __reduce__(self) -> tuple[Any, ...]:  # pickled, copied and saved as what it is made of
        plain = {name: dict(value) if isinstance(value, Mapping) else value for name, value in vars(self).items()}
        return _rebuilt, (plain,)

    def __repr__(self) -> str:
        what = f"{len(self.kinds)} architectures" if self.kinds else f"{self.architecture.get('name')!s:.60}, P={self.num_weights:,}"
        models = len(set(self.properties.get("model", ())))
        return f"Manifest({what}, {self.rows:,} rows of {models:,} models, {len(self.shards)} shards, columns {list(self.properties)[:12]})"

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shape of each shard's one tensor: ``[rows, P]``, or the numbers of all its rows for a zoo of several architectures."""
        if not self.kinds:
            return tuple((shard.rows, self.num_weights) for shard in self.shards)
        widths, shapes, at = self.widths, [], 0
        for shard in self.shards:
            shapes.append((sum(widths[at : at + shard.rows]),))
            at += shard.rows
        return tuple(shapes)

    @property
    def widths(self) -> list[int]:
        """Numbers in each row."""
        if not self.kinds:
            return [self.num_weights] * self.rows
        return [self.kinds[label].num_weights for label in self.properties[KIND]]

    def record(self) -> dict[str, Any]:
        """The JSON object, without its checksum."""
        if self.kinds:
            table = {label: {"num_weights": k.num_weights, "architecture": dict(k.architecture)} for label, k in self.kinds.items()}
            head: dict[str, Any] = {"format": FORMAT, "schema": 2, "architectures": table}
        else:
            head = {"format": FORMAT, "schema": 1, "architecture": dict(self.architecture), "num_weights": self.num_weights}
        return {
            **head,
            "rows": self.rows,
            "split": dict(self.split),
            "shards": [vars(shard) for shard in self.shards],
            "provenance": dict(self.provenance),
            "properties": {name: list(column) for name, column in self.properties.items()},
        }

    def checksum(self) -> str:
        """SHA-256 of the canonical form (sorted keys, no spaces) of :meth:`record`."""
        return hashlib.sha256(_dumps(self.record(), sort_keys=True, separators=(",", ":"))).hexdigest()

    def to_json(self) -> bytes:
        """The file's bytes, one line a field and a line per column. Raises WslfastError for what JSON cannot hold."""
        record = self.record()
        columns = record.pop("properties")
        lines = [_entry(key, value) for key, value in record.items()]
        inner = b",\n".join(b"  " + _entry(name, column) for name, column in columns.items())
        lines.append(b'"properties": {\n' + inner + b"\n }")
        lines.append(_entry("checksum", self.checksum()))
        return b"{\n " + b",\n ".join(lines) + b"\n}\n"

    @classmethod
    def parse(cls, data: bytes, where: str) -> Manifest:
        """The manifest in ``data``; ``where`` names the file in errors. Raises nothing but WslfastError."""
        record = _loads(data, where)
        require(isinstance(record, dict), f"{where}: expected a JSON object, got {type(record).__name__}")
        require(record.get("format") == FORMAT, f"{where}: format: expected {FORMAT!r}, got {_came(record.get('format'))}")
        schema = _integer(record, "schema", where)
        if schema > SCHEMA:
            raise WslfastError(f"{where}: schema {schema} is newer than this version's {SCHEMA}; upgrade wslfast to read this zoo")
        kinds = _kinds(record, where) if schema > 1 else {}
        manifest = cls(
            architecture=MappingProxyType({} if kinds else _object(record, "architecture", where)),
            num_weights=0 if kinds else _integer(record, "num_weights", where),
            rows=_integer(record, "rows", where),
            properties=_columns(record, where, kinds),
            split=MappingProxyType(_split(record, where)),
            provenance=MappingProxyType(_object(record, "provenance", where)),
            shards=_shards(record, where),
            kinds=MappingProxyType(kinds),
        )
        held = sum(shard.rows for shard in manifest.shards)
        require(held == manifest.rows, f"{where}: shards: expected {manifest.rows} rows in all, got {held}")
        claimed = record.get("checksum")
        require(claimed == manifest.checksum(), f"{where}: checksum: the manifest was changed after it was written, or is damaged")
        return manifest

    def rebuild(self, where: str, label: str | None = None) -> Architecture:
        """The architecture recorded here, of a zoo of several the one of that label. Raises WslfastError if it cannot be rebuilt or its P
        is not ``num_weights``."""
        recorded, expected = self.architecture, self.num_weights
        if self.kinds:
            require(label in self.kinds, f"{where}: expected one of the architectures {self.labels}, got {label!r}")
            assert label is not None
            recorded, expected = self.kinds[label].architecture, self.kinds[label].num_weights
        try:
            architecture = Architecture.from_dict(recorded)
            size = architecture.num_weights
        except WslfastError as error:
            raise WslfastError(f"{where}: {error}") from None
        except Exception as error:  # a record nobody wrote may fail anywhere below
            raise WslfastError(f"{where}: architecture: {type(error).__name__}: {error}") from error
        require(size == expected, f"{where}: num_weights: the architecture has {size}, the manifest says {expected}")
        return architecture

    @property
    def labels(self) -> str:
        """Labels of a zoo of several architectures, as an error names them."""
        names = list(self.kinds)
        return ", ".join(map(repr, names[:8])) + (f", ... ({len(names)} in all)" if len(names) > 8 else "")


def _rebuilt(fields: dict[str, Any]) -> Manifest:
    frozen: dict[str, Any] = {name: MappingProxyType(value) if isinstance(value, dict) else value for name, value in fields.items()}
    return Manifest(**frozen)


def plain(value: Any, what: str) -> Any:
    """A property's value as JSON holds it: int, float, str, bool or None; what is not finite becomes None."""
    if hasattr(value, "item") and not isinstance(value, _SCALARS):
        try:
            value = value.item()  # numpy's and torch's scalars
        except (ValueError, RuntimeError):
            raise WslfastError(f"{what}: expected one number or string, got {type(value).__name__}") from None
    require(isinstance(value, _SCALARS), f"{what}: expected a number, a string, a bool or None, got {type(value).__name__}")
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value


def normalised(record: Mapping[str, Any], what: str) -> dict[str, Any]:
    """``record`` as it will be read back: tuples become lists, keys strings. Raises WslfastError for what JSON cannot hold."""
    try:
        return json.loads(_dumps(dict(record)))
    except WslfastError as error:
        raise WslfastError(f"{what}: {error}") from None


def _dumps(value: Any, **options: Any) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, **options).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise WslfastError(f"cannot be written as JSON: {error}") from None


def _entry(key: str, value: Any) -> bytes:
    return _dumps(key) + b": " + _dumps(value)


def _loads(data: bytes, where: str) -> Any:
    def real(literal: str) -> float:
        value = float(literal)
        # 1e-05 and 1E-05 are one number a bit apart: only the form that is written passes, so no bit flip does
        if repr(value) != literal:
            raise WslfastError(f"{where}: number {literal[:40]} is not in its shortest form")
        return value

    def whole(literal: str) -> int:
        value = int(literal)
        if str(value) != literal:
            raise WslfastError(f"{where}: number {literal[:40]} is not in its shortest form")
        return value

    def constant(literal: str) -> None:
        raise WslfastError(f"{where}: {literal} is not JSON")

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(items)
        require(len(entries) == len(items), f"{where}: a key appears twice in one object")
        return entries

    try:
        text = data.decode("utf-8")
        return json.loads(text, parse_float=real, parse_int=whole, parse_constant=constant, object_pairs_hook=pairs)
    except WslfastError:
        raise
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise WslfastError(f"{where}: not valid JSON: {error}") from None


def _came(value: Any) -> str:
    """What came, briefly, however large or deep it is."""
    return describe(value[:60] if isinstance(value, str) else value)[:80]


def _object(record: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    value = record.get(key)
    require(isinstance(value, dict), f"{where}: {key}: expected an object, got {_came(value)}")
    assert isinstance(value, dict)
    return value


def _integer(record: Mapping[str, Any], key: str, where: str) -> int:
    value = record.get(key)
    require(type(value) is int and 1 <= value < 1 << 60, f"{where}: {key}: expected an integer >= 1, got {_came(value)}")
    assert isinstance(value, int)
    return value


def _kinds(record: Mapping[str, Any], where: str) -> dict[str, Kind]:
    kinds = {}
    for label, entry in _object(record, "architectures", where).items():
        what = f"{where}: architectures[{_came(label)}]"
        require(isinstance(entry, dict) and set(entry) == {"num_weights", "architecture"}, f"{what}: expected num_weights and architecture")
        kinds[label] = Kind(MappingProxyType(_object(entry, "architecture", what)), _integer(entry, "num_weights", what))
    require(len(kinds) > 0, f"{where}: architectures: expected at least one")
    return kinds


def _columns(record: Mapping[str, Any], where: str, kinds: Mapping[str, Kind]) -> Mapping[str, tuple[Any, ...]]:
    rows, columns = _integer(record, "rows", where), {}
    for name, column in _object(record, "properties", where).items():
        what = f"{where}: properties[{_came(name)}]"
        require(isinstance(column, list), f"{what}: expected a list, got {type(column).__name__}")
        require(len(column) == rows, f"{what}: expected {rows} values, got {len(column)}")
        wrong = next((v for v in column if not isinstance(v, _SCALARS)), None)
        require(wrong is None, f"{what}: expected numbers, strings or null, got {type(wrong).__name__}")
        columns[name] = tuple(column)
    checks: list[tuple[str, Any, Any]] = [("model", lambda v: type(v) is int, "integers"), ("split", lambda v: v in SPLITS, SPLITS)]
    checks += [(KIND, lambda v: isinstance(v, str) and v in kinds, "labels of the table")] if kinds else []
    for name, valid, expected in checks:
        require(name in columns, f"{where}: properties: column {name!r} is missing; there are {[n[:20] for n in list(columns)[:8]]}")
        for v in columns[name]:
            if not valid(v):
                raise WslfastError(f"{where}: properties[{name!r}]: expected {expected}, got {_came(v)}")
    where_is: dict[int, str] = {}
    for model, split in zip(columns["model"], columns["split"], strict=True):
        other = where_is.setdefault(model, split)
        require(other == split, f"{where}: properties['split']: model {model} is in both {other!r} and {split!r}")
    return MappingProxyType(columns)


def _split(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    value = _object(record, "split", where)
    for key in ("seed", "fractions"):  # null is a value, too: a key that lost a bit is not taken for it
        require(key in value, f"{where}: split.{key} is missing; there are {[k[:20] for k in list(value)[:8]]}")
    seed, fractions = value["seed"], value["fractions"]
    require(value.get("by") == "model", f"{where}: split.by: expected 'model', got {_came(value.get('by'))}")
    require(seed is None or type(seed) is int, f"{where}: split.seed: expected an integer or null, got {_came(seed)}")
    numbers = isinstance(fractions, list) and len(fractions) == 3 and all(type(f) in (int, float) for f in fractions)
    require(fractions is None or numbers, f"{where}: split.fractions: expected three numbers or null, got {_came(fractions)}")
    return {"by": "model", "seed": seed, "fractions": fractions}


def _shards(record: Mapping[str, Any], where: str) -> tuple[Shard, ...]:
    listed = record.get("shards")
    if not isinstance(listed, list) or not listed:
        raise WslfastError(f"{where}: shards: expected a list of at least one, got {_came(listed)}")
    shards, names = [], set()
    for i, entry in enumerate(listed):
        what = f"{where}: shards[{i}]"
        require(isinstance(entry, dict), f"{what}: expected an object, got {_came(entry)}")
        file, digest = entry.get("file"), entry.get("sha256")
        # a plain name only: nothing that could leave the zoo's folder
        require(
            isinstance(file, str) and _FILE.fullmatch(file) is not None and ".." not in file,
            f"{what}: file: expected a plain name ending in .safetensors, got {_came(file)}",
        )
        require(file.lower() not in names, f"{what}: {file!r} is listed twice")
        hexadecimal = isinstance(digest, str) and _DIGEST.fullmatch(digest) is not None
        require(hexadecimal, f"{what}: sha256: expected 64 hex digits, got {_came(digest)}")
        names.add(file.lower())
        shards.append(Shard(file, _integer(entry, "rows", what), _integer(entry, "bytes", what), digest))
    return tuple(shards)
