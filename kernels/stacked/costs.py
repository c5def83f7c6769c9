"""How many models run in a group, how many queries in a slab, and how many models are worth a thread: what a graph costs.

The first two depend on the graph, the number of queries and the width of vectors alone, never on how many models or threads there are:
else a model's bits would depend on its company. The third decides who computes a group, not what comes out.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

from ..cpu.activations import BY_TWO_FORMULAS, WHOLE
from ..cpu.products import LANES, vector
from ..graph import Graph
from ..operations import TABLE
from ..reference import value_shapes

_VIEWS = frozenset({"axes", "getitem", "identity"})  # forms that read a tensor's numbers where they are
_MOVED = frozenset({"permute"})  # operations of other forms that do
_MODELS = 256  # of a group: more leave the caches, fewer spend their time on calls
_PAIRS = 16_384  # of models and queries in a group and slab, for the same reasons
_CONVOLVED = 8  # models of a group whose time goes into convolutions (cpu/engine.py has the reasons)
_CONVOLVED_SHORT = 2  # with vectors of eight numbers: oneDNN's 3 x 3 convolutions of eight channels take 1.4 to 1.5 times as long in groups
# of eight, where a pixel of one model is half a line of the cache
_MOST_CONVOLVED = 64  # where activations are so few that calls, not numbers, take the time:
_CACHED = 20 << 20  # their bytes, of such a group's forward pass
_SOME = 16  # models of a group that are enough for its calls to be worth their while
_QUERIES = 128  # of a slab
_FEWEST = 32  # of a slab, where there are as many: with fewer, reading weights takes as long as using them
_WORK = 40_000_000  # operations a call of the graph in a group's products: smaller groups then cost nothing, keep weights in the cache
# and share threads
_BYTES = 64 << 20  # of what a group's forward pass leaves for its backward
_ROWS = 64 << 20  # of a group's weights
FILL = 16  # queries: every model's numbers then begin on 64 bytes
_NUMBER, _OPERATION, _CALL = 1.2e-9, 1.2e-11, 30e-6  # seconds of a core: for a number that is made, an operation in a product, a call
_WORTH = 5  # times as much in its numbers as in its calls, which hold Python's lock: from there on a group is worth a thread of its own
_SHARED = 350_000_000  # operations of a call, with little else than products: below, MKL shares them out sooner than groups begin
LEAST_SHARED = 20_000_000  # operations of a call: below, its products are done before MKL's threads are awake
_LITTLE = 0.6  # of the products' time


@lru_cache(maxsize=256)
def sizes(graph: Graph) -> tuple[int, int, int]:
    """Counts for one model and one query: numbers that a forward pass makes, multiply-adds in convolutions, multiply-adds elsewhere."""
    two, three = value_shapes(graph, 2), value_shapes(graph, 3)
    made = convolved = products = 0
    for i, node in enumerate(graph.nodes):
        numbers = _size(three[f"@{i}"]) - _size(two[f"@{i}"])
        form = TABLE[node.operation].form
        folded = form == "batch_norm" and not node.argument("training")  # into the layer beside it
        if not folded and form not in _VIEWS and node.operation not in _MOVED:
            made += numbers
        if form == "attention":  # scores, and shares of them
            query, key = (str(node.argument(name)) for name in ("query", "key"))
            made += 2 * (_size(three[query][:-1]) * three[key][-2] - _size(two[query][:-1]) * two[key][-2])
        if form in ("convolution", "transposed", "linear"):
            weight = str(node.argument("weight"))
            work = numbers * math.prod(three[weight][1:]) if weight in three else 0
            convolved += work if form != "linear" else 0
            products += work if form == "linear" else 0
    return max(made, 1), convolved, products


def _size(shape: Any) -> int:
    """Numbers of a tensor, or of the first of several."""
    return math.prod(shape[0] if isinstance(shape, list) else shape)


def group_shape(graph: Graph, n: int) -> tuple[int, int]:
    """Models in a group and queries in a slab, for n queries. They do not depend on k: else a model's bits would depend on its company."""
    made, convolved, products = sizes(graph)
    queries = min(_QUERIES, -(-n // FILL) * FILL)
    models = min(_MODELS, 1 << (_PAIRS // queries).bit_length() - 1)
    if convolved > products:
        models = _CONVOLVED if vector() == LANES else _CONVOLVED_SHORT
        while models < _MOST_CONVOLVED and 8 * models * made * queries <= _CACHED:
            models *= 2
    else:
        while models > 2 and operations(graph, models // 2, queries) >= _WORK * len(graph.nodes):
            models //= 2
    while models > 1 and 4 * models * graph.parameters > _ROWS:
        models //= 2
    while models > _SOME and 4 * models * made * queries > _BYTES:  # rather than queries: a few models then take fewer slabs
        models //= 2
    few = min(queries, _FEWEST)
    while models > 2 and 4 * models * made * few > _BYTES:
        models //= 2
    while queries > few and 4 * models * made * queries > _BYTES:
        queries = max(few, queries // 2 // FILL * FILL)
    return models, queries


@lru_cache(maxsize=256)
def whole_models(graph: Graph, queries: tuple[int, ...], itemsize: int) -> int:
    """Of how many models a group has to be a multiple, for slabs of so many queries each: then no model lies among the last numbers of a
    tensor, which torch computes by another formula than the others. A power of two; of numbers of ``itemsize`` bytes."""
    two, three = value_shapes(graph, 2), value_shapes(graph, 3)
    counts: set[int] = set()  # numbers of one model
    for i, node in enumerate(graph.nodes):
        reference, form = f"@{i}", TABLE[node.operation].form
        if form in ("recurrent", "cell"):  # sigmoids of a step's gates
            last = two[reference][-1] if isinstance(two[reference], list) else two[reference]
            counts.update(q * last[-1] for q in queries)
        elif node.operation in BY_TWO_FORMULAS:
            alike = two[reference] == three[reference]  # of weights alone
            counts.update(_size(value_shapes(graph, 2 if alike else q)[reference]) for q in queries)
    at_once = WHOLE // itemsize
    return max((at_once // math.gcd(at_once, count) for count in counts), default=1)


def operations(graph: Graph, models: int, queries: int) -> int:
    """Floating-point operations in products and convolutions, of a loss and its gradients with respect to both factors."""
    _, convolved, products = sizes(graph)
    return 6 * models * queries * (convolved + products)


@lru_cache(maxsize=256)
def least_worth(graph: Graph, n: int) -> int:
    """Models of the smallest group that is worth a thread of its own, for n queries.

    It computes for several times as long as its calls hold Python's lock, in which other threads wait. Of a small call that is nothing but
    matrix products, none is: MKL shares those out by itself (``Call.shares_products``).
    """
    numbers, products = n * sizes(graph)[0] * _NUMBER, operations(graph, 1, n) * _OPERATION
    worth = _WORTH * _CALL * len(graph.nodes) / (numbers + products)
    few = _SHARED / max(1, operations(graph, 1, n)) / 2 if numbers < _LITTLE * products and sizes(graph)[1] == 0 else 0
    return max(2, min(_MODELS, math.ceil(max(worth, few))))
