"""Sizes of groups: only those that give a full group's bits, and no more idle models than needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch_settings import threads_of

from wslfast import Architecture
from wslfast.kernels.cpu import jobs
from wslfast.kernels.cpu.products import LANES, vector
from wslfast.kernels.stacked import company, engine


def _library(alike: Callable[[int], bool], log: list[int]) -> company.Trial:
    """A library whose results of groups that are not ``alike`` differ in a digit."""

    def trial(size: int, order: Sequence[int]) -> Sequence[Tensor]:
        log.append(size)
        return [torch.tensor([float(i) for i in list(order)[:size]]) + (0 if alike(size) else 1e-3)]

    return trial


@pytest.mark.parametrize("full", [2, 8, 64, 256])
@pytest.mark.parametrize("name", ["all", "full alone", "even", "few"])
def test_split_takes_sizes_that_agree_and_all_models(name: str, full: int) -> None:
    alike = {"all": lambda s: True, "full alone": lambda s: s == full, "even": lambda s: s % 2 == 0, "few": lambda s: s in (4, full)}[name]
    for count in range(1, 2 * full + 3, max(1, full // 16)):
        size, last = company.split(count, full, (name, full), _library(alike, []))
        assert alike(size)
        assert alike(last)
        whole, rest = divmod(count, size)
        assert size <= max(full, 3)
        assert last <= size
        assert rest <= last or not whole
        if name == "all" and full > 2:  # the last group is the next size at most
            idle = (last - rest if rest else 0) if whole else size - count
            assert idle <= max(1, count // 3)


def test_models_that_make_a_size_are_one_group_of_it() -> None:
    assert company.split(16, 64, "sixteen", _library(lambda s: True, [])) == (16, 16)
    assert company.split(20, 64, "twenty", _library(lambda s: True, [])) == (16, 4)
    assert company.split(64, 64, "full", _library(lambda s: True, [])) == (64, 64)
    assert company.split(65, 64, "more", _library(lambda s: True, [])) == (64, 2)
    assert company.split(16, 64, "fours", _library(lambda s: s in (4, 64), [])) == (4, 4)


@pytest.mark.parametrize(
    ("count", "threads", "expected"),
    [
        *((3, 1, (3, 3)), (5, 1, (3, 2)), (7, 1, (2, 2)), (9, 1, (3, 3)), (4, 1, (2, 2)), (11, 1, (2, 2)), (1, 1, (2, 2))),
        *((3, 2, (2, 2)), (5, 2, (3, 2)), (9, 2, (2, 2))),
    ],
)
def test_a_few_of_an_odd_number_run_as_threes(count: int, threads: int, expected: tuple[int, int]) -> None:
    assert company.split(count, 2, ("threes", count), _library(lambda s: True, []), threads=threads) == expected
    assert company.split(count, 2, ("twos", count), _library(lambda s: s == 2, []), threads=threads) == (2, 2)
    assert company.split(count, 2, ("twos", count), _library(lambda s: True, []), threads=threads, multiple=2) == (2, 2)


def test_groups_are_shared_among_threads() -> None:
    """As soon done as may be: groups of equal size, as many as threads, but none smaller than what is worth one."""
    every = _library(lambda s: True, [])
    assert company.split(16, 64, "two", every, threads=2) == (8, 8)
    assert company.split(64, 64, "four", every, threads=4) == (16, 16)
    assert company.split(256, 64, "many", every, threads=4) == (64, 64)
    assert company.split(16, 64, "worth", every, threads=16, least=8) == (8, 8)
    assert company.split(16, 64, "not worth", every, threads=16, least=32) == (16, 16)
    assert company.split(16, 64, "only full", _library(lambda s: s == 64, []), threads=2) == (64, 64)


@pytest.mark.parametrize("k", [5, 16, 40])
@pytest.mark.parametrize("kind", ["wide", "narrow", "attention", "images"])
def test_bits_are_the_same_at_any_number_of_threads(kind: str, k: int) -> None:
    torch.manual_seed(0)
    shape = {"images": (1, 12, 12), "attention": (6, 16), "wide": (64,), "narrow": (7,)}[kind]
    net: nn.Module
    if kind == "wide":
        net = nn.Sequential(nn.Linear(64, 300), nn.Tanh(), nn.Linear(300, 200), nn.GELU(), nn.Linear(200, 3))
    elif kind == "narrow":
        net = nn.Sequential(nn.Linear(7, 33), nn.Tanh(), nn.Linear(33, 33), nn.ReLU(), nn.Linear(33, 3))
    elif kind == "attention":
        net = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True), nn.Flatten(), nn.Linear(96, 3))
    else:
        net = nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.InstanceNorm2d(8), nn.PReLU(8), nn.ConvTranspose2d(8, 4, 4, 2, 1), nn.ELU(), nn.Flatten()
        )
        net = nn.Sequential(net, nn.Linear(1600, 3))
    arch = Architecture.from_module(net.eval(), shape)
    assert arch.graph is not None
    weights, queries, targets = torch.randn(k, arch.num_weights) * 0.1, torch.randn(48, *shape), torch.randn(k, 48, 3)
    found = []
    for threads in (1, 2, 3, 8):
        with threads_of(threads):
            outputs = engine.forward(weights, queries, arch.graph)
            found.append((*engine.loss_and_gradient(weights, queries, targets, arch.graph, "mse"), outputs))
    for results in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results, found[0], strict=True))


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("name", ["convolutions by channel", "norms", "odd channels", "transposed"])
def test_outputs_with_a_graph_do_not_depend_on_the_company(name: str, own: bool) -> None:
    """What torch's graph computes is tried by itself: its convolutions are others than the loss's, which may agree where these do not."""
    torch.manual_seed(0)
    arch = Architecture.from_module(GRAPHS[name](), (3, 8, 8))
    assert arch.graph is not None
    n, full = 5, engine.group_shape(arch.graph, 5)[0]
    weights = torch.randn(full + 3, arch.num_weights).abs() * 0.3  # variances are among them
    queries = torch.randn(*((len(weights),) if own else ()), n, 3, 8, 8)

    def run(rows: list[int]) -> list[Tensor]:
        leaves = weights[rows].requires_grad_(), (queries[rows] if own else queries).clone().requires_grad_()
        outputs = engine.differentiable(*leaves, arch.graph)
        slopes = torch.autograd.grad(outputs.square().sum(), leaves)
        return [outputs.detach(), *slopes[: 1 + own]]  # shared queries get the sum over models

    whole = run(list(range(len(weights))))
    for some in ([0], [full + 2, 3], [5, 4, 3, 2, 1, 0], list(range(2, full))):
        assert all(torch.equal(part, all_[some]) for part, all_ in zip(run(some), whole, strict=True))


GRAPHS: dict[str, Callable[[], nn.Module]] = {
    "convolutions by channel": lambda: nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU6(), nn.Conv2d(6, 6, 3, groups=6), nn.GELU(), nn.Flatten(), nn.Linear(216, 4)
    ),
    "norms": lambda: nn.Sequential(
        nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    ),
    "odd channels": lambda: nn.Sequential(
        nn.Conv2d(3, 7, 3, padding=1), nn.BatchNorm2d(7), nn.ReLU(), nn.Conv2d(7, 7, 3, padding=1), nn.ReLU(), nn.Conv2d(7, 15, 3, 2), nn.Flatten(), nn.Linear(135, 4)
    ),
    "transposed": lambda: nn.Sequential(
        nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.ConvTranspose2d(6, 4, 4, 2, 1), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 2, 1)
    ),
}  # fmt: skip


def test_a_trial_does_not_depend_on_inference_mode() -> None:
    """What it finds is kept for calls that want gradients, whoever asked first."""

    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(40, 40), nn.Linear(40, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x).sort(-1)[0])

    arch = Architecture.from_module(Sorted(), (40,))
    call = engine.Call(torch.randn(4, arch.num_weights), torch.randn(6, 40), arch.graph, None)
    with torch.inference_mode():
        inside = call.trial(64, 3, range(64))
    outside = call.trial(64, 3, range(64))
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))
    assert bool(outside[1].any(0)[: arch.slots["first.bias"].stop].any())


@pytest.mark.parametrize("once", [True, False])
def test_a_trial_inside_a_checkpoint(once: bool) -> None:
    """It is made in the forward pass alone, and what it saves is nothing that the backward pass has to find again."""
    arch = Architecture.from_module(nn.Sequential(nn.Linear(40, 37), nn.Softsign(), nn.Linear(37, 3 + once)), (40,))
    weights, queries = torch.randn(3, arch.num_weights, requires_grad=True), torch.randn(6, 40)

    def run(rows: Tensor) -> Tensor:
        engine.Call(rows.detach(), queries, arch.graph, None, once=once)
        return engine.plain(rows, queries, arch.graph)

    (slope,) = torch.autograd.grad(checkpoint(run, weights, use_reentrant=False).sum(), weights)
    assert torch.equal(slope, torch.autograd.grad(run(weights).sum(), weights)[0])


def test_what_one_autocast_finds_does_not_count_under_another() -> None:
    arch = Architecture.from_module(nn.Sequential(nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 3)), (40,))
    keys = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            keys.append(engine.Call(torch.randn(4, arch.num_weights), torch.randn(6, 40), arch.graph, None)._key())
    assert len(set(keys)) == 3


def test_what_has_no_derivative_is_tried_by_its_outputs() -> None:
    class Held(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.only = nn.Linear(40, 40)

        def forward(self, x: Tensor) -> Tensor:
            return self.only(x).detach()

    arch = Architecture.from_module(Held(), (40,))
    weights = torch.randn(3, arch.num_weights, requires_grad=True)
    assert not engine.differentiable(weights, torch.randn(6, 40), arch.graph).requires_grad


def test_products_take_all_threads_only_where_bits_stay() -> None:
    asked: list[tuple[int, bool]] = []

    def library(same: bool) -> Callable[[int, Sequence[int], bool], Sequence[Tensor]]:
        def run(size: int, order: Sequence[int], share: bool) -> Sequence[Tensor]:
            asked.append((size, share))
            return [torch.arange(float(size)) + (1e-3 if share and not same else 0)]

        return run

    assert company.agrees_when_shared(16, "stays", library(True))
    assert not company.agrees_when_shared(16, "moves", library(False))
    assert asked == [(16, False), (16, True)] * 2
    assert company.agrees_when_shared(16, "stays", library(False))  # known by now
    assert len(asked) == 4


@pytest.mark.skipif(jobs.controls() is None or not torch.backends.mkl.is_available(), reason="no MKL that could share")
def test_a_group_by_itself_shares_products_and_several_do_not() -> None:
    arch = Architecture.from_module(nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 3)), (64,))
    assert arch.graph is not None
    with threads_of(2):
        few = engine.Call(torch.randn(8, arch.num_weights), torch.randn(32, 64), arch.graph, None)
        many = engine.Call(torch.randn(512, arch.num_weights), torch.randn(256, 64), arch.graph, None)
        assert (engine.in_one_thread(few), engine.in_one_thread(many)) == (True, False)
        assert not many.shares_products()
    with threads_of(1):
        alone = engine.Call(torch.randn(8, arch.num_weights), torch.randn(32, 64), arch.graph, None)
        assert not alone.shares_products()


@pytest.mark.skipif(jobs.controls() is None or not torch.backends.mkl.is_available(), reason="no MKL that could share")
def test_products_that_are_soon_done_are_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    arch = Architecture.from_module(nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 3)), (64,))
    assert arch.graph is not None
    monkeypatch.setattr(engine.Call, "_agrees_when_shared", lambda call, threads: True)
    with threads_of(2):
        for models, shared in ((2, False), (32, True)):  # 2.6 and 41 million operations
            call = engine.Call(torch.randn(models, arch.num_weights), torch.randn(32, 64), arch.graph, None)
            assert engine.in_one_thread(call)
            assert call.shares_products() is shared


def test_a_full_group_is_tried_once_and_a_size_once_a_process() -> None:
    log: list[int] = []
    company.split(5, 64, "once", _library(lambda s: s == 64, log))
    assert log.count(64) == 1
    assert len(set(log)) == len(log)
    before = len(log)
    company.split(5, 64, "once", _library(lambda s: s == 64, log))
    assert len(log) == before


def test_what_trials_have_found_takes_no_more_memory_than_so_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that meets one network after another keeps the last ones; one that had to make room is found again, the same."""
    monkeypatch.setattr(company, "_MOST", 5)
    for name in ("_agree", "_shared", "_split"):
        monkeypatch.setattr(company, name, {})
    log: list[int] = []
    asked = [("bounded", i) for i in range(20)]
    first = [company.split(5, 64, key, _library(lambda s: s % 4 == 0, log)) for key in asked]
    shared = [company.agrees_when_shared(8, key, lambda size, order, share: [torch.ones(size)]) for key in asked]
    assert max(len(company._agree), len(company._shared), len(company._split)) <= 5
    tried = len(log)
    assert company.split(5, 64, asked[-1], _library(lambda s: s % 4 == 0, log)) == first[-1]
    assert len(log) == tried
    assert [company.split(5, 64, key, _library(lambda s: s % 4 == 0, log)) for key in asked] == first
    assert all(shared)


class Squeezed(nn.Module):
    """Images weighted by what a small network makes of their means."""

    def __init__(self, over: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.over, self.first, self.inner, self.last = over, nn.Conv2d(2, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        return self.last(x * torch.sigmoid(self.inner(self.over(x)))).mean((-1, -2))


def _volumes() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv3d(4, 4, 2), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 3)
    )


IMAGES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "means": (lambda: Squeezed(lambda x: x.mean((2, 3), keepdim=True)), (2, 9, 9)),
    "means of many pixels": (lambda: Squeezed(lambda x: x.mean((2, 3), keepdim=True)), (2, 19, 19)),
    "an average pooling": (lambda: Squeezed(nn.AdaptiveAvgPool2d(1)), (2, 9, 9)),
    "sums of rows": (lambda: Squeezed(lambda x: x.sum(3, keepdim=True)), (2, 9, 9)),
    "spreads": (lambda: Squeezed(lambda x: x.var((2, 3), keepdim=True)), (2, 9, 9)),
    "soft extremes": (lambda: Squeezed(lambda x: x.logsumexp((2, 3), keepdim=True)), (2, 9, 9)),
    "volumes": (_volumes, (1, 6, 6, 6)),
}


@pytest.mark.parametrize("name", IMAGES)
def test_bits_of_images_do_not_depend_on_the_place(name: str) -> None:
    if name == "volumes" and vector() == LANES:
        pytest.skip("seen, and mended, without AVX-512 alone")
    make, shape = IMAGES[name]
    torch.manual_seed(0)
    arch = Architecture.from_module(make(), shape)
    assert arch.graph is not None
    for n, k in ((12, 6), (26, 50), (3, 69)):
        weights, x, targets = torch.randn(k, arch.num_weights) * 0.4, torch.randn(n, *shape), torch.randn(k, n, *arch.output_shape)
        everyones = engine.loss_and_gradient(weights, x, targets, arch.graph, "mse")
        for some in (torch.randperm(k)[: k - k // 6], torch.randperm(k)[:3]):
            mine = engine.loss_and_gradient(weights[some], x, targets[some], arch.graph, "mse")
            assert all(torch.equal(a, b[some]) for a, b in zip(mine, everyones, strict=True)), (n, len(some))


def test_a_trial_has_weights_of_both_signs() -> None:
    """Or activations would all end at their limits, where nothing that comes before makes a difference."""
    arch = Architecture.from_module(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 3)), (1, 5, 5))
    assert arch.graph is not None
    weights, _, _ = company.random_models(arch.graph, 5, False, 8, torch.float32)
    for slot in arch.graph.slots:
        part = weights[:, slot.offset : slot.stop]
        assert (part[::2] >= 0).all()
        assert (part[1::2] < 0).any() == (slot.name != "1.running_var")


def test_outputs_that_are_differentiated_come_in_small_groups() -> None:
    """A model's weights do not begin where a row has them, and so few models need not fill a group of hundreds up."""
    arch = Architecture.from_module(nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3)), (5,))
    assert arch.graph is not None
    assert arch.num_weights % 4  # rows then begin anywhere
    torch.manual_seed(0)
    for n, k in ((17, 57), (48, 20), (3, 9)):
        weights, x, slopes = torch.randn(k, arch.num_weights) * 0.4, torch.randn(n, 5), torch.randn(k, n, 3)

        def results(rows: Tensor, x: Tensor = x, weights: Tensor = weights, slopes: Tensor = slopes) -> tuple[Tensor, Tensor]:
            leaf = weights[rows].requires_grad_()
            outputs = engine.differentiable(leaf, x, arch.graph)
            return outputs.detach(), torch.autograd.grad(outputs, leaf, slopes[rows])[0]

        everyones = results(torch.arange(k))
        for some in (torch.randperm(k)[: k // 2], torch.randperm(k)[:3], torch.tensor([1])):
            assert all(torch.equal(a, b[some]) for a, b in zip(results(some), everyones, strict=True)), (n, len(some))
    few = torch.randn(4, arch.num_weights)
    assert engine.Call(few, torch.randn(48, 5), arch.graph, None, once=False).models <= 64
