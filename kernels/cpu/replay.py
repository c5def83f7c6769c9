"""Small calls again and again: the operators of torch that one of them called, called once more on the memory that they used.

Between the torch calls of a small loss there is as much Python as there is arithmetic: which rule, which view, which place. A training run
asks for the same loss thousands of times on tensors of the same shapes, and all that Python comes to the same decisions. So the second call
of a kind is recorded: every operator that writes something, with its arguments, those of torch's own backward included. Later calls put
their numbers into the memory of that one's inputs and call these operators in turn; views are there already, and results come where they
came. It is to a CPU what a CUDA graph is to a GPU.

That holds as long as nothing that depends on numbers is decided in Python. A recording is given up where a function returns anything but
tensors and is none of those that tell a shape or a type, and where random numbers are drawn. What is left is held against the call itself
before it is used: on other numbers, with NaN in all the memory that it has to write, to the bit. The twin is the call.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..criteria import Named
from . import jobs

__all__ = ["ALL_BYTES", "MOST_BYTES", "Recording", "kind_of_loss", "record", "run_or_replay"]

logger = logging.getLogger("wslfast")
MOST_BYTES = 16 << 20  # of one recording: from there on a call takes as long either way, and its memory had better be given back
ALL_BYTES = 64 << 20  # of a thread's recordings
_KINDS = 64  # of calls that a thread remembers

# functions whose answer no number of a tensor decides
_TELLS = frozenset(
    {
        *("__get__", "__len__", "data_ptr", "dim", "element_size", "get_device", "is_complex", "is_contiguous", "is_floating_point"),
        *("is_inference", "ndimension", "nelement", "numel", "size", "storage_offset", "stride", "type"),
    }
)
_UNWRITTEN = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"})
_SAME = frozenset({"_to_copy", "clone"})
_ZEROS = frozenset({"new_zeros", "zeros", "zeros_like"})
_MOVES = frozenset({"resize_", "resize_as_", "set_"})  # a tensor to other memory

# Results of inputs: new tensors, that nobody else holds.
Run = Callable[..., Sequence[Tensor]]
# Of weights and queries, whether matrix products take all threads (``jobs.run_here``); None where a call does not stay in its thread.
Share = Callable[[Tensor, Tensor], "bool | None"]


class Recording:
    """The operators of a call, bound to the memory that they read and write.

    Args:
        inputs, results: tensors in that memory.
        steps: the operators.
        made: all that they write.
        share: whether matrix products take all threads.
    """

    def __init__(
        self, inputs: Sequence[Tensor], steps: Sequence[partial[Any]], results: Sequence[Tensor], made: Sequence[Tensor], share: bool
    ) -> None:
        self.bytes = sum(map(_bytes, (*inputs, *made)))
        self._inputs, self._results, self._made, self._share = tuple(inputs), tuple(results), tuple(made), share
        steps = list(steps)
        # the first input, rows of weights, is mostly read by one copy alone: it may as well copy the caller's
        readers = [s for s in steps if _storage(inputs[0]) in map(_storage, _tensors((s.args, s.keywords)))]
        self._split: Callable[[Tensor], Any] | None = None
        if [s.func for s in readers] == [torch.split_with_sizes_copy] and _place(readers[0].args[0]) == _place(inputs[0]):
            split = readers[0]
            steps.remove(split)
            self._split = lambda rows: split.func(rows, *split.args[1:], **split.keywords)
        # a result that the last operator joins is joined anew: it is the caller's
        self._steps, self._joined = tuple(steps), -1
        self._join: partial[Tensor] | None = None
        last: Any = steps[-1]
        joined: Any = last.keywords["out"] if last.func is torch.cat else None
        places = [i for i, result in enumerate(results) if joined is not None and _storage(result) == _storage(joined)]
        if len(places) == 1 and _place(results[places[0]]) == _place(joined):
            self._steps, self._joined, self._join = self._steps[:-1], places[0], partial(last.func, *last.args)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The results, in memory of their own."""
        results: list[Tensor] = []
        with torch.no_grad():
            for here, given in zip(self._inputs, inputs, strict=True):
                if self._split is None or here is not self._inputs[0]:
                    here.copy_(given)
            jobs.run_here((partial(self._run, inputs[0], results),), self._share)
        return tuple(results)

    def _run(self, rows: Tensor, results: list[Tensor]) -> None:
        if self._split is not None:
            self._split(rows)
        for step in self._steps:
            step()
        for i, result in enumerate(self._results):
            results.append(self._join() if self._join is not None and i == self._joined else result.clone())

    def forget(self) -> None:
        """Puts NaN, ones in every bit, in all memory that a call writes."""
        for tensor in self._made:
            torch.tensor([], dtype=torch.uint8).set_(tensor.untyped_storage()).fill_(255)


def record(run: Run, inputs: Sequence[Tensor], share: bool = False) -> Recording | str:
    """A recording of ``run(*inputs)`` that was held against it, or why there is none."""
    with torch.inference_mode(False), torch.no_grad():
        own = [t.clone() for t in inputs]
        try:
            recorder = _Recorder(own)
            with _Watch(), recorder:
                results = run(*own)
            if not recorder.operators or not {_storage(t) for t in results} <= {_storage(t) for t in recorder.made}:
                return "its results come from elsewhere"
            other = [_other(t) for t in inputs]
            for here, given in zip(own, other, strict=True):
                here.copy_(given)
            recording = Recording(own, [operator.again() for operator in recorder.operators], _bare(results), recorder.made, share)
            recording.forget()
            same = all(map(_same_bits, recording(*other), run(*other)))
        except _Refused as reason:
            return str(reason)
        except Exception as error:  # the caller runs the call as it is, and sees what is wrong with it
            return f"{type(error).__name__}: {error}"
        return recording if same else "its replay gives other bits"


def _other(numbers: Tensor) -> Tensor:
    """Other numbers of the same kind."""
    turned = numbers.flip(0)
    return turned.mul_(0.75).add_(0.125) if numbers.is_floating_point() else turned


class _Refused(Exception):
    """Raised where a call cannot be replayed, as soon as that is known: a large one would be run twice."""


class _Watch(TorchFunctionMode):
    """Refuses what tells Python of numbers in its block."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(getattr(func, "__name__", func))
        nothing = result is None or (isinstance(result, (tuple, list)) and not result)  # or a split into no parts
        if not nothing and name not in _TELLS and next(_tensors(result), None) is None:
            raise _Refused(f"{name} returns no tensor")
        return result


class _Recorder(TorchDispatchMode):
    """Keeps what its block calls, and every tensor of it alive, so that none takes another's memory.

    Attributes:
        operators: those that write.
        made: tensors that are new.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.operators: list[_Operator] = []
        self.made: list[Tensor] = []
        self._kept: list[Any] = []
        self._storages = {_storage(t) for t in inputs}
        self._bytes = sum(map(_bytes, inputs))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        with torch._C.DisableTorchFunction():  # nobody watches what is asked here
            self._note(func, args, kwargs, result)
        self._kept.append((args, kwargs, result))
        return result

    def _note(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        name = func.overloadpacket.__name__
        results, read = list(_tensors(result)), {_storage(t) for t in _tensors((args, kwargs))}
        fresh = [t for t in results if _storage(t) not in read]
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise _Refused(f"{name} draws random numbers")
        if name in _MOVES or any(t.device.type != "cpu" or t.layout != torch.strided for t in results):
            raise _Refused(f"{name} makes what is no plain tensor")
        if torch.Tag.inplace_view in func.tags:
            return  # later operators see the tensor as it is now, and those before as it was
        given, named = _bare((args, kwargs))
        if func._schema.is_mutable:
            self.operators.append(_Operator(name, func, given, named, None))
        elif not results and not isinstance(result, list):  # a split into no parts
            raise _Refused(f"{name} returns no tensor")
        elif fresh:
            self._keep(name, fresh)
            if name not in _UNWRITTEN:
                self.operators.append(_Operator(name, func, given, named, _bare(result)))

    def _keep(self, name: str, fresh: Sequence[Tensor]) -> None:
        made = {_storage(t) for t in fresh}
        if made & self._storages:
            raise _Refused(f"{name} returns what was there before")
        self._storages |= made
        self.made += map(_bare, fresh)
        self._bytes += sum(map(_bytes, fresh))
        if self._bytes > MOST_BYTES:
            raise _Refused(f"it takes more than {MOST_BYTES >> 20} MiB")


class _Operator(NamedTuple):
    """An operator that was called, with all that it read and wrote; ``result``: what it made, None where it wrote over arguments."""

    name: str
    func: Any
    args: Any
    kwargs: Any
    result: Any

    def again(self) -> partial[Any]:
        """The same call into the memory of the first one, and makes it: in the order of the operators, so that each finds its arguments."""
        name, packet = self.name, self.func.overloadpacket
        if self.result is None:  # torch's function or method of that name: an operator itself takes longer to call
            function = getattr(torch if "out" in self.kwargs else Tensor, name, self.func)
            step = partial(function, *self.args, **self.kwargs)
            step()
            return step
        copied = partial(_copied, self.result, packet, self.args, self.kwargs)
        copied()
        if name in _SAME:
            return partial(self.result.copy_, self.args[0])
        if name in _ZEROS:
            return partial(self.result.zero_)
        for function, keyword in ((getattr(torch, name, None), "out"), (packet, "out"), (packet, "grad_input")):
            if function is not None and _comes_out(function, keyword, self.args, self.kwargs, self.result):
                return partial(function, *self.args, **self.kwargs, **{keyword: self.result})
        return copied


def _comes_out(function: Any, keyword: str, args: Any, kwargs: Any, result: Any) -> bool:
    """Whether a function takes memory for its results, and puts the same bits there."""
    trial = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cpu") for t in _tensors(result)]
    places = [t.data_ptr() for t in trial]
    try:
        function(*args, **kwargs, **{keyword: trial[0] if isinstance(result, Tensor) else trial})
    except (TypeError, RuntimeError, ValueError):  # it has no such argument
        return False
    return places == [t.data_ptr() for t in trial] and all(map(_same_bits, trial, _tensors(result)))


def _copied(result: Any, func: Any, args: Any, kwargs: Any) -> None:
    for here, made in zip(_tensors(result), _tensors(func(*args, **kwargs)), strict=True):
        here.copy_(made)


def _bare(value: Any) -> Any:
    """The same with tensors on that memory that are no part of torch's graph, and will be none."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, (tuple, list)):
        return type(value)(_bare(item) for item in value)
    return {key: _bare(item) for key, item in value.items()} if isinstance(value, dict) else value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _place(tensor: Tensor) -> Hashable:
    """Where a tensor lies in its storage."""
    return tensor.shape, tensor.stride(), tensor.storage_offset()


def _bytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def _same_bits(a: Tensor, b: Tensor) -> bool:
    alike = a.shape == b.shape and a.dtype == b.dtype
    return alike and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


class _Seen(threading.local):
    """The kinds of calls that a thread has seen, the latest last: with a recording, None after the first call, False where there is none.
    Each thread has memory of its own to write over."""

    def __init__(self) -> None:
        self.kinds: OrderedDict[Hashable, Recording | bool | None] = OrderedDict()
        self.busy = False

    def keep(self, kind: Hashable, value: Recording | bool | None) -> None:
        self.kinds[kind] = value
        self.kinds.move_to_end(kind)
        while len(self.kinds) > _KINDS or sum(r.bytes for r in self.kinds.values() if isinstance(r, Recording)) > ALL_BYTES:
            self.kinds.popitem(last=False)


_seen = _Seen()
_NEVER = object()


def kind_of_loss(engine: str, network: Hashable, criterion: Named, temperature: float, index: Tensor | None) -> Hashable | None:
    """The kind of a loss's calls; None where they are run: with a criterion of the caller's own, or each model's part of a pool."""
    return (engine, network, criterion, temperature) if index is None and isinstance(criterion, str) else None


def run_or_replay(kind: Hashable | None, run: Run, share: Share, *inputs: Tensor) -> Sequence[Tensor]:
    """What ``run(*inputs)`` returns, to the bit; ``inputs``: weights, queries, and what else there is.

    ``kind``: all that Python's decisions depend on beside the inputs' shapes and types and torch's settings: the engine is part of it.
    A call of no kind (None) is run.
    """
    seen, inputs = _seen, tuple(t.detach() for t in inputs)
    if kind is None or seen.busy or not _small_and_plain(inputs):  # what a call calls is part of its recording
        return run(*inputs)
    asked = (kind, _settings(), *[(t.shape, t.dtype) for t in inputs])
    known: Any = seen.kinds.get(asked, _NEVER)
    if known is _NEVER:
        seen.keep(asked, None)
        return run(*inputs)
    if known is False:
        return run(*inputs)
    seen.busy = True
    try:
        if known is None:
            wanted = share(*inputs[:2])
            known = record(run, inputs, wanted) if wanted is not None else "it does not stay in its thread"
            if isinstance(known, str):
                logger.debug("a call is not replayed: %s", known)
            seen.keep(asked, known if isinstance(known, Recording) else False)
        else:
            seen.kinds.move_to_end(asked)
        return known(*inputs) if isinstance(known, Recording) else run(*inputs)
    finally:
        seen.busy = False


# the hooks on what torch's graph saves; the argument: also where a compiler traces
_saves: Callable[[bool], Any] = torch._C._autograd._top_saved_tensors_default_hooks


def _settings() -> Hashable:
    """What of torch's settings code in Python may look at."""
    return torch.get_num_threads(), torch._C._get_mkldnn_enabled(), torch.are_deterministic_algorithms_enabled(), torch.get_default_dtype()


def _small_and_plain(inputs: Sequence[Tensor]) -> bool:
    """Whether a call may be recorded as far as one sees from outside: nobody looks on, and its inputs are small and dense.

    A checkpoint looks on: it counts what torch's graph saves, and a replay saves nothing.
    """
    if torch._C._len_torch_function_stack() > 0 or torch.is_autocast_enabled("cpu") or _saves(True) is not None:
        return False
    for t in inputs:  # noqa: SIM110 (a generator costs more than the checks)
        if t.device.type != "cpu" or not t.is_contiguous() or t.nbytes > MOST_BYTES >> 2:
            return False
    return True
