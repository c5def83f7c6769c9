"""Memory that runs out: chunks halve and go on with one warning, or the error says what would fit."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from wslfast import Architecture, WslfastError, batched_behavioral_loss, batched_forward, engine, errors

ARCH = Architecture.cnn()


@pytest.fixture
def scarce(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, type[Exception]], list[int]]:
    """Let every path fail beyond some models at once; returns the sizes that were tried."""

    def limit(most: int, error: type[Exception]) -> list[int]:
        tried: list[int] = []
        real = engine._FORWARD["loop"]

        def run(weights: Tensor, queries: Tensor, architecture: Architecture) -> Tensor:
            tried.append(len(weights))
            if len(weights) > most:
                raise error("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes.")
            return real(weights, queries, architecture)

        for path in ("loop", "cpu", "grouped", "functional"):
            monkeypatch.setitem(engine._FORWARD, path, run)
        monkeypatch.setattr(errors, "_said", set())
        return tried

    return limit


SHORTAGES = [torch.OutOfMemoryError, MemoryError, RuntimeError]


@pytest.mark.parametrize("error", SHORTAGES, ids=lambda e: e.__name__)
@pytest.mark.parametrize("most", [1, 3, 7])
def test_a_forward_pass_with_a_graph_halves_and_goes_on(
    scarce: Callable[..., list[int]], most: int, error: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    weights, queries = 0.1 * torch.randn(9, ARCH.num_weights, requires_grad=True), torch.randn(4, 1, 28, 28)
    expected = batched_forward(weights, queries, ARCH)
    (gradient,) = torch.autograd.grad(expected.sum(), weights)
    tried = scarce(most, error)
    caplog.set_level(logging.WARNING, "wslfast")
    outputs = batched_forward(weights, queries, ARCH)
    assert torch.equal(outputs, expected)
    torch.testing.assert_close(torch.autograd.grad(outputs.sum(), weights)[0], gradient)
    assert tried[0] == 9
    assert max(tried[-2:]) <= most
    warnings = [r.message for r in caplog.records if "out of memory" in r.message]
    assert len(warnings) == len(set(warnings)) > 0


@pytest.mark.parametrize("error", SHORTAGES, ids=lambda e: e.__name__)
@pytest.mark.parametrize("most", [1, 2, 5])
def test_a_loss_halves_and_goes_on(scarce: Callable[..., list[int]], most: int, error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    """The grouped path, as on a GPU: the same losses and gradients."""
    monkeypatch.setattr(engine, "choose", lambda *_, **__: engine.Choice("grouped", "as on a GPU"))
    weights, queries = 0.1 * torch.randn(6, ARCH.num_weights), torch.randn(4, 1, 28, 28)
    targets = torch.randn(6, 4, 10)
    expected = engine.loss_and_gradient(weights, queries, targets, ARCH, "mse")
    tried = scarce(most, error)
    for a, b in zip(engine.loss_and_gradient(weights, queries, targets, ARCH, "mse"), expected, strict=True):
        torch.testing.assert_close(a, b)
    assert tried[0] == 6
    assert tried[-1] <= most


@pytest.mark.parametrize("error", SHORTAGES, ids=lambda e: e.__name__)
def test_one_model_that_does_not_fit_is_a_clear_error(scarce: Callable[..., list[int]], error: type[Exception]) -> None:
    weights, queries = torch.randn(4, ARCH.num_weights, requires_grad=True), torch.randn(2, 1, 28, 28)
    scarce(0, error)
    with pytest.raises(WslfastError, match="out of memory on one model alone; pass fewer queries"):
        batched_forward(weights, queries, ARCH)


def test_another_error_is_not_taken_for_a_shortage(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Tensor:
        raise RuntimeError("shape mismatch")

    for path in ("loop", "cpu"):
        monkeypatch.setitem(engine._FORWARD, path, broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        batched_forward(torch.randn(2, ARCH.num_weights, requires_grad=True), torch.randn(2, 1, 28, 28), ARCH)


@pytest.mark.parametrize("bad", [1, 7, 32, 63])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_models_among_64_touch_nobody_else(bad: int, value: float) -> None:
    """Whatever their number: the others' losses and gradients to the bit, and each policy as documented."""
    generator = torch.Generator().manual_seed(bad)
    weights = 0.1 * torch.randn(64, ARCH.num_weights, generator=generator)
    queries, targets = torch.randn(5, 1, 28, 28, generator=generator), torch.randn(64, 5, 10, generator=generator)
    chosen = torch.randperm(64, generator=generator)[:bad]
    good = torch.ones(64, dtype=torch.bool)
    good[chosen] = False

    def run(rows: Tensor, **options: str) -> tuple[Tensor, Tensor]:
        rows = rows.clone().requires_grad_()
        losses = batched_behavioral_loss(rows, None, queries, ARCH, targets=targets, reduction="none", **options)  # type: ignore[arg-type]
        return losses.detach(), torch.autograd.grad(losses[good].sum(), rows)[0]

    expected, gradient = run(weights)
    spoilt = weights.clone()
    spoilt[chosen, torch.randint(ARCH.num_weights, (bad,), generator=generator)] = value
    for policy in ("propagate", "omit"):
        losses, rows = run(spoilt, nan_policy=policy)
        assert torch.equal(losses[good], expected[good])
        assert torch.equal(rows[good], gradient[good])
    with pytest.raises(WslfastError):
        run(spoilt, nan_policy="raise")
