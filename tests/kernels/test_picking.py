"""Kernels one wide with a stride: what they read, and networks of them. (On some processors a process that runs them otherwise dies.)"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from tolerances import FP32
from torch import Tensor, nn

from wslfast import Architecture, Population, batched_behavioral_loss, batched_forward
from wslfast.kernels.cpu.convolutions import convolution_backward
from wslfast.kernels.picking import picked, picks
from wslfast.testing import relative_error


@pytest.mark.parametrize("stride", [2, 3, (1, 2), [2, 1]])
@pytest.mark.parametrize("size", [(8, 10), (7, 9), (1, 5)])
def test_a_convolution_of_what_is_picked_is_the_convolution(stride: int | tuple[int, int], size: tuple[int, int]) -> None:
    x, weight = torch.randn(3, 4, *size, dtype=torch.float64), torch.randn(5, 4, 1, 1, dtype=torch.float64)
    assert torch.equal(F.conv2d(picked(x, picks((1, 1), stride, 0)), weight), F.conv2d(x, weight, stride=stride))


def test_others_are_left_alone() -> None:
    assert picks((1, 1), 1, 0) == picks((1, 1), [1, 1], "valid") == ()
    assert picks((1, 2), 2, 0) == picks((1, 1), 2, 1) == picks((1, 1), 2, (0, 1)) == picks((1, 1), 2, "same") == ()
    assert picks((1,), [2], [0]) == (2,)
    assert picks((1, 1, 1), [2], "valid") == (2, 2, 2)


@pytest.mark.parametrize("wanted", [(True, True, True), (False, True, False), (True, False, False)])
def test_the_three_gradients(wanted: tuple[bool, bool, bool]) -> None:
    x, weight, bias = torch.randn(3, 2, 8, 10), torch.randn(5, 2, 1, 1), torch.randn(5)
    x = x.contiguous(memory_format=torch.channels_last)
    g = torch.randn(3, 5, 4, 5)
    made = convolution_backward(g, x, weight, [5], [2, 2], [0, 0], [1, 1], False, [0, 0], 1, wanted)
    operands = [t.double().requires_grad_() for t in (x, weight, bias)]
    expected = torch.autograd.grad(F.conv2d(*operands, stride=2), operands, g.double())
    for found, true, asked in zip(made, expected, wanted, strict=True):
        assert (found is not None) == asked
        assert found is None or relative_error(found, true) < FP32


class Shortcut(nn.Module):
    """A residual block that halves its images; ``looks``: at numbers, so that it cannot be traced."""

    def __init__(self, looks: bool) -> None:
        super().__init__()
        self.looks = looks
        self.long, self.short, self.last = nn.Conv2d(3, 5, 3, 2, 1), nn.Conv2d(3, 5, 1, 2, bias=False), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.looks and x.sum() > 1e9:
            return self.last(x[:, :, 0, :5])
        return self.last(torch.tanh(self.long(x) + self.short(x)).mean((2, 3)))


NETWORKS = {
    "chain": lambda: nn.Sequential(nn.Conv2d(3, 4, 1, 2), nn.Tanh(), nn.Conv2d(4, 3, 1, 2), nn.Flatten(), nn.Linear(12, 3)),
    "graph": lambda: Shortcut(False),
    "module": lambda: Shortcut(True),
}


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str, own: bool) -> None:
    torch.manual_seed(0)
    models = [NETWORKS[name]() for _ in range(3)]
    population = Population.from_modules(models, (3, 8, 8))
    arch: Architecture = population.architecture
    assert (arch.graph is None) == (name == "module")
    x = torch.randn(*((3,) if own else ()), 6, 3, 8, 8)
    targets = torch.randn(3, 6, 3)
    w, queries = population.weights.clone().requires_grad_(), x.clone().requires_grad_()
    outputs = batched_forward(w, queries, arch)
    found = torch.autograd.grad(outputs, (w, queries), outputs.detach() - targets)
    loss = batched_behavioral_loss(w, None, queries, arch, targets=targets, reduction="sum")
    of_loss = torch.autograd.grad(loss, (w, queries))
    alone = batched_behavioral_loss(w, None, x, arch, targets=targets, reduction="sum")
    of_images = torch.zeros_like(x, dtype=torch.float64)
    for j, model in enumerate(models):
        model, mine = copy.deepcopy(model).double(), (x[j] if own else x).double().requires_grad_()
        made = model(mine)
        *slopes, of_mine = torch.autograd.grad((made - targets[j]).square().sum() / 2, (*model.parameters(), mine))
        (of_images[j] if own else of_images).add_(of_mine)
        row = torch.cat([slope.flatten() for slope in slopes])
        assert relative_error(outputs[j], made) < FP32
        assert relative_error(found[0][j], row) < FP32
        assert relative_error(of_loss[0][j] * 6, row) < FP32
        assert relative_error(torch.autograd.grad(alone, w, retain_graph=True)[0][j] * 6, row) < FP32
    assert relative_error(found[1], of_images) < FP32
    assert relative_error(of_loss[1] * 6, of_images) < FP32
