"""Pools of query images that stay on the device, and the originals' outputs on them, computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..architecture import Architecture
from ..behavior import batched_forward
from ..engine.ranks import ALONE, World
from ..errors import describe, require
from ..kernels.criteria import CRITERIA, criterion_values
from ..population import Population

_BLOCK = 256  # images that are looked at at once in float64: all may be gigabytes


class QueryPool:
    """Images ``[Q, *input_shape]`` resident on one device, from which every step draws its queries.

    Args:
        images: floating ``[Q, ...]``; kept as float32 on ``device`` (default: where they are).
    """

    def __init__(self, images: Tensor, device: torch.device | str | None = None) -> None:
        require(
            isinstance(images, Tensor) and images.is_floating_point() and images.ndim >= 2 and len(images) > 0,
            f"images: expected floating [Q, C, H, W] with Q >= 1, got {describe(images)}",
        )
        self.images = images.detach().to(device if device is not None else images.device, torch.float32).contiguous()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Tensor) -> Tensor:
        return self.images.index_select(0, index)

    def fingerprint(self) -> Tensor:
        """A sum over each image with weights of either sign, ``[Q]`` float64 on the CPU: what tells one pool from another, wherever it was
        made. The same images made by another machine may differ in their last digits."""
        flat = self.images.flatten(1)
        signs = torch.cos(1 + torch.arange(flat.shape[1], dtype=torch.float64, device=flat.device)) / flat.shape[1] ** 0.5
        return torch.cat([part.double() @ signs for part in flat.split(_BLOCK)]).cpu()

    def draw(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Indices ``[n]`` of distinct images, on the pool's device, from an explicit generator.

        Raises WslfastError for more than the pool has.
        """
        require(isinstance(n, int) and 0 < n <= len(self), f"n: expected 1 to {len(self)} queries (the pool's size), got {n!r}")
        device = generator.device if generator is not None else "cpu"
        return sent(torch.randperm(len(self), generator=generator, device=device)[:n], self.images.device)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device. From memory that may be paged out the copy would wait for all that the GPU has to do first."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class TargetCache:
    """Outputs of every original on every image of a pool, computed once.

    A permuted view of a model is the same function, so all of a model's views share its row; no training step has to run an
    original again.

    Attributes:
        outputs: ``[M, Q, K]`` float32.
        computed: (model, query) forward passes run to fill the cache.
        served: (model, query) forward passes that lookups have replaced.
    """

    def __init__(self, population: Population, pool: QueryPool, *, backend: str = "auto") -> None:
        require(isinstance(population, Population), f"population: expected a Population, got {describe(population)}")
        require(isinstance(pool, QueryPool), f"pool: expected a QueryPool, got {describe(pool)}")
        self._fill(population.architecture, lambda rows: (population.weights,), len(population), pool, backend, ALONE)

    @classmethod
    def of_blocks(
        cls,
        architecture: Architecture,
        blocks: Callable[[range], Iterable[Tensor]],
        models: int,
        pool: QueryPool,
        *,
        backend: str = "auto",
        world: World = ALONE,
    ) -> TargetCache:
        """The cache of ``models`` originals whose weights ``blocks(rows)`` gives in blocks ``[b, P]``, for a zoo that is not in memory.
        Each process of the ``world`` runs its share of them, and all have all outputs."""
        cache = cls.__new__(cls)
        cache._fill(architecture, blocks, models, pool, backend, world)
        return cache

    @torch.no_grad()
    def _fill(
        self,
        architecture: Architecture,
        blocks: Callable[[range], Iterable[Tensor]],
        models: int,
        pool: QueryPool,
        backend: str,
        world: World,
    ) -> None:
        q, mine = len(pool), world.span(models)
        outputs = torch.empty(len(mine), q, *architecture.output_shape, dtype=torch.float32, device=pool.images.device)
        at = 0
        for weights in blocks(mine):
            weights, rows = weights.to(pool.images.device), slice(at, at + len(weights))
            for start in range(0, q, 1024):  # blocks of queries bound the activations, whatever the pool's size
                block = slice(start, start + 1024)
                outputs[rows, block] = batched_forward(weights, pool.images[block], architecture, backend=backend).float()
            at = rows.stop
        require(at == len(mine), f"blocks: expected {len(mine)} models in all, got {at}")
        self.outputs = world.rows(outputs, models)
        self.computed = models * q
        self.served = 0

    def targets(self, models: Tensor, queries: Tensor) -> Tensor:
        """``[k, n, K]``: outputs of the models at rows ``models [k]`` on the pool's images at ``queries [n]``."""
        self.served += models.numel() * queries.numel()
        return self.outputs[models.unsqueeze(1), queries.unsqueeze(0)]

    def variance(self) -> float:
        """Half the variance of outputs over originals, summed over classes and averaged over queries: what criterion ``"mse"`` gives
        an answer that knows nothing of the model, the originals' mean output at each query. The natural unit of L_B. Models whose outputs
        are not finite are left out; one model alone is answered with zero."""
        return uninformed_behavior(self.outputs)


def uninformed_behavior(outputs: Tensor, criterion: str = "mse", temperature: float = 2.0) -> float:
    """A criterion's mean value over originals with outputs ``[M, Q, K]`` when each is answered with the mean output of all at each
    query: for ``"mse"`` half the variance over models, summed over classes. Models whose outputs are not finite are left out. One model
    alone is answered with zero."""
    require(criterion in CRITERIA, f"criterion: expected one of {CRITERIA}, got {criterion!r}")
    finite = outputs.isfinite().flatten(1).all(1)
    kept = int(finite.sum())
    require(kept > 0, "normalizers: behavioral: no original has finite outputs")
    blocks = [rows.split(64) for rows in (outputs, finite)]  # float64 copies of a few models at a time
    mean = torch.stack([chunk[rows].double().sum(0) for chunk, rows in zip(*blocks, strict=True)]).sum(0) / kept
    mean = mean if kept > 1 else torch.zeros_like(mean)
    values = [
        criterion_values(mean.expand_as(chunk), chunk.double(), criterion, temperature)[rows] for chunk, rows in zip(*blocks, strict=True)
    ]
    return float(torch.cat(values).mean())
