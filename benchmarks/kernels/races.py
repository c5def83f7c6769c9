"""Races in the kernels, looked for in Triton's interpreter with every load and store watched.

    TRITON_INTERPRET=1 python -m benchmarks.kernels.races [NETWORK ...] [--precision fp16] [--many]

Between programs: an address that two of them write, or that one reads and another writes, in one launch. Inside a program: an address that
is written and read, read and written, or written twice with no barrier between, by another element of the tile (the same element is the
same thread). And every address has to lie in a tensor of the launch. The interpreter runs one program after another, so none of this
shows in its numbers; on a GPU it would.
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
from torch import Tensor
from triton.runtime import interpreter

from wslfast.kernels.layers import Layers, Unplannable
from wslfast.kernels.triton import launch, network_layout
from wslfast.kernels.triton.configurations import Tuning, joins, tuned
from wslfast.kernels.triton.schedule import schedule


@dataclass
class Found:
    """What was seen: kernels launched, accesses watched, barriers met, and every race with how often."""

    launches: collections.Counter[str] = field(default_factory=collections.Counter)
    accesses: int = 0
    barriers: int = 0
    races: collections.Counter[str] = field(default_factory=collections.Counter)


def _where() -> str:
    """The function and line of a kernel that an access stands in."""
    frame, names = sys._getframe(3), []
    while frame is not None and len(names) < 2:
        if "/kernels/triton/" in frame.f_code.co_filename:
            names.append(f"{frame.f_code.co_name}:{frame.f_lineno}")
        frame = frame.f_back  # type: ignore[assignment]
    return " in ".join(names)


class _Watch:
    """The interpreter's memory with everything that touches it on record."""

    def __init__(self, real: Any, found: Found, muted: Callable[[int], bool], same_thread: bool) -> None:
        self.real, self.found, self.muted, self.same_thread = real, found, muted, same_thread
        self.kernel, self.program, self.ranges = "", 0, np.zeros((0, 2), np.int64)
        self.reads: list[np.ndarray] = []  # of the launch: [address, program]
        self.writes: list[np.ndarray] = []
        self.epoch()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def epoch(self) -> None:
        """Forget what this program did since its last barrier: (addresses of every element, 0 where masked; where)."""
        self.read_since: list[tuple[np.ndarray, str]] = []
        self.written_since: list[tuple[np.ndarray, str]] = []

    def barrier(self) -> None:
        self.found.barriers += 1
        if not self.muted(self.found.barriers):
            self.epoch()

    def note(self, what: str, *where: str) -> None:
        self.found.races[f"{self.kernel}: {what}: {' / '.join(where)}"] += 1

    def clash(self, a: np.ndarray, b: np.ndarray) -> bool:
        """Whether an address is in both tiles, and not only at one and the same element of two tiles of one shape."""
        common = np.intersect1d(a[a > 0], b[b > 0])
        if len(common) == 0:
            return False
        return not self.same_thread or a.shape != b.shape or not np.isin(common, a[a == b]).all()

    def inside(self, at: np.ndarray, size: int, where: str) -> None:
        if len(at) == 0:
            return
        slot = np.searchsorted(self.ranges[:, 0], at, side="right") - 1
        good = (slot >= 0) & (at + size <= self.ranges[slot.clip(0), 1])
        if not good.all():
            self.note("outside every tensor", where)

    def load(self, pointers: np.ndarray, mask: np.ndarray, other: np.ndarray, dtype: Any) -> Any:
        tile, where = _tile(pointers, mask), _where()
        at = np.unique(tile[tile > 0])
        self.inside(at, np.dtype(dtype).itemsize, where)
        self.reads.append(np.stack([at, np.full_like(at, self.program)], 1))
        for written, there in self.written_since:
            if self.clash(written, tile):
                self.note("read after write without a barrier", there, where)
        self.read_since.append((tile, where))
        self.found.accesses += 1
        return self.real.load(pointers, mask, other, dtype)

    def store(self, pointers: np.ndarray, value: np.ndarray, mask: np.ndarray) -> Any:
        tile, where = _tile(pointers, mask), _where()
        at, times = np.unique(tile[tile > 0], return_counts=True)
        self.inside(at, value.dtype.itemsize, where)
        self.writes.append(np.stack([at, np.full_like(at, self.program)], 1))
        if (times > 1).any():
            self.note("one store writes an address twice", where)
        for read, there in self.read_since:
            if self.clash(read, tile):
                self.note("write after read without a barrier", there, where)
        for written, there in self.written_since:
            if self.clash(written, tile):
                self.note("written twice without a barrier", there, where)
        self.written_since.append((tile, where))
        self.found.accesses += 1
        return self.real.store(pointers, value, mask)

    def begin(self, kernel: str, tensors: list[Tensor]) -> None:
        storages = {(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in tensors}
        self.ranges = np.array(sorted((start, start + size) for start, size in storages) or [(0, 0)], np.int64)
        self.kernel, self.reads, self.writes = kernel, [], []

    def end(self) -> None:
        """The launch is over: compare its programs."""
        self.found.launches[self.kernel] += 1
        if not self.writes:
            return
        writes = np.unique(np.concatenate(self.writes), axis=0)
        addresses, by = np.unique(writes[:, 0], return_counts=True)
        if (by > 1).any():
            self.note("two programs write one address")
        if self.reads:
            reads = np.unique(np.concatenate(self.reads), axis=0)
            at = np.searchsorted(addresses, reads[:, 0]).clip(0, len(addresses) - 1)
            first = np.searchsorted(writes[:, 0], addresses)
            other = (addresses[at] == reads[:, 0]) & (writes[first[at], 1] != reads[:, 1])
            if other.any():
                self.note("a program reads what another writes")


def _tile(pointers: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Addresses of every element of a tile, zero where it is masked."""
    return np.where(np.broadcast_to(mask, pointers.shape).astype(bool), pointers, 0).astype(np.int64).ravel()


@contextmanager
def watching(muted: Callable[[int], bool] = lambda number: False, same_thread: bool = True) -> Iterator[Found]:
    """Every launch inside is watched.

    Args:
        muted: barriers, by number, that are not seen: what shows that they are needed.
        same_thread: the same element of two tiles of one shape is the same thread's. Without it, a tile that is read and then written has
            to have a barrier between, whatever layouts the compiler chooses.
    """
    assert triton.knobs.runtime.interpret, "needs TRITON_INTERPRET=1 when triton is first imported"
    found = Found()
    builder, executor = interpreter.interpreter_builder, interpreter.GridExecutor
    watch = _Watch(interpreter._interpreter, found, muted, same_thread)
    set_index, to_host, to_device = builder.set_grid_idx, executor._init_args_hst, executor._restore_args_dev

    def index(x: int, y: int, z: int) -> None:
        watch.program = x
        watch.epoch()
        set_index(x, y, z)

    def begin(self: Any, args: Any, kwargs: Any) -> Any:
        host = to_host(self, args, kwargs)
        watch.begin(self.fn.__name__, [t for t in (*host[0], *host[1].values()) if isinstance(t, Tensor)])
        return host

    def end(self: Any, *rest: Any) -> Any:
        watch.end()
        return to_device(self, *rest)

    def barrier(self: Any, *_: Any, **__: Any) -> None:
        watch.barrier()

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(interpreter, "_interpreter", watch))
        stack.enter_context(mock.patch.object(builder, "set_grid_idx", index))
        stack.enter_context(mock.patch.object(type(builder), "create_barrier", barrier))
        stack.enter_context(mock.patch.object(executor, "_init_args_hst", begin))
        stack.enter_context(mock.patch.object(executor, "_restore_args_dev", end))
        yield found


MANY = Tuning(lambda role, stage, precision, c: replace(c, TILES=1, BM=16), 32)  # as many programs as there are tiles, and several splits


def exercise(layers: Layers, shape: tuple[int, ...], precision: str = "fp16", many: bool = False, k: int = 2, n: int = 5) -> None:
    """Every launch that calls of one network make: outputs, losses, rows of a pool, layer by layer, with two gradients in one launch, and
    as a whole, the latter with blocks of two queries, so that programs walk over several."""
    planned = schedule(layers, shape)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(k, planned.parameters, generator=generator) * 0.3
    queries = torch.randn(n, *shape, generator=generator)
    targets = torch.randn(k, n, planned.classes, generator=generator)
    rows = torch.randint(0, n, (k, 3), generator=generator)
    small = mock.patch.object(network_layout, "query_block", return_value=2), mock.patch.object(network_layout, "PART", 4)
    tuning = MANY if many else Tuning()

    def losses(mode: str) -> None:
        launch.loss_and_gradient(weights, queries, targets, layers, "mse", 2.0, precision, mode=mode)
        launch.loss_and_gradient(weights, queries, targets[:, :3], layers, "softmax_mse", 2.0, precision, index=rows, mode=mode)

    with small[0], small[1], tuned(tuning):
        network_layout.network.cache_clear()
        try:
            for mode in ("layers", "network"):
                try:
                    losses(mode)
                    launch.forward(weights, queries, layers, precision, mode=mode)
                except Unplannable:
                    continue
            if joins(planned, precision):
                with tuned(replace(tuning, joint=True)):
                    losses("layers")
        finally:
            network_layout.network.cache_clear()


def main() -> int:
    """Command line."""
    from benchmarks.kernels.inspect import ARCHITECTURES

    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels.races", description=__doc__.split("\n", 1)[0])
    parser.add_argument("networks", nargs="*", help=f"of {sorted(ARCHITECTURES)} (default: all)")
    parser.add_argument("--precision", default="fp16")
    parser.add_argument("--json", action="store_true", help="one JSON object a network")
    parser.add_argument("--many", action="store_true", help="as many programs as there are tiles")
    options = parser.parse_args()
    if unknown := sorted({*options.networks} - {*ARCHITECTURES}):
        parser.error(f"no such network: {', '.join(unknown)}; there are {', '.join(sorted(ARCHITECTURES))}")
    worst = 0
    for name in options.networks or ARCHITECTURES:
        with watching() as found:
            exercise(*ARCHITECTURES[name], options.precision, options.many)
        worst += len(found.races)
        if options.json:
            counts = {"launches": sum(found.launches.values()), "accesses": found.accesses, "barriers": found.barriers}
            print(json.dumps({"architecture": name, "precision": options.precision, **counts, "races": sorted(found.races)}), flush=True)
            continue
        print(f"{name}: {sum(found.launches.values())} launches, {found.accesses} accesses, {found.barriers} barriers, "
              f"{len(found.races)} races", flush=True)  # fmt: skip
        for race, times in sorted(found.races.items()):
            print(f"  {times} x {race}")
    return int(worst > 0 and not options.json)


if __name__ == "__main__":
    sys.exit(main())
