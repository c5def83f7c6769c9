"""The one error class and the one way to say something once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch

logger = logging.getLogger("wslfast")
_said: set[str] = set()
T = TypeVar("T")


class WslfastError(ValueError):
    """Raised for every wrong input; the message says what was expected and what came."""


def require(condition: bool, message: str | Callable[[], str]) -> None:
    """Raise :class:`WslfastError` unless ``condition`` holds. A message that is a function is put together only then, which a
    compiler needs where it names sizes."""
    if not condition:
        raise WslfastError(message if isinstance(message, str) else message())


def present(value: T | None, message: str) -> T:
    """``value``, which is not None. Raises :class:`WslfastError` with ``message`` if it is."""
    if value is None:
        raise WslfastError(message)
    return value


def say_once(message: str, level: int = logging.WARNING) -> None:
    """Log ``message`` the first time it is said in this process."""
    if message not in _said:
        _said.add(message)
        logger.log(level, message)


def describe(value: Any) -> str:
    """What came, in a few words: a tensor's shape, dtype and device, else the type."""
    if isinstance(value, torch.Tensor) and value.is_nested:
        return "a nested tensor"
    if isinstance(value, torch.Tensor):
        return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')} on {value.device}"
    return type(value).__name__ if not isinstance(value, (str, int, float, bool, type(None))) else repr(value)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 300 characters; of an error without a message, its class's name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def check_device(device: torch.device | str) -> torch.device:
    """The device, if it is the CPU or a CUDA device of this machine. Raises WslfastError otherwise."""
    try:
        checked = torch.device(device)
    except (RuntimeError, TypeError):
        raise WslfastError(f"device: expected cpu, cuda or cuda:N, got {device!r}") from None
    require(checked.type in ("cpu", "cuda"), f"device: expected cpu, cuda or cuda:N, got {device!r}")
    available = checked.type == "cpu" or (torch.cuda.is_available() and (checked.index or 0) < torch.cuda.device_count())
    require(available, f"device: {device!r} was asked for, and this machine does not have it")
    return checked


def check_positive(name: str, value: Any) -> None:
    """Raise :class:`WslfastError` with the argument's name unless ``value`` is a positive integer."""
    whole = isinstance(value, int) and not isinstance(value, bool) and value > 0
    require(whole, f"{name}: expected a positive integer, got {value!r:.40}")


def check_seed(seed: Any) -> int:
    """The seed, if torch's and numpy's generators take it. Raises WslfastError otherwise."""
    require(type(seed) is int and 0 <= seed < 1 << 63, f"seed: expected an integer from 0 to 2^63 - 1, got {seed!r}")
    return int(seed)
