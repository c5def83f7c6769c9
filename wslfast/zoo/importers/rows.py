"""The checkpoints of a source as rows of a zoo: which architecture each is of, what is left out, one shard in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Union

import torch
from torch import Tensor

from ...architecture import Architecture
from ...errors import WslfastError, require
from ...population import Population
from ..identical import Identical, digest
from ..manifest import KIND, Kind, normalised, plain
from ..store import SHARD_BYTES
from .checkpoint import UNKNOWN, UNTOLD, Checkpoint, Skips, State, unreadable, written
from .recognise import activations, contradiction, fits, recognise

IDENTICAL = "identical weights"
ANOTHER = "another architecture"
Reader = Callable[[Skips, set[int]], Iterator[Checkpoint]]


class Rows:
    """The source's checkpoints in shards, one in memory at a time; every pass over it reads the source again.

    Args:
        read: yields the checkpoints, notes what is left out, and adds the number of every model that is there to a set.
        architecture: what the models are; None recognises each, and several make a zoo of several architectures.
        threshold: a checkpoint with a larger weight is left out.
        stated: the activation of the first trial that states one, for those that do not.
    """

    def __init__(self, read: Reader, architecture: Architecture | None, threshold: float, stated: Callable[[], Any] = lambda: None) -> None:
        self._read, self._given, self._threshold, self._stated = read, architecture, threshold, stated
        self._guess: str | None = None  # where an architecture was recognised, if its activation is a guess
        self._known: list[Architecture] = [] if architecture is None else [architecture]
        self._begin()

    def _begin(self) -> None:
        self.skips = Skips()
        self._note_guess()
        self.seen: set[int] = set()  # models that the source has, whether or not anything of them is kept
        self.models: list[int] = []
        self.epochs: list[int] = []
        self.splits: list[str | None] = []
        self.kinds: list[Architecture] = []  # each row's
        self._properties: list[Mapping[str, Any]] = []
        self.identical = Identical()
        self.repeated = 0  # rows that repeat an earlier epoch of their own model

    def __iter__(self) -> Iterator[Union[Tensor, Sequence[Tensor]]]:
        self._begin()
        waiting: list[Tensor] = []
        labels: dict[int, int] = {}
        once: dict[tuple[int, int], str] = {}  # the file of each epoch of a model, where both are stated
        size = 0
        for checkpoint in self._read(self.skips, self.seen):
            made = self._row(checkpoint)
            if made is None:
                continue
            if checkpoint.once and (earlier := once.setdefault((checkpoint.model, checkpoint.epoch), checkpoint.where)) != checkpoint.where:
                self.skips.add(checkpoint.where, "epoch twice", f"{earlier} is read")
                continue
            architecture, row = made
            # the same numbers under another activation are another network
            key = digest(row) + str(labels.setdefault(id(architecture), len(labels))).encode()
            first = self.identical.add(key, checkpoint.model, checkpoint.epoch, checkpoint.where)
            if first is not None and first.model == checkpoint.model and first.epoch != checkpoint.epoch:
                self.repeated += 1
            elif first is not None:
                self.skips.add(checkpoint.where, IDENTICAL, f"the same as {first.where}")
                continue
            if checkpoint.unknown:
                self.skips.add(checkpoint.where, UNKNOWN, checkpoint.unknown)
            if checkpoint.untold:  # of what is stored: what cannot be read has its own reason, and misses no row
                self.skips.add(checkpoint.where, UNTOLD, checkpoint.untold)
            self.models.append(checkpoint.model)
            self.epochs.append(checkpoint.epoch)
            self.splits.append(checkpoint.split)
            self.kinds.append(architecture)
            self._properties.append({key: written(v) if isinstance(v, str) else v for key, v in checkpoint.properties.items()})
            waiting.append(row)
            size += 4 * len(row)
            if size >= SHARD_BYTES:
                yield _shard(waiting)
                waiting, size = [], 0
        if waiting:
            yield _shard(waiting)

    # -- what is known of the rows -------------------------------------------------------------------------------------

    def numbers(self) -> tuple[int, ...]:
        """The model of every row: one for the copies of a trial, unless two of them differ at one epoch."""
        epochs: dict[int, list[int]] = {}
        for model, epoch in zip(self.models, self.epochs, strict=True):
            epochs.setdefault(self.identical.family(model), []).append(epoch)
        one = {family for family, own in epochs.items() if len(set(own)) == len(own)}
        return tuple(family if (family := self.identical.family(model)) in one else model for model in self.models)

    def columns(self) -> dict[str, tuple[Any, ...]]:
        """The properties by name, None where a checkpoint lacks one; the label of each row's architecture where there are several."""
        names = dict.fromkeys(name for record in self._properties for name in record if name not in ("model", "epoch", "split"))
        table = {name: tuple(plain(record.get(name), name) for record in self._properties) for name in names}
        table = {name: column for name, column in table.items() if any(value is not None for value in column)}
        labels = self._labels()
        if len(labels) > 1:
            if KIND in table:  # the source's own column of that name
                table[f"{KIND}_stated"] = table.pop(KIND)
            table = {KIND: tuple(labels[id(kind)] for kind in self.kinds), **table}
        return table

    def table(self) -> dict[str, Kind]:
        """The architectures by label, as the manifest has them."""
        by_id = {id(kind): kind for kind in self.kinds}
        return {label: Kind(normalised(by_id[i].to_dict(), "architecture"), by_id[i].num_weights) for i, label in self._labels().items()}

    @property
    def architectures(self) -> list[Architecture]:
        """Those that rows are of, in the order in which they came."""
        return list({id(kind): kind for kind in self.kinds}.values())

    def _labels(self) -> dict[int, str]:
        """What each architecture is called, by its identity: its name, with its activation or a number where several share one."""
        every = self.architectures
        names: dict[str, int] = {}
        labels: dict[int, str] = {}
        several = {a.name for a in every if sum(b.name == a.name for b in every) > 1}
        for kind in every:
            name = " ".join((kind.name, *used)) if kind.name in several and (used := activations(kind)) else kind.name
            names[name] = names.get(name, 0) + 1
            labels[id(kind)] = name if names[name] == 1 else f"{name} ({names[name]})"
        return labels

    # -- one checkpoint ------------------------------------------------------------------------------------------------

    def _row(self, checkpoint: Checkpoint) -> tuple[Architecture, Tensor] | None:
        """The checkpoint's architecture and its weights ``[P]``, or None and a note why not."""
        try:
            state = checkpoint.read()
            shapes = {name: tuple(value.shape) for name, value in state.items()}
            architecture = checkpoint.architecture or self._architecture(checkpoint, shapes)
            if architecture is None:
                return None
            row = weights_of(architecture, state)
        except WslfastError as error:
            self.skips.add(checkpoint.where, "unreadable checkpoint", unreadable(error))
            return None
        if not bool(row.isfinite().all()):
            self.skips.add(checkpoint.where, "not finite")
            return None
        if float(row.abs().max()) > self._threshold:
            self.skips.add(checkpoint.where, "weight above threshold", f"{float(row.abs().max()):g} > {self._threshold:g}")
            return None
        return architecture, row

    def _architecture(self, checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]]) -> Architecture | None:
        """One of those that are known already, or a new one; None, and a note, where it is none."""
        wrong = "other names or shapes of weights"
        settings = self._settings(checkpoint)
        for kind in self._known:
            if fits(kind, shapes):
                differs = contradiction(kind, checkpoint.config)
                if differs is None:
                    return kind
                wrong = differs
        if self._given is not None:
            self.skips.add(checkpoint.where, ANOTHER, wrong if wrong.startswith("expected") else f"expected {self._given.name!r}")
            return None
        try:
            kind = recognise(settings, shapes)
        except WslfastError as error:
            if not self._known:
                raise
            self.skips.add(checkpoint.where, ANOTHER, str(error))
            return None
        if "model::nlin" not in settings and self._guess is None:
            self._guess = checkpoint.where
            self._note_guess()
        self._known.append(kind)
        return kind

    def _settings(self, checkpoint: Checkpoint) -> Mapping[str, Any]:
        """A trial's settings; if they do not state the activation, with that of the first trial that does."""
        if "model::nlin" in checkpoint.config:
            return checkpoint.config
        others = self._stated()
        return {**checkpoint.config, **({} if others is None else {"model::nlin": others})}

    def _note_guess(self) -> None:
        if self._guess is not None:
            self.skips.add(self._guess, "activation not stated", "taken for the default; pass the architecture if it is another")


def _shard(rows: list[Tensor]) -> Union[Tensor, Sequence[Tensor]]:
    return torch.stack(rows) if len({len(row) for row in rows}) == 1 else list(rows)


def weights_of(architecture: Architecture, state: State) -> Tensor:
    """A checkpoint's weights ``[P]``. Raises WslfastError for names or shapes that are not the architecture's."""
    for name, value in state.items():
        whole = name.endswith("num_batches_tracked") or name in architecture.constants
        require(whole or value.is_floating_point(), "weights that are not floating-point numbers")
    return Population.from_state_dicts(architecture, [state]).weights[0]
