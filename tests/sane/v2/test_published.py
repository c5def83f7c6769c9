"""``sane`` 2.x itself beside ours, where ``WSLFAST_SANE_SRC`` names a clone of it; skipped elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import published_code
from wslfast import sane

FOUND = published_code.SECOND in published_code.available()
pytestmark = pytest.mark.skipif(not FOUND, reason=f"{published_code.VARIABLE} names no clone of HSG-AIML/WeightCLIP")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)
    torch.set_num_threads(threads)


def test_every_item_has_the_published_value(tmp_path: Path) -> None:
    from benchmarks import drop_in, sane2

    sane2.write_zoo(tmp_path / "zoo", 4)
    for item, theirs, ours in sane2.rows(tmp_path / "zoo", quick=True):
        row = drop_in.compare(item, theirs, ours, 1, lambda: 0.0)
        exact = not any(word in item for word in ("Loss", "loss", "the same"))
        assert row.difference <= (0.0 if exact else 1e-5), row


def test_matching_loses_no_objective() -> None:
    from benchmarks import sane2

    assert sane2.worst_objective(20) == (0.0, 0)


def test_their_trainer_has_the_same_losses_patched(tmp_path: Path) -> None:
    from benchmarks import sane2

    lines, difference = sane2.trainer_lines(tmp_path, 8, 2, iter(range(10**9)).__next__, 1)
    assert difference <= 1e-5
    assert len(lines) == 2
    assert sane.replaced() == []
