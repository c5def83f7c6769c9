"""Networks with runs of layers, and what is expected of their segments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wslfast.architecture import Architecture
from wslfast.kernels.graph import Graph
from wslfast.kernels.reference import value_shapes
from wslfast.kernels.stacked.segments import Segment, segments


class Calls(nn.Module):
    """A module that calls its parts as the function says."""

    def __init__(self, forward: Callable[..., Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.call = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, x)


def _residual(self: nn.Module, x: Tensor) -> Tensor:
    h = F.relu(self.a(x))
    return self.c(F.relu(self.b(h)) + h).mean((2, 3))


def _two_heads(self: nn.Module, x: Tensor) -> Tensor:
    h = self.a(x)
    return torch.cat((self.b(h).flatten(1), self.c(h).flatten(1)), 1)


def _output_inside(self: nn.Module, x: Tensor) -> Tensor:
    h = self.a(x)
    self.b(h)  # nobody reads it
    return h.flatten(1)


conv, norm = nn.Conv2d, nn.BatchNorm2d
FLAT = (nn.Flatten(), nn.Linear(4, 3))  # behind a pooling to one pixel


@dataclass(frozen=True)
class Case:
    """Attributes:
    make: the network.
    shape: of a query.
    runs: operations that each segment takes in.
    kinds: records of the layers that they come down to.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    runs: tuple[int, ...]
    kinds: tuple[str, ...]


def several(*parts: nn.Module) -> nn.Module:
    return nn.Sequential(*parts)


CASES = {
    "conv": Case(lambda: several(conv(2, 3, 3, 2, 1)), (2, 7, 8), (1,), ("Conv2d",)),
    "conv to the end": Case(
        lambda: several(conv(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2), conv(4, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3), nn.GELU(), nn.Linear(3, 2)), (2, 8, 8), (9,),
        ("Conv2d", "Activation", "Pool2d", "Conv2d", "Activation", "Flatten", "Linear", "Activation", "Linear"),
    ),
    "norm behind": Case(lambda: several(conv(2, 3, 3), norm(3), nn.ReLU()), (2, 6, 7), (3,), ("Conv2d", "Activation")),
    "norm behind, no bias": Case(lambda: several(conv(2, 3, 3, bias=False), norm(3, eps=0.1), nn.ReLU()), (2, 6, 7), (3,), ("Conv2d", "Activation")),
    "norm behind, no affine": Case(lambda: several(conv(2, 3, 3), norm(3, affine=False), nn.SiLU()), (2, 6, 7), (3,), ("Conv2d", "Activation")),
    "norm ahead": Case(lambda: several(conv(2, 3, 3), nn.ReLU(), norm(3), conv(3, 4, 2)), (2, 6, 7), (4,), ("Conv2d", "Activation", "Conv2d")),
    "norm ahead of groups": Case(lambda: several(conv(2, 4, 3), nn.ELU(), norm(4), conv(4, 6, 2, groups=2, bias=False)), (2, 6, 7), (4,), ("Conv2d", "Activation", "Conv2d")),
    "norm ahead, no affine": Case(lambda: several(conv(2, 3, 3), nn.ReLU(), norm(3, affine=False), conv(3, 4, 2)), (2, 6, 7), (4,), ("Conv2d", "Activation", "Conv2d")),
    "norm ahead of a padded one": Case(lambda: several(conv(2, 3, 3), nn.ReLU(), norm(3), conv(3, 4, 3, padding=1)), (2, 6, 7), (4,), ("Conv2d", "Activation", "Affine", "Conv2d")),
    "norm ahead of a pool": Case(lambda: several(conv(2, 3, 3), nn.ReLU(), norm(3), nn.MaxPool2d(2), conv(3, 4, 2)), (2, 9, 8), (5,), ("Conv2d", "Activation", "Affine", "Pool2d", "Conv2d")),
    "norm ahead of an average": Case(lambda: several(conv(2, 3, 3), nn.ReLU(), norm(3), nn.AvgPool2d(2), conv(3, 4, 2)), (2, 9, 8), (5,), ("Conv2d", "Activation", "Pool2d", "Conv2d")),
    "norm ahead of a padded average": Case(
        lambda: several(conv(2, 3, 3), nn.ReLU(), norm(3), nn.AvgPool2d(2, padding=1), conv(3, 4, 2)), (2, 9, 8), (5,), ("Conv2d", "Activation", "Affine", "Pool2d", "Conv2d")
    ),
    "norm ahead of linear": Case(
        lambda: several(conv(2, 4, 3), nn.ReLU(), norm(4), nn.Flatten(), nn.Dropout(), nn.Linear(24, 3, bias=False)), (2, 4, 5), (6,), ("Conv2d", "Activation", "Flatten", "Linear")
    ),
    "norms on both sides": Case(lambda: several(conv(2, 3, 3), norm(3), nn.Tanh(), norm(3), conv(3, 4, 2), norm(4)), (2, 6, 7), (6,), ("Conv2d", "Activation", "Conv2d")),
    "norm of features": Case(
        lambda: several(conv(2, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.BatchNorm1d(5), nn.Linear(5, 2)), (2, 6, 5), (8,),
        ("Conv2d", "Pool2d", "Flatten", "Linear", "Activation", "Linear"),
    ),
    "norm at the end": Case(lambda: several(conv(2, 3, 3), nn.ReLU(), norm(3)), (2, 6, 7), (3,), ("Conv2d", "Activation", "Affine")),
    "one dimension": Case(
        lambda: several(nn.Conv1d(2, 4, 5, 2, 1), nn.BatchNorm1d(4), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(4, 3, 3, padding=1, dilation=1), nn.LeakyReLU(0.1)), (2, 21), (6,),
        ("Conv2d", "Activation", "Pool2d", "Conv2d", "Activation"),
    ),
    "one dimension to the end": Case(
        lambda: several(nn.Conv1d(1, 4, 3), nn.ReLU(), nn.AvgPool1d(2, 1), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 3)), (1, 12), (6,),
        ("Conv2d", "Activation", "Pool2d", "Pool2d", "Flatten", "Linear"),
    ),
    "first in groups": Case(lambda: several(conv(4, 4, 3, groups=2), nn.ReLU(), conv(4, 4, 3, groups=4)), (4, 7, 7), (3,), ("Conv2d", "Activation", "Conv2d")),
    "one channel": Case(lambda: several(conv(1, 3, 3), nn.ReLU(), conv(3, 1, 2), nn.Sigmoid(), conv(1, 2, 1)), (1, 7, 7), (5,), ("Conv2d", "Activation", "Conv2d", "Activation", "Conv2d")),
    "padded pools": Case(
        lambda: several(conv(2, 3, 3), nn.MaxPool2d(3, 2, 1), nn.SiLU(), conv(3, 4, 2), nn.AvgPool2d(2, 1, 1), nn.ReLU()), (2, 10, 9), (6,), ("Conv2d", "Pool2d", "Activation", "Conv2d", "Pool2d", "Activation")
    ),
    "ceiling ends it": Case(lambda: several(conv(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True), conv(3, 2, 2)), (2, 9, 9), (2, 1), ("Conv2d", "Activation", "Conv2d")),
    "mean over pixels": Case(lambda: Calls(lambda m, x: m.fc(F.relu(m.a(x)).mean((2, 3))), a=conv(2, 4, 3), fc=nn.Linear(4, 3)), (2, 6, 5), (4,), ("Conv2d", "Activation", "Pool2d", "Flatten", "Linear")),
    "mean kept": Case(lambda: Calls(lambda m, x: m.b(m.a(x).mean((-2, -1), keepdim=True)), a=conv(2, 4, 3), b=conv(4, 3, 1)), (2, 6, 5), (3,), ("Conv2d", "Pool2d", "Conv2d")),
    "mean over channels ends it": Case(lambda: Calls(lambda m, x: m.a(x).mean(1), a=conv(2, 4, 3)), (2, 6, 5), (1,), ("Conv2d",)),
    "squeezed": Case(lambda: Calls(lambda m, x: m.fc(F.adaptive_avg_pool2d(m.a(x), 1).squeeze(-1).squeeze(-1)), a=conv(2, 4, 3), fc=nn.Linear(4, 3)), (2, 6, 5), (5,), ("Conv2d", "Pool2d", "Flatten", "Linear")),
    "squeezed at once": Case(lambda: Calls(lambda m, x: m.fc(F.adaptive_avg_pool2d(m.a(x), 1).squeeze((2, 3))), a=conv(2, 4, 3), fc=nn.Linear(4, 3)), (2, 6, 5), (4,), ("Conv2d", "Pool2d", "Flatten", "Linear")),
    "uneven adaptive pool ends it": Case(lambda: several(conv(2, 4, 3), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)), (2, 7, 5), (1,), ("Conv2d",)),
    "another norm ends it": Case(lambda: several(conv(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), conv(4, 2, 3)), (2, 8, 8), (1, 1), ("Conv2d", "Conv2d")),
    "residual": Case(lambda: Calls(_residual, a=conv(2, 3, 3), b=conv(3, 3, 3, padding=1), c=conv(3, 4, 2)), (2, 8, 8), (2, 2, 2), ("Conv2d", "Activation", "Conv2d", "Activation", "Conv2d", "Pool2d", "Flatten")),
    "two readers": Case(lambda: Calls(_two_heads, a=conv(2, 3, 3), b=conv(3, 2, 2), c=conv(3, 1, 3)), (2, 7, 6), (1, 2, 2), ("Conv2d", "Conv2d", "Flatten", "Conv2d", "Flatten")),
    "same, uneven": Case(lambda: several(conv(2, 3, 2, padding="same"), nn.ReLU(), conv(3, 2, 3, padding="same", dilation=2)), (2, 7, 6), (1,), ("Conv2d",)),
    "unread output": Case(lambda: Calls(_output_inside, a=conv(2, 3, 3), b=conv(3, 2, 2)), (2, 7, 6), (2,), ("Conv2d", "Flatten")),
    "behind something else": Case(
        lambda: Calls(lambda m, x: m.b(F.relu(m.a(m.fc(x).unflatten(1, (2, 5, 5))))), fc=nn.Linear(6, 50), a=conv(2, 3, 3), b=conv(3, 2, 2)), (6,), (3,), ("Conv2d", "Activation", "Conv2d")
    ),
    "tied convolutions": Case(lambda: Calls(lambda m, x: m.a(F.tanh(m.a(x))), a=conv(2, 2, 3, padding=1)), (2, 6, 5), (3,), ("Conv2d", "Activation", "Conv2d")),
}  # fmt: skip


def found(graph: Graph) -> list[Segment]:
    return segments(graph, value_shapes(graph), graph.readers())


def traced(case: Case) -> tuple[nn.Module, Architecture, Graph]:
    torch.manual_seed(1)
    module = case.make().eval()
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):  # numbers of a norm that has seen something
                part.running_mean.uniform_(-1, 1)
                part.running_var.uniform_(0.3, 2)
                if part.affine:
                    part.weight.uniform_(-1.5, 1.5)
                    part.bias.uniform_(-1, 1)
    arch = Architecture.from_module(module, case.shape)
    assert arch.graph is not None, arch.reason
    return module, arch, arch.graph
