"""The evaluation protocol, without a zoo: how figures are made of what was measured."""

from __future__ import annotations

import statistics

import pytest
import torch

from wslfast.study.protocol import _bootstrap


def test_tied_accuracies_do_not_blow_up_the_spread_of_a_probe() -> None:
    """Resamples of networks with one accuracy have no R2; those that rounding gave a variance had one of -1e15."""
    targets = torch.tensor([0.1, 0.1, 0.7, 0.1, 0.1, 0.3], dtype=torch.float64)
    predicted = torch.tensor([0.2, 0.15, 0.5, 0.1, 0.3, 0.2], dtype=torch.float64)
    drawn = torch.randint(6, (500, 6), generator=torch.Generator().manual_seed(0)).tolist()
    resampled = [([targets[j].item() for j in rows], [predicted[j].item() for j in rows]) for rows in drawn]
    scores = [1 - statistics.fmean((a - b) ** 2 for a, b in zip(y, p)) / statistics.pvariance(y) for y, p in resampled if len(set(y)) > 1]
    assert _bootstrap(predicted, targets, list(range(6)), 0) == pytest.approx(statistics.stdev(scores), rel=1e-9)
