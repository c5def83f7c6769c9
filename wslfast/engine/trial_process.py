"""A trial that runs in a process of its own (trial.py), seen from the one that asked: its findings, its end, whatever becomes of it."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from . import verdicts
from .trial import MARK

# not -m: modules of the folder that somebody happens to be in would be taken for the library's and torch's own
COMMAND = (
    sys.executable, "-c",
    "import sys; sys.path = [p for p in sys.path if p]; import json; job = json.loads(sys.stdin.readline()); sys.path = job['path']; "
    "from wslfast.engine import trial; trial.serve(job)",
)  # fmt: skip


class TrialProcess:
    """A trial that runs: its findings, a line each."""

    def __init__(self, command: Sequence[str], job: dict[str, Any]) -> None:
        # what this process imports is what the trial has to: where modules are found goes with the job
        path = [*(p for p in sys.path if isinstance(p, str)), str(Path(__file__).resolve().parents[2])]
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed in stop)
        self.process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            encoding="utf-8",
            errors="replace",  # compilers and drivers print what they like
            start_new_session=True,  # compilers that it starts end with it
        )
        self.lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        # a job that a pipe does not hold is only written as it is read, if ever
        threading.Thread(target=self._write, args=(json.dumps({**job, "path": path}) + "\n",), daemon=True).start()

    def _write(self, job: str) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.write(job)
            self.process.stdin.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        try:
            for line in self.process.stdout:
                _, mark, said = line.partition(MARK)
                if mark:
                    self.lines.put(said)
        finally:
            self.lines.put(None)

    def findings(self, deadline: float) -> Iterator[dict[str, Any]]:
        """Until it ends or, with a TimeoutError, until the time is over. A line that is no finding is passed over."""
        while True:
            left = deadline - time.monotonic()
            try:
                line = self.lines.get(timeout=min(max(left, 0.01), 1.0))
            except queue.Empty:
                if self.process.poll() is not None:  # what it has started may hold its output open
                    return
                if left <= 0:
                    raise TimeoutError from None
                continue
            if line is None:
                return
            with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError):
                finding = json.loads(line)
                if "verdict" in finding:
                    finding["verdict"] = verdicts.from_dict(finding["verdict"])
                yield {"form": str(finding["form"]), **finding}

    def ended(self, deadline: float) -> str:
        """How it ended, in words; empty if well. Raises TimeoutError if it has not."""
        try:
            code = self.process.wait(max(deadline - time.monotonic(), 1.0))
        except subprocess.TimeoutExpired:
            raise TimeoutError from None
        if code == 0:
            return ""
        self.errors.seek(0)
        last = self.errors.read().decode(errors="replace").strip().splitlines()[-1:]
        how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        return f"its process died ({how}){': ' + last[0][:160] if last else ''}"

    def stop(self) -> None:
        """End it and what it started."""
        if self.process.poll() is None:  # its number may be another's afterwards
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # one that hangs in the driver cannot be ended: it is not waited for
            self.process.wait(10)
        self.errors.close()
