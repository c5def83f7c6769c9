"""Where structure and behavior pull a reconstruction, and how far the first-order picture of it holds (docs/analysis.md).

With d = reconstruction - original in weights ``[P]`` and J the Jacobian of all nK outputs, arXiv 2503.17138 writes the gradient of
the structural loss as d and that of the behavioral loss as ``d^T F``, ``F = 1/n sum_i J_orig(x_i)^T J_rec(x_i)``, ``[P, P]``. F is
never built where P > nK: its singular values and the eigenvalues of its symmetric part are those of matrices of the size of the
Gram side. For networks where even the Jacobians are too large, products with F come from ``jvp`` and ``vjp``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..architecture import Architecture
from ..errors import describe, require
from ..kernels import reference
from ..tracing.module import call_with

Product = Callable[[Tensor], Tensor]
EXACT = 1 << 27  # numbers of both Jacobians together that are held at once (1 GB in float64)
_QUERIES = 16  # images differentiated at a time


def model_function(architecture: Architecture) -> Callable[[Tensor, Tensor], Tensor]:
    """One model as a function ``(weights [P], queries [n, ...]) -> outputs [n, *out]`` that ``torch.func`` can transform."""
    graph = architecture.graph
    if graph is not None:
        return lambda weights, queries: reference.run_graph(weights, queries, graph)
    module = architecture.module
    assert module is not None

    def call(weights: Tensor, queries: Tensor) -> Tensor:
        parameters = {s.name: weights[s.offset : s.stop].view(s.shape) for s in architecture.parameters}
        return call_with(module, parameters, queries)

    return call


def jacobian(weights: Tensor, queries: Tensor, architecture: Architecture) -> Tensor:
    """Derivatives of all outputs of one model to its weights: ``weights [P]``, ``queries [n, ...] -> [m, P]``, in the weights' dtype; m is
    n times the numbers of one answer."""
    _check(weights, queries, architecture)
    single = model_function(architecture)
    one = torch.func.jacrev(lambda w, x: single(w, x.unsqueeze(0)).squeeze(0))
    if architecture.graph is None:  # its forward may look at numbers, which have no value inside vmap
        return torch.stack([one(weights, x) for x in queries.to(weights)]).flatten(0, -2)
    each = torch.func.vmap(one, in_dims=(None, 0))
    return torch.cat([each(weights, part) for part in queries.to(weights).split(_QUERIES)]).flatten(0, -2)


@dataclass(frozen=True, eq=False)
class Spectrum:
    """What F does to a weight error.

    Attributes:
        singular_values: of F, descending: all that can differ from zero if exact, the leading ones if sketched. ``[r]`` float64.
        eigenvalues: of its symmetric part (F + F^T) / 2, descending; negative ones are directions in which the first-order
            behavioral gradient points uphill of the error. Empty if sketched.
        asymmetry: ||F - F^T|| / (2 ||F||), Frobenius: 0 is symmetric, 1 antisymmetric, 0.71 neither.
        trace: sum of F's diagonal.
        frobenius: ||F||.
        exact: whether from whole Jacobians.
    """

    singular_values: Tensor
    eigenvalues: Tensor
    asymmetry: float
    trace: float
    frobenius: float
    exact: bool

    @property
    def effective_rank(self) -> float:
        """(sum s)^2 / sum s^2 of the singular values: how many directions share the effect."""
        s = self.singular_values
        return float(s.sum().square() / s.square().sum()) if len(s) and float(s[0]) > 0 else 0.0

    @property
    def negative_share(self) -> float:
        """Share of the eigenvalues' absolute sum that is negative; NaN if sketched."""
        e = self.eigenvalues
        return float(-e.clamp_max(0).sum() / e.abs().sum()) if len(e) else float("nan")


def spectrum(
    original: Tensor,
    reconstructed: Tensor,
    queries: Tensor,
    architecture: Architecture,
    *,
    rank: int = 32,
    probes: int = 32,
    method: str = "auto",
    seed: int = 0,
) -> Spectrum:
    """The spectrum of ``F = 1/n sum_i J_orig(x_i)^T J_rec(x_i)`` of one model and its reconstruction.

    Args:
        original, reconstructed: weights ``[P]``.
        queries: ``[n, *input_shape]``.
        rank: singular values to find by sketching.
        probes: random vectors that estimate trace, norm and asymmetry where F is sketched.
        method: ``"exact"``, ``"sketch"``, or ``"auto"``: exact while both Jacobians hold at most 2^27 numbers.
        seed: of the sketch.
    """
    require(method in ("auto", "exact", "sketch"), f"method: expected auto, exact or sketch, got {method!r}")
    _check(original, queries, architecture)
    _check(reconstructed, queries, architecture)
    if method == "exact" or (method == "auto" and 2 * _jacobian_size(queries, architecture) <= EXACT):
        a, b = (jacobian(w.double(), queries, architecture) for w in (original, reconstructed))
        return exact_spectrum(a, b, len(queries))
    forth, back = products(original.double(), reconstructed.double(), queries, architecture)
    return _sketch(forth, back, architecture.num_weights, min(rank, architecture.num_weights), probes, seed)


def exact_spectrum(a: Tensor, b: Tensor, n: int) -> Spectrum:
    """Of ``F = A^T B / n`` for Jacobians ``a, b [m, P]``, on the smaller of the two sides. F is ``[P, P]`` only where P <= m.

    With P > m: A^T = Q_a R_a and B^T = Q_b R_b by QR, so F's singular values are those of ``R_a R_b^T / n`` ``[m, m]``. Its symmetric
    part has range in the span of both, where, with ``[A; B]^T = Q [R_1 R_2]``, it is ``(R_1 R_2^T + R_2 R_1^T) / 2n`` ``[2m, 2m]``.
    """
    m, p = a.shape
    if p <= m:
        f = a.T @ b / n
        eigenvalues = torch.linalg.eigvalsh((f + f.T) / 2).flip(0)
        values = torch.linalg.svdvals(f)
        square = float((f * f.T).sum())
        trace = float(f.diagonal().sum())
    else:
        values = torch.linalg.svdvals(torch.linalg.qr(a.T, mode="r").R @ torch.linalg.qr(b.T, mode="r").R.T) / n
        r = torch.linalg.qr(torch.cat([a, b]).T, mode="r").R
        core = r[:, :m] @ r[:, m:].T / n
        eigenvalues = torch.linalg.eigvalsh((core + core.T) / 2).flip(0)
        square = float((core * core.T).sum())  # tr F^2: F is the core between orthonormal columns
        trace = float(core.diagonal().sum())
    return Spectrum(values, eigenvalues, _asymmetry(float(values.square().sum()), square), trace, float(values.norm()), True)


def _asymmetry(norm2: float, trace_of_square: float) -> float:
    # ||F - F^T||^2 = 2 ||F||^2 - 2 tr F^2
    return (max(0.0, 1 - trace_of_square / norm2) / 2) ** 0.5 if norm2 > 0 else 0.0


def push(function: Product, at: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """A function's value, and its derivative along a direction."""
    pair = torch.func.jvp(function, (at,), (direction.contiguous(),))
    return pair[0], pair[1]


def products(original: Tensor, reconstructed: Tensor, queries: Tensor, architecture: Architecture) -> tuple[Product, Product]:
    """``v -> F v`` and ``v -> F^T v`` for columns ``v [P, c]``, from ``jvp`` and ``vjp``: no Jacobian is held."""
    single, n = model_function(architecture), len(queries)
    blocks = queries.to(original).split(max(_QUERIES, 64))

    def through(outer: Tensor, inner: Tensor) -> Product:
        def product(v: Tensor) -> Tensor:
            total = torch.zeros_like(v)
            for x in blocks:

                def outputs(w: Tensor, x: Tensor = x) -> Tensor:
                    return single(w, x)

                pull = torch.func.vjp(outputs, outer)[1]
                for c in range(v.shape[1]):
                    total[:, c] += pull(push(outputs, inner, v[:, c])[1])[0]
            return total / n

        return product

    return through(original, reconstructed), through(reconstructed, original)


def _sketch(forth: Product, back: Product, p: int, rank: int, probes: int, seed: int) -> Spectrum:
    """Leading singular values by randomised subspace iteration (Halko et al. 2011); the rest by Hutchinson's estimator."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.linalg.svdvals(back(_range(forth, back, p, rank, generator)))[:rank]
    signs = torch.randint(0, 2, (p, probes), generator=generator).double() * 2 - 1
    fv, ftv = forth(signs), back(signs)
    norm2 = float(fv.square().sum() / probes)
    asymmetry = ((fv - ftv).square().sum() / (fv.square().sum() + ftv.square().sum()) / 2).sqrt()
    return Spectrum(values, values.new_empty(0), float(asymmetry), float((signs * fv).sum() / probes), norm2**0.5, False)


def _range(forth: Product, back: Product, p: int, rank: int, generator: torch.Generator) -> Tensor:
    """Orthonormal columns ``[P, rank + 8]`` that nearly span F's leading left singular vectors, from a generator on the CPU."""
    basis = torch.linalg.qr(forth(torch.randn(p, min(p, rank + 8), generator=generator, dtype=torch.float64)))[0]
    for _ in range(3):
        basis = torch.linalg.qr(forth(torch.linalg.qr(back(basis))[0]))[0]
    return basis


def sensitive_directions(
    weights: Tensor, queries: Tensor, architecture: Architecture, *, rank: int = 32, method: str = "auto", seed: int = 0
) -> tuple[Tensor, bool]:
    """Eigenvectors of ``J^T J`` of one model ``[P]`` as orthonormal rows, strongest first, and whether these are all that differ from
    zero: ``[min(m, P), P]``, with the m of :func:`jacobian`, if exact, the leading ``[rank, P]`` if sketched. ``method`` as in
    :func:`spectrum`."""
    _check(weights, queries, architecture)
    p = architecture.num_weights
    if method == "exact" or (method == "auto" and _jacobian_size(queries, architecture) <= EXACT):
        return torch.linalg.svd(jacobian(weights.double(), queries, architecture), full_matrices=False).Vh, True
    forth, back = products(weights.double(), weights.double(), queries, architecture)
    basis = _range(forth, back, p, min(rank, p), torch.Generator().manual_seed(seed))
    mixed = torch.linalg.eigh(basis.T @ forth(basis)).eigenvectors.flip(1)
    return (basis @ mixed).T[: min(rank, p)], False


@dataclass(frozen=True, eq=False)
class Directions:
    """Gradients at a reconstruction, to its weights ``[P]`` float64, and what they have to do with each other.

    Attributes:
        structural: d, the gradient of ``||d||^2 / 2``.
        behavioral: the gradient of L_B (criterion ``"mse"``) by autograd.
        first_order: ``F^T d``, what arXiv 2503.17138 puts in its place.
        loss: L_B.
        quadratic: ``1/(2n) sum_i ||J_orig(x_i) d||^2``, its second-order value.
    """

    structural: Tensor
    behavioral: Tensor
    first_order: Tensor
    loss: float
    quadratic: float

    def figures(self) -> dict[str, float]:
        """Angles in degrees, and what the first order misses of gradient (relative L2) and loss (ratio)."""
        return {
            "angle_structural_behavioral": angle(self.structural, self.behavioral),
            "angle_structural_first_order": angle(self.structural, self.first_order),
            "angle_behavioral_first_order": angle(self.behavioral, self.first_order),
            "first_order_gradient_error": float((self.first_order - self.behavioral).norm() / self.behavioral.norm().clamp_min(1e-300)),
            "quadratic_over_loss": self.quadratic / self.loss if self.loss > 0 else float("nan"),
            "behavior_loss": self.loss,
        }


def directions(original: Tensor, reconstructed: Tensor, queries: Tensor, architecture: Architecture) -> Directions:
    """Both gradients at one reconstruction, exact at any size: two products with Jacobians, none of which is held."""
    _check(original, queries, architecture)
    _check(reconstructed, queries, architecture)
    theta, hat = original.double(), reconstructed.double()
    single, n, x = model_function(architecture), len(queries), queries.to(theta)
    d = hat - theta
    outputs, pushed = push(lambda w: single(w, x), theta, d)
    pulling = torch.func.vjp(lambda w: single(w, x), hat)
    rebuilt, pull = pulling[0], pulling[1]
    error = rebuilt - outputs
    return Directions(
        d,
        pull(error / n)[0].detach(),
        pull(pushed / n)[0].detach(),
        float(error.square().sum() / (2 * n)),
        float(pushed.square().sum() / (2 * n)),
    )


def angle(a: Tensor, b: Tensor) -> float:
    """Degrees between two vectors, accurate near 0 and 180; NaN if one is zero."""
    a, b = a.double(), b.double()
    if float(a.norm()) == 0 or float(b.norm()) == 0:
        return float("nan")
    a, b = a / a.norm(), b / b.norm()
    return float(torch.rad2deg(2 * torch.atan2((a - b).norm(), (a + b).norm())))


def _jacobian_size(queries: Tensor, architecture: Architecture) -> int:
    """Numbers in the Jacobian of all answers of one model; an answer may have several axes, as one class for each token."""
    return len(queries) * math.prod(architecture.output_shape) * architecture.num_weights


def _check(weights: Tensor, queries: Tensor, architecture: Architecture) -> None:
    require(isinstance(architecture, Architecture), f"architecture: expected an Architecture, got {describe(architecture)}")
    p = architecture.num_weights
    fits = isinstance(weights, Tensor) and weights.shape == (p,) and weights.is_floating_point()
    require(fits, f"weights: expected floating [{p}], one model of architecture {architecture.name!r}, got {describe(weights)}")
    broken = int((~weights.isfinite()).sum())
    require(
        broken == 0, f"weights: expected finite numbers, got {broken} of {p} that are not: such a model or reconstruction has no gradient"
    )
    shape = architecture.input_shape
    some = isinstance(queries, Tensor) and tuple(queries.shape[1:]) == shape and len(queries) > 0
    require(some, f"queries: expected [n, {', '.join(map(str, shape))}], got {describe(queries)}")
