"""Numbers below 1.2e-38: zeros inside, as the caller has them outside, and kept where a network looks at how small a number is."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from wslfast import Architecture, Population, batched_behavioral_loss, batched_forward, engine
from wslfast.kernels.cpu import jobs
from wslfast.kernels.cpu.denormals import flushed, makes_many, zeros_asked, zeros_here
from wslfast.kernels.graph import Graph
from wslfast.testing import oracle_loss, relative_error

ROOT = Path(__file__).parents[3]


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
@pytest.mark.parametrize("run", [jobs.run, jobs.run_here])
def test_jobs_have_zeros_where_asked_and_the_caller_has_what_it_had(before: bool, run: Callable[..., None]) -> None:
    torch.set_flush_denormal(before)
    assert zeros_here() == _product() == before
    for asked in (True, False):
        seen: list[bool] = []
        work = [lambda seen=seen: seen.append(_product()) for _ in range(6)]
        if asked:
            flushed(run, work)
        else:
            run(work)
        assert seen == [asked or before] * 6
        assert zeros_here() == _product() == before
        assert not zeros_asked()


@pytest.mark.parametrize("run", [jobs.run, jobs.run_here])
def test_an_error_leaves_nothing_behind(run: Callable[..., None]) -> None:
    with pytest.raises(ZeroDivisionError):
        flushed(run, [lambda: 1 // 0] * 3)
    assert not zeros_here()
    assert not zeros_asked()


def test_products_are_not_shared_with_threads_that_keep_them() -> None:
    """And so a network's bits do not depend on whether there is another group."""
    seen: list[int] = []
    library = jobs.controls()
    if library is None or torch.get_num_threads() == 1:
        pytest.skip("one thread, or a build of torch whose threads are not told")
    share = lambda: seen.append(library.mkl(1))  # noqa: E731 (what was set before)
    jobs.run_here([share], True)
    flushed(jobs.run_here, [share], True)
    assert seen == [torch.get_num_threads(), 1]


THREADS = """
import torch, sys
torch.set_num_threads(4)
from wslfast.kernels.cpu import jobs
from wslfast.kernels.cpu.denormals import flushed
flushed(jobs.run, [lambda: torch.ones(9).sum() for _ in range(8)])  # the first thing that needs threads
tiny = torch.full((1 << 20,), 1e-30)
assert (tiny * 1e-10 > 0).all(), "a thread of torch's lost its denormals"
"""


def test_threads_that_are_made_meanwhile_are_as_others() -> None:
    subprocess.run([sys.executable, "-c", THREADS], check=True, timeout=120, cwd=ROOT)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: nn.functional.softplus(x, beta=100),
        lambda x: (-(x**2) / 0.02).exp(),
        lambda x: torch.sin(30 * x).relu() + x.exp() * x.softmax(-1),
        lambda x: (x.exp() * 1e4 / 30).clamp(1e-12, 6),
        lambda x: nn.functional.layer_norm((-x).exp2(), (16,)).view(-1, 4, 4).mean(1).repeat(1, 4),
    ],
)
def test_networks_that_make_many(function: Callable[[Tensor], Tensor]) -> None:
    assert makes_many(_graph_of(function))


@pytest.mark.parametrize(
    "function",
    [
        torch.relu,
        nn.functional.softplus,
        lambda x: x.exp().log(),
        lambda x: 1 / (x.exp() + 1),
        lambda x: x.exp() / x.exp().sum(-1, keepdim=True),
        lambda x: x.exp().square().sqrt(),
        lambda x: x.exp() ** 0.5,
        lambda x: x * (x.exp() > 0),
        lambda x: x.exp().ceil(),
        lambda x: nn.functional.layer_norm(x.exp(), (16,), eps=0.0),
        lambda x: nn.functional.layer_norm(x.exp(), (16,), eps=1e-40),
        lambda x: (x - 92).exp() / 1e-38,
        lambda x: (x - 92).exp() * 1e38,
        lambda x: torch.clamp(x.exp(), min=1e-39),
        lambda x: x.exp() / x.exp().norm(dim=-1, keepdim=True),
    ],
)
def test_networks_that_make_something_of_smallness_or_few(function: Callable[[Tensor], Tensor]) -> None:
    assert not makes_many(_graph_of(function))


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
    architecture, weights = _population(lambda x: (-x.square()).exp())
    seen: list[bool] = []

    def criterion(outputs: Tensor, targets: Tensor) -> Tensor:
        seen.append(_product())
        return (outputs - targets).square().flatten(1).mean(1)

    engine.loss_and_gradient(weights, torch.randn(4, 3), torch.randn(5, 4, 2), architecture, criterion)
    assert seen
    assert not any(seen)
