"""Stages: one convolution or linear layer with its pooling and activation, as integers that a kernel is specialised on.

Geometry. Activations are channels-last, ``[n, H, W, C]``, with C padded to a power of two. A row of every matrix product is
one *pooled* output position (query, oy, ox). Its window of P x P convolution outputs reads one input *patch* of R x RX
pixels, R = (P - 1) * S + KH, RX = (P - 1) * S + KW, whose first pixel is (oy * PS - PY, ox * PS - PX) with PS = P * S.
A patch row is one run of RX * C numbers, so a matrix product reads runs, and the weights are spread out to fit them
(a Toeplitz matrix: packed[i, (px, c), (dx, n)] = W[n, c, i, px - dx * S], zero outside). Pooling is then a maximum over
columns, in registers. A linear layer is a 1 x 1 convolution over a 1 x 1 map whose channels are the flattened map.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from ..layers import Slot


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below ``n``."""
    return 1 << (n - 1).bit_length()


def blocks(n: int, size: int) -> int:
    """How many blocks of ``size`` cover ``n``."""
    return -(-n // size)


class Hashed:
    """Base of records by which compiled kernels are found again: the hash of their many fields is computed once."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_hash"}  # texts hash otherwise in another process


def hash_once(record: Hashed) -> int:
    """The ``__hash__`` of a frozen dataclass, kept."""
    known: int | None = record.__dict__.get("_hash")
    if known is None:
        known = hash(tuple(getattr(record, field.name) for field in fields(record)))  # type: ignore[arg-type]
        object.__setattr__(record, "_hash", known)
    return known


@dataclass(frozen=True)
class Stage(Hashed):
    """One convolution or linear layer, its pooling and its activation: all that a kernel is specialised on.

    ``SLOPE`` says where the activation's derivative comes from in the backward pass: ``output`` (a function of the stored
    output), ``pooled`` (stored beside it, one a pooled position), ``window`` (stored, one for each position of the
    pooling window) or ``one`` (no activation).
    """

    H: int  # input map, rows
    W: int  # input map, columns
    C: int  # input channels as stored
    KH: int
    KW: int
    S: int  # stride
    PY: int  # padding, rows
    PX: int  # padding, columns
    P: int  # pooling window: 1 (none) or 2
    POOL: str  # "none" | "max" | "avg"
    HO: int  # pooled output map, rows
    WO: int  # pooled output map, columns
    N: int  # output channels as stored
    NOUT: int  # output channels
    ACT: str
    PARAM: float
    ACT_FIRST: bool  # activation before pooling, and the order matters
    SLOPE: str
    BIAS: bool
    LAST: bool  # the outputs of the network: fp32, not padded
    INPUT: bool  # reads the queries, not another stage
    # forward tiles: A [BM, KD] (a run of a patch row, or a whole patch) times packed weights [KD, ND]
    PATCH: bool  # one tile holds the whole patch and its columns all positions of the window
    RUN: int  # elements of the tile between patch rows (PATCH only)
    KD: int
    NCH: int  # tiles a patch row
    BN: int  # output channels a program
    # weight gradients: NI accumulators [KDW, ND] a program
    KDW: int
    NCHW: int
    NI: int
    FLAT: int  # tiles that run on over all kernel rows, RUNLEN elements each; 0: every kernel row has tiles of its own
    # input gradients: PS accumulators [BM, PS * BC] a program
    BC: int

    __hash__ = hash_once

    @property
    def PS(self) -> int:
        """Step of a pooled position in the input."""
        return self.P * self.S

    @property
    def R(self) -> int:
        """Rows of a patch."""
        return (self.P - 1) * self.S + self.KH

    @property
    def RX(self) -> int:
        """Columns of a patch."""
        return (self.P - 1) * self.S + self.KW

    @property
    def RUNLEN(self) -> int:
        """Elements of a patch row that are not padding."""
        return self.RX * self.C

    @property
    def KR(self) -> int:
        """Weight matrices a tile column: one a kernel row, or one for the whole patch."""
        return 1 if self.PATCH else self.KH

    @property
    def KRW(self) -> int:
        """The same for the weight gradient, whose tiles may run on over kernel rows."""
        return self.FLAT or self.KR

    @property
    def TILES(self) -> int:
        """Patch rows that are loaded one by one."""
        return 1 if self.PATCH else self.R

    @property
    def PP(self) -> int:
        """Positions of the pooling window in one accumulator's columns."""
        return self.P * self.P if self.PATCH else self.P

    @property
    def ACCS(self) -> int:
        """Accumulators: rows of the pooling window that are not columns."""
        return 1 if self.PATCH else self.P

    @property
    def ND(self) -> int:
        return self.PP * self.BN

    @property
    def NB(self) -> int:
        """Blocks of output channels."""
        return self.N // self.BN

    @property
    def EXACT(self) -> bool:
        """No tile reads past its run, so no column needs a mask."""
        if self.PATCH:
            return self.RUN == self.RUNLEN and self.KD == self.R * self.RUN
        return self.KD * self.NCH == self.RUNLEN

    @property
    def EXACTW(self) -> bool:
        """The same for the tiles of the weight gradient."""
        return self.EXACT if self.PATCH else self.KDW * self.NCHW * self.KRW == self.RUNLEN * self.KH

    @property
    def NY(self) -> int:
        """Pooled rows whose patch holds one input row."""
        return (self.R - 1) // self.PS + 1

    @property
    def NX(self) -> int:
        return (self.RX - 1) // self.PS + 1

    @property
    def HB(self) -> int:
        """Blocks of PS x PS input pixels, rows."""
        return blocks(self.H + self.PY, self.PS)

    @property
    def WB(self) -> int:
        return blocks(self.W + self.PX, self.PS)

    @property
    def CB(self) -> int:
        """Blocks of input channels of an input-gradient program."""
        return blocks(self.C, self.BC)

    @property
    def WSIZE(self) -> int:
        """Packed weights, forward form ``[NB, KR, NCH, KD, ND]``."""
        return self.NB * self.KR * self.NCH * self.KD * self.ND

    @property
    def XSIZE(self) -> int:
        """Packed weights, input-gradient form ``[CB, KH, NX, NB, P * BN, PS * BC]``."""
        return 0 if self.INPUT else self.CB * self.KH * self.NX * self.NB * self.P * self.BN * self.PS * self.BC

    @property
    def GSIZE(self) -> int:
        """Weight-gradient partial ``[NB, KRW, NCHW, KDW, ND]``, then the bias' ``[NB, ND]``."""
        return self.NB * (self.KRW * self.NCHW * self.KDW + 1) * self.ND

    @property
    def PASSES(self) -> int:
        """Weight-gradient programs a model and split: output blocks x runs x groups of kernel rows."""
        return self.NB * self.NCHW * (self.KRW // self.NI)

    @property
    def JX(self) -> int:
        """Columns of the pooling window that a product of the input gradient takes at once: as few as fill its inner dimension."""
        return self.P if self.BN < 32 else 1

    @property
    def POSITIONS(self) -> int:
        return self.HO * self.WO

    @property
    def INPUTS(self) -> int:
        """Numbers a query that the stage reads."""
        return self.H * self.W * self.C

    @property
    def OUTPUTS(self) -> int:
        """Numbers a query that the stage stores."""
        return self.POSITIONS * (self.NOUT if self.LAST else self.N)

    @property
    def CODES(self) -> int:
        """Numbers a query of the output's gradient and of the maxima's positions."""
        return self.POSITIONS * self.N

    @property
    def SLOPES(self) -> int:
        """Numbers a query of the stored slopes."""
        return self.CODES * (self.P**2 if self.SLOPE == "window" else 1)


@dataclass(frozen=True)
class Placement(Hashed):
    """A stage's layer and where its numbers lie: in a row of weights, in a row of packed weights (forward and
    input-gradient form). Kept out of ``Stage`` so that equal stages share a compiled kernel."""

    layer: str
    weight: Slot
    bias: Slot | None
    forward: int
    backward: int
    features: tuple[int, int, int]  # linear: the [C, H, W] map it flattens

    __hash__ = hash_once


@dataclass(frozen=True)
class Schedule(Hashed):
    """A network as the kernels run it: stages, placements, and the sizes of a row of weights and of packed weights."""

    stages: tuple[Stage, ...]
    placements: tuple[Placement, ...]
    parameters: int
    packed: int
    classes: int
    flat_input: bool  # queries enter as [n, features] in C-order

    __hash__ = hash_once
