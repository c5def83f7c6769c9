"""Numbers below 1.2e-38: zeros inside, as the caller has them outside, and kept where a network looks at how small a number is."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from wslfast import Architecture, Population, batched_behavioral_loss, batched_forward, engine
from wslfast.kernels.cpu import jobs
from wslfast.kernels.cpu.denormals import flushed, harmless, zeros_here
from wslfast.kernels.graph import Graph
from wslfast.testing import oracle_loss, relative_error


def _product() -> bool:
    """Whether torch's operators make zeros of what is below 1.2e-38, in this thread."""
    return float(torch.full((1,), 1e-30).mul_(1e-10)) == 0


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    torch.set_flush_denormal(False)
    yield
    torch.set_flush_denormal(False)


class Of(nn.Module):
    """A function of what one linear layer makes."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.function = nn.Linear(3, 16), nn.Linear(16, 2), function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x)))


def _graph_of(function: Callable[[Tensor], Tensor]) -> Graph:
    graph = Architecture.from_module(Of(function), (3,)).graph
    assert graph is not None
    return graph


@pytest.mark.parametrize("before", [False, True])
def test_the_caller_has_them_as_before(before: bool) -> None:
    torch.set_flush_denormal(before)
    assert zeros_here() == _product() == before
    assert flushed(_product)
    assert flushed(zeros_here)
    assert zeros_here() == _product() == before
    with pytest.raises(ZeroDivisionError):
        flushed(lambda: 1 // 0)
    assert zeros_here() == _product() == before


def test_jobs_have_them_as_their_caller() -> None:
    seen: list[bool] = []
    flushed(jobs.run, [lambda: seen.append(_product()) for _ in range(6)])
    assert seen == [True] * 6
    assert not _product()


@pytest.mark.parametrize(
    "function",
    [
        lambda x: nn.functional.softplus(x, beta=100),
        lambda x: (-(x**2) / 0.02).exp(),
        lambda x: torch.sin(30 * x).relu() + x.sigmoid() * x.softmax(-1),
        lambda x: nn.functional.layer_norm(x, (16,)).view(-1, 4, 4).mean(1).repeat(1, 4),
    ],
)
def test_harmless(function: Callable[[Tensor], Tensor]) -> None:
    assert harmless(_graph_of(function))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.sigmoid().log(),
        lambda x: 1 / (x.exp() + 1),
        lambda x: x / x.abs().sum(-1, keepdim=True),
        lambda x: x.square().sqrt(),
        lambda x: x.exp() ** 0.5,
        lambda x: x * (x.exp() > 0),
        lambda x: x.exp().ceil(),
        lambda x: nn.functional.layer_norm(x, (16,), eps=0.0),
        lambda x: x / x.norm(dim=-1, keepdim=True),
    ],
)
def test_not_harmless(function: Callable[[Tensor], Tensor]) -> None:
    assert not harmless(_graph_of(function))


def _population(function: Callable[[Tensor], Tensor], scale: float = 1.0) -> tuple[Architecture, Tensor]:
    modules = []
    for seed in range(5):
        torch.manual_seed(seed)
        modules.append(Of(function).eval())
    population = Population.from_modules(modules, input_shape=(3,))
    return population.architecture, population.weights * scale


def test_a_network_of_signed_distances_against_float64() -> None:
    """Some percent of its activations and slopes are below 1.2e-38."""
    architecture, weights = _population(lambda x: nn.functional.softplus(x, beta=100), 3.0)
    queries, targets = torch.randn(64, 3), torch.randn(5, 64, 2)
    inner = (queries @ weights[0, :48].view(16, 3).T + weights[0, 48:64]) * 100
    assert ((inner > -103) & (inner < -87.4)).float().mean() > 0.001
    rows = weights.clone().requires_grad_()
    losses = batched_behavioral_loss(rows, None, queries, architecture, targets=targets, reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum(), rows)
    truth, slope = oracle_loss(weights, queries, targets, architecture, "mse")
    assert relative_error(losses.detach(), truth) < 1e-5
    assert relative_error(gradient, slope) < 1e-5
    assert not _product()


def test_what_looks_at_how_small_a_number_is_sees_it() -> None:
    """log(exp(x)) of x = -90: exp(-90) is 8e-40."""
    architecture, weights = _population(lambda x: x.exp().log())
    weights[:, :48], weights[:, 48:64] = 0, -90
    queries = torch.randn(4, 3)
    outputs = batched_forward(weights, queries, architecture)
    hidden = torch.full((1, 16), -90.0)
    wanted = hidden @ weights[:, 64:96].view(5, 2, 16).mT + weights[:, 96:].view(5, 1, 2)
    torch.testing.assert_close(outputs, wanted.expand(5, 4, 2), rtol=1e-3, atol=1e-3)


def test_a_criterion_of_the_callers_own_sees_it() -> None:
    architecture, weights = _population(torch.tanh)
    seen: list[bool] = []

    def criterion(outputs: Tensor, targets: Tensor) -> Tensor:
        seen.append(_product())
        return (outputs - targets).square().flatten(1).mean(1)

    engine.loss_and_gradient(weights, torch.randn(4, 3), torch.randn(5, 4, 2), architecture, criterion)
    assert seen
    assert not any(seen)
