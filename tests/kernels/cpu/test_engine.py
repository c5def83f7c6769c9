"""The tuned CPU path against its readable twin in float64, and the promises of design section 5: equal bits, whatever the company."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import FP32, FP32_DEEP, FP32_ROUNDING, FP32_SMALL
from torch import Tensor
from torch_settings import default_dtype, threads_of

from wslfast.kernels import criteria, reference
from wslfast.kernels import layers as layers_module
from wslfast.kernels.cpu import engine as cpu
from wslfast.kernels.cpu import jobs, rewrites
from wslfast.kernels.cpu.activations import TABLE, function_of
from wslfast.kernels.layers import Activation, Conv2d, Dropout, Flatten, Layers, Linear, Pool2d, Unplannable, layer_slots, shapes
from wslfast.zoo.build import StackedAdam

Net = tuple[Layers, tuple[int, ...]]


def _conv(name: str, i: int, o: int, kernel: int | tuple[int, int], **kw: object) -> Conv2d:
    return Conv2d(name, i, o, kernel if isinstance(kernel, tuple) else (kernel, kernel), **kw)  # type: ignore[arg-type]


def _cnn3(act: str = "relu") -> Net:
    layers: list = []
    for i, (a, b) in enumerate(((3, 16), (16, 32), (32, 15))):
        layers += [_conv(f"c{i}", a, b, 3), Pool2d(f"p{i}"), Activation(f"a{i}", act, 0.1), Dropout(f"d{i}", 0.3)]
    layers += [Flatten("f"), Linear("l0", 60, 20), Activation("a3", act, 0.1), Linear("l1", 20, 10)]
    return tuple(layers), (3, 32, 32)


def _cnn(act: str = "tanh") -> Net:
    return (
        _conv("c0", 1, 8, 5),
        Pool2d("p0"),
        Activation("a0", act),
        _conv("c1", 8, 6, 5),
        Pool2d("p1"),
        Activation("a1", act),
        _conv("c2", 6, 4, 2),
        Activation("a2", act),
        Flatten("f"),
        Linear("l0", 36, 20),
        Activation("a3", act),
        Linear("l1", 20, 10),
    ), (1, 28, 28)


def _lenet(act: str = "relu", channels: int = 3) -> Net:
    return (
        _conv("c0", channels, 6, 5),
        Activation("a0", act),
        Pool2d("p0"),
        _conv("c1", 6, 16, 5),
        Activation("a1", act),
        Pool2d("p1"),
        Flatten("f"),
        Linear("l0", 400, 120),
        Activation("a2", act),
        Linear("l1", 120, 84),
        Activation("a3", act),
        Linear("l2", 84, 10),
    ), (channels, 32, 32)


NETS: dict[str, Net] = {
    "cnn3": _cnn3(),
    "cnn3-silu": _cnn3("silu"),  # not monotone, pooled first
    "cnn": _cnn(),
    "lenet5": _lenet(),
    "lenet5-gelu": _lenet("gelu", 1),  # not monotone, pooled last
    "narrow": (  # padding, and an activation that stays ahead of the pooling
        (_conv("c0", 2, 7, (3, 4), padding=(1, 0), stride=(2, 1)), Activation("a0", "silu"), Pool2d("p0", "avg"),
         _conv("c1", 7, 5, 3, padding=(2, 1)), Activation("a1"), Pool2d("p1"), Flatten("f"), Linear("l", 45, 4)),
        (2, 16, 15),
    ),
    "one-conv": ((_conv("c", 2, 3, 7, padding=(3, 3), stride=(2, 2)), Flatten("f")), (2, 9, 11)),
    "overlapping-pools": (
        (_conv("c0", 3, 5, 1, bias=False), Pool2d("p0", "max", (3, 3), (2, 2)), Activation("a0", "gelu", approximate="tanh"),
         _conv("c1", 5, 15, 2, padding=(1, 0)), Activation("a1", "leakyrelu", -0.2), Pool2d("p1", "max", (2, 1), (1, 1)),
         Flatten("f"), Dropout("d"), Linear("l", 300, 3)),
        (3, 11, 12),
    ),
    "average": (
        (_conv("c0", 3, 5, (3, 2), stride=(2, 1), padding=(1, 0)), Pool2d("p0", "avg", (2, 3), (1, 2)), Activation("a0", "elu", 0.7),
         _conv("c1", 5, 10, 2, groups=5, bias=False), Activation("a1", "celu", 1.3), _conv("c2", 10, 3, (2, 1), dilation=(2, 1)),
         Activation("a2", "sigmoid"), Pool2d("p1", "avg", (1, 2), (1, 1)), Flatten("f"), Linear("l", 6, 7, bias=False),
         Activation("a3", "identity"), Linear("m", 7, 3)),
        (3, 11, 9),
    ),
    "pool-first": (
        (Pool2d("p"), Activation("a", "leakyrelu", 0.2), _conv("c", 1, 1, 3), Activation("b"), Pool2d("q", "max", (2, 2), (2, 2)),
         Activation("t", "tanh"), Flatten("f"), Linear("l", 9, 2)),
        (1, 17, 16),
    ),
    "grouped-first": ((_conv("c", 4, 6, 3, groups=2), Activation("a"), Pool2d("p"), Flatten("f"), Linear("l", 24, 3)), (4, 6, 7)),
    "mlp": ((Linear("l0", 14, 30), Activation("a"), Linear("l1", 30, 15, bias=False), Activation("b", "tanh"), Linear("l2", 15, 10)), (14,)),
    "flatten-first": ((Flatten("f"), Linear("l", 2 * 3 * 5, 4)), (2, 3, 5)),
}  # fmt: skip
CRITERIA = list(criteria.CRITERIA)


def _models(layers: Layers, k: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for slots in layer_slots(layers):
        if slots.weight is not None:
            fan_in = slots.weight.size // slots.weight.shape[0]
            parts.append(torch.randn(k, slots.weight.size, generator=generator) / fan_in**0.5)
        if slots.bias is not None:
            parts.append(torch.randn(k, slots.bias.size, generator=generator) * 0.3)
    return torch.cat(parts, 1)


def _case(net: Net, k: int, n: int, own: bool = False) -> tuple[Tensor, Tensor, Tensor, Layers]:
    layers, shape = net
    generator = torch.Generator().manual_seed(5)
    queries = torch.randn(*((k, n) if own else (n,)), *shape, generator=generator)
    targets = torch.randn(k, n, shapes(layers, shape)[-1][0], generator=generator)
    return _models(layers, k), queries, targets, layers


def _assert_close(actual: Tensor, expected: Tensor, layers: Layers, bound: float = 1e-5) -> None:
    """Relative L2 of every parameter block over all models; nothing but finite numbers counts as close."""
    assert actual.isfinite().all()
    for slots in layer_slots(layers):
        for slot in filter(None, (slots.weight, slots.bias)):
            a, e = actual[:, slot.offset : slot.stop].double(), expected[:, slot.offset : slot.stop]
            assert (a - e).norm() <= bound * e.norm() + 1e-12, slot.name


def _check(net: Net, k: int, n: int, own: bool = False, criterion: str = "mse") -> None:
    weights, queries, targets, layers = _case(net, k, n, own)
    outputs = cpu.forward(weights, queries, layers)
    expected = reference.forward(weights.double(), queries.double(), layers)
    assert outputs.dtype == torch.float32
    assert (outputs - expected).norm() <= 1e-5 * expected.norm()
    losses, gradient = cpu.loss_and_gradient(weights, queries, targets, layers, criterion)
    values, truth = reference.loss_and_gradient(weights.double(), queries.double(), targets.double(), layers, criterion)
    assert losses.shape == (k,)
    assert gradient.shape == weights.shape
    assert gradient.is_contiguous()
    torch.testing.assert_close(losses.double(), values, rtol=FP32, atol=FP32_SMALL)
    _assert_close(gradient, truth, layers)


# -- against the twin --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own-queries"])
@pytest.mark.parametrize("name", NETS)
@pytest.mark.usefixtures("poisoned_empty")
def test_matches_the_reference(name: str, own: bool) -> None:
    _check(NETS[name], k=3, n=5, own=own)


SIZES = {"one": (1, 1), "full-group": (8, 3), "past-a-group": (9, 2), "past-a-slab": (2, 67), "two-slabs": (1, 130)}


@pytest.mark.parametrize(("k", "n"), SIZES.values(), ids=SIZES)
def test_sizes(k: int, n: int) -> None:
    _check(NETS["cnn"], k, n)
    _check(NETS["average"], k, n, own=True)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own-queries"])
def test_criteria(criterion: str, own: bool) -> None:
    _check(NETS["cnn"], 3, 7, own, criterion)


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own-queries"])
def test_labels(own: bool) -> None:
    weights, queries, _, layers = _case(NETS["cnn"], 5, 19, own)
    labels = torch.randint(10, (5, 19))
    losses, gradient = cpu.loss_and_gradient(weights, queries, labels, layers, "cross_entropy")
    values, truth = reference.loss_and_gradient(weights.double(), queries.double(), labels, layers, "cross_entropy")
    torch.testing.assert_close(losses.double(), values, rtol=FP32, atol=FP32_SMALL)
    _assert_close(gradient, truth, layers)


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_temperature(temperature: float) -> None:
    weights, queries, targets, layers = _case(NETS["mlp"], 2, 9)
    losses, gradient = cpu.loss_and_gradient(weights, queries, targets, layers, "distillation", temperature)
    values, truth = reference.loss_and_gradient(weights.double(), queries.double(), targets.double(), layers, "distillation", temperature)
    torch.testing.assert_close(losses.double(), values, rtol=FP32, atol=FP32_SMALL)
    _assert_close(gradient, truth, layers)


ACTIVATIONS = [
    ("relu", 0.0),
    ("leakyrelu", 0.2),
    ("leakyrelu", 0.0),
    ("leakyrelu", -0.3),
    ("tanh", 0.0),
    ("sigmoid", 0.0),
    ("silu", 0.0),
    ("gelu", 0.0),
    ("gelu", 1.0),
    ("elu", 1.4),
    ("elu", -0.6),
    ("celu", 0.8),
    ("celu", -0.9),
    ("softplus", 1.0),
    ("softplus", 2.5),
    ("identity", 0.0),
]


@pytest.mark.parametrize("order", ["pool-act", "act-pool", "act-average"])
@pytest.mark.parametrize(("function", "parameter"), ACTIVATIONS, ids=[f"{f}{p}" for f, p in ACTIVATIONS])
def test_activations_around_a_pooling(function: str, parameter: float, order: str) -> None:
    approximate = "tanh" if function == "gelu" and parameter else "none"
    pool, act = Pool2d("p", "avg" if order == "act-average" else "max"), Activation("a", function, parameter, approximate)
    middle = (pool, act) if order == "pool-act" else (act, pool)
    layers: Layers = (_conv("c", 2, 3, 3), *middle, Flatten("f"), Linear("l", 12, 4), Activation("b", function, parameter))
    _check((layers, (2, 7, 6)), 3, 11)


def test_ties_of_a_pooling_go_to_the_first() -> None:
    """Flat image regions make equal values; splitting the gradient among them would be wrong by the window's size."""
    layers, shape = NETS["cnn"]
    weights = _models(layers, 2)
    queries = torch.zeros(3, *shape)
    queries[1, :, 5:9, 7:12] = 1.0
    targets = torch.randn(2, 3, 10)
    _, gradient = cpu.loss_and_gradient(weights, queries, targets, layers, "mse")
    _, truth = reference.loss_and_gradient(weights.double(), queries.double(), targets.double(), layers, "mse")
    _assert_close(gradient, truth, layers)


@st.composite
def _nets(draw: st.DrawFn) -> Net:
    """One to three convolutions with whatever around them, then one or two linear layers."""
    channels, shape = draw(st.integers(1, 5)), (draw(st.integers(7, 16)), draw(st.integers(7, 16)))
    start = (channels, *shape)
    layers: list = []
    for i in range(draw(st.integers(1, 3))):
        height, width = shapes(tuple(layers), start)[-1][1:]
        padding = draw(st.integers(0, 1))
        kernel = draw(st.integers(1, min(7, height + 2 * padding, width + 2 * padding)))
        out = draw(st.sampled_from([1, 3, 8, 15, 16]))
        layers.append(
            _conv(
                f"c{i}", channels, out, kernel, stride=(draw(st.integers(1, 2)),) * 2, padding=(padding, padding), bias=draw(st.booleans())
            )
        )
        channels = out
        extras: list = [Activation(f"a{i}", draw(st.sampled_from(["relu", "gelu", "tanh", "silu"])))]
        size = min(shapes(tuple(layers), start)[-1][1:])
        if size >= 2 and draw(st.booleans()):
            window = draw(st.integers(2, min(3, size)))
            extras.append(Pool2d(f"p{i}", draw(st.sampled_from(["max", "avg"])), (window, window), (draw(st.integers(1, 3)),) * 2))
        layers += draw(st.permutations(extras))
    layers.append(Flatten("f"))
    size = shapes(tuple(layers), start)[-1][0]
    layers.append(Linear("l", size, 7, bias=draw(st.booleans())))
    return tuple(layers), start


@settings(max_examples=25)
@given(net=_nets(), k=st.integers(1, 9), n=st.integers(1, 20), own=st.booleans())
def test_any_net(net: Net, k: int, n: int, own: bool) -> None:
    weights, queries, targets, layers = _case(net, k, n, own)
    losses, gradient = cpu.loss_and_gradient(weights, queries, targets, layers, "mse")
    values, truth = reference.loss_and_gradient(weights.double(), queries.double(), targets.double(), layers, "mse")
    torch.testing.assert_close(losses.double(), values, rtol=FP32, atol=FP32_SMALL)
    _assert_close(gradient, truth, layers)


# -- equal bits --------------------------------------------------------------------------------------------------------


def _equal(net: Net, own: bool, k: int, n: int, take: Callable[[int], Tensor], criterion: str = "mse") -> None:
    """A selection of models gives the selection of results, to the bit."""
    weights, queries, targets, layers = _case(net, k, n, own)
    outputs = cpu.forward(weights, queries, layers)
    losses, gradient = cpu.loss_and_gradient(weights, queries, targets, layers, criterion)
    chosen = take(k)
    mine = queries[chosen] if own else queries
    assert torch.equal(cpu.forward(weights[chosen], mine, layers), outputs[chosen])
    again, rows = cpu.loss_and_gradient(weights[chosen], mine, targets[chosen], layers, criterion)
    assert torch.equal(again, losses[chosen])
    assert torch.equal(rows, gradient[chosen])


SELECTIONS = {
    "repeat": torch.arange,
    "permuted": torch.randperm,
    "reversed": lambda k: torch.arange(k - 1, -1, -1),
    "first": lambda k: torch.tensor([0]),
    "last": lambda k: torch.tensor([k - 1]),
    "chunk": lambda k: torch.arange(3, min(k, 8)),
    "twice": lambda k: torch.tensor([2, 2, 2, 2, 2, 2, 2]),
}


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own-queries"])
@pytest.mark.parametrize("take", SELECTIONS.values(), ids=SELECTIONS)
def test_bits_do_not_depend_on_the_company(take: Callable[[int], Tensor], own: bool) -> None:
    _equal(NETS["cnn3"], own, 11, 6, take)
    _equal(NETS["cnn"], own, 11, 18, take, "distillation")
    _equal(NETS["average"], own, 11, 5, take, "softmax_mse")
    _equal(NETS["mlp"], own, 11, 13, take, "cross_entropy")


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 12, 31])
def test_bits_do_not_depend_on_where_a_slice_lies(n: int) -> None:
    """Odd widths put batched operands on every address modulo 64; on some processors MKL rounds by it."""
    layers: Layers = (
        Conv2d("c", 1, 3, (3, 3)),
        Flatten("f"),
        Linear("a", 27, 33),
        Activation("t", "tanh"),
        Linear("b", 33, 9),
        Linear("d", 9, 3),
    )
    for take in SELECTIONS.values():
        _equal((layers, (1, 5, 5)), False, 11, n, take)
        _equal((layers, (1, 5, 5)), True, 11, n, take)
    weights, queries, targets, _ = _case((layers, (1, 5, 5)), 11, n)
    expected = cpu.loss_and_gradient(weights, queries, targets, layers, "mse")
    for offset in range(1, 16):
        moved = torch.empty(weights.numel() + offset)[offset:].view(weights.shape).copy_(weights)
        result = cpu.loss_and_gradient(moved, queries, targets, layers, "mse")
        assert all(map(torch.equal, result, expected))


@pytest.mark.parametrize("name", ["cnn3", "cnn", "lenet5", "mlp", "grouped-first", "pool-first"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_an_index_into_a_pool_is_the_gathered_queries(name: str, dtype: torch.dtype) -> None:
    weights, _, targets, layers = _case(NETS[name], 9, 6)
    pool = torch.randn(20, *NETS[name][1])
    index = torch.randint(20, (9, 6), dtype=dtype)
    expected = cpu.loss_and_gradient(weights, pool[index.long()], targets, layers, "mse")
    pools = [pool] if pool.ndim == 2 else [pool, pool.contiguous(memory_format=torch.channels_last)]
    for laid in pools:
        assert all(map(torch.equal, cpu.loss_and_gradient(weights, laid, targets, layers, "mse", index=index), expected))


@pytest.mark.slow
@pytest.mark.parametrize("n", [16, 33, 128, 256])
@pytest.mark.parametrize("name", ["cnn3", "cnn", "lenet5", "lenet5-gelu", "overlapping-pools"])
def test_bits_at_the_sizes_people_use(name: str, n: int) -> None:
    for take in SELECTIONS.values():
        _equal(NETS[name], False, 21, n, take)
    _equal(NETS[name], True, 9, min(n, 33), torch.randperm)


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_bits_at_any_number_of_threads(threads: int) -> None:
    """Work that is cut unevenly among threads must still be cut alike for every model."""
    with threads_of(threads):
        for name in ("cnn3", "cnn", "lenet5", "average"):
            _equal(NETS[name], False, 9, 19, torch.randperm)
            _equal(NETS[name], False, 9, 19, lambda k: torch.tensor([k - 1]))


@pytest.mark.skipif(jobs.controls() is None, reason="this torch cannot be told how many threads a job has")
@pytest.mark.parametrize(
    ("name", "k", "n"), [("cnn3", 5, 19), ("cnn3", 2, 150), ("lenet5", 9, 140), ("lenet5-gelu", 17, 9), ("mlp", 33, 40)]
)
def test_the_same_bits_whatever_the_number_of_threads(name: str, k: int, n: int) -> None:
    """More groups than threads, or fewer groups whose slabs are then jobs: one sum in one order."""
    weights, queries, targets, layers = _case(NETS[name], k, n)
    found = []
    for threads in (1, 2, 3, 8):
        with threads_of(threads):
            found.append((cpu.forward(weights, queries, layers), *cpu.loss_and_gradient(weights, queries, targets, layers, "mse")))
    for other in found[1:]:
        assert all(map(torch.equal, other, found[0]))


@pytest.mark.parametrize("n", [5, 33, 150])
@pytest.mark.parametrize("name", ["cnn3", "lenet5", "lenet5-gelu", "average", "overlapping-pools", "pool-first"])
def test_blocks_of_the_first_convolution_are_the_whole_slab(name: str, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, queries, targets, layers = _case(NETS[name], 3, n)
    outputs = cpu.forward(weights, queries, layers)
    losses, gradient = cpu.loss_and_gradient(weights, queries, targets, layers, "mse")
    monkeypatch.setattr(cpu, "blocked", lambda program: program)
    cpu._program.cache_clear()
    try:
        torch.testing.assert_close(cpu.forward(weights, queries, layers), outputs)
        values, whole = cpu.loss_and_gradient(weights, queries, targets, layers, "mse")
    finally:
        cpu._program.cache_clear()
    torch.testing.assert_close(values, losses)
    assert (whole - gradient).norm() <= 1e-5 * gradient.norm()


@pytest.mark.parametrize(("function", "parameter"), ACTIVATIONS, ids=[f"{f}{p}" for f, p in ACTIVATIONS])
def test_activations_round_every_element_alike(function: str, parameter: float) -> None:
    """Vectors and the elements left over at the end of a thread's share must agree to the bit."""
    act = Activation("a", function, parameter, "tanh" if function == "gelu" and parameter else "none")
    if function == "identity":
        return
    entry = function_of(act)
    assert entry is not None
    x, g = torch.randn(70_001) * 2, torch.randn(70_001)
    y, saved = entry.forward(x, act, False)
    gx = entry.backward(g.clone(), saved, act)
    for start, stop in ((0, 70_000), (1, 34_004), (5, 47), (7, 20), (11, 69_990)):
        part, seen = entry.forward(x[start:stop].clone(), act, False)
        assert torch.equal(part, y[start:stop])
        assert torch.equal(entry.backward(g[start:stop].clone(), seen, act), gx[start:stop])
    # channels-last, as convolutions leave it, whatever is left over at the end
    for shape in ((3, 48, 7, 9), (2, 5, 3, 3), (5, 16, 1, 1)):
        size = math.prod(shape)
        image, back = (t[:size].view(shape[0], *shape[2:], shape[1]).permute(0, 3, 1, 2) for t in (x.clone(), g.clone()))
        made, seen = entry.forward(image, act, False)
        assert torch.equal(made.permute(0, 2, 3, 1).flatten(), y[:size])
        assert torch.equal(entry.backward(back, seen, act).permute(0, 2, 3, 1).flatten(), gx[:size])


def test_the_table_of_activations_is_complete_and_tested() -> None:
    """Every activation that a record may name, and nothing that no record reaches; an unknown one is refused before anything runs."""
    assert {*TABLE, "identity"} == {*layers_module.ACTIVATIONS, "gelu_tanh"}
    assert {f if (f, p) != ("gelu", 1.0) else "gelu_tanh" for f, p in ACTIVATIONS} == {*TABLE, "identity"}
    net = (Linear("l", 3, 2), Activation("a", "softsign"), Linear("m", 2, 1))
    with pytest.raises(Unplannable, match=r"'a' \(activation\).*'softsign'"):
        cpu.compile_program(net, (3,), False)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", ["lenet5", "cnn", "cnn3"])
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own-queries"])
def test_a_small_last_group_has_the_bits_of_a_full_one(name: str, own: bool, threads: int) -> None:
    """Groups that are filled up to a few models give what a group of eight does."""
    with threads_of(threads):
        for k in (1, 3):
            _equal(NETS[name], own, 8, 11, lambda _, k=k: torch.arange(k))  # type: ignore[misc]


def test_small_groups_are_only_used_where_they_were_seen_to_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which another shape rounds differently: groups are filled, and bits are kept."""
    layers, shape = NETS["cnn"]
    inner = cpu._loss_and_gradient

    def rounds_by_shape(call: cpu._Call, *rest: object) -> tuple[Tensor, Tensor]:
        losses, gradient = inner(call, *rest)  # type: ignore[arg-type]
        return (losses, gradient) if call.sizes[0] == call.models else (losses.nextafter(losses + 1), gradient)

    cpu._smaller_groups.cache_clear()
    monkeypatch.setattr(cpu, "_loss_and_gradient", rounds_by_shape)
    assert cpu._smaller_groups(layers, shape, False, 19, torch.float32, torch.get_num_threads()) == ()
    cpu._smaller_groups.cache_clear()


@pytest.mark.parametrize("name", ["lenet5", "cnn", "narrow"])
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own-queries"])
def test_two_columns_at_once_are_the_plain_convolution(name: str, own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Narrow layers run in pairs of columns; without, gradients are the same to rounding."""
    monkeypatch.setattr(rewrites, "vector", lambda: 16)  # whatever this machine has
    cpu._program.cache_clear()
    weights, queries, targets, layers = _case(NETS[name], 5, 6, own)
    losses, gradient = cpu.loss_and_gradient(weights, queries, targets, layers, "mse")
    kinds = {type(step).__name__ for step in cpu._program(layers, NETS[name][1], own, True).steps}
    assert "NarrowConvStep" in kinds
    assert ("PairedConvStep" in kinds) == (own and name != "cnn")  # one channel is left to the grouped convolution
    cpu._program.cache_clear()
    monkeypatch.setattr(cpu, "_program", lambda layers, shape, own, _: cpu.compile_program(layers, shape, own))
    values, plain = cpu.loss_and_gradient(weights, queries, targets, layers, "mse")
    torch.testing.assert_close(losses, values, rtol=FP32, atol=FP32_SMALL)
    _assert_close(gradient, plain.double(), layers)


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own-queries"])
@pytest.mark.parametrize("n", [2, 5, 8])
def test_images_flattened_into_the_operand_are_flattened_first(n: int, own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flattening joined to the linear layer above it makes what the two apart make, with padded queries too."""
    weights, queries, targets, layers = _case(NETS["lenet5"], 5, n, own)
    made = cpu.loss_and_gradient(weights, queries, targets, layers, "mse")
    kinds = [type(step).__name__ for step in cpu._program(layers, NETS["lenet5"][1], own, True).steps]
    assert kinds.count("FlatLinearStep") == 1
    assert "FlattenStep" not in kinds
    cpu._program.cache_clear()
    monkeypatch.setattr(cpu, "flattened", lambda program: program)
    apart = cpu.loss_and_gradient(weights, queries, targets, layers, "mse")
    cpu._program.cache_clear()
    for one, other in zip(made, apart, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


ONE_BY_ONE: Net = (_conv("c", 6, 5, 1), Flatten("f"), Linear("l", 320, 5)), (6, 8, 8)
INNER_ONE: Net = (_conv("c", 3, 4, 3), Activation("a", "gelu"), _conv("d", 4, 5, 1), Flatten("f"), Linear("l", 5 * 36, 5)), (3, 8, 8)
ODD_GELU: Net = (_conv("c", 1, 4, 3), Activation("a", "gelu"), Flatten("f"), Linear("l", 4 * 7 * 7, 3)), (1, 9, 9)


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own-queries"])
@pytest.mark.parametrize("n", [2, 3, 4, 15, 17])
@pytest.mark.parametrize("net", [ONE_BY_ONE, INNER_ONE, ODD_GELU], ids=["one-by-one", "inner", "gelu"])
def test_few_images_have_the_same_bits_alone_and_in_company(net: Net, n: int, own: bool) -> None:
    """Where torch would give a call to another library for its few images, or round the last elements of a tensor another way."""
    for threads in (1, 2):
        with threads_of(threads):
            for j in range(8):
                _equal(net, own, 8, n, lambda _, j=j: torch.tensor([j]))  # type: ignore[misc]


@pytest.mark.parametrize(
    ("conv", "image"),
    [
        (_conv("c", 2, 1, (3, 1), stride=(1, 2), padding=(0, 1), dilation=(1, 2)), (2, 7, 1)),
        (_conv("c", 1, 3, 1, stride=(3, 3), padding=(1, 1), dilation=(3, 3)), (1, 2, 2)),
    ],
    ids=["column", "point"],
)
def test_a_dilation_between_taps_that_are_not_there(conv: Conv2d, image: tuple[int, ...]) -> None:
    """It means nothing, and oneDNN's channels-last path ends the process for it."""
    outputs = math.prod(shapes((conv,), image)[-1])
    layers: Layers = (conv, Flatten("f"), Linear("l", outputs, 3))
    weights, queries, targets, _ = _case((layers, image), 3, 5)
    losses, gradient = cpu.loss_and_gradient(weights, queries, targets, layers, "mse")
    rows = weights.double().requires_grad_()
    size = math.prod(conv.weight_shape)
    values = []
    for row, wanted in zip(rows, targets.double()):
        x = torch.nn.functional.conv2d(
            queries.double(),
            row[:size].view(conv.weight_shape),
            row[size : size + conv.out_channels],
            conv.stride,
            conv.padding,
            conv.dilation,
        )
        rest = row[size + conv.out_channels :]
        y = x.flatten(1) @ rest[: 3 * outputs].view(3, outputs).T + rest[3 * outputs :]
        values.append((y - wanted).square().sum() / 10)
    torch.testing.assert_close(losses.double(), torch.stack(values), rtol=FP32, atol=FP32_ROUNDING)
    torch.stack(values).sum().backward()
    assert rows.grad is not None
    torch.testing.assert_close(gradient.double(), rows.grad, rtol=FP32_DEEP, atol=FP32)


@pytest.mark.parametrize("threads", [1, 2])
def test_no_queries_are_a_mean_of_nothing(threads: int) -> None:
    weights, queries, targets, layers = _case(NETS["cnn"], 3, 4)
    with threads_of(threads):
        losses, gradient = cpu.loss_and_gradient(weights, queries[:0], targets[:, :0], layers, "mse")
    assert bool(losses.isnan().all())
    assert not bool(gradient.any())


def test_defaults_of_the_process_change_nothing() -> None:
    weights, queries, targets, layers = _case(NETS["cnn"], 3, 5)
    wanted = cpu.loss_and_gradient(weights, queries, targets, layers, "mse")
    for cache in (cpu._smaller_groups, cpu._tried):
        cache.cache_clear()
    with default_dtype(torch.float64):
        found = cpu.loss_and_gradient(weights, queries, targets, layers, "mse")
        with torch.device("meta"):
            again = cpu.loss_and_gradient(weights, queries, targets, layers, "mse")
    assert all(map(torch.equal, found, wanted))
    assert all(map(torch.equal, again, wanted))


def test_numbers_of_queries_that_never_come_again_have_no_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = NETS["cnn"][0]
    cpu._tried.cache_clear()
    asked: list[int] = []
    inner = cpu._smaller_groups
    monkeypatch.setattr(cpu, "_smaller_groups", lambda *a: asked.append(a[3]) or inner(*a))
    for n in range(3, 3 + 2 * cpu._TRIALS):
        weights, queries, targets, _ = _case(NETS["cnn"], 9, n)
        losses, _ = cpu.loss_and_gradient(weights, queries, targets, layers, "mse")
        alone, _ = cpu.loss_and_gradient(weights[8:], queries, targets[8:], layers, "mse")
        assert torch.equal(losses[8:], alone)
    assert set(asked) == set(range(3, 3 + cpu._TRIALS))
    cpu._tried.cache_clear()


LAST_WORDS = """
import threading, torch
from wslfast import Architecture, batched_behavioral_loss
torch.set_num_threads(2)
arch = Architecture.cnn()
w = arch.initial_weights(["kaiming_uniform"] * 24, range(24))
q = torch.rand(40, 1, 28, 28)
first = batched_behavioral_loss(w, w.flip(0), q, arch, reduction="none")
torch.set_flush_denormal(True)
tiny = w * 1e-13
flushed = [batched_behavioral_loss(tiny, w, q, arch, reduction="none") for _ in range(6)]
assert all(torch.equal(f, flushed[0]) for f in flushed)
torch.set_flush_denormal(False)
def late():
    threading.main_thread().join()
    assert torch.equal(batched_behavioral_loss(w, w.flip(0), q, arch, reduction="none"), first)
    print("the same")
threading.Thread(target=late).start()
"""


def test_after_the_main_thread_and_without_denormals() -> None:
    """A worker has its caller's treatment of denormals, and nobody is needed to help."""
    done = subprocess.run([sys.executable, "-c", LAST_WORDS], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "the same\n", "")


def test_any_function_of_the_outputs_is_a_criterion() -> None:
    """One that has a name, written as a function: the same losses and gradients."""
    weights, queries, targets, layers = _case(NETS["cnn"], 9, 70)
    losses, gradient = cpu.loss_and_gradient(weights, queries, targets, layers, "mse")
    values, found = cpu.loss_and_gradient(weights, queries, targets, layers, lambda y, t: (y - t).square().sum((1, 2)) / 140)
    torch.testing.assert_close(values, losses)
    _assert_close(found, gradient.double(), layers)


def test_group_shape_does_not_know_k() -> None:
    weights, queries, targets, layers = _case(NETS["mlp"], 70, 40)
    losses, gradient = cpu.loss_and_gradient(weights, queries, targets, layers, "mse")
    for j in (0, 1, 37, 69):
        alone, row = cpu.loss_and_gradient(weights[j : j + 1], queries, targets[j : j + 1], layers, "mse")
        assert torch.equal(alone[0], losses[j])
        assert torch.equal(row[0], gradient[j])


@pytest.mark.parametrize("name", ["cnn3", "cnn", "lenet5", "overlapping-pools", "average"])
def test_forward_is_the_forward_of_the_loss(name: str) -> None:
    """Losses against one's own outputs are exactly zero, and so are their gradients."""
    weights, queries, _, layers = _case(NETS[name], 5, 37)
    losses, gradient = cpu.loss_and_gradient(weights, queries, cpu.forward(weights, queries, layers), layers, "mse")
    assert not losses.any()
    assert not gradient.any()


def test_inputs_of_any_stride() -> None:
    weights, queries, targets, layers = _case(NETS["cnn3"], 5, 6)
    losses, gradient = cpu.loss_and_gradient(weights, queries, targets, layers, "mse")
    wide = torch.zeros(5, 2 * weights.shape[1])
    wide[:, ::2] = weights
    strided = queries.transpose(1, 3).contiguous().transpose(1, 3)
    far = targets.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    again, rows = cpu.loss_and_gradient(wide[:, ::2], strided, far, layers, "mse")
    assert torch.equal(again, losses)
    assert torch.equal(rows, gradient)
    one = queries[:1].expand(6, -1, -1, -1)
    expected = cpu.loss_and_gradient(weights, one.contiguous(), targets, layers, "mse")
    assert torch.equal(cpu.loss_and_gradient(weights, one, targets, layers, "mse")[1], expected[1])


# -- non-finite models stay alone --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38], ids=["nan", "inf", "overflow"])
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own-queries"])
@pytest.mark.parametrize("name", ["cnn3", "cnn", "lenet5-gelu", "average", "mlp"])
def test_a_broken_model_stays_alone(name: str, own: bool, value: float) -> None:
    weights, queries, targets, layers = _case(NETS[name], 6, 5, own)
    losses, gradient = cpu.loss_and_gradient(weights, queries, targets, layers, "mse")
    for broken in (0, 2, 5):
        bad = weights.clone()
        bad[broken] = value
        found, rows = cpu.loss_and_gradient(bad, queries, targets, layers, "mse")
        others = torch.arange(6) != broken
        assert torch.equal(found[others], losses[others])
        assert torch.equal(rows[others], gradient[others])
        if value != value:
            assert found[broken].isnan()
            assert rows[broken].isnan().any()


def test_nan_targets_stay_alone() -> None:
    weights, queries, targets, layers = _case(NETS["cnn"], 4, 5)
    _, gradient = cpu.loss_and_gradient(weights, queries, targets, layers, "mse")
    targets[1, 3, 2] = float("nan")
    losses, rows = cpu.loss_and_gradient(weights, queries, targets, layers, "mse")
    assert losses.isnan().tolist() == [False, True, False, False]
    assert torch.equal(rows[[0, 2, 3]], gradient[[0, 2, 3]])


# -- manners -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cnn", "pool-first", "mlp", "flatten-first"])
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own-queries"])
def test_arguments_are_left_as_they_were(name: str, own: bool) -> None:
    arguments = _case(NETS[name], 3, 4, own)
    copies = [a.clone() for a in arguments[:3]]
    weights = arguments[0].requires_grad_()
    cpu.forward(weights, arguments[1], arguments[3])
    losses, gradient = cpu.loss_and_gradient(*arguments, "mse")
    assert not losses.requires_grad
    assert not gradient.requires_grad
    for argument, copy in zip(arguments[:3], copies, strict=True):
        assert torch.equal(argument, copy)


def test_no_models() -> None:
    weights, queries, targets, layers = _case(NETS["cnn"], 1, 4)
    losses, gradient = cpu.loss_and_gradient(weights[:0], queries, targets[:0], layers, "mse")
    assert losses.shape == (0,)
    assert gradient.shape == (0, weights.shape[1])
    assert cpu.forward(weights[:0], queries, layers).shape == (0, 4, 10)


def test_what_it_declines() -> None:
    weights, queries, targets, layers = _case(NETS["mlp"], 2, 3)
    with pytest.raises(Unplannable, match="float32"):
        cpu.loss_and_gradient(weights.double(), queries.double(), targets.double(), layers, "mse")
    assert not cpu.supports(weights.double(), queries.double(), layers)
    assert cpu.supports(weights, queries, layers)
    image = torch.randn(2, 1, 5, 5)
    with pytest.raises(Unplannable, match="'c'"):
        cpu.forward(torch.randn(1, 10), image, (_conv("c", 1, 1, 3),))
    with pytest.raises(Unplannable, match="'p'"):
        cpu.forward(torch.randn(1, 0), image, (Pool2d("p"), Flatten("f")))
    with pytest.raises(ValueError, match="criterion"):
        cpu.loss_and_gradient(weights, queries, targets, layers, "l1")


@pytest.mark.parametrize("name", ["cnn3", "cnn", "lenet5", "mlp"])
def test_bfloat16_where_autocast_asks(name: str) -> None:
    """Errors stay within 3 x those of the reference under the same autocast, plus a little for small numbers."""
    weights, queries, targets, layers = _case(NETS[name], 3, 24)
    expected = reference.forward(weights.double(), queries.double(), layers)
    _, truth = reference.loss_and_gradient(weights.double(), queries.double(), targets.double(), layers, "mse")
    with torch.autocast("cpu", torch.bfloat16):
        outputs = cpu.forward(weights, queries, layers)
        _, gradient = cpu.loss_and_gradient(weights, queries, targets, layers, "mse")
        _, plain = reference.loss_and_gradient(weights, queries, targets, layers, "mse")
    assert outputs.dtype == gradient.dtype == torch.float32
    assert (outputs - expected).norm() <= 3e-2 * expected.norm()
    error, torchs = (gradient - truth).norm() / truth.norm(), (plain - truth).norm() / truth.norm()
    assert error <= 3 * torchs + 1e-2
    assert not torch.equal(outputs, cpu.forward(weights, queries, layers))


def test_memory_does_not_grow_with_the_models() -> None:
    """Results apart, 160 models hold no more at once than 32 do: measured as the growth of the process."""
    program = """
import resource, sys, torch
from wslfast.architecture import Architecture
from wslfast.kernels import cpu
torch.set_num_threads(1)
arch = Architecture.cnn()
def peak(k):
    weights = torch.rand(k, arch.num_weights) * 0.1
    cpu.loss_and_gradient(weights, torch.rand(64, 1, 28, 28), torch.rand(k, 64, 10), arch.layers, "mse")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
small = peak(32)
print(peak(160) - small)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    # weights, gradients and targets of 160 models are 4 MB; one group's activations 5 MB more for every copy that were kept
    assert int(done.stdout) < 20_000


# -- training with it --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_trained_models_are_as_good_as_torchs() -> None:
    """Final accuracies of 16 models trained together, and of 16 others one after another with autograd: the same distribution."""
    layers, shape = NETS["cnn"]
    generator = torch.Generator().manual_seed(7)
    prototypes = torch.randn(10, 1, 7, 7, generator=generator).repeat_interleave(4, 2).repeat_interleave(4, 3)
    labels = torch.randint(10, (1200,), generator=generator)
    images = prototypes[labels] + 1.5 * torch.randn(1200, *shape, generator=generator)

    def accuracies(together: bool, seed: int) -> Tensor:
        weights = _models(layers, 16, seed)
        adam = StackedAdam(weights, [3e-3] * 16, [1e-4] * 16)
        order = torch.randint(1000, (50, 16, 32), generator=torch.Generator().manual_seed(seed))
        for chosen in order:
            run = cpu.loss_and_gradient if together else reference.loss_and_gradient
            adam.step(run(weights, images[chosen], labels[chosen], layers, "cross_entropy")[1])
        return (reference.forward(weights, images[1000:], layers).argmax(-1) == labels[1000:]).double().mean(1)

    ours, torchs = accuracies(True, 1), accuracies(False, 2)
    assert torchs.mean() > 0.3  # they do learn: chance is 0.1
    spread = ((ours.var() + torchs.var()) / 16).sqrt()
    assert (ours.mean() - torchs.mean()).abs() < 3 * spread + 0.01
    assert (ours.std() - torchs.std()).abs() < 0.6 * torchs.std() + 0.01
    # and with the same batches, the same models to within what float32 training forgets
    assert (accuracies(False, 1) - ours).abs().mean() < 0.05
