"""Files that a stranger could hand us: pickles that call functions, archives around them, and honest samples of both forms."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch


class Calls:
    """Pickles to a call of ``function(*arguments)``."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


def hostile_programs(canary: Path) -> dict[str, bytes]:
    shell = f"touch {canary}"
    call = Calls(os.system, shell)
    programs = {f"system-{p}": pickle.dumps(call, protocol=p) for p in range(6)}
    programs |= {f"in-a-dict-{p}": pickle.dumps({"w": [call, (call,)]}, protocol=p) for p in range(2, 6)}
    programs |= {f"eval-{p}": pickle.dumps(Calls(eval, f"open({str(canary)!r}, 'w')"), protocol=p) for p in range(2, 6)}
    programs["global-inst"] = b"(S'" + shell.encode() + b"'\nios\nsystem\n."
    programs["obj"] = b"(cos\nsystem\nS'" + shell.encode() + b"'\no."
    programs["build"] = b"cos\nsystem\n}S'__setstate__'\ncos\nsystem\nsb."
    programs["extension"] = b"\x80\x02\x82\x01."
    programs["nested"] = pickle.dumps(Calls(pickle.loads, pickle.dumps(call)), protocol=2)
    programs["lazy"] = pickle.dumps(Calls(list, Calls(map, os.system, [shell])), protocol=4)
    return programs


def as_archive(program: bytes, storages: dict[str, bytes] | None = None, prefix: str = "archive") -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(f"{prefix}/data.pkl", program)
        archive.writestr(f"{prefix}/version", "3")
        for key, data in (storages or {}).items():
            archive.writestr(f"{prefix}/data/{key}", data)
    return out.getvalue()


@lru_cache(maxsize=2)  # the stream form names storages by their addresses: two samples differ in length, and a property test's must not
def honest_file(zipped: bool) -> bytes:
    out = io.BytesIO()
    torch.save(
        {"a": torch.arange(6.0).view(2, 3), "b": {"c": [1, (2, "x")], "d": torch.ones(2, dtype=torch.int64)}},
        out,
        _use_new_zipfile_serialization=zipped,
    )
    return out.getvalue()
