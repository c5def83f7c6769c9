"""What a run writes as it goes: ``log.jsonl``, and a profile of some of its steps."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import WslfastError
from ..files import write_text
from ..profiling import Profile, enabled, profile
from .hooks import LogHook

logger = logging.getLogger("wslfast")
Record = dict[str, Any]
OnRecord = Callable[[Record], None]

_WARMUP_STEPS = 3
_PROFILED_STEPS = 20


class Recorder:
    """Profiles a stretch of steps after a few that warm up; :meth:`close` writes what there is, and tells the hook.

    Without ``trace`` the phases alone are timed, and nothing is if the caller is profiling already.
    """

    def __init__(self, folder: Path, device: str, hook: LogHook | None = None, trace: bool = True) -> None:
        self.folder, self.device, self.steps, self.hook, self.trace = folder, device, 0, hook, trace
        self._stack = contextlib.ExitStack()
        self._profile: Profile | None = None

    def after_step(self) -> None:
        self.steps += 1
        if self.steps == _WARMUP_STEPS and (self.trace or not enabled()):
            self._profile = self._stack.enter_context(profile(self.folder, self.device, self.trace))
        elif self.steps == _WARMUP_STEPS + _PROFILED_STEPS:
            self.close()

    def close(self) -> None:
        self._stack.close()
        if self._profile is not None:
            if self.trace:
                logger.info("profile of %d steps:\n%s", self.steps - _WARMUP_STEPS, self._profile.table())
            if self.hook is not None:
                columns = ("phase", "share", "calls", "ms")
                self.hook.table("phases", columns, [[row[c] for c in columns] for row in self._profile.rows()])
            self._profile = None


class RunLog:
    """``log.jsonl``, cut back to the step a run continues from. Without a path nothing is written and nobody told."""

    def __init__(self, path: Path | None, step: int, on_record: OnRecord | None, hook: LogHook | None = None) -> None:
        self.path, self.step, self.on_record, self.hook = path, step, on_record, hook
        if path is not None:
            kept = [line for line in _complete_lines(path) if json.loads(line)["step"] <= step] if step else []
            write_text(path, "".join(kept))

    def __enter__(self) -> RunLog:
        self._file = None if self.path is None else self.path.open("a", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, record: Record) -> None:
        self.step = record["step"]
        if self._file is None:
            return
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        except OSError as error:
            raise WslfastError(f"cannot write {self.path}: {error} (the run goes on from its last checkpoint with resume)") from error
        if self.hook is not None:
            self.hook.scalars(record["step"], {name: value for name, value in record.items() if name != "step"})
        if self.on_record is not None:
            self.on_record(record)


def _complete_lines(path: Path) -> Iterator[str]:
    """The lines of a log that hold a whole record (a killed run may leave half of its last one)."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            json.loads(line)["step"]
            yield line
