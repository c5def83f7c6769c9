"""Ablation files of three steps, and a system that counts its calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wslfast.measure.results import NAMES, from_csv
from wslfast.study import ablations
from wslfast.study.ablations import COLUMNS, Cell, Trained

BASE = "steps = 3\nbatch_size = 4\nqueries = 8\nd_model = 16\nheads = 2\nlayers = 1\nlatent = 4\ncheckpoint_every = 2\ngamma = 0.0\n"


def write(path: Path, zoo: Path | str, rest: str, seeds: str = "[0, 1]", base: str = BASE, top: str = "") -> Path:
    path.write_text(f'zoo = "{zoo}"\nseeds = {seeds}\n{top}\n[base]\n{base}\n{rest}\n')
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    return from_csv(path, COLUMNS, names=(*NAMES, "ablation", "axis", "value"))


def counted(log: list[tuple[str, int]], like: ablations.System = ablations.core) -> ablations.System:
    def system(cell: Cell) -> Trained:
        log.append((cell.config.out, cell.config.seed))
        return like(cell)

    return system
