"""Commands of ours in processes of their own, some at a time, each with its own time and all with a deadline: one that crashes, hangs or is
late costs itself alone, and what it said is said at once."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO

from .recording import ROOT

LATE = 124  # the status of what had to be stopped


@dataclass(frozen=True)
class Job:
    """One command: arguments of this Python, seconds that it may take, additions to the environment."""

    name: str
    command: tuple[str, ...]
    seconds: float = 60.0
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Done:
    """How a job ended: its exit status (negative: a signal), seconds, and what it printed; ``cut``: stopped by the deadline of all, within
    its own time."""

    job: Job
    status: int
    seconds: float
    output: str
    cut: bool = False

    @property
    def words(self) -> str:
        """How it ended, in a few words."""
        if self.status == 0:
            return "well"
        if self.status == LATE:
            return f"stopped after {self.seconds:.0f} s"
        if self.status < 0:
            return f"died ({signal.Signals(-self.status).name})"
        last = [line for line in self.output.splitlines() if line.strip()][-1:]
        return f"failed ({self.status}){': ' + last[0][:200] if last else ''}"


class _Running:
    def __init__(self, job: Job) -> None:
        self.job, self.began = job, time.monotonic()
        self.out: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed in done)
        self.process = subprocess.Popen(
            [sys.executable, *job.command],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **job.environment},
            stdin=subprocess.DEVNULL,
            stdout=self.out,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # what it starts ends with it
        )

    def poll(self, deadline: float) -> Done | None:
        """How it ended; None while it runs within its time."""
        status = self.process.poll()
        if status is None and time.monotonic() < min(deadline, self.began + self.job.seconds):
            return None
        cut = status is None and time.monotonic() < self.began + self.job.seconds
        if status is None:
            self.stop()
            status = LATE
        seconds = time.monotonic() - self.began
        self.out.seek(0)
        output = self.out.read().decode(errors="replace")
        self.out.close()
        return Done(self.job, status, seconds, output, cut)

    def stop(self) -> None:
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def run_all(jobs: Sequence[Job], processes: int, deadline: float, said: Callable[[Done], None]) -> list[str]:
    """Run jobs in order, ``processes`` at a time; ``said`` hears of each as it ends. Returns the names of those that were not begun.

    Args:
        deadline: of ``time.monotonic()``: nothing begins after it, and what runs then is stopped.
    """
    waiting, running = deque(jobs), list[_Running]()
    try:
        while waiting or running:
            while waiting and len(running) < processes and time.monotonic() < deadline:
                running.append(_Running(waiting.popleft()))
            if not running:
                break
            for one in list(running):
                done = one.poll(deadline)
                if done is not None:
                    running.remove(one)
                    said(done)
            time.sleep(0.02)
    finally:
        for one in running:
            one.stop()
    return [job.name for job in waiting]
