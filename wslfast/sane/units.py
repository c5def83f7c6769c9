"""What a loss is divided by."""

from __future__ import annotations

from torch import Tensor


class FirstValue:
    """Divides by the first value it saw (the published code's hidden scale, one ``.item()`` at the first call), or by a constant.

    Attributes:
        scale: the divisor; None until the first value came. Setting it, for instance from a checkpoint, makes a run resumable.
    """

    def __init__(self, first: bool) -> None:
        self.scale: float | None = None if first else 1.0

    def __call__(self, value: Tensor) -> Tensor:
        if self.scale is None:
            self.scale = float(value.detach())
        return value / self.scale
