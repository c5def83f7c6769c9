"""The objective: goldens of the published losses, float64 loops written from the formulas, and algebra."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import FP32, FP32_ROUNDING, FP64

from wslfast import losses
from wslfast.architecture import Architecture
from wslfast.errors import WslfastError
from wslfast.kernels.criteria import CRITERIA
from wslfast.losses import Normalizers, compose, nt_xent, structural_loss
from wslfast.population import Population
from wslfast.queries import QueryPool, TargetCache
from wslfast.tokens import TokenLayout


@pytest.fixture(scope="module")
def cnn3_tokens() -> tuple[torch.Tensor, torch.Tensor]:
    arch = Architecture.cnn3()
    layout = TokenLayout(arch)
    weights = (0.3 * torch.arange(arch.num_weights, dtype=torch.float64).sin()).float()[None]
    return layout.tokenize(weights).tokens, layout.mask


def test_structural_golden(cnn3_tokens: tuple[torch.Tensor, torch.Tensor]) -> None:
    tokens, mask = cnn3_tokens
    # the published value divides by all T * D entries; over real weights it is that much larger
    value = structural_loss(1.1 * tokens + 0.01, tokens, mask) * mask.sum() / mask.numel()
    assert float(value) == pytest.approx(2.220978e-4, rel=FP32)


@pytest.mark.parametrize("scale", [None, "token", "entry"])
def test_structural_is_the_mean_over_real_weights(scale: str | None) -> None:
    k, t, d = 3, 5, 7
    a, b = torch.randn(k, t, d), torch.randn(k, t, d)
    mask = torch.rand(t, d) > 0.4
    factor = {None: None, "token": torch.rand(t), "entry": torch.rand(t, d)}[scale]
    total, count = 0.0, 0
    for i in range(k):
        for j in range(t):
            for c in range(d):
                if mask[j, c]:
                    weight = 1.0 if factor is None else float(factor[j] if factor.ndim == 1 else factor[j, c])
                    total += weight * (float(a[i, j, c]) - float(b[i, j, c])) ** 2
                    count += 1
    assert float(structural_loss(a, b, mask, factor)) == pytest.approx(total / count, rel=FP32)


@pytest.mark.parametrize("junk", [1e6, math.nan, math.inf], ids=str)
def test_structural_ignores_padding_in_value_and_gradient(cnn3_tokens: tuple[torch.Tensor, torch.Tensor], junk: float) -> None:
    tokens, mask = cnn3_tokens
    outcomes = []
    for padding in (0.0, junk):
        reconstructed = torch.where(mask, 1.3 * tokens, padding).requires_grad_()
        value = structural_loss(reconstructed, torch.where(mask, tokens, -padding), mask)
        (gradient,) = torch.autograd.grad(value, reconstructed)
        outcomes.append((value.detach(), gradient))
    assert torch.equal(outcomes[0][0], outcomes[1][0])
    assert torch.equal(outcomes[0][1], outcomes[1][1])
    assert not outcomes[1][1][:, ~mask].any()


def test_structural_refuses_what_does_not_fit() -> None:
    x, mask = torch.zeros(2, 3, 4), torch.ones(3, 4, dtype=torch.bool)
    for arguments in [(x, x[:1], mask), (x, x, mask[:2]), (x, x, mask.float()), (x, x, mask, torch.ones(4))]:
        with pytest.raises(WslfastError, match="expected"):
            structural_loss(*arguments)
    assert structural_loss(x.half(), x, mask).dtype == torch.float32


def test_nt_xent_golden() -> None:
    i = torch.arange(120, dtype=torch.float64).view(4, 30)
    assert float(nt_xent(1 + i.sin(), 1 + i.cos())) == pytest.approx(3.405521, abs=FP32_ROUNDING)
    assert float(nt_xent((1 + i.sin()).float(), (1 + i.cos()).float())) == pytest.approx(3.405521, rel=FP32)


def _nt_xent_loop(a: np.ndarray, b: np.ndarray, temperature: float) -> float:
    x = np.concatenate([a, b])
    total = 0.0
    for u in range(len(x)):
        similar = [float(x[u] @ x[v] / (np.linalg.norm(x[u]) * np.linalg.norm(x[v]))) / temperature for v in range(len(x))]
        partner = (u + len(a)) % len(x)
        total += math.log(sum(math.exp(s) for v, s in enumerate(similar) if v != u)) - similar[partner]
    return total / len(x)


@settings(max_examples=25)
@given(k=st.integers(1, 9), d=st.integers(1, 12), temperature=st.floats(0.05, 2), seed=st.integers(0, 99))
def test_nt_xent_against_a_loop(k: int, d: int, temperature: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, k, d, generator=generator, dtype=torch.float64) + 0.1
    assert float(nt_xent(a, b, temperature)) == pytest.approx(_nt_xent_loop(a.numpy(), b.numpy(), temperature), rel=FP32_ROUNDING, abs=FP64)


def test_nt_xent_at_the_edges() -> None:
    one = torch.randn(1, 5, requires_grad=True)
    value = nt_xent(one, torch.randn(1, 5))
    value.backward()
    assert value.item() == 0
    assert one.grad is not None
    assert not one.grad.any()
    dead = torch.zeros(3, 5, requires_grad=True)  # a projection head whose ReLUs are all off
    value = nt_xent(dead, torch.zeros(3, 5))
    value.backward()
    assert value.item() == pytest.approx(math.log(5))
    assert dead.grad is not None
    assert dead.grad.isfinite().all()
    alike = torch.ones(4, 5)
    assert float(nt_xent(alike, alike)) == pytest.approx(math.log(7))
    with torch.autocast("cpu", torch.bfloat16):
        assert nt_xent(alike.bfloat16(), alike).dtype == torch.float32
    for a, b, temperature in [(alike, one, 0.1), (alike[:0], alike[:0], 0.1), (alike, alike, 0.0)]:
        with pytest.raises(WslfastError, match="expected"):
            nt_xent(a, b, temperature)


@pytest.fixture(scope="module")
def originals() -> tuple[Population, TargetCache]:
    arch = Architecture.cnn()
    population = Population(arch, arch.initial_weights(["kaiming_normal"] * 5, range(5)))
    return population, TargetCache(population, QueryPool(torch.randn(12, 1, 28, 28)), backend="torch")


@pytest.mark.parametrize("criterion", CRITERIA)
def test_normalizers_are_the_values_of_knowing_nothing(originals: tuple[Population, TargetCache], criterion: str) -> None:
    population, cache = originals
    units = Normalizers.from_data(population, cache, batch_size=8, criterion=criterion, temperature=3.0)
    weights = population.weights.double().numpy()
    mean = np.broadcast_to(weights.mean(0), weights.shape)
    assert units.structural == pytest.approx(((weights - mean) ** 2).mean(), rel=FP32)
    assert units.contrastive == pytest.approx(math.log(15))
    total = 0.0
    for logits in cache.outputs.double():
        p = {"mse": logits, "huber": logits, "distillation": (logits / 3).softmax(-1)}.get(criterion, logits.softmax(-1))
        constant = cache.outputs.double().mean(0)  # of all models, at each query
        q = {"mse": constant, "huber": constant, "distillation": (constant / 3).softmax(-1)}.get(criterion, constant.softmax(-1))
        n = len(logits)
        total += float(
            {
                "mse": ((p - q) ** 2).sum() / (2 * n),
                "huber": torch.where((p - q).abs() < 1, (p - q) ** 2 / 2, (p - q).abs() - 0.5).sum() / n,
                "softmax_mse": ((p - q) ** 2).mean(),
                "cross_entropy": -(p * q.log()).sum() / n,
                "distillation": 9 * (p * (p / q).log()).sum() / n,
            }[criterion]
        )
    assert units.behavioral == pytest.approx(total / len(population), rel=FP32_ROUNDING)
    if criterion == "mse":
        assert units.behavioral == cache.variance()


def test_one_model_alone_is_held_against_answering_zero(originals: tuple[Population, TargetCache]) -> None:
    population, _ = originals
    alone = TargetCache(population[2], QueryPool(torch.randn(12, 1, 28, 28)), backend="torch")
    units = Normalizers.from_data(population[2], alone, batch_size=1)
    assert units.structural == pytest.approx(float(population.weights[2].double().square().mean()), rel=FP32)
    assert units.behavioral == pytest.approx(float(alone.outputs.double().square().sum(-1).mean() / 2), rel=FP32)


def test_normalizers_survive_bad_models_and_refuse_useless_units(originals: tuple[Population, TargetCache]) -> None:
    population, cache = originals
    broken = cache.outputs[:1].clone()
    broken[0, 3, 2] = math.inf
    half = float(cache.outputs.double().var(0, unbiased=False).sum(-1).mean() / 2)
    for outputs in (torch.cat([cache.outputs, broken]), torch.cat([broken, cache.outputs])):
        assert losses.uninformed_behavior(outputs) == pytest.approx(half, rel=FP64)
        mixed = copy.copy(cache)
        mixed.outputs = outputs
        assert mixed.variance() == pytest.approx(half, rel=FP64)
    many = torch.randn(150, 4, 3, generator=torch.Generator().manual_seed(2))  # more than are taken at once
    assert losses.uninformed_behavior(many) == pytest.approx(float(many.double().var(0, unbiased=False).sum(-1).mean() / 2), rel=FP64)
    assert Normalizers.from_data(population, batch_size=1) == Normalizers(Normalizers.from_data(population, batch_size=4).structural)
    with pytest.raises(WslfastError, match="structural"):
        Normalizers.from_data(population[[0, 0]], batch_size=4)  # models that are all alike
    with pytest.raises(WslfastError, match="behavioral"):
        losses.uninformed_behavior(torch.full((2, 3, 4), math.nan))
    for value in (0, -1.0, math.nan, math.inf, "1", True):
        with pytest.raises(WslfastError, match="contrastive"):
            Normalizers(contrastive=value)  # type: ignore[arg-type]
    units = Normalizers(2, 3.5, 0.1)
    assert Normalizers.from_dict(json.loads(json.dumps(units.to_dict()))) == units
    with pytest.raises(WslfastError, match="expected"):
        Normalizers.from_dict({"structural": 1.0})


def test_composition_is_the_papers_formula() -> None:
    c, s, b = (torch.tensor(v, requires_grad=True) for v in (3.0, 5.0, 7.0))
    units = Normalizers(structural=2.0, behavioral=4.0, contrastive=8.0)
    total, parts = compose(c, s, b, units)
    expected = 0.05 * 3 / 8 + 0.95 * (0.1 * 5 / 2 + 0.9 * 7 / 4)
    assert total.item() == pytest.approx(expected)
    assert {name: float(v) for name, v in parts.items()} == pytest.approx(
        {"loss": expected, "contrastive": 3 / 8, "structural": 2.5, "behavioral": 1.75}
    )
    assert not any(v.requires_grad for v in parts.values())
    assert losses.term_weights() == pytest.approx((0.05, 0.095, 0.855))
    gradients = torch.autograd.grad(total, [c, s, b])
    assert [float(g) for g in gradients] == pytest.approx([0.05 / 8, 0.095 / 2, 0.855 / 4])


def test_terms_without_weight_stay_out() -> None:
    s, units = torch.tensor(2.0, requires_grad=True), Normalizers()
    total, parts = compose(None, s, None, units, gamma=0, beta=1)
    assert total.item() == 2
    assert set(parts) == {"loss", "structural"}
    total, parts = compose(None, s, torch.tensor(math.inf), units, gamma=0, beta=1)  # reported, and kept out of the sum
    assert total.item() == 2
    assert math.isinf(float(parts["behavioral"]))
    total, _ = compose(s, None, None, units, gamma=1)
    assert total.item() == 2
    with pytest.raises(WslfastError, match="behavioral"):
        compose(None, s, None, units, gamma=0)
    for gamma, beta in [(-0.1, 0.1), (0.1, 1.1), (math.nan, 0)]:
        with pytest.raises(WslfastError, match="expected a number from 0 to 1"):
            compose(s, s, s, units, gamma, beta)
