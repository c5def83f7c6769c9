"""What a module must be to be run as a population, and the plain copy of it that is traced."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.overrides import TorchFunctionMode

from ..errors import WslfastError, first_line, require
from ..kernels.operations import by_running_statistics


class _FrozenNorm(nn.Module):
    """Batch or instance norm by its running statistics, differentiable in them as well: a decoder reconstructs those too."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, like: nn.modules.batchnorm._NormBase) -> None:
        super().__init__()
        self.eps = like.eps
        self.weight, self.bias = like.weight, like.bias
        self.register_buffer("running_mean", like.running_mean)
        self.register_buffer("running_var", like.running_var)

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1, *(1,) * (x.ndim - 2))
        scale = torch.rsqrt(self.running_var + self.eps)
        if self.weight is not None:
            scale = scale * self.weight
        shift = -self.running_mean * scale
        if self.bias is not None:
            shift = shift + self.bias
        return x * scale.view(shape) + shift.view(shape)


class FrozenNorms(TorchFunctionMode):
    """Inside this mode, norms that are called as functions are differentiable in their running statistics, too."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (F.batch_norm, F.instance_norm):
            names = ("input", "running_mean", "running_var", "weight", "bias", "from_batch", "momentum", "eps")
            given = {"from_batch": func is F.instance_norm, "eps": 1e-5, **dict(zip(names, args)), **kwargs}
            if not kwargs.get("training", kwargs.get("use_input_stats", given["from_batch"])) and given.get("running_mean") is not None:
                return by_running_statistics(given)
        return func(*args, **kwargs)


_LEAST, _SOME, _MOST = 8, 36, 600  # queries that a template is tried on, so that what it does with many of them is seen
_SMALL = 1 << 16  # numbers of a query of which there are more than the least
_NUMBERS = 1 << 22  # of queries, and of weights times queries, in that trial: mostly some tenths of a second

_NORM_FORWARDS = (nn.modules.batchnorm._BatchNorm.forward, nn.modules.instancenorm._InstanceNorm.forward, nn.SyncBatchNorm.forward)


def with_frozen_norms(module: nn.Module) -> nn.Module:
    """The module, in place, with norms that are differentiable in their running statistics: for modules that are run as they are."""
    own = isinstance(module, nn.modules.batchnorm._NormBase) and type(module).forward in _NORM_FORWARDS  # not a subclass's
    if own and module.running_mean is not None:
        return _FrozenNorm(module)  # type: ignore[arg-type]
    return _with_children(module, with_frozen_norms)


def _with_children(module: nn.Module, changed: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """The module, in place, with ``changed(child)`` for each of its children."""
    for name, child in list(module._modules.items()):  # named_children() would skip the second name of a shared one
        if child is not None:
            module._modules[name] = changed(child)
    return module


def _effective(module: nn.Module) -> nn.Module:
    """A parametrised module with the tensors that it computes as parameters. (torch's own removal changes the class, which a copy shares
    with its original.)"""
    computed = {name: getattr(module, name).detach() for name in module.parametrizations}  # type: ignore[union-attr]
    plain: Any = object.__new__(type(module).__mro__[1])
    plain.__dict__.update(module.__dict__)
    plain._modules = {name: child for name, child in module._modules.items() if name != "parametrizations"}
    plain._parameters = {**{name: nn.Parameter(value, False) for name, value in computed.items()}, **module._parameters}
    return plain  # type: ignore[no-any-return]


def _unwrapped(module: nn.Module) -> nn.Module:
    """The module, in place, without wrappers, parametrisations and pruning: with the weights that they compute."""
    while (inner := _inner(module)) is not None:
        module = inner
    if parametrize.is_parametrized(module):
        module = _effective(module)
    for hook in list(module._forward_pre_hooks.values()):  # the older forms are hooks
        kind = type(hook).__name__
        if isinstance(hook, prune.BasePruningMethod):
            prune.remove(module, hook._tensor_name)
        elif kind == "WeightNorm":
            nn.utils.remove_weight_norm(module, hook.name)  # type: ignore[attr-defined]
        elif kind == "SpectralNorm":
            nn.utils.remove_spectral_norm(module, hook.name)  # type: ignore[attr-defined]
    return _with_children(module, _unwrapped)


def _inner(module: nn.Module) -> nn.Module | None:
    """The module inside a wrapper: DataParallel, DistributedDataParallel or torch.compile."""
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return module.module
    compiled = getattr(module, "_orig_mod", None)
    return compiled if isinstance(compiled, nn.Module) else None


class _Around(nn.Module):
    """A module around another one, with the same parameters under the same names."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._inner = [module]  # in a list, so that no name is put before those of its parameters
        self._modules, self._parameters, self._buffers = module._modules, module._parameters, module._buffers
        self._non_persistent_buffers_set = module._non_persistent_buffers_set


class _Indices(_Around):
    """A module that reads whole numbers, of queries that are floating as all queries of a population are."""

    def forward(self, x: Tensor) -> Any:
        return self._inner[0](x.long())


class _Output(_Around):
    """A module that returns one part of what another module returns."""

    def __init__(self, module: nn.Module, part: str | int) -> None:
        super().__init__(module)
        self.part = part

    def forward(self, x: Tensor) -> Any:
        answer = self._inner[0](x)
        _check_part(answer, self.part)
        return getattr(answer, self.part) if isinstance(self.part, str) and not isinstance(answer, dict) else answer[self.part]


def _check_part(answer: Any, part: str | int) -> None:
    """Raise WslfastError for a part that an answer does not have, naming those that it has."""
    if isinstance(answer, Tensor):
        raise WslfastError(f"output: expected None (--output left out), as the answer is one tensor, got {part!r}")
    if not isinstance(answer, (dict, tuple, list)):  # of a class of its own, or one that stands for it while it is traced
        return
    parts = list(answer) if isinstance(answer, dict) else list(range(len(answer)))
    if isinstance(answer, dict):
        fits = part in answer
    else:  # a tuple may have names, and counts from its end, too
        fits = hasattr(answer, part) if isinstance(part, str) else part in range(-len(answer), len(answer))
    require(fits, f"output: expected a part of the answer, one of {parts[:8]}, got {part!r}")


def prepared(module: nn.Module, name: str, input_shape: tuple[int, ...], output: str | int | None = None) -> nn.Module:
    """A copy of a module as populations run it: wrappers, parametrisations and pruning off, on the CPU, in float32 and evaluation mode.

    Args:
        module: in any mode, on any device, in any dtype.
        name: for errors.
        input_shape: of one query. A module that takes integers alone (an embedding of tokens) is handed queries as such.
        output: which part of the answer counts, for a module that returns a tuple or a dict.

    Raises:
        WslfastError: a module that cannot be copied, or has no parameters yet.
    """
    for path, part in module.named_modules():
        where = f"architecture {name!r}: " + (f"its part {path!r}" if path else "it")
        scripted = isinstance(part, torch.jit.ScriptModule)
        require(not scripted, f"{where} is a TorchScript module, whose code cannot be read; pass the module that it was made from")
        lazy = [key for key, p in part._parameters.items() if isinstance(p, nn.parameter.UninitializedParameter)]
        pairs = [key for key, p in part._parameters.items() if p is not None and p.is_complex()]
        remedy = "hold its real and imaginary parts as real numbers, and join them by torch.view_as_complex"
        require(not pairs, f"{where} has complex parameters ({pairs[0] if pairs else ''}), and rows of weights are real: {remedy}")
        require(not lazy, f"{where} has parameters without a shape ({lazy[0] if lazy else ''}); run it once on a batch first")
        norm = isinstance(part, nn.modules.batchnorm._BatchNorm) and part.running_mean is None
        require(not norm, f"{where} is a batch norm without running statistics, which mixes the queries of a batch")
    try:
        plain = in_precision(_unwrapped(copy.deepcopy(module, _computed(module))), torch.float32, "cpu").eval()
    except WslfastError:
        raise
    except Exception as error:
        raise WslfastError(f"architecture {name!r}: the module cannot be copied: {first_line(error)}") from error
    parametrised, frozen = _parametrised(module), _frozen(plain)
    plain = plain.requires_grad_(False)
    plain = _Indices(plain).eval() if _wants_integers(plain, input_shape) else plain
    made = plain if output is None else _Output(plain, output).eval()
    made._parametrised, made._frozen_names = parametrised, frozen  # type: ignore[assignment]
    return made


def _wants_integers(module: nn.Module, input_shape: tuple[int, ...]) -> bool:
    """Whether a module runs on whole numbers as torch counts them, and on no floating ones."""
    with plainly():
        for dtype in (torch.float32, torch.int64):
            try:
                module(torch.zeros(2, *input_shape, dtype=dtype, device="cpu"))
            except Exception:  # of any kind: what is wrong with it is said when it is checked
                continue
            return dtype == torch.int64
    return False


def _frozen(module: nn.Module) -> frozenset[str]:
    """Parameters that their owner has frozen by ``requires_grad``; none where all are, as in a module that was made ready to be used."""
    trained = {name: value.requires_grad for name, value in module.named_parameters(remove_duplicate=False)}
    return frozenset(name for name, wanted in trained.items() if not wanted) if any(trained.values()) else frozenset()


def _parametrised(module: nn.Module) -> str:
    """Why a module cannot be trained on the weights that it computes; empty where it holds them itself."""
    for path, part in module.named_modules():
        older = any(
            isinstance(hook, prune.BasePruningMethod) or type(hook).__name__ in ("WeightNorm", "SpectralNorm")
            for hook in part._forward_pre_hooks.values()
        )
        if older or parametrize.is_parametrized(part):
            others = f"its weights are computed from others (a parametrisation or pruning of {path!r})"
            return f"{others}, which are what an optimiser would train"
    return ""


def _computed(module: nn.Module) -> dict[int, Any]:
    """Copies of tensors that a module has computed and keeps, as torch does not copy them: the weight that the older weight or spectral
    norm left after a step of training."""
    kept = (value for part in module.modules() for value in part.__dict__.values() if isinstance(value, Tensor))
    return {id(value): value.detach().clone() for value in kept if not value.is_leaf}


@contextmanager
def plainly() -> Iterator[None]:
    """No gradients, no random state touched, and torch's fused transformer encoder off: it is one operation that hides its parts."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def in_precision(module: nn.Module, dtype: torch.dtype, device: torch.device | str | None = None) -> nn.Module:
    """The module, in place, with floating tensors in ``dtype`` and complex ones in the complex dtype of that precision.
    (``Module.to`` and ``Module.double`` make real numbers of complex ones: they leave the imaginary part out.)"""

    def converted(value: Tensor) -> Tensor:
        wanted = dtype.to_complex() if value.is_complex() else dtype if value.is_floating_point() else value.dtype
        return value.to(value.device if device is None else device, wanted)

    return module._apply(converted)


def call_with(module: nn.Module, values: Mapping[str, Tensor], queries: Tensor) -> Any:
    """What a module answers with other tensors in the place of its own, which it has again afterwards.

    A part that a module holds under two names is given its tensors once: ``torch.func.functional_call`` puts them there twice, and then
    leaves the second ones where the first had been, so that a weight that another part shares with it is tied no longer.

    Args:
        values: by name, any one of the names of a tensor that has several. What is not named stays.
    """
    own = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    given = {id(own[name]): value for name, value in values.items()}
    parts = [(f"{path}." if path else "", part) for path, part in module.named_modules()]
    held = [(start + key, value) for start, part in parts for key, value in (*part._parameters.items(), *part._buffers.items())]
    placed = {key: given[id(value)] for key, value in held if id(value) in given}
    return torch.func.functional_call(module, placed, (queries,), tie_weights=False)


def queries_for(module: nn.Module, n: int, input_shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Queries that the module takes: normal numbers, or zeros and ones where it reads them as indices."""
    generator = torch.Generator().manual_seed(n)
    queries = torch.randn(n, *input_shape, generator=generator, dtype=dtype, device="cpu")
    try:
        with plainly():
            module(queries.float().clone())
    except Exception:  # of any kind: what is wrong with it is said when it is checked
        return torch.randint(0, 2, (n, *input_shape), generator=generator, device="cpu").to(dtype)
    return queries


def innermost(module: nn.Module) -> nn.Module:
    """The module without the wrappers that :func:`prepared` put around it."""
    return innermost(module._inner[0]) if isinstance(module, _Around) else module


def handed_integers(module: nn.Module | None) -> bool:
    """Whether a template, as :func:`prepared` gives it, reads nothing of its queries but whole numbers."""
    return isinstance(module, _Around) and (isinstance(module, _Indices) or handed_integers(module._inner[0]))


def output_of(module: nn.Module | None) -> str | int | None:
    """Which part of its answer counts, as :func:`prepared` was told; None where all of it does."""
    return module.part if isinstance(module, _Output) else None


def check_template(template: nn.Module, input_shape: tuple[int, ...], name: str) -> Tensor:
    """Outputs of the template on a few queries.

    Raises WslfastError for a network that a population could not run right: one that cannot run on these queries, is random in
    evaluation mode, keeps something between calls, or whose answer to one query depends on the others.
    """
    shape = f"[n, {', '.join(map(str, input_shape))}]"
    x = queries_for(template, 4, input_shape)
    with plainly():
        try:
            with RandomCalls(template) as random:
                out = template(x.clone())
            again = template(x.clone())
            halves = [template(x[2:].flip(0)), template(x[:2].clone())]  # in another order: a network may read them as time
        except Exception as error:
            raise WslfastError(f"architecture {name!r}: cannot run on {shape}: {first_line(error)}") from error
    if not isinstance(out, Tensor) or out.ndim == 0 or not out.is_floating_point():
        return out  # type: ignore[no-any-return]
    same = isinstance(again, Tensor) and again.shape == out.shape
    same = same and alike(again, out, 1e-5, 1e-6)  # a BLAS may round by where numbers lie
    remedy = "populations run in evaluation mode; make it follow self.training, or leave it out"
    require(same or not random.functions, f"architecture {name!r} is random in evaluation mode ({', '.join(random.functions)}): {remedy}")
    require(
        same, f"architecture {name!r} answers the same queries another way the second time: it keeps something between calls, or is random"
    )
    alone = all(isinstance(half, Tensor) and half.shape == (2, *out.shape[1:]) for half in halves)
    close = alone and alike(torch.cat(halves), torch.cat((out.flip(0)[:2], out[:2])), 1e-3, 1e-4)
    require(
        not isinstance(halves[0], Tensor) or len(out) != 4 or close,
        f"architecture {name!r}: its answer to a query depends on the other queries of the batch "
        "(a norm over the batch? a recurrent part or attention without batch_first?)",
    )
    if len(out) == 4:
        _check_many(template, x, out, name)
    return out


def _check_many(template: nn.Module, x: Tensor, out: Tensor, name: str) -> None:
    """Raises WslfastError for a template that computes something else where there are many queries: ``out`` are its answers to ``x``."""
    size = max(x[0].numel(), sum(value.numel() for value in template.state_dict().values()))
    times = min(_MOST, max(_SOME if x[0].numel() <= _SMALL else _LEAST, _NUMBERS // size)) // len(x)
    many = x.repeat(times, *(1,) * (x.ndim - 1))
    try:
        with plainly():
            answers = template(many)
    except Exception:  # too many for it or for this machine: whoever asks for so many will see that
        return
    expected = out.repeat(times, *(1,) * (out.ndim - 1))
    same = isinstance(answers, Tensor) and answers.shape == expected.shape and alike(answers, expected, 1e-3, 1e-4)
    why = "its forward looks at how many there are, which its graph could not"
    require(same, f"architecture {name!r}: its answer to a query is another one among {len(many)} than among {len(x)}: {why}")


def alike(actual: Tensor, expected: Tensor, rtol: float, atol: float) -> bool:
    """Whether two answers of one shape agree: ``atol`` is of one plus the largest finite number, what is not finite has to be the same."""
    actual, expected = actual.detach().double(), expected.detach().double()
    finite = expected.nan_to_num(0.0, posinf=0.0, neginf=0.0)
    scale = 1 + float(finite.abs().max()) if expected.numel() else 1.0
    return torch.allclose(actual, expected, rtol=rtol, atol=atol * scale, equal_nan=True)


class RandomCalls(TorchFunctionMode):
    """Notes which functions draw random numbers, and in which part of the module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.functions: list[str] = []
        self._parts = [(path, part) for path, part in module.named_modules() if path]
        self._at: list[str] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> RandomCalls:
        for path, part in self._parts:
            self._hooks.append(part.register_forward_pre_hook(lambda *_, path=path: self._at.append(path)))
            self._hooks.append(part.register_forward_hook(lambda *_: self._at.pop() and None))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = torch.default_generator.get_state()
        result = func(*args, **(kwargs or {}))
        if not torch.equal(before, torch.default_generator.get_state()):
            where = f" in {self._at[-1]!r}" if self._at else ""
            self.functions.append(f"{getattr(func, '__name__', func)}{where}")
        return result
