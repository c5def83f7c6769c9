"""ONE table of operations: what a network may be made of, and how k models run each of them at once.

An entry is an ATen operator, which is what torch's own modules and functions come down to: calling it is the readable reference, in any
dtype and on any device. ``form`` names how it runs *stacked*, for M models each with its own weights (``stacked/forms.py``):

    elementwise  the same call, operands aligned behind the axis of models
    axes         the same call: its axes are counted from the end
    shape        a size for the models in front
    join         several tensors along one axis
    scatter      a tensor with a part of it replaced
    image        models folded into the axis of queries, ``[M * n, C, H, W]``
    create       a tensor like the queries, the same for all models
    identity     nothing, in evaluation mode; in training mode, multiplied by a random mask of each model's own
    vmap         torch.vmap over the one operator
    else         a function of its own name

Adding an elementwise function is one line here, and its test. Adding a layer type is an entry here and, where it has weights, a form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload

from .dtypes import DTYPES
from .graph import INFINITE, QUERY, Argument, Arguments, Graph, Node, is_size

_LARGEST = (1 << 31) - 1


@dataclass(frozen=True)
class Operation:
    """One entry.

    Attributes:
        name: of the ATen operator, with its overload where that is not the default.
        form: how it runs stacked.
        monotone: whether it is elementwise and never decreasing, whatever its arguments: max pooling may go first.
    """

    name: str
    form: str
    monotone: bool = False

    @cached_property
    def overload(self) -> OpOverload:
        """The operator."""
        packet, _, overload = self.name.partition(".")
        return getattr(getattr(torch.ops.aten, packet), overload or "default")  # type: ignore[no-any-return]

    @cached_property
    def axes(self) -> int:
        """Axes of the images that it reads, by its name; 0 for none."""
        name = self.name.partition(".")[0]
        return int(name[-2]) if name.endswith("d") and name[-2:-1].isdigit() else 0

    @cached_property
    def parameters(self) -> dict[str, Parameter]:
        """Its arguments by name, in order; not those that say where and how a tensor lies, or which library computes."""
        return {name: parameter for name, parameter in self._all_parameters.items() if name not in _PLACES}

    @cached_property
    def _all_parameters(self) -> dict[str, Parameter]:
        if self.form == "getitem":
            return {"self": Parameter("Tensor", False, None, False), "index": Parameter("int", False, None, False)}
        arguments = self.overload._schema.arguments
        return {
            a.name: Parameter(
                "dtype" if a.name == "dtype" else str(a.type), a.has_default_value(), _frozen(a.default_value), bool(a.kwarg_only)
            )
            for a in arguments
        }

    def call(self, arguments: Mapping[str, Any]) -> Any:
        """What the operator gives for arguments by name; those left out have their defaults."""
        if self.form == "getitem":
            return arguments["self"][arguments["index"]]
        if self.name in _PAIRS:
            return _PAIRS[self.name](arguments["self"])
        if self.name in _DIFFERENTIABLE:
            if not (arguments.get("use_input_stats") or arguments.get("training")):
                return by_running_statistics(arguments)
            if arguments.get("training"):  # by those of the batch; the running ones stay as they are
                arguments = {**arguments, "running_mean": None, "running_var": None}
        positional, named, last = [], {}, 0
        for name, parameter in self._all_parameters.items():
            given = name in arguments
            if not given and name in _PLACES and not parameter.optional:
                given, arguments = True, {**arguments, name: False}  # cudnn_enabled has no default
            if not given and not parameter.optional:
                raise ValueError(f"{self.name}: argument {name!r} is missing")
            if parameter.keyword:
                if given:
                    named[name] = arguments[name]
                continue
            positional.append(arguments[name] if given else _thawed(parameter.default))
            last = len(positional) if given else last
        return self.overload(*positional[:last], **named)

    @cached_property
    def invoke(self) -> Callable[[Mapping[str, Any]], Any]:
        """:meth:`call` for arguments of which none is left out: nothing is looked up but they."""
        if self.form == "getitem" or self.name in (*_DIFFERENTIABLE, *_PAIRS):
            return self.call
        overload, parameters = self.overload, self._all_parameters
        names = [name for name, parameter in parameters.items() if not parameter.keyword]
        named = [name for name, parameter in parameters.items() if parameter.keyword and name not in _PLACES]
        if any(name in _PLACES for name in names):
            return self.call
        if named:
            return lambda a: overload(*[a[name] for name in names], **{name: a[name] for name in named})
        return lambda a: overload(*[a[name] for name in names])

    def check(self, arguments: Arguments, training: bool = False) -> None:
        """Raises ValueError for an argument that the operator does not have, of another type, or out of all proportion."""
        given = dict(arguments)
        if len(given) != len(arguments):
            raise ValueError("an argument is there twice")
        for name, value in arguments:
            if name not in self.parameters:
                raise ValueError(f"no argument {name!r:.40}; it has {list(self.parameters)}")
            kind = self.parameters[name].kind
            if not _fits(kind, value):
                raise ValueError(f"argument {name!r}: expected {kind}, got {value!r:.60}")
            if value != _MUST_BE.get(name, value) and not (training and name in _OF_A_MODE):
                raise ValueError(f"argument {name!r}: expected {_MUST_BE[name]}, got {value!r:.60}")
            if name in PER_AXIS and isinstance(value, tuple) and len(value) not in (self.axes or len(value), 0 if name == "stride" else -1):
                raise ValueError(f"argument {name!r}: expected one for each of {self.axes} axes, got {value!r:.60}")
        if self.form in WITH_AXES:
            for name in AXES & set(self.parameters):
                axes = given.get(name, self.parameters[name].default)
                if any(type(axis) is int and axis >= 0 for axis in (axes if isinstance(axes, tuple) else (axes,))):
                    raise ValueError(f"argument {name!r}: expected axes counted from the end, got {axes!r:.60}")
        missing = [name for name, parameter in self.parameters.items() if not parameter.optional and name not in given]
        if missing:
            raise ValueError(f"arguments {missing} are missing")


# Arguments that are axes, in forms that add an axis of models in front: counted from the end, they mean the same with it.
AXES = frozenset({"dim", "dims", "dim0", "dim1", "start_dim", "end_dim", "source", "destination", "dimension"})
PER_AXIS = ("kernel_size", "stride", "padding", "dilation", "output_padding", "output_size")  # one number for each axis of an image
WITH_AXES = ("axes", "join", "shape", "scatter")
_MUST_BE = {"train": False, "training": False, "dropout_p": 0.0, "scale_grad_by_freq": False}  # evaluation mode, and torch's gradient
_OF_A_MODE = ("train", "training", "dropout_p")

_DIFFERENTIABLE = ("batch_norm", "instance_norm")  # in their running statistics, which torch's own are not: a decoder rebuilds those too


def _as_complex(pairs: Tensor) -> Tensor:
    """Complex numbers of pairs ``[..., 2]`` that lie anywhere: torch wants them side by side, from an even place on."""
    side_by_side = not torch._C._functorch.is_functorch_wrapped_tensor(pairs) and pairs.is_contiguous() and pairs.storage_offset() % 2 == 0
    return torch.view_as_complex(pairs if side_by_side else pairs.clone(memory_format=torch.contiguous_format))


_PAIRS = {"view_as_complex": _as_complex, "view_as_real": lambda x: torch.view_as_real(x.resolve_conj())}


def by_running_statistics(a: Mapping[str, Any]) -> Tensor:
    """scale (x - mean) / sqrt(variance + eps) + shift, one of each a channel."""
    x = a["input"]
    mean, variance, scale, shift = (
        None if a.get(name) is None else a[name].view(-1, *(1,) * (x.ndim - 2))
        for name in ("running_mean", "running_var", "weight", "bias")
    )
    normed = (x - mean) * torch.rsqrt(variance + a["eps"])
    normed = normed if scale is None else normed * scale
    return normed if shift is None else normed + shift


class Parameter(NamedTuple):
    """One argument of an operator: its type, whether it may be left out, what it is then, and whether it goes by name."""

    kind: str
    optional: bool
    default: Any
    keyword: bool


_PLACES = ("layout", "device", "pin_memory", "memory_format", "non_blocking", "copy", "cudnn_enabled")


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _thawed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _fits(kind: str, value: Argument) -> bool:
    if kind.startswith("Optional["):
        return value is None or _fits(kind[len("Optional[") : -1], value)
    if kind.startswith("List["):
        inner = kind[len("List[") : -1]
        return isinstance(value, tuple) and all(_fits(inner, item) for item in value)
    if isinstance(value, str) and value in INFINITE:
        return kind in ("number", "Scalar", "float", "Tensor")
    reference = isinstance(value, str) and value.startswith("@") and not is_size(value)
    if kind == "Tensor":  # arithmetic takes a number where a tensor is meant
        return reference or type(value) in (int, float, bool)
    if kind == "dtype":
        return value is None or value in DTYPES
    if kind in ("int", "SymInt"):
        return is_size(value) or (type(value) is int and abs(value) <= _LARGEST)
    if kind in ("number", "Scalar"):
        return type(value) in (int, float, bool) or is_size(value)
    if kind == "float":
        return type(value) in (int, float)
    if kind == "bool":
        return type(value) is bool
    if kind == "str":
        return isinstance(value, str) and not value.startswith("@")
    return False


def _table() -> dict[str, Operation]:
    entries: dict[str, Operation] = {}

    def add(form: str, names: str, monotone: bool = False) -> None:
        for name in names.split():
            entries[name] = Operation(name, form, monotone)

    # elementwise functions of torch.nn
    add("elementwise", "relu relu6 tanh sigmoid softplus selu hardtanh hardsigmoid log_sigmoid", monotone=True)
    add("elementwise", "leaky_relu elu celu gelu silu mish hardswish hardshrink softshrink threshold")
    # arithmetic
    add("elementwise", "abs neg exp exp2 expm1 log log1p log2 log10 sin cos tan asin acos atan sinh cosh asinh acosh atanh")
    add("elementwise", "erf erfc sqrt rsqrt square reciprocal sign sgn floor ceil round trunc frac sinc logit")
    add("elementwise", "add.Tensor add.Scalar sub.Tensor sub.Scalar rsub.Scalar rsub.Tensor mul.Tensor mul.Scalar div.Tensor div.Scalar")
    add(
        "elementwise",
        "div.Tensor_mode pow.Tensor_Scalar pow.Tensor_Tensor pow.Scalar maximum minimum fmax fmin atan2 lerp.Tensor lerp.Scalar",
    )
    add("elementwise", "addcmul addcdiv clamp clamp.Tensor clamp_min clamp_max clamp_min.Tensor clamp_max.Tensor where.self where.Scalar")
    add(
        "elementwise",
        "where.ScalarSelf where.ScalarOther masked_fill.Scalar masked_fill.Tensor remainder.Scalar remainder.Tensor fmod.Scalar",
    )
    add(
        "elementwise",
        "gt.Scalar gt.Tensor lt.Scalar lt.Tensor ge.Scalar ge.Tensor le.Scalar le.Tensor eq.Scalar eq.Tensor ne.Scalar ne.Tensor",
    )
    add(
        "elementwise",
        "logical_and logical_or logical_not logical_xor bitwise_and.Tensor bitwise_or.Tensor bitwise_xor.Tensor bitwise_not isfinite isnan",
    )
    add("elementwise", "fmod.Tensor hypot logaddexp xlogy.Tensor copysign.Tensor rrelu nan_to_num round.decimals detach")
    # along axes
    add("axes", "softmax.int log_softmax.int sum.dim_IntList mean.dim amax amin var.correction std.correction var.dim std.dim logsumexp")
    add(
        "axes", "cumsum cumprod flip roll glu select.int slice.Tensor narrow unsqueeze squeeze.dim squeeze.dims transpose.int unflatten.int"
    )
    add("axes", "constant_pad_nd argmax argmin max.dim min.dim topk sort split.Tensor split_with_sizes chunk unbind.int prod.dim_int")
    add("axes", "norm.ScalarOpt_dim linalg_vector_norm movedim.int movedim.intlist diff repeat_interleave.self_int tril triu median.dim")
    add("axes", "var_mean.correction std_mean.correction var_mean.dim std_mean.dim any.dims all.dims any.dim all.dim argsort unfold")
    # of complex numbers, and to and from them
    add("elementwise", "real imag angle conj_physical complex polar")
    add(
        "axes",
        "view_as_complex view_as_real fft_fft fft_ifft fft_rfft fft_irfft fft_hfft fft_ihfft fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2",
    )
    add("axes", "fft_fftn fft_ifftn fft_rfftn fft_irfftn fft_fftshift fft_ifftshift")
    add("getitem", "getitem")
    # shapes
    add("shape", "reshape expand repeat permute flatten.using_ints")
    add("join", "cat stack")
    add("scatter", "slice_scatter select_scatter")
    # images
    add("image", "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d")
    add("image", "adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d")
    add("image", "max_pool2d_with_indices max_unpool2d pixel_shuffle pixel_unshuffle channel_shuffle im2col col2im pad")
    add("image", "upsample_nearest1d.vec upsample_nearest2d.vec upsample_nearest3d.vec upsample_linear1d.vec upsample_bilinear2d.vec")
    add("image", "upsample_bicubic2d.vec upsample_trilinear3d.vec _upsample_nearest_exact1d.vec _upsample_nearest_exact2d.vec")
    add("image", "_upsample_nearest_exact3d.vec _upsample_bilinear2d_aa.vec _upsample_bicubic2d_aa.vec")
    # layers with weights
    add("linear", "linear")
    add("convolution", "conv1d conv2d conv3d conv1d.padding conv2d.padding conv3d.padding")
    add("transposed", "conv_transpose1d conv_transpose2d.input conv_transpose3d.input")
    add("batch_norm", "batch_norm")
    add("instance_norm", "instance_norm")
    add("group_norm", "group_norm")
    add("layer_norm", "layer_norm")
    add("rms_norm", "rms_norm")
    add("prelu", "prelu")
    add("embedding", "embedding")
    add("recurrent", "lstm.input gru.input rnn_tanh.input rnn_relu.input")
    add("cell", "lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell")
    # products
    add("matmul", "matmul mm bmm mv dot")
    add("addmm", "addmm baddbmm")
    add("attention", "scaled_dot_product_attention")
    add("einsum", "einsum")
    add("vmap", "index.Tensor index_select gather cosine_similarity pairwise_distance outer kron grid_sampler prod median")
    add("grid", "affine_grid_generator")
    add("vmap", "linalg_matrix_norm linalg_matrix_norm.str_ord searchsorted.Tensor one_hot diagonal trace diag")
    add("vmap", "index_put index_add index_copy index_fill.int_Scalar scatter.src scatter.value scatter_add")
    add("vmap", "take_along_dim")
    add("tensordot", "tensordot inner")
    add("cdist", "cdist")
    # nothing
    add("identity", "dropout feature_dropout alpha_dropout feature_alpha_dropout")
    # made here: of the queries' dtype and device; what depends on nothing is a constant of the graph instead
    add("create", "new_zeros new_ones new_full")
    add("axes", "zeros_like ones_like full_like type_as to.dtype")
    return {name: entry for name, entry in entries.items() if entry.form == "getitem" or _there(name)}


def _there(name: str) -> bool:
    """Whether this build of torch has the operator."""
    packet, _, overload = name.partition(".")
    return hasattr(torch.ops.aten, packet) and (overload or "default") in getattr(torch.ops.aten, packet).overloads()


TABLE = _table()


def check_graph(graph: Graph, training: bool = False) -> Graph:
    """The graph itself. Raises ValueError for an operation that is not in the table, or an argument that it does not have, or has in
    ``training`` mode only."""
    for i, node in enumerate(graph.nodes):
        if node.operation not in TABLE:
            raise ValueError(f"node {i}: unknown operation {node.operation!r:.60}")
        try:
            TABLE[node.operation].check(node.arguments, training)
        except ValueError as error:
            raise ValueError(f"node {i} ({node.operation}): {error}") from None
    if graph.training.graph is not None:
        check_graph(graph.training.graph, training=True)
    return graph


@lru_cache(maxsize=256)
def reads_integers(graph: Graph) -> bool:
    """Whether a graph reads nothing of the queries but whole numbers, the indices of a table."""
    reading = [node for node in graph.nodes if QUERY in node.references() and TABLE[node.operation].form != "create"]
    return bool(reading) and all(node.operation == "to.dtype" and node.argument("dtype") == "int64" for node in reading)


def training_graph(graph: Graph) -> Graph:
    """The graph in training mode: the same one where both modes are. Batch norms whose running statistics are parameters go by those of
    the batch, dropout drops.

    Raises:
        ValueError: it cannot be trained; the message says why.
    """
    if graph.training.refused:
        raise ValueError(graph.training.refused)
    made = graph.training.graph or replace(graph, nodes=tuple(map(_in_training, graph.nodes)))
    for node in made.nodes:
        form, given = TABLE[node.operation].form, dict(node.arguments)
        if form == "recurrent" and given.get("train") and given.get("dropout") and given.get("num_layers", 1) > 1:
            raise ValueError("it has dropout between the layers of a recurrent network, which is not drawn model by model")
        if node.operation == "instance_norm" and given.get("running_mean") is not None:
            raise ValueError("it has an instance norm with running statistics, which are not kept model by model")
        if node.operation == "rrelu":
            raise ValueError("it has a randomised leaky ReLU, which is random in another way than dropout")
        if node.operation == "batch_norm" and given.get("training"):
            kept = [given.get(name) for name in ("running_mean", "running_var")]
            if kept != [None, None] and not all(isinstance(r, str) and r.startswith("@w:") for r in kept):
                raise ValueError("it has a batch norm whose running statistics are no parameters")
            if not given.get("momentum") and kept != [None, None]:
                raise ValueError("it has a batch norm without a momentum, whose running averages are of all steps so far")
    return graph if made.nodes == graph.nodes and made.output == graph.output else made


def _in_training(node: Node) -> Node:
    """A node of evaluation mode in training mode."""
    given = dict(node.arguments)
    if TABLE[node.operation].form == "identity":
        return node if given["p"] == 0 else Node(node.operation, tuple({**given, "train": True}.items()))
    if node.operation == "batch_norm":
        return Node(node.operation, tuple({**given, "training": True}.items()))
    return node
