"""Data for networks that are no classifiers: inputs, and the numbers that a network shall return for them.

All models have the same targets (plain regression), or each has its own: in a zoo of implicit neural representations each model has one
image, whose colours are the targets at its coordinates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..errors import describe, require
from .coordinates import grid_name, grid_points
from .datasets import Dataset, load_dataset
from .manifest import SPLITS


@dataclass(frozen=True, eq=False)
class Signals:
    """Inputs and targets, float32. Model j is fitted to signal j; with one signal, all models to that one.

    Attributes:
        name: what to call it.
        train_inputs: ``[N, *input]``.
        train_targets: ``[N, *out]``, the same for all models, or ``[S, N, *out]``, signal by signal.
        val_inputs, val_targets, test_inputs, test_targets: likewise, for held-out points; None without.
        provenance: where it came from, for the manifest.
        own: whether every model has its own targets.
    """

    name: str
    train_inputs: Tensor
    train_targets: Tensor
    val_inputs: Tensor | None = None
    val_targets: Tensor | None = None
    test_inputs: Tensor | None = None
    test_targets: Tensor | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    own: bool = field(init=False, repr=False, default=False)

    def __post_init__(self) -> None:
        own = None
        for name in SPLITS:
            inputs, targets = getattr(self, f"{name}_inputs"), getattr(self, f"{name}_targets")
            require((inputs is None) == (targets is None), f"{name}: expected inputs and targets, or neither")
            if inputs is None:
                continue
            for what, value in (("inputs", inputs), ("targets", targets)):
                floating = isinstance(value, Tensor) and value.dtype == torch.float32 and value.ndim >= 2
                require(floating, f"{name}_{what}: expected float32 [N, ...], got {describe(value)}")
                require(bool(value.isfinite().all()), f"{name}_{what}: expected finite numbers")
            require(len(inputs) > 0, f"{name}_inputs: expected at least one point, got none")
            require(inputs.shape[1:] == self.train_inputs.shape[1:], f"{name}_inputs: expected points like those of train_inputs")
            one = len(targets) == len(inputs) and (own is None or not own)
            several = targets.ndim >= 3 and targets.shape[1] == len(inputs)
            require(one or several, f"{name}_targets: expected [{len(inputs)}, ...] or [S, {len(inputs)}, ...], got {describe(targets)}")
            mine = several and (own if own is not None else not one)
            require(
                own is None or mine == own, f"{name}_targets: expected one target per point, or one per signal and point, in every split"
            )
            own = mine
            same = not own or len(targets) == len(self.train_targets)
            require(same, f"{name}_targets: expected {len(self.train_targets)} signals, got {len(targets)}")
        object.__setattr__(self, "own", bool(own))
        object.__setattr__(self, "provenance", MappingProxyType(dict(self.provenance)))

    @property
    def count(self) -> int | None:
        """How many signals there are; None where all models are fitted to one."""
        return len(self.train_targets) if self.own else None

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of the target of one point."""
        return tuple(self.train_targets.shape[1 + int(self.own) :])

    def split(self, name: str) -> tuple[Tensor, Tensor] | None:
        """Inputs and targets of a split; None where it has no points."""
        inputs = getattr(self, f"{name}_inputs")
        return None if inputs is None else (inputs, getattr(self, f"{name}_targets"))


def image_signals(images: Tensor | Dataset, name: str = "images") -> Signals:
    """One signal an image ``[S, C, H, W]``: at (row, column), from -1 to 1 each, its C colours. Of a :class:`Dataset`, the training
    images."""
    pixels, source = images, {"name": name}
    if isinstance(images, Dataset):
        pixels, source = images.train_images, {"name": images.name, **images.provenance}
    fits = isinstance(pixels, Tensor) and pixels.ndim == 4 and pixels.is_floating_point() and 0 not in pixels.shape
    require(fits, f"images: expected floating [S, C, H, W], got {describe(pixels)}")
    assert isinstance(pixels, Tensor)
    colours = pixels.detach().to("cpu", torch.float32).flatten(2).transpose(1, 2).contiguous()
    grid = grid_name(tuple(pixels.shape[2:]), "ij")
    record = {**load_dataset(grid, (2,)).provenance, "name": grid, "signals": source}  # by which the points are found again
    return Signals(str(source["name"]), grid_points(grid)[0], colours, provenance=record)
