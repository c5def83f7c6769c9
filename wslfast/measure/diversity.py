"""How different models are from one another, in weights and in behavior, and how new generated ones are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import engine
from ..architecture import Architecture
from ..errors import describe, require
from ..kernels.layers import layer_slots
from ..permutation import channel_norms, hidden_channels, permute
from ..zoo import Dataset
from .reconstruction import class_dtype

_BLOCK, _NUMBERS = 128, 1 << 26  # images whose distances [k, k] are in memory at a time, and numbers of these


def nearest(weights: Tensor, others: Tensor, *, block: int = 256) -> Tensor:
    """L2 distance ``[k]`` of each row of weights to the nearest row of ``others``."""
    others = others.double()
    return torch.cat([torch.cdist(part.double(), others).amin(1) for part in weights.split(block)])


def sorted_channels(weights: Tensor, architecture: Architecture) -> Tensor:
    """The same functions with every hidden layer's channels in the order of the norms of their incoming weights: ``[k, P] -> [k, P]``.

    A row norm does not change when a layer's inputs are permuted, so all permuted views of a model come out alike, and distances between
    rows are blind to permutations (an upper bound of the distance between the best views). Channels of a network that is no plain chain
    are in the order of the norms of all that belongs to them. A module that could not be traced stays as it is.
    """
    sizes = hidden_channels(architecture)
    if not sizes:
        return weights
    if not architecture.planned:
        return permute(weights, architecture, tuple(n.argsort(1) for n in channel_norms(weights, architecture)))
    slots = [layer.weight for layer in layer_slots(architecture.layers) if layer.weight is not None]
    norms = [
        weights[:, s.offset : s.stop].double().reshape(len(weights), s.shape[0], -1).norm(dim=2)[:, :c]
        for s, c in zip(slots, sizes, strict=False)  # the last layer's outputs are classes
    ]
    return permute(weights, architecture, tuple(n.argsort(1) for n in norms))


def answers(outputs: Tensor) -> Tensor:
    """Outputs ``[k, n, *out]`` as ``[k, m, K]``: the last axis holds the numbers that are compared, an answer with more axes counts as
    several, one without any as a single number."""
    return outputs.unsqueeze(-1) if outputs.ndim == 2 else outputs.flatten(1, -2)


def labels_of(data: Dataset, split: str, architecture: Architecture) -> Tensor | None:
    """Labels of a split's images; None where there are no classes, or an answer is not one of classes."""
    return data.split(split)[1] if data.classes > 0 and len(architecture.output_shape) == 1 else None


def outputs_of(weights: Tensor, images: Tensor, architecture: Architecture) -> Tensor:
    """Raw outputs ``[k, n, *out]`` of every model on every image, a block of images at a time, on the weights' device."""
    with torch.no_grad():
        return torch.cat([engine.forward(weights, part.to(weights.device), architecture) for part in images.split(1024)], 1)


def classes_of(weights: Tensor, images: Tensor, architecture: Architecture) -> Tensor:
    """The class that every model chooses on every image, ``[k, n]`` (for every part of an answer that has several); -1 where an output is
    not finite."""
    with torch.no_grad():
        parts = [answers(engine.forward(weights, part.to(weights.device), architecture)) for part in images.split(256)]
    chosen = [torch.where(o.isfinite().all(-1), o.argmax(-1), -1).to(class_dtype(architecture.num_classes)) for o in parts]
    return torch.cat(chosen, 1)


def accuracy(outputs: Tensor, labels: Tensor | None) -> Tensor:
    """Share of images classified right, ``[k]`` float64; a model with any output that is not finite has none. NaN without labels."""
    if labels is None:
        return torch.full((len(outputs),), float("nan"), dtype=torch.float64, device=outputs.device)
    right = (outputs.argmax(-1) == labels.to(outputs.device)).double().mean(1)
    return torch.where(outputs.isfinite().all(-1).all(-1), right, 0.0)


def accuracy_of_classes(classes: Tensor, labels: Tensor) -> Tensor:
    """Share of images for which ``classes [k, n]`` of :func:`classes_of` are the labels ``[n]``; ``[k]`` float64 on the CPU."""
    return (classes == labels.to(classes.device)).double().mean(1).cpu()


@dataclass(frozen=True, eq=False)
class Diversity:
    """Every pair of models of a set, once, ``[k (k - 1) / 2]`` float64 each.

    Attributes:
        structural: L2 distance of weights.
        behavioral: L2 distance of raw outputs, averaged over images (the published ``l2_preds``).
        disagreement: share of images on which the two choose different classes.
    """

    structural: Tensor
    behavioral: Tensor
    disagreement: Tensor


def diversity(weights: Tensor, outputs: Tensor) -> Diversity:
    """Pairwise distances of models ``weights [k, P]`` whose outputs on shared images are ``outputs [k, n, K]``."""
    require(
        outputs.ndim == 3 and len(outputs) == len(weights) and len(weights) >= 2,
        f"outputs: expected [{len(weights)}, n, K] of at least two models, got {describe(outputs)}",
    )
    k = len(weights)
    rows, columns = torch.triu_indices(k, k, 1, device=weights.device)
    classes = outputs.argmax(-1)
    far = torch.zeros(k, k, dtype=torch.float64, device=weights.device)
    for part in outputs.split(min(_BLOCK, max(1, _NUMBERS // k**2)), 1):
        by_image = part.transpose(0, 1).double()
        far += torch.cdist(by_image, by_image, compute_mode="donot_use_mm_for_euclid_dist").sum(0)
    differ = (classes[rows] != classes[columns]).double().mean(1)
    return Diversity(torch.pdist(weights.double()), far[rows, columns] / outputs.shape[1], differ)


def behavioral_novelty(classes: Tensor, others: Tensor) -> Tensor:
    """Share of images ``[k]`` on which each model's ``classes [k, n]`` differ from those of the model among ``others [m, n]`` that it
    agrees with most. Blind to permutations of channels, which distance in weights is not."""
    n = classes.shape[1]
    same = torch.zeros(len(classes), len(others), dtype=torch.float32, device=classes.device)
    for c in classes.unique().tolist():  # images of which both say c; counts are exact in float32
        same += (classes == c).float() @ (others == c).float().T
    return 1 - same.amax(1).double() / n


def matched_rows(wanted: Tensor, available: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct rows of ``available [m]`` whose values match ``wanted [k]`` as closely as they can, in total absolute difference.

    For one number per row, the best assignment keeps the order of both, so a dynamic program over the sorted values finds it.

    Returns:
        Rows of ``wanted`` (all, or an even sub-sample where there are more than m) and their partners in ``available``.
    """
    w_order, a_order = wanted.double().argsort(stable=True), available.double().argsort(stable=True)
    if len(w_order) > len(a_order):
        keep = ((2 * torch.arange(len(a_order)) + 1) * len(w_order)) // (2 * len(a_order))
        w_order = w_order[keep.to(w_order.device)]
    w, a = wanted.double()[w_order].cpu(), available.double()[a_order].cpu()
    k, m = len(w), len(a)
    cost = torch.zeros(m + 1, dtype=torch.float64)  # of the first i wanted within the first j available
    took = torch.zeros(k, m + 1, dtype=torch.bool)
    for i in range(k):
        use = torch.full((m + 1,), float("inf"), dtype=torch.float64)
        use[1:] = cost[:-1] + (w[i] - a).abs()
        use[: i + 1] = float("inf")
        best, at = use.cummin(0)
        took[i] = at == torch.arange(m + 1)
        cost = best
    partners, j = [0] * k, m
    for i in reversed(range(k)):
        while not took[i, j]:
            j -= 1
        j -= 1
        partners[i] = j
    return w_order, a_order[torch.tensor(partners, dtype=torch.long, device=a_order.device)]
