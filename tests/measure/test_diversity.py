"""Pairwise distances against loops, matched subsets against every assignment, novelty against its definition."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerances import FP32, FP64, FP64_ROUNDING
from torch import Tensor

from wslfast.architecture import Architecture
from wslfast.errors import WslfastError
from wslfast.measure.diversity import (
    accuracy,
    accuracy_of_classes,
    behavioral_novelty,
    classes_of,
    diversity,
    matched_rows,
    nearest,
    outputs_of,
    sorted_channels,
)
from wslfast.permutation import random_views
from wslfast.testing import oracle_outputs


def _models(k: int = 5, n: int = 130, classes: int = 4) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(k, 9, generator=g), torch.randn(k, n, classes, generator=g)


def test_diversity_is_what_loops_over_pairs_give() -> None:
    weights, outputs = _models()
    found = diversity(weights, outputs)
    pairs = list(itertools.combinations(range(5), 2))
    for row, (i, j) in enumerate(pairs):
        a, b = outputs[i].double(), outputs[j].double()
        assert float(found.structural[row]) == pytest.approx(float((weights[i].double() - weights[j].double()).norm()), rel=FP64_ROUNDING)
        assert float(found.behavioral[row]) == pytest.approx(sum(float((p - q).norm()) for p, q in zip(a, b)) / 130, rel=FP64_ROUNDING)
        assert float(found.disagreement[row]) == sum(int(p.argmax() != q.argmax()) for p, q in zip(a, b)) / 130
    assert len(found.structural) == len(pairs)


def test_copies_have_no_diversity_and_one_model_is_an_error() -> None:
    weights, outputs = (t[:1].expand(3, *t.shape[1:]) for t in _models())
    same = diversity(weights, outputs)
    assert float(same.structural.max()) == float(same.behavioral.max()) == float(same.disagreement.max()) == 0
    with pytest.raises(WslfastError, match="at least two models"):
        diversity(weights[:1], outputs[:1])


def test_outputs_classes_and_accuracy_of_a_population() -> None:
    arch = Architecture.mlp(6, (5,), 3)
    g = torch.Generator().manual_seed(0)
    weights, images = torch.randn(4, arch.num_weights, generator=g), torch.randn(70, 6, generator=g)
    labels = torch.randint(3, (70,), generator=g)
    expected = oracle_outputs(weights, images, arch)
    outputs = outputs_of(weights, images, arch)
    torch.testing.assert_close(outputs.double(), expected, rtol=FP32, atol=FP32)
    assert torch.equal(classes_of(weights, images, arch).long(), expected.argmax(-1))
    torch.testing.assert_close(accuracy(outputs, labels), (expected.argmax(-1) == labels).double().mean(1))
    weights[1] = math.nan
    broken = outputs_of(weights, images, arch)
    assert float(accuracy(broken, labels)[1]) == 0
    assert bool((classes_of(weights, images, arch)[1] == -1).all())


def test_novelty_in_behavior_is_blind_to_permutations_and_in_weights_is_not() -> None:
    arch = Architecture.mlp(6, (8,), 3)
    g = torch.Generator().manual_seed(0)
    weights, images = torch.randn(4, arch.num_weights, generator=g), torch.randn(70, 6, generator=g)
    views = random_views(weights, arch, g)
    classes = classes_of(weights, images, arch)
    assert float(behavioral_novelty(classes_of(views, images, arch), classes).max()) == 0
    assert float(nearest(views, weights).min()) > 0.1
    assert float(nearest(weights, weights).max()) < 1e-6
    other = (classes[:1] + 1) % 3
    by_hand = min(sum(int(a != b) for a, b in zip(other[0].tolist(), row.tolist())) / 70 for row in classes)
    assert float(behavioral_novelty(other, classes)[0]) == pytest.approx(by_hand, abs=FP64_ROUNDING)


@pytest.mark.parametrize("name", ["cnn3", "mlp", "lenet5"])
def test_sorted_channels_are_the_same_for_every_view_and_the_same_function(name: str) -> None:
    arch = Architecture.mlp(6, (8, 5), 3) if name == "mlp" else getattr(Architecture, name)()
    g = torch.Generator().manual_seed(0)
    weights = 0.3 * torch.randn(3, arch.num_weights, generator=g)
    canonical = sorted_channels(weights, arch)
    assert not torch.equal(canonical, weights)
    assert torch.equal(sorted_channels(random_views(weights, arch, g), arch), canonical)
    assert torch.equal(sorted_channels(canonical, arch), canonical)
    images = torch.randn(4, *arch.input_shape, generator=g)
    torch.testing.assert_close(oracle_outputs(canonical, images, arch), oracle_outputs(weights, images, arch), rtol=FP64, atol=FP64)


@given(wanted=st.lists(st.integers(0, 12), min_size=1, max_size=4), available=st.lists(st.integers(0, 12), min_size=4, max_size=6))
def test_matching_is_the_best_of_all_assignments(wanted: list[int], available: list[int]) -> None:
    w, a = (torch.tensor(v, dtype=torch.float64) / 12 for v in (wanted, available))
    rows, partners = matched_rows(w, a)
    assert sorted(rows.tolist()) == list(range(len(wanted)))
    assert len(set(partners.tolist())) == len(wanted)
    cost = float((w[rows] - a[partners]).abs().sum())
    best = min(sum(abs(x - y) for x, y in zip(w.tolist(), chosen)) for chosen in itertools.permutations(a.tolist(), len(wanted)))
    assert cost == pytest.approx(best, abs=FP64_ROUNDING)


def test_matching_more_than_there_are_takes_an_even_sample() -> None:
    wanted, available = torch.linspace(0, 1, 9), torch.tensor([0.9, 0.1, 0.5])
    rows, partners = matched_rows(wanted, available)
    assert rows.tolist() == [1, 4, 7]
    assert partners.tolist() == [1, 2, 0]


def test_behavioral_novelty_equals_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    classes, others = (torch.randint(-1, 4, (k, 50), generator=generator).to(torch.int16) for k in (6, 9))  # -1: not finite
    wanted = [min(sum(a != b for a, b in zip(row, other)) / 50 for other in others.tolist()) for row in classes.tolist()]
    assert behavioral_novelty(classes, others).tolist() == pytest.approx(wanted, abs=FP64_ROUNDING)


def test_more_classes_than_two_bytes_count() -> None:
    """As many as words of a model of language: the last ones came out negative, and so wrong on every image."""
    arch = Architecture.from_module(torch.nn.Linear(2, 40_000), (2,))
    weights = torch.zeros(2, arch.num_weights)
    for row, best in enumerate((35_000, 39_999)):
        weights[row, arch.slots["bias"].offset + best] = 1.0
    classes = classes_of(weights, torch.zeros(3, 2), arch)
    assert classes.tolist() == [[35_000] * 3, [39_999] * 3]
    assert accuracy_of_classes(classes, torch.tensor([35_000, 39_999, 1])).tolist() == pytest.approx([1 / 3, 1 / 3])
