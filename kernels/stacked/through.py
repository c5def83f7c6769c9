"""A segment as one differentiable call: forward and backward by the CPU wing's steps, in float32 or, under autocast, its dtype."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..cpu.products import operand_dtype
from ..cpu.program import Program, compile_segment
from ..cpu.rewrites import blocked, paired
from ..cpu.steps import CHANNELS_LAST, ActivationStep, FlattenStep, as_channels_last, backward_through, forward_through, values_through
from ..layers import Affine
from .segments import Segment


@lru_cache(maxsize=256)
def program_of(segment: Segment, shared: bool, input_gradient: bool) -> Program:
    """The steps of a segment, rewritten where that is faster."""
    input_gradient = input_gradient or isinstance(segment.layers[0], Affine)  # through which a convolution above it reaches the norm
    program = paired(compile_segment(segment.layers, segment.input_shape, shared, input_gradient), own_queries=False)
    return program if input_gradient else blocked(program)


def channels_last(x: Tensor) -> Tensor:
    """``[q, C, H, W]`` channels-last."""
    return as_channels_last(x.contiguous(memory_format=CHANNELS_LAST))


def lifted(x: Tensor, segment: Segment) -> Tensor:
    """``[q, C, L] -> [q, C, 1, L]`` where the segment has one dimension."""
    return x.unsqueeze(2) if segment.lifted[0] else x


def shared_input(x: Tensor, segment: Segment) -> Tensor:
    """Input that all models share, in the layout of the first convolution, cropped to the pixels that the segment reads."""
    _, height, width = program_of(segment, True, False).crop
    return channels_last(lifted(x, segment)[:, :, :height, :width])


def through(x: Tensor, rows: Tensor, segment: Segment, shared: bool) -> Tensor:
    """``[q, M * C, H, W]`` or, where the segment flattens, ``[M, q, F]``, of an input ``[q, M * C, H, W]`` or :func:`shared_input`.

    Differentiable once, in ``x`` (where it is not shared) and in ``rows [M, P]``.
    """
    x = x if shared else lifted(x, segment)
    if torch.is_grad_enabled() and (x.requires_grad or rows.requires_grad):
        y: Tensor = _Through.apply(x, rows, segment, shared)  # type: ignore[no-untyped-call]
    else:
        dtype = operand_dtype()
        program = program_of(segment, shared, False)
        with torch.autocast("cpu", enabled=False):
            packed = [step.pack(rows, dtype) for step in program.steps]
            y = values_through(program.steps, packed, x.to(dtype) if shared else channels_last(x.to(dtype)), len(rows))
    return y.squeeze(2) if segment.lifted[1] else y


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, segment: Segment, shared: bool) -> Tensor:
        ctx.run = Through(segment, shared, frozenset({"rows", "x"} if x.requires_grad else {"rows"}), lift=False)
        y, ctx.saved = ctx.run.forward({"x": x, "rows": rows}, len(rows))
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        found = ctx.run.backward(gradients[0], ctx.saved, 0)
        return found.get("x"), found["rows"], None, None


class Through:
    """The rule of a segment (``rules.py``): arguments ``x`` and ``rows``."""

    fresh = True

    def __init__(self, segment: Segment, shared: bool, wanted: frozenset[str], lift: bool = True) -> None:
        self.program = program_of(segment, shared, "x" in wanted)
        self.shared = shared
        self.lifted = segment.lifted if lift else (False, False)

    def forward(self, a: dict[str, Any], models: int) -> tuple[Tensor, Any]:
        """``[q, M * C, H, W]`` or ``[M, q, F]``, and what the backward needs."""
        x, rows, dtype = a["x"], a["rows"], operand_dtype()
        if not self.shared:
            x = channels_last((x.unsqueeze(2) if self.lifted[0] else x).to(dtype))
        with torch.autocast("cpu", enabled=False):
            packed = [step.pack(rows, dtype) for step in self.program.steps]
            y, seen = forward_through(self.program.steps, packed, x.to(dtype), models)
        return y.squeeze(2) if self.lifted[1] else y, (packed, seen, a["x"].dtype, rows)

    def backward(self, g: Tensor, saved: Any, models: int) -> dict[str, Tensor]:
        """Gradients of ``rows``, and of ``x`` where it is wanted."""
        packed, seen, dtype, rows = saved
        steps = self.program.steps
        g = g.unsqueeze(2) if self.lifted[1] else g
        laid = channels_last(g) if g.ndim == 4 else g.contiguous()
        seen_through = isinstance(steps[-1], FlattenStep) and 1 in g.shape[:2]  # of one model or one query it makes a view
        if laid.data_ptr() == g.data_ptr() and (seen_through or isinstance(steps[-1], ActivationStep)):
            laid = laid.clone()  # that step, or the one below, writes over it, and somebody else may be handed the same gradient
        gradient = torch.empty_like(rows)
        with torch.autocast("cpu", enabled=False):
            gx = backward_through(steps, packed, laid, seen, gradient, True)
        if gx is None:
            return {"rows": gradient}
        return {"rows": gradient, "x": (gx.squeeze(2) if self.lifted[0] else gx).to(dtype)}
