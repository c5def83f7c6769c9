"""In what precision a call on a GPU multiplies: torch's own settings, old and new."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from ..errors import say_once

PRECISIONS = ("tf32", "tf32x3", "fp16", "bf16")  # those that torch's settings lead to


def matmul_precision() -> str:
    """torch's float32 matmul precision: ``highest``, ``high`` or ``medium``.

    ``torch.get_float32_matmul_precision()`` raises once the newer ``torch.backends.cuda.matmul.fp32_precision`` was set to something that
    the older names cannot say; then the newer setting is read: ``tf32`` is ``high``, ``ieee`` and no setting are ``highest``.
    """
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        newer = getattr(torch.backends.cuda.matmul, "fp32_precision", "none")
        if newer == "none":
            newer = getattr(torch.backends, "fp32_precision", "none")
        return "high" if newer == "tf32" else "highest"


@contextmanager
def matmul_precision_of(precision: str) -> Iterator[None]:
    """torch's float32 matmul precision for the block, whichever of its two settings the program uses."""
    matmul = torch.backends.cuda.matmul
    newer = getattr(matmul, "fp32_precision", None)
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # the newer setting is in use: stay with it
        assert newer is not None
        matmul.fp32_precision = "ieee" if precision == "highest" else "tf32"
        try:
            yield
        finally:
            matmul.fp32_precision = newer
        return
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        if newer is not None and matmul.fp32_precision != newer:
            matmul.fp32_precision = newer


def kernel_precision() -> str:
    """What the kernels compute in: autocast's dtype, else torch's float32 matmul precision."""
    if torch.is_autocast_enabled("cuda"):
        return "bf16" if torch.get_autocast_dtype("cuda") == torch.bfloat16 else "fp16"
    if matmul_precision() != "highest":
        return "tf32"
    say_once(
        "wslfast: float32 matmul precision is 'highest': the kernels take three TF32 products for each; "
        'torch.set_float32_matmul_precision("high") takes one',
        logging.INFO,
    )
    return "tf32x3"


@contextmanager
def at_precision(precision: str) -> Iterator[None]:
    """torch's settings under which a call computes in one of the kernels' precisions. Raises ValueError for another."""
    if precision not in PRECISIONS:
        raise ValueError(f"expected one of {PRECISIONS}, got {precision!r}")
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision)
    autocast: Any = torch.autocast("cuda", half) if half is not None else nullcontext()
    with matmul_precision_of("highest" if precision == "tf32x3" else "high"), autocast:
        yield
