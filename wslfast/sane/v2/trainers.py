"""The trainers of ``sane`` 2.x on ours, for its configs; made when they are first asked for, as their bases are the installed package's."""

from __future__ import annotations

from typing import Any

from ...errors import require
from ..patching import current, patch
from .classes import HOME, at_home, published, register

TRAINERS = ("SANETrainer", "SANEContrastiveTrainer", "SANEJointAlignmentTrainer")
_made: dict[tuple[str, int], type] = {}


def trainer_of(name: str) -> type:
    """The trainer of this name. Raises WslfastError where ``sane`` 2.x is not installed."""
    require(name in TRAINERS, f"expected one of {list(TRAINERS)}, got {name!r}")
    base = published("sane.trainer", name)
    key = name, id(base)
    if key not in _made:
        _made[key] = at_home(_trainer(name, base), name)
    return _made[key]


def _trainer(name: str, base: Any) -> type:
    class Trainer(base):  # type: ignore[misc, valid-type]
        __doc__ = f"""``sane.trainer.{name}`` on ours: setting it up patches its process and makes our losses known to its config.

        A config that says ``trainer: {HOME}.{name}`` needs nothing else, and a worker of ray, which imports the package anew, has it too.
        """

        def setup(self, config: Any) -> None:
            if current() is None:  # one with other semantics serves this package as well
                patch()
            register()
            super().setup(config)

    return Trainer
