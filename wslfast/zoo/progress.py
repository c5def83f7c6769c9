"""What whoever waits for a zoo sees: a bar in a terminal, a line that is written over in a notebook."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ..errors import say_once

Advance = Callable[[int, int, Tensor], None]


@contextmanager
def bar(show: bool, steps: int) -> Iterator[Advance]:
    """What to call after each step with epoch, epochs and losses ``[k]``; shown if ``show``. In a terminal it needs rich, in a notebook
    nothing more (no ipywidgets)."""
    if show and (handle := notebook_handle()) is not None:
        yield _line(handle, steps)
        return
    if show:
        try:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        except ImportError:
            say_once("wslfast: a progress bar needs rich: pip install rich; going on without", logging.WARNING)
            show = False
    if not show:
        yield lambda epoch, epochs, losses: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(12), MofNCompleteColumn(), TimeRemainingColumn())  # whole at 60 columns
    with Progress(*columns) as shown:
        task = shown.add_task("zoo", total=steps)
        done = 0

        def advance(epoch: int, epochs: int, losses: Tensor) -> None:
            nonlocal done
            done += 1
            if done % 10 == 0 or done == steps:  # reading the losses waits for the device
                shown.update(task, completed=done, description=f"epoch {epoch}/{epochs} loss {losses.nanmedian().item():.3f}")

        yield advance


def notebook_handle() -> Any:
    """Where a notebook shows a line that can be written over; None outside of one."""
    module: Any = sys.modules.get("IPython")
    shell = module.get_ipython() if module is not None else None
    if type(shell).__name__ != "ZMQInteractiveShell":  # a terminal's IPython is a terminal
        return None
    from IPython.display import display

    return display({"text/plain": "zoo"}, raw=True, display_id=True)


def _line(handle: Any, steps: int) -> Advance:
    began, done = time.perf_counter(), 0

    def advance(epoch: int, epochs: int, losses: Tensor) -> None:
        nonlocal done
        done += 1
        if done % 10 == 0 or done == steps:
            left = (time.perf_counter() - began) / done * (steps - done)
            blocks = round(20 * done / max(steps, 1))
            text = f"zoo: {'█' * blocks}{'░' * (20 - blocks)} {done}/{steps} steps, epoch {epoch} of {epochs}"
            text += f", median loss {losses.nanmedian().item():.3f}, {left:.0f} s left"
            handle.update({"text/plain": text}, raw=True)

    return advance
