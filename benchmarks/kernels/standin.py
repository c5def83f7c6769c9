"""A stand-in for a GPU that is not there: calls of the kernels go all their way but the last step.

Inside :func:`standing_in` a call of ``launch.forward`` or ``launch.loss_and_gradient`` with CPU tensors binds its arguments, compiles its
kernels for the GPU that was named, and launches nothing. So what is compiled, inspected and counted is what a call takes, not a list
beside it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from wslfast.kernels.triton import launcher
from wslfast.kernels.triton.stages import Schedule

ROLES = ("forward", "dx", "dw", "joint", "tail", "network_forward", "network_loss", "layout")


@dataclass(frozen=True)
class Launch:
    """One launch of a call: the kernel's name among those of its network, its role, what it was compiled to and whether just now."""

    name: str
    role: str
    compiled: Any
    new: bool


class Driver:
    """What Triton's launch path asks of a GPU."""

    launcher_cls = None

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability  # kernels are kept a device: one for each kind of GPU

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class _Idle:
    """A kernel that nobody wanted compiled."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *_: None


def named(kernel: str, constants: dict[str, Any], schedule: Schedule) -> tuple[str, str]:
    """(name, role) of a launch: ``forward 0 indexed``, ``dw 1``, ``head mse``, ``fold``."""
    kind = kernel.removesuffix("_kernel")
    if kind in ("criterion", "head"):
        return f"{kind} {constants['CRITERION']}", "tail"
    if kind in ("network_forward", "network_loss"):
        return kind + _way(constants) + (f" {constants['CRITERION']}" if kind == "network_loss" else ""), kind
    if kind == "joint":
        return f"joint {schedule.stages.index(constants['s'])}{_way(constants)}", kind
    if kind in ("forward", "dw", "dx"):
        alone = " alone" if constants.get("GRAD") is False else ""
        first = _way(constants) if constants["s"].INPUT else ""
        return f"{kind} {schedule.stages.index(constants['s'])}{first}{alone}", kind
    return kind, "layout"


def _way(constants: dict[str, Any]) -> str:
    """How a kernel that reads the images finds them."""
    return " indexed" if constants["INDEXED"] else "" if constants["SHARED"] else " own"


def number(target: str) -> int:
    """``sm_90`` -> 90."""
    found = re.fullmatch(r"sm_(\d+)", target)
    if found is None:
        raise ValueError(f"expected a target such as sm_90, got {target!r}")
    return int(found[1])


@contextmanager
def standing_in(
    target: str, schedule: Schedule, record: Callable[[Launch], None], wanted: Callable[[str, str], bool] = lambda name, role: True
) -> Iterator[None]:
    """Calls of the kernels on one network compile for ``target`` and hand every launch to ``record``.

    Args:
        target: ``sm_90`` and the like.
        schedule: of the network; it gives launches their names.
        wanted: which kernels to compile, by name and role; the others are passed over.
    """
    driver, run = Driver(number(target)), JITFunction.run
    names: dict[int, tuple[str, str]] = {}

    def bind(self: JITFunction, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        constants = {p.name: options[p.name] for p in self.params if p.is_constexpr and p.name in options}
        name, role = named(self.fn.__name__, constants, schedule)
        if not wanted(name, role):
            return _Idle()
        before = _variants(self)
        compiled = run(self, *arguments, grid=grid, warmup=True, **options)
        names[id(compiled)] = name, role
        record(Launch(name, role, compiled, _variants(self) > before))
        return compiled

    def again(self: CompiledKernel, grid: Any) -> Callable[..., None]:
        return lambda *_: record(Launch(*names[id(self)], self, False))

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(JITFunction, "run", bind))
        stack.enter_context(mock.patch.object(CompiledKernel, "__getitem__", again))
        stack.enter_context(mock.patch.object(launcher, "_compiled", {}))
        stack.enter_context(mock.patch.object(launcher, "capability_of", return_value=divmod(driver.capability, 10)))
        stack.enter_context(mock.patch.object(triton.runtime.driver, "_active", driver))  # there may be none to go back to
        yield


def _variants(kernel: JITFunction) -> int:
    return sum(len(cache[0]) for cache in kernel.device_caches.values())
