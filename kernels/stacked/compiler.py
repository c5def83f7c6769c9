"""A graph made ready to run stacked: where the models of each value are, what is computed once for all, what is freed when.

Two rewrites on the way: a batch norm behind a convolution or a linear layer is folded into its weights, through which the gradient
flows; and a value that is needed in another layout is moved once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

from torch import Tensor

from ..dtypes import DTYPES
from ..graph import INFINITE, QUERY, Graph, Node, is_size, references
from ..layers import Conv2d
from ..operations import AXES, TABLE, Operation
from .calls import Call, Layout, Values, spatial
from .folds import Factor, FoldedBias, FoldedWeight
from .forms import FORMS
from .layouts import channels_first, models_first, repeated
from .program import Program, Step, freeing
from .recurrent import recurrent
from .rows import Rows, rows_of
from .rule_table import rule_of
from .rules import FUNCTIONS, TO_CHANNELS, TO_MODELS
from .segments import Segment, segments
from .settling import NORMS, Settling
from .through import Through, shared_input, through
from .training_forms import normalised

_IN_PLACE = {
    name: lambda call, a, models, run=entry.in_place: run(a["self"], a) for name, entry in FUNCTIONS.items() if entry.in_place is not None
}
_FRESH = ("convolution", "transposed", "linear", "group_norm", "instance_norm")
_SUMS = ("add.Tensor", "sub.Tensor")  # as these do, they make a new tensor that their backward does not look at
_PARAMETERS = ("weight", "bias", "running_mean", "running_var")  # which have their models in front, also where they are computed
_WIDE = 128  # numbers that a linear layer reads: with more, a fold is more than its outputs are
_FOLDABLE = {"conv1d", "conv2d", "conv3d", "conv1d.padding", "conv2d.padding", "conv3d.padding", "linear"}


@lru_cache(maxsize=256)
def compile_program(graph: Graph, own: bool, aligned: bool, segmented: bool = False) -> Program:
    """The program of a graph; ``aligned``: see :class:`Call`; ``segmented``: runs of layers go to the CPU wing's steps, and
    what is differentiated is so once."""
    return _Compiler(graph, own, aligned, segmented).program()


class _Compiler(Settling):
    def __init__(self, graph: Graph, own: bool, aligned: bool, segmented: bool) -> None:
        super().__init__(graph, own)
        self.aligned, self.segmented = aligned, segmented
        self.place: dict[str, int] = {QUERY: 0}
        self.moved: dict[tuple[str, Layout], int] = {}
        self.size = 1
        for slot in graph.slots:
            self._new(f"@w:{slot.name}", Layout.MODELS)
        for constant in graph.constants:
            self._new(f"@c:{constant.name}", Layout.SHARED)
        self.segments = segments(graph, self.shapes, self.users) if segmented else []
        self.ends = {segment.nodes[-1]: segment for segment in self.segments}
        self.within = {i for segment in self.segments for i in segment.nodes}
        self.folded = self._folded()
        self.of_weights = {f"@w:{slot.name}" for slot in graph.slots}
        self.steps: list[Step] = []
        self.made: list[Step] = []
        self.shared: list[Step] = []
        self.given: list[tuple[str, int, Layout]] = []

    def _new(self, reference: str, layout: Layout) -> int:
        self.place[reference], self.layout[reference] = self.size, layout
        self.size += 1
        return self.place[reference]

    def program(self) -> Program:
        for i, node in enumerate(self.graph.nodes):
            if i in self.ends:
                self._segment(self.ends[i])
            if i in self.within or i in self.folded.values():
                continue  # run with another: the last layer of its segment, or the norm that is folded into it
            if i in self.folded:
                self._fold(i, node, self.graph.nodes[self.folded[i]])
            else:
                self._add(i, node)
        output = self._in(self.graph.output, Layout.MODELS)
        slots = tuple(self.place[f"@w:{s.name}"] for s in self.graph.slots)
        constants = tuple((self.place[f"@c:{c.name}"], c.value) for c in self.graph.constants)
        steps = freeing(self.steps, {output})
        ready = set(slots) | {step.out for step in self.made}
        carried = tuple(sorted({i for step in steps for i in step.reads()} & ready | ({output} & ready)))
        parts = tuple(self.shared), tuple(self.made), steps
        return Program(self.graph, self.own, *parts, slots, carried, constants, 0, output, self.size, tuple(self.given))

    # -- nodes ---------------------------------------------------------------------------------------------------------

    def _add(self, i: int, node: Node) -> None:
        operation, name = TABLE[node.operation], f"@{i}"
        if operation.form == "identity" and node.argument("train"):
            self._dropout(i, node)
            return
        wanted, layout = self.settle(node, operation, name)
        if operation.form == "batch_norm" and node.argument("training"):
            step = self._emit(name, node, operation, wanted, layout, partial(normalised, node))
            step.tensors.append(("statistics", self._given("@statistics", Layout.SHARED, 0)))
            step.rule = None
            return
        if operation.form == "attention" and node.argument("dropout_p"):
            step = self._emit(name, node, operation, wanted, layout, FORMS["attention"])
            step.tensors.append(("dropped", self._given(f"@factor:{i}", Layout.MODELS, self.rank[name])))
            step.rule = None
            return
        form = _IN_PLACE[node.operation] if self._owns_its_input(node) else FORMS[operation.form]
        chosen = [node.argument(axis, operation.parameters[axis].default) for axis in AXES & set(operation.parameters)]
        if operation.form == "axes" and any(axes in (None, ()) for axes in chosen):
            form = FORMS["vmap"]  # without axes it would be of all numbers, those of other models included
        if operation.form == "recurrent":
            form = partial(recurrent, once=self.segmented)
        self._emit(name, node, operation, wanted, layout, form)

    def _dropout(self, i: int, node: Node) -> None:
        """A product with numbers that are given, and where the dropout keeps mean and variance a sum as well."""
        x = str(node.argument("input"))
        layout = Layout.MODELS if self.layout[x] is Layout.SHARED else self.layout[x]
        calls = [("factor", "mul.Tensor"), *([("shift", "add.Tensor")] if "alpha" in node.operation else [])]
        for part, operation in calls:
            made = f"@{i}" if part == calls[-1][0] else f"@{i}:{part}"
            self._given(f"@{part}:{i}", layout, self.rank[x])
            self.rank[made] = self.rank[x]
            call = Node(operation, (("self", x), ("other", f"@{part}:{i}")))
            self._emit(made, call, TABLE[operation], layout, layout, FORMS["elementwise"])
            x = made

    def _given(self, reference: str, layout: Layout, rank: int) -> int:
        """Place of a value that the caller adds to the prepared values."""
        if reference not in self.place:
            self.given.append((reference, self._new(reference, layout), layout))
            self.rank[reference] = rank
        return self.place[reference]

    def _owns_its_input(self, node: Node) -> bool:
        """Whether an activation may overwrite its input: no other node reads it, nor does the backward of the layer that made it."""
        if node.operation not in _IN_PLACE or not self.aligned:
            return False
        below = str(node.argument("self"))
        if not below[1:].isdigit() or len(self.users[below]) > 1 or self.layout[below] is Layout.SHARED or below == self.graph.output:
            return False
        made = self.graph.nodes[int(below[1:])]
        if int(below[1:]) in self.within:
            return False
        fresh = TABLE[made.operation].form in _FRESH or made.operation in _SUMS
        fresh = fresh or bool(made.argument("training"))  # a batch norm by its batch, whose backward looks at what it read
        return fresh or int(below[1:]) in self.folded

    def _emit(self, name: str, node: Node, operation: Operation, wanted: Layout, layout: Layout, form: Callable[..., Any]) -> Step:
        """A step for the node, its stacked tensors in the layout ``wanted``."""
        known: Values = {}
        tensors: list[tuple[str, int]] = []
        lists: list[tuple[str, list[int | None]]] = []
        sizes: list[tuple[str, int | None, str]] = []
        layouts: dict[str, Any] = {}
        ranks: dict[str, Any] = {}
        parameters = _PARAMETERS if operation.form in (*NORMS, "convolution", "transposed") else ()
        for key, value in node.arguments:
            if isinstance(value, str) and value.startswith("@"):
                if is_size(value):
                    sizes.append((key, None, value))
                    continue
                if value in INFINITE:
                    known[key] = INFINITE[value]
                    continue
                at, where = self._wanted(value, Layout.MODELS if key in parameters else wanted)
                tensors.append((key, at))
                layouts[key], ranks[key] = where, self.rank[value]
            elif isinstance(value, tuple) and any(references(value)):
                places = [None if r is None else self._wanted(r, wanted) for r in value]
                lists.append((key, [None if p is None else p[0] for p in places]))
                layouts[key] = tuple(Layout.SHARED if p is None else p[1] for p in places)
                ranks[key] = tuple(0 if r is None else self.rank[r] for r in value)
            elif isinstance(value, tuple):
                known[key] = list(value)
                sizes += [(key, j, item) for j, item in enumerate(value) if is_size(item)]
            else:
                known[key] = value
        defaults = {
            p: list(v.default) if isinstance(v.default, tuple) else v.default for p, v in operation.parameters.items() if v.optional
        }
        known = {**defaults, **known}
        if known.get("dtype") is not None:
            known["dtype"] = DTYPES[known["dtype"]]
        call = Call(operation, layouts, ranks, _rank(self.rank[name]), layout, self.aligned)
        alone = layout is Layout.SHARED
        run = (lambda a, models: operation.invoke(a)) if alone else (lambda a, models: form(call, a, models))
        several = not isinstance(self.rank[name], int)
        owned = form in _IN_PLACE.values()
        ruled = not alone and self.complex.isdisjoint((name, *node.references()))  # rules know nothing of conjugates
        rule = partial(rule_of, call, known, owned=owned, several=several, sized=bool(sizes)) if ruled else None
        flat = name in self.discrete or operation.name == "detach"
        step = Step(run, known, tensors, lists, sizes, self._new(name, layout), several, rule, flat=flat)
        if (
            node.references()
            and self.of_weights.issuperset(r for r in node.references() if not r.startswith("@c:"))
            and not sizes
            and not alone
        ):
            self.of_weights.add(name)
            self.made.append(step)
        else:
            (self.shared if alone else self.steps).append(step)
        return step

    def _wanted(self, reference: str, wanted: Layout) -> tuple[int, Layout]:
        """Place and layout of a value; a stacked one is moved to the layout ``wanted``."""
        layout = self.layout[reference]
        if layout in (Layout.SHARED, wanted):
            return self.place[reference], layout
        return self._in(reference, wanted), wanted

    def _in(self, reference: str, layout: Layout) -> int:
        """Place of a value in a layout; a step that moves it is added the first time."""
        if self.layout[reference] is layout:
            return self.place[reference]
        if (reference, layout) not in self.moved:
            move: Callable[[Values, int], Any]
            rule = None
            if self.layout[reference] is Layout.SHARED:
                move = _spread if layout is Layout.MODELS else _repeat
            elif layout is Layout.MODELS:
                move, rule = _to_models, (lambda wanted: TO_MODELS)
            else:
                move, rule = partial(_to_channels, self.aligned), (lambda wanted: TO_CHANNELS)
            steps = self.made if reference in self.of_weights else self.steps  # what is made of weights alone may read it
            steps.append(Step(move, {}, [("x", self.place[reference])], [], [], self.size, rule=rule))
            self.moved[reference, layout] = self.size
            self.size += 1
        return self.moved[reference, layout]

    # -- norms that are folded into the layer before them ----------------------------------------------------------------

    def _folded(self) -> dict[int, int]:
        """Batch norms by node, with the layer that each is folded into. (A factor is not: before a sine its rounding would show.)"""
        pairs = {}
        for i, node in enumerate(self.graph.nodes):
            below = str(node.argument("input"))
            own = node.operation == "batch_norm" and not node.argument("training") and i not in self.within
            own = own and all(str(node.argument(key)).startswith("@w:") for key in ("running_mean", "running_var"))
            own = own and _parameters_or_nothing(node, "weight", "bias")
            if not own or not below[1:].isdigit() or self.users[below] != [i] or below == self.graph.output:
                continue
            layer = self.graph.nodes[int(below[1:])]
            if layer.operation not in _FOLDABLE or layer.argument("weight") is None or not _parameters_or_nothing(layer, "weight", "bias"):
                continue
            if self.rank[below] == (2 if layer.operation == "linear" else spatial(TABLE[layer.operation]) + 2):
                pairs[i] = int(below[1:])
        return pairs

    def _fold(self, i: int, norm: Node, layer: Node) -> None:
        """Steps that make weights and biases of a layer with the batch norm behind it, and one for that layer. Of a wide linear layer the
        outputs take the factor, which are fewer than its weights."""
        given = dict(layer.arguments)
        numbers = {f"norm_{key}": r for key, r in norm.arguments if isinstance(r, str) and r.startswith("@w:")}
        eps = float(norm.argument("eps", 1e-5))
        rank = self.rank[str(given["weight"])]
        wide = layer.operation == "linear" and self.shapes[str(layer.argument("input"))][-1] >= _WIDE
        of_weight = ("factor", Factor(eps), 1) if wide else ("weight", FoldedWeight(eps), rank)
        made: dict[str, str] = {}
        for key, rule, axes in (of_weight, ("bias", FoldedBias(eps), 1)):
            read = {name: r for name, r in numbers.items() if key == "bias" or name in ("norm_running_var", "norm_weight")}
            read |= {key: given[key]} if given.get(key) is not None else {}
            made[key] = reference = f"@made:{key} of {i}"
            self.rank[reference] = axes
            tensors = [(name, self.place[r]) for name, r in read.items()]
            run = lambda a, models, rule=rule: rule.forward(a, models)[0]  # noqa: E731
            out = self._new(reference, Layout.MODELS)
            self.made.append(Step(run, {}, tensors, [], [], out, rule=lambda wanted, rule=rule: rule))  # type: ignore[misc]
        nodes = [(f"@{i}", Node(layer.operation, tuple({**given, **made}.items())))]
        if wide:
            parts = f"@{i}:product", f"@{i}:scaled"
            self.rank |= dict.fromkeys(parts, self.rank[f"@{i}"])
            nodes = [
                (parts[0], Node("linear", tuple((key, value) for key, value in layer.arguments if key != "bias"))),
                (parts[1], Node("mul.Tensor", (("self", parts[0]), ("other", made["factor"])))),
                (f"@{i}", Node("add.Tensor", (("self", parts[1]), ("other", made["bias"])))),
            ]
        for name, node in nodes:
            operation = TABLE[node.operation]
            self._emit(name, node, operation, *self.settle(node, operation), FORMS[operation.form])

    # -- segments --------------------------------------------------------------------------------------------------------

    def _segment(self, segment: Segment) -> None:
        """One step for a run of layers, and one that makes its weights ready."""
        references = segment.references()
        rows = self.size
        self.size += 1
        make = lambda a, models: rows_of(segment, a)  # noqa: E731
        self.made.append(Step(make, {}, [(r, self.place[r]) for r in references], [], [], rows, rule=partial(Rows, segment)))
        first = segment.layers[0]
        shared = self.layout[segment.input] is Layout.SHARED and isinstance(first, Conv2d) and first.groups == 1
        if shared:
            x = self.size
            self.size += 1
            self.shared.append(Step(lambda a, models: shared_input(a["x"], segment), {}, [("x", self.place[segment.input])], [], [], x))
        else:
            x = self._in(segment.input, Layout.CHANNELS)
        out = self._new(f"@{segment.nodes[-1]}", Layout.MODELS if segment.flat else Layout.CHANNELS)
        run = lambda a, models: through(a["x"], a["rows"], segment, shared)  # noqa: E731
        self.steps.append(Step(run, {}, [("x", x), ("rows", rows)], [], [], out, rule=partial(Through, segment, shared)))


def _parameters_or_nothing(node: Node, *names: str) -> bool:
    return all(value is None or str(value).startswith("@w:") for value in map(node.argument, names))


def _to_models(a: Values, models: int) -> Tensor:
    return models_first(a["x"], models)


def _to_channels(last: bool, a: Values, models: int) -> Tensor:
    return channels_first(a["x"], last)


def _spread(a: Values, models: int) -> Tensor:
    x: Tensor = a["x"]
    return x.expand(models, *x.shape)


def _repeat(a: Values, models: int) -> Tensor:
    return repeated(a["x"], models)


def _rank(ranks: Any) -> int:
    return ranks if isinstance(ranks, int) else ranks[0]
