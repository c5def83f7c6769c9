"""Patches of layer inputs against torch's unfold and convolutions; their moments, symmetrised, are tested in test_linear.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tolerances import FP32_AMPLIFIED, FP32_DEEP

from wslfast.architecture import Architecture
from wslfast.codes.layer_inputs import good_models, weighted_layers, without_weights
from wslfast.kernels.layers import Activation, Conv2d, Flatten, Layers, Linear, Pool2d
from wslfast.population import Population

CONVOLUTIONS = {
    "plain": Conv2d("c", 3, 4, (3, 2)),
    "strided and padded": Conv2d("c", 3, 4, (3, 2), (2, 1), (1, 0)),
    "dilated, no bias": Conv2d("c", 2, 4, (2, 3), (1, 2), (0, 2), (3, 2), bias=False),
    "groups": Conv2d("c", 4, 6, (3, 3), (2, 2), (1, 1), groups=2),
    "depthwise": Conv2d("c", 5, 5, (2, 2), groups=5, bias=False),
}


def network(conv: Conv2d) -> tuple[Layers, tuple[int, ...]]:
    shape = (conv.in_channels, 9, 8)
    sizes = F.conv2d(torch.zeros(1, *shape), torch.zeros(conv.weight_shape), None, conv.stride, conv.padding, conv.dilation, conv.groups)
    return (conv, Activation("a"), Flatten("f"), Linear("l", sizes.numel(), 3)), shape


@pytest.mark.parametrize("conv", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_patches_are_unfolds(conv: Conv2d) -> None:
    layers, shape = network(conv)
    _, (layer, _) = weighted_layers(Architecture.from_layers(layers, shape))
    x = torch.randn(6, *shape)
    unfolded = F.unfold(x, conv.kernel_size, conv.dilation, conv.padding, conv.stride).unflatten(1, (conv.groups, -1))
    expected = unfolded.permute(0, 3, 1, 2).reshape(2, -1, unfolded.shape[2])  # two models, one after another
    if conv.bias:
        expected = F.pad(expected, (0, 1), value=1.0)
    patches = layer.patches(x, k=2)
    assert patches.shape == (2, 3 * layer.positions, layer.width) == expected.shape
    # in the order of the rows through the moment with itself, which is what they are for
    torch.testing.assert_close(layer.moment(patches, patches), expected.mT @ expected / expected.shape[1])
    torch.testing.assert_close(layer.sums(patches, 2 * patches), expected.mT @ expected * 2)


@pytest.mark.parametrize(
    "conv", [c for c in CONVOLUTIONS.values() if c.groups == 1], ids=[n for n, c in CONVOLUTIONS.items() if c.groups == 1]
)
def test_rows_on_patches_are_the_layer(conv: Conv2d) -> None:
    layers, shape = network(conv)
    head, (layer, last) = weighted_layers(Architecture.from_layers((Pool2d("p", "max", (1, 1), (1, 1)), *layers), shape))
    x = torch.randn(5, *shape)
    rows = torch.randn(2, conv.out_channels, layer.width)
    seen = layer.patches(without_weights(x, head))  # the same images for both models
    made = layer(rows, seen)
    weight, bias = (rows[..., :-1], rows[..., -1]) if conv.bias else (rows, [None, None])
    expected = torch.cat(
        [
            F.conv2d(x, w.reshape(conv.weight_shape), b, conv.stride, conv.padding, conv.dilation).relu().flatten(1)
            for w, b in zip(weight, bias)
        ]
    )
    torch.testing.assert_close(made, expected, rtol=FP32_DEEP, atol=FP32_DEEP)
    rows = torch.randn(2, 3, last.width)
    both = torch.cat([h @ r[:, :-1].T + r[:, -1] for h, r in zip(expected.split(5), rows)])
    torch.testing.assert_close(last(rows, last.patches(made, 2)), both, rtol=FP32_DEEP, atol=FP32_AMPLIFIED)


def test_test_images_choose_no_models() -> None:
    """Those that a code is fitted on are the better half on validation images, whatever figures on the test images say."""
    arch = Architecture.mlp(i_dim=3, h_dim=(4,), o_dim=2)
    better = torch.arange(20) % 3 != 0
    columns = {"val_acc": (0.5 + 0.3 * better).tolist(), "test_acc": (0.9 - 0.5 * better).tolist()}
    rows = torch.zeros(20, arch.num_weights)
    chosen = good_models(Population(arch, rows, properties=columns), 6, seed=0)
    assert better[chosen].all()
    alone = good_models(Population(arch, rows, properties={"test_acc": columns["test_acc"]}), 6, seed=0)
    assert not better[alone].all()  # the only one that is known
