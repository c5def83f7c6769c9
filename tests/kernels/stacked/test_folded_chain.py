"""Chains whose norms are folded in: which there are, that they compute what the modules compute, and that no model sees another."""

from __future__ import annotations

import pytest
import torch
from graph_oracle import close, looped, queries_like, rows_near
from segment_cases import CASES
from torch import Tensor, nn

from wslfast import Architecture, engine
from wslfast.kernels.cpu import engine as cpu
from wslfast.kernels.stacked import folded_chain

TOLERANCE = 1e-5


class Spare(nn.Module):
    """A chain with a norm, and a parameter that nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Parameter(torch.ones(3))
        self.body = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, affine=False), nn.ReLU(), nn.Flatten(), nn.Linear(80, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)  # type: ignore[no-any-return]


def with_head(name: str) -> nn.Module:
    """A network of the cases with a linear layer behind it."""
    body = CASES[name].make()
    features = body.eval()(torch.zeros(2, *CASES[name].shape)).flatten(1).shape[1]
    return nn.Sequential(body, nn.Flatten(), nn.Linear(features, 3))


WHOLE = ("norm ahead of linear", "norm of features", "mean over pixels", "squeezed at once")
HEADED = ("norm behind", "norm behind, no bias", "norm behind, no affine", "norm ahead", "norm ahead of groups", "norm ahead of a padded one",
          "norm ahead of a pool", "norm ahead of an average", "norms on both sides", "norm at the end")  # fmt: skip
NETWORKS = {
    **{name: CASES[name].make for name in WHOLE},
    **{f"{name}, headed": lambda name=name: with_head(name) for name in HEADED},
    "spare": Spare,
}
SHAPES = {**{name: CASES[name].shape for name in WHOLE}, **{f"{name}, headed": CASES[name].shape for name in HEADED}, "spare": (2, 6, 7)}


def network(name: str) -> tuple[nn.Module, Architecture]:
    torch.manual_seed(1)
    module = NETWORKS[name]().eval()  # type: ignore[no-untyped-call]
    return module, Architecture.from_module(module, SHAPES[name])


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
def test_outputs_losses_and_gradients_are_those_of_the_modules(name: str, own: bool) -> None:
    module, arch = network(name)
    graph = arch.graph
    assert graph is not None
    assert folded_chain.supports(graph)
    assert engine.choose(arch, "cpu", torch.float32).name == "cpu"
    k, n = 3, 5
    weights, queries = rows_near(module, arch, k), queries_like(module, arch, *((k,) if own else ()), n)
    outputs, targets, values, slope = looped(module, arch, weights, queries)
    rows, x, wanted = weights.float(), queries.float(), targets.float()
    made = folded_chain.forward(rows, x, graph)
    close(made, outputs, TOLERANCE, "outputs")
    losses, gradient = folded_chain.loss_and_gradient(rows, x, wanted, graph, "mse")
    close(losses, values, TOLERANCE, "losses")
    for slot in graph.slots:
        close(gradient[:, slot.offset : slot.stop], slope[:, slot.offset : slot.stop], 5 * TOLERANCE, f"gradient of {slot.name}")


@pytest.mark.parametrize("name", ["norm behind, headed", "norm ahead, headed", "norm of features"])
def test_a_models_numbers_do_not_depend_on_the_others(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, arch = network(name)
    graph = arch.graph
    assert graph is not None
    k, n = 19, 11
    weights, queries = rows_near(module, arch, k).float(), queries_like(module, arch, n).float()
    targets = torch.randn(k, n, *arch.output_shape, generator=torch.Generator().manual_seed(2))
    losses, gradient = folded_chain.loss_and_gradient(weights, queries, targets, graph, "mse")
    outputs = folded_chain.forward(weights, queries, graph)
    for part in (slice(0, 1), slice(18, 19), slice(3, 5), slice(2, 11), slice(1, 18)):
        mine = folded_chain.loss_and_gradient(weights[part], queries, targets[part], graph, "mse")
        assert torch.equal(mine[0], losses[part])
        assert torch.equal(mine[1], gradient[part])
        assert torch.equal(folded_chain.forward(weights[part], queries, graph), outputs[part])
    monkeypatch.setattr(folded_chain, "_BYTES", 1)  # a few models' folded weights at once
    assert folded_chain._models(graph) < k
    again = folded_chain.loss_and_gradient(weights, queries, targets, graph, "mse")
    assert torch.equal(again[0], losses)
    assert torch.equal(again[1], gradient)
    assert torch.equal(folded_chain.forward(weights, queries, graph), outputs)


def test_an_index_takes_each_models_queries_from_a_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    module, arch = network("norm behind, headed")
    graph = arch.graph
    assert graph is not None
    k, n = 18, 6
    weights, pool = rows_near(module, arch, k).float(), queries_like(module, arch, 30).float()
    generator = torch.Generator().manual_seed(3)
    index = torch.randint(30, (k, n), generator=generator)
    labels = torch.randint(3, (k, n), generator=generator)
    monkeypatch.setattr(folded_chain, "_BYTES", 1)
    found = folded_chain.loss_and_gradient(weights, pool, labels, graph, "cross_entropy", index=index)
    expected = folded_chain.loss_and_gradient(weights, pool[index], labels, graph, "cross_entropy")
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


def test_under_autocast_operands_are_bfloat16_and_folding_is_not() -> None:
    module, arch = network("norm behind, headed")
    graph = arch.graph
    assert graph is not None
    weights, queries = rows_near(module, arch, 9).float(), queries_like(module, arch, 16).float()
    targets = torch.randn(9, 16, *arch.output_shape, generator=torch.Generator().manual_seed(2))
    losses, gradient = folded_chain.loss_and_gradient(weights, queries, targets, graph, "mse")
    with torch.autocast("cpu", torch.bfloat16):
        found = folded_chain.loss_and_gradient(weights, queries, targets, graph, "mse")
        segment = folded_chain.whole_segment(graph)
        assert segment is not None
        rows = folded_chain.folded_rows(weights, graph, segment)
        expected = cpu.loss_and_gradient(rows, queries, targets, segment.layers, "mse")
    assert torch.equal(found[0], expected[0])
    assert found[1].dtype == torch.float32
    assert not torch.equal(found[0], losses)
    close(found[0], losses, 3e-2, "losses")
    close(found[1], gradient, 1e-1, "gradient")


@pytest.mark.parametrize("name", ["one dimension to the end", "residual", "another norm ends it", "norm behind"])
def test_what_is_no_such_chain_is_left_to_the_stacked_engine(name: str) -> None:
    torch.manual_seed(1)
    arch = Architecture.from_module(CASES[name].make().eval(), CASES[name].shape)
    assert arch.graph is not None
    assert not folded_chain.supports(arch.graph)
    assert engine.choose(arch, "cpu", torch.float32).name == "stacked"


@pytest.mark.parametrize("first", [(nn.Conv2d(4, 4, 3, groups=2), nn.BatchNorm2d(4)), (nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, 1, 1))])
def test_groups_and_norms_of_the_queries_are_left_to_the_stacked_engine(first: tuple[nn.Module, ...]) -> None:
    module = nn.Sequential(*first, nn.MaxPool2d(2), nn.Flatten(), nn.LazyLinear(3)).eval()
    module(torch.zeros(1, 4, 6, 6))
    graph = Architecture.from_module(module, (4, 6, 6)).graph
    assert graph is not None
    assert folded_chain.whole_segment(graph) is not None
    assert not folded_chain.supports(graph)
