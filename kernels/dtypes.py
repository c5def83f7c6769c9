"""Dtypes that a graph names, and those of what all models share: floating and complex tensors are of the precision of the weights."""

from __future__ import annotations

import torch
from torch import Tensor

# of a conversion; floating ones are the population's
DTYPES = {
    str(d).removeprefix("torch."): d for d in (torch.float32, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
}
HELD = {**DTYPES, "complex64": torch.complex64, "complex128": torch.complex128}  # of a constant


def held(value: Tensor) -> Tensor:
    """The tensor as a constant holds it: on the CPU, dense, in single precision where it is floating or complex; one complex number, as it
    may stand in a forward, in double precision."""
    value = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
    if value.is_complex():
        return value.to(torch.complex64 if value.ndim else torch.complex128)
    return value.float() if value.is_floating_point() else value


def is_continuous(value: Tensor) -> bool:
    """Whether a value may have a gradient: it is no whole number and no truth."""
    return value.is_floating_point() or value.is_complex()


def as_precise(value: Tensor, dtype: torch.dtype) -> Tensor:
    """A constant in the precision of a floating ``dtype``; whole numbers and truths as they are."""
    return value.to(dtype.to_complex()) if value.is_complex() else value.to(dtype) if value.is_floating_point() else value
