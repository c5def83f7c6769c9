"""How code that is not ours is followed: modules that are imported later, and classes that look themselves up by name."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Iterator, Sequence
from types import FunctionType, ModuleType
from typing import Any


class ImportHook(importlib.abc.MetaPathFinder):
    """Finds what the other finders find, and tells when it has been executed."""

    def __init__(self, packages: Sequence[str], then: Callable[[], None]) -> None:
        self._packages, self._then = tuple(packages), then

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> importlib.machinery.ModuleSpec | None:
        """The spec of a module of the packages, its loader wrapped; None for any other module."""
        if fullname.partition(".")[0] not in self._packages:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None and hasattr(spec.loader, "exec_module"):
                    spec.loader = _Loader(spec.loader, self._then)
                return spec
        return None


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: Any, then: Callable[[], None]) -> None:
        self._loader, self._then = loader, then

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_loader"], name)  # runpy asks for the code

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # the module keeps its own loader: inspect and pickle ask for it
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        if module.__spec__ is not None:
            module.__spec__._initializing = False  # type: ignore[attr-defined]  # it is complete, if not yet for the importer
        self._then()


def at_home(kind: type) -> Iterator[tuple[str, Any, Any]]:
    """``(attribute, old, new)`` for every method of a class: the same code with a copy of its module's globals as they are now.

    Published classes name themselves (``super(AE, self)``, ``DistillationLoss.forward_elementwise``). Once the module's name stands for
    our class, that code would fail, and so would every object and subclass made before. The copy keeps the old class under its name.
    """
    worlds: dict[int, dict[str, Any]] = {}

    def moved(function: FunctionType) -> FunctionType:
        world = worlds.setdefault(id(function.__globals__), dict(function.__globals__))
        new = FunctionType(function.__code__, world, function.__name__, function.__defaults__, function.__closure__)
        new.__kwdefaults__, new.__qualname__, new.__doc__ = function.__kwdefaults__, function.__qualname__, function.__doc__
        new.__annotations__, new.__module__ = function.__annotations__, function.__module__
        new.__dict__.update(function.__dict__)
        return new

    for name, value in list(vars(kind).items()):
        if isinstance(value, FunctionType):
            yield name, value, moved(value)
        elif isinstance(value, (staticmethod, classmethod)) and isinstance(value.__func__, FunctionType):
            yield name, value, type(value)(moved(value.__func__))
        elif isinstance(value, property):
            get, put, drop = (moved(f) if isinstance(f, FunctionType) else f for f in (value.fget, value.fset, value.fdel))
            yield name, value, property(get, put, drop, value.__doc__)  # type: ignore[arg-type]
