"""The one seam between what is asked (populations, queries) and what runs it (torch, the tuned CPU path, Triton).

Everything above calls two functions: :func:`forward`, with full autograd, and :func:`loss_and_gradient`, which needs no graph over
models. :func:`choose` picks the path, an object with both; tests call it, and ``backend=``, or :func:`using` around a whole piece of work,
overrides it. Arguments are trusted here:
``behavior.py`` has validated them.
"""

from __future__ import annotations

import logging
from functools import partial

import torch
from torch import Tensor

from ..architecture import Architecture
from ..errors import require, say_once
from ..kernels import stacked
from ..kernels.criteria import Averaged, Named
from ..profiling import region
from .averaging import of_mean
from .choice import BACKENDS, Call, choose
from .chunks import in_chunks
from .cuda_graph import recorder
from .memory import activation_elements, memory_budget, models_per_chunk
from .module_path import Module
from .paths import Path, per_model
from .preference import check_backend, preferred, using
from .training import check_trainable, random_in_training, training_step
from .transforms import graphs_of_our_own, looked_through
from .triton_path import Triton, Unbuildable, form_of, reaches_queries

__all__ = [
    "BACKENDS",
    "Call",
    "activation_elements",
    "check_backend",
    "check_trainable",
    "choose",
    "forward",
    "in_chunks",
    "looked_through",
    "loss_and_gradient",
    "memory_budget",
    "models_per_chunk",
    "of_mean",
    "random_in_training",
    "training_step",
    "using",
]


def forward(weights: Tensor, queries: Tensor, architecture: Architecture, *, backend: str = "auto") -> Tensor:
    """Outputs ``[k, n, K]`` of k models on shared queries ``[n, *input]`` or on each model's own ``[k, n, *input]``.

    Differentiable in weights and queries. Where a graph would not fit the memory budget, models are cut into chunks that are
    recomputed in the backward pass. Where a transform looks through (``torch.func``, forward-mode derivatives, tracers), plain torch
    operators run one model after another.
    """
    backend = preferred(backend)
    if looked_through(weights, queries):
        require(backend != "triton", "backend='triton' cannot be looked through by a torch transform; use backend='torch'")
        if architecture.graph is None:
            return Module(architecture, "a torch transform looks through").plain(weights, queries)
        return stacked.plain(weights, queries, architecture.graph)
    device = weights.device.type
    graph = torch.is_grad_enabled() and (weights.requires_grad or queries.requires_grad)
    if graph and queries.requires_grad and (device != "cuda" or not reaches_queries(architecture)):
        backend = "torch" if device == "cuda" or backend == "triton" else backend
    call = Call("forward", weights.shape[0], queries.shape[int(per_model(queries, architecture))], weights.device.index)
    with region("forward"):
        while True:
            path = choose(architecture, device, weights.dtype, backend, torch.is_autocast_enabled(device), call)
            _say_module(architecture, path)
            try:
                return path.forward(weights, queries, graph)
            except Unbuildable:
                continue  # choose() knows now, and says why


def loss_and_gradient(
    weights: Tensor,
    queries: Tensor,
    targets: Tensor,
    architecture: Architecture,
    criterion: Named,
    *,
    temperature: float = 2.0,
    backend: str = "auto",
    index: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Per-model values ``[k]`` of a criterion and their gradients ``[k, P]`` to each model's own weights; no graph is kept.

    With ``index [k, n]``, ``queries`` is a pool ``[N, *input]`` from which each model takes its own. ``targets`` are outputs
    ``[k, n, K]``, or labels ``[k, n]`` for ``cross_entropy``. ``criterion`` is a name of the table in ``kernels/criteria.py``, or a
    function of outputs ``[m, q, K]`` and targets alike to values ``[m]`` that add up over queries (some paths take a few at a time).
    """
    device, backend = weights.device.type, preferred(backend)
    call = Call(form_of(criterion, index), weights.shape[0], targets.shape[1], weights.device.index)
    with region("loss"), graphs_of_our_own():
        weights, queries, targets = (t.clone() if t.is_inference() else t for t in (weights, queries, targets))  # no graph takes those
        weights, targets = weights.detach(), targets.detach()
        while True:
            path = choose(architecture, device, weights.dtype, backend, torch.is_autocast_enabled(device), call)
            _say_module(architecture, path)
            run = path.loss_and_gradient if (recorded := recorder()) is None else partial(recorded.loss_and_gradient, path)
            try:
                if not (isinstance(criterion, Averaged) and path.name == Triton.name):
                    return run(weights, queries, targets, criterion, temperature, index)
                values, gradient = run(weights, queries, targets, criterion.name, temperature, index)  # kernels know names
                return values, gradient.div_(criterion.models)
            except Unbuildable:
                continue


def _say_module(architecture: Architecture, path: Path) -> None:
    if path.name == Module.name:
        say_once(f"wslfast: architecture {architecture.name!r} is {path.reason}", logging.INFO)
