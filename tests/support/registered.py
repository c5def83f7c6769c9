"""A table of networks that decorators fill: name, how to make one, shape of a query."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

Make = Callable[[], nn.Module]


def registry() -> tuple[dict[str, tuple[Make, tuple[int, ...]]], Callable[..., Callable[[Make], Make]]]:
    """An empty table, and the decorator ``takes(*shape)`` that enters a class or a function under its name."""
    table: dict[str, tuple[Make, tuple[int, ...]]] = {}

    def takes(*shape: int) -> Callable[[Make], Make]:
        def keep(make: Make) -> Make:
            table[make.__name__] = make, shape
            return make

        return keep

    return table, takes
