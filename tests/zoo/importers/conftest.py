"""A ray tree to import."""

from __future__ import annotations

from pathlib import Path

import pytest
from zoo_trees import population

from wslfast.zoo import export_zoo, save_zoo
from wslfast.zoo.splits import Split


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    save_zoo(population(), tmp_path / "zoo", splits=Split((0.5, 0.25, 0.25), 7), provenance={})
    export_zoo(tmp_path / "zoo", tmp_path / "ray")
    return tmp_path / "ray"
