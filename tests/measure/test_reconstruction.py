"""Reconstruction metrics against loops over models in float64, and the ways in which collapse and NaN could flatter them."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from tolerances import FP32, FP64_ROUNDING
from torch import Tensor, nn

from wslfast.architecture import Architecture
from wslfast.behavior import batched_forward
from wslfast.errors import WslfastError
from wslfast.kernels.layers import Activation, Conv2d, Flatten, Linear, Pool2d
from wslfast.measure import Reconstruction, compare
from wslfast.measure import reconstruction as module
from wslfast.measure.reconstruction import collapse
from wslfast.population import Population
from wslfast.testing import oracle_outputs

SMALL = Architecture.from_layers(
    (Conv2d("c", 1, 3, (3, 3)), Pool2d("p"), Activation("a"), Flatten("f"), Linear("l", 27, 5)), (1, 8, 8), "small"
)


def _data(k: int = 7, n: int = 63, noise: float = 0.3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    original = torch.randn(k, SMALL.num_weights, generator=g) * 0.5
    reconstructed = original + noise * torch.randn(original.shape, generator=g)
    return original, reconstructed, torch.randn(n, 1, 8, 8, generator=g), torch.randint(5, (n,), generator=g)


def _naive(original: Tensor, reconstructed: Tensor, images: Tensor, labels: Tensor, groups: list[Any]) -> dict[str, list[float]]:
    """Every metric of finite models by its definition, in plain Python."""
    k, n = len(original), len(images)
    out_o, out_r = oracle_outputs(original, images, SMALL), oracle_outputs(reconstructed, images, SMALL)
    mean = original.double().mean(0)
    energy = sum(float(((w - mean) ** 2).sum()) for w in original.double()) / k
    table: dict[str, list[float]] = {}

    def agree(i: int, j: int) -> int:
        return sum(int(out_r[i, q].argmax() == out_o[j, q].argmax()) for q in range(n))

    for j in range(k):
        counts = [agree(j, i) for i in range(k)]
        others = [counts[i] / n for i in range(k) if groups[i] != groups[j]]
        winners = [i for i in range(k) if counts[i] == max(counts)]
        accuracy = [sum(int(out[j, q].argmax() == labels[q]) for q in range(n)) / n for out in (out_o, out_r)]
        distance = math.sqrt(float(((original[j].double() - reconstructed[j].double()) ** 2).sum()))
        row = {
            "accuracy_original": accuracy[0],
            "accuracy_reconstructed": accuracy[1],
            "accuracy_change": accuracy[1] - accuracy[0],
            "agreement": counts[j] / n,
            "agreement_others": sum(others) / len(others) if others else math.nan,
            "agreement_margin": counts[j] / n - sum(others) / len(others) if others else math.nan,
            "identified": sum(groups[i] == groups[j] for i in winners) / len(winners) if others else math.nan,
            "l2_masked": distance,
            "l2_relative": distance / float(original[j].double().norm()),
            "explained_variance": 1 - distance**2 / energy if k > 1 else math.nan,
            "behavior_mse": float(((out_r[j] - out_o[j]) ** 2).sum()) / (2 * n),
            "output_l2": sum(math.sqrt(float(((out_r[j, q] - out_o[j, q]) ** 2).sum())) for q in range(n)) / n,
            "softmax_l2": sum(math.sqrt(float(((out_r[j, q].softmax(0) - out_o[j, q].softmax(0)) ** 2).sum())) for q in range(n)) / n,
        }
        for name, value in row.items():
            table.setdefault(name, []).append(value)
    return table


def _assert_equal(result: Reconstruction, expected: dict[str, list[float]]) -> None:
    assert set(result.metrics()) == set(expected)
    for name, value in result.metrics().items():
        assert value.dtype == torch.float64
        wanted = torch.tensor(expected[name], dtype=torch.float64)
        torch.testing.assert_close(value, wanted, rtol=FP32, atol=1e-9, equal_nan=True, msg=name)


@pytest.mark.parametrize(
    "groups", [None, [0, 0, 0, 1, 1, 2, 2], ["a", "b", "a", "c", "b", "a", "d"]], ids=["own", "epochs", "interleaved-strings"]
)
@pytest.mark.parametrize("block", [1, 3, 256])
def test_every_metric_equals_a_loop_over_models(groups: list[Any] | None, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_IMAGES", 20)  # 63 images in blocks that do not divide them
    data = _data()
    result = compare(*data, SMALL, groups=groups, block=block)
    _assert_equal(result, _naive(*data, groups or list(range(7))))
    assert (result.images, result.non_finite, result.non_finite_original, len(result)) == (63, 0, 0, 7)


def test_group_ids_may_be_a_tensor_and_blocks_do_not_change_bits() -> None:
    data = _data()
    a = compare(*data, SMALL, groups=torch.tensor([0, 0, 0, 1, 1, 2, 2]), block=2)
    b = compare(*data, SMALL, groups=[5, 5, 5, 3, 3, 9, 9])
    for name, value in a.metrics().items():
        torch.testing.assert_close(value, b.metrics()[name], rtol=FP64_ROUNDING, atol=FP64_ROUNDING, msg=name)


def test_poisoned_memory_and_strided_inputs(poisoned_empty: None) -> None:
    original, reconstructed, images, labels = _data()
    wide = torch.stack([reconstructed, torch.zeros_like(reconstructed)], 2)[..., 0]  # strides (2P, 2)
    flipped = images.transpose(2, 3).contiguous().transpose(2, 3)
    _assert_equal(compare(original, wide, flipped, labels.int(), SMALL), _naive(original, reconstructed, images, labels, list(range(7))))


def test_known_targets_save_the_originals_and_change_nothing() -> None:
    data = _data()
    expected = compare(*data, SMALL)
    targets = batched_forward(data[0], data[2], SMALL).requires_grad_()
    given = compare(*data, SMALL, targets=targets, block=3)
    for name, value in expected.metrics().items():
        torch.testing.assert_close(given.metrics()[name], value, rtol=FP64_ROUNDING, atol=FP64_ROUNDING, msg=name)
    shuffled = compare(*data, SMALL, targets=targets.detach().roll(1, 0))  # they are used, not recomputed
    assert float(shuffled.agreement.mean()) < float(expected.agreement.mean())


def test_perfect_reconstruction() -> None:
    original, _, images, labels = _data(noise=0)
    s = compare(original, original.clone(), images, labels, SMALL).summary()
    assert s["agreement"] == 1
    assert s["identified"] == 1
    assert s["explained_variance"] == 1
    assert s["accuracy_change"] == s["accuracy_change_abs"] == s["l2_masked"] == s["behavior_mse"] == 0
    assert s["agreement_margin"] > 0.3


def test_one_model_has_no_others() -> None:
    data = _data(k=1)
    result = compare(*data, SMALL)
    _assert_equal(result, _naive(*data, [0]))
    s = json.loads(json.dumps(result.summary(), allow_nan=False))
    assert s["agreement_others"] is s["agreement_margin"] is s["identified"] is s["explained_variance"] is None
    assert s["agreement"] is not None
    assert s["n_models"] == 1
    assert s["spread"]["agreement"]["std"] is None


def test_epochs_of_one_model_alone_have_no_others() -> None:
    result = compare(*_data(k=3), SMALL, groups=["m", "m", "m"])
    assert bool(result.agreement_others.isnan().all())
    assert bool(result.identified.isnan().all())
    assert bool(result.explained_variance.isfinite().all())


def test_collapse_cannot_pass_for_success() -> None:
    original, _, images, labels = _data(k=12)
    s = compare(original, original[3:4].expand(12, -1), images, labels, SMALL).summary()
    assert s["identified"] == pytest.approx(1 / 12)
    assert abs(s["agreement_margin"]) < 0.02  # one in twelve is its own
    own = compare(original, original, images, labels, SMALL).summary()
    assert collapse(own["agreement_margin"]) == ""
    grouped = compare(original, original[3:4].expand(12, -1), images, labels, SMALL, groups=[j // 3 for j in range(12)])
    assert grouped.summary()["identified"] == pytest.approx(1 / 4)


def test_collapse_to_equal_matches_shares_the_credit() -> None:
    original, _, images, labels = _data(k=5)
    same = original[:1].expand(5, -1)
    result = compare(same, same, images, labels, SMALL)
    assert result.identified.tolist() == pytest.approx([0.2] * 5)
    assert result.agreement_margin.tolist() == pytest.approx([0.0] * 5)
    assert bool(result.explained_variance.isnan().all())  # no variance to explain
    assert result.summary()["explained_variance"] is None


@pytest.mark.parametrize(("margin", "said"), [(0.0, True), (-0.2, True), (0.0099, True), (0.01, False), (None, False), (math.nan, False)])
def test_a_margin_of_nothing_is_called_collapse(margin: float | None, said: bool) -> None:
    assert ("collapse" in collapse(margin)) is said


def test_tied_outputs_choose_the_first_class() -> None:
    original, _, images, _ = _data()
    labels = torch.zeros(len(images), dtype=torch.long)
    result = compare(original, torch.zeros_like(original), images, labels, SMALL)
    assert bool((result.accuracy_reconstructed == 1).all())


@pytest.mark.parametrize(
    ("poison", "where"),
    [(math.nan, slice(None)), (math.nan, slice(0, 1)), (-math.inf, slice(-1, None)), (1e30, slice(None))],
    ids=["nan", "one-nan", "one-negative-infinity", "finite-weights-that-overflow"],
)
def test_a_non_finite_reconstruction_is_wrong_everywhere(poison: float, where: slice) -> None:
    original, reconstructed, images, labels = _data()
    healthy = compare(original, reconstructed, images, labels, SMALL)
    broken = reconstructed.clone()
    broken[2, where] = poison
    result = compare(original, broken, images, labels, SMALL)
    assert result.non_finite == 1
    assert result.non_finite_original == 0
    for name in ("accuracy_reconstructed", "agreement", "agreement_others", "identified"):
        assert float(getattr(result, name)[2]) == 0, name
    for name in ("l2_masked", "l2_relative", "explained_variance", "behavior_mse"):
        assert math.isnan(float(getattr(result, name)[2])), name
    assert float(result.accuracy_change[2]) == -float(result.accuracy_original[2])
    rest = [0, 1, 3, 4, 5, 6]
    for name, value in healthy.metrics().items():
        torch.testing.assert_close(getattr(result, name)[rest], value[rest], rtol=FP64_ROUNDING, atol=0, msg=name)
    json.dumps(result.summary(), allow_nan=False)


def test_a_non_finite_original_is_left_out_and_nobodys_other() -> None:
    original, reconstructed, images, labels = _data()
    rest = [0, 1, 2, 3, 5, 6]
    expected = compare(original[rest], reconstructed[rest], images, labels, SMALL)
    original[4, 5] = math.nan
    result = compare(original, reconstructed, images, labels, SMALL, block=4)
    assert result.non_finite == 0
    assert result.non_finite_original == 1
    for name, value in expected.metrics().items():
        got = getattr(result, name)
        assert math.isnan(float(got[4])), name
        torch.testing.assert_close(got[rest], value, rtol=FP64_ROUNDING, atol=0, msg=name)
    assert result.summary()["n_models"] == 7
    json.dumps(compare(original * math.nan, reconstructed, images, labels, SMALL).summary(), allow_nan=False)


def test_a_dead_reconstruction_that_matches_nobody_is_not_identified() -> None:
    original, _, images, labels = _data(k=2, n=1)
    chosen = oracle_outputs(original, images, SMALL).argmax(-1).flatten().tolist()
    free = next(c for c in range(5) if c not in chosen)
    constant = torch.zeros_like(original)
    constant[:, SMALL.slots["l.bias"].offset + free] = 1
    assert compare(original, constant, images, labels, SMALL).identified.tolist() == [0, 0]


def test_summary_names_and_figures() -> None:
    result = compare(*_data(), SMALL)
    s = json.loads(json.dumps(result.summary(), allow_nan=False))
    wanted = {
        "agreement",
        "agreement_others",
        "agreement_margin",
        "identified",
        "accuracy_original",
        "accuracy_reconstructed",
        "accuracy_change",
        "accuracy_change_abs",
        "l2_masked",
        "explained_variance",
        "n_models",
        "non_finite",
        "spread",
    }
    assert wanted <= set(s)
    change = sorted(result.accuracy_change.tolist())
    assert s["accuracy_change"] == change[3]
    assert s["accuracy_change_abs"] == sorted(map(abs, change))[3]
    assert s["agreement"] == pytest.approx(sum(result.agreement.tolist()) / 7)
    spread = s["spread"]["agreement"]
    assert set(spread) == {"mean", "median", "std", "p20", "p80"}
    values = sorted(result.agreement.tolist())
    assert spread["median"] == values[3]
    assert spread["p20"] == pytest.approx(values[1] + 0.2 * (values[2] - values[1]))
    assert spread["std"] == pytest.approx(math.sqrt(sum((v - spread["mean"]) ** 2 for v in values) / 6))
    kept = 1 - float((_data()[0] - _data()[1]).double().square().sum()) / float(
        (_data()[0].double() - _data()[0].double().mean(0)).square().sum()
    )
    assert s["explained_variance"] == pytest.approx(kept)


def test_measured_in_full_precision_under_autocast() -> None:
    data = _data()
    expected = compare(*data, SMALL).behavior_mse
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(compare(*data, SMALL).behavior_mse, expected, rtol=0, atol=0)


def test_inputs_are_not_changed_and_no_graph_is_kept() -> None:
    original, reconstructed, images, labels = _data()
    before = reconstructed.clone()
    result = compare(original, reconstructed.requires_grad_(), images, labels, SMALL)
    assert not any(v.requires_grad for v in result.metrics().values())
    assert torch.equal(reconstructed.detach(), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"original": torch.zeros(7, 3)}, "original: expected floating"),
        ({"original": torch.zeros(0, SMALL.num_weights)}, "k >= 1"),
        ({"reconstructed": torch.zeros(6, SMALL.num_weights)}, "reconstructed: expected 7 models"),
        ({"images": torch.zeros(63, 3, 8, 8)}, "queries: expected"),
        ({"images": torch.zeros(0, 1, 8, 8)}, "images: expected"),
        ({"images": torch.zeros(0, 1, 8, 8), "labels": None}, "images: expected"),
        ({"images": None, "labels": None}, "images: expected .* got None"),
        ({"labels": None, "peak": -1.0}, r"peak: expected a positive number, got -1\.0"),
        ({"labels": torch.zeros(62, dtype=torch.long)}, "labels: expected integers"),
        ({"labels": torch.zeros(63)}, "labels: expected integers"),
        ({"labels": torch.full((63,), 5)}, "labels: expected 0 to 4, got 5 to 5"),
        ({"groups": [1, 2]}, "groups: expected 7 model ids"),
        ({"groups": [1, 2, None, 4, 5, 6, 7]}, r"groups: rows \[2\] have no model id"),
        ({"groups": [[1]] * 7}, "groups: expected integers or strings"),
        ({"targets": torch.zeros(7, 63, 4)}, r"targets: expected floating \[7, 63, 5\]"),
        ({"block": 0}, "block: expected a positive integer"),
        ({"architecture": "cnn"}, "architecture: expected an Architecture"),
    ],
    ids=lambda v: v if isinstance(v, str) else "-".join(v),
)
def test_wrong_inputs(change: dict[str, Any], message: str) -> None:
    names = ("original", "reconstructed", "images", "labels")
    arguments: dict[str, Any] = dict(zip(names, _data())) | {"architecture": SMALL} | change
    with pytest.raises(WslfastError, match=message):
        compare(**arguments)


class Parts(nn.Module):
    """Answers of three parts, each of one class of four."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(5, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x).view(-1, 3, 4)


def test_an_answer_of_several_parts_is_several() -> None:
    torch.manual_seed(0)
    population = Population.from_modules([Parts() for _ in range(4)], (5,))
    arch, x = population.architecture, torch.randn(21, 5)
    original, reconstructed = population.weights, population.weights + 0.3 * torch.randn_like(population.weights)
    found = compare(original, reconstructed, x, None, arch)
    o, r = (batched_forward(rows.double(), x.double(), arch) for rows in (original, reconstructed))  # [4, 21, 3, 4]
    apart = (o.softmax(-1) - r.softmax(-1)).norm(dim=-1).mean((1, 2))
    torch.testing.assert_close(found.softmax_l2, apart, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.agreement, (o.argmax(-1) == r.argmax(-1)).double().mean((1, 2)))
    with pytest.raises(WslfastError, match=r"labels: expected None, as an answer has several parts \[3\]"):
        compare(original, reconstructed, x, torch.zeros(21, dtype=torch.long), arch)
