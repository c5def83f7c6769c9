"""What every importer yields: checkpoints that can be read one at a time, and what was left out and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ...errors import WslfastError, require
from ...safe.inert import StoredTensor

State = Mapping[str, Tensor]
UNKNOWN = "no matching results"


@dataclass(frozen=True)
class Found:
    """A checkpoint: where it is, which model's and of which epoch, what is known about it, and how to read its weights.

    ``unknown`` says why nothing tells which results are its own.
    """

    where: str
    model: int
    epoch: int
    properties: Mapping[str, Any]
    config: Mapping[str, Any]
    read: Callable[[], State]
    split: str | None = None
    unknown: str = ""


@dataclass
class Skips:
    """What was left out: ``{"where", "reason", "detail"}`` each. A second pass over the same source notes nothing twice."""

    entries: list[dict[str, str]] = field(default_factory=list)

    def add(self, where: str, reason: str, detail: str = "") -> None:
        entry = {"where": where, "reason": reason, "detail": detail[:300]}
        if entry not in self.entries[-8:] or where not in self._known:
            self.entries.append(entry)
            self._known.add(where)

    _known: set[str] = field(default_factory=set)

    def counts(self) -> dict[str, int]:
        """How many for each reason, most frequent first."""
        return dict(Counter(entry["reason"] for entry in self.entries).most_common())


def state_of(value: Any) -> State:
    """A state dict from what a file holds. Raises WslfastError if it is none."""
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


def unreadable(error: WslfastError) -> str:
    """The error's words without the path it begins with."""
    return str(error).partition(": ")[2] or str(error)
