"""Batched matrix products of layers, turned so that rows are long enough for a BLAS (twice as fast for ten classes or two coordinates),
and the type of their operands."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

_FEW_QUERIES, _WIDE, _MANY_WEIGHTS = 32, 64, 48_000  # where weights are read longer than they are used
LANES = 16  # float32 numbers of a vector: a BLAS is slow where the rows of a product are shorter


def vector() -> int:
    """Float32 numbers of a vector on this machine: eight with AVX2. Elsewhere as many as with AVX-512, for which sizes were chosen."""
    return 8 if torch.backends.cpu.get_cpu_capability() == "AVX2" else LANES


@cache
def intel(known: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether Intel's own vector functions serve torch here, on a processor that they were written for: they know it by its maker."""
    if not torch.backends.mkl.is_available():
        return False
    try:
        return "GenuineIntel" in known.read_text()
    except OSError:  # no Linux
        return "GenuineIntel" in platform.processor()


def operand_dtype() -> torch.dtype:
    """The type that products and convolutions have on a CPU: autocast's, else float32."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x w^T + b ``[M, q, out]``, of ``x [M, q, in]``, ``weight [M, out, in]`` and ``bias [M, out]``.

    Turned as well where the weights are many and the queries few: then what takes the time is to read the weights, which MKL reads once
    as the first operand (1.1 to 1.4 times as fast, with AVX-512 and AVX2; of 64 queries no faster).
    """
    out, features = weight.shape[1:]
    long = x.shape[1] <= _FEW_QUERIES and out >= _WIDE and out * features >= _MANY_WEIGHTS
    if (long or out < LANES <= x.shape[1]) and x.device.type == "cpu":
        turned = x.transpose(1, 2)
        made = torch.bmm(weight, turned) if bias is None else torch.baddbmm(bias.unsqueeze(-1), weight, turned)
        return made.transpose(1, 2).contiguous()
    turned = weight.transpose(1, 2)
    return torch.bmm(x, turned) if bias is None else torch.baddbmm(bias.unsqueeze(-2), x, turned)


def weight_gradient(g: Tensor, x: Tensor, into: Tensor | None = None) -> Tensor:
    """g^T x ``[M, out, in]``, of the output's gradient ``g [M, q, out]`` and ``x [M, q, in]``; not always contiguous, and not always in the
    memory ``into``."""
    if x.shape[2] < LANES <= g.shape[2] and x.device.type == "cpu":
        return torch.bmm(x.transpose(1, 2), g).transpose(1, 2)
    return torch.bmm(g.transpose(1, 2), x) if into is None else torch.bmm(g.transpose(1, 2), x, out=into)
