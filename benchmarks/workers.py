"""Cells in a process of their own: a kernel that faults, a compilation that hangs or a process that dies costs its cell, not the run.

The parent hands a worker one cell at a time and waits; a worker that is late or gone is replaced. ``python -m benchmarks.workers DEVICE``
is the worker: cells as JSON lines in, rows as JSON lines out.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict

import torch

from .losses import Cell, beside, on_gpu
from .recording import ROOT, Row, as_record, parse

_MARK = "rows:"  # of the lines that are ours, whatever else a library prints
_START_S = 120.0


class _Worker:
    """A running worker process."""

    def __init__(self, device: str) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.workers", device],
            cwd=ROOT,
            env=environment,
            text=True,
            start_new_session=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.lost = False  # it can no longer use its device, and ends
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(_MARK):
                self.lines.put(line.removeprefix(_MARK))
        self.lines.put(None)

    def ask(self, message: object, seconds: float) -> list[Row] | str:
        """The rows of a reply, or why there are none."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
            line = self.lines.get(timeout=max(seconds, 0.01))
        except queue.Empty:
            return f"stopped after {seconds:.0f} s"
        except OSError:
            line = None
        if line is None:
            code = self.process.wait()
            return f"its process died ({signal.Signals(-code).name if code < 0 else f'exit status {code}'})"
        said = json.loads(line)
        self.lost = said["lost"]
        return [parse(record) for record in said["rows"]]

    def stop(self) -> None:
        """End the process and what it started (compilers)."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def run(
    cells: Sequence[Cell],
    emit: Callable[[list[Row]], None],
    *,
    device: str,
    deadline: float,
    cell_s: float,
    provider_s: Callable[[str], float],
    figure_s: float = 1.0,
    best: Sequence[Row] = (),
) -> None:
    """Rows of all cells, one ``emit`` a cell, in order.

    Args:
        deadline: of ``time.monotonic()``; what is not begun by then is a row that says so.
        cell_s: seconds a cell may take; its worker is stopped then.
        provider_s: seconds that a provider's cells may take together, by its name.
        figure_s: seconds that the clocks of one cell aim at.
        best: rows of the ceilings.
    """
    cuda, worker, spent = device == "cuda", None, dict.fromkeys((cell.provider for cell in cells), 0.0)
    try:
        for cell in cells:
            left = deadline - time.monotonic()
            if left <= 0 or spent[cell.provider] > provider_s(cell.provider):
                emit(
                    [
                        cell.failed(
                            "not run: " + ("out of time" if left <= 0 else f"its {provider_s(cell.provider):.0f} s were used up"), cuda
                        )
                    ]
                )
                continue
            began = time.monotonic()
            rows: list[Row] | str = []
            if worker is None:
                worker = _Worker(device)
                rows = worker.ask({"figure_s": figure_s, "best": [as_record(row) for row in best]}, min(_START_S, max(left, 20.0)))
                began = time.monotonic()  # a start is nobody's time
            if not isinstance(rows, str):
                rows = worker.ask(asdict(cell), min(cell_s, max(left, 5.0)))
            spent[cell.provider] += time.monotonic() - began
            if isinstance(rows, str) or worker.lost:
                worker.stop()
                worker = None
            if isinstance(rows, str):
                rows = [cell.failed(rows, cuda)]
            emit(rows)
    finally:
        if worker is not None:
            worker.stop()


def main(device: str) -> None:
    """Answer the parent until it closes the pipe."""
    settings = json.loads(sys.stdin.readline())
    best, figure_s = [parse(record) for record in settings["best"]], settings["figure_s"]
    _reply([])
    for line in sys.stdin:
        cell = Cell(**json.loads(line))
        rows = on_gpu(cell, figure_s, best) if device == "cuda" else beside([cell], 3, figure_s, best)
        lost = _lost(device)
        _reply(rows if lost is None else [cell.failed(f"the device was lost: {lost}", device == "cuda")], lost is not None)
        if lost is not None:  # nothing that this process asks of it will work again; the parent starts another
            return


def _lost(device: str) -> str | None:
    """Why the device no longer answers this process, None if it does: an error of a kernel shows at the next wait, whoever waits."""
    if device != "cuda":
        return None
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).splitlines()[0][:120]
    return None


def _reply(rows: list[Row], lost: bool = False) -> None:
    print(_MARK + json.dumps({"rows": [as_record(row) for row in rows], "lost": lost}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
