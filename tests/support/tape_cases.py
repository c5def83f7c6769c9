"""A call between two layers, and its losses and gradients by the tape against torch's own graph through the same program, in float64."""

from __future__ import annotations

import torch
from tolerances import FP64, FP64_ROUNDING
from torch import Tensor, nn

import wslfast
from wslfast.kernels.stacked import engine
from wslfast.kernels.stacked.compiler import compile_program
from wslfast.kernels.stacked.passes import tapes_of
from wslfast.kernels.stacked.tape import Island

K, N, WIDTH = 3, 5, 6


class Between(nn.Module):
    """A function between two linear layers, which also gets a parameter."""

    def __init__(self, run, shape=(WIDTH,)) -> None:
        super().__init__()
        self.first, self.run = nn.Linear(4, WIDTH), run
        self.own = nn.Parameter(torch.randn(shape).abs() + 0.5)
        with torch.no_grad():
            out = run(torch.ones(2, WIDTH), self.own).flatten(1).shape[1]
        self.last = nn.Linear(out, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.run(self.first(x), self.own).flatten(1))


def population(make) -> tuple[wslfast.Architecture, Tensor]:
    models = [make().eval() for _ in range(K)]
    architecture = wslfast.Architecture.from_module(models[0], (4,))
    return architecture, wslfast.Population.from_state_dicts(architecture, [m.state_dict() for m in models]).weights.double()


def check(make) -> None:
    torch.manual_seed(0)
    architecture, weights = population(make)
    queries, targets = torch.randn(N, 4).double(), torch.randn(K, N, 3).double()
    losses, gradient = engine.loss_and_gradient(weights, queries, targets, architecture.graph, "mse")
    rows = weights.clone().requires_grad_()
    wanted = (engine.plain(rows, queries, architecture.graph) - targets).square().sum((1, 2)) / (2 * N)
    (slope,) = torch.autograd.grad(wanted.sum(), rows)
    torch.testing.assert_close(losses, wanted.detach(), rtol=FP64_ROUNDING, atol=FP64_ROUNDING)
    torch.testing.assert_close(gradient, slope, rtol=FP64, atol=FP64_ROUNDING)


def kinds_of_calls(architecture: wslfast.Architecture) -> set[type]:
    """How the calls of its tape run."""
    _, tape = tapes_of(compile_program(architecture.graph, False, True))
    return {type(call) for call in tape.calls}


def check_without_islands(run, shape) -> None:
    """Of a function between two layers: what :func:`check` checks, and that no call of it is left to torch's own graph."""
    make = lambda: Between(run, shape)  # noqa: E731
    check(make)
    assert Island not in kinds_of_calls(population(make)[0])
