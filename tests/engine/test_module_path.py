"""Networks that cannot be traced: what a trial of how to run them may not depend on, or leave behind."""

from __future__ import annotations

import copy

import pytest
import torch
from place_cases import FEATURES, Of, check_places, population
from tolerances import FP32
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wslfast import Architecture, Population, batched_behavioral_loss, batched_forward
from wslfast.engine.module_path import Module
from wslfast.testing import relative_error


def opaque(x: Tensor) -> Tensor:
    """x itself, times an operation that is not in the table."""
    return x * torch.special.i0(0 * x.detach())


UNTRACED = {
    "fft": lambda: Of(lambda m, x: opaque(torch.fft.rfft(x @ m.a).real) @ m.b, (9, 9), (5, 7)),
    "scatter": lambda: Of(lambda m, x: torch.zeros_like(x).scatter_reduce(1, torch.arange(9).expand_as(x) // 2, x @ m.a, "amax"), (9, 9)),
    "pairs": lambda: Of(lambda m, x: opaque(torch.fft.rfft(x).mul(torch.view_as_complex(m.a)).real) @ m.b, (5, 2), (5, 4)),
}


@pytest.mark.parametrize("n", [9, 40])
@pytest.mark.parametrize("name", UNTRACED)
def test_bits_do_not_depend_on_the_place(name: str, n: int) -> None:
    check_places(UNTRACED[name], n, traced=False)


@pytest.mark.parametrize("name", UNTRACED)
def test_weights_may_have_any_strides(name: str) -> None:
    """Parts of a module want the last axis of a parameter dense, as its own are: pairs that make a complex number."""
    _, weights, arch = population(UNTRACED[name], traced=False)
    x, apart = torch.randn(40, FEATURES), torch.stack([weights, weights], -1)[..., 0]
    assert torch.equal(batched_forward(apart, x, arch), batched_forward(weights, x, arch))


def test_a_checkpoint_runs_a_loss_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward pass within a loss is nobody else's: for every tensor that it reads, a checkpoint would run the whole call again."""
    _, weights, arch = population(UNTRACED["fft"], traced=False)
    x, calls, run = torch.randn(40, FEATURES), [], Module.loss_and_gradient
    monkeypatch.setattr(Module, "loss_and_gradient", lambda *arguments: calls.append(1) or run(*arguments))
    targets = batched_forward(weights, x, arch) + 1
    slopes = []
    for checkpointed in (False, True):
        leaf = weights.clone().requires_grad_()
        loss = lambda leaf: batched_behavioral_loss(leaf * 1, None, x, arch, targets=targets)  # noqa: E731
        value = checkpoint(loss, leaf, use_reentrant=False) if checkpointed else loss(leaf)
        slopes += torch.autograd.grad(value, leaf)
    assert torch.equal(*slopes)
    assert len(calls) == 1 + 2


class Bag(nn.Module):
    """Means of rows of a table; ``norm``: of rows that are first made no longer than that, in place."""

    def __init__(self, norm: float | None) -> None:
        super().__init__()
        self.table, self.last = nn.EmbeddingBag(50, 5, mode="mean", max_norm=norm), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(opaque(self.table(x)))


class Spectral(nn.Module):
    """Convolution in the frequency domain, with a buffer that torch saves for the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.weight, self.last = nn.Linear(9, 8), nn.Parameter(torch.randn(5, 2)), nn.Linear(8, 3)
        self.register_buffer("window", torch.hann_window(8, periodic=False), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(opaque(self.first(x)) * self.window)
        return self.last(torch.fft.irfft(spectrum * torch.view_as_complex(self.weight), n=8))


def _population(make: type[nn.Module], shape: tuple[int, ...], *arguments: object) -> tuple[list[nn.Module], Population, Architecture]:
    torch.manual_seed(0)
    models = [make(*arguments) for _ in range(5)]
    population = Population.from_modules([copy.deepcopy(model) for model in models], shape)
    assert population.architecture.graph is None
    return models, population, population.architecture


@pytest.mark.parametrize("norm", [None, 1.0])
def test_modules_that_read_indices_are_tried_with_indices(norm: float | None) -> None:
    models, population, arch = _population(Bag, (6,), norm)
    x = torch.randint(0, 50, (40, 6))
    rows = population.weights.clone()
    w = rows.clone().requires_grad_()
    targets = torch.randn(5, 40, 3)
    losses = batched_behavioral_loss(w, None, x, arch, targets=targets, reduction="none")
    (slopes,) = torch.autograd.grad(losses.sum(), w)
    outputs = batched_forward(rows, x, arch)
    assert torch.equal(rows, population.weights)
    for j, model in enumerate(models):
        made = model.double()(x)
        assert relative_error(outputs[j], made) < FP32
        value = (made - targets[j]).square().sum() / 80
        assert relative_error(slopes[j], torch.cat([s.flatten() for s in torch.autograd.grad(value, list(model.parameters()))])) < FP32


def test_the_first_call_may_be_in_inference_mode() -> None:
    """What it makes for later calls is differentiated there."""
    models, population, arch = _population(Spectral, (9,))
    x = torch.randn(40, 9)
    with torch.inference_mode():
        outputs = batched_forward(population.weights, x, arch)
    for j, model in enumerate(models):
        assert relative_error(outputs[j], model.double()(x.double())) < FP32
    w = population.weights.clone().requires_grad_()
    batched_behavioral_loss(w, None, x, arch, targets=torch.zeros(5, 40, 3)).backward()
    value = torch.stack([model(x.double()).square().sum() / 400 for model in models]).sum()
    slopes = torch.autograd.grad(value, [p for model in models for p in model.parameters()])
    assert w.grad is not None
    assert relative_error(w.grad.flatten(), torch.cat([s.flatten() for s in _in_rows(arch, models, slopes)])) < FP32


def _in_rows(arch: Architecture, models: list[nn.Module], slopes: tuple[Tensor, ...]) -> list[Tensor]:
    """Gradients in the order of rows."""
    parts = iter(slopes)
    named = [{name: next(parts) for name, _ in model.named_parameters()} for model in models]
    return [each[slot.name] for each in named for slot in arch.parameters]


class Hooked(nn.Module):
    """Changes gradients on their way back: of a tensor, or of what goes into a part."""

    def __init__(self, part: bool) -> None:
        super().__init__()
        self.part, self.first, self.middle, self.last = part, nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        if part:
            self.middle.register_full_backward_hook(lambda module, into, out: (into[0] * 2,))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        if h.requires_grad and not self.part:
            h.register_hook(lambda slope: slope * 2)
        return self.last(torch.tanh(self.middle(h)))


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("part", [False, True], ids=["of a tensor", "of a part"])
def test_hooks_of_gradients_are_run(part: bool, own: bool) -> None:
    models, population, arch = _population(Hooked, (6,), part)
    x, targets = torch.randn(*((5,) if own else ()), 7, 6), torch.randn(5, 7, 3)
    expected = []
    for j, model in enumerate(models):
        w1, b1, w2, b2, w3, b3 = (p.detach().double().requires_grad_() for p in model.parameters())
        h = torch.tanh((x[j] if own else x).double() @ w1.T + b1)
        doubled = 2 * h - h.detach()  # the same value, twice the slope
        made = torch.tanh(doubled @ w2.T + b2) @ w3.T + b3
        value = (made - targets[j]).square().sum() / 14
        expected.append(torch.cat([s.flatten() for s in torch.autograd.grad(value, (w1, b1, w2, b2, w3, b3))]))
    leaf = population.weights.clone().requires_grad_()
    losses = batched_behavioral_loss(leaf, None, x, arch, targets=targets, reduction="none")
    (slopes,) = torch.autograd.grad(losses.sum(), leaf)
    assert relative_error(slopes, torch.stack(expected)) < FP32
    written = (batched_forward(leaf, x, arch) - targets).square().sum((1, 2)) / 14
    (slopes,) = torch.autograd.grad(written.sum(), leaf)
    assert relative_error(slopes, torch.stack(expected)) < FP32
