"""Latents refined at test time: moved, model by model, to where the decoder makes the network that behaves most like the original.

A code is fitted to a zoo once; a model that is stored can be looked at again. With the decoder fixed, the latent z of each model
descends L_B (arXiv 2503.17138, eq. 2) on query images, from the encoder's latent. The latent keeps its size and the decoder its
weights, so the figures compare with those of the code; but encoding costs hundreds of forward and backward passes, so
tables report them apart.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..adaptive import AdaptiveCodec
from ..autoencoder import Autoencoder
from ..behavior import batched_behavioral_loss, batched_forward
from ..codec import LinearCodec
from ..errors import require
from ..profiling import region
from ..tokens import layout
from .evaluation import Code, encode

_HELD_OUT = 4  # one image in so many judges instead of teaching


def refine(
    code: Code, weights: Tensor, images: Tensor, *, steps: int = 200, queries: int = 256, lr: float = 0.05, criterion: str = "distillation",
    block: int = 128, seed: int = 0,
) -> Tensor:  # fmt: skip
    """Latents ``[k, T, W]`` of rows of weights ``[k, P]``, refined on ``images [n, *input_shape]``.

    Every model is refined on its own (Adam, ``queries`` of the images a step, the rate falling along a cosine to zero), ``block`` of
    them at a time. A quarter of the images is kept back: a model whose refined latent is not better on them keeps the encoder's.

    Args:
        code: an autoencoder or a linear code, whose decoder can be differentiated; not an :class:`AdaptiveCodec`, whose cannot.
        steps: of descent; 0 gives the encoder's latents.
        lr: first rate, as a share of the root mean square of a model's latent.

    Raises:
        WslfastError: fewer than 8 images, or a code that cannot be refined.
    """
    require(not isinstance(code, AdaptiveCodec), "code: an adaptive code's decoder cannot be differentiated; refine a linear code")
    require(len(images) >= 2 * _HELD_OUT, f"images: expected at least {2 * _HELD_OUT} images, got {len(images)}")
    require(steps >= 0 and queries >= 1, f"steps, queries: expected steps >= 0 and queries >= 1, got {steps}, {queries}")
    generator = torch.Generator().manual_seed(seed)
    judge = torch.arange(len(images)) % _HELD_OUT == 0
    taught = images[~judge]
    draws = [torch.randint(len(taught), (min(queries, len(taught)),), generator=generator) for _ in range(steps)]
    with region("refine"):
        return torch.cat([_refined(code, part, taught, images[judge], draws, lr, criterion) for part in weights.split(block)])


def _refined(
    code: Code, weights: Tensor, taught: Tensor, kept_back: Tensor, draws: list[Tensor], lr: float, criterion: str
) -> Tensor:  # fmt: skip
    architecture = code.layout.architecture
    start = encode(code, weights)
    with torch.no_grad():
        targets, wanted = (batched_forward(weights, x, architecture) for x in (taught, kept_back))
    # in units of each model's own latent, so that a model's path does not depend on its company
    scale = start.square().mean((1, 2), keepdim=True).sqrt().nan_to_num(1.0)
    step_by = torch.zeros_like(start, requires_grad=True)
    adam = torch.optim.Adam([step_by], lr)
    for step, rows in enumerate(draws):
        adam.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / len(draws))) / 2
        with torch.enable_grad():
            values = batched_behavioral_loss(
                _decoded(code, start + scale * step_by), None, taught[rows], architecture, targets=targets[:, rows], criterion=criterion,
                reduction="none", nan_policy="omit",
            )  # fmt: skip
            (step_by.grad,) = torch.autograd.grad(values.nan_to_num(0).sum(), step_by)  # a model that overflows stands still
        adam.step()
    moved = start + scale * step_by.detach()
    with torch.no_grad():
        before, after = (
            batched_behavioral_loss(
                _decoded(code, z), None, kept_back, architecture, targets=wanted, criterion=criterion, reduction="none"
            )
            for z in (start, moved)
        )  # fmt: skip
    return torch.where((after < before)[:, None, None], moved, start)


def _decoded(code: Code, latents: Tensor) -> Tensor:
    """Weights ``[k, P]`` with their graph."""
    if isinstance(code, LinearCodec):
        return code.decode(latents)
    assert isinstance(code, Autoencoder)
    return layout(code.layout.architecture, code.layout.token_size).detokenize(code.decode(latents).float())
