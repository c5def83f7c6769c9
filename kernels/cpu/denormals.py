"""Numbers below 1.2e-38, of which a processor takes a hundred times as long to make a product: for networks that make many, they are zeros.

What saturates makes them by the thousand: softplus(100 x), as networks of signed distances have it, exp(-x^2) far from its center. With
them as zeros the loss of such a network takes a quarter of the time, and no sum is another by more than 1e-38 times its terms. What a
network makes of a number's smallness would be another: log(1e-40) is -92 and no infinity. So networks with such operations keep theirs.

A processor is told so thread by thread, and a new thread begins as the one that made it. So it is told by jobs alone (``jobs.py``), inside
of which there is one thread: torch's threads stay as they are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import lru_cache
from typing import TypeVar

import torch

from ..graph import Argument, Graph, Node
from ..operations import TABLE

__all__ = ["flushed", "makes_many", "with_zeros", "zeros_asked", "zeros_here"]

_T = TypeVar("_T")
_LEAST = 1e-20  # of a constant of the network, and of one over it
_SMALL, _SMALLER = 2.3e-308, 0.1  # their product is no ordinary number of 64 bits

# elementwise, or along axes: what they and their slopes make of a number below 1e-38 is what they make of zero, or as close to it
_EVEN = frozenset(
    name
    for names in (
        "relu relu6 tanh sigmoid softplus selu hardtanh hardsigmoid log_sigmoid leaky_relu elu celu gelu silu mish hardswish threshold",
        "hardshrink softshrink abs neg exp exp2 expm1 log1p sin cos tan atan sinh cosh asinh erf erfc square add.Tensor add.Scalar",
        "sub.Tensor sub.Scalar rsub.Scalar rsub.Tensor mul.Tensor mul.Scalar div.Scalar maximum minimum lerp.Tensor lerp.Scalar",
        "addcmul clamp clamp_min clamp_max logaddexp detach softmax.int log_softmax.int sum.dim_IntList mean.dim amax amin logsumexp",
        "cumsum flip roll glu select.int slice.Tensor narrow unsqueeze squeeze.dim squeeze.dims transpose.int unflatten.int",
        "constant_pad_nd split.Tensor split_with_sizes chunk unbind.int movedim.int movedim.intlist diff repeat_interleave.self_int",
        "tril triu zeros_like ones_like full_like type_as to.dtype",
    )
    for name in names.split()
)
_EXPONENTIALS, _STEEP = frozenset({"exp", "exp2"}), 10
_FORMS = frozenset({"elementwise", "axes", "vmap", "tensordot", "cdist", "grid"})  # of which those above alone
_NORMS = frozenset({"batch_norm", "instance_norm", "group_norm", "layer_norm", "rms_norm"})  # without eps they divide by what may be small


def zeros_here() -> bool:
    """Whether numbers below 1.2e-38 are zeros in this thread (``torch.set_flush_denormal``, which torch does not tell)."""
    return _SMALL * _SMALLER == 0


class _Here(threading.local):
    """What the calls of this thread ask of their jobs."""

    flushed = False


_here = _Here()


def flushed(call: Callable[..., _T], *arguments: object, **named: object) -> _T:
    """What ``call(*arguments, **named)`` returns, with numbers below 1.2e-38 as zeros in the jobs (``jobs.py``) that this thread begins."""
    before = _here.flushed
    try:
        _here.flushed = True
        return call(*arguments, **named)
    finally:
        _here.flushed = before


def zeros_asked() -> bool:
    """Whether jobs that this thread begins have zeros there (:func:`flushed`)."""
    return _here.flushed


def with_zeros(act: Callable[[], None], wanted: bool) -> None:
    """Call ``act`` with numbers below 1.2e-38 as zeros in this thread, or not; afterwards they are what they were."""
    before = zeros_here()
    if before == wanted:
        act()
        return
    try:
        torch.set_flush_denormal(wanted)
        act()
    finally:
        torch.set_flush_denormal(before)


@lru_cache(maxsize=256)
def makes_many(graph: Graph) -> bool:
    """Whether a graph is likely to make many of them, and nothing of a number's smallness: outputs and gradients stay what they are but for
    1e-38 times their terms."""
    return any(map(_saturates, graph.nodes)) and all(map(_harmless, graph.nodes))


def _saturates(node: Node) -> bool:
    """Whether a node makes them of numbers that networks have: -1 is enough for a softplus that is steep."""
    beta = node.argument("beta", 1)
    return node.operation in _EXPONENTIALS or (node.operation == "softplus" and isinstance(beta, (int, float)) and beta >= _STEEP)


def _harmless(node: Node) -> bool:
    form = TABLE[node.operation].form
    if not all(_ordinary(value) for _, value in node.arguments):  # itself a zero by then, or what makes a small number large
        return False
    if form in _NORMS:
        return node.argument("eps") != 0
    if node.operation == "div.Tensor":  # by a number
        return not isinstance(node.argument("other"), str)
    if node.operation == "pow.Tensor_Scalar":
        exponent = node.argument("exponent")
        return isinstance(exponent, (int, float)) and exponent >= 1
    return form not in _FORMS or node.operation in _EVEN


def _ordinary(value: Argument) -> bool:
    """Whether the numbers of an argument are zero, or neither small nor large."""
    if isinstance(value, tuple):
        return all(map(_ordinary, value))
    return not isinstance(value, (int, float)) or value == 0 or _LEAST <= abs(value) <= 1 / _LEAST
