"""The published behavior losses, run by the core's engine.

Values and gradients are those of the published code (arXiv 2503.17138) as long as a flag of
:class:`~wslfast.sane.semantics.Semantics` says so; what is fast is how they are computed: all models in one call, no graph over
models, no deep copy, no DataLoader a step, and originals that are two views of one model run once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .. import engine
from ..architecture import Architecture
from ..behavior import batched_behavioral_loss
from ..errors import WslfastError, describe, require
from ..kernels.once import link, once
from ..nan_policy import bad_models
from ..tokens import layout
from .loss_scale import ScaledLoss
from .queries import Queries
from .semantics import Choice, resolve
from .structure import MaskedReconLoss
from .views import shared_functions

LOSSES = ("l2", "cross_entropy", "distillation")
REDUCTIONS = ("mean", "sum")
NETWORKS: dict[str, Callable[..., Architecture]] = {
    "CNN": Architecture.cnn, "CNN2": Architecture.cnn2, "CNN3": Architecture.cnn3, "LeNet5": Architecture.lenet5,
}  # fmt: skip


def architecture_of(reference_params: Mapping[str, Any] | None, reference_checkpoint: Mapping[str, Tensor] | None) -> Architecture:
    """The network a zoo's ``params.json`` describes, checked against one of its checkpoints.

    Raises:
        WslfastError: for a network that is not known here, or a checkpoint that is not of it.
    """
    require(isinstance(reference_params, Mapping), f"reference_params: expected the zoo's params, got {describe(reference_params)}")
    require(isinstance(reference_checkpoint, Mapping), f"reference_checkpoint: expected a state dict, got {describe(reference_checkpoint)}")
    assert reference_params is not None
    assert reference_checkpoint is not None
    kind = reference_params.get("model::type")
    unknown = f"reference_params: model::type: expected one of {list(NETWORKS)}, got {kind!r}"
    require(kind in NETWORKS, f"{unknown}; pass architecture= for any other network")
    missing = [key for key in ("model::channels_in", "model::nlin", "model::dropout") if key not in reference_params]
    require(not missing, f"reference_params: expected {missing[0]!r} for the template of {kind!r}" if missing else "")
    architecture = NETWORKS[str(kind)](
        int(reference_params["model::channels_in"]), reference_params["model::nlin"], float(reference_params["model::dropout"] or 0.0)
    )
    _check_checkpoint(reference_checkpoint, architecture)
    return architecture


def _check_checkpoint(checkpoint: Mapping[str, Tensor], architecture: Architecture) -> None:
    came = {name: tuple(value.shape) for name, value in checkpoint.items() if value.is_floating_point()}
    expected = {slot.name: tuple(slot.shape) for slot in architecture.parameters}
    for name in [*expected, *came]:
        require(
            came.get(name) == expected.get(name),
            f"reference_checkpoint: {name!r}: expected {expected.get(name)} for architecture {architecture.name!r}, got {came.get(name)}",
        )


class DistillationLoss(ScaledLoss):
    """Distance in behavior between reconstructions and originals on queries drawn at every call.

    Args:
        reference_checkpoint, reference_params: a state dict of the zoo and its params; they say what network it is. No weight
            of either is used, and none becomes a parameter of this module.
        queryset: ``"random"`` (uniform noise), ``"data"`` (of ``dump``), or ``"union"`` (half of each).
        dump: images, a data set, or a file with a key ``trainset``.
        n_queries: images per call.
        loss: ``"l2"``, ``"cross_entropy"`` or ``"distillation"``.
        reduction: ``"mean"`` or ``"sum"``, over queries and classes (but for ``"distillation"``) and over finite models.
        temperature: of ``"distillation"``.
        architecture: in place of ``reference_params``, for a network that they cannot name. Its outputs are ``[n, ..., K]`` with
            classes in the last axis; what has more axes is summed over them where it is summed over classes.
        semantics, flags: see :class:`~wslfast.sane.semantics.Semantics`.

    Attributes:
        scale: the first value, which every later one is divided by; None before the first call. 1 and constant where
            ``first_value_scale`` is off.
    """

    def __init__(
        self,
        reference_checkpoint: Mapping[str, Tensor] | None,
        reference_params: Mapping[str, Any] | None,
        queryset: str = "random",
        dump: Any = None,
        n_queries: int = 64,
        loss: str = "l2",
        reduction: str = "mean",
        temperature: float = 2.0,
        *,
        architecture: Architecture | None = None,
        semantics: Choice = "published",
        **flags: bool,
    ) -> None:
        require(loss in LOSSES, f"loss: expected one of {list(LOSSES)}, got {loss!r}")
        require(reduction in REDUCTIONS, f"reduction: expected one of {list(REDUCTIONS)}, got {reduction!r}")
        chosen = resolve(semantics, flags)
        super().__init__(chosen.first_value_scale)
        self.semantics = chosen
        if architecture is None:
            architecture = architecture_of(reference_params, reference_checkpoint)
        elif reference_checkpoint is not None:
            _check_checkpoint(reference_checkpoint, architecture)
        classes = chosen.softmax_mse or loss != "l2"  # else numbers are compared as they are
        flat = f"architecture: expected outputs [n, ..., K] of classes for loss {loss!r}, got one number a query from {architecture.name!r}"
        require(bool(architecture.output_shape) or not classes, flat)
        self.architecture = architecture
        self.reference_checkpoint = reference_checkpoint
        self.i_dim = architecture.input_shape
        self.loss, self.reduction, self.temperature = loss, reduction, float(temperature)
        self._queries = Queries(queryset, n_queries, self.i_dim, dump)
        self.queryset, self.n_queries = queryset, self._queries.n
        self.recipe: dict[str, Tensor] | None = None
        self._order: Tensor | None = None

    def generate_queries(self) -> Tensor:
        """The next queries ``[n, C, H, W]``, on the CPU."""
        return self._queries.draw()

    def forward(self, output: Tensor, target: Tensor, _: Any = None, pos: Tensor | None = None) -> dict[str, Tensor]:
        """Reconstructions and originals as tokens ``[k, T, D]``, positions ``[k, T, 3]`` (None: in the layout's order)."""
        queries = self.generate_queries().to(output.device)
        if self.semantics.half_precision:
            queries = queries.to(output.dtype)
        values = self.values(output, target, queries, pos)
        finite = values[values.isfinite()]
        loss = self.scaled(finite.mean() if self.reduction == "mean" else finite.sum())
        return {"loss_recon": loss, "loss_structure": torch.tensor(0.0), "loss_behaviour": loss}

    def values(self, output: Tensor, target: Tensor, queries: Tensor, pos: Tensor | None = None) -> Tensor:
        """One value per model ``[k]`` before any scale, on given queries."""
        rows, wanted = self._weights(output, "output", pos), self._weights(target.detach(), "target", pos)
        half = output.dtype if output.dtype in (torch.float16, torch.bfloat16) and self.semantics.half_precision else None
        if half is not None:
            wanted = wanted.to(half).float()
        queries = queries.float()
        with torch.autocast(output.device.type, dtype=half) if half is not None else nullcontext():
            outputs = self._originals(wanted, queries)
            compute = self._raw_cross_entropy if self._raw else self._engine
            lost = ~outputs.isfinite().flatten(1).all(1)
            if not (self.semantics.nan_gradients and bool(lost.any())):
                return compute(rows, outputs, queries)
            # of an original that is not finite the published formulas make a constant, and the reconstruction's gradient is finite
            values = rows.new_zeros(len(rows), dtype=torch.float32)
            for which, how in ((lost, self._published), (~lost, compute)):
                if bool(which.any()):
                    where = which.nonzero().flatten()
                    values = values.index_copy(0, where, how(rows[where], outputs[where], queries))
            return values

    # -- originals -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _originals(self, rows: Tensor, queries: Tensor) -> Tensor:
        """Outputs of the originals; what is one function in two views runs once."""
        first, of = shared_functions(rows, self.architecture)
        outputs = engine.forward(rows if first is None else rows[first], queries, self.architecture).float()
        return outputs if of is None else outputs[of]

    def _weights(self, tokens: Tensor, argument: str, pos: Tensor | None) -> Tensor:
        """``[k, T, D] -> [k, P]`` float32."""
        require(
            isinstance(tokens, Tensor) and tokens.ndim == 3 and tokens.is_floating_point(),
            f"{argument}: expected floating tokens [k, T, D], got {describe(tokens)}",
        )
        place = layout(self.architecture, tokens.shape[2])
        if self.recipe is None:
            self._order = self._sort(pos, place.token_layer)
            rows = torch.arange(place.num_tokens) if self._order is None else self._order
            self.recipe = {name: rows[place.token_layer == index] for index, name in enumerate(place.layers)}
        require(
            tokens.shape[1] == place.num_tokens,
            f"{argument}: expected all {place.num_tokens} tokens of {self.architecture.name!r}, got {describe(tokens)} (a window?)",
        )
        if self._order is not None:
            tokens = tokens.index_select(1, self._order.to(tokens.device))
        return place.detokenize(tokens.float())

    @staticmethod
    def _sort(pos: Tensor | None, layers: Tensor) -> Tensor | None:
        """Where the layout's tokens lie in the caller's order, by the layers of ``pos[0]``; None if in order."""
        if pos is None:
            return None
        mine = (pos[0] if pos.ndim == 3 else pos)[:, 1].long().cpu()
        order = mine.argsort(stable=True)
        require(
            torch.equal(mine[order], layers),
            f"pos: expected the layers of all {len(layers)} tokens of the network, got {len(mine)}: {mine.bincount().tolist()} a layer",
        )
        return None if torch.equal(order, torch.arange(len(order))) else order

    # -- values --------------------------------------------------------------------------------------------------------

    @property
    def _policy(self) -> str:
        return "propagate" if self.semantics.nan_gradients else "omit"

    @property
    def _raw(self) -> bool:
        return self.loss == "cross_entropy" and self.semantics.raw_logit_cross_entropy

    def _raw_cross_entropy(self, rows: Tensor, targets: Tensor, queries: Tensor) -> Tensor:
        """Cross-entropy with logits for class probabilities: a criterion of its own, so the engine gets it as a function."""
        if rows.requires_grad and torch.is_grad_enabled():
            values = _RawCrossEntropy.apply(rows, queries, targets, self, (link(rows),))
            return self._repaired(values, ~values.detach().isfinite(), rows, targets, queries)
        with torch.no_grad():
            return self._published(rows, targets, queries)

    def _repaired(self, values: Tensor, bad: Tensor, rows: Tensor, targets: Tensor, queries: Tensor) -> Tensor:
        """``values`` with those of ``bad`` models ``[k]`` by the published formula, where its NaN gradients count (``nan_gradients``)."""
        if self.semantics.nan_gradients and bool(bad.any()):
            where = bad.nonzero().flatten()
            values = values.index_copy(0, where, self._published(rows[where], targets[where], queries))
        return values

    def _engine(self, rows: Tensor, targets: Tensor, queries: Tensor) -> Tensor:
        criterion = self.loss if self.loss != "l2" else "softmax_mse" if self.semantics.softmax_mse else "mse"
        values = batched_behavioral_loss(
            rows,
            None,
            queries,
            self.architecture,
            targets=targets,
            criterion=criterion,
            temperature=self.temperature,
            reduction="none",
            nan_policy=self._policy,
        )
        if self.reduction == "sum" and self.loss != "distillation":
            values = values * (targets[0].numel() if criterion == "softmax_mse" else targets.shape[1])
        bad = ~values.detach().isfinite()
        if self.loss == "distillation":
            # a probability of exactly zero is 0 * log 0 in the published formula: it drops the model
            bad = bad | ((targets / self.temperature).softmax(-1) == 0).flatten(1).any(1)
        return self._repaired(values, bad, rows, targets, queries)

    def _published(self, rows: Tensor, targets: Tensor, queries: Tensor) -> Tensor:
        """The published formulas through torch's graph, for models that the engine's values are not defined for."""
        return self._formula(engine.forward(rows, queries, self.architecture).float(), targets)

    def _formula(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """One value per model ``[k]`` of outputs ``[k, n, ..., K]``; of several axes, classes are the last."""
        n = outputs.shape[1]
        if self.loss == "l2":
            p, q = (torch.nan_to_num(x.softmax(-1), nan=0.0, posinf=1.0, neginf=0.0) for x in (outputs, targets))
            squares = (p - q).square()
            return squares.flatten(1).mean(1) if self.reduction == "mean" else squares.flatten(1).sum(1)
        if self.loss == "cross_entropy":
            total = -(targets * torch.nan_to_num(outputs, nan=0.0).log_softmax(-1)).flatten(1).sum(1)
            return total / n if self.reduction == "mean" else total
        tiny = 1e-9
        q = torch.nan_to_num((targets / self.temperature).softmax(-1), nan=tiny, posinf=1.0, neginf=tiny)
        low = float(torch.tensor(tiny).log())
        log_p = torch.nan_to_num((outputs / self.temperature).log_softmax(-1), nan=low, posinf=0.0, neginf=low)
        return (q * (q.log() - log_p)).flatten(1).sum(1) / n * self.temperature**2


class _RawCrossEntropy(torch.autograd.Function):
    """Raw-logit cross-entropy ``[k]`` of one model each, loss and gradient together; a model whose outputs are not finite is NaN."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, queries: Tensor, targets: Tensor, loss: DistillationLoss, linked: tuple[Tensor]) -> Tensor:
        (ctx.link,) = linked  # in a tuple: to torch it is no input
        divisor = targets.shape[1] if loss.reduction == "mean" else 1

        def share(outputs: Tensor, wanted: Tensor) -> Tensor:
            # the last term is zero, and NaN where an output is not finite
            return (-(wanted * outputs.log_softmax(-1)) / divisor + 0 * outputs).flatten(1).sum(1)

        values, gradient = engine.loss_and_gradient(rows, queries, targets, loss.architecture, share)
        if not loss.semantics.nan_gradients:
            bad = bad_models(values, gradient)
            values = values.masked_fill(bad, float("nan"))
            gradient = gradient.masked_fill(bad.unsqueeze(1), 0.0)
        ctx.save_for_backward(gradient)
        return values

    @staticmethod
    def backward(ctx: Any, grad_values: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return once(gradient * grad_values.unsqueeze(1), ctx.link), None, None, None, None


class ReconDistillationLoss(nn.Module):
    """``beta`` times the structural loss plus ``1 - beta`` times the behavioral one, each in its own unit.

    Arguments are those of :class:`DistillationLoss`; ``reduction`` reaches the structural loss alone, as published.
    """

    def __init__(
        self,
        reference_checkpoint: Mapping[str, Tensor] | None,
        reference_params: Mapping[str, Any] | None,
        beta: float = 0.1,
        reduction: str = "mean",
        queryset: str = "random",
        dump: Any = None,
        n_queries: int = 64,
        loss: str = "l2",
        temperature: float = 2.0,
        *,
        architecture: Architecture | None = None,
        semantics: Choice = "published",
        **flags: bool,
    ) -> None:
        super().__init__()
        self.semantics = resolve(semantics, flags)
        self.recon_loss = MaskedReconLoss(reduction, semantics=self.semantics)
        self.distillation_loss = DistillationLoss(
            reference_checkpoint,
            reference_params,
            queryset=queryset,
            dump=dump,
            n_queries=n_queries,
            loss=loss,
            temperature=temperature,
            architecture=architecture,
            semantics=self.semantics,
        )
        self.beta = beta

    def forward(self, output: Tensor, target: Tensor, mask: Tensor, pos: Tensor | None = None) -> dict[str, Tensor]:
        """Tokens ``[k, T, D]``, mask of that shape, positions ``[k, T, 3]``."""
        structure = self.recon_loss(output, target, mask, pos)
        behavior = self.distillation_loss(output, target, mask, pos)
        loss = self.beta * structure["loss_recon"] + (1 - self.beta) * behavior["loss_recon"]
        return {
            "loss_recon": loss,
            "loss_structure": structure["loss_recon"],
            "loss_behaviour": behavior["loss_recon"],
            "rsq": structure["rsq"],
        }


def supports(reference_params: Any, reference_checkpoint: Any) -> str | None:
    """None if the behavior losses can run this network, else the reason."""
    try:
        architecture_of(reference_params, reference_checkpoint)
    except (WslfastError, TypeError, ValueError, AttributeError) as error:
        return str(error)
    return None
