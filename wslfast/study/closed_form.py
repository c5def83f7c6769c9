"""Closed-form codes as systems of an ablation: what a query set is worth to a code that is fitted, not trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from ..codes.adaptive import AdaptiveCodec
from ..codes.linear import LinearCodec
from ..errors import require
from ..measure.evaluation import embeddings, reconstruct
from ..population import Population
from ..training import TrainConfig
from ..training.query_sets import query_images
from .ablations import Cell, System, Trained

_QUERIES = 512  # images at most; TrainConfig.query_pool or the set may hold fewer


def _plain(zoo: Population, config: TrainConfig) -> LinearCodec:
    return LinearCodec(zoo, latent=config.share, token_size=config.token_size, seed=config.seed)


def _metric(zoo: Population, config: TrainConfig) -> LinearCodec:
    return LinearCodec(
        zoo, latent=config.share, metric="activation", queries=_images(zoo, config), token_size=config.token_size, seed=config.seed
    )


def _adaptive(zoo: Population, config: TrainConfig) -> LinearCodec:
    require(AdaptiveCodec.supports(zoo.architecture), f"semantics: the adaptive code does not fit {zoo.architecture.name!r}")
    return AdaptiveCodec(zoo, latent=config.share, queries=_images(zoo, config), token_size=config.token_size, seed=config.seed)


def _images(zoo: Population, config: TrainConfig) -> torch.Tensor:
    """A random part of the query set, drawn with the seed."""
    images = query_images(config.query_set, config.zoo, zoo, seed=config.seed)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(config.seed))
    return images[order[: min(_QUERIES, config.query_pool)]].to(zoo.weights.device)


def _system(fit: Callable[[Population, TrainConfig], LinearCodec]) -> System:
    def system(cell: Cell) -> Trained:
        code = fit(cell.zoo, cell.config)
        cell.stop(cell.config.steps)  # the seconds it took
        return Trained(lambda w: reconstruct(code, w), lambda w: embeddings(code, w), code.latent_size, 0)

    return system


def systems() -> Mapping[str, System]:
    """``"linear"`` (no queries), ``"metric"`` and ``"adaptive"``, of size ``share``, with the images of ``query_set``; settings of
    training are ignored."""
    return {"linear": _system(_plain), "metric": _system(_metric), "adaptive": _system(_adaptive)}
