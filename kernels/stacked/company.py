"""Group sizes at which every model gets the bits that it gets in a full group, whatever its place in the group.

A library may compute a batch of two products with another routine than a batch of sixty-four. The choice does not depend on the numbers,
so a trial with random numbers shows it. Each size is tried once against a full group, whose models are in the opposite order; what was
found is kept, and found again, the same, where it had to make room.
Only sizes that give the same bits are used. Places that are left over are filled with idle models. What does depend on the numbers, a
trial may miss: callers say of what a size has to be a multiple (``costs.whole_models``).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..graph import Graph
from ..reference import value_shapes

logger = logging.getLogger("wslfast")
SIZES = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192)
_FEW = 9  # models, among which one that is idle counts
_A_GROUP = 2  # models' time that the calls of a group cost beside their numbers
_MOST = 4096  # answers of each sort that are kept: their keys hold graphs, and a process may meet any number of networks
_agree: dict[Hashable, bool] = {}
_shared: dict[Hashable, bool] = {}
_everywhere: dict[Hashable, bool] = {}
_split: dict[Hashable, tuple[int, int]] = {}
Answer = TypeVar("Answer")

# Results of the first ``size`` of random models in an order; first axis models.
Trial = Callable[[int, Sequence[int]], Sequence[Tensor]]


def group_size(count: int, most: int, full: int, key: Hashable, trial: Trial, multiple: int = 1) -> int:
    """How many models to run at once: a size that gives each model the bits it has in a full group.

    Args:
        count: models there are. The size is at least this, and they are filled up to it, where they are fewer than ``most``.
        most: models that may be run at once; exceeded only where no smaller size gives the bits of a full group.
        full: models of a full group.
        key: all that the bits may depend on.
        trial: see :data:`Trial`.
        multiple: of which the size is one, as ``full`` is.
    """
    if full <= 2 or count >= full <= most:
        return full
    sizes = _smaller(full, multiple)
    enough = [size for size in sizes if count <= size <= most]
    fewer = [size for size in reversed(sizes) if size <= most and size < count]
    candidates = enough + ([full] if full <= most else []) + fewer + [size for size in sizes if size > most]
    return next((size for size in candidates if size == full or _agrees(size, full, key, trial)), full)


def _smaller(full: int, multiple: int) -> list[int]:
    return [size for size in SIZES if size < full and size % multiple == 0]


def split(count: int, full: int, key: Hashable, trial: Trial, threads: int = 1, least: int = 2, multiple: int = 1) -> tuple[int, int]:
    """How many models to run at once, and how many in the last group, where some may be idle; other arguments as above.

    Of the sizes that give a full group's bits, those are tried first with which the last thread is done soonest, a group costing as much as
    two models more. Where a full group is two models, a few of an odd number run as three, and twos, if that is done sooner.

    Args:
        threads: that take groups side by side.
        least: models of the smallest group that is worth a thread of its own.
    """
    if full == 2 and multiple == 1 and _in_threes(count, threads) and _agrees(2, 3, key, trial):
        return 3, 3 if count % 3 == 0 else 2
    if full <= 2:
        return full, full
    asked = key, count, full, threads, least, multiple
    return _kept(_split, asked, lambda: _chosen(count, full, key, _with_one_full_group(trial, full), threads, least, multiple))


def _in_threes(count: int, threads: int) -> bool:
    """Whether a few models are done sooner as threes than as twos, of which the last is half idle."""
    if count % 2 == 0 or count % 3 == 1 or not 3 <= count <= _FEW:
        return False
    twos, threes = -(-count // 2), -(-count // 3)
    return threads == 1 or -(-threes // threads) * 3 < -(-twos // threads) * 2


def _chosen(count: int, full: int, key: Hashable, trial: Trial, threads: int, least: int, multiple: int) -> tuple[int, int]:
    """What :func:`split` returns, when it is asked for the first time."""
    sizes = _smaller(full, multiple)

    def rest_of(size: int) -> int:
        """Models of the last group, filled up."""
        rest = count % size if count > size else 0
        return next((other for other in sizes if other >= rest), full) if rest else 0

    def cost(size: int) -> tuple[int, int]:
        groups = -(-count // size)
        if threads > 1 and groups > 1:
            return -(-groups // threads) * (size + _A_GROUP), -size
        whole, last = max(1, count // size), rest_of(size)
        return whole * (size + _A_GROUP) + (last + _A_GROUP if last else 0), -size

    if threads == 1 and count >= full:
        size = full
    else:
        worth = [size for size in (*sizes, full) if threads == 1 or size >= min(least, count) or size == full]
        size = next((size for size in sorted(worth, key=cost) if size == full or _agrees(size, full, key, trial)), full)
    if size >= count or count % size == 0:
        return size, size
    return size, group_size(count % size, size, full, key, trial, multiple)


def _with_one_full_group(trial: Trial, full: int) -> Trial:
    """The same trial, which runs a full group in order once, however many sizes are compared with it."""
    kept: list[Sequence[Tensor]] = []

    def run(size: int, order: Sequence[int]) -> Sequence[Tensor]:
        if order != range(full):
            return trial(size, order)
        if not kept:
            kept.append(trial(size, order))
        return kept[0]

    return run


def agrees_when_shared(size: int, key: Hashable, run: Callable[[int, Sequence[int], bool], Sequence[Tensor]]) -> bool:
    """Whether a group of this size gives the same bits with its products on all threads as on one.

    ``run``: results of random models, ``(size, order, whether products are shared)``; ``key``: all that the bits may depend on.
    """

    def same() -> bool:
        alone, shared = run(size, range(size), False), run(size, range(size), True)
        return all(map(_equal, alone, shared))

    return _kept(_shared, (key, size), same)


def agrees_everywhere(key: Hashable, run: Callable[[int], Sequence[Tensor]], places: int = 16) -> bool:
    """Whether one model's bits do not depend on its place: neighbors begin at every place in 64 bytes, where numbers lie one after another.

    ``run``: results of so many times the same model; ``key``: all that the bits may depend on.
    """

    def same() -> bool:
        return all(torch.equal(result, result[:1].expand_as(result)) for result in run(places))

    return _kept(_everywhere, key, same)


def _agrees(size: int, full: int, key: Hashable, trial: Trial) -> bool:
    """Whether a group of this size gives the bits of a full one, the last models first."""

    def same() -> bool:
        straight = trial(full, range(full))
        turned = trial(size, range(full - 1, -1, -1))
        agree = all(_equal(a, b.flip(0)[:size]) for a, b in zip(turned, straight, strict=True))
        if not agree:
            logger.debug("groups of %d give other bits than groups of %d", size, full)
        return agree

    return _kept(_agree, (key, size, full), same)


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two results are the same, NaN where NaN is."""
    return torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


@contextmanager
def by_itself() -> Iterator[None]:
    """A block that leaves no trace in what surrounds it: no inference mode, in which no graph is recorded and what is made cannot be
    differentiated later; no hooks on saved tensors, by which a checkpoint counts what it will recompute."""
    with torch.inference_mode(False), torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
        yield


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _kept(answers: dict[Hashable, Answer], asked: Hashable, find: Callable[[], Answer]) -> Answer:
    """The answer that is there, or is found now. Where there are too many, all make room; threads may ask at the same time."""
    known = answers.get(asked)
    if known is not None:
        return known
    found = find()
    if len(answers) >= _MOST:
        answers.clear()
    answers[asked] = found
    return found


@lru_cache(maxsize=2)  # trials of one call follow each other; queries of each model's own may be hundreds of megabytes
def random_models(graph: Graph, n: int, own: bool, full: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Weights ``[full, P]``, queries ``[n, *input]`` (``own``: ``[full, n, *input]``) and targets ``[full, n, *out]`` of a trial."""
    generator = torch.Generator().manual_seed(0)
    kind: Any = {"generator": generator, "dtype": dtype, "device": "cpu"}
    rows = []
    variances = {node.argument("running_var", None) for node in graph.nodes}
    for slot in graph.slots:
        values = torch.randn(full, slot.size, **kind) / math.sqrt(max(1, math.prod(slot.shape[1:])))
        values[
            ::2
        ].abs_()  # half of the models: something may take their roots; the others, so that not all activations end at their limits
        rows.append(values.abs_() if f"@w:{slot.name}" in variances else values)
    weights = torch.cat(rows, 1)
    queries = torch.rand(*((full,) if own else ()), n, *graph.input_shape, **kind)
    out = value_shapes(graph)[graph.output][1:]
    return weights, queries, torch.randn(full, n, *out, **kind)
