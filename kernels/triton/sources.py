"""What the kernels are made of, as one number: verdicts, recorded tables and races hold for the sources that they were made with."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

# What decides how kernels are launched on the host, and not what is compiled.
HOST = (
    "__init__.py",
    "budget.py",
    "buffers.py",
    "differentiable.py",
    "folding.py",
    "launch.py",
    "launcher.py",
    "network_launch.py",
    "query_gradient.py",
    "sources.py",
)


@lru_cache(maxsize=2)
def digest(compiled: bool = False) -> str:
    """SHA-256, its first 16 digits, of this folder's sources; ``compiled``: of those alone that decide what is compiled."""
    total = hashlib.sha256()
    for file in sorted(Path(__file__).resolve().parent.glob("*.py")):
        if not (compiled and file.name in HOST):
            total.update(file.name.encode() + b"\0" + file.read_bytes().replace(b"\r\n", b"\n") + b"\0")
    return total.hexdigest()[:16]
