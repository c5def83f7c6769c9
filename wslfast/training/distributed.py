"""Data-parallel training under torchrun: every process holds the model and takes its share of each batch; one of them writes.

All processes draw the same batches, views and queries from the same seeds, so a run does not depend on their number beyond the
order of summation, and a checkpoint of one number of processes continues on another. The engine is ``torch.distributed``: NCCL
between GPUs, Gloo between CPUs.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import WslfastError, check_device, require


@dataclass(frozen=True)
class World:
    """This process among ``size`` of them; alone by default, and then every method is the identity."""

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


@contextmanager
def joined(device: str) -> Iterator[tuple[World, torch.device]]:
    """This process's place among those torchrun started, and its device (``cuda`` becomes one GPU a process).

    Raises:
        WslfastError: for a device that is not there, or when another process has gone.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "RANK" not in os.environ:
        yield World(), check_device(device)
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    here = check_device(f"cuda:{local}" if device == "cuda" else device)
    require(here.type != "cuda" or device == "cuda", f"device: expected cuda (one GPU a process) or cpu under torchrun, got {device!r}")
    if here.type == "cuda":
        torch.cuda.set_device(here)
    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group("nccl" if here.type == "cuda" else "gloo")
    world = World(dist.get_rank(), dist.get_world_size())
    try:
        yield world, here
    except (dist.DistError, RuntimeError) as error:
        if not _lost(error):
            raise
        raise WslfastError(f"process {world.rank} of {world.size}: another process has gone; the run goes on with --resume") from error
    finally:
        if ours:
            gc.collect()  # whoever still holds the group, in a cycle, would keep its threads alive
            dist.destroy_process_group()


def _lost(error: Exception) -> bool:
    """Whether a collective failed because a peer did."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(mark in text for mark in ("gloo", "connection closed", "connection reset", "nccl"))
