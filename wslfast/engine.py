"""The one seam between what is asked (populations, queries) and what runs it (torch, the tuned CPU path, Triton).

Everything above calls two functions: :func:`forward`, with full autograd, and :func:`loss_and_gradient`, which needs no
graph over models. Which path serves a call is a pure function of architecture, device and dtype (:func:`choose`); tests
call that function, and ``backend=`` overrides it. Arguments are trusted here: ``behavior.py`` has validated them.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import logging
import math
import os
import subprocess
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ._chunks import in_chunks
from .architecture import Architecture
from .errors import WslfastError, say_once
from .kernels import budget, cpu, plan, reference
from .kernels.schedule import schedule
from .profiling import region

_T = TypeVar("_T")
BACKENDS = ("auto", "triton", "torch")
_CPU_CHUNK = 1 << 30
_CUDA_CHUNK = 4 << 30
# The kernels are proved in the interpreter and by compiling them; until `make gpu` has been green on a device, only an explicit
# backend="triton" runs them.
_TRITON_BY_DEFAULT = False
_unbuildable: dict[Architecture, str] = {}  # whose kernels failed to build in this process, and why


class Choice(NamedTuple):
    """``path``: loop | grouped | functional | cpu | triton, and the reason in words."""

    path: str
    reason: str


def choose(architecture: Architecture, device: str, dtype: torch.dtype, backend: str = "auto", autocast: bool = False) -> Choice:
    """The path for a call: a pure function of what is run, where, and in which dtype (and of what is installed).

    Raises WslfastError if ``backend="triton"`` cannot be had.
    """
    if backend == "triton" or (backend == "auto" and device == "cuda"):
        reason = _why_not_triton(architecture, device, dtype)
        if reason is None and backend == "auto" and not _TRITON_BY_DEFAULT:
            reason = "the kernels have not been verified on a GPU yet (backend='triton' runs them)"
        if reason is None:
            return Choice("triton", "kernels, all models in one launch")
        if backend == "triton":
            raise WslfastError(f"backend='triton' cannot run this: {reason}")
        level = logging.INFO if _why_no_kernels(architecture) is None else logging.WARNING
        say_once(f"wslfast: no Triton kernels for architecture {architecture.name!r}: {reason}; using torch", level)
    if not architecture.planned:
        return Choice("functional", "not a plain chain of layers: torch.func.functional_call, in chunks that fit memory")
    if device == "cuda":
        return Choice("grouped", "a loop over models would be bound by launches")
    if backend == "auto" and dtype == torch.float32 and _cpu_plans(architecture):
        return Choice("cpu", "hand-written forward and backward, no graph over models")
    return Choice("loop", "one model after another, channels-last" if not autocast else "one model after another, under autocast")


@lru_cache(maxsize=64)
def _cpu_plans(architecture: Architecture) -> bool:
    sizes = (architecture.num_weights,), architecture.input_shape
    weights, query = (torch.zeros(1, *size, dtype=torch.float32, device="cpu") for size in sizes)
    return cpu.supports(weights, query, architecture.layers)


def _why_not_triton(architecture: Architecture, device: str, dtype: torch.dtype) -> str | None:
    """None if the kernels can run it, else the reason."""
    if device != "cuda":
        return f"tensors are on {device}, kernels need cuda"
    if dtype == torch.float64:
        return "kernels have no float64"
    if not architecture.planned:
        return f"architecture {architecture.name!r} is not a plain chain of layers"
    if (reason := _why_no_kernels(architecture)) is not None:
        return reason
    try:
        schedule(architecture.layers, architecture.input_shape)
    except plan.Unplannable as error:
        return str(error)
    return None


def _why_no_kernels(architecture: Architecture) -> str | None:
    """None if this machine can build them, else the reason: what a user may want to mend, and is warned of."""
    return "triton is not installed" if importlib.util.find_spec("triton") is None else _unbuildable.get(architecture)


def _triton_precision() -> str:
    """What the kernels compute in: autocast's dtype, else torch's float32 matmul precision."""
    if torch.is_autocast_enabled("cuda"):
        return "bf16" if torch.get_autocast_dtype("cuda") == torch.bfloat16 else "fp16"
    if torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    say_once(
        "wslfast: float32 matmul precision is 'highest': the kernels take three TF32 products for each; "
        'torch.set_float32_matmul_precision("high") takes one',
        logging.INFO,
    )
    return "tf32x3"


# -- memory ------------------------------------------------------------------------------------------------------------


def memory_budget(device: str) -> int:
    """Bytes of activations one chunk of models may hold; ``WSLFAST_MEMORY_MB`` overrides it. Never depends on free memory,
    so that chunks, and with them the bits of grouped calls, are the same on every run."""
    megabytes = os.environ.get("WSLFAST_MEMORY_MB")
    if megabytes is not None:
        if not megabytes.isdecimal() or int(megabytes) < 1:
            raise WslfastError(f"WSLFAST_MEMORY_MB: expected a positive integer, got {megabytes!r}")
        return int(megabytes) << 20
    return _CUDA_CHUNK if device == "cuda" else _CPU_CHUNK


@lru_cache(maxsize=64)
def activation_elements(architecture: Architecture) -> int:
    """Numbers one (model, query) pair keeps for its backward."""
    if architecture.module is None:
        return plan.activation_elements(architecture.layers, architecture.input_shape)
    total = 0

    def count(_: nn.Module, __: object, output: object) -> None:
        nonlocal total
        total += 2 * output.numel() if isinstance(output, Tensor) else 0

    hooks = [m.register_forward_hook(count) for m in architecture.module.modules() if not list(m.children())]
    with torch.no_grad():
        architecture.module(torch.zeros(1, *architecture.input_shape))
    for hook in hooks:
        hook.remove()
    return max(total, math.prod(architecture.input_shape))


def models_per_chunk(architecture: Architecture, n: int, device: str) -> int:
    """Models whose activations, their gradients and one workspace fit the budget; at least one."""
    per_model = 4 * (3 * n * activation_elements(architecture) + 2 * architecture.num_weights)
    return max(1, memory_budget(device) // per_model)


# -- paths -------------------------------------------------------------------------------------------------------------


def _loop(weights: Tensor, queries: Tensor, architecture: Architecture) -> Tensor:
    # oneDNN runs small convolutions 3-6x faster on channels-last images than on a loop's NCHW ones
    if queries.ndim == 4:
        queries = queries.contiguous(memory_format=torch.channels_last)
    return reference.forward(weights, queries, architecture.layers)


def _grouped(weights: Tensor, queries: Tensor, architecture: Architecture) -> Tensor:
    return reference.forward_grouped(weights, queries, architecture.layers)


@lru_cache(maxsize=16)
def _template(architecture: Architecture, device: torch.device, dtype: torch.dtype) -> nn.Module:
    return copy.deepcopy(architecture.module).to(device, dtype)  # type: ignore[union-attr]


def _functional(weights: Tensor, queries: Tensor, architecture: Architecture) -> Tensor:
    module = _template(architecture, weights.device, weights.dtype)
    own = queries.ndim == len(architecture.input_shape) + 2

    def one(row: Tensor, x: Tensor) -> Tensor:
        parameters = {s.name: row[s.offset : s.stop].view(s.shape) for s in architecture.parameters}
        return torch.func.functional_call(module, parameters, (x,))

    if weights.device.type == "cuda":
        return torch.vmap(one, in_dims=(0, 0 if own else None))(weights, queries)
    # copies, as in reference.forward: the bits of a model's output do not depend on where its row stands
    return torch.stack([one(w.clone(), queries[j].clone() if own else queries) for j, w in enumerate(weights)])


def _triton(weights: Tensor, queries: Tensor, architecture: Architecture) -> Tensor:
    kernels = importlib.import_module("wslfast.kernels.autograd")
    key, precision = kernels.layers_key(architecture.layers), _triton_precision()
    outputs = kernels.population_forward(weights, queries, None, key, precision, memory_budget("cuda"))
    return outputs.to(torch.get_autocast_dtype("cuda")) if torch.is_autocast_enabled("cuda") else outputs


def _say_mode(architecture: Architecture, n: int, precision: str) -> None:
    """Why the kernels leave their usual way, a launch a layer."""
    planned = schedule(architecture.layers, architecture.input_shape)
    mode, reason = budget.choose_mode(planned, n, precision, True, memory_budget("cuda"))
    if mode == "network":
        say_once(f"wslfast: {architecture.name!r} runs as a whole network in one launch: {reason}", logging.INFO)


def _triton_loss(
    weights: Tensor, queries: Tensor, targets: Tensor, architecture: Architecture, criterion: str, temperature: float, index: Tensor | None
) -> tuple[Tensor, Tensor]:
    kernels, precision, memory = importlib.import_module("wslfast.kernels.autograd"), _triton_precision(), memory_budget("cuda")
    _say_mode(architecture, queries.shape[-len(architecture.input_shape) - 1] if index is None else index.shape[1], precision)
    return kernels.loss_and_gradient(
        weights, queries, targets, architecture.layers, criterion, temperature, precision, index=index, memory=memory
    )


def _built(architecture: Architecture, run: Callable[[], _T]) -> _T | None:
    """What ``run`` gives, or None where its kernels cannot be built on this machine: from then on :func:`choose` says why."""
    try:
        return run()
    except Exception as error:
        triton = type(error).__module__.partition(".")[0] == "triton"  # its compiler, or a kernel that wants more than the GPU has
        system = isinstance(error, (ImportError, OSError, subprocess.CalledProcessError))  # a broken install, a read-only cache, gcc
        if not (triton or system or "C compiler" in str(error)):
            raise
        first = (str(error).strip() or "no message").splitlines()[0]
        _unbuildable[architecture] = f"they cannot be built here: {type(error).__name__}: {first:.200}"
        return None


_FORWARD = {"loop": _loop, "grouped": _grouped, "functional": _functional, "cpu": _loop, "triton": _triton}


def forward(weights: Tensor, queries: Tensor, architecture: Architecture, *, backend: str = "auto") -> Tensor:
    """Outputs ``[k, n, K]`` of k models on shared queries ``[n, *input]`` or on each model's own ``[k, n, *input]``.

    Differentiable in weights and queries. Where a graph would not fit the memory budget, models are cut into chunks that
    are recomputed in the backward pass.
    """
    device = weights.device.type
    autocast = torch.is_autocast_enabled(device)
    graph = torch.is_grad_enabled() and (weights.requires_grad or queries.requires_grad)
    if graph and queries.requires_grad:
        backend = "torch"  # the kernels have no gradient to the images
    choice = choose(architecture, device, weights.dtype, backend, autocast)
    _say_functional(architecture, choice)
    own = queries.ndim == len(architecture.input_shape) + 2
    n = queries.shape[1] if own else queries.shape[0]
    with region("forward"):
        if choice.path == "cpu" and not graph:
            outputs = cpu.forward(weights, queries, architecture.layers)
            return outputs.to(torch.get_autocast_dtype(device)) if autocast else outputs
        run = _FORWARD[choice.path]
        if choice.path == "triton":  # the kernels chunk for themselves
            made = _built(architecture, lambda: run(weights, queries, architecture))
            return made if made is not None else forward(weights, queries, architecture, backend=backend)
        chunk = models_per_chunk(architecture, n, device)
        # a loop without a graph holds one model's activations
        if len(weights) == 0 or (not graph and choice.path in ("loop", "cpu")):
            return run(weights, queries, architecture)
        pieces: list[Tensor] = []

        def piece(part: slice) -> None:
            arguments = (weights[part], queries[part] if own else queries, architecture)
            again = graph and part.stop - part.start < len(weights)  # recomputed only where not all fits
            pieces.append(checkpoint(run, *arguments, use_reentrant=False) if again else run(*arguments))

        in_chunks(len(weights), chunk, piece)
        return torch.cat(pieces)


def loss_and_gradient(
    weights: Tensor,
    queries: Tensor,
    targets: Tensor,
    architecture: Architecture,
    criterion: str,
    *,
    temperature: float = 2.0,
    backend: str = "auto",
    index: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Per-model values ``[k]`` of a criterion and their gradients ``[k, P]`` to each model's own weights; no graph is kept.

    With ``index [k, n]``, ``queries`` is a pool ``[N, *input]`` from which each model takes its own. ``targets`` are outputs
    ``[k, n, K]``, or labels ``[k, n]`` for ``cross_entropy``.
    """
    device = weights.device.type
    choice = choose(architecture, device, weights.dtype, backend, torch.is_autocast_enabled(device))
    _say_functional(architecture, choice)
    weights, targets = weights.detach(), targets.detach()
    if index is not None and choice.path not in ("cpu", "triton"):
        return _gathered(weights, queries, targets, index, architecture, criterion, temperature, backend)
    if queries.ndim == 4 and choice.path == "loop":
        queries = queries.contiguous(memory_format=torch.channels_last)
    with region("loss"):
        if choice.path == "cpu":
            return cpu.loss_and_gradient(weights, queries, targets, architecture.layers, criterion, temperature, index)
        if choice.path == "triton":
            found = _built(architecture, lambda: _triton_loss(weights, queries, targets, architecture, criterion, temperature, index))
            if found is not None:
                return found
            return loss_and_gradient(
                weights, queries, targets, architecture, criterion, temperature=temperature, backend=backend, index=index
            )
        if choice.path == "loop":
            return reference.loss_and_gradient(weights, queries, targets, architecture.layers, criterion, temperature)
        own = queries.ndim == len(architecture.input_shape) + 2
        chunk = models_per_chunk(architecture, queries.shape[1] if own else queries.shape[0], device)
        chunk = 1 if choice.path == "functional" and device == "cpu" else chunk  # a loop either way; one graph at a time
        losses, gradient = weights.new_empty(len(weights)), torch.empty_like(weights, memory_format=torch.contiguous_format)

        def piece(part: slice) -> None:
            with torch.enable_grad():
                rows = weights[part].detach().requires_grad_()
                outputs = _FORWARD[choice.path](rows, queries[part] if own else queries, architecture)
                values = reference.criterion_values(outputs.to(weights.dtype), targets[part], criterion, temperature)
                # models are independent: the gradient of the sum is each model's own
                (gradient[part],) = torch.autograd.grad(values.sum(), rows)
            losses[part] = values.detach()

        in_chunks(len(weights), chunk, piece)
        return losses, gradient


def _gathered(
    weights: Tensor,
    pool: Tensor,
    targets: Tensor,
    index: Tensor,
    architecture: Architecture,
    criterion: str,
    temperature: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """:func:`loss_and_gradient` of paths that want each model's queries as a tensor, gathered for some models at a time."""
    losses, gradient = weights.new_empty(len(weights)), torch.empty_like(weights, memory_format=torch.contiguous_format)
    per_model = pool.element_size() * index.shape[1] * math.prod(architecture.input_shape)
    chunk = max(1, memory_budget(weights.device.type) // (4 * per_model))

    def piece(part: slice) -> None:
        with region("gather"):
            own = pool.index_select(0, index[part].reshape(-1)).unflatten(0, index[part].shape)
        losses[part], gradient[part] = loss_and_gradient(
            weights[part], own, targets[part], architecture, criterion, temperature=temperature, backend=backend
        )

    in_chunks(len(weights), chunk, piece)
    return losses, gradient


def _say_functional(architecture: Architecture, choice: Choice) -> None:
    if choice.path == "functional":
        say_once(f"wslfast: architecture {architecture.name!r} is {choice.reason}")
