"""From a module to its graph: what torch's dispatcher sees of one forward pass, as operations of the table.

The module is followed twice, with two numbers of queries: a size that differs between the two is a multiple of their number. The graph
is believed once it computes what the module computes, in float64, with other weights and another number of queries.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..kernels.graph import Constant, Graph, slots_of
from ..kernels.operations import check_graph
from ..kernels.reference import run_graph
from .convert import Converter, Untraceable, unified
from .module import first_line, plainly, queries_for
from .training import training_of

__all__ = ["Untraceable", "trace"]

_NUMBERS = (3, 5)  # of queries
_STEP = "num_batches_tracked"


def trace(module: nn.Module, input_shape: tuple[int, ...]) -> Graph:
    """The graph of a prepared module. Raises Untraceable with the reason: an operation that is not in the table, control flow that looks at
    numbers, a size that is no multiple of the number of queries."""
    graph, state = _traced(module, input_shape)
    _verify(graph, module, state)
    return replace(graph, training=training_of(module, graph, state, lambda m: _traced(m, input_shape)[0]))


def _traced(module: nn.Module, input_shape: tuple[int, ...]) -> tuple[Graph, dict[str, Tensor]]:
    """The graph of a module in the mode in which it is, and its state."""
    state, aliases, kept = _state(module)
    followed = [_followed(module, state, queries_for(module, n, input_shape)) for n in _NUMBERS]
    names = {id(value): (name, True) for name, value in kept.items()}
    names |= {id(value): (name, False) for name, value in module.named_buffers() if id(value) not in names and name not in state}
    (nodes, output, constants), (other, output_other, constants_other) = (
        Converter(traced, list(state), names, n, module.training).converted() for traced, n in zip(followed, _NUMBERS, strict=True)
    )
    if output != output_other or len(nodes) != len(other) or set(constants) != set(constants_other):
        raise Untraceable("another number of queries takes another way through its forward")
    joined = tuple(unified(a, b, _NUMBERS) for a, b in zip(nodes, other, strict=True))
    for name, value in constants.items():
        if value.shape != constants_other[name].shape or not torch.equal(value, constants_other[name]):
            raise Untraceable("it makes a tensor that depends on the number of queries")
    held = {name: Constant.of(name, value, name in kept) for name, value in {**kept, **constants}.items()}
    graph = Graph(
        tuple(input_shape),
        joined,
        output,
        slots_of({name: tuple(value.shape) for name, value in state.items()}),
        tuple(held.values()),
        tuple(aliases.items()),
    )
    try:
        check_graph(graph)
    except ValueError as error:
        raise Untraceable(str(error)) from None
    return graph, state


def _state(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, str], dict[str, Tensor]]:
    """Entries of a row of weights; further keys of tied ones; integer entries, which are constants."""
    first: dict[int, str] = {}
    state, aliases, kept = {}, {}, {}
    for key, value in module.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor) or key.endswith(_STEP):
            continue
        name = first.setdefault(id(value), key)
        if name != key:
            aliases[key] = name
        elif value.is_floating_point():
            state[key] = value
        else:
            kept[key] = value
    return state, aliases, kept


def _followed(module: nn.Module, state: Mapping[str, Tensor], queries: Tensor) -> fx.GraphModule:
    """One forward pass as a graph of ATen operators, the state's tensors its first inputs."""
    from torch.fx.experimental.proxy_tensor import make_fx  # two seconds, which only who traces shall wait

    names = list(state)

    def run(values: list[Tensor], x: Tensor) -> Any:
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,))

    try:
        with plainly():
            return make_fx(run, pre_dispatch=True)([state[name].detach().clone() for name in names], queries)
    except Exception as error:  # a forward that cannot be followed, whatever it raised
        looks = "get value out of a tracing tensor" in str(error) or "data-dependent" in str(error)
        why = "control flow that looks at numbers" if looks else first_line(error)
        raise Untraceable(f"its forward cannot be followed: {why}") from None


def _verify(graph: Graph, module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Raises Untraceable unless graph and module agree in float64 on weights near the module's own."""
    generator = torch.Generator().manual_seed(0)
    near = {}
    for name, value in state.items():
        wide = value.detach().double()
        noise = torch.randn(wide.shape, generator=generator, dtype=torch.float64)
        near[name] = wide * (1 + 0.1 * noise).abs() + 0.01 * noise.abs()
    exact = copy.deepcopy(module).double()
    for n in (2, 4):
        queries = queries_for(module, n, graph.input_shape, torch.float64)
        if _agree(graph, exact, near, queries, 1e-8) is not True:  # a forward that casts to float32, say
            why = _agree(graph, module, {name: value.float() for name, value in near.items()}, queries.float(), 1e-4)
            if why is not True:
                raise Untraceable(why or "its graph does not compute what it computes (a view that is written to?)")


def _agree(graph: Graph, module: nn.Module, state: Mapping[str, Tensor], queries: Tensor, tolerance: float) -> bool | str:
    """Whether graph and module give the same, or why that cannot be told."""
    row = torch.cat([value.flatten() for value in state.values()]) if state else queries.new_empty(0)
    try:
        with plainly():
            expected = torch.func.functional_call(module, dict(state), (queries.clone(),))
            actual = run_graph(row, queries.clone(), graph)
    except Exception as error:
        return f"its graph does not run: {first_line(error)}"
    if not (isinstance(expected, Tensor) and isinstance(actual, Tensor) and actual.shape == expected.shape):
        return False
    expected, actual = expected.double(), actual.double()
    scale = 1 + float(expected.nan_to_num(posinf=0, neginf=0).abs().max()) if expected.numel() else 1.0
    return torch.allclose(actual, expected, rtol=tolerance, atol=tolerance * scale, equal_nan=True)
