"""Files of ``torch.save`` that hold tensors and plain values alone: training states, ours and the published ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..errors import WslfastError, describe, require
from .inert import InertFile, StoredTensor, exactly

_DEEPEST = 64  # containers in containers
_SCALARS = (bool, int, float, complex, str, bytes, type(None))


def load_plain(path: str | Path, device: torch.device | str = "cpu", check: Callable[[BinaryIO], None] | None = None) -> Any:
    """What the file holds: dicts, lists, tuples, sets, numbers, strings, and tensors on the device that share what they shared.

    Nothing of the file is run, its checksums are right, and no more memory is taken than it has bytes.

    Args:
        path: a file of ``torch.save``.
        device: where the tensors go.
        check: as :class:`InertFile`'s.

    Raises:
        WslfastError: for anything else in it, for what contains itself or would be larger than the file when written out.
    """
    with InertFile(path, check) as file:
        try:
            return _Reader(file.size, device).value(file.root)[0]
        except (TypeError, ValueError, RuntimeError) as error:  # a WslfastError; an unhashable key; a shape beyond torch's arithmetic
            raise WslfastError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None


class _Reader:
    def __init__(self, size: int, device: torch.device | str) -> None:
        self._left, self._size, self._device = size, size, device
        self._storages: dict[str, bytearray] = {}
        self._done: dict[int, tuple[Any, int]] = {}

    def value(self, what: Any, depth: int = 0) -> tuple[Any, int]:
        """The value, and how many it is when written out: a list twice in a list, sixty times over, is no state."""
        require(depth <= _DEEPEST, "nested too deeply")
        if isinstance(what, _SCALARS):
            return what, 1
        if id(what) not in self._done:
            if isinstance(what, StoredTensor):
                self._done[id(what)] = self._tensor(what), 1
            else:
                self._done[id(what)] = self._container(what, depth + 1)
        return self._done[id(what)]

    def _container(self, what: Any, depth: int) -> tuple[Any, int]:
        require(isinstance(what, (dict, list, tuple, set)), f"expected tensors and plain values, got {describe(what)}")
        inner = [self.value(part, depth) for part in ((*what, *what.values()) if isinstance(what, dict) else what)]
        parts, count = [part for part, _ in inner], 1 + sum(number for _, number in inner)
        require(count <= self._size, "it holds more values than the file has bytes")
        if isinstance(what, dict):
            return dict(zip(parts[: len(what)], parts[len(what) :], strict=True)), count
        return type(what)(parts), count

    def _tensor(self, stored: StoredTensor) -> Tensor:
        key = stored.storage.key
        if key not in self._storages:
            self._left -= stored.num_bytes
            require(self._left >= 0, "its storages are larger than the file")
            self._storages[key] = stored.read(stored.storage)
        return stored.within(lambda storage: exactly(self._storages[key], storage)).to(self._device)
