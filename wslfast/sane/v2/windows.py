"""Which rows of a batch are whole networks: windows of ``sane`` 2.x put together by the positions of their tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import WslfastError


class Model(NamedTuple):
    """One network of a batch: where its tokens lie in the flat batch ``[B T]``, in order; None: the first ``tokens`` of ``row``."""

    row: int
    tokens: int
    places: Tensor | None


def models_of(mask: Tensor, positions: Tensor | None) -> list[Model]:
    """The networks of a batch of windows.

    A row that begins with token 0 begins a network; a row that goes on where the one before it ended belongs to it (where windows
    overlap, the first of two copies counts). Rows of padding alone are passed over. Nothing in a batch says whose window a row is: the
    caller keeps those of a network together.

    Args:
        mask: ``[B, T, D]`` bool, False on padding.
        positions: ``[B, T, 3]``, the first column counting a network's tokens; None: rows are whole networks in order.

    Raises:
        WslfastError: for a window whose network is not complete.
    """
    b, t, _ = mask.shape
    real = mask.any(-1).cpu()
    counts = real.sum(1)
    prefix = bool((real == (torch.arange(t) < counts.unsqueeze(1))).all())
    if positions is None:
        if not prefix:
            raise WslfastError("p: positions are needed where padding lies between tokens")
        return [Model(row, int(count), None) for row, count in enumerate(counts) if count]
    number = positions[..., 0].cpu().long()
    if prefix and bool(((number == torch.arange(t)) | ~real).all()):
        return [Model(row, count, None) for row, count in enumerate(counts.tolist()) if count]
    networks: list[tuple[int, list[Tensor], int]] = []  # first row, places, next token
    for row in range(b):
        where = real[row].nonzero().flatten()
        if len(where) == 0:
            continue
        tokens = number[row, where]
        first, last = int(tokens[0]), int(tokens[-1])
        if bool((tokens != torch.arange(first, first + len(tokens))).any()):
            raise WslfastError(f"p: row {row}: expected consecutive tokens, got {tokens[:8].tolist()}...")
        if first == 0:
            networks.append((row, [row * t + where], last + 1))
            continue
        begun = networks[-1] if networks else None
        if begun is None or not first <= begun[2] <= last + 1:
            raise WslfastError(_partial(row, first, last, begun))
        begun[1].append((row * t + where)[begun[2] - first :])
        networks[-1] = (begun[0], begun[1], last + 1)
    return [Model(row, stop, torch.cat(places)) for row, places, stop in networks]


def _partial(row: int, first: int, last: int, begun: tuple[int, list[Tensor], int] | None) -> str:
    before = "the batch begins with it" if begun is None else f"the window before it ends with token {begun[2] - 1}"
    return (
        f"x: row {row} is a window of tokens {first} to {last} of a network, and {before}. Behavior is that of whole networks: set "
        "window_size to all their tokens (num_windows_per_model: 1), or pass the windows of each network one after another, unshuffled"
    )
