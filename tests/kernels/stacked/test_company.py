"""Sizes of groups: only those that give a full group's bits, and no more idle models than needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from wslfast.kernels.stacked import company


def _library(alike: Callable[[int], bool], log: list[int]) -> company.Trial:
    """A library whose results of groups that are not ``alike`` differ in a digit."""

    def trial(size: int, order: Sequence[int]) -> Sequence[Tensor]:
        log.append(size)
        return [torch.tensor([float(i) for i in list(order)[:size]]) + (0 if alike(size) else 1e-3)]

    return trial


@pytest.mark.parametrize("full", [2, 8, 64, 256])
@pytest.mark.parametrize("name", ["all", "full alone", "even", "few"])
def test_split_takes_sizes_that_agree_and_all_models(name: str, full: int) -> None:
    alike = {"all": lambda s: True, "full alone": lambda s: s == full, "even": lambda s: s % 2 == 0, "few": lambda s: s in (4, full)}[name]
    for count in range(1, 2 * full + 3, max(1, full // 16)):
        size, last = company.split(count, full, (name, full), _library(alike, []))
        assert alike(size)
        assert alike(last)
        whole, rest = divmod(count, size)
        assert size <= full
        assert last <= size
        assert rest <= last or not whole
        if name == "all" and full > 2:  # the last group is the next size at most
            idle = (last - rest if rest else 0) if whole else size - count
            assert idle <= max(1, count // 3)


def test_models_that_make_a_size_are_one_group_of_it() -> None:
    assert company.split(16, 64, "sixteen", _library(lambda s: True, [])) == (16, 16)
    assert company.split(20, 64, "twenty", _library(lambda s: True, [])) == (16, 4)
    assert company.split(64, 64, "full", _library(lambda s: True, [])) == (64, 64)
    assert company.split(65, 64, "more", _library(lambda s: True, [])) == (64, 2)
    assert company.split(16, 64, "fours", _library(lambda s: s in (4, 64), [])) == (4, 4)


def test_a_full_group_is_tried_once_and_a_size_once_a_process() -> None:
    log: list[int] = []
    company.split(5, 64, "once", _library(lambda s: s == 64, log))
    assert log.count(64) == 1
    assert len(set(log)) == len(log)
    before = len(log)
    company.split(5, 64, "once", _library(lambda s: s == 64, log))
    assert len(log) == before
