"""Which path serves a call: a pure function of architecture, device and dtype, and of what is installed."""

from __future__ import annotations

import importlib.util
import logging
from functools import lru_cache

import torch

from ..architecture import Architecture
from ..errors import WslfastError, say_once
from ..kernels.cpu import engine as cpu
from ..kernels.layers import Conv2d, Unplannable
from ..kernels.triton.schedule import schedule
from . import triton_path
from .module_path import Module
from .paths import Cpu, Loop, Path, Stacked
from .triton_path import Triton

BACKENDS = ("auto", "triton", "torch")
# The kernels are proved in the interpreter and by compiling them; until `make gpu` has been green on a device, only an explicit
# backend="triton" runs them.
TRITON_BY_DEFAULT = False


def choose(architecture: Architecture, device: str, dtype: torch.dtype, backend: str = "auto", autocast: bool = False) -> Path:
    """The path for a call. Raises WslfastError if ``backend="triton"`` cannot be had."""
    if backend == "triton" or (backend == "auto" and device == "cuda"):
        reason = _why_not_triton(architecture, device, dtype)
        if reason is None and backend == "auto" and not TRITON_BY_DEFAULT:
            reason = "the kernels have not been verified on a GPU yet (backend='triton' runs them)"
        if reason is None:
            return Triton(architecture, "kernels, all models in one launch")
        if backend == "triton":
            raise WslfastError(f"backend='triton' cannot run this: {reason}")
        level = logging.INFO if _why_no_kernels(architecture) is None else logging.WARNING
        say_once(f"wslfast: no Triton kernels for architecture {architecture.name!r}: {reason}; using torch", level)
    if architecture.graph is None:
        return Module(architecture, f"run as a module, with each model's weights in place of its own, as {architecture.reason}")
    convolved = any(isinstance(layer, Conv2d) for layer in architecture.layers)
    if device != "cpu" or not architecture.planned or (backend == "auto" and dtype == torch.float32 and not convolved):
        return Stacked(architecture, "many models in one torch call an operation")
    if backend == "auto" and dtype == torch.float32 and _cpu_plans(architecture):
        return Cpu(architecture, "hand-written forward and backward, no graph over models")
    return Loop(architecture, "one model after another, channels-last" if not autocast else "one model after another, under autocast")


@lru_cache(maxsize=64)
def _cpu_plans(architecture: Architecture) -> bool:
    sizes = (architecture.num_weights,), architecture.input_shape
    weights, query = (torch.zeros(1, *size, dtype=torch.float32, device="cpu") for size in sizes)
    return cpu.supports(weights, query, architecture.layers)


def _why_not_triton(architecture: Architecture, device: str, dtype: torch.dtype) -> str | None:
    """None if the kernels can run it, else the reason."""
    if device != "cuda":
        return f"tensors are on {device}, kernels need cuda"
    if dtype == torch.float64:
        return "kernels have no float64"
    if not architecture.planned:
        return f"architecture {architecture.name!r} is not a plain chain of layers"
    if (reason := _why_no_kernels(architecture)) is not None:
        return reason
    try:
        schedule(architecture.layers, architecture.input_shape)
    except Unplannable as error:
        return str(error)
    return None


def _why_no_kernels(architecture: Architecture) -> str | None:
    """None if this machine can build them, else the reason: what a user may want to mend, and is warned of."""
    missing = importlib.util.find_spec("triton") is None
    return "triton is not installed" if missing else triton_path.unbuildable.get(architecture)
