"""``sane`` 2.x (WeightCLIP's package, 2026) fast, and with the behavioral loss it lacks.

Importing this needs nothing of that package; its losses and trainers do, when they are asked for::

    from wslfast.sane.v2 import BehavioralLoss

    loss = BehavioralLoss(zoo="zoos/tune_zoo_svhn_cnn3", queryset="data")
    loss({"x": x, "x_hat": x_hat, "mask": mask, "p": p})["loss"].backward()

From a config: ``trainer: wslfast.sane.v2.SANETrainer`` and ``loss: {class: GammaContrastReconBehavioralLoss, ...}``.
"""

from __future__ import annotations

from typing import Any

from .classes import LOSSES, class_of, register
from .images import images_of, to_npz
from .layout import Layout
from .tokenizers import detokenize_all, tokenize_all
from .zoos import export_zoo, population

__all__ = [
    "BehavioralLoss",
    "GammaContrastReconBehavioralLoss",
    "Layout",
    "SANEContrastiveTrainer",
    "SANEJointAlignmentTrainer",
    "SANETrainer",
    "detokenize_all",
    "export_zoo",
    "images_of",
    "population",
    "register",
    "to_npz",
    "tokenize_all",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in LOSSES:
        return class_of(name)
    if name in __all__:  # a trainer; it patches, and the patch knows the losses above
        from .trainers import trainer_of

        return trainer_of(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
