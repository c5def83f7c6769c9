"""Numbers below 1.2e-38, of which a processor takes a hundred times as long to make a product: for most networks they are zeros.

What saturates makes them by the thousand: softplus(100 x), as networks of signed distances have it, exp(-x^2) far from its center. With
them as zeros the loss of such a network takes a quarter of the time, and no sum is another by more than 1e-38 times its terms. What a
network makes of a number's smallness would be another: log(1e-40) is -92 and no infinity. So networks with such operations keep theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TypeVar

import torch

from ..graph import Graph, Node
from ..operations import TABLE

__all__ = ["flushed", "harmless", "zeros_here"]

_T = TypeVar("_T")
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
_FORMS = frozenset({"elementwise", "axes", "vmap", "tensordot", "cdist", "grid"})  # of which those above alone
_NORMS = frozenset({"batch_norm", "instance_norm", "group_norm", "layer_norm", "rms_norm"})  # without eps they divide by what may be small


def zeros_here() -> bool:
    """Whether numbers below 1.2e-38 are zeros in this thread (``torch.set_flush_denormal``, which torch does not tell)."""
    return _SMALL * _SMALLER == 0


def flushed(call: Callable[..., _T], *arguments: object) -> _T:
    """What ``call(*arguments)`` returns, with numbers below 1.2e-38 as zeros in this thread, and in jobs (``jobs.py``) that it begins."""
    if zeros_here():
        return call(*arguments)
    try:
        torch.set_flush_denormal(True)
        return call(*arguments)
    finally:
        torch.set_flush_denormal(False)


@lru_cache(maxsize=256)
def harmless(graph: Graph) -> bool:
    """Whether a graph makes nothing of a number's smallness: outputs and gradients stay what they are but for 1e-38 times their terms."""
    return all(map(_harmless, graph.nodes))


def _harmless(node: Node) -> bool:
    form = TABLE[node.operation].form
    if form in _NORMS:
        return node.argument("eps") != 0
    if node.operation == "div.Tensor":  # by a number
        return not isinstance(node.argument("other"), str)
    if node.operation == "pow.Tensor_Scalar":
        exponent = node.argument("exponent")
        return isinstance(exponent, (int, float)) and exponent >= 1
    return form not in _FORMS or node.operation in _EVEN
