"""Second derivatives: gradients that have none of their own give an error and never zeros; where there are some, they are right."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch
from behavior_cases import case, functional_oracle
from small_networks import SMALL
from tolerances import FP32, FP64
from torch import Tensor, nn

from wslfast.architecture import Architecture
from wslfast.behavior import batched_behavioral_loss, batched_forward
from wslfast.kernels.once import link, once
from wslfast.testing import relative_error
from wslfast.tokens import TokenLayout


@pytest.mark.parametrize("tokens", [False, True])
def test_torchs_own_hessians_raise_instead_of_being_zero(tokens: bool) -> None:
    rows, originals, queries = case(SMALL)
    given = TokenLayout(SMALL).tokenize(rows).tokens if tokens else rows

    def loss(weights: Tensor) -> Tensor:
        return batched_behavioral_loss(weights, originals, queries, SMALL)

    for second in (torch.autograd.functional.hvp, torch.autograd.functional.vhp):
        with pytest.raises(RuntimeError, match="once_differentiable"):
            second(loss, given, torch.ones_like(given))
    leaf = given.clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.autograd.grad(slope.sum(), leaf, allow_unused=True)  # None came: it was said to depend on nothing


def test_several_gradients_in_one_backward_pass() -> None:
    rows, originals, queries = case(SMALL)
    leaf = rows.clone().requires_grad_()
    values = batched_behavioral_loss(leaf, originals, queries, SMALL, reduction="none")
    (every,) = torch.autograd.grad(values, leaf, torch.eye(len(rows)), is_grads_batched=True)
    gradient = functional_oracle(rows, originals, queries, SMALL, "mse")[1]
    for j, own in enumerate(every):
        assert relative_error(own[j], gradient[j]) < 2 * FP32
        assert float(own.norm()) == pytest.approx(float(own[j].norm()))  # nothing of the other models


def test_a_marked_gradient_has_the_same_numbers_and_no_graph_where_none_is_recorded() -> None:
    gradient, of = torch.randn(3, 2), torch.randn(3, 2, requires_grad=True)
    assert torch.equal(once(gradient, of), gradient)
    assert once(gradient, torch.ones(2)).requires_grad  # nothing that could be asked for, and still no constant
    with torch.no_grad():
        assert once(gradient, of) is gradient


def test_a_link_leads_to_its_tensor_and_does_not_keep_it() -> None:
    leaf = torch.ones(4, 3, requires_grad=True)
    between = leaf * 2
    tail, held = link(between), weakref.ref(between.untyped_storage())
    assert torch.equal(torch.autograd.grad(tail, leaf)[0], torch.zeros(4, 3))
    del between
    gc.collect()
    assert held() is None


@pytest.mark.parametrize("shape", [(6,), (2, 6)])
def test_forward_mode_over_forward_mode_of_a_layer_norm(shape: tuple[int, ...]) -> None:
    """torch's own layer norm gives a wrong second derivative here; that of a gradient, in reverse mode twice, is right."""
    torch.manual_seed(0)
    first = nn.Linear(shape[-1], shape[-1])
    architecture = Architecture.from_module(nn.Sequential(first, nn.LayerNorm(shape), nn.Flatten(), nn.Linear(math.prod(shape), 2)), shape)
    rows = torch.randn(2, architecture.num_weights, dtype=torch.float64)
    originals, queries = torch.randn_like(rows), torch.randn(3, *shape, dtype=torch.float64)

    def loss(weights: Tensor) -> Tensor:
        return batched_behavioral_loss(weights, originals, queries, architecture)

    along = torch.randn_like(rows)
    slope = torch.func.jvp(lambda w: torch.func.jvp(loss, (w,), (along,))[1], (rows,), (along,))[1]
    leaf = rows.clone().requires_grad_()
    wanted = batched_forward(originals, queries, architecture)
    value = (batched_forward(leaf, queries, architecture) - wanted).square().sum() / (2 * len(queries) * len(rows))
    (gradient,) = torch.autograd.grad(value, leaf, create_graph=True)
    (curved,) = torch.autograd.grad((gradient * along).sum(), leaf)
    torch.testing.assert_close(slope, (curved * along).sum(), rtol=FP64, atol=FP64)
