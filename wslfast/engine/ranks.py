"""Work that several processes share, which torchrun started (one per GPU): they share a batch, or each gets its own jobs. One writes files.

Training shares every batch: all processes draw the same batches, views and queries from the same seeds, so a run does not depend on
their number beyond the order of summation, and a checkpoint of one number of processes continues on another. Zoo building, caches of
targets, evaluation and ablations deal out models, units and cells, whose results do not depend on who computes them. The engine is
``torch.distributed``: NCCL between GPUs, Gloo between CPUs and for whatever lies on the CPU.
"""

from __future__ import annotations

import datetime
import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import WslfastError, check_device, require

T = TypeVar("T")
_PATIENCE = datetime.timedelta(days=30)  # for which a process waits for another one's jobs; a process that has died is noticed at once
_apart: ContextVar[bool] = ContextVar("apart", default=False)


@dataclass(frozen=True)
class World:
    """This process among ``size`` of them. By default it is alone: then methods return the whole, and nothing is sent."""

    rank: int = 0
    size: int = 1

    @property
    def writes(self) -> bool:
        """Whether this process is the one that writes files and logs."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """This process's part of ``count`` rows. Raises WslfastError unless all parts are equal."""
        require(count % self.size == 0, f"batch_size: expected a multiple of the {self.size} processes, got {count}")
        each = count // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def dealt(self, items: Sequence[T]) -> list[T]:
        """This process's items, every ``size``-th of them."""
        return list(items[self.rank :: self.size])

    def mine(self, number: int) -> bool:
        """Whether job ``number`` is this process's."""
        return number % self.size == self.rank

    def span(self, count: int) -> range:
        """This process's numbers of ``count``, in one piece; pieces differ by one at most, and follow one another in the order of ranks."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def wait(self) -> None:
        """Return when every process has called this."""
        self.total(torch.zeros(1))

    def collected(self, value: T) -> list[T]:
        """Every process's ``value``, anything that pickles, in the order of ranks."""
        if self.size == 1:
            return [value]
        everybody: list[Any] = [None] * self.size
        dist.all_gather_object(everybody, value)
        return everybody

    def rows(self, part: Tensor, count: int) -> Tensor:
        """All ``count`` rows; ``part`` holds this process's, those of :meth:`span`. No gradient flows. Memory holds the whole once."""
        if self.size == 1:
            return part
        each = max(len(World(rank, self.size).span(count)) for rank in range(self.size))
        whole = part.new_zeros(self.size, each, *part.shape[1:])
        filled = part.new_zeros(each, *part.shape[1:])
        filled[: len(part)] = part
        dist.all_gather(list(whole), filled)
        counts = [len(World(rank, self.size).span(count)) for rank in range(self.size)]
        at = 0
        for rank, rows in enumerate(counts):  # moved up in place, so that no row is held twice
            whole.view(-1, *part.shape[1:])[at : at + rows] = whole[rank, :rows].clone()
            at += rows
        return whole.view(-1, *part.shape[1:])[:count]

    def gather(self, part: Tensor) -> Tensor:
        """Every process's rows, in the order of ranks; a gradient reaches the own rows alone.

        For a loss that all processes compute on the gathered rows, the parameter gradients *summed* over processes are those of one
        process with the whole batch; what is averaged afterwards has to be scaled (:meth:`summed`).
        """
        if self.size == 1:
            return part
        parts = [torch.empty_like(part) for _ in range(self.size)]
        dist.all_gather(parts, part.detach().contiguous())
        parts[self.rank] = part
        return torch.cat(parts)

    def summed(self, loss: Tensor) -> Tensor:
        """``loss``, with a gradient that an average over processes turns into the sum over them."""
        return loss if self.size == 1 else self.size * loss - (self.size - 1) * loss.detach()

    def total(self, value: Tensor) -> Tensor:
        """The sum over processes, without gradient."""
        if self.size == 1:
            return value
        value = value.detach().clone()
        dist.all_reduce(value)
        return value


ALONE = World()


def first() -> bool:
    """Whether this process prints and logs: it is the only one, or the first that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def apart() -> Iterator[None]:
    """In this block the process shares no work with the others. For a job that was dealt out to it: the others have jobs of their own."""
    token = _apart.set(True)
    try:
        yield
    finally:
        _apart.reset(token)


def is_apart() -> bool:
    """Whether this code runs inside a block of :func:`apart`."""
    return _apart.get()


@contextmanager
def joined(device: str | torch.device, *, patient: bool = False) -> Iterator[tuple[World, torch.device]]:
    """This process's place among those torchrun started, and its device (``cuda`` becomes one GPU a process).

    Args:
        device: ``cpu``, ``cuda``, or, in a process alone, ``cuda:N``.
        patient: processes wait for one another as long as it takes, for jobs of unequal length.

    Raises:
        WslfastError: for a device that is not there, or when another process has gone.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "RANK" not in os.environ or _apart.get():
        yield World(), check_device(device)
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    asked, gpus = str(device), torch.cuda.device_count() if torch.cuda.is_available() else 0
    seen = f"device: process {local} of this node takes GPU {local}, and sees {gpus}; every process has to see all GPUs of its node"
    require(asked != "cuda" or not gpus or local < gpus, f"{seen} (CUDA_VISIBLE_DEVICES), and there may be no more processes than GPUs")
    here = check_device(f"cuda:{local}" if asked == "cuda" else device)
    require(here.type != "cuda" or asked == "cuda", f"device: expected cuda (one GPU a process) or cpu under torchrun, got {asked!r}")
    if here.type == "cuda":
        torch.cuda.set_device(here)
    ours = not dist.is_initialized()
    if ours:
        backend = "cpu:gloo,cuda:nccl" if here.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, store=_meeting(), rank=int(os.environ["RANK"]), world_size=size, timeout=_PATIENCE if patient else None
        )
    world = World(dist.get_rank(), dist.get_world_size())
    try:
        yield world, here
    except (dist.DistError, RuntimeError) as error:
        if not _lost(error):
            raise
        kept = "what is finished is kept, and the same command goes on with it" if patient else "the run goes on with --resume"
        raise WslfastError(f"process {world.rank} of {world.size}: another process has gone; {kept}") from error
    finally:
        if ours:
            gc.collect()  # an object in a reference cycle that holds the group would keep its threads alive
            dist.destroy_process_group()


_meetings: list[Any] = []  # the store that torchrun's processes share, and one entry more for each group that was made


def _meeting() -> dist.Store:
    """The store through which the processes find each other. Each group has a name of its own in it, or it would find older addresses."""
    if not _meetings:
        _meetings.append(next(dist.rendezvous("env://"))[0])
    _meetings.append(len(_meetings))
    return dist.PrefixStore(f"wslfast-{len(_meetings)}", _meetings[0])


def _lost(error: Exception) -> bool:
    """Whether a collective failed because a peer did."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(mark in text for mark in ("gloo", "connection closed", "connection reset", "nccl"))
