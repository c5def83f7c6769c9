"""What one call computes, kept as the operators of torch that it called, on the memory that they used.

Every operator that writes something is recorded, with its arguments, those of torch's own backward included. To replay a call is to put
numbers into the memory of its inputs and to call these operators in turn; views are there already, and results come where they came.

That holds as long as nothing that depends on numbers is decided in Python. A recording is given up where a function returns anything but
tensors and is none of those that tell a shape or a type, and where random numbers are drawn. What is left is held against the call itself
before it is used: on other numbers, with NaN in all the memory that it has to write, to the bit. The twin is the call.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from . import jobs
from .arena import Arena

__all__ = ["MOST_BYTES", "Recording", "Run", "record"]

MOST_BYTES = 16 << 20  # that a call writes: from there on it takes as long either way, and recording it takes many times as long
_LOOSE = 1 << 16  # bytes of a result from which on its memory is taken as it comes, where it would have to be copied

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
_PUT = _SAME | _ZEROS | {"split_with_sizes_copy"}  # whose results are put anywhere, whatever kernels are said to be there
_MOVES = frozenset({"resize_", "resize_as_", "set_"})  # a tensor to other memory

# Results of inputs: new tensors, that nobody else holds.
Run = Callable[..., Sequence[Tensor]]


class Recording:
    """The operators of a call, bound to the memory that they read and write.

    Args:
        inputs, results: tensors in that memory.
        steps: the operators.
        memory: all that they write.
        loose: what stands for memory that torch makes, and that no step gives back.
        share: whether matrix products take all threads.

    Attributes:
        bytes: that it holds.
    """

    def __init__(
        self,
        inputs: Sequence[Tensor],
        steps: Sequence[partial[Any]],
        results: Sequence[Tensor],
        memory: Tensor,
        loose: Sequence[Sequence[Tensor]],
        share: bool,
    ) -> None:
        self._loose = loose
        self.bytes = sum(map(_bytes, (*inputs, memory)))
        self._inputs, self._results, self._memory, self._share = tuple(inputs), tuple(results), memory, share
        self._anywhere = (None,) * len(results)
        # the first input, rows of weights, is mostly read by one copy alone: it may as well copy the caller's
        readers = [i for i, s in enumerate(steps) if _storage(inputs[0]) in map(_storage, _tensors((s.args, s.keywords)))]
        self._ahead: tuple[partial[Any], ...] = ()  # of that copy
        self._split: Callable[[Tensor], Any] | None = None
        first = steps[readers[0]] if len(readers) == 1 else None
        if first is not None and first.func is torch.split_with_sizes_copy and _place(first.args[0]) == _place(inputs[0]):
            self._ahead, steps = tuple(steps[: readers[0]]), steps[readers[0] + 1 :]
            self._split = lambda rows: first.func(rows, *first.args[1:], **first.keywords)
        # a result that the last operator joins is joined anew: it is the caller's
        self._steps, self._joined = tuple(steps), -1
        self._join: partial[Tensor] | None = None
        last: Any = steps[-1] if steps else None
        joined: Any = last.keywords["out"] if last is not None and last.func is torch.cat else None
        places = [i for i, result in enumerate(results) if joined is not None and _storage(result) == _storage(joined)]
        if len(places) == 1 and _place(results[places[0]]) == _place(joined):
            self._steps, self._joined, self._join = self._steps[:-1], places[0], partial(last.func, *last.args)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The results, in memory of their own."""
        return self.into(None, *inputs)

    def into(self, places: Sequence[Tensor | None] | None, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The results, written to ``places``; where there is None, in memory of their own."""
        places = self._anywhere if places is None else places
        results: list[Tensor] = []
        with torch.no_grad():
            for here, given in zip(self._inputs, inputs, strict=True):
                if self._split is None or here is not self._inputs[0]:
                    here.copy_(given)
            jobs.run_here((partial(self._run, inputs[0], places, results),), self._share)
        return tuple(results)

    def _run(self, rows: Tensor, places: Sequence[Tensor | None], results: list[Tensor]) -> None:
        for step in self._ahead:
            step()
        if self._split is not None:
            self._split(rows)
        for step in self._steps:
            step()
        for i, (place, result) in enumerate(zip(places, self._results, strict=True)):
            if self._join is not None and i == self._joined:
                results.append(self._join() if place is None else self._join(out=place))
            else:
                results.append(result.clone() if place is None else place.copy_(result))
        for aliases in self._loose:
            _released(aliases)

    def forget(self) -> None:
        """Puts NaN, ones in every bit, in all memory that a call writes."""
        self._memory.fill_(255)


def record(run: Run, inputs: Sequence[Tensor], share: bool = False) -> Recording | str:
    """A recording of ``run(*inputs)`` that was held against it, or why there is none. What a call raises is raised here."""
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
            recording = _settled(own, recorder, _bare(results), share)
            del recorder, results
            recording.forget()
            same = all(map(_same_bits, recording(*other), run(*other)))
        except _Refused as reason:
            return str(reason)
        return recording if same else "its replay gives other bits"


def _settled(inputs: Sequence[Tensor], recorder: _Recorder, results: Sequence[Tensor], share: bool) -> Recording:
    """What was recorded, in memory of its own."""
    sizes = {_storage(t): _bytes(t) for t in recorder.made}
    loose = {_storage(t) for o in recorder.operators if o.makes_its_own() for t in _tensors(o.result) if _bytes(t) >= _LOOSE}
    lives: dict[int, tuple[int, int]] = {}
    for i, touched in enumerate((*[(o.args, o.kwargs, o.result) for o in recorder.operators], results)):
        for name in map(_storage, _tensors(touched)):
            if name in sizes:
                lives[name] = lives.get(name, (i, i))[0], i
    arena = Arena(sizes, {name: life for name, life in lives.items() if name not in loose})
    aliases = _Aliases(loose)
    moved = partial(_changed, lambda t: aliases.of(t) if _storage(t) in loose else arena.moved(t))
    operators = [_Operator(o.name, o.func, moved(o.args), moved(o.kwargs), moved(o.result)) for o in recorder.operators]
    results = moved(results)
    steps: list[partial[Any]] = []
    for i, (operator, before) in enumerate(zip(operators, recorder.operators, strict=True)):
        places = [aliases.known.get(_storage(t), here) for t, here in zip(_tensors(before.result), _tensors(operator.result), strict=True)]
        steps.append(operator.again(places))
        ended = [name for name in loose if lives[name][1] == i < len(operators) - 1]  # what the last one reads, it may read again
        for name in ended:
            steps.append(partial(_released, aliases.known[name]))
            steps[-1]()
    last = [aliases.known[name] for name in loose if lives[name][1] >= len(operators) - 1]
    return Recording(inputs, steps, results, arena.memory, last, share)


class _Aliases:
    """Tensors on memory that torch makes anew in every replay, by the storage that was recorded."""

    def __init__(self, storages: set[int]) -> None:
        self.known: dict[int, list[Tensor]] = {name: [] for name in storages}

    def of(self, tensor: Tensor) -> Tensor:
        """One that stands for ``tensor``."""
        every = self.known[_storage(tensor)]
        for known in every:
            if known.dtype == tensor.dtype and _place(known) == _place(tensor):
                return known
        made = torch.empty(0, dtype=tensor.dtype, device="cpu")
        every.append(made.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride()))
        return every[-1]


def _rebound(places: Sequence[Tensor | list[Tensor]], func: Any, args: Any, kwargs: Any) -> None:
    """Call an operator, and let what stands for its results, or for views of them, be in their memory; copy those that have a place."""
    for place, made in zip(places, _tensors(func(*args, **kwargs)), strict=True):
        if isinstance(place, Tensor):
            place.copy_(made)
            continue
        storage = made.untyped_storage()
        for alias in place:
            alias.set_(storage, alias.storage_offset(), alias.shape, alias.stride())


def _released(aliases: Sequence[Tensor]) -> None:
    """Give memory back that was read for the last time."""
    aliases[0].untyped_storage().resize_(0)


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
        counted = name != "index" or any(t.dtype in (torch.bool, torch.uint8) for t in _tensors(args[1]))
        if torch.Tag.dynamic_output_shape in func.tags and counted:
            raise _Refused(f"{name} makes as much as its numbers say")
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

    def makes_its_own(self) -> bool:
        """Whether its results come in memory of its own, and can only be copied: there is no kernel that writes elsewhere."""
        if self.result is None or self.name in _PUT:
            return False
        packet = self.func.overloadpacket
        written = [o for o in packet.overloads() if getattr(packet, o)._schema.is_mutable and o.split("_")[-1] in ("out", "input")]
        return not any(torch._C._dispatch_has_kernel_for_dispatch_key(f"{self.func.namespace}::{self.name}.{o}", "CPU") for o in written)

    def again(self, places: Sequence[Tensor | list[Tensor]]) -> partial[Any]:
        """The same call into the memory of the first one, and makes it: in the order of the operators, so that each finds its arguments.

        ``places``: for each result its place, or all that stands for it (:class:`_Aliases`).
        """
        name, packet = self.name, self.func.overloadpacket
        if self.result is None:  # torch's function or method of that name: an operator itself takes longer to call
            function = getattr(torch if "out" in self.kwargs else Tensor, name, self.func)
            step = partial(function, *self.args, **self.kwargs)
            step()
            return step
        copied = partial(_rebound, places, packet, self.args, self.kwargs)
        copied()
        if any(isinstance(place, list) for place in places):
            return copied
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


def _bare(value: Any) -> Any:
    """The same with tensors on that memory that are no part of torch's graph, and will be none."""
    return _changed(Tensor.detach, value)


def _changed(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The same with other tensors."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        return type(value)(_changed(change, item) for item in value)
    return {key: _changed(change, item) for key, item in value.items()} if isinstance(value, dict) else value


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
