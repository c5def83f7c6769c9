"""Losses, gradients and outputs of any graph: groups of models, slabs of queries, one plain torch call an operation.

A group of M models runs on a slab of q queries: forward, the criterion's share and its gradient written out, and one backward through
torch's graph, which then is gone. Which M and q is a pure function of the graph and of the number of queries, never of k: the last
group is filled up with idle models. Where they give the same bits on this machine, smaller groups run instead: of fewer models, and of as
many as leave no thread without a group (``company.py``). On a CPU the
number of queries is filled up to a multiple of 16, so that every model's numbers lie alike in memory whatever its place in the group.

Groups are jobs of one thread each (``cpu/jobs.py``) where there is enough work for more than one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..cpu import jobs
from ..cpu.memory import fresh_like, keep_freed_memory
from ..cpu.products import operand_dtype
from ..cpu.recording import Run
from ..cpu.replay import kind_of_loss, own_queries, replay, run_or_replay
from ..criteria import Named, share_of_loss
from ..graph import Graph
from .company import agrees_when_shared, by_itself, random_models, split
from .compiler import compile_program
from .costs import FILL, LEAST_SHARED, group_shape, least_worth, operations, sizes, whole_models
from .leaves import PACKED, copies_of, leaves_of
from .passes import by_graph, by_tape, no_gradients

_FEW = 1000  # numbers of a product: so few could agree by chance, and a group is always filled


class Call:
    """What holds for all groups of one call."""

    fill = FILL

    def __init__(
        self, weights: Tensor, queries: Tensor, graph: Graph, index: Tensor | None, size: int | None = None, once: bool = True
    ) -> None:
        """``once``: nobody differentiates twice, or with respect to the queries. If not, torch's graph is what runs."""
        self.graph, self.index, self.once = graph, index, once
        self.weights, self.queries, self._token = weights, queries, object()
        self._shared: dict[int, list[Any]] = {}  # what is made of slabs that all models see
        self.own = index is not None or queries.ndim == len(graph.input_shape) + 2
        self.n = index.shape[1] if index is not None else queries.shape[int(self.own)]
        self.plain = weights.device.type == "cpu"
        if self.plain:
            keep_freed_memory()
        segmented = self.plain and once and weights.dtype == torch.float32
        self.program = compile_program(graph, self.own, self.plain, segmented)
        full, self.slab = group_shape(graph, self.n)
        self.share: bool | None = None  # whether products take all threads; None: not decided
        if weights.device.type != "cpu":  # the caller has cut models into chunks that fit its memory
            full, self.slab = max(1, weights.shape[0]), max(1, self.n)
        chosen = (size, size) if size else self._sizes(full) if self.plain and weights.shape[0] else (full, full)
        self.models, self.last = chosen  # of a group, and of the last one
        # parameters whose gradients may be written where the result is: with several slabs they are sums
        one = self.plain and self.n <= self.slab and graph.parameters >= PACKED
        self.large = [(p, s) for p, s in zip(self.program.places, graph.slots, strict=True) if s.size >= PACKED] if one else []

    def shared_among(self) -> tuple[int, int]:
        """Threads that take groups side by side, and models of the smallest group that is worth one."""
        if jobs.controls() is None or self.small() or not self.once:  # torch's graph is made by one
            return 1, 2
        return torch.get_num_threads(), least_worth(self.graph, self.n)

    def small(self) -> bool:
        """Whether there are too few models for two groups that are each worth a thread."""
        return self.weights.shape[0] < 2 * least_worth(self.graph, self.n)

    def filled(self, group: int) -> int:
        """Models that run in a group: those that it has, and idle ones."""
        return self.models if self.weights.shape[0] - group >= self.models else self.last

    @property
    def tried(self) -> int:
        """Queries of a trial: those of a full slab and of the last one. One stands for all numbers that are filled up to the same."""
        whole, rest = (self.slab if self.n >= self.slab else 0), self.n % self.slab
        return whole + (rest if rest < 2 or rest % self.fill == 0 else rest + -rest % self.fill - 1)

    def _sizes(self, full: int) -> tuple[int, int]:
        multiple = self._multiple()
        if full % multiple:  # a large network: each model by itself
            full = 1
        if self.graph.parameters * self.tried < _FEW:
            return full, full
        return split(self.weights.shape[0], full, self._key(), partial(self.trial, max(3, full)), *self.shared_among(), multiple)

    def _multiple(self) -> int:
        """Of how many models every group is a multiple, or its last model's last numbers would be others."""
        slabs = {min(self.slab, self.n), self.n % self.slab} - {0} if self.once else {self.n}
        filled = sorted({-(-q // self.fill) * self.fill for q in slabs})
        autocast = torch.is_autocast_enabled("cpu")  # to 16 bits, some of it
        return whole_models(self.graph, tuple(filled), 2 if autocast else self.weights.itemsize)

    def _key(self) -> Hashable:
        """All that the bits of a group's results may depend on."""
        return type(self), self.graph, self.tried, self.own, self.once, self.weights.dtype, operand_dtype(), jobs.threads_inside()

    def trial(self, full: int, size: int, order: Sequence[int], share: bool = False) -> Sequence[Tensor]:
        """Losses (of torch's graph: outputs) and gradients of the first ``size`` of random models in an order, run in one group; ``share``:
        products on all threads."""
        rows = list(order[:size])
        with by_itself():
            weights, queries, targets = random_models(self.graph, self.tried, self.own, full, self.weights.dtype)
            call = self.again(weights[rows], queries[rows] if self.own else queries, rows)
            call.share = share
            return loss_and_gradient_of(call, targets[rows], "mse", 1.0) if self.once else _outputs_and_slopes(call, targets[rows])

    def again(self, weights: Tensor, queries: Tensor, rows: list[int]) -> Call:
        """A call like this one for other models, numbered ``rows``, in one group."""
        return Call(weights, queries, self.graph, None, size=len(rows), once=self.once)

    def shares_products(self) -> bool:
        """Whether matrix products take all threads: where groups run in one thread, products are many and nearly all, and bits stay."""
        if self.share is None:
            threads = torch.get_num_threads()
            able = threads > 1 and self.plain and jobs.controls() is not None
            self.share = able and self._mostly_products() and in_one_thread(self) and self._agrees_when_shared(threads)
        return self.share

    def _mostly_products(self) -> bool:
        _, convolved, products = sizes(self.graph)
        return convolved <= products and operations(self.graph, self.weights.shape[0], self.n) >= LEAST_SHARED

    def _agrees_when_shared(self, threads: int) -> bool:
        key, both = (self._key(), threads), {self.models, self.last}
        return all(agrees_when_shared(m, key, partial(self.trial, m)) for m in both)

    def starts(self) -> range:
        return range(0, self.n, self.slab)

    def rows(self, group: int) -> Tensor:
        """Weights ``[M, P]`` of a group, filled up with idle models: copies of its last."""
        rows = self.weights if self.models == self.weights.shape[0] else self.weights[group : group + self.models]
        missing = self.filled(group) - rows.shape[0]
        return rows if missing == 0 else torch.cat((rows, rows[-1:].expand(missing, rows.shape[1])))

    def slab_of(self, group: int, start: int, whole: bool = False) -> Tensor:
        """Queries of a slab (of all, where ``whole``), as many as a multiple of 16, and of a group where they are each model's own."""
        part = slice(start, start + (self.n if whole else self.slab))
        if self.index is not None:
            rows = self.index[group : group + self.models, part]
            x = self.queries.index_select(0, rows.reshape(-1)).unflatten(0, rows.shape)
        elif self.own:
            x = self.queries[group : group + self.models, part]
        else:
            x = self.queries[part]
        idle = self.filled(group) - len(x) if self.own else 0
        if idle:
            x = torch.cat((x, x[-1:].expand(idle, *x.shape[1:])))
        axis = int(self.own)
        missing = -x.shape[axis] % self.fill if self.plain else 0
        if missing:
            more = x.narrow(axis, 0, 1)
            shape = list(x.shape)
            shape[axis] = missing
            x = torch.cat((x, more.expand(shape)), axis)
        return x

    def share_values(self) -> None:
        """Make :meth:`values` of all slabs that all models see, by all threads. One slab is made when it is asked for: groups that are
        replayed do not."""
        if not self.own and self.n > self.slab:
            self._shared = {start: self.program.prepare(self.slab_of(0, start)) for start in self.starts()}

    def values(self, group: int, start: int) -> list[Any]:
        """What is made of a slab's queries alone."""
        made = self._shared.get(start)
        if made is None:
            made = self.program.prepare(self.slab_of(group, start))
            if not self.own:
                self._shared[start] = made
        return made

    def replayed(
        self, part: slice, kind: Hashable | None, run: Run, places: Sequence[Tensor] | None, *more: Tensor
    ) -> Sequence[Tensor] | None:
        """Results of a group's models, replayed; None where they have to be run. ``run``: of a call that is that group alone, and
        ``more``."""
        if kind is None or self.n > self.slab or self.weights.shape[0] <= self.models:
            return None
        queries, filled = self.queries[part] if self.own else self.queries, self.filled(part.start)
        share = bool(self.share)

        def again(weights: Tensor, queries: Tensor, *more: Tensor) -> Sequence[Tensor]:
            call = Call(weights, queries, self.graph, None, size=filled)
            call.share = share
            return run(call, *more)

        return replay((kind, filled, share), again, (self.weights[part], queries, *more), places, call=self._token)


def _jobs(count: int, call: Call, run: Callable[[int], None]) -> None:
    """Run every group once: several at a time where that is faster, and on a CPU always with one thread inside each."""
    groups = [partial(run, group) for group in range(0, count, call.models)]
    if call.weights.device.type != "cpu":
        for group in groups:
            group()
    elif in_one_thread(call):
        jobs.run_here(groups, call.shares_products())
    else:
        jobs.run(groups)


def in_one_thread(call: Call) -> bool:
    """Whether a call's groups run one after another, which is done sooner than the same by several threads."""
    return call.weights.shape[0] <= call.models or call.small()


def loss_and_gradient(
    weights: Tensor,
    queries: Tensor,
    targets: Tensor,
    graph: Graph,
    criterion: Named,
    temperature: float = 2.0,
    index: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Per-model losses ``[k]`` and gradients ``[k, P]`` with respect to each model's own weights.

    Queries ``[n, *input]`` shared by all models or ``[k, n, *input]``; with ``index [k, n]``, a pool ``[N, *input]`` from which each model
    takes its own. Targets ``[k, n, *out]``, or labels ``[k, n]`` for ``cross_entropy``.
    """
    queries, index, kind = own_queries(queries, index, kind_of_loss("stacked", graph, criterion, temperature))

    def run(weights: Tensor, queries: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return loss_and_gradient_of(Call(weights, queries, graph, index), targets, criterion, temperature, kind)

    losses, gradient = run_or_replay(kind, run, partial(_share, graph), weights, queries, targets)
    return losses, gradient


def _share(graph: Graph, weights: Tensor, queries: Tensor) -> bool | None:
    """Whether a call's products take all threads; None where it has several groups: each is replayed by itself."""
    call = Call(weights, queries, graph, None)
    return call.shares_products() if weights.shape[0] <= call.models else None


def loss_and_gradient_of(
    call: Call, targets: Tensor, criterion: Named, temperature: float, kind: Hashable | None = None
) -> tuple[Tensor, Tensor]:
    """Arguments as :func:`loss_and_gradient` has them; ``kind`` of its groups, None where they are run."""
    weights, graph, n, k = call.weights, call.graph, call.n, call.weights.shape[0]
    if n == 0:  # the mean over no queries, as the reference has it
        return weights.new_full((k,), float("nan")), torch.zeros_like(weights, memory_format=torch.contiguous_format)
    autocast = _autocast(weights.device.type)
    with no_gradients(), autocast():
        call.share_values()

    def group(start: int, into: Mapping[int, Tensor]) -> tuple[Tensor, list[Tensor]]:
        rows = call.rows(start)
        models, real = rows.shape[0], min(k - start, call.models)
        wanted = targets if real == k else targets[start : start + real]
        if real < models:
            wanted = torch.cat((wanted, wanted[-1:].expand(models - real, *wanted.shape[1:])))

        def share(at: int, made: Tensor) -> tuple[Tensor, Tensor]:
            target = wanted if call.slab >= n else wanted[:, at : at + call.slab]
            q = target.shape[1]
            outputs = made if q == made.shape[1] else made[:, :q]
            outputs = outputs.contiguous()  # models that lie between each other would be added up in an order that depends on how many
            value, slope = share_of_loss(outputs.to(weights.dtype), target, n, criterion, temperature)
            if made.shape[1] > q:
                slope = torch.cat((slope, slope.new_zeros(models, made.shape[1] - q, *slope.shape[2:])), 1)
            return value, slope

        def prepared(at: int) -> list[Any]:
            with no_gradients(), autocast():
                return call.values(start, at)

        slabs = ((at, prepared(at)) for at in call.starts())
        leaves = copies_of(rows, graph)
        if call.plain and autocast is nullcontext:
            value, slopes = by_tape(call.program, leaves, slabs, share, into)
        else:
            value, slopes = by_graph(call.program, leaves, slabs, share, autocast)
        flat = [s if s.ndim == 2 else s.reshape(models, -1) for s in slopes]
        return (value, flat) if real == models else (value[:real], [s[:real] for s in flat])

    if call.shares_products():
        call.large = []  # a product that all threads share is slow where it writes into rows of a matrix
    if call.models >= k and not call.large:  # one group: what it gives is the result
        results: list[tuple[Tensor, list[Tensor]]] = []
        _jobs(k, call, lambda start: results.append(group(start, {})))
        ((losses, slopes),) = results
        return losses, torch.cat(slopes, 1, out=fresh_like(weights))
    losses, gradient = weights.new_empty(k), fresh_like(weights)
    alone = partial(loss_and_gradient_of, criterion=criterion, temperature=temperature)

    def keep(start: int) -> None:
        rows = gradient[start : start + call.models]
        models = slice(start, start + call.models)
        if call.replayed(models, kind, alone, (losses[models], rows), targets[models]) is not None:
            return
        whole = rows.shape[0] == call.filled(start)  # no idle models, whose gradients would have no place
        into = {place: rows[:, slot.offset : slot.stop].view(-1, *slot.shape) for place, slot in call.large if whole}
        losses[start : start + rows.shape[0]], flat = group(start, into)
        if not call.large:
            torch.cat(flat, 1, out=rows)
            return
        for slot, slope in zip(graph.slots, flat, strict=True):
            part = rows[:, slot.offset : slot.stop]
            if part.data_ptr() != slope.data_ptr():  # elsewhere than in the memory that was offered
                part.copy_(slope)

    _jobs(k, call, keep)
    return losses, gradient


def _autocast(device: str) -> Callable[[], Any]:
    """The caller's autocast setting, for threads, which do not inherit it."""
    enabled = torch.is_autocast_enabled(device)
    if not enabled:
        return nullcontext
    return partial(torch.autocast, device, torch.get_autocast_dtype(device), enabled=enabled)


def forward(weights: Tensor, queries: Tensor, graph: Graph) -> Tensor:
    """Outputs ``[k, n, *out]``, not differentiable."""
    kind = None if torch.is_autocast_enabled("cpu") else (forward, graph)
    run = lambda weights, queries: (_forward(Call(weights, queries, graph, None), kind),)  # noqa: E731
    return run_or_replay(kind, run, partial(_share, graph), weights, queries)[0]


def _forward(call: Call, kind: Hashable | None = None) -> Tensor:
    weights, graph = call.weights, call.graph
    autocast = _autocast(weights.device.type)
    with torch.no_grad(), autocast():
        call.share_values()
    pieces: dict[tuple[int, int], Tensor] = {}

    def group(start: int) -> None:
        replayed = call.replayed(slice(start, start + call.models), kind, lambda call: (_forward(call),), None)
        if replayed is not None:
            pieces[start, 0] = replayed[0]
            return
        with torch.no_grad(), autocast():
            rows = call.rows(start)
            ready = call.program.weights(copies_of(rows, graph))
            real = min(weights.shape[0] - start, call.models)
            for at in call.starts():
                values = call.values(start, at)
                made = call.program.outputs(values, ready, rows.shape[0], values[call.program.query].shape[int(call.own)])
                pieces[start, at] = made[:real, : min(call.slab, call.n - at)]

    _jobs(weights.shape[0], call, group)
    rows = [torch.cat([pieces[start, at] for at in call.starts()], 1) for start in range(0, weights.shape[0], call.models)]
    return torch.cat(rows) if len(rows) > 1 else rows[0].contiguous()


def differentiable(weights: Tensor, queries: Tensor, graph: Graph) -> Tensor:
    """Outputs ``[k, n, *out]`` through torch's own graph, differentiable in weights and queries as often as torch is, in the groups in
    which they get the bits of a full one. For callers that cut models into chunks that fit memory."""
    return _differentiable(Call(weights, queries, graph, None, once=False))


def _differentiable(call: Call) -> Tensor:
    weights, graph = call.weights, call.graph
    outputs, autocast = list[Tensor](), _autocast(weights.device.type)

    def run() -> None:
        with torch.enable_grad(), autocast():
            for start in range(0, weights.shape[0], call.models):
                x, rows = call.slab_of(start, 0, whole=True), call.rows(start)
                ready = call.program.weights((copies_of if call.plain else leaves_of)(rows, graph))
                made = call.program.outputs(call.program.prepare(x), ready, rows.shape[0], x.shape[int(call.own)])
                outputs.append(made[: weights.shape[0] - start, : call.n])

    jobs.run([run]) if weights.device.type == "cpu" else run()
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0].contiguous()


def _outputs_and_slopes(call: Call, slope: Tensor) -> list[Tensor]:
    """Outputs ``[k, n, *out]`` of a call that is not ``once``, and the gradients of their product with ``slope`` to the weights and, where
    each model has its own, to the queries."""
    call.weights.requires_grad_()
    leaves = [call.weights, *([call.queries.requires_grad_()] if call.own else [])]
    outputs = _differentiable(call)
    if not outputs.requires_grad:  # of a network that ends in what has no derivative
        return [outputs]
    slopes = torch.autograd.grad(outputs, leaves, slope.to(outputs.dtype), allow_unused=True, materialize_grads=True)
    return [outputs.detach(), *slopes]


def plain(weights: Tensor, queries: Tensor, graph: Graph) -> Tensor:
    """Outputs ``[k, n, *out]`` in plain operators that any transform sees through. Bits may depend on how many models there are."""
    own = queries.ndim == len(graph.input_shape) + 2
    program = compile_program(graph, own, False)
    ready = program.weights(leaves_of(weights, graph))
    return program.outputs(program.prepare(queries), ready, weights.shape[0], queries.shape[int(own)])


__all__ = ["differentiable", "forward", "group_shape", "loss_and_gradient", "plain", "sizes"]
