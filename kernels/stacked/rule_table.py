"""The rule of a call: where each kind has its own."""

from __future__ import annotations

from . import algebra, choices, image_rules, transposed
from .calls import Call, Values
from .rules import FORM_MAKERS, NAME_MAKERS, Maker, Rule

_TABLES = (NAME_MAKERS, algebra.MAKERS, image_rules.MAKERS, transposed.MAKERS, choices.MAKERS)
_BY_NAME: dict[str, list[Maker]] = {name: [table[name] for table in _TABLES if name in table] for name in set().union(*_TABLES)}


def rule_of(call: Call, known: Values, wanted: frozenset[str], owned: bool, several: bool = False, sized: bool = False) -> Rule | None:
    """The rule of a call, None where it has none.

    Args:
        call: what is known of it.
        known: its arguments that are no tensors.
        wanted: names of those whose gradients are; of an argument that is a list of tensors, ``name.0`` and so on.
        owned: whether it may write over what it reads.
        several: whether its value is several tensors.
        sized: whether some of ``known`` depends on the number of queries, and is not known yet.
    """
    if (several and call.operation.name not in algebra.PARTS) or (sized and call.operation.name not in algebra.OF_ANY_SIZE):
        return None
    form = FORM_MAKERS.get(call.operation.form)
    makers = _BY_NAME.get(call.operation.name) or ([] if form is None else [form])
    made = (maker(call, known, wanted, owned) for maker in makers)
    return next((rule for rule in made if rule is not None), None)


__all__ = ["rule_of"]
