"""The library call against two independent oracles: ordinary modules one after another, and torch.func, both in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_networks import OPAQUE, SMALL, Residual
from tolerances import BARS, FP32, FP32_DEEP, FP32_ROUNDING, FP64, FP64_GRADIENT, FP64_ROUNDING
from torch import Tensor, nn

from wslfast.architecture import Architecture
from wslfast.behavior import CRITERIA, batched_behavioral_loss, batched_forward
from wslfast.errors import WslfastError
from wslfast.kernels.layers import Linear
from wslfast.permutation import random_views
from wslfast.population import Population, unstack
from wslfast.testing import as_module, oracle_loss, oracle_outputs, relative_error
from wslfast.tokens import TokenLayout


class PlainNorm(nn.Module):
    """Batch norm in evaluation mode by its formula: torch's own has no gradient to the running statistics."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, mean, var = (t.view(1, 2, 1, 1) for t in self.buffers())
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias


NETS = {
    "cnn": Architecture.cnn(),
    "cnn3": Architecture.cnn3(),
    "lenet5": Architecture.lenet5(1, "gelu"),
    "mlp": Architecture.mlp(),
    "small": SMALL,
}
REDUCTIONS = ("mean", "sum", "none")


def _models(arch: Architecture, k: int, seed: int) -> Tensor:
    if arch.planned:
        return arch.initial_weights((["kaiming_uniform", "default", "xavier_normal"] * k)[:k], range(seed, seed + k))
    weights = torch.randn(k, arch.num_weights, generator=torch.Generator().manual_seed(seed)) / 3
    for slot in arch.parameters:
        if slot.name.endswith("running_var"):
            weights[:, slot.offset : slot.stop] = weights[:, slot.offset : slot.stop].abs() + 0.5
    return weights


def _case(arch: Architecture, k: int = 4, n: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Reconstructed and original weights, and queries."""
    queries = torch.randn(n, *arch.input_shape, generator=torch.Generator().manual_seed(9))
    return _models(arch, k, 0), _models(arch, k, 50), queries


def _module(arch: Architecture) -> nn.Module:
    if arch.planned:
        return as_module(arch).double()
    module = Residual().double()
    module.bn = PlainNorm().double()  # type: ignore[assignment]
    return module


def functional_oracle(
    weights: Tensor, original: Tensor, queries: Tensor, arch: Architecture, criterion: str, temperature: float = 2.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Per-model values, gradients to the weights and whole gradients to the queries ``[k, n, ...]``, those through the original's
    outputs included, by torch.func in float64."""
    module = _module(arch)

    def outputs(row: Tensor, x: Tensor) -> Tensor:
        return torch.func.functional_call(module, {s.name: row[s.offset : s.stop].view(s.shape) for s in arch.parameters}, (x,))

    def value(row: Tensor, other: Tensor, x: Tensor) -> Tensor:
        y, target = outputs(row, x), outputs(other, x)
        if criterion == "mse":
            return (y - target).pow(2).sum() / (2 * y.shape[0])
        if criterion == "huber":
            return F.huber_loss(y, target, reduction="sum") / y.shape[0]
        if criterion == "softmax_mse":
            return (F.softmax(y, -1) - F.softmax(target, -1)).pow(2).mean()
        if criterion == "cross_entropy":
            return F.cross_entropy(y, F.softmax(target, -1))
        p, q = F.softmax(y / temperature, -1), F.softmax(target / temperature, -1)
        return temperature**2 * (q * (q / p).log()).sum() / y.shape[0]

    w, o, x = (t.detach().double() for t in (weights, original, queries))
    (row_gradients, query_gradients), values = torch.vmap(torch.func.grad_and_value(value, argnums=(0, 2)), in_dims=(0, 0, None))(w, o, x)
    return values, row_gradients, query_gradients


def _by_name(actual: Tensor, expected: Tensor, arch: Architecture) -> float:
    return max(
        relative_error(a[s.offset : s.stop], e[s.offset : s.stop]) for a, e in zip(actual, expected, strict=True) for s in arch.parameters
    )


def _loss(rows: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """The loss and its gradient to fresh leaf weights."""
    leaf = rows.detach().clone().requires_grad_()
    value = batched_behavioral_loss(leaf, *args, **options)
    value.sum().backward()
    assert leaf.grad is not None
    return value.detach(), leaf.grad


# -- values and gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("net", "criterion"),
    [*((net, criterion) for net in ("small", "mlp") for criterion in CRITERIA), ("cnn", "mse"), ("cnn", "distillation"),
     ("cnn3", "mse"), ("cnn3", "cross_entropy"), ("lenet5", "softmax_mse")],
)  # fmt: skip
def test_against_both_oracles(net: str, criterion: str) -> None:
    """fp32: 1e-5 per parameter and model, as design.md section 5; the difference of two softmaxes cancels, so its gradient may be 3e-5."""
    arch = NETS[net]
    rows, original, queries = _case(arch, 3, 4)
    targets = oracle_outputs(original, queries, arch)
    values, gradients = oracle_loss(rows, queries, targets, arch, criterion)
    other = functional_oracle(rows, original, queries, arch, criterion)
    assert relative_error(other[0], values) < FP64
    assert _by_name(other[1], gradients, arch) < FP64_GRADIENT
    single, double = (
        _loss(rows, original, queries, arch, criterion=criterion, reduction="none"),
        _loss(rows.double(), original.double(), queries.double(), arch, criterion=criterion, reduction="none"),
    )
    assert relative_error(double[0], values) < FP64
    assert _by_name(double[1], gradients, arch) < FP64_GRADIENT
    assert single[0].dtype == single[1].dtype == torch.float32
    assert relative_error(single[0], values) < FP32
    assert _by_name(single[1], gradients, arch) < (3e-5 if criterion == "softmax_mse" else 1e-5)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_opaque_against_torch_func(criterion: str) -> None:
    rows, original, queries = _case(OPAQUE)
    values, gradients, _ = functional_oracle(rows, original, queries, OPAQUE, criterion)
    got = _loss(rows, original, queries, OPAQUE, criterion=criterion, reduction="none")
    assert relative_error(got[0], values) < FP32
    assert _by_name(got[1], gradients, OPAQUE) < 3 * FP32


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("temperature", [0.5, 4])
def test_reductions_and_temperature(reduction: str, temperature: float) -> None:
    rows, original, queries = _case(SMALL)
    values, gradients, _ = functional_oracle(rows, original, queries, SMALL, "distillation", temperature)
    got = _loss(rows, original, queries, SMALL, criterion="distillation", temperature=temperature, reduction=reduction)
    expected = {"mean": values.mean(), "sum": values.sum(), "none": values}[reduction]
    assert got[0].shape == expected.shape
    assert relative_error(got[0], expected) < FP32
    assert relative_error(got[1], gradients / (4 if reduction == "mean" else 1)) < FP32


def test_mse_is_the_papers_formula() -> None:
    rows, original, queries = (t.double() for t in _case(SMALL, 3, 7))
    a, b = oracle_outputs(rows, queries, SMALL), oracle_outputs(original, queries, SMALL)
    total = sum(float((a[j, i] - b[j, i]).norm() ** 2) for j in range(3) for i in range(7))
    assert float(batched_behavioral_loss(rows, original, queries, SMALL)) == pytest.approx(total / (2 * 3 * 7), rel=FP64_ROUNDING)


def test_cross_entropy_is_least_at_the_original_and_never_negative() -> None:
    rows, original, queries = _case(SMALL)
    at = batched_behavioral_loss(original, original, queries, SMALL, criterion="cross_entropy", reduction="none")
    off = batched_behavioral_loss(rows, original, queries, SMALL, criterion="cross_entropy", reduction="none")
    assert (at >= 0).all()
    assert (off > at).all()
    _, gradient = _loss(original, original, queries, SMALL, criterion="cross_entropy")
    assert float(gradient.abs().max()) < 1e-6


@pytest.mark.parametrize("criterion", ["mse", "softmax_mse", "distillation"])
def test_a_model_is_at_no_distance_from_itself_or_its_views(criterion: str) -> None:
    rows = _models(SMALL, 3, 0).double()
    for other in (rows, random_views(rows, SMALL)):
        value, gradient = _loss(other, rows, torch.randn(4, *SMALL.input_shape, dtype=torch.float64), SMALL, criterion=criterion)
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
    rows, _, queries = (t.double() for t in _case(SMALL))
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
    rows, originals, queries = _case(SMALL)
    expected = _loss(rows, originals, queries, SMALL)
    leaf = rows.clone().requires_grad_()
    other = Population(SMALL, originals) if original == "population" else FORMS[original](originals)
    value = batched_behavioral_loss(FORMS[reconstructed](leaf), other, queries, SMALL)
    value.backward()
    assert torch.equal(value.detach(), expected[0])
    assert torch.equal(leaf.grad, expected[1])  # type: ignore[arg-type]
    assert torch.equal(batched_forward(FORMS[reconstructed](rows), queries, SMALL), batched_forward(rows, queries, SMALL))


def test_padding_of_tokens_does_not_matter() -> None:
    rows, originals, queries = _case(SMALL)
    layout = TokenLayout(SMALL)
    tokens = torch.where(layout.mask, layout.tokenize(rows).tokens, torch.nan).requires_grad_()
    value = batched_behavioral_loss(tokens, originals, queries, SMALL, nan_policy="raise")
    value.backward()
    assert torch.equal(value.detach(), batched_behavioral_loss(rows, originals, queries, SMALL))
    assert torch.equal(tokens.grad[:, ~layout.mask], torch.zeros(4, int((~layout.mask).sum())))  # type: ignore[index]


def test_a_population_has_no_gradient() -> None:
    rows, originals, queries = _case(SMALL)
    assert not batched_behavioral_loss(Population(SMALL, rows), originals, queries, SMALL).requires_grad
    assert batched_forward(Population(SMALL, rows), queries, SMALL).shape == (4, 5, 3)


def test_targets_in_place_of_originals() -> None:
    rows, originals, queries = _case(SMALL)
    targets = batched_forward(originals, queries, SMALL)
    expected = _loss(rows, originals, queries, SMALL)
    wide = torch.full((4, 10, 3), torch.nan)
    wide[:, ::2] = targets
    forms = {"plain": targets, "requires-grad": targets.clone().requires_grad_(), "strided": wide[:, ::2], "double": targets.double()}
    for name, form in forms.items():
        got = _loss(rows, None, queries, SMALL, targets=form)
        assert torch.equal(got[0], expected[0]), name
        assert torch.equal(got[1], expected[1]), name
    assert forms["requires-grad"].grad is None
    shared = targets[:1].expand(4, -1, -1)  # stride 0 over models
    assert torch.equal(_loss(rows, None, queries, SMALL, targets=shared)[1], _loss(rows, None, queries, SMALL, targets=shared.clone())[1])


def test_the_original_never_gets_a_gradient() -> None:
    rows, originals, queries = _case(SMALL)
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
    rows, originals, queries = _case(SMALL)
    _, expected = _loss(rows, originals, queries, SMALL, reduction="none")
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
    rows, originals, queries = _case(SMALL)
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
    rows, originals, queries = _case(SMALL)
    leaf = rows.requires_grad_()
    loss = batched_behavioral_loss(leaf, originals, queries, SMALL).square()
    total = torch.autograd.grad(loss, leaf, create_graph=True)[0].sum()
    with pytest.raises(RuntimeError, match="once_differentiable"):
        total.backward()


def test_gradients_flow_on_through_a_decoder() -> None:
    rows, originals, queries = _case(SMALL)
    decoder = nn.Linear(6, SMALL.num_weights)
    latent = torch.randn(4, 6)
    batched_behavioral_loss(decoder(latent) * 0.1, originals, queries, SMALL).backward()
    gradient = functional_oracle(decoder(latent) * 0.1, originals, queries, SMALL, "mse")[1] / 4
    assert relative_error(decoder.weight.grad, 0.1 * gradient.T.float() @ latent) < 2 * FP32  # type: ignore[arg-type]
    assert rows is not None


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("arch", [SMALL, OPAQUE], ids=["planned", "opaque"])
def test_queries_that_require_a_gradient_get_it(arch: Architecture, criterion: str) -> None:
    rows, originals, queries = (t.double() for t in _case(arch))
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
    rows, originals, queries = _case(SMALL)
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
    rows, originals, queries = _case(Architecture.cnn())
    values, gradients, _ = functional_oracle(rows, originals, queries, Architecture.cnn(), "mse")
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradient = _loss(rows, originals, queries, Architecture.cnn())
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
    rows, originals, queries = _case(arch, 3, 4)
    expected = _loss(rows, originals, queries, arch)
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
    rows, originals, queries = _case(Architecture.cnn3(), 3, 4)
    expected = _loss(rows, originals, queries, Architecture.cnn3())
    got = _loss(rows, originals, queries.contiguous(memory_format=torch.channels_last), Architecture.cnn3())
    assert relative_error(got[0], expected[0]) < FP32 / 10
    assert relative_error(got[1], expected[1]) < FP32 / 10


def test_expanded() -> None:
    rows, originals, queries = _case(SMALL)
    leaf = rows[:1].clone().requires_grad_()
    batched_behavioral_loss(leaf.expand(4, -1), originals, queries, SMALL, reduction="sum").backward()
    _, expected = _loss(rows[:1].repeat(4, 1), originals, queries, SMALL, reduction="sum")
    assert relative_error(leaf.grad, expected.sum(0, keepdim=True)) < FP32 / 10  # type: ignore[arg-type]
    same = queries[:1].expand(5, -1, -1, -1)
    assert torch.equal(_loss(rows, originals, same, SMALL)[1], _loss(rows, originals, same.contiguous(), SMALL)[1])
    assert torch.equal(
        _loss(rows, originals[:1].expand(4, -1), queries, SMALL)[1], _loss(rows, originals[:1].repeat(4, 1), queries, SMALL)[1]
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
    rows, originals, queries = (t.to(dtype) for t, dtype in zip(_case(SMALL), dtypes, strict=True))
    values, gradients, _ = functional_oracle(rows, originals, queries, SMALL, "mse")
    value, gradient = _loss(rows, originals, queries, SMALL)
    double = dtypes[0] == torch.float64
    assert value.dtype == (torch.float64 if double else torch.float32)
    assert gradient.dtype == dtypes[0]
    assert relative_error(value, values.mean()) < (1e-12 if double else 1e-5)
    rounding = {torch.float16: 1e-3, torch.bfloat16: 5e-3, torch.float32: 1e-5, torch.float64: 1e-12}[dtypes[0]]
    assert relative_error(gradient, gradients / 4) < rounding
    assert batched_forward(rows, queries, SMALL).dtype == value.dtype


@pytest.mark.parametrize(("k", "n"), [(1, 1), (1, 5), (3, 1), (5, 63), (9, 17)], ids=str)
@pytest.mark.parametrize("net", ["cnn", "mlp"])
def test_odd_sizes(net: str, k: int, n: int, poisoned_empty: None) -> None:
    rows, originals, queries = _case(NETS[net], k, n)
    values, gradients, _ = functional_oracle(rows, originals, queries, NETS[net], "mse")
    value, gradient = _loss(rows, originals, queries, NETS[net], reduction="none")
    assert value.shape == (k,)
    assert relative_error(value, values) < FP32
    assert _by_name(gradient, gradients, NETS[net]) < FP32


# -- models that are not finite ----------------------------------------------------------------------------------------


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
    rows, originals, queries = _case(CNN, 6, 5)
    bad, good = [1, 4], [0, 2, 3, 5]
    spoiled, others = _spoil(rows, originals, how, bad)
    clean = batched_behavioral_loss(spoiled.requires_grad_(), others, queries, CNN, criterion=criterion, reduction="none").isfinite()
    assert clean[good].all()
    if criterion == "mse":
        assert not clean[bad].any()
    bad = [j for j in bad if not clean[j]]  # a softmax may survive what a square does not
    good = [j for j in range(6) if clean[j]]
    for reduction in REDUCTIONS:
        value, gradient = _loss(spoiled, others, queries, CNN, criterion=criterion, reduction=reduction, nan_policy="omit")
        expected, alone = _loss(spoiled[good], others[good], queries, CNN, criterion=criterion, reduction=reduction, nan_policy="omit")
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
    rows, originals, queries = (t.to(dtype) for t in _case(arch, 5, 3))
    rows[2, 0] = torch.nan
    good = [0, 1, 3, 4]
    value, gradient = _loss(rows, originals, queries, arch, nan_policy="omit")
    expected, alone = _loss(rows[good], originals[good], queries, arch, nan_policy="omit")
    assert torch.equal(gradient[good], alone)
    assert not gradient[2].any()
    assert float(value) == pytest.approx(float(expected), rel=FP32_ROUNDING)


FRAGILE = Architecture.from_layers([Linear("a", 1, 1, bias=False), Linear("b", 1, 1, bias=False)], (1,), "fragile")


@pytest.mark.parametrize("hidden", [False, True], ids=["planned", "opaque"])
def test_a_finite_loss_with_a_gradient_that_is_not(hidden: bool) -> None:
    arch = Architecture("fragile", (1,), None, as_module(FRAGILE), "hidden by a test") if hidden else FRAGILE
    rows = torch.tensor([[1.0, 2.0], [1e37, 1e-36], [0.5, 0.5]])  # the second outputs 10; d/db = (10 + 1000) * 1e37
    targets, queries = torch.tensor([1.0, -1000.0, 3.0]).view(3, 1, 1), torch.ones(1, 1)
    values, gradient = _loss(rows, None, queries, arch, targets=targets, reduction="none")
    assert values.isfinite().all()
    assert not gradient[1].isfinite().all()
    value, gradient = _loss(rows, None, queries, arch, targets=targets, nan_policy="omit")
    expected, alone = _loss(rows[[0, 2]], None, queries, arch, targets=targets[[0, 2]])
    assert torch.equal(gradient[[0, 2]], alone)
    assert not gradient[1].any()
    assert torch.equal(value, expected)
    with pytest.raises(WslfastError, match=r"models \[1\] of 3 have a non-finite value or gradient"):
        _loss(rows, None, queries, arch, targets=targets, nan_policy="raise")
    x = queries.clone().requires_grad_()
    batched_behavioral_loss(rows, None, x, arch, targets=targets, nan_policy="omit").backward()
    y = queries.clone().requires_grad_()
    batched_behavioral_loss(rows[[0, 2]], None, y, arch, targets=targets[[0, 2]]).backward()
    assert torch.equal(x.grad, y.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("how", HOW)
def test_propagate_shows_in_that_model_alone(how: str) -> None:
    rows, originals, queries = _case(CNN, 4, 5)
    spoiled, others = _spoil(rows, originals, how, [2])
    values, gradient = _loss(spoiled, others, queries, CNN, reduction="none")
    clean = _loss(rows, originals, queries, CNN, reduction="none")
    good = [0, 1, 3]
    assert not values[2].isfinite()
    assert not gradient[2].isfinite().all()
    assert torch.equal(values[good], clean[0][good])
    assert torch.equal(gradient[good], clean[1][good])
    for reduction in ("mean", "sum"):
        value, gradient = _loss(spoiled, others, queries, CNN, reduction=reduction)
        assert not value.isfinite()
        assert gradient[good].isfinite().all()


@pytest.mark.parametrize(("how", "reduction"), zip(HOW, REDUCTIONS * 2, strict=True))
def test_raise_names_the_models(how: str, reduction: str) -> None:
    rows, originals, queries = _case(CNN, 4, 5)
    spoiled, others = _spoil(rows, originals, how, [1, 3])
    for requires in (False, True):
        with pytest.raises(WslfastError, match=r"^reconstructed: models \[1, 3\] of 4 have a non-finite value or gradient"):
            batched_behavioral_loss(
                spoiled.detach().requires_grad_(requires), others, queries, CNN, reduction=reduction, nan_policy="raise"
            )
    clean = _loss(rows, originals, queries, CNN, reduction=reduction, nan_policy="raise")
    assert torch.equal(clean[1], _loss(rows, originals, queries, CNN, reduction=reduction)[1])


@pytest.mark.parametrize("policy", ["omit", "raise", "propagate"])
def test_policies_agree_where_nothing_is_wrong(policy: str) -> None:
    rows, originals, queries = _case(CNN)
    expected = _loss(rows, originals, queries, CNN)
    got = _loss(rows, originals, queries, CNN, nan_policy=policy)
    assert relative_error(got[0], expected[0]) < 1e-7
    assert relative_error(got[1], expected[1]) < 1e-7


@pytest.mark.parametrize("through_queries", [False, True], ids=["rows", "queries"])
def test_every_model_bad(through_queries: bool) -> None:
    rows, originals, queries = _case(SMALL)
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
    rows, originals, queries = (t.double() for t in _case(SMALL))
    rows[2] = torch.nan
    good = [0, 1, 3]
    leaf, x = rows.requires_grad_(), queries.requires_grad_()
    batched_behavioral_loss(leaf, originals, x, SMALL, nan_policy="omit").backward()
    _, gradients, to_queries = functional_oracle(rows[good], originals[good], queries, SMALL, "mse")
    assert relative_error(x.grad, to_queries.mean(0)) < FP64  # type: ignore[arg-type]
    assert relative_error(leaf.grad[good], gradients / 3) < FP64  # type: ignore[index]
    assert not leaf.grad[2].any()  # type: ignore[index]


def test_nan_values_of_omitted_models_do_not_poison_a_users_own_mean() -> None:
    rows, originals, queries = _case(SMALL)
    rows[1] = torch.inf
    leaf = rows.requires_grad_()
    values = batched_behavioral_loss(leaf, originals, queries, SMALL, nan_policy="omit", reduction="none")
    values.nanmean().backward()
    assert leaf.grad.isfinite().all()  # type: ignore[union-attr]
    assert not leaf.grad[1].any()  # type: ignore[index]


def test_a_bad_query_is_bad_for_every_model() -> None:
    rows, originals, queries = _case(SMALL)
    queries[3, 1, 2, 2] = torch.nan
    assert batched_behavioral_loss(rows, originals, queries, SMALL, reduction="none").isnan().all()
    with pytest.raises(WslfastError, match="all 4 models"):
        batched_behavioral_loss(rows, originals, queries, SMALL, nan_policy="omit")


# -- bad arguments -----------------------------------------------------------------------------------------------------

ROWS, ORIGINAL, QUERIES = _case(SMALL)
P = SMALL.num_weights
TARGETS = torch.zeros(4, 5, 3)
GOOD: dict[str, Any] = {"reconstructed": ROWS, "original": ORIGINAL, "queries": QUERIES, "architecture": SMALL}
PARTS = unstack(ROWS, SMALL)
TOKENS = TokenLayout(SMALL).tokenize(ROWS).tokens

# id: (what changes in a good call, the argument the message begins with, what came)
LOSS_ERRORS: dict[str, tuple[dict[str, Any], str, str]] = {
    "rows-none": ({"reconstructed": None}, "reconstructed", "None"),
    "rows-list": ({"reconstructed": [[0.0]]}, "reconstructed", "list"),
    "rows-numpy": ({"reconstructed": ROWS.numpy()}, "reconstructed", "ndarray"),
    "rows-module": ({"reconstructed": nn.Linear(2, 2)}, "reconstructed", "Linear"),
    "rows-int": ({"reconstructed": ROWS.long()}, "reconstructed", "int64"),
    "rows-bool": ({"reconstructed": ROWS > 0}, "reconstructed", "bool"),
    "rows-complex": ({"reconstructed": ROWS.to(torch.complex64)}, "reconstructed", "complex64"),
    "rows-one-model": ({"reconstructed": ROWS[0]}, "reconstructed", f"[{P}]"),
    "rows-scalar": ({"reconstructed": torch.tensor(1.0)}, "reconstructed", "[]"),
    "rows-narrow": ({"reconstructed": ROWS[:, :-1]}, "reconstructed", f"[4, {P - 1}]"),
    "rows-wide": ({"reconstructed": torch.zeros(4, P + 1)}, "reconstructed", f"[4, {P + 1}]"),
    "rows-four-axes": ({"reconstructed": torch.zeros(1, 1, 1, P)}, "reconstructed", f"[1, 1, 1, {P}]"),
    "rows-zero-models": ({"reconstructed": ROWS[:0], "original": ORIGINAL[:0]}, "reconstructed", f"[0, {P}]"),
    "rows-transposed": ({"reconstructed": ROWS.t()}, "reconstructed", f"[{P}, 4]"),
    "tokens-count": ({"reconstructed": TOKENS[:, :-1]}, "reconstructed", str(list(TOKENS[:, :-1].shape))),
    "tokens-size": ({"reconstructed": TOKENS[:, :, :-1]}, "reconstructed", str(list(TOKENS[:, :, :-1].shape))),
    "tokens-empty": ({"reconstructed": torch.zeros(4, 5, 0)}, "reconstructed", "[4, 5, 0]"),
    "tokens-int": ({"reconstructed": TOKENS.int()}, "reconstructed", "int32"),
    "tokens-transposed": ({"reconstructed": TOKENS.mT}, "reconstructed", str(list(TOKENS.mT.shape))),
    "tokens-of-none": ({"reconstructed": TOKENS[:0]}, "reconstructed", "[0,"),
    "tokens-huge": ({"reconstructed": torch.zeros(1).expand(1, 1, 10**9)}, "reconstructed", "[1, 1, 1000000000]"),
    "dict-empty": ({"reconstructed": {}}, "reconstructed", "'a.weight' is missing"),
    "dict-missing": ({"reconstructed": {k: v for k, v in PARTS.items() if k != "i.bias"}}, "reconstructed", "'i.bias' is missing"),
    "dict-unknown": ({"reconstructed": {**PARTS, "z.weight": ROWS}}, "reconstructed", "['z.weight']"),
    "dict-shape": ({"reconstructed": {**PARTS, "i.bias": torch.zeros(4, 2)}}, "reconstructed", "[4, 2]"),
    "dict-one-model": ({"reconstructed": {k: v[0] for k, v in PARTS.items()}}, "reconstructed", "[5, 2, 3, 3]"),
    "dict-ragged": ({"reconstructed": {**PARTS, "i.bias": torch.zeros(3, 3)}}, "reconstructed", "[3, 4]"),
    "dict-of-lists": ({"reconstructed": {**PARTS, "i.bias": [0.0]}}, "reconstructed", "list"),
    "dict-of-int": ({"reconstructed": {k: v.int() for k, v in PARTS.items()}}, "reconstructed", "int32"),
    "dict-zero": ({"reconstructed": {k: v[:0] for k, v in PARTS.items()}}, "reconstructed", "[0,"),
    "population-other": ({"reconstructed": Population(CNN, torch.zeros(4, CNN.num_weights))}, "reconstructed", "'cnn'"),
    "original-other": ({"original": Population(CNN, torch.zeros(4, CNN.num_weights))}, "original", "'cnn'"),
    "original-none": ({"original": None}, "original", "both are None"),
    "original-models": ({"original": ORIGINAL[:3]}, "original", "3"),
    "original-narrow": ({"original": ORIGINAL[:, 1:]}, "original", f"[4, {P - 1}]"),
    "original-int": ({"original": ORIGINAL.int()}, "original", "int32"),
    "original-list": ({"original": [ORIGINAL]}, "original", "list"),
    "original-outputs": ({"original": TARGETS}, "original", "[4, 5, 3]"),
    "original-device": ({"original": ORIGINAL.to("meta")}, "original", "meta"),
    "original-zero": ({"original": ORIGINAL[:0]}, "original", f"[0, {P}]"),
    "both": ({"targets": TARGETS}, "original", "targets= is given"),
    "targets-queries": ({"original": None, "targets": torch.zeros(4, 6, 3)}, "targets", "[4, 6, 3]"),
    "targets-models": ({"original": None, "targets": torch.zeros(3, 5, 3)}, "targets", "[3, 5, 3]"),
    "targets-classes": ({"original": None, "targets": torch.zeros(4, 5, 10)}, "targets", "[4, 5, 10]"),
    "targets-broadcast": ({"original": None, "targets": torch.zeros(1, 5, 3)}, "targets", "[1, 5, 3]"),
    "targets-labels": ({"original": None, "targets": torch.zeros(4, 5).long()}, "targets", "[4, 5] int64"),
    "targets-int": ({"original": None, "targets": TARGETS.long()}, "targets", "int64"),
    "targets-list": ({"original": None, "targets": [1.0]}, "targets", "list"),
    "targets-device": ({"original": None, "targets": TARGETS.to("meta")}, "targets", "meta"),
    "queries-none": ({"queries": None}, "queries", "None"),
    "queries-list": ({"queries": [QUERIES]}, "queries", "list"),
    "queries-zero": ({"queries": QUERIES[:0]}, "queries", "[0, 2, 7, 9]"),
    "queries-one": ({"queries": QUERIES[0]}, "queries", "[2, 7, 9]"),
    "queries-channels": ({"queries": torch.zeros(5, 3, 7, 9)}, "queries", "[5, 3, 7, 9]"),
    "queries-transposed": ({"queries": QUERIES.mT}, "queries", "[5, 2, 9, 7]"),
    "queries-nhwc": ({"queries": QUERIES.permute(0, 2, 3, 1)}, "queries", "[5, 7, 9, 2]"),
    "queries-flat": ({"queries": QUERIES.flatten(1)}, "queries", "[5, 126]"),
    "queries-per-model": ({"queries": QUERIES.expand(3, -1, -1, -1, -1)}, "queries", "[3, 5, 2, 7, 9]"),
    "queries-uint8": ({"queries": (QUERIES * 255).to(torch.uint8)}, "queries", "uint8"),
    "queries-int": ({"queries": QUERIES.long()}, "queries", "int64"),
    "queries-complex": ({"queries": QUERIES.to(torch.complex64)}, "queries", "complex64"),
    "queries-device": ({"queries": QUERIES.to("meta")}, "queries", "meta"),
    "architecture-none": ({"architecture": None}, "architecture", "None"),
    "architecture-name": ({"architecture": "cnn3"}, "architecture", "'cnn3'"),
    "architecture-module": ({"architecture": as_module(SMALL)}, "architecture", "_Chain"),
    "architecture-class": ({"architecture": Architecture}, "architecture", "type"),
    "criterion-unknown": ({"criterion": "l2"}, "criterion", "'l2'"),
    "criterion-none": ({"criterion": None}, "criterion", "None"),
    "criterion-list": ({"criterion": ["mse"]}, "criterion", "['mse']"),
    "criterion-function": ({"criterion": F.mse_loss}, "criterion", "mse_loss"),
    "temperature-zero": ({"temperature": 0}, "temperature", "0"),
    "temperature-negative": ({"temperature": -1.0}, "temperature", "-1.0"),
    "temperature-nan": ({"temperature": float("nan")}, "temperature", "nan"),
    "temperature-inf": ({"temperature": float("inf")}, "temperature", "inf"),
    "temperature-text": ({"temperature": "2"}, "temperature", "'2'"),
    "temperature-bool": ({"temperature": True}, "temperature", "True"),
    "temperature-tensor": ({"temperature": torch.tensor(2.0)}, "temperature", "tensor"),
    "reduction-unknown": ({"reduction": "batchmean"}, "reduction", "'batchmean'"),
    "reduction-none": ({"reduction": None}, "reduction", "None"),
    "policy-unknown": ({"nan_policy": "ignore"}, "nan_policy", "'ignore'"),
    "policy-none": ({"nan_policy": None}, "nan_policy", "None"),
    "backend-unknown": ({"backend": "cuda"}, "backend", "'cuda'"),
    "backend-none": ({"backend": None}, "backend", "None"),
    "backend-triton": ({"backend": "triton"}, "backend", "cpu"),
}
FORWARD_ERRORS = {
    name: ({"weights" if key == "reconstructed" else key: value for key, value in changes.items() if key != "original"}, argument, came)
    for name, (changes, argument, came) in LOSS_ERRORS.items()
    if argument in ("reconstructed", "queries", "architecture", "backend")
}


def _complains(call: Callable[[], object], argument: str, came: str) -> None:
    with pytest.raises(WslfastError) as caught:
        call()
    message = str(caught.value)
    assert type(caught.value) is WslfastError
    assert caught.value.__cause__ is None  # one error, not a chain of them
    assert caught.value.__context__ is None or caught.value.__suppress_context__
    assert message.startswith(argument), message
    assert came in message
    assert "expected" in message or "missing" in message or "unknown" in message or "differ" in message or "cannot run" in message
    assert "\n" not in message
    assert len(message) < 400


@pytest.mark.parametrize(("changes", "argument", "came"), LOSS_ERRORS.values(), ids=LOSS_ERRORS)
def test_bad_arguments_of_the_loss(changes: dict[str, Any], argument: str, came: str) -> None:
    _complains(lambda: batched_behavioral_loss(**{**GOOD, **changes}), argument, came)


@pytest.mark.parametrize(("changes", "argument", "came"), FORWARD_ERRORS.values(), ids=FORWARD_ERRORS)
def test_bad_arguments_of_the_forward(changes: dict[str, Any], argument: str, came: str) -> None:
    good = {"weights": ROWS, "queries": QUERIES, "architecture": SMALL}
    _complains(lambda: batched_forward(**{**good, **changes}), "weights" if argument == "reconstructed" else argument, came)


def test_the_good_call_is_good() -> None:
    assert batched_behavioral_loss(**GOOD).isfinite()
    assert len(LOSS_ERRORS) >= 60
