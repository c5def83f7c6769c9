"""The kernels under autograd, in Triton's interpreter: forms of gradients and queries, and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kernel_cases import MLP, SMALL, Net, error, make, oracle
from tolerances import FP32
from torch import Tensor
from torch_settings import default_dtype

from wslfast.kernels import reference
from wslfast.kernels.layers import Activation, Flatten, Linear

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("needs TRITON_INTERPRET=1 when triton is first imported", allow_module_level=True)

from wslfast.kernels.triton import budget
from wslfast.kernels.triton import launch as kernels
from wslfast.kernels.triton.differentiable import differentiable_forward
from wslfast.kernels.triton.schedule import schedule
from wslfast.kernels.triton.tables import fold_tables

FLATTENED = (Flatten("f"), Linear("l", 12, 5), Activation("a"), Linear("m", 5, 3))


def _forward(weights: Tensor, queries: Tensor, case: Net = SMALL) -> Tensor:
    return differentiable_forward(weights, queries, case.layers, "ieee")


def test_forward_differentiates() -> None:
    weights, queries, targets = make(SMALL, 2, 3)
    weights.requires_grad_()
    wide = weights.detach().double().requires_grad_()
    expected = reference.forward(wide, queries.double(), SMALL.layers)
    for loss in (lambda y: (y.tanh() * targets).sum(), lambda y: y.sum(), lambda y: y[0, 1, 2]):
        weights.grad = wide.grad = None
        outputs = _forward(weights, queries)
        loss(outputs).backward(retain_graph=True)
        once = weights.grad.clone()
        loss(expected).backward(retain_graph=True)
        assert error(once, wide.grad) < FP32 / 2
        loss(outputs).backward()
        assert torch.equal(weights.grad, 2 * once)


@pytest.mark.parametrize("mode", ["layers", "network"])
def test_results_are_float32_whatever_the_default_type(mode: str) -> None:
    weights, queries, targets = make(MLP, 2, 3)

    def run() -> list[Tensor]:
        w, x = weights.clone().requires_grad_(), queries.clone().requires_grad_()
        outputs = differentiable_forward(w, x, MLP.layers, "ieee")
        slopes = torch.autograd.grad((outputs * targets).sum(), (w, x))
        return [
            outputs.detach(),
            *slopes,
            kernels.forward(weights, queries, MLP.layers, "ieee", mode=mode),
            *kernels.loss_and_gradient(weights, queries, targets, MLP.layers, "mse", precision="ieee", mode=mode),
        ]

    expected = run()
    with default_dtype(torch.float64):
        found = run()
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_partial_sums_beyond_32_bits_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their places would wrap around, and the gradients there be zero."""
    weights, queries, targets = make(MLP, 2, 3)
    row = fold_tables(schedule(MLP.layers, MLP.shape), 3, weights.device).row
    monkeypatch.setattr(budget, "OFFSETS", row + 1)
    kernels.loss_and_gradient(weights, queries, targets, MLP.layers, "mse", precision="ieee", mode="layers")
    monkeypatch.setattr(budget, "OFFSETS", row)
    with pytest.raises(ValueError, match=f"{row} partial sums a model"):
        kernels.loss_and_gradient(weights, queries, targets, MLP.layers, "mse", precision="ieee", mode="layers")


GRADIENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "expanded": lambda g: g[:1, :1].expand(2, 3, 3),  # stride 0, as behind a sum over models and queries
    "one number": lambda g: g.new_tensor(0.7).expand(2, 3, 3),
    "transposed": lambda g: g.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "sliced": lambda g: torch.cat([g, g], 2)[:, :, ::2],
    "half": lambda g: g.to(torch.float16),
}


@pytest.mark.parametrize("form", GRADIENTS)
def test_any_strides_of_the_incoming_gradient(form: str) -> None:
    weights, queries, base = make(MLP, 2, 3)
    weights.requires_grad_()
    gradient = GRADIENTS[form](base)
    wide = weights.detach().double().requires_grad_()
    outputs = _forward(weights, queries, MLP)
    if gradient.dtype != torch.float32:
        outputs = outputs.to(gradient.dtype)
    (found,) = torch.autograd.grad(outputs, weights, gradient)
    (expected,) = torch.autograd.grad(reference.forward(wide, queries.double(), MLP.layers), wide, gradient.double())
    assert error(found, expected) < FP32 / 2


@pytest.mark.parametrize("kind", [torch.float16, torch.float64])
def test_gradients_have_the_weights_dtype(kind: torch.dtype) -> None:
    weights, queries, _ = (t.to(kind) for t in make(MLP, 2, 3))
    weights.requires_grad_()
    assert torch.autograd.grad(_forward(weights, queries, MLP).sum(), weights)[0].dtype == kind


def test_differentiated_twice_is_an_error() -> None:
    """Also behind a plain sum, whose gradient is a constant: an error, not half an answer."""
    weights, queries, _ = make(MLP, 2, 3)
    weights.requires_grad_()
    for value in (_forward(weights, queries, MLP).sum(), _forward(weights, queries, MLP).square().sum()):
        (slope,) = torch.autograd.grad(value, weights, create_graph=True)
        with pytest.raises(RuntimeError, match="once"):
            (weights.sum() + slope.sum()).backward()
        with pytest.raises(RuntimeError, match="once"):
            torch.autograd.grad(slope.sum(), weights, allow_unused=True)  # None is zeros to torch.autograd.functional


def test_without_a_gradient_there_is_no_graph() -> None:
    weights, queries, _ = make(MLP, 2, 3)
    outputs = _forward(weights, queries, MLP)
    assert not outputs.requires_grad
    assert torch.equal(outputs, kernels.forward(weights, queries, MLP.layers, "ieee"))
    with torch.no_grad():
        assert not _forward(weights.requires_grad_(), queries, MLP).requires_grad


@pytest.mark.parametrize("shape", [(2, 3, 2), (12,)])
@pytest.mark.parametrize("own", [False, True])
def test_a_network_that_flattens_takes_images_and_vectors(shape: tuple[int, ...], own: bool, poisoned_empty: None) -> None:
    case = Net(FLATTENED, shape)
    weights, queries, targets = make(case, 2, 3)
    queries = torch.randn(2, 3, *shape) if own else queries
    assert error(_forward(weights, queries, case), reference.forward(weights.double(), queries.double(), FLATTENED)) < FP32 / 2
    expected = oracle(weights, queries, targets, FLATTENED, "mse")
    assert error(kernels.loss_and_gradient(weights, queries, targets, FLATTENED, "mse", 2.0, "ieee")[1], expected[1]) < FP32 / 2
    if not own:
        index = torch.tensor([[0, 2], [1, 1]])
        pooled = kernels.forward(weights, queries, FLATTENED, "ieee", index=index)
        assert torch.equal(pooled, _forward(weights, queries[index], case))


def test_queries_of_no_known_form_are_named() -> None:
    weights, queries, _ = make(MLP, 2, 3)
    for wrong in (queries[0], queries.view(3, 1, 1, 1, 1, 5)):
        with pytest.raises(ValueError, match="expected queries"):
            kernels.forward(weights, wrong, MLP.layers)
    with pytest.raises(ValueError, match="pool"):
        kernels.forward(weights, queries.expand(2, 3, 5), MLP.layers, index=torch.zeros(2, 2, dtype=torch.long))


@pytest.mark.parametrize("criterion", ["mse", "labels"])
def test_warmup(criterion: str) -> None:
    kernels.warmup(MLP.layers, MLP.shape, 3, criterion, "ieee", "cpu")
