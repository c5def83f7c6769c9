"""Memory of a recording: what is needed at the same time lies apart, and what is not lies in the same place."""

from __future__ import annotations

import random

import pytest
import torch

from wslfast.kernels.cpu.arena import Arena, offsets


def test_blocks_of_different_times_share_their_place():
    places, size = offsets([640, 640, 64], [(0, 1), (2, 3), (1, 2)])
    assert places[0] == places[1]
    assert size == 640 + 64


def test_nothing_takes_nothing():
    assert offsets([], []) == ([], 0)
    assert offsets([0, 0], [(0, 1), (0, 1)])[1] == 0


@pytest.mark.parametrize("seed", range(20))
def test_lives_that_overlap_lie_apart(seed):
    source = random.Random(seed)
    sizes = [source.choice([0, 1, 63, 64, 65, 1000, 4096]) for _ in range(60)]
    lives = [(first, first + source.randrange(12)) for first in (source.randrange(40) for _ in sizes)]
    places, total = offsets(sizes, lives)
    assert all(place % 64 == 0 and place + size <= total for place, size in zip(places, sizes, strict=True))
    for i in range(60):
        for j in range(i):
            if lives[i][0] <= lives[j][1] and lives[j][0] <= lives[i][1]:
                assert places[i] + sizes[i] <= places[j] or places[j] + sizes[j] <= places[i]
    at_once = max(sum(-(-s // 64) * 64 for s, (a, b) in zip(sizes, lives, strict=True) if a <= t <= b) for t in range(60))
    assert at_once <= total <= sum(-(-s // 64) * 64 for s in sizes)


def test_tensors_keep_their_form_and_find_each_other():
    base = torch.zeros(6, 4)
    complexes = torch.zeros(3, dtype=torch.complex64)
    name, other = base.untyped_storage()._cdata, complexes.untyped_storage()._cdata
    arena = Arena({name: base.nbytes, other: complexes.nbytes}, {name: (0, 1), other: (1, 2)})
    whole, part, turned = arena.moved(base), arena.moved(base[2:, 1:3]), arena.moved(base.t())
    whole.copy_(torch.arange(24.0).view(6, 4))
    assert torch.equal(part, whole[2:, 1:3])
    assert torch.equal(turned, whole.t())
    arena.moved(complexes).fill_(1 + 2j)
    assert torch.equal(whole, torch.arange(24.0).view(6, 4))
    stranger = torch.ones(2)
    assert arena.moved(stranger) is stranger
    assert base.sum() == 0
