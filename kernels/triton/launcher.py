"""Launching a kernel with little work on the host.

Triton's own launch looks a kernel up by the value of every constant, and a stage has thirty: twice the time on the host of what is here
(benchmarks/kernels/host_cost.py), twelve times a call, which is what a small call costs on a GPU. Here the compiled kernel is found again
by a short key and handed its arguments. The key holds all that Triton specialises on (types, alignment, ones and multiples of 16), whether
or not a kernel asks for it, so that a compiled kernel never meets an argument it was not made for. Twin: ``kernel[(programs,)](...)``,
which also serves the first call and the interpreter.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .configurations import launch_options

_compiled: dict[tuple[Any, ...], Any] = {}
_MOST = 4096  # kinds of launches: more means that something in the keys never repeats
_INT32 = 2**31


@lru_cache(maxsize=64)
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def capability_of(device: torch.device) -> tuple[int, int]:
    """Compute capability of a GPU; the interpreter stands for an H100."""
    if device.type != "cuda":
        return 9, 0
    return _capability(torch.cuda.current_device() if device.index is None else device.index)


def _kind(argument: Any) -> Any:
    """What of an argument a compiled kernel may depend on."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, float):
        return "fp32"
    return (argument == 1) + 2 * (argument % 16 == 0) + 4 * (not -_INT32 <= argument < _INT32)


def launch(kernel: Any, programs: int, *arguments: Any, warps: int = 4, registers: int = 0, **constants: Any) -> None:
    """Launch ``programs`` programs of a Triton kernel on the device of its first argument, which has to be the current one.

    Args:
        kernel: a ``triton.jit`` function.
        arguments: tensors, whole numbers and floats, in the order of its signature.
        warps, registers: see ``configurations.launch_options``.
        constants: the ``constexpr`` arguments, which come last, in the order of its signature.
    """
    values = tuple(constants.values())
    key = (kernel, arguments[0].device, warps, registers, values, tuple(map(_kind, arguments)))
    ready = _compiled.get(key)
    if ready is not None:
        ready[programs, 1, 1](*arguments, *values)
        return
    made = kernel[(programs,)](*arguments, **constants, **launch_options(warps, registers))
    if made is not None:  # the interpreter gives none
        if len(_compiled) >= _MOST:
            _compiled.clear()
        _compiled[key] = made
