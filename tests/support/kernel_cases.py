"""Networks, inputs and comparisons that the kernel tests share."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wslfast.kernels import reference
from wslfast.kernels.layers import Activation, Conv2d, Dropout, Flatten, Layer, Layers, Linear, Pool2d, layer_slots, shapes


@dataclass(frozen=True)
class Net:
    layers: Layers
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Block:
    """One convolution and what follows it; ``order`` "pa" pools before the activation, "ap" after it."""

    out: int
    kernel: int | tuple[int, int] = 3
    stride: int = 1
    padding: int | tuple[int, int] = 0
    pool: str = ""
    order: str = "pa"
    act: str = "relu"
    parameter: float = 0.0
    approximate: str = "none"
    bias: bool = True


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)


def net(shape: tuple[int, ...], *blocks: Block, hidden: tuple[tuple[int, str], ...] = (), out: int = 3) -> Net:
    layers: list[Layer] = []
    channels = shape[0]
    for i, b in enumerate(blocks):
        kernel, padding = _pair(b.kernel), _pair(b.padding)
        layers.append(Conv2d(f"conv{i}", channels, b.out, kernel, _pair(b.stride), padding, bias=b.bias))
        pool = [Pool2d(f"pool{i}", b.pool)] if b.pool else []
        act = [Activation(f"act{i}", b.act, b.parameter, b.approximate)] if b.act else []
        layers += [*pool, *act] if b.order == "pa" else [*act, *pool]
        channels = b.out
    if len(shape) == 3:
        layers.append(Flatten("flatten"))
    features = shapes(tuple(layers), shape)[-1][0]
    for i, (width, act) in enumerate(hidden):
        layers += [Linear(f"hidden{i}", features, width), *([Activation(f"hidden_act{i}", act)] if act else [])]
        features = width
    return Net((*layers, Linear("head", features, out)), shape)


def cnn3(act: str = "relu", parameter: float = 0.0) -> Net:
    layers: list[Layer] = []
    channels = 3
    for i, out in enumerate((16, 32, 15)):
        layers += [Conv2d(f"c{i}", channels, out, (3, 3)), Pool2d(f"p{i}"), Activation(f"a{i}", act, parameter), Dropout(f"d{i}")]
        channels = out
    tail = (Flatten("f"), Linear("l0", 60, 20), Activation("a3", act, parameter), Dropout("d3"), Linear("l1", 20, 10))
    return Net((*layers, *tail), (3, 32, 32))


def cnn28(act: str = "tanh") -> Net:
    blocks = (Block(8, 5, pool="max", act=act), Block(6, 5, pool="max", act=act), Block(4, 2, act=act))
    return net((1, 28, 28), *blocks, hidden=((20, act),), out=10)


def lenet5(act: str = "relu") -> Net:
    blocks = (Block(6, 5, pool="max", order="ap", act=act), Block(16, 5, pool="max", order="ap", act=act))
    return net((3, 32, 32), *blocks, hidden=((120, act), (84, act)), out=10)


MLP = net((5,), hidden=((7, "relu"),))
SMALL = net((2, 9, 8), Block(3, pool="max", act="tanh"), Block(3, 2, pool="max"))

# Each line covers what the others do not; sizes are odd and small because the interpreter is slow.
CASES: dict[str, Net] = {
    "same_padding": net((2, 7, 5), Block(3, padding=1), Block(5, padding=1, act="tanh"), hidden=((5, "tanh"),)),
    "stride_2": net((3, 9, 11), Block(4, stride=2, padding=1), Block(6, stride=2, padding=1, act="sigmoid")),
    "stride_2_and_pool": net((3, 17, 15), Block(4, stride=2, padding=1, pool="max"), Block(6, act="tanh")),
    "dx_through_stride_2_and_pool": net((2, 15, 13), Block(4, padding=1), Block(5, stride=2, padding=1, pool="max", act="tanh")),
    "kernel_1": net((2, 6, 6), Block(3, 1), Block(4, 1, pool="max", act="tanh"), Block(4, 1, stride=2)),
    "kernel_7_same": net((1, 11, 9), Block(3, 7, padding=3, act="tanh"), Block(3, 7, padding=3, pool="max")),
    "kernels_2_4_6": net((2, 15, 14), Block(3, 2, act="tanh"), Block(3, 4, pool="max"), Block(2, 6, padding=2)),
    "kernel_5_pool": net(
        (3, 12, 13), Block(6, 5, padding=2, pool="max", order="ap"),
        Block(5, 5, padding=2, pool="max", act="leakyrelu", parameter=0.01),
    ),
    "rectangular": net((2, 9, 8), Block(3, (3, 1), act="tanh"), Block(3, (1, 5), padding=(0, 2), pool="max")),
    "average_then_act": net((2, 9, 8), Block(3, pool="avg", act="tanh"), Block(3, 2, pool="avg", act="silu")),
    "act_then_average": net((2, 9, 8), Block(3, pool="avg", order="ap", act="tanh"), Block(3, 2, pool="avg", order="ap")),
    "act_then_average_wide": net(
        (2, 14, 14), Block(3, pool="avg", order="ap", act="silu"), Block(20, pool="avg", order="ap", act="gelu")
    ),
    "silu_after_max": net((2, 9, 8), Block(3, pool="max", act="silu"), Block(3, 2, act="silu")),
    "gelu_after_max": net((2, 12, 12), Block(3, pool="max", act="gelu"), Block(17, pool="max", act="gelu", approximate="tanh")),
    "gelu_before_max": net(
        (2, 12, 12), Block(3, pool="max", order="ap", act="gelu"),
        Block(17, pool="max", order="ap", act="gelu", approximate="tanh"),
    ),
    "silu_before_max": net((2, 9, 8), Block(3, pool="max", order="ap", act="silu"), Block(3, 2, pool="max", order="ap", act="silu")),
    "negative_leak_before_max": net(
        (2, 9, 8), Block(3, pool="max", order="ap", act="leakyrelu", parameter=-0.2), Block(3, 2, act="leakyrelu", parameter=-0.3)
    ),
    "softplus": net((2, 9, 8), Block(3, pool="max", order="ap", act="softplus", parameter=1.0), Block(3, 2, act="softplus", parameter=2.5)),
    "elu_celu": net((2, 9, 8), Block(3, pool="max", act="elu", parameter=1.3), Block(3, 2, act="celu", parameter=0.7)),
    "sigmoid_before_max": net((2, 9, 8), Block(15, pool="max", order="ap", act="sigmoid"), Block(3, 2, act="sigmoid")),
    "no_bias_no_act": net((2, 9, 8), Block(3, pool="max", act="", bias=False), Block(3, 2, act="", bias=False)),
    "average_no_act": net((2, 9, 8), Block(3, pool="avg", act=""), Block(3, 2, pool="avg", act="")),
    "flat_gradient": net((3, 12, 14), Block(6, 5, pool="max", act="tanh")),
    "flat_gradient_stride_2": net((3, 19, 18), Block(6, 5, stride=2, padding=2, pool="avg", act="tanh"), Block(5)),
    "dx_by_columns": net((2, 7, 8), Block(3, act="tanh"), Block(33, 2, pool="max")),
    "cropped": net((1, 17, 19), Block(3, pool="max", act="tanh"), Block(4, pool="max"), Block(3, 2)),
    "channels_1": net((1, 6, 6), Block(1), Block(1)),
    "channels_17_in": net((17, 6, 6), Block(9, pool="max")),
    "channels_33_64_63": net((3, 9, 9), Block(33, padding=1, pool="max"), Block(64, pool="max", padding=1, act="tanh"), Block(63, 2)),
    "linear_wide": net((2, 3, 5), hidden=((70, "silu"), (130, "relu")), out=1),
    "activation_last": Net((*net((5,), hidden=((7, "relu"),)).layers, Activation("last", "sigmoid")), (5,)),
    "silu_last": Net((*net((5,), hidden=((7, "relu"),)).layers, Activation("last", "silu")), (5,)),
}  # fmt: skip

# Networks whose last two layers, criterion and their backward are one launch.
HEADS: dict[str, Net] = {
    "head_relu": net((2, 6, 6), Block(3, pool="max"), hidden=((5, "relu"),)),
    "head_silu_on_average": net((2, 6, 6), Block(3, pool="avg", act="tanh"), hidden=((17, "silu"),), out=9),
    "head_on_silu": net((2, 6, 6), Block(3, pool="max", act="silu"), hidden=((5, "sigmoid"),)),
    "head_on_window_average": net((2, 6, 6), Block(3, pool="avg", order="ap", act="gelu"), hidden=((5, ""),), out=1),
    "head_sigmoid_last": Net((*net((6,), hidden=((7, "relu"), (9, "tanh"))).layers, Activation("last", "sigmoid")), (6,)),
    "head_silu_last": Net((*net((6,), hidden=((7, "relu"), (9, "gelu"))).layers, Activation("last", "silu")), (6,)),
}


def random_net(seed: int, smallest: int = 8, channels: int = 12) -> Net:
    """One or two random stages on a random image."""
    draw = random.Random(seed)
    while True:
        size = draw.randint(smallest, smallest + smallest // 2)
        blocks = []
        for _ in range(draw.randint(1, 2)):
            kernel = draw.randint(1, 5), draw.randint(1, 5)
            padding = draw.randint(0, (kernel[0] - 1) // 2), draw.randint(0, (kernel[1] - 1) // 2)
            pool, order = draw.choice(("", "max", "avg")), draw.choice(("pa", "ap"))
            act = draw.choice(("relu", "tanh", "silu", "gelu", "sigmoid"))
            out, stride, bias = draw.randint(1, channels), draw.choice((1, 1, 2)), draw.random() < 0.8
            blocks.append(Block(out, kernel, stride, padding, pool, order, act, bias=bias))
        hidden = ((draw.randint(1, channels), "tanh"),) if draw.random() < 0.5 else ()
        try:
            return net((draw.randint(1, 5), size, size + draw.randint(0, 3)), *blocks, hidden=hidden, out=draw.randint(1, 12))
        except ValueError:  # nothing is left of the image
            continue


def count(layers: Layers) -> int:
    slots = [s for pair in layer_slots(layers) for s in (pair.weight, pair.bias) if s is not None]
    return slots[-1].stop


def make_weights(layers: Layers, k: int) -> Tensor:
    """``[k, P]`` with activations of order one: few numbers near a tie, none near zero gradients everywhere."""
    weights = torch.zeros(k, count(layers))
    for pair in layer_slots(layers):
        if pair.weight is not None:
            spread = 1.3 * (pair.weight.shape[0] / pair.weight.size) ** 0.5
            weights[:, pair.weight.offset : pair.weight.stop] = torch.randn(k, pair.weight.size) * spread
        if pair.bias is not None:
            weights[:, pair.bias.offset : pair.bias.stop] = torch.randn(k, pair.bias.size) * 0.2
    return weights


def make(case: Net, k: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """(weights, shared queries, targets)."""
    classes = shapes(case.layers, case.shape)[-1][0]
    return make_weights(case.layers, k), torch.randn(n, *case.shape), torch.randn(k, n, classes)


def error(found: Tensor, expected: Tensor) -> float:
    """Relative L2 error; NaN anywhere is no agreement."""
    found, expected = found.double().cpu(), expected.double().cpu()
    assert found.shape == expected.shape
    assert found.isfinite().all(), "not finite"
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


def gradient_errors(found: Tensor, expected: Tensor, layers: Layers) -> dict[str, float]:
    """Relative error of every parameter's gradient, by name."""
    slots = [s for pair in layer_slots(layers) for s in (pair.weight, pair.bias) if s is not None]
    return {s.name: error(found[:, s.offset : s.stop], expected[:, s.offset : s.stop]) for s in slots}


def oracle(weights: Tensor, queries: Tensor, targets: Tensor, layers: Layers, criterion: str, **options: Any) -> tuple[Tensor, Tensor]:
    """Losses and gradients by autograd in float64."""
    wide = targets.double() if targets.is_floating_point() else targets
    return reference.loss_and_gradient(weights.double(), queries.double(), wide, layers, criterion, **options)
