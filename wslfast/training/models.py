"""The training models as a step asks for them: in memory, or read from their mapped shards at every step, with the same rows."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Union

import torch
from torch import Tensor

from ..population import Population
from ..queries.pool import sent
from ..zoo import MappedZoo

_LOOKED_AT = 16  # rows that tell one zoo from another
SAMPLE = 4096  # rows that stand for a larger zoo where a statistic of it is wanted: the linear start, the normalisers


class TrainingModels:
    """Rows of weights on the trainer's device.

    Args:
        source: a population, or a zoo on disk.
        device: where rows go.
        limit: a zoo of at most so many bytes is loaded; a larger one stays on disk. Which of the two changes no result.
    """

    def __init__(self, source: Union[Population, MappedZoo], device: torch.device, limit: float) -> None:
        self.source, self.device = source, device
        self.architecture = source.architecture
        self._weights: Tensor | None = None
        if isinstance(source, Population):
            self._weights = source.weights.to(device)
        elif source.num_bytes <= limit:
            self._weights = source.rows(torch.arange(len(source))).to(device)

    def __len__(self) -> int:
        return len(self.source)

    @property
    def resident(self) -> bool:
        """Whether all weights are in memory."""
        return self._weights is not None

    def rows(self, index: Tensor) -> Tensor:
        """Weights ``[b, P]`` of the models at ``index [b]`` (on the CPU)."""
        if self._weights is not None:
            return self._weights[sent(index, self.device)]
        assert isinstance(self.source, MappedZoo)
        return sent(self.source.rows(index), self.device)

    def fingerprint(self) -> int:
        """A number that another zoo of the same size has not: a checksum of rows here and there, so that a large zoo is not read whole."""
        index = torch.linspace(0, len(self) - 1, min(len(self), _LOOKED_AT)).long()
        return zlib.crc32(self.rows(index).cpu().contiguous().view(torch.uint8).numpy().tobytes())

    def shuffle(self, generator: torch.Generator) -> Tensor:
        """The order of one epoch, int64 ``[len]`` on the CPU; shard-aware for zoos of many shards, wherever they are kept."""
        if isinstance(self.source, MappedZoo):
            return self.source.shuffle(generator)
        return torch.randperm(len(self), generator=generator)

    def sample(self, seed: int) -> Population:
        """All models, or a random ``SAMPLE`` of more than that, in memory on the device."""
        if len(self) <= SAMPLE:
            whole = self.source if isinstance(self.source, Population) else self.source.load()
            return whole.to(self.device)
        index = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:SAMPLE].sort().values
        some = self.source[index] if isinstance(self.source, Population) else self.source.load(index)
        return some.to(self.device)

    def blocks(self, size: int, rows: range | None = None) -> Iterator[Tensor]:
        """The rows numbered ``rows`` (default: all) in order, ``size`` at a time."""
        wanted = torch.arange(len(self)) if rows is None else torch.arange(rows.start, rows.stop)
        return (self.rows(wanted[start : start + size]) for start in range(0, len(wanted), size))
