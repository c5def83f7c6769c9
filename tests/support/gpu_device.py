"""Where the GPU tier runs: a CUDA device or, to find typing errors without one, Triton's interpreter on small shapes.

WSLFAST_GPU_TESTS=interpret python -m pytest -m gpu tests/gpu/test_kernels_gpu.py
"""

from __future__ import annotations

import os
from typing import TypeVar

import pytest
import torch

INTERPRET = os.environ.get("WSLFAST_GPU_TESTS") == "interpret" and not torch.cuda.is_available()
DEVICE = "cpu" if INTERPRET else "cuda"
Value = TypeVar("Value")

needs_cuda = pytest.mark.skipif(INTERPRET, reason="the interpreter has no streams, graphs or autocast of a GPU")


def size(full: Value, small: Value) -> Value:
    """A shape, or whatever stands for it in the interpreter."""
    return small if INTERPRET else full
