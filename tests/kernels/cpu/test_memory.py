"""Fresh memory: of the shape and type asked for, whole, and anybody's own."""

from __future__ import annotations

import pytest
import torch

from wslfast.kernels.cpu import memory


@pytest.mark.parametrize("numbers", [0, 1, 1000, (33 << 20) // 4, (70 << 20) // 4 + 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fresh_memory_can_be_written_and_read(numbers: int, dtype: torch.dtype) -> None:
    like = torch.empty(0, dtype=dtype).expand(0) if numbers == 0 else torch.empty(1, dtype=dtype).expand(numbers)
    made = memory.fresh_like(like)
    assert (made.shape, made.dtype, made.is_contiguous()) == (like.shape, dtype, True)
    made.fill_(3.5)
    other = memory.fresh_like(like).fill_(1.0)
    assert bool((made == 3.5).all())
    assert bool((other == 1.0).all())


def test_a_transposed_tensor_gives_contiguous_memory() -> None:
    made = memory.fresh_like(torch.empty(7, 5).T)
    assert (tuple(made.shape), made.is_contiguous()) == ((5, 7), True)


def test_a_system_that_gives_no_large_pages_gives_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(memory, "_LARGE", 100)
    monkeypatch.setattr(memory, "_advise", lambda: lambda address, size, advice: asked.append(size.value) or -1)
    assert memory.fresh_like(torch.empty(10_000)).fill_(2.0).sum() == 20_000
    assert len(asked) == 1
    assert asked[0] <= 40_000
    monkeypatch.setattr(memory, "_advise", lambda: None)
    assert memory.fresh_like(torch.empty(10_000)).fill_(2.0).sum() == 20_000
