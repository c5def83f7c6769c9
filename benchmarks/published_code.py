"""Makes a clone of the published code importable, for the tests and the benchmark that run it beside ours.

``WSLFAST_SANE_SRC`` names one or more clones (separated by ``os.pathsep``) of ``HSG-AIML/SANE``, ``HSG-AIML/MultiZoo-SANE``,
``HSG-AIML/ICLR_WSL_2025-Structure_is_not_enough`` or ``HSG-AIML/WeightCLIP`` (package ``sane`` 2.x, which needs what it asks for). The
others import more than their losses, tokens and autoencoder use (ray, lightning, torchvision, ...); what is not installed is stood in
for by the few names that matter here.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

VARIABLE = "WSLFAST_SANE_SRC"
PACKAGES = ("shrp", "SANE", "mzsane")
SECOND = "sane"  # 2.x, which has other modules and is run with what it needs installed


def available() -> list[str]:
    """Names of the published packages that the environment variable leads to, importable from now on."""
    found = []
    for clone in filter(None, os.environ.get(VARIABLE, "").split(os.pathsep)):
        for package in PACKAGES:
            for source in ("src", "skaling_hyper_reps/src", "."):
                folder = Path(clone) / source
                if (folder / package / "models" / "def_loss.py").is_file():
                    if str(folder) not in sys.path:
                        sys.path.append(str(folder))
                    found.append(package)
        folder = Path(clone) / "src"
        if (folder / SECOND / "orchestrator.py").is_file():
            if str(folder) not in sys.path:
                sys.path.append(str(folder))
            found.append(SECOND)
    if set(found) & set(PACKAGES):
        _stand_in()
    return found


def module(package: str, name: str) -> Any:
    """``{package}.{name}`` of the clone."""
    return importlib.import_module(f"{package}.{name}")


def _stand_in() -> None:
    _install("tqdm", tqdm=Bar)
    _install("torchmetrics.functional", explained_variance=_explained_variance, r2_score=None)
    _install("lightning.fabric", Fabric=object, seed_everything=torch.manual_seed)
    _install("ray", remote=_remote, get=lambda values: values, init=lambda **_: None, shutdown=lambda: None)
    _install("ray.actor", ActorHandle=object)
    _install("psutil")
    _install("rebasin", PermutationCoordinateDescent=object)
    _install("rebasin.permutation_initializer", PermutationInitializer=object)
    _install("torchvision.transforms", RandomErasing=object)
    _install("torchvision.models.resnet", ResNet=torch.nn.Module, BasicBlock=torch.nn.Module, Bottleneck=torch.nn.Module)


def _install(name: str, **names: Any) -> None:
    """A module of these names under ``name`` and its parents, unless the real one is there and can be imported."""
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        path = ".".join(parts[:depth])
        if path in sys.modules:
            if not getattr(sys.modules[path], "stands_in", False):
                return
            continue
        if depth == 1 and _works(path):
            return
        stand_in = ModuleType(path)
        stand_in.stands_in = True  # type: ignore[attr-defined]
        stand_in.__path__ = []  # type: ignore[attr-defined]
        stand_in.__spec__ = ModuleSpec(path, None, is_package=True)  # others ask whether it is there
        sys.modules[path] = stand_in
        if depth > 1:
            setattr(sys.modules[".".join(parts[: depth - 1])], parts[depth - 1], stand_in)
    for key, value in names.items():
        setattr(sys.modules[name], key, value)


def _works(name: str) -> bool:
    """Whether a module can be imported: one that was built for another torch is there, and raises."""
    try:
        importlib.import_module(name)
    except Exception:
        return False
    return True


def _explained_variance(preds: torch.Tensor, target: torch.Tensor, multioutput: str = "uniform_average") -> torch.Tensor:
    """As torchmetrics has it: per position over the batch, averaged; where a target never varies, 1 if the error does not
    either and 0 if it does."""
    n = len(target)
    error = target - preds
    numerator = (error.square().sum(0) / n - (error.sum(0) / n).square()).flatten()
    denominator = (target.square().sum(0) / n - (target.sum(0) / n).square()).flatten()
    scores = torch.where((denominator == 0) & (numerator != 0), 0.0, 1.0)
    valid = denominator != 0
    scores[valid] = 1 - numerator[valid] / denominator[valid]
    return scores.mean()


def _remote(*arguments: Any, **_: Any) -> Any:
    """``ray.remote``, run at once in this process; for classes, an attribute's ``remote`` calls it."""

    def decorate(thing: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            return _Actor() if isinstance(thing, type) else thing(*args, **kwargs)

        holder = ModuleType("remote")
        holder.remote = run  # type: ignore[attr-defined]
        return holder

    return decorate(arguments[0]) if arguments else decorate


class Bar:
    """A progress bar that shows nothing, for tqdm's and for the published one, an actor of ray's."""

    def __init__(self, iterable: Any = (), **_: Any) -> None:
        self.iterable, self.actor = iterable, _Actor()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.iterable)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


class _Actor:
    """Anything a progress bar may be asked."""

    def __getattr__(self, name: str) -> Any:
        holder = ModuleType(name)
        holder.remote = lambda *_: None  # type: ignore[attr-defined]
        return holder
