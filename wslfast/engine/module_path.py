"""The path for any ``torch.nn.Module``: the module itself, with each model's weights put in the place of its own.

Networks without convolutions run all at once, as ``torch.vmap`` of the forward with one ordinary backward; others, and networks that
vmap cannot follow, one model after another, channels-last where that helps. Which of these is a function of network and shapes.
"""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from ..architecture import Architecture
from ..errors import WslfastError, describe, first_line
from ..kernels.cpu.memory import fresh_like
from ..kernels.cpu.products import operand_dtype
from ..kernels.criteria import Named, share_of_loss
from ..kernels.picking import picks
from ..kernels.reference import beside
from ..kernels.stacked.company import agrees_everywhere, by_itself, group_size
from ..tracing.module import alike, in_precision, queries_for
from .chunks import in_chunks, is_shortage
from .memory import default_budget, models_per_chunk
from .paths import gathered, in_pieces, per_model

# what a forward raises that does not fit its input; torch's checkpoint has exceptions of its own, which are none
_FAILURES = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError)
_GROUP = 64  # models that vmap runs at once
_LOOPED = 8  # models of a loop that share one backward call
_FEW = 1000  # numbers of a product: so few could agree by chance, and a group is always filled


class _Bound:
    """A copy of the module whose parameters are replaced by a model's, by assignment: ``functional_call`` costs a small network more
    time than its own operators."""

    def __init__(self, architecture: Architecture, device: torch.device, dtype: torch.dtype) -> None:
        assert architecture.module is not None
        self.module = in_precision(copy.deepcopy(architecture.module), dtype, device)
        self.name = architecture.name
        self.slots = architecture.parameters
        self.lock = threading.RLock()
        self.writes = _writes(architecture)  # then it is given copies
        order = {slot.name: i for i, slot in enumerate(self.slots)}
        order |= {key: order[name] for key, name in architecture.aliases.items()}
        self.places: list[tuple[dict[str, Any], str, int]] = []
        self.recurrent: list[tuple[nn.RNNBase, list[int]]] = []
        for path, part in self.module.named_modules(remove_duplicate=False):
            for held in (part._parameters, part._buffers):
                for leaf in held:
                    key = f"{path}.{leaf}" if path else leaf
                    if key in order:
                        self.places.append((held, leaf, order[key]))
            if isinstance(part, nn.RNNBase):  # it keeps a list of its own
                names = [f"{path}.{leaf}" if path else leaf for leaf in part._flat_weights_names]
                self.recurrent.append((part, [order[name] for name in names]))

    def __call__(self, values: Sequence[Tensor], x: Tensor) -> Tensor:
        """The module's outputs with ``values``, one tensor per slot."""
        with self.lock:
            before = [held[leaf] for held, leaf, _ in self.places]
            lists = [part._flat_weights for part, _ in self.recurrent]
            try:
                for held, leaf, i in self.places:
                    held[leaf] = values[i]
                for part, which in self.recurrent:
                    part._flat_weights = [values[i] for i in which]
                return self._answer(x)
            finally:
                for (held, leaf, _), value in zip(self.places, before, strict=True):
                    held[leaf] = value
                for (part, _), value in zip(self.recurrent, lists, strict=True):
                    part._flat_weights = value

    def _answer(self, x: Tensor) -> Tensor:
        version = None if x.is_inference() or torch._C._functorch.is_functorch_wrapped_tensor(x) else x._version
        try:
            outputs = self.module(x)
        except _FAILURES as error:
            if is_shortage(error) or isinstance(error, WslfastError):
                raise
            raise WslfastError(f"architecture {self.name!r}: its forward failed on queries {describe(x)}: {first_line(error)}") from error
        if version is not None and x._version != version and not self.writes:
            raise WslfastError(
                f"architecture {self.name!r}: its forward changed its input in place, which it did not do when it was taken in; "
                "write it without, as in x = x - 0.5"
            )
        return outputs


@lru_cache(maxsize=16)
def _bound(architecture: Architecture, device: torch.device, dtype: torch.dtype) -> _Bound:
    with temporarily_clear_interpreter_stack(), by_itself():  # made inside a transform, it would belong to that transform
        return _Bound(architecture, device, dtype)


@lru_cache(maxsize=64)
def _writes(architecture: Architecture) -> bool:
    """Whether the module's forward changes its input in place."""
    assert architecture.module is not None
    with temporarily_clear_interpreter_stack(), by_itself(), torch.no_grad():
        x = torch.zeros(2, *architecture.input_shape, dtype=torch.float32, device="cpu")
        architecture.module(x)
        return x._version > 0


@lru_cache(maxsize=64)
def _traits(architecture: Architecture) -> frozenset[str]:
    """What decides how the module is run: ``writes`` to its input, has ``convolutions`` or a ``recurrent`` part, ``slices`` channels,
    ``picks`` positions (``kernels/picking.py``), norms by group, can be ``mapped``."""
    assert architecture.module is not None
    traits = set()
    parts = list(architecture.module.modules())
    if any(isinstance(part, nn.modules.conv._ConvNd) and part.weight.ndim == 4 for part in parts):
        traits.add("convolutions")
    if any(isinstance(part, nn.RNNBase) for part in parts):
        traits.add("recurrent")
    with temporarily_clear_interpreter_stack(), by_itself(), torch.no_grad(), _Names() as names:
        architecture.module(torch.zeros(2, *architecture.input_shape, dtype=torch.float32, device="cpu"))
    if _writes(architecture):
        traits.add("writes")
    if names.seen & {"slice", "split", "split_with_sizes", "select", "cat", "index"}:
        traits.add("slices")
    traits |= names.seen & {"picks", "native_group_norm"}
    path = Module(architecture, "")
    try:
        with temporarily_clear_interpreter_stack(), by_itself():
            row = torch.zeros(2, architecture.num_weights, dtype=torch.float32, device="cpu")
            x = torch.zeros(2, *architecture.input_shape, dtype=torch.float32, device="cpu")
            for queries in (x, x.expand(2, *x.shape)):  # each model's own too: control flow may look at queries alone
                path._outputs_and_gradient(row, queries, "writes" in traits)
            if path._as_one_after_another("writes" in traits):
                traits.add("mapped")
    except Exception:  # whatever vmap cannot follow runs one model after another
        pass
    return frozenset(traits)


class _Names(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the names of the operators that are called, and ``picks`` for a convolution with a stride that is one wide."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.seen.add(name)
        if name == "convolution" and picks(args[1].shape[2:], args[3], args[4]):
            self.seen.add("picks")
        return func(*args, **(kwargs or {}))


def _leaves(rows: Tensor, architecture: Architecture) -> list[Tensor]:
    """Each parameter of every model, ``[k, *shape]``, in one split: its backward is one concatenation."""
    parts = rows.split([slot.size for slot in architecture.parameters], 1)
    return [part.unflatten(1, slot.shape) if slot.shape else part[:, 0] for part, slot in zip(parts, architecture.parameters, strict=True)]


@dataclass(frozen=True)
class Module:
    """Any module, see the file's head."""

    architecture: Architecture
    reason: str
    name: ClassVar[str] = "module"

    def _at_once(self, queries: Tensor) -> bool:
        """Whether vmap runs all models at once; never a matter of how many there are, or bits would depend on company. Nor where a model's
        bits depend on its place: vmap's products begin anywhere in memory, and some processors' BLAS looks at that."""
        traits = _traits(self.architecture)
        if "mapped" not in traits or queries.device.type != "cpu":
            return "mapped" in traits
        return not traits & {"convolutions", "recurrent"} and self._agrees_everywhere(queries)

    def _agrees_everywhere(self, queries: Tensor) -> bool:
        own, dtype = per_model(queries, self.architecture), queries.dtype
        shape = tuple(queries.shape[int(own) :])

        @by_itself()
        def trial(places: int) -> Sequence[Tensor]:
            row, x = self._random(1, shape, own, dtype)
            everyones = x.repeat(places, *(1,) * len(shape)) if own else x
            return self._outputs_and_gradient(row.repeat(places, 1), everyones, "writes" in _traits(self.architecture))

        return agrees_everywhere(self._key(shape, own, dtype), trial)

    def _key(self, shape: tuple[int, ...], own: bool, dtype: torch.dtype) -> Hashable:
        """All that the bits of what vmap runs may depend on."""
        return self.architecture, shape, own, dtype, torch.get_num_threads(), operand_dtype()

    def _random(self, count: int, shape: tuple[int, ...], own: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Weights of random models, and their queries."""
        assert self.architecture.module is not None
        generator, size = torch.Generator().manual_seed(0), self.architecture.num_weights
        rows = torch.randn(count, size, generator=generator, dtype=torch.float32, device="cpu") / math.sqrt(size)
        x = queries_for(self.architecture.module, shape[0] * (count if own else 1), shape[1:], dtype)
        return rows.to(dtype), x.unflatten(0, (count, shape[0])) if own else x

    def _mapped(self, leaves: Sequence[Tensor], queries: Tensor, writes: bool) -> Tensor:
        bound = _bound(self.architecture, queries.device, queries.dtype)
        own_queries = per_model(queries, self.architecture)
        x = queries.clone() if writes else queries
        if writes and not own_queries:  # vmap refuses to write what differs between models into what they share
            x, own_queries = x.expand(len(leaves[0]), *x.shape).clone(), True
        return torch.vmap(lambda values, mine: bound(values, mine), in_dims=(0, 0 if own_queries else None))(list(leaves), x)

    def _looped(self, leaves: Sequence[Tensor], queries: Tensor) -> list[Tensor]:
        """Outputs of each model. Values and own queries are copied, as in ``reference.forward``: bits do not depend on where rows stand."""
        own, traits = per_model(queries, self.architecture), _traits(self.architecture)
        bound = _bound(self.architecture, queries.device, queries.dtype)
        # of channels-last images torch's group norm loses digits (stacked/image_rules.py)
        channels_last = "convolutions" in traits and not traits & {"slices", "picks", "native_group_norm"}
        images: Any = queries
        if not own:
            flat = channels_last and queries.ndim == 4
            images = [queries.contiguous(memory_format=torch.channels_last) if flat else queries] * len(leaves[0])
        answers = []
        for values, x in zip(zip(*(leaf.unbind() for leaf in leaves)), images):
            if own and channels_last and x.ndim == 4:
                x = x.contiguous(memory_format=torch.channels_last)
            if own or "writes" in traits:
                x = x.clone()
            answers.append(bound([value.clone() for value in values], x))
        return answers

    def _size(self, count: int, queries: Tensor, dtype: torch.dtype) -> int:
        """Models that are run at once."""
        architecture, device = self.architecture, queries.device.type
        own_queries = per_model(queries, architecture)
        shape = tuple(queries.shape[int(own_queries) :])
        most = models_per_chunk(architecture, shape[0], device)
        if not self._at_once(queries):
            return min(_LOOPED, most)
        if device != "cpu":
            return most
        full = min(_GROUP, models_per_chunk(architecture, shape[0], device, default_budget(device)))
        if architecture.num_weights * shape[0] < _FEW:
            return full

        @by_itself()
        def trial(size: int, order: Sequence[int]) -> Sequence[Tensor]:
            rows, x = self._random(full, shape, own_queries, dtype)
            chosen = list(order)[:size]
            return self._outputs_and_gradient(rows[chosen], x[chosen] if own_queries else x, "writes" in _traits(architecture))

        return group_size(count, most, full, self._key(shape, own_queries, dtype), trial)

    def _outputs_and_gradient(self, rows: Tensor, x: Tensor, writes: bool) -> Sequence[Tensor]:
        """Of models that vmap runs at once."""
        with torch.enable_grad():
            leaf = rows.detach().requires_grad_()
            outputs = self._mapped(_leaves(leaf, self.architecture), x, writes)
            return outputs.detach(), torch.autograd.grad(outputs, leaf, torch.ones_like(outputs))[0]

    def _as_one_after_another(self, writes: bool) -> bool:
        """Whether vmap gives what a model gives that is run alone, outputs and gradients: it passes by what hooks do to gradients."""
        assert self.architecture.module is not None
        noise, x = self._random(2, (3, *self.architecture.input_shape), False, torch.float32)
        state = self.architecture.module.state_dict()
        own = torch.cat([state[slot.name].flatten() for slot in self.architecture.parameters])
        bound = _bound(self.architecture, x.device, x.dtype)
        found = []
        with torch.enable_grad():
            rows = (own + 0.05 * noise * math.sqrt(len(own))).requires_grad_()
            leaves = _leaves(rows, self.architecture)
            alone = [bound([leaf[j].clone() for leaf in leaves], x.clone()) for j in range(len(rows))]
            for outputs in (torch.stack(alone), self._mapped(leaves, x, writes)):
                slope = torch.linspace(0.5, 1.5, outputs.numel(), dtype=outputs.dtype, device="cpu").view(outputs.shape)
                (gradient,) = torch.autograd.grad(outputs, rows, slope, retain_graph=True)
                found.append((outputs, gradient))
        return all(alike(mapped, single, 1e-3, 1e-4) for single, mapped in zip(*found, strict=True))

    def _run(self, weights: Tensor, queries: Tensor) -> Tensor:
        leaves = [leaf.contiguous() for leaf in _leaves(weights, self.architecture)]  # as a module's own parameters are
        if self._at_once(queries):
            return self._mapped(leaves, queries, "writes" in _traits(self.architecture))
        return beside(self._looped(leaves, queries))

    def forward(self, weights: Tensor, queries: Tensor, graph: bool) -> Tensor:
        k = len(weights)
        if k == 0 or not self._at_once(queries):
            return in_pieces(self._run, weights, queries, self.architecture, graph)
        size = self._size(k, queries, weights.dtype)

        def run(rows: Tensor, x: Tensor) -> Tensor:
            real = len(rows)
            return self._run(*_filled((rows, x), size, (True, per_model(x, self.architecture))))[:real]

        return in_pieces(run, weights, queries, self.architecture, graph, size)

    def plain(self, weights: Tensor, queries: Tensor) -> Tensor:
        """Outputs where a transform looks through: nothing cut into chunks, no threads."""
        return torch.stack(self._looped(_leaves(weights, self.architecture), queries))

    def loss_and_gradient(
        self, weights: Tensor, queries: Tensor, targets: Tensor, criterion: Named, temperature: float, index: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        architecture = self.architecture
        if index is not None:
            return gathered(self, weights, queries, targets, index, architecture, criterion, temperature)
        k, own, n = len(weights), per_model(queries, architecture), targets.shape[1]
        losses, gradient = weights.new_empty(k), fresh_like(weights)
        at_once, size = self._at_once(queries), self._size(k, queries, weights.dtype)
        writes = "writes" in _traits(architecture)

        def piece(part: slice) -> None:
            rows, x, wanted = weights[part], queries[part] if own else queries, targets[part]
            real = len(rows)
            if at_once:
                rows, x, wanted = _filled((rows, x, wanted), size, (True, own, True))
            with torch.enable_grad():
                leaves = [leaf.detach().clone().requires_grad_() for leaf in _leaves(rows, architecture)]
                answers = [self._mapped(leaves, x, writes)] if at_once else [a[None] for a in self._looped(leaves, x)]
            values, slopes = [], []
            for answer, target in zip(answers, wanted.split(len(wanted) if at_once else 1), strict=True):
                value, slope = share_of_loss(answer.detach().to(rows.dtype), target, n, criterion, temperature)
                values.append(value)
                slopes.append(slope.to(answer.dtype))
            # models are independent: the gradient of the sum is each model's own
            gradients = torch.autograd.grad(answers, leaves, slopes, materialize_grads=True)
            losses[part] = torch.cat(values)[:real]
            gradient[part] = torch.cat([slope.reshape(len(rows), -1) for slope in gradients], 1)[:real]

        in_chunks(k, size, piece)
        return losses, gradient


def _filled(tensors: Sequence[Tensor], size: int, stacked: Sequence[bool]) -> list[Tensor]:
    """Tensors with one entry a model (where ``stacked``), filled up to ``size`` models with copies of the last."""
    missing = size - len(tensors[0])
    if missing <= 0:
        return list(tensors)
    return [torch.cat((t, t[-1:].expand(missing, *t.shape[1:]))) if own else t for t, own in zip(tensors, stacked, strict=True)]
