"""What a form knows of its node: where the axis of models is in each tensor, and how many axes each tensor has."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any

from ..operations import Operation

Values = dict[str, Any]


class Layout(Enum):
    """Where the axis of models is in a value."""

    SHARED = 0
    MODELS = 1
    CHANNELS = 2


@dataclass(frozen=True)
class Call:
    """What is known of a node when the program is made.

    Attributes:
        operation: of the table.
        layouts: of its tensors, by argument name; a tuple where the argument is a list of tensors.
        ranks: axes of its tensors for one model, likewise.
        rank: axes of its output for one model.
        layout: of its output.
        aligned: whether operands of products are filled up to 16 bytes a row, so that no model's bits depend on its place.
    """

    operation: Operation
    layouts: Mapping[str, Any]
    ranks: Mapping[str, Any]
    rank: int
    layout: Layout
    aligned: bool

    @cached_property
    def spatial(self) -> int:
        """Number of spatial axes of the images that the operation reads; 0 where its name does not say it."""
        return spatial(self.operation)

    def stacked(self, name: str) -> bool:
        """Whether a tensor argument has an axis of models in front."""
        return self.layouts.get(name) is Layout.MODELS


def spatial(operation: Operation) -> int:
    """Number of spatial axes of the images that an operation reads, by the operation's name; 0 where the name does not say it."""
    found = re.search(r"(\d)d", operation.name)
    return int(found[1]) if found else 2 if operation.name in ("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "im2col") else 0
