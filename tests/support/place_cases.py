"""Whether a model's bits depend on its place among the others, and its values are those of a float64 module."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from tolerances import FP32_DEEP
from torch import Tensor, nn

from wslfast import Architecture, Population, batched_behavioral_loss, batched_forward
from wslfast.testing import relative_error

FEATURES = 9
_MODELS = 9


class Of(nn.Module):
    """A function of the module and of queries ``[n, 9]``; its parameters ``a``, ``b`` ... have these shapes, or it has parts of these names."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor], *parts: Any) -> None:
        super().__init__()
        self.run = run
        for name, part in zip("abc", parts):
            setattr(self, name, part if isinstance(part, nn.Module) else nn.Parameter(torch.randn(part) / part[0] ** 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def population(make: Callable[[], nn.Module], traced: bool) -> tuple[list[nn.Module], Tensor, Architecture]:
    """Models, their weights, and their architecture."""
    torch.manual_seed(0)
    models = [make() for _ in range(_MODELS)]
    made = Population.from_modules(models, (FEATURES,))
    assert (made.architecture.graph is not None) == traced
    return models, made.weights, made.architecture


def check_places(make: Callable[[], nn.Module], n: int, traced: bool) -> None:
    models, weights, arch = population(make, traced)
    x, order = torch.randn(n, FEATURES), torch.tensor([3, 8, 1, 6, 2, 0])
    with torch.no_grad():
        targets = torch.stack([model(x) for model in models])
    targets = targets + torch.randn_like(targets)

    def results(rows: Tensor) -> tuple[Tensor, ...]:
        w = weights[rows].requires_grad_()
        losses = batched_behavioral_loss(w, None, x, arch, targets=targets[rows], reduction="none")
        (of_loss,) = torch.autograd.grad(losses.sum(), w)
        outputs = batched_forward(w, x, arch)
        (of_outputs,) = torch.autograd.grad(outputs, w, targets[rows])
        return outputs.detach(), losses.detach(), of_loss, of_outputs

    everyones = results(torch.arange(_MODELS))
    for mine, theirs in zip(results(order), everyones, strict=True):
        assert torch.equal(mine, theirs[order])
    for j in (0, 5):
        model = copy.deepcopy(models[j]).double()
        error = model(x.double()) - targets[j].double()
        slopes = torch.autograd.grad(error.square().sum() / (2 * n), list(model.parameters()))
        assert relative_error(everyones[0][j], error + targets[j]) < FP32_DEEP
        assert relative_error(everyones[2][j], torch.cat([slope.flatten() for slope in slopes])) < FP32_DEEP
