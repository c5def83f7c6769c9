"""Codes that are fitted, not trained, as systems of an ablation: what query sets are worth to them, and what is to be passed."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..codes.adaptive import AdaptiveCodec
from ..codes.joint import JointCodec
from ..codes.layer_inputs import spaced
from ..codes.trained_joint import OutputImportance, train_importance
from ..errors import require
from ..measure.evaluation import closed_form, decode, embeddings, reconstruct
from ..measure.refinement import refine
from ..training.query_sets import query_images
from .ablations import Cell, System, Trained

_QUERIES = 512  # images at most; TrainConfig.query_pool or the set may hold fewer
_JOINT = 1024  # of the code that also encodes on them
_REFINED = 4096  # for the refinement of latents at test time
_JOINTS = ("joint", "joint-trained", "joint-untrained", "joint-fisher")
_CODES = {"linear": "linear-views", "metric": "linear-metric", "adaptive": "adaptive", "refined": "adaptive"}


def systems() -> Mapping[str, System]:
    """``"linear"`` (no queries), ``"metric"``, ``"adaptive"``, ``"refined"`` (the adaptive code with latents refined at test time, for as
    many ``steps``) and ``"joint"``, of size ``share``, with the images of ``query_set``; other settings of training are ignored.
    ``"joint-trained"``: a joint code whose directions are chosen by an importance of answers that is trained for ``steps``;
    ``"joint-untrained"``: the same with all answers alike; ``"joint-fisher"``: with softmax outputs as importance. All three read
    coordinates off, without descent."""
    return {name: partial(_fitted, name) for name in (*_CODES, *_JOINTS)}


def _fitted(name: str, cell: Cell) -> Trained:
    zoo, config = cell.zoo, cell.config
    fits = name in ("linear", "metric") or AdaptiveCodec.supports(zoo.architecture)
    require(fits, f"semantics: the {name} code does not fit {zoo.architecture.name!r}")
    images = everything = None
    if name != "linear":  # a random part of the query set, drawn with the seed
        everything = query_images(config.query_set, config.zoo, zoo, seed=config.seed)
        order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(config.seed))
        images = everything[order[: min(_JOINT if name in _JOINTS else _QUERIES, config.query_pool)]]
    if name in _JOINTS:
        assert images is not None
        assert everything is not None
        joint = _joint(name, cell, images, everything)
        cell.stop(config.steps)
        return Trained(joint.reconstruct, joint.encode, joint.latent_size, config.steps if name == "joint-trained" else 0)
    code = closed_form(_CODES[name], zoo, config.share, images, config.token_size, config.seed)
    cell.stop(config.steps)  # the seconds it took
    if name == "refined":
        assert everything is not None
        seen = spaced(everything, _REFINED)
        steps, seed = config.steps, config.seed
        return Trained(
            lambda w: decode(code, refine(code, w, seen, steps=steps, seed=seed)), lambda w: embeddings(code, w), code.latent_size, 0
        )
    return Trained(lambda w: reconstruct(code, w), lambda w: embeddings(code, w), code.latent_size, 0)


def _joint(name: str, cell: Cell, images: Tensor, everything: Tensor) -> JointCodec:
    config = cell.config
    settings: dict[str, Any] = {"queries": images, "latent": config.share, "token_size": config.token_size, "seed": config.seed}
    if name == "joint":
        return JointCodec(cell.zoo, **settings)
    if name == "joint-fisher":
        return JointCodec(cell.zoo, **settings, steps=0, importance=lambda outputs: outputs.softmax(-1))
    if name == "joint-untrained":
        return JointCodec(cell.zoo, **settings, steps=0, importance=OutputImportance(config.seed))
    plain = JointCodec(cell.zoo, **settings, steps=0)
    importance = train_importance(plain, cell.zoo, everything, steps=config.steps, lr=config.lr, seed=config.seed)
    return JointCodec(cell.zoo, **settings, steps=0, importance=importance)
