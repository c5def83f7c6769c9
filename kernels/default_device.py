"""The CPU for what a function makes without saying where, whatever torch's default device is; and numbers in it, whatever mode torch is in.

Populations, layouts and zoos are on the CPU until somebody moves them. With ``torch.set_default_device("cuda")`` a part of what makes them
would be elsewhere.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

__all__ = ["on_the_cpu", "with_numbers"]

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


def with_numbers(function: Callable[Arguments, Answer]) -> Callable[Arguments, Answer]:
    """The function, in which tensors hold numbers: ``torch.compile`` looks at shapes alone, and what is kept from there would have none."""

    @functools.wraps(function)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Answer:
        with unset_fake_temporarily():
            return function(*args, **kwargs)

    return run
