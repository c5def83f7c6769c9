"""A small zoo on disk, and networks of one's own in a file and as modules."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from own_networks import NET, module
from torch import nn
from zoo_cases import make, save


@pytest.fixture
def nets(tmp_path: Path) -> list[nn.Module]:
    torch.manual_seed(0)
    (tmp_path / "net.py").write_text(NET)
    return [module() for _ in range(6)]


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    save(make(), tmp_path / "zoo", shard_rows=8)
    return tmp_path / "zoo"
