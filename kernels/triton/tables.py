"""Packing as index tables: where every packed number comes from, and where every weight's gradient went.

Packing is linear and copies each weight to a few places, so it is one gather, ``packed[j, t] = weights[j, table[t]]`` with
-1 for zero, and its backward is a segment sum: the gradient of weight p is the sum of the partials at ``places[p, :]``, in
a fixed order. Tables depend on the schedule (and, for the partials, on the number of row splits) alone and are cached.

The plain functions here are the readable twins of the kernels in packing.py.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .configurations import splits
from .stages import Placement, Schedule, Stage, blocks


def _channels(stage: Stage, placement: Placement) -> Tensor:
    """``[C]``: the layer's input channel (linear: feature) behind each stored channel, -1 where there is none."""
    channels, height, width = placement.features
    if not channels:
        inputs, stored = placement.weight.shape[1], torch.arange(stage.C)
        return torch.where(stored < inputs, stored, -1)
    features = torch.arange(channels * height * width).view(channels, height, width)
    if not stage.INPUT:
        # The map below is stored channels-last, its channels padded.
        padded = torch.full((height, width, stage.C // (height * width)), -1)
        padded[..., :channels] = features.permute(1, 2, 0)
        features = padded
    out = torch.full((stage.C,), -1)
    out[: features.numel()] = features.flatten()
    return out


def _positions(stage: Stage, placement: Placement, n: Tensor, c: Tensor, i: Tensor, j: Tensor, valid: Tensor) -> Tensor:
    """Index of W[n, c, i, j] in a row of weights, -1 outside the kernel; the arguments broadcast."""
    channel = _channels(stage, placement)[c.clamp(0, stage.C - 1)]
    valid = valid & (n < stage.NOUT) & (c < stage.C) & (channel >= 0)
    valid = valid & (i >= 0) & (i < stage.KH) & (j >= 0) & (j < stage.KW)
    inputs = placement.weight.shape[1]
    return torch.where(valid, placement.weight.offset + ((n * inputs + channel) * stage.KH + i) * stage.KW + j, -1)


def _axis(size: int, at: int, of: int) -> Tensor:
    return torch.arange(size).view([size if axis == at else 1 for axis in range(of)])


def forward_table(stage: Stage, placement: Placement, kd: int, tiles: int) -> Tensor:
    """``[NB, KR, tiles, kd, P or 1 (dy), P (dx), BN]``, flat: the Toeplitz form for tiles of ``kd`` elements."""
    dys = stage.P if stage.PATCH else 1
    nb, kr, ch, e, dy, dx, bn = (_axis(size, at, 7) for at, size in enumerate((stage.NB, stage.KR, tiles, kd, dys, stage.P, stage.BN)))
    if stage.PATCH:
        row, element = e // stage.RUN - dy * stage.S, e % stage.RUN
    else:
        row, element = kr, ch * kd + e
    column = element // stage.C - dx * stage.S
    inside = (element < stage.RUNLEN).expand(1, 1, tiles, kd, 1, 1, 1)
    return _positions(stage, placement, nb * stage.BN + bn, element % stage.C, row, column, inside).flatten()


def gradient_table(stage: Stage, placement: Placement) -> Tensor:
    """``[NB, KRW, NCHW, KDW, ND]``, flat: the weight behind every number of a weight-gradient partial."""
    if not stage.FLAT:
        return forward_table(stage, placement, stage.KDW, stage.NCHW)
    nb, tile, e, dx, bn = (_axis(size, at, 5) for at, size in enumerate((stage.NB, stage.FLAT, stage.KDW, stage.P, stage.BN)))
    row, element = (tile * stage.KDW + e) // stage.RUNLEN, (tile * stage.KDW + e) % stage.RUNLEN
    return _positions(stage, placement, nb * stage.BN + bn, element % stage.C, row, element // stage.C - dx * stage.S, nb >= 0).flatten()


def backward_table(stage: Stage, placement: Placement) -> Tensor:
    """``[CB, KH, NX, NB, P (dx), BN, PS (rx), BC]``, flat: the form that gathers the gradient of an input block."""
    cb, i, nx, nb, dx, bn, rx, bc = (
        _axis(size, at, 8) for at, size in enumerate((stage.CB, stage.KH, stage.NX, stage.NB, stage.P, stage.BN, stage.PS, stage.BC))
    )
    column = rx + nx * stage.PS - dx * stage.S
    return _positions(stage, placement, nb * stage.BN + bn, cb * stage.BC + bc, i, column, i >= 0).flatten()


@lru_cache(maxsize=64)
def pack_table(schedule: Schedule, device: torch.device) -> Tensor:
    """``[packed]`` int32: the position in a row of weights behind every packed number, -1 for zero."""
    table = torch.full((schedule.packed,), -1)
    for stage, place in zip(schedule.stages, schedule.placements, strict=True):
        table[place.forward : place.forward + stage.WSIZE] = forward_table(stage, place, stage.KD, stage.NCH)
        if not stage.INPUT:
            table[place.backward : place.backward + stage.XSIZE] = backward_table(stage, place)
    return table.to(torch.int32).to(device)


class FoldTables:
    """Where the partial gradients of every parameter lie in a model's row of partials.

    Parameter p is the sum over splits s and places d of ``partials[j, places[p, d] + s * steps[p]]`` (place >= 0,
    s < counts[p]), s outermost. ``bases`` are the stages' offsets in that row, ``row`` its length.
    """

    def __init__(self, schedule: Schedule, parts: tuple[int, ...], device: torch.device) -> None:
        self.bases: list[int] = []
        self.splits = parts
        places = torch.full((schedule.parameters, most_places(schedule)), -1)
        steps, counts = torch.zeros(schedule.parameters, dtype=torch.long), torch.zeros(schedule.parameters, dtype=torch.long)
        base = 0
        for stage, place, count in zip(schedule.stages, schedule.placements, parts, strict=True):
            self.bases.append(base)
            table = _gradient_table(stage, place)
            at, width = _invert(table, schedule.parameters)
            places[:, :width] = torch.where(at >= 0, base + at, places[:, :width])
            for slot in (place.weight, place.bias):
                if slot is not None:
                    steps[slot.offset : slot.stop], counts[slot.offset : slot.stop] = step(stage), count
            base += count * step(stage)
        self.row = base
        self.places, self.steps, self.counts = (t.to(torch.int32).to(device).contiguous() for t in (places, steps, counts))


def step(stage: Stage) -> int:
    """Numbers from one split's partial to the next."""
    return blocks(stage.GSIZE, 16) * 16


def _gradient_table(stage: Stage, place: Placement) -> Tensor:
    """``[GSIZE]``: the parameter behind every number of a weight-gradient partial, -1 for padding."""
    weight = gradient_table(stage, place)
    n = torch.arange(stage.NB).view(-1, 1) * stage.BN + torch.arange(stage.ND) % stage.BN
    # Averages hand every position of the window its share; a maximum's gradient is summed once, in the first BN columns.
    used = torch.arange(stage.ND) < (stage.ND if stage.POOL == "avg" else stage.BN)
    bias = torch.where(used & (n < stage.NOUT), n + (place.bias.offset if place.bias else 0), -1)
    return torch.cat([weight, (bias if place.bias else torch.full_like(bias, -1)).flatten()])


def _invert(table: Tensor, parameters: int) -> tuple[Tensor, int]:
    """``[parameters, most]``: the ascending places that hold each parameter, -1 beyond the last one."""
    held = torch.nonzero(table >= 0).flatten()
    owner = table[held]
    order = torch.argsort(owner, stable=True)
    held, owner = held[order], owner[order]
    counts = torch.bincount(owner, minlength=parameters)
    rank = torch.arange(owner.numel()) - (counts.cumsum(0) - counts)[owner]
    most = int(counts.max())
    out = torch.full((parameters, most), -1)
    out[owner, rank] = held
    return out, most


@lru_cache(maxsize=64)
def most_places(schedule: Schedule) -> int:
    """Copies of one weight that packing makes at most."""
    return max(stage.P**2 for stage in schedule.stages)


def fold_tables(schedule: Schedule, n: int, device: torch.device) -> FoldTables:
    """Cached :class:`FoldTables` of the layer-by-layer path, for n queries."""
    return _fold_tables(schedule, tuple(splits(stage, n) for stage in schedule.stages), device)


def whole_tables(schedule: Schedule, device: torch.device) -> FoldTables:
    """Cached :class:`FoldTables` of one sum a stage, as a program of the whole-network path keeps it."""
    return _fold_tables(schedule, (1,) * len(schedule.stages), device)


@lru_cache(maxsize=64)
def _fold_tables(schedule: Schedule, parts: tuple[int, ...], device: torch.device) -> FoldTables:
    return FoldTables(schedule, parts, device)


def round_tf32(x: Tensor) -> Tensor:
    """fp32 rounded to the nearest of TF32's 10-bit mantissas, ties away from zero; NaN and infinities stay."""
    bits = (x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF
    return torch.where(x.isfinite(), bits.view(torch.float32), x)


def round_operand(x: Tensor, precision: str) -> Tensor:
    """fp32 numbers as a matrix product at ``precision`` stores them: rounded to nearest, fp16 saturating."""
    if precision == "tf32":
        return round_tf32(x)
    if precision == "fp16":
        most = torch.finfo(torch.float16).max
        return torch.where(x.isnan(), x, x.clamp(-most, most)).to(torch.float16)
    return x.to(torch.bfloat16) if precision == "bf16" else x


def pack(weights: Tensor, schedule: Schedule, precision: str) -> Tensor:
    """``[k, P]`` weights -> ``[k, packed]`` operands."""
    table = pack_table(schedule, weights.device).long()
    return round_operand(torch.where(table >= 0, weights.float()[:, table.clamp(min=0)], 0.0), precision)


def fold(partials: Tensor, schedule: Schedule, n: int) -> Tensor:
    """``[k, row]`` partial gradients -> ``[k, P]``: the transpose of packing, and the sum over splits."""
    tables = fold_tables(schedule, n, partials.device)
    out = partials.new_zeros(partials.shape[0], schedule.parameters)
    for s in range(max(tables.splits)):
        for d in range(tables.places.shape[1]):
            at = (tables.places[:, d] + s * tables.steps).long()
            used = (tables.places[:, d] >= 0) & (s < tables.counts)
            out += torch.where(used, partials[:, at.clamp(0, tables.row - 1)], 0.0)
    return out
