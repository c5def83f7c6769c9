"""Zoos pickled whole: the published ``dataset_{train,val,test}.pt``, a Dataset object with its models inside.

The object's class is not needed: a stub with its attributes is read (``inert.py``). ``data`` holds models of epochs, each a state
dict or a token matrix; tokens become weights again by the layout of ``reference_checkpoint``'s architecture, and a
standardisation that the object remembers (``layers``) is undone.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...architecture import Architecture
from ...errors import WslfastError, describe, present, require
from ...population import Population
from ...safe.inert import InertFile, Ordered, StoredTensor, Stub
from ...tokens import TokenLayout
from ..manifest import SPLITS
from .checkpoint import Checkpoint, Skips, State, state_of, unreadable
from .recognise import recognise


def files_of(source: Path) -> dict[str, Path]:
    """The pickled data sets at ``source``: a file, or a folder of ``dataset_{split}.pt``; by split ("" for a file of any other name)."""
    if source.is_file():
        split = next((s for s in SPLITS if source.stem.endswith(f"_{s}")), "")
        return {split: source}
    files = {split: source / f"dataset_{split}.pt" for split in SPLITS}
    return {split: file for split, file in files.items() if file.is_file()}


def is_data_set(file: Path) -> bool:
    """Whether a file holds a pickled data set of models, and not one state dict; True for one that cannot be read: its error comes then."""
    if file.suffix not in (".pt", ".pth"):
        return False
    try:
        with InertFile(file) as opened:
            root = opened.root
    except WslfastError:
        return True
    if isinstance(root, Stub):
        return root.attribute("data") is not None
    return isinstance(root, dict) and any(isinstance(root.get(f"{s}set"), Stub) for s in SPLITS)


def checkpoints(
    files: Mapping[str, Path], architecture: Architecture | None, epochs: Collection[int] | None, skips: Skips, seen: set[int]
) -> Iterator[Checkpoint]:
    """Every model and epoch of the data sets, models numbered through; the numbers of all go to ``seen``. Of several files, those that
    cannot be read go to ``skips``."""
    first = 0
    for split, file in files.items():
        try:
            opened = InertFile(file)
        except WslfastError as error:
            if len(files) == 1:
                raise
            skips.add(file.name, "unreadable data set", unreadable(error))
            continue
        with opened:
            try:
                named = _datasets(opened.root, split)
                sets = [(name, _Models.of(stub, f"{file.name}{f'[{name}]' if name else ''}", architecture)) for name, stub in named]
            except WslfastError as error:
                if len(files) == 1:
                    raise
                skips.add(file.name, "unreadable data set", str(error))
                continue
            for name, models in sets:
                numbers = models.numbers()
                seen.update(first + n for n in numbers)
                yield from models.checkpoints(first, numbers, name if name in SPLITS else split or None, epochs, skips)
                first += max(numbers) + 1


def _datasets(root: Any, split: str) -> list[tuple[str, Stub]]:
    """The data sets of a file: the object itself, or a dict of ``trainset``, ``valset``, ``testset``."""
    if isinstance(root, Stub):
        return [(split, root)]
    require(isinstance(root, dict), "expected a pickled data set of models")
    named = [(s, root[f"{s}set"]) for s in SPLITS if isinstance(root.get(f"{s}set"), Stub)]
    require(bool(named), f"expected a pickled data set of models, got a dict of {[str(k)[:20] for k in list(root)[:5]]}")
    return named


@dataclass
class _Models:
    """The models of one data set object."""

    where: str
    data: list[Any]
    stub: Stub
    config: Mapping[str, Any]
    architecture: Architecture
    layout: TokenLayout | None

    @classmethod
    def of(cls, stub: Stub, where: str, architecture: Architecture | None) -> _Models:
        data = stub.attribute("data")
        require(isinstance(data, list) and len(data) > 0, f"{where}: {stub!r} has no list of models named data")
        config = stub.attribute("reference_config")
        config = config if isinstance(config, dict) else {}
        if architecture is None:
            stored = stub.attribute("reference_checkpoint")
            stored = stored if isinstance(stored, dict) else next((m for m in _flat(data) if isinstance(m, dict)), None)
            reference = present(stored, f"{where}: no reference_checkpoint says what the tokens are of; pass the architecture")
            shapes = {str(k): tuple(v.shape) for k, v in reference.items() if isinstance(v, StoredTensor)}
            architecture = recognise(config, shapes)
        tokens = next((m for m in _flat(data) if isinstance(m, StoredTensor)), None)
        layout = None
        if tokens is not None:
            require(len(tokens.shape) == 2, f"{where}: expected tokens [T, D], got {list(tokens.shape)}")
            ignore = stub.attribute("ignore_bn", False) is True
            layout = TokenLayout(architecture, int(tokens.shape[1]), ignore_bn=ignore)
            require(layout.complete, f"{where}: its tokens leave batch norm out; such models cannot be rebuilt")
        return cls(where, data, stub, config, architecture, layout)

    def numbers(self) -> list[int]:
        """The model that each entry of ``data`` is of: itself, or, in a flat list of checkpoints, the one its label or path names."""
        if any(isinstance(model, list) for model in self.data):
            return list(range(len(self.data)))
        labels, paths = self.stub.attribute("labels"), self.stub.attribute("paths")
        names = [_model_of(_at(labels, j, 0)) or _model_of(_at(paths, j, 0)) or j for j in range(len(self.data))]
        order = {name: number for number, name in enumerate(dict.fromkeys(names))}
        return [order[name] for name in names]

    def checkpoints(
        self, first: int, numbers: list[int], split: str | None, epochs: Collection[int] | None, skips: Skips
    ) -> Iterator[Checkpoint]:
        restore = self._standardisation()
        if not self._stated():
            skips.add(self.where, "epochs not stated", "a model's checkpoints are counted from 0 as they come")
        for j, model in enumerate(self.data):
            rows = model if isinstance(model, list) else [model]
            for e, row in enumerate(rows):
                epoch, place = self._epoch(j, e, len(rows))
                where = f"{self.where} model {j} epoch {e if epoch is None else epoch}"
                if epoch is None:
                    skips.add(where, "epoch unknown", "as many epochs as checkpoints are not there, and no labels say which is which")
                    continue
                if epochs is not None and epoch not in epochs:
                    continue
                known, unknown = self._properties(j, place, len(rows))
                why = f"properties of other epochs, or lists of other lengths: {', '.join(unknown)}" if unknown else ""
                config = {**self.config, **{key: known[key] for key in ("model::nlin",) if key in known}}  # the model's own
                yield Checkpoint(where, first + numbers[j], epoch, known, config, partial(self._read, row, restore), split, why)

    def _epoch(self, j: int, e: int, count: int) -> tuple[int | None, int | None]:
        """The epoch of a model's e-th checkpoint and its place among the properties, None where not known.

        The published class drops epoch 0 from ``epochs``, and reads properties for what is left; labels (``PATH#_#epoch_0``) keep it.
        It takes lines of ``result.json`` by their place, which is another epoch's line where a run began again; where the property
        ``training_iteration`` says so, that counts.
        """
        mine, label, recorded = self._listed(j), _at(self.stub.attribute("labels"), j, e), self._recorded(j)
        said = re.search(r"#_#epoch_(\d{1,9})$", label) if isinstance(label, str) else None
        if said:
            epoch = int(said[1])
        elif isinstance(mine, list):
            if len(mine) != count or type(mine[e]) is not int:
                return None, None
            epoch = mine[e]
        elif type(mine) is int:
            epoch = mine
        else:
            epoch = recorded[e] if recorded is not None and len(recorded) == count else e
        numbers = mine if recorded is None else recorded
        if not isinstance(numbers, list):
            return epoch, e
        return epoch, max((place for place, number in enumerate(numbers) if number == epoch), default=None)

    @property
    def _table(self) -> Mapping[Any, Any]:
        """The properties: columns of models of epochs."""
        table = self.stub.attribute("properties")
        return table if isinstance(table, dict) else {}

    def _listed(self, j: int) -> Any:
        """A model's entry of ``epochs``, or None."""
        listed = self.stub.attribute("epochs")
        return listed[j] if isinstance(listed, list) and j < len(listed) else None

    def _recorded(self, j: int) -> list[Any] | None:
        """The training iterations that a model's properties are of, where they say so."""
        column = self._table.get("training_iteration")
        epochs = column[j] if isinstance(column, list) and len(column) == len(self.data) else None
        epochs = [epochs] if type(epochs) is int else epochs
        return epochs if isinstance(epochs, list) and len(epochs) > 0 and all(type(n) is int for n in epochs) else None

    def _stated(self) -> bool:
        """Whether anything says which epochs the checkpoints are of."""
        lists = (self.stub.attribute("epochs"), self.stub.attribute("labels"), self._table.get("training_iteration"))
        return any(isinstance(entries, list) for entries in lists)

    def _properties(self, j: int, place: int | None, count: int) -> tuple[dict[str, Any], list[str]]:
        """What is known of a model's checkpoint at a place of its lists, and the columns whose lists do not say.

        Settings (``model::nlin``, ``optim::lr``) are those of the whole model, wherever in its list they are.
        """
        short = {"model::init_type": "init_type", "optim::lr": "lr", "optim::wd": "wd", "training_iteration": None}
        properties: dict[str, Any] = {}
        unknown: list[str] = []
        length = next((len(numbers) for numbers in (self._recorded(j), self._listed(j)) if isinstance(numbers, list)), count)
        for key, column in self._table.items():
            if not isinstance(key, str) or not isinstance(column, list):
                continue
            values = column[j] if len(column) == len(self.data) else []
            if "::" in key:
                value = _at(column, j, 0) if len(column) == len(self.data) else None
            elif place is None or (isinstance(values, list) and len(values) != length):
                unknown.append(key)
                continue
            else:
                value = _at(column, j, place)
            name = short.get(key, key)
            if isinstance(name, str) and isinstance(value, (int, float, str)) and not isinstance(value, bool):
                properties[name] = value
        return properties, unknown

    def _standardisation(self) -> tuple[Tensor, Tensor] | None:
        """``scale, shift`` of a row of weights that undo the data set's, or None."""
        kind = self.stub.attribute("standardize", False)
        if kind is False or kind is None:
            return None
        layers = self.stub.attribute("layers")
        usable = kind in (True, "minmax") and isinstance(layers, dict)
        require(usable, f"{self.where}: standardised as {describe(kind)}, which forgets the weights' size; such models cannot be rebuilt")
        scale, shift = (torch.full((self.architecture.num_weights,), value, dtype=torch.float32) for value in (1.0, 0.0))
        for key, figures in layers.items():
            names = (key, key.replace("weight", "bias")) if isinstance(key, str) else ("", "")
            for slot in (self.architecture.slots[n] for n in dict.fromkeys(names) if n in self.architecture.slots):
                a, b, twice = _affine(figures, f"{self.where}: layers[{key!r:.40}]")
                if twice and names[0] == names[1]:
                    # the published class standardises weight and bias of a key; for running statistics both are the key itself
                    a, b = a * a, b * a + b
                scale[slot.offset : slot.stop], shift[slot.offset : slot.stop] = a, b
        return scale, shift

    def _read(self, row: Any, restore: tuple[Tensor, Tensor] | None) -> State:
        if isinstance(row, StoredTensor):
            wrong = f"expected tokens, got {list(row.shape)}"
            layout = present(self.layout, wrong)
            require(row.shape == tuple(layout.mask.shape), wrong)
            weights = layout.detokenize(row.tensor().float().unsqueeze(0))
            if restore is None:
                return Population(self.architecture, weights).state_dict(0)
        else:
            state = state_of(row)
            if restore is None:
                return state
            weights = Population.from_state_dicts(self.architecture, [state]).weights
        return Population(self.architecture, weights * restore[0] + restore[1]).state_dict(0)


def _affine(figures: Any, where: str) -> tuple[float, float, bool]:
    """Scale and shift that undo one layer's standardisation, and whether it is the kind that visits a key and then its bias."""
    values = {k: v for k, v in figures.items() if isinstance(v, (int, float))} if isinstance(figures, (dict, Ordered)) else {}
    if {"mean", "std"} <= set(values):
        return float(values["std"]), float(values["mean"]), True
    if {"min", "max"} <= set(values):
        half = (values["max"] - values["min"]) / 2
        return float(half), float(values["min"] + half), False
    raise WslfastError(f"{where}: expected mean and std, or min and max")


def _flat(data: list[Any]) -> Iterator[Any]:
    for model in data:
        yield from model if isinstance(model, list) else [model]


def _model_of(name: Any) -> str | None:
    """The path in a label ``PATH#_#epoch_5``, or a path itself (pickled as its parts)."""
    if isinstance(name, Stub):
        name = "/".join(part for part in name.arguments if isinstance(part, str))
    return name.partition("#_#")[0] or None if isinstance(name, str) else None


def _at(table: Any, j: int, e: int) -> Any:
    """``table[j][e]``, ``table[j]``, or None."""
    row = table[j] if isinstance(table, list) and j < len(table) else None
    if isinstance(row, list):
        row = row[e] if e < len(row) else None
    return row.tensor().item() if isinstance(row, StoredTensor) and row.shape == () else row
