"""Launching the whole network of every model: two launches for outputs, three for losses and gradients, a chunk of models (network.py)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from . import launcher
from .budget import rounded_chunk
from .configurations import Tuning, tuned, tuning
from .convolution import rows_of
from .criterion import gradient_scale, loss_scale, target_strides
from .devices import matrix_unit
from .launcher import launch
from .network import network_forward_kernel, network_loss_kernel, reduce_kernel
from .network_layout import Network, model_bytes, network, split
from .packing import pack, prepare, stack_pool, storage
from .stages import Schedule, blocks
from .tables import whole_tables


def specialised(schedule: Schedule, precision: str, gradient: bool, device: torch.device, block: int | None = None) -> Network:
    """``network`` for a device; in the interpreter with a precision that it gets right. Raises Unplannable."""
    emulated = "bf16_emulated" if precision == "bf16" and triton.knobs.runtime.interpret else None
    return _specialised(tuning(), schedule, precision, gradient, matrix_unit(launcher.capability_of(device)), block, emulated)


@lru_cache(maxsize=256)
def _specialised(choice: Tuning, *arguments: Any) -> Network:
    """``network`` with the launch parameters of a choice. Its own cache keeps those of its first caller: good for sizes alone."""
    with tuned(choice):
        return network.__wrapped__(*arguments)


def resident(device: torch.device) -> int:
    """Programs of a persistent grid: two on every multiprocessor, what 255 registers a thread leave room for."""
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


class _Launch:
    """What both directions share: the grid, the scratch, and chunks of models that keep a call below ``memory`` bytes."""

    def __init__(self, weights: Tensor, net: Network, units: int, schedule: Schedule, n: int, precision: str, memory: int) -> None:
        self.net, self.schedule, self.n, self.precision, self.device = net, schedule, n, precision, weights.device
        gradient = net.SUMS > 0
        self.programs = max(1, min(len(weights) * units, resident(self.device)))
        room = memory - self.programs * net.program_bytes(precision)
        self.chunk = rounded_chunk(len(weights), max(0, room) // model_bytes(schedule, n, precision, gradient))
        self.scratch = self.empty(net.SCRATCH, storage(precision))

    def empty(self, size: int, kind: torch.dtype) -> Tensor:
        """``size`` numbers for every program."""
        return torch.empty(self.programs * max(size, 1), dtype=kind, device=self.device)

    def chunks(
        self, weights: Tensor, queries: Tensor, index: Tensor | None, rank: int, shared: bool
    ) -> Iterator[tuple[int, Tensor, Tensor, Tensor, Tensor]]:
        """(first model, its rows of weights, packed weights, images, index) of every chunk; the launch that packs also stacks the
        queries, but for a pool."""
        images: Tensor | None = None
        for start in range(0, len(weights), self.chunk):
            rows = weights[start : start + self.chunk]
            if index is None and not (shared and start):
                own = queries if shared else queries[start : start + self.chunk]
                packed, images = prepare(rows, own, self.schedule, rank, self.precision)
            else:
                packed = pack(rows, self.schedule, self.precision)
            if images is None:  # a pool that many calls index
                images = stack_pool(queries, self.schedule, rank, self.precision)
            yield start, rows, packed, images, images if index is None else index[start:]


def network_forward(
    weights: Tensor,
    queries: Tensor,
    index: Tensor | None,
    outputs: Tensor,
    schedule: Schedule,
    precision: str,
    rank: int,
    memory: int,
    *,
    shared: bool,
    block: int | None = None,
) -> None:
    """Fill ``outputs`` ``[k, n, K]``: two launches a chunk. Raises Unplannable if the network does not fit one program."""
    n = outputs.shape[1]
    net = specialised(schedule, precision, False, weights.device, block)
    walks = blocks(n, net.QB)
    held = _Launch(weights, net, walks, schedule, n, precision, memory)
    for start, rows, packed, images, own in held.chunks(weights, queries, index, rank, shared):
        units = len(rows) * walks
        launch(
            network_forward_kernel,
            min(units, held.programs),
            images,
            own,
            packed,
            rows,
            outputs[start:],
            held.scratch,
            n,
            rows_of(images, schedule.stages[0]),
            units,
            walks,
            packed.stride(0),
            rows.stride(0),
            rows.stride(1),
            net=net,
            SHARED=shared,
            INDEXED=index is not None,
        )


def network_loss(
    weights: Tensor,
    queries: Tensor,
    index: Tensor | None,
    targets: Tensor,
    losses: Tensor,
    gradient: Tensor,
    schedule: Schedule,
    n: int,
    criterion: str,
    temperature: float,
    precision: str,
    rank: int,
    memory: int,
    *,
    shared: bool,
    block: int | None = None,
) -> None:
    """Fill ``losses`` ``[k]`` and ``gradient`` ``[k, P]``: three launches a chunk. ``targets`` are ``[k, n, K]`` (``[k, n]``
    integers for ``labels``) of any strides. Raises Unplannable if the network does not fit one program."""
    net = specialised(schedule, precision, True, weights.device, block)
    parts, each = split(n, net.QB)
    held = _Launch(weights, net, parts, schedule, n, precision, memory)
    codes, outs, sums = held.empty(net.CODES, torch.int8), held.empty(net.OUTS, torch.float32), held.empty(net.SUMS, torch.float32)
    partials = torch.empty(held.chunk * parts, schedule.parameters, dtype=torch.float32, device=weights.device)
    terms = torch.empty(held.chunk * parts, dtype=torch.float32, device=weights.device)
    tables = whole_tables(schedule, weights.device)
    scales = gradient_scale(criterion, n, schedule.classes, temperature), loss_scale(criterion, n, schedule.classes, temperature)
    programs = blocks(schedule.parameters, 256)
    for start, rows, packed, images, own in held.chunks(weights, queries, index, rank, shared):
        count = len(rows)
        launch(
            network_loss_kernel,
            min(count * parts, held.programs),
            images,
            own,
            packed,
            rows,
            targets[start:],
            tables.places,
            tables.steps,
            tables.counts,
            partials,
            terms,
            codes,
            held.scratch,
            outs,
            sums,
            n,
            rows_of(images, schedule.stages[0]),
            count * parts,
            parts,
            each,
            packed.stride(0),
            rows.stride(0),
            rows.stride(1),
            *target_strides(targets),
            temperature,
            net=net,
            CRITERION=criterion,
            SHARED=shared,
            INDEXED=index is not None,
        )
        launch(
            reduce_kernel,
            count * programs,
            partials,
            terms,
            gradient[start:],
            losses[start:],
            programs,
            parts,
            schedule.parameters,
            *scales,
            B=256,
        )
