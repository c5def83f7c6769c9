"""Splits by model: every checkpoint of a model is in the same one, so that no model is tested on what it was trained beside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..errors import require
from .manifest import SPLITS


@dataclass(frozen=True)
class Split:
    """Shares of the models for train, val and test (they sum to 1), and the seed that draws them."""

    fractions: tuple[float, float, float] = (0.7, 0.15, 0.15)
    seed: int = 0

    def __post_init__(self) -> None:
        f = self.fractions
        three = isinstance(f, (tuple, list)) and len(f) == 3 and all(isinstance(v, (int, float)) and 0 <= v <= 1 for v in f)
        require(three and abs(sum(f) - 1) < 1e-6, f"split: expected three shares (train, val, test) that sum to 1, got {f!r}")
        require(f[0] > 0, f"split: expected a share > 0 for train, got {f!r}")
        require(type(self.seed) is int, f"split seed: expected an integer, got {self.seed!r}")
        object.__setattr__(self, "fractions", tuple(float(v) for v in f))

    def assign(self, models: Sequence[int]) -> tuple[str, ...]:
        """The split of every row, given each row's model id. With at least three models no split of a positive share is empty."""
        kinds = {type(model) for model in models}
        require(len(kinds) <= 1, f"models: expected ids of one type, got {', '.join(sorted(kind.__name__ for kind in kinds))}")
        unique = sorted(set(models))
        order = torch.randperm(len(unique), generator=torch.Generator().manual_seed(self.seed)).tolist()
        sizes = [round(share * len(unique)) for share in self.fractions]
        for i in (1, 2):
            if self.fractions[i] > 0 and len(unique) >= 3:
                sizes[i] = max(1, sizes[i])
        sizes[0] = max(1, len(unique) - sizes[1] - sizes[2])
        names = [name for name, size in zip(SPLITS, sizes, strict=True) for _ in range(size)]
        of = {unique[i]: name for i, name in zip(order, names, strict=False)}
        return tuple(of[m] for m in models)
