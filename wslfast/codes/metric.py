"""Second moments of what enters each layer: the metric in which a weight error is an output error.

Hidden channels have no order, so the moments are averaged over every permutation of a layer's input channels, in closed form.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import engine
from ..architecture import Architecture
from ..errors import describe, require
from ..kernels.layers import Conv2d, Layer, Linear, layer_slots
from ..kernels.reference import forward_one
from ..permutation import hidden_channels
from ..population import Population
from .groups import TokenGroups

_ACCURACIES = ("test_acc", "val_acc", "train_acc")


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
    return torch.linspace(0, k - 1, min(models, k)).round().long()


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


def hidden_inputs(architecture: Architecture) -> list[tuple[int, int]]:
    """Of every convolution and linear layer: its permutable input channels (0 for images and beside grouped convolutions), and
    the entries of its row that are not inputs (1 with a bias, else 0)."""
    layers = [layer for layer in architecture.layers if isinstance(layer, (Conv2d, Linear))]
    return [(c, int(layer.bias)) for c, layer in zip((0, *hidden_channels(architecture)), layers, strict=True)]


def _one_model(row: Tensor, queries: Tensor, architecture: Architecture, chunk: int, first: Tensor | None) -> list[Tensor]:
    totals: list[Tensor] = []
    for images in queries.split(chunk):
        x, index = images, 0
        for layer, slots in zip(architecture.layers, layer_slots(architecture.layers), strict=True):
            if slots.weight is not None:
                if index or first is None:
                    moment = _moment(x, layer) * (len(images) / len(queries))
                    if index < len(totals):
                        totals[index] += moment
                    else:
                        totals.append(moment)
                elif not totals:
                    totals.append(first)
                index += 1
            stop = slots.weight.offset if slots.weight is not None else 0
            end = stop if slots.weight is None else (slots.bias or slots.weight).stop
            x = forward_one(row[stop:end], x, (layer,))
    return totals


def _moment(x: Tensor, layer: Layer) -> Tensor:
    """``[width, width]`` float64 of one batch of inputs."""
    if isinstance(layer, Conv2d):
        patches = F.unfold(x, layer.kernel_size, layer.spacing, layer.padding, layer.stride)  # [n, C * kh * kw, positions]
        patches = patches.unflatten(1, (layer.groups, -1))  # a row of a grouped convolution sees its own group's channels
        rows = patches.permute(0, 1, 3, 2).flatten(0, 2)
    else:
        assert isinstance(layer, Linear)
        rows = x
    if layer.bias:
        rows = F.pad(rows, (0, 1), value=1.0)
    return (rows.T @ rows).double() / len(rows)


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


def spaced(images: Tensor, most: int) -> Tensor:
    """At most so many of the images, evenly spaced: a data set may be sorted by class."""
    return images[:: -(-len(images) // most) or 1]


def root(moment: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """``C^(1/2), C^(-1/2)`` of ``C = moment + damping * mean eigenvalue * I``, in float64; ``[..., n, n]`` each."""
    scale = moment.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    value, vector = torch.linalg.eigh((moment + moment.mT) / 2)
    half = (value.clamp_min(0) + damping * scale).sqrt().unsqueeze(-2)
    return (vector * half) @ vector.mT, (vector / half) @ vector.mT


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
        before = engine.forward(weights, queries, architecture).double()
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
            after = engine.forward(weights + layout.detokenize(disturbed), queries, architecture).double()
            change = (after - before).square().sum(2).mean(1) / power
            change = change[change.isfinite()]
            factors += [float(change.median()) / total if len(change) and total > 0 else 0.0] * span.chunks
    smallest = min((f for f in factors if f > 0), default=1.0)
    return [f if f > 0 else smallest for f in factors]  # a layer that does nothing here still has an order among its components
