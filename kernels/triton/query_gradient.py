"""The gradient to the queries, for whoever learns probe images.

The kernels' input gradient of a stage is written over the stored output of the stage below. The first stage has none below, so it gets
one: a 1 x 1 convolution (for vectors a linear layer) that is the identity and whose stored output is the queries, each model's own copy.
After the backward pass that buffer holds the gradient. No kernel is new; what it costs is one more stage forward and one more dX.
Twin: ``reference.forward`` with torch's graph to the queries.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layers import Conv2d, Layers, Linear, Unplannable
from .launch import loss_and_gradient
from .schedule import schedule

WIDEST = 256  # numbers of a vector that are worth a square of them
_NAME = "the queries themselves"


@lru_cache(maxsize=256)
def layers_on_queries(layers: Layers, input_shape: tuple[int, ...]) -> Layers:
    """The layers behind an identity whose output is the queries. Raises Unplannable where that is not worth it, or not possible."""
    if len(input_shape) == 1 and input_shape[0] > WIDEST:
        raise Unplannable(f"a gradient to vectors of {input_shape[0]} numbers; the kernels give it for up to {WIDEST}")
    if len(input_shape) == 3:
        made: Layers = (Conv2d(_NAME, input_shape[0], input_shape[0], (1, 1), bias=False), *layers)
    else:
        made = (Linear(_NAME, input_shape[0], input_shape[0], bias=False), *layers)
    schedule(made, input_shape)
    return made


def gradients(
    weights: Tensor, queries: Tensor, slope: Tensor, layers: Layers, precision: str = "tf32", *, memory: int | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients ``[k, P]`` and, as the queries are, ``[n, *input]`` (summed over models) or ``[k, n, *input]``, of the sum of ``slope``
    ``[k, n, K]`` and the outputs; both fp32. Raises Unplannable as :func:`layers_on_queries`."""
    k, own = len(weights), queries.ndim in (3, 5)
    shape = tuple(queries.shape[2:] if own else queries.shape[1:])
    behind = layers_on_queries(layers, shape)
    first = schedule(behind, shape).stages[0]
    n, size = queries.shape[int(own)], shape[0]
    identity = torch.eye(size, dtype=weights.dtype, device=weights.device).flatten()
    rows = torch.cat([identity.expand(k, -1), weights], 1)
    found = torch.zeros(k if own else 1, n, *shape, dtype=torch.float32, device=weights.device)

    def take(start: int, count: int, stored: Tensor, gain: Tensor) -> None:
        """From the stored form of some models' queries to the queries' own."""
        g = stored[: count * n * first.OUTPUTS].view(count, n, first.HO, first.WO, first.N)[..., :size].float()
        g = g / gain[:count].view(-1, 1, 1, 1, 1)  # a power of two
        g = g.permute(0, 1, 4, 2, 3)
        if len(shape) == 1:
            g = g.flatten(2)
        else:  # rows that nobody reads
            g = F.pad(g, (0, shape[2] - first.WO, 0, shape[1] - first.HO))
        if own:
            found[start : start + count] = g
        else:
            found[0] += g.sum(0)

    _, gradient = loss_and_gradient(rows, queries, slope, behind, "gradient", 1.0, precision, memory=memory, mode="layers", on_queries=take)
    return gradient[:, size * size :], found if own else found[0]
