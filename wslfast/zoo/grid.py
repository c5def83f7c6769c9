"""Hyper-parameters of a zoo: the published grid, a small one for digits, and balanced sub-samples of either."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch

from ..architecture import INITIALISATIONS
from ..errors import WslfastError, require


class Cell(NamedTuple):
    """What one model is trained with; its trajectory depends on nothing else."""

    init_type: str
    lr: float
    weight_decay: float
    seed: int


@dataclass(frozen=True)
class Grid:
    """Every combination of initialisation, learning rate, weight decay and seed; trained by Adam."""

    init_types: tuple[str, ...]
    lrs: tuple[float, ...]
    weight_decays: tuple[float, ...]
    seeds: tuple[int, ...]

    def __post_init__(self) -> None:
        for name, low in (("init_types", None), ("lrs", 0.0), ("weight_decays", 0.0), ("seeds", None)):
            values = getattr(self, name)
            require(isinstance(values, Sequence) and not isinstance(values, str), f"grid.{name}: expected a sequence, got {values!r}")
            require(len(values) > 0 and len(set(values)) == len(values), f"grid.{name}: expected distinct values, got {values!r:.200}")
            object.__setattr__(self, name, tuple(values))
            if low is not None:
                require(
                    all(isinstance(v, (int, float)) and math.isfinite(v) and v >= low for v in values),
                    f"grid.{name}: expected finite numbers >= {low}, got {values!r:.200}",
                )
        unknown = [i for i in self.init_types if i not in INITIALISATIONS]
        require(not unknown, f"grid.init_types: expected some of {INITIALISATIONS}, got {unknown}")
        counted = all(type(s) is int and 0 <= s < 1 << 40 for s in self.seeds)
        require(counted, f"grid.seeds: expected integers from 0 to 2^40, got {self.seeds!r:.200}")

    @classmethod
    def published(cls) -> Grid:
        """The grid of the published CNN zoos (arXiv 2503.17138): 4 x 5 x 3 x 20 = 1,200 models, batches of 32."""
        inits = ("uniform", "normal", "kaiming_uniform", "kaiming_normal")
        return cls(inits, (1e-4, 2.5e-4, 5e-4, 7.5e-4, 1e-3), (1e-4, 5e-4, 1e-3), tuple(range(20)))

    @classmethod
    def small(cls) -> Grid:
        """27 settings that train on digits in 5 to 8 epochs to accuracies that are spread out.

        There are more seeds than a small zoo has models, so that :meth:`cells` gives every model its own: two models that
        begin from the same weights and differ in weight decay alone stay near-copies, and one may be in train, the other in test.
        """
        return cls(("kaiming_uniform", "kaiming_normal", "xavier_normal"), (1e-3, 2e-3, 4e-3), (0.0, 1e-4, 1e-3), tuple(range(1000)))

    @classmethod
    def signals(cls) -> Grid:
        """For networks that are fitted to signals (:class:`wslfast.zoo.Signals`): one initialisation, that of sine networks where there are
        sines, two learning rates, no weight decay."""
        return cls(("siren",), (5e-4, 1e-3), (0.0,), tuple(range(100_000)))

    @classmethod
    def of(cls, grid: str | Grid) -> Grid:
        """``grid`` itself, or the one of that name."""
        if isinstance(grid, Grid):
            return grid
        grids = {"small": cls.small, "published": cls.published, "signals": cls.signals}
        if grid in grids:
            return grids[grid]()
        raise WslfastError(f"grid: expected 'small', 'published', 'signals' or a Grid, got {grid!r}")

    def __len__(self) -> int:
        return len(self.init_types) * len(self.lrs) * len(self.weight_decays) * len(self.seeds)

    def cells(self, models: int, seed: int = 0) -> list[Cell]:
        """``models`` different cells, drawn by ``seed``; all of them for ``models == len(grid)``.

        Balanced: settings are dealt in turns, so that each occurs equally often to within one, and seeds are as different as can be.
        """
        require(type(models) is int and 0 < models <= len(self), f"models: expected 1 to {len(self)} (the grid's size), got {models!r}")
        generator = torch.Generator().manual_seed(seed)
        settings = list(itertools.product(self.init_types, self.lrs, self.weight_decays))
        order = torch.randperm(len(settings), generator=generator).tolist()
        seeds = torch.randperm(len(self.seeds), generator=generator).tolist()
        # both wheels turn together; after a common multiple one is shifted, so that no pair comes twice
        period = math.lcm(len(settings), len(self.seeds))
        cells = []
        for j in range(models):
            init_type, lr, weight_decay = settings[order[j % len(settings)]]
            cells.append(Cell(init_type, float(lr), float(weight_decay), self.seeds[seeds[(j + j // period) % len(self.seeds)]]))
        return cells

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; a run of seeds is kept as ``[first, last]``."""
        record: dict[str, Any] = asdict(self)
        if len(self.seeds) > 2 and self.seeds == tuple(range(self.seeds[0], self.seeds[-1] + 1)):
            record["seeds"] = {"first": self.seeds[0], "last": self.seeds[-1]}
        return record
