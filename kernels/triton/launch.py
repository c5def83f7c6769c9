"""A population on Triton kernels: outputs, losses and their gradients.

The contract is reference.py's: weights ``[k, P]``, queries ``[n, C, H, W]`` shared by all models or ``[k, n, C, H, W]``, and
here also an image pool ``[rows, C, H, W]`` with ``index`` ``[k, n]``; outputs ``[k, n, K]`` fp32.

``loss_and_gradient`` computes both in one call, layer by layer for all models of a chunk at once, so that no activation
outlives it. Chunks cut models only, and a model's sums keep their order: neither chunks nor neighbours change a bit. With
``mode="network"`` each program takes its model through the whole network instead (network.py): three launches, little memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..layers import Layers
from . import launcher
from .budget import MEMORY, choose_mode, models_per_chunk, too_many
from .buffers import Activations, Queries, axes_of
from .configurations import joins, tuning
from .convolution import launch_configuration, stage_forward
from .criterion import CRITERIA, criterion_forward_backward, gradient_scale
from .devices import matrix_unit
from .head import fits, head_loss_and_gradient
from .input_gradients import stage_dx
from .joint_gradient import stage_joint
from .network_launch import network_forward, network_loss
from .packing import fold, pack
from .schedule import PRECISIONS
from .schedule import schedule as schedule_of
from .stages import Schedule
from .tables import FoldTables, fold_tables
from .weight_gradients import stage_dw

# Layers that were seen, by identity: hashing some twenty records at every call takes longer than a launch.
_schedules: dict[tuple[int, tuple[int, ...]], tuple[Layers, Schedule]] = {}


def _device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device: make it the tensors'."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _forward(
    schedule: Schedule,
    held: Activations,
    weights: Tensor,
    packed: Tensor,
    images: Tensor,
    index: Tensor | None,
    k: int,
    n: int,
    precision: str,
    *,
    shared: bool,
    gradient: bool,
    stages: int | None = None,
) -> None:
    """The first ``stages`` stages, all of them by default."""
    for i, (stage, place) in enumerate(zip(schedule.stages[:stages], schedule.placements, strict=False)):
        stage_forward(
            images if i == 0 else held.outputs[i - 1],
            index if i == 0 else None,
            packed[:, place.forward :],
            weights if place.bias is None else weights[:, place.bias.offset :],
            held.outputs[i],
            held.codes[i],
            held.slopes[i],
            k,
            n,
            stage,
            launch_configuration("forward", stage, precision, packed.device),
            shared=shared and i == 0,
            gradient=gradient,
        )


def _backward(
    schedule: Schedule,
    held: Activations,
    packed: Tensor,
    images: Tensor,
    index: Tensor | None,
    partials: Tensor,
    tables: FoldTables,
    k: int,
    n: int,
    precision: str,
    *,
    shared: bool,
    g: Tensor,
    stages: int,
    lowest: int = 0,
) -> None:
    """Weight-gradient partials of stages ``lowest`` to ``stages`` - 1, down from ``g``, the gradient of the last one's output.
    Overwrites the activations: a stage's weight gradient reads its input before the input gradient is written over it."""
    unit = matrix_unit(launcher.capability_of(packed.device))
    joint = lowest == 0 and tuning().joint and joins(schedule, precision, unit)
    for i in range(stages - 1, -1, -1):
        stage = schedule.stages[i]
        if i < lowest:
            break
        stage_dw(
            images if i == 0 else held.outputs[i - 1],
            index if i == 0 else None,
            g,
            held.codes[i],
            held.slopes[i],
            partials[:, tables.bases[i] :],
            k,
            n,
            stage,
            launch_configuration("dw", stage, precision, packed.device),
            shared=shared and i == 0,
        )
        if i == 1 and joint:
            stage_joint(
                g,
                held.codes[1],
                held.slopes[1],
                packed[:, schedule.placements[1].backward :],
                held.outputs[0],
                held.codes[0],
                held.slopes[0],
                images,
                index,
                partials[:, tables.bases[0] :],
                k,
                n,
                stage,
                schedule.stages[0],
                launch_configuration("joint", stage, precision, packed.device),
                shared=shared,
            )
            break
        if i:
            below = held.outputs[i - 1]
            stage_dx(
                g,
                held.codes[i],
                held.slopes[i],
                packed[:, schedule.placements[i].backward :],
                below,
                held.slopes[i - 1],
                k,
                n,
                stage,
                schedule.stages[i - 1],
                launch_configuration("dx", stage, precision, packed.device),
            )
            g = below


def _check(weights: Tensor, schedule: Schedule, n: int, precision: str) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; known: {list(PRECISIONS)}")
    if weights.ndim != 2 or weights.shape[1] != schedule.parameters or not weights.is_floating_point():
        raise ValueError(f"expected weights [k, {schedule.parameters}], got {list(weights.shape)} {weights.dtype}")
    _refuse(too_many(schedule, n, sums=False))


def _refuse(why: str | None) -> None:
    if why is not None:
        raise ValueError(why)


def _schedule(layers: Layers, queries: Tensor) -> Schedule:
    shape = tuple(queries.shape[-axes_of(queries) :])
    known = _schedules.get((id(layers), shape))
    if known is None or known[0] is not layers:
        if len(_schedules) >= 256:
            _schedules.clear()
        known = _schedules[id(layers), shape] = layers, schedule_of(layers, shape)
    return known[1]


def _mode(asked: str | None, schedule: Schedule, n: int, precision: str, gradient: bool, memory: int) -> str:
    if asked not in (None, "layers", "network"):
        raise ValueError(f"unknown mode {asked!r}; known: 'layers', 'network', None")
    return asked or choose_mode(schedule, n, precision, gradient, memory)[0]


def forward(
    weights: Tensor,
    queries: Tensor,
    layers: Layers,
    precision: str = "tf32",
    *,
    index: Tensor | None = None,
    memory: int | None = None,
    mode: str | None = None,
) -> Tensor:
    """Outputs ``[k, n, K]`` fp32, without autograd. ``memory`` bounds the bytes of activations in flight.

    ``index`` ``[k, n]`` picks rows of a query pool. Checking it would wait for the device: a row that is not there is a query of NaN.
    ``mode``: ``layers``, ``network`` (raises Unplannable where it cannot), or None for ``choose_mode``.
    """
    schedule, k = _schedule(layers, queries), weights.shape[0]
    memory = memory or MEMORY
    with torch.no_grad(), _device(weights):
        source = Queries(queries, index, schedule, k, precision)
        n = source.n
        _check(weights, schedule, n, precision)
        outputs = torch.empty(k, n, schedule.classes, dtype=torch.float32, device=weights.device)
        if k == 0:
            return outputs
        if _mode(mode, schedule, n, precision, False, memory) == "network":
            network_forward(weights, queries, source.index, outputs, schedule, precision, source.rank, memory, shared=source.shared)
            return outputs
        chunk = models_per_chunk(schedule, k, n, precision, False, memory)
        held = Activations(schedule, chunk, n, precision, False, weights.device)
        direct = chunk == k or chunk % 8 == 0  # else a chunk's outputs may begin anywhere, for which there is another kernel
        for start in range(0, k, chunk):
            part = weights[start : start + chunk]
            if direct:
                held.outputs[-1] = outputs[start:]
            images, own = source.of(start, len(part))
            _forward(
                schedule,
                held,
                part,
                pack(part, schedule, precision),
                images,
                own,
                part.shape[0],
                n,
                precision,
                shared=source.shared,
                gradient=False,
            )
            if not direct:
                outputs[start : start + chunk] = held.outputs[-1].view(chunk, n, schedule.classes)[: len(part)]
        return outputs


def loss_and_gradient(
    weights: Tensor,
    queries: Tensor,
    targets: Tensor,
    layers: Layers,
    criterion: str,
    temperature: float = 2.0,
    precision: str = "tf32",
    *,
    index: Tensor | None = None,
    memory: int | None = None,
    mode: str | None = None,
    on_queries: Callable[[int, int, Tensor, Tensor], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Per-model losses ``[k]`` and gradients ``[k, P]`` with respect to each model's own weights, both fp32.

    ``targets`` ``[k, n, K]``, or integer labels ``[k, n]`` for cross_entropy. Criteria: see ``criteria.criterion_values``; ``gradient``
    takes dL/d outputs for targets and gives zeros for losses. ``index``, ``memory`` and ``mode``: see :func:`forward`.
    ``on_queries`` (layer by layer) is for query_gradient.py: it is called with a chunk's first model, its models, the gradient of the
    first stage's stored output and each model's gain, and that stage's own weights then get no gradient.
    """
    schedule, k = _schedule(layers, queries), weights.shape[0]
    memory = memory or MEMORY
    with torch.no_grad(), _device(weights):
        source = Queries(queries, index, schedule, k, precision)
        n, device = source.n, weights.device
        _check(weights, schedule, n, precision)
        if not targets.is_floating_point():
            if criterion != "cross_entropy" or targets.shape != (k, n):
                raise ValueError(f"labels are [{k}, {n}] and for cross_entropy, got {list(targets.shape)}, {criterion}")
            criterion, targets = "labels", targets.long()
        elif targets.shape != (k, n, schedule.classes):
            raise ValueError(f"expected targets {[k, n, schedule.classes]}, got {list(targets.shape)}")
        if criterion not in (*CRITERIA, "labels", "gradient"):
            raise ValueError(f"unknown criterion {criterion!r}")
        losses = torch.empty(k, dtype=torch.float32, device=device)
        gradient = torch.empty(k, schedule.parameters, dtype=torch.float32, device=device)
        if k == 0:
            return losses, gradient
        if _mode(mode, schedule, n, precision, True, memory) == "network":
            network_loss(
                weights,
                queries,
                source.index,
                targets,
                losses,
                gradient,
                schedule,
                n,
                criterion,
                temperature,
                precision,
                source.rank,
                memory,
                shared=source.shared,
            )
            return losses, gradient
        _refuse(too_many(schedule, n))
        chunk = models_per_chunk(schedule, k, n, precision, True, memory)
        held = Activations(schedule, chunk, n, precision, True, device)
        tables = fold_tables(schedule, n, device)
        partials = torch.empty(chunk, tables.row, dtype=torch.float32, device=device)
        gain = torch.empty(chunk, dtype=torch.float32, device=device)
        scale = gradient_scale(criterion, n, schedule.classes, temperature)
        fused = fits(schedule, n) and (on_queries is None or len(schedule.stages) > 2)
        stages = len(schedule.stages) - 2 * fused
        for start in range(0, k, chunk):
            rows = weights[start : start + chunk]
            count = rows.shape[0]
            packed = pack(rows, schedule, precision)
            images, own = source.of(start, count)
            _forward(
                schedule,
                held,
                rows,
                packed,
                images,
                own,
                count,
                n,
                precision,
                shared=source.shared,
                gradient=True,
                stages=stages,
            )
            if fused:
                head_loss_and_gradient(
                    held.outputs[-3],
                    held.slopes[-3],
                    packed,
                    rows,
                    targets[start:],
                    losses[start:],
                    gain,
                    partials,
                    tables.bases,
                    count,
                    n,
                    schedule,
                    launch_configuration("head", schedule.stages[-2], precision, device),
                    criterion,
                    temperature,
                )
            else:
                criterion_forward_backward(
                    held.outputs[-1],
                    targets[start:],
                    held.slopes[-1],
                    losses[start:],
                    gain,
                    held.gradient,
                    count,
                    n,
                    schedule.stages[-1],
                    criterion,
                    temperature,
                    precision,
                )
            _backward(
                schedule,
                held,
                packed,
                images,
                own,
                partials,
                tables,
                count,
                n,
                precision,
                shared=source.shared,
                g=held.outputs[-3] if fused else held.gradient,
                stages=stages,
                lowest=int(on_queries is not None),
            )
            if on_queries is not None:
                on_queries(start, count, held.outputs[0], gain)
            fold(partials[:count], gain, gradient[start:], schedule, tables, scale)
        return losses, gradient


def warmup(
    layers: Layers,
    input_shape: tuple[int, ...],
    n: int,
    criterion: str = "mse",
    precision: str = "tf32",
    device: torch.device | str = "cuda",
    *,
    memory: int | None = None,
    mode: str | None = None,
) -> None:
    """Compile the kernels and build the tables that calls with n queries use, for any k: after it, a call with ``criterion``, forward or
    through ``differentiable_forward``, with shared queries, each model's own or rows of a pool, in one chunk or many, makes no copy
    from the host and compiles nothing, so a CUDA graph can capture it."""
    schedule = schedule_of(layers, input_shape)
    weights = torch.zeros(1, schedule.parameters, dtype=torch.float32, device=device)
    queries = torch.zeros(n, *input_shape, dtype=torch.float32, device=device)
    outputs = torch.zeros(1, n, schedule.classes, dtype=torch.float32, device=device)
    kinds = {"labels": (torch.long, (1, n))}
    kind, shape = kinds.get(criterion, (torch.float32, outputs.shape))
    targets = torch.zeros(shape, dtype=kind, device=device)
    criterion = "cross_entropy" if criterion == "labels" else criterion
    more: dict[str, Any] = {"memory": memory, "mode": mode}
    index = torch.zeros(1, n, dtype=torch.long, device=device)
    for images, rows in ((queries, None), (queries[None], None), (queries, index)):
        loss_and_gradient(weights, images, targets, layers, criterion, 2.0, precision, index=rows, **more)
        loss_and_gradient(weights, images, outputs, layers, "gradient", 1.0, precision, index=rows, **more)
        forward(weights, images, layers, precision, index=rows, **more)
