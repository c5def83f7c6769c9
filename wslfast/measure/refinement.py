"""Latents refined at test time: moved, model by model, to where the decoder makes the network that behaves most like the original.

A code is fitted to a zoo once; a model that is stored can be looked at again. With the decoder fixed, the latent z of each model
descends L_B (arXiv 2503.17138, eq. 2) on query images, from the encoder's latent. The latent keeps its size and the decoder its
numbers, so the figures compare with those of the code; but encoding costs hundreds of forward and backward passes, so
tables report them apart.

The decoder of an adaptive code turns the bases of a layer with what it has decoded of the layers below and cannot be differentiated. So
its latents descend with all bases held, in one round for each layer: after a round, the lowest layer that was free is kept as it is, and
the layers above are encoded again on top of it. In the last round the bases of the one layer that is left are exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..architecture import Architecture
from ..behavior import batched_behavioral_loss, batched_forward
from ..codes.adaptive import AdaptiveCodec
from ..codes.autoencoder import Autoencoder
from ..codes.linear import LinearCodec
from ..errors import check_positive, require
from ..profiling import region
from ..tokens import layout
from .evaluation import Code, decode, encode

REFINED = ("linear-metric", "adaptive")  # closed-form codes that an evaluation refines
Decoder = Callable[[Tensor], Tensor]
_HELD_OUT = 4  # one image in so many judges instead of teaching


def refine(
    code: Code,
    weights: Tensor,
    images: Tensor,
    *,
    steps: int = 300,
    queries: int = 128,
    lr: float = 0.02,
    criterion: str = "mse",
    block: int = 128,
    seed: int = 0,
) -> Tensor:
    """Latents ``[k, T, W]`` of rows of weights ``[k, P]``, refined on ``images [n, *input_shape]``.

    Every model is refined on its own (Adam, ``queries`` of the images per step, the rate falling along a cosine to zero), ``block`` of
    them at a time. A quarter of the images is kept back: a model whose refined latent is not better on them keeps the encoder's.

    Args:
        code: an autoencoder, a linear or an adaptive code.
        steps: of descent, in all (of an adaptive code, shared out among its layers); 0 gives the encoder's latents.
        lr: first rate, as a share of the root mean square of a model's latent.
        criterion: of :func:`wslfast.batched_behavioral_loss`.

    Raises:
        WslfastError: fewer than 8 images, or numbers out of range.
    """
    require(len(images) >= 2 * _HELD_OUT, f"images: expected at least {2 * _HELD_OUT} images, got {len(images)}")
    require(isinstance(steps, int) and steps >= 0, f"steps: expected an integer >= 0, got {steps!r}")
    check_positive("queries", queries)
    check_positive("block", block)
    require(isinstance(lr, (int, float)) and 0 < lr < float("inf"), f"lr: expected a positive number, got {lr!r}")
    architecture, generator = code.layout.architecture, torch.Generator().manual_seed(seed)
    judge = torch.arange(len(images)) % _HELD_OUT == 0
    taught, kept_back = images[~judge], images[judge]
    rounds = len(code.layout.layers) if isinstance(code, AdaptiveCodec) else 1
    draws = [
        [torch.randint(len(taught), (min(queries, len(taught)),), generator=generator) for _ in range(-(-steps // rounds))]
        for _ in range(rounds)
    ]
    with region("refine"), torch.no_grad():
        parts = []
        for part in weights.split(block):
            start = encode(code, part)
            if steps == 0:
                parts.append(start)
                continue
            refined = _descended(code, part, start, taught, draws, lr, criterion)
            targets = batched_forward(part, kept_back, architecture)
            before, after = (_loss(decode(code, z), kept_back, architecture, targets, criterion) for z in (start, refined))
            parts.append(torch.where((after < before)[:, None, None], refined, start))
        return torch.cat(parts)


def _descended(
    code: Code, weights: Tensor, latents: Tensor, images: Tensor, draws: list[list[Tensor]], lr: float, criterion: str
) -> Tensor:
    targets, current = batched_forward(weights, images, code.layout.architecture), weights
    for fixed, batches in enumerate(draws):
        latents, decoder = _held(code, current, latents, fixed)
        free = (code.layout.token_layer >= fixed).to(latents.device)[:, None]
        # in units of each model's own latent, so that a model's path does not depend on its company
        scale = latents.square().mean((1, 2), keepdim=True).sqrt().nan_to_num(1.0) * free
        offset = torch.zeros_like(latents, requires_grad=True)
        adam = torch.optim.Adam([offset], lr)
        for step, rows in enumerate(batches):
            adam.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / len(batches))) / 2
            with torch.enable_grad():
                moved = decoder(latents + scale * offset)
                values = _loss(moved, images[rows], code.layout.architecture, targets[:, rows], criterion)
                (offset.grad,) = torch.autograd.grad(values.nan_to_num(0).sum(), offset)  # a model that overflows stands still
            adam.step()
        latents = latents + scale * offset.detach()
        current = decoder(latents)
    return latents


def _loss(weights: Tensor, images: Tensor, architecture: Architecture, targets: Tensor, criterion: str) -> Tensor:
    settings: dict[str, Any] = {"criterion": criterion, "reduction": "none", "nan_policy": "omit"}
    return batched_behavioral_loss(weights, None, images, architecture, targets=targets, **settings)


def _held(code: Code, weights: Tensor, latents: Tensor, fixed: int) -> tuple[Tensor, Decoder]:
    """Latents to begin a round with, and a decoder that can be differentiated."""
    if isinstance(code, AdaptiveCodec):
        return code.held(weights, latents, fixed)
    return latents, code.decode if isinstance(code, LinearCodec) else partial(_decoded, code)


def _decoded(code: Autoencoder, latents: Tensor) -> Tensor:
    return layout(code.layout.architecture, code.layout.token_size).detokenize(code.decode(latents).float())
