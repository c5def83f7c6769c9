"""From a module to its graph: what torch's dispatcher sees of one forward pass, as operations of the table.

The module is followed twice, with two numbers of queries: a size that differs between the two is a multiple of their number. The graph
is believed once it computes what the module computes, outputs and gradients, in float64, with other weights and another number of queries.
"""

from __future__ import annotations

import copy
import traceback
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from ..errors import first_line
from ..kernels.graph import Constant, Graph, Node, slots_of
from ..kernels.operations import check_graph
from ..kernels.reference import check_values, run_graph
from .convert import Converter, Untraceable, written_in
from .module import FrozenNorms, alike, call_with, in_precision, plainly, queries_for
from .simplify import joined
from .training import training_of, verify_training

__all__ = ["Untraceable", "trace"]

_NUMBERS = (3, 5)  # of queries
_STEP = "num_batches_tracked"


def trace(module: nn.Module, input_shape: tuple[int, ...]) -> Graph:
    """The graph of a prepared module. Raises Untraceable with the reason: an operation that is not in the table, control flow that looks at
    numbers, a size that is no multiple of the number of queries."""
    graph, state = _traced(module, input_shape)
    return replace(graph, training=training_of(module, graph, state, lambda m: _traced(m, input_shape)[0]))


def _traced(module: nn.Module, input_shape: tuple[int, ...]) -> tuple[Graph, dict[str, Tensor]]:
    """The graph of a module in the mode in which it is, and its state."""
    state, aliases, kept = _state(module)
    names = {id(value): name for name, value in kept.items()}
    names |= {id(value): name for name, value in module.named_buffers() if id(value) not in names and name not in state}

    def made(followed: list[fx.GraphModule]) -> Graph:
        first, second = (Converter(traced, list(state), names, module.training).converted() for traced in followed)
        nodes, output, constants = joined(first, second, _NUMBERS)
        graph = Graph(
            tuple(input_shape),
            nodes,
            output,
            slots_of({name: tuple(value.shape) for name, value in state.items()}),
            tuple(Constant.of(name, value, name in kept) for name, value in {**kept, **constants}.items()),
            tuple(aliases.items()),
        )
        try:
            check_values(check_graph(graph, module.training))
        except ValueError as error:
            picks = "torch.nonzero" in str(error)
            why = "it picks numbers by a mask, and how many depends on them; torch.where keeps their places" if picks else str(error)
            raise Untraceable(why) from None
        verify = verify_training if module.training else _verify  # it may be random there, and is compared another way
        verify(graph, module, state)
        return graph

    queries = [queries_for(module, n, input_shape) for n in _NUMBERS]
    followed = [_followed(module, state, x) for x in queries]
    try:
        return made(followed), state
    except Untraceable:
        if not any(_writes(traced) for traced in followed):
            raise
    return made([_followed(module, state, x, written=True) for x in queries]), state  # a view that is written to, perhaps


def _writes(traced: fx.GraphModule) -> bool:
    """Whether a forward changes a tensor in place."""
    targets = [node.target for node in traced.graph.nodes]
    return any(isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable for target in targets)


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


def _followed(module: nn.Module, state: Mapping[str, Tensor], queries: Tensor, written: bool = False) -> fx.GraphModule:
    """One forward pass as a graph of ATen operators, the state's tensors its first inputs.

    ``written``: with what is changed in place made anew, and every view of it, as torch's exporter does it. It costs seconds, and other
    spellings of some operations.
    """
    from torch._subclasses.functional_tensor import FunctionalTensorMode, dispatch_functionalize
    from torch.fx.experimental.proxy_tensor import make_fx  # two seconds, which only who traces shall wait

    names = list(state)

    def run(values: list[Tensor], x: Tensor) -> Any:
        with _CopiedDropout() if written else nullcontext():
            return call_with(module, dict(zip(names, values, strict=True)), x)

    try:
        with plainly(), torch.enable_grad():  # so that torch.no_grad() inside shows; nothing here requires a gradient
            follow: Any = dispatch_functionalize(run, FunctionalTensorMode(pre_dispatch=True, export=True)) if written else run
            return make_fx(follow, pre_dispatch=True, record_stack_traces=True)([state[name].detach().clone() for name in names], queries)
    except Exception as error:  # a forward that cannot be followed, whatever it raised
        looks = "get value out of a tracing tensor" in str(error) or "data-dependent" in str(error)
        where = written_in("".join(traceback.format_tb(error.__traceback__)))
        why = f"control flow that looks at numbers{where}; torch.where in place of it can be" if looks else f"{first_line(error)}{where}"
        raise Untraceable(f"its forward cannot be followed: {why}") from None


class _CopiedDropout(TorchFunctionMode):
    """Dropout in evaluation mode gives its input itself, which the exporter then lets nobody write to: a copy may be written to."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result.clone() if "dropout" in getattr(func, "__name__", "") and isinstance(result, Tensor) else result


def _verify(graph: Graph, module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Raises Untraceable unless graph and module agree in float64 on weights near the module's own, outputs and gradients."""
    generator = torch.Generator().manual_seed(0)
    near = {}
    for name, value in state.items():
        wide = value.detach().double()
        noise = torch.randn(wide.shape, generator=generator, dtype=torch.float64)
        near[name] = wide * (1 + 0.1 * noise).abs() + 0.01 * noise.abs()
    exact = in_precision(copy.deepcopy(module), torch.float64)
    for n in (2, 4):
        queries = queries_for(module, n, graph.input_shape, torch.float64)
        if _difference(graph, exact, near, queries, 1e-8) is not None:  # a forward that casts to float32, say
            difference = _difference(graph, module, {name: value.float() for name, value in near.items()}, queries.float(), 1e-4)
            if difference is not None:
                raise Untraceable(difference)


def _difference(graph: Graph, module: nn.Module, state: Mapping[str, Tensor], queries: Tensor, tolerance: float) -> str | None:
    """How graph and module differ, in words; None if they give the same."""
    leaves = {name: value.clone().requires_grad_() for name, value in state.items()}
    x = queries.clone().requires_grad_()
    try:
        with plainly(), torch.enable_grad(), FrozenNorms():
            expected = call_with(module, leaves, x.clone())
            row = torch.cat([value.flatten() for value in leaves.values()]) if leaves else x.new_empty(0)
            actual = run_graph(row, x.clone(), graph)
    except Exception as error:
        return f"its graph does not run: {first_line(error)}"
    if not (isinstance(expected, Tensor) and isinstance(actual, Tensor) and actual.shape == expected.shape):
        return "its graph gives another shape"
    if not alike(actual, expected, tolerance, tolerance):
        return "its graph does not compute what it computes (a view that is written to?)"
    into = [*leaves.values(), x]
    slope = torch.linspace(0.5, 1.5, actual.numel(), dtype=actual.dtype, device="cpu").reshape(actual.shape)
    try:
        wanted = torch.autograd.grad(expected, into, slope.to(expected.dtype), allow_unused=True, materialize_grads=True)
    except RuntimeError:  # a network that cannot be differentiated
        return None
    gradients = torch.autograd.grad(actual, into, slope, allow_unused=True, materialize_grads=True)
    same = all(alike(a, b, tolerance, tolerance) for a, b in zip(gradients, wanted, strict=True))
    return None if same else "its graph has other gradients than it has (a function with a backward of its own?)"


def with_axis_last(graph: Graph, axis: int) -> Graph:
    """The graph with an axis of its result, counted from behind, moved to the end; in training mode likewise."""
    nodes = (*graph.nodes, Node("movedim.int", (("self", graph.output), ("source", axis), ("destination", -1))))
    own = graph.training.graph
    training = replace(graph.training, graph=None if own is None else with_axis_last(own, axis))
    return replace(graph, nodes=nodes, output=f"@{len(graph.nodes)}", training=training)
