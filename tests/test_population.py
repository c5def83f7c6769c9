"""Stacked weights and their table."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from wslfast.architecture import Architecture
from wslfast.errors import WslfastError
from wslfast.population import Population, stack, unstack
from wslfast.testing import as_module

ARCH = Architecture.cnn()


def _states(k: int) -> list[dict[str, torch.Tensor]]:
    out = []
    for j in range(k):
        torch.manual_seed(j)
        out.append(as_module(Architecture.from_layers(ARCH.layers, ARCH.input_shape)).state_dict())
    return out


def test_state_dicts_there_and_back(poisoned_empty: None) -> None:
    states = _states(3)
    population = Population.from_state_dicts(ARCH, states, {"epoch": [1, 2, 3]})
    assert population.weights.shape == (3, 2464)
    assert population.weights.dtype == torch.float32
    for j, state in enumerate(states):
        assert torch.equal(population.weights[j], torch.cat([t.flatten() for t in state.values()]))
        again = population.state_dict(j)
        assert list(again) == list(state)
        assert all(torch.equal(again[key], state[key]) for key in state)
    as_module(ARCH).load_state_dict(population.state_dicts()[2])


def test_any_key_order_dtype_strides_and_parameters() -> None:
    state = _states(1)[0]
    other = {key: state[key] for key in reversed(state)}
    other["module_list.0.weight"] = nn.Parameter(state["module_list.0.weight"].to(memory_format=torch.channels_last).double())
    other["module_list.11.weight"] = state["module_list.11.weight"].t().contiguous().t()
    expected = Population.from_state_dicts(ARCH, [state]).weights
    actual = Population.from_state_dicts(ARCH, [other])
    assert torch.equal(actual.weights, expected)
    assert not actual.weights.requires_grad


def test_step_counters_come_and_go() -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))
    module[1].num_batches_tracked += 7
    arch = Architecture.from_module(module, (1, 4, 4))
    population = Population.from_state_dicts(arch, [module.state_dict()])
    state = population.state_dict(0)
    assert set(state) == set(module.state_dict())
    assert state["1.num_batches_tracked"].dtype == torch.int64
    module.load_state_dict(state)


def test_state_dict_is_a_copy() -> None:
    population = Population.from_state_dicts(ARCH, _states(1))
    before = population.weights.clone()
    for value in population.state_dict(0).values():
        value.zero_()
    assert torch.equal(before, population.weights)


TABLE = {"test_acc": [0.5, None, 0.25, 1], "model": ["a", "b", "c", "d"]}


@pytest.mark.parametrize(
    ("index", "rows"),
    [
        (2, [2]),
        (-1, [3]),
        (slice(1, None, 2), [1, 3]),
        (slice(4, 9), []),
        ([3, 0, 0], [3, 0, 0]),
        ((1, 2), [1, 2]),
        ([True, False, False, True], [0, 3]),
        (torch.tensor([False, True, True, False]), [1, 2]),
        (torch.tensor([1, -1]), [1, 3]),
        (torch.tensor(2), [2]),
    ],
    ids=["int", "negative", "slice", "empty-slice", "list", "tuple", "bool-list", "mask", "indices", "scalar"],
)
def test_indexing(index: Any, rows: list[int]) -> None:
    weights = torch.arange(4.0)[:, None].expand(4, 2464)
    population = Population(ARCH, weights, TABLE)[index]
    assert population.weights[:, 0].tolist() == rows
    assert population.properties["model"] == tuple("abcd"[i] for i in rows)
    assert len(population) == len(rows)


@pytest.mark.parametrize("index", [4, -5, [0, 4], 1.5, "a", None, [True, False], torch.tensor([0.5])], ids=str)
def test_bad_index(index: Any) -> None:
    with pytest.raises(WslfastError, match=r"population\["):
        Population(ARCH, torch.zeros(4, 2464))[index]


def test_iterating_ends() -> None:
    population = Population(ARCH, torch.arange(3.0)[:, None].expand(3, 2464), {"model": "abc"})
    assert [(len(p), p.properties["model"]) for p in population] == [(1, ("a",)), (1, ("b",)), (1, ("c",))]


def test_columns() -> None:
    population = Population(ARCH, torch.zeros(4, 2464), {**TABLE, "ok": [True, False, True, True]})
    column = population.column("test_acc")
    assert column.dtype == torch.float64
    assert column[[0, 2, 3]].tolist() == [0.5, 0.25, 1.0]
    assert column[1].isnan()
    assert population.column("ok").tolist() == [1, 0, 1, 1]
    with pytest.raises(WslfastError, match=r"'model' is not numeric"):
        population.column("model")
    with pytest.raises(WslfastError, match=r"'loss' is unknown; known: \['test_acc', 'model', 'ok'\]"):
        population.column("loss")


def test_immutable() -> None:
    table: dict[str, list[Any]] = {"epoch": [1, 2]}
    population = Population(ARCH, torch.zeros(2, 2464), table)
    with pytest.raises(dataclasses.FrozenInstanceError):
        population.weights = torch.ones(2, 2464)  # type: ignore[misc]
    with pytest.raises(TypeError):
        population.properties["epoch"] = (3, 4)  # type: ignore[index]
    table["epoch"].append(3)
    assert population.properties["epoch"] == (1, 2)


def test_no_gradient_enters() -> None:
    weights = torch.zeros(2, 2464, dtype=torch.float16, requires_grad=True)
    population = Population(ARCH, weights * 2)
    assert population.weights.dtype == torch.float32
    assert not population.weights.requires_grad


def test_to_and_repr() -> None:
    population = Population(ARCH, torch.zeros(2, 2464), {"epoch": [1, 2]})
    assert population.to("meta").weights.device.type == "meta"
    assert population.to("cpu").properties == population.properties
    assert repr(population) == "Population('cnn', k=2, P=2464, properties=['epoch'])"


def test_stack_is_the_inverse_of_unstack_and_differentiable() -> None:
    weights = torch.randn(3, 2464, dtype=torch.float64, requires_grad=True)
    parts = unstack(weights, ARCH)
    assert list(parts) == list(ARCH.slots)
    assert all(value.shape == (3, *ARCH.slots[name].shape) for name, value in parts.items())
    again = stack(dict(reversed(parts.items())), ARCH)
    assert torch.equal(again, weights)
    (gradient,) = torch.autograd.grad((again * torch.arange(2464.0)).sum(), weights)
    assert torch.equal(gradient, torch.arange(2464.0, dtype=torch.float64).expand(3, -1))


def test_stack_agrees_with_torch_func() -> None:
    modules = [as_module(ARCH) for _ in range(3)]
    parameters, _ = torch.func.stack_module_state(modules)
    expected = torch.stack([torch.cat([p.flatten() for p in m.parameters()]) for m in modules])
    assert torch.equal(stack(parameters, ARCH), expected)


class Scaled(nn.Module):
    """Holds a 0-d parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.fc = nn.Parameter(torch.tensor(3.0)), nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.scale).sum(1, keepdim=True) * self.fc(x)


def test_scalar_parameters() -> None:
    arch = Architecture.from_module(Scaled(), (2,))
    weights = torch.randn(3, arch.num_weights)
    parts = unstack(weights, arch)
    assert parts["scale"].shape == (3,)
    assert torch.equal(stack(parts, arch), weights)
    module = Scaled()
    module.load_state_dict(Population(arch, weights).state_dict(1))
    assert torch.equal(Population.from_state_dicts(arch, [module.state_dict()]).weights, weights[1:2])


def _missing() -> dict[str, torch.Tensor]:
    state = dict(_states(1)[0])
    del state["module_list.3.bias"]
    return state


def _changed(key: str, value: Any) -> dict[str, Any]:
    return {**_states(1)[0], key: value}


WRONG: dict[str, tuple[Any, str]] = {
    "architecture": (lambda: Population("cnn", torch.zeros(1, 2)), r"architecture: expected an Architecture, got 'cnn'"),  # type: ignore[arg-type]
    "weights-type": (lambda: Population(ARCH, [[0.0]]), r"weights: expected floating \[k, 2464\].*got list"),  # type: ignore[arg-type]
    "weights-axes": (lambda: Population(ARCH, torch.zeros(2464)), r"weights: .*got \[2464\] float32"),
    "weights-width": (lambda: Population(ARCH, torch.zeros(2, 2463)), r"weights: .*\[k, 2464\] for architecture 'cnn', got \[2, 2463\]"),
    "weights-int": (lambda: Population(ARCH, torch.zeros(2, 2464, dtype=torch.int64)), r"weights: expected floating.*int64"),
    "column-length": (lambda: Population(ARCH, torch.zeros(2, 2464), {"acc": [1.0]}), r"properties\['acc'\]: expected 2 values, got 1"),
    "no-models": (lambda: Population.from_state_dicts(ARCH, []), r"state_dicts: expected at least one model"),
    "not-a-mapping": (lambda: Population.from_state_dicts(ARCH, [[1]]), r"state_dicts\[0\]: expected a mapping.*list"),  # type: ignore[list-item]
    "a-module": (lambda: Population.from_state_dicts(ARCH, [as_module(ARCH)]), r"state_dicts\[0\]: expected a mapping"),  # type: ignore[list-item]
    "missing": (lambda: Population.from_state_dicts(ARCH, [*_states(1), _missing()]), r"state_dicts\[1\]: key 'module_list.3.bias' is missing"),
    "unknown": (lambda: Population.from_state_dicts(ARCH, [_changed("module.0", torch.zeros(1))]), r"unknown keys \['module.0'\]; expected \['module_list"),
    "odd-key": (lambda: Population.from_state_dicts(ARCH, [{3: torch.zeros(1)}]), r"unknown keys \[3\]"),  # type: ignore[dict-item]
    "shape": (
        lambda: Population.from_state_dicts(ARCH, [_changed("module_list.0.weight", torch.zeros(8, 3, 5, 5))]),
        r"state_dicts\[0\]\['module_list.0.weight'\]: expected \[8, 1, 5, 5\], got \[8, 3, 5, 5\]",
    ),
    "value": (lambda: Population.from_state_dicts(ARCH, [_changed("module_list.0.bias", 3)]), r"\['module_list.0.bias'\]: expected \[8\], got 3"),
    "stack-unknown": (lambda: stack({"a": torch.zeros(1)}, ARCH), r"parameters: unknown keys \['a'\]"),
    "stack-missing": (lambda: stack({}, ARCH), r"parameters: key 'module_list.0.weight' is missing"),
    "stack-shape": (lambda: stack(_states(1)[0], ARCH), r"parameters\['module_list.0.weight'\]: expected \[k, 8, 1, 5, 5\], got \[8, 1, 5, 5\]"),
    "stack-ragged": (
        lambda: stack({**unstack(torch.zeros(2, 2464), ARCH), "module_list.0.bias": torch.zeros(3, 8)}, ARCH), r"models differ in number: \[2, 3\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("call", "words"), WRONG.values(), ids=WRONG)
def test_bad_arguments(call: Any, words: str) -> None:
    with pytest.raises(WslfastError, match=words):
        call()


def test_untied_values_of_tied_keys() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    module[2].weight = module[0].weight
    arch = Architecture.from_module(module, (3,))
    state = {**module.state_dict(), "2.weight": torch.zeros(3, 3)}
    with pytest.raises(WslfastError, match=r"state_dicts\[0\]\['2.weight'\]: expected the values of '0.weight'"):
        Population.from_state_dicts(arch, [state])
