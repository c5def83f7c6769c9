"""Jobs side by side: each is done once, by one torch thread, and an error in one is the caller's."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
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


def test_a_job_differentiates_in_whatever_thread() -> None:
    """torch's graph is built and run back in threads that torch made itself."""
    x = torch.randn(12, 5)
    made: dict[int, torch.Tensor] = {}

    def job(i: int) -> None:
        time.sleep(0.002)
        leaf = x[i].clone().requires_grad_()
        with torch.enable_grad():
            made[i] = torch.autograd.grad(leaf.pow(3).sum(), leaf)[0]

    with torch.no_grad():
        jobs.run([lambda i=i: job(i) for i in range(12)])  # type: ignore[misc]
    assert torch.allclose(torch.stack([made[i] for i in range(12)]), 3 * x.square())


def test_jobs_within_jobs() -> None:
    done: list[tuple[int, int]] = []
    inner = lambda i: jobs.run([lambda j=j: done.append((i, j)) for j in range(3)])  # type: ignore[misc] # noqa: E731
    jobs.run([lambda i=i: inner(i) for i in range(5)])  # type: ignore[misc]
    assert sorted(done) == [(i, j) for i in range(5) for j in range(3)]


def test_a_threads_modes_are_its_own_afterwards() -> None:
    """A caller that flushes denormals has them flushed in all jobs, and torch's threads have what they had before."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        seen: list[float] = []
        small = torch.full((1,), 1e-30)
        jobs.run([lambda: (time.sleep(0.002), seen.append(float(small * 1e-10))) for _ in range(9)])  # type: ignore[misc, list-item]
    finally:
        torch.set_flush_denormal(False)
    assert seen == [0.0] * 9
    seen.clear()
    jobs.run([lambda: (time.sleep(0.002), seen.append(float(small * 1e-10))) for _ in range(9)])  # type: ignore[misc, list-item]
    assert all(value > 0 for value in seen)


def test_an_interrupt_reaches_the_caller() -> None:
    """Ctrl-C while jobs run: no further job begins, and the caller gets it."""
    begun: list[int] = []

    def job(i: int) -> None:
        begun.append(i)
        time.sleep(0.02)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    timer = threading.Timer(0.1, signal.raise_signal, [signal.SIGINT])
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            jobs.run([lambda i=i: job(i) for i in range(300)])  # type: ignore[misc]
    finally:
        timer.join()
        signal.signal(signal.SIGINT, before)
    assert 3 <= len(begun) < 100
    assert torch.get_num_threads() == 3


def test_shared_products_use_mkls_threads_and_nothing_else() -> None:
    """Bits of a sum that MKL cuts in three: those of three threads where products are shared, of one where they are not."""
    a, b = torch.randn(64, 40_000), torch.randn(40_000, 64)
    together = a @ b
    made: list[torch.Tensor] = []
    jobs.run_here([lambda: made.append(a @ b)], share_products=True)
    jobs.run_here([lambda: made.append(a @ b)])
    torch.set_num_threads(1)
    alone = a @ b
    torch.set_num_threads(3)
    assert torch.equal(made[1], alone)
    assert torch.equal(made[0], together) or not torch.backends.mkl.is_available()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_operators_of_a_forked_process_end() -> None:
    """Also those that torch would share out, of whoever: a check of a caller's numbers, a gradient."""
    x = torch.randn(1_000_000)
    total = x.exp().sum().item()  # torch's threads are there
    assert not jobs.controls() or torch.get_num_threads() == 3
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        leaf = x.requires_grad_()
        leaf.exp().sum().backward()
        assert leaf.grad is not None
        os.write(writer, str(leaf.grad.sum().item()).encode())
        os._exit(0)
    assert select.select([reader], [], [], 30)[0], "the child hangs"
    assert float(os.read(reader, 30)) == pytest.approx(total, rel=1e-4)
    os.waitpid(child, 0)
    assert torch.get_num_threads() == 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_works_alone() -> None:
    """OpenMP's threads do not survive a fork, and it would wait for them."""
    jobs.run([lambda: None] * 6)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        done: list[int] = []
        jobs.run([lambda i=i: done.append(i) for i in range(9)])  # type: ignore[misc]
        os.write(writer, str(len(done)).encode())
        os._exit(0)
    assert select.select([reader], [], [], 30)[0], "the child hangs"
    assert os.read(reader, 10) == b"9"
    os.waitpid(child, 0)


@pytest.mark.parametrize("at", range(5))
def test_an_interrupt_leaves_no_thread_alone(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it comes: behind any of the calls that set a number, or in the job."""
    told: dict[str, int] = {"openmp": 4, "mkl": 0}
    calls: list[str] = []

    def call(name: str, number: int) -> int:
        before, told[name] = told.get(name, 0), number
        calls.append(name)
        if len(calls) == at + 1:
            raise KeyboardInterrupt
        return before

    def setter(name: str) -> Callable[[int], int]:
        return lambda number: call(name, number)

    fakes = jobs.Controls(setter("openmp"), setter("mkl"), lambda *_: None, True)
    monkeypatch.setattr(jobs, "controls", lambda: fakes)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    with pytest.raises(KeyboardInterrupt):
        jobs.run_here([lambda: call("job", 1) and None])
    assert (told["openmp"], told["mkl"]) == (4, 0)
