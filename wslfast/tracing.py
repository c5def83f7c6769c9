"""From a module to layer records, where the module is a plain chain; and batch norm that a gradient can pass through."""

from __future__ import annotations

import copy
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from .errors import WslfastError, require
from .kernels import reference
from .kernels.layers import Activation, Conv2d, Dropout, Flatten, Layer, Layers, Linear, Pool2d, layer_slots, shapes

_PLAIN = {nn.ReLU: "relu", nn.Tanh: "tanh", nn.Sigmoid: "sigmoid", nn.SiLU: "silu", nn.Identity: "identity"}
# target of a traced call: the activation, and the names of its arguments after the input
_CALLS: dict[Any, tuple[str, tuple[str, ...]]] = {
    F.relu: ("relu", ("inplace",)), torch.relu: ("relu", ()), "relu": ("relu", ()), "relu_": ("relu", ()),
    torch.tanh: ("tanh", ()), F.tanh: ("tanh", ()), "tanh": ("tanh", ()),
    torch.sigmoid: ("sigmoid", ()), F.sigmoid: ("sigmoid", ()), "sigmoid": ("sigmoid", ()),
    F.silu: ("silu", ("inplace",)), F.gelu: ("gelu", ("approximate",)), F.leaky_relu: ("leakyrelu", ("negative_slope", "inplace")),
    F.elu: ("elu", ("alpha", "inplace")), F.celu: ("celu", ("alpha", "inplace")),
}  # fmt: skip
_DEFAULTS = {"leakyrelu": 0.01, "elu": 1.0, "celu": 1.0}


def _pair(value: Any) -> tuple[int, int]:
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _record(module: nn.Module, name: str) -> Layer | None:
    """The record of one leaf module, or None where there is none."""
    if type(module) in _PLAIN:
        return Activation(name, _PLAIN[type(module)])
    if isinstance(module, nn.LeakyReLU):
        return Activation(name, "leakyrelu", float(module.negative_slope))
    if isinstance(module, (nn.ELU, nn.CELU)):
        return Activation(name, type(module).__name__.lower(), float(module.alpha))
    if isinstance(module, nn.GELU):
        return Activation(name, "gelu", approximate=module.approximate)
    if isinstance(module, (nn.Dropout, nn.Dropout2d)):
        return Dropout(name, float(module.p))
    if isinstance(module, nn.Flatten):
        return Flatten(name) if module.start_dim == 1 and module.end_dim == -1 else None
    if type(module) is nn.Linear:
        return Linear(name, module.in_features, module.out_features, module.bias is not None)
    if type(module) is nn.Conv2d:
        if module.padding_mode != "zeros":
            return None
        padding = _same(module) if isinstance(module.padding, str) else _pair(module.padding)
        if padding is None:
            return None
        return Conv2d(
            name,
            module.in_channels,
            module.out_channels,
            _pair(module.kernel_size),
            _pair(module.stride),
            padding,
            _pair(module.dilation),
            module.groups,
            module.bias is not None,
        )
    if isinstance(module, (nn.MaxPool2d, nn.AvgPool2d)):
        plain = _pair(module.padding) == (0, 0) and not module.ceil_mode and _pair(getattr(module, "dilation", 1)) == (1, 1)
        plain = plain and not getattr(module, "return_indices", False) and getattr(module, "divisor_override", None) is None
        mode = "max" if isinstance(module, nn.MaxPool2d) else "avg"
        stride = module.kernel_size if module.stride is None else module.stride
        return Pool2d(name, mode, _pair(module.kernel_size), _pair(stride)) if plain else None
    return None


def _same(module: nn.Conv2d) -> tuple[int, int] | None:
    """Padding numbers of ``padding="same" | "valid"``; None where same needs an uneven border."""
    if module.padding == "valid":
        return (0, 0)
    total = [d * (k - 1) for d, k in zip(_pair(module.dilation), _pair(module.kernel_size), strict=True)]
    return None if any(t % 2 for t in total) else (total[0] // 2, total[1] // 2)


def _call_record(node: fx.Node, name: str) -> Layer | None:
    """The record of a functional call or tensor method in a traced chain."""
    if node.target in _CALLS:
        function, names = _CALLS[node.target]
        values = dict(zip(names, node.args[1:], strict=False)) | node.kwargs
        values.pop("inplace", None)
        parameter = values.pop("negative_slope", values.pop("alpha", _DEFAULTS.get(function, 0.0)))
        approximate = values.pop("approximate", "none")
        if values or not isinstance(parameter, (int, float)):
            return None
        return Activation(name, function, float(parameter), str(approximate))
    if node.target in (torch.flatten, "flatten"):
        values = dict(zip(("start_dim", "end_dim"), node.args[1:], strict=False)) | node.kwargs
        return Flatten(name) if values.get("start_dim") == 1 and values.get("end_dim", -1) == -1 else None
    if node.target in ("view", "reshape", torch.reshape):
        sizes: Any = node.args[1:]
        sizes = sizes[0] if len(sizes) == 1 and isinstance(sizes[0], (list, tuple)) else sizes
        # x.view(x.size(0), -1) or x.view(-1, 400): the numeric check in layers_of catches any other use
        return Flatten(name) if len(sizes) == 2 and not node.kwargs else None
    if node.target in (F.dropout, F.dropout2d):
        p = node.args[1] if len(node.args) > 1 else node.kwargs.get("p", 0.5)
        return Dropout(name, float(p)) if isinstance(p, (int, float)) else None  # one that stays on in evaluation fails the check
    if node.target in (F.max_pool2d, torch.max_pool2d, F.avg_pool2d):
        values = dict(zip(("kernel_size", "stride", "padding"), node.args[1:], strict=False)) | node.kwargs
        kernel, stride = values.pop("kernel_size", None), values.pop("stride", None)
        if not isinstance(kernel, (int, tuple)) or any(v not in (0, 1, None, False, True) for v in values.values()):
            return None
        plain = not values.get("padding") and not values.get("ceil_mode") and not values.get("return_indices")
        if plain and values.get("dilation", 1) == 1 and values.get("count_include_pad", True):
            return Pool2d(name, "avg" if node.target is F.avg_pool2d else "max", _pair(kernel), _pair(stride or kernel))
    return None


def _chain(module: nn.Module) -> list[Layer] | None:
    """Records in execution order, or None if the traced graph is not one chain of known layers."""
    try:
        graph = fx.symbolic_trace(module).graph
        graph.eliminate_dead_code()  # shapes that a forward prints, or reads and drops
    except Exception:  # a forward that tracing cannot follow is an opaque module, whatever it raised
        return None
    layers: list[Layer] = []
    current: fx.Node | None = None
    modules = dict(module.named_modules())
    for node in graph.nodes:
        if node.op == "placeholder":
            if current is not None:
                return None
            current = node
        elif node.op == "output":
            return layers if node.args[0] is current else None
        elif node.target in ("size", getattr, operator.getitem):  # the x.size(0) or x.shape[0] inside a view
            continue
        elif not node.args or node.args[0] is not current:
            return None
        else:
            name = str(node.target) if node.op == "call_module" else node.name
            record = _record(modules[name], name) if node.op == "call_module" else _call_record(node, name)
            if record is None:
                return None
            layers.append(record)
            current = node
    return None


def layers_of(module: nn.Module, input_shape: tuple[int, ...]) -> Layers | None:
    """Layer records of a module that is a plain chain; None when it must stay opaque.

    The records are accepted only if their keys are the module's state dict in order and they compute what the module
    computes, in float64 on random input.
    """
    chain = _chain(module)
    if chain is None:
        return None
    layers = tuple(chain)
    try:
        shapes(layers, input_shape)
    except ValueError:
        return None
    slots = [s for pair in layer_slots(layers) for s in (pair.weight, pair.bias) if s is not None]
    state = module.state_dict()
    if not slots or [(s.name, s.shape) for s in slots] != [(key, tuple(t.shape)) for key, t in state.items()]:
        return None
    queries = torch.randn(2, *input_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    random = {
        key: torch.randn(t.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) / max(t[0].numel(), 1) ** 0.5
        for i, (key, t) in enumerate(state.items())
    }
    row = torch.cat([t.flatten() for t in random.values()])
    training = {m: m.training for m in module.modules()}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            expected = torch.func.functional_call(module.eval(), random, (queries,))
            actual = reference.forward_one(row, queries, layers)
    except Exception:
        return None
    finally:
        for m, mode in training.items():
            m.training = mode
    same = isinstance(expected, Tensor) and expected.shape == actual.shape and torch.allclose(expected, actual, rtol=1e-9, atol=1e-12)
    return layers if same else None


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


def _replaced(module: nn.Module) -> nn.Module:
    """The module with its wrappers taken off and its running statistics differentiable, in place."""
    while (inner := _inner(module)) is not None:
        module = inner
    if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
        return _FrozenNorm(module)
    for name, child in list(module._modules.items()):  # named_children() would skip the second name of a shared one
        if child is not None:
            replaced = _replaced(child)
            if replaced is not child:
                module._modules[name] = replaced
    return module


def _inner(module: nn.Module) -> nn.Module | None:
    """What a wrapper holds: of DataParallel, DistributedDataParallel and torch.compile."""
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return module.module
    compiled = getattr(module, "_orig_mod", None)
    return compiled if isinstance(compiled, nn.Module) else None


def unwrapped(module: nn.Module, name: str) -> nn.Module:
    """A copy of a module as populations run it: wrappers off, on the CPU, in float32 and evaluation mode, running statistics
    differentiable. Raises WslfastError for a module that cannot be copied or has no parameters yet."""
    for path, part in module.named_modules():
        where = f"architecture {name!r}: " + (f"its part {path!r}" if path else "it")
        scripted = isinstance(part, torch.jit.ScriptModule)
        require(not scripted, f"{where} is a TorchScript module, whose code cannot be read; pass the module that it was made from")
        lazy = [key for key, p in part._parameters.items() if isinstance(p, nn.parameter.UninitializedParameter)]
        require(not lazy, f"{where} has parameters without a shape ({lazy[0] if lazy else ''}); run it once on a batch first")
        norm = isinstance(part, nn.modules.batchnorm._BatchNorm) and part.running_mean is None
        require(not norm, f"{where} is a batch norm without running statistics, which mixes the queries of a batch")
    try:
        return _replaced(copy.deepcopy(module)).to("cpu", torch.float32).eval().requires_grad_(False)
    except WslfastError:
        raise
    except Exception as error:
        raise WslfastError(f"architecture {name!r}: the module cannot be copied: {_first_line(error)}") from error


def check_template(template: nn.Module, input_shape: tuple[int, ...], name: str) -> Tensor:
    """Outputs of the template on a few queries.

    Raises WslfastError for a network that a population could not run right: one that cannot run on these queries, is random in
    evaluation mode, keeps something between calls, or whose answer to one query depends on the others.
    """
    shape = f"[n, {', '.join(map(str, input_shape))}]"
    x = torch.randn(4, *input_shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            with _RandomCalls(template) as random:
                out = template(x.clone())
            again, fewer = template(x.clone()), template(x[:2].clone())
        except Exception as error:
            raise WslfastError(f"architecture {name!r}: cannot run on {shape}: {_first_line(error)}") from error
    if not isinstance(out, Tensor):
        return out
    same = isinstance(again, Tensor) and again.shape == out.shape and torch.equal(again.nan_to_num(), out.nan_to_num())
    remedy = "populations run in evaluation mode; make it follow self.training, or leave it out"
    require(same or not random.found, f"architecture {name!r} is random in evaluation mode ({', '.join(random.found)}): {remedy}")
    require(
        same, f"architecture {name!r} answers the same queries another way the second time: it keeps something between calls, or is random"
    )
    alone = isinstance(fewer, Tensor) and fewer.shape[1:] == out.shape[1:] and len(fewer) == 2 and len(out) == 4
    close = alone and torch.allclose(fewer, out[:2], rtol=1e-3, atol=1e-4 * (1 + float(out.abs().max())), equal_nan=True)
    require(
        not isinstance(fewer, Tensor) or len(out) != 4 or close,
        f"architecture {name!r}: its answer to a query depends on the other queries of the batch (a norm over the batch?)",
    )
    return out


class _RandomCalls(TorchFunctionMode):
    """Notes which functions draw random numbers, and in which part of the module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.found: list[str] = []
        self._parts = [(path, part) for path, part in module.named_modules() if path]
        self._at: list[str] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> _RandomCalls:
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
            self.found.append(f"{getattr(func, '__name__', func)}{where}")
        return result


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
