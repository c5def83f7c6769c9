"""What a kernel would take on a GPU that is not there: a static model of an SM's pipes, fed with the machine code of its tile loop.

A lower bound, not a time. Counted are warp instructions over four schedulers (issue), loads and stores at 128 bytes a clock, matrix
products at the unit's rate, and bytes of device memory; left out are latency, bank conflicts, caches and the tails of a launch.
Rates are those of an H100 (SXM): 132 SMs at 1.7 GHz, 3 TB/s.
"""

from __future__ import annotations

import re
from dataclasses import astuple, dataclass

from wslfast.kernels.triton.configurations import Configuration, element_size, splits
from wslfast.kernels.triton.stages import Stage, blocks

SMS, GIGAHERTZ, TERABYTES = 132, 1.7, 3.0
WARPS = 4
QUERIES = 256  # of the bytes that are shared by a model's queries
PLAN = 0.65  # of the bound: what launches, latency and tails are expected to leave

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?);", re.MULTILINE)


@dataclass(frozen=True)
class Clocks:
    """Clocks of one SM: issue, load/store and tensor pipes."""

    issue: float = 0.0
    memory: float = 0.0
    tensor: float = 0.0
    products: float = 0.0  # multiply-adds, those that warps repeat included

    def __add__(self, other: Clocks) -> Clocks:
        return Clocks(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, times: float) -> Clocks:
        return Clocks(*(times * value for value in astuple(self)))

    def slowest(self) -> tuple[float, str]:
        return max((self.tensor, "tensor"), (self.issue, "issue"), (self.memory, "load/store"))


def _bytes(operation: str) -> int:
    for suffix, size in ((".128", 16), (".64", 8), (".U8", 1), (".S8", 1), (".U16", 2), (".S16", 2)):
        if suffix in operation:
            return size
    return 4


def _instruction(operation: str, warps: int) -> Clocks:
    """One instruction of every warp of a program."""
    name = operation.split(".", 1)[0]
    tensor = memory = products = 0.0
    rate = 1024 if "TF32" in operation else 2048
    if name == "HGMMA":
        m, n, k = map(int, re.search(r"HGMMA\.(\d+)x(\d+)x(\d+)", operation).groups())  # type: ignore[union-attr]
        products = m * n * k * warps / 4
        tensor = products / rate
    elif name == "HMMA":
        shape = int(re.search(r"HMMA\.(\d+)", operation)[1])  # type: ignore[index]
        products = {1688: 1024, 16816: 2048, 1684: 512}[shape] * warps
        tensor = products / (0.62 * rate)  # 62 %: what the older instruction is said to reach
    elif name in ("LDG", "STG", "LDL", "STL", "LDS", "STS"):
        memory = max(1.0, _bytes(operation) * 32 / 128) * warps
    elif name == "LDGSTS":
        memory = 2 * max(1.0, _bytes(operation) * 32 / 128) * warps
    elif name in ("LDSM", "STSM"):
        memory = (4 if ".4" in operation else 2 if ".2" in operation else 1) * warps
    elif name == "SHFL":
        memory = warps
    return Clocks(0.0 if name == "NOP" else warps / 4, memory, tensor, products)


def tile_clocks(sass: str, inner: int = 1, warps: int = WARPS) -> Clocks:
    """One tile of rows: the body of the kernel's outermost loop that holds matrix products, loops inside it ``inner`` times."""
    lines = [(int(m[1], 16), m[2], m[3]) for m in _LINE.finditer(sass)]
    loops = []
    for at, operation, argument in lines:
        target = re.search(r"0x([0-9a-f]+)", argument) if operation.startswith("BRA") else None
        if target and int(target[1], 16) < at:
            loops.append((int(target[1], 16), at))
    products = [at for at, operation, _ in lines if operation.startswith(("HGMMA", "HMMA", "FFMA"))]
    holding = [loop for loop in loops if any(loop[0] <= at <= loop[1] for at in products)]
    if not holding:
        return Clocks()
    first, last = max(holding, key=lambda loop: loop[1] - loop[0])
    nested = [loop for loop in holding if first <= loop[0] and loop[1] <= last and loop != (first, last)]
    total = Clocks()
    for at, operation, _ in lines:
        if first <= at <= last:
            total += _instruction(operation, warps) * (inner if any(a <= at <= b for a, b in nested) else 1)
    return total


def tiles_per_query(stage: Stage, role: str, config: Configuration) -> tuple[float, int]:
    """(row tiles a query of all programs of a model, turns of the loop inside a tile where weights are not held)."""
    if role == "forward":
        return stage.POSITIONS / config.BM * stage.NB, stage.NCH
    if role == "dw":
        return stage.POSITIONS / config.BM * stage.PASSES * config.TURNS, 1
    return stage.HB * stage.WB / config.BM * stage.CB, stage.NB  # dx, joint


def query_traffic(stage: Stage, role: str, precision: str) -> float:
    """Bytes of device memory that one (model, query) pair moves; images that all models share stay in cache."""
    size = element_size(precision)
    stored = stage.CODES * (stage.POOL == "max") + stage.SLOPES * size * (stage.SLOPE in ("pooled", "window"))
    inputs = 0 if stage.INPUT else stage.INPUTS * size
    if role == "forward":
        return inputs + stored + stage.OUTPUTS * (4 if stage.LAST else size)
    given = stored + stage.CODES * size
    if role == "dw":
        return inputs + given + 2 * 4 * stage.GSIZE * splits(stage, QUERIES) / QUERIES
    return given + 2 * inputs


def joint_traffic(stage: Stage, below: Stage, precision: str) -> float:
    """The same for the input gradient of ``stage`` and the weight gradient of the first stage, ``below``, in one launch: what lies between
    is neither written nor read."""
    size = element_size(precision)
    apart = query_traffic(stage, "dx", precision) + query_traffic(below, "dw", precision)
    return apart - (stage.INPUTS + below.CODES) * size


def nanoseconds(clocks: Clocks, traffic: float) -> tuple[float, str]:
    """(time a pair on a full GPU, what bounds it)."""
    pipe, name = clocks.slowest()
    on_chip, off_chip = pipe / (SMS * GIGAHERTZ), traffic / (1e3 * TERABYTES)
    return max((on_chip, name), (off_chip, "memory"))


def programs_per_sm(registers: int, shared_bytes: int, warps: int = WARPS) -> int:
    """Programs of a kernel that an SM holds at once."""
    by_registers = 65536 // (blocks(registers, 8) * 8 * 32 * warps)
    return min(by_registers, 227 * 1024 // (shared_bytes + 1024), 2048 // (32 * warps), 32)
