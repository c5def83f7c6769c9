"""The feed-forward half of a post-norm transformer layer on a CPU: equal in value and in random numbers to torch's, in less memory.

torch keeps three tensors of the hidden width (before the ReLU, after it, and the dropout's noise), each too large for any cache and
given back to the system after every step. Here rows are worked off in blocks, and what is kept for the backward is the hidden
layer alone: its positive entries are those that both the ReLU and the dropout let through.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_ROWS = 512  # a block's hidden layer stays in a core's cache for its second product


def feed_forward(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, p: float, training: bool) -> Tensor:
    """``dropout(relu(x w1' + b1), p) w2' + b2``, for ``x [..., d]``, ``w1 [h, d]``, ``w2 [d, h]``."""
    p = p if training else 0.0
    if x.is_cpu and x.dtype == torch.float32 and p < 1 and not torch.is_autocast_enabled("cpu"):
        return _FeedForward.apply(x.reshape(-1, x.shape[-1]), w1, b1, w2, b2, p).view(x.shape)
    return F.linear(F.dropout(F.relu(F.linear(x, w1, b1)), p, training), w2, b2)


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, p: float) -> Tensor:
        hidden, y = x.new_empty(len(x), len(w1)), torch.empty_like(x)
        # one draw for the whole layer, as torch's dropout makes it; a byte an entry holds the same draws as a float would
        kept = torch.empty(hidden.shape, dtype=torch.bool).bernoulli_(1 - p) if p else None
        for start in range(0, len(x), _ROWS):
            rows = slice(start, start + _ROWS)
            h = torch.addmm(b1, x[rows], w1.T, out=hidden[rows]).relu_()
            if kept is not None:
                h.mul_(kept[rows]).mul_(1 / (1 - p))
            torch.addmm(b2, h, w2.T, out=y[rows])
        ctx.save_for_backward(x, w1, b1, w2, hidden)
        ctx.p = p
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, w1, b1, w2, hidden = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: in operators that torch differentiates again
            through = (hidden > 0).to(x.dtype) / (1 - ctx.p)
            inner = (gradient @ w2) * through
            hidden = F.linear(x, w1, b1) * through
            return inner @ w1, inner.T @ x, inner.sum(0), gradient.T @ hidden, gradient.sum(0), None
        gradient = gradient.contiguous()
        grad_x = torch.empty_like(x)
        grad_w1, grad_w2, grad_b1 = torch.zeros_like(w1), torch.zeros_like(w2), w1.new_zeros(len(w1))
        for start in range(0, len(x), _ROWS):
            rows = slice(start, start + _ROWS)
            g, h = gradient[rows], hidden[rows]
            grad_w2.addmm_(g.T, h)
            inner = torch.ops.aten.threshold_backward(g @ w2, h, 0)
            if ctx.p:
                inner.mul_(1 / (1 - ctx.p))
            torch.mm(inner, w1, out=grad_x[rows])
            grad_w1.addmm_(inner.T, x[rows])
            grad_b1 += inner.sum(0)
        return grad_x, grad_w1, grad_b1, grad_w2, gradient.sum(0), None
