"""Query images: sets made without any data, pools that stay on the device, and the originals' outputs on them, computed once."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import _images
from ._files import write_atomically
from .architecture import Architecture
from .behavior import batched_forward
from .errors import WslfastError, check_seed, describe, require
from .population import Population

SYNTHETIC = ("uniform", "noise", "smooth", "strokes", "blend", "optimised")
_JUDGES = 24  # models that have to disagree
_ASCENT = 64  # images optimised at a time


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

    def draw(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Indices ``[n]`` of distinct images, on the pool's device, from an explicit generator."""
        require(isinstance(n, int) and 0 < n <= len(self), f"n: expected 1 to {len(self)} queries (the pool's size), got {n!r}")
        device = generator.device if generator is not None else "cpu"
        return torch.randperm(len(self), generator=generator, device=device)[:n].to(self.images.device)


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
        self._fill(population.architecture, (population.weights,), len(population), pool, backend)

    @classmethod
    def of_blocks(
        cls, architecture: Architecture, blocks: Iterable[Tensor], models: int, pool: QueryPool, *, backend: str = "auto"
    ) -> TargetCache:
        """The cache of ``models`` originals whose weights come in blocks ``[b, P]``, for a zoo that is not in memory."""
        cache = cls.__new__(cls)
        cache._fill(architecture, blocks, models, pool, backend)
        return cache

    @torch.no_grad()
    def _fill(self, architecture: Architecture, blocks: Iterable[Tensor], models: int, pool: QueryPool, backend: str) -> None:
        q = len(pool)
        self.outputs = torch.empty(models, q, architecture.num_classes, device=pool.images.device)
        at = 0
        for weights in blocks:
            weights, rows = weights.to(pool.images.device), slice(at, at + len(weights))
            for start in range(0, q, 1024):  # blocks of queries bound the activations, whatever the pool's size
                block = slice(start, start + 1024)
                self.outputs[rows, block] = batched_forward(weights, pool.images[block], architecture, backend=backend).float()
            at = rows.stop
        require(at == models, f"blocks: expected {models} models in all, got {at}")
        self.computed = models * q
        self.served = 0

    def targets(self, models: Tensor, queries: Tensor) -> Tensor:
        """``[k, n, K]``: outputs of the models at rows ``models [k]`` on the pool's images at ``queries [n]``."""
        self.served += models.numel() * queries.numel()
        return self.outputs[models.unsqueeze(1), queries.unsqueeze(0)]

    def variance(self) -> float:
        """Half the variance of outputs over originals, summed over classes and averaged over queries: what criterion ``"mse"`` gives
        an answer that knows nothing of the model, the originals' mean output at each query. The natural unit of L_B."""
        return float(self.outputs.double().var(0, unbiased=False).sum(1).mean() / 2)


# -- sets that need no data --------------------------------------------------------------------------------------------


def synthetic_queries(
    kind: str, n: int, architecture: Architecture, *, population: Population | None = None, steps: int = 12, seed: int = 0
) -> Tensor:
    """Query images made without any data set: ``[n, *architecture.input_shape]`` float32 on the CPU.

    Args:
        kind: ``"uniform"`` U[0, 1), the published code's ``random``; the others have mean 0 and standard deviation 1 a channel:
            ``"noise"`` white; ``"smooth"`` noise with a spectrum like that of photographs; ``"strokes"`` curves of a soft pen;
            ``"blend"`` strokes over smooth noise; ``"optimised"`` smooth noise, strokes and blends, altered until the models of
            ``population`` disagree most, and distilled to the n that leave the least of the disagreement unsaid (their mean and
            deviation are near those of what they were chosen from).
        population: models to disagree, for ``"optimised"`` alone: weights, never images.
        steps: of the ascent, for ``"optimised"``.
        seed: of everything drawn, 0 to 2^63 - 1.

    Raises:
        WslfastError: naming the argument, what was expected and what came.
    """
    require(kind in SYNTHETIC, f"kind: expected one of {SYNTHETIC}, got {kind!r}")
    require(isinstance(n, int) and not isinstance(n, bool) and n >= 1, f"n: expected a positive integer, got {n!r}")
    generator = torch.Generator().manual_seed(check_seed(seed))
    if kind != "optimised":
        return _images.draw(kind, n, architecture.input_shape, generator)
    require(isinstance(population, Population), f"population: expected the models that have to disagree, got {describe(population)}")
    assert population is not None
    require(len(population) >= 2, f"population: expected at least 2 models, got {len(population)}")
    rows = torch.randperm(len(population), generator=generator)[:_JUDGES].sort().values
    weights = population.weights[rows.to(population.weights.device)]
    parts = [_images.draw(k, n, architecture.input_shape, generator) for k in ("smooth", "strokes", "blend")]
    candidates = torch.cat(parts).to(weights.device)
    raised = torch.cat([_ascend(block, weights, architecture, steps) for block in candidates.split(_ASCENT)])
    return raised[distil(raised, weights, architecture, n)].cpu()


def _ascend(images: Tensor, weights: Tensor, architecture: Architecture, steps: int) -> Tensor:
    """Images moved towards disagreement: the variance over models of class probabilities.

    Each step is the gradient divided by its own largest entry in frequency space, where low frequencies move most (1 / f), so that
    images stay images; an image keeps its mean and its contrast, or larger pixels alone would win.
    """
    x = images.clone()
    std, mean = torch.std_mean(x.flatten(1), 1, correction=0, keepdim=True)
    size = std.clamp_min(1e-3)
    for step in range(steps):
        x.requires_grad_()
        with torch.enable_grad():
            spread = batched_forward(weights, x, architecture).softmax(2).var(0).sum()
            (gradient,) = torch.autograd.grad(spread, x)
        with torch.no_grad():
            g = torch.where(gradient.isfinite(), gradient, 0.0)
            if g.ndim == 4:
                h, w = g.shape[2:]
                g = torch.fft.irfft2(torch.fft.rfft2(g) / _images.frequencies(h, w).to(g), s=(h, w))
            g = g.flatten(1)
            rate = 0.3 * (1 - step / steps) * size  # per step, in units of the image's contrast
            moved = x.flatten(1) + rate * g / g.std(1, correction=0, keepdim=True).clamp_min(1e-12)
            s, m = torch.std_mean(moved, 1, correction=0, keepdim=True)
            x = ((moved - m) / s.clamp_min(1e-12) * size + mean).view_as(images)
    return x.detach()


@torch.no_grad()
def distil(images: Tensor, weights: Tensor, architecture: Architecture, n: int) -> Tensor:
    """Indices ``[n]`` of the images that say most about how models ``weights [k, P]`` differ.

    An image is the vector of what each model answers beyond the models' mean; pivoted Cholesky takes, one after another, the image
    whose vector is furthest from the span of those taken before (greedy D-optimal design). ``n`` is at most the number of images;
    once everything is said, the rest follow in order of how much they say alone.
    """
    require(0 < n <= len(images), f"n: expected 1 to {len(images)} images, got {n!r}")
    outputs = torch.cat([batched_forward(weights, block, architecture) for block in images.split(1024)], 1).softmax(2).double()
    outputs = outputs[outputs.isfinite().flatten(1).all(1)]
    vectors = (outputs - outputs.mean(0)).permute(1, 0, 2).flatten(1)  # [N, k K]
    alone = vectors.square().sum(1)
    left, factor = alone.clone(), vectors.new_zeros(len(images), n)
    chosen: list[int] = []
    for column in range(n):
        best = int(left.argmax())
        if not float(left[best]) > 1e-12 * float(alone.max()):
            break
        chosen.append(best)
        row = vectors @ vectors[best] - factor[:, :column] @ factor[best, :column]
        factor[:, column] = row / left[best].sqrt()
        left = (left - factor[:, column].square()).clamp_min(0)
        left[chosen] = 0
    taken = set(chosen)
    rest = [i for i in alone.argsort(descending=True).tolist() if i not in taken]
    return torch.tensor((chosen + rest)[:n], device=images.device)


def save_queries(path: str | Path, images: Tensor) -> None:
    """Write query images ``[n, ...]`` to an ``.npz`` file, under the key ``queries``."""
    path = Path(path)
    require(path.suffix == ".npz", f"queries: expected a path ending in .npz, got {str(path)!r}")

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez_compressed(file, queries=images.detach().float().cpu().numpy())

    write_atomically(path, write)


def load_queries(path: str | Path, architecture: Architecture) -> Tensor:
    """Query images ``[n, *architecture.input_shape]`` float32 of :func:`save_queries`, or of any ``.npz`` file with a floating array
    ``queries`` of that shape, used as they are. Raises WslfastError naming the file; nothing is unpickled."""
    shape = architecture.input_shape
    expected = f"queries {path}: expected an .npz file with floating 'queries' [n, {', '.join(map(str, shape))}]"
    try:
        with np.load(path, allow_pickle=False) as file:
            found = file["queries"] if isinstance(file, np.lib.npyio.NpzFile) and "queries" in file.files else None
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, KeyError) as error:
        raise WslfastError(f"{expected}, got {type(error).__name__}: {error}") from None
    require(found is not None, f"{expected}, got a file without it")
    assert found is not None
    fits = found.dtype.kind == "f" and tuple(found.shape[1:]) == shape and found.ndim > 1 and len(found) > 0
    require(fits, f"{expected}, got {found.dtype} {list(found.shape)}")
    images = torch.from_numpy(np.ascontiguousarray(found, dtype=np.float32))
    require(bool(images.isfinite().all()), f"{expected}, got values that are not finite")
    return images
