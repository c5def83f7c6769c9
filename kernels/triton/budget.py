"""What a call holds in memory, and the mode that is chosen from it. Pure functions of shapes and of the caller's budget: neither the
number of models nor what happens to be free changes a model's bits.
"""

from __future__ import annotations

from functools import lru_cache

from ..layers import Unplannable
from .configurations import element_size, splits
from .network_layout import network
from .stages import Schedule, blocks

OFFSETS = 2**31  # numbers of one model that the kernels' 32-bit offsets reach
MEMORY = 2**33  # bytes of activations in flight unless the caller says otherwise: no device query, and graphs can capture
# (model, query) pairs that fill a GPU, the published batch's 128 models and 256 queries: with more, everything takes longer in proportion.
# An estimate; no GPU has been asked.
FULL_PAIRS = 2**15
FEW_MODELS = 64  # a chunk with fewer models, that does not fill a GPU with its pairs either, leaves one idle


@lru_cache(maxsize=256)
def query_bytes(schedule: Schedule, precision: str, gradient: bool) -> int:
    """Bytes of activations that one (model, query) pair holds while its chunk is in flight, layer by layer."""
    size = element_size(precision)
    total = 0
    for stage in schedule.stages:
        total += stage.OUTPUTS * (4 if stage.LAST else size)
        if gradient:
            total += stage.CODES * (stage.POOL == "max") + stage.CODES * size * stage.LAST
            total += stage.SLOPES * size * (stage.SLOPE in ("pooled", "window"))
    return total


def model_bytes(schedule: Schedule, n: int, precision: str, gradient: bool) -> int:
    """Bytes that one model holds while its chunk is in flight, layer by layer."""
    each = n * query_bytes(schedule, precision, gradient) + schedule.packed * element_size(precision)
    if gradient:
        each += 4 * sum(splits(stage, n) * stage.GSIZE for stage in schedule.stages)
    return each


def models_per_chunk(schedule: Schedule, k: int, n: int, precision: str, gradient: bool, memory: int) -> int:
    """Models that are run together, layer by layer, so that what they need stays below ``memory`` bytes."""
    return rounded_chunk(k, memory // model_bytes(schedule, n, precision, gradient))


def rounded_chunk(k: int, fitting: int) -> int:
    """Models of one chunk where ``fitting`` fit: all, or a multiple of 8, so that every chunk's numbers begin at a multiple of 16
    bytes, as the first one's do."""
    return max(1, k if k <= fitting else fitting // 8 * 8 or fitting)


def choose_mode(schedule: Schedule, n: int, precision: str, gradient: bool, memory: int) -> tuple[str, str]:
    """(``layers`` | ``network``, why) of a call that names no mode."""
    try:
        network(schedule, precision, gradient)
    except Unplannable as error:
        return "layers", str(error)
    if not gradient:
        return "network", "forward alone: what lies between two layers need not leave the chip"
    models = memory // model_bytes(schedule, n, precision, gradient)
    held = f"{memory >> 20} MiB hold the activations of {models} models of {n} queries at a time"
    if models < FEW_MODELS and models * n < FULL_PAIRS:
        return "network", f"{held}, too few for a launch a layer"
    return "layers", held


def too_many(schedule: Schedule, n: int, sums: bool = True) -> str | None:
    """None if the kernels can take n queries of a model at once, else why not; ``sums``: with the partial sums of its gradient, as all
    calls but those of one mode have them."""
    numbers = n * _widest(schedule)
    if numbers < OFFSETS and sums:
        partial = sum(splits(stage, n) * blocks(stage.GSIZE, 16) * 16 for stage in schedule.stages)
        if partial >= OFFSETS:
            return f"{n} queries are {partial} partial sums a model; the kernels address fewer than {OFFSETS}"
    if numbers < OFFSETS:
        return None
    return f"{n} queries are {numbers} numbers a model; the kernels address fewer than {OFFSETS}: ask fewer at a time"


@lru_cache(maxsize=256)
def _widest(schedule: Schedule) -> int:
    """Numbers a query of the largest block that is addressed with 32 bits."""
    return max(max(s.INPUTS, s.CODES, s.OUTPUTS, s.SLOPES, s.HB * s.WB * s.PS**2 * s.C) for s in schedule.stages)
