"""Tables in text files: CSV with a header, packed or not, its numbers as numbers."""

from __future__ import annotations

import csv
import gzip
import io
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ...errors import WslfastError, require

_LARGEST = 1 << 30  # bytes


def read_table(path: str | Path, text: Collection[str] = ()) -> list[dict[str, Any]]:
    """The rows of a CSV file (``.csv``, ``.tsv``, with ``.gz`` too), by the names of its first line.

    The separator is the comma, semicolon or tab that the first line has most of; a byte-order mark is passed over. Whole numbers are
    integers, other numbers floats; what is empty or no number of this world (``nan``, ``inf``) is None; the rest is text. The columns named
    in ``text`` are text whatever they hold: a file ``007`` is not called 7.

    Raises:
        WslfastError: naming the file, for one that is missing, damaged or no table.
    """
    file = Path(path)
    try:
        opened = gzip.open(file, "rb") if file.suffix == ".gz" else open(file, "rb")  # noqa: SIM115 - closed by with, below
        with opened:
            data = opened.read(_LARGEST + 1)
        require(len(data) <= _LARGEST, f"{path}: larger than {_LARGEST >> 30} GiB")
        content = data.decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise WslfastError(f"{path}: cannot be read as a table: {reason}") from None
    head = content.partition("\n")[0]
    separator = max(",;\t", key=head.count)
    try:
        lines = [line for line in csv.reader(io.StringIO(content, newline=""), delimiter=separator) if any(cell.strip() for cell in line)]
    except csv.Error as error:
        raise WslfastError(f"{path}: cannot be read as a table: {error}") from None
    require(len(lines) > 0, f"{path}: expected a table with a line of names, got an empty file")
    names = [name.strip() for name in lines[0]]
    twice = sorted({name for name in names if names.count(name) > 1})
    require(not twice, f"{path}: columns that are there twice: {twice[:4]}")
    for number, line in enumerate(lines[1:], 2):
        require(len(line) <= len(names), f"{path}: line {number}: expected {len(names)} columns, got {len(line)}")
    return [{name: cell.strip() if name in text else number_of(cell) for name, cell in zip(names, line)} for line in lines[1:]]


def number_of(cell: str) -> Any:
    """A cell's value: an integer, a float, a text, or None for nothing."""
    cell = cell.strip()
    if not cell:
        return None
    try:
        whole = int(cell)
        return whole if "_" not in cell and abs(whole) < 1 << 63 else cell
    except ValueError:
        pass
    try:
        value = float(cell)
    except ValueError:
        return cell
    if "_" in cell:
        return cell
    return value if math.isfinite(value) else None
