"""Jobs side by side: each is done once, by one torch thread, and an error in one is the caller's."""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from wslfast.architecture import Architecture
from wslfast.kernels.cpu import engine as cpu
from wslfast.kernels.cpu import jobs

pytestmark = pytest.mark.skipif(jobs.controls() is None, reason="this torch cannot be told how many threads a job has")


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_every_job_once_on_one_torch_thread_each() -> None:
    done: list[int] = []
    seen: set[tuple[str, int]] = set()

    def job(number: int) -> None:
        time.sleep(0.002)
        done.append(number)
        seen.add((threading.current_thread().name, torch.get_num_threads()))

    jobs.run([lambda number=number: job(number) for number in range(60)])  # type: ignore[misc]
    assert sorted(done) == list(range(60))
    assert len(seen) == 3
    assert {threads for _, threads in seen} == {1}
    assert torch.get_num_threads() == 3


def test_mkl_too_uses_one_thread() -> None:
    """Sums of a product that MKL would cut in three: the bits of one thread, not of three."""
    a, b = torch.randn(64, 40_000), torch.randn(40_000, 64)
    torch.set_num_threads(1)
    alone = a @ b
    torch.set_num_threads(3)
    results: list[torch.Tensor] = []
    jobs.run([lambda: results.append(a @ b) for _ in range(6)])
    assert all(torch.equal(result, alone) for result in results)


def test_an_error_is_raised_and_ends_what_has_not_begun() -> None:
    begun: list[int] = []

    def job(number: int) -> None:
        begun.append(number)
        if number == 3:
            raise ValueError("the fourth")
        time.sleep(0.005)

    with pytest.raises(ValueError, match="the fourth"):
        jobs.run([lambda number=number: job(number) for number in range(200)])  # type: ignore[misc]
    assert len(begun) < 20
    assert torch.get_num_threads() == 3
    jobs.run([lambda: begun.append(-1)] * 5)  # the threads live on
    assert begun.count(-1) == 5


def test_the_callers_inference_mode_holds_in_jobs() -> None:
    with torch.inference_mode():
        made = torch.zeros(8)
        jobs.run([lambda i=i: made[i].add_(i) for i in range(8)])  # type: ignore[misc]
    assert made.tolist() == list(range(8))


def _loss(seed: int) -> torch.Tensor:
    arch = Architecture.cnn3()
    generator = torch.Generator().manual_seed(seed)
    weights = 0.1 * torch.randn(20, arch.num_weights, generator=generator)
    queries, targets = torch.randn(8, 3, 32, 32, generator=generator), torch.randn(20, 8, 10, generator=generator)
    return cpu.loss_and_gradient(weights, queries, targets, arch.layers, "mse")[1]


def test_callers_on_several_threads_do_not_meet() -> None:
    expected = [_loss(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(_loss, [0, 1, 2, 3] * 3))
    assert all(torch.equal(x, expected[i % 4]) for i, x in enumerate(found))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_starts_its_own_threads() -> None:
    jobs.run([lambda: None] * 6)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:  # nothing that torch would share out among threads: OpenMP's did not survive the fork either
        names: set[str] = set()
        jobs.run([lambda: (time.sleep(0.01), names.add(threading.current_thread().name)) for _ in range(9)])  # type: ignore[misc, list-item]
        os.write(writer, str(len(names)).encode())
        os._exit(0)
    assert select.select([reader], [], [], 30)[0], "the child hangs"
    assert os.read(reader, 10) == b"3"
    os.waitpid(child, 0)
