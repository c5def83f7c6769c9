"""How far the first-order picture of a weight error holds: directions, magnitudes, measured loss against the quadratic form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..architecture import Architecture
from ..behavior import batched_forward
from ..codes.layer_inputs import evenly_spread
from ..errors import check_seed, require
from ..files import check_folder, write_json
from ..kernels.criteria import criterion_values
from ..training import load_run
from ..training.query_sets import query_images
from ..zoo import MappedZoo, dataset_of, load_zoo
from .diversity import answers, labels_of
from .evaluation import reconstruct
from .gradients import directions, model_function, push, sensitive_directions, spectrum
from .results import HEADER, KEY, Row, figures, update_csv

COLUMNS = (*HEADER, "direction", "magnitude", "models")
MAGNITUDES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
_TOP = 16  # eigenvectors that "top" mixes


@dataclass(frozen=True)
class GradientSettings:
    """Sizes of a gradient analysis."""

    models: int = 12
    """Held-out models to analyse, evenly spaced over the split."""
    queries: int = 64
    """Images that F and the losses are over."""
    query_set: str = "data"
    """Where they come from, as in wslfast train."""
    split: str = "test"
    """Whose models: test or val."""
    magnitudes: tuple[float, ...] = MAGNITUDES
    """Sizes of a weight error, relative to the norm of the model's weights."""
    seed: int = 0
    """Seed of random directions and queries."""

    def __post_init__(self) -> None:
        for name in ("models", "queries"):
            require(getattr(self, name) >= 1, f"{name}: expected at least 1, got {getattr(self, name)}")
        require(self.split in ("test", "val"), f"split: expected test or val, got {self.split!r}")
        require(len(self.magnitudes) > 0 and all(0 < m < float("inf") for m in self.magnitudes), "magnitudes: expected positive numbers")


def error_directions(
    weights: Tensor, queries: Tensor, architecture: Architecture, generator: torch.Generator, reconstructed: Tensor | None = None
) -> dict[str, Tensor]:
    """Directions of a weight error for one model ``[P]``, each of the norm of its weights.

    ``random``: Gaussian. ``layer``: Gaussian, each parameter tensor's part in proportion to that tensor's own norm. ``top`` and
    ``bottom``: a random mixture of the 16 leading eigenvectors of ``J^T J``, and a random vector freed of all that the queries
    excite (with fewer outputs than weights; else of all but the weakest 16; of a network too large for its Jacobian, of the leading
    32). ``reconstruction``: the error that was made.
    """
    p = len(weights)
    size = weights.double().norm()
    noise = torch.randn(3, p, generator=generator, dtype=torch.float64)
    layer = torch.cat(
        [
            noise[0, s.offset : s.stop] / noise[0, s.offset : s.stop].norm() * weights[s.offset : s.stop].double().norm()
            for s in architecture.parameters
        ]
    )
    basis, _ = sensitive_directions(weights, queries, architecture)
    top = noise[1, : min(_TOP, len(basis))] @ basis[:_TOP]
    strong = basis if len(basis) < p else basis[: max(0, p - _TOP)]
    bottom = noise[2] - strong.T @ (strong @ noise[2])
    bottom = bottom - strong.T @ (strong @ bottom)  # twice is enough: what is left is exact to rounding
    named = {"random": noise[1], "layer": layer, "top": top, "bottom": bottom}
    if reconstructed is not None:
        named["reconstruction"] = reconstructed.double() - weights.double()
    return {name: v * (size / v.norm().clamp_min(1e-300)) for name, v in named.items()}


@torch.no_grad()
def sweep(
    weights: Tensor,
    direction: Tensor,
    magnitudes: Sequence[float],
    queries: Tensor,
    images: Tensor,
    labels: Tensor | None,
    architecture: Architecture,
) -> dict[str, list[float]]:
    """One model ``[P]`` moved by ``magnitude * direction [P]``: lists over magnitudes of what is measured and what is predicted.

    Returns:
        ``loss`` L_B on the queries, ``quadratic`` ``1/(2n) sum ||J d||^2``, ``ratio`` quadratic / loss, ``accuracy`` and ``agreement`` on
        labelled images (NaN where there are no classes).
    """
    theta, n = weights.double(), len(queries)
    single, x = model_function(architecture), queries.double()
    outputs, pushed = push(lambda w: single(w, x), theta, direction.double())
    steps = torch.tensor(list(magnitudes), dtype=torch.float64)
    moved = theta + steps.unsqueeze(1) * direction.double()
    loss = criterion_values(batched_forward(moved, x, architecture), outputs.expand(len(steps), *outputs.shape), "mse", 2.0)
    quadratic = steps.square() * pushed.square().sum() / (2 * n)
    classes = answers(batched_forward(torch.cat([weights.unsqueeze(0), moved.float()]), images, architecture)).argmax(2)
    nothing = [float("nan")] * len(steps)
    return {
        "loss": loss.tolist(),
        "quadratic": quadratic.tolist(),
        "ratio": (quadratic / loss).tolist(),
        "accuracy": nothing if labels is None else (classes[1:] == labels).double().mean(1).tolist(),
        "agreement": nothing if architecture.num_classes == 1 else (classes[1:] == classes[0]).double().mean(1).tolist(),
    }


def analyse(
    run: str | Path,
    out: str | Path,
    settings: GradientSettings = GradientSettings(),
    zoo: str | Path | None = None,
    name: str | None = None,
    architecture: str | None = None,
) -> list[Row]:
    """Gradients, spectrum and sweeps at the reconstructions of a run's held-out models.

    Writes ``out/gradients.csv`` (:data:`COLUMNS`: median, mean and standard deviation over models; rows of other runs stay) and
    ``out/gradients.json`` (every model's figures and spectra, for plots). Returns the rows. ``name`` is their variant, by default the
    run's folder; ``architecture`` chooses one (its label) of a zoo of several.

    Raises:
        WslfastError: unreadable run or zoo, an empty split.
    """
    check_seed(settings.seed)
    check_folder(Path(out), "results")
    loaded = load_run(run)
    folder = str(zoo if zoo is not None else loaded.zoo)
    population = load_zoo(folder, settings.split, architecture=architecture)
    require(len(population) > 0, f"zoo {folder} has no {settings.split} models")
    arch, dataset = population.architecture, dataset_of(folder, population.architecture)
    images, labels = dataset.split(settings.split)[0], labels_of(dataset, settings.split, arch)
    source = MappedZoo(folder, "train", architecture=architecture)
    pool = query_images(settings.query_set, folder, source, n=max(settings.queries, 2), seed=settings.seed)
    require(settings.queries <= len(pool), f"queries: expected at most {len(pool)} (the query set), got {settings.queries}")
    generator = torch.Generator().manual_seed(settings.seed)
    queries = pool[torch.randperm(len(pool), generator=generator)[: settings.queries]]
    chosen = evenly_spread(len(population), settings.models)
    weights = population.weights[chosen]
    rebuilt = reconstruct(loaded.of(arch), weights)
    models: list[dict[str, Any]] = []
    for row, theta, hat in zip(chosen.tolist(), weights, rebuilt, strict=True):
        models.append(_model(theta, hat, queries, images, labels, arch, settings, generator) | {"row": row})
    rows = _rows(models, {"zoo": dataset.name, "variant": name or Path(run).name, "seed": loaded.config.seed}, settings.magnitudes)
    update_csv(Path(out) / "gradients.csv", COLUMNS, rows, KEY)
    facts = {
        "run": str(run),
        "zoo": folder,
        "architecture": arch.name,
        "magnitudes": list(settings.magnitudes),
        "queries": settings.queries,
        "query_set": settings.query_set,
        "models": models,
    }
    write_json(Path(out) / "gradients.json", facts)
    return rows


def _model(
    theta: Tensor,
    hat: Tensor,
    queries: Tensor,
    images: Tensor,
    labels: Tensor | None,
    architecture: Architecture,
    settings: GradientSettings,
    generator: torch.Generator,
) -> dict[str, Any]:
    pulled = directions(theta, hat, queries, architecture)
    values = spectrum(theta, hat, queries, architecture, seed=settings.seed)
    measured = pulled.figures() | {
        "relative_error": float((hat - theta).norm() / theta.norm()),
        "asymmetry": values.asymmetry,
        "effective_rank": values.effective_rank,
        "largest_singular_value": float(values.singular_values[0]),
        "negative_share": values.negative_share,
    }
    moves = error_directions(theta, queries, architecture, generator, hat)
    swept = {name: sweep(theta, d, settings.magnitudes, queries, images, labels, architecture) for name, d in moves.items()}
    spectra = {"singular_values": values.singular_values.tolist(), "eigenvalues": values.eigenvalues.tolist()}
    return {"figures": measured, "sweep": swept, **spectra}


def _rows(models: Sequence[Mapping[str, Any]], head: Mapping[str, Any], magnitudes: Sequence[float]) -> list[Row]:
    def row(metric: str, values: list[float], direction: str = "", magnitude: float | None = None) -> Row:
        numbers = torch.tensor(values, dtype=torch.float64)
        of = {"direction": direction, "magnitude": magnitude, "models": int(numbers.isfinite().sum())}
        return {**head, **dict(zip(HEADER[3:], (metric, *figures(numbers)))), **of}

    rows = [row(metric, [m["figures"][metric] for m in models]) for metric in models[0]["figures"]]
    for direction, swept in models[0]["sweep"].items():
        for metric in swept:
            for i, magnitude in enumerate(magnitudes):
                rows.append(row(metric, [m["sweep"][direction][metric][i] for m in models], direction, float(magnitude)))
    return rows
