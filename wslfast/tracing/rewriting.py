"""Calls that become other calls of the table: what torch has no batching rule or no derivative for, and what is shorter another way."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ..kernels.graph import Node
from ..kernels.operations import TABLE


class Rewriting:
    """The nodes so far, and how some calls are written.

    Attributes:
        nodes: in order.
        constants: tensors that all models share, by name.
    """

    nodes: list[Node]
    constants: dict[str, Tensor]

    def reference(self, value: Any) -> Any:
        """What an argument is called here."""
        raise NotImplementedError

    def append(self, name: str, arguments: list[tuple[str, Any]]) -> str:
        self.nodes.append(Node(name, tuple(arguments)))
        return f"@{len(self.nodes) - 1}"

    def node(self, reference: Any) -> Node | None:
        """The node whose value it is, if there is one."""
        return self.nodes[int(reference[1:])] if isinstance(reference, str) and reference[1:].isdigit() else None

    def mask_of(self, given: Mapping[str, Any]) -> dict[str, Any] | None:
        """Arguments of the ``where`` that an assignment of one number to what a mask picks comes down to; None for any other."""
        before, (*whole, mask), value = shape_of(given["self"]), given["indices"], given["values"]
        picked = shape_of(mask)
        if any(i is not None for i in whole) or dtype_of(mask) is not torch.bool or before is None or picked is None:
            return None
        if math.prod(shape_of(value) or ()) != 1 or given.get("accumulate"):
            return None
        behind = len(before) - len(whole) - len(picked)  # axes that the mask does not have
        condition = self.reference(mask)
        if behind:
            condition = self.append("reshape", [("self", condition), ("shape", (*picked, *(1,) * behind))])
        return {"condition": condition, "self": value, "other": given["self"]}

    def bilinear(self, given: Mapping[str, Any]) -> str:
        """x W y + b of nn.Bilinear, which torch has no batching rule for."""
        first, weight, second, bias = (self.reference(given.get(key)) for key in ("input1", "weight", "input2", "bias"))
        made = self.append("einsum", [("equation", "...i,oij,...j->...o"), ("tensors", (first, weight, second))])
        return made if bias is None else self.append("add.Tensor", [("self", made), ("other", bias)])

    def short_transforms(self, given: Mapping[str, Any]) -> str | None:
        """``torch.stft``, which torch has no batching rule for: frames, times a window, transformed. None without a window that is shorter
        than its frames."""
        size, real = given["n_fft"], not is_complex(given["self"])
        step, length = given.get("hop_length") or size // 4, given.get("win_length") or size
        before, window = (size - length) // 2, self.reference(given.get("window"))
        if window is None and length < size:
            return None
        made = self.append("unfold", [("self", self.reference(given["self"])), ("dimension", -1), ("size", size), ("step", step)])
        if length < size:
            window = self.append("constant_pad_nd", [("self", window), ("pad", (before, size - length - before))])
        if window is not None:
            made = self.append("mul.Tensor", [("self", made), ("other", window)])
        half = real if given.get("onesided") is None else given["onesided"]
        scale = [("norm", "ortho")] if given.get("normalized") else []
        made = self.append("fft_rfft" if half else "fft_fft", [("self", made), ("dim", -1), *scale])
        return self.append("transpose.int", [("self", made), ("dim0", -2), ("dim1", -1)])

    def bags(self, given: Mapping[str, Any]) -> list[Any] | None:
        """``nn.EmbeddingBag`` of bags that are all as long: rows of a table, and their sum, mean or largest. None for any other."""
        offsets, flat = given["offsets"], shape_of(given["indices"])
        called = getattr(getattr(offsets, "target", None), "overloadpacket", None)
        size = offsets.args[2] if called is torch.ops.aten.arange and len(offsets.args) == 3 and offsets.args[0] == 0 else None
        otherwise = given.get("padding_idx") not in (None, -1) or given.get("include_last_offset") or given.get("scale_grad_by_freq")
        if type(size) is not int or size < 1 or flat is None or len(offsets.users) > 1 or otherwise:
            return None
        shape = (flat[0] // size, size)
        self.constants.pop(self.reference(offsets).removeprefix("@c:"), None)  # it depends on how many queries there are
        rows = self.append("reshape", [("self", self.reference(given["indices"])), ("shape", shape)])
        made = self.append("embedding", [("weight", self.reference(given["weight"])), ("indices", rows)])
        factors = given.get("per_sample_weights")
        if factors is not None:
            factors = self.append("reshape", [("self", self.reference(factors)), ("shape", (*shape, 1))])
            made = self.append("mul.Tensor", [("self", made), ("other", factors)])
        name, axes = (("sum.dim_IntList", (-2,)), ("mean.dim", (-2,)), ("amax", (-2,)))[given.get("mode", 0)]
        return [self.append(name, [("self", made), ("dim", axes)]), None, None, None]  # nobody asks for offsets and sizes

    def is_nothing(self, reference: str) -> bool:
        """Whether a value is known to be zeros."""
        node = self.node(reference)
        if node is None or node.operation in ("slice.Tensor", "narrow", "select.int", "reshape"):
            return node is not None and self.is_nothing(node.argument("self"))
        if node.operation == "complex":
            return all(self.is_nothing(node.argument(part)) for part in ("real", "imag"))
        return node.operation in ("zeros_like", "new_zeros") or (node.operation == "new_full" and node.argument("fill_value") == 0)

    def padded(self, arguments: Mapping[str, Any], node: fx.Node) -> str:
        """Zeros of which a part is replaced: that part between zeros."""
        whole, axis = shape_of(node), arguments["dim"]
        assert whole is not None
        start, stop, _ = slice(arguments.get("start"), arguments.get("end")).indices(whole[axis])
        around = (*(0, 0) * (-axis - 1), start, whole[axis] - max(start, stop))
        return self.append("constant_pad_nd", [("self", arguments["src"]), ("pad", around)])

    def scattered_pairs(self, name: str, arguments: dict[str, Any], given: Mapping[str, Any]) -> str:
        """A complex tensor with a part of it replaced, as pairs of real numbers: torch differentiates that of real ones alone."""
        for part in ("self", "src"):
            value = arguments[part] if is_complex(given[part]) else self.as_complex(arguments[part])
            arguments[part] = self._pairs(value)
        return self.append("view_as_complex", [("self", self.append(name, list({**arguments, "dim": arguments["dim"] - 1}.items())))])

    def _pairs(self, reference: str) -> str:
        """The real and imaginary parts of a complex value."""
        node = self.node(reference)
        if node is not None and node.operation == "view_as_complex":
            return str(node.argument("self"))
        return self.append("view_as_real", [("self", reference)])

    def numbered(self, name: str, arguments: list[tuple[str, Any]], given: Mapping[str, Any]) -> tuple[str, list[tuple[str, Any]]]:
        """Convolutions padded by "valid" or "same" as those of numbers; "same" stays where it needs an uneven border."""
        kernel = shape_of(given["weight"])
        assert kernel is not None
        sizes = kernel[2:]
        spacing = given.get("dilation", [1])
        spacing = list(spacing) * (len(sizes) if len(spacing) == 1 else 1)
        total = [d * (k - 1) for d, k in zip(spacing, sizes, strict=True)]
        if given.get("padding", "valid") == "same" and any(t % 2 for t in total):
            return name, arguments
        padding = tuple(t // 2 for t in total) if given.get("padding", "valid") == "same" else (0,) * len(sizes)
        order = list(TABLE[name.removesuffix(".padding")].parameters)
        values = {**dict(arguments), "padding": padding}
        if not any(padding):
            del values["padding"]
        return name.removesuffix(".padding"), [(key, values[key]) for key in order if key in values]

    def as_complex(self, reference: str) -> str:
        """A real value as a complex one."""
        nothing = self.append("zeros_like", [("self", reference)])
        return self.append("complex", [("real", reference), ("imag", nothing)])

    def filled_with(self, number: complex, arguments: list[tuple[str, Any]]) -> str:
        """A tensor of one complex number; ``arguments`` of one of zeros."""
        parts = [("real", number.real), ("imag", number.imag)]
        return self.append("complex", [(part, self.append("new_full", [*arguments[:2], ("fill_value", v)])) for part, v in parts])


def shape_of(node: Any) -> tuple[int, ...] | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return tuple(int(s) for s in value.shape) if isinstance(value, Tensor) else None


def dtype_of(node: Any) -> torch.dtype | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value.dtype if isinstance(value, Tensor) else None


def is_complex(node: Any) -> bool:
    dtype = dtype_of(node)
    return dtype is not None and dtype.is_complex
