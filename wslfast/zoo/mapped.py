"""A zoo that stays on disk: rows are read from mapped shards, so a zoo larger than memory trains like a small one.

What is in memory is the property table and at most ``WINDOW`` mapped shards, whose pages the system may take back. A shuffle that
jumped between all shards would read one from disk at every row, so rows are drawn shard-aware: the shards in random order, a
window of them at a time, all rows of a window mixed. A zoo of no more than one window is mixed completely.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import safetensors
import torch
from torch import Tensor

from ..architecture import Architecture
from ..errors import WslfastError, describe, require
from ..files import sha256_of
from ..population import Population
from .manifest import SPLITS
from .reading import in_shards, parts_of, read_manifest, selection
from .shards import check_digest, check_weights, regular_file, rows_of

WINDOW = 8  # shards: 512 MiB of those that save_zoo writes


class MappedZoo:
    """One split of a stored zoo, its weights on disk.

    Args:
        path: a folder written by :func:`wslfast.zoo.save_zoo`.
        split: None for every row, or "train", "val", "test".
        architecture: of a zoo of several architectures, which one (its label); else what the models are, for a zoo whose architecture
            cannot be rebuilt from its manifest.
        verify: check a shard's SHA-256 when it is first opened.
        skip_bad: leave out shards that are missing or damaged, as :func:`wslfast.load_zoo` does; reads all of them now.

    Attributes:
        architecture, properties: as a :class:`Population`'s.

    Raises:
        WslfastError: for a manifest or a shard that is missing, damaged or not what the manifest says.
    """

    architecture: Architecture
    properties: Mapping[str, tuple[Any, ...]]

    def __init__(
        self,
        path: str | Path,
        split: str | None = None,
        *,
        architecture: Architecture | str | None = None,
        verify: bool = True,
        skip_bad: bool = False,
    ) -> None:
        require(split is None or split in SPLITS, f"split: expected None or one of {SPLITS}, got {split!r}")
        self._folder, self._verify = Path(path), verify
        manifest, self.architecture, chosen, properties = selection(
            self._folder, read_manifest(path), split, architecture, verify, skip_bad
        )
        self.properties = MappingProxyType(properties)
        self._shards, self._shapes = manifest.shards, manifest.shapes
        numbers, places = in_shards(manifest, chosen)
        self._shard_of = torch.repeat_interleave(torch.arange(len(numbers)), torch.tensor([len(own) for own in numbers]))
        self._row_in = torch.cat(places)
        self._open: OrderedDict[int, Tensor] = OrderedDict()
        self._sound: set[int] = set(range(len(manifest.shards))) if skip_bad else set()

    def __len__(self) -> int:
        return len(self._row_in)

    def __repr__(self) -> str:
        return f"MappedZoo({str(self._folder)!r}, {self.architecture.name!r}, k={len(self)}, shards={len(self._shards)})"

    @property
    def num_bytes(self) -> int:
        """What :meth:`load` takes."""
        return 4 * len(self) * self.architecture.num_weights

    def rows(self, index: Tensor) -> Tensor:
        """Weights ``[b, P]`` (a copy, on the CPU) of the rows at ``index [b]``."""
        index = index.cpu()
        require(
            index.ndim == 1 and index.dtype == torch.int64 and bool(((index >= 0) & (index < len(self))).all()),
            f"index: expected int64 [b] from 0 to {len(self) - 1}, got {describe(index)}",
        )
        out = torch.empty(len(index), self.architecture.num_weights, dtype=torch.float32)
        shards = self._shard_of[index]
        for number in shards.unique().tolist():
            here = (shards == number).nonzero().flatten()
            out[here] = rows_of(self._mapped(number), self._row_in[index[here]], self.architecture.num_weights)
        return out

    def shuffle(self, generator: torch.Generator) -> Tensor:
        """A permutation of the rows that visits each shard's neighbourhood once: ``[len]``, int64."""
        if len(self._shards) <= WINDOW:
            return torch.randperm(len(self), generator=generator)
        order = torch.randperm(len(self._shards), generator=generator)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order))
        window_of = place[self._shard_of] // WINDOW
        mixed = torch.randperm(len(self), generator=generator)
        return mixed[window_of[mixed].argsort(stable=True)]

    def load(self, index: Tensor | None = None) -> Population:
        """The rows at ``index`` (default: all) in memory."""
        if index is None:
            return Population(self.architecture, self.rows(torch.arange(len(self))), self.properties)
        picked = index.tolist()
        return Population(self.architecture, self.rows(index), {n: tuple(c[i] for i in picked) for n, c in self.properties.items()})

    def _mapped(self, number: int) -> Tensor:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        weights = self._map(number)
        while len(self._open) >= WINDOW:
            self._open.popitem(last=False)  # unmapped with its last reference
        self._open[number] = weights
        return weights

    def _map(self, number: int) -> Tensor:
        shard = self._shards[number]
        where = self._folder / shard.file
        file = regular_file(self._folder, shard.file)
        try:
            if self._verify and number not in self._sound:
                check_digest(sha256_of(file), shard, where)
                self._sound.add(number)
            with safetensors.safe_open(file, framework="pt") as opened:
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
        except WslfastError:
            raise
        except OSError as error:
            raise WslfastError(f"{where}: cannot be read: {error.strerror or error}") from error
        except Exception as error:  # whatever the parser makes of bytes that nobody wrote
            raise WslfastError(f"{where}: not a safetensors file: {error}") from error
        return check_weights(tensors, self._shapes[number], str(where))


def mapped_parts(path: str | Path, split: str | None = None, *, skip_bad: bool = False) -> dict[str, MappedZoo]:
    """A stored zoo by architecture, as :func:`wslfast.zoo.load_parts`, its weights on disk."""
    return parts_of(path, split, lambda label: MappedZoo(path, split, architecture=label, skip_bad=skip_bad))
