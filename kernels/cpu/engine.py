"""The tuned CPU path: loss and gradient of k models, in groups that share every operator call.

The loop that a careful user writes runs one model after another. Its convolutions have 16 outputs of 27 numbers and fill
neither a vector unit nor the time that an operator call costs. Here M models form a group and q queries a slab, and a layer of all
M models on all q queries is one call: the first layer one convolution with M * C_out outputs of the shared queries, the others
grouped convolutions in channels-last memory, linear layers batched products (layouts and backward: steps.py).
Forward, loss and backward of one slab follow each other while its activations are in cache; the gradient adds up over slabs. Groups are
jobs of one thread each (jobs.py).

Which M and q is a pure function of the architecture, never of k: the last group is filled up with idle models, so every
operator call has the shape it would have in any other batch, and a model's loss and gradient are the same bits
alone, among neighbours, in any order, in any chunk and at any number of threads (where smaller groups give the same bits:
``_smaller_groups``). Memory beyond inputs and results does not grow with k.

float32, and under CPU autocast its dtype (operands; losses, sums over slabs and gradients stay float32).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from ..criteria import Named, share_of_loss
from ..criteria import criterion as criterion_of
from ..layers import Conv2d, Layers, Linear, Unplannable, layer_slots, numbers_of
from ..reference import per_model_queries
from . import jobs
from .half_pooling import HALVES
from .memory import fresh_like, keep_freed_memory
from .padded_channels import Wide, widened
from .products import operand_dtype
from .program import Program, compile_program
from .queries import own_slab, shared_slabs
from .recording import Run
from .replay import kind_of_loss, own_queries, replay, run_or_replay
from .rewrites import blocked, flattened, paired
from .sizes import activations, group_shape
from .steps import backward_through, forward_through, values_through

__all__ = ["forward", "group_shape", "loss_and_gradient", "models_of_a_job", "supports"]


_ALONE = 1_000_000  # activations of a call: below, one thread is done before another has joined in


@lru_cache(maxsize=64)
def _program(layers: Layers, input_shape: tuple[int, ...], own_queries: bool, one_thread: bool) -> Program:
    program = flattened(paired(compile_program(layers, input_shape, own_queries), own_queries))
    return blocked(program) if one_thread else program  # several threads would wait for each other at every block


def _refuse(layers: Layers, why: str) -> Unplannable:
    return Unplannable(f"layer {layers[0].name!r} ({layers[0].kind}): the CPU engine {why}")


def supports(weights: Tensor, queries: Tensor, layers: Layers) -> bool:
    """Whether this path runs these shapes and dtypes; what it declines is the reference's."""
    try:
        _compile(weights, queries, layers)
    except Unplannable:
        return False
    return True


def _compile(weights: Tensor, queries: Tensor, layers: Layers, indexed: bool = False) -> tuple[Program, Tensor, bool]:
    """The compiled network, the queries as it wants them, and whether they are each model's own (``indexed``: by an index)."""
    for tensor in (weights, queries):
        if tensor.device.type != "cpu" or tensor.dtype != torch.float32:
            raise _refuse(layers, f"takes float32 on the CPU, got {tensor.dtype} on {tensor.device}")
    keep_freed_memory()
    own = not indexed and per_model_queries(queries, layers)
    first = next((layer for layer in layers if isinstance(layer, (Conv2d, Linear))), None)
    if not own and not indexed and isinstance(first, Conv2d) and first.groups > 1:
        # Groups of shared channels and groups of models do not fit into one convolution: every model gets its copy.
        queries, own = queries.expand(weights.shape[0], *queries.shape), True
    program = _program(layers, tuple(queries.shape[1 + own :]), own or indexed, jobs.threads_inside() == 1)
    return program, queries, own


def _widened(queries: Tensor, layers: Layers, indexed: bool) -> Wide | None:
    """The network with the channels that 16-bit convolutions want, where it has others."""
    own = not indexed and per_model_queries(queries, layers)
    return widened(layers, tuple(queries.shape[1 + own :])) if operand_dtype() in HALVES else None


class _Call:
    """What holds for all groups and slabs of one call: the compiled network, its slabs of queries, and how models are grouped."""

    def __init__(
        self,
        weights: Tensor,
        queries: Tensor,
        layers: Layers,
        index: Tensor | None = None,
        shape: tuple[int, int] | None = None,
        sizes: tuple[int, ...] | None = None,
    ) -> None:
        self.layers, self.given, self._token = layers, queries, object()
        self.own_given = index is None and per_model_queries(queries, layers)
        self.wide = _widened(queries, layers, index is not None)
        inside = layers if self.wide is None else self.wide.layers
        self.program, self.queries, axis = _compile(weights, queries, inside, index is not None)
        self.steps = self.program.steps[self.program.first :]
        self.own, self.index = axis or index is not None, index
        self.weights, self.dtype = weights.detach(), operand_dtype()
        self.n = index.shape[1] if index is not None else self.queries.shape[axis]
        image = tuple(self.queries.shape[1 + axis :])
        full, self.slab = shape or group_shape(layers, image)
        self.models = full
        if sizes is None:
            k, threads = weights.shape[0], torch.get_num_threads()
            few = k < full * threads and jobs.threads_inside() < threads and k * self.n * activations(layers, image) > _ALONE
            whole = not few and k % full == 0
            n = self.n if self.n < self.slab else self.slab + self.n % self.slab  # a full slab and the last one
            sizes = () if whole else _sizes(layers, image, self.own, n, self.dtype, jobs.threads_inside())
            if few:
                self.models = next(size for size in (*sizes, full) if size * threads >= k)
        self.sizes = *sizes, full
        self.starts = range(0, self.n, self.slab)
        self._slabs: list[Any] = []  # of queries that all models see, made when they are asked for

    def filled(self, models: int) -> int:
        """Models that run in a group of so many: those, and idle ones."""
        return next(size for size in self.sizes if size >= models)

    def rows(self, group: int) -> Tensor:
        """Weights ``[M, P]`` of a group, filled up with idle models of zeros, as the compiled network has them."""
        rows = self.weights[group : group + self.models]
        filled = self.filled(rows.shape[0])
        if self.wide is not None:
            return self.wide.rows(rows, filled)
        if rows.shape[0] == filled:
            return rows
        return torch.cat((rows, rows.new_zeros(filled - rows.shape[0], rows.shape[1])))

    def replayed(self, part: slice, kind: Hashable | None, run: Run, places: Sequence[Tensor], *more: Tensor) -> bool:
        """Whether a group's results were replayed, into ``places``; if not, it has to be run. ``run``: of a call of that group alone."""
        if kind is None or len(self.starts) > 1 or len(self.weights) <= self.models:
            return False
        weights, queries = self.weights[part], self.given[part] if self.own_given else self.given
        shape = self.filled(weights.shape[0]), self.slab
        again = lambda weights, queries, *more: run(_Call(weights, queries, self.layers, None, shape, ()), *more)  # noqa: E731
        return replay((kind, shape), again, (weights, queries, *more), places, call=self._token) is not None

    def keep(self, grads: Tensor, gradient: Tensor) -> None:
        """Write a group's gradients ``[M, P]`` to its rows ``[m, P]`` of the result."""
        real = grads[: len(gradient)]
        if self.wide is None:
            gradient.copy_(real)
        else:
            self.wide.narrowed(real, gradient)

    def pack(self, rows: Tensor) -> list[Any]:
        """The weights of a group, a step each."""
        return [step.pack(rows, self.dtype) for step in self.steps]

    def share_slabs(self, fewest: int = 1) -> None:
        """Make the slabs that all models see, where there are so many."""
        if not self.own and not self._slabs and len(self.starts) >= fewest:
            with _plain():
                self._slabs = shared_slabs(self.queries, self.program, self.slab, self.dtype)

    def slab_of(self, group: int, start: int, models: int) -> Tensor:
        """Input of the first layer with parameters."""
        if not self.own:
            self.share_slabs()
            return self._slabs[start // self.slab]
        part = slice(group, group + self.models), slice(start, start + self.slab)
        return own_slab(self.queries, self.index, part, self.program, models, self.dtype)

    def outputs(self, group: int, start: int, packed: list[Any], models: int) -> Tensor:
        """Outputs ``[M, q, K]`` of a slab (q at least 2 where images are shared): the same bits as :meth:`forward`, with nothing kept."""
        return values_through(self.steps, packed, self.slab_of(group, start, models), models)

    def forward(self, group: int, start: int, packed: list[Any], models: int) -> tuple[Tensor, list[Any]]:
        """Outputs ``[M, q, K]`` of a slab, and what the backward of each step wants to see."""
        return forward_through(self.steps, packed, self.slab_of(group, start, models), models)

    def backward(self, g: Tensor, saved: list[Any], packed: list[Any], rows: Tensor, fresh: bool) -> None:
        """Gradient of the parameters, into ``rows [M, P]``; ``saved`` is emptied."""
        backward_through(self.steps, packed, g, saved, rows, fresh)


@contextmanager
def _plain() -> Iterator[None]:
    """No graph, and no autocast beneath us: operands are cast by hand."""
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        yield


def loss_and_gradient(
    weights: Tensor,
    queries: Tensor,
    targets: Tensor,
    layers: Layers,
    criterion: Named,
    temperature: float = 2.0,
    index: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Per-model losses ``[k]`` and gradients ``[k, P]`` with respect to each model's own weights.

    Queries ``[n, *input]`` shared by all models or ``[k, n, *input]``; with ``index [k, n]`` (int64 or int32), a pool
    ``[N, *input]`` from which each model takes its own (fastest where the pool is channels-last).
    Targets ``[k, n, K]``, or labels ``[k, n]`` for ``cross_entropy``. A criterion that has no name here may be a function
    (:data:`Named`), which torch differentiates with respect to the outputs alone. Raises :class:`Unplannable` for what it leaves to others.
    """
    if isinstance(criterion, str):
        criterion_of(criterion)  # raises for an unknown name

    queries, index, kind = own_queries(queries, index, kind_of_loss("cpu", layers, criterion, temperature))

    def run(weights: Tensor, queries: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return _loss_and_gradient(_Call(weights, queries, layers, index), targets, criterion, temperature, kind)

    losses, gradient = run_or_replay(kind, run, partial(_share, layers), weights, queries, targets)
    return losses, gradient


def _share(layers: Layers, weights: Tensor, queries: Tensor) -> bool | None:
    """That products do not take all threads (False); None where a call is more than one job: each is replayed by itself."""
    return False if models_of_a_job(weights, queries, layers) >= len(weights) else None


def models_of_a_job(weights: Tensor, queries: Tensor, layers: Layers) -> int:
    """Of how many models one job computes loss and gradient; 0 where queries are cut, too. Of weights only the number is looked at."""
    call = _Call(weights, queries, layers)
    return call.models if len(call.starts) == 1 or torch.get_num_threads() == 1 else 0


class _Group:
    """Loss and gradient of one group of models: its slabs one after another, or each on its own and added up in the same order."""

    def __init__(self, call: _Call, start: int, targets: Tensor, criterion: Named, temperature: float) -> None:
        self.call, self.start, self.criterion, self.temperature = call, start, criterion, temperature
        self.targets = targets[start : start + call.models]
        self.rows = call.rows(start)
        self.packed = call.pack(self.rows)

    def add(self, start: int, gradient: Tensor, fresh: bool) -> Tensor:
        """This slab's share of the losses ``[M]``; that of the gradient is written to, or added to, ``gradient [M, P]``."""
        call, filled, real = self.call, len(self.rows), len(self.targets)
        y, saved = call.forward(self.start, start, self.packed, filled)
        wanted = self.targets[:, start : start + call.slab]
        if real < filled:
            wanted = torch.cat((wanted, wanted.new_zeros((filled - real, *wanted.shape[1:]))))
        added = y.shape[1] - wanted.shape[1]
        value, g = share_of_loss(y[:, : wanted.shape[1]].float(), wanted, call.n, self.criterion, self.temperature)
        if added:
            g = torch.nn.functional.pad(g, (0, 0, 0, added))
        call.backward(g.to(call.dtype), saved, self.packed, gradient, fresh)
        return value

    def all(self, losses: Tensor, gradient: Tensor) -> None:
        """Every slab in turn, into this group's rows ``[m]`` and ``[m, P]`` of the results."""
        real, filled = len(losses), len(self.rows)
        grads = gradient if real == filled and self.call.wide is None else torch.empty_like(self.rows)
        total = self.rows.new_zeros(filled)
        for start in self.call.starts:
            total += self.add(start, grads, fresh=start == 0)
        losses.copy_(total[:real])
        if grads is not gradient:
            self.call.keep(grads, gradient)


def _loss_and_gradient(
    call: _Call, targets: Tensor, criterion: Named, temperature: float, kind: Hashable | None = None
) -> tuple[Tensor, Tensor]:
    """Arguments as :func:`loss_and_gradient` has them; ``kind`` of its groups, None where they are run."""
    k, models = call.weights.shape[0], call.models
    losses = call.weights.new_empty(k)
    gradient = fresh_like(call.weights)
    groups = range(0, k, models)
    if call.n == 0:  # the mean over no queries, as the reference has it
        return losses.fill_(float("nan")), gradient.zero_()

    call.share_slabs(fewest=2)  # by all threads
    alone = partial(_loss_and_gradient, criterion=criterion, temperature=temperature)

    def whole(group: int) -> None:
        with _plain():
            rows = slice(group, group + models)
            if call.replayed(rows, kind, alone, (losses[rows], gradient[rows]), targets[rows]):
                return
            _Group(call, group, targets, criterion, temperature).all(losses[rows], gradient[rows])

    if len(groups) >= torch.get_num_threads() or len(call.starts) == 1:
        jobs.run([partial(whole, group) for group in groups])
        return losses, gradient

    # Fewer groups than threads: their slabs are jobs, and what each adds is kept until it can be added in the order above. A few slabs a
    # thread at a time, or memory would grow with the queries.
    parts: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def part(group: _Group, start: int) -> None:
        with _plain():
            grads = torch.empty_like(group.rows)
            parts[group.start, start] = group.add(start, grads, fresh=True), grads

    with _plain():
        made = [_Group(call, group, targets, criterion, temperature) for group in groups]
        total = [(torch.zeros_like(group.rows[:, 0]), torch.empty_like(group.rows)) for group in made]
        wave = max(1, 2 * torch.get_num_threads() // len(made))
        for first in range(0, len(call.starts), wave):
            starts = call.starts[first : first + wave]
            jobs.run([partial(part, group, start) for group in made for start in starts])
            for group, (loss, grads) in zip(made, total, strict=True):
                for start in starts:
                    value, more = parts.pop((group.start, start))
                    loss += value
                    if start == 0:
                        grads.copy_(more)
                    else:
                        grads += more
        for group, (loss, grads) in zip(made, total, strict=True):
            real = len(group.targets)
            losses[group.start : group.start + real] = loss[:real]
            call.keep(grads, gradient[group.start : group.start + real])
    return losses, gradient


_TRIALS = 8  # numbers of queries for which smaller groups are tried


@lru_cache(maxsize=256)
def _tried(layers: Layers, image: tuple[int, ...], own: bool) -> set[int]:
    """Numbers of queries that have had their trial."""
    return set()


def _sizes(layers: Layers, image: tuple[int, ...], own: bool, n: int, dtype: torch.dtype, threads: int) -> tuple[int, ...]:
    """:func:`_smaller_groups`, or none where the number of queries is another in every call: filling up costs less than so many trials."""
    tried = _tried(layers, image, own)
    if n not in tried and len(tried) >= _TRIALS:
        return ()
    tried.add(n)
    return _smaller_groups(layers, image, own, n, dtype, threads)


@lru_cache(maxsize=256)
def _smaller_groups(layers: Layers, image: tuple[int, ...], own: bool, n: int, dtype: torch.dtype, threads: int) -> tuple[int, ...]:
    """Sizes of smaller groups that give a full group's bits on this machine, found by trying: for a last group, and for few models.

    Filling one model up to eight is waste, and one group is work for one thread alone; but another shape may be another kernel of
    oneDNN, or another way of sharing a sum out among threads. Neither looks at the numbers, so random ones tell, once a process for
    each shape; small networks, where few numbers could agree by chance, are filled.
    """
    slots = [slot for pair in layer_slots(layers) for slot in (pair.weight, pair.bias) if slot is not None]
    parameters = numbers_of(layers)
    models, slab = group_shape(layers, image)
    if parameters < 1000:
        return ()
    generator = torch.Generator().manual_seed(0)
    kind: Any = {"generator": generator, "dtype": torch.float32, "device": "cpu"}
    weights, targets = torch.randn(models, parameters, **kind), torch.randn(models, n, 1, **kind)
    for slot in slots:
        weights[:, slot.offset : slot.stop] /= math.sqrt(math.prod(slot.shape[1:]))
    queries = torch.randn(*((models,) if own else ()), n, *image, **kind)

    def run(size: int) -> tuple[Tensor, Tensor]:
        call = _Call(weights[:size], queries[:size] if own else queries, layers, shape=(models, slab), sizes=(size,))
        return _loss_and_gradient(call, targets[:size], "mse", 1.0)

    full = run(models)
    return tuple(size for size in (2, 3, 4, 6) if size < models and all(torch.equal(x, y[:size]) for x, y in zip(run(size), full)))


def forward(weights: Tensor, queries: Tensor, layers: Layers) -> Tensor:
    """Outputs ``[k, n, K]``: bit for bit those inside :func:`loss_and_gradient`. Not differentiable."""
    kind = None if torch.is_autocast_enabled("cpu") else (forward, layers)
    run = lambda weights, queries: _forward(_Call(weights, queries, layers), kind)  # noqa: E731
    return run_or_replay(kind, run, partial(_share, layers), weights, queries)[0]


def _forward(call: _Call, kind: Hashable | None = None) -> tuple[Tensor]:
    weights = call.weights
    outputs = call.weights.new_empty(weights.shape[0], call.n, call.program.outputs)

    call.share_slabs(fewest=2)

    def part(group: int, starts: Sequence[int]) -> None:
        models = slice(group, group + call.models)
        with _plain():
            if call.replayed(models, kind, _forward, (outputs[models],)):
                return
            rows = call.rows(group)
            packed = call.pack(rows)
            for start in starts:
                mine = outputs[models, start : start + call.slab]
                mine.copy_(call.outputs(group, start, packed, rows.shape[0])[: mine.shape[0], : mine.shape[1]])

    groups = range(0, weights.shape[0], call.models)
    cuts = [call.starts] if len(groups) >= torch.get_num_threads() else [(start,) for start in call.starts]
    jobs.run([partial(part, group, starts) for group in groups for starts in cuts])
    return (outputs,)
