"""Channel-wise tokens: a model as a sequence (Schuerholt et al. 2024, SANE), for all models of a population at once.

Every entry of a row of weights is part of one *layer*: a parameter as a matrix of rows, one an output channel, with the bias that is added
to those outputs as last columns. A row is padded with zeros to a multiple of the token size and cut into consecutive tokens. Layers are in
state-dict key order (of the parameter, not of its bias). Which axes of a parameter count its rows, the first rule that fits:

1. What a layer of the graph multiplies its input with has its outputs as rows: the first axis of linear layers, convolutions, recurrent
   layers; ``groups * shape[1]`` rows of a transposed convolution; all axes but the one that is summed over of a matrix in a product.
2. A key that holds ``weight``, ``running_mean`` or ``running_var``: the first axis. For the published networks that is the whole rule.
3. Anything else (a position table, a class token, a scale): the first axis that is left after leading axes of length one are dropped,
   of which two axes always remain. A vector is a row per number, a scalar one row.

A bias is the entry whose key is the layer's with ``bias`` for ``weight``, or the one that the graph adds. One whose numbers are no multiple
of the rows, or that belongs to no layer, is a layer of its own.

All of that is one index map, made once per architecture and token size; tokenising is one gather, and so is its inverse.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .architecture import Architecture
from .errors import describe, require
from .kernels.default_device import on_the_cpu
from .kernels.graph import Graph, Node, Slot
from .kernels.operations import TABLE

_BATCH_NORM = ("bn", "downsample.1", "batchnorm")  # key parts that mark batch norm in the published code
_NAMED = ("weight", "running_mean", "running_var")  # key parts that mark a layer there


class Tokens(NamedTuple):
    """``tokens [k, T, D]``, and what all models share: ``mask [T, D]`` (True on real weights), ``positions [T, 3]``."""

    tokens: Tensor
    mask: Tensor
    positions: Tensor


class TokenLayout:
    """Where each weight of an architecture lives in its token sequence.

    Args:
        architecture: what is tokenised.
        token_size: D; 0 finds it as the published code does: the longest row (with its bias) of any layer that has a bias or
            is a running statistic. Longer rows are cut into several tokens. Where only norms have a bias, it is the longest row of all.
        ignore_bn: leave batch-norm keys out; :meth:`detokenize` then takes them from its ``reference``.

    Attributes:
        mask: ``[T, D]`` bool, True on real weights.
        positions: ``[T, 3]`` (token, layer, channel), int16 or int32.
        num_tokens, token_size: T and D.
        layers: names of the tokenised layers, by layer index.
        complete: whether every weight has a token, as it has unless ``ignore_bn`` leaves some out.
    """

    @on_the_cpu
    def __init__(self, architecture: Architecture, token_size: int = 0, *, ignore_bn: bool = False) -> None:
        require(isinstance(architecture, Architecture), f"architecture: expected an Architecture, got {describe(architecture)}")
        require(
            isinstance(token_size, int) and not isinstance(token_size, bool) and token_size >= 0,
            f"token_size: expected a non-negative integer, got {token_size!r}",
        )
        self.architecture = architecture
        layers = layers_of(architecture, ignore_bn)
        require(bool(layers), f"architecture {architecture.name!r} has nothing to tokenise")
        self.token_size = token_size or _discover(layers)
        self.layers = tuple(layer.slot.name for layer in layers)
        rows, positions = [], []
        for i, layer in enumerate(layers):
            row = layer.places()
            chunks = -(-row.shape[1] // self.token_size)
            row = torch.nn.functional.pad(row, (0, chunks * self.token_size - row.shape[1]), value=-1)
            rows.append(row.view(-1, self.token_size))
            channel = torch.arange(row.shape[0]).repeat_interleave(chunks)
            positions.append(torch.stack([torch.full_like(channel, i), channel], 1))
        self.index = torch.cat(rows)  # [T, D], -1 on padding
        place = torch.cat(positions)
        place = torch.cat([torch.arange(len(place)).unsqueeze(1), place], 1)
        self.positions = place.to(torch.int16 if int(place.max()) <= 32_767 else torch.int32)
        self.mask = self.index >= 0
        self.num_tokens = len(self.index)
        self.token_layer = place[:, 1]  # [T], the layer of each token
        flat = self.index.flatten()
        self._gather = torch.where(flat < 0, architecture.num_weights, flat)  # padding reads the zero appended to a row
        self._scatter = torch.full((architecture.num_weights,), flat.numel())  # untokenised weights read the appended zero
        self._scatter[flat[flat >= 0]] = torch.arange(flat.numel())[flat >= 0]
        self.complete = bool((self._scatter < flat.numel()).all())
        self._dense = bool((flat >= 0).all()), self.complete  # whether tokens, and rows, have no place that stays zero
        self._on: dict[torch.device, tuple[Tensor, Tensor, Tensor, Tensor]] = {}

    def __repr__(self) -> str:
        return f"TokenLayout({self.architecture.name!r}, T={self.num_tokens}, D={self.token_size})"

    def _maps(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if device not in self._on:
            self._on[device] = tuple(t.to(device) for t in (self._gather, self._scatter, self.mask, self.positions))  # type: ignore[assignment]
        return self._on[device]

    def tokenize(self, weights: Tensor) -> Tokens:
        """``[k, P] -> tokens [k, T, D], mask [T, D], positions [T, 3]``, padding zero; differentiable.

        Raises WslfastError for weights of another shape or type.
        """
        p = self.architecture.num_weights
        require(
            isinstance(weights, Tensor) and weights.ndim == 2 and weights.shape[1] == p and weights.is_floating_point(),
            f"weights: expected floating [k, {p}] for architecture {self.architecture.name!r}, got {describe(weights)}",
        )
        gather, scatter, mask, positions = self._maps(weights.device)
        tokens = _Move.apply(weights, gather, scatter, self._dense).view(-1, self.num_tokens, self.token_size)
        return Tokens(tokens, mask, positions)

    def detokenize(self, tokens: Tensor, reference: Tensor | None = None) -> Tensor:
        """``[k, T, D] -> [k, P]``, padding discarded; differentiable.

        Weights that have no token (``ignore_bn``) come from ``reference`` (``[P]`` or ``[k, P]``), which is then required.
        Raises WslfastError for tokens of another shape or type.
        """
        require(
            isinstance(tokens, Tensor)
            and tokens.ndim == 3
            and tuple(tokens.shape[1:]) == (self.num_tokens, self.token_size)
            and tokens.is_floating_point(),
            f"tokens: expected floating [k, {self.num_tokens}, {self.token_size}] for architecture {self.architecture.name!r}, "
            f"got {describe(tokens)}",
        )
        gather, scatter, _, _ = self._maps(tokens.device)
        weights = _Move.apply(tokens.flatten(1), scatter, gather, self._dense[::-1])
        if self.complete:
            return weights
        require(reference is not None, "reference: this layout leaves weights out; pass the row they are taken from")
        expected = (self.architecture.num_weights,)
        require(
            isinstance(reference, Tensor) and tuple(reference.shape) in (expected, (len(tokens), *expected)),
            f"reference: expected {list(expected)} or {[len(tokens), *expected]}, got {describe(reference)}",
        )
        assert reference is not None
        return torch.where(scatter < self.mask.numel(), weights, reference.to(weights))


class _Move(torch.autograd.Function):
    """``out[:, i] = x[:, take[i]]``, or 0 where ``take[i]`` is past the end; ``give`` is the inverse map, so that the
    backward is the same gather the other way: exact, deterministic, no atomics, and differentiable again. ``dense``: whether ``take``,
    and ``give``, never point there, which saves a copy of ``x``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, take: Tensor, give: Tensor, dense: tuple[bool, bool]) -> Tensor:
        return (x if dense[0] else torch.cat((x, x.new_zeros(len(x), 1)), 1)).index_select(1, take)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, tuple[bool, bool]], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:3])
        ctx.save_for_forward(*inputs[1:3])
        ctx.dense = inputs[3]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        take, give = ctx.saved_tensors
        return _Move.apply(gradient, give, take, ctx.dense[::-1]), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return _Move.apply(tangent, *ctx.saved_tensors, ctx.dense)


# -- the rule --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A parameter as rows, one an output channel.

    Attributes:
        slot: the parameter.
        bias: what is appended to its rows.
        axes: of the parameter that count rows; the others are its columns, in their order.
        groups: of a transposed convolution ``[in, out / groups, ...]``, whose groups count rows as well.
        multiplies: whether the graph multiplies with it, so that its rows are a layer's outputs.
    """

    slot: Slot
    bias: Slot | None
    axes: tuple[int, ...]
    groups: int = 1
    multiplies: bool = False

    @property
    def channels(self) -> int:
        """Number of rows."""
        return self.groups * math.prod([self.slot.shape[axis] for axis in self.axes])

    @property
    def width(self) -> int:
        """Numbers of a row, its bias included."""
        return (self.slot.size + (0 if self.bias is None else self.bias.size)) // self.channels

    def places(self) -> Tensor:
        """``[channels, width]``: where each number of the rows lies in a row of weights."""
        shape, axes = self.slot.shape, self.axes
        if self.groups > 1:
            shape, axes = (self.groups, shape[0] // self.groups, *shape[1:]), (0, 2)
        columns = [axis for axis in range(len(shape)) if axis not in axes]
        row = (torch.arange(self.slot.size) + self.slot.offset).view(shape).permute((*axes, *columns)).reshape(self.channels, -1)
        if self.bias is None:
            return row
        return torch.cat([row, (torch.arange(self.bias.size) + self.bias.offset).view(self.channels, -1)], 1)


@lru_cache(maxsize=64)
def layers_of(architecture: Architecture, ignore_bn: bool = False) -> tuple[Layer, ...]:
    """Every tokenised layer, in key order. Parameters without numbers have no place in a row of weights and none here."""
    uses = _Uses(architecture.graph)
    chosen: list[Layer] = []
    taken: set[str] = set()  # biases that are columns of a layer
    for slot in architecture.parameters:
        layer = uses.rows.get(slot.name) or Layer(slot, None, _row_axes(slot))
        names = (slot.name.replace("weight", "bias"), uses.biases.get(slot.name, ""))
        bias = next((architecture.slots[name] for name in names if name in architecture.slots and name != slot.name), None)
        fits = bias is not None and slot.size and bias.size and bias.size % layer.channels == 0
        if bias is not None and fits and bias.name not in uses.rows and not {bias.name, slot.name} & taken:
            layer = replace(layer, bias=bias)
            taken.add(bias.name)
        chosen.append(layer)
    ignored = {s.name for s in architecture.parameters if ignore_bn and any(part in s.name for part in _BATCH_NORM)}
    return tuple(layer for layer in chosen if layer.slot.size and layer.slot.name not in taken | ignored)


def _row_axes(slot: Slot) -> tuple[int, ...]:
    """Axes that count the rows of a parameter that no layer of a graph multiplies with."""
    if not slot.shape:
        return ()
    if any(part in slot.name for part in _NAMED):
        return (0,)
    ones = 0
    while ones < len(slot.shape) - 2 and slot.shape[ones] == 1:
        ones += 1
    return tuple(range(ones + 1))


class _Uses:
    """What a graph does with its parameters.

    Attributes:
        rows: of each parameter that a layer multiplies its input with, how it is rows.
        biases: by the name of such a parameter, the one that is added to its outputs.
    """

    def __init__(self, graph: Graph | None) -> None:
        self.rows: dict[str, Layer] = {}
        self.biases: dict[str, str] = {}
        if graph is None:
            return
        self._slots = {f"@w:{slot.name}": (slot, False) for slot in graph.slots}  # parameters, and whether they are read transposed
        self._outputs: dict[str, str] = {}  # by a node, the parameter that it multiplies with
        for i, node in enumerate(graph.nodes):
            self._follow(f"@{i}", node, dict(node.arguments), TABLE[node.operation].form)

    def _follow(self, here: str, node: Node, given: dict[str, Any], form: str) -> None:
        if (source := _turned(node, given)) in self._slots:
            slot, turned = self._slots[source]
            if len(slot.shape) == 2:
                self._slots[here] = (slot, not turned)
        elif form in ("linear", "convolution") or node.operation == "bilinear":
            self._multiply(here, given["weight"], (0,), given.get("bias"))
        elif form == "transposed":
            self._multiply(here, given["weight"], (1,), given.get("bias"), given.get("groups", 1))
        elif form == "recurrent":
            for reference in given["params"]:
                if reference in self._slots and len(self._slots[reference][0].shape) == 2:  # the others are biases
                    self._multiply(here, reference, (0,), None)
        elif form in ("matmul", "addmm"):
            keys = ("mat1", "mat2", "batch1", "batch2") if form == "addmm" else tuple(given)
            self._product(here, [given[key] for key in keys if key in given], given.get("self") if form == "addmm" else None)
        elif node.operation == "add.Tensor":
            for a, b in ((given["self"], given["other"]), (given["other"], given["self"])):
                weight, bias = self._outputs.get(a), self._slots.get(b)
                if weight is not None and bias is not None and bias[0].size == self.rows[weight].channels:
                    self.biases.setdefault(weight, bias[0].name)
        elif given.get("weight") in self._slots and given.get("bias") in self._slots:
            self.biases.setdefault(self._slots[given["weight"]][0].name, self._slots[given["bias"]][0].name)

    def _multiply(self, here: str, weight: Any, axes: tuple[int, ...], bias: Any, groups: int = 1) -> None:
        """A node multiplies with a parameter whose outputs are these axes, as it is read."""
        if weight not in self._slots:
            return
        slot, turned = self._slots[weight]
        axes = tuple(1 - axis for axis in axes) if turned else axes
        self.rows.setdefault(slot.name, Layer(slot, None, axes, groups, True))
        if bias in self._slots:
            self.biases.setdefault(slot.name, self._slots[bias][0].name)
        elif bias is None:
            self._outputs[here] = slot.name

    def _product(self, here: str, factors: list[Any], bias: Any) -> None:
        """A product of matrices of which one is a parameter; of two, which are factors of one, the first axes are rows as of any other."""
        left, right = factors
        if (left in self._slots) == (right in self._slots):
            return
        weight = left if left in self._slots else right
        rank = len(self._slots[weight][0].shape)
        summed = rank - 1 if weight == left else max(rank - 2, 0)
        self._multiply(here, weight, tuple(axis for axis in range(rank) if axis != summed), bias)


def _turned(node: Node, given: dict[str, Any]) -> Any:
    """What a node does nothing to but turn a matrix."""
    turns = node.operation in ("t", "mT", "numpy_T")
    turns |= node.operation == "transpose.int" and {given["dim0"], given["dim1"]} == {-1, -2}
    turns |= node.operation == "permute" and tuple(given["dims"]) == (-1, -2)
    return given["self"] if turns else None


def _discover(layers: tuple[Layer, ...]) -> int:
    """The published token-size discovery: bias-free layers take no part, running statistics do (and count one column more)."""
    with_bias = [layer.width for layer in layers if layer.bias is not None]
    longest = max([*with_bias, *(layer.width + 1 for layer in layers if "running" in layer.slot.name)], default=0)
    return longest if longest > 2 else max(layer.width for layer in layers)


def num_tokens(architecture: Architecture, token_size: int) -> int:
    """T at a token size, without making the layout."""
    return sum(layer.channels * -(-layer.width // token_size) for layer in layers_of(architecture))


@lru_cache(maxsize=32)
def layout(architecture: Architecture, token_size: int = 0) -> TokenLayout:
    """The cached layout of an architecture at a token size."""
    return TokenLayout(architecture, token_size)
