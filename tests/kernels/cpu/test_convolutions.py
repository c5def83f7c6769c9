"""Convolutions with a model a group: in bfloat16 no group sees another, and numbers are those of a float64 convolution."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from wslfast import Architecture, engine
from wslfast.kernels import stacked
from wslfast.kernels.cpu.convolutions import convolution, convolution_backward, crosses
from wslfast.testing import relative_error

MODELS, BROKEN = 6, 3
GEOMETRY = {"plain": (3, 9, 1, 0), "padded": (3, 9, 1, 1), "pixels": (1, 6, 1, 0), "strided": (2, 6, 2, 0)}  # kernel, size, stride, padding


def operands(inside: int, outside: int, geometry: str, transposed: bool, broken: float) -> tuple[Tensor, Tensor, Tensor, tuple]:
    """Images, kernels and the output's gradient in bfloat16, channels-last, one model's all ``broken``; and the arguments behind them."""
    kernel, size, stride, padding = GEOMETRY[geometry]
    generator = torch.Generator().manual_seed(0)
    last = {"memory_format": torch.channels_last, "dtype": torch.bfloat16}
    channels = (inside, outside) if transposed else (outside, inside)
    x = torch.randn(4, MODELS * inside, size, size, generator=generator)
    weight = torch.randn(MODELS * channels[0], channels[1], kernel, kernel, generator=generator)
    x.unflatten(1, (MODELS, -1))[:, BROKEN] = broken
    weight.unflatten(0, (MODELS, -1))[BROKEN] = broken
    x, weight = x.to(**last), weight.to(**last)
    rest = (stride,) * 2, (padding,) * 2, (1, 1), transposed, (0, 0), MODELS
    g = torch.randn(convolution(x, weight, None, *rest).shape, generator=generator)
    g.unflatten(1, (MODELS, -1))[:, BROKEN] = broken
    return x, weight, g.to(**last), rest


def others(x: Tensor, axis: int) -> Tensor:
    """What belongs to the models that are whole."""
    models = x.unflatten(axis, (MODELS, -1)).movedim(axis, 0)
    return torch.cat((models[:BROKEN], models[BROKEN + 1 :])).double()


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize("geometry", GEOMETRY)
@pytest.mark.parametrize("channels", [(1, 1), (1, 4), (3, 2), (2, 3), (5, 15), (6, 7), (15, 8), (8, 16)])
@pytest.mark.parametrize("transposed", [False, True])
def test_no_group_sees_another(channels: tuple[int, int], geometry: str, transposed: bool, broken: float) -> None:
    x, weight, g, rest = operands(*channels, geometry, transposed, broken)
    found = convolution(x, weight, None, *rest), *convolution_backward(g, x, weight, None, *rest, (True, True, False))[:2]
    exact = [t.double().nan_to_num(0, 0, 0).requires_grad_() for t in (x, weight)]
    y = torch.ops.aten.convolution(*exact, None, *rest)
    expected = y, *torch.autograd.grad(y, exact, g.double().nan_to_num(0, 0, 0))
    for axis, mine, true in zip((1, 1, 0), found, expected, strict=True):
        assert mine is not None
        assert mine.dtype == torch.bfloat16
        assert others(mine, axis).isfinite().all()
        assert relative_error(others(mine, axis), others(true, axis)) < 1e-2


def test_only_what_is_wanted_is_computed() -> None:
    x, weight, g, rest = operands(3, 5, "plain", False, 1.0)
    assert convolution_backward(g, x, weight, None, *rest, (True, False, False))[1] is None
    gx, gw, _ = convolution_backward(g, x, weight, None, *rest, (False, True, False))
    assert gx is None
    assert gw is not None


@pytest.mark.parametrize(
    ("dtype", "channels", "groups", "expected"),
    [(torch.bfloat16, 3, 4, True), (torch.bfloat16, 3, 1, False), (torch.bfloat16, 4, 4, False), (torch.float32, 3, 4, False)],
)
def test_which_convolutions_cross(dtype: torch.dtype, channels: int, groups: int, expected: bool) -> None:
    assert crosses(dtype, channels, groups) == expected


class Residual(nn.Module):
    def __init__(self, make: type[nn.Module], channels: int, **arguments: int) -> None:
        super().__init__()
        self.a, self.b = (make(channels, channels, 3, padding=1, **arguments) for _ in range(2))
        self.norm, self.head = nn.GroupNorm(1, channels), nn.Linear(channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        h = torch.relu(self.norm(self.b(h))) + h
        return self.head(torch.relu(self.a(h)).flatten(2).mean(2))  # type: ignore[no-any-return]


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "images": (lambda: Residual(nn.Conv2d, 3), (3, 6, 6)),
    "channel by channel": (lambda: Residual(nn.Conv2d, 5, groups=5), (5, 6, 6)),
    "groups": (lambda: Residual(nn.Conv2d, 9, groups=3), (9, 6, 6)),
    "one dimension": (lambda: Residual(nn.Conv1d, 5), (5, 12)),
    "three dimensions": (lambda: Residual(nn.Conv3d, 3), (3, 4, 4, 4)),
    "transposed": (lambda: Residual(nn.ConvTranspose2d, 5), (5, 6, 6)),
    "a chain": (lambda: nn.Sequential(nn.Conv2d(1, 5, 3), nn.ReLU(), nn.Conv2d(5, 7, 3), nn.ReLU(), nn.Flatten(), nn.Linear(28, 3)), (1, 6, 6)),
    "norms": (lambda: nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 7, 3), nn.BatchNorm2d(7), nn.Flatten(), nn.Linear(28, 3)), (3, 6, 6)),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("path", ["served", "stacked", "with graph"])
def test_under_autocast_a_broken_model_breaks_no_other(name: str, own: bool, path: str) -> None:
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    arch = Architecture.from_module(make().eval(), shape)
    graph = arch.graph
    assert graph is not None
    generator = torch.Generator().manual_seed(0)
    weights = 0.2 * torch.randn(MODELS, arch.num_weights, generator=generator)
    weights = torch.cat(
        [weights[:, s.offset : s.stop].abs() if "running_var" in s.name else weights[:, s.offset : s.stop] for s in graph.slots], 1
    )
    weights[BROKEN] = float("nan")
    queries = torch.randn(*((MODELS,) if own else ()), 16, *shape, generator=generator)
    targets = torch.randn(MODELS, 16, 3, generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        if path == "with graph":
            rows = weights.clone().requires_grad_()
            outputs = stacked.differentiable(rows, queries, graph)
            (gradient,) = torch.autograd.grad((outputs.float() - targets).square().sum(), rows)
            found = [outputs, gradient]
        elif path == "stacked":
            found = [stacked.forward(weights, queries, graph), *stacked.loss_and_gradient(weights, queries, targets, graph, "mse")]
        else:
            served = engine.loss_and_gradient(weights, queries, targets, arch, "mse")
            found = [engine.forward(weights, queries, arch), *served]
    for part in found:
        finite = part.isfinite().flatten(1).all(1) if part.ndim > 1 else part.isfinite()
        assert finite.tolist() == [j != BROKEN for j in range(MODELS)]
