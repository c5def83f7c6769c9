"""Makes published code that is already loaded fast: its names are replaced by ours wherever they are looked up.

Scripts import by name, so a class has to be replaced in every module that holds it, found by identity. All signatures are
checked before the first replacement; modules of the package that are imported later, while the patch is on, are treated the same
way. The patch is one of the process: threads that run published code at the same time see it, too.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from ..errors import WslfastError, require, say_once
from .hook import ImportHook, at_home
from .semantics import Choice, Semantics, resolve
from .surface import PACKAGES, Item, additions, surface_of

_lock = threading.RLock()
_active: Patch | None = None


class Patch:
    """The handle of an active patch.

    Attributes:
        semantics: what the replacements compute.
        replaced: one record per replaced name: ``{"package", "name", "places"}`` with every ``module.attribute`` it was found under.
    """

    def __init__(self, semantics: Semantics, strict: bool) -> None:
        self.semantics, self.strict = semantics, strict
        self._names: list[tuple[str, str, Any, Any]] = []  # (package, name, original, replacement)
        self._attributes: list[tuple[type, str, Any, Any]] = []  # methods: (class, attribute, original, replacement)
        self._added: list[tuple[ModuleType, str, Any]] = []  # names that the package lacks
        self._hook = ImportHook(PACKAGES, self._imported)
        self.active = False

    # -- on ------------------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        self._apply(self._check())
        sys.meta_path.insert(0, self._hook)
        self.active = True

    def _check(self) -> list[Item]:
        """Everything of the loaded packages that is not replaced yet; raises before anything is touched."""
        checked: list[Item] = []
        for package in PACKAGES:
            items = surface_of(package, self.semantics, self.strict)
            drift = [item.drift for item in items if item.drift is not None]
            known = "nothing was replaced, as signatures differ from those this version of wslfast knows"
            require(not drift, f"{package}: {known}: {'; '.join(drift)}")
            checked += items
        return checked

    def _apply(self, items: list[Item]) -> None:
        try:
            for item in items:
                if isinstance(item.holder, type):
                    self._set(item.holder, item.attribute, item.original, item.replacement)
                    continue
                if isinstance(item.original, type):
                    for attribute, old, new in at_home(item.original):
                        self._set(item.original, attribute, old, new)
                self._names.append((item.package, item.name, item.original, item.replacement))
            # the world that at_home keeps has to be read before any name of it is replaced
            _rebind([(original, replacement) for _, _, original, replacement in self._names])
            for module, name, value in additions():
                setattr(module, name, value)
                self._added.append((module, name, value))
        except BaseException:
            self.undo()
            raise

    def _set(self, holder: type, attribute: str, old: Any, new: Any) -> None:
        self._attributes.append((holder, attribute, old, new))
        setattr(holder, attribute, new)

    def _imported(self) -> None:
        """A module of the package has been imported while the patch is on."""
        with _lock:
            if not self.active:
                return
            try:
                items = self._check()
            except WslfastError:
                self.undo()
                raise
            self._apply(items)

    # -- off -----------------------------------------------------------------------------------------------------------

    def undo(self) -> None:
        """Put every original back, in modules imported since, too. A second call does nothing."""
        global _active
        with _lock:
            if self._hook in sys.meta_path:
                sys.meta_path.remove(self._hook)
            _rebind([(replacement, original) for _, _, original, replacement in self._names])
            for holder, attribute, original, replacement in reversed(self._attributes):
                if holder.__dict__.get(attribute) is replacement:
                    setattr(holder, attribute, original)
            for module, name, value in self._added:
                if vars(module).get(name) is value:
                    delattr(module, name)
            self._names, self._attributes, self._added, self.active = [], [], [], False
            if _active is self:
                _active = None

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    @property
    def added(self) -> list[str]:
        """Names of ours that the package lacks, where its configs look for them: ``["sane.loss.BehavioralLoss", ...]``."""
        return [f"{module.__name__}.{name}" for module, name, _ in self._added]

    @property
    def replaced(self) -> list[dict[str, Any]]:
        rows = [{"package": package, "name": name, "places": places} for package, name, _, new in self._names if (places := _places(new))]
        whole = {id(original) for _, _, original, _ in self._names}  # the methods of a replaced class are no rows of their own
        for holder, attribute, _, _ in self._attributes:
            if id(holder) not in whole:
                package, _, path = holder.__module__.partition(".")
                name = f"{path}.{holder.__name__}.{attribute}"
                rows.append({"package": package, "name": name, "places": [f"{package}.{name}"]})
        return rows

    def __repr__(self) -> str:
        return f"Patch(active={self.active}, replaced={[row['name'] for row in self.replaced]})"


def patch(*, semantics: Choice = "published", strict: bool = False, **flags: bool) -> Patch:
    """Replace what is slow in the published packages ``SANE``, ``shrp``, ``mzsane`` and ``sane`` 2.x, now and as they are imported.

    Args:
        semantics, flags: see :class:`~wslfast.sane.semantics.Semantics`.
        strict: raise for a network or setting that only the original can run; otherwise the original runs it, and it is said once.

    Returns:
        A handle with ``undo()``. Where a patch is already on, that one is returned and nothing changes.

    Raises:
        WslfastError: where a signature differs from the published one (nothing is replaced then), or another patch is on.
    """
    global _active
    with _lock:
        chosen = resolve(semantics, flags)
        if _active is not None:
            same = (_active.semantics, _active.strict) == (chosen, strict)
            require(same, "patch: another patch is on, with other semantics or strictness; undo it first")
            return _active
        made = Patch(chosen, strict)
        made._start()
        _active = made
        if not made.replaced:
            say_once(f"wslfast.sane: none of {', '.join(PACKAGES)} is loaded yet; what is imported from now on is patched")
        return made


@contextmanager
def patched(*, semantics: Choice = "published", strict: bool = False, **flags: bool) -> Iterator[Patch]:
    """:func:`patch` for the length of a ``with`` block; inside another one it changes nothing, and leaves the undoing to that."""
    with _lock:
        outer = _active
        handle = patch(semantics=semantics, strict=strict, **flags)
    try:
        yield handle
    finally:
        if handle is not outer:
            handle.undo()


def current() -> Patch | None:
    """The handle of the patch that is on, if one is."""
    return _active


def replaced() -> list[dict[str, Any]]:
    """What is replaced at the moment: ``{"package", "name", "places"}`` each; empty where no patch is on."""
    return [] if _active is None else _active.replaced


def _modules() -> list[ModuleType]:
    # a module's own dictionary is asked: some answer an attribute with an import, or an error
    modules = [m for m in list(sys.modules.values()) if isinstance(m, ModuleType)]
    return [m for m in modules if not str(vars(m).get("__name__", "")).startswith("wslfast.")]


def _rebind(pairs: list[tuple[Any, Any]]) -> None:
    """Every module attribute that *is* the first of a pair becomes the second."""
    swap = {id(old): (old, new) for old, new in pairs}
    for module in _modules():
        for name, value in list(vars(module).items()):
            if id(value) in swap and value is swap[id(value)][0]:
                setattr(module, name, swap[id(value)][1])


def _places(value: Any) -> list[str]:
    return [f"{vars(module).get('__name__')}.{name}" for module in _modules() for name, held in list(vars(module).items()) if held is value]
