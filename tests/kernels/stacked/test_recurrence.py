"""Recurrent layers written out, against the same formulas through torch's own graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from wslfast.kernels.stacked.recurrence import CELLS, direction
from wslfast.kernels.stacked.recurrent import _direction

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


@pytest.mark.parametrize("biases", [True, False], ids=["biases", "no biases"])
@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("reads", ["all", "last state", "steps"])
def test_values_and_gradients(kind: str, biases: bool, reads: str) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return (0.5 * torch.randn(shape, generator=generator, dtype=torch.float64)).requires_grad_()

    models, steps, n, features, width = 3, 5, 4, 6, 7
    x, states = random(models, steps, n, features), [random(models, n, width) for _ in range(CELLS[kind].states)]
    sizes = [(features,), (width,), *([(), ()] if biases else [])]
    parameters = [random(models, GATES[kind] * width, *size) for size in sizes]
    results = []
    for made, last in (direction(kind, x, states, parameters), _direction(kind, x, states, parameters, biases)):
        factors = torch.linspace(-1, 1, made.numel(), dtype=torch.float64).view_as(made)
        total = torch.zeros((), dtype=torch.float64)
        if reads != "last state":
            total = total + (made * factors).sum()
        if reads != "steps":
            total = total + sum(state.square().sum() for state in last)
        gradients = torch.autograd.grad(total, [x, *states, *parameters], materialize_grads=True)
        results.append([made.detach(), *(state.detach() for state in last), *gradients])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain)


def test_a_second_derivative_is_refused() -> None:
    x = torch.randn(1, 2, 3, 4, requires_grad=True)
    made, _ = direction("rnn_tanh", x, [torch.zeros(1, 3, 5)], [torch.randn(1, 5, 4), torch.randn(1, 5, 5)])
    (slope,) = torch.autograd.grad(made.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        torch.autograd.grad(slope.sum(), x)
