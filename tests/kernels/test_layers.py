"""Layer records: slots, shapes, JSON there and back, and records that a hostile manifest could hold."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from wslfast.kernels.layers import (
    Activation,
    Conv2d,
    Dropout,
    Flatten,
    Layer,
    LayerSlots,
    Linear,
    Pool2d,
    layer_from_dict,
    layer_slots,
    layer_to_dict,
    output_shape,
    shapes,
)

CHAIN: tuple[Layer, ...] = (
    Conv2d("a", 3, 5, (3, 2), (2, 1), (1, 0), (1, 2)),
    Pool2d("b", "avg", (2, 1), (1, 1)),
    Activation("c", "leakyrelu", 0.2),
    Conv2d("d", 5, 10, (1, 3), groups=5, bias=False),
    Activation("e", "gelu", approximate="tanh"),
    Flatten("f"),
    Dropout("g", 0.5),
    Linear("h", 240, 7, bias=False),
    Activation("i", "elu", 1.5),
    Linear("j", 7, 3),
)


def _module(layer: Layer) -> nn.Module:
    if isinstance(layer, Conv2d):
        return nn.Conv2d(
            layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups, layer.bias
        )
    if isinstance(layer, Pool2d):
        return {"max": nn.MaxPool2d, "avg": nn.AvgPool2d}[layer.mode](layer.kernel_size, layer.stride)
    if isinstance(layer, Linear):
        return nn.Linear(layer.in_features, layer.out_features, layer.bias)
    return nn.Flatten() if isinstance(layer, Flatten) else nn.Identity()


def test_slots_tile_the_row_in_state_dict_order() -> None:
    slots = [s for pair in layer_slots(CHAIN) for s in (pair.weight, pair.bias) if s is not None]
    state = {f"{layer.name}.{key}": t for layer in CHAIN for key, t in _module(layer).state_dict().items()}
    assert [(s.name, s.shape) for s in slots] == [(name, tuple(t.shape)) for name, t in state.items()]
    assert slots[0].offset == 0
    assert all(a.stop == b.offset for a, b in pairwise(slots))
    assert slots[-1].stop == sum(t.numel() for t in state.values())
    assert len(layer_slots(CHAIN)) == len(CHAIN)
    assert layer_slots(CHAIN)[1] == LayerSlots()


def test_shapes_are_torchs() -> None:
    x = torch.zeros(1, 3, 11, 9)
    expected = [tuple(x.shape[1:])]
    for layer in CHAIN[:6]:
        x = _module(layer)(x)
        expected.append(tuple(x.shape[1:]))
    assert shapes(CHAIN[:6], (3, 11, 9)) == tuple(expected)


@settings(max_examples=60)
@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)), kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)), padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
)  # fmt: skip
def test_convolution_shape_is_torchs(size: Any, kernel: Any, stride: Any, padding: Any, dilation: Any) -> None:
    layer = Conv2d("c", 2, 3, kernel, stride, padding, dilation)
    try:
        expected = tuple(_module(layer)(torch.zeros(1, 2, *size)).shape[1:])
    except RuntimeError:
        with pytest.raises(ValueError, match="'c'"):
            output_shape(layer, (2, *size))
        return
    assert output_shape(layer, (2, *size)) == expected


@settings(max_examples=40)
@given(size=st.integers(1, 9), kernel=st.integers(1, 4), stride=st.integers(1, 4))
def test_pool_shape_is_torchs(size: int, kernel: int, stride: int) -> None:
    layer = Pool2d("p", "max", (kernel, kernel), (stride, stride))
    if kernel > size:
        with pytest.raises(ValueError, match="nothing is left"):
            output_shape(layer, (2, size, size))
    else:
        assert output_shape(layer, (2, size, size)) == tuple(_module(layer)(torch.zeros(1, 2, size, size)).shape[1:])


@pytest.mark.parametrize(
    ("layer", "shape", "words"),
    [
        (Linear("fc", 5, 2), (6,), r"layer 'fc' \(linear\): expected \[5\]; its input is \[6\]"),
        (Linear("fc", 5, 2), (1, 1, 5), r"expected \[5\]"),
        (Conv2d("c", 3, 2, (3, 3)), (2, 8, 8), "expected 3 channels"),
        (Conv2d("c", 3, 2, (3, 3)), (48,), r"expected \[C, H, W\]"),
        (Conv2d("c", 3, 2, (9, 9)), (3, 8, 8), "nothing is left"),
        (Pool2d("p"), (3, 1, 8), "nothing is left"),
        (Pool2d("p"), (8,), r"expected \[C, H, W\]"),
    ],
    ids=["features", "no-flatten", "channels", "flat-conv", "kernel", "pool", "flat-pool"],
)
def test_a_layer_that_does_not_fit_is_named(layer: Layer, shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        output_shape(layer, shape)


@pytest.mark.parametrize("layer", CHAIN, ids=[layer.name + "-" + layer.kind for layer in CHAIN])
def test_json_there_and_back(layer: Layer) -> None:
    text = json.dumps(layer_to_dict(layer), allow_nan=False)
    again = layer_from_dict(json.loads(text))
    assert again == layer
    assert type(again) is type(layer)
    assert hash(again) == hash(layer)


def test_defaults_may_be_left_out() -> None:
    assert layer_from_dict({"kind": "pool2d", "name": "p"}) == Pool2d("p")
    assert layer_from_dict({"kind": "activation", "name": "a", "function": "elu", "parameter": 1}) == Activation("a", "elu", 1.0)


CONV = {"kind": "conv2d", "name": "c", "in_channels": 4, "out_channels": 6, "kernel_size": [3, 3]}
HOSTILE: dict[str, Any] = {
    "not-an-object": ["conv2d"],
    "none": None,
    "no-kind": {"name": "c"},
    "unknown-kind": {"kind": "exec", "name": "c"},
    "unhashable-kind": {"kind": ["conv2d"], "name": "c"},
    "number-kind": {"kind": 3, "name": "c"},
    "unknown-field": {**CONV, "device": "cuda"},
    "dunder-field": {**CONV, "__class__": "x"},
    "no-name": {"kind": "flatten"},
    "empty-name": {"kind": "flatten", "name": ""},
    "number-name": {"kind": "flatten", "name": 3},
    "none-name": {"kind": "flatten", "name": None},
    "long-name": {"kind": "flatten", "name": "x" * 100_000},
    "missing-required": {"kind": "linear", "name": "l", "in_features": 3},
    "negative": {**CONV, "in_channels": -1},
    "zero": {**CONV, "out_channels": 0},
    "text-number": {**CONV, "in_channels": "4"},
    "float-number": {**CONV, "in_channels": 4.0},
    "true-number": {**CONV, "in_channels": True},
    "huge": {**CONV, "out_channels": 10**30},
    "zero-kernel": {**CONV, "kernel_size": [0, 3]},
    "zero-stride": {**CONV, "stride": [1, 0]},
    "zero-dilation": {**CONV, "dilation": [0, 1]},
    "negative-padding": {**CONV, "padding": [-1, 0]},
    "huge-padding": {**CONV, "padding": [10**30, 0]},
    "one-number-kernel": {**CONV, "kernel_size": 3},
    "three-kernel": {**CONV, "kernel_size": [3, 3, 3]},
    "float-kernel": {**CONV, "kernel_size": [3.0, 3]},
    "bool-kernel": {**CONV, "kernel_size": [True, 3]},
    "text-kernel": {**CONV, "kernel_size": "33"},
    "groups-do-not-divide-in": {**CONV, "groups": 3},
    "groups-do-not-divide-out": {**CONV, "groups": 4},
    "int-bias": {**CONV, "bias": 1},
    "zero-pool": {"kind": "pool2d", "name": "p", "kernel_size": [0, 0]},
    "zero-pool-stride": {"kind": "pool2d", "name": "p", "stride": [0, 0]},
    "unknown-pool": {"kind": "pool2d", "name": "p", "mode": "min"},
    "unknown-activation": {"kind": "activation", "name": "a", "function": "eval"},
    "nan-parameter": {"kind": "activation", "name": "a", "function": "elu", "parameter": math.nan},
    "inf-parameter": {"kind": "activation", "name": "a", "function": "elu", "parameter": math.inf},
    "zero-celu": {"kind": "activation", "name": "a", "function": "celu", "parameter": 0.0},
    "bool-parameter": {"kind": "activation", "name": "a", "function": "elu", "parameter": True},
    "huge-parameter": {"kind": "activation", "name": "a", "function": "elu", "parameter": 10**400},
    "unknown-approximation": {"kind": "activation", "name": "a", "function": "gelu", "approximate": "erf"},
    "dropout-above-one": {"kind": "dropout", "name": "d", "p": 1.5},
    "dropout-negative": {"kind": "dropout", "name": "d", "p": -0.1},
    "dropout-nan": {"kind": "dropout", "name": "d", "p": math.nan},
}


@pytest.mark.parametrize("record", HOSTILE.values(), ids=HOSTILE)
def test_hostile_record_is_a_value_error(record: Any) -> None:
    with pytest.raises(ValueError, match=r"\w") as caught:
        layer_from_dict(record)
    assert type(caught.value) is ValueError
    assert len(str(caught.value)) < 1000


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5), lambda x: st.lists(x, max_size=3), max_leaves=4
)
FIELDS = sorted({f for layer in CHAIN for f in layer_to_dict(layer)})


@settings(max_examples=150)
@given(base=st.sampled_from(CHAIN), changes=st.dictionaries(st.sampled_from(FIELDS), JSON, min_size=1, max_size=2))
def test_a_mangled_record_is_a_layer_or_a_value_error(base: Layer, changes: dict[str, Any]) -> None:
    record = {**layer_to_dict(base), **changes}
    try:
        layer = layer_from_dict(record)
    except ValueError:
        return
    assert layer_from_dict(json.loads(json.dumps(layer_to_dict(layer), allow_nan=False))) == layer
    layer_slots((layer,))
    for shape in ((3, 11, 9), (5, 4, 4), (240,)):
        try:
            output_shape(layer, shape)
        except ValueError:
            continue
