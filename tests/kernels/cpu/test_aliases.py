"""Recordings on the caller's memory: large inputs are read where they lie, large results written where they go, and neither is kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from wslfast.kernels.cpu import recording
from wslfast.kernels.cpu.aliases import Borrowed
from wslfast.kernels.cpu.recording import Recording, record

ROWS, COLUMNS = 8, (recording._BORROWED >> 1) + 3  # of float32: many times what is borrowed


def _run(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Views of a large input, one of them turned, and a large result of several operators that write to parts of it."""
    made = torch.empty_like(x)
    torch.mul(x[:, :100], y, out=made[:, :100])
    made[:, 100:].copy_(x.flip(1)[:, :-100])
    made[2:4].add_(x[2:4])
    return (x[:3].t() @ torch.ones(3, 1)).sum(0), made


def _inputs(seed: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return torch.randn(ROWS, COLUMNS), torch.randn(ROWS, 100)


def _recorded(run=_run) -> Recording:
    made = record(run, _inputs(0))
    assert isinstance(made, Recording), made
    return made


def _same(a, b) -> bool:
    return all(map(recording._same_bits, a, b))


def test_what_is_large_is_borrowed():
    made = _recorded()
    assert [isinstance(t, Borrowed) for t in (*made._inputs, *made._results)] == [True, False, False, True]
    assert made.bytes < ROWS * COLUMNS * 4 * 2


@pytest.mark.parametrize("start", [0, 1, 7])
def test_numbers_anywhere(start):
    """Inputs and places in the middle of other memory, at any address."""
    made = _recorded()
    for seed in range(1, 4):
        x, y = _inputs(seed)
        there = torch.zeros(start + x.numel() + 5)
        mine = there[start : start + x.numel()].view_as(x).copy_(x)
        home = torch.full((start + x.numel() + 5,), 7.0)
        place = home[start : start + x.numel()].view_as(x)
        results = made.into((None, place), mine, y)
        assert _same(results, _run(x, y))
        assert results[1] is place
        assert (home[:start] == 7).all()
        assert (home[start + x.numel() :] == 7).all()
        assert torch.equal(mine, x)


def test_results_are_the_callers():
    made = _recorded()
    first, second = made(*_inputs(1)), made(*_inputs(2))
    assert first[1].data_ptr() != second[1].data_ptr()
    assert _same(first, _run(*_inputs(1)))


def test_a_place_that_is_not_dense():
    made, (x, y) = _recorded(), _inputs(1)
    place = torch.zeros(ROWS, COLUMNS * 2)[:, ::2]
    results = made.into((None, place), x, y)
    assert _same((results[0], place.contiguous()), _run(x, y))


def test_nothing_of_the_callers_is_kept():
    made = _recorded()
    for _ in range(2):
        made(*_inputs(1))
        for borrowed in made._borrowed:
            assert all(alias.untyped_storage().nbytes() == 0 for alias in borrowed._aliases)


def test_nothing_is_kept_after_an_error():
    def run(x: Tensor, labels: Tensor) -> tuple[Tensor]:
        return (x.gather(1, labels) * 2,)

    x = torch.randn(ROWS, COLUMNS)
    made = record(run, (x, torch.zeros(ROWS, 1, dtype=torch.int64)))
    assert isinstance(made, Recording), made
    with pytest.raises(RuntimeError, match="out of bounds"):
        made(x, torch.full((ROWS, 1), COLUMNS))
    assert all(alias.untyped_storage().nbytes() == 0 for borrowed in made._borrowed for alias in borrowed._aliases)
    again = made(x, torch.full((ROWS, 1), 3))
    assert torch.equal(again[0], 2 * x[:, 3:4])


def test_one_memory_for_two_results_is_not_borrowed():
    def run(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        made = torch.empty(2 * ROWS, COLUMNS)
        made[:ROWS], made[ROWS:] = x, x * 2
        return made[:ROWS], made[ROWS:]

    made = _recorded(run)
    assert not any(isinstance(t, Borrowed) for t in made._results)
    assert _same(made(*_inputs(3)), run(*_inputs(3)))


def test_an_input_read_as_another_type_is_not_borrowed():
    def run(x: Tensor, y: Tensor) -> tuple[Tensor]:
        return (x.view(torch.int32).bitwise_and(0xFFFF).view(torch.float32) * 1,)

    made = _recorded(run)
    assert not isinstance(made._inputs[0], Borrowed)
    assert _same(made(*_inputs(3)), run(*_inputs(3)))


def test_inputs_of_inference_mode():
    made = _recorded()
    with torch.inference_mode():
        x, y = _inputs(4)
        assert _same(made(x, y), _run(x, y))
    x, y = _inputs(5)
    assert _same(made(x, y), _run(x, y))
