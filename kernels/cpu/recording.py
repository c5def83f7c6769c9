"""What one call computes, kept as the operators of torch that it called, on the memory that they used.

Every operator that writes something is recorded, with its arguments, those of torch's own backward included. To replay a call is to put
numbers into the memory of its inputs and to call these operators in turn; views are there already, and results come where they came.

That holds as long as nothing that depends on numbers is decided in Python. A recording is given up where a function returns anything but
tensors and is none of those that tell a shape or a type, and where random numbers are drawn. What is left is held against the call itself
before it is used: on other numbers, with NaN in all the memory that it has to write, to the bit. The twin is the call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from . import jobs
from .aliases import Borrowed, Loose, place_of, rebound, released, storage_of, tensors_in
from .arena import Arena

__all__ = ["MOST_BYTES", "Recording", "Run", "record"]

MOST_BYTES = 16 << 20  # that a call writes: from there on it takes as long either way, and recording it takes many times as long
_BORROWED = 1 << 14  # bytes, for each tensor that stands for it, of an input that is read where the caller has it, and of a result that is
# written where it goes: as many are copied while one is moved there and back
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
_WITH_NUMBERS = frozenset({"add", "div", "mul", "sub"})
_MOVES = frozenset({"resize_", "resize_as_", "set_"})  # a tensor to other memory

# Results of inputs: new tensors, that nobody else holds.
Run = Callable[..., Sequence[Tensor]]


class Recording:
    """The operators of a call, bound to the memory that they read and write.

    Args:
        inputs, results: tensors in that memory, or what stands for them where the caller's memory is used.
        steps: the operators.
        memory: all that they write.
        loose: what stands for memory that torch makes, and that no step gives back.
        share: whether matrix products take all threads.

    Attributes:
        bytes: that it holds.
    """

    def __init__(
        self,
        inputs: Sequence[Tensor | Borrowed],
        steps: Sequence[partial[Any]],
        results: Sequence[Tensor | Borrowed],
        memory: Tensor,
        loose: Sequence[Sequence[Tensor]],
        share: bool,
    ) -> None:
        self._loose = loose
        self.bytes = sum(_bytes(t) for t in (*inputs, memory) if isinstance(t, Tensor))
        self._inputs, self._results, self._memory, self._share = tuple(inputs), tuple(results), memory, share
        self._anywhere = (None,) * len(results)
        self._steps = tuple(steps)
        self._borrowed = [t for t in (*inputs, *results) if isinstance(t, Borrowed)]
        for borrowed in self._borrowed:
            borrowed.settle()

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The results, in memory of their own."""
        return self.into(None, *inputs)

    def into(self, places: Sequence[Tensor | None] | None, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The results, written to ``places``; where there is None, in memory of their own. Inputs are dense."""
        places = self._anywhere if places is None else places
        results: list[Tensor] = []
        with torch.no_grad():
            try:
                for here, given in zip(self._inputs, inputs, strict=True):
                    if isinstance(here, Borrowed):
                        here.lend(given)
                    else:
                        here.copy_(given)
                homes = [_home(result, place) for result, place in zip(self._results, places, strict=True)]
                jobs.run_here((partial(self._run, homes, results),), self._share)
            finally:
                for borrowed in self._borrowed:
                    borrowed.give_back()
        for place, result in zip(places, results, strict=True):
            if place is not None and place is not result:
                place.copy_(result)
        return tuple(results)

    def _run(self, homes: Sequence[Tensor | None], results: list[Tensor]) -> None:
        """``homes``: where results go, of those that are borrowed the memory that was lent; None: anywhere."""
        for step in self._steps:
            step()
        for home, result in zip(homes, self._results, strict=True):
            if isinstance(result, Tensor):
                home = result.clone() if home is None else home.copy_(result)
            assert home is not None
            results.append(home)
        for aliases in self._loose:
            released(aliases)

    def forget(self) -> None:
        """Puts NaN, ones in every bit, in all memory that a call writes."""
        self._memory.fill_(255)


def _home(result: Tensor | Borrowed, place: Tensor | None) -> Tensor | None:
    """Where a result goes: to its place; a borrowed one, which is dense, to memory that lies so."""
    if not isinstance(result, Borrowed):
        return place
    home = place if place is not None and place.is_contiguous() else torch.empty(result.shape, dtype=result.dtype, device="cpu")
    result.lend(home)
    return home


def record(run: Run, inputs: Sequence[Tensor], share: bool = False) -> Recording | str:
    """A recording of ``run(*inputs)`` that was held against it, or why there is none. What a call raises is raised here."""
    with torch.inference_mode(False), torch.no_grad():
        own = [t.clone() for t in inputs]
        try:
            recorder = _Recorder(own)
            with _Watch(), recorder:
                results = run(*own)
            if not recorder.operators or not {storage_of(t) for t in results} <= {storage_of(t) for t in recorder.made}:
                return "its results come from elsewhere"
            other = [_other(t) for t in inputs]
            for here, given in zip(own, other, strict=True):
                here.copy_(given)
            recording = _settled(own, recorder, _bare(results), share)
            del recorder, results
            recording.forget()
            wanted = run(*other)
            places = [torch.empty(t.shape, dtype=t.dtype, device="cpu") for t in wanted]
            for place in places:
                place.view(-1).view(torch.uint8).fill_(255)
            same = all(map(_same_bits, recording.into(places, *other), wanted))
        except _Refused as reason:
            return str(reason)
        return recording if same else "its replay gives other bits"


def _settled(inputs: Sequence[Tensor], recorder: _Recorder, results: Sequence[Tensor], share: bool) -> Recording:
    """What was recorded, in memory of its own."""
    sizes = {storage_of(t): _bytes(t) for t in recorder.made}
    borrowed = _borrowed(inputs, recorder, results)
    loose = {storage_of(t) for o in recorder.operators if o.makes_its_own() for t in tensors_in(o.result) if _bytes(t) >= _LOOSE}
    lives: dict[int, tuple[int, int]] = {}
    for i, touched in enumerate((*[(o.args, o.kwargs, o.result) for o in recorder.operators], results)):
        for name in map(storage_of, tensors_in(touched)):
            if name in sizes and name not in borrowed:
                lives[name] = lives.get(name, (i, i))[0], i
    arena = Arena(sizes, {name: life for name, life in lives.items() if name not in loose})
    aliases = Loose(loose)

    def there(t: Tensor) -> Tensor:
        name = storage_of(t)
        return borrowed[name].of(t) if name in borrowed else aliases.of(t) if name in loose else arena.moved(t)

    moved = partial(_changed, there)
    operators = [_Operator(o.name, o.func, moved(o.args), moved(o.kwargs), moved(o.result)) for o in recorder.operators]
    found = [borrowed.get(storage_of(t)) or there(t) for t in results]
    steps: list[partial[Any]] = []
    for i, (operator, before) in enumerate(zip(operators, recorder.operators, strict=True)):
        made = zip(tensors_in(before.result), tensors_in(operator.result), strict=True)
        places = [aliases.known.get(storage_of(t), here) for t, here in made]
        steps.append(operator.again(places))
        ended = [name for name in loose if lives[name][1] == i < len(operators) - 1]  # what the last one reads, it may read again
        for name in ended:
            steps.append(partial(released, aliases.known[name]))
            steps[-1]()
    last = [aliases.known[name] for name in loose if lives[name][1] >= len(operators) - 1]
    return Recording([borrowed.get(storage_of(t)) or t for t in inputs], steps, found, arena.memory, last, share)


def _borrowed(inputs: Sequence[Tensor], recorder: _Recorder, results: Sequence[Tensor]) -> dict[int, Borrowed]:
    """Large inputs, and large results that are nothing but memory to the operators that write there, by their storage."""
    seen = [t for o in recorder.operators for t in tensors_in((o.args, o.kwargs, o.result))]
    made = {storage_of(t) for o in recorder.operators for t in tensors_in(o.result)}
    found: dict[int, Borrowed] = {}
    for tensor in (*inputs, *results):
        name = storage_of(tensor)
        here = [t for t in seen if storage_of(t) == name]
        whole = tensor.is_contiguous() and tensor.nbytes == _bytes(tensor)
        once = sum(storage_of(t) == name for t in (*inputs, *results)) == 1
        worth = tensor.nbytes >= _BORROWED * len({place_of(t) for t in here})
        if whole and once and worth and name not in made and all(t.dtype == tensor.dtype for t in here):
            found[name] = Borrowed(tensor)
    return found


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
        if not nothing and name not in _TELLS and not tensors_in(result):
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
        self._storages = {storage_of(t) for t in inputs}
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
        results, read = tensors_in(result), {storage_of(t) for t in tensors_in((args, kwargs))}
        fresh = [t for t in results if storage_of(t) not in read]
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise _Refused(f"{name} draws random numbers")
        counted = name != "index" or any(t.dtype in (torch.bool, torch.uint8) for t in tensors_in(args[1]))
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
        made = {storage_of(t) for t in fresh}
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

        ``places``: for each result its place, or all that stands for it (:class:`Loose`).
        """
        name, args = self.name, _without_numbers(self.name, self.args)
        if self.result is None:  # torch's function or method of that name: an operator itself takes longer to call
            function = getattr(torch if "out" in self.kwargs else Tensor, name, self.func)
            step = partial(function, *args, **self.kwargs)
            step()
            return step
        copied = partial(rebound, places, self.func, self.args, self.kwargs)
        copied()
        if any(isinstance(place, list) for place in places):
            return copied
        if name in _SAME:
            return partial(self.result.copy_, self.args[0])
        if name in _ZEROS:
            return partial(self.result.zero_)
        ways = ((getattr(torch, name, None), "out"), *((_written(self.func, keyword), keyword) for keyword in ("out", "grad_input")))
        for function, keyword in ways:
            if function is not None and _comes_out(function, keyword, args, self.kwargs, self.result):
                return partial(function, *args, **self.kwargs, **{keyword: self.result})
        return copied


@cache
def _written(func: Any, keyword: str) -> Any:
    """The operator that takes what ``func`` does and has a ``keyword`` for its result; to call all of one name takes twice as long."""
    packet, taken = func.overloadpacket, _types(func._schema.arguments)
    for overload in packet.overloads():
        arguments = getattr(packet, overload)._schema.arguments
        if arguments[-1].name == keyword and _types(arguments[:-1]) == taken:
            return getattr(packet, overload)
    return None


def _types(arguments: Sequence[Any]) -> list[tuple[str, str]]:
    return [(argument.name, str(argument.type)) for argument in arguments]


def _without_numbers(name: str, args: Any) -> Any:
    """Arguments of a sum or product with a number of Python's as a tensor: torch would make one in every call, of another type, and convert
    it."""
    if name.rstrip("_") not in _WITH_NUMBERS or len(args) != 2 or not isinstance(args[0], Tensor) or type(args[1]) not in (int, float):
        return args
    return (args[0], torch.tensor(args[1], dtype=args[0].dtype, device="cpu")) if args[0].dtype in (torch.float32, torch.float64) else args


def _comes_out(function: Any, keyword: str, args: Any, kwargs: Any, result: Any) -> bool:
    """Whether a function takes memory for its results, and puts the same bits there."""
    trial = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cpu") for t in tensors_in(result)]
    places = [t.data_ptr() for t in trial]
    try:
        function(*args, **kwargs, **{keyword: trial[0] if isinstance(result, Tensor) else trial})
    except (TypeError, RuntimeError, ValueError):  # it has no such argument
        return False
    return places == [t.data_ptr() for t in trial] and all(map(_same_bits, trial, tensors_in(result)))


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


def _bytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def _same_bits(a: Tensor, b: Tensor) -> bool:
    alike = a.shape == b.shape and a.dtype == b.dtype
    return alike and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
