"""Operands of products, filled up with zeros where models would not all begin on 16 bytes.

A BLAS may take another routine for an operand or a result that lies elsewhere, and with it other bits: a model's would depend on its place
among the others. Activations have a multiple of 16 queries; it is weights, and products of weights, that have any number of numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

_NUMBERS = 4  # in 16 bytes, of float32


def ragged(shape: Sequence[int]) -> bool:
    """Whether models of this many numbers each, one after another, do not all begin on 16 bytes."""
    return math.prod(shape) % _NUMBERS != 0


def _up(size: int) -> int:
    return -(-size // _NUMBERS) * _NUMBERS


def _filled(x: Tensor, axis: int, size: int) -> Tensor:
    """The tensor with zeros at the end of an axis that is counted from the end."""
    missing = size - x.shape[axis]
    return F.pad(x, (0, 0) * (-axis - 1) + (0, missing)) if missing else x


def rows_and_weight(rows: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Operands ``[..., in']`` and ``[M, out, in']`` of a layer's product, and so of its gradients."""
    size = _up(weight.shape[-1]) if ragged(weight.shape[1:]) else weight.shape[-1]
    return _filled(rows, -1, size), _filled(weight, -1, size)


def even_rows(x: Tensor) -> Tensor:
    """A matrix ``[..., rows', features]``."""
    return _filled(x, -2, _up(x.shape[-2]))


def factors(x: Tensor, y: Tensor, stacked: Sequence[bool]) -> tuple[Tensor, Tensor]:
    """Operands ``[..., a, b']`` and ``[..., b', c']`` of a product of matrices; ``stacked``: whether each has the models in front."""
    first, second = (t.shape[own:] for t, own in zip((x, y), stacked, strict=True))
    if (stacked[0] and ragged(first)) or (stacked[1] and ragged(second)):
        size = _up(y.shape[-2])
        x, y = _filled(x, -1, size), _filled(y, -2, size)
    numbers = first[-2] * second[-1]  # of a product; there are at least as many products as either has matrices
    if all(ragged((numbers, *shape[:-2])) for shape in (first, second)):
        y = _filled(y, -1, _up(y.shape[-1]))
    return x, y


def letters(operands: Sequence[Tensor], given: Sequence[str], out: str, models: str) -> tuple[list[Tensor], list[int]]:
    """Operands of an ``einsum`` of one or two, and the shape that its result has without what was filled; ``models``: their letter."""
    parts, sizes = [*given, out], dict[str, int]()
    for part, x in zip(given, operands, strict=True):
        for letter, size in zip(part, x.shape, strict=True):
            sizes[letter] = max(size, sizes.get(letter, 1))  # one long, it is broadcast
    filled = dict(sizes)
    if all(len(set(part)) == len(part) for part in parts):  # no diagonals
        for own in (part.replace(models, "") for part in parts if models in part):
            if ragged([filled[letter] for letter in own]) and own:
                filled[own[-1]] = _up(filled[own[-1]])
    made = list(operands)
    for i, part in enumerate(given):
        for place, letter in enumerate(part):
            if made[i].shape[place] == sizes[letter]:
                made[i] = _filled(made[i], place - len(part), filled[letter])
    return made, [sizes[letter] for letter in out]


def spread(x: Tensor, shape: Sequence[int]) -> Tensor:
    """The tensor with zeros up to a shape: the gradient of :func:`taken`."""
    for axis, size in enumerate(shape, -x.ndim):
        x = _filled(x, axis, size)
    return x


def first(x: Tensor, count: int) -> Tensor:
    """The first numbers of every row."""
    return taken(x, (*x.shape[:-1], count))


def taken(x: Tensor, shape: Sequence[int]) -> Tensor:
    """The first numbers along every axis: what was there before it was filled."""
    if x.shape == shape:
        return x
    for axis, size in enumerate(shape):
        x = x.narrow(axis, 0, size)
    return x.contiguous()
