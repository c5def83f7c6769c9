"""Zoos as ray tune left them: one folder per model with ``params.json``, ``result.json`` (a JSON object per line) and checkpoints.

A model's folder is any that has ``params.json`` (or ``config.json``), ``result.json`` or a ``checkpoint_*`` folder (published ones are
called ``NN_tune_trainable_*`` or ``tune_zoo_*``); weights are in ``checkpoint_000020/checkpoints``, ``checkpoint_20/checkpoints``, or
``checkpoint.pt`` of the CNN Wild Park (Kofinas et al. 2024: ``{"model", "config", "last_result"}``). Folders are visited in sorted order,
so a zoo is the same on every machine. Links to folders are not followed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from ...architecture import Architecture
from ...errors import WslfastError
from ...safe.inert import InertFile
from ..export import PROPERTIES, RECORD, RESULTS
from ..manifest import SPLITS
from .checkpoint import Checkpoint, Skips, State, folders, listing, plain_of, state_of
from .modules import park_cnn
from .results import match

_CHECKPOINT = re.compile(r"checkpoint_(\d{1,9})")
_TRIAL = "NN_tune_trainable_"
_LARGEST_JSON = 64 << 20
_FILES = ("checkpoints", "checkpoint.pt")  # in a checkpoint's folder
_CONFIGS = ("params.json", "config.json")
_SETTINGS = {  # a property, and the settings that say it, the first that is there
    "init_type": ("model::init_type", "init_type"), "lr": ("optim::lr", "lr", "learning_rate"),
    "wd": ("optim::wd", "optim::weight_decay", "weight_decay", "wd"), "dropout": ("model::dropout", "dropout"), "seed": ("seed",),
}  # fmt: skip


def is_tree(source: Path) -> bool:
    """Whether the folder holds a trial with weights (somewhere)."""
    nothing = Skips()
    return source.is_dir() and any(_weights(folder, "", nothing) for folder in _trials(source, nothing))


def checkpoints(source: Path, epochs: Collection[int] | None, skips: Skips, seen: set[int]) -> Iterator[Checkpoint]:
    """Every checkpoint of every trial, in order of folders and epochs; ``epochs`` keeps some. What is missing goes to ``skips``, the
    numbers of all trials to ``seen``."""
    for model, folder in enumerate(_trials(source, skips)):
        seen.add(model)
        where = str(folder.relative_to(source)) if folder != source else folder.name
        config = _config(folder, where, skips)
        lines = _lines(folder, where, skips)
        repeated = (line["config"] for line in reversed(lines or []) if isinstance(line.get("config"), dict))
        config = config or next(repeated, {})  # ray repeats it in every line; the last run's counts
        matched, left = match(lines or [], _weights(folder, where, skips))
        for file, reason, detail in left:
            skips.add(f"{where}/{file.parent.name}", reason, detail)
        if not matched and not left:
            skips.add(where, "no checkpoints")
        wanted = sorted(matched) if epochs is None else sorted(epochs)
        for epoch in wanted:
            at = f"{where}/checkpoint_{epoch:06d}"
            if epoch not in matched:
                if matched:
                    skips.add(at, "epoch missing")
                continue
            file, line, why = matched[epoch]
            properties = {"name": folder.name, **_properties(config, line or {})}
            unknown = why if line is None and lines is not None else ""
            kind, beside = _park(file) if file.name == "checkpoint.pt" else (_recorded(config), {})
            properties |= {name: value for name, value in beside.items() if properties.get(name) is None}
            split = properties.pop("split", None)  # a zoo export writes it
            split = split if split in SPLITS else None
            yield Checkpoint(at, model, epoch, properties, config, partial(_read, file), split, "" if beside else unknown, kind)


def _recorded(config: Mapping[str, Any]) -> Architecture | None:
    """The network that an export of ours wrote down among the settings; None where there is none, or none that can be rebuilt."""
    record = config.get(RECORD)
    if not isinstance(record, dict):
        return None
    try:
        return _rebuilt(json.dumps(record))
    except WslfastError:
        return None


@lru_cache(maxsize=64)
def _rebuilt(record: str) -> Architecture:
    return Architecture.from_dict(json.loads(record))


def _park(file: Path) -> tuple[Architecture | None, dict[str, Any]]:
    """What a checkpoint of the Wild Park says itself: its network, and its last results. Nothing where it cannot be read, which reading its
    weights will say."""
    try:
        with InertFile(file) as opened:
            root = opened.root if isinstance(opened.root, dict) else {}
            config, last = plain_of(root.get("config")), plain_of(root.get("last_result"))
            results = _properties({}, last) if isinstance(last, dict) else {}
            config = config["model"] if isinstance(config, dict) and isinstance(config.get("model"), dict) else config
            properties = {name: value for name, value in results.items() if value is not None}
            return (park_cnn(config) if config else None), properties
    except WslfastError:
        return None, {}


def stated(source: Path, key: str) -> Any:
    """The first value of a setting that a trial's ``params.json`` states, or None."""
    nothing = Skips()
    return next((value for folder in _trials(source, nothing) if (value := _config(folder, "", nothing).get(key)) is not None), None)


def _weights(folder: Path, where: str, skips: Skips) -> dict[int, Path]:
    """Files of weights in a trial's folder by epoch."""
    files: dict[int, Path] = {}
    # shorter names first: where both exist, the published loaders take checkpoint_20 before checkpoint_000020
    for name in sorted(listing(folder, where, skips), key=lambda n: (len(n), n)):
        match = _CHECKPOINT.fullmatch(name)
        if match is None:
            if name.startswith("checkpoint_") and (folder / name).is_dir():
                skips.add(f"{where}/{name}", "not an epoch", "expected checkpoint_ and a number of up to nine digits")
            continue
        file = next((folder / name / kind for kind in _FILES if (folder / name / kind).is_file()), folder / name / _FILES[0])
        if file.is_file() and int(match[1]) in files:
            skips.add(f"{where}/{name}", "epoch twice", f"{files[int(match[1])].parent.name} is read")
        elif file.is_file():
            files[int(match[1])] = file
        else:
            skips.add(f"{where}/{name}", "no weights", "expected a file named checkpoints")
    return files


def _is_trial(names: Collection[str]) -> bool:
    return _is_leaf(names) or bool({*_CONFIGS} & set(names))


def _is_leaf(names: Collection[str]) -> bool:
    """Whether a folder is a trial whatever lies below it. One with settings alone may be the root of a zoo, whose ``config.json`` is the
    grid that its trials were drawn from."""
    return "result.json" in names or any(_CHECKPOINT.fullmatch(n) for n in names)


def _trials(source: Path, skips: Skips) -> Iterator[Path]:
    nothing = Skips()
    for folder, names, below in folders(source, skips, _is_leaf):
        if _is_leaf(names) or (_is_trial(names) and not any(_is_trial(listing(path, "", nothing)) for path in below)):
            yield folder
        elif not below and folder.name.startswith(_TRIAL):
            skips.add(str(folder.relative_to(source)), "no checkpoints", "an empty trial")


def _read(file: Path) -> State:
    with InertFile(file) as opened:
        return state_of(opened.root)


def _json(file: Path) -> Any:
    try:
        with open(file, "rb") as opened:
            data = opened.read(_LARGEST_JSON + 1)
        if len(data) > _LARGEST_JSON:
            raise WslfastError(f"larger than {_LARGEST_JSON >> 20} MiB")
        return data.decode("utf-8-sig")  # a byte-order mark is passed over
    except OSError as error:
        raise WslfastError(error.strerror or str(error)) from None
    except UnicodeDecodeError:
        raise WslfastError("not UTF-8") from None


def _object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _config(folder: Path, where: str, skips: Skips) -> dict[str, Any]:
    file = next((folder / name for name in _CONFIGS if (folder / name).exists()), None)
    if file is None:
        skips.add(f"{where}/params.json", "no params.json", "the model is read, its settings are unknown")
        return {}
    try:
        value = _object(_json(file))
    except WslfastError as error:
        skips.add(f"{where}/{file.name}", f"unreadable {file.name}", str(error))
        return {}
    if value is None:
        skips.add(f"{where}/{file.name}", f"unreadable {file.name}", "not a JSON object")
    return value or {}


def _lines(folder: Path, where: str, skips: Skips) -> list[Mapping[str, Any]] | None:
    """The objects in ``result.json``, in the order in which they were written; None if it cannot be read."""
    file = folder / "result.json"
    if not file.exists():
        skips.add(f"{where}/result.json", "no result.json", "the model is read, its accuracies are unknown")
        return None
    try:
        texts = _json(file).splitlines()
    except WslfastError as error:
        skips.add(f"{where}/result.json", "unreadable result.json", str(error))
        return None
    objects: list[Mapping[str, Any]] = []
    for number, text in enumerate(texts):
        if not text.strip():
            continue
        value = _object(text)
        if value is None:
            skips.add(f"{where}/result.json:{number + 1}", "unreadable line of result.json")
        else:
            objects.append(value)
    return objects


def _properties(config: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
    values = {name: _number(result.get(name, result.get(name.replace("_", "/", 1)))) for name in RESULTS}
    train, test = values["train_acc"], values["test_acc"]
    values["ggap"] = train - test if train is not None and test is not None else None
    settings = {ours: next((config[name] for name in names if name in config), None) for ours, names in _SETTINGS.items()}
    stated = result.get(PROPERTIES)
    ours = {n: v for n, v in stated.items() if isinstance(v, (int, float, str))} if isinstance(stated, dict) else {}
    return {**values, **{n: v if isinstance(v, str) else _number(v) for n, v in settings.items()}, **_further(config), **ours}


def _further(config: Mapping[str, Any]) -> dict[str, Any]:
    """Every other setting of the optimiser (``optim::momentum``: momentum), and the activation."""
    taken = {name for names in _SETTINGS.values() for name in names}
    named = {name.partition("::")[2]: v for name, v in config.items() if name.startswith("optim::") and name not in taken}
    named |= {"activation": config["model::nlin"]} if "model::nlin" in config else {}
    return {n: v for n, v in named.items() if isinstance(v, str) or _number(v) is not None}


def _number(value: Any) -> float | int | None:
    ordinary = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300
    return value if ordinary else None
