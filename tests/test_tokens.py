"""Tokens against a per-model loop written from the published rules, and against the published numbers."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import PRINTED
from torch import Tensor, nn

from wslfast.architecture import Architecture
from wslfast.errors import WslfastError
from wslfast.kernels.layers import Conv2d, Flatten, Linear
from wslfast.population import unstack
from wslfast.tokens import TokenLayout, layout

MINI = Architecture.from_layers(
    [Conv2d("body.0", 2, 3, (2, 2)), Conv2d("body.1", 3, 2, (1, 1), bias=False), Flatten("flat"), Linear("head", 8, 2)], (2, 3, 3), "mini"
)


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3)
        self.downsample = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4))
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.downsample(self.bn1(self.conv1(x)).relu()).flatten(1))


NORM = Architecture.from_module(Norm(), (2, 4, 4))


def naive(state: Mapping[str, Tensor], size: int, ignore_bn: bool = False) -> tuple[Tensor, Tensor, list[tuple[int, int, int]]]:
    """One model, key after key and row after row, with Python lists (rules 1-6 of reference.md section 2)."""

    def skipped(key: str) -> bool:
        return ignore_bn and any(part in key for part in ("bn", "downsample.1", "batchnorm"))

    keys = [key for key in state if any(part in key for part in ("weight", "running_mean", "running_var")) and not skipped(key)]
    if size == 0:
        with_bias = [key for key in keys if key.replace("weight", "bias") in state]
        size = max(math.prod(state[key].shape) // state[key].shape[0] + 1 for key in with_bias)
    rows, masks, positions = [], [], []
    for layer, key in enumerate(keys):
        bias = state.get(key.replace("weight", "bias")) if "weight" in key else None
        for channel in range(state[key].shape[0]):
            values = state[key][channel].reshape(-1).tolist()
            if bias is not None:
                values.append(bias[channel].item())
            for start in range(0, len(values), size):
                part = values[start : start + size]
                positions.append((len(rows), layer, channel))
                masks.append([True] * len(part) + [False] * (size - len(part)))
                rows.append(part + [0.0] * (size - len(part)))
    return torch.tensor(rows, dtype=torch.float64), torch.tensor(masks), positions


CASES: dict[str, tuple[Architecture, int, bool]] = {
    "cnn": (Architecture.cnn(), 0, False),
    "cnn3": (Architecture.cnn3(), 0, False),
    "cnn3-chunked": (Architecture.cnn3(), 100, False),
    "cnn3-exact-chunk": (Architecture.cnn3(), 145, False),
    "cnn3-wide": (Architecture.cnn3(), 300, False),
    "cnn3-by-one": (Architecture.cnn2(), 1, False),
    "lenet5": (Architecture.lenet5(), 256, False),
    "mlp": (Architecture.mlp(), 0, False),
    "mlp-7": (Architecture.mlp(), 7, False),
    "no-bias-somewhere": (MINI, 0, False),
    "batch-norm": (NORM, 0, False),
    "batch-norm-chunked": (NORM, 5, False),
    "ignore-bn": (NORM, 5, True),
}


@pytest.mark.parametrize(("arch", "size", "ignore_bn"), CASES.values(), ids=CASES)
def test_against_the_naive_loop(arch: Architecture, size: int, ignore_bn: bool, poisoned_empty: None) -> None:
    weights = torch.randn(2, arch.num_weights, dtype=torch.float64)
    tokens = TokenLayout(arch, size, ignore_bn=ignore_bn)
    got = tokens.tokenize(weights)
    for j in range(2):
        expected, mask, positions = naive({name: value[j] for name, value in unstack(weights, arch).items()}, size, ignore_bn)
        assert torch.equal(got.tokens[j], expected)
    assert torch.equal(got.mask, mask)
    assert got.positions.tolist() == [list(p) for p in positions]
    assert got.tokens.shape == (2, tokens.num_tokens, tokens.token_size)
    assert torch.equal(tokens.token_layer, got.positions[:, 1].long())
    assert not got.tokens[:, ~got.mask].any()


@settings(max_examples=25)
@given(size=st.integers(1, 20), k=st.integers(1, 4))
def test_round_trip_at_any_size(size: int, k: int) -> None:
    weights = torch.randn(k, MINI.num_weights)
    tokens = TokenLayout(MINI, size)
    padded = tokens.tokenize(weights).tokens
    assert torch.equal(tokens.detokenize(padded), weights)
    assert torch.equal(tokens.detokenize(torch.where(tokens.mask, padded, torch.nan)), weights)  # padding is discarded, whatever it holds


# reference.md section 2, worked numbers: tokens x size, real values, last position's token, largest layer and channel
WORKED: dict[str, tuple[Architecture, int, int, int, int, tuple[int, int, int]]] = {
    "cnn-1": (Architecture.cnn(1), 0, 48, 201, 2_464, (47, 4, 19)),
    "cnn2-3": (Architecture.cnn2(3), 0, 51, 151, 3_347, (50, 4, 19)),
    "cnn3-3": (Architecture.cnn3(3), 0, 93, 289, 10_853, (92, 4, 31)),
    "lenet5-3": (Architecture.lenet5(3), 0, 236, 401, 62_006, (235, 4, 119)),
    "lenet5-3-paper": (Architecture.lenet5(3), 256, 356, 256, 62_006, (355, 4, 119)),
    "mlp": (Architecture.mlp(), 0, 55, 31, 1_075, (54, 2, 29)),
}


@pytest.mark.parametrize(("arch", "size", "count", "width", "real", "largest"), WORKED.values(), ids=WORKED)
def test_worked_numbers(arch: Architecture, size: int, count: int, width: int, real: int, largest: tuple[int, int, int]) -> None:
    tokens = TokenLayout(arch, size)
    assert (tokens.num_tokens, tokens.token_size, int(tokens.mask.sum())) == (count, width, real)
    assert tuple(tokens.positions.amax(0).tolist()) == largest
    assert tokens.positions.dtype == torch.int16
    assert tokens.complete


def test_resnet18_with_and_without_batch_norm() -> None:
    arch = Architecture.resnet18(width=16)  # a quarter of the published width: the same rows of narrower layers
    everything, without = TokenLayout(arch, 72), TokenLayout(arch, 72, ignore_bn=True)
    assert len(everything.layers) == 81
    assert everything.num_tokens - without.num_tokens == 3 * 4_800 // 4  # 4,800 published channels of batch norm
    assert everything.complete
    assert not without.complete
    assert TokenLayout(arch).token_size == 129


@pytest.mark.slow
def test_resnet18_published_numbers() -> None:
    arch = Architecture.resnet18()
    everything, without = TokenLayout(arch, 288), TokenLayout(arch, 288, ignore_bn=True)
    assert (everything.num_tokens, int(everything.mask.sum())) == (53_524, 11_183_562)
    assert tuple(everything.positions.amax(0).tolist()) == (53_523, 80, 511)
    assert everything.positions.dtype == torch.int32
    assert (without.num_tokens, int(without.mask.sum())) == (39_124, 11_164_362)
    assert TokenLayout(arch).token_size == 513


@pytest.mark.parametrize(("count", "dtype"), [(32_768, torch.int16), (32_769, torch.int32)], ids=["fits", "one-more"])
def test_positions_dtype(count: int, dtype: torch.dtype) -> None:
    arch = Architecture.from_layers([Linear("a", 1, 2), Linear("b", 2, count - 2)], (1,))
    tokens = TokenLayout(arch)
    assert tokens.num_tokens == count
    assert tokens.positions.dtype == dtype
    assert int(tokens.positions[-1, 0]) == count - 1


# -- goldens -----------------------------------------------------------------------------------------------------------


def _g1(arch: Architecture) -> Tensor:
    return (0.3 * torch.arange(arch.num_weights, dtype=torch.float64).sin()).float()[None]


@pytest.mark.parametrize(
    ("arch", "size", "total", "squares"),
    [
        (Architecture.cnn3(), 0, 0.233449, 488.355532),
        (Architecture.lenet5(), 256, 0.585410, 2790.253555),
        (Architecture.cnn(), 0, None, 110.835253),
    ],
    ids=["cnn3", "lenet5", "cnn"],
)
def test_golden_g1(arch: Architecture, size: int, total: float | None, squares: float) -> None:
    tokens, mask, _ = TokenLayout(arch, size).tokenize(_g1(arch))
    assert tokens.dtype == torch.float32
    if total is not None:
        assert float(tokens.double().sum()) == pytest.approx(total, abs=PRINTED)
    assert float(tokens.double().square().sum()) == pytest.approx(squares, abs=PRINTED)
    expected = torch.zeros_like(tokens[0])
    expected[mask] = _g1(arch)[0][TokenLayout(arch, size).index[mask]]
    assert torch.equal(tokens[0], expected)


def test_golden_g1_values() -> None:
    tokens, mask, _ = TokenLayout(Architecture.cnn3()).tokenize(_g1(Architecture.cnn3()))
    assert tokens[0, 1, :3].tolist() == pytest.approx([0.286913, 0.081272, -0.199090], abs=PRINTED)
    assert float(tokens[0, 1][mask[1]][-1]) == pytest.approx(-0.154186, abs=PRINTED)


# -- batch norm --------------------------------------------------------------------------------------------------------


def test_batch_norm_rows() -> None:
    tokens = TokenLayout(NORM)
    assert tokens.layers == (
        "conv1.weight",
        "bn1.weight",
        "bn1.running_mean",
        "bn1.running_var",
        "downsample.0.weight",
        "downsample.1.weight",
        "downsample.1.running_mean",
        "downsample.1.running_var",
        "fc.weight",
    )
    widths = tokens.mask.sum(1)
    assert tokens.token_size == 17  # the linear layer's; conv1 (18 wide, no bias) takes no part and is cut
    for layer, width, count in ((1, 2, 3), (2, 1, 3), (3, 1, 3), (5, 2, 4), (6, 1, 4)):
        rows = tokens.token_layer == layer
        assert widths[rows].tolist() == [width] * count
    assert widths[tokens.token_layer == 0].tolist() == [17, 1] * 3


def test_ignored_batch_norm_comes_from_the_reference() -> None:
    tokens = TokenLayout(NORM, ignore_bn=True)
    assert tokens.layers == ("conv1.weight", "downsample.0.weight", "fc.weight")
    weights, reference = torch.randn(3, NORM.num_weights), torch.randn(NORM.num_weights)
    got = unstack(tokens.detokenize(tokens.tokenize(weights).tokens, reference), NORM)
    each = torch.randn(3, NORM.num_weights)
    own = unstack(tokens.detokenize(tokens.tokenize(weights).tokens, each), NORM)
    for name, value in unstack(weights, NORM).items():
        ignored = "bn" in name or "downsample.1" in name
        assert torch.equal(got[name], unstack(reference[None], NORM)[name].expand_as(value) if ignored else value)
        assert torch.equal(own[name], unstack(each, NORM)[name] if ignored else value)
    with pytest.raises(WslfastError, match="reference: this layout leaves weights out"):
        tokens.detokenize(tokens.tokenize(weights).tokens)


# -- autograd ----------------------------------------------------------------------------------------------------------


def test_gradients_both_ways() -> None:
    tokens = TokenLayout(MINI, 5)
    weights = torch.randn(2, MINI.num_weights, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(2, tokens.num_tokens, 5, dtype=torch.float64, requires_grad=True)
    for function, x in ((lambda w: tokens.tokenize(w).tokens, weights), (tokens.detokenize, rows)):
        assert torch.autograd.gradcheck(function, x)
        assert torch.autograd.gradcheck(lambda v, f=function: f(v) ** 3, x)
        assert torch.autograd.gradgradcheck(lambda v, f=function: f(v) ** 3, x)


def test_gradient_of_padding_is_zero_and_stride_zero_gradients_work() -> None:
    tokens = TokenLayout(MINI, 5)
    rows = torch.randn(2, tokens.num_tokens, 5, requires_grad=True)
    tokens.detokenize(rows).sum().backward()  # a stride-0 gradient
    assert torch.equal(rows.grad, tokens.mask.float().expand_as(rows))  # type: ignore[arg-type]
    weights = torch.randn(2, MINI.num_weights, requires_grad=True)
    tokens.tokenize(weights).tokens.sum().backward()
    assert torch.equal(weights.grad, torch.ones_like(weights))  # type: ignore[arg-type]


def test_ignored_weights_get_no_gradient() -> None:
    tokens = TokenLayout(NORM, ignore_bn=True)
    weights = torch.randn(1, NORM.num_weights, requires_grad=True)
    tokens.tokenize(weights).tokens.sum().backward()
    assert weights.grad is not None
    for name, gradient in unstack(weights.grad, NORM).items():
        ignored = "bn" in name or "downsample.1" in name
        assert torch.equal(gradient, torch.full_like(gradient, 0.0 if ignored else 1.0))


def test_strides_and_dtypes() -> None:
    tokens = TokenLayout(MINI, 5)
    weights = torch.randn(3, MINI.num_weights)
    expected = tokens.tokenize(weights)
    assert torch.equal(tokens.tokenize(weights.t().contiguous().t()).tokens, expected.tokens)
    assert torch.equal(tokens.tokenize(weights[:1].expand(3, -1)).tokens, expected.tokens[:1].expand(3, -1, -1))
    assert torch.equal(tokens.detokenize(expected.tokens.transpose(1, 2).contiguous().transpose(1, 2)), weights)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        got = tokens.tokenize(weights.to(dtype)).tokens
        assert got.dtype == dtype
        assert torch.equal(tokens.detokenize(got), weights.to(dtype))


def test_positions_and_mask_are_shared_by_models() -> None:
    tokens = TokenLayout(Architecture.cnn())
    a, b = tokens.tokenize(torch.zeros(1, 2464)), tokens.tokenize(torch.zeros(3, 2464))
    assert a.positions is b.positions
    assert a.mask.shape == (48, 201)


def test_layout_is_cached_per_size() -> None:
    assert layout(Architecture.cnn(), 9) is layout(Architecture.cnn(), 9)
    assert layout(Architecture.cnn(), 9) is not layout(Architecture.cnn(), 10)


def test_a_copied_layout_works() -> None:
    tokens = copy.deepcopy(TokenLayout(MINI, 5))
    weights = torch.randn(1, MINI.num_weights)
    assert torch.equal(tokens.detokenize(tokens.tokenize(weights).tokens), weights)


class Odd(nn.Module):
    """Layer norm over two axes: more bias than rows; and a scalar whose name says weight."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc, self.mix_weight = nn.LayerNorm((2, 3)), nn.Linear(6, 2), nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(x[:, 0]).flatten(1)) * self.mix_weight


def test_odd_shapes_survive() -> None:
    arch = Architecture.from_module(Odd(), (1, 2, 3))
    for size in (0, 1, 4):
        tokens = TokenLayout(arch, size)
        weights = torch.randn(2, arch.num_weights)
        assert torch.equal(tokens.detokenize(tokens.tokenize(weights).tokens), weights)


WRONG = {
    "architecture": (lambda: TokenLayout("cnn"), r"architecture: expected an Architecture, got 'cnn'"),  # type: ignore[arg-type]
    "size-negative": (lambda: TokenLayout(MINI, -1), r"token_size: expected a non-negative integer, got -1"),
    "size-float": (lambda: TokenLayout(MINI, 5.0), r"token_size: expected a non-negative integer, got 5.0"),  # type: ignore[arg-type]
    "size-bool": (lambda: TokenLayout(MINI, True), r"token_size: expected a non-negative integer, got True"),
    "size-none": (lambda: TokenLayout(MINI, None), r"token_size: expected a non-negative integer, got None"),  # type: ignore[arg-type]
    "weights-width": (lambda: TokenLayout(MINI).tokenize(torch.zeros(2, 3)), r"weights: expected floating \[k, 51\].*'mini', got \[2, 3\]"),
    "weights-axes": (lambda: TokenLayout(MINI).tokenize(torch.zeros(51)), r"weights: expected floating \[k, 51\]"),
    "weights-int": (lambda: TokenLayout(MINI).tokenize(torch.zeros(2, 51).long()), r"weights: expected floating.*int64"),
    "weights-none": (lambda: TokenLayout(MINI).tokenize(None), r"weights: expected floating.*got None"),  # type: ignore[arg-type]
    "tokens-count": (
        lambda: TokenLayout(MINI, 5).detokenize(torch.zeros(1, 3, 5)),
        r"tokens: expected floating \[k, \d+, 5\].*got \[1, 3, 5\]",
    ),
    "tokens-axes": (lambda: TokenLayout(MINI, 5).detokenize(torch.zeros(3, 5)), r"tokens: expected floating"),
    "tokens-int": (lambda: TokenLayout(MINI, 9).detokenize(torch.zeros(1, 7, 9).int()), r"tokens: expected floating.*int32"),
    "reference-shape": (
        lambda: TokenLayout(NORM, 5, ignore_bn=True).detokenize(
            TokenLayout(NORM, 5, ignore_bn=True).tokenize(torch.zeros(2, NORM.num_weights)).tokens, torch.zeros(3, NORM.num_weights)
        ),
        r"reference: expected",
    ),
}


@pytest.mark.parametrize(("call", "words"), WRONG.values(), ids=WRONG)
def test_bad_arguments(call: object, words: str) -> None:
    with pytest.raises(WslfastError, match=words):
        call()  # type: ignore[operator]
