"""What every importer yields: checkpoints that can be read one at a time, and what was left out and why."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ...architecture import Architecture
from ...errors import WslfastError, require
from ...safe.inert import StoredTensor, Stub

State = Mapping[str, Tensor]
UNKNOWN = "no matching results"
UNTOLD = "not in the table"
NAMED_EPOCH = "epoch read from the file's name"
_NOTES = (UNKNOWN, UNTOLD, NAMED_EPOCH, "no file", "activation not stated", "epochs not stated")
_DEEPEST = 8  # folders below a source that are looked into
_WRAPPERS = ("model_state_dict", "state_dict", "model", "params", "net", "network", "weights")  # keys that a state dict lies under
_SCALARS = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
_PARTS = ("_parameters", "_buffers", "_modules")  # of a module that was pickled whole


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint: where it is, which model's and of which epoch, what is known about it, and how to read its weights.

    ``unknown`` says why nothing tells which results are its own, ``untold`` which table has no row for it; ``architecture`` what it is of,
    where the source itself says so; ``once`` that the source states model and epoch, so that there is one such checkpoint.
    """

    where: str
    model: int
    epoch: int
    properties: Mapping[str, Any]
    config: Mapping[str, Any]
    read: Callable[[], State]
    split: str | None = None
    unknown: str = ""
    architecture: Architecture | None = None
    untold: str = ""
    once: bool = False


@dataclass
class Skips:
    """What was left out or is not known: ``{"where", "reason", "detail"}`` each. A second pass over the same source notes nothing twice."""

    entries: list[dict[str, str]] = field(default_factory=list)

    def add(self, where: str, reason: str, detail: str = "") -> None:
        where, detail = written(where), written(detail)
        entry = {"where": where, "reason": reason, "detail": detail[:300]}
        if entry not in self.entries[-8:] or where not in self._known:
            self.entries.append(entry)
            self._known.add(where)

    _known: set[str] = field(default_factory=set)

    def counts(self) -> dict[str, int]:
        """How many for each reason, most frequent first."""
        return dict(Counter(entry["reason"] for entry in self.entries).most_common())


def written(name: str) -> str:
    """A file's name, or a text with one in it, as UTF-8 can hold it: ``caf\\xe9.pt`` where its bytes are none."""
    try:
        return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # a half of a character, of which a name has none
        return name.encode("utf-8", "backslashreplace").decode()


def is_note(reason: str) -> bool:
    """Whether a reason is of what is not known of networks, which are stored all the same; else something was left out."""
    return reason in _NOTES or reason.endswith(".json")  # files of settings and results


def held(state: State) -> Callable[[], State]:
    """What reads the weights of a checkpoint that is in memory already."""
    return lambda: state


def listing(folder: Path, where: str, skips: Skips) -> list[str]:
    """Names in a folder, in no order; none, and a note to ``skips`` under the name ``where``, if it cannot be read."""
    try:
        return os.listdir(folder)
    except OSError as error:
        skips.add(where, "unreadable folder", error.strerror or str(error))
        return []


def folders(
    source: Path, skips: Skips, is_leaf: Callable[[Collection[str]], bool] = lambda names: False
) -> Iterator[tuple[Path, list[str], set[Path]]]:
    """``source`` and every folder below it, in sorted order: the folder, all names in it, and the folders in it.

    Folders with names for which ``is_leaf`` is true are not looked into, and are given as having none. Links to folders are not followed,
    nor is anything more than eight folders down; ``skips`` has them.
    """
    waiting = [(source, 0)]
    while waiting:
        folder, depth = waiting.pop()
        names = listing(folder, str(folder), skips)
        below = set() if is_leaf(names) else {path for path in (folder / name for name in names) if path.is_dir()}
        for path in sorted(below, reverse=True):
            where = str(path.relative_to(source))
            if path.is_symlink():
                skips.add(where, "a link to a folder", "links are not followed")
            elif depth == _DEEPEST:
                skips.add(where, "too deep", f"more than {_DEEPEST} folders down")
            else:
                waiting.append((path, depth + 1))
        yield folder, names, below


def unwrapped(value: Any) -> tuple[Any, dict[str, Any]]:
    """The state dict in what a training script saves, not read yet, and the plain values beside it (``epoch``, ``test_acc``, ...).

    A state dict lies bare, or under one of the usual keys, or in a module that was pickled whole.
    """
    beside: dict[str, Any] = {}
    for _ in range(4):
        if isinstance(value, Stub) and _is_module(value):
            return _of_module(value), beside
        if not isinstance(value, dict):
            break
        beside |= {str(k): v for k, v in value.items() if isinstance(v, (int, float, str)) and not isinstance(v, bool)}
        inner = next((value[k] for k in _WRAPPERS if isinstance(value.get(k), (dict, Stub)) and _holds_tensors(value[k])), None)
        if inner is None:
            tensors = {k: v for k, v in value.items() if isinstance(v, StoredTensor)}
            return (tensors or value), beside
        beside |= {str(k): number for k, v in value.items() if (number := _number(v)) is not None}
        value = inner
    return value, beside


def _number(value: Any) -> int | float | None:
    """The number in a tensor of one element, or in one of numpy's scalars, as accuracies are saved; None for anything else."""
    if isinstance(value, StoredTensor):
        return value.tensor().item() if math.prod(value.shape) == 1 else None  # type: ignore[no-any-return]
    if not (isinstance(value, Stub) and value.kind in _SCALARS and len(value.arguments) == 2):
        return None
    kind, data = value.arguments
    if isinstance(data, Stub) and data.kind == "_codecs.encode" and data.arguments and isinstance(data.arguments[0], str):
        data = data.arguments[0].encode("latin1", "replace")
    code = kind.arguments[0] if isinstance(kind, Stub) and kind.kind == "numpy.dtype" and kind.arguments else None
    state = kind.state if isinstance(kind, Stub) and isinstance(kind.state, tuple) else ()
    known = isinstance(code, str) and re.fullmatch("[iu][1248]|f[248]", code) and ">" not in state[:2]
    if not known or not isinstance(data, bytes) or len(data) != int(str(code)[1]):
        return None
    return np.frombuffer(data, dtype=f"<{code}")[0].item()  # type: ignore[no-any-return]


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, Stub):
        return _is_module(value)
    return any(isinstance(v, StoredTensor) or (isinstance(v, dict) and _holds_tensors(v)) for v in value.values())


def _is_module(stub: Stub) -> bool:
    return all(isinstance(stub.attribute(part), dict) for part in _PARTS)


def _of_module(stub: Stub, prefix: str = "", depth: int = 0) -> dict[str, StoredTensor]:
    """The state dict of a module that was pickled whole, out of its attributes."""
    require(depth < 64, "a module that is nested too deeply")
    temporary = stub.attribute("_non_persistent_buffers_set")
    left_out = temporary if isinstance(temporary, set) else set()
    state: dict[str, StoredTensor] = {}
    for part in _PARTS[:2]:
        own = stub.attribute(part)
        state |= {f"{prefix}{k}": v for k, v in own.items() if isinstance(v, StoredTensor) and (part == "_parameters" or k not in left_out)}
    for name, child in stub.attribute("_modules").items():
        if isinstance(child, Stub) and _is_module(child):
            state |= _of_module(child, f"{prefix}{name}.", depth + 1)
    return state


def state_of(value: Any) -> State:
    """A state dict, read, from what a file holds: bare or wrapped (:func:`unwrapped`). Raises WslfastError if it is none."""
    value, _ = unwrapped(value)
    require(isinstance(value, dict) and len(value) > 0, "expected a state dict (names to tensors)")
    wrong = [k for k, v in value.items() if not isinstance(k, str) or not isinstance(v, StoredTensor)]
    require(not wrong, f"expected a state dict of tensors; {str(wrong[0])[:60] if wrong else ''!r} is something else")
    state: dict[str, Tensor] = {}
    storages: dict[str, int] = {}
    total = 0
    for name, stored in value.items():
        state[name] = stored.tensor()
        storages[stored.storage.key] = stored.num_bytes
        total += state[name].numel() * state[name].element_size()
        # tied weights are listed twice; a file of a few storages under thousands of names would fill the memory
        require(total <= 2 * sum(storages.values()), f"its tensors are more than twice as large as their storages, at {name:.60}")
    for name in [n for n in state if n.startswith("_orig_mod.")]:  # torch.compile's
        state[name.removeprefix("_orig_mod.")] = state.pop(name)
    return state


def plain_of(value: Any, depth: int = 0) -> Any:
    """A configuration as dicts, lists and scalars, whatever class it was saved as (a dataclass, OmegaConf's containers)."""
    require(depth < 32, "a configuration that is nested too deeply")
    if isinstance(value, Stub):
        for name in ("_content", "_val"):  # OmegaConf's containers and leaves
            inner = value.attribute(name)
            if inner is not None:
                return plain_of(inner, depth + 1)
        states = value.state if isinstance(value.state, tuple) else (value.state,)
        return {k: plain_of(v, depth + 1) for state in states if isinstance(state, dict) for k, v in state.items() if isinstance(k, str)}
    if isinstance(value, dict):
        return {k: plain_of(v, depth + 1) for k, v in value.items() if isinstance(k, str)}
    if isinstance(value, (list, tuple)):
        return [plain_of(v, depth + 1) for v in value]
    return value


def unreadable(error: WslfastError) -> str:
    """The error's words without the path it begins with."""
    return str(error).partition(": ")[2] or str(error)
