"""The ridge probe against golden G4, the normal equations and scikit-learn; weight statistics against a loop."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import FP32_DEEP, FP32_ROUNDING, FP64, FP64_GRADIENT, FP64_ROUNDING, PRINTED
from torch import Tensor

from wslfast.architecture import Architecture
from wslfast.errors import WslfastError
from wslfast.measure import RidgeProbe, behavior_statistics, consensus_of, probe, weight_statistics
from wslfast.measure.probe import PENALTIES

SPLITS = {"train": slice(0, 40), "test": slice(40, 50), "val": slice(50, 60)}


def _golden() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    index = torch.arange(300, dtype=torch.float64)
    x = torch.sin(1.3 * index).view(60, 5)
    noise = 0.3 * torch.cos(2.1 * torch.arange(60, dtype=torch.float64))
    y = x @ torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0], dtype=torch.float64) + noise + 1
    return {s: x[part] for s, part in SPLITS.items()}, {s: y[part] for s, part in SPLITS.items()}


def _random(m: int, d: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(m, d, generator=g, dtype=torch.float64)
    return x, x @ torch.randn(d, generator=g, dtype=torch.float64) + 0.5 * torch.randn(m, generator=g, dtype=torch.float64) + 2


def test_golden_g4() -> None:
    features, targets = _golden()
    fitted = RidgeProbe.fit(features["train"], targets["train"], validation=(features["val"], targets["val"]))
    assert fitted.penalty == 1e-5
    r2 = probe(features, targets)
    assert list(r2) == ["train", "test", "val"]
    assert r2["train"] == pytest.approx(0.995228, abs=PRINTED)
    assert r2["test"] == pytest.approx(0.978993, abs=PRINTED)
    assert r2["val"] == pytest.approx(0.974170, abs=PRINTED)


def test_the_grid_is_the_published_one() -> None:
    assert len(PENALTIES) == 17
    assert PENALTIES == (1e3, 3e2, 1e2, 3e1, 1e1, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5)


@pytest.mark.parametrize(("m", "d"), [(40, 7), (5, 5), (6, 30), (1, 3)], ids=["tall", "square", "wide", "one-model"])
@pytest.mark.parametrize("penalty", [1e-5, 1.0, 300.0])
def test_coefficients_equal_sklearn_and_the_normal_equations(m: int, d: int, penalty: float) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y = _random(m, d)
    fitted = RidgeProbe.fit(x, y, penalties=[penalty])
    ones = torch.cat([x, torch.ones(m, 1, dtype=torch.float64)], 1)
    normal = torch.linalg.solve(ones.T @ ones + penalty * torch.eye(d + 1, dtype=torch.float64), ones.T @ y)
    # the column of ones is penalised like any other: scikit-learn's own intercept, which is not, would differ
    ridge = linear_model.Ridge(alpha=penalty, fit_intercept=False, solver="svd").fit(ones.numpy(), y.numpy())
    torch.testing.assert_close(fitted.coefficients, torch.from_numpy(ridge.coef_), rtol=FP64_GRADIENT, atol=FP64)
    torch.testing.assert_close(fitted.coefficients, normal, rtol=FP32_DEEP, atol=FP32_ROUNDING)


def test_the_penalty_is_the_best_on_validation() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y = _random(30, 25, seed=3)
    val_x, val_y = _random(20, 25, seed=4)
    fitted = RidgeProbe.fit(x, y, validation=(val_x, val_y))
    ones, val_ones = (torch.cat([a, torch.ones(len(a), 1)], 1).numpy() for a in (x, val_x))
    scores = {}
    for penalty in PENALTIES:
        ridge = linear_model.Ridge(alpha=penalty, fit_intercept=False, solver="svd").fit(ones, y.numpy())
        scores[penalty] = metrics.r2_score(val_y.numpy(), ridge.predict(val_ones))
    best = max(scores, key=scores.__getitem__)
    assert fitted.penalty == best
    assert fitted.r2(val_x, val_y) == pytest.approx(scores[best], abs=FP64)
    assert best not in (PENALTIES[0], PENALTIES[-1])  # or this test would prove little


def test_without_validation_the_training_data_choose() -> None:
    x, y = _random(30, 4)
    assert RidgeProbe.fit(x, y).penalty == 1e-5  # less shrinking always fits its own data better
    assert set(probe({"train": x, "test": x}, {"train": y, "test": y})) == {"train", "test"}


def test_models_without_the_property_are_dropped() -> None:
    x, y = _random(30, 4)
    val_x, val_y = _random(10, 4, seed=9)
    expected = probe({"train": x[5:], "val": val_x[:8]}, {"train": y[5:], "val": val_y[:8]})
    y[:5] = math.nan
    x[0] = math.nan  # a broken model without a target is harmless
    val_y[8:] = math.nan
    assert probe({"train": x, "val": val_x}, {"train": y, "val": val_y}) == pytest.approx(expected, rel=FP64_ROUNDING)
    listed = {"train": y.tolist(), "val": val_y.tolist()}
    assert probe({"train": x, "val": val_x}, listed) == pytest.approx(expected, rel=FP64_ROUNDING)


def test_validation_without_any_target_falls_back_to_training_data() -> None:
    x, y = _random(30, 4)
    r2 = probe({"train": x, "val": x[:3]}, {"train": y, "val": [math.nan] * 3})
    assert r2["train"] > 0.8
    assert math.isnan(r2["val"])


def test_constant_targets_have_no_r2() -> None:
    x, _ = _random(12, 3)
    for value in (1.0, 0.1, 0.7):  # 0.1 is no binary number: the mean of twelve may be another one
        for count in (3, 7, 12):
            r2 = probe({"train": x[:count]}, {"train": torch.full((count,), value, dtype=torch.float64)})
            assert math.isnan(r2["train"])


def test_float32_features_are_computed_in_float64() -> None:
    x, y = _random(50, 6)
    fitted = RidgeProbe.fit(x.float(), y.float())
    again = RidgeProbe.fit(x.float().double(), y.float().double())
    assert torch.equal(fitted.coefficients, again.coefficients)
    assert fitted.predict(x.float()).dtype == torch.float64


@settings(max_examples=25)
@given(m=st.integers(2, 40), d=st.integers(1, 12), seed=st.integers(0, 1000))
def test_a_linear_target_is_recovered(m: int, d: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(m + d + 1, d, generator=g, dtype=torch.float64)
    y = x @ torch.randn(d, generator=g, dtype=torch.float64) + 0.7
    if float(y.var()) > 1e-3:
        assert RidgeProbe.fit(x, y, penalties=[1e-12]).r2(x, y) > 1 - 1e-6


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, y: RidgeProbe.fit(x[0], y), r"features: expected \[m, d\]"),
        (lambda x, y: RidgeProbe.fit(x, y[:3]), r"target: expected \[10\]"),
        (lambda x, y: RidgeProbe.fit(x, y * math.nan), "target: expected at least one value"),
        (lambda x, y: RidgeProbe.fit(x, y * math.inf), "target: expected finite"),
        (lambda x, y: RidgeProbe.fit(x * math.nan, y), "non-finite features"),
        (lambda x, y: RidgeProbe.fit(x, y, penalties=[]), "penalties: expected positive"),
        (lambda x, y: RidgeProbe.fit(x, y, penalties=[0.0]), "penalties: expected positive"),
        (lambda x, y: RidgeProbe.fit(x, y, validation=(x[:, :2], y)), r"validation: expected \[m, 3\]"),
        (lambda x, y: RidgeProbe.fit(x, y).predict(x[:, :2]), r"features: expected \[m, 3\]"),
        (lambda x, y: probe({"train": x}, {"test": y}), "targets: expected splits"),
        (lambda x, y: probe({"test": x}, {"test": y}), "expected a split 'train'"),
    ],
    ids=["1-d", "length", "all-nan", "infinite", "nan-features", "no-penalty", "zero-penalty", "val-width", "width", "splits", "no-train"],
)
def test_wrong_inputs(call: object, message: str) -> None:
    assert callable(call)
    with pytest.raises(WslfastError, match=message):
        call(*_random(10, 3))


@pytest.mark.parametrize("elements", [1 << 23, 100], ids=["at-once", "in-blocks"])
def test_weight_statistics_equal_a_loop(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # the package's attribute of that name is the function
    monkeypatch.setattr(importlib.import_module("wslfast.measure.probe"), "_ELEMENTS", elements)
    arch = Architecture.cnn(1)
    weights = torch.randn(5, arch.num_weights)
    features = weight_statistics(weights, arch)
    assert features.shape == (5, 7 * len(arch.parameters))
    assert features.dtype == torch.float64
    levels = torch.tensor([0, 0.25, 0.5, 0.75, 1], dtype=torch.float64)
    for j in range(5):
        expected = []
        for slot in arch.parameters:
            values = weights[j, slot.offset : slot.stop].double()
            expected += [values.mean(), values.std(unbiased=False), *torch.quantile(values, levels)]
        torch.testing.assert_close(features[j], torch.stack(expected), rtol=FP64_ROUNDING, atol=FP64_ROUNDING)


def test_weight_statistics_of_one_model_and_one_number() -> None:
    arch = Architecture.mlp(i_dim=1, h_dim=(1,), o_dim=1, dropout=0.0)
    features = weight_statistics(torch.tensor([[2.0, -1.0, 0.5, 3.0]]), arch).view(4, 7)
    assert features[:, 0].tolist() == [2, -1, 0.5, 3]
    assert features[:, 1].tolist() == [0] * 4
    assert torch.equal(features[:, 2:], features[:, :1].expand(-1, 5))
    with pytest.raises(WslfastError, match="weights: expected floating"):
        weight_statistics(torch.zeros(2, 5), arch)


@pytest.mark.parametrize("elements", [1 << 23, 60], ids=["at-once", "in-blocks"])
def test_behavior_statistics_equal_a_loop(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("wslfast.measure.probe"), "_ELEMENTS", elements)
    generator = torch.Generator().manual_seed(0)
    outputs, others = (torch.randn(k, 7, 3, generator=generator) * 3 for k in (5, 4))
    consensus = consensus_of(others)
    expected = torch.stack([y.double().softmax(1) for y in others]).mean(0)
    torch.testing.assert_close(consensus, expected)
    features = behavior_statistics(outputs, consensus)
    assert features.shape == (5, 3 + 6)
    for y, found in zip(outputs.double(), features):
        p = [[math.exp(a) / sum(math.exp(b) for b in row) for a in row] for row in y.tolist()]
        largest = [max(row) for row in p]
        mean = sum(largest) / 7
        agrees = [row.index(max(row)) == c.index(max(c)) for row, c in zip(p, expected.tolist())]
        cross = [-sum(c * math.log(a) for a, c in zip(row, of)) for row, of in zip(p, expected.tolist())]
        wanted = [sum(row[c] for row in p) / 7 for c in range(3)]
        wanted += [mean, math.sqrt(sum((v - mean) ** 2 for v in largest) / 7), -sum(a * math.log(a) for row in p for a in row) / 7]
        wanted += [sum(agrees) / 7, sum(cross) / 7, math.log(sum(v * v for v in y.flatten().tolist()) / 21)]
        assert found.tolist() == pytest.approx(wanted, abs=FP64)


def test_behavior_statistics_of_networks_that_diverged_are_finite() -> None:
    outputs = torch.tensor([[[float("nan"), 1.0], [float("inf"), -float("inf")]], [[1e30, -1e30], [0.0, 0.0]]])
    features = behavior_statistics(outputs, consensus_of(-outputs[1:]))
    assert bool(features.isfinite().all())
    assert features[1, -2] == 20  # as sure as can be, and wrong: no more than this
    with pytest.raises(WslfastError, match="consensus: expected floating"):
        behavior_statistics(outputs, torch.ones(3, 2))
    with pytest.raises(WslfastError, match="outputs: expected floating"):
        behavior_statistics(outputs[0], torch.ones(2, 2))
