"""The behavioral loss that ``sane`` 2.x lacks, as one of its losses: a dict of tensors in, a dict of tensors out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...architecture import Architecture
from ...behavior import NAN_POLICIES, REDUCTIONS, batched_behavioral_loss, batched_forward
from ...engine import BACKENDS
from ...errors import WslfastError, describe, present, require
from ...kernels.criteria import CRITERIA
from ..queries import KINDS, Queries
from ..views import shared_functions
from .images import images_of
from .layout import KINDS as TOKENIZERS
from .layout import Layout
from .networks import STATISTICS, Networks, networks_of
from .windows import Model, models_of

_VIEWS = ("x", "x_hat", "mask", "p")
NORMALIZE = (None, "batch")


class Group(NamedTuple):
    """The networks of a batch that have one number of classes: tokens of originals and reconstructions ``[m, T, D]``."""

    networks: Networks
    classes: int
    layout: Layout
    models: list[int]
    x: Tensor
    x_hat: Tensor


class Behavior:
    """What :class:`BehavioralLoss` computes; it has no base, as that is the installed package's.

    Args:
        zoo: what networks the tokens are of: a zoo's folder or a list of them (``params.json`` and one checkpoint are read), a checkpoint
            object, or a module. Networks of one kind may differ in their number of classes.
        queryset, dump, n_queries: the query images of every call, as :class:`wslfast.sane.DistillationLoss` has them: ``"random"`` (uniform
            noise), ``"data"`` or ``"union"`` (half of each). ``dump`` is images, a data set or a file; by default the training images of
            ``dataset.pt`` in the zoos' folders.
        criterion, temperature, nan_policy, backend: see :func:`wslfast.batched_behavioral_loss`.
        reduction: ``"mean"`` or ``"sum"`` over the networks of a batch.
        normalize: None, or ``"batch"``: the value in units of what a reconstruction gives that outputs its original's mean (only for
            ``"mse"``).
        statistics: of networks with batch norm, whose running statistics are in no token: ``"queries"``, those that each original has on
            the queries, for original and reconstruction alike; or ``"reference"``, those of ``zoo``'s network for all.
        tokenizer: ``"sparse"`` or ``"dense"``; by default told by the mask.
        input_shape: of one query; by default the images', else what the zoo's settings say.

    Raises:
        WslfastError: naming the argument, what was expected and what came.
    """

    name: str

    def set_up(
        self,
        zoo: Any,
        queryset: str = "random",
        dump: Any = None,
        n_queries: int = 64,
        criterion: str = "mse",
        temperature: float = 2.0,
        reduction: str = "mean",
        normalize: str | None = None,
        statistics: str = "queries",
        tokenizer: str | None = None,
        nan_policy: str = "propagate",
        backend: str = "auto",
        input_shape: Sequence[int] | None = None,
    ) -> None:
        """Checks the settings and reads the zoo."""
        for argument, value, expected in (
            ("queryset", queryset, KINDS),
            ("criterion", criterion, CRITERIA),
            ("reduction", reduction, REDUCTIONS[:2]),
            ("normalize", normalize, NORMALIZE),
            ("statistics", statistics, STATISTICS),
            ("tokenizer", tokenizer, (None, *TOKENIZERS)),
            ("nan_policy", nan_policy, NAN_POLICIES),
            ("backend", backend, BACKENDS),
        ):
            require(value in expected, f"{argument}: expected one of {list(expected)}, got {value!r}")
        require(normalize is None or criterion == "mse", f"normalize: 'batch' is defined for criterion 'mse', got {criterion!r}")
        self.criterion, self.temperature, self.reduction, self.nan_policy, self.backend = (
            criterion,
            temperature,
            reduction,
            nan_policy,
            backend,
        )
        self.normalize, self.statistics, self.tokenizer = normalize, statistics, tokenizer
        images = None
        if queryset != "random":
            images = _images(dump, zoo)
            input_shape = images.shape[1:] if input_shape is None and images is not None else input_shape
        self.networks = networks_of(zoo, input_shape)
        shapes = {networks.input_shape for networks in self.networks}
        require(len(shapes) == 1, f"zoo: expected networks of one input shape, got {sorted(shapes)}; pass input_shape, or a loss for each")
        self.queries = Queries(queryset, n_queries, shapes.pop(), dump if images is None else images)

    def forward(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The loss of a batch, on queries drawn at this call.

        Args:
            tensors: ``x`` and ``x_hat`` ``[B, T, D]``, ``mask`` (that of ``x``) and positions ``p``; or ``x_i``, ``x_hat_i``, ... and the
                same with ``_j`` for two views of each network. Rows are whole networks, or the windows of each in a row.

        Returns:
            ``loss``, the same under this loss's name, and for criterion ``"mse"`` ``<name>_rsq``: the share of the variance of outputs over
            queries that reconstructions explain.

        Raises:
            WslfastError: for tokens that are not of whole networks of the zoo.
        """
        queries = self.queries.draw().to(_device(tensors)).float()
        parts = [_view(tensors, suffix) for suffix in (("_i", "_j") if "x_i" in tensors and "x" not in tensors else ("",))]
        with torch.autocast(queries.device.type, enabled=False):
            values, units = self.values(parts, queries)
        kept = torch.ones_like(values, dtype=torch.bool) if self.nan_policy != "omit" else ~values.detach().isnan()
        counted = values[kept]
        require(len(counted) > 0, "x_hat: no network of the batch has a finite value and gradient (nan_policy 'omit')")
        loss = counted.mean() if self.reduction == "mean" else counted.sum()
        out: dict[str, Tensor] = {}
        if units is not None:
            unit = units[kept].mean()  # a network that is left out is in neither
            if self.normalize == "batch":
                loss = loss / unit
            out[f"{self.name}_rsq"] = 1 - counted.detach().mean() / unit
        return {"loss": loss, self.name: loss, **out}

    def values(self, parts: Sequence[tuple[Tensor, Tensor, Tensor | None, Tensor | None]], queries: Tensor) -> tuple[Tensor, Tensor | None]:
        """One value per network ``[M]`` before any normalisation, in the batch's order (the first view's networks, then the second's);
        and for criterion ``"mse"`` what each would be if its reconstruction output the mean."""
        groups, count = self._groups(parts)
        order = torch.tensor([j for group in groups for j in group.models], device=queries.device)
        values, units = [], []
        for group in groups:
            architecture = group.networks.architecture(group.classes)
            reference = group.networks.reference_row(group.classes).to(queries.device)
            with torch.no_grad():
                originals = group.layout.detokenize(group.x.detach().float(), reference)
                if group.networks.has_statistics and self.statistics == "queries":
                    originals = group.networks.statistics(originals, queries, group.classes)
                targets = self._outputs(originals, queries, architecture, len(parts) == 2)
                units.append(targets.double().reshape(*targets.shape[:2], -1).var(1, unbiased=False).sum(1).float() / 2)
            # what no token holds is the original's, in the reconstruction too
            rows = group.layout.detokenize(group.x_hat.float(), originals)
            values.append(
                batched_behavioral_loss(
                    rows,
                    None,
                    queries,
                    architecture,
                    targets=targets,
                    criterion=self.criterion,
                    temperature=self.temperature,
                    reduction="none",
                    nan_policy=self.nan_policy,
                    backend=self.backend,
                )
            )
        sorted_ = torch.empty_like(order).index_copy(0, order, torch.arange(count, device=order.device))
        value = torch.cat(values).index_select(0, sorted_)
        return value, torch.cat(units).index_select(0, sorted_) if self.criterion == "mse" else None

    def _outputs(self, rows: Tensor, queries: Tensor, architecture: Architecture, two_views: bool) -> Tensor:
        """Outputs of the originals; what is one function in two views runs once."""
        if two_views and architecture.planned:
            first, of = shared_functions(rows, architecture)
            if first is not None and of is not None:
                return batched_forward(rows[first], queries, architecture, backend=self.backend)[of]
        return batched_forward(rows, queries, architecture, backend=self.backend)

    # -- tokens to networks --------------------------------------------------------------------------------------------

    def _groups(self, parts: Sequence[tuple[Tensor, Tensor, Tensor | None, Tensor | None]]) -> tuple[list[Group], int]:
        groups: list[Group] = []
        count = 0
        for x, x_hat, mask, p in parts:
            fits = x.ndim == 3 and x.shape == x_hat.shape and x.is_floating_point() and x_hat.is_floating_point() and len(x) > 0
            require(fits, f"x, x_hat: expected floating tokens [B, T, D] of one shape, got {describe(x)} and {describe(x_hat)}")
            keep = self._without_mask(x) if mask is None else mask.bool()
            require(keep.shape == x.shape, f"mask: expected the shape of x {list(x.shape)}, got {describe(mask)}")
            require(p is None or p.shape == (*x.shape[:2], 3), f"p: expected positions {[*x.shape[:2], 3]}, got {describe(p)}")
            models = models_of(keep, p)
            for positions in _alike(models, keep):
                take = _rows([models[j] for j in positions], x.shape[1], x.device)
                masks = take(keep)
                networks, classes, layout = self._recognised(masks)
                groups.append(Group(networks, classes, layout, [count + j for j in positions], take(x), take(x_hat)))
            count += len(models)
        require(count > 0, "mask: expected a network with at least one token, got padding alone")
        return _merged(groups), count

    def _recognised(self, masks: Tensor) -> tuple[Networks, int, Layout]:
        """The network, its classes and its tokenizer, by the masks ``[m, T, D]`` of tokens that hold equally many numbers."""
        numbers = int(masks[0].sum())
        for networks in self.networks:
            classes = networks.classes_of(numbers)
            if classes is None:
                continue
            for kind in TOKENIZERS:
                if self.tokenizer in (None, kind):
                    layout = networks.layout(kind, masks.shape[2], classes)
                    if layout.num_tokens == masks.shape[1] and bool((layout.on(masks.device)[2] == masks).all()):
                        return networks, classes, layout
        names = ", ".join(f"{n.architecture(n.classes).name} ({n.numbers:,} numbers with {n.classes} classes)" for n in self.networks)
        raise WslfastError(
            f"x: {masks.shape[1]} tokens of {masks.shape[2]} that hold {numbers:,} numbers are none of the zoo's networks: {names}. Is it "
            "a window that does not cover the network, or are the tokens of another tokenizer?"
        )

    def _without_mask(self, x: Tensor) -> Tensor:
        """The mask of tokens that came without one: those of the zoo's first network, if there are as many."""
        networks = self.networks[0]
        kinds = [kind for kind in TOKENIZERS if self.tokenizer in (None, kind)]
        layouts = [networks.layout(kind, x.shape[2], networks.classes) for kind in kinds]
        fit = [layout for layout in layouts if layout.num_tokens == x.shape[1]]
        expected = " or ".join(str(layout.num_tokens) for layout in layouts)
        require(
            len(fit) > 0, f"x: expected {expected} tokens of {x.shape[2]} (all of the network) where there is no mask, got {describe(x)}"
        )
        alike = all(torch.equal(layout.index, fit[0].index) for layout in fit)
        require(alike, f"mask: {x.shape[1]} tokens of {x.shape[2]} are as many dense as sparse ones; pass a mask, or tokenizer=")
        return fit[0].on(x.device)[2].expand(len(x), -1, -1)


def _alike(models: Sequence[Model], keep: Tensor) -> list[list[int]]:
    """Positions of models that have equally many tokens and numbers."""
    numbers = keep.sum((1, 2)).tolist()
    groups: dict[tuple[int, int], list[int]] = {}
    for j, model in enumerate(models):
        size = numbers[model.row] if model.places is None else int(keep.flatten(0, 1)[model.places.to(keep.device)].sum())
        groups.setdefault((model.tokens, size), []).append(j)
    return list(groups.values())


def _rows(models: Sequence[Model], t: int, device: torch.device) -> Callable[[Tensor], Tensor]:
    """What gathers the models' tokens ``[m, count, ...]`` out of a batch ``[B, T, ...]``."""
    count, rows = models[0].tokens, [model.row for model in models]
    if all(model.places is None for model in models):
        if rows == list(range(len(rows))):
            return lambda x: x[: len(rows), :count]
        index = torch.tensor(rows, device=device)
        return lambda x: x.index_select(0, index)[:, :count]
    places = [torch.arange(m.row * t, m.row * t + m.tokens) if m.places is None else m.places for m in models]
    together = torch.stack(places).to(device)
    return lambda x: x.flatten(0, 1)[together]


def _merged(groups: Sequence[Group]) -> list[Group]:
    """One group a network and tokenizer: both views of a batch are run together."""
    alike: dict[tuple[int, int, int], list[Group]] = {}
    for group in groups:
        alike.setdefault((id(group.networks), group.classes, id(group.layout)), []).append(group)
    return [
        same[0]
        if len(same) == 1
        else same[0]._replace(
            models=[j for group in same for j in group.models],
            x=torch.cat([group.x for group in same]),
            x_hat=torch.cat([group.x_hat for group in same]),
        )
        for same in alike.values()
    ]


def _device(tensors: Mapping[str, Tensor]) -> torch.device:
    x = next((tensors[key] for key in ("x_hat", "x_hat_i") if isinstance(tensors.get(key), Tensor)), None)
    expected = "expected 'x' and 'x_hat', or 'x_i', 'x_hat_i', 'x_j' and 'x_hat_j'"
    return present(x, f"tensors: {expected}; got {sorted(map(str, tensors))}").device


def _view(tensors: Mapping[str, Tensor], suffix: str) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    x, x_hat, mask, p = (tensors.get(f"{key}{suffix}") for key in _VIEWS)
    for key, value in (("x", x), ("x_hat", x_hat)):
        require(isinstance(value, Tensor), f"{key}{suffix}: expected tokens [B, T, D], got {describe(value)}")
    assert x is not None
    assert x_hat is not None
    return x, x_hat, mask, p


def _images(dump: Any, zoo: Any) -> Tensor | None:
    """Images of a zoo's ``dataset.pt``; None for a dump that :class:`~wslfast.sane.queries.Queries` reads itself."""
    if dump is None:
        folders = [one for one in (zoo if isinstance(zoo, (list, tuple)) else [zoo]) if isinstance(one, (str,)) or hasattr(one, "joinpath")]
        require(bool(folders), "dump: expected images, a data set or a file for queries of data, got None")
        parts = [_train(images_of(folder)) for folder in folders]
        shapes = {tuple(part.shape[1:]) for part in parts}
        require(len(shapes) == 1, f"dump: the zoos' images differ in shape, {sorted(shapes)}; pass dump=")
        return torch.cat(parts)
    if isinstance(dump, str) or hasattr(dump, "joinpath"):
        return _train(images_of(dump))
    return None


def _train(parts: Mapping[str, tuple[Tensor, Tensor | None]]) -> Tensor:
    return parts["train"][0] if "train" in parts else next(iter(parts.values()))[0]
