"""From a module to a graph of operations and back, and what a module must be to be run as a population."""

from . import untraced
from .graph import Untraceable, trace, with_axis_last
from .module import check_template, handed_integers, innermost, output_of, prepared, queries_for, with_frozen_norms
from .rebuilt import rebuilt
from .state import effective_state

__all__ = [
    "Untraceable",
    "check_template",
    "effective_state",
    "handed_integers",
    "innermost",
    "output_of",
    "prepared",
    "queries_for",
    "rebuilt",
    "trace",
    "untraced",
    "with_axis_last",
    "with_frozen_norms",
]
