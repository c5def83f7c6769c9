"""What enters each layer of a network: its patches, their second moments, and the metric that these make of weight errors.

A layer's rows are multiplied with the patches that it meets (of a linear layer: with the feature vector). With C the patches' second
moment, the error e of a row costs its layer's output ``e C e^T``: C says which directions of a row matter. Hidden channels have no order,
so where a metric is an average over models it is averaged over every permutation of a layer's input channels too, in closed form.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Union

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import engine
from ..architecture import Architecture
from ..errors import describe, require
from ..kernels.layers import Conv2d, Layers, Linear, layer_slots, shapes
from ..kernels.reference import forward_one
from ..permutation import hidden_channels
from ..population import Population
from .token_groups import TokenGroups

_ACCURACIES = ("val_acc", "train_acc", "test_acc")  # the last of zoos that know no other: test images choose nothing

# -- patches -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WeightedLayer:
    """A layer with weights and what follows it up to the next one.

    Activations between them are ``[m, ...]``: the n queries of one model after another (m = k n), or once for all models (m = n).
    Patches are laid out once, ``[k, R, width]``, channels-last (runs of whole pixels are copied, not single numbers); the small things,
    moments and rows, are put in order instead.

    Attributes:
        layer: the one with weights.
        rest: layers behind it, without weights.
        outputs: shape of what ``layer`` makes of one query.
    """

    layer: Union[Conv2d, Linear]
    rest: Layers
    outputs: tuple[int, ...]

    @property
    def width(self) -> int:
        """Numbers of a row: the weights of one output, then its bias if there is one."""
        return math.prod(self.layer.weight_shape[1:]) + self.layer.bias

    @property
    def groups(self) -> int:
        """Groups of a convolution, whose rows see a part of the channels each."""
        return self.layer.groups if isinstance(self.layer, Conv2d) else 1

    @property
    def positions(self) -> int:
        """Patches of one query."""
        return math.prod(self.outputs[1:]) * self.groups

    def patches(self, x: Tensor, k: int = 1) -> Tensor:
        """``[k n, *input] -> [k, n * positions, width]``: what the rows meet, pixels before channels, 1 last if there is a bias."""
        layer, width = self.layer, self.width - self.layer.bias
        if isinstance(layer, Linear):
            if not layer.bias:
                return x.reshape(k, -1, width)
            out = x.new_empty(len(x), width + 1)
            out[:, :width] = x
        else:
            (down, right), (height, size) = layer.padding, layer.kernel_size
            x = F.pad(x, (right, right, down, down)) if down or right else x
            x = x.permute(0, 2, 3, 1).contiguous()
            image, line, pixel = x.stride()[:3]
            (sy, sx), (dy, dx), each = layer.stride, layer.spacing, x.shape[3] // self.groups
            windows = x.as_strided(
                (len(x), *self.outputs[1:], self.groups, height, size, each),
                (image, sy * line, sx * pixel, each, dy * line, dx * pixel, 1),
            )
            out = x.new_empty(len(x) * self.positions, self.width)
            out[:, :width].unflatten(1, (height, size, each)).unflatten(0, windows.shape[:4]).copy_(windows)
        if layer.bias:
            out[:, width] = 1
        return out.view(k, -1, self.width)

    def _order(self, device: torch.device) -> Tensor:
        """Places in a row, ``[C, kh, kw]`` and bias, of a patch's numbers, ``[kh, kw, C]`` and bias."""
        places = torch.arange(self.width, device=device)
        if isinstance(self.layer, Conv2d):
            width = self.width - self.layer.bias
            places[:width] = places[:width].view(self.layer.weight_shape[1:]).permute(1, 2, 0).flatten()
        return places

    def ordered(self, x: Tensor) -> Tensor:
        """``x [..., width]``, numbers as in a patch, in the order of the rows."""
        return x[..., self._order(x.device).argsort()]

    def sums(self, patches: Tensor, others: Tensor) -> Tensor:
        """``x y^T`` summed over queries and positions, ``[k, width, width]``, in the order of the rows."""
        return self.ordered(self.ordered(patches.mT @ others).mT).mT

    def moment(self, patches: Tensor, others: Tensor) -> Tensor:
        """``E[x y^T]`` over queries and positions, ``[k, width, width]``, in the order of the rows."""
        return self.sums(patches, others) / patches.shape[1]

    def __call__(self, rows: Tensor, patches: Tensor) -> Tensor:
        """Rows ``[k, channels, width]`` on patches ``[k, R, width]`` or ``[1, R, width]``: what reaches the next one, ``[k n, ...]``.

        Not of a grouped convolution, whose patches are of its groups.
        """
        made = patches @ rows[..., self._order(rows.device)].mT  # [k, R, channels]
        if isinstance(self.layer, Linear):
            made = made.flatten(0, 1)
        else:
            made = made.view(-1, *self.outputs[1:], self.outputs[0]).permute(0, 3, 1, 2)
        return without_weights(made, self.rest)


def weighted_layers(architecture: Architecture) -> tuple[Layers, tuple[WeightedLayer, ...]]:
    """The layers before the first one with weights, and those with weights, of a planned architecture."""
    layers = architecture.layers
    sizes = shapes(layers, architecture.input_shape)
    starts = [(i, layer) for i, layer in enumerate(layers) if isinstance(layer, (Conv2d, Linear))]
    ends = [*(i for i, _ in starts[1:]), len(layers)]
    return layers[: starts[0][0]], tuple(
        WeightedLayer(layer, layers[start + 1 : end], sizes[start + 1]) for (start, layer), end in zip(starts, ends, strict=True)
    )


def without_weights(x: Tensor, layers: Layers) -> Tensor:
    """What ``layers``, which have no weights, make of ``x [n, ...]``: the same in every model."""
    return forward_one(x.new_zeros(0), x, layers)


# -- second moments --------------------------------------------------------------------------------------------------------


def input_second_moments(weights: Tensor, queries: Tensor, architecture: Architecture, chunk: int = 128) -> list[Tensor]:
    """``E[x x^T]`` of the inputs x of every convolution and linear layer, over queries, positions and models.

    x is laid out like a row of the layer's weights: the patch under a kernel (C-order over channel, row, column) or the
    feature vector, then 1 if the layer has a bias.

    Args:
        weights: ``[k, P]`` of the models that run. Those with a non-finite activation are left out.
        queries: ``[n, *input_shape]``.
        architecture: planned.
        chunk: queries at a time.

    Returns:
        float64 ``[width, width]`` a layer, unchanged by any permutation of the layer's hidden input channels.
    """
    require(
        architecture.planned,
        f"metric='activation': architecture {architecture.name!r} is not a plain chain of layers, so its layers' inputs cannot be "
        "followed; use metric='plain'",
    )
    shape = architecture.input_shape
    require(
        isinstance(queries, Tensor) and queries.is_floating_point() and tuple(queries.shape[1:]) == shape and len(queries) > 0,
        f"queries: expected floating [n, {', '.join(map(str, shape))}], got {describe(queries)}",
    )
    queries = queries.to(weights.device, torch.float32)
    sums: list[list[Tensor]] = []
    first: Tensor | None = None  # the first layer sees the same images in every model
    with torch.no_grad():
        for row in weights:
            moments = _one_model(row, queries, architecture, chunk, first)
            first = moments[0]
            if all(bool(m.isfinite().all()) for m in moments):
                sums.append(moments)
    require(len(sums) > 0, "metric='activation': none of the models drawn has finite activations")
    averages = [torch.stack(layer).mean(0) for layer in zip(*sums, strict=True)]
    return [symmetrise(m, *hidden) for m, hidden in zip(averages, hidden_inputs(architecture), strict=True)]


def _one_model(row: Tensor, queries: Tensor, architecture: Architecture, chunk: int, first: Tensor | None) -> list[Tensor]:
    """The moments ``[width, width]`` float64 of one model's layers; ``first``: that of the first layer, where it is known."""
    head, layers = weighted_layers(architecture)
    slots = [slots for slots in layer_slots(architecture.layers) if slots.weight is not None]
    totals = [row.new_zeros(layer.width, layer.width, dtype=torch.float64) for layer in layers]
    for images in queries.split(chunk):
        x = without_weights(images, head)
        for index, (layer, place) in enumerate(zip(layers, slots, strict=True)):
            if index or first is None:
                patches = layer.patches(x)
                totals[index] += layer.sums(patches, patches)[0].double() / patches.shape[1] * (len(images) / len(queries))
            assert place.weight is not None
            x = forward_one(row[place.weight.offset : (place.bias or place.weight).stop], x, (layer.layer, *layer.rest))
    return totals if first is None else [first, *totals[1:]]


def hidden_inputs(architecture: Architecture) -> list[tuple[int, int]]:
    """Of every convolution and linear layer: its permutable input channels (0 for images and beside grouped convolutions), and
    the entries of its row that are not inputs (1 with a bias, else 0)."""
    layers = [layer for layer in architecture.layers if isinstance(layer, (Conv2d, Linear))]
    return [(c, int(layer.bias)) for c, layer in zip((0, *hidden_channels(architecture)), layers, strict=True)]


def symmetrise(moment: Tensor, channels: int, bias: int, extra: int = 0) -> Tensor:
    """The average of ``P moment P^T`` over all permutations P of the input channels, in closed form.

    Args:
        moment: ``[channels * block + bias + extra, same]``, channels in blocks (a kernel's window, a feature map, one number).
        channels: 0 leaves the moment as it is.
        bias, extra: last rows and columns that no permutation moves.

    Returns:
        The same shape: every diagonal block is the mean diagonal block, every other block the mean of the others.
    """
    if not channels:
        return moment
    width = len(moment) - bias - extra
    block = width // channels
    core = moment[:width, :width].reshape(channels, block, channels, block)
    own = core.diagonal(dim1=0, dim2=2).mean(-1)  # [block, block]
    other = (core.sum((0, 2)) - channels * own) / max(channels * (channels - 1), 1)
    eye = torch.eye(channels, dtype=moment.dtype, device=moment.device)
    out = moment.clone()
    out[:width, :width] = torch.kron(eye, own) + torch.kron(1 - eye, other)
    edge = moment[:width, width:].reshape(channels, block, bias + extra).mean(0).repeat(channels, 1)
    out[:width, width:] = edge
    out[width:, :width] = edge.T
    return out


def root(moment: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """``C^(1/2), C^(-1/2)`` of ``C = moment + damping * mean eigenvalue * I``, in float64; ``[..., n, n]`` each."""
    scale = moment.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    value, vector = torch.linalg.eigh((moment + moment.mT) / 2)
    half = (value.clamp_min(0) + damping * scale).sqrt().unsqueeze(-2)
    return (vector * half) @ vector.mT, (vector / half) @ vector.mT


# -- which models and images, and what an error does ------------------------------------------------------------------------


def good_models(population: Population, models: int, seed: int) -> Tensor:
    """Rows of ``models`` models: drawn from the more accurate half where an accuracy is known, else evenly spread."""
    require(isinstance(models, int) and models >= 1, f"models: expected a positive integer, got {models!r}")
    k = len(population)
    for name in _ACCURACIES:
        if name not in population.properties:
            continue
        accuracy = population.column(name)
        order = accuracy.nan_to_num(-1.0).argsort(descending=True, stable=True)
        pool = order[: min(k, max(models, (k + 1) // 2))]
        pick = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))[:models]
        return pool[pick].sort().values
    return evenly_spread(k, models)


def evenly_spread(count: int, most: int) -> Tensor:
    """At most so many places of ``count``, from the first to the last, int64."""
    return torch.linspace(0, count - 1, min(most, count), dtype=torch.float32).round().long()


def spaced(images: Tensor, most: int) -> Tensor:
    """At most so many of the images, evenly spaced: a data set may be sorted by class."""
    return images[:: -(-len(images) // most) or 1]


def output_sensitivity(
    weights: Tensor, queries: Tensor, groups: TokenGroups, roots: list[tuple[Tensor, Tensor]], seed: int, noise: float = 0.1
) -> list[float]:
    """How much the networks' outputs move for a unit of squared error in each layer's metric, measured.

    Layers are not alike: the same error in a layer's output costs more where few channels carry the rest of the network. So each
    layer in turn gets random weight errors that are white in its metric, ``noise`` of its own size, and the outputs are compared.

    Args:
        weights: ``[k, P]`` of the models that run; queries ``[n, *input_shape]``, of which 128 are used.
        roots: ``C^(1/2), C^(-1/2)`` of every group, ``[n, n]`` each, or ``[k, n, n]``: one a model.

    Returns:
        For every group (all groups of a layer alike): relative change of the outputs (mean squared change over the variance of
        a model's outputs, the median over models), divided by the squared error summed over the layer's rows.
    """
    architecture, layout = groups.layout.architecture, groups.layout
    queries = queries[:128].to(weights.device, torch.float32)
    generator = torch.Generator().manual_seed(seed)
    tokens = layout.tokenize(weights).tokens
    factors: list[float] = []
    with torch.no_grad():
        before = engine.forward(weights, queries, architecture).double().flatten(2)
        power = before.var(1, unbiased=False).sum(1)
        for span in groups.spans:
            disturbed, total = torch.zeros_like(tokens), 0.0
            for c in range(span.chunks):
                place = (slice(None), slice(span.start + c, span.stop, span.chunks), slice(0, groups.sizes[span.first + c]))
                half, inverse = roots[span.first + c]
                rows = tokens[place].double() @ half
                size = rows.square().mean().sqrt() * noise
                error = torch.randn(rows.shape, generator=generator, dtype=torch.float64).to(rows.device) * size
                disturbed[place] = (error @ inverse).float()
                total += float(error.square().sum()) / len(weights)
            after = engine.forward(weights + layout.detokenize(disturbed), queries, architecture).double().flatten(2)
            change = (after - before).square().sum(2).mean(1) / power
            change = change[change.isfinite()]
            factors += [float(change.median()) / total if len(change) and total > 0 else 0.0] * span.chunks
    smallest = min((f for f in factors if f > 0), default=1.0)
    return [f if f > 0 else smallest for f in factors]  # a layer that does nothing here still has an order among its components
