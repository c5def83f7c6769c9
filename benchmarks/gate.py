"""The gate: a provider's losses and gradient against the float64 loop, before it is timed. A red gate gives no number."""

from __future__ import annotations

import torch
from torch import Tensor

from wslfast.errors import WslfastError
from wslfast.testing import relative_error

from .cases import Case, numerics
from .providers import FORWARDS, PROVIDERS, Unavailable
from .recording import digits

# Relative L2 of a few models' whole gradient, losses or outputs. Below highest, rounding moves the argmax of near-ties in a pooling
# window, and with it the first convolution's gradient.
BOUNDS = {"highest": 1e-4, "tf32": 8e-2, "fp16": 8e-2, "bf16": 2e-1}


class Red(Exception):
    """The gate is red. ``error`` is the relative error that was found."""

    def __init__(self, error: float, bound: float) -> None:
        super().__init__(f"gate: relative error {error:.2g} above {bound:g}, not timed")
        self.error = error


def run(name: str, case: Case, direction: str, given: bool) -> tuple[Tensor, ...]:
    """One call of a provider: ``(outputs,)`` of the forward direction, else ``(losses, gradient)``."""
    if direction == "forward":
        with torch.no_grad():
            return (FORWARDS[name](case.weights, case.queries, case.architecture),)
    return PROVIDERS[name](case.weights, case.original, case.queries, case.targets if given else None, case.architecture)


def error_of(found: tuple[Tensor, ...], case: Case, direction: str) -> float:
    """The larger relative error of what was found for ``case.rows``; inf if any model's is not finite or has another shape."""
    expected = (case.outputs,) if direction == "forward" else case.truth
    worst = 0.0
    for value, truth in zip(found, expected, strict=True):
        if value.shape != (len(case.weights), *truth.shape[1:]) or not bool(value.isfinite().all()):
            return float("inf")
        worst = max(worst, relative_error(value[case.rows], truth))
    return digits(worst, 2)


def check(name: str, case: Case, direction: str, given: bool, precision: str) -> float:
    """The error of a provider on the very case that will be timed (so this is its warm-up too).

    Raises Red if it is above the precision's bound, and whatever the provider raises.
    """
    with numerics(precision, case.queries.device.type):
        return judge(run(name, case, direction, given), case, direction, precision)


def judge(found: tuple[Tensor, ...], case: Case, direction: str, precision: str) -> float:
    """The error of results. Raises Red if it is above the bound."""
    error = error_of(found, case, direction)
    if not error <= BOUNDS[precision]:
        raise Red(error, BOUNDS[precision])
    return error


def reason(error: Exception) -> str:
    """Why there is no number, in one line."""
    if isinstance(error, (Red, Unavailable, WslfastError)):
        return str(error)
    if isinstance(error, torch.cuda.OutOfMemoryError) or "can't allocate memory" in str(error):
        return "out of memory"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"failed: {type(error).__name__}: {(lines or [''])[0][:140]}".replace(";", ",")
