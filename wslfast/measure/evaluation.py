"""Evaluating a run on held-out models of its zoo, beside the standing baselines."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Union

import torch
from torch import Tensor

from .. import engine
from ..behavior import batched_forward
from ..codes.adaptive import AdaptiveCodec
from ..codes.autoencoder import Autoencoder
from ..codes.layer_inputs import spaced
from ..codes.linear import LinearCodec
from ..errors import require
from ..files import write_text
from ..population import Population
from ..profiling import region
from ..tokens import layout
from ..training import load_run
from ..zoo import Dataset, dataset_of, load_zoo
from .reconstruction import Reconstruction, compare
from .recorded import check_recorded

Code = Union[Autoencoder, LinearCodec]
BASELINES = ("linear", "linear-views", "linear-metric", "adaptive")  # what linear_baselines returns, where the architecture allows


def encode(code: Code, weights: Tensor, *, block: int = 256) -> Tensor:
    """Latents ``[k, T, W]`` of rows of weights ``[k, P]``, canonical (unpermuted), a block of models at a time."""
    if isinstance(code, LinearCodec):
        return code.encode(weights)
    tokens_of = layout(code.layout.architecture, code.layout.token_size)
    with torch.no_grad():
        return torch.cat([code.encode(tokens_of.tokenize(part).tokens).float() for part in weights.split(block)])


def decode(code: Code, latents: Tensor, *, block: int = 256) -> Tensor:
    """The inverse, as far as the code has one: ``[k, T, W] -> [k, P]``."""
    if isinstance(code, LinearCodec):
        return code.decode(latents)
    tokens_of = layout(code.layout.architecture, code.layout.token_size)
    with torch.no_grad():
        return torch.cat([tokens_of.detokenize(code.decode(part).float()) for part in latents.split(block)])


def reconstruct(code: Code, weights: Tensor, *, block: int = 256) -> Tensor:
    """Encode and decode rows of weights ``[k, P] -> [k, P]``, a block of models at a time."""
    return torch.cat([decode(code, encode(code, part)) for part in weights.split(block)])


def embeddings(code: Code, weights: Tensor, *, block: int = 256) -> Tensor:
    """Mean-token latents ``[k, W]``, the features of the paper's discriminative tasks."""
    return torch.cat([encode(code, part).mean(1) for part in weights.split(block)])


def evaluate_codes(codes: Mapping[str, Code], population: Population, images: Tensor, labels: Tensor) -> dict[str, Reconstruction]:
    """Reconstruct every model of a population with each code and compare it with its original on labelled images.

    The originals run once, whatever the number of codes.
    """
    with region("evaluate"), torch.no_grad():
        weights, arch = population.weights, population.architecture
        images, labels = images.to(weights.device), labels.to(weights.device)
        groups: Sequence[Any] | None = population.properties.get("model")
        targets = torch.cat([batched_forward(weights, part, arch) for part in images.split(1024)], 1) if len(codes) > 1 else None
        return {
            name: compare(weights, reconstruct(code, weights), images, labels, arch, groups=groups, targets=targets)
            for name, code in codes.items()
        }


def evaluate_code(code: Code, population: Population, images: Tensor, labels: Tensor) -> Reconstruction:
    """:func:`evaluate_codes` for one."""
    return evaluate_codes({"code": code}, population, images, labels)["code"]


def evaluate(
    run: str | Path,
    zoo: str | Path | None = None,
    *,
    split: str = "test",
    baselines: bool = True,
    out: str | Path | None = None,
    device: str = "cpu",
    backend: str = "auto",
    skip_bad: bool = False,
) -> dict[str, dict[str, Any]]:
    """Reconstruct a split of a zoo with a trained run and measure how its models behave.

    Where the originals' accuracy and the zoo's ``test_acc`` differ by more than half a point, one warning names the likely causes.

    Args:
        run: folder of a training run.
        zoo: folder of the zoo; by default the one that the run was trained on.
        split: ``"train"``, ``"val"`` or ``"test"``: held-out models, on the data set's test images.
        baselines: also evaluate the closed-form codes at the same latent size (see :func:`linear_baselines`).
        out: file to write the figures to, as JSON.
        device: where to run.
        backend: what runs the networks: ``"auto"``, ``"triton"`` or ``"torch"``.
        skip_bad: leave out shards of the zoo that are missing or damaged, with a count, instead of raising.

    Returns:
        Figures by variant (``"run"`` and the baselines): means over models of accuracy of original and reconstruction,
        agreement with the own original and with others, the margin between them, identified, explained variance, masked L2, latent
        numbers a model; medians and spreads beside them.

    Raises:
        WslfastError: unreadable run or zoo, an empty split.
    """
    require(split in ("train", "val", "test"), f"split: expected train, val or test, got {split!r}")
    engine.check_backend(backend)
    loaded = load_run(run, device=device)
    folder = str(zoo if zoo is not None else loaded.config.zoo)
    population = load_zoo(folder, split, skip_bad=skip_bad).to(device)
    require(len(population) > 0, f"zoo {folder} has no {split} models")
    dataset = dataset_of(folder, population.architecture)
    images, labels = dataset.split("test")
    codes: dict[str, Code] = {"run": loaded.autoencoder}
    with engine.using(backend):
        if baselines:
            train, numbers = load_zoo(folder, "train", skip_bad=skip_bad).to(device), loaded.autoencoder.latent_numbers
            codes |= linear_baselines(train, dataset, numbers, loaded.config.token_size)
        compared = evaluate_codes(codes, population, images, labels)
    results = {}
    check_recorded(population, compared["run"].accuracy_original, dataset, folder)
    for name, result in compared.items():
        numbers = latent_numbers(codes[name])
        results[name] = {**result.summary(), "latent_numbers": numbers, "latent_share": numbers / population.architecture.num_weights}
    if out is not None:
        write_json(out, {"run": str(run), "zoo": folder, "split": split, "backend": backend, "variants": results})
    return results


def linear_baselines(
    train: Population, dataset: Dataset, latent: int, token_size: int = 0, seed: int = 0, only: Sequence[str] = BASELINES
) -> dict[str, LinearCodec]:
    """The closed-form codes of a zoo with ``latent`` numbers a model: what any trained autoencoder has to beat.

    ``linear`` is PCA of the stored weights, ``linear-views`` PCA over all their permuted views, ``linear-metric`` the same in
    the activation metric, ``adaptive`` in the metric of each model's own activations (see :mod:`wslfast.codes.adaptive`); ``only`` some.
    """
    latent = min(latent, train.architecture.num_weights)
    images = spaced(dataset.train_images, 512).to(train.weights.device)
    given: dict[str, dict[str, Any]] = {
        "linear": {"views": False},
        "linear-views": {},
        "linear-metric": {"metric": "activation", "queries": images},
        "adaptive": {"queries": images},
    }
    return {
        name: (AdaptiveCodec if name == "adaptive" else LinearCodec)(train, latent=latent, token_size=token_size, seed=seed, **given[name])
        for name in only
        if name != "adaptive" or AdaptiveCodec.supports(train.architecture)
    }


def latent_numbers(code: Code) -> int:
    """Numbers that a code keeps of one model."""
    return code.latent_size if isinstance(code, LinearCodec) else code.latent_numbers


def write_json(path: str | Path, value: Mapping[str, Any]) -> None:
    """Write figures as JSON, atomically; NaN becomes null."""
    text = json.dumps(json_ready(value), indent=1, allow_nan=False) + "\n"
    write_text(Path(path), text)


def json_ready(value: Any) -> Any:
    """Mappings, sequences and numbers as JSON has them; what is not finite becomes None."""
    if isinstance(value, Mapping):
        return {str(k): json_ready(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_ready(v) for v in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return value
