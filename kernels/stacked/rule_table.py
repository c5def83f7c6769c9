"""The rule of a call: where each kind has its own."""

from __future__ import annotations

from . import image_rules, transposed
from .calls import Call, Values
from .rules import FORM_MAKERS, NAME_MAKERS, Maker, Rule

_BY_NAME: dict[str, Maker] = {**NAME_MAKERS, **image_rules.MAKERS, **transposed.MAKERS}


def rule_of(call: Call, known: Values, wanted: frozenset[str], owned: bool) -> Rule | None:
    """The rule of a call, None where it has none.

    Args:
        call: what is known of it.
        known: its arguments that are no tensors.
        wanted: names of those whose gradients are; of an argument that is a list of tensors, ``name.0`` and so on.
        owned: whether it may write over what it reads.
    """
    maker = _BY_NAME.get(call.operation.name) or FORM_MAKERS.get(call.operation.form)
    return None if maker is None else maker(call, known, wanted, owned)


__all__ = ["rule_of"]
