"""Memory that runs out: chunks halve and go on with one warning, or the error says what would fit."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from matrix import reached
from torch import Tensor

from wslfast import Architecture, WslfastError, batched_forward, engine, errors
from wslfast.engine import chunks, paths

ARCH = Architecture.cnn()


@pytest.fixture
def scarce(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, type[Exception]], list[int]]:
    """Let every path fail beyond some models at once; returns the sizes that were tried."""

    def limit(most: int, error: type[Exception]) -> list[int]:
        tried: list[int] = []
        for path, name, ahead in ((paths.Loop, "_run", 0), (paths.Stacked, "_run", 1), (paths.Stacked, "_piece", 0)):
            real = getattr(path, name)

            def run(self: Any, *given: Any, real: Any = real, ahead: int = ahead) -> Any:
                tried.append(len(given[ahead]))
                if len(given[ahead]) > most:
                    raise error("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes.")
                return real(self, *given)

            monkeypatch.setattr(path, name, run)
        monkeypatch.setattr(errors, "_said", set())
        return tried

    return limit


@pytest.fixture(params=[paths.Loop, paths.Stacked], ids=lambda path: path.name)
def graphed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each path that a forward pass with a graph may take."""
    monkeypatch.setattr(engine, "choose", lambda *_, **__: request.param(ARCH, "a test"))


SHORTAGES = [torch.OutOfMemoryError, MemoryError, RuntimeError]


@pytest.mark.parametrize("error", SHORTAGES, ids=lambda e: e.__name__)
@pytest.mark.parametrize("most", [1, 3, 7])
def test_a_forward_pass_with_a_graph_halves_and_goes_on(
    graphed: None, scarce: Callable[..., list[int]], most: int, error: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    weights, queries = 0.1 * torch.randn(9, ARCH.num_weights, requires_grad=True), torch.randn(4, 1, 28, 28)
    expected = batched_forward(weights, queries, ARCH)
    (gradient,) = torch.autograd.grad(expected.sum(), weights)
    tried = scarce(most, error)
    caplog.set_level(logging.WARNING, "wslfast")
    outputs = batched_forward(weights, queries, ARCH)
    torch.testing.assert_close(outputs, expected)
    torch.testing.assert_close(torch.autograd.grad(outputs.sum(), weights)[0], gradient)
    assert tried[0] == 9
    assert max(tried[-2:]) <= most
    (warning,) = [r.message for r in caplog.records if "out of memory" in r.message]
    assert warning.startswith(f"wslfast: out of memory on 9 models at once; going on with {tried[-1]} ")


@pytest.mark.parametrize("error", SHORTAGES, ids=lambda e: e.__name__)
@pytest.mark.parametrize("most", [1, 2, 5])
def test_a_loss_halves_and_goes_on(
    scarce: Callable[..., list[int]], most: int, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stacked path: the same losses and gradients."""
    monkeypatch.setattr(engine, "choose", lambda *_, **__: paths.Stacked(ARCH, "as on a GPU"))
    weights, queries = 0.1 * torch.randn(6, ARCH.num_weights), torch.randn(4, 1, 28, 28)
    targets = torch.randn(6, 4, 10)
    expected = engine.loss_and_gradient(weights, queries, targets, ARCH, "mse")
    tried = scarce(most, error)
    for a, b in zip(engine.loss_and_gradient(weights, queries, targets, ARCH, "mse"), expected, strict=True):
        torch.testing.assert_close(a, b)
    assert tried[0] == 6
    assert tried[-1] <= most


@pytest.mark.parametrize("error", SHORTAGES, ids=lambda e: e.__name__)
def test_one_model_that_does_not_fit_is_a_clear_error(graphed: None, scarce: Callable[..., list[int]], error: type[Exception]) -> None:
    weights, queries = torch.randn(4, ARCH.num_weights, requires_grad=True), torch.randn(2, 1, 28, 28)
    scarce(0, error)
    with pytest.raises(WslfastError, match="out of memory on one model alone; pass fewer queries"):
        batched_forward(weights, queries, ARCH)


def test_another_error_is_not_taken_for_a_shortage(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Tensor:
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(engine, "choose", lambda *_, **__: paths.Loop(ARCH, "a test"))
    monkeypatch.setattr(paths.Loop, "_run", broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        batched_forward(torch.randn(2, ARCH.num_weights, requires_grad=True), torch.randn(2, 1, 28, 28), ARCH)


MESSAGES = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes. Error code 12"
    ),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes."),
    MemoryError(),
    MemoryError("Unable to allocate 3 GiB for an array"),
]


@pytest.mark.parametrize("at", [0, 1, 2, 3])
@pytest.mark.parametrize("error", MESSAGES, ids=[f"{type(e).__name__}-{i}" for i, e in enumerate(MESSAGES)])
def test_memory_that_runs_out_once_anywhere(
    at: int, error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """At the first chunk or a later one: that chunk alone is tried again at half its size, one warning, the same numbers."""
    monkeypatch.setattr(errors, "_said", set())
    monkeypatch.setattr(paths.Stacked, "_models", lambda *_: 4)
    monkeypatch.setattr(engine, "choose", lambda *_, **__: paths.Loop(ARCH, "chunked"))
    weights, queries = 0.1 * torch.randn(16, ARCH.num_weights), torch.randn(4, 1, 28, 28)
    targets = torch.randn(16, 4, 10)
    expected = engine.loss_and_gradient(weights, queries, targets, ARCH, "mse")
    real, sizes = paths.Stacked._piece, []
    monkeypatch.setattr(engine, "choose", lambda *_, **__: paths.Stacked(ARCH, "chunked"))

    def run(self: Any, part: Tensor, *rest: Any) -> Any:
        sizes.append(len(part))
        if len(sizes) == at + 1:
            raise error
        return real(self, part, *rest)

    monkeypatch.setattr(paths.Stacked, "_piece", run)
    for a, b in zip(engine.loss_and_gradient(weights, queries, targets, ARCH, "mse"), expected, strict=True):
        torch.testing.assert_close(a, b)
    assert sizes == [4] * (at + 1) + [2] * (2 * (4 - at))
    assert [r.getMessage() for r in caplog.records if "out of memory" in r.getMessage()] == [
        "wslfast: out of memory on 4 models at once; going on with 2 (WSLFAST_MEMORY_MB bounds it ahead)"
    ]
    if (at, error) == (3, MESSAGES[-1]):
        reached("memory", "injected points of failure: halved, one warning, the same numbers", 4 * len(MESSAGES), 20)


def test_a_real_allocation_that_fails_is_recognised() -> None:
    """What torch says on this machine when an allocation cannot be met."""
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert chunks.is_shortage(caught.value)
