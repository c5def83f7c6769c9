"""The CPU for what a function makes without saying where, whatever torch's default device is.

Populations, layouts and zoos are on the CPU until somebody moves them. With ``torch.set_default_device("cuda")`` a part of what makes them
would be elsewhere.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

__all__ = ["on_the_cpu"]

Arguments = ParamSpec("Arguments")
Answer = TypeVar("Answer")


def on_the_cpu(function: Callable[Arguments, Answer]) -> Callable[Arguments, Answer]:
    """The function, in which the CPU is torch's default device."""

    @functools.wraps(function)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Answer:
        if torch.get_default_device().type == "cpu":  # a device that is set costs every call of torch
            return function(*args, **kwargs)
        with torch.device("cpu"):
            return function(*args, **kwargs)

    return run
