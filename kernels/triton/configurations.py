"""How each kernel is launched: rows a tile, warps, what a program holds; and what a machine may choose instead.

``configuration`` is a pure function of role, stage, precision and the matrix unit, so that no first call tunes. :func:`tuned` puts
another choice in its place: one of CHOICES, between which a machine decides when it proves the kernels, or what a measurement tries.
No tensors and no Triton here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import lru_cache

from .devices import WARPGROUP
from .stages import Hashed, Schedule, Stage, blocks, hash_once

MOST_REGISTERS = 255  # a thread's
PRECISE_ACCUMULATORS = 64 * 128  # the same where operands of tf32x3 take the other registers


@dataclass(frozen=True)
class Configuration(Hashed):
    """How one kernel is launched: rows a tile, warps, pipeline stages, whether weights stay in shared memory, the precision, row
    tiles a program, a limit to registers a thread (0: the compiler's own), the parts in which a product of the forward pass or of the
    input gradient takes its sum, and the programs that share the weight gradient's tiles which are one program's otherwise."""

    BM: int
    WARPS: int
    STAGES: int
    HOIST: bool
    PREC: str
    TILES: int = 8
    REGISTERS: int = 0
    CUT: int = 1
    TURNS: int = 1

    __hash__ = hash_once


def launch_options(warps: int = 4, registers: int = 0) -> dict[str, int | bool]:
    """Options of every launch. Fused multiply-adds are asked for by name: Triton's default is about to change."""
    return {"num_warps": warps, "enable_fp_fusion": True, **({"maxnreg": registers} if registers else {})}


def element_size(precision: str) -> int:
    return 2 if precision in ("fp16", "bf16") else 4


@lru_cache(maxsize=1024)
def _default(role: str, stage: Stage, precision: str, unit: str) -> Configuration:
    """Hopper's matrix instruction takes 64 rows a warpgroup. Before it operands pass through registers, and the rows are as few as keep
    them from spilling. tf32x3 holds every operand twice: its gradients' sums are as short as products of one warp are everywhere, and
    forward products on Hopper and input gradients before it take their sums in two parts."""
    role = "dx" if role == "joint" else role
    size, hopper, precise = element_size(precision), unit == WARPGROUP, precision == "tf32x3"
    if role == "dw":
        rows = 32 if hopper or size == 2 else 16
        rows = (32 if stage.PATCH else 16) if precise else rows
    elif precise and (role == "head" or not hopper):
        rows = 32 if stage.PATCH else 16
    elif hopper:
        rows = 64
    else:
        rows = 16 if role == "dx" and size == 4 else 32
    weights = 0 if role == "dw" else stage.XSIZE // stage.CB if role == "dx" else stage.WSIZE // stage.NB
    # Held weights take shared memory and, in dX, where wide gradients are live as well, registers.
    held = role != "dw" and (hopper or size == 2 or role == "dx") and (not precise or stage.PATCH)
    hoist = held and weights * size <= (49152 if role != "dx" or stage.JX < stage.P else 32768)
    wide = stage.KD if role == "forward" and not stage.PATCH else stage.JX * stage.BN if role == "dx" else 0
    cut = 2 if precise and wide >= 32 and hopper == (role == "forward") else 1
    turns = 1
    if precise and not hopper and role == "dw":
        fit = PRECISE_ACCUMULATORS // (stage.KDW * stage.ND)
        fit = min(fit, 2) if stage.FLAT else fit  # those tiles have addresses of their own, which take registers, too
        turns = next(t for t in range(1, stage.NI + 1) if stage.NI % t == 0 and stage.NI // t <= max(1, fit))
    # Left to itself, the assembler spills a few bytes of long tiles where that makes room for one more program on a multiprocessor.
    limit = MOST_REGISTERS if precise and stage.R > 4 and role != ("dw" if hopper else "head") else 0
    return Configuration(BM=rows, WARPS=4, STAGES=1, HOIST=hoist, PREC=precision, REGISTERS=limit, CUT=cut, TURNS=turns)


SPLIT_ROWS = 4096  # of a weight gradient's sum
Choice = Callable[[str, Stage, str, Configuration], Configuration]


@dataclass(frozen=True)
class Tuning:
    """What a measurement tries in place of the defaults: ``choose(role, stage, precision, default)``, rows a split, and whether the second
    stage's input gradient and the first's weight gradient are one launch where they can be (joint_gradient.py)."""

    choose: Choice = lambda role, stage, precision, default: default
    split_rows: int = SPLIT_ROWS
    joint: bool = False


def _pipelined(role: str, stage: Stage, precision: str, default: Configuration) -> Configuration:
    return replace(default, STAGES=2) if role != "dw" else default


# What a machine may find fastest when it proves the kernels. "pipelined" moves loads and no term of a sum: its bits are the default's.
# "joint" adds up the first stage's weight gradient in another order.
CHOICES = {"default": Tuning(), "pipelined": Tuning(_pipelined), "joint": Tuning(joint=True)}
_tuning: ContextVar[Tuning | None] = ContextVar("wslfast_tuning", default=None)


def tuning() -> Tuning:
    """What :func:`tuned` set for this call, to be set again where autograd's own thread goes on with it."""
    return _tuning.get() or CHOICES["default"]


@contextmanager
def tuned(choice: Tuning) -> Iterator[None]:
    """Inside, every launch takes its configuration from ``choice``: one of CHOICES, or what ``benchmarks/tune.py`` tries."""
    token = _tuning.set(choice)
    try:
        yield
    finally:
        _tuning.reset(token)


def configuration(role: str, stage: Stage, precision: str, unit: str = WARPGROUP) -> Configuration:
    """Launch parameters of ``role`` (forward | dx | dw | head | joint): a pure function, so that no first call tunes."""
    default = _default(role, stage, precision, unit)
    return tuning().choose(role, stage, precision, default)


@lru_cache(maxsize=256)
def joins(schedule: Schedule, precision: str, unit: str = WARPGROUP) -> bool:
    """Whether joint_gradient.py serves the first two stages: a first patch that is one tile, maxima, no channels split, and sums of both
    that leave registers for the operands. They do on units that take 64 rows, with operands of two bytes ("ieee" is the interpreter's)."""
    if len(schedule.stages) < 2 or unit != WARPGROUP or precision not in ("fp16", "bf16", "ieee"):
        return False
    below, stage = schedule.stages[:2]
    whole = below.PATCH and below.NB == 1 and stage.CB == 1 and stage.BC == stage.C == below.N
    return whole and below.POOL == "max" and stage.PS in (1, 2) and (stage.H, stage.W) == (below.HO, below.WO)


def splits(stage: Stage, n: int) -> int:
    """Parts of the rows that a weight gradient is summed over; never a function of k, so a model's sum keeps its order."""
    return min(16, blocks(n * stage.POSITIONS, tuning().split_rows))
