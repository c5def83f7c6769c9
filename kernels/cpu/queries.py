"""Queries laid out for the CPU path: slabs that all models share, or every model's own, channels-last and cropped."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .program import Program
from .steps import CHANNELS_LAST


def shared_slabs(queries: Tensor, program: Program, slab: int, dtype: torch.dtype) -> list[Tensor]:
    """Slabs of the queries that all models see, cropped and channels-last; the layers ahead of the first weights already run.

    A slab of one image gets a second one, of zeros: torch hands convolutions of a single image to another library, in which a
    model's bits depend on its place. A 1 x 1 convolution needs 16 (``needs_sixteen``).
    """
    if queries.ndim == 4:
        _, height, width = program.crop
        # Explicit strides: with one channel, contiguous() would leave a layout that torch reads as NCHW.
        laid = torch.empty((queries.shape[0], *program.crop), dtype=dtype, device=queries.device, memory_format=CHANNELS_LAST)
        queries = laid.copy_(queries[:, :, :height, :width])
    slabs = []
    for x in queries.to(dtype).split(slab):
        for step in program.steps[: program.first]:
            x, _ = step.forward(x, None, 1)
        missing = program.fewest - x.shape[0] if x.ndim == 4 else 0
        if missing > 0:
            more = torch.zeros((missing, *x.shape[1:]), dtype=x.dtype, device=x.device)
            x = torch.cat((x, more.contiguous(memory_format=CHANNELS_LAST)))
        slabs.append(x)
    return slabs


def own_slab(queries: Tensor, index: Tensor | None, part: tuple[slice, slice], program: Program, models: int, dtype: torch.dtype) -> Tensor:
    """A slab of each model's own queries, as the first layer with parameters wants it.

    Args:
        queries: ``[k, n, *input]``, or a pool ``[N, *input]`` with ``index [k, n]``.
        part: the models, of which there may be fewer than ``models`` (idle ones see zeros), and the queries.

    Returns:
        ``[q, M * C, H, W]`` channels-last or ``[M, q, F]``; for a program that runs model by model ``[m, q, C, H, W]``.
    """
    if program.model_by_model:
        return _apart(queries, index, part, program, dtype)
    mine = list(queries[part]) if index is None else [_gathered(queries, rows) for rows in index[part]]
    x = _side_by_side(mine, program, models, dtype)
    for step in program.steps[: program.first]:
        x, _ = step.forward(x, None, models)
    return x


def _side_by_side(queries: Sequence[Tensor], program: Program, models: int, dtype: torch.dtype) -> Tensor:
    """``m`` times ``[q, *input]`` -> ``[q, M * C, H, W]`` channels-last or ``[M, q, F]``; idle models see zeros."""
    q = queries[0].shape[0]
    empty = torch.empty if len(queries) == models else torch.zeros
    if queries[0].ndim == 2:
        flat = empty((models, q, queries[0].shape[1]), dtype=dtype, device="cpu")
        for row, mine in zip(flat, queries):
            row.copy_(mine)
        return flat
    channels, height, width = program.crop
    x = empty((q, height, width, models, channels), dtype=dtype, device="cpu")
    # one model at a time: a third of the time of one copy of them all, whose inner loop would be over the models
    for j, mine in enumerate(queries):
        x[:, :, :, j].copy_(mine[..., :height, :width].permute(0, 2, 3, 1))
    return x.view(q, height, width, models * channels).permute(0, 3, 1, 2)


def _gathered(pool: Tensor, index: Tensor) -> Tensor:
    """``pool[index]``, ``[q, *input]``: whole images at a time if the pool is channels-last, as its gather is then."""
    if pool.ndim == 4:
        return pool.permute(0, 2, 3, 1).index_select(0, index).permute(0, 3, 1, 2)
    return pool.index_select(0, index)


def _apart(queries: Tensor, index: Tensor | None, part: tuple[slice, slice], program: Program, dtype: torch.dtype) -> Tensor:
    """Own queries ``[m, q, C, H, W]`` of the m models there are, cropped, each model's channels-last."""
    if index is None:
        x = queries[part].permute(0, 1, 3, 4, 2)
    else:
        x = queries.permute(0, 2, 3, 1).index_select(0, index[part].flatten()).unflatten(0, index[part].shape)
    _, height, width = program.crop
    return x[:, :, :height, :width].to(dtype).contiguous().permute(0, 1, 4, 2, 3)
