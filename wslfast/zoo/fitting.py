"""The training of a zoo's models, all at once: what is measured of them, epoch by epoch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import engine
from ..architecture import Architecture
from ..population import Population
from ..profiling import region
from .adam import StackedAdam
from .datasets import Dataset
from .grid import Cell
from .manifest import SPLITS
from .signals import Signals

_EVALUATION_BLOCK = 256
_ORDER, _DROPOUT = 0x5EED, 0xD509  # apart from the stream that draws the initial weights

Measures = dict[str, list[Any]]


def batch_generator(seed: int) -> torch.Generator:
    """The generator of a model's batch orders: one ``randperm`` of the training images per epoch."""
    return torch.Generator().manual_seed(seed << 16 | _ORDER)


def dropout_generator(seed: int) -> torch.Generator:
    """The generator of a model's dropout: at each step one ``rand`` for every dropout in the order of its forward, kept where it reaches
    p."""
    return torch.Generator().manual_seed(seed << 16 | _DROPOUT)


class Kept(Protocol):
    """Where the state of an unfinished training is kept."""

    def load(self) -> dict[str, Any] | None: ...

    def save(self, state: dict[str, Any]) -> None: ...


@dataclass
class _Points:
    """Training points on the device, and what a step takes of them."""

    inputs: Tensor
    targets: Tensor
    own: bool  # targets are [k, N, ...]
    criterion: str
    scale: float  # from the criterion to the mean that torch's losses take

    @property
    def count(self) -> int:
        return len(self.inputs)

    def chosen(self, index: Tensor) -> Tensor:
        """Targets ``[k, b, ...]`` of each model's batch ``index [k, b]``."""
        if not self.own:
            return self.targets.index_select(0, index.reshape(-1)).unflatten(0, index.shape)
        rows = torch.arange(len(index), device=index.device).unsqueeze(1)
        return self.targets[rows, index.long()]


def _points(data: Dataset | Signals, models: int, device: torch.device) -> _Points:
    pair = data.split("train")
    assert pair is not None
    inputs, targets = (t.to(device) for t in pair)
    if inputs.ndim == 4:  # so that the gather of a batch copies whole images into the layout that convolutions want
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    if isinstance(data, Dataset):
        return _Points(inputs, targets, False, "cross_entropy", 1.0)
    targets = targets[:models] if data.own else targets
    return _Points(inputs, targets, data.own, "mse", 2.0 / max(1, math.prod(data.output_shape)))


def train_models(
    weights: Tensor,
    architecture: Architecture,
    data: Dataset | Signals,
    cells: Sequence[Cell],
    kept: Sequence[int],
    batch_size: int,
    advance: Callable[[int, int, Tensor], None],
    unfinished: Kept | None = None,
) -> Population:
    """Train ``weights [k, P]`` in place, on their device: every kept checkpoint, ``k * len(kept)`` rows, model-major, with what was
    measured.

    Cross-entropy on a :class:`Dataset`, ``F.mse_loss`` on :class:`Signals`. Where a batch holds every point, all models take them in order.
    Entries that no optimiser trains (running statistics, buffers) are no part of weight decay.
    """
    k, device = len(cells), weights.device
    run = _Run(weights, architecture, _points(data, k, device), cells, batch_size)
    rows = torch.empty(k, len(kept), weights.shape[1], dtype=torch.float32)
    measured: list[Measures] = []
    begin = 0
    if unfinished is not None and (state := unfinished.load()) is not None:
        begin = run.load(state) + 1
        measured = list(state["measured"])
        rows[:, : len(measured)] = state["rows"]
    for epoch in range(begin, kept[-1] + 1):
        if epoch > 0:
            run.epoch(lambda losses, epoch=epoch: advance(epoch, kept[-1], losses))  # type: ignore[misc]
        if epoch in kept:
            with region("evaluate"):
                measured.append(_measure(weights, data, architecture))
            rows[:, len(measured) - 1] = weights.cpu()
        if unfinished is not None and epoch < kept[-1]:
            unfinished.save({**run.state(epoch), "rows": rows[:, : len(measured)], "measured": measured})
    table: dict[str, list[Any]] = {"model": [j for j in range(k) for _ in kept], "epoch": [e for _ in range(k) for e in kept]}
    for name in measured[0]:
        table[name] = [at[name][j] for j in range(k) for at in measured]
    for name, field in (("init_type", "init_type"), ("lr", "lr"), ("wd", "weight_decay"), ("seed", "seed")):
        table[name] = [getattr(c, field) for c in cells for _ in kept]
    return Population(architecture, rows.flatten(0, 1), {name: tuple(column) for name, column in table.items()})


class _Run:
    """All that an epoch changes."""

    def __init__(self, weights: Tensor, architecture: Architecture, points: _Points, cells: Sequence[Cell], batch_size: int) -> None:
        self.weights, self.architecture, self.points, self.batch_size = weights, architecture, points, batch_size
        self.adam = StackedAdam(weights, [c.lr for c in cells], [c.weight_decay for c in cells])
        self.orders = [batch_generator(c.seed) for c in cells]
        random = engine.random_in_training(architecture)
        self.dropout = [dropout_generator(c.seed) for c in cells] if random else []
        fixed = [slot for slot in architecture.parameters if slot.name in architecture.untrained]
        self.fixed = [slice(slot.offset, slot.stop) for slot in fixed]
        self.names = [slot.name for slot in fixed]

    def epoch(self, advance: Callable[[Tensor], None]) -> None:
        """One pass over the training points."""
        points, n = self.points, self.points.count
        if self.batch_size >= n and points.criterion == "mse":  # everything at once, in whatever order
            targets = points.targets if points.own else points.targets.expand(len(self.weights), *points.targets.shape)
            advance(self._step(points.inputs, targets, None))
            return
        order = torch.stack([torch.randperm(n, generator=g, dtype=torch.int32) for g in self.orders]).to(self.weights.device)  # [k, n]
        for start in range(0, n, self.batch_size):
            chosen = order[:, start : start + self.batch_size]  # the last batch is what is left
            advance(self._step(points.inputs, points.chosen(chosen), chosen))

    def _step(self, inputs: Tensor, targets: Tensor, index: Tensor | None) -> Tensor:
        weights, points = self.weights, self.points
        losses, gradient, statistics = engine.training_step(
            weights, inputs, targets, self.architecture, points.criterion, index=index, generators=self.dropout
        )
        with region("optimise"):
            if points.scale != 1.0:
                gradient *= points.scale
                losses = losses * points.scale
            held = [weights[:, part].clone() for part in self.fixed]
            self.adam.step(gradient)
            for part, name, value in zip(self.fixed, self.names, held, strict=True):
                weights[:, part] = statistics.get(name, value).to(weights).view_as(value)
        return losses

    def state(self, epoch: int) -> dict[str, Any]:
        """What :meth:`load` goes on from, after an epoch."""
        state = {"epoch": epoch, "weights": self.weights, "orders": _states(self.orders)}
        if self.dropout:
            state["dropout"] = _states(self.dropout)
        return {**state, **{f"adam.{name}": value for name, value in self.adam.state().items()}}

    def load(self, state: Mapping[str, Any]) -> int:
        """Go on from a :meth:`state`; returns its epoch."""
        self.weights.copy_(state["weights"])
        self.adam.load({name.removeprefix("adam."): value for name, value in state.items() if name.startswith("adam.")})
        for name, generators in (("orders", self.orders), ("dropout", self.dropout)):
            for generator, held in zip(generators, state.get(name, ()), strict=bool(generators)):
                generator.set_state(held.clone())
        return int(state["epoch"])


def _states(generators: Sequence[torch.Generator]) -> Tensor:
    return torch.stack([generator.get_state() for generator in generators])


# -- what is measured ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def _measure(weights: Tensor, data: Dataset | Signals, architecture: Architecture) -> Measures:
    """What is known of each model after an epoch, over whole splits: k values each; None where not finite."""
    if isinstance(data, Signals):
        return _losses(weights, data, architecture)
    device = weights.device
    accuracy: dict[str, list[float]] = {}
    total = torch.zeros(len(weights), dtype=torch.float64, device=device)
    for name in SPLITS:
        images, labels = (t.to(device) for t in data.split(name))
        right = torch.zeros(len(weights), dtype=torch.int64, device=device)
        for queries, target in zip(images.split(_EVALUATION_BLOCK), labels.split(_EVALUATION_BLOCK), strict=True):
            outputs = engine.forward(weights, queries, architecture)  # [k, b, K]
            right += (outputs.argmax(-1) == target).sum(1)
            if name == "train":
                total -= outputs.log_softmax(-1).gather(-1, target.expand(len(weights), -1).unsqueeze(-1)).sum((1, 2), dtype=torch.float64)
        accuracy[name] = (right.double() / len(labels)).tolist()
    loss = (total / len(data.train_labels)).tolist()
    return {
        **{f"{name}_acc": list(values) for name, values in accuracy.items()},
        "ggap": [a - b for a, b in zip(accuracy["train"], accuracy["test"], strict=True)],
        "train_loss": [_finite(v) for v in loss],
    }


def _losses(weights: Tensor, data: Signals, architecture: Architecture) -> Measures:
    """The mean squared error of each model on its signal, split by split."""
    k, measures = len(weights), {}
    for name in SPLITS:
        pair = data.split(name)
        if pair is None:
            continue
        inputs, targets = (t.to(weights.device) for t in pair)
        total = torch.zeros(k, dtype=torch.float64, device=weights.device)
        for start in range(0, len(inputs), _EVALUATION_BLOCK):
            part = slice(start, start + _EVALUATION_BLOCK)
            outputs = engine.forward(weights, inputs[part], architecture)
            wanted = targets[:k, part] if data.own else targets[part]
            total += (outputs - wanted).double().square().flatten(1).sum(1)
        mean = total / (len(inputs) * max(1, math.prod(data.output_shape)))
        measures[f"{name}_loss"] = [_finite(v) for v in mean.tolist()]
    signals = {"signal": list(range(k))} if data.own else {}
    return {**signals, **measures}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
