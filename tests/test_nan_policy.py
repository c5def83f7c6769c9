"""Models that are not finite, under each ``nan_policy``: which ones count as bad, and that nobody else is touched."""

from __future__ import annotations

import pytest
import torch
from behavior_cases import REDUCTIONS, case, functional_oracle, loss_and_gradient
from small_networks import OPAQUE, SMALL
from tolerances import FP32_ROUNDING, FP64
from torch import Tensor

from wslfast.architecture import Architecture
from wslfast.behavior import batched_behavioral_loss
from wslfast.errors import WslfastError
from wslfast.kernels.layers import Linear
from wslfast.testing import as_module, relative_error


def _spoil(rows: Tensor, originals: Tensor, how: str, models: list[int]) -> tuple[Tensor, Tensor]:
    rows, originals = rows.clone(), originals.clone()
    if how == "nan-weight":
        rows[models, 3] = torch.nan
    elif how == "inf-weight":
        rows[models, -1] = torch.inf
    elif how == "overflow":
        rows[models] *= 1e30
    elif how == "nan-original":
        originals[models, 0] = torch.nan
    elif how == "inf-original":
        originals[models, -1] = -torch.inf
    else:
        originals[models] *= 1e30
    return rows, originals


HOW = ("nan-weight", "inf-weight", "overflow", "nan-original", "inf-original", "overflowing-original")
CNN = Architecture.cnn()


@pytest.mark.parametrize(
    ("how", "criterion"),
    [*((how, "mse") for how in HOW), ("nan-weight", "softmax_mse"), ("overflow", "cross_entropy"), ("inf-original", "distillation")],
)
def test_omit_is_bit_equal_to_a_run_without(how: str, criterion: str) -> None:
    rows, originals, queries = case(CNN, 6, 5)
    bad, good = [1, 4], [0, 2, 3, 5]
    spoiled, others = _spoil(rows, originals, how, bad)
    clean = batched_behavioral_loss(spoiled.requires_grad_(), others, queries, CNN, criterion=criterion, reduction="none").isfinite()
    assert clean[good].all()
    if criterion == "mse":
        assert not clean[bad].any()
    bad = [j for j in bad if not clean[j]]  # a softmax may survive what a square does not
    good = [j for j in range(6) if clean[j]]
    for reduction in REDUCTIONS:
        value, gradient = loss_and_gradient(spoiled, others, queries, CNN, criterion=criterion, reduction=reduction, nan_policy="omit")
        expected, alone = loss_and_gradient(
            spoiled[good], others[good], queries, CNN, criterion=criterion, reduction=reduction, nan_policy="omit"
        )
        assert torch.equal(gradient[good], alone)
        assert not gradient[bad].any()
        if reduction == "none":
            assert torch.equal(value[good], expected)
            assert value[bad].isnan().all()
        else:
            assert float(value) == pytest.approx(float(expected), rel=FP32_ROUNDING)


@pytest.mark.parametrize("arch", [Architecture.cnn3(), SMALL, OPAQUE], ids=["cnn3", "small", "opaque"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float", "double"])
def test_omit_on_every_path(arch: Architecture, dtype: torch.dtype) -> None:
    rows, originals, queries = (t.to(dtype) for t in case(arch, 5, 3))
    rows[2, 0] = torch.nan
    good = [0, 1, 3, 4]
    value, gradient = loss_and_gradient(rows, originals, queries, arch, nan_policy="omit")
    expected, alone = loss_and_gradient(rows[good], originals[good], queries, arch, nan_policy="omit")
    assert torch.equal(gradient[good], alone)
    assert not gradient[2].any()
    assert float(value) == pytest.approx(float(expected), rel=FP32_ROUNDING)


FRAGILE = Architecture.from_layers([Linear("a", 1, 1, bias=False), Linear("b", 1, 1, bias=False)], (1,), "fragile")


@pytest.mark.parametrize("hidden", [False, True], ids=["planned", "opaque"])
def test_a_finite_loss_with_a_gradient_that_is_not(hidden: bool) -> None:
    arch = Architecture("fragile", (1,), None, as_module(FRAGILE), "hidden by a test") if hidden else FRAGILE
    rows = torch.tensor([[1.0, 2.0], [1e37, 1e-36], [0.5, 0.5]])  # the second outputs 10; d/db = (10 + 1000) * 1e37
    targets, queries = torch.tensor([1.0, -1000.0, 3.0]).view(3, 1, 1), torch.ones(1, 1)
    values, gradient = loss_and_gradient(rows, None, queries, arch, targets=targets, reduction="none")
    assert values.isfinite().all()
    assert not gradient[1].isfinite().all()
    value, gradient = loss_and_gradient(rows, None, queries, arch, targets=targets, nan_policy="omit")
    expected, alone = loss_and_gradient(rows[[0, 2]], None, queries, arch, targets=targets[[0, 2]])
    assert torch.equal(gradient[[0, 2]], alone)
    assert not gradient[1].any()
    assert torch.equal(value, expected)
    with pytest.raises(WslfastError, match=r"models \[1\] of 3 have a non-finite value or gradient"):
        loss_and_gradient(rows, None, queries, arch, targets=targets, nan_policy="raise")
    x = queries.clone().requires_grad_()
    batched_behavioral_loss(rows, None, x, arch, targets=targets, nan_policy="omit").backward()
    y = queries.clone().requires_grad_()
    batched_behavioral_loss(rows[[0, 2]], None, y, arch, targets=targets[[0, 2]]).backward()
    assert torch.equal(x.grad, y.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("how", HOW)
def test_propagate_shows_in_that_model_alone(how: str) -> None:
    rows, originals, queries = case(CNN, 4, 5)
    spoiled, others = _spoil(rows, originals, how, [2])
    values, gradient = loss_and_gradient(spoiled, others, queries, CNN, reduction="none")
    clean = loss_and_gradient(rows, originals, queries, CNN, reduction="none")
    good = [0, 1, 3]
    assert not values[2].isfinite()
    assert not gradient[2].isfinite().all()
    assert torch.equal(values[good], clean[0][good])
    assert torch.equal(gradient[good], clean[1][good])
    for reduction in ("mean", "sum"):
        value, gradient = loss_and_gradient(spoiled, others, queries, CNN, reduction=reduction)
        assert not value.isfinite()
        assert gradient[good].isfinite().all()


@pytest.mark.parametrize(("how", "reduction"), zip(HOW, REDUCTIONS * 2, strict=True))
def test_raise_names_the_models(how: str, reduction: str) -> None:
    rows, originals, queries = case(CNN, 4, 5)
    spoiled, others = _spoil(rows, originals, how, [1, 3])
    for requires in (False, True):
        with pytest.raises(WslfastError, match=r"^reconstructed: models \[1, 3\] of 4 have a non-finite value or gradient"):
            batched_behavioral_loss(
                spoiled.detach().requires_grad_(requires), others, queries, CNN, reduction=reduction, nan_policy="raise"
            )
    clean = loss_and_gradient(rows, originals, queries, CNN, reduction=reduction, nan_policy="raise")
    assert torch.equal(clean[1], loss_and_gradient(rows, originals, queries, CNN, reduction=reduction)[1])


@pytest.mark.parametrize("policy", ["omit", "raise", "propagate"])
def test_policies_agree_where_nothing_is_wrong(policy: str) -> None:
    rows, originals, queries = case(CNN)
    expected = loss_and_gradient(rows, originals, queries, CNN)
    got = loss_and_gradient(rows, originals, queries, CNN, nan_policy=policy)
    assert relative_error(got[0], expected[0]) < 1e-7
    assert relative_error(got[1], expected[1]) < 1e-7


@pytest.mark.parametrize("through_queries", [False, True], ids=["rows", "queries"])
def test_every_model_bad(through_queries: bool) -> None:
    rows, originals, queries = case(SMALL)
    leaf, x = rows.fill_(torch.nan).requires_grad_(), queries.requires_grad_(through_queries)
    with pytest.raises(WslfastError, match="nan_policy='omit': all 4 models have a non-finite value or gradient; nothing to average"):
        batched_behavioral_loss(leaf, originals, x, SMALL, nan_policy="omit")
    total = batched_behavioral_loss(leaf, originals, x, SMALL, nan_policy="omit", reduction="sum")
    assert float(total) == 0
    total.backward()
    assert torch.equal(leaf.grad, torch.zeros_like(leaf))  # type: ignore[arg-type]
    assert batched_behavioral_loss(leaf, originals, x, SMALL, nan_policy="omit", reduction="none").isnan().all()
    with pytest.raises(WslfastError, match=r"models \[0, 1, 2, 3\] of 4"):
        batched_behavioral_loss(leaf, originals, x, SMALL, nan_policy="raise")


def test_omitted_models_leave_the_queries_gradient_alone() -> None:
    rows, originals, queries = (t.double() for t in case(SMALL))
    rows[2] = torch.nan
    good = [0, 1, 3]
    leaf, x = rows.requires_grad_(), queries.requires_grad_()
    batched_behavioral_loss(leaf, originals, x, SMALL, nan_policy="omit").backward()
    _, gradients, to_queries = functional_oracle(rows[good], originals[good], queries, SMALL, "mse")
    assert relative_error(x.grad, to_queries.mean(0)) < FP64  # type: ignore[arg-type]
    assert relative_error(leaf.grad[good], gradients / 3) < FP64  # type: ignore[index]
    assert not leaf.grad[2].any()  # type: ignore[index]


def test_nan_values_of_omitted_models_do_not_poison_a_users_own_mean() -> None:
    rows, originals, queries = case(SMALL)
    rows[1] = torch.inf
    leaf = rows.requires_grad_()
    values = batched_behavioral_loss(leaf, originals, queries, SMALL, nan_policy="omit", reduction="none")
    values.nanmean().backward()
    assert leaf.grad.isfinite().all()  # type: ignore[union-attr]
    assert not leaf.grad[1].any()  # type: ignore[index]


def test_a_bad_query_is_bad_for_every_model() -> None:
    rows, originals, queries = case(SMALL)
    queries[3, 1, 2, 2] = torch.nan
    assert batched_behavioral_loss(rows, originals, queries, SMALL, reduction="none").isnan().all()
    with pytest.raises(WslfastError, match="all 4 models"):
        batched_behavioral_loss(rows, originals, queries, SMALL, nan_policy="omit")


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
def test_bad_originals_leave_the_queries_gradient_alone(own: bool) -> None:
    """The originals' answers depend on the queries, too."""
    rows, originals, queries = (t.double() for t in case(SMALL))
    queries = torch.stack([queries, queries + 1, queries - 1, 2 * queries]) if own else queries
    spoiled, good = originals.clone(), [0, 1, 3]
    spoiled[2] = torch.nan

    def slopes(which: list[int], originals: Tensor) -> tuple[Tensor, Tensor]:
        leaf, x = rows[which].requires_grad_(), (queries[which] if own else queries.clone()).requires_grad_()
        batched_behavioral_loss(leaf, originals[which], x, SMALL, nan_policy="omit").backward()
        assert leaf.grad is not None
        assert x.grad is not None
        return leaf.grad, x.grad

    (mine, to_queries), (wanted, expected) = slopes([0, 1, 2, 3], spoiled), slopes(good, originals)
    torch.testing.assert_close(mine[good], wanted)
    assert not mine[2].any()
    torch.testing.assert_close(to_queries[good] if own else to_queries, expected)
    if own:
        assert not to_queries[2].any()


@pytest.mark.parametrize("through", [False, True], ids=["weights alone", "queries too"])
def test_an_omitted_models_gradient_is_zero_whatever_a_user_makes_of_its_nan(through: bool) -> None:
    rows, originals, queries = case(SMALL)
    rows[1] = torch.inf
    leaf = rows.requires_grad_()
    values = batched_behavioral_loss(leaf, originals, queries.requires_grad_(through), SMALL, nan_policy="omit", reduction="none")
    values.log().nanmean().backward()  # whose slope at NaN is NaN
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()
    assert leaf.grad[0].any()
    assert not leaf.grad[1].any()
