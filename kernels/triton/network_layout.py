"""The layout of a whole network on one program (network.py): where a block of queries keeps its activations, and which networks fit.

A program takes one model and a block of ``QB`` queries through all stages, forward and (for a loss) back, and keeps what lies
between two stages in a scratch of its own, small enough that the scratches of all programs stay in the L2 cache or close to it.
``network`` lays the scratch out, or raises Unplannable with the reason. All pure functions of shapes: no tensors, no Triton.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate

from ..layers import Unplannable
from .configurations import Configuration, configuration, element_size
from .devices import WARPGROUP
from .stages import Hashed, Schedule, Stage, blocks, hash_once, power_of_two
from .tables import step

SCRATCH = 2**18  # bytes of activations that a block of queries should stay below
MOST_SCRATCH = 2**22  # bytes a program may hold: activations of at least one query, and sums of weight gradients
MOST_QUERIES = 64  # a tile of rows: more queries fill no more of it
MOST_STAGES, MOST_PRODUCTS = 8, 256  # unrolled into one kernel: what the compiler can be asked for
MOST_LOGITS = 4096  # numbers in the criterion's tile [QB, classes]
PART = 128  # queries that one program walks over


@dataclass(frozen=True)
class Network(Hashed):
    """All that a whole-network kernel is specialised on. Offsets are in numbers, within a packed row (``weights``, ``back``), a
    row of weights (``biases``), or a program's scratch (``outputs``, ``slopes``, ``gradient``: operands; ``codes``: bytes;
    ``sums``: fp32)."""

    stages: tuple[Stage, ...]
    forward: tuple[Configuration, ...]
    dw: tuple[Configuration, ...]
    dx: tuple[Configuration, ...]
    weights: tuple[int, ...]
    back: tuple[int, ...]
    biases: tuple[int, ...]
    outputs: tuple[int, ...]
    slopes: tuple[int, ...]
    codes: tuple[int, ...]
    sums: tuple[int, ...]
    gradient: int
    QB: int
    SCRATCH: int
    CODES: int
    SUMS: int
    PARAMETERS: int
    PLACES: int

    __hash__ = hash_once

    @property
    def DEPTH(self) -> int:
        return len(self.stages)

    @property
    def OUTS(self) -> int:
        """The last stage's outputs, fp32."""
        return self.QB * self.stages[-1].NOUT

    @property
    def KP(self) -> int:
        """Columns of the criterion's tile."""
        return max(self.stages[-1].N, power_of_two(self.stages[-1].NOUT))

    def program_bytes(self, precision: str) -> int:
        """Scratch of one program."""
        return self.SCRATCH * element_size(precision) + self.CODES + 4 * (self.OUTS + self.SUMS)


def _products(stage: Stage) -> int:
    """Matrix products of a stage's three kernels as they are unrolled, without loops over runs and blocks."""
    forward = stage.TILES * stage.ACCS
    gather = stage.NY * stage.NX * stage.P * (stage.P // stage.JX) * stage.PS * (not stage.INPUT)
    return forward + stage.NI * stage.ACCS + gather


def _offsets(sizes: Iterable[int], start: int = 0) -> tuple[tuple[int, ...], int]:
    """Where blocks of ``sizes`` begin, each at a multiple of 64 numbers, and where the last one ends."""
    starts, at = [], start
    for size in sizes:
        starts.append(at)
        at += blocks(size, 64) * 64
    return tuple(starts), at


def _query_numbers(schedule: Schedule, gradient: bool) -> tuple[int, int]:
    """(operands, codes) that one query keeps in the scratch."""
    stages = schedule.stages
    operands = sum(stage.OUTPUTS for stage in stages[:-1])
    if not gradient:
        return operands, 0
    operands += stages[-1].CODES + sum(s.SLOPES for s in stages if s.SLOPE in ("pooled", "window"))
    return operands, sum(stage.CODES for stage in stages if stage.POOL == "max")


def query_block(schedule: Schedule, precision: str, gradient: bool) -> int:
    """Queries a program takes through the network at a time: a power of two, never a function of k or n."""
    operands, codes = _query_numbers(schedule, gradient)
    each = operands * element_size(precision) + codes
    most = min(MOST_QUERIES, MOST_LOGITS // max(schedule.stages[-1].N, power_of_two(schedule.classes)))
    block = 1
    while 2 * block <= most and 2 * block * each <= SCRATCH:
        block *= 2
    return block


@lru_cache(maxsize=256)
def network(
    schedule: Schedule, precision: str, gradient: bool, unit: str = WARPGROUP, block: int | None = None, interpreted: str | None = None
) -> Network:
    """Lay out ``schedule`` for one program. ``block`` overrides the queries a block (a power of two), ``interpreted`` the products'
    precision. Raises Unplannable if the network is too deep, too wide or too large for it."""
    stages = schedule.stages
    if len(stages) > MOST_STAGES:
        raise Unplannable(f"{len(stages)} stages; one kernel unrolls up to {MOST_STAGES}")
    products = sum(map(_products, stages))
    if products > MOST_PRODUCTS:
        raise Unplannable(f"{products} matrix products; one kernel unrolls up to {MOST_PRODUCTS}")
    last = stages[-1]
    if max(last.N, power_of_two(last.NOUT)) > MOST_LOGITS:
        raise Unplannable(f"layer {schedule.placements[-1].layer!r}: {last.NOUT} outputs; the criterion's tile holds {MOST_LOGITS}")
    qb = block or query_block(schedule, precision, gradient)
    outputs, end = _offsets(qb * s.OUTPUTS * (s is not last) for s in stages)
    slopes, end = _offsets((qb * s.SLOPES * (gradient and s.SLOPE in ("pooled", "window")) for s in stages), end)
    (gradient_at,), end = _offsets([qb * last.CODES * gradient], end)
    codes, codes_end = _offsets(qb * s.CODES * (gradient and s.POOL == "max") for s in stages)
    bases = tuple(accumulate((step(s) for s in stages[:-1]), initial=0)) if gradient else (0,) * len(stages)
    roles = {role: tuple(configuration(role, s, precision, unit) for s in stages) for role in ("forward", "dw", "dx")}
    if precision == "tf32x3":  # with more rows the one kernel spills more than 2 KB and compiles for a minute
        roles["dx"] = tuple(replace(c, BM=min(c.BM, 16)) for c in roles["dx"])
    if interpreted is not None:
        roles = {role: tuple(replace(c, PREC=interpreted) for c in configurations) for role, configurations in roles.items()}
    layout = Network(
        stages,
        roles["forward"],
        roles["dw"],
        roles["dx"],
        weights=tuple(p.forward for p in schedule.placements),
        back=tuple(p.backward for p in schedule.placements),
        biases=tuple(p.bias.offset if p.bias else 0 for p in schedule.placements),
        outputs=outputs,
        slopes=slopes,
        codes=codes,
        sums=bases,
        gradient=gradient_at,
        QB=qb,
        SCRATCH=end,
        CODES=codes_end,
        SUMS=bases[-1] + step(last) if gradient else 0,
        PARAMETERS=schedule.parameters,
        PLACES=max(s.P**2 for s in stages),
    )
    if layout.program_bytes(precision) > MOST_SCRATCH:
        raise Unplannable(f"{layout.program_bytes(precision)} bytes a program; the whole network in one launch takes up to {MOST_SCRATCH}")
    return layout


def split(n: int, block: int) -> tuple[int, int]:
    """(parts of a model's n queries that programs walk over, queries a part): never a function of k."""
    queries = blocks(blocks(n, min(16, blocks(n, PART))), block) * block
    return blocks(n, queries), queries


def model_bytes(schedule: Schedule, n: int, precision: str, gradient: bool) -> int:
    """What a call holds for every model of a chunk: packed weights and, for a loss, a gradient a part of its queries."""
    parts = split(n, query_block(schedule, precision, True))[0] if gradient else 0
    return schedule.packed * element_size(precision) + 4 * parts * (schedule.parameters + 1)


def network_bytes(schedule: Schedule, k: int, n: int, precision: str, gradient: bool, programs: int, unit: str = WARPGROUP) -> int:
    """Bytes a call on k models holds beyond its arguments, its results and the queries as the kernels read them."""
    return programs * network(schedule, precision, gradient, unit).program_bytes(precision) + k * model_bytes(
        schedule, n, precision, gradient
    )
