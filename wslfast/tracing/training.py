"""How a module differs in training mode, as far as the graph of its evaluation mode does not tell."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import first_line
from ..kernels.graph import Graph, Training
from ..kernels.operations import training_graph
from ..kernels.reference import run_graph
from .convert import Untraceable
from .module import RandomCalls, alike, call_with, in_precision, plainly, queries_for

# What draws through an operation that a stacked run can give each model's own numbers.
_DROPOUT = frozenset({
    "dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d", "feature_dropout", "feature_dropout_", "alpha_dropout", "alpha_dropout_",
    "feature_alpha_dropout", "feature_alpha_dropout_", "scaled_dot_product_attention", "multi_head_attention_forward",
})  # fmt: skip
_STATISTICS = ("running_mean", "running_var")

# The graph of a module in training mode, traced whole.
Follow = Callable[[nn.Module], Graph]


def training_of(module: nn.Module, graph: Graph, state: Mapping[str, Tensor], follow: Follow) -> Training:
    """What ``graph``, traced in evaluation mode, does not tell of the module's training mode. Never raises: what cannot be trained is
    refused by name."""
    norms = {
        f"{path}.{name}".lstrip(".")
        for path, part in module.named_modules(remove_duplicate=False)
        if isinstance(part, nn.modules.batchnorm._NormBase)
        for name in _STATISTICS
    }
    buffers = {name for name, _ in module.named_buffers(remove_duplicate=False)}
    fixed = (buffers - norms) | getattr(module, "_frozen_names", frozenset())
    refused = str(getattr(module, "_parametrised", ""))
    own = None
    if not refused:
        try:
            own = _own(copy.deepcopy(module).train(), graph, state, follow)
            fixed |= _unreached(copy.deepcopy(module), graph, [name for name in state if name not in buffers])
        except Untraceable as reason:
            refused = str(reason)
    return Training(tuple(name for name in state if name in fixed), own, refused)


def _unreached(module: nn.Module, graph: Graph, names: Iterable[str]) -> set[str]:
    """Which of these parameters no gradient comes to, as those of a layer that is not used: torch's optimisers do not let them decay
    either. Told by what autograd has recorded; nothing is differentiated, as not every answer can be."""
    own = dict(module.named_parameters(remove_duplicate=False))
    try:
        with plainly(), torch.enable_grad():
            answer = module.requires_grad_().train()(queries_for(module, 3, graph.input_shape))
    except Exception:  # of any kind: a network that cannot be differentiated at all
        return set()
    reached: set[int] = set()
    seen, stack = set(), [getattr(answer, "grad_fn", None)]
    while stack:
        step = stack.pop()
        if step is not None and step not in seen:
            seen.add(step)
            reached.add(id(getattr(step, "variable", None)))
            stack += [following for following, _ in step.next_functions]
    return {name for name in names if id(own[name]) not in reached}


def _own(module: nn.Module, graph: Graph, state: Mapping[str, Tensor], follow: Follow) -> Graph | None:
    """The graph of training mode, or None if the graph of evaluation mode says all about it. Raises Untraceable, with the reason, if
    training mode has no graph."""
    plain = all(isinstance(part, _DETERMINISTIC) for part in module.modules() if not list(part.children()))
    if type(module) is nn.Sequential and plain and all(type(part) is nn.Sequential for part in module.modules() if list(part.children())):
        return None  # torch's own layers, one after another, none of which looks at its mode
    drawn = _drawn(module, queries_for(module, 3, graph.input_shape))
    averages = [path for path, part in module.named_modules() if isinstance(part, nn.modules.batchnorm._NormBase) and part.momentum is None]
    if averages:
        raise Untraceable(f"it has a norm without a momentum ({averages[0]!r}), whose running averages are of all steps so far")
    if drawn:
        raise Untraceable(f"it is random in training mode in another way than dropout ({', '.join(drawn)})")
    own = follow(module)
    try:
        told: Graph | None = training_graph(graph)
    except ValueError as error:
        if own.nodes == graph.nodes:
            return None  # said when it is asked for
        raise Untraceable(str(error)) from None
    assert told is not None
    if (own.nodes, own.output, own.constants) == (told.nodes, told.output, graph.constants):
        own = told
    return None if own is told else replace(own, training=Training())


_DETERMINISTIC = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ReLU, nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.LeakyReLU, nn.Flatten,
    nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Identity, nn.LayerNorm, nn.GroupNorm)  # fmt: skip


def _drawn(module: nn.Module, queries: Tensor) -> list[str]:
    """Names of the functions other than dropout that draw random numbers, in one pass in training mode."""
    python, numpys = random.getstate(), repr(np.random.get_state(legacy=False))
    try:
        with plainly(), RandomCalls(module) as calls:
            copy.deepcopy(module)(queries.clone())
    except Exception as error:
        raise Untraceable(f"its forward fails in training mode: {first_line(error)}") from None
    others = [name for name in calls.functions if name.partition(" ")[0] not in _DROPOUT]
    if random.getstate() != python or repr(np.random.get_state(legacy=False)) != numpys:
        others.append("Python's or numpy's generator")
    return list(dict.fromkeys(others))


def verify_training(graph: Graph, module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Raises Untraceable unless graph and module give the same in training mode, drawing the same numbers for their dropout: in float64, or
    in float32 where a forward makes numbers of that type itself."""
    if _training_differs(graph, module, state, torch.float64) and (why := _training_differs(graph, module, state, torch.float32)):
        raise Untraceable(why)


def _training_differs(graph: Graph, module: nn.Module, state: Mapping[str, Tensor], dtype: torch.dtype) -> str:
    """How graph and module differ in training mode, in words; nothing if they give the same."""
    exact = in_precision(copy.deepcopy(module), dtype)
    queries = queries_for(module, 4, graph.input_shape, dtype)
    values = {name: value.detach().to(dtype).clone() for name, value in state.items()}
    row = torch.cat([value.flatten() for value in values.values()])
    try:
        with plainly():
            torch.default_generator.manual_seed(0)  # torch.manual_seed would set those of GPUs, which are the caller's
            expected = call_with(exact, values, queries.clone())
            torch.default_generator.manual_seed(0)
            actual = run_graph(row, queries, graph)
    except Exception as error:
        return f"its graph of training mode does not run: {first_line(error)}"
    same = actual.shape == expected.shape and alike(actual, expected, 1e-4, 1e-4)
    return "" if same else "its training mode does something that its graph does not"
