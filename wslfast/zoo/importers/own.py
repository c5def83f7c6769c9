"""A user's own networks: a folder of state dicts, and a table of what is known of each. The files of the weights are read and never run
(``safe/inert.py``); the module that they are of is named (``network_files.py``)."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ...architecture import Architecture
from ...errors import WslfastError, require
from ...tracing import effective_state
from ..arrays import SETS
from ..manifest import KIND, SPLITS, plain
from .checkpoint import NAMED_EPOCH, Checkpoint, Skips, State, held, unreadable
from .files import load, name_of, state_files
from .recognise import fits
from .tables import read_table

INDEX = "index.json"  # of zoo export --format state-dicts
_CALLED = {
    **{split: split for split in SPLITS},
    **SETS,
    "training": "train",
    "testing": "test",
    "valid": "val",
    "validation": "val",
    "dev": "val",
}
_RESERVED = ("model", "epoch", "split", "file")  # columns of a table that are no properties
_FIGURE = re.compile(r"(?:(?:train|val|test)_)?(?:acc|accuracy|loss)", re.IGNORECASE)  # columns of numbers
_EPOCH = re.compile(r"[ _.-]?(?<![a-z])ep(?:och)?[ _=-]?(\d+)(?![a-z\d])", re.IGNORECASE)
_BESIDE = re.compile(r"[ _-](?:[a-z]+_)?(?:step|loss|acc|accuracy)[ _=-]?\d+(?:\.\d+)?(?!\d)", re.IGNORECASE)  # of a trainer


# -- the networks' files -----------------------------------------------------------------------------------------------


@dataclass
class Table:
    """What is known of each file, by what the table's column ``file`` calls it."""

    rows: Mapping[str, Mapping[str, Any]]
    where: str = ""

    @classmethod
    def read(cls, path: str | Path | None) -> Table:
        """The table of a CSV file; an empty one of None."""
        if path is None:
            return cls({})
        lines = read_table(path, text=("file",))
        names = list(lines[0]) if lines else []
        require("file" in names, f"table: {path}: expected a column 'file' with the names of the models' files, got {names[:12]}")
        keys = [_key(line["file"]) if line.get("file") else f"line {number}" for number, line in enumerate(lines, 2)]
        twice = sorted({key for key in keys if keys.count(key) > 1}) if len(set(keys)) < len(keys) else []
        require(not twice, f"table: {path}: files that are there twice: {twice[:4]}")
        for number, line in enumerate(lines, 2):
            if line.get("split") is not None:
                line["split"] = _split(line["split"], f"table: {path}: line {number}: split")
            for name in filter(_FIGURE.fullmatch, line):
                text = isinstance(line[name], str)
                require(not text, f"table: {path}: line {number}: {name}: expected a number such as 0.855, got {line[name]!r:.40}")
        return cls(dict(zip(keys, lines, strict=True)), str(path))

    def of(self, file: Path, source: Path) -> tuple[str, Mapping[str, Any]] | None:
        """The row of a file, by its path below the source, its name, or either without the ending; and how it is called there."""
        whole = file.name if source.is_file() else file.relative_to(source).as_posix()
        ending = file.name.removeprefix(name_of(file))
        for key in (whole, file.name, str(file)):
            forms = dict.fromkeys((key, key.removesuffix(file.suffix), key.removesuffix(ending)))
            there = [form for form in forms if form in self.rows]
            require(len(there) < 2, f"table: {self.where}: several rows are of the file {whole}: {', '.join(there)}")
            if there:
                return there[0], self.rows[there[0]]
        return None

    def under(self, *names: str) -> tuple[str, Mapping[str, Any]] | None:
        """The row that is called one of these, and how it is called."""
        return next(((name, self.rows[name]) for name in names if name in self.rows), None)

    def without(self, column: str) -> Table:
        """The table without a column."""
        return Table({key: {n: v for n, v in row.items() if n != column} for key, row in self.rows.items()}, self.where)

    def refused(self, what: str) -> None:
        """Raise WslfastError if there is a table: ``what`` knows everything of its models itself."""
        require(not self.where, f"table: expected none beside {what}, which has its own; got {self.where}")

    def unused(self, used: Collection[str], source: Path, skips: Skips) -> None:
        """Note the rows that no network was found for."""
        for name in self.rows:
            if name not in used:
                named = (
                    f"{self.where} names it, and it is not in {source}" if self.rows[name].get("file") else f"{self.where} names none there"
                )
                skips.add(name, "no file", named)


def _split(stated: Any, where: str) -> str:
    """One of the three splits, by whatever usual name and in whatever case."""
    name = str(stated).lower()
    require(name in _CALLED, f"{where}: expected one of {', '.join(SPLITS)}, got {stated!r:.40}")
    return _CALLED[name]


def _key(name: str) -> str:
    return Path(name.strip()).as_posix()


def checkpoints(
    source: Path,
    networks: Sequence[tuple[str, Architecture]],
    table: Table,
    epochs: Collection[int] | None,
    skips: Skips,
    seen: set[int],
) -> Iterator[Checkpoint]:
    """The networks of a folder, one per file, in order of names; a table's columns ``model``, ``epoch`` and ``split`` are what they say.
    Files whose names differ in their epoch alone (``m0_epoch3.pt``, ``m0/epoch=3.ckpt``) are of one model, unless they say another.

    Args:
        networks: what they may be of, by the names they were given; the table's column ``network`` chooses, else the first that fits.
            None: each is recognised by its names and shapes.
        table: what is known of each.
    """
    files = state_files(source, skips)
    models: dict[Any, int] = {}
    used: set[str] = set()
    named: set[tuple[str, int | None]] = set()
    for file in files:
        where = file.name if source.is_file() else str(file.relative_to(source))
        row = table.of(file, source)
        if row is not None:
            used.add(row[0])
        untold = f"{table.where} has no row for it; what is known of it is empty" if row is None and table.rows else ""
        facts = dict(row[1]) if row is not None else {}
        name, named_epoch = _of_epoch(where)
        key = file if named_epoch is None or (name, named_epoch) in named else name
        named.add((name, named_epoch))
        try:
            loaded = load(file)
        except WslfastError as error:
            seen.add(models.setdefault(key, len(models)))
            skips.add(where, "unreadable checkpoint", unreadable(error))
            continue
        beside = {name: value for name, value in loaded.beside.items() if name not in facts and name not in ("model", "split", "name")}
        facts = {**beside, **facts}
        stated, (state, chosen, reason) = facts.get("model"), _of(loaded.state, networks, facts)
        # models may be numbered anew for each network
        model = models.setdefault(key if stated is None else (chosen, stated), len(models))
        seen.add(model)
        epoch = facts.get("epoch", named_epoch)
        if named_epoch is not None and "epoch" not in facts:
            skips.add(where, NAMED_EPOCH, f"epoch {named_epoch} of {name}")
        if isinstance(epoch, float) and epoch.is_integer():
            epoch = int(epoch)
        if epoch is not None and (type(epoch) is not int or epoch < 0):
            skips.add(where, "epoch unknown", f"expected a whole number, got {epoch!r:.40}")
            continue
        if epochs is not None and (epoch or 0) not in epochs:
            continue
        split = facts.get("split") if facts.get("split") in SPLITS else None  # an index may hold anything
        properties = {"name": name_of(file), **{k: plain(v, k) for k, v in facts.items() if k not in _RESERVED}}
        if len(networks) > 1 and properties.pop("network", None) == properties.get(KIND):
            properties.pop(KIND, None)  # the zoo has that column of its own
        if stated is not None and type(stated) is not int:
            properties["model_name"] = stated
        if not source.is_file() and file.parent != source:
            properties.setdefault("folder", file.parent.relative_to(source).as_posix())
        if reason:
            skips.add(where, "another architecture", reason)
            continue
        once = stated is not None and epoch is not None
        yield Checkpoint(where, model, epoch or 0, properties, {}, held(state), split, untold=untold, architecture=chosen, once=once)
    table.unused(used, source, skips)


def _of(state: State, networks: Sequence[tuple[str, Architecture]], facts: Mapping[str, Any]) -> tuple[State, Architecture | None, str]:
    """A file's entries, the network that they are of where some were named, and why it is none of these."""
    if not networks:
        return state, None, ""
    try:
        return *_chosen(state, networks, facts.get("network")), ""
    except WslfastError as error:
        return state, None, str(error)


def _of_epoch(where: str) -> tuple[str, int | None]:
    """A file's path without the epoch in it, and that epoch; None where it names none."""
    found = list(_EPOCH.finditer(where))
    if not found:
        return where, None
    return _BESIDE.sub("", where[: found[-1].start()] + where[found[-1].end() :]), int(found[-1][1])


def of_trials(
    trials: Iterator[Checkpoint], networks: Sequence[tuple[str, Architecture]], table: Table, source: Path, skips: Skips
) -> Iterator[Checkpoint]:
    """Checkpoints of trials with what a table knows of each besides (its column ``file`` has the folder of the trial, or that of the
    checkpoint), and of the networks that were named, where some were."""
    used: set[str] = set()
    for checkpoint in trials:
        trial = checkpoint.where.rpartition("/")[0]
        row = table.under(checkpoint.where, trial, trial.rpartition("/")[2])
        properties = dict(row[1]) if row is not None else {}
        if row is not None:
            used.add(row[0])
        untold = f"{table.where} has no row for it" if row is None and table.rows else ""
        further = {k: plain(v, k) for k, v in properties.items() if k not in _RESERVED and k != "network"}
        split = properties["split"] if properties.get("split") in SPLITS else checkpoint.split
        checkpoint = replace(checkpoint, properties={**checkpoint.properties, **further}, split=split, untold=untold)
        if not networks:
            yield checkpoint
            continue
        try:
            state = checkpoint.read()
        except WslfastError:
            yield checkpoint  # read once more where what is wrong with it is noted
            continue
        state, architecture, reason = _of(state, networks, properties)
        if reason:
            skips.add(checkpoint.where, "another architecture", reason)
            continue
        yield replace(checkpoint, read=held(state), architecture=architecture)
    table.unused(used, source, skips)


def _chosen(entries: State, networks: Sequence[tuple[str, Architecture]], named: Any) -> tuple[State, Architecture]:
    """The architecture that a checkpoint is of, and its entries under that one's names."""
    candidates = [(name, arch) for name, arch in networks if named in (None, name)]
    require(bool(candidates), f"its network is {named!r}, expected one of {[name for name, _ in networks]}")
    for _, architecture in candidates:
        state = effective_state(_without_prefix(entries, architecture), architecture.known)
        if _is_of(state, architecture):
            return state, architecture
    for _, architecture in candidates:
        inner = _among_others(entries, architecture)
        if inner is not None:
            return inner, architecture
    raise WslfastError(_difference(entries, candidates[0][1]))


def _is_of(state: State, architecture: Architecture) -> bool:
    return fits(architecture, {name: tuple(value.shape) for name, value in state.items() if name not in architecture.constants})


def _among_others(state: State, architecture: Architecture) -> State | None:
    """The network's entries where a trainer has more beside them (Lightning: ``model.``, and the weights of its loss); None where it has
    none. Raises WslfastError where it has several networks (an average beside the weights), and nothing says which counts."""
    heads = dict.fromkeys(name[: at + 1] for name in state for at, letter in enumerate(name) if letter == ".")
    found: dict[str, State] = {}
    for head in heads:
        if not any(head.startswith(outer) for outer in found):
            inner = {name.removeprefix(head): value for name, value in state.items() if name.startswith(head)}
            inner = effective_state(inner, architecture.known)
            if _is_of(inner, architecture):
                found[head] = inner
    first = next(iter(found.values()), None)
    alike = first is None or all(torch.equal(one[s.name], first[s.name]) for one in found.values() for s in architecture.parameters)
    names = [head.rstrip(".") for head in found]
    require(alike, f"it has several networks of these names and shapes, {names[:4]}; save the one that counts alone")
    return first


def _without_prefix(state: State, architecture: Architecture) -> State:
    """The entries without what a wrapper (``model.``, ``net.``) put before all names, if that makes them the network's."""
    current = dict(state)
    for _ in range(8):
        if any(name in architecture.known for name in effective_state(current, architecture.known)):
            return current
        heads = {name.partition(".")[0] for name in current}
        if len(heads) != 1 or not all("." in name for name in current):
            return state
        current = {name.partition(".")[2]: value for name, value in current.items()}
    return state


def _difference(state: State, architecture: Architecture) -> str:
    """How a checkpoint differs from the network, in words."""
    wanted = {slot.name: slot.shape for slot in architecture.parameters}
    held = {name: tuple(value.shape) for name, value in effective_state(_without_prefix(state, architecture), architecture.known).items()}
    lacks = [name for name in wanted if name not in held]
    extra = [name for name in held if name not in architecture.known and not name.endswith("num_batches_tracked")]
    other = [f"{name} is {list(held[name])}, expected {list(shape)}" for name, shape in wanted.items() if held.get(name, shape) != shape]
    parts = [f"it lacks {lacks[:3]}"] if lacks else []
    parts += [f"it has {extra[:3]} beside"] if extra else []
    return "; ".join([*parts, *other[:3]]) or f"expected {architecture.name!r}"


# -- what zoo export wrote ---------------------------------------------------------------------------------------------


def is_exported(source: Path) -> bool:
    """Whether the folder is one that ``zoo export --format state-dicts`` wrote."""
    return source.is_dir() and (source / INDEX).is_file()


def exported(source: Path) -> tuple[list[tuple[str, Architecture]], Table]:
    """The architectures and the table of an exported folder. Raises WslfastError for an index that is not one of ours."""
    file = source / INDEX
    try:
        record = json.loads(file.read_text("utf-8-sig"))
        several = record.get("architectures") or {str(record["architecture"].get("name")): record["architecture"]}
        rows = record["checkpoints"]
        table = Table({_key(row["file"]): row for row in rows}, str(file))
        made = [(label, Architecture.from_dict(kind)) for label, kind in several.items()]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise WslfastError(f"{file}: not an index that zoo export wrote: {error}") from None
    if len(made) > 1:
        table = Table({key: {**row, "network": row.get("architecture")} for key, row in table.rows.items()}, str(file))
    return made, table
