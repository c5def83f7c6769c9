"""Where the models of each value are: in front, or among the channels, as convolutions have them.

A value that is needed in another layout is moved, which takes as long as a pass over it. So what can compute among the channels does so
where its input already is.
"""

from __future__ import annotations

from typing import Any

from ..cpu.activations import BY_TWO_FORMULAS
from ..graph import QUERY, Graph, Node, references
from ..operations import TABLE, Operation
from ..reference import complex_values, discrete_values, value_shapes
from .calls import Layout, spatial

_PER_CHANNEL = frozenset({
    "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
    "adaptive_avg_pool3d", "pixel_shuffle", "pixel_unshuffle", "pad", "upsample_nearest1d.vec", "upsample_nearest2d.vec",
    "upsample_nearest3d.vec", "upsample_linear1d.vec", "upsample_bilinear2d.vec", "upsample_bicubic2d.vec", "upsample_trilinear3d.vec",
})  # fmt: skip
_ALONG_PIXELS = frozenset({
    "mean.dim", "sum.dim_IntList", "amax", "amin", "softmax.int", "log_softmax.int", "slice.Tensor", "logsumexp", "var.correction",
    "std.correction", "flip", "constant_pad_nd", "squeeze.dims", "squeeze.dim",
})  # fmt: skip
NORMS = ("batch_norm", "instance_norm", "group_norm", "prelu")  # and what else has a number a channel


class Settling:
    """What is known of a graph's values, and the layout in which each node computes.

    Attributes:
        shapes, rank: of every value for one model, a list where an operation gives several.
        layout: of the values so far.
        users: nodes that read each value.
        complex, discrete: values that are complex numbers, and those that are whole numbers or truths.
    """

    def __init__(self, graph: Graph, own: bool) -> None:
        self.graph, self.own = graph, own
        self.shapes, self.users = value_shapes(graph), graph.readers()
        self.complex, self.discrete = complex_values(graph), discrete_values(graph)
        self.rank: dict[str, Any] = {r: _ranks(shape) for r, shape in self.shapes.items()}
        self.layout: dict[str, Layout] = {QUERY: Layout.MODELS if own else Layout.SHARED}

    def settle(self, node: Node, operation: Operation, name: str = "") -> tuple[Layout, Layout]:
        """The layout in which a node wants its stacked tensors, and that of its output, whose reference is ``name``."""
        if operation.form == "create":
            return Layout.MODELS, Layout.SHARED
        of = (("self", node.argument("self")),) if operation.name == "type_as" else node.arguments  # of the other it takes the dtype
        every = list(references(tuple(value for _, value in of)))
        read = [r for r in every if not r.startswith("@w:")]
        layouts = [self.layout[r] for r in read]
        if all(self.layout[r] is Layout.SHARED for r in every):
            return Layout.MODELS, Layout.SHARED
        if operation.form == "getitem":
            return layouts[0], layouts[0]
        if operation.form in ("convolution", "transposed"):
            x = str(node.argument("input"))
            batched = self.rank[x] == spatial(operation) + 2 and x not in self.complex
            given = [r for key in ("weight", "bias") for r in references(node.argument(key))]
            if not batched or all(self.layout[r] is Layout.SHARED for r in given):
                return Layout.MODELS, Layout.MODELS
            return Layout.CHANNELS, Layout.CHANNELS
        if Layout.CHANNELS in layouts and self._stays(node, operation, read, name):
            return Layout.CHANNELS, Layout.CHANNELS
        return Layout.MODELS, Layout.MODELS

    def _stays(self, node: Node, operation: Operation, read: list[str], name: str) -> bool:
        """Whether a node can compute in the layout of channels, where its input already is, or one of them."""
        ranks = [self.rank[r] for r in read]
        stacked = [r for r in read if self.layout[r] is not Layout.SHARED]
        if operation.form == "identity" or operation.form in NORMS:
            return True
        if operation.name == "cat":
            return -max(ranks) < node.argument("dim") < 0 and min(ranks) == max(ranks) >= 3 and not any(r.startswith("@w:") for r in read)
        if operation.name in _PER_CHANNEL:  # images without queries have other axes in the places of queries and channels
            return ranks[0] == 2 + (len(node.argument("pad")) // 2 if operation.name == "pad" else spatial(operation))
        if operation.name in _ALONG_PIXELS:
            dims = node.argument("dim", node.argument("dims", node.argument("pad")))
            if operation.name == "constant_pad_nd":
                return len(node.argument("pad")) // 2 <= ranks[0] - 2
            return isinstance(dims, (int, tuple)) and all(-d <= ranks[0] - 2 for d in (dims if isinstance(dims, tuple) else (dims,)))
        if operation.form == "elementwise":
            # a number a channel, as a squeeze-and-excitation has it, is soon moved
            there = self._meets_convolution(name)
            alike = all(self.rank[r] == max(ranks) and (self.layout[r] is Layout.CHANNELS or there or self._a_number(r)) for r in stacked)
            alike = alike and len({self.shapes[r][1] for r in stacked}) == 1  # one channel would meet other models' many
            # what is left over of vectors goes by another formula: a number a channel makes vectors of many models' channels
            alike = alike and (operation.name not in BY_TWO_FORMULAS or len({self.shapes[r] for r in stacked}) == 1)
            scalars = all(self.rank[r] == 0 for r in read if r not in stacked)
            return alike and scalars and not any(r.startswith("@w:") for r in node.references())
        return False

    def _meets_convolution(self, reference: str) -> bool:
        """Whether a value is needed among the channels alone: nobody reads it, or what is computed of it number by number, but one
        convolution."""
        readers = self.users.get(reference, [])
        if len(readers) != 1 or reference == self.graph.output:
            return False
        node = self.graph.nodes[readers[0]]
        form = TABLE[node.operation].form
        if form == "convolution":
            return node.argument("input") == reference
        return form in ("elementwise", "identity") and list(node.references()) == [reference] and self._meets_convolution(f"@{readers[0]}")

    def _a_number(self, reference: str) -> bool:
        """Whether a value of images is one number a channel."""
        return self.rank[reference] >= 3 and all(size == 1 for size in self.shapes[reference][2:])


def _ranks(shape: Any) -> Any:
    return len(shape) if not isinstance(shape, list) else [len(s) for s in shape]
