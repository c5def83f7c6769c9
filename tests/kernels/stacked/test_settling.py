"""Where the models of a value are: few moves between layouts, and none that would mix models."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wslfast.architecture import Architecture
from wslfast.kernels.stacked.calls import Layout
from wslfast.kernels.stacked.compiler import _Compiler


class Images(nn.Module):
    """Two convolutions with a function between them, which has a third for itself."""

    def __init__(self, run: Callable[[Tensor, nn.Module], Tensor]) -> None:
        super().__init__()
        self.first, self.own, self.last, self.run = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 3, 1), run

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.run(self.first(x), self.own))


def _by_columns(x: Tensor) -> Tensor:
    """Images that come with models in front: among the channels nobody transposes."""
    return x.transpose(2, 3).contiguous().cumsum(2)


RUNS: dict[str, tuple[Callable[[Tensor, nn.Module], Tensor], str, Layout]] = {
    "a sum of two kinds that a convolution reads": (lambda x, own: F.gelu(_by_columns(x) + own(x)), "add.Tensor", Layout.CHANNELS),
    "a sum that is read twice": (
        lambda x, own: (lambda y: y * y.mean((1, 2, 3), True))(_by_columns(x) + own(x)),
        "add.Tensor",
        Layout.MODELS,
    ),
    "a gate": (lambda x, own: x * own(x.mean((2, 3), keepdim=True)).sigmoid(), "mul.Tensor", Layout.CHANNELS),
    "a power by a gate": (lambda x, own: x.abs() ** own(x.mean((2, 3), keepdim=True)).sigmoid(), "pow.Tensor_Tensor", Layout.MODELS),
    "complex numbers": (lambda x, own: torch.fft.fft2(own(x)).real, "fft_fft2", Layout.MODELS),
}


@pytest.mark.parametrize("name", RUNS)
def test_layouts(name: str) -> None:
    run, operation, layout = RUNS[name]
    graph = Architecture.from_module(Images(run), (2, 4, 4)).graph
    assert graph is not None
    compiler = _Compiler(graph, False, True, False)
    compiler.program()
    found = [compiler.layout[f"@{i}"] for i, node in enumerate(graph.nodes) if node.operation == operation]
    assert found[0] is layout
