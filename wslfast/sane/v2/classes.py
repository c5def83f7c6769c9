"""The losses that stand among those of ``sane`` 2.x, in its ``sane.loss``.

Their bases are the installed package's, so they are made when they are first asked for.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from ...errors import WslfastError, require
from ...losses import term_weights
from .behavior import Behavior

LOSSES = ("BehavioralLoss", "GammaContrastReconBehavioralLoss")
HOME = "wslfast.sane.v2"
_SETTINGS = tuple(inspect.signature(Behavior.set_up).parameters)[2:]  # without self and zoo
_made: dict[tuple[str, int], type] = {}


def class_of(name: str) -> type:
    """The loss of this name. Raises WslfastError where ``sane`` 2.x is not installed."""
    require(name in LOSSES, f"expected one of {list(LOSSES)}, got {name!r}")
    base = published("sane.loss.loss", "SANELoss")
    key = name, id(base)
    if key not in _made:
        _made[key] = at_home(_behavioral(base) if name == "BehavioralLoss" else _composite(), name)
    return _made[key]


def at_home(made: type, name: str) -> type:
    """The class under the name by which pickles and configs find it."""
    made.__module__, made.__qualname__, made.__name__ = HOME, name, name
    return made


def register() -> None:
    """Puts the losses into ``sane.loss``, where the trainers look for the class that a yaml names."""
    home = importlib.import_module("sane.loss") if published("sane.loss.loss", "SANELoss") else None
    for name in LOSSES:
        setattr(home, name, class_of(name))


def published(module: str, name: str) -> Any:
    """A name of the installed package. Raises WslfastError where it is missing."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise WslfastError(f"this needs the package sane 2.x (of WeightCLIP), whose {module}.{name} cannot be had: {error}") from None


def _behavioral(base: Any) -> type:
    class BehavioralLoss(Behavior, base):  # type: ignore[misc, valid-type]
        __doc__ = f"""Distance in behavior between reconstructed networks and their originals (arXiv 2503.17138), a ``SANELoss``.

{(Behavior.__doc__ or "").partition(chr(10))[2]}"""

        def __init__(self, name: str = "loss_behavioral", zoo: Any = None, **settings: Any) -> None:
            unknown = sorted(set(settings) - set(_SETTINGS))
            require(not unknown, f"BehavioralLoss: expected settings of {list(_SETTINGS)}, got {unknown}")
            super().__init__(name)
            self.set_up(zoo, **settings)

    return BehavioralLoss


def _composite() -> type:
    composite = published("sane.loss.loss", "CompositeLoss")
    contrast, structure = published("sane.loss.contrastive", "NTXentLoss"), published("sane.loss.reconstruction", "MSEReconstructionLoss")

    class GammaContrastReconBehavioralLoss(composite):  # type: ignore[misc, valid-type]
        """Contrast, structure and behavior in one: ``gamma C + (1 - gamma) (beta S + (1 - beta) B)``, as arXiv 2503.17138 weighs them.

        Args:
            name: of the loss.
            gamma: weight of the contrast, 0 to 1.
            beta: share of structure in the rest, 0 to 1; 1 leaves behavior out.
            temperature, reduction, normalize, std_eps: of contrast and structure, as ``GammaContrastReconLoss`` has them.
            behavior: settings of :class:`BehavioralLoss` by name; ``zoo`` is needed.
        """

        def __init__(
            self,
            name: str = "loss_gamma_contrast_recon_behavioral",
            gamma: float = 0.05,
            beta: float = 0.1,
            temperature: float = 0.1,
            reduction: str = "mean",
            normalize: str | None = "token",
            std_eps: float = 1e-6,
            behavior: Mapping[str, Any] | None = None,
        ) -> None:
            given = isinstance(behavior, Mapping) and "zoo" in behavior
            require(given, f"behavior: expected the settings of BehavioralLoss, with 'zoo', got {behavior!r}")
            assert behavior is not None
            weights = term_weights(gamma, beta)
            losses = [
                contrast(temperature=temperature),
                structure(reduction=reduction, normalize=normalize, std_eps=std_eps),
                class_of("BehavioralLoss")(**behavior),
            ]
            super().__init__(name, losses, [float(weight) for weight in weights])

    return GammaContrastReconBehavioralLoss
