"""What a model is: the static description that all models of a population share.

An :class:`Architecture` is a :class:`~wslfast.kernels.graph.Graph` of operations, as plain data: it is in a zoo's manifest and in a
checkpoint, and no command needs the module again. A plain chain of layers also has its layer records, which the hand-written engines
read. A module that cannot be traced is kept as it is, and runs as it is.

The published networks are class methods; their module orders, key names and initialisations are those of the model-zoo code that the
field's zoos were made with (``networks.py``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from . import networks, tracing
from .errors import WslfastError, describe, present, require
from .kernels.chains import chain_of, graph_of
from .kernels.default_device import on_the_cpu, with_numbers
from .kernels.graph import Graph, Slot, slots_of
from .kernels.layers import RECORDS, Layer, Layers, check_layer, layer_from_dict
from .kernels.operations import check_graph
from .kernels.reference import check_values, value_shapes
from .networks import INITIALISATIONS, initial_weights

__all__ = ["INITIALISATIONS", "Architecture", "from_handle"]

VERSION = 2  # of the JSON form: 1 had a list of layers, or the name of a recipe


class Architecture:
    """A network as data, with the names and shapes of its parameters. Immutable; equal if the graphs are.

    Attributes:
        name: what to call it.
        input_shape: shape of one query, ``(C, H, W)``, ``(features,)`` or any other.
        graph: the operations; None for a module that cannot be traced.
        parameters: name, shape and offset of every entry of a row of weights, in state-dict key order. Floating buffers are entries
            too, as batch norm's running statistics (a network is not the same function without them); its step counter is not. A
            parameter that several keys share is one entry, under its first key.
        module: the template of a module that cannot be traced, in evaluation mode; None otherwise.
        reason: why it cannot be traced.
        num_weights: P, numbers in one row of weights (trainable parameters, and running statistics where there are any).
        output_shape: shape of the answer to one query.
        handle: what torch operators take in its place, see :func:`from_handle`.
        slots: parameters by name.
        aliases: further state-dict keys of tied parameters, by the name of the one entry that holds each.
        constants: integer and boolean entries of the state dict by name: part of the network, the same for all models, not of a row of
            weights.
        known: every state-dict key that it has a place for.
    """

    name: str
    input_shape: tuple[int, ...]
    graph: Graph | None
    parameters: tuple[Slot, ...]
    module: nn.Module | None
    reason: str
    num_weights: int
    output_shape: tuple[int, ...]
    handle: str
    slots: dict[str, Slot]
    aliases: dict[str, str]
    constants: dict[str, Tensor]
    known: frozenset[str]
    _views: dict[int, Architecture]  # with classes last, by their axis counted from behind

    @on_the_cpu
    def __init__(
        self, name: str, input_shape: tuple[int, ...], graph: Graph | None, module: nn.Module | None = None, reason: str = ""
    ) -> None:
        parameters = graph.slots if graph is not None else _slots(module)
        given = {"name": name, "input_shape": tuple(input_shape), "graph": graph, "parameters": parameters}
        self.__dict__.update(given, module=module, reason=reason)
        self._derive()

    def _derive(self) -> None:
        """Plain attributes, as a compiler cannot follow properties that are computed once."""
        num_weights = self.parameters[-1].stop if self.parameters else 0
        self.__dict__.update(num_weights=num_weights, output_shape=self._output_shape(), handle=self._handle(), _views={})
        slots, aliases, constants = {p.name: p for p in self.parameters}, self._aliases(), self._constants()
        self.__dict__.update(slots=slots, aliases=aliases, constants=constants, known=frozenset((*slots, *aliases, *constants)))

    def __setattr__(self, key: str, value: Any) -> None:
        raise AttributeError(f"an Architecture does not change; {key!r} cannot be set")

    def __getstate__(self) -> dict[str, Any]:
        return {key: self.__dict__[key] for key in ("name", "input_shape", "graph", "parameters", "module", "reason")}

    @on_the_cpu
    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._derive()

    def __copy__(self) -> Architecture:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Architecture:
        return self  # immutable

    def __hash__(self) -> int:
        return hash(self.graph) if self.graph is not None else id(self.module)

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Architecture):
            return NotImplemented
        if self.graph is None or other.graph is None:
            return self.module is other.module and self.graph is other.graph
        return self.name == other.name and self.graph == other.graph

    def __repr__(self) -> str:
        sizes = ", ".join(map(str, self.input_shape))
        what = f"{len(self.graph.nodes)} operations" if self.graph is not None else "a module that cannot be traced"
        out = ", ".join(map(str, self.output_shape))
        return f"Architecture({self.name!r}, [n, {sizes}] -> [n, {out}], {self.num_weights:,} weights, {what})"

    def same_network(self, other: Architecture) -> bool:
        """Whether both compute the same from the same rows of weights, whatever they are called."""
        if self.graph is None or other.graph is None:
            return self is other or (self.module is other.module and self.parameters == other.parameters)
        return self.graph == other.graph

    # -- sizes ---------------------------------------------------------------------------------------------------------

    @cached_property
    def layers(self) -> Layers:
        """The layer records of a plain chain; empty for any other network."""
        return () if self.graph is None else chain_of(self.graph)

    @property
    def planned(self) -> bool:
        """Whether it is a plain chain of layers, which the hand-written engines run."""
        return bool(self.layers)

    @cached_property
    def statistics(self) -> tuple[str, ...]:
        """Running means and variances."""
        return tuple(p.name for p in self.parameters if p.name.endswith(("running_mean", "running_var")))

    @cached_property
    def untrained(self) -> frozenset[str]:
        """Entries that no optimiser trains: running statistics, other floating buffers, frozen and unused parameters."""
        return frozenset((*self.statistics, *(self.graph.training.fixed if self.graph is not None else ())))

    @cached_property
    def num_parameters(self) -> int:
        """Trainable parameters."""
        return sum(p.size for p in self.parameters if p.name not in self.untrained)

    def _output_shape(self) -> tuple[int, ...]:
        if self.graph is not None:
            return tuple(value_shapes(self.graph)[self.graph.output][1:])
        assert self.module is not None
        with torch.no_grad():
            answer = self.module(tracing.queries_for(self.module, 2, self.input_shape))
        return tuple(answer.shape[1:])

    @property
    def num_classes(self) -> int:
        """K: numbers in the last axis of an answer."""
        return self.output_shape[-1] if self.output_shape else 1

    def _aliases(self) -> dict[str, str]:
        return dict(self.graph.aliases) if self.graph is not None else _aliases(self.module)

    def _constants(self) -> dict[str, Tensor]:
        if self.graph is not None:
            return {c.name: c.value for c in self.graph.constants if c.kept}
        assert self.module is not None
        state = self.module.state_dict().items()
        return {key: t for key, t in state if not t.is_floating_point() and not key.endswith("num_batches_tracked")}

    def _handle(self) -> str:
        if self.graph is not None:
            return json.dumps(self.to_dict())
        return tracing.untraced.enter(self)

    # -- construction --------------------------------------------------------------------------------------------------

    @classmethod
    def from_layers(cls, layers: Sequence[Layer], input_shape: Sequence[int], name: str = "custom") -> Architecture:
        """An architecture from layer records. Raises WslfastError naming a layer that does not fit its input."""
        layers, shape = tuple(layers), _input_shape(input_shape)
        wrong = [describe(layer) for layer in layers if type(layer) not in RECORDS.values()]
        require(not wrong, f"layers: expected records of wslfast.kernels.layers, got {wrong[:3]}")
        try:
            for layer in layers:
                check_layer(layer)
            graph = graph_of(layers, shape)
        except ValueError as error:
            raise WslfastError(f"architecture {name!r}: {error}") from None
        return cls(name, shape, graph)

    @classmethod
    @on_the_cpu
    def from_module(
        cls, module: nn.Module, input_shape: Sequence[int], name: str | None = None, *, output: str | int | None = None
    ) -> Architecture:
        """An architecture from any module that maps ``[n, *input_shape]`` to ``[n, *out]``.

        The module is followed through one forward pass in evaluation mode and becomes a graph of operations, which is checked against
        it. Wrappers (DataParallel, torch.compile), parametrisations and pruning are taken off: the weights are those that they compute.
        A module that cannot be followed stays as it is and runs as it is, slower, which is said once. Its own weights are not kept.

        Args:
            module: in any mode, on any device, in any dtype; it is not changed.
            input_shape: of one query.
            name: default: the class's.
            output: which part of the answer counts, for a module that returns a tuple (a number) or a dict or dataclass (a name).

        Raises:
            WslfastError: for what is no function of weights and one query: random or changing in evaluation mode, or mixing queries.
        """
        require(isinstance(module, nn.Module), f"module: expected a torch.nn.Module, got {type(module).__name__}")
        shape = _input_shape(input_shape)
        template = tracing.prepared(module, name or type(module).__name__, shape, output)
        return cls._of_template(template, shape, name or type(tracing.innermost(template)).__name__)

    @classmethod
    def _of_template(cls, template: nn.Module, shape: tuple[int, ...], name: str) -> Architecture:
        require(any(t.is_floating_point() for t in template.state_dict().values()), f"architecture {name!r}: it has no parameters")
        answer = tracing.check_template(template, shape, name)
        part = f"got a {type(answer).__name__}; name a part of it with output= (--output)"
        kind = f"got {describe(answer)}" if isinstance(answer, Tensor) else part
        fits = isinstance(answer, Tensor) and answer.ndim >= 1 and len(answer) == 4 and answer.is_floating_point()
        require(fits, f"architecture {name!r}: expected floating outputs [n, ...] for [n, {', '.join(map(str, shape))}], {kind}")
        try:
            return cls(name, shape, tracing.trace(template, shape))
        except tracing.Untraceable as reason:
            return cls(name, shape, None, tracing.with_frozen_norms(template), str(reason))

    @classmethod
    def cnn(cls, channels_in: int = 1, activation: str = "relu", dropout: float = 0.0, num_classes: int = 10) -> Architecture:
        """The published 28x28 ``CNN``: 2,464 parameters for one input channel and ten classes."""
        return cls.from_layers(networks.cnn28(channels_in, (8, 6, 4), activation, dropout, num_classes), (channels_in, 28, 28), "cnn")

    @classmethod
    def cnn2(cls, channels_in: int = 1, activation: str = "relu", dropout: float = 0.0, num_classes: int = 10) -> Architecture:
        """The published 28x28 ``CNN2``: 3,047 parameters for one input channel and ten classes."""
        return cls.from_layers(networks.cnn28(channels_in, (6, 9, 6), activation, dropout, num_classes), (channels_in, 28, 28), "cnn2")

    @classmethod
    def cnn3(cls, channels_in: int = 3, activation: str = "relu", dropout: float = 0.0, num_classes: int = 10) -> Architecture:
        """The published 32x32 ``CNN3``: 10,853 parameters for three input channels and ten classes."""
        return cls.from_layers(networks.cnn3(channels_in, activation, dropout, num_classes), (channels_in, 32, 32), "cnn3")

    @classmethod
    def lenet5(cls, channels_in: int = 3, activation: str = "relu", dropout: float = 0.0, num_classes: int = 10) -> Architecture:
        """The published 32x32 ``LeNet5`` (activation before pooling): 62,006 parameters for three input channels and ten classes."""
        return cls.from_layers(networks.lenet5(channels_in, activation, dropout, num_classes), (channels_in, 32, 32), "lenet5")

    @classmethod
    def mlp(
        cls,
        i_dim: int = 14,
        h_dim: Sequence[int] = (30, 15),
        o_dim: int = 10,
        activation: str = "leakyrelu",
        dropout: float = 0.2,
        use_bias: bool = True,
    ) -> Architecture:
        """The published ``MLP`` on flat inputs: 1,075 parameters with the defaults."""
        return cls.from_layers(networks.mlp(i_dim, h_dim, o_dim, activation, dropout, use_bias), (i_dim,), "mlp")

    @classmethod
    def siren(
        cls, in_features: int = 2, hidden: Sequence[int] = (32, 32), out_features: int = 1, omega: float = 30.0, offset: float = 0.0
    ) -> Architecture:
        """An implicit neural representation with sine activations (Sitzmann et al. 2020): linear layers ``seq.{i}``, sin(omega x) between
        them, ``offset`` added to what comes out (0.5 in the zoos of DWSNets)."""
        return cls("siren", (in_features,), networks.siren(in_features, hidden, out_features, omega, offset))

    @classmethod
    def resnet18(cls, channels_in: int = 3, num_classes: int = 10, width: int = 64) -> Architecture:
        """ResNet-18 for 32x32 images (3x3 stem, no stem pooling), torchvision's key names: 11,173,962 parameters (He et al. 2016)."""
        return cls("resnet18", (channels_in, 32, 32), networks.resnet18(channels_in, num_classes, width))

    def with_classes_last(self, axis: int) -> Architecture:
        """The same network with an axis of its answer moved to the end, for criteria over classes. A module must be traceable."""
        behind = axis - len(self.output_shape) if axis >= 0 else axis
        if behind not in self._views:
            if torch.compiler.is_compiling():
                torch._dynamo.graph_break(msg=f"call with_classes_last({axis}) of the architecture once before it is compiled")
            remedy = "let its forward move the classes to the end"
            graph = present(self.graph, f"class_axis: architecture {self.name!r} cannot be traced; {remedy}")
            self._views[behind] = Architecture(self.name, self.input_shape, tracing.with_axis_last(graph, behind))
        return self._views[behind]

    # -- weights -------------------------------------------------------------------------------------------------------

    @on_the_cpu
    def initial_weights(self, initialisations: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Fresh weights ``[k, P]`` of k models, each from its own initialisation and seed (the zoo code calls it ``init_type``).

        ``uniform`` is U[0, 1] and ``normal`` N(0, 1), as published. ``default`` is torch's own initialisation of each layer, biases
        included. ``siren`` is that of sine networks (Sitzmann et al. 2020), and ``default`` where there is no sine. Norms start as the
        identity. A model's row depends on nothing but its own initialisation and seed.

        Raises WslfastError for an unknown name, for another number of seeds than names, and for a module that cannot be traced.
        """
        graph = present(self.graph, f"initial_weights: architecture {self.name!r} cannot be traced; initialise its module instead")
        return initial_weights(graph, initialisations, seeds)

    # -- JSON ----------------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form for a zoo's manifest; a module that cannot be traced keeps names and shapes only."""
        record: dict[str, Any] = {"name": self.name, "input_shape": list(self.input_shape), "version": VERSION}
        if self.graph is not None:
            return record | {"graph": self.graph.to_dict()}
        record |= {"parameters": [[p.name, list(p.shape)] for p in self.parameters], "untraceable": self.reason}
        return record if (part := tracing.output_of(self.module)) is None else record | {"output": part}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Architecture:
        """The architecture of a record that :meth:`to_dict` made, in this version or in the one before. No code is run, and nothing large
        is allocated.

        The code of a module that cannot be traced is in no record: what is returned is the architecture of that module which this process
        holds already.

        Raises WslfastError for anything that is no such record, and for a module that this process does not hold.
        """
        require(isinstance(record, Mapping), f"architecture: expected an object, got {type(record).__name__}")
        shape = record.get("input_shape")
        sizes = isinstance(shape, (list, tuple)) and 1 <= len(shape) <= 8 and all(type(s) is int and 0 < s < 1 << 20 for s in shape)
        require(sizes, f"architecture: input_shape is a list of positive integers, got {shape!r:.60}")
        assert isinstance(shape, (list, tuple))
        name = str(record.get("name", "custom"))
        version = record.get("version", 1)
        require(version in (1, VERSION), f"architecture {name!r}: written by a newer version of wslfast (form {version!r:.20})")
        try:
            if isinstance(record.get("graph"), Mapping):
                graph = check_graph(Graph.from_dict(record["graph"]))
                require(graph.input_shape == tuple(shape), f"architecture {name!r}: its graph has another input shape")
                for each in filter(None, (graph, graph.training.graph)):
                    check_values(each)  # every operation fits what it reads
                return cls(name, tuple(shape), graph)
            if isinstance(record.get("layers"), list):
                return cls.from_layers([layer_from_dict(r) for r in record["layers"]], shape, name)
        except WslfastError:
            raise
        except ValueError as error:
            raise WslfastError(f"architecture {name!r}: {error}") from None
        recipe = record.get("recipe")
        if isinstance(recipe, (list, tuple)) and len(recipe) == 2 and recipe[0] == "resnet18" and isinstance(recipe[1], dict):
            require(
                set(recipe[1]) <= {"channels_in", "num_classes", "width"}
                and all(type(v) is int and 0 < v <= 256 for v in recipe[1].values()),  # a manifest must not allocate at will
                f"architecture {name!r}: expected resnet18 arguments up to 256, got {recipe[1]!r}",
            )
            return cls.resnet18(**recipe[1])
        own = tracing.untraced.of_record(record)
        why = f"cannot be traced ({record.get('untraceable')}), so no file holds it"
        remedy = "name its code again with --network FILE.py:NAME; in Python keep Architecture.from_module of it, or pass architecture="
        return present(own, f"architecture {name!r} {why if 'untraceable' in record else 'has no graph'}; {remedy}")


def from_handle(handle: str) -> Architecture:
    """The architecture behind a ``handle``: a graph anywhere, a module while somebody holds it in this process."""
    kept = tracing.untraced.held(handle)
    return kept if kept is not None else _of_json(handle)


@lru_cache(maxsize=64)
@with_numbers
def _of_json(handle: str) -> Architecture:
    require(handle.startswith("{"), f"architecture {handle!r}: a module has to be kept as long as what was compiled with it")
    return Architecture.from_dict(json.loads(handle))


def _input_shape(value: Sequence[int]) -> tuple[int, ...]:
    sizes = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else ()
    whole = all(isinstance(s, int) and not isinstance(s, bool) and s > 0 for s in sizes)
    require(whole and 1 <= len(sizes) <= 8, f"input_shape: expected (C, H, W), (features,) or other positive integers, got {value!r:.80}")
    return tuple(int(s) for s in sizes)


def _aliases(module: nn.Module | None) -> dict[str, str]:
    assert module is not None
    first: dict[int, str] = {}
    names = {key: first.setdefault(id(tensor), key) for key, tensor in module.state_dict(keep_vars=True).items()}
    return {key: name for key, name in names.items() if key != name}


def _slots(module: nn.Module | None) -> tuple[Slot, ...]:
    assert module is not None
    aliases = _aliases(module)
    state = module.state_dict().items()
    return slots_of({key: tuple(t.shape) for key, t in state if t.is_floating_point() and key not in aliases})
