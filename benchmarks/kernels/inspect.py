"""Compile every kernel configuration for a GPU that is not there and print what it takes.

    python -m benchmarks.kernels.inspect [--target sm_80|sm_90|...] [--precision fp16 ...] [--json]

One row a kernel, stage and precision: registers a thread, bytes of stack (spills), shared memory, matrix products in the
source and which tensor-core instruction they became. The stages are those of CNN3, CNN and LeNet-5, the specialisations
(strides of 1, offsets divisible by 16) those of a real launch. Needs Triton, whose wheel holds the assembler; no GPU.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from wslfast.kernels.layers import Activation, Conv2d, Dropout, Flatten, Layers, Linear, Pool2d, Unplannable
from wslfast.kernels.triton.convolution import dw_kernel, dx_kernel, forward_kernel
from wslfast.kernels.triton.criterion import criterion_kernel, query_block
from wslfast.kernels.triton.head import fits, head_kernel
from wslfast.kernels.triton.network import network_forward_kernel, network_loss_kernel, reduce_kernel
from wslfast.kernels.triton.network_layout import network
from wslfast.kernels.triton.packing import fold_kernel, pack_kernel, prepare_kernel, stack_kernel
from wslfast.kernels.triton.schedule import PRECISIONS, configuration, launch_options
from wslfast.kernels.triton.schedule import schedule as schedule_of
from wslfast.kernels.triton.stages import Schedule, Stage, power_of_two
from wslfast.kernels.triton.tables import most_places

TARGETS = ("sm_80", "sm_90")  # what the tests hold
KNOWN = ("sm_80", "sm_86", "sm_89", "sm_90")  # newer ones have another matrix instruction, which nobody looks for here
FIELDS = (
    "kernel", "role", "architecture", "precision", "target",
    "registers", "spill_bytes", "shared_bytes", "dots", "mma", "seconds",
)  # fmt: skip
ROLES = ("forward", "dx", "dw", "tail", "network_forward", "network_loss", "layout")
POINTERS = {"fp16": "*fp16", "bf16": "*bf16"}
# Arguments whose value says nothing about alignment: the launchers do not specialise on them.
PLAIN = {
    "n", "tiles", "programs", "count", "rows_per_split", "bias_stride", "packed", "channels", "parameters", "most",
    "first", "units", "walks", "parts", "queries_per_part", "k_stride",
}  # fmt: skip


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


def disassemble(cubin: bytes, flag: str) -> str:
    """What cuobjdump says of a compiled kernel: its machine code (``-sass``) or its resources (``-res-usage``)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return subprocess.run([_tool("cuobjdump"), flag, str(path)], capture_output=True, text=True, check=True).stdout


def compile_kernel(kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int, target: str) -> Any:
    """Compile for ``target`` as a launch with aligned tensors would. ``types``: of the arguments that are not constants
    and not integers."""
    names = kernel.arg_names
    types = {n: kind for n, kind in types.items() if n in names}
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n in names if n not in constants and n not in PLAIN}
    for n in types:
        if types[n] == "fp32":
            aligned.pop((names.index(n),), None)
    source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in constants.items()}, aligned)
    return triton.compile(source, target=GPUTarget("cuda", int(target[3:]), 32), options=launch_options(warps))


def _kernels(
    stages: tuple[Stage, ...], packed_places: int, precision: str, hopper: bool, fused: bool
) -> Iterator[tuple[str, str, Any, dict[str, str], dict[str, Any], int]]:
    """(kernel's name, role, kernel, types, constants, warps) of every launch for a network."""
    data = POINTERS.get(precision, "*fp32")
    tables = dict.fromkeys(("places", "steps", "counts", "table"), "*i32")
    plain = dict.fromkeys(("partials", "gain", "losses", "outputs", "targets", "queries", "weights", "bias", "part"), "*fp32")
    first, last = stages[0], stages[-1]
    layout = {"B": 1024, "PREC": precision}
    yield "pack", "layout", pack_kernel, {**plain, **tables, "out": data}, {**layout, "step": 1}, 4
    shape = {"H": first.H, "W": first.W, "C": first.C, "x_stride": 1}
    yield "stack", "layout", stack_kernel, {**plain, "out": data}, {**layout, **shape}, 4
    for i, stage in enumerate(stages):
        types = {**plain, **dict.fromkeys(("x", "index", "w", "y", "slope", "g", "xg", "below_slope"), data), "code": "*i8"}
        if stage.LAST:
            types["y"] = "*fp32"
        forward, dw, dx = (configuration(role, stage, precision, hopper) for role in ("forward", "dw", "dx"))
        ways = {"": {"SHARED": i == 0, "INDEXED": False}}
        if i == 0:
            ways = {**ways, " indexed": {"SHARED": False, "INDEXED": True}}
        for way, sharing in ways.items():
            own = {**types, "index": "*i64"} if way else types
            constants = {"s": stage, "c": forward, "bias_step": 1, **sharing}
            yield f"forward {i}{way}", "forward", forward_kernel, own, {**constants, "GRAD": True}, forward.WARPS
            yield f"dw {i}{way}", "dw", dw_kernel, {**own, "y": data}, {"s": stage, "c": dw, **sharing}, dw.WARPS
        yield f"forward {i} alone", "forward", forward_kernel, types, {**constants, **ways[""], "GRAD": False}, forward.WARPS
        if i:
            yield f"dx {i}", "dx", dx_kernel, types, {"s": stage, "c": dx, "below": stages[i - 1]}, dx.WARPS
    types = {**plain, "slope": data, "g": data, "temperature": "fp32", "loss_scale": "fp32"}
    for criterion in ("mse", "softmax_mse", "distillation"):
        constants = {
            "s": last,
            "CRITERION": criterion,
            "KP": max(last.N, power_of_two(last.NOUT)),
            "BQ": query_block(last),
            "PREC": precision,
            "c_stride": 1,
        }
        yield f"criterion {criterion}", "tail", criterion_kernel, types, constants, 4
    one, two = stages[-2:]
    c = configuration("forward", one, precision, hopper)
    types = {**plain, **dict.fromkeys(("x", "below_slope", "w1", "w2", "w1x", "w2x"), data), "temperature": "fp32"}
    types.update(dict.fromkeys(("bias1", "bias2", "part1", "part2"), "*fp32"), loss_scale="fp32")
    if fused:
        for criterion in ("mse", "softmax_mse", "distillation"):
            constants = {"s1": one, "s2": two, "below": stages[-3], "c": c, "CRITERION": criterion}
            constants.update(bias_step=1, c_stride=1)
            yield f"head {criterion}", "tail", head_kernel, types, constants, c.WARPS
    constants = {"D": packed_places, "B": 256}
    yield "fold", "layout", fold_kernel, {**plain, **tables, "out": "*fp32", "scale": "fp32"}, constants, 4


def _whole(schedule: Schedule, precision: str, hopper: bool) -> Iterator[tuple[str, str, Any, dict[str, str], dict[str, Any], int]]:
    """The same of the whole-network path, for a network that it takes."""
    data = POINTERS.get(precision, "*fp32")
    types = dict.fromkeys(("x", "index", "w", "scratch"), data) | {"codes": "*i8", "temperature": "fp32"}
    types |= dict.fromkeys(("bias", "targets", "partials", "terms", "y", "outs", "sums", "weights", "queries"), "*fp32")
    types |= dict.fromkeys(("places", "steps", "counts", "table"), "*i32") | {"out": data, "images": data}
    first = schedule.stages[0]
    constants: dict[str, Any] = {"H": first.H, "W": first.W, "C": first.C, "x_stride": 1, "step": 1, "B": 1024, "PREC": precision}
    yield "prepare", "layout", prepare_kernel, types, constants, 4
    sums = {"gradient": "*fp32", "losses": "*fp32", "scale": "fp32", "loss_scale": "fp32"}
    yield "reduce", "layout", reduce_kernel, {**types, **sums}, {"B": 256}, 4
    kernels = {"network_forward": network_forward_kernel, "network_loss": network_loss_kernel}
    for role, kernel in kernels.items():
        try:
            net = network(schedule, precision, role == "network_loss", hopper)
        except Unplannable:
            continue
        constants = {"net": net, "CRITERION": "mse", "SHARED": True, "INDEXED": False}
        constants = {n: v for n, v in constants.items() if n in kernel.arg_names} | {"bias_step": 1}
        if role == "network_loss":
            constants["c_stride"] = 1
        yield role, role, kernel, types, constants, 4


def rows(target: str, precisions: tuple[str, ...], architectures: tuple[str, ...], roles: tuple[str, ...] = ()) -> Iterator[dict[str, Any]]:
    """One row a kernel, see FIELDS; of some roles, or of all."""
    return (row for row, _ in listings(target, precisions, architectures, roles))


def listings(
    target: str,
    precisions: tuple[str, ...],
    architectures: tuple[str, ...],
    roles: tuple[str, ...] = (),
    wanted: Callable[[str], bool] = lambda name: True,
) -> Iterator[tuple[dict[str, Any], str]]:
    """The same with the kernel's machine code, empty for one without matrix products; ``wanted`` picks kernels by name."""
    for architecture in architectures:
        schedule = schedule_of(*ARCHITECTURES[architecture])
        for precision in precisions:
            hopper = target == "sm_90"
            layers = _kernels(schedule.stages, most_places(schedule), precision, hopper, fits(schedule, 1))
            for name, role, kernel, types, constants, warps in chain(layers, _whole(schedule, precision, hopper)):
                if (roles and role not in roles) or not wanted(name):
                    continue
                began = time.perf_counter()
                compiled = compile_kernel(kernel, types, constants, warps, target)
                seconds = time.perf_counter() - began
                usage = disassemble(compiled.asm["cubin"], "-res-usage")
                numbers = re.search(r"REG:(\d+) STACK:(\d+)", usage)
                assert numbers is not None, usage
                dots = len(re.findall(r"\btt\.dot\b", compiled.asm["ttir"]))
                sass = disassemble(compiled.asm["cubin"], "-sass") if dots else ""
                mma = next((op for op in ("HGMMA", "HMMA") if re.search(rf"\b{op}\b", sass)), None)
                values = (
                    name,
                    role,
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
                yield dict(zip(FIELDS, values, strict=True)), sass


def table(listed: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = ["| " + " | ".join(FIELDS) + " |", "|" + " --- |" * len(FIELDS)]
    return "\n".join([*lines, *("| " + " | ".join(str(row[f]) for f in FIELDS) + " |" for row in listed)])


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels.inspect", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--target", choices=KNOWN, default="sm_90")
    parser.add_argument("--precision", choices=PRECISIONS, nargs="+", default=["fp16", "tf32"])
    parser.add_argument("--architecture", choices=sorted(ARCHITECTURES), nargs="+", default=list(ARCHITECTURES))
    parser.add_argument("--role", choices=ROLES, nargs="+", default=[])
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        print("inspect compiles; unset TRITON_INTERPRET", file=sys.stderr)
        return 2
    listed = []
    for row in rows(options.target, tuple(options.precision), tuple(options.architecture), tuple(options.role)):
        listed.append(row)
        if options.json:
            print(json.dumps(row), flush=True)
    if not options.json:
        print(table(listed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
