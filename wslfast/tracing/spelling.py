"""One spelling of each operation: the many names and forms that torch has for the same thing, as those of the table.

``x + y``, ``torch.add`` and ``x.add_``; ``x.T``, ``x.mT`` and ``x.swapaxes(0, 1)``; ``w.sum()`` and ``w.sum((0, 1))``. So two ways of
writing a network give equal graphs, and the table stays short.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Given = Mapping[str, Any]  # arguments by name
Shape = Callable[[Any], "tuple[int, ...] | None"]  # of an argument
Spelled = tuple[str, str, Given]  # name, overload, arguments

_OTHER_NAMES = {
    "__and__": "bitwise_and", "__or__": "bitwise_or", "__xor__": "bitwise_xor", "__iand__": "bitwise_and", "__ior__": "bitwise_or",
    "__ixor__": "bitwise_xor", "absolute": "abs", "negative": "neg", "multiply": "mul", "divide": "div", "true_divide": "div",
    "subtract": "sub", "clip": "clamp", "fix": "trunc", "concat": "cat", "concatenate": "cat", "greater": "gt", "greater_equal": "ge",
    "less": "lt", "less_equal": "le", "not_equal": "ne", "arcsin": "asin", "arccos": "acos", "arctan": "atan", "arctan2": "atan2",
    "arcsinh": "asinh", "arccosh": "acosh", "arctanh": "atanh", "special_expit": "sigmoid", "special_erf": "erf", "special_erfc": "erfc",
    "special_exp2": "exp2", "special_expm1": "expm1", "special_log1p": "log1p", "special_logit": "logit", "special_sinc": "sinc",
    "special_round": "round", "special_softmax": "softmax", "special_log_softmax": "log_softmax", "special_logsumexp": "logsumexp",
    "special_xlogy": "xlogy", "linalg_matmul": "matmul", "ger": "outer", "moveaxis": "movedim", "unsafe_chunk": "chunk",
    "unsafe_split": "split", "unsafe_split_with_sizes": "split_with_sizes", "split_copy": "split", "squeeze_copy": "squeeze",
    "conj": "conj_physical", "_conj": "conj_physical",
}  # fmt: skip
_OVER_EVERYTHING = {  # of all numbers of a tensor
    ("sum", "default"): ("sum", "dim_IntList"),
    ("mean", "default"): ("mean", "dim"),
    ("max", "default"): ("amax", "default"),
    ("min", "default"): ("amin", "default"),
    ("var", "default"): ("var", "dim"),
    ("std", "default"): ("std", "dim"),
    ("var_mean", "default"): ("var_mean", "dim"),
    ("std_mean", "default"): ("std_mean", "dim"),
    ("norm", "Scalar"): ("norm", "ScalarOpt_dim"),
    ("any", "default"): ("any", "dims"),
    ("all", "default"): ("all", "dims"),
}
_REDUCTIONS = frozenset(
    {"sum", "mean", "amax", "amin", "var", "std", "var_mean", "std_mean", "norm", "linalg_vector_norm", "logsumexp", "all", "any"}
)
_TURNED = frozenset({"t", "mT", "mH", "adjoint", "numpy_T", "matrix_H"})


def spelled(packet: str, overload: str, given: Given, result: tuple[int, ...] | None, shape: Shape) -> Spelled:
    """Name, overload and arguments of an ATen call in the table's spelling.

    Args:
        packet: its name, without the underscore of calls in place.
        overload: its overload.
        given: its arguments by name.
        result: shape of what it gives, where that is one tensor.
        shape: shape of an argument, None for what is no tensor.
    """
    packet = _OTHER_NAMES.get(packet, packet)
    if (packet, overload) in _OVER_EVERYTHING:
        packet, overload = _OVER_EVERYTHING[packet, overload]
    before = shape(given["self"]) if "self" in given else None
    if packet in _REDUCTIONS and not given.get("dim") and given.get("dim") != 0 and before is not None:
        given = {**given, "dim": tuple(range(-len(before), 0))}
        if packet == "norm" and given.get("p") is None:
            given = {**given, "p": 2}
    if packet == "linalg_norm" and overload == "default":
        flat = given.get("ord") is None and given.get("dim") is None
        one = isinstance(given.get("dim"), (list, tuple)) and len(given["dim"]) == 1
        if before is not None and (flat or one or len(before) == 1):
            order = 2 if given.get("ord") is None else given["ord"]
            axes = tuple(given["dim"]) if one else tuple(range(-len(before), 0))
            kept = given.get("keepdim", False)
            return "linalg_vector_norm", "default", {"self": given["self"], "ord": order, "dim": axes, "keepdim": kept}
    if packet in ("max", "min") and overload == "other":
        return packet + "imum", "default", given
    if packet in _TURNED and before is not None:
        if len(before) < 2:
            return "alias", "default", given
        if len(before) == 2 or packet not in ("t", "numpy_T", "matrix_H"):
            return "transpose", "int", {"self": given["self"], "dim0": -2, "dim1": -1}
        return "permute", "default", {"self": given["self"], "dims": tuple(range(-1, -len(before) - 1, -1))}
    if packet in ("swapaxes", "swapdims"):
        first, second = ("axis0", "axis1") if packet == "swapaxes" else ("dim0", "dim1")
        return "transpose", "int", {"self": given["self"], "dim0": given[first], "dim1": given[second]}
    if packet == "squeeze" and overload == "default" and before is not None:
        return "squeeze", "dims", {"self": given["self"], "dim": tuple(i - len(before) for i, size in enumerate(before) if size == 1)}
    if packet == "expand_as":
        return "expand", "default", {"self": given["self"], "size": result}
    if packet in ("view_as", "reshape_as", "ravel", "_unsafe_view") or (packet == "view" and overload == "default"):
        return "reshape", "default", {"self": given["self"], "shape": result}  # a value's strides are nobody's business
    if packet == "tile" and before is not None:
        times = tuple(given["dims"])
        return "repeat", "default", {"self": given["self"], "repeats": (1,) * (len(before) - len(times)) + times}
    if packet == "pad" and given.get("mode", "constant") == "constant":
        return "constant_pad_nd", "default", {"self": given["self"], "pad": given["pad"], "value": given.get("value") or 0}
    if packet == "floor_divide":  # which has no derivative in torch; this has, and it is zero
        return "div", "Tensor_mode", {"self": given["self"], "other": given["other"], "rounding_mode": "floor"}
    if packet == "hstack":
        return "cat", "default", {"tensors": given["tensors"], "dim": min(1, len(shape(given["tensors"][0]) or ()) - 1)}
    if packet == "fill" and overload == "Scalar":
        return "full_like", "default", {"self": given["self"], "fill_value": given["value"]}
    if packet == "zero":
        return "zeros_like", "default", given
    if packet == "empty_like":  # which holds anything
        return "zeros_like", "default", {name: given[name] for name in ("self", "dtype") if name in given}
    if packet in ("copy", "fill"):
        return "expand", "default", {"self": given["src" if packet == "copy" else "value"], "size": result}
    if (
        packet in ("slice", "slice_scatter")
        and type(given.get("end")) is int
        and before is not None
        and given["end"] >= before[given.get("dim", 0)]
    ):
        return packet, overload, {**given, "end": None}
    if packet == "_native_batch_norm_legit_no_training":
        return "batch_norm", "default", {**given, "training": False, "cudnn_enabled": False}
    return packet, overload, given
