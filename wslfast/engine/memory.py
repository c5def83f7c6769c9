"""How much memory a call may hold, and how many models at once fit into it. Pure functions of shapes and settings."""

from __future__ import annotations

import math
import os
from functools import lru_cache

import torch
from torch import Tensor, nn

from ..architecture import Architecture
from ..errors import WslfastError
from ..kernels import stacked

_CPU_CHUNK = 1 << 30
_CUDA_CHUNK = 4 << 30


def default_budget(device: str) -> int:
    """:func:`memory_budget` where nothing is set: what decides bits must not depend on settings."""
    return _CUDA_CHUNK if device == "cuda" else _CPU_CHUNK


def memory_budget(device: str) -> int:
    """Bytes of activations that one chunk of models may hold; ``WSLFAST_MEMORY_MB`` overrides it. Never depends on free memory,
    so that chunks, and with them the bits of grouped calls, are the same on every run."""
    megabytes = os.environ.get("WSLFAST_MEMORY_MB")
    if megabytes is not None:
        if not megabytes.isdecimal() or int(megabytes) < 1:
            raise WslfastError(f"WSLFAST_MEMORY_MB: expected a positive integer, got {megabytes!r}")
        return int(megabytes) << 20
    return default_budget(device)


@lru_cache(maxsize=64)
def activation_elements(architecture: Architecture) -> int:
    """Numbers that one (model, query) pair keeps for its backward."""
    if architecture.graph is not None:
        return max(stacked.sizes(architecture.graph)[0], math.prod(architecture.input_shape))
    assert architecture.module is not None
    total = 0

    def count(_: nn.Module, __: object, output: object) -> None:
        nonlocal total
        total += 2 * output.numel() if isinstance(output, Tensor) else 0

    hooks = [m.register_forward_hook(count) for m in architecture.module.modules() if not list(m.children())]
    try:
        with torch.no_grad():
            architecture.module(torch.zeros(1, *architecture.input_shape, dtype=torch.float32, device="cpu"))
    finally:
        for hook in hooks:
            hook.remove()
    return max(total, math.prod(architecture.input_shape))


def stacks_well(architecture: Architecture, n: int) -> bool:
    """Whether a graph over many models of a plain chain is faster on a CPU as stacked calls than as one model after another, channels-last.

    Measured (one thread of an AMD EPYC, forward and backward to weights and to queries): 1.0 to 6 times as fast for every chain of less
    than a million multiplications a query, whatever n; CNN3, with 1.2 million, 1.3 times at 16 queries, 0.65 times at 128.
    """
    assert architecture.graph is not None
    _, convolved, others = stacked.sizes(architecture.graph)
    products = convolved + others
    return products < 1_000_000 or n * products < 24_000_000


def models_per_chunk(architecture: Architecture, n: int, device: str, budget: int | None = None) -> int:
    """Models whose activations, their gradients and one workspace fit the budget (default: :func:`memory_budget`); at least one."""
    per_model = 4 * (3 * n * activation_elements(architecture) + 2 * architecture.num_weights)
    return max(1, (memory_budget(device) if budget is None else budget) // per_model)
