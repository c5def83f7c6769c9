"""Which line of a trial's ``result.json`` belongs to which checkpoint: by what the lines record, never by their place in the file.

A run that was killed and began again appends to the file, so places say nothing. What a line may record:

- ``checkpoint_dir_name``: the folder itself (ray 2.7 and later, where folders only count checkpoints);
- ``training_iteration`` or ``epoch``: the number that a folder is called by.

Of several lines of one checkpoint the last one counts: a run that began again wrote its checkpoints over the earlier ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

_FOLDER = "checkpoint_dir_name"
_NUMBERS = ("training_iteration", "epoch")
Line = Mapping[str, Any]


class Match(NamedTuple):
    """A checkpoint's file of weights and the line that belongs to it, or None and why nothing tells which one does."""

    file: Path
    line: Line | None
    why: str


def match(lines: Sequence[Line], files: Mapping[int, Path]) -> tuple[dict[int, Match], list[tuple[Path, str, str]]]:
    """Checkpoints by epoch, and those whose epoch is not known or there twice, with reason and detail.

    Args:
        lines: objects of ``result.json``, in the order in which they were written.
        files: weights by the number in their folder's name.
    """
    place = {line[_FOLDER]: i for i, line in enumerate(lines) if isinstance(line.get(_FOLDER), str)}
    if place:
        return _by_folder(lines, files, place)
    by_epoch = {number: line for line in lines for number in _numbers(line)[:1]}
    why = _undecided(lines, files, by_epoch)
    matched = {}
    for number, file in files.items():
        line = None if why else by_epoch.get(number)
        matched[number] = Match(file, line, why or f"no line records number {number}")
    return matched, []


def _by_folder(
    lines: Sequence[Line], files: Mapping[int, Path], place: Mapping[str, int]
) -> tuple[dict[int, Match], list[tuple[Path, str, str]]]:
    """Folders that the lines name: their numbers count checkpoints, so the epoch is the line's, too, if lines record any."""
    matched: dict[int, Match] = {}
    left: list[tuple[Path, str, str]] = []
    counted = any(_numbers(line) for line in lines)
    for number, file in sorted(files.items(), key=lambda item: -place.get(item[1].parent.name, -1)):  # what was written last comes first
        name = file.parent.name
        line = lines[place[name]] if name in place else None
        why = "" if line is not None else "the lines name other folders"
        epoch = next(iter(_numbers(line or {})), None) if counted else number
        if epoch is None:
            left.append((file, "epoch unknown", why or "its line records no number"))
        elif epoch in matched:
            left.append((file, "epoch twice", f"{matched[epoch].file.parent.name} is read"))
        else:
            matched[epoch] = Match(file, line, why)
    return matched, left


def _undecided(lines: Sequence[Line], files: Mapping[int, Path], known: Mapping[int, Line]) -> str:
    """Why the numbers in the folders' names do not say which line is whose, or nothing."""
    if not known:
        return "no line records training_iteration, epoch or checkpoint_dir_name"
    if any(len(set(_numbers(line))) > 1 for line in lines):
        return "training_iteration and epoch differ, and nothing says which one the folders are called by"
    # ray's functions count folders from 0 and iterations from 1; where folder 0 holds initial weights, last folder and last line agree
    if 0 in files and 0 not in known and max(files) < max(known):
        return "folders count from 0 and lines from 1"
    return ""


def _numbers(line: Line) -> list[int]:
    """The numbers that a line records, the training iteration first; as many digits as a folder's name may have."""
    values = (line.get(name) for name in _NUMBERS)
    return [int(v) for v in values if (type(v) is int or (isinstance(v, float) and v.is_integer())) and 0 <= v < 10**9]
