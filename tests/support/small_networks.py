"""Two small networks of odd sizes: one that is planned, one that is not a chain."""

from __future__ import annotations

from torch import Tensor, nn

from wslfast.architecture import Architecture
from wslfast.kernels.layers import Activation, Conv2d, Flatten, Linear, Pool2d

SMALL = Architecture.from_layers(
    [
        Conv2d("a", 2, 5, (3, 3), padding=(1, 0)), Activation("b", "silu"), Pool2d("c", "avg"), Conv2d("d", 5, 3, (2, 2), bias=False),
        Activation("e", "tanh"), Flatten("f"), Linear("g", 12, 4), Activation("h", "gelu"), Linear("i", 4, 3),
    ],
    (2, 7, 9), "small",
)  # fmt: skip


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Linear(18, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc((self.bn(self.conv(x)).tanh() + x).flatten(1))


OPAQUE = Architecture.from_module(Residual(), (2, 3, 3), "residual")
