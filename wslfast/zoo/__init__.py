"""Zoos: data sets to train them on, building all models at once, and storing them."""

from __future__ import annotations

from .. import submodules_of
from .build import build_zoo
from .datasets import Dataset, image_shape, load_dataset
from .export import export_zoo
from .grid import Grid
from .importers import Imported, import_zoo
from .manifest import Manifest
from .mapped import MappedZoo
from .reading import load_parts, load_zoo, read_manifest, summarize
from .signals import Signals, image_signals
from .splits import Split
from .store import save_zoo
from .trained_on import dataset_of, network

__all__ = [
    "Dataset",
    "Grid",
    "Imported",
    "Manifest",
    "MappedZoo",
    "Signals",
    "Split",
    "build_zoo",
    "dataset_of",
    "export_zoo",
    "image_shape",
    "image_signals",
    "import_zoo",
    "load_dataset",
    "load_parts",
    "load_zoo",
    "network",
    "read_manifest",
    "save_zoo",
    "summarize",
]
__getattr__ = submodules_of(__name__)
