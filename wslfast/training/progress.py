"""The progress of a run as its user sees it, a bar or a line every 20 seconds; and a Ctrl-C that loses nothing."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

from .records import OnRecord

if TYPE_CHECKING:
    from rich.console import Console

_EVERY = 20.0  # seconds between lines where there is no terminal


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a run, after its last step was finished and its checkpoint written; the text says how it goes on."""


@contextlib.contextmanager
def finishing_steps() -> Iterator[Callable[[], bool]]:
    """A function that says whether Ctrl-C was pressed inside the block. The first Ctrl-C lets the current step finish, a second one stops
    at once. If the program handles the signal itself, or outside of the main thread, nothing is changed."""
    pressed = False

    def handler(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours:
        signal.signal(signal.SIGINT, handler)
    try:
        yield lambda: pressed
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def shown(console: Console | None, steps: int) -> Iterator[OnRecord]:
    """A function that shows each record of a run. On a terminal it draws a bar, at most 80 columns wide. Elsewhere it prints a line for the
    first record, the last one, and every 20 seconds. Needs rich."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(highlight=False) if console is None else console
    columns = (
        BarColumn(16),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=steps, rate="")
        said = -_EVERY

        def on_record(record: dict[str, Any]) -> None:
            nonlocal said
            rate = f"{record['models_per_s']:.0f} models/s"
            progress.update(task, completed=record["step"], description=f"loss {record['loss']:.4f}", rate=rate)
            now = time.monotonic()
            if not console.is_terminal and (now - said >= _EVERY or record["step"] >= steps):
                said = now
                parts = " ".join(f"{n} {record[n]:.4f}" for n in ("loss", "contrastive", "structural", "behavioral") if n in record)
                console.print(f"step {record['step']} of {steps} {parts} {rate}", soft_wrap=True)

        yield on_record
