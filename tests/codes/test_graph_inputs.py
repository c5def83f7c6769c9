"""Second moments of layer inputs in networks with norms and joins, against hooks on torch's own modules."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from tolerances import FP32, FP32_DEEP
from torch import Tensor, nn

from wslfast import Architecture, Population, WslfastError
from wslfast.codes.activation_metric import ActivationMetric
from wslfast.codes.graph_inputs import graph_second_moments
from wslfast.tokens import TokenLayout, layers_of


class Joined(nn.Module):
    """A batch norm, a sum of two ways of which no channel may be permuted alone, a grouped convolution, padding and strides."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(1, 0), bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.grouped = nn.Conv2d(4, 4, 1, groups=2)
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)))
        x = self.grouped(F.relu(self.second(x)) + x)
        return self.last(x.mean((2, 3)))


def modules(k: int) -> list[nn.Module]:
    made = []
    for seed in range(k):
        torch.manual_seed(seed)
        module = Joined().eval()
        with torch.no_grad():
            module.norm.running_var.uniform_(0.5, 2)
            module.norm.running_mean.normal_()
        made.append(module)
    return made


def test_moments_are_those_of_what_the_modules_read(monkeypatch: pytest.MonkeyPatch) -> None:
    nets = modules(3)
    architecture = Architecture.from_module(copy.deepcopy(nets[0]), (2, 6, 5))
    weights = Population.from_modules(nets, (2, 6, 5)).weights
    queries = torch.randn(5, 2, 6, 5, generator=torch.Generator().manual_seed(3))
    # as stored, so that they compare; views are tested for chains, whose moments know all of them
    monkeypatch.setattr("wslfast.codes.graph_inputs.hidden_channels", lambda architecture: ())
    monkeypatch.setattr("wslfast.codes.graph_inputs.random_views", lambda w, architecture, generator: w)
    got = dict(zip((layer.slot.name for layer in layers_of(architecture)), graph_second_moments(weights, queries, architecture)))
    seen: dict[str, list[Tensor]] = {"first.weight": [], "second.weight": [], "last.weight": []}
    for net in nets:
        for name in seen:
            net.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(lambda m, x, n=name: seen[n].append(x[0].detach()))
        with torch.no_grad():
            net(queries)
    for name, inputs in seen.items():
        layer = nets[0].get_submodule(name.removesuffix(".weight"))
        total = torch.zeros_like(got[name])
        for x in inputs:
            if isinstance(layer, nn.Conv2d):
                rows = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride).transpose(1, 2).flatten(0, 1).double()
            else:
                rows = x.double()
            rows = rows if layer.bias is None else F.pad(rows, (0, 1), value=1.0)
            total += sum((torch.outer(row, row) for row in rows), torch.zeros_like(total)) / len(rows) / len(inputs)
        torch.testing.assert_close(got[name], total, rtol=FP32_DEEP, atol=FP32)
    for name in set(got) - set(seen):
        assert torch.equal(got[name], torch.eye(len(got[name]), dtype=torch.float64)), name
    assert {"norm.weight", "grouped.weight"} <= set(got) - set(seen)


def test_its_metric_is_a_loss_and_coordinates() -> None:
    population = Population.from_modules(modules(4), (2, 6, 5))
    place = TokenLayout(population.architecture)
    metric = ActivationMetric(population, torch.randn(9, 2, 6, 5), place, unit="outputs")
    tokens = place.tokenize(population.weights).tokens
    assert float(metric.loss(tokens, tokens)) == 0.0
    assert float(metric.loss(tokens.mean(0).expand_as(tokens), tokens)) == pytest.approx(metric.spread, rel=FP32_DEEP)
    coordinates = metric.coordinates(population)
    torch.testing.assert_close(torch.where(place.mask, coordinates.inverse(coordinates(tokens)), 0), tokens, rtol=FP32_DEEP, atol=10 * FP32)


def test_models_that_overflow_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wslfast.codes.graph_inputs.random_views", lambda w, architecture, generator: w)
    population = Population.from_modules(modules(2), (2, 6, 5))
    queries = torch.randn(4, 2, 6, 5)
    broken = torch.cat([population.weights[:1], torch.full_like(population.weights[:1], 1e30)])
    alone = graph_second_moments(population.weights[:1], queries, population.architecture)
    for a, b in zip(alone, graph_second_moments(broken, queries, population.architecture)):
        assert torch.equal(a, b)
    with pytest.raises(WslfastError, match="finite activations"):
        graph_second_moments(broken[1:], queries, population.architecture)
