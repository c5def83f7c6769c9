"""Which path serves a call: a pure function of architecture, device, dtype, form and size, of what is installed and of this machine's
verdicts."""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass
from functools import lru_cache

import torch

from ..architecture import Architecture
from ..errors import WslfastError, say_once
from ..kernels.cpu import engine as cpu
from ..kernels.layers import Conv2d, Unplannable
from ..kernels.stacked import folded_chain
from ..kernels.triton import budget, devices
from ..kernels.triton.folding import chain
from ..kernels.triton.schedule import schedule
from . import triton_path, verdicts
from .module_path import Module
from .paths import Cpu, Loop, Path, Stacked
from .precision import kernel_precision
from .triton_path import Triton

BACKENDS = ("auto", "triton", "torch")


@dataclass(frozen=True)
class Call:
    """What of a call decides its path besides the network: the form (``verdicts.FORMS``), the size, the GPU's number."""

    form: str = "loss"
    k: int | None = None
    n: int | None = None
    gpu: int | None = None


_ANY = Call()


def choose(
    architecture: Architecture, device: str, dtype: torch.dtype, backend: str = "auto", autocast: bool = False, call: Call = _ANY
) -> Path:
    """The path for a call. Raises WslfastError if ``backend="triton"`` cannot be had. With ``backend="auto"`` on a GPU, the kernels are
    taken where this machine has proved them right and faster (verdicts.py)."""
    if backend == "triton" or (backend == "auto" and device == "cuda"):
        reason = why_not_triton(architecture, device, dtype, call.gpu, call.n)
        decision = None
        if reason is None and backend == "auto":
            decision = verdicts.decide(architecture, kernel_precision(), call.form, call.k, call.n, call.gpu)
            reason = None if decision.on else decision.reason
        if reason is None:
            if decision is None:
                return Triton(architecture, "kernels, all models in one launch")
            return Triton(architecture, decision.reason, decision.choice)
        if backend == "triton":
            raise WslfastError(f"backend='triton' cannot run this: {reason}")
        unseen = decision is not None and not decision.proved
        level = logging.WARNING if unseen or _why_no_kernels(architecture) is not None else logging.INFO
        say_once(f"wslfast: no Triton kernels for architecture {architecture.name!r}: {reason}; using torch", level)
    if architecture.graph is None:
        return Module(architecture, f"run as a module, with each model's weights in place of its own, as {architecture.reason}")
    convolved = any(isinstance(layer, Conv2d) for layer in architecture.layers)
    if device == "cpu" and backend == "auto" and dtype == torch.float32 and _folds(architecture):
        return Cpu(architecture, "norms folded into weights, hand-written forward and backward, no graph over models")
    if device != "cpu" or not architecture.planned or (backend == "auto" and dtype == torch.float32 and not convolved):
        return Stacked(architecture, "many models in one torch call per operation")
    if backend == "auto" and dtype == torch.float32 and _cpu_plans(architecture):
        return Cpu(architecture, "hand-written forward and backward, no graph over models")
    return Loop(architecture, "one model after another, channels-last" if not autocast else "one model after another, under autocast")


def _folds(architecture: Architecture) -> bool:
    """Whether the CPU engine runs it once its norms are folded in."""
    return not architecture.planned and architecture.graph is not None and folded_chain.supports(architecture.graph)


@lru_cache(maxsize=64)
def _cpu_plans(architecture: Architecture) -> bool:
    sizes = (architecture.num_weights,), architecture.input_shape
    weights, query = (torch.zeros(1, *size, dtype=torch.float32, device="cpu") for size in sizes)
    return cpu.supports(weights, query, architecture.layers)


def why_not_triton(architecture: Architecture, device: str, dtype: torch.dtype, gpu: int | None = None, n: int | None = None) -> str | None:
    """None if the kernels can run it, on so many queries where that is said, else the reason."""
    if device != "cuda":
        return f"tensors are on {device}, kernels need cuda"
    if dtype == torch.float64:
        return "kernels have no float64"
    if architecture.graph is None:
        return f"architecture {architecture.name!r} is not a plain chain of layers, but a module that cannot be traced"
    if (reason := _why_no_kernels(architecture)) is not None:
        return reason
    try:
        chain(architecture.graph)
    except Unplannable as error:
        return str(error)
    return _refused(gpu) if n is None else _too_many(architecture, n) or _refused(gpu)


@lru_cache(maxsize=256)
def _too_many(architecture: Architecture, n: int) -> str | None:
    assert architecture.graph is not None
    return budget.too_many(schedule(chain(architecture.graph).layers, architecture.input_shape), n)


def _refused(gpu: int | None) -> str | None:
    """None if the kernels are for this GPU, else the reason; a machine without one is asked for the paths that it would take."""
    if not torch.cuda.is_available():
        return None
    return _refusal(torch.cuda.current_device() if gpu is None else gpu)


@lru_cache(maxsize=64)
def _refusal(gpu: int) -> str | None:
    rocm = getattr(torch.version, "hip", None) is not None
    return devices.refusal(torch.cuda.get_device_name(gpu), torch.cuda.get_device_capability(gpu), rocm)


def _why_no_kernels(architecture: Architecture) -> str | None:
    """None if this machine can build them, else the reason: what a user may want to mend, and is warned of."""
    missing = importlib.util.find_spec("triton") is None
    return "triton is not installed" if missing else triton_path.unbuildable.get(architecture)
