"""What a launch costs on the host: the launcher that finds compiled kernels by a short key, beside Triton's own launch.

    PYTHONPATH=. python -m benchmarks.kernels.host_cost [--architecture cnn3] [--precision fp16] [--repeats 200]

No GPU is needed: a driver stands in whose launches do nothing, and everything in Python before it is what runs on a machine with one. So
the figures are this machine's processor, without the C code behind a launch, which is the same for both. The sides take turns call by call.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from triton.runtime.jit import JITFunction

from benchmarks.kernels.inspect import ARCHITECTURES
from benchmarks.kernels.standin import Driver, number
from wslfast.kernels.layers import Layers
from wslfast.kernels.triton import (
    convolution,
    criterion,
    head,
    input_gradients,
    joint_gradient,
    launch,
    launcher,
    network_launch,
    packing,
    weight_gradients,
)
from wslfast.kernels.triton.schedule import schedule

LAUNCHING = (convolution, criterion, head, input_gradients, joint_gradient, network_launch, packing, weight_gradients)


class _Idle(Driver):
    """A GPU that takes every launch and does nothing."""

    utils = SimpleNamespace(
        load_binary=lambda *_: (object(), object(), 0, 0, 1024),
        unload_module=lambda *_: None,
        get_device_properties=lambda device: {"max_shared_mem": 227 * 1024},
    )

    @staticmethod
    def launcher_cls(source: Any, metadata: Any) -> Callable[..., None]:
        return lambda *_: None


class _Forgetful(dict[Any, Any]):
    """Keeps nothing: every launch goes through Triton's own."""

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


@contextmanager
def idle(target: str = "sm_90") -> Iterator[dict[Any, Any]]:
    """Calls of the kernels with CPU tensors go all their way to a launch that does nothing; what the launcher keeps is handed out."""
    kept: dict[Any, Any] = {}
    capability = number(target)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(launcher, "_compiled", kept))
        stack.enter_context(mock.patch.object(launcher, "capability_of", return_value=divmod(capability, 10)))
        stack.enter_context(mock.patch.object(triton.runtime.driver, "_active", _Idle(capability)))
        yield kept


@contextmanager
def through_triton() -> Iterator[None]:
    """Inside :func:`idle`: every launch goes through ``JITFunction.run``."""
    with mock.patch.object(launcher, "_compiled", _Forgetful()):
        yield


def launches_of(call: Callable[[], Any]) -> list[Callable[[], None]]:
    """The launches that a call makes, in order, each to be made again by itself."""
    made: list[Callable[[], None]] = []

    def record(*arguments: Any, **options: Any) -> None:
        made.append(partial(launcher.launch, *arguments, **options))

    with ExitStack() as stack:
        for module in LAUNCHING:
            stack.enter_context(mock.patch.object(module, "launch", record))
        call()
    return made


@contextmanager
def counting_launches() -> Iterator[list[str]]:
    """Launches that go through Triton's own way, by the kernel's name."""
    seen: list[str] = []
    run = JITFunction.run

    def counted(self: JITFunction, *arguments: Any, **options: Any) -> Any:
        seen.append(self.fn.__name__)
        return run(self, *arguments, **options)

    with mock.patch.object(JITFunction, "run", counted):
        yield seen


def make_call(layers: Layers, shape: tuple[int, ...], precision: str, k: int = 128, n: int = 4) -> Callable[[], Any]:
    """Losses and gradients of k models, layer by layer; few queries, as torch's own allocations are on the CPU here."""
    planned = schedule(layers, shape)
    weights, queries, targets = torch.zeros(k, planned.parameters), torch.zeros(n, *shape), torch.zeros(k, n, planned.classes)
    return lambda: launch.loss_and_gradient(weights, queries, targets, layers, "mse", 2.0, precision, mode="layers")


def functions_called(call: Callable[[], Any]) -> int:
    """Functions, Python's and built-in, that run in a call."""
    events = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal events
        events += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return events


@dataclass(frozen=True)
class Cost:
    """Of one launch, the mean over those of a call: microseconds and functions called, with the short key and by Triton's own way."""

    launches: int
    short_us: float
    triton_us: float
    short_functions: float
    triton_functions: float

    def __str__(self) -> str:
        return (
            f"{self.launches} launches; a launch by the short key {self.short_us:.1f} us and {self.short_functions:.0f} functions, "
            f"by Triton's own way {self.triton_us:.1f} us and {self.triton_functions:.0f} functions: "
            f"{self.triton_us / self.short_us:.1f} times"
        )


def measure(call: Callable[[], Any], repeats: int = 200) -> Cost:
    """Inside :func:`idle`: medians of ``repeats`` turns, in each of which all launches of a call are made by either side."""
    launches = launches_of(call)

    def launch_all() -> None:
        for again in launches:
            again()

    launch_all()  # compiles, and fills the launcher's table
    sides: dict[str, tuple[Any, list[float]]] = {"short": (ExitStack, []), "triton": (through_triton, [])}
    functions = {}
    for name, (side, _) in sides.items():
        with side():
            launch_all()
            functions[name] = functions_called(launch_all) / len(launches)
    for _ in range(repeats):
        for side, times in sides.values():
            with side():
                began = time.perf_counter()
                launch_all()
                times.append(time.perf_counter() - began)
    us = {name: 1e6 * statistics.median(times) / len(launches) for name, (_, times) in sides.items()}
    return Cost(len(launches), us["short"], us["triton"], functions["short"], functions["triton"])


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels.host_cost", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--architecture", choices=sorted(ARCHITECTURES), default="cnn3")
    parser.add_argument("--precision", default="fp16")
    parser.add_argument("--repeats", type=int, default=200)
    options = parser.parse_args()
    if triton.knobs.runtime.interpret:
        print("host_cost launches compiled kernels; unset TRITON_INTERPRET", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    call = make_call(*ARCHITECTURES[options.architecture], options.precision)
    with idle():
        print(f"{options.architecture} {options.precision}: {measure(call, options.repeats)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
