"""The kernels as torch operators, in Triton's interpreter: autograd, fakes, opcheck, compiled callers, forms of gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kernel_cases import MLP, SMALL, Net, error, make, oracle
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from wslfast.kernels import reference
from wslfast.kernels.layers import Activation, Flatten, Linear

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("needs TRITON_INTERPRET=1 when triton is first imported", allow_module_level=True)

from wslfast.kernels.triton import launch as kernels

FLATTENED = (Flatten("f"), Linear("l", 12, 5), Activation("a"), Linear("m", 5, 3))


def _forward(weights: Tensor, queries: Tensor, index: Tensor | None = None, case: Net = SMALL) -> Tensor:
    return kernels.population_forward(weights, queries, index, kernels.layers_key(case.layers), "ieee", 0)


def _loss(weights: Tensor, queries: Tensor, targets: Tensor, case: Net = SMALL) -> tuple[Tensor, Tensor]:
    return kernels.population_loss(weights, queries, None, targets, kernels.layers_key(case.layers), "mse", 2.0, "ieee", 0)


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
        assert error(once, wide.grad) < 5e-6
        loss(outputs).backward()
        assert torch.equal(weights.grad, 2 * once)


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
    outputs = _forward(weights, queries, case=MLP)
    if gradient.dtype != torch.float32:
        outputs = outputs.to(gradient.dtype)
    (found,) = torch.autograd.grad(outputs, weights, gradient)
    (expected,) = torch.autograd.grad(reference.forward(wide, queries.double(), MLP.layers), wide, gradient.double())
    assert error(found, expected) < 5e-6


def test_any_strides_of_the_losses_gradient() -> None:
    weights, queries, targets = make(MLP, 2, 3)
    losses, gradient = _loss(weights.requires_grad_(), queries, targets, MLP)
    (found,) = torch.autograd.grad(losses, weights, losses.new_tensor(2.0).expand(2), retain_graph=True)
    assert torch.equal(found, 2 * gradient)
    (found,) = torch.autograd.grad(losses, weights, torch.tensor([1.0, 9.0, -3.0, 9.0])[::2])
    assert torch.equal(found, gradient * torch.tensor([[1.0], [-3.0]]))


@pytest.mark.parametrize("kind", [torch.float16, torch.float64])
def test_gradients_have_the_weights_dtype(kind: torch.dtype) -> None:
    weights, queries, targets = (t.to(kind) for t in make(MLP, 2, 3))
    weights.requires_grad_()
    assert torch.autograd.grad(_forward(weights, queries, case=MLP).sum(), weights)[0].dtype == kind
    assert torch.autograd.grad(_loss(weights, queries, targets, MLP)[0].sum(), weights)[0].dtype == kind


def test_differentiated_twice_is_an_error() -> None:
    """Also behind a plain sum, whose gradient is a constant: an error, not half an answer."""
    weights, queries, targets = make(MLP, 2, 3)
    weights.requires_grad_()
    losses, gradient = _loss(weights, queries, targets, MLP)
    assert not gradient.requires_grad
    for value in (losses.sum(), losses.square().sum()):
        (slope,) = torch.autograd.grad(value, weights, create_graph=True)
        with pytest.raises(RuntimeError, match="once"):
            (weights.sum() + slope.sum()).backward()
    (slope,) = torch.autograd.grad(_forward(weights, queries, case=MLP).square().sum(), weights, create_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        slope.square().sum().backward()


def test_no_gradient_for_queries_is_an_error() -> None:
    weights, queries, _ = make(SMALL, 2, 3)
    with pytest.raises(ValueError, match="queries"):
        _forward(weights.requires_grad_(), queries.requires_grad_())


@pytest.mark.parametrize("shape", [(2, 3, 2), (12,)])
@pytest.mark.parametrize("own", [False, True])
def test_a_network_that_flattens_takes_images_and_vectors(shape: tuple[int, ...], own: bool, poisoned_empty: None) -> None:
    case = Net(FLATTENED, shape)
    weights, queries, targets = make(case, 2, 3)
    queries = torch.randn(2, 3, *shape) if own else queries
    assert error(_forward(weights, queries, case=case), reference.forward(weights.double(), queries.double(), FLATTENED)) < 5e-6
    expected = oracle(weights, queries, targets, FLATTENED, "mse")
    assert error(_loss(weights, queries, targets, case)[1], expected[1]) < 5e-6
    if not own:
        index = torch.tensor([[0, 2], [1, 1]])
        assert torch.equal(_forward(weights, queries, index, case), _forward(weights, queries[index], case=case))


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


def test_fakes_on_a_gpu_that_is_not_there() -> None:
    """Shapes, dtypes and devices of the results without running anything, for every form of the queries."""
    with FakeTensorMode():
        weights = torch.empty(5, 66, device="cuda", dtype=torch.float16)
        for shape, index, n in (((7, 5), None, 7), ((5, 7, 5), None, 7), ((99, 5), torch.empty(5, 4, device="cuda", dtype=torch.long), 4)):
            outputs = _forward(weights, torch.empty(shape, device="cuda"), index, MLP)
            assert (outputs.shape, outputs.dtype, outputs.device.type) == ((5, n, 3), torch.float32, "cuda")
        losses, gradient = _loss(weights, torch.empty(7, 5, device="cuda"), torch.empty(5, 7, 3, device="cuda"), MLP)
        assert (losses.shape, gradient.shape, gradient.dtype) == ((5,), (5, 66), torch.float32)


@pytest.mark.slow
def test_opcheck() -> None:
    """Schema, autograd registration, fakes, and the compiler's dispatch with fixed and with symbolic sizes."""
    weights, queries, targets = make(MLP, 2, 3)
    weights.requires_grad_()
    key, index = kernels.layers_key(MLP.layers), torch.tensor([[0, 2], [1, 1]])
    torch.library.opcheck(kernels.population_forward, (weights, queries, None, key, "ieee", 0))
    torch.library.opcheck(kernels.population_forward, (weights, queries, index, key, "ieee", 0))
    torch.library.opcheck(kernels.population_loss, (weights, queries, None, targets, key, "mse", 2.0, "ieee", 0))
    labels = torch.randint(0, 3, (2, 2))
    torch.library.opcheck(kernels.population_loss, (weights, queries, index, labels, key, "cross_entropy", 2.0, "fp16", 0))


def test_compiled_callers() -> None:
    weights, queries, targets = make(MLP, 2, 3)
    weights.requires_grad_()

    key = kernels.layers_key(MLP.layers)

    def step(w: Tensor) -> Tensor:
        outputs = kernels.population_forward(w, queries, None, key, "ieee", 0)
        losses, _ = kernels.population_loss(w, queries, None, targets, key, "mse", 2.0, "ieee", 0)
        return (outputs - targets).square().sum() + losses.mean()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    (found,) = torch.autograd.grad(compiled(weights), weights)
    (expected,) = torch.autograd.grad(step(weights), weights)
    assert torch.equal(found, expected)
