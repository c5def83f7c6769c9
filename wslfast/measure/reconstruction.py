"""How well reconstructed models do what their originals did: per model, and never best-of.

Agreement alone can be had by collapse: a decoder that returns one good network agrees with everybody. So each
reconstruction is also held against the originals of *other* models, and what counts is the margin between the two
(:func:`collapse` says in words when there is none).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Union

import torch
from torch import Tensor

from ..architecture import Architecture
from ..behavior import batched_forward
from ..errors import WslfastError, check_positive, describe, require
from ..kernels.criteria import criterion_values

Groups = Union[Sequence[Hashable], Tensor]

_IMAGES = 1024  # queries per forward: bounds the activations, whatever the test set's size
_GAPS = ("behavior_mse", "output_l2", "softmax_l2")  # distances between outputs, in the order of _behavior
_SPREAD = ("mean", "median", "std", "p20", "p80")
COLLAPSE = 0.01  # a mean margin below this is none


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """Originals against their reconstructions, one value per model (``[k]`` float64 on the CPU; NaN where undefined).

    A *non-finite* reconstruction (a weight, or an output on any image, is NaN or infinite) is wrong on every image and
    agrees with nobody: accuracy, agreement, agreement_others and identified are 0; distances are NaN. Where the *original*
    is non-finite there is nothing to reconstruct: all of that model's values are NaN, and it is nobody's "other".

    Attributes:
        accuracy_original, accuracy_reconstructed: share of images classified right, 0 to 1. The class is the argmax; the
            lowest index wins a tie.
        accuracy_change: reconstructed minus original.
        agreement: share of images on which reconstruction and own original choose the same class.
        agreement_others: the same against the originals of other models, averaged over them; NaN without others.
        agreement_margin: agreement - agreement_others; about 0 when reconstructions have collapsed to one model.
        identified: 1 where the best-matching original is the own one or of the own group, else 0; of several that match
            equally well, the share that is. Averages 1 / number of groups by chance, and under collapse. NaN without others.
        l2_masked: L2 distance in weights, over real weights only (token padding has no place in ``[k, P]``).
        l2_relative: l2_masked / L2 norm of the original.
        explained_variance: 1 - squared distance / the originals' mean squared distance from their mean, so that the mean over
            models is the share of the population's variance kept; NaN if the originals do not vary.
        behavior_mse: 1/(2n) sum_i ||f_rec(x_i) - f_orig(x_i)||^2 on raw outputs (arXiv 2503.17138, L_B of one model).
        output_l2: 1/n sum_i ||f_rec(x_i) - f_orig(x_i)||, on raw outputs.
        softmax_l2: the same on softmax outputs, of each part of an answer, 0 to sqrt(2) (the published comparison's first figure).
        psnr: peak signal-to-noise ratio of the outputs in decibels, 10 log10(peak^2 / mean squared difference), infinite for equal ones;
            None for networks whose answers are classes. Agreement is undefined where an answer is one number; *identified* is then
            judged by the distance between outputs.
        images: n, images that everything was measured on.
        non_finite: models whose reconstruction is non-finite.
        non_finite_original: models left out because their original is.
    """

    accuracy_original: Tensor
    accuracy_reconstructed: Tensor
    accuracy_change: Tensor
    agreement: Tensor
    agreement_others: Tensor
    agreement_margin: Tensor
    identified: Tensor
    l2_masked: Tensor
    l2_relative: Tensor
    explained_variance: Tensor
    behavior_mse: Tensor
    output_l2: Tensor
    softmax_l2: Tensor
    images: int
    non_finite: int
    non_finite_original: int
    psnr: Tensor | None = None

    def __len__(self) -> int:
        return len(self.agreement)

    def metrics(self) -> dict[str, Tensor]:
        """The per-model values by name, ``[k]`` each."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def summary(self) -> dict[str, Any]:
        """JSON-able figures over models. Flat keys are means, except ``accuracy_change`` and ``accuracy_change_abs``: medians
        of the per-model signed and absolute change. ``spread`` holds mean, median, std and the 20th and 80th percentile of
        every metric. Undefined values are left out; what has none is None. No best-of anywhere."""
        spread = {name: spread_of(values) for name, values in self.metrics().items()}
        flat = {name: figures["mean"] for name, figures in spread.items()}
        flat["accuracy_change"] = spread["accuracy_change"]["median"]
        flat["accuracy_change_abs"] = spread_of(self.accuracy_change.abs())["median"]
        counts = {"n_models": len(self), "n_images": self.images, "non_finite": self.non_finite}
        return {**flat, **counts, "non_finite_original": self.non_finite_original, "spread": spread}


def compare(
    original: Tensor,
    reconstructed: Tensor,
    images: Tensor,
    labels: Tensor | None,
    architecture: Architecture,
    *,
    groups: Groups | None = None,
    targets: Tensor | None = None,
    block: int = 256,
    backend: str = "auto",
    peak: float | None = None,
) -> Reconstruction:
    """Measure reconstructions against their originals on labelled images, or on any queries.

    Args:
        original, reconstructed: weights ``[k, P]``, row by row the same models; may hold NaN (see :class:`Reconstruction`).
        images: ``[n, *architecture.input_shape]``, on the weights' device.
        labels: ``[n]`` integers in 0 .. K-1; None where answers are no classes, whose ``psnr`` is then measured.
        architecture: what every model is.
        groups: k model ids (integers or strings). Rows with equal ids are one model at several epochs: never "others" of
            each other. Default: every row its own model.
        targets: ``[k, n, K]`` outputs of the originals on these images, where they are known; saves running them.
        block: models run, and compared with one another, at a time. Memory grows with ``block * n``, time with ``k^2 n K``.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.
        peak: range of the outputs, for ``psnr``; default: that of the originals' on these queries.

    Raises:
        WslfastError: naming the argument, what was expected and what came.
    """
    original, reconstructed = _check_weights(original, reconstructed, architecture)
    some = isinstance(images, Tensor) and images.ndim > 0 and len(images) > 0
    require(some, f"images: expected [n, ...] with n >= 1, got {describe(images)}")
    require(peak is None or (isinstance(peak, (int, float)) and 0 < peak < math.inf), f"peak: expected a positive number, got {peak!r}")
    labels = None if labels is None else _check_labels(images, labels, architecture)
    _check_targets(targets, (len(original), len(images), *architecture.output_shape), original.device)
    check_positive("block", block)
    ids = _group_ids(groups, len(original)).to(original.device)
    # a surrounding autocast would blur the very differences that are measured
    with torch.no_grad(), torch.autocast(original.device.type, enabled=False):
        runs = [
            _behavior(original[b], reconstructed[b], images, None if targets is None else targets[b], architecture, backend)
            for b in _blocks(len(original), block)
        ]
        classes_o, classes_r, finite_o, finite_r, gaps, extremes = (torch.cat(parts) for parts in zip(*runs))
        agreement, others, identified = _agreement(classes_o, classes_r, ids, finite_o, architecture.num_classes, block)
        l2, norm, energy = _distances(original, reconstructed, finite_o, block)
        nan = torch.full_like(l2, float("nan"))
        accuracy_o = accuracy_r = nan
        if labels is not None:
            accuracy_o, accuracy_r = ((classes == labels).double().mean(1) for classes in (classes_o, classes_r))
        if architecture.num_classes == 1:  # one number has no class
            agreement = others = nan
            identified = _nearest_outputs(original, reconstructed, images, architecture, backend, ids, finite_o, block)
    l2, gaps = torch.where(finite_r, l2, nan), torch.where(finite_r.unsqueeze(1), gaps, nan.unsqueeze(1))
    values = {
        "accuracy_original": accuracy_o,
        "accuracy_reconstructed": accuracy_r,
        "accuracy_change": accuracy_r - accuracy_o,
        "agreement": agreement,
        "agreement_others": others,
        "agreement_margin": agreement - others,
        "identified": identified,
        "l2_masked": l2,
        "l2_relative": torch.where(norm > 0, l2 / norm, nan),
        "explained_variance": 1 - l2.square() / energy if energy > 0 else nan,
        **dict(zip(_GAPS, gaps.unbind(1))),
    }
    if labels is None:
        values["psnr"] = _psnr(values["behavior_mse"], math.prod(architecture.output_shape), extremes[finite_o], peak)
    return Reconstruction(
        **{name: torch.where(finite_o, value, nan).cpu() for name, value in values.items()},
        images=len(images),
        non_finite=int((finite_o & ~finite_r).sum()),
        non_finite_original=int((~finite_o).sum()),
    )


def collapse(margin: float | None) -> str:
    """What to say of a mean ``agreement_margin`` below :data:`COLLAPSE`; nothing of a larger one, or of none."""
    if margin is None or not margin < COLLAPSE:
        return ""
    return "collapse: agrees with other models' originals as much as with its own"


def class_dtype(classes: int) -> torch.dtype:
    """The least integers that hold so many classes, and negative marks beside them: a model of language has more than two bytes count."""
    return torch.int16 if classes <= 32_768 else torch.int32


def _blocks(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def _behavior(
    original: Tensor, reconstructed: Tensor, images: Tensor, targets: Tensor | None, architecture: Architecture, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Classes chosen ``[b, n]`` by originals and reconstructions, which of each are finite ``[b]``, ``_GAPS`` ``[b, 3]``, and the least
    and greatest output of each original ``[b, 2]``.

    The classes of a non-finite model are -1 (original) and -2 (reconstruction): right nowhere, equal to nobody's.
    """
    finite_o, finite_r = original.isfinite().all(1), reconstructed.isfinite().all(1)
    gaps = torch.zeros(len(original), len(_GAPS), dtype=torch.float64, device=original.device)
    classes: tuple[list[Tensor], list[Tensor]] = ([], [])
    ends: list[Tensor] = []
    for part in _blocks(len(images), _IMAGES):
        if targets is None:
            outputs_o = batched_forward(original, images[part], architecture, backend=backend)
        else:
            outputs_o = targets[:, part]
        outputs_r = batched_forward(reconstructed, images[part], architecture, backend=backend)
        share = outputs_o.shape[1] / len(images)
        outputs_o, outputs_r = outputs_o.flatten(2), outputs_r.flatten(2)  # all numbers of one answer
        finite_o &= outputs_o.isfinite().all(-1).all(-1)
        finite_r &= outputs_r.isfinite().all(-1).all(-1)
        o, r = outputs_o.double(), outputs_r.double()
        ends.append(torch.stack(o.flatten(1).aminmax(dim=1), 1))
        shares = [x.unflatten(2, (-1, architecture.num_classes)).softmax(-1).flatten(1, 2) for x in (o, r)]  # of each part of an answer
        far = [(a - b).norm(dim=-1).mean(1) for a, b in ((o, r), shares)]
        gaps += torch.stack([criterion_values(r, o, "mse"), *far], 1) * share
        for chosen, outputs in zip(classes, (outputs_o, outputs_r)):
            outputs = outputs.unflatten(2, (-1, architecture.num_classes)).flatten(1, 2)  # an answer of several parts is several
            chosen.append(outputs.argmax(-1).to(class_dtype(architecture.num_classes)))
    classes_o = torch.cat(classes[0], 1).masked_fill_(~finite_o.unsqueeze(1), -1)
    classes_r = torch.cat(classes[1], 1).masked_fill_(~finite_r.unsqueeze(1), -2)
    extremes = torch.stack([torch.stack(ends).amin(0)[:, 0], torch.stack(ends).amax(0)[:, 1]], 1)
    return classes_o, classes_r, finite_o, finite_r, gaps, extremes


def _psnr(behavior_mse: Tensor, numbers: int, extremes: Tensor, peak: float | None) -> Tensor:
    """Of each model, from half its mean squared distance of answers of so many numbers."""
    span = float(extremes[:, 1].max() - extremes[:, 0].min()) if peak is None and len(extremes) else float(peak or 0.0)
    return 10 * torch.log10(span**2 / (2 * behavior_mse / numbers)) if span > 0 else torch.full_like(behavior_mse, float("nan"))


def _nearest_outputs(
    original: Tensor,
    reconstructed: Tensor,
    images: Tensor,
    architecture: Architecture,
    backend: str,
    ids: Tensor,
    finite_o: Tensor,
    block: int,
) -> Tensor:
    """1 where a reconstruction's outputs are nearest to those of the own original or of its group, else 0, ``[k]``; NaN without others."""
    far = torch.zeros(len(original), len(original), dtype=torch.float64, device=original.device)
    for part in _blocks(len(images), _IMAGES):
        o, r = (
            torch.cat([batched_forward(rows[b], images[part], architecture, backend=backend) for b in _blocks(len(rows), block)]).double()
            for rows in (original, reconstructed)
        )
        far += torch.cdist(r.flatten(1), o.flatten(1)).square()
    far = far.masked_fill(~finite_o, float("inf"))
    same_group = ids.unsqueeze(1) == ids
    nearest = same_group.gather(1, far.nan_to_num(float("inf")).argmin(1, keepdim=True)).squeeze(1).double()
    nearest = torch.where(far.isfinite().any(1) & reconstructed.isfinite().all(1), nearest, 0.0)
    return torch.where((~same_group & finite_o).any(1), nearest, float("nan"))


def _agreement(
    classes_o: Tensor, classes_r: Tensor, ids: Tensor, finite_o: Tensor, num_classes: int, block: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Agreement with the own original, mean agreement with others, and identification, ``[k]`` each in float64."""
    k, n = classes_o.shape
    columns = []
    for rows in _blocks(k, block):
        matches = torch.cat([_matches(classes_r[rows], classes_o[b], num_classes) for b in _blocks(k, block)], 1)  # [b, k]
        own_group = (ids[rows].unsqueeze(1) == ids) & finite_o
        other = ~own_group & finite_o
        count = other.sum(1)
        own_agreement = (classes_r[rows] == classes_o[rows]).double().mean(1)
        others = (matches * other).sum(1) / (count * n)  # 0 / 0 = NaN without others, as it should be
        best = (matches == matches.masked_fill(~finite_o, -1).amax(1, keepdim=True)) & finite_o
        identified = (best & own_group).sum(1).double() / best.sum(1)
        identified = torch.where(matches.amax(1) > 0, identified, 0.0)  # what agrees with nobody is not identified by a tie at 0
        columns.append((own_agreement, others, torch.where(count > 0, identified, torch.full_like(identified, float("nan")))))
    own_agreement, others, identified = (torch.cat(parts) for parts in zip(*columns))
    return own_agreement, others, identified


def _matches(a: Tensor, b: Tensor, num_classes: int) -> Tensor:
    """Images on which each row of ``a [i, n]`` and of ``b [j, n]`` chose the same class: ``[i, j]`` float64.

    One matrix product of indicators a class, as a comparison of all pairs would hold ``[i, j, n]``. Zeros and ones are
    exact in any matmul precision, their fp32 sums up to 2^24 images.
    """
    total = torch.zeros(len(a), len(b), dtype=torch.float64, device=a.device)
    for c in range(num_classes):
        total += (a == c).float() @ (b == c).float().T
    return total


def _distances(original: Tensor, reconstructed: Tensor, finite_o: Tensor, block: int) -> tuple[Tensor, Tensor, float]:
    """L2 distance ``[k]``, the originals' norms ``[k]``, and their mean squared distance from their mean, in float64."""
    count = max(int(finite_o.sum()), 1)
    norm, l2 = (torch.empty(len(original), dtype=torch.float64, device=original.device) for _ in range(2))
    total = torch.zeros(original.shape[1], dtype=torch.float64, device=original.device)
    for b in _blocks(len(original), block):  # float64 a block at a time: a copy of everything would cost three populations
        rows = original[b].double()
        norm[b], l2[b] = rows.norm(dim=1), (reconstructed[b] - rows).norm(dim=1)
        total += rows[finite_o[b]].sum(0)
    mean = total / count
    energy = sum(float((original[b][finite_o[b]] - mean).square().sum()) for b in _blocks(len(original), block)) / count
    return l2, norm, energy


def spread_of(values: Tensor) -> dict[str, float | None]:
    """Mean, median, std (of a sample; None for one value) and 20th and 80th percentile of the values that are defined."""
    finite = values[values.isfinite()]
    if len(finite) == 0:
        return dict.fromkeys(_SPREAD)
    low, middle, high = torch.quantile(finite, torch.tensor([0.2, 0.5, 0.8], dtype=finite.dtype)).tolist()
    std = float(finite.std()) if len(finite) > 1 else None
    return dict(zip(_SPREAD, (float(finite.mean()), middle, std, low, high)))


# -- validation --------------------------------------------------------------------------------------------------------


def _check_weights(original: Any, reconstructed: Any, architecture: Any) -> tuple[Tensor, Tensor]:
    require(isinstance(architecture, Architecture), f"architecture: expected an Architecture, got {describe(architecture)}")
    p = architecture.num_weights
    for argument, value in (("original", original), ("reconstructed", reconstructed)):
        require(
            isinstance(value, Tensor) and value.ndim == 2 and value.shape[1] == p and len(value) > 0 and value.is_floating_point(),
            f"{argument}: expected floating [k, {p}] with k >= 1 for architecture {architecture.name!r}, got {describe(value)}",
        )
    k = len(original)
    require(len(reconstructed) == k, f"reconstructed: expected {k} models (as many as original), got {len(reconstructed)}")
    require(original.device == reconstructed.device, f"reconstructed: expected device {original.device}, got {reconstructed.device}")
    return original.detach(), reconstructed.detach()


def _check_labels(images: Any, labels: Any, architecture: Architecture) -> Tensor:
    require(
        isinstance(labels, Tensor) and labels.shape == (len(images),) and not labels.is_floating_point() and not labels.is_complex(),
        f"labels: expected integers [{len(images)}] (one per image), got {describe(labels)}",
    )
    shape = architecture.output_shape
    several = f"labels: expected None, as an answer has several parts {list(shape[:-1])}, each a class of its own; got {describe(labels)}"
    require(math.prod(shape) == architecture.num_classes, several)
    low, high = int(labels.min()), int(labels.max())
    top = architecture.num_classes - 1
    require(low >= 0 and high <= top, f"labels: expected 0 to {top}, got {low} to {high}")
    return labels.to(images.device)


def _check_targets(targets: Any, shape: tuple[int, ...], device: torch.device) -> None:
    if targets is not None:
        fits = isinstance(targets, Tensor) and targets.is_floating_point() and tuple(targets.shape) == shape
        require(fits, f"targets: expected floating {list(shape)} (models, images, classes), got {describe(targets)}")
        require(targets.device == device, f"targets: expected device {device}, got {targets.device}")


def _group_ids(groups: Groups | None, k: int) -> Tensor:
    if groups is None:
        return torch.arange(k)
    values = groups.flatten().tolist() if isinstance(groups, Tensor) else list(groups)
    require(len(values) == k, f"groups: expected {k} model ids (one per row), got {len(values)}")
    missing = [j for j, v in enumerate(values) if v is None or (isinstance(v, float) and math.isnan(v))]
    require(not missing, f"groups: rows {missing[:10]} have no model id")
    first: dict[Hashable, int] = {}
    try:
        return torch.tensor([first.setdefault(v, len(first)) for v in values])
    except TypeError:
        raise WslfastError(f"groups: expected integers or strings, got {describe(values[0])}") from None
