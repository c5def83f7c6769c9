"""Races and addresses, in an interpreter that watches every load and store; and that the watch sees what it is there to see."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from kernel_cases import CASES, HEADS, MLP, SMALL, Net, cnn3

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("needs TRITON_INTERPRET=1 when triton is first imported", allow_module_level=True)

import triton.language as tl

from benchmarks.kernels.races import exercise, watching
from wslfast.kernels.triton import launcher

ALL = {"small": SMALL, **HEADS, **CASES}


def _clean(case: Net, precision: str = "fp16", many: bool = False, **more: bool) -> None:
    with watching(**more) as found:
        exercise(case.layers, case.shape, precision, many)
    assert found.launches["forward_kernel"]
    assert found.accesses > 100
    assert found.barriers
    assert not found.races, dict(found.races)


def test_every_kernel_in_two_networks() -> None:
    """One whose end is the head in one launch, and one that has all the others: what the sources define is what was watched."""
    launched: set[str] = set()
    for case in (HEADS["head_sigmoid_last"], SMALL):
        with watching() as found:
            exercise(case.layers, case.shape)
        assert not found.races, dict(found.races)
        launched |= set(found.launches)
    folder = Path(launcher.__file__).parent
    assert launched == {name for file in folder.glob("*.py") for name in re.findall(r"^def (\w+_kernel)\(", file.read_text(), re.M)}


def test_two_gradients_in_one_launch() -> None:
    """Nothing is written but its own partials, by as many programs as there are splits."""
    case = CASES["cropped"]
    with watching(same_thread=False) as found:
        exercise(case.layers, case.shape, "fp16", many=True)
    assert found.launches["joint_kernel"] == 2
    assert not [race for race in found.races if race.startswith("joint_kernel")]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ALL)
def test_clean(name: str) -> None:
    _clean(ALL[name])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["small", "head_relu", "act_then_average", "dx_through_stride_2_and_pool"])
def test_clean_with_many_programs(name: str) -> None:
    """One tile a program and several splits: what programs share is seen."""
    _clean(ALL[name], "tf32", many=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_clean_in_three_products(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """tf32x3, whose weight gradients several programs share on one kind of matrix unit, and whose sums are taken in parts on the other."""
    monkeypatch.setattr(launcher, "capability_of", lambda device: capability)
    _clean(CASES["channels_17_in"], "tf32x3", many=capability == (9, 0))


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_clean_cnn3() -> None:
    _clean(cnn3())


def test_barriers_that_are_not_seen_are_missed() -> None:
    with watching(muted=lambda number: number % 3 == 0) as found:
        exercise(MLP.layers, MLP.shape)
    assert any("read after write" in race for race in found.races)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_barrier_before_writing_in_place_is_a_contract() -> None:
    """dX is written over what it read. Even if load and store had other layouts, no thread would read what another has overwritten."""
    case = SMALL
    for muted, expected in ((lambda number: False, set()), (lambda number: True, {"dx_kernel"})):
        with watching(muted, same_thread=False) as found:
            exercise(case.layers, case.shape)
        assert {race.partition(":")[0] for race in found.races} & {"dx_kernel", "head_kernel"} == expected


# -- the watch itself --------------------------------------------------------------------------------------------------


@triton.jit
def _shift(x, BLOCK: tl.constexpr, BARRIER: tl.constexpr):  # type: ignore[no-untyped-def]
    """x[i + 1] = x[i] in place."""
    i = tl.arange(0, BLOCK)
    value = tl.load(x + i)
    if BARRIER:
        tl.debug_barrier()
    tl.store(x + 1 + i, value)


@triton.jit
def _everybody_writes(x, y, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + tl.program_id(0) * BLOCK + i))


@triton.jit
def _reads_a_neighbour(x, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, BLOCK)
    pid = tl.program_id(0)
    value = tl.load(x + ((pid + 1) % 2) * BLOCK + i)
    tl.debug_barrier()
    tl.store(x + pid * BLOCK + i, value)


@triton.jit
def _past_the_end(x, y, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i + 1))


@triton.jit
def _same_address(y, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, BLOCK)
    tl.store(y + i // 2, i.to(tl.float32))


def _races(launch: object) -> str:
    with watching() as found:
        launch()  # type: ignore[operator]
    return " ".join(found.races)


def test_what_the_watch_sees() -> None:
    x, y = torch.zeros(17), torch.zeros(16)
    assert "write after read without a barrier" in _races(lambda: _shift[(1,)](x, 16, False))
    assert _races(lambda: _shift[(1,)](x, 16, True)) == ""
    assert "two programs write one address" in _races(lambda: _everybody_writes[(2,)](torch.zeros(32), y, 16))
    assert _races(lambda: _everybody_writes[(1,)](torch.zeros(32), y, 16)) == ""
    assert "a program reads what another writes" in _races(lambda: _reads_a_neighbour[(2,)](torch.zeros(32), 16))
    assert "one store writes an address twice" in _races(lambda: _same_address[(1,)](y, 16))
    buffers = torch.zeros(1 << 16), torch.zeros(1 << 16)  # far apart, so that the address past the one is not in the other
    end = buffers[0][-16:]
    assert "outside every tensor" in _races(lambda: _past_the_end[(1,)](end, buffers[1], 16))
