"""The tape: every rule, and what has none, against torch's own graph through the same program, in float64."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from tape_cases import WIDTH, Between, K, check, kinds_of_calls, population
from tolerances import FP64, FP64_ROUNDING
from torch import Tensor, nn

from wslfast.kernels.stacked import engine, passes, rules
from wslfast.kernels.stacked.compiler import compile_program
from wslfast.kernels.stacked.leaves import copies_of
from wslfast.kernels.stacked.tape import Island, Ruled


class Normed(nn.Module):
    def __init__(self, *norm, **options) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, WIDTH), nn.LayerNorm(*norm, **options), nn.Linear(WIDTH, 3)
        for p in self.norm.parameters():
            nn.init.normal_(p)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(self.norm(h) + h)


FUNCTIONS = {
    "relu": lambda x, w: F.relu(x) * w,
    "tanh": lambda x, w: torch.tanh(x) + w,
    "sigmoid": lambda x, w: torch.sigmoid(x) - w,
    "leaky_relu": lambda x, w: F.leaky_relu(x, 0.2) * w,
    "silu": lambda x, w: F.silu(x) * w,
    "gelu": lambda x, w: F.gelu(x) + F.gelu(x * w, approximate="tanh"),
    "elu": lambda x, w: F.elu(x * w, 0.7),
    "celu": lambda x, w: F.celu(x * w, 0.5),  # torch rounds 1 / alpha to float32
    "selu": lambda x, w: F.selu(x * w),
    "softplus": lambda x, w: F.softplus(x * w, 2.0, 3.0),
    "hardswish": lambda x, w: F.hardswish(x * w * 4),
    "hardsigmoid": lambda x, w: F.hardsigmoid(x * w * 4),
    "mish": lambda x, w: F.mish(x * w),
    "relu6": lambda x, w: F.relu6(x * w * 9),
    "hardtanh": lambda x, w: F.hardtanh(x * w, -0.3, 0.8),
    "sin": lambda x, w: torch.sin(30 * x) * w,
    "cos": lambda x, w: torch.cos(x * w),
    "exp": lambda x, w: torch.exp(x - w),
    "neg": lambda x, w: -x * w,
    "abs": lambda x, w: torch.abs(x) + w,
    "sqrt": lambda x, w: torch.sqrt(x * x + w),
    "square": lambda x, w: torch.square(x + w),
    "log": lambda x, w: torch.log(x * x + w),
    "rsqrt": lambda x, w: torch.rsqrt(x * x + w),
    "reciprocal": lambda x, w: torch.reciprocal(x * x + w),
    "rsub.Scalar": lambda x, w: torch.rsub(x * w, 2, alpha=3),
    "pow.Tensor_Scalar": lambda x, w: (x * w) ** 3 + (x * w) ** 2 + (x * x + w) ** 0.4 + (x * w) ** 0 + w**-1,
    "log_sigmoid": lambda x, w: F.logsigmoid(x * w * 4),
    "clamp": lambda x, w: (x * w).clamp(-0.2, 0.7) + (x - w).clamp(min=0.1) + (x + w).clamp(max=-0.1),
    "clamp_min": lambda x, w: torch.clamp_min(x * w, 0.1),
    "clamp_max": lambda x, w: torch.clamp_max(x * w, 0.1),
    "glu": lambda x, w: F.glu(x * w, -1),
    "softmax.int": lambda x, w: F.softmax(x * w, -1),
    "log_softmax.int": lambda x, w: F.log_softmax(x * w, -1),
}
ARITHMETIC = {
    "a number ahead": lambda x, w: 2 - x * 3,
    "divided by a number": lambda x, w: x / 1.7 + w / 3,
    "a scalar a model": (lambda x, w: x * w - w, ()),
    "one number of an axis": (lambda x, w: x * w + w, (1,)),
    "twice itself": lambda x, w: x + x * x + 0 * w,
    "the same value twice": lambda x, w: torch.add(x, x, alpha=3) + 0 * w,
    "weights alone": lambda x, w: x + (w * 2).exp().sum(-1),
    "of a mean": lambda x, w: x.unflatten(1, (2, 3)).mean((-1, -2), keepdim=True).flatten(1) + x * w,
    "over one axis": lambda x, w: (x * w).unflatten(1, (2, 3)).mean(-2),
    "divided by weights": lambda x, w: x / w,
    "divided by what depends on both": lambda x, w: w / (x * x + w),
    "several results": lambda x, w: torch.cat((x.chunk(2, 1)[0], w * x), 1).sort(1)[0],
    "a part with no gradient": lambda x, w: x * w + torch.round(x).detach() + x.argmax(1, keepdim=True),
    "queries beside weights": lambda x, w: torch.maximum(x, w) + torch.minimum(x * 2, w),
}


@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_function(name: str) -> None:
    make = lambda: Between(FUNCTIONS[name])  # noqa: E731
    check(make)
    architecture, _ = population(make)
    assert any(node.operation == name for node in architecture.graph.nodes)
    assert Island not in kinds_of_calls(architecture)


def test_every_function_has_a_case() -> None:
    assert set(FUNCTIONS) == set(rules.FUNCTIONS)


@pytest.mark.parametrize("name", list(ARITHMETIC))
def test_arithmetic(name: str) -> None:
    run = ARITHMETIC[name]
    run, shape = run if isinstance(run, tuple) else (run, (WIDTH,))
    check(lambda: Between(run, shape))


@pytest.mark.parametrize("options", [{}, {"elementwise_affine": False}, {"bias": False}, {"eps": 0.3}], ids=str)
def test_layer_norm(options: dict) -> None:
    check(lambda: Normed(WIDTH, **options))


def test_layer_norm_of_a_parameter() -> None:
    """A vector that all queries share: its norm has no axis to sum the gradients of scale and shift over."""

    class OwnScale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 3)
            self.own, self.norm = nn.Parameter(torch.randn(WIDTH)), nn.LayerNorm(WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x) * self.norm(self.own))

    check(OwnScale)


def test_tokens_of_a_sequence() -> None:
    """Linear layers and norms on [n, tokens, features], attention between them, and a sort, which is an island."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm, self.last = nn.Linear(1, 8), nn.LayerNorm(8), nn.Linear(8, 3)
            self.attend = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            h = self.embed(x.unsqueeze(-1))
            h = h + self.attend(self.norm(h), h, h, need_weights=False)[0]
            return self.last(h.sort(-1)[0].mean(1))

    check(Block)
    architecture, _ = population(Block)
    assert {Ruled, Island} <= kinds_of_calls(architecture)


def test_images_among_the_channels() -> None:
    """Convolutions with residuals: rules in the layout of channels, in float64 without segments."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
            self.last = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.a(x.view(-1, 1, 2, 2)))
            h = h + F.relu(self.norm(self.b(h))) * 0.5
            return F.log_softmax(self.last(h.mean((2, 3))), 1)

    check(Residual)


def test_several_slabs_add_up() -> None:
    """More queries than a slab holds: values and gradients are sums over slabs, and what is made of weights alone is made once."""
    torch.manual_seed(0)
    architecture, weights = population(lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)))
    weights = weights.abs() + 0.1
    n = 300
    queries, targets = torch.randn(n, 4).double(), torch.randn(K, n, 3).double()
    assert engine.group_shape(architecture.graph, n)[1] < n
    losses, gradient = engine.loss_and_gradient(weights, queries, targets, architecture.graph, "mse")
    rows = weights.clone().requires_grad_()
    wanted = (engine.plain(rows, queries, architecture.graph) - targets).square().sum((1, 2)) / (2 * n)
    torch.testing.assert_close(losses, wanted.detach(), rtol=FP64_ROUNDING, atol=FP64_ROUNDING)
    torch.testing.assert_close(gradient, torch.autograd.grad(wanted.sum(), rows)[0], rtol=FP64, atol=FP64_ROUNDING)


def test_tape_and_graph_agree() -> None:
    """The two ways through a group give one loss and one gradient."""
    torch.manual_seed(0)
    architecture, weights = population(lambda: Normed(WIDTH))
    program = compile_program(architecture.graph, False, True)
    queries, targets = torch.randn(16, 4).double(), torch.randn(K, 16, 3).double()

    def share(at: int, outputs: Tensor) -> tuple[Tensor, Tensor]:
        return (outputs - targets).square().sum((1, 2)), 2 * (outputs - targets)

    ways = []
    for way in (passes.by_tape, lambda *a: passes.by_graph(*a, nullcontext)):
        leaves = copies_of(weights, architecture.graph)
        ways.append(way(program, leaves, [(0, program.prepare(queries))], share))
    torch.testing.assert_close(ways[0][0], ways[1][0])
    for a, b in zip(ways[0][1], ways[1][1], strict=True):
        torch.testing.assert_close(a, b)
