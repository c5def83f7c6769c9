"""Random graphs, small and right: drawn operation by operation, each fitting what it reads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st

from wslfast.kernels.graph import Constant, Graph, Node, slots_of

MOST = 240  # numbers of a value of one model and query
SMOOTH = ("tanh", "sigmoid", "sin", "cos", "gelu", "silu", "softplus", "relu", "leaky_relu", "abs", "elu", "hardswish", "log_sigmoid")
Shape = tuple[int, ...]


class Draft:
    """A graph in the making: its values that have an axis of queries, with the shapes behind that axis."""

    def __init__(self, draw: Any) -> None:
        self.draw = draw
        self.nodes: list[Node] = []
        self.slots: dict[str, Shape] = {}
        self.constants: list[Constant] = []
        self.input = tuple(self.size(2, 6) for _ in range(self.size(1, 3)))
        self.values: list[tuple[str, Shape]] = [("@x", self.input)]

    # -- drawing -------------------------------------------------------------------------------------------------------

    def size(self, least: int, most: int) -> int:
        return int(self.draw(st.integers(least, most)))

    def yes(self) -> bool:
        return bool(self.draw(st.booleans()))

    def one(self, of: Sequence[Any]) -> Any:
        return self.draw(st.sampled_from(list(of)))

    def value(self, *ranks: int) -> tuple[str, Shape] | None:
        """One of the values so far of these ranks, more often a late one."""
        fitting = [v for v in self.values if not ranks or len(v[1]) in ranks]
        return self.one([*fitting, *fitting[-2:]]) if fitting else None

    # -- making --------------------------------------------------------------------------------------------------------

    def node(self, operation: str, shape: Shape | None, /, **arguments: Any) -> str:
        self.nodes.append(Node(operation, tuple((name, value) for name, value in arguments.items() if value is not None)))
        reference = f"@{len(self.nodes) - 1}"
        if shape is not None and math.prod(shape) <= MOST:
            self.values.append((reference, shape))
        return reference

    def parameter(self, *shape: int, kind: str = "w") -> str:
        """A parameter of its own, one that is there already, or one that is computed from others; or a constant."""
        choice = self.size(0, 9) if kind == "w" else 9
        if choice == 0:
            generator = torch.Generator().manual_seed(len(self.constants))
            self.constants.append(Constant.of(f"c{len(self.constants)}", torch.randn(shape, generator=generator)))
            return f"@c:{self.constants[-1].name}"
        same = [name for name, known in self.slots.items() if known == shape and name[0] == kind]
        if choice == 1 and same:
            return f"@w:{self.one(same)}"
        name = f"{kind}{len(self.slots)}"
        self.slots[name] = shape
        if choice == 2:
            return self.node("mul.Tensor", None, self=self.node("tanh", None, self=f"@w:{name}"), other=1.5)
        return f"@w:{name}"

    def step(self) -> None:
        getattr(self, self.one(STEPS))()

    def elementwise(self) -> None:
        x, shape = self.value()  # type: ignore[misc]
        self.node(self.one(SMOOTH), shape, self=x)

    def arithmetic(self) -> None:
        x, shape = self.value()  # type: ignore[misc]
        operation = self.one(("add.Tensor", "mul.Tensor", "sub.Tensor", "maximum"))
        kind = self.size(0, 3)
        if kind == 0 and operation != "maximum":
            self.node(operation, shape, self=x, other=self.one((2, 0.5, -1.25)))
            return
        alike = [v for v in self.values if v[1] == shape]
        if kind == 1 and len(alike) > 1:
            other = self.one(alike)[0]
        else:
            cut = self.size(0, len(shape))
            own = tuple(1 if self.size(0, 3) == 0 else s for s in shape[cut:])
            other = self.parameter(*own)
        first, second = (other, x) if self.yes() else (x, other)
        self.node(operation, shape, self=first, other=second)

    def linear(self) -> None:
        x, shape = self.value()  # type: ignore[misc]
        if not shape:
            return
        out = self.size(1, 6)
        self.node(
            "linear", (*shape[:-1], out), input=x, weight=self.parameter(out, shape[-1]), bias=self.parameter(out) if self.yes() else None
        )

    def convolution(self) -> None:
        found = self.value(2, 3)
        if found is None:
            return
        x, (channels, *pixels) = found
        d = len(pixels)
        transposed = self.size(0, 4) == 0
        groups = self.one([g for g in (1, 1, 2, 3, channels) if channels % g == 0])
        out, kernel = groups * self.size(1, 3), tuple(self.size(1, min(3, p)) for p in pixels)
        stride, padding = (self.size(1, 2),) * d, tuple(self.size(0, k - 1) for k in kernel)
        bias = self.parameter(out) if self.yes() else None
        if transposed:
            sizes = [(p - 1) * s - 2 * a + k for p, s, a, k in zip(pixels, stride, padding, kernel, strict=True)]
            if min(sizes) < 1:
                return
            weight, name = self.parameter(channels, out // groups, *kernel), f"conv_transpose{d}d" + ("" if d == 1 else ".input")
        else:
            sizes = [(p + 2 * a - k) // s + 1 for p, s, a, k in zip(pixels, stride, padding, kernel, strict=True)]
            weight, name = self.parameter(out, channels // groups, *kernel), f"conv{d}d"
        self.node(name, (out, *sizes), input=x, weight=weight, bias=bias, stride=stride, padding=padding, groups=groups)

    def pooling(self) -> None:
        found = self.value(2, 3)
        if found is None:
            return
        x, (channels, *pixels) = found
        d, kind = len(pixels), self.one(("max", "avg", "adaptive"))
        if kind == "adaptive":
            size = tuple(self.size(1, p) for p in pixels)
            self.node(f"adaptive_avg_pool{d}d", (channels, *size), self=x, output_size=size)
            return
        kernel, ceil = tuple(self.size(1, min(3, p)) for p in pixels), self.yes()
        padding = tuple(self.size(0, k // 2) for k in kernel)
        up = [k - 1 if ceil else 0 for k in kernel]
        sizes = [(p + 2 * a - k + u) // k + 1 for p, a, k, u in zip(pixels, padding, kernel, up, strict=True)]
        sizes = [s - ((s - 1) * k >= p + a) for s, p, a, k in zip(sizes, pixels, padding, kernel, strict=True)]  # none begins outside
        self.node(f"{kind}_pool{d}d", (channels, *sizes), self=x, kernel_size=kernel, padding=padding, ceil_mode=ceil)

    def norm(self) -> None:
        x, shape = self.value(1, 2, 3)  # type: ignore[misc]
        kind, c = self.one(("batch", "batch", "group", "layer")), shape[0]
        if kind == "batch":
            weight, bias = (self.parameter(c) for _ in range(2)) if self.yes() else (None, None)
            given = {
                "input": x,
                "weight": weight,
                "bias": bias,
                "running_mean": self.parameter(c),
                "running_var": self.parameter(c, kind="v"),
            }
            self.nodes.append(Node("batch_norm", (*given.items(), ("training", False), ("momentum", 0.1), ("eps", 0.1))))
            self.values.append((f"@{len(self.nodes) - 1}", shape))
        elif kind == "group":
            self.node(
                "group_norm",
                shape,
                input=x,
                num_groups=self.one([g for g in (1, 2, c) if c % g == 0 and math.prod(shape) // g > 1] or [1]),
                weight=self.parameter(c),
                eps=0.1,
            )
        else:
            over = shape[self.size(0, len(shape) - 1) :]
            self.node("layer_norm", shape, input=x, normalized_shape=over, weight=self.parameter(*over), eps=0.1)

    def reduction(self) -> None:
        x, shape = self.value(1, 2, 3)  # type: ignore[misc]
        axes = sorted({-self.size(1, len(shape)) for _ in range(2)})
        kept = self.yes()
        left = tuple(1 if d - len(shape) in axes else s for d, s in enumerate(shape) if kept or d - len(shape) not in axes)
        name = self.one(("mean.dim", "sum.dim_IntList", "amax", "logsumexp"))
        self.node(name, left, self=x, dim=tuple(axes), keepdim=kept)

    def along(self) -> None:
        x, shape = self.value(1, 2, 3)  # type: ignore[misc]
        axis = -self.size(1, len(shape))
        length = shape[axis]
        kind = self.size(0, 5)
        if kind == 0:
            self.node("softmax.int", shape, self=x, dim=axis)
        elif kind == 1:
            self.node("cumsum", shape, self=x, dim=axis)
        elif kind == 2:
            start = self.size(0, length - 1)
            end = self.size(start + 1, length)
            self.node(
                "slice.Tensor",
                tuple(end - start if d - len(shape) == axis else s for d, s in enumerate(shape)),
                self=x,
                dim=axis,
                start=start,
                end=end,
            )
        elif kind == 3:
            self.node(
                "select.int",
                tuple(s for d, s in enumerate(shape) if d - len(shape) != axis),
                self=x,
                dim=axis,
                index=self.size(0, length - 1),
            )
        elif kind == 4:
            self.node("flip", shape, self=x, dims=(axis,))
        else:
            self.node("constant_pad_nd", (*shape[:-1], shape[-1] + 3), self=x, pad=(1, 2), value=0.5)

    def view(self) -> None:
        x, shape = self.value(2, 3)  # type: ignore[misc]
        if self.yes():
            order = self.draw(st.permutations(range(-len(shape), 0)))
            self.node("permute", tuple(shape[d] for d in order), self=x, dims=(-len(shape) - 1, *order))
        elif self.yes():
            self.node("flatten.using_ints", (math.prod(shape),), self=x, start_dim=-len(shape), end_dim=-1)
        else:
            wide = (shape[0] * shape[1], *shape[2:])
            self.node("reshape", wide, self=x, shape=("@n", *wide))

    def queries_as_rows(self) -> None:
        """Queries and an axis side by side, a layer, and back."""
        x, shape = self.value(2)  # type: ignore[misc]
        rows = self.node("reshape", None, self=x, shape=(f"@n*{shape[0]}", shape[1]))
        made = self.node("linear", None, input=rows, weight=self.parameter(3, shape[1]))
        self.node("reshape", (shape[0], 3), self=made, shape=("@n", shape[0], 3))

    def join(self) -> None:
        x, shape = self.value(1, 2, 3)  # type: ignore[misc]
        alike = [v for v in self.values if v[1] == shape]
        others = [self.one(alike)[0] for _ in range(self.size(1, 2))]
        if self.yes():
            learned = self.node("expand", None, self=self.parameter(1, *shape), size=("@n", *shape))
            others.append(learned)
        if self.yes() and len(shape) < 3:
            self.node("stack", (*shape, 1 + len(others)), tensors=(x, *others), dim=-1)
        else:
            axis = -self.size(1, len(shape))
            self.node(
                "cat",
                tuple(s * (1 + len(others)) if d - len(shape) == axis else s for d, s in enumerate(shape)),
                tensors=(x, *others),
                dim=axis,
            )

    def product(self) -> None:
        x, shape = self.value(2, 3)  # type: ignore[misc]
        turned = self.node("transpose.int", None, self=x, dim0=-2, dim1=-1)
        self.node("matmul", (*shape[:-1], shape[-2]), self=x, other=turned)

    def parts(self) -> None:
        x, shape = self.value(1, 2, 3)  # type: ignore[misc]
        axis = -self.size(1, len(shape))
        length = shape[axis]
        if length < 2:
            return
        first = self.size(1, length - 1)
        several = self.node("split_with_sizes", None, self=x, split_sizes=(first, length - first), dim=axis)
        for index, size in enumerate((first, length - first)):
            self.node("getitem", tuple(size if d - len(shape) == axis else s for d, s in enumerate(shape)), self=several, index=index)

    def graph(self) -> Graph:
        """All loose ends side by side."""
        read = {r for node in self.nodes for r in node.references()}
        ends = [v for v in self.values if v[0] not in read][-3:] or self.values[-1:]
        flat = []
        for x, shape in ends:
            flat.append(self.node("reshape", None, self=x, shape=("@n", math.prod(shape))))
        output = flat[0] if len(flat) == 1 else self.node("cat", None, tensors=tuple(flat), dim=-1)
        if not self.slots:
            output = self.node("mul.Tensor", None, self=output, other=self.parameter(1, kind="s"))
        return Graph(self.input, tuple(self.nodes), output, slots_of(self.slots), tuple(self.constants))


# those of layers are drawn more often
STEPS = (
    "elementwise", "elementwise", "arithmetic", "arithmetic", "linear", "linear", "convolution", "convolution", "convolution", "pooling", "norm", "norm", "reduction", "along",
    "view", "queries_as_rows", "join", "product", "parts",
)  # fmt: skip


@st.composite
def graphs(draw: Any, most: int = 8) -> Graph:
    """Graphs of up to ``most`` operations, and what it takes to bring their ends together."""
    draft = Draft(draw)
    for _ in range(draft.size(1, most)):
        if draft.value(2) is not None and draft.value(2, 3) is not None:
            draft.step()
        else:
            getattr(draft, draft.one(("elementwise", "arithmetic", "linear", "norm", "along", "join", "parts")))()
    return draft.graph()
