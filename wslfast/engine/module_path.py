"""The path for any ``torch.nn.Module``: the module itself, with each model's weights put in the place of its own.

Networks without convolutions run all at once, as ``torch.vmap`` of the forward with one ordinary backward; others, and networks that
vmap cannot follow, one model after another, channels-last where that helps. Which of these is a function of network and shapes.
"""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from ..architecture import Architecture
from ..errors import WslfastError, describe
from ..kernels.criteria import Named, share_of_loss
from .chunks import in_chunks, is_shortage
from .company import filled
from .memory import models_per_chunk
from .paths import gathered, in_pieces, per_model

# what a forward raises that does not fit its input; torch's checkpoint has exceptions of its own, which are none
_FAILURES = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError)
_GROUP = 64  # models that vmap runs at once
_LOOPED = 8  # models of a loop that share one backward call


class _Bound:
    """A copy of the module whose parameters are replaced by a model's, by assignment: ``functional_call`` costs a small network more
    time than its own operators."""

    def __init__(self, architecture: Architecture, device: torch.device, dtype: torch.dtype) -> None:
        assert architecture.module is not None
        self.module = copy.deepcopy(architecture.module).to(device, dtype)
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
        """The module's outputs with ``values``, one tensor a slot."""
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
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise WslfastError(f"architecture {self.name!r}: its forward failed on queries {describe(x)}: {first:.300}") from error
        if version is not None and x._version != version and not self.writes:
            raise WslfastError(
                f"architecture {self.name!r}: its forward changed its input in place, which it did not do when it was taken in; "
                "write it without, as in x = x - 0.5"
            )
        return outputs


@lru_cache(maxsize=16)
def _bound(architecture: Architecture, device: torch.device, dtype: torch.dtype) -> _Bound:
    with temporarily_clear_interpreter_stack():  # made inside a transform, it would belong to that transform
        return _Bound(architecture, device, dtype)


@lru_cache(maxsize=64)
def _writes(architecture: Architecture) -> bool:
    """Whether the module's forward changes its input in place."""
    assert architecture.module is not None
    with temporarily_clear_interpreter_stack(), torch.no_grad():
        x = torch.zeros(2, *architecture.input_shape, dtype=torch.float32, device="cpu")
        architecture.module(x)
    return x._version > 0


@lru_cache(maxsize=64)
def _traits(architecture: Architecture) -> frozenset[str]:
    """What decides how the module is run: ``writes`` to its input, has ``convolutions`` or a ``recurrent`` part, ``slices`` channels,
    can be ``mapped``."""
    assert architecture.module is not None
    found = set()
    parts = list(architecture.module.modules())
    if any(isinstance(part, nn.modules.conv._ConvNd) and part.weight.ndim == 4 for part in parts):
        found.add("convolutions")
    if any(isinstance(part, nn.RNNBase) for part in parts):
        found.add("recurrent")
    x = torch.zeros(2, *architecture.input_shape, dtype=torch.float32, device="cpu")
    with temporarily_clear_interpreter_stack(), torch.no_grad(), _Names() as names:
        architecture.module(x.clone())
    if _writes(architecture):
        found.add("writes")
    if names.seen & {"slice", "split", "split_with_sizes", "select", "cat", "index"}:
        found.add("slices")
    row = torch.zeros(2, architecture.num_weights, dtype=torch.float32, device="cpu")
    path = Module(architecture, "")
    try:
        with temporarily_clear_interpreter_stack(), torch.no_grad():
            path._mapped(_leaves(row, architecture), x, architecture, "writes" in found)
        found.add("mapped")
    except Exception:  # whatever vmap cannot follow runs one model after another
        pass
    return frozenset(found)


class _Names(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the names of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(func.overloadpacket.__name__)
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

    def _at_once(self, k: int, device: str) -> bool:
        """Whether vmap runs all models at once."""
        traits = _traits(self.architecture)
        if "mapped" not in traits:
            return False
        return device != "cpu" or (k > 2 and not traits & {"convolutions", "recurrent"})

    def _mapped(self, leaves: Sequence[Tensor], queries: Tensor, architecture: Architecture, writes: bool) -> Tensor:
        bound = _bound(architecture, queries.device, queries.dtype)
        own = per_model(queries, architecture)
        x = queries.clone() if writes else queries
        if writes and not own:  # vmap refuses to write what differs between models into what they share
            x, own = x.expand(len(leaves[0]), *x.shape).clone(), True
        return torch.vmap(lambda values, mine: bound(values, mine), in_dims=(0, 0 if own else None))(list(leaves), x)

    def _looped(self, leaves: Sequence[Tensor], queries: Tensor) -> list[Tensor]:
        """Outputs of each model. Values and own queries are copied, as in ``reference.forward``: bits do not depend on where rows stand."""
        own, traits = per_model(queries, self.architecture), _traits(self.architecture)
        bound = _bound(self.architecture, queries.device, queries.dtype)
        images = queries if own else [queries] * len(leaves[0])
        channels_last = "convolutions" in traits and "slices" not in traits
        if channels_last and not own and queries.ndim == 4:
            images = [queries.contiguous(memory_format=torch.channels_last)] * len(leaves[0])
        answers = []
        for values, x in zip(zip(*(leaf.unbind() for leaf in leaves)), images):
            if own and channels_last and x.ndim == 4:
                x = x.contiguous(memory_format=torch.channels_last)
            if own or "writes" in traits:
                x = x.clone()
            answers.append(bound([value.clone() for value in values], x))
        return answers

    def _run(self, weights: Tensor, queries: Tensor) -> Tensor:
        leaves = _leaves(weights, self.architecture)
        if self._at_once(len(weights), weights.device.type):
            return self._mapped(leaves, queries, self.architecture, "writes" in _traits(self.architecture))
        return torch.stack(self._looped(leaves, queries))

    def forward(self, weights: Tensor, queries: Tensor, graph: bool) -> Tensor:
        return in_pieces(self._run, weights, queries, self.architecture, graph)

    def plain(self, weights: Tensor, queries: Tensor) -> Tensor:
        """Outputs where a transform looks through: nothing cut into chunks, no threads."""
        return torch.stack(self._looped(_leaves(weights, self.architecture), queries))

    def loss_and_gradient(
        self, weights: Tensor, queries: Tensor, targets: Tensor, criterion: Named, temperature: float, index: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        architecture = self.architecture
        if index is not None:
            return gathered(self, weights, queries, targets, index, architecture, criterion, temperature)
        k, own = len(weights), per_model(queries, architecture)
        losses, gradient = weights.new_empty(k), torch.empty_like(weights, memory_format=torch.contiguous_format)
        at_once = self._at_once(k, weights.device.type)
        group = min(_GROUP if at_once else _LOOPED, models_per_chunk(architecture, queries.shape[int(own)], weights.device.type))

        def some(rows: Tensor, x: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
            n = wanted.shape[1]
            with torch.enable_grad():
                leaves = [leaf.detach().clone().requires_grad_() for leaf in _leaves(rows, architecture)]
                if at_once:
                    answers = [self._mapped(leaves, x, architecture, "writes" in _traits(architecture))]
                else:
                    answers = [a[None] for a in self._looped(leaves, x)]
            values, slopes = [], []
            for answer, part in zip(answers, wanted.split(len(wanted) if at_once else 1), strict=True):
                value, slope = share_of_loss(answer.detach().to(rows.dtype), part, n, criterion, temperature)
                values.append(value)
                slopes.append(slope.to(answer.dtype))
            # models are independent: the gradient of the sum is each model's own
            found = torch.autograd.grad(answers, leaves, slopes, materialize_grads=True)
            return torch.cat(values), torch.cat([slope.reshape(len(rows), -1) for slope in found], 1)

        def piece(part: slice) -> None:
            rows, x, wanted = weights[part], queries[part] if own else queries, targets[part]
            real = len(rows)
            size = self._filled(real, group, queries, wanted, some) if at_once and weights.device.type == "cpu" else real
            if size > real:
                rows, wanted = (torch.cat((t, t[-1:].expand(size - real, *t.shape[1:]))) for t in (rows, wanted))
                x = torch.cat((x, x[-1:].expand(size - real, *x.shape[1:]))) if own else x
            values, slopes = some(rows, x, wanted)
            losses[part], gradient[part] = values[:real], slopes[:real]

        in_chunks(k, group, piece)
        return losses, gradient

    def _filled(self, count: int, full: int, queries: Tensor, wanted: Tensor, some: Callable[..., tuple[Tensor, Tensor]]) -> int:
        own = per_model(queries, self.architecture)
        shape, kind = queries.shape[int(own) :], queries.dtype
        if self.architecture.num_weights * shape[0] < 1000:  # so few numbers could agree by chance
            return full

        def run(size: int) -> tuple[Tensor, Tensor]:
            generator = torch.Generator().manual_seed(0)
            rows = torch.randn(full, self.architecture.num_weights, generator=generator) / math.sqrt(self.architecture.num_weights)
            x = torch.randn(*((full,) if own else ()), *shape, generator=generator).to(kind)
            outputs = torch.zeros(full, *wanted.shape[1:], dtype=wanted.dtype)
            return some(rows.to(kind)[:size], x[:size] if own else x, outputs[:size])

        key = self.architecture, tuple(shape), own, kind, wanted.dtype, torch.get_num_threads(), torch.is_autocast_enabled("cpu")
        return filled(count, full, key, run)
