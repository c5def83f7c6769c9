"""A zoo of ten models."""

from __future__ import annotations

from pathlib import Path

import pytest

from wslfast import build_zoo


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zoo") / "zoo"
    build_zoo("digits", folder, models=10, epochs=1, seed=0)
    return folder
