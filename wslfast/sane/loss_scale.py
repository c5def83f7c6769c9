"""What a loss is divided by: the first value that it had, as in the published code, or a constant."""

from __future__ import annotations

from torch import Tensor, nn


class ScaledLoss(nn.Module):
    """A loss that is divided by the first value it had (the published code's hidden scale), or by a constant.

    Attributes:
        scale: the divisor; None until the first value came. Setting it, for instance from a checkpoint, makes a run resumable.
    """

    def __init__(self, by_first_value: bool) -> None:
        super().__init__()
        self.scale: float | None = None if by_first_value else 1.0

    def scaled(self, value: Tensor) -> Tensor:
        """``value`` over the scale, which it becomes if it is the first (one ``.item()``)."""
        if self.scale is None:
            self.scale = float(value.detach())
        return value / self.scale
