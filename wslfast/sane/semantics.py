"""Which of the published system's departures are reproduced: one switch, and a named flag for each."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Union

from ..errors import require


@dataclass(frozen=True)
class Semantics:
    """Every flag is True in ``"published"`` and False in ``"corrected"``; numbers are those of docs/published.md.

    Attributes:
        batch_attention: (1) the ``pytorch`` transformer attends over the models of a batch, not over a model's tokens.
        corrupted_padding: (2) padding of a permuted view holds the first weight, not zero.
        unmasked_target: (3) the structural loss masks the output alone, and its mean counts padding.
        first_value_scale: (4) every loss is divided by the first value it had.
        raw_logit_cross_entropy: (5) ``cross_entropy`` takes the originals' logits for class probabilities.
        nan_gradients: (6) a model that is not finite leaves the value (or counts, under ``l2``), but its NaN gradient reaches the
            whole batch.
        softmax_mse: ``l2`` compares probabilities; corrected, outputs, by the paper's formula.
        decoder_dropout: the ``pytorch`` decoder drops out 10 % whatever ``ae:dropout`` says.
        half_precision: queries and weights are rounded to the output's dtype (float16 under autocast) before networks run.
    """

    batch_attention: bool = True
    corrupted_padding: bool = True
    unmasked_target: bool = True
    first_value_scale: bool = True
    raw_logit_cross_entropy: bool = True
    nan_gradients: bool = True
    softmax_mse: bool = True
    decoder_dropout: bool = True
    half_precision: bool = True


NAMES = tuple(f.name for f in fields(Semantics))
PUBLISHED = Semantics()
CORRECTED = Semantics(**dict.fromkeys(NAMES, False))
Choice = Union[str, Semantics]


def resolve(semantics: Choice, flags: dict[str, bool]) -> Semantics:
    """The semantics of a name, with single flags changed. Raises WslfastError naming what is not known."""
    if isinstance(semantics, Semantics):
        chosen = semantics
    else:
        known = {"published": PUBLISHED, "corrected": CORRECTED}
        require(isinstance(semantics, str) and semantics in known, f"semantics: expected 'published' or 'corrected', got {semantics!r}")
        chosen = known[semantics]
    for name, value in flags.items():
        require(name in NAMES, f"expected a flag of {list(NAMES)}, got {name!r}")
        require(isinstance(value, bool), f"{name}: expected True or False, got {value!r}")
    return replace(chosen, **flags)
