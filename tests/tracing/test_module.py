"""Modules as they are handed over: those that take integers alone, and those whose weights a state dict does not tell."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import wslfast
from wslfast import Architecture, Population, WslfastError, batched_behavioral_loss, batched_forward
from wslfast.measure.gradients import jacobian
from wslfast.tracing.module import call_with

TOKENS, WORDS = 5, 11


class Tagger(nn.Module):
    """Answers with a dict, of tokens that are an index and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.rnn, self.head = nn.Embedding(WORDS, 4), nn.GRU(4, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.rnn(self.table(x))[0][:, -1])}


def bag() -> nn.Module:
    return nn.Sequential(nn.Embedding(WORDS, 4), nn.Flatten(), nn.Linear(4 * TOKENS, 3))


def largest() -> nn.Module:
    return nn.Sequential(nn.EmbeddingBag(WORDS, 4, mode="max", padding_idx=0), nn.Linear(4, 3))


CASES = {"a table first": (bag, None), "a part of the answer": (Tagger, "logits"), "untraced": (largest, None)}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
def test_modules_that_take_integers_are_handed_integers(name: str, own: bool) -> None:
    make, output = CASES[name]
    torch.manual_seed(0)
    modules = [make() for _ in range(3)]
    population = Population.from_modules(modules, (TOKENS,), output=output)
    arch = population.architecture
    assert (arch.graph is None) == (name == "untraced"), arch.reason
    queries = torch.randint(WORDS, (*((3,) if own else ()), 7, TOKENS))
    with torch.no_grad():
        answers = [m.eval()(queries[j] if own else queries) for j, m in enumerate(modules)]
    expected = torch.stack([a[output] if output else a for a in answers])
    for given in (queries, queries.int(), queries.float()):
        assert torch.allclose(batched_forward(population.weights, given, arch), expected, atol=1e-6)
    weights = population.weights.clone().requires_grad_()
    loss = batched_behavioral_loss(weights, None, queries, arch, targets=expected + 1)
    (gradient,) = torch.autograd.grad(loss, weights)
    assert gradient.count_nonzero() > 0
    for j, module in enumerate(modules):
        rebuilt = population.module(j)
        assert torch.allclose(rebuilt(queries[j] if own else queries), expected[j], atol=1e-6)
        loaded = module.load_state_dict(rebuilt.state_dict())
        assert not loaded.missing_keys


def test_a_zoo_of_such_modules_is_kept(tmp_path: Path) -> None:
    population = Population.from_modules([bag(), bag()], (TOKENS,))
    wslfast.save_zoo(population, tmp_path / "zoo")
    again = wslfast.load_zoo(tmp_path / "zoo")
    queries = torch.randint(WORDS, (6, TOKENS))
    assert torch.equal(
        batched_forward(again.weights, queries, again.architecture), batched_forward(population.weights, queries, population.architecture)
    )


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_other_networks_are_not_given_integers_by_mistake(dtype: torch.dtype) -> None:
    arch = Architecture.from_module(nn.Linear(TOKENS, 3), (TOKENS,))
    with pytest.raises(wslfast.WslfastError, match="queries: expected floating"):
        batched_forward(torch.zeros(2, arch.num_weights), torch.ones(4, TOKENS, dtype=dtype), arch)


def test_a_parametrisation_that_a_state_dict_does_not_tell() -> None:
    module = nn.Sequential(nn.utils.parametrizations.orthogonal(nn.Linear(6, 6)), nn.ReLU(), nn.Linear(6, 2))
    arch = Architecture.from_module(module, (6,))
    with pytest.raises(wslfast.WslfastError, match=r"unknown keys .*Population.from_modules"):
        Population.from_state_dicts(arch, [module.state_dict()])
    x = torch.randn(4, 6)
    population = Population.from_modules([module], (6,))
    assert torch.allclose(batched_forward(population.weights, x, arch)[0], module.eval()(x), atol=1e-6)


class Recycled(nn.Module):
    """One layer under two names, whose weight a further layer shares; on the way it may look at numbers, which no graph can follow."""

    def __init__(self, looks: bool) -> None:
        super().__init__()
        self.looks, self.first = looks, nn.Linear(4, 4)
        self.again, self.last = self.first, nn.Linear(4, 4)
        self.last.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.again(torch.tanh(self.first(x)))
        return self.last(torch.tanh(x)) if not self.looks or x.isfinite().all() else x


@pytest.mark.parametrize("looks", [False, True], ids=["traced", "untraced"])
def test_a_part_under_two_names_stays_tied_to_a_third(looks: bool) -> None:
    torch.manual_seed(0)
    module = Recycled(looks)
    arch = Architecture.from_module(module, (4,))
    assert (arch.graph is None) == looks, arch.reason
    row, queries = Population.from_modules([module], (4,)).weights[0].double(), torch.randn(3, 4, dtype=torch.float64)
    w, b, c = (row[s.offset : s.stop].view(s.shape) for s in arch.parameters)

    def written_out(w: Tensor) -> Tensor:
        y = torch.tanh(torch.tanh(queries @ w.T + b) @ w.T + b)
        return y @ w.T + c

    expected = torch.autograd.functional.jacobian(written_out, w).flatten(0, 1).flatten(1)
    for _ in range(2):  # the second time on what the first one left in the module
        assert torch.allclose(jacobian(row, queries, arch)[:, : w.numel()], expected)


def test_a_call_with_other_tensors_leaves_the_modules_own() -> None:
    module = Recycled(False)
    before = dict(module.named_parameters(remove_duplicate=False))
    call_with(module, {"again.weight": torch.zeros(4, 4)}, torch.randn(2, 4))  # by the second of its names
    assert all(value is before[name] for name, value in module.named_parameters(remove_duplicate=False))


class Rotary(nn.Module):
    """Turns pairs of features by angles that it keeps as complex numbers, as rotary embeddings are written."""

    def __init__(self, persistent: bool, traced: bool = False) -> None:
        super().__init__()
        self.first, self.last, self.traced = nn.Linear(3, 4), nn.Linear(4, 2), traced
        angles = torch.arange(5.0)[:, None] * torch.tensor([1.0, 0.3])
        self.register_buffer("turns", torch.polar(torch.ones_like(angles), angles), persistent)

    def forward(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(self.first(x).unflatten(-1, (2, 2)))
        made = self.last(torch.view_as_real(pairs * self.turns).flatten(-2))
        return made if self.traced else made + 0 * torch.special.i0(made)  # which is not in the table


@pytest.mark.parametrize("traced", [True, False])
@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_complex_buffers_keep_their_imaginary_parts(persistent: bool, dtype: torch.dtype, traced: bool) -> None:
    torch.manual_seed(0)
    modules, queries = [Rotary(persistent, traced) for _ in range(3)], torch.randn(7, 5, 3)
    population = Population.from_modules(modules, (5, 3))
    assert (population.architecture.graph is not None) == traced
    expected = torch.stack([module(queries) for module in modules]).to(dtype)
    weights = population.weights.to(dtype).requires_grad_()
    outputs = batched_forward(weights, queries.to(dtype), population.architecture)
    assert torch.allclose(outputs, expected, atol=1e-6)
    (gradient,) = torch.autograd.grad(outputs.square().sum(), weights)
    for j, module in enumerate(modules):
        wanted = torch.autograd.grad(module(queries).square().sum(), list(module.parameters()))
        assert torch.allclose(gradient[j], torch.cat([g.flatten() for g in wanted]).to(dtype), rtol=1e-4, atol=1e-4)
        assert torch.allclose(population.module(j)(queries).to(dtype), expected[j], atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_answers_that_are_not_finite_are_those_of_the_module(value: float) -> None:
    torch.manual_seed(0)
    modules = [Plain(lambda x: torch.where(x > 0, x, value)) for _ in range(3)]
    population, queries = Population.from_modules(modules, (4,)), torch.randn(5, 4)
    outputs = batched_forward(population, queries, population.architecture)
    assert torch.allclose(outputs, torch.stack([m(queries) for m in modules]), equal_nan=True)


class Plain(nn.Module):
    def __init__(self, answer: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight, self.answer = nn.Parameter(torch.randn(4, 3, dtype=dtype)), answer

    def forward(self, x: Tensor) -> Tensor:
        return self.answer(x.to(self.weight.dtype) @ self.weight)


def test_complex_parameters_are_refused_and_not_made_real() -> None:
    with pytest.raises(WslfastError, match=r"complex parameters \(weight\).*view_as_complex"):
        Architecture.from_module(Plain(torch.abs, torch.complex64), (4,))


def test_answers_of_any_type_are_taken_or_refused_by_name() -> None:
    with pytest.raises(WslfastError, match=r"expected floating outputs .* bool"):
        Architecture.from_module(Plain(lambda x: x > 0), (4,))
    modules = [Plain(Tensor.bfloat16) for _ in range(3)]
    population, queries = Population.from_modules(modules, (4,)), torch.randn(5, 4)
    outputs = batched_forward(population, queries, population.architecture)
    assert outputs.dtype == torch.bfloat16  # as the module says itself
    assert torch.equal(outputs, torch.stack([m(queries) for m in modules]))


def test_an_untraced_network_of_another_object_says_which_one_to_pass() -> None:
    modules = [Rotary(True) for _ in range(2)]
    population = Population.from_modules(modules, (5, 3))
    with pytest.raises(WslfastError, match=r"pass the population's \.architecture"):
        batched_forward(population, torch.randn(7, 5, 3), Architecture.from_module(modules[0], (5, 3)))
