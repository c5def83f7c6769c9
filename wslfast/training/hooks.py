"""Where a run's figures go besides its own files: a hook of three methods, and the one that comes with us, TensorBoard's.

Anything with these methods is a hook (docs/logging.md has Weights & Biases and MLflow in ten lines each). A hook that fails never
stops a run: its error is a warning, said once.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, Union

import numpy as np

from ..errors import WslfastError, describe, require, say_once

METHODS = ("scalars", "table", "picture")


class LogHook(Protocol):
    """What a run and an evaluation tell about themselves."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Figures by name after ``step`` optimiser steps: loss and its parts, learning rate, models a second."""

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table: the phases of a step, the figures of an evaluation."""

    def picture(self, name: str, png: bytes) -> None:
        """A picture of a page, as the bytes of a PNG file."""


LogTo = Union[Literal["tensorboard"], LogHook, None]


def hook_of(log_to: LogTo, folder: Path, step: int = 0) -> LogHook | None:
    """The hook that is asked for, made safe; None for none.

    Args:
        log_to: ``"tensorboard"``, or an object with the three methods of :class:`LogHook`.
        folder: TensorBoard's files go into ``folder/tensorboard``.
        step: where a resumed run goes on; later figures that are there are hidden.

    Raises:
        WslfastError: anything else, or TensorBoard is not installed.
    """
    if log_to is None:
        return None
    if isinstance(log_to, str):
        require(log_to == "tensorboard", f"log_to: expected 'tensorboard' or an object with {', '.join(METHODS)}, got {log_to!r}")
        return _Safe(TensorBoard(folder / "tensorboard", step))
    missing = [name for name in METHODS if not callable(getattr(log_to, name, None))]
    require(not missing, f"log_to: expected 'tensorboard' or an object with {', '.join(METHODS)}; {describe(log_to)} lacks {missing}")
    return log_to if isinstance(log_to, _Safe) else _Safe(log_to)


class TensorBoard:
    """Writes TensorBoard's event files: scalars, tables as text, pictures as images.

    Args:
        folder: ``tensorboard --logdir`` of it, or of a folder above, shows them.
        step: of a run that is resumed.

    Raises:
        WslfastError: tensorboard is not installed, or the folder cannot be written.
    """

    def __init__(self, folder: str | Path, step: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise WslfastError(f"log_to tensorboard needs tensorboard: pip install 'wslfast[tensorboard]' ({error})") from error
        try:
            self._writer: Any = SummaryWriter(str(folder), purge_step=step + 1 if step else None)  # type: ignore[no-untyped-call]
        except OSError as error:
            raise WslfastError(f"{folder}: cannot be written: {error.strerror or error}") from error

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        lines = [" | ".join(map(_cell, row)) for row in (columns, *rows)]
        lines.insert(1, " | ".join("---" for _ in columns))
        self._writer.add_text(name, "\n".join(f"| {line} |" for line in lines))
        self._writer.flush()

    def picture(self, name: str, png: bytes) -> None:
        from PIL import Image

        pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
        self._writer.add_image(name, pixels, dataformats="HWC")
        self._writer.flush()


class _Safe:
    """A hook whose errors are said and cost nothing else: a service that is away must not end a night of training."""

    def __init__(self, hook: LogHook) -> None:
        self.hook = hook

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._tell("scalars", step, values)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        self._tell("table", name, columns, rows)

    def picture(self, name: str, png: bytes) -> None:
        self._tell("picture", name, png)

    def _tell(self, method: str, *arguments: Any) -> None:
        try:
            getattr(self.hook, method)(*arguments)
        except Exception as error:
            say_once(f"wslfast: log_to: {type(self.hook).__name__}.{method} failed, and what it was told is not logged: {error!r:.300}")


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.split()).replace("|", "\\|")
