"""What the tests of the fault matrix share: how much of each row is run, and a record of what was reached."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

from wslfast.profiling import processor

FULL = os.environ.get("WSLFAST_FAULTS") == "full"  # make faults
_OUT = os.path.abspath(os.environ["WSLFAST_FAULTS_OUT"]) if "WSLFAST_FAULTS_OUT" in os.environ else None  # tests change the folder


def many(short: int, full: int) -> int:
    """How many cases to run: a few in ``make test``, the row's figure in ``make faults``."""
    return full if FULL else short


def reached(row: str, what: str, count: int | str, wanted: int | str) -> None:
    """Record a figure of the matrix; ``render.py`` makes docs/reliability.md's table of it. Called when it has been reached."""
    if _OUT is None:
        return
    place = Path(_OUT)
    place.mkdir(parents=True, exist_ok=True)
    record = {
        "row": row,
        "what": what,
        "reached": count,
        "wanted": wanted,
        "form": "full" if FULL else "short",
        "date": time.strftime("%Y-%m-%d"),
        "cores": os.cpu_count(),
        "machine": processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    with open(place / "figures.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def digest(value: Any) -> str:
    """SHA-256 of a state's content, to the bit: tensors by dtype, shape and bytes, the rest by its representation."""
    total = hashlib.sha256()
    _add(total, value)
    return total.hexdigest()


def _add(total: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        total.update(f"{value.dtype}{list(value.shape)}".encode())
        total.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data if value.numel() else b"")
    elif isinstance(value, dict):
        for key in value:
            total.update(repr(key).encode())
            _add(total, value[key])
    elif isinstance(value, (list, tuple)):
        total.update(f"{len(value)}".encode())
        for inner in value:
            _add(total, inner)
    else:
        total.update(repr(value).encode())


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, with its content."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
