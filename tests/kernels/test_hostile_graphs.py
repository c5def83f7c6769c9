"""Graphs out of files: what is none is refused in one sentence, before anything is computed, allocated or run."""

from __future__ import annotations

import contextlib
import copy
import json
import resource
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import wslfast
from wslfast.architecture import Architecture
from wslfast.zoo.manifest import _loads

# a convolution, a norm, attention of a kind, a recurrence, a constant, a tied key
GOOD: dict[str, Any] = {
    "name": "good", "version": 2, "input_shape": [2, 6],
    "graph": {
        "input_shape": [2, 6],
        "parameters": [["w", [4, 2, 3]], ["b", [4]], ["i", [9, 4]], ["h", [9, 3]], ["o", [2, 3]]],
        "nodes": [
            {"op": "conv1d", "input": "@x", "weight": "@w:w", "bias": "@w:b", "padding": [1]},
            {"op": "relu", "self": "@0"},
            {"op": "transpose.int", "self": "@1", "dim0": -2, "dim1": -1},
            {"op": "add.Tensor", "self": "@2", "other": "@c:shift"},
            {"op": "new_zeros", "self": "@x", "size": [1, "@n", 3]},
            {"op": "gru.input", "input": "@3", "hx": "@4", "params": ["@w:i", "@w:h"], "has_biases": False, "num_layers": 1, "dropout": 0.0, "train": False,
             "bidirectional": False, "batch_first": True},
            {"op": "getitem", "self": "@5", "index": 0},
            {"op": "reshape", "self": "@6", "shape": ["@n*6", 3]},
            {"op": "linear", "input": "@7", "weight": "@w:o"},
            {"op": "reshape", "self": "@8", "shape": ["@n", 12]},
        ],
        "output": "@9",
        "constants": [{"name": "shift", "dtype": "float32", "shape": [4], "data": "AACAPwAAgD8AAIA/AACAPw==", "kept": True}],
        "aliases": [["o2", "o"]],
    },
}  # fmt: skip
BIG = (1 << 31) - 1


def edited(*path: Any, to: Any) -> Callable[[], Any]:
    def make() -> Any:
        record = copy.deepcopy(GOOD)
        place: Any = record["graph"]
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = to
        return record

    return make


def appended(*nodes: dict[str, Any], output: str = "@10") -> Callable[[], Any]:
    def make() -> Any:
        record = copy.deepcopy(GOOD)
        record["graph"]["nodes"] += nodes
        record["graph"]["output"] = output
        return record

    return make


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


HOSTILE: dict[str, tuple[Callable[[], Any], str]] = {
    # references
    "a node that is not there": (edited("nodes", 1, "self", to="@99"), "node 1 .*'@99'"),
    "a later node": (edited("nodes", 1, "self", to="@2"), "node 1 .*'@2'"),
    "itself": (edited("nodes", 1, "self", to="@1"), "node 1 .*'@1'"),
    "a cycle": (edited("nodes", 0, "input", to="@9"), "node 0 .*'@9'"),
    "a negative node": (edited("nodes", 1, "self", to="@-1"), "'@-1'"),
    "a node spelled otherwise": (edited("nodes", 1, "self", to="@00"), "node 1"),
    "digits of another script": (edited("nodes", 1, "self", to="@²"), "node 1"),
    "a parameter that is not there": (edited("nodes", 0, "weight", to="@w:none"), "'@w:none'"),
    "a constant that is not there": (edited("nodes", 3, "other", to="@c:none"), "'@c:none'"),
    "nothing at all": (edited("nodes", 1, "self", to="@"), "'@'"),
    "a size for a tensor": (edited("nodes", 1, "self", to="@n"), "expected Tensor"),
    "a size of another kind": (edited("nodes", 7, "shape", to=["@n*-6", 3]), "a size"),
    "a size of many digits": (edited("nodes", 7, "shape", to=["@n*" + "9" * 5000, 3]), "a size"),
    "an output that is not there": (edited("output", to="@77"), "output: '@77'"),
    "an output without a mark": (edited("output", to="9"), "output: '9'"),
    "an output of several": (edited("output", to="@5"), "one floating tensor"),
    "an output of parameters alone": (edited("output", to="@w:o"), "one answer a query"),
    "an output without queries in front": (edited("output", to="@8"), "one answer a query"),
    "an output of whole numbers": (appended({"op": "argmax", "self": "@9", "dim": -1}), "one floating tensor"),
    "queries that meet each other": (appended({"op": "reshape", "self": "@9", "shape": ["@n", 1, 12]}, {"op": "add.Tensor", "self": "@10", "other": "@9"}, output="@11"), "one answer a query"),
    # what a node is
    "an unknown operation": (edited("nodes", 1, "op", to="system"), "unknown operation 'system'"),
    "an operation of another library": (edited("nodes", 1, "op", to="os.system"), "unknown operation"),
    "an operation in place": (edited("nodes", 1, "op", to="relu_"), "unknown operation"),
    "no operation": (edited("nodes", 1, to={"self": "@0"}), "a node is an object with an op"),
    "an operation that is a number": (edited("nodes", 1, "op", to=3), "a node is an object with an op"),
    "a node that is a list": (edited("nodes", 1, to=["relu", "@0"]), "a node is an object"),
    "nodes that are none": (edited("nodes", to={"op": "relu"}), "nodes: expected a list"),
    "an argument too many": (edited("nodes", 1, "out", to="@x"), "no argument 'out'"),
    "an argument too few": (edited("nodes", 1, to={"op": "relu"}), "missing"),
    "a device": (edited("nodes", 4, "device", to="cuda"), "no argument 'device'"),
    "a text for a number": (edited("nodes", 5, "num_layers", to="1"), "num_layers"),
    "a truth for a number": (edited("nodes", 5, "num_layers", to=True), "num_layers"),
    "a fraction for a whole": (edited("nodes", 6, "index", to=0.5), "index"),
    "a number for a list": (edited("nodes", 7, "shape", to=36), "shape"),
    "an object for an argument": (edited("nodes", 1, "self", to={"a": 1}), "an argument of type dict"),
    "infinity unmarked": (edited("nodes", 5, "dropout", to=float("inf")), "no finite number"),
    "not a number": (edited("nodes", 5, "dropout", to=float("nan")), "no finite number"),
    "training": (edited("nodes", 5, "train", to=True), "expected False"),
    "an axis from the front": (edited("nodes", 2, "dim0", to=1), "counted from the end"),
    "an axis out of range": (edited("nodes", 2, "dim0", to=-9), "node 2 .*does not fit"),
    "padding of other axes": (edited("nodes", 0, "padding", to=[1, 1]), "one for each of 1 axes"),
    "a stride of nothing": (edited("nodes", 0, "stride", to=[0]), "node 0 .*does not fit"),
    "groups of nothing": (edited("nodes", 0, "groups", to=0), "node 0 .*does not fit"),
    "a part of one tensor": (edited("nodes", 6, "self", to="@3"), "one tensor"),
    "a part that is not there": (edited("nodes", 6, "index", to=7), "node 6 .*does not fit"),
    "several where one is meant": (edited("nodes", 7, "self", to="@5"), "node 7"),
    # sizes
    "a shape that does not fit": (edited("nodes", 9, "shape", to=["@n", 13]), "node 9 .*does not fit"),
    "another kernel": (edited("parameters", 0, to=["w", [4, 3, 3]]), "node 0 .*does not fit"),
    "a recurrence of another width": (edited("parameters", 3, to=["h", [9, 4]]), "node 5 .*does not fit"),
    "a giant parameter": (edited("parameters", 1, to=["b", [BIG] * 16]), "parameters"),
    "a parameter of many": (edited("parameters", 1, to=["b", [1 << 20, 1 << 19, 1 << 12]]), "parameters"),
    "a negative size": (edited("parameters", 1, to=["b", [-4]]), "expected sizes"),
    "a size that is a fraction": (edited("parameters", 1, to=["b", [4.0]]), "expected sizes"),
    "a parameter that is there twice": (edited("parameters", 1, to=["w", [4]]), "there twice"),
    "a parameter without a shape": (edited("parameters", 1, to=["b"]), r"\[name, shape\]"),
    "no parameters": (edited("parameters", to=[]), "no parameters"),
    "a giant value": (appended({"op": "new_zeros", "self": "@x", "size": ["@n", BIG]}), "makes .* numbers"),
    "a giant repetition": (appended({"op": "repeat", "self": "@9", "repeats": [1, 1 << 29]}), "makes .* numbers"),
    "a giant border": (appended({"op": "constant_pad_nd", "self": "@9", "pad": [BIG, BIG]}), "makes .* numbers"),
    "a giant image": (appended({"op": "upsample_nearest1d.vec", "input": "@1", "output_size": [BIG], "scale_factors": None}), "makes .* numbers"),
    "a square of a square": (appended({"op": "outer", "self": "@w:b", "vec2": "@w:b"}, *({"op": "kron", "self": f"@{i}", "other": f"@{i}"} for i in range(10, 20)), output="@9"), "makes .* numbers"),
    "twice and twice again": (appended(*({"op": "cat", "tensors": [f"@{i}", f"@{i}"], "dim": -1} for i in range(9, 40)), output="@40"), "makes .* numbers"),
    "many parts": (appended({"op": "new_zeros", "self": "@x", "size": ["@n", 1 << 27]}, {"op": "unbind.int", "self": "@10", "dim": -1}, {"op": "getitem", "self": "@11", "index": 0}, output="@12"), "parts"),
    "many pieces": (appended({"op": "split.Tensor", "self": "@9", "split_size": 1, "dim": -1}, {"op": "chunk", "self": "@9", "chunks": BIG, "dim": -1}, output="@9"), "parts"),
    "a number out of proportion": (edited("nodes", 5, "dropout", to=10**400), "out of all proportion"),
    "many layers": (edited("nodes", 5, "num_layers", to=BIG), "node 5 .*does not fit"),
    "input of another shape": (edited("input_shape", to=[2, 7]), "another input shape"),
    # constants and aliases
    "a constant that is short": (edited("constants", 0, "data", to="AACAPw=="), "does not hold its numbers"),
    "a constant that is no base64": (edited("constants", 0, "data", to="!!!"), "does not hold its numbers"),
    "a giant constant": (edited("constants", 0, "shape", to=[BIG, BIG]), "a constant of"),
    "a constant of objects": (edited("constants", 0, "dtype", to="object"), "a constant of"),
    "a constant of more": (edited("constants", 0, "code", to="import os"), "a constant has"),
    "a constant that is a text": (edited("constants", 0, to="shift"), "a constant has"),
    "a tied key of nothing": (edited("aliases", to=[["o2", "none"]]), "a key of no parameter"),
    "a tied key that is there": (edited("aliases", to=[["w", "o"]]), "there twice"),
    "a tied key that is no pair": (edited("aliases", to=["o2"]), r"\[key, name\]"),
    # the whole
    "something more": (edited("code", to="import os"), "unknown entries"),
    "nested deep": (edited("nodes", 7, "shape", to=nested(40)), "nested too deep"),
    "nested in a size": (edited("input_shape", to=nested(40)), "expected sizes"),
    "a graph that is a list": (lambda: {**GOOD, "graph": [1]}, "has no graph"),
    "a newer version": (lambda: {**GOOD, "version": 99}, "newer version"),
    "no record": (lambda: [GOOD], "expected an object"),
}  # fmt: skip


@pytest.fixture
def scarce() -> Any:
    """No more than two gigabytes beyond what is there."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        held = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + (2 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def test_what_is_right_is_taken() -> None:
    arch = Architecture.from_dict(json.loads(json.dumps(GOOD)))
    weights = torch.rand(3, arch.num_weights)
    assert wslfast.batched_forward(weights, torch.rand(5, 2, 6), arch).shape == (3, 5, 12)
    assert Architecture.from_dict(arch.to_dict()) == arch
    assert arch.aliases == {"o2": "o"}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_wrong_is_refused(name: str, scarce: None) -> None:
    make, sentence = HOSTILE[name]
    with pytest.raises(wslfast.WslfastError, match=sentence) as caught:
        Architecture.from_dict(make())
    assert len(str(caught.value)) < 600
    assert "\n" not in str(caught.value)


def test_a_long_recurrence_is_not_gone_through() -> None:
    record = edited("nodes", 0, "padding", to=[1])()
    record["input_shape"] = record["graph"]["input_shape"] = [2, 200_000]
    record["graph"]["nodes"][7:] = [{"op": "mean.dim", "self": "@6", "dim": [-2]}]
    record["graph"]["output"] = "@7"
    assert Architecture.from_dict(record).output_shape == (3,)  # step by step it would take minutes


def test_json_that_is_nested_too_deep() -> None:
    with pytest.raises(wslfast.WslfastError, match="not valid JSON"):
        _loads(b"[" * 100_000 + b"]" * 100_000, "manifest")


def test_indices_out_of_range_have_a_name() -> None:
    """What only numbers tell comes while it runs, as the network's own error."""
    record = appended(
        {"op": "to.dtype", "self": "@x", "dtype": "int64"}, {"op": "select.int", "self": "@10", "dim": -2, "index": 0},
        {"op": "embedding", "weight": "@w:o", "indices": "@11"}, {"op": "flatten.using_ints", "self": "@12", "start_dim": -2, "end_dim": -1}, output="@13",
    )()  # fmt: skip
    arch = Architecture.from_dict(record)
    with pytest.raises(wslfast.WslfastError, match="'good' cannot run on queries"):
        wslfast.batched_forward(torch.rand(2, arch.num_weights), torch.full((3, 2, 6), 70.0), arch)


values = st.one_of(
    st.none(), st.booleans(), st.integers(-4, 9), st.sampled_from([BIG, -BIG, 1 << 62, 1 << 16]), st.floats(), st.text(max_size=4),
    st.sampled_from(["@x", "@0", "@3", "@5", "@w:w", "@w:o", "@c:shift", "@n", "@n*2", "@inf", "same", "float32", "relu", "linear", "cat"]),
    st.lists(st.one_of(st.integers(-3, 7), st.sampled_from(["@x", "@1", "@n", "@w:b"])), max_size=4),
)  # fmt: skip


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in items for place in _places(item, (*path, key)))]


PLACES = _places(GOOD["graph"])[1:]


def _has(part: Any, key: Any) -> bool:
    """Whether a part of a record, which may have been mangled already, has a place of that name or number."""
    return key in part if isinstance(part, dict) else isinstance(part, list) and isinstance(key, int) and key < len(part)


def mangled(place: tuple[Any, ...], value: Any, another: tuple[Any, ...] | None) -> Any:
    record = copy.deepcopy(GOOD)
    for path in (place, another):
        part: Any = record["graph"]
        for key in (path or ())[:-1]:
            part = part[key] if _has(part, key) else None
        if path and (isinstance(part, dict) or _has(part, path[-1])):
            part[path[-1]] = value
    return record


def loads_or_refuses(record: Any) -> None:
    with contextlib.suppress(wslfast.WslfastError):
        arch = Architecture.from_dict(record)
        if arch.num_weights > 10_000:
            return
        made = wslfast.batched_forward(torch.rand(2, arch.num_weights), torch.rand(2, *arch.input_shape), arch)
        assert made.shape == (2, 2, *arch.output_shape)


@settings(max_examples=60)
@given(st.sampled_from(PLACES), values, st.one_of(st.none(), st.sampled_from(PLACES)))
def test_anything_else_is_refused_or_runs(place: tuple[Any, ...], value: Any, another: tuple[Any, ...] | None) -> None:
    loads_or_refuses(mangled(place, value, another))


@pytest.mark.slow
@settings(max_examples=3000)
@given(st.sampled_from(PLACES), values, st.one_of(st.none(), st.sampled_from(PLACES)))
def test_anything_else_is_refused_or_runs_at_length(place: tuple[Any, ...], value: Any, another: tuple[Any, ...] | None) -> None:
    loads_or_refuses(mangled(place, value, another))
