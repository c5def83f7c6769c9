"""What a representation knows about its models: a linear probe, and the baseline features it has to beat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Union

import torch
from torch import Tensor

from ..architecture import Architecture
from ..errors import describe, require

PENALTIES = (1e3, 3e2, 1e2, 3e1, 1e1, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5)
_QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
_ELEMENTS = 1 << 23  # numbers sorted at a time

Target = Union[Tensor, Sequence[float]]


@dataclass(frozen=True, eq=False)
class RidgeProbe:
    """Linear regression with an L2 penalty, in closed form and float64, as the published evaluation does it: features are not
    scaled, and a column of ones is appended that is penalised like any other.

    Attributes:
        coefficients: ``[d + 1]``, the last one the intercept.
        penalty: lambda, chosen from ``PENALTIES`` (17 values) by R2 on validation data; the larger of equals.
    """

    coefficients: Tensor
    penalty: float

    @classmethod
    def fit(
        cls,
        features: Tensor,
        target: Target,
        *,
        validation: tuple[Tensor, Target] | None = None,
        penalties: Sequence[float] = PENALTIES,
    ) -> RidgeProbe:
        """Fit on ``features [m, d]`` and ``target [m]``; models whose target is NaN are dropped.

        Args:
            validation: features and target that choose the penalty; training data do where there is none.
            penalties: positive candidates, preferred in this order where they do equally well.

        Raises:
            WslfastError: wrong shapes, non-finite features, an infinite target, or nothing left to fit on.
        """
        positive = len(penalties) > 0 and all(0 < p < float("inf") for p in penalties)
        require(positive, f"penalties: expected positive numbers, got {penalties!r}")
        x, y = _clean(features, target, "features")
        require(len(y) > 0, "target: expected at least one value that is not NaN")
        judge_x, judge_y = (x, y) if validation is None else _clean(*validation, "validation")
        width = f"validation: expected [m, {x.shape[1] - 1}] features, got [{len(judge_x)}, {judge_x.shape[1] - 1}]"
        require(judge_x.shape[1] == x.shape[1], width)
        if len(judge_y) == 0:
            judge_x, judge_y = x, y
        # one decomposition serves all penalties: w = V diag(s / (s^2 + lambda)) U^T y
        u, s, vh = torch.linalg.svd(x, full_matrices=False)
        lam = torch.tensor(list(penalties), dtype=torch.float64, device=x.device)
        shrunk = s.unsqueeze(1) / (s.square().unsqueeze(1) + lam) * (u.T @ y).unsqueeze(1)  # [rank, penalties]
        candidates = vh.T @ shrunk  # [d + 1, penalties]
        # R2 falls with the squared error and is undefined for a constant target; the error never is
        error = (judge_x @ candidates - judge_y.unsqueeze(1)).square().mean(0)
        best = int(error.argmin())
        return cls(candidates[:, best].clone(), float(penalties[best]))

    def predict(self, features: Tensor) -> Tensor:
        """``[m, d] -> [m]`` float64."""
        x = _design(features, "features")
        require(x.shape[1] == len(self.coefficients), f"features: expected [m, {len(self.coefficients) - 1}], got {describe(features)}")
        return x @ self.coefficients.to(x.device)

    def r2(self, features: Tensor, target: Target) -> float:
        """1 - mean squared error / variance of this target; NaN targets dropped. NaN if nothing is left or it is constant."""
        x, y = _clean(features, target, "features")
        if len(y) == 0 or bool((y == y[0]).all()):  # equal numbers have a variance of 1e-34, as their mean is rounded
            return float("nan")
        return 1 - float((self.predict(x[:, :-1]) - y).square().mean()) / float(y.var(unbiased=False))


def probe(
    features: Mapping[str, Tensor], targets: Mapping[str, Target], *, train: str = "train", validation: str = "val"
) -> dict[str, float]:
    """R2 of a ridge probe on every split, fitted on ``train``, its penalty chosen on ``validation`` where that is a split.

    Args:
        features: ``{split: [m, d]}``, e.g. the mean of each model's latent tokens.
        targets: ``{split: [m]}`` of the same splits; NaN for models without the property.

    Returns:
        ``{split: R2}``, in the order of ``features``.
    """
    require(set(features) == set(targets), f"targets: expected splits {sorted(features)} (as in features), got {sorted(targets)}")
    require(train in features, f"features: expected a split {train!r}, got {sorted(features)}")
    judge = (features[validation], targets[validation]) if validation in features else None
    fitted = RidgeProbe.fit(features[train], targets[train], validation=judge)
    return {split: fitted.r2(features[split], targets[split]) for split in features}


def weight_statistics(weights: Tensor, architecture: Architecture) -> Tensor:
    """Mean, standard deviation and 0, 25, 50, 75, 100 % quantiles of every parameter tensor (Unterthiner et al. 2020).

    Args:
        weights: ``[k, P]``.

    Returns:
        ``[k, 7 * number of parameter tensors]`` float64, in state-dict order, seven a tensor.
    """
    require(isinstance(architecture, Architecture), f"architecture: expected an Architecture, got {describe(architecture)}")
    p = architecture.num_weights
    require(
        isinstance(weights, Tensor) and weights.ndim == 2 and weights.shape[1] == p and weights.is_floating_point(),
        f"weights: expected floating [k, {p}] for architecture {architecture.name!r}, got {describe(weights)}",
    )
    weights = weights.detach()
    columns = [_statistics(weights[:, s.offset : s.stop]) for s in architecture.parameters]
    return torch.cat(columns, 1)


def behavior_statistics(outputs: Tensor, consensus: Tensor) -> Tensor:
    """What networks' answers on *unlabelled* images say of them, a few numbers per network.

    Labels do not enter: how sure a network is, and how far it answers as the others do, tell its accuracy nearly as well. Where the outputs
    are those of networks decoded from latents, these are features of the latents, read through their decoder.

    Args:
        outputs: raw outputs ``[k, n, K]`` of k networks on n images (:func:`wslfast.batched_forward`); numbers that are not finite count
            as 0, an answer without a preference.
        consensus: class probabilities ``[n, K]`` that the answers are held against, as of :func:`consensus_of` the training models.

    Returns:
        ``[k, K + 6]`` float64: mean probability of each class; mean and standard deviation (over images) of the largest one; mean entropy,
        nats; share of images on which the class is the consensus's; cross-entropy to the consensus, nats, at most 20; logarithm of the mean
        square of the outputs.
    """
    require(
        isinstance(outputs, Tensor) and outputs.ndim == 3 and outputs.is_floating_point() and outputs.shape[1] > 0,
        f"outputs: expected floating [k, n, K], got {describe(outputs)}",
    )
    fits = isinstance(consensus, Tensor) and consensus.shape == outputs.shape[1:] and consensus.is_floating_point()
    require(fits, f"consensus: expected floating {list(outputs.shape[1:])} (one row per image), got {describe(consensus)}")
    consensus = consensus.detach().to(outputs.device, torch.float64)
    rows = max(1, _ELEMENTS // outputs[0].numel()) if len(outputs) else 1
    return torch.cat([_answers(part, consensus) for part in outputs.detach().split(rows)])


def consensus_of(outputs: Tensor) -> Tensor:
    """Mean class probabilities ``[n, K]`` float64 of networks with raw outputs ``[k, n, K]``."""
    require(isinstance(outputs, Tensor) and outputs.ndim == 3 and len(outputs) > 0, f"outputs: expected [k, n, K], got {describe(outputs)}")
    total = outputs.new_zeros(outputs.shape[1:], dtype=torch.float64)
    for part in outputs.detach().split(max(1, _ELEMENTS // max(1, outputs[0].numel()))):
        total += _finite(part).softmax(-1).sum(0)
    return total / len(outputs)


def _finite(outputs: Tensor) -> Tensor:
    return torch.where(outputs.isfinite(), outputs.double(), 0.0)


def _answers(outputs: Tensor, consensus: Tensor) -> Tensor:
    outputs = _finite(outputs)
    log_p = outputs.log_softmax(-1)
    p = log_p.exp()
    largest, chosen = p.max(-1)
    alone = [
        largest.mean(1),
        largest.std(1, unbiased=False),
        -(p * log_p).sum(-1).mean(1),
        (chosen == consensus.argmax(-1)).double().mean(1),
        (-(consensus * log_p).sum(-1).mean(1)).clamp_max(20),
        outputs.square().mean((1, 2)).clamp_min(1e-12).log(),
    ]
    return torch.cat([p.mean(1), torch.stack(alone, 1)], 1)


def _statistics(values: Tensor) -> Tensor:
    """``[k, size] -> [k, 7]``; sorted here, as ``torch.quantile`` refuses more than 2^24 numbers."""
    size = values.shape[1]
    place = torch.tensor(_QUANTILES, dtype=torch.float64, device=values.device) * (size - 1)
    below, above = place.floor().long(), place.ceil().long()
    pieces = []
    for rows in values.split(max(1, _ELEMENTS // size)):
        rows = rows.double()
        ordered = rows.sort(1).values
        low, high = ordered[:, below], ordered[:, above]
        quantiles = low + (high - low) * (place - below)
        moments = torch.stack([rows.mean(1), rows.std(1, unbiased=False)], 1)
        pieces.append(torch.cat([moments, quantiles], 1))
    return torch.cat(pieces)


def _design(features: Any, argument: str) -> Tensor:
    """Features in float64 with the column of ones."""
    require(
        isinstance(features, Tensor) and features.ndim == 2 and not features.is_complex(),
        f"{argument}: expected [m, d] features, got {describe(features)}",
    )
    x = features.detach().double()
    bad = (~x.isfinite().all(1)).nonzero().flatten().tolist()
    require(not bad, f"{argument}: models {bad[:10]} of {len(x)} have non-finite features; leave them out")
    return torch.cat([x, x.new_ones(len(x), 1)], 1)


def _clean(features: Any, target: Any, argument: str) -> tuple[Tensor, Tensor]:
    """Design matrix and float64 target of the models whose target is known (a model without one may have any features)."""
    require(isinstance(features, Tensor) and features.ndim == 2, f"{argument}: expected [m, d] features, got {describe(features)}")
    y = torch.as_tensor(target, dtype=torch.float64, device=features.device).detach()
    require(y.shape == (len(features),), f"target: expected [{len(features)}] (one per model), got {describe(y)}")
    require(not bool(y.isinf().any()), "target: expected finite values or NaN, got an infinity")
    labelled = ~y.isnan()
    return _design(features[labelled], argument), y[labelled]
