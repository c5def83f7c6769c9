"""Weight matching of Git Re-Basin (Ainsworth et al. 2023), as every published package has it: the same assignments from the same draws.

It takes the published steps in the published order and keeps what did not change since it was computed: a product of two layers while
the permutations next to it stand still, an assignment while its matrix does. Products are torch's own on the same operands, so that
permutations and random draws agree with the published function's to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import WslfastError, describe, require
from .permutations import get_permuted_param

State = Mapping[str, Tensor]
Permutation = dict[str, Tensor]


def solver() -> Callable[..., Any]:
    """scipy's solver of the assignment problem. Raises WslfastError where scipy is missing."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise WslfastError("weight matching needs scipy: pip install scipy") from None
    return linear_sum_assignment  # type: ignore[no-any-return]


class _Term(NamedTuple):
    """How one tensor enters the gain of one permutation: as a matrix ``[n, rest]``, its other axes permuted.

    Attributes:
        shape: ``(n, block, *other axes)``; an axis with a block of several numbers per channel keeps the block beside it.
        turned: a matrix whose columns are matched. It is multiplied transposed, as published: a product's last bits depend on how
            operands lie in memory.
        moves: ``(axis, permutation, repeated)`` of what permutes other axes.
    """

    name: str
    axis: int
    shape: tuple[int, ...]
    turned: bool
    moves: tuple[tuple[int, str, bool], ...]

    def of(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """The tensor with its axes in the order that is multiplied, nothing permuted."""
        w = arrays[self.name]
        if self.turned:
            return w
        return w.reshape(self.shape) if self.axis == 0 else np.moveaxis(w, self.axis, 0).reshape(self.shape)

    def permuted(self, w: np.ndarray, places: Mapping[str, np.ndarray]) -> Tensor:
        """``[n, rest]`` of what :meth:`of` gave; numpy gathers small arrays in a fourth of the time that torch takes."""
        for axis, q, repeated in self.moves:
            which = places[q]
            if repeated:
                width = w.shape[axis] // len(which)
                which = (which[:, None] * width + np.arange(width)).ravel()
            w = w.take(which, axis)
        return torch.from_numpy(w).t() if self.turned else torch.from_numpy(w.reshape(self.shape[0], -1))


class _Plan:
    """What matching needs to know of a spec and its shapes: sizes and terms by permutation, and which products each one moves."""

    def __init__(self, spec: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.spec, self.shapes = spec, dict(shapes)
        self.sizes = {p: shapes[axes[0][0]][axes[0][1]] for p, axes in spec.perm_to_axes.items()}
        self.terms: dict[str, list[_Term]] = {}
        self.readers: dict[str, list[tuple[str, int]]] = {p: [] for p in self.sizes}
        for p, places in spec.perm_to_axes.items():
            n = self.sizes[p]
            self.terms[p] = []
            for i, (name, axis) in enumerate(places):
                shape, per = shapes[name], spec.axes_to_perm[name]
                other = [j for j in range(len(shape)) if j != axis]
                turned = len(shape) == 2 and axis == 1 and shape[1] == n
                moves = []
                for position, j in enumerate(other):
                    q = per[j] if j < len(per) else None
                    if q is not None:
                        fits = shape[j] % self.sizes[q] == 0
                        require(fits, f"axis {j} of {name!r} {list(shape)} does not divide into {self.sizes[q]} blocks ({q})")
                        moves.append((0 if turned else 2 + position, q, shape[j] != self.sizes[q]))
                        self.readers[q].append((p, i))
                require(shape[axis] % n == 0, f"axis {axis} of {name!r} {list(shape)} does not divide into {n} blocks ({p})")
                laid = (n, shape[axis] // n, *(shape[j] for j in other))
                self.terms[p].append(_Term(name, axis, laid, turned, tuple(moves)))
        self.tensors = tuple(dict.fromkeys(term.name for terms in self.terms.values() for term in terms))
        self.rows = {p: np.arange(0, n * n, n) for p, n in self.sizes.items()}


class _Side:
    """The matrices of one state dict, by permutation and in the spec's order."""

    def __init__(self, plan: _Plan, params: State) -> None:
        arrays = {name: np.ascontiguousarray(params[name].detach().numpy()) for name in plan.tensors}
        self.matrices = {p: [term.of(arrays) for term in terms] for p, terms in plan.terms.items()}


class _Reference(_Side):
    """The model that others are matched to. Its numbers are copied, so that a later call knows it by them."""

    def __init__(self, plan: _Plan, params: State) -> None:
        self.plan = plan
        self.copy = {name: params[name].detach().clone() for name in plan.tensors}
        super().__init__(plan, self.copy)
        self.laid = {
            p: [term._replace(moves=()).permuted(w, {}) for term, w in zip(plan.terms[p], matrices)]
            for p, matrices in self.matrices.items()
        }

    def is_of(self, spec: Any, params: State) -> bool:
        """Whether these are the numbers, and the spec, that it was made of."""
        if self.plan.spec is not spec:
            return False
        return all(name in params and torch.equal(value, params[name]) for name, value in self.copy.items())


_last: list[_Reference] = []  # a zoo is matched to one model


def _reference(spec: Any, params: State, keep: bool) -> _Reference:
    last = next(iter(_last), None)  # looked at once: another thread may put its own there at any time
    if last is not None and last.is_of(spec, params):
        return last
    shapes = {name: tuple(params[name].shape) for axes in spec.perm_to_axes.values() for name, _ in axes}
    same = last is not None and last.plan.spec is spec and last.plan.shapes == shapes
    made = _Reference(last.plan if last is not None and same else _Plan(spec, shapes), params)
    if keep:
        _last[:] = [made]
    return made


@torch.no_grad()
def weight_matching(
    ps: Any, params_a: State, params_b: State, max_iter: int = 100, init_perm: Permutation | None = None, *, original: Any = None
) -> Permutation:
    """Permutations of ``params_b`` that bring its weights near ``params_a``: coordinate descent, one assignment problem a permutation.

    Args:
        ps: a permutation spec: ``perm_to_axes`` and ``axes_to_perm``.
        params_a, params_b: state dicts of one network.
        max_iter: sweeps over all permutations at most.
        init_perm: where to begin, filled in place; by default nothing is moved.
        original: what serves tensors that this function does not (on a GPU, of other dtypes than float32); None raises.

    Returns:
        ``{permutation: float indices [n]}``, as published.

    Raises:
        WslfastError: state dicts that the spec does not fit, tensors that are not float32 on the CPU, an ``init_perm`` that is none, or
            scipy is missing.
    """
    assign = solver()
    try:
        _check(ps, params_a, params_b)
        a = _reference(ps, params_a, keep=params_a is not params_b)
        b = _Side(a.plan, params_b)
    except (KeyError, IndexError, AttributeError, RuntimeError, WslfastError) as error:
        if original is not None:
            return original(ps, params_a, params_b, max_iter, init_perm)  # type: ignore[no-any-return]
        raise WslfastError(f"weight_matching: the spec does not fit the state dicts: {error}") from None
    plan = a.plan
    whole = {p: torch.arange(n) for p, n in plan.sizes.items()}
    perm: Permutation = dict(whole) if init_perm is None else init_perm
    wrong = sorted(p for p in whole | perm if p not in perm or p not in whole or not torch.equal(perm[p].long().sort().values, whole[p]))
    require(not wrong, lambda: f"init_perm: expected a permutation of each size in {plan.sizes}, not so for {wrong}")
    names = list(perm)
    places = {p: value.long().numpy() for p, value in perm.items()}
    gains = {p: np.empty((n, n), np.float32) for p, n in plan.sizes.items()}
    products: dict[str, list[Any]] = {p: [None] * len(plan.terms[p]) for p in names}
    waiting = set(names)  # whose matrix is not the one that the assignment in force was made of
    for _ in range(max_iter):
        progress = False
        for place in torch.randperm(len(names)).tolist():
            p = names[place]
            if p not in waiting:
                continue
            waiting.discard(p)
            gain, mine = gains[p], products[p]
            gain.fill(0)
            for i, product in enumerate(mine):
                if product is None:
                    moved = plan.terms[p][i].permuted(b.matrices[p][i], places)
                    mine[i] = product = torch.mm(a.laid[p][i], moved.t()).numpy()
                gain += product
            after, before = assign(gain, maximize=True)[1], places[p]
            if (after != before).any():
                places[p] = after
                if not progress:
                    new, old = (torch.from_numpy(gain.take(plan.rows[p] + which)).sum() for which in (after, before))
                    progress = bool(new > old + 1e-12)
                for q, i in plan.readers[p]:
                    products[q][i] = None
                    waiting.add(q)
        if not progress:
            break
    perm.update({p: torch.from_numpy(places[p]).float() for p in names})
    return perm


def _check(spec: Any, params_a: State, params_b: State) -> None:
    for name in dict.fromkeys(name for axes in spec.perm_to_axes.values() for name, _ in axes):
        value, other = params_a[name], params_b[name]
        same = value.dtype == other.dtype == torch.float32 and value.shape == other.shape
        if not same or value.device.type != "cpu" or other.device.type != "cpu":
            raise WslfastError(f"{name!r}: expected float32 tensors of one shape on the CPU, got {describe(value)} and {describe(other)}")


def objective(ps: Any, params_a: State, params_b: State, perm: Mapping[str, Tensor]) -> float:
    """The inner product of ``params_a`` with the permuted ``params_b``, over all tensors of the spec, in float64: what matching raises."""
    total = 0.0
    for name in ps.axes_to_perm:
        if name in params_a and params_a[name].is_floating_point():
            total += float((params_a[name].double() * get_permuted_param(ps, perm, name, params_b).double()).sum())
    return total
