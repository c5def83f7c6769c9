"""Compile every kernel configuration for a GPU that is not there and print what it takes.

    python -m benchmarks.kernels.inspect [--target sm_80|sm_90|...] [--precision fp16 ...] [--json]

One row a kernel, stage and precision: registers a thread, bytes of stack (spills), shared memory, matrix products in the
source and which tensor-core instruction they became. The stages are those of CNN3, CNN and LeNet-5; what is compiled is what calls of
the kernels compile on such a GPU (standin.py). Needs Triton, whose wheel holds the assembler; no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton

from wslfast.kernels.layers import Activation, Conv2d, Dropout, Flatten, Layers, Linear, Pool2d, Unplannable
from wslfast.kernels.triton import launch
from wslfast.kernels.triton.configurations import CHOICES, tuned
from wslfast.kernels.triton.head import MOST_QUERIES, fits
from wslfast.kernels.triton.query_gradient import gradients, layers_on_queries
from wslfast.kernels.triton.schedule import PRECISIONS
from wslfast.kernels.triton.schedule import schedule as schedule_of
from wslfast.kernels.triton.stages import Schedule

from .standin import ROLES, Launch, standing_in

TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
FIELDS = (
    "kernel", "role", "architecture", "precision", "target",
    "registers", "spill_bytes", "shared_bytes", "dots", "mma", "seconds",
)  # fmt: skip
# What the gradient to the queries adds (query_gradient.py), by its name in the network behind the identity: copying the queries, reading
# them each model's own, and the gradient itself. The other kernels are the network's.
TO_QUERIES = {"forward 0": "queries", "forward 1": "forward 0 of queries", "dw 1": "dw 0 of queries", "dx 1": "dx 0 to queries"}
# PTX's instructions for tensor cores and what each becomes in machine code: Hopper's, Blackwell's (data centre), everybody's
MMA = {"wgmma.mma_async": "HGMMA", "tcgen05.mma": "UTCHMMA", "mma.sync": "HMMA"}


def _name(i: int) -> str:
    return f"module_list.{i}"


def _conv(i: int, channels: int, out: int, kernel: int) -> Conv2d:
    return Conv2d(_name(i), channels, out, (kernel, kernel))


ARCHITECTURES: dict[str, tuple[Layers, tuple[int, ...]]] = {
    "cnn3": (
        (
            _conv(0, 3, 16, 3), Pool2d(_name(1)), Activation(_name(2)), Dropout(_name(3)),
            _conv(4, 16, 32, 3), Pool2d(_name(5)), Activation(_name(6)), Dropout(_name(7)),
            _conv(8, 32, 15, 3), Pool2d(_name(9)), Activation(_name(10)), Dropout(_name(11)),
            Flatten(_name(12)), Linear(_name(13), 60, 20), Activation(_name(14)), Dropout(_name(15)),
            Linear(_name(16), 20, 10),
        ),
        (3, 32, 32),
    ),
    "cnn": (
        (
            _conv(0, 1, 8, 5), Pool2d(_name(1)), Activation(_name(2)),
            _conv(3, 8, 6, 5), Pool2d(_name(4)), Activation(_name(5)),
            _conv(6, 6, 4, 2), Activation(_name(7)), Flatten(_name(8)),
            Linear(_name(9), 36, 20), Activation(_name(10)), Linear(_name(11), 20, 10),
        ),
        (1, 28, 28),
    ),
    "lenet5": (
        (
            _conv(0, 3, 6, 5), Activation(_name(1)), Pool2d(_name(2)), Dropout(_name(3)),
            _conv(4, 6, 16, 5), Activation(_name(5)), Pool2d(_name(6)), Dropout(_name(7)), Flatten(_name(8)),
            Linear(_name(9), 400, 120), Activation(_name(10)), Dropout(_name(11)),
            Linear(_name(12), 120, 84), Activation(_name(13)), Dropout(_name(14)), Linear(_name(15), 84, 10),
        ),
        (3, 32, 32),
    ),
}  # fmt: skip


def _tool(name: str) -> str:
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return str(bundled) if bundled.exists() else name


def disassemble(cubin: bytes, *flags: str) -> str:
    """What cuobjdump says of a compiled kernel: its machine code (``-sass``), its resources (``-res-usage``), or both."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return subprocess.run([_tool("cuobjdump"), *flags, str(path)], capture_output=True, text=True, check=True).stdout


def make_calls(layers: Layers, shape: tuple[int, ...], schedule: Schedule, precision: str) -> Iterator[Callable[[], object]]:
    """Calls that between them launch every kernel of a network: outputs, losses and gradients, layer by layer and as a whole, the
    head in one launch and not, two gradients in one and not, shared queries and rows of a pool."""
    weights, queries = torch.zeros(1, schedule.parameters), torch.zeros(2, *shape)
    targets, index = torch.zeros(1, 2, schedule.classes), torch.zeros(1, 2, dtype=torch.long)

    def loss(criterion: str, queries: torch.Tensor, targets: torch.Tensor, **options: Any) -> Callable[[], object]:
        return lambda: launch.loss_and_gradient(weights, queries, targets, layers, criterion, 2.0, precision, **options)

    def joint(call: Callable[[], object]) -> Callable[[], object]:
        def run() -> None:
            with tuned(CHOICES["joint"]):
                call()

        return run

    many = MOST_QUERIES + 1 if fits(schedule, 1) else 2
    for criterion in ("mse", "softmax_mse", "distillation"):
        yield loss(criterion, queries, targets, mode="layers")
        yield loss(criterion, torch.zeros(many, *shape), torch.zeros(1, many, schedule.classes), mode="layers")
    yield loss("mse", queries, targets, mode="layers", index=index)
    yield joint(loss("mse", queries, targets, mode="layers"))
    yield joint(loss("mse", queries, targets, mode="layers", index=index))
    yield lambda: launch.forward(weights, queries, layers, precision, mode="layers")
    yield lambda: launch.forward(weights, queries, layers, precision, mode="network")
    yield loss("mse", queries, targets, mode="network")


def rows(target: str, precisions: tuple[str, ...], architectures: tuple[str, ...], roles: tuple[str, ...] = ()) -> Iterator[dict[str, Any]]:
    """One row a kernel, see FIELDS; of some roles, or of all."""
    return (row for row, _ in listings(target, precisions, architectures, roles, code=False))


def listings(
    target: str,
    precisions: tuple[str, ...],
    architectures: tuple[str, ...],
    roles: tuple[str, ...] = (),
    wanted: Callable[[str], bool] = lambda name: True,
    code: bool = True,
) -> Iterator[tuple[dict[str, Any], str]]:
    """The same with the kernel's machine code, empty for one without matrix products or without ``code``; ``wanted`` picks kernels by
    name."""
    for architecture in architectures:
        layers, shape = ARCHITECTURES[architecture]
        schedule = schedule_of(layers, shape)
        for precision in precisions:
            seen = _Seen()
            for call in make_calls(layers, shape, schedule, precision):
                seen.began = time.perf_counter()
                with (
                    contextlib.suppress(Unplannable),
                    standing_in(target, schedule, seen, lambda name, role: (not roles or role in roles) and wanted(name)),
                ):
                    call()
                for seconds, launched in seen.new():
                    yield _row(launched, architecture, precision, target, seconds, code)

            def added(name: str, role: str) -> bool:
                return name in TO_QUERIES and (not roles or role in roles) and wanted(TO_QUERIES[name])

            behind = schedule_of(layers_on_queries(layers, shape), shape)
            seen.began = time.perf_counter()
            with standing_in(target, behind, seen.to_queries, added):
                gradients(
                    torch.zeros(1, schedule.parameters), torch.zeros(2, *shape), torch.zeros(1, 2, schedule.classes), layers, precision
                )
            for seconds, launched in seen.new():
                yield _row(launched, architecture, precision, target, seconds, code)


class _Seen:
    """The kernels of one network and precision as they are first launched, and the seconds that each took to compile."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.waiting: list[tuple[float, Launch]] = []
        self.began = time.perf_counter()

    def __call__(self, launched: Launch) -> None:
        if launched.name not in self.names:
            self.names.add(launched.name)
            self.waiting.append((time.perf_counter() - self.began, launched))
        self.began = time.perf_counter()

    def to_queries(self, launched: Launch) -> None:
        """The same for kernels of a network behind the identity whose gradient is the queries'."""
        self(replace(launched, name=TO_QUERIES[launched.name]))

    def new(self) -> list[tuple[float, Launch]]:
        """Those since the last time."""
        found, self.waiting = self.waiting, []
        return found


def _row(launched: Launch, architecture: str, precision: str, target: str, seconds: float, code: bool) -> tuple[dict[str, Any], str]:
    compiled = launched.compiled
    dots = len(re.findall(r"\btt\.dot\b", compiled.asm["ttir"]))
    said = disassemble(compiled.asm["cubin"], "-res-usage", *(["-sass"] if dots and code else []))
    numbers = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert numbers is not None, said
    sass = said if dots and code else ""
    mma = next((became for op, became in MMA.items() if f"{op}." in compiled.asm["ptx"]), None)
    assert mma is None or not sass or re.search(rf"\b{mma}\b", sass), f"{launched.name}: no {mma} in its machine code"
    values = (
        launched.name,
        launched.role,
        architecture,
        precision,
        target,
        int(numbers[1]),
        int(numbers[2]),
        compiled.metadata.shared,
        dots,
        mma,
        round(seconds, 2),
    )
    return dict(zip(FIELDS, values, strict=True)), sass


def table(listed: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = ["| " + " | ".join(FIELDS) + " |", "|" + " --- |" * len(FIELDS)]
    return "\n".join([*lines, *("| " + " | ".join(str(row[f]) for f in FIELDS) + " |" for row in listed)])


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels.inspect", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--target", choices=TARGETS, default="sm_90")
    parser.add_argument("--precision", choices=PRECISIONS, nargs="+", default=["fp16", "tf32"])
    parser.add_argument("--architecture", choices=sorted(ARCHITECTURES), nargs="+", default=list(ARCHITECTURES))
    parser.add_argument("--role", choices=ROLES, nargs="+", default=[])
    parser.add_argument("--kernel", nargs="+", default=[], help="by name, as it is printed (default: all)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        print("inspect compiles; unset TRITON_INTERPRET", file=sys.stderr)
        return 2
    listed = []
    asked = options.target, tuple(options.precision), tuple(options.architecture), tuple(options.role)
    for row, _ in listings(*asked, wanted=lambda name: not options.kernel or name in options.kernel, code=False):
        listed.append(row)
        if options.json:
            print(json.dumps(row), flush=True)
    if not options.json:
        print(table(listed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
