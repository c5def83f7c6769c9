"""The library call against two independent oracles: ordinary modules one after another, and torch.func, both in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from behavior_cases import NETS, REDUCTIONS, case, functional_oracle, largest_error, loss_and_gradient, stored_weights
from small_networks import OPAQUE, SMALL
from tolerances import BARS, FP32, FP32_DEEP, FP32_ROUNDING, FP64, FP64_GRADIENT, FP64_ROUNDING
from torch import Tensor, nn

from wslfast.architecture import Architecture
from wslfast.behavior import CRITERIA, batched_behavioral_loss, batched_forward
from wslfast.kernels import criteria
from wslfast.permutation import random_views
from wslfast.population import Population, unstack
from wslfast.testing import oracle_loss, oracle_outputs, relative_error
from wslfast.tokens import TokenLayout

# -- values and gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("net", "criterion"),
    [*((net, criterion) for net in ("small", "mlp") for criterion in CRITERIA), ("cnn", "mse"), ("cnn", "distillation"),
     ("cnn3", "mse"), ("cnn3", "cross_entropy"), ("lenet5", "softmax_mse")],
)  # fmt: skip
def test_against_both_oracles(net: str, criterion: str) -> None:
    """fp32: 1e-5 per parameter and model, as design.md section 5; the difference of two softmaxes cancels, so its gradient may be 3e-5."""
    arch = NETS[net]
    rows, original, queries = case(arch, 3, 4)
    targets = oracle_outputs(original, queries, arch)
    values, gradients = oracle_loss(rows, queries, targets, arch, criterion)
    other = functional_oracle(rows, original, queries, arch, criterion)
    assert relative_error(other[0], values) < FP64
    assert largest_error(other[1], gradients, arch) < FP64_GRADIENT
    single, double = (
        loss_and_gradient(rows, original, queries, arch, criterion=criterion, reduction="none"),
        loss_and_gradient(rows.double(), original.double(), queries.double(), arch, criterion=criterion, reduction="none"),
    )
    assert relative_error(double[0], values) < FP64
    assert largest_error(double[1], gradients, arch) < FP64_GRADIENT
    assert single[0].dtype == single[1].dtype == torch.float32
    assert relative_error(single[0], values) < FP32
    assert largest_error(single[1], gradients, arch) < (3e-5 if criterion == "softmax_mse" else 1e-5)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_opaque_against_torch_func(criterion: str) -> None:
    rows, original, queries = case(OPAQUE)
    values, gradients, _ = functional_oracle(rows, original, queries, OPAQUE, criterion)
    got = loss_and_gradient(rows, original, queries, OPAQUE, criterion=criterion, reduction="none")
    assert relative_error(got[0], values) < FP32
    assert largest_error(got[1], gradients, OPAQUE) < 3 * FP32


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("temperature", [0.5, 4])
def test_reductions_and_temperature(reduction: str, temperature: float) -> None:
    rows, original, queries = case(SMALL)
    values, gradients, _ = functional_oracle(rows, original, queries, SMALL, "distillation", temperature)
    got = loss_and_gradient(rows, original, queries, SMALL, criterion="distillation", temperature=temperature, reduction=reduction)
    expected = {"mean": values.mean(), "sum": values.sum(), "none": values}[reduction]
    assert got[0].shape == expected.shape
    assert relative_error(got[0], expected) < FP32
    assert relative_error(got[1], gradients / (4 if reduction == "mean" else 1)) < FP32


def test_mse_is_the_papers_formula() -> None:
    rows, original, queries = (t.double() for t in case(SMALL, 3, 7))
    a, b = oracle_outputs(rows, queries, SMALL), oracle_outputs(original, queries, SMALL)
    total = sum(float((a[j, i] - b[j, i]).norm() ** 2) for j in range(3) for i in range(7))
    assert float(batched_behavioral_loss(rows, original, queries, SMALL)) == pytest.approx(total / (2 * 3 * 7), rel=FP64_ROUNDING)


def test_cross_entropy_is_least_at_the_original_and_never_negative() -> None:
    rows, original, queries = case(SMALL)
    at = batched_behavioral_loss(original, original, queries, SMALL, criterion="cross_entropy", reduction="none")
    off = batched_behavioral_loss(rows, original, queries, SMALL, criterion="cross_entropy", reduction="none")
    assert (at >= 0).all()
    assert (off > at).all()
    _, gradient = loss_and_gradient(original, original, queries, SMALL, criterion="cross_entropy")
    assert float(gradient.abs().max()) < 1e-6


@pytest.mark.parametrize("criterion", ["mse", "softmax_mse", "distillation"])
def test_a_model_is_at_no_distance_from_itself_or_its_views(criterion: str) -> None:
    rows = stored_weights(SMALL, 3, 0).double()
    for other in (rows, random_views(rows, SMALL)):
        value, gradient = loss_and_gradient(
            other, rows, torch.randn(4, *SMALL.input_shape, dtype=torch.float64), SMALL, criterion=criterion
        )
        assert abs(float(value)) < 1e-14
        assert float(gradient.abs().max()) < 1e-12


def test_golden_g3() -> None:
    """reference.md section 5: target t, output 1.05 t (t the G1 weights of CNN3), queries sin(0.01 k)."""
    arch = Architecture.cnn3()
    rows = (0.3 * torch.arange(arch.num_weights, dtype=torch.float64).sin()).float()[None]
    queries = (0.01 * torch.arange(8 * 3 * 32 * 32, dtype=torch.float64)).sin().float().view(8, 3, 32, 32)
    expected = [-0.133919, -0.503385, -0.332597, 0.249411, 0.610717, 0.312124, -0.362358, -0.677856, -0.260129, 0.460709]
    assert batched_forward(rows, queries, arch)[0, 0].tolist() == pytest.approx(expected, abs=2 * FP32_ROUNDING)
    tokens = TokenLayout(arch).tokenize(rows).tokens
    # The published value is itself a float32 sum: for distillation, whose terms cancel to first order, it lies 1.2e-4 from the
    # float64 value of the same weights.
    for criterion, value, single in (("softmax_mse", 1.109059e-5, 1e-4), ("distillation", 5.544150e-4, 1.5e-4)):
        got = batched_behavioral_loss(1.05 * tokens, tokens, queries, arch, criterion=criterion)
        assert float(got) == pytest.approx(value, rel=single)
        exact = functional_oracle(1.05 * rows, rows, queries, arch, criterion)
        assert float(exact[0]) == pytest.approx(value, rel=1.5e-4)
        double = batched_behavioral_loss((1.05 * rows).double(), rows.double(), queries, arch, criterion=criterion)
        assert float(double) == pytest.approx(float(exact[0]), rel=FP64)
        leaf = (1.05 * rows).requires_grad_()
        batched_behavioral_loss(leaf, rows, queries, arch, criterion=criterion).backward()
        assert relative_error(leaf.grad, exact[1]) < FP32_DEEP  # type: ignore[arg-type]


def test_forward_matches_and_is_differentiable_in_both() -> None:
    rows, _, queries = (t.double() for t in case(SMALL))
    rows, queries = rows.requires_grad_(), queries.requires_grad_()
    assert torch.autograd.gradcheck(lambda w, x: batched_forward(w, x, SMALL)[:, :, 0], (rows[:2, :], queries[:1]), fast_mode=True)
    outputs = batched_forward(rows, queries, SMALL)
    assert relative_error(outputs, oracle_outputs(rows, queries, SMALL)) < FP64_ROUNDING
    with torch.no_grad():
        assert not batched_forward(rows, queries, SMALL).requires_grad


# -- forms of weights --------------------------------------------------------------------------------------------------

FORMS: dict[str, Callable[[Tensor], Any]] = {
    "weights": lambda w: w,
    "tokens": lambda w: TokenLayout(SMALL).tokenize(w).tokens,
    "tokens-chunked": lambda w: TokenLayout(SMALL, 7).tokenize(w).tokens,
    "tokens-of-one": lambda w: TokenLayout(SMALL, 1).tokenize(w).tokens,
    "dict": lambda w: unstack(w, SMALL),
    "dict-reversed": lambda w: dict(reversed(unstack(w, SMALL).items())),
}


@pytest.mark.parametrize("reconstructed", FORMS)
@pytest.mark.parametrize("original", ["weights", "tokens-chunked", "dict", "population"])
def test_every_form(reconstructed: str, original: str) -> None:
    rows, originals, queries = case(SMALL)
    expected = loss_and_gradient(rows, originals, queries, SMALL)
    leaf = rows.clone().requires_grad_()
    other = Population(SMALL, originals) if original == "population" else FORMS[original](originals)
    value = batched_behavioral_loss(FORMS[reconstructed](leaf), other, queries, SMALL)
    value.backward()
    assert torch.equal(value.detach(), expected[0])
    assert torch.equal(leaf.grad, expected[1])  # type: ignore[arg-type]
    assert torch.equal(batched_forward(FORMS[reconstructed](rows), queries, SMALL), batched_forward(rows, queries, SMALL))


def test_padding_of_tokens_does_not_matter() -> None:
    rows, originals, queries = case(SMALL)
    layout = TokenLayout(SMALL)
    tokens = torch.where(layout.mask, layout.tokenize(rows).tokens, torch.nan).requires_grad_()
    value = batched_behavioral_loss(tokens, originals, queries, SMALL, nan_policy="raise")
    value.backward()
    assert torch.equal(value.detach(), batched_behavioral_loss(rows, originals, queries, SMALL))
    assert torch.equal(tokens.grad[:, ~layout.mask], torch.zeros(4, int((~layout.mask).sum())))  # type: ignore[index]


def test_a_population_has_no_gradient() -> None:
    rows, originals, queries = case(SMALL)
    assert not batched_behavioral_loss(Population(SMALL, rows), originals, queries, SMALL).requires_grad
    assert batched_forward(Population(SMALL, rows), queries, SMALL).shape == (4, 5, 3)


def test_targets_in_place_of_originals() -> None:
    rows, originals, queries = case(SMALL)
    targets = batched_forward(originals, queries, SMALL)
    expected = loss_and_gradient(rows, originals, queries, SMALL)
    wide = torch.full((4, 10, 3), torch.nan)
    wide[:, ::2] = targets
    forms = {"plain": targets, "requires-grad": targets.clone().requires_grad_(), "strided": wide[:, ::2], "double": targets.double()}
    for name, form in forms.items():
        got = loss_and_gradient(rows, None, queries, SMALL, targets=form)
        assert torch.equal(got[0], expected[0]), name
        assert torch.equal(got[1], expected[1]), name
    assert forms["requires-grad"].grad is None
    shared = targets[:1].expand(4, -1, -1)  # stride 0 over models
    assert torch.equal(
        loss_and_gradient(rows, None, queries, SMALL, targets=shared)[1],
        loss_and_gradient(rows, None, queries, SMALL, targets=shared.clone())[1],
    )


def test_the_original_never_gets_a_gradient() -> None:
    rows, originals, queries = case(SMALL)
    leaf, other, x = rows.requires_grad_(), originals.requires_grad_(), queries.requires_grad_()
    batched_behavioral_loss(leaf, other, queries.detach(), SMALL).backward()
    batched_behavioral_loss(leaf, other, x, SMALL).backward()
    batched_behavioral_loss(leaf, unstack(other, SMALL), x, SMALL).backward()
    assert other.grad is None
    assert leaf.grad is not None
    assert not batched_behavioral_loss(rows.detach(), other, queries.detach(), SMALL).requires_grad
    same = originals.detach().clone().requires_grad_()
    batched_behavioral_loss(same, same, queries.detach(), SMALL).backward()
    assert torch.equal(same.grad, torch.zeros_like(same))  # type: ignore[arg-type]


# -- autograd habits ---------------------------------------------------------------------------------------------------


def test_incoming_gradients_of_any_stride() -> None:
    rows, originals, queries = case(SMALL)
    _, expected = loss_and_gradient(rows, originals, queries, SMALL, reduction="none")
    leaf = rows.requires_grad_()

    def values() -> Tensor:
        return batched_behavioral_loss(leaf, originals, queries, SMALL, reduction="none")

    scale = torch.tensor([2.0, -1.0, 0.0, 0.5])
    wide = torch.stack([scale, scale * 7], 1)
    for name, gradient, factor in (
        ("sum", torch.autograd.grad(values().sum(), leaf)[0], torch.ones(4)),
        ("expand", torch.autograd.grad(values().expand(3, 4).sum(), leaf)[0], torch.full((4,), 3.0)),
        ("stride-0", torch.autograd.grad(values(), leaf, torch.tensor(2.0).expand(4))[0], torch.full((4,), 2.0)),
        ("strided", torch.autograd.grad(values(), leaf, wide[:, 0])[0], scale),
        ("one", torch.autograd.grad(values()[2], leaf)[0], torch.tensor([0.0, 0, 1, 0])),
    ):
        assert relative_error(gradient, expected * factor[:, None]) < FP32 / 10, name


@pytest.mark.parametrize("nan_policy", ["propagate", "omit", "raise"])
def test_retain_graph_gives_the_same_twice(nan_policy: str) -> None:
    rows, originals, queries = case(SMALL)
    leaf = rows.requires_grad_()
    loss = batched_behavioral_loss(leaf, originals, queries, SMALL, nan_policy=nan_policy)
    (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    copy = first.clone()
    first.fill_(torch.nan)  # what is handed out is not what is kept
    (second,) = torch.autograd.grad(loss, leaf)
    assert torch.equal(copy, second)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaf)


def test_create_graph_raises_instead_of_lying() -> None:
    rows, originals, queries = case(SMALL)
    leaf = rows.requires_grad_()
    loss = batched_behavioral_loss(leaf, originals, queries, SMALL).square()
    total = torch.autograd.grad(loss, leaf, create_graph=True)[0].sum()
    with pytest.raises(RuntimeError, match="once_differentiable"):
        total.backward()


def test_gradients_flow_on_through_a_decoder() -> None:
    rows, originals, queries = case(SMALL)
    decoder = nn.Linear(6, SMALL.num_weights)
    latent = torch.randn(4, 6)
    batched_behavioral_loss(decoder(latent) * 0.1, originals, queries, SMALL).backward()
    gradient = functional_oracle(decoder(latent) * 0.1, originals, queries, SMALL, "mse")[1] / 4
    assert relative_error(decoder.weight.grad, 0.1 * gradient.T.float() @ latent) < 2 * FP32  # type: ignore[arg-type]
    assert rows is not None


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("arch", [SMALL, OPAQUE], ids=["planned", "opaque"])
def test_queries_that_require_a_gradient_get_it(arch: Architecture, criterion: str) -> None:
    rows, originals, queries = (t.double() for t in case(arch))
    values, gradients, query_gradients = functional_oracle(rows, originals, queries, arch, criterion)
    for policy in ("propagate", "omit", "raise"):
        leaf, x = rows.clone().requires_grad_(), queries.clone().requires_grad_()
        loss = batched_behavioral_loss(leaf, originals, x, arch, criterion=criterion, nan_policy=policy)
        loss.backward()
        assert float(loss) == pytest.approx(float(values.mean()), rel=FP64)
        assert relative_error(leaf.grad, gradients / 4) < FP64_GRADIENT  # type: ignore[arg-type]
        assert relative_error(x.grad, query_gradients.sum(0) / 4) < FP64_GRADIENT  # type: ignore[arg-type]
    x = queries.clone().requires_grad_()
    batched_behavioral_loss(rows, originals, x, arch, criterion=criterion).backward()
    assert relative_error(x.grad, query_gradients.sum(0) / 4) < FP64_GRADIENT  # type: ignore[arg-type]


def test_without_grad() -> None:
    rows, originals, queries = case(SMALL)
    expected = batched_behavioral_loss(rows, originals, queries, SMALL)
    leaf = rows.clone().requires_grad_()
    with torch.no_grad():
        plain = batched_behavioral_loss(leaf, originals, queries, SMALL)
    with torch.inference_mode():
        inference = batched_behavioral_loss(leaf, originals, queries, SMALL)
    assert not plain.requires_grad
    assert torch.equal(plain, expected)
    assert torch.equal(inference, expected)


def test_bf16_autocast() -> None:
    rows, originals, queries = case(Architecture.cnn())
    values, gradients, _ = functional_oracle(rows, originals, queries, Architecture.cnn(), "mse")
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradient = loss_and_gradient(rows, originals, queries, Architecture.cnn())
        assert batched_forward(rows, queries, Architecture.cnn()).dtype == torch.bfloat16
    assert loss.dtype == gradient.dtype == torch.float32
    assert relative_error(loss, values.mean()) < BARS["bf16"].outputs
    assert relative_error(gradient, gradients / 4) < BARS["bf16"].convolution


# -- layouts and dtypes ------------------------------------------------------------------------------------------------


def _sliced(t: Tensor) -> Tensor:
    wide = t.new_full((2 * t.shape[0], *t.shape[1:]), torch.nan)
    wide[::2] = t
    return wide[::2]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "sliced": _sliced,
    "inner-sliced": lambda t: torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0],
    "offset": lambda t: torch.cat([torch.full_like(t[:1], torch.nan), t])[1:],
    "flipped": lambda t: t.flip(0).contiguous().flip(0),
}


@pytest.mark.parametrize("form", LAYOUTS)
def test_strides(form: str) -> None:
    arch = Architecture.cnn3(2)
    rows, originals, queries = case(arch, 3, 4)
    expected = loss_and_gradient(rows, originals, queries, arch)
    view = LAYOUTS[form]
    leaf = rows.clone().requires_grad_()
    value = batched_behavioral_loss(view(leaf), view(originals), view(queries), arch)
    value.backward()
    assert relative_error(value, expected[0]) < FP32 / 10
    assert relative_error(leaf.grad, expected[1]) < FP32 / 10  # type: ignore[arg-type]
    x = queries.clone().requires_grad_()
    batched_behavioral_loss(view(rows), view(originals), view(x), arch).backward()
    assert relative_error(x.grad, functional_oracle(rows, originals, queries, arch, "mse")[2].mean(0)) < FP32  # type: ignore[arg-type]


def test_channels_last_queries() -> None:
    rows, originals, queries = case(Architecture.cnn3(), 3, 4)
    expected = loss_and_gradient(rows, originals, queries, Architecture.cnn3())
    got = loss_and_gradient(rows, originals, queries.contiguous(memory_format=torch.channels_last), Architecture.cnn3())
    assert relative_error(got[0], expected[0]) < FP32 / 10
    assert relative_error(got[1], expected[1]) < FP32 / 10


def test_expanded() -> None:
    rows, originals, queries = case(SMALL)
    leaf = rows[:1].clone().requires_grad_()
    batched_behavioral_loss(leaf.expand(4, -1), originals, queries, SMALL, reduction="sum").backward()
    _, expected = loss_and_gradient(rows[:1].repeat(4, 1), originals, queries, SMALL, reduction="sum")
    assert relative_error(leaf.grad, expected.sum(0, keepdim=True)) < FP32 / 10  # type: ignore[arg-type]
    same = queries[:1].expand(5, -1, -1, -1)
    assert torch.equal(loss_and_gradient(rows, originals, same, SMALL)[1], loss_and_gradient(rows, originals, same.contiguous(), SMALL)[1])
    assert torch.equal(
        loss_and_gradient(rows, originals[:1].expand(4, -1), queries, SMALL)[1],
        loss_and_gradient(rows, originals[:1].repeat(4, 1), queries, SMALL)[1],
    )
    one = torch.zeros(1).expand(3, 2, 7, 9)  # stride 0 everywhere
    assert torch.equal(batched_forward(rows, one, SMALL), batched_forward(rows, torch.zeros(3, 2, 7, 9), SMALL))


DTYPES = {
    "half": (torch.float16, torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "half-originals": (torch.float32, torch.float16, torch.float32),
    "double-queries": (torch.float32, torch.float32, torch.float64),
    "double-originals": (torch.float32, torch.float64, torch.float16),
    "double": (torch.float64, torch.float32, torch.bfloat16),
}


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_mixed_dtypes(dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]) -> None:
    rows, originals, queries = (t.to(dtype) for t, dtype in zip(case(SMALL), dtypes, strict=True))
    values, gradients, _ = functional_oracle(rows, originals, queries, SMALL, "mse")
    value, gradient = loss_and_gradient(rows, originals, queries, SMALL)
    double = dtypes[0] == torch.float64
    assert value.dtype == (torch.float64 if double else torch.float32)
    assert gradient.dtype == dtypes[0]
    assert relative_error(value, values.mean()) < (1e-12 if double else 1e-5)
    rounding = {torch.float16: 1e-3, torch.bfloat16: 5e-3, torch.float32: 1e-5, torch.float64: 1e-12}[dtypes[0]]
    assert relative_error(gradient, gradients / 4) < rounding
    assert batched_forward(rows, queries, SMALL).dtype == value.dtype


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_mean_over_no_queries_is_nan_and_no_error(criterion: str) -> None:
    nothing = torch.zeros(2, 0, 3)
    assert criteria.criterion_values(nothing, nothing, criterion).isnan().all()
    values, gradient = criteria.share_of_loss(nothing, nothing, 0, criterion, 2.0)
    assert values.isnan().all()
    assert gradient.shape == nothing.shape


@pytest.mark.parametrize(("k", "n"), [(1, 1), (1, 5), (3, 1), (5, 63), (9, 17)], ids=str)
@pytest.mark.parametrize("net", ["cnn", "mlp"])
def test_odd_sizes(net: str, k: int, n: int, poisoned_empty: None) -> None:
    rows, originals, queries = case(NETS[net], k, n)
    values, gradients, _ = functional_oracle(rows, originals, queries, NETS[net], "mse")
    value, gradient = loss_and_gradient(rows, originals, queries, NETS[net], reduction="none")
    assert value.shape == (k,)
    assert relative_error(value, values) < FP32
    assert largest_error(gradient, gradients, NETS[net]) < FP32
