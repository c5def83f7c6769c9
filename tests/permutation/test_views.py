"""Views: the same function from different weights, and back."""

from __future__ import annotations

import math
from itertools import permutations as every

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import FP64_ROUNDING

from wslfast.architecture import Architecture
from wslfast.errors import WslfastError
from wslfast.kernels.layers import Activation, Conv2d, Flatten, Linear, Pool2d
from wslfast.permutation import hidden_channels, inverse, permute, random_permutations, random_views
from wslfast.population import unstack
from wslfast.testing import oracle_outputs, relative_error
from wslfast.tokens import TokenLayout

GROUPED = Architecture.from_layers(
    [
        Conv2d("a", 2, 4, (3, 3)), Activation("r"), Conv2d("b", 4, 6, (3, 3), groups=2), Activation("s", "tanh"),
        Conv2d("c", 6, 5, (1, 1), bias=False), Pool2d("p", "avg", (2, 3), (1, 1)), Flatten("f"), Linear("d", 30, 4), Linear("e", 4, 3),
    ],
    (2, 8, 8), "grouped",
)  # fmt: skip
SMALL = Architecture.from_layers(
    [Conv2d("a", 1, 3, (2, 2)), Activation("r", "silu"), Pool2d("p", "max", (2, 2), (1, 1)), Flatten("f"), Linear("b", 12, 4), Linear("c", 4, 2)],
    (1, 4, 4), "small",
)  # fmt: skip

# reference.md section 3.1: sizes of P0, P1, ...
NETS: dict[str, tuple[Architecture, tuple[int, ...]]] = {
    "cnn": (Architecture.cnn(), (8, 6, 4, 20)),
    "cnn-gelu-dropout": (Architecture.cnn(3, "gelu", 0.2), (8, 6, 4, 20)),
    "cnn2": (Architecture.cnn2(), (6, 9, 6, 20)),
    "cnn3": (Architecture.cnn3(), (16, 32, 15, 20)),
    "cnn3-silu": (Architecture.cnn3(1, "silu"), (16, 32, 15, 20)),
    "lenet5": (Architecture.lenet5(), (6, 16, 120, 84)),
    "mlp": (Architecture.mlp(), (30, 15)),
    "mlp-no-bias": (Architecture.mlp(7, (5, 6), 3, use_bias=False), (5, 6)),
    "small": (SMALL, (3, 4)),
    "grouped": (GROUPED, (0, 0, 5, 4)),
    "one-layer": (Architecture.from_layers([Linear("a", 3, 2)], (3,)), ()),
}


@pytest.mark.parametrize(("arch", "sizes"), NETS.values(), ids=NETS)
def test_hidden_channels(arch: Architecture, sizes: tuple[int, ...]) -> None:
    assert hidden_channels(arch) == sizes
    drawn = random_permutations(arch, 3)
    assert [tuple(p.shape) for p in drawn] == [(3, c) for c in sizes]
    assert all(torch.equal(p.sort(1).values, torch.arange(p.shape[1]).expand(3, -1)) for p in drawn)


@pytest.mark.parametrize(("arch", "sizes"), NETS.values(), ids=NETS)
def test_outputs_are_the_same_and_the_inverse_restores(arch: Architecture, sizes: tuple[int, ...], poisoned_empty: None) -> None:
    weights = torch.randn(3, arch.num_weights, dtype=torch.float64) / 4
    queries = torch.randn(2, *arch.input_shape, dtype=torch.float64)
    drawn = random_permutations(arch, 3)
    views = permute(weights, arch, drawn)
    assert relative_error(oracle_outputs(views, queries, arch), oracle_outputs(weights, queries, arch)) < FP64_ROUNDING
    assert torch.equal(permute(views, arch, inverse(drawn)), weights)
    assert torch.equal(views.sort(1).values, weights.sort(1).values)  # nothing is lost or doubled
    if any(sizes):
        assert all(not torch.equal(v, w) for v, w in zip(views, weights, strict=True))


def test_rows_move_with_their_bias_and_the_next_layers_columns() -> None:
    weights = torch.arange(float(SMALL.num_weights))[None]
    p, q = torch.tensor([[2, 0, 1]]), torch.tensor([[3, 1, 0, 2]])
    old = {name: value[0] for name, value in unstack(weights, SMALL).items()}
    new = {name: value[0] for name, value in unstack(permute(weights, SMALL, (p, q)), SMALL).items()}
    assert torch.equal(new["a.weight"], old["a.weight"][p[0]])
    assert torch.equal(new["a.bias"], old["a.bias"][p[0]])
    maps = old["b.weight"].view(4, 3, 4)  # features are whole 2x2 maps of a channel
    assert torch.equal(new["b.weight"], maps[q[0]][:, p[0]].reshape(4, 12))
    assert torch.equal(new["b.bias"], old["b.bias"][q[0]])
    assert torch.equal(new["c.weight"], old["c.weight"][:, q[0]])
    assert torch.equal(new["c.bias"], old["c.bias"])


@settings(max_examples=20)
@given(k=st.integers(1, 5), seed=st.integers(0, 1 << 30))
def test_composition_is_a_permutation(k: int, seed: int) -> None:
    weights = torch.randn(k, SMALL.num_weights, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    first, second = random_permutations(SMALL, k, generator), random_permutations(SMALL, k, generator)
    both = tuple(a.gather(1, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(permute(permute(weights, SMALL, first), SMALL, second), permute(weights, SMALL, both))


def test_channels_of_a_grouped_convolution_stay() -> None:
    weights = torch.randn(2, GROUPED.num_weights)
    old, new = unstack(weights, GROUPED), unstack(random_views(weights, GROUPED), GROUPED)
    for name in ("a.weight", "a.bias", "b.weight", "b.bias"):
        assert torch.equal(old[name], new[name])
    assert not torch.equal(old["c.weight"], new["c.weight"])
    assert not torch.equal(old["d.weight"], new["d.weight"])


def test_classes_keep_their_order() -> None:
    weights = torch.randn(4, SMALL.num_weights)
    assert torch.equal(unstack(weights, SMALL)["c.bias"], unstack(random_views(weights, SMALL), SMALL)["c.bias"])


def test_uniform() -> None:
    k = 6000
    drawn = random_permutations(SMALL, k, torch.Generator().manual_seed(1))
    counts = torch.tensor([int((drawn[0] == torch.tensor(p)).all(1).sum()) for p in every(range(3))], dtype=torch.float64)
    assert counts.sum() == k
    chi2 = float(((counts - k / 6).square() / (k / 6)).sum())
    assert chi2 < 30.9  # 5 degrees of freedom, p = 1e-5
    fixed = (drawn[1] == torch.arange(4)).double().sum(1).mean()  # one fixed point on average
    assert float(fixed) == pytest.approx(1.0, abs=5 / math.sqrt(k))
    together = ((drawn[0][:, 0] == 0) & (drawn[1][:, 0] == 0)).double().mean()  # layers are independent
    assert float(together) == pytest.approx(1 / 12, abs=5 * math.sqrt(1 / 12 / k))


def test_models_get_their_own_draws() -> None:
    views = random_views(torch.arange(10853.0).expand(8, -1), Architecture.cnn3())
    assert len({tuple(v.tolist()) for v in views}) == 8


def test_an_explicit_generator_is_all_that_counts() -> None:
    weights = torch.randn(3, SMALL.num_weights)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = random_views(weights, SMALL, torch.Generator().manual_seed(7))
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(first, random_views(weights, SMALL, torch.Generator().manual_seed(7)))
    generator = torch.Generator().manual_seed(7)
    random_views(weights, SMALL, generator)
    assert not torch.equal(first, random_views(weights, SMALL, generator))


@pytest.mark.parametrize("size", [0, 5], ids=["discovered", "chunked"])
def test_padding_stays_zero(size: int) -> None:
    tokens = TokenLayout(Architecture.cnn3(), size)
    rows, mask, _ = tokens.tokenize(random_views(torch.rand(2, 10853) + 1, Architecture.cnn3()))
    assert not rows[:, ~mask].any()
    assert (rows[:, mask] >= 1).all()


def test_differentiable_and_strided() -> None:
    drawn = random_permutations(SMALL, 2)
    weights = torch.randn(2, SMALL.num_weights, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: permute(w, SMALL, drawn) ** 2, weights)
    scale = torch.arange(float(SMALL.num_weights), dtype=torch.float64).expand(2, -1)
    (permute(weights, SMALL, drawn) * scale).sum().backward()
    assert torch.equal(weights.grad, permute(scale, SMALL, inverse(drawn)))  # type: ignore[arg-type]
    strided = weights.detach().t().contiguous().t()
    assert torch.equal(permute(strided, SMALL, drawn), permute(weights.detach(), SMALL, drawn))


ONE = torch.zeros(1, SMALL.num_weights)
WRONG = {
    "width": (lambda: permute(torch.zeros(1, 3), SMALL, ()), r"weights: expected \[k, \d+\], got \[1, 3\]"),
    "axes": (lambda: permute(ONE[0], SMALL, ()), r"weights: expected"),
    "none": (lambda: permute(ONE, SMALL, ()), r"permutations: expected \[\[1, 3\], \[1, 4\]\], got \[\]"),
    "models": (lambda: permute(ONE, SMALL, random_permutations(SMALL, 2)), r"permutations: expected .*got \[\[2, 3\], \[2, 4\]\]"),
    "sizes": (lambda: permute(ONE, SMALL, (torch.zeros(1, 4).long(), torch.zeros(1, 3).long())), r"permutations: expected"),
}


@pytest.mark.parametrize(("call", "words"), WRONG.values(), ids=WRONG)
def test_bad_arguments(call: object, words: str) -> None:
    with pytest.raises(WslfastError, match=words):
        call()  # type: ignore[operator]


def test_other_inputs_scramble_a_model_and_keep_its_weights() -> None:
    arch = Architecture.cnn(1)
    weights = arch.initial_weights(["kaiming_normal"] * 3, range(3))
    outputs = random_permutations(arch, 3, torch.Generator().manual_seed(0))
    inputs = random_permutations(arch, 3, torch.Generator().manual_seed(1))
    same, scrambled = permute(weights, arch, outputs, outputs), permute(weights, arch, outputs, inputs)
    assert torch.equal(same, permute(weights, arch, outputs))
    assert torch.equal(scrambled.sort(1).values, weights.sort(1).values)
    x = torch.randn(5, 1, 28, 28, generator=torch.Generator().manual_seed(2))
    original = oracle_outputs(weights, x, arch)
    torch.testing.assert_close(oracle_outputs(same, x, arch), original)
    assert float((oracle_outputs(scrambled, x, arch) - original).norm() / original.norm()) > 0.1
    # the first layer's rows and the last layer's columns are where each permutation says
    first, last = arch.parameters[0], arch.parameters[-2]
    rows = lambda w, s: w[:, s.offset : s.stop].view(3, *s.shape)  # noqa: E731
    assert torch.equal(rows(scrambled, first)[1], rows(weights, first)[1][outputs[0][1]])
    assert torch.equal(rows(scrambled, last)[1], rows(weights, last)[1][:, inputs[-1][1]])
    with pytest.raises(WslfastError, match="inputs"):
        permute(weights, arch, outputs, inputs[:-1])
