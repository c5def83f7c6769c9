"""Which images a run compares models on: ``TrainConfig.query_set`` as a tensor."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Union

import torch
from torch import Tensor

from ..errors import check_seed, require
from ..population import Population
from ..queries import SYNTHETIC, load_queries, synthetic_queries
from ..zoo import MappedZoo, dataset_of

DATA = {"data": "train", "val": "val", "test": "test"}
OPTIMISED = 128  # images that an optimised set is distilled to
_DISAGREE = 64  # models read for it


def set_names(query_set: str) -> tuple[str, ...]:
    """The sets that ``a+b`` joins. Raises WslfastError for one that is neither known nor an ``.npz`` file's name."""
    names = tuple(query_set.split("+"))
    for name in names:
        known = name in DATA or name in SYNTHETIC or name.endswith(".npz")
        require(known, f"query_set: expected {', '.join((*DATA, *SYNTHETIC))}, a file ending in .npz, or several joined by +, got {name!r}")
    return names


def query_images(
    query_set: str, zoo: str | Path, source: Union[Population, MappedZoo], *, n: int = 2048, seed: int = 0, exactly: bool = False
) -> Tensor:
    """Images ``[N, *input_shape]`` of a query set.

    Args:
        query_set: ``data``, ``val`` or ``test``: that split of the images that the zoo was trained on; one of
            :data:`wslfast.queries.SYNTHETIC`, which no image of the zoo's goes into; an ``.npz`` file
            (:func:`wslfast.queries.load_queries`); or several joined by ``+``, each cut to the size of the smallest.
        zoo: folder, for the images.
        source: the training models, for the architecture and for ``optimised``.
        n: images of each synthetic set (of an optimised one at most 128).
        seed: of what is drawn.
        exactly: n images in all, whatever they are made of.

    Raises:
        WslfastError: for a set that is not known, or, with ``exactly``, has fewer images.
    """
    architecture = source.architecture
    check_seed(seed)
    require(type(n) is int and n > 0, f"n: expected a positive integer, got {n!r}")

    @cache
    def data() -> dict[str, Tensor]:
        found = dataset_of(zoo, architecture)
        return {name: found.split(split)[0] for name, split in DATA.items()}

    def one(name: str) -> Tensor:
        if name in DATA:
            return data()[name]
        if name.endswith(".npz"):
            return load_queries(name, architecture)
        if name != "optimised":
            return synthetic_queries(name, n, architecture, seed=seed)
        rows = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed))[:_DISAGREE].sort().values
        some = source[rows] if isinstance(source, Population) else source.load(rows)
        return synthetic_queries(name, n if exactly else min(n, OPTIMISED), architecture, population=some, seed=seed)

    sets = [one(name) for name in set_names(query_set)]
    generator = torch.Generator().manual_seed(seed)
    size = min(map(len, sets))
    if exactly:
        each = -(-n // len(sets))
        require(each <= size, f"n: {query_set!r} has {size * len(sets)} images in all, expected at most as many, got {n}")
        parts = [images if len(images) == each else images[torch.randperm(len(images), generator=generator)[:each]] for images in sets]
        return torch.cat(parts)[:n]
    if len(sets) == 1:
        return sets[0]
    return torch.cat([images[torch.randperm(len(images), generator=generator)[:size]] for images in sets])
