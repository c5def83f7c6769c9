"""New models from the latents of good ones: a kernel density around anchors, decoded and measured, all samples at once."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .. import engine
from ..autoencoder import Autoencoder
from ..errors import require
from ..population import Population
from ..profiling import region
from ..tokens import layout
from ..training import load_run
from ..zoo import Dataset, dataset_of, load_zoo, save_zoo


def best_rows(population: Population, share: float, by: str = "val_acc") -> Tensor:
    """Rows ``[m]`` of the best ``share`` of a population, at least one, best first; rows without a value are last."""
    require(0 < share <= 1, f"anchors: expected a share in (0, 1], got {share!r}")
    value = torch.nan_to_num(population.column(by), nan=-torch.inf)
    return value.argsort(descending=True, stable=True)[: max(1, round(share * len(population)))]


def sample_latents(anchors: Tensor, samples: int, bandwidth: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draws from a joint Gaussian kernel density around anchors ``[m, ...]``: an anchor, uniformly, plus Gaussian noise.

    Args:
        bandwidth: standard deviation of the noise, in units of each latent number's standard deviation over the anchors; 0
            gives the anchors themselves.
        generator: one stream for anchors and noise (never a fixed seed a dimension).

    Returns:
        Latents ``[samples, ...]`` and the anchor ``[samples]`` that each was drawn around.
    """
    chosen = torch.randint(len(anchors), (samples,), generator=generator)
    noise = torch.randn(samples, *anchors.shape[1:], generator=generator).to(anchors)
    spread = anchors.std(0, unbiased=False)
    chosen = chosen.to(anchors.device)
    return anchors[chosen] + bandwidth * spread * noise, chosen


def nearest(weights: Tensor, others: Tensor, *, block: int = 256) -> Tensor:
    """L2 distance ``[k]`` of each row of weights to the nearest row of ``others``."""
    return torch.cat([torch.cdist(part.double(), others.double()).amin(1) for part in weights.split(block)])


def generate(
    run: str | Path, zoo: str | Path | None = None, *, samples: int = 64, anchors: float = 0.3, bandwidth: float = 0.05,
    seed: int = 0, out: str | Path | None = None, device: str = "cpu", skip_bad: bool = False,
) -> Population:  # fmt: skip
    """Sample new models from a trained run: latents around those of its zoo's best training models, decoded.

    Args:
        run: folder of a training run.
        zoo: folder of the zoo; by default the one that the run was trained on.
        samples: how many models.
        anchors: share of the training models, best validation accuracy first, whose latents are sampled around.
        bandwidth: of the kernel density (see :func:`sample_latents`). Small ones copy the anchors with noise: read ``novelty``.
        seed: of the draw.
        out: folder to store the generated models in, as a zoo.
        device: where to run.
        skip_bad: leave out shards of the zoo that are missing or damaged, with a count, instead of raising.

    Returns:
        A population with, a model: ``anchor`` (the zoo's ``model`` it was drawn around), ``anchor_epoch``, ``val_acc`` and
        ``test_acc`` on the zoo's data set, and ``novelty``, the L2 distance in weights to the nearest training model. Every
        sample is there, in the order drawn: nothing is selected.

    Raises:
        WslfastError: unreadable run or zoo, arguments out of range.
    """
    require(isinstance(samples, int) and samples >= 1, f"samples: expected a positive integer, got {samples!r}")
    require(0 <= bandwidth < float("inf"), f"bandwidth: expected a non-negative number, got {bandwidth!r}")
    loaded = load_run(run, device=device)
    folder = str(zoo if zoo is not None else loaded.config.zoo)
    train = load_zoo(folder, "train", skip_bad=skip_bad).to(device)
    data = dataset_of(folder, train.architecture)
    rows = best_rows(train, anchors)
    with region("generate"), torch.no_grad():
        weights, drawn = _decode(loaded.autoencoder, train.weights[rows], samples, bandwidth, seed)
        of = rows[drawn.cpu()].tolist()
        properties = {
            "model": tuple(range(samples)),
            "anchor": tuple(train.properties["model"][j] for j in of),
            "anchor_epoch": tuple(train.properties["epoch"][j] for j in of),
            **{f"{name}_acc": _accuracy(weights, data, name, train) for name in ("val", "test")},
            "novelty": tuple(nearest(weights, train.weights).tolist()),
        }
    population = Population(train.architecture, weights.cpu(), properties)
    if out is not None:
        settings = {"bandwidth": bandwidth, "anchors": anchors, "seed": seed}
        provenance = {"made_by": "wslfast.generate", "run": str(run), "zoo": folder, **settings}
        save_zoo(population, out, splits=["test"] * samples, provenance=provenance)
    return population


def _decode(code: Autoencoder, anchors: Tensor, samples: int, bandwidth: float, seed: int) -> tuple[Tensor, Tensor]:
    """Weights ``[samples, P]`` and the anchor of each."""
    place = layout(code.layout.architecture, code.layout.token_size)
    latents = torch.cat([code.encode(place.tokenize(part).tokens).float() for part in anchors.split(256)])
    drawn, of = sample_latents(latents, samples, bandwidth, torch.Generator().manual_seed(seed))
    return torch.cat([place.detokenize(code.decode(part).float()) for part in drawn.split(256)]), of


def _accuracy(weights: Tensor, data: Dataset, split: str, like: Population) -> tuple[float, ...]:
    images, labels = (t.to(weights.device) for t in data.split(split))
    right = torch.zeros(len(weights), device=weights.device)
    for queries, target in zip(images.split(256), labels.split(256)):
        right += (engine.forward(weights, queries, like.architecture).argmax(-1) == target).sum(1)
    return tuple((right / len(labels)).tolist())
