"""Small calls again and again: which are recorded (recording.py), and which are replayed.

Between the torch calls of a small loss there is as much Python as there is arithmetic: which rule, which view, which place. A training run
asks for the same loss thousands of times on tensors of the same shapes, and all that Python comes to the same decisions. So the second call
of a kind is recorded, and later ones are replayed. It is to a CPU what a CUDA graph is to a GPU. A recording takes as long as a dozen
calls: where earlier ones have not been worth it, as with another number of queries in every step, a kind is recorded once it is called
often.

Of a call of many models each group is a call. A recording has one piece of memory, so it is lent to one thread at a time; a thread that
finds none makes its own.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..criteria import Averaged, Named
from . import jobs
from .recording import MOST_BYTES, Recording, Run, record

__all__ = ["ALL_BYTES", "Recording", "kind_of_loss", "own_queries", "replay", "run_or_replay", "saving_is_watched", "unrecorded"]

logger = logging.getLogger("wslfast")
ALL_BYTES = (4 + (os.cpu_count() or 1)) * MOST_BYTES  # of all recordings: each thread needs its own
_INPUT = MOST_BYTES >> 2  # bytes of one input
_KINDS = 256  # of calls that are remembered
_FREE = 8  # recordings that nobody has to have earned
_EARNED = 8  # replays after which there may be one more
_OFTEN = 12  # calls of a kind that is recorded in any case
_ERRORS = 3  # of calls that were to be recorded, until their kind is run: a label that is no class is the caller's to mend

# Of weights and queries, whether matrix products take all threads (``jobs.run_here``); None where a call does not stay in its thread.
Share = Callable[[Tensor, Tensor], "bool | None"]


class _Kind:
    """What is known of a kind of call.

    Attributes:
        latest: the call in which it was seen last.
        calls: in which it was seen.
        free: recordings that nobody uses.
        bytes: of all its recordings, those in use included.
        errors: in calls that were to be recorded.
        run: it is not replayed, or was forgotten.
        full: no more recordings are made.
    """

    def __init__(self) -> None:
        self.latest: object = None
        self.calls = 0
        self.free: list[Recording] = []
        self.bytes, self.errors, self.run, self.full = 0, 0, False, False


class _Kept:
    """The kinds of calls that were seen, the latest last."""

    def __init__(self) -> None:
        self.kinds: OrderedDict[Hashable, _Kind] = OrderedDict()
        self.recorded = self.replayed = 0  # in how many calls, of all kinds
        self._lock = threading.Lock()

    def take(self, name: Hashable, call: object) -> tuple[_Kind, Recording | None, bool]:
        """A kind; a recording that nobody else has; if there is none, whether one should be made: never in the first call of a kind."""
        with self._lock:
            kind = self.kinds.get(name)
            if kind is None:
                kind = self.kinds[name] = _Kind()
                while len(self.kinds) > _KINDS:
                    self._give_up(self.kinds.popitem(last=False)[1])
            self.kinds.move_to_end(name)
            if kind.latest is not call:
                kind.latest, kind.calls = call, kind.calls + 1
            if kind.free:
                self.replayed += 1
                return kind, kind.free.pop(), False
            worth = kind.calls >= (2 if self.recorded < _FREE + self.replayed // _EARNED else _OFTEN)
            wanted = worth and not (kind.run or kind.full)
            self.recorded += wanted
            return kind, None, wanted

    def give(self, kind: _Kind, recording: Recording, new: bool) -> None:
        """A recording comes back, or is ``new``."""
        with self._lock:
            if kind.run:  # it was given up meanwhile
                return
            kind.free.append(recording)
            if new:
                kind.bytes += recording.bytes
                self._make_room(kind, recording)

    def run(self, kind: _Kind, errors: int) -> None:
        """Calls of a kind are run from now on, if there were so many ``errors``."""
        with self._lock:
            kind.errors += errors
            if kind.errors >= _ERRORS:
                self._give_up(kind)

    def _make_room(self, mine: _Kind, recording: Recording) -> None:
        """The oldest kinds are run, and stay so, or recordings would be made in turn for ever; a kind does not drive itself out."""
        over = sum(known.bytes for known in self.kinds.values()) - ALL_BYTES
        for known in self.kinds.values():
            if over <= 0:
                return
            if known is not mine and known.bytes:
                over -= known.bytes
                self._give_up(known)
        if over > 0:
            mine.free.remove(recording)
            mine.bytes -= recording.bytes
            mine.full = True

    @staticmethod
    def _give_up(known: _Kind) -> None:
        known.free.clear()
        known.bytes, known.run = 0, True


_kept = _Kept()


def _forget() -> None:
    """All of it, lock and all: in a forked process somebody else may hold it."""
    global _kept
    _kept = _Kept()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


class _Here(threading.local):
    """Whether this thread is recording: what a call calls is part of its recording."""

    busy = False


_here = _Here()


@contextmanager
def unrecorded() -> Iterator[None]:
    """A block whose calls are run, in this thread: they are parts of one that is recorded as a whole, or will be."""
    before, _here.busy = _here.busy, True
    try:
        yield
    finally:
        _here.busy = before


def kind_of_loss(engine: str, network: Hashable, criterion: Named, temperature: float) -> Hashable | None:
    """The kind of a loss's calls; None where they are run: with a criterion of the caller's own, and under autocast.

    Asked in the caller's thread: those that take a part of a call know nothing of its autocast.
    """
    plain = isinstance(criterion, (str, Averaged)) and not torch.is_autocast_enabled("cpu")
    return (engine, network, criterion, temperature) if plain else None


def own_queries(queries: Tensor, index: Tensor | None, kind: Hashable | None) -> tuple[Tensor, Tensor | None, Hashable | None]:
    """Queries and index of a call, and its kind; where queries are few, each model's part of the pool, and no index. With an index there is
    no kind."""
    if index is None or kind is None:
        return queries, index, kind if index is None else None
    if not queries.is_contiguous() or len(queries) == 0 or queries[0].nbytes * index.numel() > _INPUT:
        return queries, index, None
    return queries.index_select(0, index.reshape(-1)).unflatten(0, index.shape), None, kind


def run_or_replay(kind: Hashable | None, run: Run, share: Share, *inputs: Tensor) -> Sequence[Tensor]:
    """What ``run(*inputs)`` returns, to the bit; ``inputs``: weights, queries, and what else there is.

    ``kind``: all that Python's decisions depend on beside the inputs' shapes and types and torch's settings: the engine is part of it.
    A call of no kind (None) is run.
    """
    inputs = tuple(t.detach() for t in inputs)
    made = replay(kind, run, inputs, share=share)
    return run(*inputs) if made is None else made


def replay(
    kind: Hashable | None,
    run: Run,
    inputs: Sequence[Tensor],
    places: Sequence[Tensor | None] | None = None,
    *,
    call: object = None,
    share: Share | None = None,
) -> Sequence[Tensor] | None:
    """What ``run(*inputs)`` returns, replayed; None where it has to be run.

    Arguments as :func:`run_or_replay` has them; inputs that no graph is made of.

    Args:
        places: where results go; None makes new memory.
        call: of which this is a part, in one thread. The parts of the first one that has a kind are run.
    """
    if kind is None or _here.busy or jobs.forked() or not _small_and_plain(inputs):
        return None
    of_kind, recording, wanted = _kept.take((kind, _settings(), *[(t.shape, t.dtype) for t in inputs]), object() if call is None else call)
    if wanted:
        recording = _made(of_kind, run, share, inputs)
    if recording is None:
        return None
    try:
        return recording.into(places, *inputs)
    finally:
        _kept.give(of_kind, recording, wanted)


def _made(kind: _Kind, run: Run, share: Share | None, inputs: Sequence[Tensor]) -> Recording | None:
    """A recording of a call; None where there is none: the call is run, and its kind mostly from now on."""
    errors = _ERRORS
    with unrecorded():  # what a call calls is part of its recording
        shared = False if share is None else share(*inputs[:2])
        try:
            made = record(run, inputs, shared) if shared is not None else "it does not stay in its thread"
        except Exception as error:  # the caller runs the call as it is, and sees what is wrong with it
            made, errors = f"{type(error).__name__}: {error}", 1
    if isinstance(made, Recording):
        return made
    logger.debug("a call is not replayed: %s", made)
    _kept.run(kind, errors)
    return None


def saving_is_watched() -> bool:
    """Whether somebody's hooks see what torch's graph saves in this thread: a checkpoint's, say."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None  # also where a compiler traces


def _settings() -> Hashable:
    """What of torch's settings code in Python may look at."""
    return torch.get_num_threads(), torch._C._get_mkldnn_enabled(), torch.are_deterministic_algorithms_enabled(), torch.get_default_dtype()


def _small_and_plain(inputs: Sequence[Tensor]) -> bool:
    """Whether a call may be recorded as far as one sees from outside: nobody looks on, and its inputs are small and dense.

    A checkpoint looks on: it counts what torch's graph saves, and a replay saves nothing.
    """
    if torch._C._len_torch_function_stack() > 0 or torch._C._len_torch_dispatch_stack() > 0:
        return False
    if torch.is_autocast_enabled("cpu") or saving_is_watched():
        return False
    for t in inputs:  # noqa: SIM110 (a generator costs more than the checks)
        if t.device.type != "cpu" or not t.is_contiguous() or t.nbytes > _INPUT:
            return False
    return True
