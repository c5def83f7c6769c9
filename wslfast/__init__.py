"""wslfast: run and compare thousands of small neural networks, each with its own weights, on shared queries.

The public names below are all there are; each is imported when it is first used, and so is every submodule: ``import wslfast`` is
light. The paper this serves is arXiv 2503.17138 (behavioral loss for weight-space autoencoders).
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"


def _register_kernels() -> None:
    """In a source tree that is not installed, ``kernels/`` beside this package is ``wslfast.kernels`` (a wheel holds it inside)."""
    here = Path(__file__).resolve().parent
    source = here.parent / "kernels" / "__init__.py"
    if (here / "kernels").exists() or not source.is_file() or importlib.util.find_spec(f"{__name__}.kernels") is not None:
        return
    spec = importlib.util.spec_from_file_location(f"{__name__}.kernels", source, submodule_search_locations=[str(source.parent)])
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot load {source}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    globals()["kernels"] = module


_register_kernels()

if TYPE_CHECKING:
    from . import profiling
    from .architecture import Architecture
    from .behavior import batched_behavioral_loss, batched_forward
    from .codes.adaptive import AdaptiveCodec
    from .codes.autoencoder import Autoencoder
    from .codes.joint import JointCodec
    from .codes.linear import LinearCodec
    from .errors import WslfastError
    from .measure import evaluate, generate
    from .population import Population
    from .proof import doctor
    from .queries import QueryPool, TargetCache
    from .tokens import TokenLayout
    from .training import TrainConfig, train
    from .zoo import build_zoo, load_zoo, save_zoo

_HOME = {
    "AdaptiveCodec": "codes.adaptive",
    "Architecture": "architecture",
    "Autoencoder": "codes.autoencoder",
    "JointCodec": "codes.joint",
    "LinearCodec": "codes.linear",
    "Population": "population",
    "QueryPool": "queries",
    "TargetCache": "queries",
    "TokenLayout": "tokens",
    "TrainConfig": "training",
    "WslfastError": "errors",
    "batched_behavioral_loss": "behavior",
    "batched_forward": "behavior",
    "build_zoo": "zoo",
    "doctor": "proof",
    "evaluate": "measure",
    "generate": "measure",
    "load_zoo": "zoo",
    "save_zoo": "zoo",
    "train": "training",
}
__all__ = [
    "AdaptiveCodec",
    "Architecture",
    "Autoencoder",
    "JointCodec",
    "LinearCodec",
    "Population",
    "QueryPool",
    "TargetCache",
    "TokenLayout",
    "TrainConfig",
    "WslfastError",
    "batched_behavioral_loss",
    "batched_forward",
    "build_zoo",
    "doctor",
    "evaluate",
    "generate",
    "load_zoo",
    "profiling",
    "save_zoo",
    "train",
]


def submodules_of(package: str) -> Callable[[str], ModuleType]:
    """The ``__getattr__`` of a package (PEP 562): its submodules by name, each imported when it is first used."""

    def __getattr__(name: str) -> ModuleType:
        full = f"{package}.{name}"
        if name.startswith("__") or importlib.util.find_spec(full) is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return importlib.import_module(full)

    return __getattr__


_submodule = submodules_of(__name__)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        return _submodule(name)
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value  # the next access is a plain attribute
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
