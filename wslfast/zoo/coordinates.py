"""Coordinate grids: what implicit neural representations are asked, as a data set without labels.

Two orders of a point's coordinates are in use, and a network knows one of them: ``xy``, the column first (DWSNets'
``numpy.meshgrid``), and ``ij``, the row first (SIREN's and NFN's ``torch.meshgrid``). Points are listed pixel by pixel, row after row, in
both.
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import present, require

PREFIX = "grid:"
_NAME = re.compile(r"grid:(?P<sizes>\d{1,5}(x\d{1,5}){0,3})(:(?P<order>xy|ij))?(:(?P<low>[-+.\deE]+),(?P<high>[-+.\deE]+))?")
_MOST = 1 << 22  # points


def grid_name(sizes: tuple[int, ...], order: str = "xy", low: float = -1.0, high: float = 1.0) -> str:
    """The name of a grid: ``grid:28x28:xy:-1,1``."""
    return f"{PREFIX}{'x'.join(map(str, sizes))}:{order}:{low:g},{high:g}"


def is_grid(name: str) -> bool:
    """Whether a data set's name is a grid's."""
    return name.startswith(PREFIX)


def grid_points(name: str) -> tuple[Tensor, dict[str, Any]]:
    """Points ``[N, axes]`` float32 of the grid ``grid:SIZES[:ORDER][:LOW,HIGH]``, and its facts.

    SIZES are points per axis (``28x28``), evenly spaced from LOW to HIGH (-1 to 1), both included; ORDER is ``xy`` (default) or ``ij``.
    Raises WslfastError for anything else.
    """
    match = present(_NAME.fullmatch(name), f"data set {name!r}: expected grid:SIZES[:xy|:ij][:LOW,HIGH], as grid:28x28:ij:-1,1")
    sizes, order = tuple(int(s) for s in match["sizes"].split("x")), match["order"] or "xy"
    try:
        low, high = float(match["low"] or -1), float(match["high"] or 1)
    except ValueError:
        low, high = math.nan, math.nan
    require(low < high < math.inf and low > -math.inf, f"data set {name!r}: expected LOW < HIGH")
    require(0 < math.prod(sizes) <= _MOST, f"data set {name!r}: expected 1 to {_MOST:,} points")
    axes = [np.linspace(low, high, size) for size in sizes]
    points = np.stack([a.reshape(-1) for a in np.meshgrid(*axes, indexing="ij")], 1)
    if order == "xy":
        points = points[:, ::-1]
    facts = {"source": "coordinate grid", "shape": list(sizes), "order": order, "low": low, "high": high}
    return torch.from_numpy(np.ascontiguousarray(points, dtype=np.float32)), facts
