"""Closed-form codes as systems of an ablation: what a query set is worth to a code that is fitted, not trained."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch

from ..codes.adaptive import AdaptiveCodec
from ..errors import require
from ..measure.evaluation import closed_form, embeddings, reconstruct
from ..training.query_sets import query_images
from .ablations import Cell, System, Trained

_QUERIES = 512  # images at most; TrainConfig.query_pool or the set may hold fewer
_CODES = {"linear": "linear-views", "metric": "linear-metric", "adaptive": "adaptive"}


def systems() -> Mapping[str, System]:
    """``"linear"`` (no queries), ``"metric"`` and ``"adaptive"``, of size ``share``, with the images of ``query_set``; settings of
    training are ignored."""
    return {name: partial(_fitted, name) for name in _CODES}


def _fitted(name: str, cell: Cell) -> Trained:
    zoo, config = cell.zoo, cell.config
    fits = name != "adaptive" or AdaptiveCodec.supports(zoo.architecture)
    require(fits, f"semantics: the adaptive code does not fit {zoo.architecture.name!r}")
    images = None
    if name != "linear":  # a random part of the query set, drawn with the seed
        images = query_images(config.query_set, config.zoo, zoo, seed=config.seed)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(config.seed))
        images = images[order[: min(_QUERIES, config.query_pool)]]
    code = closed_form(_CODES[name], zoo, config.share, images, config.token_size, config.seed)
    cell.stop(config.steps)  # the seconds it took
    return Trained(lambda w: reconstruct(code, w), lambda w: embeddings(code, w), code.latent_size, 0)
