"""The gradient of a mean over models, divided at the outputs: what the same mean of each model's own loss has."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import wslfast
from wslfast import Architecture, Population, batched_behavioral_loss, engine
from wslfast.kernels.criteria import Averaged


class _Gate(nn.Module):
    """Gates of six numbers each: parts of a layer's output that lie apart in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 24), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c, d = self.first(x).chunk(4, 1)
        return self.last(torch.sigmoid(a) * torch.tanh(b) + nn.functional.elu(c) * nn.functional.gelu(d))


class _Halved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).to(torch.float16).relu().to(torch.float32))


def _models(make: type[nn.Module], shape: tuple[int, ...], k: int) -> tuple[Architecture, Tensor, list[nn.Module]]:
    modules = []
    for seed in range(k):
        torch.manual_seed(seed)
        modules.append(make().eval())
    architecture = Architecture.from_module(modules[0], shape)
    return architecture, Population.from_state_dicts(architecture, [m.state_dict() for m in modules]).weights.clone(), modules


@pytest.mark.parametrize("k", [1, 3, 7, 40])
@pytest.mark.parametrize("factor", [1.0, 0.3])
@pytest.mark.parametrize("nan_policy", ["propagate", "raise", "omit"])
def test_gradient_of_the_mean(k: int, factor: float, nan_policy: str) -> None:
    architecture, weights, modules = _models(_Gate, (5,), k)
    queries, targets = torch.randn(60, 5), torch.randn(k, 60, 3)
    expected = torch.zeros_like(weights, dtype=torch.float64)
    for j, module in enumerate(modules):
        module = module.double()
        loss = factor * (module(queries.double()) - targets[j].double()).square().sum() / (2 * 60 * k)
        loss.backward()
        flat = dict(module.named_parameters())
        expected[j] = torch.cat([flat[name].grad.flatten() for name, _ in module.named_parameters()])
    for _ in range(3):  # the third is replayed
        leaf = weights.clone().requires_grad_()
        loss = batched_behavioral_loss(leaf, None, queries, architecture, targets=targets, nan_policy=nan_policy)
        (gradient,) = torch.autograd.grad(factor * loss, leaf)
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-6)


def test_means_and_sums_of_one_network_are_not_replayed_for_each_other() -> None:
    architecture, weights, _ = _models(_Gate, (5,), 4)
    queries, targets = torch.randn(8, 5), torch.randn(4, 8, 3)
    for _ in range(3):
        found = {}
        for reduction in ("mean", "sum"):
            leaf = weights.clone().requires_grad_()
            batched_behavioral_loss(leaf, None, queries, architecture, targets=targets, reduction=reduction).backward()
            found[reduction] = leaf.grad
        torch.testing.assert_close(found["mean"] * 4, found["sum"], rtol=1e-5, atol=1e-7)


def test_where_it_is_divided_afterwards() -> None:
    architecture, weights, _ = _models(_Gate, (5,), 4)
    assert engine.of_mean("mse", architecture, weights, "auto") == Averaged("mse", 4)
    assert engine.of_mean("mse", architecture, weights, "triton") == "mse"
    assert engine.of_mean("mse", architecture, weights.half(), "auto") == "mse"
    with engine.using("triton"):
        assert engine.of_mean("mse", architecture, weights, "auto") == "mse"
    with torch.autocast("cpu", torch.bfloat16):
        assert engine.of_mean("mse", architecture, weights, "auto") == "mse"


def test_numbers_of_16_bits_keep_their_size() -> None:
    architecture, weights, _ = _models(_Halved, (4,), 3)
    assert engine.of_mean("mse", architecture, weights, "auto") == "mse"
    queries = torch.randn(9, 4)
    original = weights + 1e-4
    each = weights.clone().requires_grad_()
    wslfast.batched_behavioral_loss(each, original, queries, architecture, reduction="sum").backward()
    mean = weights.clone().requires_grad_()
    wslfast.batched_behavioral_loss(mean, original, queries, architecture).backward()
    torch.testing.assert_close(mean.grad * 3, each.grad, rtol=1e-6, atol=0)
